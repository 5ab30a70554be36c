import shlex
from pathlib import Path

import pytest

from comms.errors import ConfigError
from orchestrator.runners.ray_jobs.job_command import job_command

VERBS = ("train", "simulate")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    for name in ("my cluster.yaml", "own/model.py", "text.txt"):
        (tmp_path / name).write_text("x")
    return tmp_path


def test_words_come_through_a_shell_as_they_are(folder: Path) -> None:
    words = [
        "train",
        "--cluster",
        "my cluster.yaml",
        "--set",
        "loss=own.py:x",
        "--set",
        "a='b c'",
        "--steps=3",
    ]
    command = job_command(words, VERBS, folder)
    assert shlex.split(command.text) == ["python", "-m", "orchestrator", *words]
    assert (command.value("--steps"), command.value("--cluster"), command.value("--run-dir")) == (
        "3", "my cluster.yaml", None,
    )  # fmt: skip
    assert command.elsewhere == ()


def test_whole_paths_into_the_folder_travel_and_others_are_told(folder: Path) -> None:
    words = ["train", f"--model={folder}/own/model.py:make", "--cluster", str(folder / "my cluster.yaml")]
    command = job_command([*words, "--data", "/elsewhere/text.txt"], VERBS, folder)
    assert command.words == (
        "train", "--model=own/model.py:make", "--cluster", "my cluster.yaml", "--data", "/elsewhere/text.txt",
    )  # fmt: skip
    assert command.elsewhere == ("/elsewhere/text.txt",)


@pytest.mark.parametrize(
    "words",
    [["--cluster", "none.yaml"], ["--model", "own/none.py:make"], ["--job=jobs/none.yaml"], ["--data", "none.txt"]],
)  # fmt: skip
def test_a_file_that_would_be_missing_there_is_named_here(words: list[str], folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file") as caught:
        job_command(["train", *words], VERBS, folder)
    assert str(folder) in caught.value.hint


@pytest.mark.parametrize(
    "words",
    [
        ["--cluster", "dgx-a100"], ["--model", "builtin:gpt-mini"], ["--model", "hf:gpt2"], ["--data", "pkg.mod:name"],
        ["--model", "own/model.py:make"],
    ],
)  # fmt: skip
def test_names_are_no_files(words: list[str], folder: Path) -> None:
    assert job_command(["train", *words], VERBS, folder).words == ("train", *words)


@pytest.mark.parametrize(
    ("words", "problem"), [([], "no command is given"), (["trian"], "'trian' is no command")]
)
def test_what_is_no_command_is_refused(words: list[str], problem: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        job_command(words, VERBS, folder)
