"""Rings, doubling, direct and Bruck: proved for any number of ranks, and no more rounds or bytes than promised."""

from math import ceil, log2, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.algorithms import direct, doubling, ring
from comms.algorithms.catalog import algorithm_of
from comms.algorithms.rounds import Ranks
from comms.collectives.outline_time import closed_seconds
from comms.collectives.proof import prove
from comms.collectives.schedule import Op, PieceOrder
from comms.networks.groups import Level

PATIENT = settings(max_examples=40)
FAMILIES = (ring, doubling, direct)
EVERY = [
    (each, op) for family in FAMILIES for each in family.ALGORITHMS if each.by_default for op in each.ops
]
each_schedule = pytest.mark.parametrize(("algorithm", "op"), EVERY, ids=[f"{a.name}-{op}" for a, op in EVERY])
ranks = st.integers(1, 20)
DIGITWISE = [
    *(("bruck", op) for op in (Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_REDUCE, Op.ALL_TO_ALL)),
    ("dissemination", Op.BARRIER),
    *(("direct", op) for op in (Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL)),
    ("two-shot", Op.ALL_REDUCE),
    ("pairwise", Op.ALL_TO_ALL),
]


def made(name, op, num_ranks, root=0, fanouts=(), pieces=1):
    return algorithm_of(op, name).make(op, Ranks(num_ranks, root, tuple(fanouts), pieces=pieces))


def rounds_of(schedule):
    return [each for channel in schedule.channels for each in channel.rounds]


def sent_shares(schedule):
    """[rank] What each rank sends over the bytes of the collective."""
    sent = np.zeros(schedule.num_ranks)
    for each in rounds_of(schedule):
        np.add.at(sent, each.pattern.src, schedule.message_shares(each))
    return sent


def crossing_share(schedule, per_host):
    """What leaves the hosts in all, over the bytes of the collective."""
    total = 0.0
    for each in rounds_of(schedule):
        leaves = each.pattern.src // per_host != each.pattern.dst // per_host
        total += schedule.message_shares(each)[leaves].sum()
    return total


@each_schedule
def test_every_algorithm_is_proved_for_1_to_24_ranks(algorithm, op):
    for num_ranks in range(1, 25):
        schedule = algorithm.make(op, Ranks(num_ranks))
        assert (schedule.algorithm, schedule.op, schedule.num_ranks) == (algorithm.name, op, num_ranks)
        prove(schedule)


@PATIENT
@given(st.sampled_from(ring.AROUND), st.data())
def test_rings_go_in_any_order_of_ranks_in_several_channels_and_both_ways(op, data):
    n = data.draw(st.integers(1, 12))
    orders = data.draw(st.lists(st.permutations(range(n)), min_size=1, max_size=3))
    both_ways = data.draw(st.booleans())
    schedule = ring.schedule(op, Ranks(n, pieces=2), orders=orders, both_ways=both_ways)
    prove(schedule)
    assert len(schedule.channels) == (len(orders) * (1 + both_ways) if n > 1 else 0)
    assert all((channel.pieces, channel.order) == (2, PieceOrder.SERIAL) for channel in schedule.channels)


@PATIENT
@given(st.sampled_from((Op.BROADCAST, Op.REDUCE)), st.data())
def test_chains_start_or_end_at_any_root(op, data):
    n = data.draw(st.integers(1, 12))
    prove(ring.chain_schedule(op, Ranks(n, data.draw(st.integers(0, n - 1)), pieces=3)))


def test_a_ring_has_one_pattern_for_all_its_rounds():
    rounds = rounds_of(made("ring", Op.ALL_REDUCE, 16))
    assert len(rounds) == 30
    assert len({id(each.pattern) for each in rounds}) == 1


@given(st.integers(2, 40))
def test_a_ring_sends_every_byte_but_the_own_share_twice(num_ranks):
    shares = sent_shares(made("ring", Op.ALL_REDUCE, num_ranks))
    np.testing.assert_allclose(shares, 2 * (num_ranks - 1) / num_ranks)


@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_every_ring_over_rails_leaves_each_host_once_and_together_by_every_rail(hosts, per_host, data):
    num_rings = data.draw(st.integers(1, per_host))
    orders = ring.rail_orders(hosts * per_host, per_host, num_rings)
    for order in orders:
        leaves = order // per_host != np.roll(order, -1) // per_host
        assert leaves.sum() == (hosts if hosts > 1 else 0)
        crosses_rails = order[leaves] % per_host != np.roll(order, -1)[leaves] % per_host
        assert crosses_rails.sum() == (hosts % 2 if per_host > 1 and hosts > 1 else 0)
    if num_rings == per_host and hosts > 1:
        next_host = [order // per_host != np.roll(order, -1) // per_host for order in orders]
        senders = np.concatenate([order[leaves] for order, leaves in zip(orders, next_host, strict=True)])
        np.testing.assert_array_equal(np.sort(senders), np.arange(hosts * per_host))


@given(st.integers(3, 200), st.floats(1, 1e12), st.floats(1e-7, 1e-3), st.floats(1e8, 1e12))
def test_a_chain_is_cut_into_pieces_until_filling_it_hardly_counts(num_chips, nbytes, latency_s, rate):
    levels = (Level("flat", num_chips, latency_s, rate),)
    pieces = algorithm_of(Op.BROADCAST, ring.RING).cut(Op.BROADCAST, nbytes, levels)
    endless = (num_chips - 1) * latency_s + nbytes / rate
    seconds = closed_seconds(ring.chain_outline(Op.BROADCAST, nbytes, levels, pieces))
    assert endless * (1 - 1e-9) <= seconds <= endless * (1 + 1 / 32 + 1e-9)


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 32])
def test_halving_doubling_takes_few_rounds_and_moves_what_a_ring_moves(num_ranks):
    schedule = made("halving-doubling", Op.ALL_REDUCE, num_ranks)
    assert len(rounds_of(schedule)) == 2 * log2(num_ranks)
    np.testing.assert_allclose(sent_shares(schedule), 2 * (num_ranks - 1) / num_ranks)


