"""Trees, hierarchies, tori and switches that reduce: proved, as frugal as promised, and as long as played out."""

from dataclasses import dataclass
from itertools import pairwise
from math import inf, log2, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.algorithms import (
    binomial_trees,
    double_trees,
    in_network,
    torus_exchange,
    torus_rings,
    torus_trees,
)
from comms.algorithms.catalog import algorithm_of
from comms.algorithms.hierarchical import hierarchical, hierarchical_exchange, hierarchical_rooted
from comms.algorithms.hierarchical.hierarchical import Crossing
from comms.algorithms.hierarchical.hierarchical_rooted import LINEAR
from comms.algorithms.rounds import Ranks
from comms.collectives.outline import Hop
from comms.collectives.outline_time import closed_seconds, folded_seconds
from comms.collectives.proof import prove
from comms.collectives.schedule import Op, PieceOrder
from comms.errors import CommsError
from comms.networks.groups import Level

PATIENT = settings(max_examples=30)
FAMILIES = (
    binomial_trees,
    hierarchical,
    hierarchical_rooted,
    torus_rings,
    torus_trees,
    torus_exchange,
    in_network,
)
DOUBLE_TREE = double_trees.ALGORITHMS[0]
EVERY = [(each, op) for family in FAMILIES for each in family.ALGORITHMS for op in each.ops]
EVERY.append((DOUBLE_TREE, Op.ALL_REDUCE))
each_schedule = pytest.mark.parametrize(("algorithm", "op"), EVERY, ids=[f"{a.name}-{op}" for a, op in EVERY])
HIERARCHIES = [each.name for each in hierarchical.ALGORITHMS]
SIZES = (*range(1, 18), 32)
NBYTES = 8.0
ROOTED = (Op.BROADCAST, Op.REDUCE, Op.SCATTER, Op.GATHER)
latencies = st.sampled_from([0.0, 0.1, 0.7, 1.5, 5.0])
rates = st.sampled_from([0.5, 1.0, 2.0])
few_digits = st.one_of(
    st.lists(st.integers(2, 5), min_size=2, max_size=2), st.lists(st.integers(2, 3), min_size=3, max_size=3)
)


# A network played out: every message leaves when its chip may send it, and shares its wires max-min fairly.


@dataclass(frozen=True)
class Wires:
    """Wires by name, and the ones that a message crosses."""

    bytes_per_s: dict
    latency_s: dict
    route: object


@dataclass(eq=False)
class Message:
    stream: int
    piece: int
    number: int  # of its round in the channel
    phase_end: int
    src: int
    dst: int
    nbytes: float
    wires: list


def messages_of(schedule, nbytes, wires, at_once):
    """(place in the order of its port, port, message); `at_once`: a round's messages have a port each."""
    for stream, channel in enumerate(schedule.channels):
        number = end = 0
        for phase, rounds in enumerate(channel.phases):
            end += len(rounds)
            for each in rounds:
                sizes, taken = schedule.message_shares(each) * nbytes / channel.pieces, {}
                columns = (each.pattern.src.tolist(), each.pattern.dst.tolist(), sizes.tolist())
                for src, dst, size in zip(*columns, strict=True):
                    route = wires.route(src, dst)
                    lane = taken[src, route[0]] = taken.get((src, route[0]), -1) + at_once
                    for piece in range(channel.pieces):
                        serial = channel.order is PieceOrder.SERIAL
                        order = (phase, piece, number) if serial else (phase, number, piece)
                        message = Message(stream, piece, number, end, src, dst, size, route)
                        yield order, (stream, src, route[0], lane), message
                number += 1


def played(schedule, nbytes, wires, at_once=False):
    """Seconds until the last message is there."""
    queues, coming = {}, {}
    for _, port, message in sorted(messages_of(schedule, nbytes, wires, at_once), key=lambda row: row[0]):
        queues.setdefault(port, []).insert(0, message)
        missing = coming.setdefault((message.stream, message.piece, message.dst), {})
        missing[message.number] = missing.get(message.number, 0) + 1
    serial = [channel.order is PieceOrder.SERIAL for channel in schedule.channels]

    def has(message, piece, end):
        missing = coming.get((message.stream, piece, message.src), {})
        return not any(count and number < end for number, count in missing.items())

    def may_leave(message):
        waits = serial[message.stream] and message.piece
        return has(message, message.piece, message.number) and not (
            waits and not has(message, message.piece - 1, message.phase_end)
        )

    now, moving, flying = 0.0, {}, []
    while queues or moving or flying:
        for port in [port for port in queues if port not in moving and may_leave(queues[port][-1])]:
            moving[port] = queues[port].pop()
            queues.update() if queues[port] else queues.pop(port)
        speeds = fair_rates(list(moving.values()), wires.bytes_per_s)
        left = [now + m.nbytes / speed for m, speed in zip(moving.values(), speeds, strict=True)]
        assert left or flying, "nothing can leave any more"
        before, now = now, min([*left, *(at for at, _ in flying)])
        for message, speed in zip(moving.values(), speeds, strict=True):
            message.nbytes -= (now - before) * speed
        for port in [port for port, message in moving.items() if message.nbytes <= 1e-9 * nbytes]:
            message = moving.pop(port)
            flying.append((now + sum(wires.latency_s[wire] for wire in message.wires), message))
        for _, message in [row for row in flying if row[0] <= now * (1 + 1e-12)]:
            coming[message.stream, message.piece, message.dst][message.number] -= 1
        flying = [row for row in flying if row[0] > now * (1 + 1e-12)]
    return now


