"""Where machine code is kept: below the user's cache folder, by the content of what was compiled."""

import os
import subprocess
import sys
from pathlib import Path

from comms.kept_files import unsealed
from comms.simulation.jit import loops_folder

ROOT = Path(__file__).parents[3]
USE_A_HEAP = """
from comms.simulation.heaps import add_timer, empty_timers
timers = empty_timers(4)
add_timer(timers, 2.0, 7)
add_timer(timers, 1.0, 8)
print(timers.heap[0]["number"])
"""


def test_the_cache_folder_follows_the_specification_of_base_directories(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    there = Path(loops_folder())
    assert there.parent == tmp_path / "caches" / "orchestrate"
    assert there.is_dir()
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert Path(loops_folder()) == tmp_path / "home" / ".cache" / "orchestrate" / there.name
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Path(loops_folder()) == tmp_path / "home" / ".cache" / "orchestrate" / there.name


def test_where_it_cannot_be_written_numba_chooses(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert loops_folder() == ""


def used_a_heap(caches):
    """What a fresh process says that uses one compiled function."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(caches)}
    command = [sys.executable, "-c", USE_A_HEAP]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    assert used_a_heap(tmp_path) == "8"
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("heaps.add_timer*")}
    assert {path.suffix for path in kept} == {".nbc"}
    assert used_a_heap(tmp_path) == "8"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("heaps.add_timer*")} == kept


def test_machine_code_that_was_damaged_is_made_again(tmp_path):
    assert used_a_heap(tmp_path) == "8"
    for path in sorted(tmp_path.rglob("heaps.add_timer*")):
        whole = path.read_bytes()
        path.write_bytes(
            whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
        )
        assert used_a_heap(tmp_path) == "8"
        assert unsealed(path.name, path.read_bytes())


def test_without_a_folder_the_loops_still_run(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert used_a_heap(tmp_path / "file") == "8"
