"""The Program: what every chip does in one training step, per role instead of per chip.

A *role* is an equivalence class of chips (here: a pipeline stage). Its *bodies* are short ordered lists of
instructions (forward of one microbatch, backward of one microbatch, update, ...) and its *schedule* is the
order in which bodies are called, so a Program for 100,000 chips and 96 microbatches is as small as one for 8
chips. Peers and groups are named by mesh axes; coordinates are inputs (`TensorKind.COORDINATE`), never constants.

A *segment* is a straight run of tensor operations between two communications. Its operations are kept as one
expression each (`aten.mm.default(v0, v3)`), with the shapes, FLOPs and bytes that a cost model needs.

This module is torch-free. Text form and msgpack codec: `program_text.py`, `program_codec.py`.
Not here: validity (`static_check.py`), memory (`peak_memory.py`), timing (runners).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Annotated, ClassVar, TypeAlias

VERSION = 4
VALUE = re.compile(r"\bv(\d+)\b")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")

DTYPE_BYTES: Mapping[str, int] = {
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "b8": 1, "c64": 8,
    "c128": 16,
}  # fmt: skip


class TensorKind(StrEnum):
    """What a tensor is for; decides its lifetime and its class in the memory report."""

    PARAM = "param"  # a model parameter's local shard (usually a view into a FLAT buffer)
    FLAT = "flat"  # one buffer that holds many parameters end to end
    MASTER = "master"  # full-precision copy that the optimizer updates
    GRAD = "grad"  # gradient accumulator, lives across the microbatches of a step
    STATE = "state"  # optimizer state, accounted for by element count
    CONSTANT = "constant"  # computed once before the first step (masks, rotary tables), or a model buffer
    BUFFER = "buffer"  # a model buffer that the forward changes: the new value holds from the next step on
    COORDINATE = "coordinate"  # this chip's index along a mesh axis, a 0-dim integer
    BATCH = "batch"  # model input, one per microbatch
    ACTIVATION = "activation"  # anything computed in a microbatch
    SCALAR = "scalar"  # persistent small results (loss, count, norms)


MICROBATCH_KINDS = frozenset({TensorKind.BATCH, TensorKind.ACTIVATION})


class CollectiveOp(StrEnum):
    """Collectives a Program may use; `comms` decides how each is carried out and what it costs."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    BROADCAST = "broadcast"


