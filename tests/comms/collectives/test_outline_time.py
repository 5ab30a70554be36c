"""Closed forms and folded sweeps against schedules that are played message by message, as their docstring says."""

from collections import Counter, defaultdict, deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.algorithms import direct, doubling, ring
from comms.algorithms.catalog import algorithm_of
from comms.algorithms.rounds import Ranks
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.outline_time import closed_seconds, folded_seconds
from comms.collectives.schedule import Channel, Op, Pattern, PieceOrder, Round, Schedule
from comms.networks.groups import Level, num_members

PATIENT = settings(max_examples=60)
EXACT = 1e-9

latencies = st.floats(1e-7, 1e-4)
rates = st.floats(1e8, 1e12)
orders = st.sampled_from(PieceOrder)
hops = st.builds(Hop, latencies, rates)


def play(schedule, nbytes, cost, port):
    """When the last message has arrived: cost(round number, src, dst) is (latency, rate), every wire private."""
    return max((play_channel(schedule, c, nbytes, cost, port) for c in schedule.channels), default=0.0)


def play_channel(schedule, channel, nbytes, cost, port):
    queues, expected, came = defaultdict(list), defaultdict(Counter), defaultdict(lambda: defaultdict(list))
    number = 0
    for phase_number, phase in enumerate(channel.phases):
        end = number + len(phase)
        for each in phase:
            sizes = schedule.message_shares(each) * nbytes / channel.pieces
            for row, (src, dst) in enumerate(pairs(each.pattern)):
                for piece in range(channel.pieces):
                    within = (number, piece) if channel.order is PieceOrder.INTERLEAVED else (piece, number)
                    message = (src, dst, number, piece, sizes[row], end)
                    queues[port(number, src, dst)].append(((phase_number, *within, row), message))
                    expected[dst, piece][number] += 1
            number += 1
    waiting = {key: deque(message for _, message in sorted(queue)) for key, queue in queues.items()}
    return run_queues(waiting, expected, came, cost, channel)


def run_queues(waiting, expected, came, cost, channel):
    free, last, moved = defaultdict(float), 0.0, True

    def has(rank, piece, before):
        """When a rank has all that rounds before this one send it of a piece, if that is known."""
        rounds = [each for each in expected[rank, piece] if each < before]
        if any(len(came[rank, piece][each]) < expected[rank, piece][each] for each in rounds):
            return None
        return max((time for each in rounds for time in came[rank, piece][each]), default=0.0)

    while moved:
        moved = False
        for key, queue in waiting.items():
            while queue:
                src, dst, number, piece, size, end = queue[0]
                needs = [has(src, piece, number)]
                if channel.order is PieceOrder.SERIAL and piece:
                    needs.append(has(src, piece - 1, end))
                if None in needs:
                    break
                latency, rate = cost(number, src, dst)
                free[key] = max(free[key], *needs) + size / rate
                came[dst, piece][number].append(free[key] + latency)
                last, moved = max(last, free[key] + latency), True
                queue.popleft()
    assert not any(waiting.values()), "messages wait for each other in a circle"
    return last


def crossing(levels, src, dst):
    """The outermost level whose digit differs, and the members of one group inside it."""
    found, inner = None, 1
    for index, level in enumerate(levels):
        if src // inner % level.fanout != dst // inner % level.fanout:
            found = index, level, inner
        inner *= level.fanout
    return found


