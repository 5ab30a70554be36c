"""Schedules as text: what is written is read again, and what is wrong is named by line."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.algorithms import direct, doubling, ring
from comms.algorithms.rounds import Ranks
from comms.collectives.schedule import Channel, Op, PieceOrder, Schedule
from comms.collectives.schedule_text import load_schedule, parse_schedule, schedule_text
from comms.errors import CommsError, ConfigError

PATIENT = settings(max_examples=60)
SOUND = [
    partial(each.make, op)
    for family in (ring, doubling, direct)
    for each in family.ALGORITHMS
    for op in each.ops
    if each.by_default
]
TWO_RANKS = """\
# Two ranks add what they have.
op all_reduce
ranks 2
chunks 2
channel pieces 4 order interleaved
phase
round 0: 0 -> 1 chunk 0 reduce   # the lower half
round 0: 1 -> 0 chunk 1 reduce
round 1: 0 -> 1 chunk 1
round 1: 1->0 chunks 0 copy
"""
NAMED = """\
op all_reduce
algorithm mine
ranks 2
chunks 1
"""


def refused(text):
    with pytest.raises(CommsError) as caught:
        parse_schedule(text, "mine.txt")
    assert caught.value.hint
    return f"{caught.value.where}: {caught.value.problem}"


def say_the_same(one, other):
    """Schedules are not compared by `==`, as their rounds are shared objects."""
    return schedule_text(one) == schedule_text(other)


def test_a_schedule_is_read_as_it_is_written():
    schedule = parse_schedule(TWO_RANKS)
    assert (schedule.op, schedule.num_ranks, schedule.num_chunks) == (Op.ALL_REDUCE, 2, 2)
    assert (schedule.algorithm, schedule.shares, schedule.root) == ("user-defined", 0.5, 0)
    (channel,) = schedule.channels
    assert (channel.pieces, channel.order, channel.by_chunk) == (4, PieceOrder.INTERLEAVED, False)
    adds, copies = channel.rounds
    assert (adds.reduces, copies.reduces) == (True, False)
    assert adds.pattern is copies.pattern
    np.testing.assert_array_equal(np.stack([copies.first, copies.count]), [[1, 0], [1, 1]])


def test_channel_and_phase_may_be_left_out():
    short = "op broadcast\nranks 3\nchunks 2\nround 0: 0 -> 1 chunk 0-1\nround 1: 1 -> 2 chunk 1-0\n"
    (channel,) = parse_schedule(short).channels
    assert len(channel.phases) == 1
    assert (channel.pieces, channel.order) == (1, PieceOrder.SERIAL)


@PATIENT
@given(st.sampled_from(SOUND), st.integers(1, 9))
def test_what_is_printed_is_read_again(make, num_ranks):
    schedule = make(Ranks(num_ranks))
    again = parse_schedule(schedule_text(schedule))
    assert say_the_same(schedule, again)
    assert again.shares == schedule.shares
    for one, other in zip(schedule.channels, again.channels, strict=True):
        assert [len(phase) for phase in one.phases] == [len(phase) for phase in other.phases]
        for ours, theirs in zip(one.rounds, other.rounds, strict=True):
            assert ours.reduces == theirs.reduces
            columns = [(r.pattern.src, r.pattern.dst, r.first, r.count) for r in (ours, theirs)]
            for mine, read in zip(*columns, strict=True):
                np.testing.assert_array_equal(mine, read)


def test_channels_phases_pieces_roots_switches_and_shares_are_printed_too():
    rings = ring.schedule(Op.ALL_REDUCE, Ranks(4, pieces=3), orders=[[0, 1, 2, 3], [3, 1, 0, 2]])
    channels = tuple(replace(each, order=PieceOrder.INTERLEAVED) for each in rings.channels)
    halves = replace(rings, channels=channels)
    chain = ring.chain_schedule(Op.BROADCAST, Ranks(5, 2, pieces=7))
    uneven = direct.all_to_allv(np.array([[0.0, 1.0], [3.0, 0.0]]))
    first = halves.channels[0]
    phases = Channel(
        (first.rounds[:3], first.rounds[3:]), 3, PieceOrder.SERIAL, by_chunk=True, at_once=True, apart=True
    )
    parted = Schedule(Op.ALL_REDUCE, "in parts", 4, 8, 0.125, (phases, halves.channels[1]))
    for schedule in (halves, chain, uneven, parted):
        again = parse_schedule(schedule_text(schedule))
        assert schedule_text(again) == schedule_text(schedule)
        assert again.root == schedule.root
        np.testing.assert_array_equal(again.shares, schedule.shares)
        kinds, read = (
            [(c.pieces, c.order, c.by_chunk, c.at_once, c.apart, len(c.phases)) for c in each.channels]
            for each in (schedule, again)
        )
        assert read == kinds


def test_switches_are_ranks_after_the_others():
    text = NAMED + "helpers 1\n" + "round 0: 0 -> 2 chunk 0 reduce\nround 0: 1 -> 2 chunk 0 reduce\n"
    text += "round 1: 2 -> 0 chunk 0\nround 1: 2 -> 1 chunk 0\n"
    schedule = parse_schedule(text)
    assert schedule.num_helpers == 1
    assert say_the_same(parse_schedule(schedule_text(schedule)), schedule)


def test_what_is_lost_or_doubled_is_refused_by_name():
    lost = TWO_RANKS.replace("round 1: 1->0 chunks 0 copy\n", "")
    assert refused(lost) == "mine.txt: rank 0 never gets chunk 0 from rank 1"
    doubled = TWO_RANKS + "round 2: 0 -> 1 chunk 1 reduce\n"
    assert refused(doubled) == "mine.txt: rank 1 has chunk 1 from rank 0 twice"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("hello", "starts with 'hello'"),
        ("ranks 2", "says ranks twice"),
        ("helpers -1", "helpers is '-1'"),
        ("helpers", "helpers is ''"),
        ("op sum", "there is no operation 'sum'"),
        ("algorithm", "has no name"),
        ("shares half", "shares are 'half'"),
        ("channel fast", "says 'fast' of a channel"),
        ("channel pieces many", "pieces is 'many'"),
        ("channel order random", "says 'order random' of a channel"),
        ("phase 2", "says '2' of a phase"),
        ("round one: 0 -> 1 chunk 0", "says 'round one: 0 -> 1 chunk 0'"),
        ("round 1: 0 -> 1 chunk 0", "round 1 where round 0 comes next"),
        ("round 0: 0 to 1", "says '0 to 1'"),
        ("round 0: 0 -> 1 chunk 0 add", "says '0 -> 1 chunk 0 add'"),
        ("round 0: 0 -> 2 chunk 0", "there is no rank 2"),
        ("round 0: 1 -> 1 chunk 0", "rank 1 sends to itself"),
        ("round 0: 0 -> 1 chunk 0-1", "there is no chunk 1"),
        ("round 0: 0 -> 1 chunk 0\nround 0: 1 -> 0 chunk 0 reduce", "a round both adds and replaces"),
    ],
)
def test_a_line_that_is_wrong_is_named(line, problem):
    number = NAMED.count("\n") + line.count("\n") + 1
    assert refused(NAMED + line + "\n") == f"mine.txt line {number}: {problem}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "mine.txt: does not say op"),
        ("op all_reduce\nchunks 1\n", "mine.txt: does not say ranks"),
        ("op all_reduce\nranks 1\n", "mine.txt: does not say chunks"),
        ("op all_reduce\nranks 0\nchunks 1\n", "mine.txt: has no ranks or no chunks"),
        ("op all_gather\nranks 2\nchunks 3\n", "mine.txt: 3 chunks"),
        ("round 0: 0 -> 1 chunk 0\n", "mine.txt line 1: there is no rank 1"),
        ("op broadcast\nranks 1\nchunks 2\nshares 1 nan\n", "mine.txt: shares do not fit the chunks"),
    ],
)
def test_a_text_that_says_too_little_is_named(text, problem):
    assert refused(text) == problem


def test_a_file_is_read_and_a_missing_one_named(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(TWO_RANKS)
    assert say_the_same(load_schedule(path), parse_schedule(TWO_RANKS))
    with pytest.raises(ConfigError, match="cannot read the file"):
        load_schedule(tmp_path / "none.txt")
