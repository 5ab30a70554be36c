"""Full fidelity against a simulation that is slow and obvious, straight from the meaning of a schedule."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.collectives.schedule import Channel, Op, Pattern, PieceOrder, Round, Schedule
from comms.errors import CommsError
from comms.networks.topology import UNDISTURBED, Change, Conditions, Ways, Wires, routes_of
from comms.simulation.compiled import CollectiveJob, compile_jobs
from comms.simulation.events import MOST_RESTARTS
from comms.simulation.full import Method, simulate, simulate_within
from comms.simulation.incremental import IncrementalSimulation
from comms.simulation.lower_bound import end_lower_bound_s
from comms.simulation.sharing import draw_in, empty_flows, insert, solve
from comms.simulation.work_budget import UNLIMITED, GivenUp, WorkBudget
from comms.simulation.world import RESTARTS, first_world


class Table:
    """A topology by hand: wires, and a route for each pair."""

    tiers = ("table",)

    def __init__(self, num_chips, wires, routes, forward=0.0):
        self.num_chips = self.num_nodes = num_chips
        self._wires = wires  # (latency, rate)
        self._routes = routes  # (src, dst) -> wires
        self.forward = forward

    def wires(self):
        num = len(self._wires)
        latency, rate = np.array(self._wires, dtype=float).reshape(num, 2).T
        zeros = np.zeros(num, dtype=np.int64)
        return Wires(zeros, zeros, latency, rate, np.full(num, self.forward), zeros, np.arange(num))

    def routes(self, src, dst):
        found = [self._routes[int(s), int(d)] for s, d in zip(src, dst, strict=True)]
        longest = max((len(route) for route in found), default=1)
        padded = [list(route) + [-1] * (longest - len(route)) for route in found]
        return routes_of(list(np.array(padded, dtype=np.int64).reshape(len(found), longest).T))

    def ways(self, src, dst):
        return Ways.single(self.routes(src, dst))


def filled(capacity, routes):
    """Max-min fair rates by progressive filling: raise all rates together, stop whoever meets a full wire."""
    rates = [0.0] * len(routes)
    growing = {flow for flow, route in enumerate(routes) if route}
    while growing:
        load = {w: sum(rates[f] for f, r in enumerate(routes) if w in r) for w in range(len(capacity))}
        users = {w: [f for f in growing if w in routes[f]] for w in range(len(capacity))}
        steps = {w: (capacity[w] - load[w]) / len(users[w]) for w in users if users[w]}
        step = min(steps.values())
        for flow in growing:
            rates[flow] += step
        full = {w for w, s in steps.items() if s <= step * (1 + 1e-12) + 1e-15}
        growing -= {f for w in full for f in users[w]}
    return rates


class Chain:
    """One message of one piece, for the slow simulation."""

    def __init__(self, job, channel, piece, number, phase, index, lane, src, dst, nbytes, chunks, route):
        self.job, self.channel, self.piece, self.round, self.phase = job, channel, piece, number, phase
        self.index, self.src, self.dst, self.left, self.chunks = index, src, dst, nbytes, chunks
        self.nbytes, self.route, self.lane = nbytes, route, lane
        self.started = self.sent = self.arrived = None

    @property
    def port(self):
        return (self.job, self.channel, self.src, self.route[0] if self.route else None, self.lane)


def messages_of(topology, jobs):
    found = []
    for j, job in enumerate(jobs):
        for c, channel in enumerate(job.schedule.channels):
            number = 0
            for phase, rounds in enumerate(channel.phases):
                for each in rounds:
                    seen = Counter()
                    sizes = job.schedule.message_shares(each) * job.nbytes / channel.pieces
                    for i in range(len(each.pattern.src)):
                        s, d = int(each.pattern.src[i]), int(each.pattern.dst[i])
                        key = (int(job.places[s]), int(job.places[d]))
                        total = job.schedule.num_chunks
                        chunks = {(int(each.first[i]) + k) % total for k in range(int(each.count[i]))}
                        route = list(topology._routes[key])
                        lane = (seen[s, route[0]] * channel.at_once, phase * channel.apart)
                        seen[s, route[0]] += 1
                        for piece in range(channel.pieces):
                            numbers = (j, c, piece, number, phase, i, lane, s, d)
                            found.append(Chain(*numbers, sizes[i], chunks, list(route)))
                    number += 1
    return found


def turn(message, channel):
    if channel.order is PieceOrder.SERIAL:
        return (message.phase, message.piece, message.round, message.index)
    return (message.phase, message.round, message.piece, message.index)


def may_leave(m, messages, jobs, now):
    """Whether a message may leave now, by the rules of comms.collectives.schedule."""
    channel = jobs[m.job].schedule.channels[m.channel]
    if now < jobs[m.job].start_s:
        return False
    for other in messages:
        if (other.job, other.channel) != (m.job, m.channel):
            continue
        if other.port == m.port and turn(other, channel) < turn(m, channel) and other.sent is None:
            return False
        if other.dst != m.src or (other.arrived is not None and other.arrived <= now):
            continue
        waits = other.piece == m.piece and other.round < m.round
        if waits and (not channel.by_chunk or other.chunks & m.chunks):
            return False
        if channel.order is PieceOrder.SERIAL and other.piece == m.piece - 1 and other.phase <= m.phase:
            return False
    return True


def start_all(messages, jobs, latency, now):
    """Whatever may leave leaves, until nothing more may."""
    moved = True
    while moved:
        moved = False
        for m in messages:
            if m.started is None and may_leave(m, messages, jobs, now):
                m.started, moved = now, True
                if m.left <= 0 or not m.route:
                    m.sent, m.arrived = now, now + sum(latency[w] for w in m.route)


def slow_simulation(topology, jobs):
    """Seconds of each job, by looking at everything at every instant."""
    latency, capacity = zip(*topology._wires, strict=True)
    messages = messages_of(topology, jobs)
    now = 0.0
    while any(m.arrived is None or m.arrived > now for m in messages):
        start_all(messages, jobs, latency, now)
        going = [m for m in messages if m.started is not None and m.sent is None]
        rates = filled(capacity, [m.route for m in going])
        times = [now + m.left / r for m, r in zip(going, rates, strict=True) if r > 0]
        times += [m.arrived for m in messages if m.arrived is not None and m.arrived > now]
        times += [job.start_s for job in jobs if job.start_s > now]
        then = min(times, default=now)
        for m, rate in zip(going, rates, strict=True):
            m.left -= rate * (then - now)
            if m.left <= 1e-9 * m.nbytes:
                m.sent = then
                held = sum(min(topology.forward, m.nbytes) / capacity[w] for w in m.route[:-1])
                m.arrived = then + sum(latency[w] for w in m.route) + held
        now = then
    return [
        max((m.arrived for m in messages if m.job == j), default=job.start_s) - job.start_s
        for j, job in enumerate(jobs)
    ]


@st.composite
def tables(draw, num_chips):
    num = draw(st.integers(1, 5))
    wires = [(draw(st.floats(0, 2)), draw(st.floats(0.5, 4))) for _ in range(num)]
    pick = st.lists(st.integers(0, num - 1), min_size=1, max_size=3, unique=True)
    pairs = [(s, d) for s in range(num_chips) for d in range(num_chips) if s != d]
    return Table(
        num_chips, wires, {pair: tuple(draw(pick)) for pair in pairs}, draw(st.sampled_from([0.0, 0.3]))
    )


@st.composite
def schedules(draw, ranks, chunks=3):
    """Any rounds at all: timing does not ask whether they make sense."""

    def a_round():
        num = draw(st.integers(1, 3))
        src = draw(st.lists(st.integers(0, ranks - 1), min_size=num, max_size=num))
        dst = [(s + draw(st.integers(1, ranks - 1))) % ranks for s in src]
        first = draw(st.lists(st.integers(0, chunks - 1), min_size=num, max_size=num))
        count = draw(st.lists(st.integers(1, chunks), min_size=num, max_size=num))
        return Round(Pattern(np.array(src), np.array(dst)), np.array(first), np.array(count), True)

    channels = []
    for _ in range(draw(st.integers(1, 2))):
        phases = tuple(
            tuple(a_round() for _ in range(draw(st.integers(1, 2)))) for _ in range(draw(st.integers(1, 2)))
        )
        order, by_chunk = draw(st.sampled_from(PieceOrder)), draw(st.booleans())
        flags = draw(st.booleans()), draw(st.booleans())
        channels.append(Channel(phases, draw(st.integers(1, 2)), order, by_chunk, *flags))
    return Schedule(Op.ALL_REDUCE, "any", ranks, chunks, 1.0 / chunks, tuple(channels))


@settings(max_examples=150)
@given(st.data())
def test_any_schedules_on_any_wires_take_what_the_slow_simulation_says(data):
    ranks = data.draw(st.integers(2, 4))
    table = data.draw(tables(ranks))
    jobs = [
        CollectiveJob(
            data.draw(schedules(ranks)), np.array(data.draw(st.permutations(range(ranks)))), 5.0, start
        )
        for start in data.draw(st.lists(st.sampled_from([0.0, 1.5]), min_size=1, max_size=2))
    ]
    expected = slow_simulation(table, jobs)
    assert simulate(table, jobs, method=Method.EVENTS).seconds == pytest.approx(expected, rel=1e-7, abs=1e-9)
    assert simulate(table, jobs).seconds == pytest.approx(expected, rel=1e-7, abs=1e-9)


@settings(max_examples=100)
@given(st.data())
def test_what_is_given_up_as_late_is_late_and_all_else_is_timed_as_ever(data):
    ranks = data.draw(st.integers(2, 4))
    table = data.draw(tables(ranks))
    jobs = [
        CollectiveJob(
            data.draw(schedules(ranks)), np.array(data.draw(st.permutations(range(ranks)))), 5.0, start
        )
        for start in data.draw(st.lists(st.sampled_from([0.0, 1.5]), min_size=1, max_size=2))
    ]
    whole = simulate(table, jobs).seconds
    end_s = max(job.start_s + seconds for job, seconds in zip(jobs, whole, strict=True))
    compiled = compile_jobs(table, jobs)
    assert end_lower_bound_s(compiled, compiled.bytes_per_s) <= end_s * (1 + 1e-9)
    for until_s in (end_s * (1 + 1e-9), np.inf):
        assert simulate_within(table, jobs, UNDISTURBED, WorkBudget(until_s)).seconds == pytest.approx(
            whole, rel=1e-12
        )
    for share in (0.1, 0.9, 1 - 1e-6):
        given_up = simulate_within(table, jobs, UNDISTURBED, WorkBudget(share * end_s))
        assert given_up.is_late
        assert share * end_s * (1 - 1e-9) <= given_up.at_least_s <= end_s * (1 + 1e-9)


def fair_rates(bytes_per_s, offsets, resources):
    """Max-min fair rates of flows with routes resources[offsets[i] : offsets[i + 1]], solved all at once."""
    num, drawn = len(offsets) - 1, 0
    flows = empty_flows(bytes_per_s, num, int(np.diff(offsets).max(initial=0)))
    for flow in range(num):
        insert(flows, flow, resources, int(offsets[flow]), int(offsets[flow + 1]))
        drawn = draw_in(flows, flow, drawn)
    solve(flows, drawn)
    return flows.flow["rate"]


@settings(max_examples=200)
@given(st.data())
def test_rates_are_those_of_progressive_filling(data):
    num = data.draw(st.integers(1, 6))
    capacity = data.draw(st.lists(st.floats(0.1, 10), min_size=num, max_size=num))
    pick = st.lists(st.integers(0, num - 1), min_size=1, max_size=4, unique=True)
    routes = data.draw(st.lists(pick, min_size=1, max_size=12))
    offsets = np.cumsum([0, *map(len, routes)])
    rates = fair_rates(np.array(capacity), offsets, np.concatenate(routes).astype(np.int32))
    assert rates == pytest.approx(filled(capacity, routes), rel=1e-9)


def ring(n, pieces=1, order=PieceOrder.SERIAL):
    rank = np.arange(n)
    pattern, one = Pattern(rank, (rank + 1) % n), np.ones(n, dtype=np.int64)
    rounds = [Round(pattern, (rank - s) % n, one, True) for s in range(n - 1)]
    rounds += [Round(pattern, (rank + 1 - s) % n, one, False) for s in range(n - 1)]
    return Schedule(Op.ALL_REDUCE, "ring", n, n, 1.0 / n, (Channel((tuple(rounds),), pieces, order),))


def ring_table(n, rates, latency=0.1):
    rates = np.broadcast_to(rates, n)
    pairs = {(s, (s + 1) % n): (s,) for s in range(n)}
    return Table(n, [(latency, rate) for rate in rates], pairs)


@given(st.integers(2, 9), st.integers(1, 4), st.sampled_from(PieceOrder), st.integers(0, 99))
@settings(max_examples=60)
def test_sweep_and_events_agree_where_nothing_meets(n, pieces, order, seed):
    table = ring_table(n, np.random.default_rng(seed).uniform(1, 2, n))
    job = CollectiveJob(ring(n, pieces, order), np.arange(n), 7.0)
    swept, stepped = (simulate(table, [job], method=method) for method in Method)
    assert swept.seconds == pytest.approx(stepped.seconds, rel=1e-12)
    assert swept.num_messages == stepped.num_messages == 2 * (n - 1) * n * pieces


def test_a_uniform_ring_takes_its_closed_form():
    result = simulate(ring_table(8, 2.0), [CollectiveJob(ring(8), np.arange(8), 16.0)])
    assert result.seconds[0] == pytest.approx(14 * (0.1 + 2.0 / 2.0))
    assert result.method is Method.SWEEP
    assert result.wire_nbytes == pytest.approx(np.full(8, 14 * 2.0))


def one_message(src=0, dst=1, ranks=2):
    each = Round(Pattern(np.array([src]), np.array([dst])), np.zeros(1, int), np.ones(1, int), False)
    return Schedule(Op.BROADCAST, "one", ranks, 1, 1.0, (Channel(((each,),)),))


LINE = Table(2, [(0.5, 2.0)], {(0, 1): (0,), (1, 0): (0,)})


def seconds(conditions=UNDISTURBED, nbytes=10.0, schedule=None):
    return simulate(
        LINE, [CollectiveJob(schedule or one_message(), np.arange(2), nbytes)], conditions
    ).seconds[0]


def test_conditions_slow_a_message_down_as_they_say():
    assert seconds() == pytest.approx(5.5)
    assert seconds(nbytes=0.0) == 0.5
    assert seconds(Conditions(factors={0: 0.5})) == pytest.approx(10.5)
    assert seconds(Conditions(overhead_s={0: 2.0})) == pytest.approx(7.5)
    down = Conditions(changes=(Change(1.0, 0, 0.0), Change(4.0, 0, 1.0)))
    assert seconds(down) == pytest.approx(8.5)


def test_a_channel_or_job_that_sends_nothing_takes_no_time():
    idle = Schedule(Op.BROADCAST, "idle", 2, 1, 1.0, (Channel(()), *one_message().channels))
    assert seconds(schedule=idle) == pytest.approx(5.5)
    nothing = Schedule(Op.BROADCAST, "nothing", 2, 1, 1.0, ())
    for method in Method:
        jobs = [CollectiveJob(nothing, np.arange(2), 10.0), CollectiveJob(one_message(), np.arange(2), 10.0)]
        assert simulate(LINE, jobs, method=method).seconds == pytest.approx([0.0, 5.5])


def test_a_wire_that_stays_dead_is_an_error():
    with pytest.raises(CommsError, match="never arrive"):
        seconds(Conditions(factors={0: 0.0}))
    with pytest.raises(CommsError, match="never arrive"):
        seconds(Conditions(changes=(Change(1.0, 0, 0.0),)))


def crossing(ranks, at_once=False):
    """All to all over one wire."""
    pairs = [(s, d) for s in range(ranks) for d in range(ranks) if s != d]
    src, dst = (np.array(column) for column in zip(*pairs, strict=True))
    each = Round(Pattern(src, dst), src * ranks + dst, np.ones_like(src), False)
    schedule = Schedule(Op.ALL_TO_ALL, "all", ranks, ranks**2, 1.0, (Channel(((each,),), at_once=at_once),))
    return Table(ranks, [(0.5, 2.0)], dict.fromkeys(pairs, (0,))), CollectiveJob(
        schedule, np.arange(ranks), 1.0
    )


def test_what_would_be_too_much_work_is_given_up_after_a_part_of_it():
    table, job = crossing(40)
    whole = simulate_within(table, [job], UNDISTURBED, UNLIMITED)
    given_up = simulate_within(table, [job], UNDISTURBED, WorkBudget(most_work=whole.work // 3))
    assert not given_up.is_late
    assert given_up.work < whole.work / 4
    assert given_up.at_least_s <= whole.seconds[0]


@pytest.mark.parametrize("at_once", [False, True])
def test_what_is_no_more_work_than_it_may_be_is_not_given_up(at_once):
    table, job = crossing(40, at_once)  # at once, all are on their way before any arrives
    whole = simulate_within(table, [job], UNDISTURBED, UNLIMITED)
    again = simulate_within(table, [job], UNDISTURBED, WorkBudget(most_work=whole.work))
    assert (again.work, again.seconds) == (whole.work, whole.seconds)


def test_even_no_work_at_all_comes_to_an_end():
    table, job = crossing(3)
    for most_work in (0, 1):
        assert isinstance(
            simulate_within(table, [job], UNDISTURBED, WorkBudget(most_work=most_work)), GivenUp
        )


def test_who_watches_hears_of_an_ever_larger_share(monkeypatch):
    monkeypatch.setattr("comms.simulation.full.WATCHED_WORK", 100)
    table, job = crossing(12)
    shares = []
    simulate_within(table, [job], UNDISTURBED, UNLIMITED, shares.append)
    assert len(shares) > 2
    assert sorted(shares) == shares
    assert 0 <= shares[0] < shares[-1] < 1


def test_a_wire_that_stays_dead_is_an_error_and_not_late_where_nothing_limits():
    dead = Conditions(changes=(Change(1.0, 0, 0.0),))
    job = CollectiveJob(one_message(), np.arange(2), 10.0)
    with pytest.raises(CommsError, match="never arrive"):
        simulate_within(LINE, [job], dead, UNLIMITED)
    revived = Conditions(factors={0: 0.0}, changes=(Change(4.0, 0, 1.0),))
    assert simulate_within(LINE, [job], revived, WorkBudget(9.5)).seconds[0] == pytest.approx(9.5)
    assert simulate_within(LINE, [job], revived, WorkBudget(9.4)).is_late


def test_background_takes_its_share_for_as_long_as_the_foreground_runs():
    jobs = [
        CollectiveJob(one_message(), np.arange(2), 10.0),
        CollectiveJob(one_message(1, 0), np.arange(2), 4.0, repeats=True),
    ]
    result = simulate(LINE, jobs)
    # 4 bytes each at rate 1, half a second at rate 2 until the background comes again; twice; then the latency.
    assert result.seconds[0] == pytest.approx(4 + 0.5 + 4 + 0.5 + 0.5)
    assert math.isnan(result.seconds[1])


def test_the_maximum_of_the_noise_grows_with_the_number_of_chips():
    def slowest_of(n, seed):
        rank = np.arange(n)
        shift = Round(Pattern(rank, (rank + 1) % n), rank, np.ones(n, dtype=np.int64), False)
        schedule = Schedule(Op.ALL_GATHER, "shift", n, n, 1.0 / n, (Channel(((shift,),)),))
        conditions = Conditions(noise_s=2.0, seed=seed)
        return simulate(ring_table(n, 2.0), [CollectiveJob(schedule, rank, 0.0)], conditions).seconds[0] - 0.1

    assert slowest_of(8, 1) == slowest_of(8, 1) != slowest_of(8, 2)
    # The mean of the largest of n exponentials is their mean times the n-th harmonic number.
    for n, seeds in ((4, 1000), (64, 200), (1024, 50)):
        expected = 2.0 * sum(1 / k for k in range(1, n + 1))
        assert np.mean([slowest_of(n, seed) for seed in range(seeds)]) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("places", "nbytes", "problem"),
    [
        ([0], 1.0, "1 places for 2 ranks"),
        ([0, 5], 1.0, "node 5 is outside"),
        ([0, 1], -1.0, "bytes"),
        ([0, 1], math.inf, "inf bytes"),
    ],
)
def test_impossible_jobs_are_named(places, nbytes, problem):
    with pytest.raises(CommsError, match=problem):
        simulate(LINE, [CollectiveJob(one_message(), np.array(places), nbytes)])


@given(st.permutations(range(6)), st.integers(0, 99))
@settings(max_examples=30)
def test_relabelling_chips_with_their_network_takes_as_long(names, seed):
    rng = np.random.default_rng(seed)
    rates = rng.uniform(1, 2, 3)
    routes = {(s, d): tuple(rng.choice(3, 2, replace=False)) for s in range(6) for d in range(6) if s != d}
    table = Table(6, [(0.1, rate) for rate in rates], routes)
    renamed = Table(6, table._wires, {(names[s], names[d]): r for (s, d), r in routes.items()})
    first = simulate(table, [CollectiveJob(ring(6), np.arange(6), 3.0)])
    second = simulate(renamed, [CollectiveJob(ring(6), np.array(names), 3.0)])
    assert first.seconds == pytest.approx(second.seconds, rel=1e-9)


@given(st.floats(0.1, 10), st.integers(0, 99))
@settings(max_examples=30)
def test_scaling_all_costs_scales_the_time(k, seed):
    rng = np.random.default_rng(seed)
    routes = {(s, d): tuple(rng.choice(3, 2, replace=False)) for s in range(5) for d in range(5) if s != d}
    rates = rng.uniform(1, 2, 3)
    base = Table(5, [(0.1, rate) for rate in rates], routes)
    scaled = Table(5, [(0.1 * k, rate / k) for rate in rates], routes)
    job = CollectiveJob(ring(5), np.arange(5), 3.0)
    assert simulate(scaled, [job]).seconds == pytest.approx(k * simulate(base, [job]).seconds, rel=1e-9)


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30)
def test_groups_of_a_job_are_jobs_of_their_own(n, groups, seed):
    rng = np.random.default_rng(seed)
    total = n * groups
    routes = {(s, d): tuple(rng.choice(4, 2, replace=False)) for s in range(total) for d in range(total)}
    table = Table(total, [(0.1, rate) for rate in rng.uniform(1, 2, 4)], routes)
    places = rng.permutation(total).reshape(groups, n)
    together = simulate(table, [CollectiveJob(ring(n), places, 3.0)])
    apart = simulate(table, [CollectiveJob(ring(n), each, 3.0) for each in places])
    assert together.seconds[0] == pytest.approx(apart.seconds.max(), rel=1e-9)
    assert together.wire_nbytes == pytest.approx(apart.wire_nbytes)


def test_groups_started_live_take_what_they_take_when_all_is_known_before():
    rng = np.random.default_rng(0)
    routes = {(s, d): tuple(rng.choice(4, 2, replace=False)) for s in range(6) for d in range(6)}
    table = Table(6, [(0.1, rate) for rate in rng.uniform(1, 2, 4)], routes)
    places = np.arange(6).reshape(2, 3)
    first, second = CollectiveJob(ring(3), places[0], 3.0, 1.0), CollectiveJob(ring(3), places[1], 3.0, 2.0)
    known = simulate(table, [first, second])
    live = IncrementalSimulation(table, [CollectiveJob(ring(3), places, 3.0)])
    for round_ in range(3):  # the same groups again and again, always alone in the network with each other
        base = 100.0 * round_
        live.start(0, 0, base + 1.0)
        assert live.advance(base + 2.0) == ()
        live.start(0, 1, base + 2.0)
        ends = {}
        while len(ends) < 2:
            ends |= {each.group: each.at_s for each in live.advance(np.inf)}
        assert ends[0] - base - 1.0 == pytest.approx(known.seconds[0], rel=1e-9)
        assert ends[1] - base - 2.0 == pytest.approx(known.seconds[1], rel=1e-9)


def test_background_goes_on_between_what_is_started_live():
    ours, others = (
        CollectiveJob(one_message(), np.arange(2), 10.0),
        CollectiveJob(one_message(1, 0), np.arange(2), 4.0, repeats=True),
    )
    known = simulate(LINE, [ours, others, CollectiveJob(one_message(), np.arange(2), 10.0, 101.3)])
    live = IncrementalSimulation(LINE, [ours, others])
    for start_s, seconds_ in ((0.0, known.seconds[0]), (101.3, known.seconds[2])):
        live.start(0, 0, start_s)
        (end,) = live.advance(np.inf)
        assert end.at_s - start_s == pytest.approx(seconds_, rel=1e-9)
    assert known.seconds[2] > 5.5  # what it takes alone


def test_a_group_that_cannot_end_is_an_error_when_driven_live_too():
    live = IncrementalSimulation(
        LINE, [CollectiveJob(one_message(), np.arange(2), 10.0)], Conditions(factors={0: 0.0})
    )
    live.start(0, 0, 0.0)
    with pytest.raises(CommsError, match="never arrive"):
        live.advance(np.inf)


@pytest.mark.parametrize("pieces", [0, 1 << 20])
def test_a_number_of_pieces_that_no_timer_holds_is_refused(pieces):
    channel = Channel(one_message().channels[0].phases, pieces)
    with pytest.raises(CommsError, match=f"{pieces} pieces"):
        seconds(schedule=Schedule(Op.BROADCAST, "one", 2, 1, 1.0, (channel,)))


def test_a_change_counts_from_the_sheet_and_a_factor_from_either_way_of_a_shared_wire():
    half = Conditions(factors={0: 0.5}, changes=(Change(0.0, 0, 1.0),))
    assert seconds(half) == pytest.approx(5.5)

    class Shared(Table):
        def wires(self):
            one = super().wires()
            return Wires(*(getattr(one, name) for name in Wires.__slots__[:-1]), np.zeros(2, dtype=np.int64))

    both = Shared(2, [(0.5, 2.0), (0.5, 2.0)], {(0, 1): (0,), (1, 0): (1,)})
    job = CollectiveJob(one_message(), np.arange(2), 10.0)
    for factors in ({0: 0.5}, {1: 0.5}, {0: 0.5, 1: 0.5}):
        assert simulate(both, [job], Conditions(factors=factors)).seconds[0] == pytest.approx(10.5)


def test_who_waits_for_ever_beside_a_background_job_is_told_so(monkeypatch):
    def after_a_long_wait(*args, **options):
        world = first_world(*args, **options)
        world.counters[RESTARTS] = MOST_RESTARTS - 1000
        return world

    monkeypatch.setattr("comms.simulation.full.first_world", after_a_long_wait)
    wires = Table(4, [(0.5, 2.0), (0.0, 2.0)], {(0, 1): (0,), (2, 3): (1,)})
    jobs = [
        CollectiveJob(one_message(), np.array([0, 1]), 10.0),
        CollectiveJob(one_message(), np.array([2, 3]), 1e-3, repeats=True),
    ]
    with pytest.raises(CommsError, match="never arrive"):
        simulate(wires, jobs, Conditions(factors={0: 0.0}))


def test_a_late_start_changes_nothing():
    quick = ring_table(8, 512e9, 1e-9)
    for method in Method:
        early = simulate(quick, [CollectiveJob(ring(8), np.arange(8), 512.0)], method=method).seconds[0]
        late = simulate(quick, [CollectiveJob(ring(8), np.arange(8), 512.0, 1000.0)], method=method).seconds[
            0
        ]
        assert late == pytest.approx(early, rel=1e-3)


def test_noise_is_another_one_each_time_a_group_starts():
    live = IncrementalSimulation(
        LINE, [CollectiveJob(one_message(), np.arange(2), 10.0)], Conditions(noise_s=2.0, seed=3)
    )
    took = []
    for start in (0.0, 100.0, 200.0):
        live.start(0, 0, start)
        took.append(live.advance(np.inf)[0].at_s - start)
    assert len({round(each, 6) for each in took}) == 3
