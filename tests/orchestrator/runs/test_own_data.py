"""Own data: the batches are those of torch's loaders, any step can be asked for, and what is not fit is named."""

import gc
import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from comms.errors import DataError, ModelError
from orchestrator.runs.own_data import OwnData, Reading

X = torch.arange(20.0, dtype=torch.float64).reshape(20, 1)
SET = TensorDataset(X, -X)


def read(source: Any, samples: int = 8, **more: Any) -> OwnData:
    reading = Reading(samples, more.pop("seed", 0), torch.float64, **{"shuffle": False, **more})
    return OwnData(
        "mine.py:data", source, reading, lambda v: v if isinstance(v, dict) else {"x": v[0], "y": v[1]}
    )


def rows(data: OwnData, steps: int) -> list[list[int]]:
    """Which samples each batch holds."""
    return [data.batch(step)["x"].flatten().int().tolist() for step in range(steps)]


def of_torch(loader: Any, steps: int) -> list[list[int]]:
    """The same of a loader that is gone through again and again."""
    passes = (batch for _ in itertools.count() for batch in loader)
    return [batch[0].flatten().int().tolist() for batch in itertools.islice(passes, steps)]


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, count: int = 20) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X[: self.count], -X[: self.count], strict=True)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.rand(1) + random.random() + np.random.rand(), X[index]


class Columns:
    """What a dataset of Hugging Face is to its readers: rows, columns by name, and a format."""

    def __init__(self, kind: str | None = None) -> None:
        self.format = {"type": kind}

    def with_format(self, kind: str) -> "Columns":
        return Columns(kind)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return [float(v) for v in X]
        row = [float(X[key])]
        return {"x": torch.tensor(row, dtype=torch.float64) if self.format["type"] == "torch" else row}


@pytest.mark.parametrize(
    "source", [SET, list(SET), Stream(), DataLoader(SET, batch_size=8), DataLoader(SET, batch_size=8, num_workers=1),
               DataLoader(Stream(), batch_size=8), Columns()],
    ids=["dataset", "list", "stream", "loader", "workers", "loader of a stream", "columns"],
)  # fmt: skip
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_are_those_of_a_loader_pass_after_pass(source: Any, drop_last: bool) -> None:
    expected = of_torch(DataLoader(SET, batch_size=8, drop_last=drop_last), 7)
    assert rows(read(source, drop_last=drop_last), 7) == expected


def test_the_workers_of_a_loader_end_with_who_reads_them() -> None:
    data = read(DataLoader(SET, batch_size=8, num_workers=1))
    assert multiprocessing.active_children()
    gc.disable()  # cycles, where torch gives workers up after five seconds only
    try:
        del data
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "options",
    [{"sampler": range(19, -1, -1), "batch_size": 8}, {"batch_sampler": [[3, 1, 2, 0], [9, 8]]},
     {"batch_size": 4, "collate_fn": lambda samples: [torch.stack([x * 2 for x, _ in samples])] * 2}],
    ids=["sampler", "batch sampler", "collate"],
)  # fmt: skip
def test_samplers_and_collation_of_a_loader_are_kept(options: dict[str, Any]) -> None:
    loader: DataLoader[Any] = DataLoader(SET, **options)
    assert rows(read(loader, samples=len(next(iter(loader))[0])), 5) == of_torch(loader, 5)


def test_every_pass_has_every_sample_once_in_an_order_of_seed_and_pass() -> None:
    def passes(seed: int) -> list[list[int]]:
        found = rows(read(SET, shuffle=True, seed=seed), 6)
        return [list(itertools.chain(*part)) for part in (found[:3], found[3:])]

    first, second = passes(0)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second and first != list(range(20))
    assert passes(0) == [first, second] != passes(1)