def fair_rates(messages, bytes_per_s):
    """Progressive filling: all grow alike until a wire is full; those on it stay, the others grow on."""
    speeds, growing = [0.0] * len(messages), set(range(len(messages)))
    room = {wire: bytes_per_s[wire] for message in messages for wire in message.wires}
    while growing:
        count = {}
        for index in growing:
            for wire in messages[index].wires:
                count[wire] = count.get(wire, 0) + 1
        full = min(count, key=lambda wire: room[wire] / count[wire])
        share = room[full] / count[full]
        for index in [index for index in growing if full in messages[index].wires]:
            speeds[index] = share
            growing.remove(index)
            for wire in messages[index].wires:
                room[wire] -= share
    return speeds


def tiered(levels):
    """A switch per group and level; chips have the ports that levels name; groups share their pool."""
    sizes = [prod(level.fanout for level in levels[:k]) for k in range(len(levels) + 1)]
    bytes_per_s, latency_s = {}, {}
    for k, level in enumerate(levels):
        for chip in range(sizes[-1]):
            for way in ("out", "in"):
                port, pool = (way, level.port, chip), (way, "pool", k, chip)
                bytes_per_s[port], latency_s[port] = level.bytes_per_s, 0.0
                bytes_per_s[pool], latency_s[pool] = level.pool_bytes_per_s, level.latency_s / 2

    def route(src, dst):
        k = max(k for k, size in enumerate(sizes[:-1]) if src // size != dst // size)
        pools = [("out", "pool", k, src // sizes[k]), ("in", "pool", k, dst // sizes[k])]
        return [("out", levels[k].port, src), *pools, ("in", levels[k].port, dst)]

    return Wires(bytes_per_s, latency_s, route)


def board(level):
    """A wire from every chip to every other one."""
    pairs = [(a, b) for a in range(level.fanout) for b in range(level.fanout)]
    alike = dict.fromkeys(pairs, level.bytes_per_s), dict.fromkeys(pairs, level.latency_s)
    return Wires(*alike, lambda src, dst: [(src, dst)])


def grid(levels):
    """Wires between neighbours in every dimension; two chips have one link."""
    fanouts = [level.fanout for level in levels]
    inners = [prod(fanouts[:k]) for k in range(len(fanouts))]
    names = [(k, chip, step) for k in range(len(levels)) for chip in range(prod(fanouts)) for step in (1, -1)]
    bytes_per_s = {name: levels[name[0]].bytes_per_s for name in names}
    latency_s = {name: levels[name[0]].latency_s for name in names}

    def route(src, dst):
        (k,) = [k for k, inner in enumerate(inners) if src // inner % fanouts[k] != dst // inner % fanouts[k]]
        by = (dst - src) // inners[k]
        step = by if abs(by) == 1 else -by // abs(by)
        assert abs(by) == 1 or (abs(by) == fanouts[k] - 1 and levels[k].wraps), "not a neighbour"
        return [(k, src, step)]

    return Wires(bytes_per_s, latency_s, route)


def switches(levels):
    """Chips under leaves under a spine, nodes in that order; each wire is named by its lower end."""
    chips, leaves = prod(level.fanout for level in levels), prod(level.fanout for level in levels[1:])
    bytes_per_s, latency_s = {}, {}
    for low in range(chips + leaves):
        level, inside_s = (levels[0], 0.0) if low < chips else (levels[-1], levels[0].latency_s)
        for way in ("up", "down"):
            bytes_per_s[way, low] = level.pool_bytes_per_s
            latency_s[way, low] = (level.latency_s - inside_s) / 2
    return Wires(bytes_per_s, latency_s, lambda src, dst: [("up", src) if src < dst else ("down", dst)])


@st.composite
def switched_levels(draw, digits, tapered=True, own_ports=False):
    """Levels with the fanouts drawn; a group has all that its members have outwards, or less."""
    levels, inner, port, rate = [], 1, 0, draw(rates)
    for fanout in draw(digits):
        if levels and (own_ports or draw(st.booleans())):
            port, rate = port + 1, draw(rates)
        pool = rate * inner / (draw(st.sampled_from([1, 1, 2, 4])) if tapered else 1)
        levels.append(Level("switch", fanout, draw(latencies), rate, pool, port=port))
        inner *= fanout
    return tuple(levels)


@st.composite
def lattices(draw, digits, rings=False):
    """Rings and lines, as `comms.networks.fabrics.torus_mesh` tells them."""
    levels, inner = [], 1
    for fanout in draw(digits):
        latency, rate = draw(latencies), draw(rates)
        pool, wraps = inner * (1 if fanout == 2 else 2) * rate, fanout > 2 and (rings or draw(st.booleans()))
        levels.append(Level("wire", fanout, latency, rate, pool, latency, ring=True, wraps=wraps))
        inner *= fanout
    return tuple(levels)


def fanouts_of(levels):
    return tuple(level.fanout for level in levels)


def rounds_of(schedule):
    return [each for channel in schedule.channels for each in channel.rounds]


def sent_shares(schedule, inner=1, outer=inf):
    """[rank] What each rank sends over the bytes of the collective, across digits between inner and outer."""
    sent = np.zeros(schedule.num_ranks + schedule.num_helpers)
    for each in rounds_of(schedule):
        src, dst = each.pattern.src, each.pattern.dst
        far = src // inner != dst // inner
        near = src // outer == dst // outer if outer < inf else far
        np.add.at(sent, src, schedule.message_shares(each) * (far & near))
    return sent


def made(name, op, num_ranks, root=0, fanouts=(), pieces=1, **more):
    ranks = Ranks(num_ranks, root, tuple(fanouts), pieces=pieces, **more)
    return algorithm_of(op, name).make(op, ranks)


def sketched(name, op, nbytes, levels, pieces=1):
    """The outline in so many pieces, or None."""
    each = algorithm_of(op, name)
    if not each.suits(op, levels):
        return None
    return each.sketch(op, nbytes, levels, *(() if each.cut is None else (pieces,)))


def ranks_for(name, num_ranks):
    """The nearest number of ranks that an algorithm by this name takes."""
    return 1 << round(log2(num_ranks)) if Crossing.DOUBLING in name else num_ranks


# What a schedule does


@each_schedule
def test_every_algorithm_is_proved_for_its_ranks_and_roots(algorithm, op):
    for num_ranks in sorted({ranks_for(algorithm.name, size) for size in SIZES}):
        for root in {0, num_ranks // 2, num_ranks - 1} if op in ROOTED else {0}:
            schedule = algorithm.make(op, Ranks(num_ranks, root))
            assert (schedule.algorithm, schedule.op) == (algorithm.name, op)
            assert (schedule.num_ranks, schedule.root) == (num_ranks, root)
            prove(schedule)


@each_schedule
@settings(max_examples=6)
@given(data=st.data())
def test_every_algorithm_over_levels_is_proved(algorithm, op, data):
    most = 2 if algorithm.name == in_network.NAME else 4
    sizes = st.sampled_from([2, 4]) if Crossing.DOUBLING in algorithm.name else st.integers(1, 4)
    fanouts = data.draw(st.lists(sizes, min_size=1, max_size=most).filter(lambda f: prod(f) <= 64))
    num_ranks = prod(fanouts)
    root = data.draw(st.integers(0, num_ranks - 1)) if op in ROOTED else 0
    prove(algorithm.make(op, Ranks(num_ranks, root, tuple(fanouts))))


@PATIENT
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_from_and_to_any_root_levels_may_be_rings_each_for_itself(fanouts, data):
    rings = tuple(data.draw(st.booleans()) for _ in fanouts)
    num_ranks = prod(fanouts)
    ranks = Ranks(num_ranks, data.draw(st.integers(0, num_ranks - 1)), tuple(fanouts), rings)
    for each in hierarchical_rooted.ALGORITHMS:
        for op in each.ops:
            if not (op is Op.REDUCE and Crossing.DOUBLING in each.name):
                prove(each.make(op, ranks))


@PATIENT
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_dimensions_may_wrap_around_or_not_each_for_itself(fanouts, data):
    wraps = tuple(data.draw(st.booleans()) for _ in fanouts)
    for each in torus_rings.ALGORITHMS[:3]:
        for op in each.ops:
            schedule = each.make(op, Ranks(prod(fanouts), fanouts=tuple(fanouts), wraps=wraps))
            assert schedule.op is op
            prove(schedule)


@pytest.mark.parametrize("name", [double_trees.DOUBLE, torus_rings.LINE])
@given(num_ranks=st.integers(1, 17), pieces=st.integers(1, 6))
@PATIENT
def test_pieces_that_are_chunks_are_proved(name, num_ranks, pieces):
    prove(made(name, Op.ALL_REDUCE, num_ranks, pieces=pieces))


@each_schedule
def test_rounds_alike_share_a_pattern(algorithm, op):
    for channel in algorithm.make(op, Ranks(16)).channels:
        found = {(e.pattern.src.tobytes(), e.pattern.dst.tobytes()): e.pattern for e in channel.rounds}
        assert len({id(each.pattern) for each in channel.rounds}) == len(found)


def test_what_cannot_be_is_refused():
    with pytest.raises(CommsError, match="6 ranks"):
        made("hierarchical ring, halving-doubling", Op.ALL_REDUCE, 12, fanouts=(2, 6))


# How much it sends


@pytest.mark.parametrize("num_ranks", SIZES)
def test_a_binomial_tree_sends_to_everyone_once_in_log2_rounds(num_ranks):
    for op in (Op.BROADCAST, Op.SCATTER):
        schedule = made(binomial_trees.BINOMIAL, op, num_ranks, num_ranks // 2)
        receivers = [dst for each in rounds_of(schedule) for dst in np.unique(each.pattern.dst).tolist()]
        assert sorted([*receivers, num_ranks // 2]) == list(range(num_ranks))
        assert len(rounds_of(schedule)) == (num_ranks - 1).bit_length()


@pytest.mark.parametrize("num_ranks", SIZES[1:])
def test_in_two_trees_no_rank_has_children_in_both(num_ranks):
    first, second = (set(parents.tolist()) - {-1} for parents in double_trees.double_trees(num_ranks))
    assert not first & second
    assert (
        max(
            np.bincount([p for p in parents if p >= 0]).max()
            for parents in double_trees.double_trees(num_ranks)
        )
        <= 2
    )
    schedule = made(double_trees.DOUBLE, Op.ALL_REDUCE, num_ranks, pieces=3)
    assert sent_shares(schedule).max() <= 2.0
    assert sent_shares(schedule).sum() == pytest.approx(2 * (num_ranks - 1))
    assert schedule.num_messages == 4 * 3 * (num_ranks - 1)


@PATIENT
@given(
    few_digits,
    st.sampled_from([Crossing.RING, Crossing.DIRECT]),
    st.sampled_from([Crossing.RING, Crossing.DIRECT]),
)
def test_hierarchies_send_less_the_further_out(fanouts, first, others):
    num_ranks, inner = prod(fanouts), 1
    for op, factor in ((Op.ALL_REDUCE, 2), (Op.REDUCE_SCATTER, 1), (Op.ALL_GATHER, 1)):
        ranks = Ranks(num_ranks, fanouts=tuple(fanouts))
        schedule = hierarchical.schedule(op, ranks, ways=(first, others))
        for fanout, inner in zip(fanouts, np.cumprod([1, *fanouts]).tolist(), strict=False):
            sent = sent_shares(schedule, inner, inner * fanout)
            np.testing.assert_allclose(sent, factor * (fanout - 1) / fanout / inner)


@PATIENT
@given(few_digits)
def test_a_hierarchical_all_to_all_crosses_each_level_once(fanouts):
    schedule = made(hierarchical_exchange.NAME, Op.ALL_TO_ALL, prod(fanouts), fanouts=fanouts)
    for fanout, inner in zip(fanouts, np.cumprod([1, *fanouts]).tolist(), strict=False):
        np.testing.assert_allclose(sent_shares(schedule, inner, inner * fanout), (fanout - 1) / fanout)


@PATIENT
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_levels_of_one_port_are_crossed_at_once_in_an_all_to_all(group, hosts, units):
    fanouts = (group, hosts, units)
    schedule = made(
        hierarchical_exchange.NAME, Op.ALL_TO_ALL, prod(fanouts), fanouts=fanouts, ports=(0, 1, 1)
    )
    prove(schedule)
    assert sum(len(channel.phases) for channel in schedule.channels) == (group > 1) + (hosts * units > 1)
    leaves = sent_shares(schedule, group, prod(fanouts))
    np.testing.assert_allclose(leaves, (hosts * units - 1) / (hosts * units))


@PATIENT
@given(st.lists(st.integers(3, 4), min_size=2, max_size=3))
def test_a_rotated_torus_loads_all_wires_of_a_dimension_alike(fanouts):
    num_ranks = prod(fanouts)
    schedule = made(torus_rings.ROTATED, Op.ALL_REDUCE, num_ranks, fanouts=fanouts)
    assert len(schedule.channels) == 2 * len(fanouts)
    np.testing.assert_allclose(sent_shares(schedule), 2 * (num_ranks - 1) / num_ranks)
    if len(set(fanouts)) == 1:
        inner = np.cumprod([1, *fanouts]).tolist()
        for low, high in pairwise(inner):
            expected = 2 * (num_ranks - 1) / num_ranks / len(fanouts)
            np.testing.assert_allclose(sent_shares(schedule, low, high), expected)


@pytest.mark.parametrize("num_ranks", SIZES[2:])
def test_on_a_line_the_all_reduce_sends_the_buffer_over_every_wire_once(num_ranks):
    crossed = {}
    schedule = made(torus_rings.LINE, Op.ALL_REDUCE, num_ranks, pieces=4)
    for each in rounds_of(schedule):
        for src, dst in zip(each.pattern.src.tolist(), each.pattern.dst.tolist(), strict=True):
            crossed[src, dst] = crossed.get((src, dst), 0) + 1 / schedule.num_chunks
    ends = [(at, at + 1) for at in range(num_ranks - 1)]
    assert crossed == pytest.approx(dict.fromkeys([*ends, *((b, a) for a, b in ends)], 1.0))


@pytest.mark.parametrize("fanouts", [(5,), (8,), (3, 4), (4, 2)])
def test_switches_have_everyone_send_and_get_the_buffer_once(fanouts):
    num_ranks = prod(fanouts)
    schedule = made(in_network.NAME, Op.ALL_REDUCE, num_ranks, fanouts=fanouts)
    np.testing.assert_allclose(sent_shares(schedule)[:num_ranks], 1.0)
    got = np.zeros(num_ranks + schedule.num_helpers)
    for each in rounds_of(schedule):
        np.add.at(got, each.pattern.dst, schedule.message_shares(each))
    np.testing.assert_allclose(got[:num_ranks], 1.0)
    for op in (Op.REDUCE_SCATTER, Op.ALL_GATHER):
        whole = made(in_network.NAME, op, num_ranks, fanouts=fanouts)
        sent = (num_ranks - 1 if op is Op.REDUCE_SCATTER else 1) / num_ranks
        np.testing.assert_allclose(sent_shares(whole)[:num_ranks], sent)


# How long it takes


def check_time(outline, schedule, wires, at_once=False):
    assert outline is not None
    assert outline.algorithm == schedule.algorithm
    seconds = closed_seconds(outline)
    assert folded_seconds(outline) == pytest.approx(seconds, rel=1e-9)
    assert played(schedule, NBYTES, wires, at_once) == pytest.approx(seconds, rel=1e-6)


@PATIENT
@given(switched_levels(st.lists(st.integers(2, 17), min_size=1, max_size=1), tapered=False), st.data())
def test_trees_in_one_level_take_as_long_as_outlined(levels, data):
    (level,) = levels
    root = data.draw(st.integers(0, level.fanout - 1))
    open_board = Level("board", level.fanout, level.latency_s, level.bytes_per_s, level.bytes_per_s * 16)
    for one, wires in ((levels, tiered(levels)), ((open_board,), board(open_board))):
        for each in binomial_trees.ALGORITHMS[:2]:
            for op in each.ops:
                schedule = each.make(op, Ranks(level.fanout, root))
                check_time(each.outline(op, NBYTES, one), schedule, wires)


@PATIENT
@given(switched_levels(few_digits, tapered=False), st.data())
def test_trees_over_levels_take_as_long_as_outlined(levels, data):
    num_ranks = prod(fanouts_of(levels))
    root = data.draw(st.integers(0, num_ranks - 1))
    for op in ROOTED:
        schedule = made(binomial_trees.BINOMIAL, op, num_ranks, root, fanouts_of(levels))
        check_time(sketched(binomial_trees.BINOMIAL, op, NBYTES, levels), schedule, tiered(levels))


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7, 8, 15, 16])
@pytest.mark.parametrize("latency", [0.0, 0.3, 2.5])
def test_a_full_double_tree_takes_as_long_as_outlined(num_ranks, latency):
    levels = (Level("switch", num_ranks, latency, 1.0, 1.0),)
    for pieces in (1, 2, 5, 12):
        schedule = made(double_trees.DOUBLE, Op.ALL_REDUCE, num_ranks, pieces=pieces)
        outline = sketched(double_trees.DOUBLE, Op.ALL_REDUCE, NBYTES, levels, pieces)
        check_time(outline, schedule, tiered(levels), at_once=True)


@pytest.mark.parametrize("num_ranks", [5, 6, 9, 11, 13])
def test_other_double_trees_take_at_most_as_long_as_outlined(num_ranks):
    levels = (Level("switch", num_ranks, 0.1, 1.0, 1.0),)
    for pieces, slack in ((1, 1.15), (32, 1.01)):
        schedule = made(double_trees.DOUBLE, Op.ALL_REDUCE, num_ranks, pieces=pieces)
        bound = closed_seconds(sketched(double_trees.DOUBLE, Op.ALL_REDUCE, NBYTES, levels, pieces))
        assert bound / slack <= played(schedule, NBYTES, tiered(levels), at_once=True) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("name", HIERARCHIES)
@settings(max_examples=8)
@given(data=st.data())
def test_hierarchies_take_as_long_as_outlined(name, data):
    digits = st.lists(
        st.sampled_from([2, 4] if Crossing.DOUBLING in name else [2, 3, 4]), min_size=2, max_size=2
    )
    levels = data.draw(switched_levels(st.one_of(digits, st.just([2, 2, 2]))))
    num_ranks, fanouts = prod(fanouts_of(levels)), fanouts_of(levels)
    at_once = data.draw(st.booleans())
    for op in hierarchical.ALGORITHMS[0].ops:
        pieces = 3 if len(fanouts) == 2 and num_ranks <= 9 and not at_once else 1
        schedule = made(name, op, num_ranks, fanouts=fanouts, pieces=pieces)
        check_time(sketched(name, op, NBYTES, levels, pieces), schedule, tiered(levels), at_once)


def rooted(op, levels, data, *, name=LINEAR, pieces=1):
    """Outline and schedule of a hierarchy to or from any root."""
    num_ranks = prod(fanouts_of(levels))
    root = data.draw(st.integers(0, num_ranks - 1))
    schedule = made(name, op, num_ranks, root, fanouts_of(levels), pieces)
    return sketched(name, op, NBYTES, levels, pieces), schedule


def check_rooted(op, levels, data, **options):
    check_time(*rooted(op, levels, data, **options), tiered(levels))


@pytest.mark.parametrize("name", HIERARCHIES)
@settings(max_examples=8)
@given(data=st.data())
def test_hierarchical_reduces_take_as_long_as_outlined(name, data):
    digits = st.lists(
        st.sampled_from([2, 4] if Crossing.DOUBLING in name else [2, 3, 4]), min_size=2, max_size=2
    )
    shapes = st.one_of(digits, st.just([2, 2, 2]))
    check_rooted(Op.REDUCE, data.draw(switched_levels(shapes)), data, name=name)
    levels, pieces = data.draw(switched_levels(shapes, own_ports=True)), data.draw(st.integers(2, 4))
    check_rooted(Op.REDUCE, levels, data, name=name, pieces=pieces)


@PATIENT
@given(switched_levels(few_digits), switched_levels(few_digits, own_ports=True), st.data())
def test_hierarchical_gathers_take_as_long_as_outlined(levels, own_ports, data):
    check_rooted(Op.GATHER, levels, data)
    check_rooted(Op.GATHER, own_ports, data, pieces=data.draw(st.integers(2, 3)))


@PATIENT
@given(switched_levels(few_digits, False), switched_levels(few_digits, False, True), st.data())
def test_hierarchical_scatters_take_as_long_as_outlined(levels, own_ports, data):
    check_rooted(Op.SCATTER, levels, data)
    check_rooted(Op.SCATTER, own_ports, data, pieces=data.draw(st.integers(2, 3)))


@PATIENT
@given(switched_levels(few_digits, tapered=False, own_ports=True), st.data())
def test_hierarchical_broadcasts_over_ports_of_their_own_take_as_long_as_outlined(levels, data):
    check_rooted(Op.BROADCAST, levels, data, name="hierarchical ring")


@PATIENT
@given(switched_levels(few_digits, tapered=False, own_ports=True), st.integers(2, 6), st.data())
def test_a_broadcast_in_pieces_takes_a_few_messages_of_one_piece_more_than_outlined(levels, pieces, data):
    outline, schedule = rooted(Op.BROADCAST, levels, data, name="hierarchical ring", pieces=pieces)
    ratio = played(schedule, NBYTES, tiered(levels)) / closed_seconds(outline)
    assert 1 - 1e-6 <= ratio <= 1 + 0.26 / pieces


@PATIENT
@given(switched_levels(few_digits, tapered=False, own_ports=True), st.data())
def test_a_broadcast_in_its_pieces_is_not_slower_than_in_one(levels, data):
    pieces = hierarchical_rooted.best_pieces(Op.BROADCAST, NBYTES, levels)
    whole, _ = rooted(Op.BROADCAST, levels, data, name="hierarchical ring")
    _, schedule = rooted(Op.BROADCAST, levels, data, name="hierarchical ring", pieces=min(pieces, 8))
    assert played(schedule, NBYTES, tiered(levels)) <= closed_seconds(whole) * (1 + 1e-6)


@pytest.mark.parametrize(("op", "name"), [(Op.SCATTER, LINEAR), (Op.BROADCAST, "hierarchical ring")])
@PATIENT
@given(levels=switched_levels(few_digits, own_ports=True))
def test_over_a_tapered_trunk_what_comes_from_a_root_takes_at_most_as_long(op, name, levels):
    fanouts = fanouts_of(levels)
    schedule = made(name, op, prod(fanouts), fanouts=fanouts)
    bound = closed_seconds(sketched(name, op, NBYTES, levels))
    assert bound * 0.45 <= played(schedule, NBYTES, tiered(levels)) <= bound * (1 + 1e-9)


@PATIENT
@given(switched_levels(few_digits))
def test_over_one_port_the_outline_of_a_hierarchical_broadcast_is_an_estimate(levels):
    fanouts = fanouts_of(levels)
    schedule = made("hierarchical ring", Op.BROADCAST, prod(fanouts), fanouts=fanouts)
    estimate = closed_seconds(sketched("hierarchical ring", Op.BROADCAST, NBYTES, levels))
    assert 0.7 <= played(schedule, NBYTES, tiered(levels)) / estimate <= 1.3


@PATIENT
@given(lattices(st.lists(st.integers(2, 5), min_size=1, max_size=2)))
def test_tori_take_as_long_as_outlined(levels):
    wraps, fanouts = tuple(level.wraps for level in levels), fanouts_of(levels)
    name = torus_rings.TORUS if all(wraps) else torus_rings.MESH
    for op in torus_rings.OPS:
        schedule = made(name, op, prod(fanouts), fanouts=fanouts, wraps=wraps)
        check_time(sketched(name, op, NBYTES, levels), schedule, grid(levels))


@settings(max_examples=12)
@given(
    lattices(
        st.lists(st.integers(2, 5), min_size=2, max_size=3).filter(lambda each: prod(each) <= 40), rings=True
    )
)
def test_rotated_tori_take_as_long_as_outlined(levels):
    name, fanouts = torus_rings.ROTATED, fanouts_of(levels)
    for op in torus_rings.OPS:
        schedule = made(name, op, prod(fanouts), fanouts=fanouts)
        check_time(sketched(name, op, NBYTES, levels), schedule, grid(levels))


def test_a_rotated_torus_loads_the_wires_of_every_dimension_alike_although_its_rings_differ():
    levels = tuple(Level("wire", fanout, 0.0, 1.0, ring=True) for fanout in (16, 20, 28))
    one, rotated = (
        closed_seconds(sketched(name, Op.ALL_REDUCE, 1.0, levels))
        for name in (torus_rings.TORUS, torus_rings.ROTATED)
    )
    assert 2.8 < one / rotated <= 3.0


@PATIENT
@given(st.integers(3, 9), latencies, st.integers(1, 6))
def test_a_line_takes_as_long_as_outlined(num_ranks, latency, pieces):
    levels = (Level("wire", num_ranks, latency, 1.0, 2.0, latency, ring=True, wraps=False),)
    schedule = made(torus_rings.LINE, Op.ALL_REDUCE, num_ranks, pieces=pieces)
    check_time(sketched(torus_rings.LINE, Op.ALL_REDUCE, NBYTES, levels, pieces), schedule, grid(levels))


@pytest.mark.parametrize("op", in_network.OPS)
@settings(max_examples=15)
@given(data=st.data())
def test_switches_that_reduce_take_as_long_as_outlined(op, data):
    fanouts = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=2))
    inside_s, more_s, taper = data.draw(latencies), data.draw(latencies), data.draw(st.sampled_from([1, 3]))
    levels = (Level("leaf", fanouts[0], inside_s, 1.0, 1.0, reduces=True),)
    if len(fanouts) == 2:
        pool = fanouts[0] / taper
        levels += (Level("spine", fanouts[1], inside_s + more_s, 1.0, pool, reduces=True),)
    root, pieces = data.draw(st.integers(0, prod(fanouts) - 1)), data.draw(st.integers(1, 4))
    schedule = made(in_network.NAME, op, prod(fanouts), root, fanouts, pieces)
    prove(schedule)
    check_time(sketched(in_network.NAME, op, NBYTES, levels, pieces), schedule, switches(levels))


# What outlines promise


def test_one_piece_goes_up_and_down_a_double_tree_by_hand():
    levels = (Level("switch", 8, 3.0, 2.0, 2.0),)
    phases = sketched(double_trees.DOUBLE, Op.ALL_REDUCE, 8.0, levels).phases
    stages = [stage for stage in phases[0] if stage.repeat]
    assert [(stage.repeat, stage.nbytes, stage.hops) for stage in stages] == [
        (2, 4.0, (Hop(3.0, 1.0),)),
        (1, 4.0, (Hop(3.0, 2.0),)),
    ]
    assert closed_seconds(sketched(double_trees.DOUBLE, Op.ALL_REDUCE, 8.0, levels)) == 2 * (
        2 * (3 + 4) + (3 + 2)
    )


@pytest.mark.parametrize("nbytes", [0.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("num_ranks", [3, 16, 100])
def test_pipelines_get_enough_pieces_and_not_many_more(nbytes, num_ranks):
    switch = (Level("switch", num_ranks, 5e-6, 5e10, 5e10, reduces=True),)
    line = (Level("wire", num_ranks, 5e-6, 5e10, 1e11, ring=True, wraps=False),)
    in_pieces = (
        (DOUBLE_TREE, switch),
        (algorithm_of(Op.ALL_REDUCE, torus_rings.LINE), line),
        (in_network.ALGORITHMS[0], switch),
    )
    for each, levels in in_pieces:
        for op in each.ops:
            if each.name != in_network.NAME or op is not Op.BARRIER:
                pieces = each.cut(op, nbytes, levels)
                best = closed_seconds(each.sketch(op, nbytes, levels, 1 << 20))
                assert closed_seconds(each.sketch(op, nbytes, levels, pieces)) <= best * 1.04
                fewer = max(1, pieces // 2)
                assert pieces == 1 or closed_seconds(each.sketch(op, nbytes, levels, fewer)) > best * 1.03


@PATIENT
@given(switched_levels(few_digits, tapered=False), st.floats(1.0, 1e4))
def test_hierarchies_get_about_the_best_number_of_pieces(levels, nbytes):
    for name in ("hierarchical ring", "hierarchical direct"):
        each = algorithm_of(Op.ALL_REDUCE, name)
        chosen = each.cut(Op.ALL_REDUCE, nbytes, levels)
        times = {
            q: closed_seconds(each.sketch(Op.ALL_REDUCE, nbytes, levels, q))
            for q in {1, chosen, *range(2, 65, 3)}
        }
        assert times[chosen] <= times[1]
        assert times[chosen] <= 1.15 * min(times.values())


@PATIENT
@given(switched_levels(few_digits, tapered=False, own_ports=True), st.floats(1.0, 1e4))
def test_rooted_hierarchies_get_about_the_best_number_of_pieces(levels, nbytes):
    for each in hierarchical_rooted.ALGORITHMS:
        for op in each.ops:
            chosen = each.cut(op, nbytes, levels)
            if each.outline(op, nbytes, levels) is None:
                assert chosen == 1
                continue
            times = {
                q: closed_seconds(each.sketch(op, nbytes, levels, q)) for q in {1, chosen, *range(2, 65, 5)}
            }
            assert times[chosen] <= times[1]
            assert times[chosen] <= (1.25 if op is Op.BROADCAST else 1.15) * min(times.values())


def test_levels_that_share_a_port_and_rings_get_one_piece_from_and_to_a_root():
    port, ring = Level("switch", 4, 0.0, 1.0, 1.0), Level("wire", 4, 0.0, 1.0, 2.0, ring=True)
    beyond = Level("switch", 4, 0.0, 1.0, 4.0, port=1)
    for each in hierarchical_rooted.ALGORITHMS:
        for op in each.ops:
            assert each.cut(op, 1e9, (port, beyond)) > 1
            assert each.cut(op, 1e9, (port, port)) == each.cut(op, 1e9, (ring, beyond)) == 1


@pytest.mark.parametrize("hosts", [2, 8, 32])
@pytest.mark.parametrize(("nbytes", "most"), [(1 << 26, 1.06), (1 << 30, 1.02)])
def test_a_reduce_over_rails_takes_about_as_long_as_an_all_reduce(hosts, nbytes, most):
    levels = (Level("fabric", 8, 6e-7, 274e9, 274e9), Level("net", hosts, 1.3e-6, 24e9, 192e9, port=1))
    name = "hierarchical direct, ring"

    reduce_s, all_reduce_s = (
        closed_seconds(algorithm_of(op, name).outline(op, nbytes, levels))
        for op in (Op.REDUCE, Op.ALL_REDUCE)
    )
    assert reduce_s <= most * all_reduce_s


def test_switches_that_reduce_beat_the_bandwidth_bound_of_rings():
    nbytes, rate, chips = 1 << 30, 450e9, 8
    levels = (Level("nvswitch", chips, 1e-6, rate, rate, reduces=True),)
    (in_switch,) = in_network.ALGORITHMS
    seconds = closed_seconds(in_switch.outline(Op.ALL_REDUCE, nbytes, levels))
    busbw = 2 * (chips - 1) / chips * nbytes / seconds
    assert rate * 1.6 < busbw < rate * 2 * (chips - 1) / chips


def test_a_rotated_torus_is_as_many_times_faster_as_it_has_dimensions():
    levels = tuple(Level("wire", 8, 1e-6, 50e9, 1e11 * 8**k, ring=True) for k in range(3))
    one, all_at_once = (
        closed_seconds(sketched(name, Op.ALL_REDUCE, 1 << 30, levels))
        for name in (torus_rings.TORUS, torus_rings.ROTATED)
    )
    assert 2.9 < one / all_at_once < 3.0


def test_outlines_are_none_where_an_algorithm_does_not_apply():
    switch = Level("switch", 6, 1.0, 1.0, 1.0)
    ring = Level("wire", 6, 1.0, 1.0, 2.0, ring=True)
    line = Level("wire", 6, 1.0, 1.0, 2.0, ring=True, wraps=False)
    narrow = Level("wire", 6, 1.0, 1.0, 1.0, ring=True, wraps=False)  # both ways by one port
    for op in ROOTED:
        assert sketched(binomial_trees.BINOMIAL, op, 1.0, (ring,)) is None
    for op in (Op.SCATTER, Op.GATHER):
        assert sketched(LINEAR, op, 1.0, (switch,)) is None
        assert sketched(LINEAR, op, 1.0, (ring, switch)) is not None
        assert sketched(LINEAR, op, 1.0, (line, switch)) is None
    for op in (Op.BROADCAST, Op.REDUCE, Op.ALL_REDUCE):
        assert sketched("hierarchical ring", op, 1.0, (switch,)) is None
        assert sketched("hierarchical ring", op, 1.0, (ring, switch)) is not None
        assert sketched("hierarchical ring", op, 1.0, (line, switch)) is None
    for op in (Op.REDUCE, Op.ALL_REDUCE):
        assert sketched("hierarchical halving-doubling", op, 1.0, (switch, switch)) is None
    assert sketched(hierarchical_exchange.NAME, Op.ALL_TO_ALL, 1.0, (ring, switch)) is None
    assert sketched(binomial_trees.SCATTER_GATHER, Op.BROADCAST, 1.0, (switch, switch)) is None
    for name, levels in (
        (double_trees.DOUBLE, (ring,)),
        (double_trees.DOUBLE, (switch, switch)),
        (torus_rings.TORUS, (switch,)),
        (torus_rings.TORUS, (line,)),
        (torus_rings.MESH, (narrow,)),
        (torus_rings.ROTATED, (ring, line)),
        (torus_rings.LINE, (ring,)),
        (in_network.NAME, (switch,)),
    ):
        assert sketched(name, Op.ALL_REDUCE, 1.0, levels) is None, name
