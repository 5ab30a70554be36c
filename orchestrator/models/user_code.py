"""User code: objects that a job names by `file.py:name` or `pkg.module:name`, and calls of them.

What the user's code raises becomes an error with the user's own lines, innermost first, and none of ours. A file is
read once a process (again when it has changed), also where another file imports it, so that its classes and globals
are the same for the model and its data. Neighbours are found in its folder, modules in the current folder too, as
`python` does; a name that would find another module than the file that lies there is refused.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from comms.errors import ModelError, UserError
from orchestrator.config.schema import nearest

PREFIX = "orchestrate_user_"  # of the modules that files become
PACKAGE_FOLDERS = {  # on a cluster each of them may lie in a folder of its own
    name: Path(spec.origin).parent
    for name in ("orchestrator", "comms", "partitioner", "kernels")
    if (spec := importlib.util.find_spec(name)) is not None and spec.origin is not None
}
OURS = tuple(map(str, PACKAGE_FOLDERS.values()))
RAISED = (
    Exception,
    SystemExit,
)  # what code of the user's may end with, as a script without a main guard does
MAX_FRAMES = 3
MAX_NAMES = 12


def named_object(text: str, key: str) -> object:
    """The object that the job's `key` names. Raises ModelError."""
    target, _, name = text.rpartition(":")
    found: object = _from_file(Path(target), key) if target.endswith(".py") else _from_module(target, key)
    module = found
    for part in name.split("."):
        if not hasattr(found, part):
            alike = nearest(name, tuple(n for n, v in vars(module).items() if callable(v) and n[:1] != "_"))
            hint = alike if alike.startswith("did you mean") else f"it defines {_defined(module)}"
            raise ModelError(f"{target} has no {name!r}", key, hint)
        found = getattr(found, part)
    return found


def called(function: Callable[..., object], text: str, key: str, *args: object, **kwargs: object) -> object:
    """What a function of the user's returns. Raises ModelError with the user's own lines."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        hint = f"it is {text}{inspect.signature(function)}"
        raise ModelError(f"{text} cannot be called so: {error}", key, hint) from error
    except ValueError:  # some builtins have no signature
        pass
    try:
        return function(*args, **kwargs)
    except UserError:
        raise
    except RAISED as error:
        raise raised(error, text, key) from error


def raised(error: BaseException, text: str, key: str) -> ModelError:
    """What the user's code raised, with its own frames."""
    said = " ".join(str(error).split())
    problem = f"{text} raised {type(error).__name__}{f': {said}' if said else ''}"
    return ModelError(problem, own_frames(error) or key, f"mend {key}; -v shows the whole traceback")


def own_frames(error: BaseException) -> str:
    """The user's lines that an error passed through, innermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((*OURS, "<")) and "site-packages" not in f.filename
           and not f.filename.startswith(str(Path(importlib.__file__).parent.parent))]  # fmt: skip
    lines = [f"{f.filename}:{f.lineno} in {f.name} ({f.line})" for f in reversed(own)]
    return ", from ".join(lines[:MAX_FRAMES])


def own_sources() -> dict[str, str]:
    """Digests of the user's files that have been imported, by the names of their modules."""
    found: dict[str, str] = {}
    for name, path in sorted(own_files()):
        known = path.name if name.startswith(PREFIX) else f"{name.replace('.', '/')}.py"
        found[known] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def own_files() -> Iterator[tuple[str, Path]]:
    """The user's modules that have been imported, and their files: not ours, Python's, or of what is installed."""
    library = str(Path(importlib.__file__).parent.parent)
    for name, module in list(sys.modules.items()):
        path = str(getattr(module, "__dict__", {}).get("__file__") or "")
        is_code = path.endswith(".py") and not path.startswith((*OURS, library)) and "-packages" not in path
        if is_code and Path(path).is_file():
            yield name, Path(path)