@pytest.mark.parametrize(
    "source",
    [lambda: Noisy(), lambda: DataLoader(Noisy(), batch_size=8, shuffle=True)],
    ids=["dataset", "loader"],
)
def test_a_batch_follows_from_its_step_alone_and_draws_leave_the_process_as_it_was(
    source: Callable[[], Any],
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    whole, again = read(source()), read(source())
    batches = [whole.batch(step) for step in range(5)]
    for step in (4, 1):
        assert torch.equal(again.batch(step)["x"], batches[step]["x"])
        assert torch.equal(again.batch(step)["y"], batches[step]["y"])
    assert not torch.equal(batches[0]["x"], batches[3]["x"])
    assert torch.equal(torch.get_rng_state(), before)
    assert whole.digest == again.digest != read(source(), seed=1).digest


@pytest.mark.parametrize(("drop_last", "expected"), [(False, [0, 8, 16, 20, 28]), (True, [0, 8, 16, 24, 32])])
def test_the_position_counts_the_samples_that_were_read(drop_last: bool, expected: list[int]) -> None:
    data = read(SET, drop_last=drop_last)
    assert [data.position(step) for step in range(5)] == expected
    assert read(Stream(16)).position(3) == 24


def test_numbers_that_are_not_whole_come_in_the_jobs_dtype() -> None:
    sample = {"x": torch.ones(2), "n": torch.ones(2, dtype=torch.int32), "deep": [torch.ones(1)], "name": "a"}
    found = read([sample] * 8).batch(0)
    assert (found["x"].dtype, found["n"].dtype, found["deep"][0].dtype) == (
        torch.float64, torch.int32, torch.float64)  # fmt: skip
    assert found["name"] == ["a"] * 8


@pytest.mark.parametrize(
    ("source", "said", "hint"),
    [
        (5, "gives a int", "give a dataset"), ({"train": SET}, "a mapping of train", "one of its datasets"),
        ([], "has 0 samples", "give samples"), (Stream(0), "there are no samples", "give samples"),
        (list(SET)[:3], "has 3 samples, global_batch is 8", "--global-batch 3"),
        (Stream(3), "first batch of mine.py:data has 3 samples", "--global-batch 3"),
        (DataLoader(SET, batch_size=4), "have 4 samples, global_batch is 8", "--global-batch 4"),
        ([{"x": torch.ones(n)} for n in range(9)], "cannot be put together", "collate_fn"),
        ([None] * 8, "cannot be put together", "collate_fn"),
    ],
)  # fmt: skip
def test_data_that_gives_no_batches_is_refused(source: Any, said: str, hint: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read(source)
    assert caught.value.where and hint in caught.value.hint


@pytest.mark.parametrize("source", [SET, DataLoader(SET, batch_size=8)], ids=["dataset", "loader"])
def test_a_rest_that_does_not_divide_is_refused_before_anything_is_trained(source: Any) -> None:
    read(source).require_parts(2)  # 20 = 8 + 8 + 4
    with pytest.raises(DataError, match="last batch of 4 samples does not divide into 8 parts"):
        read(source).require_parts(8)
    read(source, drop_last=True).require_parts(8)


def test_a_batch_of_a_stream_that_does_not_fit_is_refused_when_it_comes() -> None:
    stream = read(Stream(19))
    stream.require_parts(2)
    assert [len(batch) for batch in rows(stream, 2)] == [8, 8]
    with pytest.raises(DataError, match="last batch of 3 samples"):
        stream.batch(2)
    with pytest.raises(DataError, match="batch of step 2 has 6 samples, global_batch is 2"):
        read(DataLoader(SET, batch_sampler=[[1, 2], range(6)]), samples=2).batch(1)


def test_what_can_be_read_once_is_read_once() -> None:
    data = read(pair for pair in SET)
    assert [len(batch) for batch in rows(data, 3)] == [8, 8, 4]
    for step in (3, 0):
        with pytest.raises(DataError, match="only once") as caught:
            data.batch(step)
        assert caught.value.hint == "give an iterable that starts anew each time, or fewer steps"


class Broken(Noisy):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return {}[index]  # type: ignore[no-any-return]


@pytest.mark.parametrize("source", [Broken(), DataLoader(Broken(), batch_size=8)], ids=["dataset", "loader"])
def test_what_the_users_code_raises_has_the_users_lines_alone(source: Any) -> None:
    with pytest.raises(ModelError, match="raised KeyError") as caught:
        read(source)
    assert (
        caught.value.where.startswith(__file__) and "in __getitem__ (return {}[index]" in caught.value.where
    )
    assert "own_data" not in caught.value.where.replace("test_own_data", "")


def test_only_the_last_batch_of_a_pass_is_left_out() -> None:
    loader: DataLoader[Any] = DataLoader(SET, batch_sampler=[[*range(8)], [8, 9], [*range(10, 18)], [18, 19]])
    assert [len(batch) for batch in rows(read(loader, drop_last=True), 6)] == [8, 2, 8, 8, 2, 8]
    assert [len(batch) for batch in rows(read(loader), 5)] == [8, 2, 8, 2, 8]


def test_arrays_of_numpy_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="entry x of a batch is of numpy"):
        read(DataLoader(SET, batch_size=8, collate_fn=lambda s: {"x": np.zeros((8, 1)), "y": X[:8]}))


def test_sparse_entries_and_lengths_that_cannot_be_told_are_refused() -> None:
    class Broken(Noisy):
        def __len__(self) -> int:
            raise OSError("no index")

    with pytest.raises(DataError, match="entry x of a batch is sparse"):
        read(DataLoader(SET, batch_size=8, collate_fn=lambda s: {"x": torch.eye(8).to_sparse(), "y": X[:8]}))
    with pytest.raises(ModelError, match="raised OSError: no index"):
        read(Broken())
