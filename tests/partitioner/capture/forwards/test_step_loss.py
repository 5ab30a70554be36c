"""A step's loss: who is given which entries of a batch, and what is refused."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comms.errors import CaptureError
from partitioner.capture.forwards.step_loss import loss_of_step
from partitioner.capture.graph_units import capture_graph

mse = nn.functional.mse_loss
BATCH = {"x": torch.ones(4, 3), "y": torch.zeros(4, 2)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(x) * scale


class Distance(nn.Module):
    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return mse(output, y)


class Called:
    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return mse(output, y)


def by_name(output: Tensor, y: Tensor) -> Tensor:
    return mse(output, y)


def by_keyword(output: Tensor, *, y: Tensor) -> Tensor:
    return mse(output, y)


def of_all(output: Tensor, **batch: Tensor) -> Tensor:
    return mse(output, batch["y"])


def of_batch(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return mse(output, batch["y"])


def of_batch_or_none(output: Tensor, batch: dict[str, Tensor] | None = None) -> Tensor:
    assert batch is not None
    return mse(output, batch["y"])


def of_the_rest(output: Tensor, *rest: Any) -> Tensor:
    (batch,) = rest
    return mse(output, batch["y"])


def with_default(output: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
    return weight * mse(output, y)


def pair(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return mse(output, y), output


def mapping(output: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"loss": mse(output, y), "seen": y}


@pytest.mark.parametrize(
    "loss_fn", [by_name, by_keyword, of_all, of_batch, of_batch_or_none, of_the_rest, with_default, pair, mapping,
                Distance(), Called(), partial(with_default, weight=1.0), lambda out, b: mse(out, b["y"])]
)  # fmt: skip
def test_a_loss_is_given_what_it_names_or_the_batch(loss_fn: Callable[..., Any]) -> None:
    net = Net()
    assert torch.equal(loss_of_step(net, loss_fn, BATCH), mse(net(BATCH["x"]), BATCH["y"]))


def test_what_both_name_goes_to_both_and_what_is_left_out_has_its_default() -> None:
    net, batch = Net(), {"x": torch.ones(4, 3), "scale": 2.0}
    found = loss_of_step(net, lambda out, scale, power=2: (out / scale**power).mean(), batch)
    assert torch.equal(found, (net(batch["x"], 2.0) / 4).mean())


def test_an_entry_called_batch_is_that_entry_unless_the_loss_needs_more() -> None:
    net, batch = Net(), {"x": torch.ones(4, 3), "batch": torch.zeros(4, 2)}
    assert torch.equal(
        loss_of_step(net, lambda out, batch: mse(out, batch), batch), net(batch["x"]).square().mean()
    )


def two(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (mse(output, target) * weight).mean()


def only_by_name(output: Tensor, *, target: Tensor) -> Tensor:
    return mse(output, target)


def another(output: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return mse(output, y) * target


def only_by_place(output: Tensor, y: Tensor, /, target: float = 1.0) -> Tensor:
    return mse(output, y) * target


@pytest.mark.parametrize(
    "loss_fn",
    [two, only_by_name, another, only_by_place, nn.MSELoss(), mse],
    ids=["two", "name", "one of two", "place", "class", "function"],
)
def test_a_loss_whose_entries_are_not_there_is_refused_with_both_lists(loss_fn: Callable[..., Any]) -> None:
    with pytest.raises(CaptureError, match=r"the loss takes .*target.*, the batch has x, y"):
        loss_of_step(Net(), loss_fn, BATCH)


@pytest.mark.parametrize(
    "value", [0.5, None, torch.ones(2), torch.ones((), dtype=torch.complex64), {"total": torch.ones(())}, ()]
)
def test_what_is_no_scalar_is_said_of_the_loss_and_not_of_the_model(value: Any) -> None:
    with pytest.raises(CaptureError, match=r"loss_fn returns .*, not a scalar loss"):
        loss_of_step(Net(), lambda out, y: value, BATCH)
    with pytest.raises(CaptureError, match=r"Net returns shape \(4, 2\), not a scalar loss"):
        loss_of_step(Net(), None, {"x": BATCH["x"]})


@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [(lambda out, target: mse(out, target), "called target, and raised AttributeError"),
     (lambda out, b: mse(out, b["labels"]), "called b, and raised KeyError: 'labels'")],
)  # fmt: skip
def test_a_loss_that_cannot_do_with_the_whole_batch_is_refused_with_what_is_there(
    loss_fn: Callable[..., Any], said: str
) -> None:
    with pytest.raises(CaptureError, match=said) as caught:
        loss_of_step(Net(), loss_fn, BATCH)
    assert caught.value.hint == "the batch has x, y; name what is meant as there"


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(CaptureError, match="5 is no function"):
        loss_of_step(Net(), 5, BATCH)  # type: ignore[arg-type]


def test_what_does_not_say_what_it_takes_is_refused() -> None:
    with pytest.raises(CaptureError, match="does not say what it takes") as caught:
        loss_of_step(Net(), torch.dist, BATCH)
    assert caught.value.hint == "wrap it in a function of yours"


def test_a_loss_that_does_not_fit_the_models_own_names_no_line_of_torch() -> None:
    class Scalar(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return mse(super().forward(x), y)

    with pytest.raises(CaptureError) as caught:
        capture_graph(Scalar(), BATCH, dp=2, loss_fn=by_name)
    assert not re.search("<|/torch/", caught.value.where)


@pytest.mark.parametrize(("name", "warned"), [("batch", False), ("y", True)])
def test_a_loss_that_is_given_the_batch_by_another_name_is_warned_of(name: str, warned: bool) -> None:
    scope: dict[str, Any] = {}
    exec(f"def loss(output, {name}): return output.square().sum() / len({name})", scope)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        capture_graph(Net(), {"x": BATCH["x"]}, loss_fn=scope["loss"])
    assert [str(w.message) for w in caught if "whole batch as y" in str(w.message)] == [
        "the loss is given the whole batch as y, as no entry is called so: call it batch to say so"
    ] * warned
