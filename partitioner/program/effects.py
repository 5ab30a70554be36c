"""Effects: which tensors an instruction reads, writes and names."""

from partitioner.program.program import (
    Accumulate,
    Collective,
    Compute,
    Free,
    Instruction,
    Recv,
    Send,
    Update,
    Wait,
)


def reads(ins: Instruction) -> tuple[int, ...]:
    """Tensors whose value the instruction uses."""
    match ins:
        case Compute() | Accumulate() | Collective():
            return ins.reads
        case Send():
            return (ins.tensor,)
        case Update():
            return (ins.param, ins.grad, ins.stats)
        case _:
            return ()


def writes(ins: Instruction) -> tuple[int, ...]:
    """Tensors that have a new value afterwards (for transfers: after the Wait)."""
    match ins:
        case Compute() | Accumulate() | Collective():
            return ins.writes
        case Recv():
            return (ins.tensor,)
        case Update():
            return (ins.param, ins.target)
        case _:
            return ()


def named(ins: Instruction) -> tuple[int, ...]:
    """Every tensor the instruction mentions."""
    return ins.tensors if isinstance(ins, Wait | Free) else (*reads(ins), *writes(ins))
