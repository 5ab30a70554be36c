"""A step of 32 layers, data times tensor parallel, at four scales: folded in how long, and how close to full.

The step that simulators are compared by: 8 chips behind one switch of 450 GB/s and 500 ns, such groups behind
another of 50 GB/s and 2 us. Per half layer 1 ms forward and 2 ms backward, each followed by an all-reduce of
64 MiB over the 8 chips that the next work waits for; per layer a gradient all-reduce of 48 MiB over the groups
that only the optimizer (500 us) waits for. ASTRA-sim takes 2.6 s for 64 chips and 104 s for 1,024.
"""

import argparse
import time
from dataclasses import dataclass, field

from support.harness import median, report

from comms.collectives.schedule import Op
from comms.networks.groups import mesh_group
from comms.networks.links import Link
from comms.networks.network import Network, TierKind, switched
from comms.selection.choice import choose
from orchestrator.runners.timing.every_chip import ProgramTraffic, simulate_every_chip
from orchestrator.runners.timing.simulated import simulate_step
from orchestrator.runners.timing.step_costs import Working, WorkTime, collective_nbytes
from partitioner.program.program import (
    Body,
    Call,
    Collective,
    CollectiveOp,
    Compute,
    Group,
    Instruction,
    Program,
    Reduction,
    Role,
    Segment,
    Send,
    Tensor,
    TensorKind,
    TensorSpec,
    Wait,
)

LAYERS, TP, MIB = 32, 8, 2**20
FORWARD, BACKWARD, OPTIMIZER = 0, 1, 2
WORK_NS = (1_000_000, 2_000_000, 500_000)
SCALES = (1_024, 4_096, 102_400, 1_048_576)
FULL_SCALES = (64, 256, 1_024)
REPEATS = 5


def network(num_chips: int) -> Network:
    """Switch by switch."""
    inner = switched("fabric", TP, Link(500e-9, 450e9), TierKind.SCALE_UP)
    return Network((inner, switched("network", num_chips, Link(2000e-9, 50e9), TierKind.SCALE_OUT)))


def step_program(num_chips: int) -> Program:
    """One role; tensor 0 is the activation, 1 .. LAYERS the gradients."""
    tensors = tuple(
        Tensor(
            number,
            f"t{number}",
            TensorKind.ACTIVATION,
            TensorSpec(((64 if number == 0 else 48) * MIB // 4,), "f32"),
        )
        for number in range(LAYERS + 1)
    )
    instructions: list[Instruction] = []

    def add(make: type[Compute] | type[Collective] | type[Wait], **fields: object) -> None:
        instructions.append(make(id=len(instructions), **fields))  # type: ignore[arg-type]

    def half_layer(segment: int) -> None:
        add(Compute, segment=segment, reads=(0,), writes=(0,))
        all_reduce("tp", 0)
        add(Wait, tensors=(0,))

    def all_reduce(axis: str, tensor: int) -> None:
        op, group = CollectiveOp.ALL_REDUCE, Group((axis,))
        add(Collective, op=op, reduction=Reduction.SUM, group=group, dim=0, reads=(tensor,), writes=(tensor,))

    for _ in range(2 * LAYERS):
        half_layer(FORWARD)
    for layer in range(LAYERS):
        half_layer(BACKWARD)
        half_layer(BACKWARD)
        all_reduce("dp", layer + 1)
    add(Wait, tensors=tuple(range(1, LAYERS + 1)))
    add(Compute, segment=OPTIMIZER, reads=(0,), writes=(0,))
    segments = tuple(Segment(number, f"segment {number}", (), (), ()) for number in range(3))
    role = Role(0, tensors, (Body("step", tuple(instructions)),), (("step", (Call("step", 0),)),))
    return Program((("pp", 1), ("dp", num_chips // TP), ("tp", TP)), 1, segments, (role,))


@dataclass
class StepCosts:
    """Work by the table, collectives by choice."""

    program: Program
    network: Network
    algorithms: dict[str, str] = field(default_factory=dict)
    _known: dict[tuple[str, int], int] = field(default_factory=dict)

    def work(self, role: Role, instruction: Working) -> WorkTime:
        """What the segment takes."""
        assert isinstance(instruction, Compute)
        return WorkTime(WORK_NS[instruction.segment])

    def collective_ns(self, role: Role, instruction: Collective) -> int:
        """The fastest algorithm's time, with all groups of the axis busy."""
        axis, nbytes = instruction.group.axes[0], collective_nbytes(role, instruction)
        if (axis, nbytes) not in self._known:
            members = mesh_group(self.program.axes, (axis,))
            choice = choose(Op.ALL_REDUCE, nbytes, members, self.network)
            self.algorithms[axis] = choice.algorithm
            self._known[axis, nbytes] = round(choice.seconds * 1e9)
        return self._known[axis, nbytes]

    def transfer_ns(self, role: Role, instruction: Send) -> int:
        """There is only one stage."""
        raise AssertionError(instruction)

    issue_ns = transfer_ns


def folded(num_chips: int) -> tuple[int, dict[str, str], float]:
    """The step in nanoseconds, the algorithms, and the seconds it took to tell, Program and all."""
    start = time.perf_counter()
    program = step_program(num_chips)
    costs = StepCosts(program, network(num_chips))
    step_ns = simulate_step(program, costs).step_ns
    return step_ns, costs.algorithms, time.perf_counter() - start


def full(num_chips: int) -> tuple[int, float]:
    """The step in nanoseconds with every chip and message, and the seconds it took to tell."""
    start = time.perf_counter()
    program, wires = step_program(num_chips), network(num_chips)
    traffic = ProgramTraffic(program, wires)
    step_ns = simulate_every_chip(program, StepCosts(program, wires), traffic).step_ns
    return step_ns, time.perf_counter() - start


def main() -> None:
    """Print and keep the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--repeats", type=int, default=REPEATS, help="runs of each scale, the median counts"
    )
    repeats = arguments.parse_args().repeats
    rows = []
    for num_chips in sorted({*SCALES, *FULL_SCALES}):
        runs = [folded(num_chips) for _ in range(repeats)]
        row: dict[str, object] = {
            "chips": num_chips,
            "step_ms": runs[0][0] / 1e6,
            "folded_s": median([seconds for _, _, seconds in runs]),
            "algorithms": ", ".join(f"{axis} {name}" for axis, name in runs[0][1].items()),
        }
        if num_chips in FULL_SCALES:
            step_ns, seconds = full(num_chips)
            row |= {"full_ms": step_ns / 1e6, "full_over_folded": step_ns / runs[0][0], "full_s": seconds}
        rows.append(row)
    report("dp_tp_step", rows)


if __name__ == "__main__":
    main()
