"""The list of small models that `many_models.py` runs: built offline, in train mode, in float64."""

from support.models import convolutions, decoders, encoders, other_networks, senses
from support.models.model_case import ModelCase


def model_cases() -> list[ModelCase]:
    """All models, the quick ones of this repository first."""
    rooms = (other_networks, convolutions, decoders, encoders, senses)
    found = [case for room in rooms for case in room.cases()]
    assert len({case.name for case in found}) == len(found), "two models have one name"
    return found
