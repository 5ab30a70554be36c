"""Claims about `orchestrate comms`: what it answers, at which fidelity, what it refuses and what it warns of."""

import json
from functools import partial
from pathlib import Path

import pytest

from comms.algorithms import ring
from comms.algorithms.rounds import Ranks
from comms.collectives.schedule import Op
from comms.collectives.schedule_text import schedule_text
from comms.networks.conditions import Described, LinkFault, Reach
from comms.selection.collective import answer_to
from comms.selection.question import Fidelity, Question, conditions_in_words
from orchestrator.config.hardware.cluster_file import load_cluster, shipped_clusters

CONFIGS = Path(__file__).parents[3] / "cluster_configs"
LAPTOP = (CONFIGS / "laptop.yaml").read_text()
MESH = (CONFIGS / "tenstorrent-galaxy.yaml").read_text()
MIB = 2**20


@pytest.fixture
def comms(orchestrate):
    """Run `orchestrate comms` with these words: exit code, stdout, stderr."""
    return partial(orchestrate, "comms")


@pytest.fixture
def answer(orchestrate_json):
    """The JSON of a run that must succeed."""
    return partial(orchestrate_json, "comms")


def file_with(tmp_path: Path, text: str, conditions: str) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"{text}conditions:\n{conditions}")
    return str(path)


@pytest.mark.parametrize(("cluster", "chips"), [("laptop", "8"), ("dgx-a100", "16"), ("tpu-v5p-pod", "64")])
def test_the_three_fidelities_agree_on_groups_that_fold(answer, cluster, chips):
    words = ("--cluster", cluster, "--chips", chips)
    seconds = [answer(*words, "--fidelity", each)["seconds"] for each in ("closed", "folded", "full")]
    assert seconds == pytest.approx([seconds[0]] * 3, rel=1e-3)


@pytest.mark.parametrize("op", list(Op))
def test_every_operation_has_an_answer(answer, op):
    found = answer("--op", op, "--size", "1MiB")
    assert (found["op"], found["fidelity"]) == (op, "full" if op is Op.GATHER else "folded")
    assert found["seconds"] > 0
    assert (found["nbytes"] == 0) == (op is Op.BARRIER)


def test_bandwidths_are_those_of_nccl_tests(answer):
    found = answer("--size", "64MiB")
    assert found["algbw_bytes_per_s"] == pytest.approx(64 * MIB / found["seconds"])
    assert found["busbw_bytes_per_s"] == pytest.approx(found["algbw_bytes_per_s"] * 2 * 7 / 8)


def test_the_document_has_every_promised_key(answer):
    promised = "seconds algorithm algbw_bytes_per_s busbw_bytes_per_s per_tier limiting_link elapsed_s"
    promised += " reason protocol setup_s fidelity num_messages candidates left_out notes"
    found = answer("--fidelity", "full")
    assert set(promised.split()) <= found.keys()
    assert found["num_messages"] > 0
    assert min(each["seconds"] for each in found["candidates"]) == pytest.approx(found["seconds"])
    assert found["candidates"][0]["algorithm"] == found["algorithm"]


def test_the_limiting_link_is_a_tier_and_with_full_fidelity_a_wire_with_two_ends(answer):
    assert answer()["limiting_link"]["tier"] == "ethernet"
    wire = answer("--fidelity", "full")["limiting_link"]
    assert wire["tier"] == "ethernet"
    assert {wire["from"], wire["to"]} == {"pcie root 0", "ethernet switch 0"}
    assert 0.5 < wire["busy"] <= 1


def test_bytes_of_a_tier_are_those_of_its_messages(answer):
    found = answer("--fidelity", "full", "--chips", "2", "--algorithm", "ring", "--size", "2MiB")
    (tier,) = found["per_tier"]
    assert tier["nbytes"] == pytest.approx(2 * 2 * 2 * MIB)  # two chips send 2 MiB each, up and down
    assert tier["busiest_wire"]["nbytes"] == pytest.approx(2 * MIB)


