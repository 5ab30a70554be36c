"""Closed forms against rings that are played step by step, and the shapes that mesh groups have on a network."""

import itertools
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.collectives import ALGORITHMS, collective_seconds, fold, mesh_group, transfer_seconds
from comms.links import Link
from comms.network import Network, TierKind, switched

PATIENT = settings(deadline=None)
FAST, SLOW = Link(2e-6, 300e9), Link(5e-6, 25e9)
HOSTS = Network(
    (
        switched("fabric", 8, FAST, TierKind.SCALE_UP),
        switched("net", 2**14, SLOW, TierKind.SCALE_OUT, oversubscription=2.0),
    )
)
links = st.builds(Link, st.floats(0, 1e-4), st.floats(1e6, 1e12))


def flat(num_chips, link):
    return Network((switched("flat", num_chips, link, TierKind.SCALE_UP),))


def play_ring(hops, nbytes, passes):
    """Every chip sends chunk after chunk to its right; a chunk leaves once it has come from the left."""
    num_chips = len(hops)
    has = [0.0] * num_chips  # when each chip has what it sends next
    wire = [0.0] * num_chips
    for _ in range(passes * (num_chips - 1)):
        wire = [max(has[i], wire[i]) + hops[i].seconds(nbytes / num_chips) for i in range(num_chips)]
        has = [wire[i - 1] for i in range(num_chips)]
    return max(has)


@PATIENT
@given(st.integers(2, 12), st.floats(1, 1e9), links)
def test_ring_equals_a_played_ring_on_unshared_links(num_chips, nbytes, link):
    for op, passes in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)):
        levels = fold(range(num_chips), flat(num_chips, link))
        assert ALGORITHMS[op]["ring"](nbytes, levels) == pytest.approx(
            play_ring([link] * num_chips, nbytes, passes)
        )


@PATIENT
@given(st.integers(2, 4), st.integers(2, 5), st.floats(1, 1e9))
def test_ring_across_hosts_goes_at_the_pace_of_its_slowest_hop(hosts, per_host, nbytes):
    chips = [host * 8 + chip for host in range(hosts) for chip in range(per_host)]
    slow = HOSTS.tiers[1].loaded_link
    hops = [slow if (i + 1) % per_host == 0 else FAST for i in range(len(chips))]
    assert ALGORITHMS["all_reduce"]["ring"](nbytes, fold(chips, HOSTS)) == pytest.approx(
        play_ring(hops, nbytes, 2)
    )


@PATIENT
@given(st.integers(2, 4), st.integers(2, 8), st.floats(1, 1e9))
def test_hierarchical_all_reduce_is_scatter_inside_reduce_across_gather_inside(hosts, per_host, nbytes):
    chips = [host * 8 + chip for host in range(hosts) for chip in range(per_host)]
    inside = play_ring([FAST] * per_host, nbytes, 1)
    across = play_ring([HOSTS.tiers[1].loaded_link] * hosts, nbytes / per_host, 2)
    seconds = ALGORITHMS["all_reduce"]["hierarchical"](nbytes, fold(chips, HOSTS))
    assert seconds == pytest.approx(2 * inside + across)


def test_a_large_all_reduce_across_hosts_goes_by_levels_and_a_small_one_by_doubling():
    everyone = mesh_group((("pp", 8), ("dp", 16), ("tp", 8)), ("pp", "dp", "tp"))
    assert collective_seconds("all_reduce", 1e9, everyone, HOSTS).algorithm == "hierarchical"
    small = collective_seconds("all_reduce", 24, everyone, HOSTS)
    assert (small.algorithm, small.tier) == ("recursive doubling", "net")
    assert small.seconds == pytest.approx(3 * FAST.seconds(24) + 7 * HOSTS.tiers[1].loaded_link.seconds(24))


