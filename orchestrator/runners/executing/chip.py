"""One simulated (or real) chip with real tensors: its memory, each local instruction, its checkpoint.

A chip holds persistent tensors (flat parameter and gradient buffers, constants, optimizer state) and instances of
per-microbatch tensors. Communication is not here: `PendingCommunications` gives and takes
tensors through `read` and `write`.

Parameters are the same on all replicas, so the replica with dp = 0 saves them; optimizer state (and master copies)
likewise, unless ZeRO shards it, in which case every chip saves its own.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import assert_never

import torch

from comms.errors import RunError, UserError
from kernels.backend import OpCode, SegmentFunction, compile_segment
from kernels.optimizers import FlatOptimizer, StepStatistics
from orchestrator.models.user_code import RAISED, own_frames
from orchestrator.runners.executing.failed_segment import failed_segment
from orchestrator.runners.executing.slices import cut, joined
from orchestrator.runners.runner import BadOrder, Settings, StepRequest
from orchestrator.runs.timeline import Mark
from partitioner.capture.captured_graph import TORCH
from partitioner.program.machine import Machine, Run
from partitioner.program.program import (
    Accumulate,
    Collective,
    Compute,
    Free,
    Program,
    Recv,
    Segment,
    Send,
    Tensor,
    TensorKind,
    Update,
    Wait,
)

Observer = Callable[["ExecutingChip", Compute, int, Sequence[torch.Tensor], Sequence[torch.Tensor]], None]
State = Mapping[str, torch.Tensor]
COMMIT, STATS = "commit", "update.stats"  # the body that writes to buffers, what says whether it may
ZERO_FILLED = (TensorKind.FLAT, TensorKind.MASTER, TensorKind.GRAD)


def op_codes(segment: Segment) -> list[OpCode]:
    """A segment's ops as the kernel packages take them."""
    return [OpCode(op.code, len(op.outs), op.is_tuple) for op in segment.ops]


class SegmentLibrary:
    """Compiled segments of a Program, made when first used and shared by all chips of a process.

    One is made at a time: Python 3.11 miscounts the depth of two texts that are parsed at once (its issue 106905).
    """

    def __init__(self, program: Program, device: str) -> None:
        self.program, self.device = program, device
        self._functions: dict[int, SegmentFunction] = {}
        self._making = threading.Lock()

    def function(self, index: int) -> SegmentFunction:
        """Segment `index`, compiled."""
        if (found := self._functions.get(index)) is not None:
            return found
        with self._making:
            if index not in self._functions:
                segment = self.program.segments[index]
                self._functions[index] = compile_segment(
                    segment.name, len(segment.inputs), op_codes(segment), segment.outputs, self.device
                )
            return self._functions[index]


