import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.runners.executing.header import BadMessage
from orchestrator.runners.executing.mailbox import batch_key, marks_key, state_key, value_key
from orchestrator.runners.executing.transport import Arrival
from orchestrator.runners.on_ray.screening import (
    DRIVER,
    require_of_chips,
    require_of_driver,
    require_report,
)
from partitioner.program.machine import Key

ACTOR_OF = (0, 0, 1, 1, 2, 2)
chips = st.lists(st.integers(0, 7), max_size=4).map(tuple)
numbers = st.integers(-1, 7)


def message(sender: int, key: Key, source: int = 0) -> Arrival:
    return Arrival(sender, 0, key, source, torch.zeros(1))


@given(st.sampled_from(["p2p", "group"]), chips, numbers, st.integers(-1, 2), st.integers(0, 2))
def test_an_actor_sends_for_its_own_chips_to_who_takes_part(kind, members, source, sender, here) -> None:
    is_sound = (
        set(members) <= set(range(6))
        and source in members
        and ACTOR_OF[source] == sender
        and any(ACTOR_OF[chip] == here for chip in members)
        and (kind == "group" or (len(members) == 2 and members[0] == source))
    )
    try:
        require_of_chips(message(sender, Key(kind, members, 0), source), ACTOR_OF, here)
    except BadMessage:
        assert not is_sound
    else:
        assert is_sound


@pytest.mark.parametrize("key", [value_key("w"), batch_key(0, 0, "x"), state_key(0, "w")])
def test_values_come_from_the_driver_alone(key: Key) -> None:
    require_of_driver(message(DRIVER, key))
    with pytest.raises(BadMessage):
        require_of_driver(message(0, key))


def test_an_actor_reports_of_itself_alone() -> None:
    require_report(message(1, marks_key(1)), ACTOR_OF)
    require_report(message(1, state_key(3, "w")), ACTOR_OF)
    for sender, key in [
        (1, marks_key(0)),
        (1, state_key(0, "w")),
        (1, state_key(9, "w")),
        (1, value_key("w")),
    ]:
        with pytest.raises(BadMessage):
            require_report(message(sender, key), ACTOR_OF)
