"""Header: what precedes a tensor on the wire, and the limits that it is held to before anything is done for it.

Reading a header allocates nothing but the header: sizes are checked against what has arrived first. A message that
breaks a rule is a `BadMessage`; it says what is wrong with it and harms nobody but its sender.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import msgpack

from partitioner.capture.captured_graph import TORCH
from partitioner.program.machine import Key

MAX_HEADER_BYTES = 1 << 20  # the chips of a group are listed
MAX_NAME = 4096  # characters of a kind, which may hold a parameter's name
MAX_CHIPS = 1 << 17
MAX_DIMS = 64  # torch's own limit
MAX_NUMBER = 1 << 62
MAX_TENSOR_BYTES = 1 << 40


class BadMessage(ValueError):
    """A message that no sound peer sends."""


class Header(NamedTuple):
    """`sequence` counts the sender's messages to this end. `block`: where the bytes are; None if they follow."""

    sequence: int
    epoch: int
    kind: str
    chips: tuple[int, ...]
    number: int
    source: int
    dtype: str
    shape: tuple[int, ...]
    block: int | None

    @property
    def key(self) -> Key:
        return Key(self.kind, self.chips, self.number)

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * TORCH[self.dtype].itemsize

    def packed(self) -> bytes:
        """As it is sent."""
        packed: bytes = msgpack.packb(self)
        return packed


def read_header(content: bytes | memoryview) -> Header:
    """The header in a frame. Raises BadMessage."""
    if len(content) > MAX_HEADER_BYTES:
        raise BadMessage(f"a header of {len(content)} bytes")
    try:
        fields = msgpack.unpackb(
            content, use_list=False, max_str_len=MAX_NAME, max_bin_len=0, max_array_len=MAX_CHIPS,
            max_map_len=0, max_ext_len=0,
        )  # fmt: skip
    # Bytes that are no msgpack, text that is no UTF-8, or what is deeper than msgpack follows
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadMessage(f"no header: {type(error).__name__}") from error
    if not isinstance(fields, tuple) or len(fields) != len(Header._fields):
        raise BadMessage("no header: another number of fields")
    for name, value in zip(Header._fields, fields, strict=True):
        if not RULES[name](value):
            raise BadMessage(f"a header whose {name} cannot be")
    header = Header(*fields)
    if header.nbytes > MAX_TENSOR_BYTES:
        raise BadMessage(f"a tensor of {header.nbytes} bytes")
    return header


def _is_count(value: object, limit: int = MAX_NUMBER) -> bool:
    return type(value) is int and 0 <= value < limit


def _are_counts(value: object, limit: int = MAX_NUMBER) -> bool:
    return isinstance(value, tuple) and all(_is_count(each, limit) for each in value)


RULES: dict[str, Callable[[object], bool]] = {
    "sequence": _is_count,
    "epoch": _is_count,
    "kind": lambda value: isinstance(value, str) and value != "",
    "chips": lambda value: _are_counts(value, MAX_CHIPS),
    "number": _is_count,
    "source": lambda value: value == -1 or _is_count(value, MAX_CHIPS),
    "dtype": lambda value: isinstance(value, str) and value in TORCH,
    "shape": lambda value: _are_counts(value) and len(value) <= MAX_DIMS,  # type: ignore[arg-type]  # a tuple then
    "block": lambda value: value is None or _is_count(value, 1 << 31),
}