@PATIENT
@given(st.sampled_from(sorted(ALGORITHMS)), st.floats(1, 1e10), links, st.floats(1, 100), st.floats(1, 100))
def test_more_bandwidth_or_less_latency_is_never_slower(op, nbytes, link, latency_factor, rate_factor):
    better = Link(link.latency_s / latency_factor, link.bytes_per_s * rate_factor)
    group = range(6)
    worse_s = collective_seconds(op, nbytes, group, flat(6, link)).seconds
    assert collective_seconds(op, nbytes, group, flat(6, better)).seconds <= worse_s * (1 + 1e-12)


@PATIENT
@given(st.sampled_from(sorted(ALGORITHMS)), st.floats(1, 1e10), links, st.floats(1, 50))
def test_k_times_slower_links_take_k_times_as_long(op, nbytes, link, k):
    slower = Link(link.latency_s * k, link.bytes_per_s / k)
    seconds = collective_seconds(op, nbytes, range(8), flat(8, link)).seconds
    assert collective_seconds(op, nbytes, range(8), flat(8, slower)).seconds == pytest.approx(k * seconds)


def test_all_to_all_counts_each_peer_at_the_tier_that_joins_it():
    slow = HOSTS.tiers[1].loaded_link
    seconds = collective_seconds("all_to_all", 1600, range(16), HOSTS).seconds
    assert seconds == pytest.approx(7 * FAST.seconds(100) + 8 * slow.seconds(100))


def test_broadcast_of_little_doubles_and_of_much_scatters():
    assert collective_seconds("broadcast", 8, range(8), HOSTS).seconds == pytest.approx(3 * FAST.seconds(8))
    assert collective_seconds("broadcast", 1e9, range(8), HOSTS).algorithm == "scatter and gather"


def test_one_chip_needs_no_time_and_no_tier():
    cost = collective_seconds("all_reduce", 1e9, (5,), HOSTS)
    assert (cost.seconds, cost.tier) == (0.0, "")


def test_a_transfer_takes_the_loaded_link_of_the_innermost_common_tier():
    assert transfer_seconds(1000, 0, 7, HOSTS).seconds == FAST.seconds(1000)
    across = transfer_seconds(1000, 0, 8, HOSTS)
    assert (across.seconds, across.tier) == (HOSTS.tiers[1].loaded_link.seconds(1000), "net")


def test_an_uneven_group_is_priced_as_if_no_two_shared_a_host():
    assert [level.fanout for level in fold((5, 6, 7, 8, 9), HOSTS)] == [5]
    assert [level.fanout for level in fold(mesh_group((("pp", 4), ("tp", 6)), ("tp",)), HOSTS)] == [6]


POWERS = st.sampled_from([1, 2, 4, 8])


@PATIENT
@given(st.tuples(POWERS, POWERS, POWERS), st.sets(st.sampled_from(["pp", "dp", "tp"]), min_size=1))
def test_a_mesh_group_folds_like_the_listed_chips_of_every_coordinate(sizes, along):
    axes = tuple(zip(("pp", "dp", "tp"), sizes, strict=True))
    network = Network(
        (
            switched("pair", 2, FAST, TierKind.PCIE),
            switched("host", 8, FAST, TierKind.SCALE_UP),
            switched("net", 512, SLOW, TierKind.SCALE_OUT),
        )
    )
    groups: dict[tuple[int, ...], list[int]] = {}
    for chip, at in enumerate(itertools.product(*(range(size) for size in sizes))):
        fixed = tuple(c for (axis, _), c in zip(axes, at, strict=True) if axis not in along)
        groups.setdefault(fixed, []).append(chip)
    folded = fold(mesh_group(axes, along), network)
    assert all(fold(chips, network) == folded for chips in groups.values())


def test_a_group_of_sixteen_thousand_chips_folds_into_two_levels():
    axes = (("pp", 8), ("dp", 256), ("tp", 8))
    assert [level.fanout for level in fold(mesh_group(axes, ("pp", "dp", "tp")), HOSTS)] == [8, 2048]
    assert [level.fanout for level in fold(mesh_group(axes, ("dp",)), HOSTS)] == [256]
    assert prod(level.fanout for level in fold(mesh_group(axes, ("pp", "tp")), HOSTS)) == 64
