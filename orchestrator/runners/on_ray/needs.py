"""Needs: which tensors an actor must be given for its chips, so that the driver sends no others."""

from collections.abc import Sequence

from partitioner.program.program import Program, TensorKind


def values(program: Program, chips: Sequence[int]) -> frozenset[str]:
    """The parameters and buffers that `Chip.load` asks for on these chips."""
    roles = {program.role_of(chip).stage: program.role_of(chip) for chip in chips}
    return frozenset(
        f"params:{tensor.source}" if tensor.kind is TensorKind.PARAM else tensor.source
        for role in roles.values()
        for tensor in role.tensors
        if (tensor.kind is TensorKind.PARAM and tensor.base is not None)
        or (tensor.kind is TensorKind.CONSTANT and tensor.source)
    )


def batches(program: Program, chips: Sequence[int]) -> frozenset[tuple[int, str]]:
    """The (replica, batch name) that these chips read."""
    return frozenset(
        (program.coordinates(chip)["dp"], tensor.source.split(":", 1)[1])
        for chip in chips
        for tensor in program.role_of(chip).tensors
        if tensor.kind is TensorKind.BATCH
    )


def states(program: Program, chips: Sequence[int]) -> frozenset[int]:
    """The chips whose saved state `restore_state` asks for on these chips: the first replica's, or their own."""
    first = {program.chip_at(program.coordinates(chip) | {"dp": 0}) for chip in chips}
    return frozenset(first | set(chips) if program.facts["zero"] else first)