def costs_on(levels, schedule):
    """What messages cost on levels: as many flows leave a group as members send at once, in all channels."""
    flows = defaultdict(dict)
    for index, channel in enumerate(schedule.channels):
        for each in channel.rounds:
            senders = defaultdict(set)
            for src, dst in pairs(each.pattern):
                level, _, inner = crossing(levels, src, dst)
                senders[level, src // inner].add(src)
            for key, members in senders.items():
                seen = flows[key].get(index, 0)
                flows[key][index] = max(seen, len(members))

    def cost(number, src, dst):
        index, level, inner = crossing(levels, src, dst)
        if level.ring:
            return on_wires(level, src // inner % level.fanout, dst // inner % level.fanout, number, schedule)
        return level.latency_s, level.rate(sum(flows[index, src // inner].values()))

    return cost


def on_wires(level, src, dst, number, schedule):
    """One level of chips in a line or ring: its wires are shared by the messages of the round that cross them."""

    def route(a, b):
        ahead, back = (b - a) % level.fanout, (a - b) % level.fanout
        if not level.wraps:
            return [(i, 1) for i in range(a, b)] if a < b else [(i, -1) for i in range(a, b, -1)]
        if ahead < back or (ahead == back and a % 2 == 0):
            return [((a + i) % level.fanout, 1) for i in range(ahead)]
        return [((a - i) % level.fanout, -1) for i in range(back)]

    load = Counter(
        wire
        for channel in schedule.channels
        for pair in set(pairs(channel.rounds[number].pattern))  # several messages of a pair take turns
        for wire in route(*pair)
    )
    path = route(src, dst)
    busiest = max(load[wire] for wire in path)
    return level.latency_s + (len(path) - 1) * level.hop_latency_s, level.bytes_per_s / busiest


def pairs(pattern):
    return list(zip(pattern.src.tolist(), pattern.dst.tolist(), strict=True))


def two_ports(levels):
    """One for the innermost level that parts anything, one for all others."""
    innermost = next((index for index, level in enumerate(levels) if level.fanout > 1), 0)
    return lambda number, src, dst: (src, crossing(levels, src, dst)[0] == innermost)


def one_port(number, src, dst):
    return src


@st.composite
def levels_of(draw, max_levels=3, max_members=24, power_of_two=False):
    fanouts, levels = [], []
    for index in range(draw(st.integers(1, max_levels))):
        choices = [f for f in range(1, 8) if np.prod([*fanouts, f]) <= max_members]
        if power_of_two:
            choices = [f for f in choices if f & (f - 1) == 0]
        fanout = draw(st.sampled_from(choices))
        fanouts.append(fanout)
        port = int(np.prod(fanouts[:-1]) > 1)  # the innermost that parts anything, and all others
        levels.append(Level(f"tier {index}", fanout, draw(latencies), draw(rates), draw(rates), port=port))
    return tuple(levels)


@st.composite
def lines_of_chips(draw, power_of_two=False):
    fanout = draw(st.sampled_from((2, 4, 8, 16)) if power_of_two else st.integers(2, 9))
    wraps = draw(st.booleans())
    return (Level("wires", fanout, draw(latencies), draw(rates), np.inf, draw(latencies), True, wraps),)


def fanouts_of(levels):
    return tuple(level.fanout for level in levels)


def made(name, op, num_ranks, fanouts=(), pieces=1):
    return algorithm_of(op, name).make(op, Ranks(num_ranks, fanouts=tuple(fanouts), pieces=pieces))


def ordered(outline, schedule, order):
    """The same with pieces in this order."""
    channels = tuple(replace(each, order=order) for each in schedule.channels)
    return outline and replace(outline, order=order), replace(schedule, channels=channels)


def agree(outline, schedule, nbytes, levels, port=None):
    played = play(schedule, nbytes, costs_on(levels, schedule), port or two_ports(levels))
    assert outline is not None
    assert outline.algorithm == schedule.algorithm
    assert closed_seconds(outline) == pytest.approx(played, rel=EXACT)
    assert folded_seconds(outline) == pytest.approx(played, rel=EXACT)


@PATIENT
@given(st.sampled_from(ring.AROUND), levels_of(), st.floats(0, 1e9), st.integers(1, 4), orders)
def test_a_ring_is_timed_as_it_is_played(op, levels, nbytes, pieces, order):
    schedule = ring.schedule(op, Ranks(num_members(levels), pieces=pieces))
    outline = ring.outline(op, nbytes, levels, pieces)
    agree(*ordered(outline, schedule, order), nbytes, levels)


@PATIENT
@given(
    st.sampled_from(ring.AROUND), levels_of(max_levels=1), st.floats(0, 1e9), st.integers(1, 3), st.booleans()
)
def test_several_rings_share_the_wires_of_one_level(op, levels, nbytes, rings, both_ways):
    n = num_members(levels)
    schedule = ring.schedule(op, Ranks(n), orders=[np.arange(n)] * rings, both_ways=both_ways)
    outline = ring.outline(op, nbytes, levels, rings=rings, both_ways=both_ways)
    agree(outline, schedule, nbytes, levels)


@PATIENT
@given(
    st.sampled_from(ring.AROUND),
    lines_of_chips(),
    st.floats(0, 1e9),
    st.booleans(),
    st.integers(1, 3),
    orders,
)
def test_a_ring_over_wires_between_neighbours_is_timed_as_it_is_played(
    op, levels, nbytes, both_ways, pieces, order
):
    n = num_members(levels)
    outline = ring.outline(op, nbytes, levels, pieces, both_ways=both_ways)
    if both_ways and (n == 2 or not levels[0].wraps):
        assert outline is None
        return
    schedule = ring.schedule(op, Ranks(n, pieces=pieces), both_ways=both_ways)
    agree(*ordered(outline, schedule, order), nbytes, levels)


@PATIENT
@given(st.sampled_from((Op.BROADCAST, Op.REDUCE)), levels_of(), st.floats(0, 1e9), st.integers(1, 5))
def test_a_chain_is_timed_as_it_is_played(op, levels, nbytes, pieces):
    schedule = ring.chain_schedule(op, Ranks(num_members(levels), pieces=pieces))
    agree(ring.chain_outline(op, nbytes, levels, pieces), schedule, nbytes, levels)


@PATIENT
@given(
    st.sampled_from(doubling.HALVES),
    levels_of(power_of_two=True, max_members=32) | lines_of_chips(power_of_two=True),
    st.floats(0, 1e9),
)
def test_halving_doubling_is_timed_as_it_is_played(op, levels, nbytes):
    schedule = made("halving-doubling", op, num_members(levels))
    agree(doubling.halving_outline(op, nbytes, levels), schedule, nbytes, levels, one_port)


@PATIENT
@given(levels_of(power_of_two=True, max_members=32), st.floats(0, 1e9))
def test_recursive_doubling_is_timed_as_it_is_played(levels, nbytes):
    schedule = made("recursive doubling", Op.ALL_REDUCE, num_members(levels))
    agree(doubling.whole_outline(Op.ALL_REDUCE, nbytes, levels), schedule, nbytes, levels)


def test_doubling_of_surplus_ranks_has_no_outline():
    levels = (Level("flat", 6, 1e-6, 1e9),)
    assert doubling.halving_outline(Op.ALL_REDUCE, 1e6, levels) is None
    assert doubling.whole_outline(Op.ALL_REDUCE, 1e6, levels) is None


@PATIENT
@given(
    st.sampled_from((Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL)),
    levels_of(),
    st.floats(0, 1e9),
    st.booleans(),
)
def test_one_round_is_timed_as_it_is_played(op, levels, nbytes, has_one_port):
    schedule = made("direct", op, num_members(levels), fanouts_of(levels))
    if has_one_port:
        levels = tuple(replace(level, port=0) for level in levels)
    outline = direct.outline(op, nbytes, levels)
    agree(outline, schedule, nbytes, levels, one_port if has_one_port else None)


@PATIENT
@given(levels_of(max_levels=1), st.floats(0, 1e9))
def test_two_rounds_are_timed_as_they_are_played(levels, nbytes):
    schedule = made("two-shot", Op.ALL_REDUCE, num_members(levels))
    agree(direct.two_shot_outline(Op.ALL_REDUCE, nbytes, levels), schedule, nbytes, levels)


@PATIENT
@given(levels_of(), st.floats(0, 1e9))
def test_pairwise_all_to_all_is_timed_as_it_is_played(levels, nbytes):
    schedule = made("pairwise", Op.ALL_TO_ALL, num_members(levels), fanouts_of(levels))
    agree(direct.pairwise_outline(Op.ALL_TO_ALL, nbytes, levels), schedule, nbytes, levels)


@PATIENT
@given(levels_of(), st.floats(0, 1e9))
def test_scatter_is_timed_as_it_is_played(levels, nbytes):
    schedule = made("direct", Op.SCATTER, num_members(levels))
    agree(direct.outline(Op.SCATTER, nbytes, levels), schedule, nbytes, levels)


@given(st.integers(2, 9), st.floats(0, 1e9), hops)
def test_what_is_gathered_shares_the_way_into_the_root(num_chips, nbytes, hop):
    levels = (Level("flat", num_chips, hop.latency_s, hop.bytes_per_s),)
    outline = direct.outline(Op.GATHER, nbytes, levels)
    seconds = hop.latency_s + nbytes * (num_chips - 1) / num_chips / hop.bytes_per_s
    assert closed_seconds(outline) == pytest.approx(seconds)


@PATIENT
@given(st.sampled_from((*doubling.HALVES, Op.ALL_TO_ALL)), levels_of(), st.floats(0, 1e9))
def test_bruck_is_timed_as_it_is_played(op, levels, nbytes):
    schedule = made("bruck", op, num_members(levels), fanouts_of(levels))
    agree(doubling.bruck_outline(op, nbytes, levels), schedule, nbytes, levels, one_port)


@PATIENT
@given(levels_of())
def test_a_barrier_is_timed_as_it_is_played(levels):
    schedule = made("dissemination", Op.BARRIER, num_members(levels), fanouts_of(levels))
    agree(doubling.bruck_outline(Op.BARRIER, 0.0, levels), schedule, 0.0, levels, one_port)


@st.composite
def outlines(draw, own_ports=True):
    positions = draw(st.integers(1, 4))
    order = draw(orders)
    own = st.booleans() if own_ports or order is PieceOrder.INTERLEAVED else st.just(False)
    stages = st.builds(
        OutlineStage,
        st.integers(0, 5),
        st.floats(0, 1e7),
        st.sampled_from((1, positions)).flatmap(lambda p: st.tuples(*[hops] * p)),
        own,
    )
    phases = draw(st.lists(st.lists(stages, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4))
    ports = tuple(draw(st.integers(0, 2)) for _ in phases)
    return Outline("any", tuple(phases), ports, draw(st.integers(1, 4)), order)


@settings(max_examples=300)
@given(outlines())
def test_closed_is_folded(outline):
    assert closed_seconds(outline) == pytest.approx(folded_seconds(outline), rel=EXACT, abs=1e-15)


@settings(max_examples=150)
@given(outlines(own_ports=False))
def test_any_outline_is_timed_as_chips_play_it(outline):
    """Two groups of positions in a ring; stages with one hop are exchanges between the groups."""
    positions = max(len(stage.hops) for phase in outline.phases for stage in phase)
    chips = np.arange(2 * positions)
    phases, stage_of, port_of = [], [], []
    for phase, port in zip(outline.phases, outline.ports, strict=True):
        rounds = []
        for stage in phase:
            step = 1 if len(stage.hops) > 1 else positions
            pattern = Pattern(chips, (chips + step) % len(chips))
            for _ in range(stage.repeat):
                rounds.append(Round(pattern, 0 * chips, 0 * chips + 1, reduces=False))
                stage_of.append(stage)
                port_of.append(len(port_of) + 10 if stage.own_ports else port)
        phases.append(tuple(rounds))
    channel = Channel(tuple(phases), outline.pieces, outline.order)
    schedule = Schedule(Op.BROADCAST, "any", len(chips), 1, 1.0, (channel,))

    def cost(number, src, dst):
        hop = stage_of[number].hops[src % positions % len(stage_of[number].hops)]
        return hop.latency_s, hop.bytes_per_s / max(stage_of[number].nbytes, 1e-300)

    played = play(schedule, 1.0, cost, lambda number, src, dst: (src, port_of[number]))
    assert folded_seconds(outline) == pytest.approx(played, rel=EXACT, abs=1e-15)
    assert closed_seconds(outline) == pytest.approx(played, rel=EXACT, abs=1e-15)


@settings(max_examples=100)
@given(
    st.lists(hops, min_size=1, max_size=8), st.integers(1, 400), st.floats(0, 1e7), st.integers(1, 5), orders
)
def test_a_long_ring_is_followed_to_its_end(ring_hops, rounds, nbytes, pieces, order):
    outline = Outline("ring", ((OutlineStage(rounds, nbytes, tuple(ring_hops)),),), (0,), pieces, order)
    assert closed_seconds(outline) == pytest.approx(folded_seconds(outline), rel=EXACT)


def test_a_path_once_around_may_be_the_longest_when_the_slowest_wires_nearly_tie():
    slow = (Hop(8.329160468417061e-05, 517970616209.0), Hop(6.781699252508934e-05, 405589675204.0))
    tied = (Hop(8.765415765044081e-05, 178454146655.0), Hop(8.765415765044081e-05, 178453439888.0))
    ahead = (
        Hop(1e-05, 356162330012.0),
        Hop(1e-07, 37465444051.0),
        Hop(3.7e-05, 42971425595.0),
        Hop(1e-07, 6e11),
    )
    outline = Outline(
        "ring", ((OutlineStage(10, 5618175.0, ahead + slow + tied),),), (0,), 2, PieceOrder.SERIAL
    )
    assert closed_seconds(outline) == pytest.approx(folded_seconds(outline), rel=1e-12)


@given(st.integers(1, 9), hops, st.floats(0, 1e9), st.integers(1, 9), st.integers(1, 9))
def test_pieces_on_one_port_hide_latency_or_keep_it_busy(chips, hop, nbytes, pieces, rounds):
    wire = nbytes / pieces / hop.bytes_per_s
    outline = Outline("any", ((OutlineStage(rounds, nbytes, (hop,)),),), (0,), pieces, PieceOrder.INTERLEAVED)
    whole = rounds * (wire + hop.latency_s) + (pieces - 1) * wire
    assert closed_seconds(outline) == pytest.approx(max(whole, rounds * pieces * wire + hop.latency_s))


@given(st.lists(hops, min_size=1, max_size=4), st.floats(0, 1e9), st.integers(1, 9))
def test_pieces_through_phases_are_a_flow_shop(phase_hops, nbytes, pieces):
    phases = tuple((OutlineStage(3, nbytes, (hop,)),) for hop in phase_hops)
    outline = Outline("any", phases, tuple(range(len(phases))), pieces, PieceOrder.SERIAL)
    through = [3 * (hop.latency_s + nbytes / pieces / hop.bytes_per_s) for hop in phase_hops]
    assert closed_seconds(outline) == pytest.approx(sum(through) + (pieces - 1) * max(through))


def test_nothing_to_do_takes_no_time():
    one = (Level("alone", 1, 1e-6, 1e9),)
    for each in (*ring.ALGORITHMS[:2], *doubling.ALGORITHMS, *direct.ALGORITHMS):
        for op in each.ops:
            outline = each.outline(op, 1e6, one)
            assert closed_seconds(outline) == folded_seconds(outline) == 0.0
