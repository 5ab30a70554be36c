"""Signals at every moment of a command, then `--resume`: the same bits as a run that nobody disturbed."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.runners.signals import SIGNALS
from orchestrator.runs.checkpoints import checkpoint_folder
from orchestrator.verbs import train
from orchestrator.verbs.training import training_loop

Make = Callable[..., Any]
STEPS = 4
COMMAND = (
    "train", "--cluster", "laptop", "--chips", 2, "--runner", "inline", "--model", "builtin:gpt-nano", "--seq", 8,
    "--global-batch", 4, "--steps", STEPS, "--set", "model_args={layers: 2, width: 16, heads: 2, max_seq: 8}",
    "--set", "checkpoints.every=1", "--set", "validation.every=0", "--set", "plan.dp=2",
)  # fmt: skip
# By name: what is called at that moment, and how far the run then gets.
MOMENTS: dict[str, tuple[object, str, int]] = {
    "before the model is captured": (train, "prepare", 0),
    "as parameters are loaded": (train, "step_of_job", 0),
    "in the first step": (training_loop.Training, "_step", 1),
    "between step and record": (training_loop.Training, "_record", 1),
    "while it is saved": (checkpoint_folder, "save_file", 2),
    "as the folder gets its name": (checkpoint_folder, "write_whole", 2),
    "after the last step": (train, "write_results", STEPS),
}
pytestmark = pytest.mark.usefixtures("undrawn", "one_thread")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, facts_of: Make, tensors_of: Make) -> Any:
    """What the whole run leaves: numbers and tensors."""
    from orchestrator import cli

    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["orchestrate", *map(str, COMMAND), "--run-dir", str(folder)])
        before = {each: signal.getsignal(each) for each in SIGNALS}
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        for each, handler in before.items():
            signal.signal(each, handler)
    return facts_of(folder), tensors_of(folder, STEPS)


@contextmanager
def signal_at(place: object, name: str, number: signal.Signals) -> Iterator[None]:
    """Sends the signal once, as this is first called."""
    original, sent = getattr(place, name), list[bool]()

    def sending(*given: Any, **named: Any) -> Any:
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), number)
        return original(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, sending)
        yield
    assert sent


@pytest.mark.parametrize("number", SIGNALS, ids=lambda each: each.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_is_lost_repeated_or_changed(
    moment: str, number: signal.Signals, undisturbed: Any, orchestrate: Make, tmp_path: Path, facts_of: Make,
    tensors_of: Make,
) -> None:  # fmt: skip
    place, name, least = MOMENTS[moment]
    folder = tmp_path / "run"
    with signal_at(place, name, number):
        ran = orchestrate(*COMMAND, "--run-dir", folder)
    assert ran.code == (0 if least == STEPS else 128 + number), ran.err
    assert "Traceback" not in ran.err
    found = checkpoint_folder.latest(folder).checkpoint
    assert (found.manifest.step if found else 0) >= min(least, 1)
    if least < STEPS:
        assert f"go on with `orchestrate train --resume {folder}`" in ran.err
    again = orchestrate("train", "--resume", folder)
    assert again.code == 0, again.err
    assert facts_of(folder) == undisturbed[0]
    tensors = tensors_of(folder, STEPS)
    assert tensors.keys() == undisturbed[1].keys()
    assert all(torch.equal(value, undisturbed[1][key]) for key, value in tensors.items())
