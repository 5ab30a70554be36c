"""What is said of a split: why a plan was taken for an odd batch, which split is exact, what is a way out."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.runners.timing.fastest_plan import prepare
from orchestrator.views.console import Console
from orchestrator.views.split_notes import say_split, warnings_of
from partitioner import partition
from partitioner.layout.parallel_plan import Plan

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("given", "chips", "said"),
    [
        (("global_batch=6",), 4, "as a batch of 6 does not divide by dp 4"),
        (("global_batch=8", "plan.dp=4"), 4, "the split is exact: loss = "),
        (("global_batch=8",), 1, "the batch is not split: loss of the whole batch"),
    ],
)
def test_the_plan_of_an_odd_batch_is_explained_and_the_loss_told(
    given: tuple[str, ...], chips: int, said: str, tiny_job: Make, laptop: Any
) -> None:
    err = io.StringIO()
    say_split(prepare(laptop.take(chips), tiny_job(*given)), Console(out=io.StringIO(), err=err))
    assert said in err.getvalue()
    assert ("does not divide" in err.getvalue()) == ("6" in said)


@pytest.mark.parametrize(("layer", "has_other"), [(nn.BatchNorm1d(4), True), (nn.Softmax(0), False)])
def test_microbatches_that_run_as_one_name_batch_norm_by_parts_only_where_it_helps(
    layer: nn.Module, has_other: bool
) -> None:
    module = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 1))
    batch = {"input": torch.zeros(8, 4)}
    program = partition(
        module, batch, Plan(microbatches=2), loss_fn=lambda output, **_: output.square().mean()
    )
    (said,) = warnings_of(program)
    assert "2 microbatches run as one" in said
    assert said.endswith("; or plan.batch_norm=per_part") == has_other
