"""Claims about what is moved message by message: how much is too much, and what a comparison does without it."""

from pathlib import Path

import pytest

from comms.algorithms import torus_exchange
from comms.collectives.schedule import Op
from comms.errors import TooManyMessages
from comms.networks.conditions import Between, Described, LinkFault, Reach
from comms.selection.choice import choose
from comms.selection.collective import answer_to
from comms.selection.full_collective import of_choice
from comms.selection.progress import quiet
from comms.selection.question import Fidelity, Question
from comms.selection.site import site_of
from comms.simulation.work_budget import UNLIMITED, unwatched
from comms.synthesis.bisection import makespan_bound
from orchestrator.config.hardware.cluster_file import load_cluster

CONFIGS = Path(__file__).parents[3] / "cluster_configs"
POD = load_cluster(CONFIGS / "tpu-v5p-pod.yaml").network
MESH = load_cluster(CONFIGS / "tenstorrent-galaxy.yaml").network  # of 8 x 4
RAILS = load_cluster(CONFIGS / "dgx-h100-superpod.yaml").network  # of 32 hosts of 8 and more
RINGS = load_cluster(CONFIGS / "graphcore-pod64.yaml").network  # a torus of 2 x 32
NBYTES = 2.0**20


@pytest.mark.parametrize("num_chips", [64, 1280])
def test_messages_are_counted_before_they_are_moved(num_chips):
    site = site_of(POD, num_chips)
    choice = choose(Op.BROADCAST, NBYTES, site.members, site.network, "mesh tree")
    count = choice.schedule().num_messages
    assert of_choice(site, choice).run(count, UNLIMITED, unwatched).result.num_messages == count
    with pytest.raises(TooManyMessages, match="million messages"):
        of_choice(site, choice).run(count - 1, UNLIMITED, unwatched)


def test_what_is_surely_too_much_is_refused_without_being_made():
    site = site_of(POD, 8960)
    choice = choose(Op.ALL_TO_ALL, NBYTES, site.members, site.network)
    with pytest.raises(TooManyMessages, match="80 million"):
        of_choice(site, choice).timed(quiet)


@pytest.mark.parametrize(
    "name", ["hierarchical direct, halving-doubling", "hierarchical direct", "halving-doubling"]
)
def test_scattered_chunks_are_counted_before_they_fill_the_memory(name):
    site = site_of(load_cluster(CONFIGS / "dgx-a100.yaml").network, 8192)
    choice = choose(Op.ALL_GATHER, NBYTES, site.members, site.network, name)
    with pytest.raises(TooManyMessages, match="million messages"):
        of_choice(site, choice).timed(quiet)


def test_a_comparison_leaves_out_what_is_too_large_and_says_so(monkeypatch):
    slow = Described(links=(LinkFault(Between(0, 1), 0.5),))
    asked = Question(
        RINGS, 64, Op.ALL_TO_ALL, NBYTES, fidelity=Fidelity.FULL, described=slow, looks_for_better=False
    )
    whole = answer_to(asked)
    monkeypatch.setattr(torus_exchange, "MOST_CHUNKS", 64)
    fewer = answer_to(asked)
    names = {each.algorithm for each in whole.candidates} - {each.algorithm for each in fewer.candidates}
    assert names == {torus_exchange.SHIFT, torus_exchange.ROTATED_SHIFT}
    assert not any("not compared" in note for note in whole.notes)
    assert any(all(name in note for name in names) for note in fewer.notes)


@pytest.mark.parametrize("num_chips", [8, 24, 31])
def test_a_slow_link_is_a_condition_of_any_part_of_a_mesh(num_chips):
    slow = Described(links=(LinkFault(Between(0, 1), 0.5),))
    asked = Question(
        MESH.take(num_chips), num_chips, Op.ALL_REDUCE, NBYTES, described=slow, looks_for_better=False
    )
    found = answer_to(asked)
    assert found.seconds > makespan_bound(found.site.topology, Op.ALL_REDUCE, NBYTES)


def test_what_is_timed_as_one_flat_level_is_moved_in_as_many_pieces():
    site = site_of(POD.take(100), 100)
    choice = choose(Op.BROADCAST, 64 * NBYTES, site.members, site.network, "ring")
    assert not choice.is_folded
    assert of_choice(site, choice).timed(quiet).seconds == pytest.approx(choice.seconds, rel=0.1)


@pytest.mark.parametrize("op", [Op.ALL_REDUCE, Op.REDUCE, Op.BROADCAST, Op.GATHER])
def test_one_host_more_than_fills_a_set_of_leaves_does_not_cost_a_multiple(op):
    even, odd = (
        answer_to(Question(RAILS.take(n), n, op, 64 * NBYTES, fidelity=Fidelity.CLOSED)) for n in (256, 264)
    )
    assert even.seconds <= odd.seconds <= 2 * even.seconds
    (warning,) = odd.warnings
    assert "count as 8 (scale-up) x 33" in warning


def test_bytes_over_wires_are_those_of_the_messages_whatever_share_a_protocol_gets():
    network = load_cluster(CONFIGS / "dgx-a100.yaml").network
    asked = Question(network.take(8), 8, Op.ALL_REDUCE, NBYTES, algorithm="ring", fidelity=Fidelity.FULL)
    (tier,) = answer_to(asked).loads
    assert tier.busiest.nbytes == pytest.approx(2 * 7 / 8 * NBYTES)
    assert tier.nbytes == pytest.approx(2 * 8 * tier.busiest.nbytes)  # up to the switch and down


def test_under_conditions_a_library_still_has_only_its_own_algorithms():
    network = load_cluster(CONFIGS / "dgx-a100.yaml").network
    slow = Described(links=(LinkFault(Reach((0,), "scale-up"), 0.5),))
    found = answer_to(Question(network.take(8), 8, Op.ALL_REDUCE, NBYTES, described=slow))
    assert {each.algorithm for each in found.candidates} == {"ring"}
    assert any("what the library offers" in note for note in found.notes)
