"""Data: a sample depends on (seed, index) alone, epochs cover the text, nothing held out is trained on; a batch goes
to exactly one replica and microbatch, in order; baselines are the formula written out with counters."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import DataError
from orchestrator.runs.data import (
    PRIOR_STRENGTH,
    TokenData,
    baseline_losses,
    load_data,
    split,
    split_batch,
    step_key,
)
from partitioner.capture.forwards.keyed_random import FIRST_SAMPLE, KEY
from partitioner.layout.parallel_plan import Plan
from partitioner.program.program import Program, Role, Tensor, TensorKind, TensorSpec


def numbered(length: int, seq: int, seed: int = 0) -> TokenData:
    """Data whose byte i says i modulo 256."""
    text = np.arange(length, dtype=np.int64).astype(np.uint8)
    return TokenData("numbered", text, text, seq, seed, "")


def rows(data: TokenData, samples: range) -> list[list[int]]:
    found: list[list[int]] = data.batch(samples)["input_ids"].tolist()
    return found


@given(
    length=st.integers(20, 400), seq=st.integers(1, 9), start=st.integers(0, 10**6), size=st.integers(1, 20)
)
def test_any_range_of_samples_is_the_same_samples_one_by_one(
    length: int, seq: int, start: int, size: int
) -> None:
    data = numbered(length, seq)
    together = rows(data, range(start, start + size))
    assert together == [rows(data, range(i, i + 1))[0] for i in range(start, start + size)]
    strided = rows(data, range(start, start + size, 2))
    assert strided == together[::2]


def test_labels_are_the_bytes_that_follow() -> None:
    batch = numbered(1000, 8).batch(range(5))
    assert (batch["labels"] == (batch["input_ids"] + 1) % 256).all()
    assert batch["labels"].shape == (5, 8)


@given(
    length=st.integers(12, 256), seq=st.integers(1, 10), seed=st.integers(0, 2**70), epoch=st.integers(0, 9)
)
def test_an_epoch_visits_disjoint_windows_over_nearly_all_the_text(
    length: int, seq: int, seed: int, epoch: int
) -> None:
    data = numbered(length, seq, seed)
    count = data.samples_per_epoch
    seen = [byte for row in rows(data, range(epoch * count, (epoch + 1) * count)) for byte in row]
    assert len(set(seen)) == len(seen) == count * seq
    assert len(seen) >= length - 2 * seq - 1


def test_order_changes_with_the_seed_and_with_the_epoch() -> None:
    first = numbered(200, 4)
    one_epoch = range(first.samples_per_epoch)
    later = range(first.samples_per_epoch, 2 * first.samples_per_epoch)
    assert rows(first, one_epoch) != rows(first, later)
    assert rows(first, one_epoch) != rows(numbered(200, 4, seed=1), one_epoch)


def test_samples_stay_where_they_are_from_version_to_version() -> None:
    starts = [row[0] for row in rows(numbered(250, 10), range(6))]
    assert starts == [182, 42, 82, 222, 2, 12]


def test_validation_windows_follow_the_text_and_start_over() -> None:
    data = numbered(41, 10)
    assert data.num_validation_samples == 4
    firsts = data.validation_batch(range(2, 6))["input_ids"][:, 0].tolist()
    assert firsts == [20, 30, 0, 10]


@given(length=st.integers(10, 10**5))
def test_split_holds_out_a_tenth_and_loses_nothing(length: int) -> None:
    text = np.arange(length).astype(np.uint8)
    train, validation = split(text)
    assert len(train) + len(validation) == length
    assert len(validation) == pytest.approx(length / 10, abs=11)


def test_split_takes_its_tenth_from_all_over_the_text() -> None:
    place = np.repeat(np.arange(100, dtype=np.uint8), 3000)
    train, validation = split(place)
    assert len(np.unique(validation)) == 20
    assert set(np.unique(train)) | set(np.unique(validation)) == set(range(100))


def test_default_text_is_english_and_holds_no_paragraph_twice() -> None:
    data = load_data("builtin:english", seq=128, seed=0)
    text = data.train.tobytes() + data.validation.tobytes()
    assert len(text) > 300_000
    assert b"statement" in data.validation.tobytes()
    paragraphs = data.validation.tobytes().split(b"\n\n")[1:-1]
    copied = [
        paragraph for paragraph in paragraphs if len(paragraph) > 200 and paragraph in data.train.tobytes()
    ]
    assert not copied


def test_folder_is_its_text_files_in_order_of_path(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"second " * 200)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_bytes(b"first " * 200)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0" * 200)
    (tmp_path / ".hidden").write_bytes(b"never" * 200)
    folder = load_data(str(tmp_path), seq=8, seed=0)
    joined = tmp_path / "joined.txt"
    joined.write_bytes(b"first " * 200 + b"\n" + b"second " * 200)
    assert folder.digest == load_data(str(joined), seq=8, seed=0).digest


def test_any_bytes_are_text(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(bytes(range(128, 256)) * 40)
    assert load_data(str(path), seq=16, seed=0).batch(range(3))["input_ids"].min() >= 128


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty"), (b"too short", "9 bytes are too few for sequences of 16")],
)
def test_too_little_text_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_data(str(path), seq=16, seed=0)


def test_the_hinted_number_of_bytes_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"x" * 170)
    assert load_data(str(path), seq=16, seed=0).num_validation_samples == 1
    path.write_bytes(b"x" * 160)
    with pytest.raises(DataError, match="few") as caught:
        load_data(str(path), seq=16, seed=0)
    assert "at least 170 bytes" in caught.value.hint


def test_missing_paths_empty_folders_and_unknown_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt: No such file"):
        load_data(str(tmp_path / "gone.txt"), seq=8, seed=0)
    with pytest.raises(DataError, match="holds no text files"):
        load_data(str(tmp_path), seq=8, seed=0)
    with pytest.raises(DataError, match="unknown data 'builtin:french'"):
        load_data("builtin:french", seq=8, seed=0)


def reading(plan: Plan, samples: int = 0, **shapes: tuple[int, ...]) -> Program:
    """A Program whose parts read entries of these shapes."""
    tensors = tuple(
        Tensor(i, name, TensorKind.BATCH, TensorSpec(shape, "i64"), source=f"batch:{name}")
        for i, (name, shape) in enumerate(shapes.items())
    )
    role = Role(0, tensors, (), ())
    return Program(plan.axes, plan.microbatches, (), (role,), (("samples_per_part", samples),))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_the_pieces_in_order_are_the_global_batch(dp: int, microbatches: int, size: int) -> None:
    samples = torch.arange(dp * microbatches * size * 2).reshape(-1, 2)
    program = reading(Plan(dp=dp, microbatches=microbatches), x=(size, 2), y=(size,))
    split = split_batch({"x": samples, "y": samples[:, 0]}, program)
    assert set(split) == set(range(dp))
    for name, whole in (("x", samples), ("y", samples[:, 0])):
        pieces = [
            split[replica][microbatch, name] for replica in range(dp) for microbatch in range(microbatches)
        ]
        assert {len(p) for p in pieces} == {size}
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("plan", [Plan(dp=2), Plan(microbatches=2), Plan(tp=4, pp=2, dp=2)])
def test_only_dp_and_microbatches_cut(plan: Plan) -> None:
    split = split_batch({"x": torch.arange(4)}, reading(plan, x=(2,)))
    assert [len(v) for part in split.values() for v in part.values()] == [2, 2]


def test_what_all_samples_share_goes_everywhere_and_what_nothing_reads_nowhere() -> None:
    shared = torch.arange(3)
    program = reading(Plan(dp=2, microbatches=2), x=(2,), shared=(3,), scale=())
    batch = {"x": torch.arange(8), "shared": shared, "scale": torch.tensor(7), "other": torch.arange(5)}
    split = split_batch(batch, program)
    parts = [split[replica][microbatch, "shared"] for replica in (0, 1) for microbatch in (0, 1)]
    assert all(torch.equal(part, shared) for part in parts)
    assert {name for part in split.values() for _, name in part} == {"x", "shared", "scale"}


def test_every_part_knows_the_number_of_its_first_sample_and_all_the_same_key() -> None:
    plan = Plan(dp=2, microbatches=3)
    program = reading(plan, 4, x=(4,), **{KEY: (), FIRST_SAMPLE: ()})
    split = split_batch({"x": torch.arange(24)}, program, key=-5)
    for replica, part in split.items():
        for microbatch in range(3):
            assert part[microbatch, FIRST_SAMPLE] == part[microbatch, "x"][0] == 12 * replica + 4 * microbatch
            assert part[microbatch, KEY] == -5


@given(st.integers(0, 2**70), st.integers(0, 2**40))
def test_keys_differ_from_step_to_step_and_from_seed_to_seed(seed: int, step: int) -> None:
    key = step_key(seed, step)
    assert -(2**63) <= key < 2**63
    assert key == step_key(seed, step)
    assert len({key, step_key(seed, step + 1), step_key(seed + 1, step)}) == 3


def as_bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def brute_force(train: bytes, validation: bytes, order: int) -> float:
    """The same interpolation, one byte at a time."""

    def probability(context: bytes, byte: bytes) -> float:
        if len(context) == 0:
            shorter, gram, seen = 1 / 256, 1, len(train)
        else:
            shorter, gram = probability(context[1:], byte), len(context) + 1
            contexts = Counter(train[i : i + gram - 1] for i in range(len(train) - gram + 1))
            seen = contexts[context]
        grams = Counter(train[i : i + gram] for i in range(len(train) - gram + 1))
        return (grams[context + byte] + PRIOR_STRENGTH * shorter) / (seen + PRIOR_STRENGTH)

    places = range(2, len(validation))
    losses = [-math.log(probability(validation[i - order + 1 : i], validation[i : i + 1])) for i in places]
    return sum(losses) / len(losses)


@given(train=st.binary(min_size=1, max_size=30), validation=st.binary(min_size=3, max_size=12))
def test_losses_equal_counting_one_byte_at_a_time(train: bytes, validation: bytes) -> None:
    found = baseline_losses(as_bytes(train), as_bytes(validation))
    expected = [brute_force(train, validation, order) for order in (1, 2, 3)]
    assert list(found.values()) == pytest.approx(expected)


def test_more_context_helps_on_text_that_repeats() -> None:
    text = as_bytes(b"abac" * 1000)
    found = baseline_losses(text, text[:400])
    assert found["unigram"] == pytest.approx(1.5 * math.log(2), abs=0.01)
    assert found["bigram"] == pytest.approx(0.5 * math.log(2), abs=0.03)
    assert found["trigram"] == pytest.approx(0, abs=0.05)


def test_default_text_has_the_baselines_that_a_model_must_beat() -> None:
    data = load_data("builtin:english", seq=128, seed=0)
    found = baseline_losses(data.train, data.validation)
    assert list(found) == ["unigram", "bigram", "trigram"]
    assert 3.0 < found["unigram"] < 3.6
    assert 1.8 < found["trigram"] < 2.2 < found["bigram"] < 2.8