class Reduction(StrEnum):
    """How contributions are combined; NONE for collectives that only move data."""

    NONE = "none"
    SUM = "sum"
    AVG = "avg"
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a value; prints as `f32[4,256,192]`."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("f", "bf"))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def local_length(sections: Sequence[int], parts: int) -> int:
    """What one of `parts` chips holds of a dim whose sections are each cut by itself; rounded up."""
    return sum(-(-length // parts) for length in sections)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a role.

    `shards` says how the local tensor is cut from the global one: ((dim, axis), ...). `sections`: lengths of the parts
    that the global dim consists of where each is cut by itself (query, key and value in one weight), or where they do
    not divide: slices are then padded with zeros at the end.
    `base`: the id of the buffer this one is a view of, at element `offset` (or, with `shards`, the slice that
    belongs to the chip's coordinate). `source`: global name of a parameter, buffer or batch entry.
    """

    id: int
    name: str
    kind: TensorKind
    spec: TensorSpec
    shards: tuple[tuple[int, str], ...] = ()
    base: int | None = None
    offset: int = 0
    source: str = ""
    sections: tuple[int, ...] = ()

    @property
    def is_per_microbatch(self) -> bool:
        return self.kind in MICROBATCH_KINDS


@dataclass(frozen=True, slots=True)
class Operation:
    """One tensor operation: `code` is a call whose operands are earlier values `v<i>`."""

    code: str
    outs: tuple[TensorSpec, ...]
    is_tuple: bool
    flops: int
    read_bytes: int
    write_bytes: int

    @property
    def target(self) -> str:
        return self.code.partition("(")[0]

    @property
    def operands(self) -> tuple[int, ...]:
        """The values it reads, in the order in which they stand in its code."""
        arguments = self.code.partition("(")[2]
        if "'" in arguments or '"' in arguments:
            arguments = QUOTED.sub("", arguments)
        return tuple(map(int, VALUE.findall(arguments)))


@dataclass(frozen=True, slots=True)
class Segment:
    """A straight run of ops: values v0..v(n-1) are the inputs, op i defines value v(n+i)."""

    id: int
    name: str
    inputs: tuple[TensorSpec, ...]
    ops: tuple[Operation, ...]
    outputs: tuple[int, ...]

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    @property
    def nbytes(self) -> int:
        return sum(op.read_bytes + op.write_bytes for op in self.ops)


@dataclass(frozen=True, slots=True)
class Group:
    """Chips that meet in a collective: those that differ only along `axes` (and, of pp, are in `stages`)."""

    axes: tuple[str, ...]
    stages: tuple[int, ...] = ()

    def __str__(self) -> str:
        restricted = "@" + "+".join(map(str, self.stages)) if self.stages else ""
        return "*".join(self.axes) + restricted


class Holds(StrEnum):
    """What a field of an instruction holds: decides its text, its packed form, its effects and its check."""

    READ = "read"  # tensors whose value is used
    WRITTEN = "written"  # tensors that have a new value afterwards (for transfers: after the Wait)
    CHANGED = "changed"  # tensors that are read, and written in place
    NAMED = "named"  # tensors that are mentioned, their values neither used nor made
    SEGMENT = "segment"
    STAGE = "stage"  # another pipeline stage
    GROUP = "group"
    OP = "op"  # the collective; stands for the verb in the text
    REDUCTION = "reduction"  # not written where there is none
    DIM = "dim"  # not written where it is 0
    SETTINGS = "settings"  # the group of optimizer settings that apply


Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Compute:
    """Run a segment. Blocks the compute lane."""

    FORM: ClassVar = "compute {segment} {reads} -> {writes}"
    id: int
    segment: Annotated[int, Holds.SEGMENT]
    reads: Annotated[Ids, Holds.READ]
    writes: Annotated[Ids, Holds.WRITTEN]


@dataclass(frozen=True, slots=True)
class Accumulate:
    """Add `reads[i]` into the accumulators `writes[i]`; the first addition of a step overwrites them."""

    FORM: ClassVar = "accumulate {reads} -> {writes}"
    id: int
    reads: Annotated[Ids, Holds.READ]
    writes: Annotated[Ids, Holds.WRITTEN]


@dataclass(frozen=True, slots=True)
class Collective:
    """Start a collective over `group`; asynchronous, finished by a `Wait` on what it writes."""

    FORM: ClassVar = "{op} {reduction} {group} {reads} -> {writes} dim={dim}"
    id: int
    op: Annotated[CollectiveOp, Holds.OP]
    reduction: Annotated[Reduction, Holds.REDUCTION]
    group: Annotated[Group, Holds.GROUP]
    dim: Annotated[int, Holds.DIM]
    reads: Annotated[Ids, Holds.READ]
    writes: Annotated[Ids, Holds.WRITTEN]


@dataclass(frozen=True, slots=True)
class Send:
    """Start sending `tensor` to the chip with the same coordinates in stage `to`; asynchronous."""

    FORM: ClassVar = "send {tensor} to {to}"
    id: int
    tensor: Annotated[int, Holds.READ]
    to: Annotated[int, Holds.STAGE]


@dataclass(frozen=True, slots=True)
class Recv:
    """Start receiving `tensor` from the chip with the same coordinates in stage `source`; asynchronous."""

    FORM: ClassVar = "recv {tensor} from {source}"
    id: int
    tensor: Annotated[int, Holds.WRITTEN]
    source: Annotated[int, Holds.STAGE]


@dataclass(frozen=True, slots=True)
class Wait:
    """Block until every pending operation that writes `tensors` has finished."""

    FORM: ClassVar = "wait {tensors}"
    id: int
    tensors: Annotated[Ids, Holds.NAMED]


@dataclass(frozen=True, slots=True)
class Free:
    """Drop `tensors` (of this microbatch); one still being sent goes when the transfer ends."""

    FORM: ClassVar = "free {tensors}"
    id: int
    tensors: Annotated[Ids, Holds.NAMED]


@dataclass(frozen=True, slots=True)
class Update:
    """Optimizer step on `param` (a flat buffer or this chip's shard of one), predicated on finite statistics.

    `stats` is the reduced vector (sum of squared gradients, loss sum, count); `target`, if not `param`, gets
    `param` cast to its dtype afterwards. `group`: which of the optimizer's groups of settings applies. `whole`, where
    the optimizer looks at whole parameters that tp cuts: `param` and `grad` of all chips of the tp group, end to end.
    """

    FORM: ClassVar = "update {param} grad={grad} stats={stats} target={target} group={group} {whole}"
    id: int
    param: Annotated[int, Holds.CHANGED]
    grad: Annotated[int, Holds.READ]
    stats: Annotated[int, Holds.READ]
    target: Annotated[int, Holds.WRITTEN]
    group: Annotated[int, Holds.SETTINGS]
    whole: Annotated[Ids, Holds.READ] = ()


# A new instruction: its class above, its name at the end here (the place is its code in the packed form). Text, codec,
# effects and the checks that all instructions get follow from its FORM and what its fields hold; what it costs and how
# a chip carries it out is left to the runners (`step_costs.py`, `chip.py`).
Instruction: TypeAlias = Compute | Accumulate | Collective | Send | Recv | Wait | Free | Update


@dataclass(frozen=True, slots=True)
class Body:
    """A named run of instructions, called once per microbatch or once per step."""

    name: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One execution of a body; `microbatch` selects the instance of per-microbatch tensors."""

    body: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.body}({self.microbatch})"


@dataclass(frozen=True)
class Role:
    """All chips of one pipeline stage."""

    stage: int
    tensors: tuple[Tensor, ...]
    bodies: tuple[Body, ...]
    schedules: tuple[tuple[str, tuple[Call, ...]], ...]

    @property
    def name(self) -> str:
        return f"stage {self.stage}"

    @cached_property
    def body(self) -> Mapping[str, Body]:
        return {body.name: body for body in self.bodies}

    @cached_property
    def schedule(self) -> Mapping[str, tuple[Call, ...]]:
        return dict(self.schedules)


@dataclass(frozen=True)
class Program:
    """Everything the chips do: `axes` slowest first, one role per pipeline stage.

    `meta` carries facts about the whole step (samples, tokens, model FLOPs, dtype, names); see `lower.py`.
    """

    axes: tuple[tuple[str, int], ...]
    microbatches: int
    segments: tuple[Segment, ...]
    roles: tuple[Role, ...]
    meta: tuple[tuple[str, str | int | float], ...] = ()

    @cached_property
    def facts(self) -> Mapping[str, str | int | float]:
        return dict(self.meta)

    @property
    def num_chips(self) -> int:
        return prod(size for _, size in self.axes)

    def size(self, axis: str) -> int:
        """Number of chips along `axis` (1 when the mesh has no such axis)."""
        return dict(self.axes).get(axis, 1)

    def coordinates(self, chip: int) -> dict[str, int]:
        """Mesh coordinates of a chip: row-major, last axis fastest."""
        found: dict[str, int] = {}
        for axis, size in reversed(self.axes):
            chip, found[axis] = divmod(chip, size)
        return found

    def chip_at(self, coordinates: Mapping[str, int]) -> int:
        """Inverse of `coordinates`."""
        chip = 0
        for axis, size in self.axes:
            chip = chip * size + coordinates[axis]
        return chip

    def role_of(self, chip: int) -> Role:
        """The role that a chip plays: that of its pipeline stage."""
        return self.roles[self.coordinates(chip)["pp"]]

    def members(self, group: Group, chip: int) -> tuple[int, ...]:
        """The chips that meet `chip` in `group`, in chip order (the order of every reduction)."""
        places = [self.coordinates(chip)]
        for axis in group.axes:
            places = [at | {axis: index} for at in places for index in self.along(group, axis)]
        return tuple(sorted(map(self.chip_at, places)))

    def along(self, group: Group, axis: str) -> Sequence[int]:
        """The coordinates along `axis` that a group spans."""
        return group.stages if axis == "pp" and group.stages else range(self.size(axis))

    def peer(self, chip: int, stage: int) -> int:
        """The chip with the same coordinates as `chip` in another stage."""
        return self.chip_at(self.coordinates(chip) | {"pp": stage})
