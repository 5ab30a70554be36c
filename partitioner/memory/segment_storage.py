"""Storage inside a segment: which values share memory, and how much a run of it needs beyond its inputs.

A view shares the storage of its first operand; every other operation makes new storage. A value's storage goes after
the last use of the last value that shares it, unless an output of the segment shares it. Not modelled: scratch memory
inside a kernel, the allocator's rounding and fragmentation, fusion that keeps a value in registers.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from partitioner.program.program import Op, Segment

VALUE = re.compile(r"\bv(\d+)\b")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
SELECTED = re.compile(r"getitem\(v\d+, (\d+)\)")


def operands(op: Op) -> tuple[int, ...]:
    """The values an operation reads, in the order in which they stand in its code."""
    arguments = op.code.partition("(")[2]
    if "'" in arguments or '"' in arguments:
        arguments = QUOTED.sub("", arguments)
    return tuple(map(int, VALUE.findall(arguments)))


def is_view(op: Op) -> bool:
    """True for operations that move no bytes: their result shares its first operand's storage."""
    return op.read_bytes == 0 and op.write_bytes == 0


@dataclass(frozen=True, slots=True)
class Output:
    """Where an output of a segment lies: storage `storage` (an input's number if it is a view of that input)."""

    storage: int
    nbytes: int  # of the whole storage; 0 for an input's


@dataclass(frozen=True, slots=True)
class Footprint:
    """A segment's memory: its outputs, and the largest sum of storage that it made and still holds.

    `kept_at_peak` is the part of `peak_bytes` that later leaves the segment as outputs.
    """

    outputs: tuple[Output, ...]
    peak_bytes: int
    kept_at_peak: int


def footprint(segment: Segment) -> Footprint:
    """Walk the operations once; O(operations + operands)."""
    storages = _storages(segment)
    kept = {storages.of[v][0] for v in segment.outputs}
    due = _last_uses(segment, storages, kept)
    live = held = peak = kept_at_peak = 0
    for index in range(len(segment.ops)):
        made = storages.made.get(index, ())
        live += sum(storages.nbytes[s] for s in made)
        held += sum(storages.nbytes[s] for s in made if s in kept)
        if live > peak:
            peak, kept_at_peak = live, held
        live -= sum(storages.nbytes[s] for s in due.get(index, ()))
    outputs = tuple(_output(storages, v) for v in segment.outputs)
    return Footprint(outputs, peak, kept_at_peak)


@dataclass
class _Storages:
    """`of[v]`: the storages of value v (one per element of a tuple); storage s < number of inputs is input s."""

    of: list[tuple[int, ...]] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    made: dict[int, tuple[int, ...]] = field(default_factory=dict)


def _storages(segment: Segment) -> _Storages:
    found = _Storages([(i,) for i in range(len(segment.inputs))], [0] * len(segment.inputs))
    for index, op in enumerate(segment.ops):
        sources = operands(op)
        if sources and is_view(op):
            found.of.append(_viewed(segment, op, sources[0], found.of[sources[0]]))
            continue
        first = len(found.nbytes)
        found.nbytes += [spec.nbytes for spec in op.outs]
        found.made[index] = tuple(range(first, len(found.nbytes)))
        found.of.append(found.made[index])
    return found


def _viewed(segment: Segment, op: Op, source: int, storages: tuple[int, ...]) -> tuple[int, ...]:
    """A view's storage: its operand's, or for `getitem` that of the chosen element."""
    chosen = SELECTED.match(op.code)
    if chosen is None or len(storages) < 2 or not op.outs:
        return storages[:1]
    specs = segment.ops[source - len(segment.inputs)].outs
    index = int(chosen[1])  # counts also what is no tensor, so that it may point beside its element
    if index >= len(specs) or specs[index] != op.outs[0]:
        index = specs.index(op.outs[0]) if op.outs[0] in specs else 0
    return (storages[index],)


def _last_uses(segment: Segment, storages: _Storages, kept: Iterable[int]) -> dict[int, list[int]]:
    """Storages to drop after each operation."""
    last: dict[int, int] = {}
    for index, op in enumerate(segment.ops):
        for storage in storages.of[len(segment.inputs) + index]:
            last[storage] = index
        for value in operands(op):
            for storage in storages.of[value]:
                last[storage] = index
    due: dict[int, list[int]] = {}
    for storage, index in last.items():
        if storage >= len(segment.inputs) and storage not in kept:
            due.setdefault(index, []).append(storage)
    return due


def _output(storages: _Storages, value: int) -> Output:
    storage = storages.of[value][0]
    return Output(storage, storages.nbytes[storage])