@pytest.mark.parametrize("size", ["64", "1.5B", "many", "-1B", "3 GB/s"])
def test_a_size_is_whole_bytes_with_a_unit(comms, size):
    code, out, err = comms("--size", size)
    assert (code, out) == (2, "")
    assert "at: --size" in err
    assert "do: " in err


@pytest.mark.parametrize("size", ["0B", "1B"])
def test_the_smallest_sizes_take_time_too(answer, size):
    found = answer("--size", size)
    assert found["nbytes"] == float(size[0])
    assert found["seconds"] > 0


def test_one_chip_needs_nothing(comms, answer):
    found = answer("--chips", "1")
    assert (found["seconds"], found["algorithm"], found["limiting_link"]) == (0, "none", None)
    assert found["reason"] == "one chip has all it needs"
    assert "--algorithm has no effect" in comms("--chips", "1", "--algorithm", "ring")[2]


def test_more_chips_than_there_are_is_an_error_with_a_way_out(comms):
    code, _, err = comms("--chips", "16")
    assert code == 2
    assert "has 8 chips" in err


def test_chips_that_do_not_fold_are_moved_message_by_message_and_the_answer_says_so(comms, answer):
    found = answer("--chips", "3")
    assert found["fidelity"] == "full"
    assert any("do not fold" in note for note in found["notes"])
    code, _, err = comms("--chips", "3", "--fidelity", "folded")
    assert code == 0
    assert "warning: 3 chips do not fold" in err


def test_where_nothing_suits_the_levels_the_answer_is_that_of_full_fidelity(answer):
    found = answer("--cluster", "tenstorrent-galaxy", "--op", "all_to_all")
    assert found["fidelity"] == "full"
    assert any("no algorithm for all_to_all suits" in note for note in found["notes"])


def test_a_slow_link_makes_it_slower_and_is_told(comms, answer, tmp_path):
    path = file_with(tmp_path, LAPTOP, "  links:\n    - {chip: 0, tier: ethernet, factor: 0.5}\n")
    healthy, slow = answer("--op", "all_gather"), answer("--cluster", path, "--op", "all_gather")
    assert slow["fidelity"] == "full"
    assert slow["seconds"] > 1.5 * healthy["seconds"]
    assert "conditions of the cluster file: 1 slow link" in slow["notes"]
    code, out, err = comms("--cluster", path, "--op", "all_gather", "--fidelity", "folded", "--json")
    assert json.loads(out)["seconds"] == pytest.approx(healthy["seconds"])
    assert (code, "conditions of the cluster file are left out" in err) == (0, True)


def test_conditions_that_do_not_touch_a_collective_change_nothing(answer, tmp_path):
    path = file_with(tmp_path, LAPTOP, "  chips:\n    - {chip: 3, slowdown: 2}\n")
    assert answer("--cluster", path)["seconds"] == answer()["seconds"]


def test_conditions_are_counted_in_words():
    links = (LinkFault(Reach((0,), "ethernet"), 0.5), LinkFault(Reach((1,), "ethernet"), 0.0))
    assert conditions_in_words(Described(links=links)) == "1 link down, 1 slow link"
    assert conditions_in_words(Described()) == ""


def test_around_a_dead_link_a_schedule_made_for_the_network_wins(answer, tmp_path):
    path = file_with(tmp_path, MESH, "  links:\n    - {from: 5, to: 6, down: true}\n")
    found = answer("--cluster", path, "--size", "4MiB")
    assert found["algorithm"] == "synthesized"
    assert "times faster than" in found["reason"]
    fixed = [each for each in found["candidates"] if each["algorithm"] != "synthesized"]
    assert fixed
    assert all(each["seconds"] > found["seconds"] for each in fixed)


def test_synthesis_is_compared_with_what_auto_would_take(answer):
    found = answer("--algorithm", "synthesized", "--chips", "4", "--size", "1MiB")
    assert [each["fidelity"] for each in found["candidates"]] == ["full", "full"]
    assert found["candidates"][0]["algorithm"] == "synthesized"
    assert "made for this network" in found["reason"]


