"""Runs that go on by actors where one process was, and back."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.verbs.inputs.options import RunnerKind
from partitioner.layout.parallel_plan import Plan, plan_to_yaml

Make = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("undrawn", "one_thread", "local_ray")


@pytest.mark.ray
def test_actors_go_on_where_one_process_was_and_the_other_way_round(
    tmp_path: Path, train_job: Make, resume_run: Make, signal_after: Make, facts_of: Make, tensors_of: Make
) -> None:
    """The same plan by another runner gives the same bits; another plan after that starts from them."""
    plan = Plan(dp=2, zero=1)
    whole = train_job(tmp_path / "whole", plan, "steps=4")
    folder = tmp_path / "moved"
    with signal_after(2):
        train_job(folder, plan, "steps=4")
    with signal_after(3):
        resume_run(folder, runner=RunnerKind.RAY, code=130)
    resume_run(folder, runner=RunnerKind.INLINE)
    assert facts_of(folder) == facts_of(whole)
    expected, found = tensors_of(whole, 4), tensors_of(folder, 4)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    (tmp_path / "pp.yaml").write_text(plan_to_yaml(Plan(pp=2, microbatches=2)))
    resume_run(other, runner=RunnerKind.RAY, plan=tmp_path / "pp.yaml", steps=5)
    assert [row[0] for row in facts_of(other)] == [1, 2, 3, 4, 5]