class ExecutingChip:
    """Tensors of one chip, and execution of its local instructions."""

    def __init__(self, program: Program, index: int, library: SegmentLibrary, settings: Settings) -> None:
        self.program, self.index, self.library, self.settings = program, index, library, settings
        self.role = program.role_of(index)
        self.coordinates = program.coordinates(index)
        self.tensors: Sequence[Tensor] = self.role.tensors
        self.fixed: list[torch.Tensor | None] = [None] * len(self.tensors)
        self.instances: dict[tuple[int, int], torch.Tensor] = {}
        self.per_microbatch = [t.is_per_microbatch for t in self.tensors]
        self.optimizers: dict[int, FlatOptimizer] = {}
        self.touched: set[int] = set()
        self.marks: list[Mark] | None = None
        self.resident: dict[int, int] | None = (
            None  # persistent storages and their bytes, while it is measured
        )
        self.step_settings: Sequence[Mapping[str, object]] = ()
        self.batches: Mapping[tuple[int, str], torch.Tensor] = {}
        self.stats: StepStatistics | None = None
        self.checked = False
        self.body = ""
        self.observer: Observer | None = None
        self.first_bad: tuple[BadOrder, str] | None = None
        for tensor in self.tensors:
            self.fixed[tensor.id] = self._allocate(tensor)
        self.whole_at = {  # parameters that must be stepped on by themselves, by the place where they begin
            (t.base, t.offset): t for t in self.tensors if t.kind is TensorKind.PARAM and program.facts["whole_tensors"]
        }  # fmt: skip

    def _allocate(self, tensor: Tensor) -> torch.Tensor | None:
        dtype, device = TORCH[tensor.spec.dtype], self.settings.device
        if tensor.base is not None:
            base = self.fixed[tensor.base]
            assert base is not None
            start = tensor.offset
            if tensor.kind is TensorKind.FLAT:  # this chip's slice of a whole buffer
                start = self.coordinates[tensor.shards[0][1]] * tensor.spec.numel
            return base.narrow(0, start, tensor.spec.numel).view(tensor.spec.shape)
        if tensor.kind is TensorKind.COORDINATE:
            axis = tensor.source.split(":")[1]
            return torch.tensor(self.coordinates[axis], dtype=dtype, device=device)
        return (
            torch.zeros(tensor.spec.shape, dtype=dtype, device=device) if tensor.kind in ZERO_FILLED else None
        )

    def load(self, values: Callable[[str], torch.Tensor]) -> None:
        """Fill parameters and buffers: `values("params:w")` or `values("buffer:b")` is the whole tensor."""
        for tensor in self.tensors:
            target = self.fixed[tensor.id]
            if tensor.kind is TensorKind.PARAM and target is not None:
                target.copy_(cut(self.program, tensor, values(f"params:{tensor.source}"), self.coordinates))
            elif tensor.kind in (TensorKind.CONSTANT, TensorKind.BUFFER) and tensor.source:
                whole = values(tensor.source)
                self.fixed[tensor.id] = whole.to(self.settings.device, TORCH[tensor.spec.dtype])
        for tensor in self.tensors:
            if tensor.kind is TensorKind.MASTER:
                self.value(tensor.id).copy_(self.named(tensor.source))

    def named(self, name: str) -> torch.Tensor:
        """A persistent tensor by name."""
        return self.value(next(t.id for t in self.tensors if t.name == name))

    def value(self, tensor: int) -> torch.Tensor:
        """A persistent tensor, which must be there."""
        value = self.fixed[tensor]
        assert value is not None, f"chip {self.index}: {self.tensors[tensor].name} has no value"
        return value

    def begin(self, request: StepRequest) -> Machine:
        """Start a schedule: fresh accumulators, fresh machine."""
        self.marks, self.checked = ([] if request.measure else None), request.check
        self.touched.clear()
        self.instances.clear()
        self.stats, self.first_bad, self.resident = None, None, None
        self.step_settings = request.settings or ({"lr": request.lr},) * len(self.settings.groups)
        self.batches = request.batches.get(self.coordinates["dp"], {})
        return Machine(self.program, self.index, request.schedule)

    def read(self, tensor: int, microbatch: int) -> torch.Tensor:
        """The current value of a tensor (of this microbatch)."""
        if not self.per_microbatch[tensor]:
            return self.value(tensor)
        found = self.instances.get((tensor, microbatch))
        return self._batch(tensor, microbatch) if found is None else found

    def _batch(self, tensor: int, microbatch: int) -> torch.Tensor:
        info = self.tensors[tensor]
        assert info.kind is TensorKind.BATCH, f"chip {self.index}: {info.name}({microbatch}) is not there"
        value = self.batches[microbatch, info.source.split(":", 1)[1]]
        self.instances[tensor, microbatch] = value
        return value

    def write(self, tensor: int, microbatch: int, value: torch.Tensor) -> None:
        """Store a value: into its buffer if the tensor is part of one, else by reference."""
        if self.per_microbatch[tensor]:
            self.instances[tensor, microbatch] = value
        elif self.tensors[tensor].kind in ZERO_FILLED:
            target = self.value(tensor)
            if target.data_ptr() != value.data_ptr():
                target.copy_(value)
        else:
            self.fixed[tensor] = value

    def is_buffer(self, tensor: int) -> bool:
        """True if writes go into a fixed buffer."""
        return self.tensors[tensor].kind in ZERO_FILLED

    def execute(self, run: Run) -> None:
        """Carry out the instructions of a run in order."""
        self.body = run.body.name
        for instruction in run.instructions:
            start = time.perf_counter_ns() if self.marks is not None else 0
            match instruction:
                case Compute():
                    self._compute(instruction, run.microbatch)
                case Free():
                    for tensor in instruction.tensors:
                        self.instances.pop((tensor, run.microbatch), None)
                    continue
                case Accumulate():
                    self._accumulate(instruction, run.microbatch)
                case Update():
                    self._update(instruction, run.microbatch)
                case Collective() | Send() | Recv() | Wait():
                    continue  # what goes between chips is carried out where they meet
                case _:
                    assert_never(instruction)
            if self.marks is not None:
                end = time.perf_counter_ns()
                place = (self.index, run.call, run.microbatch, instruction.id)
                self.marks.append(Mark(*place, start, end, self._held_bytes()))

    def _held_bytes(self) -> int:
        """What the chip's tensors take now: every storage once, without what is inside an instruction."""
        if self.resident is None:  # the persistent ones change hardly ever
            states = (value for each in self.optimizers.values() for value in each.state().values())
            self.resident = _storages(t for t in (*self.fixed, *states) if t is not None)
        # At once, as other threads bring what arrives meanwhile. Python 3.11 makes a tuple after its iterator, and may
        # collect garbage between the two; a list it makes before.
        held = list(self.instances.values())
        return sum((self.resident | _storages(held)).values())

    def _compute(self, instruction: Compute, microbatch: int) -> None:
        function = self.library.function(instruction.segment)
        operands = [self.read(t, microbatch) for t in instruction.reads]
        try:
            results = function(*operands)
        except torch.OutOfMemoryError:
            raise
        except RAISED as error:  # an operator of the user's may end with anything
            segment = self.program.segments[instruction.segment]
            place = f"{segment.name}, on chip {self.index} ({self.role.name}), microbatch {microbatch}"
            raise failed_segment(op_codes(segment), operands, self.tensors, place, error) from error
        if self.observer is not None:
            self.observer(self, instruction, microbatch, operands, results)
        for tensor, value in zip(instruction.writes, results, strict=True):
            if self.body != COMMIT or self.tensors[tensor].kind is not TensorKind.BUFFER or self._goes_on():
                self.write(tensor, microbatch, value)
        if self.checked and self.first_bad is None:
            self._look_for_nan(instruction, microbatch, results)

    def _look_for_nan(self, instruction: Compute, microbatch: int, results: Sequence[torch.Tensor]) -> None:
        if any(r.is_floating_point() and not torch.isfinite(r).all() for r in results):
            name = self.program.segments[instruction.segment].name
            place = f"chip {self.index} ({self.role.name}), microbatch {microbatch}"
            backward = self.body.startswith("backward")
            along = -self.role.stage if backward else self.role.stage
            rank = 0 if self.body.startswith("forward") else 1 if backward else 2
            order = (rank, microbatch, along, self.index)
            self.first_bad = order, f"{place}, instruction {instruction.id} ({name})"

    def _accumulate(self, instruction: Accumulate, microbatch: int) -> None:
        first: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        later: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for source, target in zip(instruction.reads, instruction.writes, strict=True):
            value = self.read(source, microbatch)
            if self.fixed[target] is None:
                spec = self.tensors[target].spec
                self.fixed[target] = torch.zeros(
                    spec.shape, dtype=TORCH[spec.dtype], device=self.settings.device
                )
            into = later if target in self.touched else first
            self.touched.add(target)
            into[0].append(self.value(target))
            into[1].append(value if value.dtype == into[0][-1].dtype else value.to(into[0][-1].dtype))
        if first[0]:
            torch._foreach_copy_(*first)
        if later[0]:
            torch._foreach_add_(*later)

    def statistics(self, stats: torch.Tensor) -> StepStatistics:
        """The reduced statistics vector as numbers."""
        squares, loss, count = stats.tolist()
        return StepStatistics(squares, loss, count, float(self.program.facts["nominal_count"]))

    def _goes_on(self, stats: int | None = None) -> bool:
        """Whether the step is finite, by its statistics; else parameters and buffers stay as they were."""
        if self.stats is None:
            self.stats = self.statistics(self.named(STATS) if stats is None else self.value(stats))
        return self.stats.is_finite

    def _update(self, instruction: Update, microbatch: int) -> None:
        optimizer = self.optimizer(instruction) if self._goes_on(instruction.stats) else None
        if optimizer is None:
            return
        try:
            self._step(instruction, optimizer, microbatch)
        except UserError:
            raise
        except RAISED as error:  # whatever an optimizer of the user's raises
            kind = type(optimizer.optimizer).__name__
            hint = "mend the optimizer, and go on from the last checkpoint"
            raise RunError(
                f"{kind}.step raised {type(error).__name__}: {error}", own_frames(error) or kind, hint
            ) from error
        if instruction.target != instruction.param:
            self.value(instruction.target).copy_(self.value(instruction.param))

    def _step(self, instruction: Update, optimizer: FlatOptimizer, microbatch: int) -> None:
        assert self.stats is not None
        scale = self.stats.gradient_scale(self.settings.clip_norm)
        settings = self.step_settings[instruction.group]
        grad, own = self.value(instruction.grad), self._stepped(instruction)
        if own is None or not instruction.whole:
            optimizer.step(grad if own is None else grad[: own.spec.numel], scale, settings)
            return
        pieces = [self.read(t, microbatch).split(grad.numel()) for t in instruction.whole]
        whole, gradient = (
            joined(own, [p[: own.spec.numel].view(own.spec.shape) for p in ps]) for ps in pieces
        )
        optimizer.param.data = whole.contiguous()
        optimizer.step(gradient.contiguous(), scale, settings)
        stepped = cut(self.program, own, optimizer.param.detach(), self.coordinates)
        self.value(instruction.param)[: own.spec.numel].copy_(stepped.reshape(-1))
        optimizer.param.data = grad.new_empty(0)  # until it is gathered again
        grad.mul_(scale)  # as a step leaves them

    def _stepped(self, instruction: Update) -> Tensor | None:
        """The parameter that must be stepped on by itself: the one whose place this chip's shard is, if any."""
        target = self.tensors[instruction.target]
        base, shard = (target.id, 0) if target.base is None else (target.base, self.coordinates["dp"])
        return self.whole_at.get((base, shard * target.spec.numel))

    def optimizer(self, instruction: Update) -> FlatOptimizer | None:
        """The optimizer of one flat group, made when first needed; None if the group has no parameter for this chip."""
        found = self.optimizers.get(instruction.param)
        if found is None:
            flat, is_whole = self.value(instruction.param), bool(self.program.facts["whole_tensors"])
            if is_whole:
                own = self._stepped(instruction)
                if own is None:
                    return None
                flat = flat.new_empty(0) if instruction.whole else flat[: own.spec.numel].view(own.spec.shape)
            settings = self.settings.groups[instruction.group] if self.settings.groups else {}
            found = FlatOptimizer(self.settings.optimizer, flat, settings, is_whole=is_whole)
            self.resident = None
            self.optimizers[instruction.param] = found
        return found


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {each.data_ptr(): each.nbytes() for each in storages}