def test_an_algorithm_can_be_asked_for_by_name(answer, comms):
    found = answer("--algorithm", "ring")
    assert (found["algorithm"], found["reason"]) == ("ring", "asked for by name")
    code, _, err = comms("--algorithm", "rng")
    assert (code, "did you mean 'ring'?" in err) == (2, True)
    code, _, err = comms("--op", "gather", "--algorithm", "torus")
    assert (code, "gather has no algorithm" in err) == (2, True)


def test_a_schedule_from_a_file_takes_what_the_same_algorithm_takes(answer, comms, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(
        schedule_text(ring.schedule(Op.ALL_REDUCE, Ranks(8))).replace("algorithm ring", "algorithm mine")
    )
    mine = answer("--algorithm", str(path))
    assert mine["algorithm"] == "mine"
    assert mine["seconds"] == pytest.approx(answer("--algorithm", "ring")["seconds"], rel=1e-3)
    assert "proved" in mine["reason"]
    assert "--fidelity closed has no effect" in comms("--algorithm", str(path), "--fidelity", "closed")[2]


@pytest.mark.parametrize(
    ("change", "words", "expected"),
    [
        (("1 -> 2 chunk 0", "1 -> 2 chunk 1"), (), "rank"),
        (("", ""), ("--chips", "4"), "a schedule of 8 ranks, but 4 chips"),
        (("", ""), ("--op", "all_gather"), "a schedule for all_reduce, but --op is all_gather"),
        (("op all_reduce", "op all_red"), (), "line 1"),
    ],
)
def test_a_schedule_that_does_not_hold_is_refused(comms, tmp_path, change, words, expected):
    path = tmp_path / "mine.txt"
    text = schedule_text(ring.schedule(Op.ALL_REDUCE, Ranks(8)))
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    code, _, err = comms("--algorithm", str(path), *words)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err


def test_a_sweep_doubles_and_says_where_the_choice_changes(answer):
    found = answer("--sweep", "1KiB..1MiB")
    assert [row["nbytes"] for row in found["rows"]] == [2.0**power for power in range(10, 21)]
    assert [row["algorithm"] for row in found["rows"]] != [found["rows"][0]["algorithm"]] * 11
    choices = found["choices"]
    assert (choices[0]["from_nbytes"], choices[-1]["to_nbytes"]) == (1024, MIB)
    for row in found["rows"]:
        within = [each for each in choices if each["from_nbytes"] <= row["nbytes"] <= each["to_nbytes"]]
        assert [each["algorithm"] for each in within] == [row["algorithm"]]
    assert found["rows"][-1]["seconds"] == answer("--size", "1MiB")["seconds"]


@pytest.mark.parametrize("sweep", ["1KiB", "2KiB..1KiB", "0B..1KiB", "1..2", "1KiB-1MiB"])
def test_a_range_that_is_none_is_refused(comms, sweep):
    code, _, err = comms("--sweep", sweep)
    assert (code, "at: --sweep" in err) == (2, True)


def test_tiers_are_told_from_the_inside_to_the_network(answer, comms):
    words = ("--tiers", "--cluster", "dgx-h100-superpod")
    assert [row["tier"] for row in answer(*words)["tiers"]][-2:] == ["scalable unit", "spine"]
    assert [row["tier"] for row in answer(*words, "--chips", "8")["tiers"]][-1] == "scale-up"
    assert "ethernet" in comms("--tiers")[1]


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (("--tiers", "--size", "1MiB"), "--size"),
        (("--tiers", "--fidelity", "full"), "--fidelity"),
        (("--sweep", "1KiB..2KiB", "--size", "1MiB"), "--size"),
        (("--op", "barrier", "--size", "1MiB"), "--size"),
    ],
)
def test_what_has_no_effect_is_said(comms, words, flag):
    code, _, err = comms(*words)
    assert code == 0
    assert f"warning: {flag} has no effect" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--op", "allreduce"), "did you mean 'all_reduce'?"),
        (("--op", "barrier", "--sweep", "1B..2B"), "no size to vary"),
        (("--plot", "picture.pdf"), ".png"),
        (("--plot", "no/such/folder/picture.png"), "folder that exists"),
        (
            (
                "--cluster",
                "dgx-h100-superpod",
                "--chips",
                "8192",
                "--algorithm",
                "ring",
                "--fidelity",
                "full",
            ),
            "too many to move one by one",
        ),
    ],
)
def test_what_cannot_be_is_three_lines_and_exit_code_2(comms, words, expected):
    code, out, err = comms(*words)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("error:") == 1


