"""Proofs: sound algorithms pass, any fault is named, and what passes is right in whatever order messages come."""

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.algorithms import direct, doubling, ring
from comms.algorithms.rounds import Ranks
from comms.collectives.proof import prove
from comms.collectives.schedule import Channel, Op, Pattern, Round, Schedule
from comms.errors import CommsError

PATIENT = settings(max_examples=150)
SOUND = [
    partial(each.make, op)
    for family in (ring, doubling, direct)
    for each in family.ALGORITHMS
    for op in each.ops
    if each.by_default
]


def messages(*rows, reduces=False):
    """A round of messages (src, dst, first chunk, number of chunks)."""
    src, dst, first, count = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return Round(Pattern(src, dst), first, count, reduces)


def schedule(op, num_ranks, num_chunks, *rounds, **more):
    return Schedule(op, "mine", num_ranks, num_chunks, 1.0 / num_chunks, (Channel((rounds,)),), **more)


def refused(wrong):
    with pytest.raises(CommsError) as caught:
        prove(wrong)
    assert caught.value.where == f"{wrong.algorithm} {wrong.op} of {wrong.num_ranks} ranks"
    assert caught.value.hint
    return caught.value.problem


EXCHANGE = messages((0, 1, 0, 1), (1, 0, 0, 1), reduces=True)


def test_two_ranks_that_add_what_they_exchange_are_proved():
    prove(schedule(Op.ALL_REDUCE, 2, 1, EXCHANGE))


@pytest.mark.parametrize("make", SOUND)
def test_algorithms_of_64_ranks_are_proved(make):
    prove(make(Ranks(64)))


def test_what_is_lost_is_named():
    lost = schedule(Op.ALL_REDUCE, 2, 1, messages((0, 1, 0, 1), reduces=True))
    assert refused(lost) == "rank 0 never gets chunk 0 from rank 1"


def test_what_is_doubled_is_named():
    twice = schedule(Op.ALL_REDUCE, 2, 1, EXCHANGE, messages((1, 0, 0, 1), reduces=True))
    assert refused(twice) == "rank 0 has chunk 0 from rank 0 twice"
    again = schedule(
        Op.ALL_REDUCE, 3, 2, *[messages((1, 0, 1, 1), reduces=True)] * 3, messages((2, 0, 0, 2), reduces=True)
    )
    assert refused(again) == "rank 0 never gets chunk 0 from rank 1"
    only_adds = schedule(Op.REDUCE, 2, 1, *[messages((1, 0, 0, 1), reduces=True)] * 3)
    assert refused(only_adds) == "rank 0 has chunk 0 from rank 1 3 times"


def test_counts_without_end_are_still_a_fault():
    rounds = [EXCHANGE] * 80
    assert "10000 times or more" in refused(schedule(Op.ALL_REDUCE, 2, 1, *rounds))


def test_one_who_sends_what_it_has_not_is_named():
    early = schedule(Op.BROADCAST, 3, 1, messages((1, 2, 0, 1)), messages((0, 1, 0, 1)))
    assert refused(early) == "rank 1 sends chunk 0 in channel 0 round 0 without having it"
    same_round = schedule(Op.BROADCAST, 3, 1, messages((0, 1, 0, 1), (1, 2, 0, 1)))
    assert refused(same_round) == "rank 1 sends chunk 0 in channel 0 round 0 without having it"


def test_one_who_adds_to_nothing_is_named():
    wrong = schedule(Op.ALL_GATHER, 2, 2, messages((0, 1, 0, 1), (1, 0, 1, 1), reduces=True))
    assert refused(wrong) == "rank 1 adds to chunk 0 in channel 0 round 0 without having it"


def test_a_chunk_must_not_be_replaced_while_it_is_sent():
    swap = messages((0, 1, 0, 1), (1, 0, 0, 1))
    assert refused(schedule(Op.ALL_REDUCE, 2, 1, swap)) == (
        "rank 1 sends chunk 0 in channel 0 round 0 while it is replaced"
    )


def test_a_chunk_may_be_replaced_by_the_same_while_it_is_sent():
    prove(schedule(Op.ALL_REDUCE, 2, 1, EXCHANGE, messages((0, 1, 0, 1), (1, 0, 0, 1))))


def test_two_replacements_in_one_round_must_be_the_same():
    sums = messages((0, 1, 0, 1), (2, 3, 0, 1), reduces=True)
    wrong = schedule(Op.REDUCE, 5, 1, sums, messages((1, 4, 0, 1), (3, 4, 0, 1)), root=4)
    assert refused(wrong) == "rank 4 gets chunk 0 twice in channel 0 round 1, not the same"
    prove(
        schedule(
            Op.BROADCAST, 4, 1, messages((0, 1, 0, 1), (0, 2, 0, 1)), messages((1, 3, 0, 1), (2, 3, 0, 1))
        )
    )