def saved_state(chip: ExecutingChip) -> dict[str, torch.Tensor]:
    """The tensors this chip is responsible for, by name; empty if another replica saves them all."""
    state: dict[str, torch.Tensor] = {}
    if chip.coordinates["dp"] == 0:
        state |= {
            t.name: chip.value(t.id) for t in chip.tensors
            if (t.kind is TensorKind.FLAT and t.base is None) or t.kind is TensorKind.BUFFER
        }  # fmt: skip
    if chip.coordinates["dp"] == 0 or chip.program.facts["zero"]:
        state |= optimizer_state(chip)
    return state


def optimizer_state(chip: ExecutingChip) -> dict[str, torch.Tensor]:
    """What a chip's optimizers keep, and the full-precision copies that they step on, by name."""
    state = {t.name: chip.value(t.id) for t in chip.tensors if t.kind is TensorKind.MASTER}
    for param, optimizer in chip.optimizers.items():
        name = chip.tensors[param].name
        state |= {f"{name}.optimizer.{key}": value for key, value in optimizer.state().items()}
    return state


def restore_state(chip: ExecutingChip, state_of: Callable[[int], State]) -> None:
    """Put back what `saved_state` gave; `state_of(chip)` is the saved state of any chip. Optimizers must exist."""
    first = chip.program.chip_at(chip.coordinates | {"dp": 0})
    shared, own = state_of(first), state_of(chip.index if chip.program.facts["zero"] else first)
    with torch.no_grad():
        for tensor in chip.tensors:
            if tensor.kind is TensorKind.FLAT and tensor.base is None:
                chip.value(tensor.id).copy_(shared[tensor.name])
            elif tensor.kind is TensorKind.MASTER:
                chip.value(tensor.id).copy_(own[tensor.name])
            elif tensor.kind is TensorKind.BUFFER:
                chip.fixed[tensor.id] = shared[tensor.name].clone()
        for param, optimizer in chip.optimizers.items():
            prefix = f"{chip.tensors[param].name}.optimizer."
            optimizer.load({k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)})
