"""Own modules: the user's Python files that define operators, as text that another process can import.

A Program names operators of the user's (`torch.library`) and does not hold their code: whoever executes it imports the
modules that were imported here, from their text, under their names and in their order. Files that such a module reads
beside itself do not travel.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from comms.errors import ModelError
from orchestrator.models.user_code import own_files

MAIN, AS_MAIN = "__main__", "__mp_main__"  # a script is not run as one again: as multiprocessing names it


@dataclass(frozen=True, slots=True)
class OwnModule:
    """One module: all names that it is known by, its file for messages, and its text."""

    names: tuple[str, ...]
    file: str
    text: str
    is_package: bool


def own_modules() -> tuple[OwnModule, ...]:
    """Those of the user's that this process has imported, in the order in which it did."""
    known: dict[Path, list[str]] = {}
    for name, file in own_files():
        known.setdefault(file, []).append(AS_MAIN if name == MAIN else name)
    return tuple(
        OwnModule(tuple(names), str(file), file.read_text(encoding="utf-8"), file.name == "__init__.py")
        for file, names in known.items()
    )


def import_modules(modules: Sequence[OwnModule]) -> None:
    """Have them here too, unless they are. Raises ModelError with the file of one that does not run."""
    finder = _Finder({name: module for module in modules for name in module.names})
    sys.meta_path.insert(0, finder)
    try:
        for module in modules:
            try:
                found = importlib.import_module(module.names[0])
            except Exception as error:  # what the user's code raises
                problem = f"{Path(module.file).name} cannot be imported by an actor: {type(error).__name__}: {error}"
                hint = "have it import without files beside it, which do not travel"
                raise ModelError(problem, module.file, hint) from error
            for name in module.names[1:]:
                sys.modules.setdefault(name, found)
    finally:
        sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules in a table of texts; what one imports of another is found there as well."""

    def __init__(self, modules: dict[str, OwnModule]) -> None:
        self.modules = modules

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.modules:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=self.modules[name].is_package)

    def exec_module(self, module: ModuleType) -> None:
        own = self.modules[module.__name__]
        module.__file__ = own.file
        for name in own.names:
            sys.modules.setdefault(name, module)
        exec(compile(own.text, own.file, "exec"), vars(module))
