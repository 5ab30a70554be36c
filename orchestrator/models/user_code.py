"""User code: objects that a job names by `file.py:name` or `pkg.module:name`, and calls of them.

What the user's code raises becomes an error with the user's own lines, innermost first, and none of ours. A file is
read once a process (again when it has changed), so that classes of one file are the same for the model and its data;
its folder is where it finds its neighbours, and modules are found in the current folder too, as `python` does.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from comms.errors import ModelError, UserError

PREFIX = "orchestrate_user_"  # of the modules that files become
OURS = tuple(
    str(Path(__file__).parents[2] / name) for name in ("orchestrator", "partitioner", "kernels", "comms")
)
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
            raise ModelError(f"{target} has no {name!r}", key, f"it defines {_defined(module)}")
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
    library = str(Path(importlib.__file__).parent.parent)
    found: dict[str, str] = {}
    for name, module in sorted(sys.modules.items()):
        path = str(getattr(module, "__dict__", {}).get("__file__") or "")
        is_own = path.endswith(".py") and not path.startswith((*OURS, library)) and "-packages" not in path
        if is_own and Path(path).is_file():
            known = Path(path).name if name.startswith(PREFIX) else f"{name.replace('.', '/')}.py"
            found[known] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return found


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
    found = importlib.util.spec_from_file_location(name, whole)
    assert found is not None and found.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    _look_in(str(whole.parent))
    try:
        found.loader.exec_module(module)
    except RAISED as error:
        del sys.modules[name]
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{type(error).__name__}: {said}", own_frames(error) or str(path),
                         "make the file importable on its own") from error  # fmt: skip
    return module


def _from_module(target: str, key: str) -> ModuleType:
    _look_in(str(Path.cwd()))
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{target}.".startswith(f"{error.name}."):
            raise raised(error, target, key) from error
        hint = "install the package, or give the path of a .py file"
        raise ModelError(f"no module {target!r}", key, hint) from error
    except RAISED as error:
        raise raised(error, target, key) from error


def _look_in(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
