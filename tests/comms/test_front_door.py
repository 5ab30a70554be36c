"""Claims about `import comms`: one line prices a collective, and what is asked wrong is said."""

import pytest

import comms

LINK = comms.Link(latency_s=2e-6, bytes_per_s=50e9)
NBYTES = 64e6


@pytest.mark.parametrize("num_chips", [2, 8, 24])
def test_a_ring_on_one_switch_takes_what_the_textbook_says(num_chips):
    answer = comms.estimate("all_reduce", NBYTES, comms.Network.of((num_chips, LINK)), algorithm="ring")
    stage_s = LINK.latency_s + NBYTES / num_chips / LINK.bytes_per_s
    assert answer.seconds == pytest.approx(2 * (num_chips - 1) * stage_s)
    assert answer.algorithm == "ring"


def test_switches_over_switches_are_tiers_from_the_inside():
    network = comms.Network.of((4, comms.Link(1e-6, 400e9)), (16, LINK))
    assert [(tier.size, tier.link.latency_s) for tier in network.tiers] == [(4, 1e-6), (16, 2e-6)]
    answer = comms.estimate(comms.Op.ALL_REDUCE, NBYTES, network)
    assert [share.fanout for share in answer.tiers] == [4, 4]
    assert answer.seconds <= min(each.seconds for each in answer.candidates)


def test_moving_every_message_agrees_and_says_which_wire_is_busiest():
    network = comms.Network.of((4, LINK))
    moved = comms.simulate("all_gather", NBYTES, network, algorithm="ring")
    assert moved.seconds == pytest.approx(comms.estimate("all_gather", NBYTES, network, "ring").seconds)
    assert moved.busiest_wire.busy == pytest.approx(NBYTES * 3 / 4 / LINK.bytes_per_s / moved.seconds)
    assert comms.estimate("all_gather", NBYTES, network).busiest_wire is None


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (lambda: comms.Network.of((4, LINK), (6, LINK), (8, LINK)), "does not hold whole groups of 4"),
        (lambda: comms.estimate("all_reduce", -1.0, comms.Network.of((4, LINK))), "-1.0 bytes"),
    ],
)
def test_what_cannot_be_is_said(asked, problem):
    with pytest.raises(comms.UserError) as raised:
        asked()
    assert problem in raised.value.problem


def test_there_is_nothing_else_at_the_door():
    with pytest.raises(AttributeError, match="cheapest"):
        comms.cheapest  # noqa: B018
    with pytest.raises(ValueError, match="all_to_none"):
        comms.estimate("all_to_none", 1.0, comms.Network.of((4, LINK)))