def first_parameter(function: Callable[..., object]) -> inspect.Parameter | None:
    """What a function is given first, if that can be told."""
    try:
        return next(iter(inspect.signature(function).parameters.values()), None)
    except (ValueError, TypeError):
        return None


def _defined(module: object) -> str:
    """The names of what a module defines itself, or else of all it has."""
    has = {n: v for n, v in vars(module).items() if not n.startswith("_")}
    own = [n for n, v in has.items() if getattr(v, "__module__", None) == getattr(module, "__name__", "")]
    names = sorted(own or (n for n, v in has.items() if not isinstance(v, ModuleType)))
    return ", ".join(names[:MAX_NAMES]) + ", ..." * (len(names) > MAX_NAMES) or "nothing"


def _from_file(path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"no file {path}", key, "give a Python file's path")
    whole, stat = path.resolve(), path.stat()
    mark = f"{hash((str(whole), stat.st_mtime_ns, stat.st_size)) % 2**64:x}"
    name = f"{PREFIX}{path.stem}_{mark}"
    if name in sys.modules:
        return sys.modules[name]
    if (imported := sys.modules.get(path.stem)) is not None and _lies_at(imported, whole):
        if imported.__name__ == path.stem:  # a neighbour has imported it: one file is one module
            sys.modules[name] = imported
            return imported
        del sys.modules[path.stem]  # it has changed since
    found = importlib.util.spec_from_file_location(name, whole)
    assert found is not None and found.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(found)
    _require_own_neighbours(whole, key, set())
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    aliases = [name]
    if path.stem not in sys.modules and importlib.util.find_spec(path.stem) is None:
        aliases.append(path.stem)  # as its neighbours import it
        sys.modules[path.stem] = module
    try:
        with _looking_first_in(str(whole.parent)):
            found.loader.exec_module(module)
    except RAISED as error:
        for alias in aliases:
            del sys.modules[alias]
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{type(error).__name__}: {said}", own_frames(error) or str(path),
                         "make the file importable on its own") from error  # fmt: skip
    return module


def _lies_at(module: ModuleType, path: Path) -> bool:
    held = getattr(module, "__file__", None)
    return held is not None and Path(held).resolve() == path


def _require_own_neighbours(path: Path, key: str, seen: set[Path]) -> None:
    """Refuse imports that would find another module than the file of that name beside them."""
    seen.add(path)
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # running it says so
        return
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    for root in sorted({name.partition(".")[0] for name in names}):
        for beside in (path.parent / root / "__init__.py", path.parent / f"{root}.py"):
            if not beside.is_file() or beside in seen:
                continue
            if (other := sys.modules.get(root)) is not None and not _lies_at(other, beside.resolve()):
                there = getattr(other, "__file__", None) or "Python's own"
                raise ModelError(f"{path} imports {root}, which is {there} here, not the one beside it", key,
                                 f"rename {beside.name}")  # fmt: skip
            _require_own_neighbours(beside, key, seen)


def _from_module(target: str, key: str) -> ModuleType:
    _look_in(str(Path.cwd()))
    root = target.partition(".")[0]
    spec = importlib.util.find_spec(root) if root else None
    for local in (Path(root, "__init__.py"), Path(f"{root}.py")):
        if local.is_file() and (spec is None or spec.origin != str(local.resolve())):
            there = spec.origin if spec is not None else "another"
            raise ModelError(
                f"{root} is {there}, not {local} in this folder", key, "give the path of the .py file"
            )
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{target}.".startswith(f"{error.name}."):
            raise raised(error, target, key) from error
        hint = "install the package, or give the path of a .py file"
        raise ModelError(f"no module {target!r}", key, hint) from error
    except RAISED as error:
        raise raised(error, target, key) from error


@contextmanager
def _looking_first_in(folder: str) -> Iterator[None]:
    """As Python does for a script; afterwards the folder comes last, so that nothing else finds its files first."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        _look_in(folder)


def _look_in(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
