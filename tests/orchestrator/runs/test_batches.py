"""Batches: every sequence goes to exactly one replica and microbatch, in order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.runs.data import split_batch
from partitioner.layout.parallel_plan import Plan


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_the_pieces_in_order_are_the_global_batch(dp: int, microbatches: int, size: int) -> None:
    samples = torch.arange(dp * microbatches * size * 2).reshape(-1, 2)
    split = split_batch({"x": samples, "y": samples[:, 0]}, Plan(dp=dp, microbatches=microbatches))
    assert set(split) == set(range(dp))
    for name, whole in (("x", samples), ("y", samples[:, 0])):
        pieces = [
            split[replica][microbatch, name] for replica in range(dp) for microbatch in range(microbatches)
        ]
        assert {len(p) for p in pieces} == {size}
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("plan", [Plan(dp=2), Plan(microbatches=2), Plan(tp=4, pp=2, dp=2)])
def test_only_dp_and_microbatches_cut(plan: Plan) -> None:
    split = split_batch({"x": torch.arange(4)}, plan)
    assert [len(v) for part in split.values() for v in part.values()] == [2, 2]
