"""Sketches: the Programs of any plan of a job, and tables of its units, for the clock alone.

Two captures, for parts of two sizes, give those of every other size (`other_samples`); where they do not, or where a
size cannot be captured, that is found out size by size. Nothing is proved of a sketch: who runs a plan has it made by
`preparation`.

Unit tables are kept in the user's cache, under all that decides them, and so is the reason why a size or a degree is
refused: what was searched before needs neither torch nor the model.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from comms.errors import CaptureError, PartitionError, UserError
from comms.selection.progress import Progress
from orchestrator.config.job_file import Job
from orchestrator.planning.preparation import key_of, remembered
from partitioner.layout.parallel_plan import Plan
from partitioner.program.other_samples import with_samples
from partitioner.program.program import Program
from partitioner.program.program_codec import decode, encode
from partitioner.program.unit_table import UnitTable

if TYPE_CHECKING:
    from partitioner.capture.captured_graph import Graph
    from partitioner.lowering.lower import StepShape

REFUSED = b"refused: "
REFUSALS: dict[str, type[UserError]] = {"capture": CaptureError, "partition": PartitionError}
TRIES = 4  # sizes that are tried until two are found


class Capture(Protocol):
    """What is captured: a job's model, or one that somebody holds. `content`: see `JobCapture`."""

    @property
    def job(self) -> Job: ...
    @property
    def progress(self) -> Progress: ...
    @property
    def content(self) -> dict[str, object] | None: ...
    @property
    def shape(self) -> "StepShape": ...
    def graph_of(self, samples: int) -> "Graph": ...


@dataclass
class Sketches:
    """Those of one job; `samples`: the sizes of parts that are asked for, ascending."""

    capture: Capture
    samples: Sequence[int]
    _tables: dict[tuple[int, int], UnitTable] = field(default_factory=dict)
    _captured: dict[tuple[int, int], Program | UserError] = field(default_factory=dict)
    _graphs: "dict[int, Graph | UserError]" = field(default_factory=dict)
    _bases: list[int] = field(default_factory=list)

    @property
    def num_units(self) -> int:
        """Pieces of the model, each of which could be a pipeline stage. Raises CaptureError or PartitionError."""
        return len(self.table(self._first_tp, self.bases[0]).role_of)

    @property
    def _first_tp(self) -> int:
        return self.capture.job.plan.tp or 1

    @property
    def bases(self) -> Sequence[int]:
        """The sizes that others follow from: one or two. Raises what the first was refused for where none works."""
        if not self._bases:
            errors: list[UserError] = []
            order = dict.fromkeys([*self.samples[:2], *self.samples[-1:], *self.samples[2:]])
            for samples in list(order)[:TRIES]:
                try:
                    self._units(self._first_tp, samples)
                except (CaptureError, PartitionError) as error:
                    errors.append(error)
                    continue
                self._bases.append(samples)
                if len(self._bases) == 2:
                    break
            if not self._bases:
                raise errors[0]
        return self._bases

    def table(self, tp: int, samples: int) -> UnitTable:
        """What a search must know. Raises PartitionError for what cannot be captured or cut."""
        if (tp, samples) not in self._tables:
            try:
                self._tables[tp, samples] = UnitTable(self._at(samples, partial(self._units, tp)))
            except CaptureError as error:
                raise PartitionError(error.problem, error.where, error.hint) from error
        return self._tables[tp, samples]

    def program(self, plan: Plan, samples: int) -> Program:
        """The unchecked Program of a plan whose parts are of so many samples. Raises PartitionError or CaptureError."""
        return self._at(samples, partial(self._lowered, plan))

    def _at(self, samples: int, made: Callable[[int], Program]) -> Program:
        """What is made for a size: from two others, if they tell."""
        if samples in self.bases or len(self.bases) == 1:
            return made(samples)
        first, second = map(made, self.bases)
        try:
            return with_samples(first, second, samples)
        except PartitionError:
            return made(samples)

    def _lowered(self, plan: Plan, samples: int) -> Program:
        graph, shape = self._graph(samples), self.capture.shape
        from partitioner.lowering.lower import lower  # with torch, as the graph is there

        return lower(graph, plan, replace(shape, samples=samples * plan.dp * plan.microbatches), check=False)

    def _graph(self, samples: int) -> "Graph":
        if samples not in self._graphs:
            try:
                self._graphs[samples] = self.capture.graph_of(samples)
            except CaptureError as error:
                self._graphs[samples] = error
        found = self._graphs[samples]
        if isinstance(found, UserError):
            raise found
        return found

    def _units(self, tp: int, samples: int) -> Program:
        """The units of a captured size. Raises CaptureError or PartitionError."""
        key = (tp, samples)
        if key not in self._captured:
            self._captured[key] = remembered(self._entry(*key), _read, partial(self._made, *key), _written)[0]
        found = self._captured[key]
        if isinstance(found, UserError):
            raise found
        return found

    def _made(self, tp: int, samples: int) -> Program | UserError:
        try:
            graph, shape = self._graph(samples), self.capture.shape
            from partitioner.lowering.unit_roles import lower_units

            with self.capture.progress(f"price tp {tp}, parts of {samples} samples"):
                return lower_units(graph, tp, replace(shape, samples=samples))
        except (CaptureError, PartitionError) as error:
            return error

    def _entry(self, tp: int, samples: int) -> str | None:
        content, asked = self.capture.content, self.capture.job.plan
        if content is None:
            return None
        facts = {"tp": tp, "samples": samples, "pp": asked.pp, "batch_norm": str(asked.batch_norm)}
        return f"{key_of({'units': content, **facts})}.units"


def _read(data: bytes) -> Program | UserError:
    if not data.startswith(REFUSED):
        return decode(data)
    kind, *texts = json.loads(data.removeprefix(REFUSED))
    return REFUSALS[kind](*texts)


def _written(made: Program | UserError) -> bytes:
    if isinstance(made, Program):
        return encode(made)
    kind = "capture" if isinstance(made, CaptureError) else "partition"
    return REFUSED + json.dumps([kind, made.problem, made.where, made.hint]).encode()
