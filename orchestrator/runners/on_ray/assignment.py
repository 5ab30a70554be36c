"""Assignment: which actor executes which chip, and which tensors it must be given for its chips.

Chips are lined up by data-parallel coordinate, then stage, then the other axes, and the line is cut into pieces of
equal length. So actors hold whole replicas where there are enough of them (they then meet once a step), else
neighbouring stages of a replica, else parts of a stage. Which actor hosts a chip never changes a result.
"""

from collections.abc import Sequence

from partitioner.program.program import Program, TensorKind

SLOWEST = ("dp", "pp")  # axes with the least traffic first


def assign(program: Program, machines: Sequence[str]) -> tuple[int, ...]:
    """The actor of every chip, of actors on these machines, at most one per chip; sizes differ by at most one.

    Over several machines chips stay in chip order, which is that of the cluster's hosts, so that those of a host meet
    on one machine; and where every chip has an actor, that is the one of its own number.
    """
    num_actors, num_chips = len(machines), program.num_chips
    assert 1 <= num_actors <= num_chips, f"{num_actors} actors for {num_chips} chips"
    if num_actors == num_chips:
        return tuple(range(num_chips))
    if len(set(machines)) > 1:
        by_machine = sorted(range(num_actors), key=lambda actor: (machines.index(machines[actor]), actor))
        return tuple(by_machine[chip * num_actors // num_chips] for chip in range(num_chips))
    actor_of = [0] * num_chips
    for position, chip in enumerate(sorted(range(num_chips), key=lambda c: _place(program, c))):
        actor_of[chip] = position * num_actors // num_chips
    return tuple(actor_of)


def chips_of(actor_of: Sequence[int], actor: int) -> tuple[int, ...]:
    """The chips that `actor` executes, in chip order."""
    return tuple(chip for chip, holder in enumerate(actor_of) if holder == actor)


def needed_values(program: Program, chips: Sequence[int]) -> frozenset[str]:
    """The parameters and buffers that `ExecutingChip.load` asks for on these chips."""
    roles = {program.role_of(chip).stage: program.role_of(chip) for chip in chips}
    return frozenset(
        f"params:{tensor.source}" if tensor.kind is TensorKind.PARAM else tensor.source
        for role in roles.values()
        for tensor in role.tensors
        if (tensor.kind is TensorKind.PARAM and tensor.base is not None)
        or (tensor.kind in (TensorKind.CONSTANT, TensorKind.BUFFER) and tensor.source)
    )


def needed_batches(program: Program, chips: Sequence[int]) -> frozenset[tuple[int, str]]:
    """The (replica, batch name) that these chips read."""
    return frozenset(
        (program.coordinates(chip)["dp"], tensor.source.split(":", 1)[1])
        for chip in chips
        for tensor in program.role_of(chip).tensors
        if tensor.kind is TensorKind.BATCH
    )


def needed_states(program: Program, chips: Sequence[int]) -> frozenset[int]:
    """The chips whose saved state `restore_state` asks for on these chips: the first replica's, or their own."""
    first = {program.chip_at(program.coordinates(chip) | {"dp": 0}) for chip in chips}
    return frozenset(first | set(chips) if program.facts["zero"] else first)


def _place(program: Program, chip: int) -> tuple[int, ...]:
    at = program.coordinates(chip)
    return (*(at.get(axis, 0) for axis in SLOWEST), chip)
