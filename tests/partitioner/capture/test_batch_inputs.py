"""Batches as models take them: every tensor has a name of its own, and everything else is part of the call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from comms.errors import PlanError
from partitioner.capture.batch_inputs import rebuilt, require_plain, settings_of, tensors_of
from partitioner.capture.graph_units import capture_graph


class Pair(NamedTuple):
    left: Any
    right: str


T = [torch.full((2,), float(i)) for i in range(6)]
NESTED = {
    "x": T[0],
    "images": [T[1], (T[2], None)],
    "more": {"mask": T[3], "scale": 0.5, "deeper": {"last": [T[4]]}},
    "pair": Pair(T[5], "text"),
    "flag": True,
}


def test_a_tensor_is_named_by_the_way_to_it() -> None:
    assert {name: int(value[0]) for name, value in tensors_of(NESTED).items()} == {
        "x": 0, "images.0": 1, "images.1.0": 2, "more.mask": 3, "more.deeper.last.0": 4, "pair.left": 5,
    }  # fmt: skip


def test_a_batch_is_rebuilt_with_other_tensors_in_the_same_places() -> None:
    made = rebuilt(NESTED, {name: value + 10 for name, value in tensors_of(NESTED).items()})
    assert [int(v[0]) for v in tensors_of(made).values()] == [10, 11, 12, 13, 14, 15]
    assert made["images"][1][1] is None
    assert made["more"]["scale"] == 0.5
    assert made["pair"] == Pair(made["pair"].left, "text")
    assert settings_of(made) == settings_of(NESTED)


LEAVES = st.one_of(
    st.integers(0, 9).map(torch.tensor), st.integers(), st.floats(allow_nan=False), st.text(max_size=3), st.none()
)  # fmt: skip
KEYS = st.text("abc", min_size=1, max_size=2)
TREES = st.recursive(
    LEAVES, lambda t: st.one_of(st.lists(t, max_size=3), st.dictionaries(KEYS, t, max_size=3)), max_leaves=8
)


@given(st.dictionaries(KEYS, TREES, max_size=3))
def test_rebuilding_with_its_own_tensors_gives_the_batch(batch: dict[str, Any]) -> None:
    require_plain(batch)
    made = rebuilt(batch, tensors_of(batch))
    assert settings_of(made) == settings_of(batch)
    assert [id(v) for v in tensors_of(made).values()] == [id(v) for v in tensors_of(batch).values()]
    assert str(made) == str(batch)


def test_what_is_no_tensor_tells_two_calls_apart() -> None:
    first = {"x": T[0], "scale": 1.0, "mask": None}
    assert settings_of(first) == settings_of({**first, "x": T[1]})
    for other in ({**first, "scale": 2.0}, {**first, "scale": 1}, {**first, "mask": False}, {"x": T[0]}):
        assert settings_of(first) != settings_of(other)


@pytest.mark.parametrize("hidden", [object(), {1, 2}, lambda x: x, [torch.nn.Linear(1, 1)]])
def test_objects_that_could_hide_tensors_are_refused_by_name(hidden: object) -> None:
    with pytest.raises(PlanError, match=r"the batch's given\.inner") as caught:
        require_plain({"x": T[0], "given": {"inner": hidden}})
    assert "lists or dicts" in caught.value.hint


class Taking(nn.Module):
    """A forward with inputs of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3, dtype=torch.float64)

    def forward(
        self, views: list[torch.Tensor], target: dict[str, Any], scale: float, mode: str, mask: Any = None
    ) -> torch.Tensor:
        assert mode == "mean" and mask is None
        found = torch.stack([self.lin(view) for view in views]).sum(0)
        return (found - target["y"]).square().mean() * scale + target["shift"]


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def taken() -> dict[str, Any]:
    return {
        "views": [doubles(4, 4), doubles(4, 4)],
        "target": {"y": doubles(4, 3), "shift": torch.tensor(0.25, dtype=torch.float64)},
        "scale": 0.5, "mode": "mean", "mask": None,
    }  # fmt: skip


def test_a_forward_is_called_as_the_batch_says(check_against_eager: Callable[..., Any]) -> None:
    check_against_eager(Taking(), taken())


def test_entries_with_samples_are_cut_wherever_they_stand() -> None:
    graph = capture_graph(Taking(), taken(), dp=2)
    assert graph.cut == {"views.0", "views.1", "target.y"}
    assert set(graph.batch) >= {"views.0", "views.1", "target.y", "target.shift"}
    assert graph.samples == 2


def test_a_batch_of_other_objects_is_refused_before_anything_is_traced() -> None:
    with pytest.raises(PlanError, match="the batch's mode is a set"):
        capture_graph(Taking(), {**taken(), "mode": {"mean"}})
