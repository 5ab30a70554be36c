"""Claims about what is moved message by message: how much is too much, and what a comparison does without it."""

from pathlib import Path

import pytest

from comms.algorithms import torus_exchange
from comms.choice import choose
from comms.conditions import Between, Described, LinkFault
from comms.errors import TooManyMessages
from comms.pricing import Fidelity
from comms.schedule import Op
from orchestrator.cluster_file import load_cluster
from orchestrator.collective import time_collective
from orchestrator.full_collective import site_of, timed_choice
from orchestrator.question import Question

CONFIGS = Path(__file__).parents[2] / "cluster_configs"
POD = load_cluster(CONFIGS / "tpu-v5p-pod.yaml").network
RINGS = load_cluster(CONFIGS / "graphcore-pod64.yaml").network  # a torus of 2 x 32
NBYTES = 2.0**20


@pytest.mark.parametrize("num_chips", [64, 1280])
def test_messages_are_counted_before_they_are_moved(num_chips):
    site = site_of(POD, num_chips)
    choice = choose(Op.BROADCAST, NBYTES, site.members, site.network, "mesh tree")
    count = choice.schedule().num_messages
    assert timed_choice(site, choice, count).result.num_messages == count
    with pytest.raises(TooManyMessages, match="million messages"):
        timed_choice(site, choice, count - 1)


def test_what_is_surely_too_much_is_refused_without_being_made():
    site = site_of(POD, 8960)
    choice = choose(Op.ALL_TO_ALL, NBYTES, site.members, site.network)
    with pytest.raises(TooManyMessages, match="80 million"):
        timed_choice(site, choice)


def test_a_comparison_leaves_out_what_is_too_large_and_says_so(monkeypatch):
    slow = Described(links=(LinkFault(Between(0, 1), 0.5),))
    asked = Question(
        RINGS, 64, Op.ALL_TO_ALL, NBYTES, fidelity=Fidelity.FULL, described=slow, looks_for_better=False
    )
    whole = time_collective(asked)
    monkeypatch.setattr(torus_exchange, "MOST_CHUNKS", 64)
    fewer = time_collective(asked)
    names = {each.algorithm for each in whole.candidates} - {each.algorithm for each in fewer.candidates}
    assert names == {torus_exchange.SHIFT, torus_exchange.ROTATED_SHIFT}
    assert not any("left out" in note for note in whole.notes)
    assert any("2 algorithms with many messages are left out" in note for note in fewer.notes)
