"""Actor: one process that executes several chips of a Program, with one long call per step.

Plain Python: `ray_start` makes it a Ray actor. Control comes as Ray calls with small arguments; Programs come as bytes
and tensors through `Transport`. The interpreter switches threads more often than usual here, because a tensor that
arrives is taken by one thread while another one computes.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cache

import torch

from kernels.memory import keep_memory
from kernels.optimizers import FlatOptimizer, OptimizerSpec, StepStatistics
from orchestrator.models.own_modules import import_modules
from orchestrator.models.user_code import PACKAGE_FOLDERS
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.executing.header import BadMessage
from orchestrator.runners.executing.mailbox import Mailbox, batch_key, marks_key, state_key, value_key
from orchestrator.runners.executing.peer_keys import PeerKeys
from orchestrator.runners.executing.transport import COMMUNICATIONS, Address, Arrival, Transport
from orchestrator.runners.failure import ActorStatus
from orchestrator.runners.on_ray.screening import DRIVER, require_of_chips, require_of_driver
from orchestrator.runners.runner import BadOrder, Settings, StepRequest
from orchestrator.runs.timeline import Mark
from partitioner.program.program_codec import decode

PATIENCE_S = 600.0  # for values from the driver, which may be building a model
SWITCH_S = 5e-4


@dataclass(frozen=True, slots=True)
class ActorReport:
    """What came of a request on the chips of an actor; marks travel as a tensor."""

    stats: StepStatistics | None
    first_bad: tuple[BadOrder, str] | None


@dataclass(frozen=True, slots=True)
class ActorFacts:
    """An actor once it is up. `node`: Ray's name of its machine; `output`: the files that it writes to."""

    address: Address
    machine: str
    node: str
    output: tuple[str, ...]
    code: Mapping[str, str]

    @property
    def place(self) -> str:
        """For messages."""
        return f"process {self.address.process} on {self.machine} (node {self.node[:8]})"


def node_address() -> str:
    """The interface by which Ray knows this machine."""
    import ray

    return str(ray.util.get_node_ip_address())


@cache
def code_facts() -> dict[str, str]:
    """What must be the same on all machines: a digest of our own code, and the libraries that compute."""
    digest = hashlib.sha256()
    for folder in PACKAGE_FOLDERS.values():
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder.parent)}\n".encode() + path.read_bytes())
    python = ".".join(map(str, sys.version_info[:2]))
    return {"orchestrate": digest.hexdigest()[:12], "torch": torch.__version__, "Python": python}


class ChipActor:
    """The chips of one actor."""

    def __init__(self, keys: PeerKeys, host: str | None = None) -> None:
        sys.setswitchinterval(SWITCH_S)
        keep_memory()
        self.actor = keys.actor
        self.mailbox = Mailbox(PATIENCE_S)
        self.transport = Transport(keys, self._deliver, host or node_address())
        self._chip_set: ChipSet | None = None
        self._actor_of: Sequence[int] = ()

    def facts(self) -> ActorFacts:
        """Where it is, where the other actors reach it, and what code it runs."""
        import ray

        worker = ray._private.worker.global_worker
        node = ray.get_runtime_context().get_node_id()
        output = (worker.get_out_file_path(), worker.get_err_file_path())
        return ActorFacts(self.transport.address, node_address(), node, output, code_facts())

    def warm_up(self) -> None:
        """Take a step of a small optimizer: the first one in a process imports for a second."""
        small = torch.zeros(1)
        FlatOptimizer(OptimizerSpec(), small, {}).step(torch.zeros(1), 1.0, {"lr": 0.0})

    def connect(
        self, addresses: Mapping[int, Address], program: bytes, actor_of: Sequence[int], settings: Settings
    ) -> None:
        """Get to know the peers and take the chips of a Program, in place of those of another."""
        self.mailbox.clear()
        import_modules(settings.modules)
        self.transport.connect({a: address for a, address in addresses.items() if a != self.actor})
        self._actor_of = actor_of
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

    def _deliver(self, message: Arrival) -> None:
        if message.key.kind in COMMUNICATIONS:
            if self._chip_set is None:
                raise BadMessage("a communication before there are chips")
            require_of_chips(message, self._actor_of, self.actor)
            tensor = message.tensor.to(self._chip_set.settings.device)
            self._chip_set.deliver(message.epoch, message.key, message.source, tensor)
        else:
            require_of_driver(message)
            self.mailbox.put(message.epoch, message.key, message.tensor)


def marks_tensor(marks: Sequence[Mark]) -> torch.Tensor:
    """Marks as rows of integers."""
    rows = [astuple(mark) for mark in marks]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, len(fields(Mark)))


def marks_from(rows: torch.Tensor) -> list[Mark]:
    """Inverse of `marks_tensor`."""
    return [Mark(*row) for row in rows.tolist()]
