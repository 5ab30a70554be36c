"""What a step asks: questions that tell shapes or positions make whole parameters necessary, or are refused."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comms.errors import OptimizerError
from kernels.trials.optimizer_trials import Scope, traits_of

Share = Callable[[int, int, torch.Tensor, torch.Tensor, dict[str, Any]], float]
HELPERS = SimpleNamespace(rank=lambda grad: grad.dim())


def stepping_by(share: Share) -> type[torch.optim.Optimizer]:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            for place, group in enumerate(self.param_groups):
                for turn, param in enumerate(group["params"]):
                    if param.grad is not None:
                        by = share(place, turn, param, param.grad, self.state[param])
                        param.sub_(param.grad, alpha=group["lr"] * by)

    return Own


def counted(_: int, __: int, p: torch.Tensor, ___: torch.Tensor, state: dict[str, Any]) -> float:
    state["n"] = state.get("n", torch.zeros(())) + 1
    return float(1 / state["n"])


@pytest.mark.parametrize(
    "share",
    [
        lambda _, __, p, *___: 0.1 if p.ndimension() == 4 else 1.0,
        lambda _, __, ___, g, ____: 0.1 if g.nbytes > 1e5 else 1.0,
        lambda _, __, p, *___: 0.1 if p.untyped_storage().nbytes() > 1e5 else 1.0,
        lambda _, __, ___, g, ____: 0.1 if len(g.stride()) == 4 else 1.0,
        lambda _, __, ___, g, ____: 0.1 if "[[[" in repr(g) else 1.0,
        lambda _, __, p, *___: 0.1 if isinstance(p.tolist()[0], list) else 1.0,
        lambda _, __, ___, g, ____: 0.1 if HELPERS.rank(g) == 4 else 1.0,
        lambda _, __, p, *___: 0.1 if p.is_contiguous() else 1.0,
        lambda _, __, p, *___: 0.1 if len(p) > 1000 else 1.0,
    ],
)
def test_what_asks_for_a_form_needs_whole_parameters(share: Share) -> None:
    assert traits_of(stepping_by(share)).scope is Scope.PARAMETER


@pytest.mark.parametrize(
    "share",
    [
        counted,
        lambda _, __, p, g, ___: (
            1.0 if p.dtype == g.dtype and not g.is_sparse and p.is_floating_point() else 2.0
        ),
        lambda _, __, p, g, ___: 1.0 if p.device == g.device and p.is_leaf and not p.is_complex() else 2.0,
    ],
)
def test_what_tells_no_form_may_be_asked(share: Share) -> None:
    assert traits_of(stepping_by(share)).scope is Scope.ENTRY


@pytest.mark.parametrize(
    ("share", "sizes"),
    [
        (lambda _, turn, *__: 0.1 if turn > 4 else 1.0, [6]),
        (lambda place, *_: 0.1 if place > 2 else 1.0, [3] * 4),
    ],
)
def test_what_goes_by_positions_is_refused(share: Share, sizes: list[int]) -> None:
    with pytest.raises(OptimizerError, match="goes by how many parameters or groups there are"):
        traits_of(stepping_by(share), (), sizes)


@pytest.mark.parametrize("like", [0, 0.0, torch.zeros(()), torch.zeros((), dtype=torch.int64)])
def test_a_count_of_any_kind_is_moved_far(like: Any) -> None:
    def late(_: int, __: int, ___: torch.Tensor, grad: torch.Tensor, state: dict[str, Any]) -> float:
        state["n"] = state.get("n", like) + 1
        return float(1 / grad.norm()) if state["n"] > 1000 else 1.0

    assert traits_of(stepping_by(late)).scope is Scope.PARAMETER


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.AdamW, torch.optim.RMSprop])
def test_subclasses_of_torchs_step_by_entries(kind: Any) -> None:
    class Own(kind):  # type: ignore[misc]
        """With nothing of its own."""

    assert traits_of(lambda params: Own(params, lr=0.01)).scope is Scope.ENTRY
