"""Claims about the words of `orchestrate comms` and `calibrate links`: no dead end, nothing that misleads."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from comms.errors import CommsError, ConfigError, located
from orchestrator.verbs.inputs.comms_inputs import FLAGS

CONFIGS = Path(__file__).parents[3] / "cluster_configs"
LAPTOP = (CONFIGS / "laptop.yaml").read_text()
GALAXY = ("--cluster", "tenstorrent-galaxy")


@pytest.fixture
def comms(orchestrate):
    """Run `orchestrate comms` with these words: exit code, stdout, stderr."""
    return partial(orchestrate, "comms")


@pytest.fixture
def answer(orchestrate_json):
    """The JSON of a run that must succeed."""
    return partial(orchestrate_json, "comms")


def line_of(out: str, name: str) -> str:
    """What stands beside a name in a report."""
    (found,) = (line for line in out.splitlines() if line.split("   ")[0].strip() == name)
    return found.strip().removeprefix(name).strip()


def test_where_tiers_are_balanced_none_is_said_to_limit(comms, answer):
    words = (*GALAXY, "--fidelity", "folded")
    found = answer(*words)
    assert found["limiting_link"]["saved_s"] < 0.05 * found["seconds"]
    said = line_of(comms(*words).out, "limited by")
    assert said.startswith("no single tier")
    assert "balanced; --fidelity full shows the busiest wire" in said


def test_a_tier_that_limits_is_named(comms):
    assert line_of(comms().out, "limited by").startswith("ethernet: without it")


def test_the_part_of_the_time_that_is_not_only_setup_is_called_so(comms):
    said = line_of(comms("--cluster", "dgx-a100", "--chips", "16").out, "time")
    assert "(of which " in said
    assert said.endswith(" setup and pipeline fill)")


def test_a_sweep_says_that_no_schedule_is_made_for_each_size(answer, tmp_path):
    words = ("--chips", "3", "--sweep", "1KiB..2KiB")
    assert any("not looked for at each size" in note for note in answer(*words)["notes"])
    assert any("--algorithm synthesized" in note for note in answer(*GALAXY, *words[2:])["notes"])
    for more in (("--algorithm", "ring"), ("--op", "gather"), ("--fidelity", "folded")):
        assert not any("each size" in note for note in answer(*words, *more)["notes"])
    assert not any("each size" in note for note in answer("--sweep", "1KiB..2KiB")["notes"])


def test_every_row_of_a_sweep_has_its_own_fidelity(comms):
    table = comms("--chips", "3", "--sweep", "1KiB..4KiB").out.split("where the choice")[0]
    _, head, *rows = (line.split() for line in table.splitlines() if len(line.split()) > 1)
    assert head[-1] == "fidelity"
    assert [row[-1] for row in rows] == ["full"] * 3


def test_an_empty_range_is_repeated_as_it_was_typed(comms):
    assert "there are no sizes in 1GiB..1KiB\n" in comms("--sweep", "1GiB..1KiB").err


@pytest.mark.parametrize(
    ("size", "nbytes"), [("1EiB", 2**60), ("1EB", 10**18), ("1PiB", 2**50), ("1PB", 10**15)]
)
def test_large_units_are_units_of_size(answer, size, nbytes):
    assert answer("--size", size)["nbytes"] == nbytes


@pytest.mark.parametrize("size", ["2EiB", "1025PiB", "1e9EB"])
def test_no_size_is_above_one_eib(comms, size):
    code, _, err = comms("--size", size)
    assert code == 2
    assert "at: --size\n  do: give at most 1 EiB" in err


def parts(path: Path, rows: list[list[int]]) -> Path:
    path.write_text("\n".join(",".join(map(str, row)) for row in rows))
    return path


def test_an_uneven_all_to_all_is_called_so_with_its_largest_row(comms, tmp_path):
    path = parts(tmp_path / "parts.csv", [[0, 1024], [2048, 0]])
    out = comms("--op", "all_to_allv", "--chips", "2", "--size", path).out
    assert out.startswith("all_to_allv of at most 2 KiB from a chip (the largest row) over 2 chips of laptop")


@pytest.mark.parametrize(
    ("rows", "says"),
    [([], "the table is empty"), ([[0, 0], [0, 0]], "sends another"), ([[5, 0], [0, 5]], "sends another")],
)
def test_a_table_in_which_nothing_moves_is_refused(comms, tmp_path, rows, says):
    code, _, err = comms("--op", "all_to_allv", "--chips", "2", "--size", parts(tmp_path / "parts.csv", rows))
    assert code == 2
    assert says in err


@pytest.mark.parametrize("num_chips", [2, 4, 8])
@pytest.mark.parametrize("own", ["0", "1GiB", "3GiB"])
def test_parts_that_are_even_take_as_long_as_even_ones_whatever_chips_keep(answer, tmp_path, num_chips, own):
    rows = [[own if a == b else "1GiB" for b in range(num_chips)] for a in range(num_chips)]
    table = parts(tmp_path / "parts.csv", rows)
    words = ("--cluster", "dgx-a100", "--chips", num_chips, "--op", "all_to_allv", "--size", table)
    assert " take 1.00 times as long" in answer(*words)["reason"]


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (
            "\u00b2",
            "is not a number with a unit",
        ),  # superscript two and an Arabic three: digits of other scripts
        ("\u0663", "is not a number with a unit"),
        ("9999999999999999999999", "is more than any chip holds"),
        ("0.5", "is 0.5 bytes"),
        ("1e3", "needs a unit"),
        ("1e9999999999999999999 B", "must be finite"),
    ],
)
def test_a_bare_number_of_bytes_is_checked_like_one_with_a_unit(comms, tmp_path, cell, says):
    path = tmp_path / "parts.csv"
    path.write_text(f"0,1024\n{cell},0\n", encoding="utf-8")
    code, _, err = comms("--op", "all_to_allv", "--chips", "2", "--size", path)
    assert code == 2
    assert says in err
    assert f"at: {path}, row 2\n  do: " in err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"0,1\xff\n2,0\n", "not UTF-8 text"),
        ("0,1\n2,0\n".encode("utf-16"), "not UTF-8 text"),
        (b"0," + b"1" * 200_000 + b"\n", "the file is larger than"),
    ],
)
def test_a_table_that_is_no_text_is_refused(comms, tmp_path, content, says):
    path = tmp_path / "parts.csv"
    path.write_bytes(content)
    code, _, err = comms("--op", "all_to_allv", "--chips", "2", "--size", path)
    assert code == 2
    assert says in err
    assert f"at: {path}\n  do: " in err


def test_a_table_may_start_with_the_mark_of_a_spreadsheet(answer, tmp_path):
    path = tmp_path / "parts.csv"
    path.write_bytes(b"\xef\xbb\xbf1024,2048.0\r\n 1 KiB ,0\r\n")
    assert answer("--op", "all_to_allv", "--chips", "2", "--size", path)["nbytes"] == 3072


@pytest.mark.parametrize("name", ["nosuch.txt", "schedules/mine", "./ring"])
def test_what_looks_like_a_file_and_is_none_is_told(comms, name):
    code, _, err = comms("--algorithm", name)
    assert code == 2
    assert f"there is no file {name}\n  at: --algorithm" in err


def test_errors_of_algorithms_name_the_flag(comms):
    with pytest.raises(ConfigError) as caught, located("network", words=FLAGS):
        raise CommsError("ring does not suit", "algorithm", "take another")
    assert caught.value.where == "--algorithm"
    code, _, err = comms(*GALAXY, "--algorithm", "ring", "--fidelity", "folded")
    assert (code, "at: --algorithm" in err) == (2, True)


def test_a_slow_chip_is_said_to_have_no_effect(comms, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(f"{LAPTOP}conditions:\n  chips: [{{chip: 3, slowdown: 1.5}}]\n")
    code, _, err = comms("--cluster", path)
    assert code == 0
    assert "warning: `slowdown` of chips has no effect here" in err
    path.write_text(f"{LAPTOP}conditions:\n  chips: [{{chip: 3, delay: 5 us}}]\n")
    assert "slowdown" not in comms("--cluster", path).err


def nccl_table(path: Path, gpus: int, ranks: int) -> Path:
    lines = [f"# nThread 1 nGpus {gpus} minBytes 1048576", "# all_reduce_perf"]
    lines += [f"#  Rank  {rank} Group  0 Pid  1 on   host device  {rank}" for rank in range(ranks)]
    lines.append("#  size count type redop root time algbw busbw #wrong time algbw busbw #wrong")
    for nbytes in (2**power for power in range(20, 28)):
        seconds = 30e-6 + nbytes / 200e9
        bandwidth = nbytes / seconds / 1e9
        half = f"{seconds * 1e6:.4f} {bandwidth:.4f} {bandwidth * 14 / 8:.4f} 0"
        lines.append(f"{nbytes} {nbytes // 4} float sum -1 {half} {half}")
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(("gpus", "ranks"), [(8, 1), (8, 0), (8, 8), (1, 8)])
@pytest.mark.parametrize("words", [(), ("--chips", "8")])
def test_chips_are_those_of_the_header_where_rank_lines_are_fewer(orchestrate, tmp_path, gpus, ranks, words):
    ran = orchestrate("calibrate", "links", nccl_table(tmp_path / "ar.txt", gpus, ranks), *words)
    assert ran.code == 0, ran.err


def test_a_table_of_other_chips_is_told_in_a_sentence(orchestrate, tmp_path):
    path = nccl_table(tmp_path / "ar.txt", 8, 1)
    assert (
        "the table is of 8 chips, not of 4\n" in orchestrate("calibrate", "links", path, "--chips", "4").err
    )


@pytest.mark.parametrize("words", [(), ("--chips", "8")])
def test_a_table_of_one_chip_does_not_send_people_round_in_circles(orchestrate, tmp_path, words):
    err = orchestrate("calibrate", "links", nccl_table(tmp_path / "ar.txt", 1, 1), *words).err
    assert "the table is of 1 chip, which moves nothing" in err
    assert "every line about its ranks" in err
    assert "leave" not in err


def test_switches_side_by_side_do_not_stand_on_each_others_letters():
    from orchestrator.views.network.topology_layout import Node, NodeKind, Picture
    from orchestrator.views.network.topology_plot import apart

    chips = tuple(Node(float(x), 0.0, str(x), NodeKind.CHIP) for x in range(64))
    row = tuple(Node(31.0 + x / 10, 1.6, f"scalable unit\nswitch {x}", NodeKind.SWITCH) for x in range(8))
    for scale, is_whole in ((0.3, True), (0.05, False)):
        moved = [
            node for node in apart(Picture((*chips, *row), ()), scale).nodes if node.kind is NodeKind.SWITCH
        ]
        xs = [node.x for node in moved]
        assert xs == sorted(xs)
        assert sum(xs) / 8 == pytest.approx(sum(node.x for node in row) / 8)
        assert min(b - a for a, b in pairwise(xs)) > 0.1
        assert (moved[7].text == row[7].text) == is_whole


@pytest.mark.parametrize(("latency", "is_idle"), [("1 us", False), ("1.1 us", True)])
def test_a_parallel_link_that_carries_nothing_is_warned_of(comms, latency, is_idle, tmp_path):
    path = tmp_path / "par.yaml"
    path.write_text(
        "kind: cluster\nversion: 1\nname: par\ndevice: simulated\n"
        "hosts: [{count: 1, chips: [{like: nvidia_l4, count: 2}]}]\n"
        "scale_up:\n  domain: 2\n  bandwidth: 50 GB/s\n  latency: 1 us\n"
        f"  edges: [{{a: 0, b: 1}}, {{a: 0, b: 1, bandwidth: 30 GB/s, latency: {latency}}}]\n"
    )
    code, _, err = comms("--cluster", str(path), "--op", "all_to_all", "--size", "1MiB")
    assert code == 0
    said = "links that carry nothing, as others beside them have less latency: 0 - 1"
    assert (said in err) == is_idle