def test_no_chunk_is_in_two_channels():
    both = Schedule(Op.BROADCAST, "mine", 2, 2, 0.5, (Channel(((messages((0, 1, 0, 2)),),)),) * 2)
    assert refused(both) == "chunk 0 is in channels 0 and 1"


def test_switches_add_and_copy_and_have_nothing_of_their_own():
    up = messages((0, 3, 0, 1), (1, 3, 0, 1), (2, 3, 0, 1), reduces=True)
    down = messages((3, 0, 0, 1), (3, 1, 0, 1), (3, 2, 0, 1))
    prove(schedule(Op.ALL_REDUCE, 3, 1, up, down, num_helpers=1))
    assert refused(schedule(Op.ALL_REDUCE, 3, 1, up, down)) == "channel 0 round 0: there is no rank 3"
    assert refused(schedule(Op.ALL_REDUCE, 3, 1, down, num_helpers=1)) == (
        "rank 3 sends chunk 0 in channel 0 round 0 without having it"
    )


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ((0, 0, 0, 1), "channel 0 round 0: rank 0 sends to itself"),
        ((0, 2, 0, 1), "channel 0 round 0: there is no rank 2"),
        ((-1, 0, 0, 1), "channel 0 round 0: there is no rank -1"),
        ((0, 1, 2, 1), "channel 0 round 0: rank 0 sends 1 chunks from chunk 2 on"),
        ((0, 1, 0, 0), "channel 0 round 0: rank 0 sends 0 chunks from chunk 0 on"),
        ((0, 1, 0, 3), "channel 0 round 0: rank 0 sends 3 chunks from chunk 0 on"),
    ],
)
def test_a_message_that_cannot_be_is_named(message, problem):
    assert refused(schedule(Op.BROADCAST, 2, 2, messages(message))) == problem


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_ranks": 0}, "0 ranks and 2 chunks"),
        ({"num_chunks": 0}, "2 ranks and 0 chunks"),
        ({"root": 2}, "root 2 is not a rank"),
        ({"op": Op.ALL_GATHER, "num_chunks": 3}, "3 chunks"),
        ({"op": Op.ALL_TO_ALL, "num_chunks": 2}, "2 chunks"),
        ({"shares": np.array([0.5])}, "shares do not fit the chunks"),
        ({"shares": -1.0}, "shares do not fit the chunks"),
        ({"channels": (Channel((), pieces=0),)}, "channel 0 has 0 pieces"),
    ],
)
def test_a_schedule_that_cannot_be_is_named(changes, problem):
    assert refused(replace(schedule(Op.BROADCAST, 2, 2, messages((0, 1, 0, 2))), **changes)) == problem


def test_columns_of_different_lengths_are_named():
    each = messages((0, 1, 0, 1))
    wrong = Round(each.pattern, each.first, np.array([1, 1]), reduces=False)
    assert refused(schedule(Op.BROADCAST, 2, 1, wrong)) == "columns of channel 0 round 0 differ in length"


def test_chunks_without_bytes_need_not_get_anywhere():
    nothing = Schedule(Op.ALL_TO_ALL, "mine", 2, 4, np.array([1.0, 0.0, 0.0, 1.0]), ())
    prove(nothing)
    assert refused(replace(nothing, shares=0.5)) == "rank 0 never gets chunk 2 from rank 1"


def test_chunks_wrap_around():
    prove(schedule(Op.BROADCAST, 2, 3, messages((0, 1, 2, 2), (0, 1, 1, 1))))


def test_a_proof_in_blocks_of_chunks_is_the_same(monkeypatch):
    monkeypatch.setattr("comms.collectives.proof.BLOCK", 40)
    prove(ring.schedule(Op.ALL_REDUCE, Ranks(6)))
    prove(doubling.bruck_schedule(Op.ALL_TO_ALL, Ranks(5)))
    broken = changed(ring.schedule(Op.ALL_REDUCE, Ranks(6)), 8, 3, lambda row: None)
    assert "never gets" in refused(broken)


# What is proved, against chips that go on as soon as they may, in random order.


def changed(sound, number, row, change):
    """A schedule with one message changed; None leaves it out."""
    (channel,) = sound.channels
    rounds = list(channel.rounds)
    each = rounds[number % len(rounds)]
    rows = [list(r) for r in zip(each.pattern.src, each.pattern.dst, each.first, each.count, strict=True)]
    new = change(rows[row % len(rows)])
    rows[row % len(rows) : row % len(rows) + 1] = [] if new is None else new
    kept = [messages(*rows, reduces=each.reduces)] if rows else []
    rounds[number % len(rounds) : number % len(rounds) + 1] = kept
    return replace(sound, channels=(replace(channel, phases=(tuple(rounds),)),))


