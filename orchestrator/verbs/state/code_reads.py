"""Code reads: the names by which a function gets at values, read off its bytecode.

Attributes and globals that it names, text that may be such a name, modules that it imports, and whether it also makes
names while it runs (`getattr` with anything but text, `vars`, `asdict`, `eval`), so that any attribute may be read.
"""

import dis
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeAlias

from kernels.trials.optimizer_reads import codes_in

Place: TypeAlias = tuple[Mapping[str, Any], str]  # a namespace and a name in it

BY_NAME = frozenset({"getattr", "hasattr"})
ANY_NAME = frozenset({
    "vars", "dir", "eval", "exec", "asdict", "astuple", "fields", "getmembers", "attrgetter", "__dict__",
    "model_dump",
})  # fmt: skip
ANY_GLOBAL = frozenset({"globals", "eval", "exec", "__globals__"})
DOTTED, FIELDS = re.compile(r"[A-Za-z_][\w.]*"), re.compile(r"[{.\[]([A-Za-z_]\w*)")
MAX_TEXT = 200  # characters: longer text is for people


@dataclass(frozen=True, slots=True)
class CodeReads:
    """What a function names; `is_open`: it may read attributes of any name."""

    names: frozenset[str]
    places: tuple[Place, ...]
    is_open: bool
    reads_all_globals: bool


def reads_of(function: FunctionType) -> CodeReads:
    """What a function and those that are defined in it read by name."""
    codes = list(codes_in(function.__code__))
    names = {n for code in codes for n in code.co_names}
    space: Mapping[str, Any] = function.__globals__
    listed = [list(dis.get_instructions(code)) for code in codes]
    found = {i.argval: None for each in listed for i in each if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    builtin = vars(sys.modules["builtins"])
    places: list[Place] = [(space, n) for n in found if n in space or n not in builtin]
    imported = [i.argval for each in listed for i in each if i.opname == "IMPORT_NAME"]
    places += [(sys.modules, full) for name in imported for full in _full_names(name, space)]
    is_open = bool(names & ANY_NAME) or any(_makes_names(each) for each in listed)
    text = {n for code in codes for each in _texts(code.co_consts) for n in _names_in(each)}
    return CodeReads(frozenset(names | text), tuple(places), is_open, bool(names & ANY_GLOBAL))


def _full_names(name: str, space: Mapping[str, Any]) -> Iterator[str]:
    """A module's names in `sys.modules`: how many packages up it is depends on dots that only the parser saw."""
    parts = str(space.get("__package__") or "").split(".")
    for end in range(len(parts) + 1):
        yield ".".join([p for p in parts[:end] if p] + [name] * bool(name))


def _texts(consts: Sequence[object]) -> Iterator[str]:
    for each in consts:
        if isinstance(each, str):
            yield each
        elif isinstance(each, tuple | frozenset):
            yield from _texts(tuple(each))


def _names_in(text: str) -> list[str]:
    """Of `beta`, `model.beta` or `{0.beta}`; words of sentences are none."""
    if len(text) > MAX_TEXT:
        return []
    return text.split(".") if DOTTED.fullmatch(text) else FIELDS.findall(text) if "{" in text else []


def _makes_names(listed: Sequence[dis.Instruction]) -> bool:
    """Whether `getattr` is used with anything but text, or passed on."""
    return any(
        each.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        and each.argval in BY_NAME
        and not _is_text(listed[at + 1 :])
        for at, each in enumerate(listed)
    )


def _is_text(rest: Sequence[dis.Instruction]) -> bool:
    """Whether the second argument of the call that begins here is a constant: one instruction, then the next argument.

    The stack's height above the function tells where arguments begin.
    """
    height, last = 0, {1: -2, 2: -2}
    for at, each in enumerate(rest):
        last[height] = at
        height += dis.stack_effect(each.opcode, each.arg, jump=False)
        if height <= 0 and at:
            begin = last[1]
            return begin >= 0 and last[2] == begin + 1 and isinstance(rest[begin].argval, str) \
                and rest[begin].opname == "LOAD_CONST"  # fmt: skip
    return False
