"""Links and networks: which tier two chips meet in, and what is left of a network of fewer chips."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.links import Link
from comms.network import UNBOUNDED, Network, Tier, TierKind

SLOW = Link(1e-5, 1e9)


def network(*sizes: int) -> Network:
    return Network(tuple(Tier(f"tier {size}", size, SLOW, TierKind.SCALE_OUT) for size in sizes))


@st.composite
def networks(draw):
    factors = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    sizes = [factors[0]]
    for factor in factors[1:]:
        sizes.append(sizes[-1] * factor)
    return network(*sizes)


def test_a_message_takes_latency_plus_bytes_over_rate():
    assert Link(2e-6, 1e9).seconds(1000) == pytest.approx(3e-6)
    assert Link(2e-6, 1e9).seconds(0) == 2e-6


@pytest.mark.parametrize("figures", [(-1.0, 1.0), (0.0, 0.0), (0.0, -1.0)])
def test_a_link_without_a_rate_is_refused(figures):
    with pytest.raises(ValueError, match="a link needs"):
        Link(*figures)


@given(networks(), st.data())
def test_tier_for_is_the_innermost_with_all_chips_in_one_group(net, data):
    chips = data.draw(st.lists(st.integers(0, net.tiers[-1].size - 1), min_size=1, max_size=6))
    brute = next(t for t in net.tiers if len({chip // t.size for chip in chips}) == 1)
    assert net.tier_for(chips) == brute


def test_a_chip_outside_the_network_is_refused():
    with pytest.raises(ValueError, match="outside the network of 8 chips"):
        network(4, 8).tier_for([3, 8])


@given(networks(), st.data())
def test_a_part_of_a_network_keeps_the_tier_of_every_pair(net, data):
    num_chips = data.draw(st.integers(2, net.tiers[-1].size))
    pair = data.draw(st.lists(st.integers(0, num_chips - 1), min_size=2, max_size=2))
    part = net.take(num_chips)
    assert part.tiers[-1].size == num_chips
    assert part.tier_for(pair).name == net.tier_for(pair).name


def test_an_unbounded_network_ends_at_what_is_taken():
    net = network(8, UNBOUNDED)
    assert [tier.size for tier in net.take(1024).tiers] == [8, 1024]
    assert [tier.size for tier in net.take(4).tiers] == [4]
    assert net.tier_for([0, 10**9]).size == UNBOUNDED


def test_a_network_cannot_give_more_chips_than_it_has():
    with pytest.raises(ValueError, match="9 chips do not fit"):
        network(4, 8).take(9)


def test_groups_that_do_not_nest_are_refused():
    with pytest.raises(ValueError, match="does not hold whole groups"):
        network(4, 6, 12)
    with pytest.raises(ValueError, match="does not hold whole groups"):
        network(8, 4)
    with pytest.raises(ValueError, match="at least one tier"):
        Network(())


def test_oversubscription_divides_the_loaded_rate_only():
    tier = Tier("spine", 64, Link(1e-6, 40e9), TierKind.SCALE_OUT, oversubscription=4.0)
    assert tier.loaded_link == Link(1e-6, 10e9)
    with pytest.raises(ValueError, match="at least 1"):
        Tier("spine", 64, SLOW, TierKind.SCALE_OUT, oversubscription=0.5)