class Chip:
    """One rank's program: round by round post receives and sends, wait for them, then add."""

    def __init__(self, rank, state, rounds):
        self.rank, self.state, self.rounds, self.round = rank, state, rounds, 0
        self.aside = []
        self.open_round()

    def open_round(self):
        while self.round < len(self.rounds):
            each = self.rounds[self.round]
            self.unsent = [i for i in range(len(each.first)) if each.pattern.src[i] == self.rank]
            self.unreceived = {i for i in range(len(each.first)) if each.pattern.dst[i] == self.rank}
            if self.unsent or self.unreceived:
                return
            self.round += 1
        self.unsent, self.unreceived = [], set()

    def close_round(self):
        if self.round < len(self.rounds) and not self.unsent and not self.unreceived:
            for chunks, values in self.aside:
                self.state[chunks] += values
            self.aside = []
            self.round += 1
            self.open_round()
            self.close_round()


def run_in_random_order(start, schedule, seed):
    """[rank, chunk, source] in the end. Messages leave and land one at a time, whichever may."""
    dice = random.Random(seed)
    state = start.copy()
    rounds = schedule.channels[0].rounds if schedule.channels else ()
    chips = [Chip(rank, state[rank], rounds) for rank in range(len(state))]
    flying = {}
    while True:
        leaving = [(True, chip.rank, i) for chip in chips for i in chip.unsent]
        landing = [
            (False, number, i) for number, i in flying if chips[rounds[number].pattern.dst[i]].round == number
        ]
        if not leaving + landing:
            return state
        leaves, where, i = dice.choice(leaving + landing)
        number = chips[where].round if leaves else where
        each = rounds[number]
        chunks = (each.first[i] + np.arange(each.count[i])) % schedule.num_chunks
        if leaves:
            chip = chips[where]
            chip.unsent.remove(i)
            flying[number, i] = chip.state[chunks].copy()
        else:
            chip = chips[each.pattern.dst[i]]
            chip.unreceived.remove(i)
            values = flying.pop((number, i))
            if each.reduces:
                chip.aside.append((chunks, values))
            else:
                chip.state[chunks] = values
        chip.close_round()


def starts_and_ends(num_ranks, op):
    """What all-reduce and all-gather start and must end with, with one chunk per rank."""
    n = num_ranks
    own = np.eye(n, dtype=np.int64)
    start = np.repeat(own[:, np.newaxis], n, axis=1) if op is Op.ALL_REDUCE else own[:, :, np.newaxis]
    return start, np.ones_like(start)


SMALL = [
    partial(ring.schedule, Op.ALL_REDUCE),
    partial(doubling.halving_schedule, Op.ALL_REDUCE),
    partial(doubling.bruck_schedule, Op.ALL_REDUCE),
    partial(direct.two_shot_schedule, Op.ALL_REDUCE),
    partial(ring.schedule, Op.ALL_GATHER),
]


@PATIENT
@given(st.sampled_from(SMALL), st.sampled_from((2, 4, 5)), st.data())
def test_what_is_proved_is_right_in_any_order_of_messages(make, num_ranks, data):
    sound = make(Ranks(num_ranks))
    if sound.num_chunks != num_ranks:
        return  # surplus ranks share chunks
    kind = data.draw(st.sampled_from(("as it is", "lost", "twice", "elsewhere", "other chunk")))
    target, number, row = (data.draw(st.integers(0, 50)) for _ in range(3))
    changes = {
        "as it is": lambda r: [r],
        "lost": lambda r: None,
        "twice": lambda r: [r, r],
        "elsewhere": lambda r: [[r[0], (r[0] + 1 + target % (num_ranks - 1)) % num_ranks, *r[2:]]],
        "other chunk": lambda r: [[*r[:2], target % num_ranks, r[3]]],
    }
    tried = changed(sound, number, row, changes[kind])
    start, end = starts_and_ends(num_ranks, tried.op)
    outcomes = [run_in_random_order(start, tried, seed) for seed in range(4)]
    right = [np.array_equal(outcome, end) for outcome in outcomes]
    try:
        prove(tried)
    except CommsError as fault:
        assert kind != "as it is"
        if "never gets" in fault.problem or "has chunk" in fault.problem:
            assert not any(right)
        return
    assert all(right)


@PATIENT
@given(st.sampled_from(SMALL), st.integers(2, 6), st.integers(0, 99), st.integers(0, 99))
def test_no_message_can_be_left_out_and_none_that_is_added_can_come_twice(make, num_ranks, number, row):
    refused(changed(make(Ranks(num_ranks)), number, row, lambda r: None))
    rounds = make(Ranks(num_ranks)).channels[0].rounds
    if rounds[number % len(rounds)].reduces:
        refused(changed(make(Ranks(num_ranks)), number, row, lambda r: [r, r]))
