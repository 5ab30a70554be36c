"""The front door: what `partitioner` offers a stranger; `tests/test_python_page.py` runs what the page shows of it."""

import pytest
import torch

import partitioner
from comms.errors import PlanError


def test_there_is_nothing_else_at_the_door() -> None:
    with pytest.raises(AttributeError, match="split"):
        partitioner.split  # noqa: B018


def test_a_batch_that_does_not_split_is_refused(one_thread: None) -> None:
    module = torch.nn.Linear(4, 1)
    with pytest.raises(PlanError, match=r"does not divide into 2 parts .*input \[7, 4\]"):
        partitioner.partition(module, {"input": torch.randn(7, 4)}, partitioner.Plan(dp=2))
