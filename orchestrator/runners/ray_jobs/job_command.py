"""Job command: what a job executes, a command of ours with the files that it names.

Files in the working folder travel, and are named as they are there. A file elsewhere is taken to be on storage that
the cluster has too; who submits is told so.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comms.errors import ConfigError

PYTHON = ("python", "-m", "orchestrator")  # also where no script of ours is installed
FILE_FLAGS = frozenset({"--cluster", "--job", "--model", "--data", "--plan", "--resume"})
CODE = ".py:"  # a file of the user's with the name of an object


@dataclass(frozen=True, slots=True)
class JobCommand:
    """The words of a command as a job executes it; `elsewhere`: files that do not travel."""

    words: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """As a shell takes it."""
        return shlex.join((*PYTHON, *self.words))

    def value(self, flag: str) -> str | None:
        """What a flag is given, if it is there."""
        for at, word in enumerate(self.words):
            if word == flag and at + 1 < len(self.words):
                return self.words[at + 1]
            if word.startswith(f"{flag}="):
                return word.partition("=")[2]
        return None


def job_command(words: Sequence[str], verbs: Sequence[str], folder: Path) -> JobCommand:
    """The command of these words, its files by their paths in `folder`. Raises ConfigError."""
    if not words or words[0] not in verbs:
        given = f"{words[0]!r} is no command" if words else "no command is given"
        hint = f"write it after two dashes: -- train --cluster FILE (or {', '.join(verbs[:-1])}, {verbs[-1]})"
        raise ConfigError(given, "jobs", hint)
    found, elsewhere, flag = [words[0]], list[str](), ""
    for word in words[1:]:
        name, separator, value = word.partition("=") if word.startswith("--") else ("", "", "")
        text = value if separator else word
        is_file = (name if separator else flag) in FILE_FLAGS
        if is_file:
            text, travels = _in_folder(text, name or flag, folder)
            elsewhere += [] if travels else [text]
        found.append(f"{name}={text}" if separator else text)
        flag = word if word.startswith("--") and not separator else ""
    return JobCommand(tuple(found), tuple(elsewhere))


def _in_folder(text: str, flag: str, folder: Path) -> tuple[str, bool]:
    """A value of a flag as it is on the cluster, and whether it travels. Raises ConfigError for a file that is not."""
    file, code, name = text.partition(CODE) if CODE in text else (text, "", "")
    path = Path(f"{file}.py" if code else file)
    if path.is_absolute():
        if not path.resolve().is_relative_to(folder.resolve()):
            return text, False
        path = path.resolve().relative_to(folder.resolve())
        return f"{path}:{name}" if code else str(path), True
    is_path = bool(code) or path.suffix in (".yaml", ".yml", ".json", ".txt") or len(path.parts) > 1
    if is_path and ":" not in file and not (folder / path).exists():
        hint = f"give its path from {folder}, which travels with the job, or another --working-dir"
        raise ConfigError(f"there is no file {path}", flag, hint)
    return text, True
