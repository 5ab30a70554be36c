"""Pictures of networks: everything is there once, nothing overlaps, large ones are cut, the bytes are the same."""

import io
from itertools import combinations
from pathlib import Path

import pytest

from comms.collectives.schedule import Op
from comms.networks.conditions import Between, Described, LinkFault, Reach
from comms.selection.collective import answer_to
from comms.selection.question import Fidelity, Question
from comms.selection.size_sweep import sizes_between, sweep_sizes
from orchestrator.config.hardware.cluster_file import load_cluster, shipped_clusters
from orchestrator.views.network.bandwidth_plot import algorithm_curves, sweep_png
from orchestrator.views.network.node_names import node_names
from orchestrator.views.network.topology_excerpt import excerpt
from orchestrator.views.network.topology_layout import NodeKind, Picture, layout
from orchestrator.views.network.topology_plot import picture_of, topology_png

CONFIGS = Path(__file__).parents[4] / "cluster_configs"


def cluster_of(name: str, num_chips: int | None = None):
    return load_cluster(CONFIGS / f"{name}.yaml").take(num_chips)


def answer_of(name: str, num_chips: int | None = None, **more):
    cluster = cluster_of(name, num_chips)
    question = Question(
        cluster.network,
        cluster.num_chips,
        Op.ALL_REDUCE,
        2**20,
        chips_per_host=cluster.chips_per_host,
        **more,
    )
    return answer_to(question)


def texts(picture: Picture, kind: NodeKind) -> list[str]:
    return [node.text for node in picture.nodes if node.kind is kind]


def test_chips_and_switches_have_names_that_say_where_they_are():
    cluster = cluster_of("laptop")
    names = node_names(cluster.network.topology(8), cluster.chips_per_host)
    assert names[5] == "chip 5 (host 1)"
    assert {"pcie switch 3", "pcie root 1", "ethernet switch 0"} <= set(names)
    assert len(set(names)) == len(names)


def test_every_chip_and_switch_is_drawn_once_with_its_links():
    picture = picture_of(answer_of("laptop"))
    assert texts(picture, NodeKind.CHIP) == [str(chip) for chip in range(8)]
    assert len(texts(picture, NodeKind.SWITCH)) == 4 + 2 + 1
    assert len(picture.lines) == 8 + 4 + 2
    assert len({(node.x, node.y) for node in picture.nodes}) == len(picture.nodes)
    assert sorted({line.value for line in picture.lines}) == pytest.approx([3.125e9, 23.94e9])


def test_switches_stand_above_what_is_below_them():
    picture = picture_of(answer_of("laptop"))
    height = {node.text.split("\n")[0] + node.text[-1]: node.y for node in picture.nodes}
    assert height["ethernet0"] > height["pcie1"] > 0


@pytest.mark.parametrize(("name", "num_chips"), [("laptop", 8), ("dgx-h100-superpod", 32), ("dgx-a100", 16)])
def test_switches_do_not_stand_on_each_other(name, num_chips):
    picture = picture_of(answer_of(name, num_chips))
    switches = [node for node in picture.nodes if node.kind is NodeKind.SWITCH]
    for one, other in combinations(switches, 2):
        wide = 0.065 * max(len(line) for node in (one, other) for line in node.text.split("\n"))
        assert one.y != other.y or abs(one.x - other.x) > wide


def test_the_scale_up_fabric_stands_below_where_another_leads_outwards():
    picture = picture_of(answer_of("dgx-a100", 16))
    heights = {node.text.split()[0]: node.y for node in picture.nodes if node.kind is NodeKind.SWITCH}
    assert heights["scale-up"] < 0 < heights["infiniband"]


def test_a_mesh_is_drawn_as_a_grid():
    picture = picture_of(answer_of("tenstorrent-galaxy"))
    assert {(node.x, node.y) for node in picture.nodes} == {(x, y) for x in range(4) for y in range(8)}
    assert len(picture.lines) == 3 * 8 + 4 * 7


def test_with_full_fidelity_lines_say_how_busy_they_are_and_which_are_down():
    down = Described(links=(LinkFault(Between(5, 6), 0.0),))
    answer = answer_of("tenstorrent-galaxy", described=down, looks_for_better=False)
    picture = picture_of(answer)
    dead = [line for line in picture.lines if line.value is None]
    assert [(line.a, line.b) for line in dead] == [(5, 6)]
    busiest = max(line.value for line in picture.lines if line.value is not None)
    assert busiest == pytest.approx(max(load.busiest.busy for load in answer.loads))
    assert busiest <= 1 + 1e-9


def test_a_large_network_is_one_group_of_each_tier_and_how_many_more_there_are():
    network = cluster_of("dgx-h100-superpod", 1024).network
    picture = excerpt(network, 1024)
    assert len(texts(picture, NodeKind.CHIP)) == 8
    assert texts(picture, NodeKind.MORE) == ["31 more\nof 8 chips", "3 more\nof 256 chips"]
    assert [text.split("\n")[0] for text in texts(picture, NodeKind.SWITCH)] == [
        "scale-up",
        "scalable unit",
        "spine",
    ]


def test_a_large_torus_shows_a_corner():
    picture = excerpt(cluster_of("tpu-v5p-pod").network, 8960)
    assert len(texts(picture, NodeKind.CHIP)) == 4 * 4 * 2
    assert "16 x 20 x 28" in texts(picture, NodeKind.MORE)[0]


def test_layouts_need_no_network_between_chips():
    cluster = cluster_of("laptop", 1)
    picture = layout(cluster.network.topology(1), 1, {})
    assert (texts(picture, NodeKind.CHIP), picture.lines) == (["0"], ())


@pytest.mark.parametrize("name", list(shipped_clusters()))
def test_every_shipped_cluster_can_be_drawn(name):
    cluster = cluster_of(name)
    assert topology_png(answer_of(name, cluster.num_chips), name).startswith(b"\x89PNG")


def test_the_same_question_is_the_same_picture_and_load_is_another():
    first = topology_png(answer_of("laptop"), "laptop")
    assert first == topology_png(answer_of("laptop"), "laptop")
    assert b"tEXt" not in first
    assert first != topology_png(answer_of("laptop", fidelity=Fidelity.FULL), "laptop")
    slow = Described(links=(LinkFault(Reach((0,), "ethernet"), 0.5),))
    assert topology_png(answer_of("laptop", described=slow, looks_for_better=False), "laptop") != first


def test_a_sweep_is_drawn_per_algorithm_the_chosen_first():
    cluster = cluster_of("laptop")
    question = Question(cluster.network, 8, Op.ALL_REDUCE, 0.0)
    sweep = sweep_sizes(question, sizes_between(2.0**10, 2.0**20))
    curves = algorithm_curves(sweep)
    chosen = {answer.algorithm for answer in sweep.answers}
    assert set(list(curves)[: len(chosen)]) == chosen
    assert len(chosen) > 1
    assert sweep_png(sweep, "laptop") == sweep_png(sweep, "laptop")


@pytest.mark.parametrize("words", [(), ("--sweep", "1KiB..8KiB"), ("--chips", "1")])
def test_the_picture_is_where_it_was_asked_for(words, orchestrate, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "picture.png"
    ran = orchestrate("comms", *words, "--plot", path)
    assert ran.code == 0
    assert imread(io.BytesIO(path.read_bytes())).shape[1] > 400
    assert str(path) in ran.err
