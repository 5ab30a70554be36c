"""Claims about algorithms compared at full fidelity: which take part, who is given up, and what the answer says."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from comms.collectives.schedule import Op
from comms.networks.conditions import Between, Described, LinkFault
from comms.selection import comparison
from comms.selection.candidate_jobs import expected_messages, jobs_of
from comms.selection.choice import choose, offered
from comms.selection.collective import answer_to
from comms.selection.comparison import Budget, compare, suitable, unpriced
from comms.selection.full_collective import hierarchies, of_choice
from comms.selection.progress import quiet
from comms.selection.question import Fidelity, Question
from comms.selection.site import site_of
from orchestrator.config.hardware.cluster_file import load_cluster

CONFIGS = Path(__file__).parents[3] / "cluster_configs"
LAPTOP, MESH, POD, RINGS, CARDS = (
    load_cluster(CONFIGS / f"{name}.yaml").network
    for name in ("laptop", "tenstorrent-galaxy", "tpu-v5p-pod", "graphcore-pod64", "pcie-workstation")
)
MIB = 2.0**20
SLOW = Described(links=(LinkFault(Between(0, 1), 0.5),))


def asked(network, num_chips, op, nbytes, **how):
    return Question(network.take(num_chips), num_chips, op, nbytes, looks_for_better=False, **how)


def uneven(op=Op.ALL_TO_ALL, **how):
    """30 chips of a torus, which do not fold."""
    return asked(POD, 30, op, MIB, **how)


def candidates_for(question):
    site = site_of(question.network, question.num_chips, question.described)
    choices = suitable(question)
    return [of_choice(site, each) for each in choices] + hierarchies(question, site, choices)


@pytest.mark.parametrize("op", [Op.ALL_REDUCE, Op.ALL_TO_ALL, Op.BROADCAST])
def test_giving_up_who_is_late_changes_neither_winner_nor_time(op, monkeypatch):
    every = candidates_for(uneven(op))
    whole = compare(every, comparison.THOROUGH, quiet)
    monkeypatch.setattr(comparison, "FEW_MESSAGES", 0)
    stopped = compare(every, comparison.THOROUGH, quiet)
    assert whole.late == ()
    assert stopped.late
    assert stopped.timings[0].algorithm == whole.timings[0].algorithm
    assert stopped.timings[0].seconds == whole.timings[0].seconds
    assert {each.algorithm for each in stopped.timings} | set(stopped.late) == {
        each.algorithm for each in whole.timings
    }


def test_an_algorithm_takes_part_once_under_its_name_with_its_fastest_variant():
    (first, *others) = candidates_for(uneven())
    slower, faster = (compare([first], comparison.THOROUGH, quiet).timings[0] for _ in range(2))
    slower = replace(slower, seconds=2 * faster.seconds)
    again = [replace(first, run=lambda *_, timing=timing: timing) for timing in (slower, faster, slower)]
    outcome = compare([*again, *others], comparison.THOROUGH, quiet)
    timed = [each.algorithm for each in outcome.timings]
    assert len(set(timed)) == len(timed) == outcome.num_compared
    assert faster.seconds in [each.seconds for each in outcome.timings]


def test_the_answer_counts_every_algorithm_once():
    found = answer_to(uneven())
    names = [each.algorithm for each in found.candidates]
    assert len(set(names)) == len(names) > 1
    assert f"fastest of {len(names)} " in found.reason


def test_what_takes_part_is_what_an_automatic_choice_looks_at():
    for num_chips in (30, 72):
        question = asked(POD, num_chips, Op.ALL_REDUCE, MIB)
        known = offered(question.op, question.members, question.network)
        assert {each.name for each in candidates_for(question)} <= set(known)


def test_what_would_take_long_is_left_out_by_name_and_a_bound_of_its_time():
    every = candidates_for(uneven())
    outcome = compare(every, Budget(2**21, 400, 10**9), quiet)
    assert outcome.unfinished
    (note,) = outcome.notes("wait")
    assert all(str(each) in note for each in outcome.unfinished)
    assert any("or more" in str(each) for each in outcome.unfinished)
    assert note.endswith("wait")
    whole = {each.algorithm: each.seconds for each in compare(every, comparison.THOROUGH, quiet).timings}
    assert all(each.seconds <= whole[each.name] for each in outcome.unfinished if each.is_bound)


def test_all_work_together_is_bounded_too():
    every = candidates_for(uneven())
    most = Budget(2**21, 10**9, 1)
    outcome = compare(every, most, quiet)
    assert outcome.num_compared <= 1
    assert len(outcome.unfinished) >= len({each.name for each in every}) - 1


def test_where_nothing_is_quickly_timed_the_answer_is_by_levels_and_says_so(monkeypatch):
    monkeypatch.setattr(comparison, "QUICK", Budget(10, 10, 10))
    found = answer_to(uneven())
    assert found.fidelity is Fidelity.FOLDED
    assert any("--fidelity full moves every message" in warning for warning in found.warnings)
    assert any("would take long: " in note for note in found.notes)
    assert answer_to(uneven(fidelity=Fidelity.FULL)).fidelity is Fidelity.FULL


def test_who_waits_is_told_which_algorithm_is_moved_and_how_far_it_is(monkeypatch):
    monkeypatch.setattr("comms.simulation.full.WATCHED_WORK", 200)
    phases = []
    answer_to(uneven(), lambda name: nullcontext(phases.append(name)))
    assert "every message of direct" in phases
    assert any(each.endswith("% of the messages have been moved") for each in phases)


@pytest.mark.parametrize(
    ("network", "num_chips", "op", "nbytes", "winner"),
    [
        (MESH, 32, Op.ALL_GATHER, 64 * MIB, "ring"),
        (POD, 16, Op.ALL_GATHER, 1000.0, "direct"),
        (RINGS, 64, Op.ALL_GATHER, 1000.0, "direct"),
        (CARDS, 4, Op.GATHER, 64 * MIB, "direct"),
    ],
)
def test_what_only_full_fidelity_can_time_wins_where_it_is_faster(network, num_chips, op, nbytes, winner):
    by_levels = answer_to(asked(network, num_chips, op, nbytes, fidelity=Fidelity.FOLDED))
    for fidelity in (None, Fidelity.FULL):
        found = answer_to(asked(network, num_chips, op, nbytes, fidelity=fidelity))
        assert (found.algorithm, found.fidelity) == (winner, Fidelity.FULL)
        assert found.seconds < by_levels.seconds
        assert "no closed form" in found.reason
        assert by_levels.algorithm in {each.algorithm for each in found.candidates}
    assert by_levels.fidelity is Fidelity.FOLDED
    (note,) = [each for each in by_levels.notes if "no closed form" in each]
    assert winner in note


def test_what_is_limited_to_closed_forms_stays_a_closed_form():
    question = asked(POD, 16, Op.ALL_GATHER, 1000.0, fidelity=Fidelity.CLOSED)
    found = answer_to(question)
    assert found.seconds == choose(question.op, 1000.0, question.members, question.network).seconds
    assert found.fidelity is Fidelity.CLOSED
    assert any("direct" in note for note in found.notes)


@pytest.mark.parametrize(
    ("network", "num_chips"), [(MESH, 32), (POD, 16), (RINGS, 64), (LAPTOP, 8), (CARDS, 4)]
)
@pytest.mark.parametrize("op", [Op.ALL_REDUCE, Op.ALL_GATHER, Op.GATHER])
@pytest.mark.parametrize("nbytes", [1000.0, 4 * MIB])
def test_nothing_that_is_dismissed_unmoved_is_faster(network, num_chips, op, nbytes):
    question = asked(network, num_chips, op, nbytes)
    choice = choose(op, nbytes, question.members, question.network)
    to_beat_s = choice.seconds * (1 - comparison.FIDELITY_TOLERANCE)
    kept = unpriced(question, choice, to_beat_s, 2**17)
    priced = {choice.algorithm, *(name for name, _ in choice.others)}
    names = {*kept.unknown, *(each.algorithm for each in kept.promising)}
    site = site_of(question.network, num_chips)
    for each in suitable(question, priced):
        if not each.is_folded and each.algorithm not in names and expected_messages(each) < 2**12:
            assert of_choice(site, each).timed(quiet).seconds >= to_beat_s


def test_what_has_no_closed_form_and_too_many_messages_is_named(monkeypatch):
    monkeypatch.setattr(comparison, "BRIEF", Budget(10, 10, 10))
    monkeypatch.setattr(comparison, "GUESS_RATIO", 1e9)
    found = answer_to(asked(POD, 16, Op.ALL_GATHER, 1000.0))
    assert found.fidelity is Fidelity.FOLDED
    assert any("would take long: direct" in note for note in found.notes)


def test_under_conditions_all_are_compared_at_full_fidelity():
    found = answer_to(asked(MESH, 32, Op.ALL_GATHER, MIB, described=SLOW))
    assert {each.fidelity for each in found.candidates} == {Fidelity.FULL}


@pytest.mark.parametrize("name", ["pairwise", "bidirectional ring", "direct"])
def test_about_as_many_messages_are_expected_as_there_are(name):
    op = Op.ALL_GATHER if name == "bidirectional ring" else Op.ALL_TO_ALL
    question = asked(POD, 30, op, MIB)
    choice = choose(op, MIB, question.members, question.network, name)
    whole = question.network.topology()
    (job, *_) = jobs_of(choice, question.members, whole, whole)
    assert job.schedule.num_messages <= 2 * expected_messages(choice) <= 8 * job.schedule.num_messages


def test_who_happens_to_be_done_is_not_the_answer_where_another_promises_far_more():
    """520 chips: rings on rails have too many messages to be timed unasked, a single ring has not."""
    network = load_cluster(CONFIGS / "dgx-h100-superpod.yaml").take(520).network
    answer = answer_to(Question(network, 520, Op.ALL_GATHER, 2.0**26))
    assert (answer.algorithm, answer.fidelity) == ("rail rings", Fidelity.FOLDED)
    assert any("rail rings" in note for note in answer.notes)
