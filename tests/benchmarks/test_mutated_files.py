"""Files as people and disks spoil them: read, or refused in three parts (thousands more: `benchmarks/exactness`)."""

from pathlib import Path

import pytest
from exactness.mutated_files import Outcome, read, tried
from hypothesis import given, settings
from hypothesis import strategies as st
from support.file_mutations import FileKind, mutated, seeds

from comms.errors import UserError
from comms.text_files import MOST_NBYTES

SEEDS = list(seeds())
HEAD = "kind: cluster\nversion: 1\nname: c\ndevice: simulated\n"
HOST = """hosts:
  - chips: [{like: nvidia_h100_sxm, count: 8}]
    nics: {count: 8, bandwidth: 1 GB/s, latency: 1 us}
"""
FABRIC = "scale_up: {bandwidth: 50 GB/s, latency: 1 us, %s}\n"


@given(number=st.integers(0, 10**9))
@settings(max_examples=60)
def test_a_mutated_file_is_read_or_refused_in_three_parts(tmp_path_factory, number):
    seed, ways, data = mutated(number, SEEDS)
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_bytes(data)
    outcome, said = tried(seed.kind, path)
    assert outcome in (Outcome.READ, Outcome.REFUSED), f"{seed.name}, {ways}: {said}"


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        (
            FileKind.CHECKED,
            HEAD + HOST.replace("count: 8}", "count: 100000000}", 1),
            "100000000 chips in one host",
        ),
        (
            FileKind.CHECKED,
            HEAD + HOST.replace("- chips", "- count: 100000000\n    chips"),
            "800000000 chips in one",
        ),
        (FileKind.CHECKED, f"{HEAD}repeat: 1000000000\n{HOST}", "8000000000 chips in one cluster"),
        (
            FileKind.CHECKED,
            HEAD + HOST + HOST.removeprefix("hosts:\n").replace("- chips", "- count: 50000\n    chips"),
            "chips in the hosts that repeat",
        ),
        (
            FileKind.CHECKED,
            HEAD + HOST + FABRIC % "shape: torus, dims: [8, 1000000]",
            "8000000 chips in one torus",
        ),
        (
            FileKind.CHECKED,
            HEAD + HOST + "repeat: any\n" + FABRIC % "shape: full mesh, domain: 100000",
            "10000000000 wires",
        ),
        (
            FileKind.CHECKED,
            HEAD + HOST + "conditions: {chips: [{chip: 0-999999999, slowdown: 2}]}\n",
            "no cluster has",
        ),
        (FileKind.CHECKED, f"{HEAD}repeat: {'9' * 4000}\n{HOST}", "beyond 2^64"),
        (FileKind.CHECKED, f"{HEAD}repeat: 0x{'f' * 4000}\n{HOST}", "beyond 2^64"),
        (FileKind.CHECKED, f"{HEAD}a: [{'1, ' * 100_001}]\n", "more than 100000 values"),
        (FileKind.CHECKED, HEAD + HOST.replace("nvidia_h100_sxm", "x" * 1_000_000), "is not in the catalog"),
        (FileKind.PLAN, "kind: plan\nversion: 1\nmicrobatches: 1000000000\n", "microbatches is 1000000000"),
        (FileKind.PLAN, "kind: plan\nversion: 1\ndp: !!int ''\n", "cannot read ''"),
        (FileKind.SCHEDULE, "op all_reduce\nranks 999999999\nchunks 1\n", "has 999999999 ranks"),
        (FileKind.SCHEDULE, "op all_reduce\nranks 2\nchunks 999999999\n", "has 999999999 chunks"),
        (FileKind.TABLE, f"size,time_us,chips\n8,1,{'9' * 5000}\n", "is not a number of chips"),
        (FileKind.TABLE, f"size,time_us\n8,{'1' * 200_000}\n", "not CSV"),
        (FileKind.PARTS, "0,1\n" + "1" * 200_000 + ",0\n", "larger than 0.1"),
    ],
)
def test_what_would_fill_the_memory_is_refused_with_its_limit(tmp_path, kind, text, problem):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read(kind, path)
    assert problem in caught.value.problem
    assert caught.value.where and caught.value.hint
    assert len(caught.value.text) < 7000


@pytest.mark.parametrize("kind", [kind for kind in FileKind if kind is not FileKind.TABLE])
def test_a_file_of_a_hundred_megabytes_is_not_read(tmp_path, kind):
    path = tmp_path / "file.yaml"
    with path.open("wb") as file:
        file.truncate(10 * MOST_NBYTES)
    with pytest.raises(UserError, match="is larger than"):
        read(kind, path)
    assert tried(kind, Path("/dev/zero"))[0] is Outcome.REFUSED
