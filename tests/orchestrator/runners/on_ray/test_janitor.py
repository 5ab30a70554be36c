import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.runners.on_ray import janitor


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", janitor.__file__, str(folder)], stdin=subprocess.PIPE
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "of-a-ray"
    (made / "session" / "sockets").mkdir(parents=True)
    (made / "session" / "log").write_text("x")
    return made


def test_an_owner_that_is_killed_leaves_neither_files_nor_processes(folder: Path) -> None:
    left = subprocess.Popen(["sleep", "1000", f"--{folder}"], stderr=subprocess.DEVNULL)
    other = subprocess.Popen([sys.executable, "-c", "input()", str(folder)], stdin=subprocess.PIPE)
    process = start(folder)
    process.communicate(b"")  # what the kernel does with the pipe of an owner that has ended
    assert not folder.exists()
    assert left.wait() != 0 and other.wait() != 0


def test_an_owner_that_is_done_is_believed(folder: Path) -> None:
    process = start(folder)
    process.communicate(janitor.DONE)
    assert folder.exists()
    assert process.returncode == 0