@pytest.mark.parametrize("name", list(shipped_clusters()))
def test_every_shipped_cluster_has_an_answer_and_tiers(answer, name):
    assert answer("--cluster", name)["seconds"] >= 0
    assert answer("--cluster", name, "--tiers")["tiers"]


def test_the_same_question_has_the_same_answer(answer):
    def timeless(found: dict) -> dict:
        return {key: value for key, value in found.items() if key not in ("elapsed_s", "loading_s")}

    words = ("--chips", "3", "--size", "1MiB")
    assert timeless(answer(*words)) == timeless(answer(*words))


def test_the_clock_is_the_callers():
    cluster = load_cluster(CONFIGS / "laptop.yaml")
    question = Question(cluster.network, 8, Op.ALL_REDUCE, MIB)
    assert answer_to(question, clock=iter((1.0, 1.5)).__next__).elapsed_s == 0.5
    full = Question(cluster.network, 8, Op.ALL_REDUCE, MIB, fidelity=Fidelity.FULL)
    found = answer_to(full, clock=iter((1.0, 2.0, 5.0, 9.0)).__next__)
    assert (found.loading_s, found.elapsed_s) == (3.0, 5.0)


def test_the_bisection_is_what_one_card_of_each_host_carries(answer):
    assert answer("--cluster", "laptop")["bisection_bytes_per_s"] == pytest.approx(25e9 / 8)
    assert answer("--cluster", "laptop", "--chips", "1")["bisection_bytes_per_s"] is None


SCRAMBLED = """\
kind: cluster
version: 1
name: scrambled
device: simulated
hosts:
  - chips: [{like: nvidia_a100_sxm_80gb, count: 6}]
scale_up:
  bandwidth: 50 GB/s
  latency: 1 us
  efficiency: 1.0
  edges: [{a: 0, b: 2}, {a: 2, b: 4}, {a: 4, b: 1}, {a: 1, b: 3}, {a: 3, b: 5}, {a: 5, b: 0}]
"""


def test_rings_go_from_neighbour_to_neighbour_both_ways_on_a_graph(answer, tmp_path):
    path = tmp_path / "scrambled.yaml"
    path.write_text(SCRAMBLED)
    found = answer("--cluster", str(path), "--algorithm", "ring", "--size", "600 MB")
    assert found["fidelity"] == "full"
    assert found["seconds"] == pytest.approx(10 * (1e-6 + 50e6 / 50e9), rel=1e-6)


DGX = (CONFIGS / "dgx-a100.yaml").read_text()


def test_late_chips_and_noise_are_part_of_the_choice(answer, tmp_path):
    path = file_with(tmp_path, LAPTOP, "  chips: [{chip: 7, delay: 5 ms}]\n")
    words = ("--cluster", path, "--size", "1MiB")
    every = answer(*words)
    named = answer(*words, "--algorithm", "recursive doubling")
    assert every["seconds"] <= named["seconds"] * (1 + 1e-9)
    assert len(every["candidates"]) > 2


def test_a_wire_is_not_said_to_be_busier_than_always_beside_other_jobs(answer, tmp_path):
    job = "  background:\n    - {op: all_reduce, size: 1 GiB, chips: 0-7}\n"
    document = answer("--cluster", file_with(tmp_path, DGX, job), "--chips", "8", "--size", "1MiB")
    assert 0 < document["limiting_link"]["busy"] <= 1


def test_an_algorithm_asked_for_by_name_is_moved_message_by_message_where_levels_do_not_suit_it(
    answer, comms
):
    words = ("--cluster", "tenstorrent-galaxy", "--algorithm", "ring")
    assert answer(*words)["fidelity"] == "full"
    code, _, err = comms(*words, "--fidelity", "closed")
    assert code == 2
    assert "ring does not suit" in err
    assert "--fidelity full" in err


