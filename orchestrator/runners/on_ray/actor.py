"""Actor: one process that executes several chips of a Program, with one long call per step.

Plain Python: `ray_start` makes it a Ray actor. Control comes as Ray calls with small arguments; Programs come as bytes
and tensors through `Transport`. The interpreter switches threads more often than usual here, because a tensor that
arrives is taken by one thread while another one computes.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace

import torch

from kernels.optimizers import FlatOptimizer, OptimizerSpec, StepStatistics
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.executing.mailbox import Mailbox, batch_key, marks_key, state_key, value_key
from orchestrator.runners.executing.transport import Address, Transport
from orchestrator.runners.failure import ActorStatus
from orchestrator.runners.runner import BadOrder, Settings, StepRequest
from orchestrator.runs.timeline import Mark
from partitioner.program.machine import Key
from partitioner.program.program_codec import decode

DRIVER = -1  # the driver's number among the actors
COMMUNICATIONS = ("p2p", "group")
PATIENCE_S = 600.0  # for values from the driver, which may be building a model
SWITCH_S = 5e-4


@dataclass(frozen=True, slots=True)
class ActorReport:
    """What came of a request on the chips of an actor; marks travel as a tensor."""

    stats: StepStatistics | None
    first_bad: tuple[BadOrder, str] | None


class ChipActor:
    """The chips of one actor."""

    def __init__(self, actor: int, secret: bytes) -> None:
        sys.setswitchinterval(SWITCH_S)
        self.actor = actor
        self.mailbox = Mailbox(PATIENCE_S)
        self.transport = Transport(actor, secret, self._deliver)
        self._chip_set: ChipSet | None = None

    def address(self) -> Address:
        """Where the other actors reach this one."""
        return self.transport.address

    def warm_up(self) -> None:
        """Take a step of a small optimizer: the first one in a process imports for a second."""
        small = torch.zeros(1)
        FlatOptimizer(OptimizerSpec(), small, {}).step(torch.zeros(1), 1.0, {"lr": 0.0})

    def connect(
        self, addresses: Mapping[int, Address], program: bytes, actor_of: Sequence[int], settings: Settings
    ) -> None:
        """Get to know the peers and take the chips of a Program, in place of those of another."""
        self.mailbox.clear()
        self.transport.connect({a: address for a, address in addresses.items() if a != self.actor})
        self._chip_set = ChipSet(
            decode(program), settings, actor_of=actor_of, actor=self.actor, mail=self.transport
        )

    def load(self) -> None:
        """Take parameters and buffers from the mailbox, in the order of need; compute constants."""
        values: dict[str, torch.Tensor] = {}

        def value(name: str) -> torch.Tensor:
            if name not in values:
                values[name] = self.mailbox.take(0, value_key(name))
            return values[name]

        self.chip_set.load(value)

    def run(self, request: StepRequest, epoch: int, sent: Sequence[tuple[int, int, str]]) -> ActorReport:
        """Execute a schedule on all chips; `sent` are the (replica, microbatch, name) that the driver has sent.

        Measured intervals are sent to the driver.
        """
        batches: dict[int, dict[tuple[int, str], torch.Tensor]] = {}
        for replica, microbatch, name in sent:
            tensor = self.mailbox.take(epoch, batch_key(replica, microbatch, name))
            batches.setdefault(replica, {})[microbatch, name] = tensor.to(self.chip_set.settings.device)
        result = self.chip_set.run(replace(request, batches=batches))
        if request.measure:
            marks = marks_tensor(result.marks)
            self.transport.send(DRIVER, epoch, marks_key(self.actor), self.actor, marks)
        return ActorReport(result.stats, result.first_bad)

    def send_states(self) -> dict[int, list[str]]:
        """Send the checkpoint states to the driver; returns their names by chip."""
        names: dict[int, list[str]] = {}
        for index, state in self.chip_set.states().items():
            names[index] = list(state)
            for name, tensor in state.items():
                self.transport.send(DRIVER, 0, state_key(index, name), index, tensor)
        return names

    def restore(self, names: Mapping[int, Sequence[str]]) -> None:
        """Put back a checkpoint from the states of these chips, which the driver has sent."""
        states = {
            chip: {name: self.mailbox.take(0, state_key(chip, name)) for name in of_chip}
            for chip, of_chip in names.items()
        }
        self.chip_set.restore(states)

    def status(self) -> ActorStatus:
        """Where every chip is; raises what ended the transport, if it has ended. Called while `run` is running."""
        if self.transport.failure is not None:
            raise self.transport.failure
        chip_set = self.chip_set
        with chip_set.changed:
            execution = chip_set.execution
            if execution is None:
                return ActorStatus((), "")
            positions = tuple((machine.call, machine.index) for machine in execution.machines.values())
            return ActorStatus((chip_set.epoch, execution.combining, positions), chip_set.explain(execution))

    @property
    def chip_set(self) -> ChipSet:
        """The chips; `connect` has been called."""
        assert self._chip_set is not None
        return self._chip_set

    def _deliver(self, epoch: int, key: Key, source: int, tensor: torch.Tensor) -> None:
        if key.kind in COMMUNICATIONS:
            device = self.chip_set.settings.device
            self.chip_set.deliver(epoch, key, source, tensor.to(device))
        else:
            self.mailbox.put(epoch, key, tensor)


def marks_tensor(marks: Sequence[Mark]) -> torch.Tensor:
    """Marks as rows of integers."""
    rows = [astuple(mark) for mark in marks]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, len(fields(Mark)))


def marks_from(rows: torch.Tensor) -> list[Mark]:
    """Inverse of `marks_tensor`."""
    return [Mark(*row) for row in rows.tolist()]
