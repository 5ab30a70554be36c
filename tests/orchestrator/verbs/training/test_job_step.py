"""The step of a job: what the job says of carrying it out reaches who does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comms.errors import ConfigError
from comms.selection.progress import quiet
from orchestrator.planning.job_parts import job_parts
from orchestrator.runners.executing.chip_set import ChipSet, InlineLaunch
from orchestrator.runners.runner import Settings
from orchestrator.runners.timing.fastest_plan import prepare
from orchestrator.verbs.training.job_step import step_of_job
from partitioner.layout.parallel_plan import Plan
from partitioner.program.program import Program


class Listening(InlineLaunch):
    """Keeps what it is given."""

    settings: Settings

    def connect(self, program: Program, settings: Settings, progress: Any) -> ChipSet:
        self.settings = settings
        return super().connect(program, settings, progress)


@pytest.mark.parametrize(("overrides", "seconds"), [((), 300.0), (("hang_timeout=20 s",), 20.0)])
def test_how_long_chips_may_be_still_is_told_with_the_program(
    overrides: tuple[str, ...], seconds: float, laptop: Any, tiny_job: Callable[..., Any]
) -> None:
    prepared = prepare(laptop.take(1), tiny_job(*overrides), progress=quiet)
    parts, launch = job_parts(prepared.job, "cpu"), Listening(laptop.take(1))
    step_of_job(prepared, parts, parts.optimizer, launch)
    assert launch.settings.hang_timeout_s == seconds


def test_one_process_says_that_it_needs_no_wait(tmp_path: Path, train_job: Callable[..., Path]) -> None:
    folder = train_job(tmp_path / "run", Plan(), "steps=1", "hang_timeout=20 s")
    assert "hang_timeout has no effect" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    "wrong", ["hang_timeout=0 s", "hang_timeout=20", "checkpoints.interval=5", "checkpoints.keep=0"]
)
def test_waits_have_units_and_are_some(wrong: str, tiny_job: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"a wait of zero|needs a unit|at least 1|greater than or equal"):
        tiny_job(wrong)