def test_what_has_too_many_messages_is_left_out_of_the_comparison(comms):
    code, _, err = comms(
        "--cluster",
        "dgx-h100-superpod",
        "--op",
        "all_to_all",
        "--chips",
        "8192",
        "--fidelity",
        "full",
        "--algorithm",
        "direct",
    )
    assert code == 2
    assert "67 million messages" in err


def test_the_bisection_is_that_of_the_links_as_they_are(answer, tmp_path):
    words = ("--chips", "16", "--size", "1MiB")
    slow = file_with(tmp_path, DGX, "  links: [{chip: 0, tier: scale-out, factor: 0.1}]\n")
    assert (
        answer("--cluster", slow, *words)["bisection_bytes_per_s"]
        < answer("--cluster", "dgx-a100", *words)["bisection_bytes_per_s"]
    )


def test_the_bisection_of_a_mesh_is_known_by_its_shape(comms):
    assert "closed form" in comms("--cluster", "tenstorrent-galaxy")[1]


ISLANDS = SCRAMBLED[: SCRAMBLED.index("  edges")] + (
    "  edges: [{a: 0, b: west}, {a: 1, b: east}, {a: 2, b: west}, {a: 3, b: east}, {a: 4, b: west}, {a: 5, b: east},"
    " {a: west, b: east, bandwidth: 5 GB/s}]\n"
)


def test_hierarchies_found_on_a_graph_take_part_in_the_comparison(answer, tmp_path):
    path = tmp_path / "islands.yaml"
    path.write_text(ISLANDS)
    seconds = {each["algorithm"]: each["seconds"] for each in answer("--cluster", str(path))["candidates"]}
    assert seconds["hierarchical ring"] < seconds["ring"]


def parts_file(tmp_path, rows) -> Path:
    path = tmp_path / "parts.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return path


def test_an_uneven_all_to_all_of_even_parts_is_an_all_to_all(answer, tmp_path):
    path = parts_file(tmp_path, [["0" if a == b else "1 MiB" for b in range(8)] for a in range(8)])
    uneven = answer("--cluster", "dgx-a100", "--op", "all_to_allv", "--size", path)
    even = answer(
        "--cluster",
        "dgx-a100",
        "--op",
        "all_to_all",
        "--size",
        "8 MiB",
        "--algorithm",
        "direct",
        "--fidelity",
        "full",
    )
    assert uneven["seconds"] == pytest.approx(even["seconds"], rel=1e-6)
    assert uneven["nbytes"] == 7 * MIB


def test_one_busy_receiver_makes_an_all_to_all_slower_than_even_parts(answer, tmp_path):
    path = parts_file(tmp_path, [[8 * MIB if b == 3 else MIB for b in range(8)] for _ in range(8)])
    document = answer("--cluster", "dgx-a100", "--op", "all_to_allv", "--size", path)
    assert document["limiting_link"]["to"] == "chip 3"
    assert "even parts of as much in all" in document["reason"]


@pytest.mark.parametrize("words", [(), ("--size", "no.csv"), ("--size", "1MiB"), ("--sweep", "1KiB..1MiB")])
def test_an_uneven_all_to_all_wants_a_table_of_all_chips(comms, words):
    code, _, err = comms("--op", "all_to_allv", *words)
    assert code == 2
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("rows", "says"),
    [([[1, 2]], "1 rows of 2 columns"), ([["x"] * 8] * 8, "row 1"), ([[-1] * 8] * 8, "row 1")],
)
def test_a_table_of_parts_that_is_wrong_is_told(comms, tmp_path, rows, says):
    code, _, err = comms("--op", "all_to_allv", "--size", parts_file(tmp_path, rows))
    assert code == 2
    assert says in err


def test_on_a_mesh_the_answer_says_that_a_schedule_of_its_own_may_be_faster(answer):
    words = ("--cluster", "tenstorrent-galaxy", "--size", "64 MiB")
    found = answer(*words)
    assert any("--algorithm synthesized" in note for note in found["notes"])
    assert answer(*words, "--algorithm", "synthesized")["seconds"] < found["seconds"]
    assert answer(*words, "--algorithm", "mesh")["notes"] == []