def test_rounds_there_and_back_share_their_patterns():
    rounds = rounds_of(made("halving-doubling", Op.ALL_REDUCE, 8))
    assert [id(each.pattern) for each in rounds] == [id(each.pattern) for each in reversed(rounds)]


@pytest.mark.parametrize("op", doubling.HALVES)
def test_large_messages_between_near_ranks_spare_the_network(op):
    ways = 2 if op is Op.ALL_REDUCE else 1
    if_far_ranks_came_first = ways * 32 * (1 / 2 + 1 / 4)  # the two largest of five messages
    assert crossing_share(made("halving-doubling", op, 32), 8) < if_far_ranks_came_first / 7


@PATIENT
@given(st.sampled_from(DIGITWISE), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_going_digit_by_digit_is_proved_for_any_fanouts(which, fanouts):
    prove(made(*which, prod(fanouts), fanouts=fanouts))


@pytest.mark.parametrize("name", ["bruck", "direct"])
@pytest.mark.parametrize("op", [Op.ALL_GATHER, Op.REDUCE_SCATTER])
@given(num_ranks=st.integers(2, 40))
def test_one_way_collectives_send_every_byte_once(name, op, num_ranks):
    np.testing.assert_allclose(sent_shares(made(name, op, num_ranks)), (num_ranks - 1) / num_ranks)


@pytest.mark.parametrize("name", ["direct", "pairwise"])
@given(num_ranks=st.integers(2, 20))
def test_all_to_all_sends_everything_once(name, num_ranks):
    np.testing.assert_allclose(sent_shares(made(name, Op.ALL_TO_ALL, num_ranks)), (num_ranks - 1) / num_ranks)


@given(st.integers(2, 70))
def test_bruck_takes_as_few_rounds_as_can_be(num_ranks):
    fewest = ceil(log2(num_ranks))
    assert len(rounds_of(made("bruck", Op.ALL_GATHER, num_ranks))) == fewest
    assert len(rounds_of(made("bruck", Op.ALL_TO_ALL, num_ranks))) == fewest
    assert len(rounds_of(made("dissemination", Op.BARRIER, num_ranks))) == fewest
    assert len(rounds_of(made("bruck", Op.ALL_REDUCE, num_ranks))) == 2 * fewest


@given(st.integers(2, 40))
def test_what_moves_together_in_bruck_s_all_to_all_is_few_messages(num_ranks):
    assert made("bruck", Op.ALL_TO_ALL, num_ranks).num_messages <= 2 * num_ranks**2


def test_a_barrier_carries_nothing():
    assert sent_shares(made("dissemination", Op.BARRIER, 7)).sum() == 0.0


def test_gathering_digit_by_digit_spares_the_network():
    each_host_gets_once_what_it_lacks = 4 * (3 / 4)
    digits = made("bruck", Op.ALL_GATHER, 32, fanouts=(8, 4))
    assert crossing_share(digits, 8) == pytest.approx(each_host_gets_once_what_it_lacks)
    assert crossing_share(made("bruck", Op.ALL_GATHER, 32), 8) > 4 * each_host_gets_once_what_it_lacks


@PATIENT
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_no_two_ranks_send_directly_to_one_at_a_time(fanouts):
    n = prod(fanouts)
    for each in rounds_of(made("direct", Op.ALL_GATHER, n, fanouts=fanouts)):
        turns = each.pattern.dst.reshape(n - 1, n)
        np.testing.assert_array_equal(each.pattern.src.reshape(n - 1, n), np.tile(np.arange(n), (n - 1, 1)))
        np.testing.assert_array_equal(np.sort(turns), np.tile(np.arange(n), (n - 1, 1)))


@PATIENT
@given(st.integers(1, 6), st.data())
def test_uneven_all_to_all_sends_what_the_table_says(num_ranks, data):
    sizes = st.sampled_from((0.0, 1.0, 7.0, 1e6))
    table = np.array([[data.draw(sizes) for _ in range(num_ranks)] for _ in range(num_ranks)])
    schedule = direct.all_to_allv(table)
    prove(schedule)
    sent = np.zeros_like(table)
    for each in rounds_of(schedule):
        sent[each.pattern.src, each.pattern.dst] += schedule.message_shares(each) * table.sum(axis=1).max()
        assert (schedule.message_shares(each) > 0).all()
    np.testing.assert_allclose(sent, table - np.diag(np.diag(table)))


def test_levels_whose_subgroups_stand_in_rings_have_no_outline_where_chips_send_past_their_neighbours():
    levels = (Level("x", 4, 1e-6, 1e9, ring=True), Level("y", 4, 1e-6, 1e9, ring=True))
    for each in (*direct.ALGORITHMS, *doubling.ALGORITHMS, *ring.ALGORITHMS):
        if each.name not in (doubling.HALVING, doubling.WHOLE):
            assert all(each.outline(op, 1e6, levels) is None for op in each.ops), each.name
    assert doubling.halving_outline(Op.ALL_REDUCE, 1e6, levels) is not None
