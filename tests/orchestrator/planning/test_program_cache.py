"""The cache of Programs: by content, whole or not at all, never in the way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning import preparation as cache
from partitioner.layout.parallel_plan import Plan
from partitioner.program.program import Program

Make = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there yet"))
    return tmp_path / "not" / "there yet" / "orchestrate"


def stored(folder: Path, pattern: str) -> Path:
    """The one entry of that kind."""
    (path,) = folder.glob(pattern)
    return path


def prepared(tiny_job: Make, laptop: Any) -> Any:
    return cache.prepare(laptop.take(2), tiny_job(), Plan(pp=2, microbatches=2))


def test_a_program_comes_back_equal(folder: Path, tiny_job: Make, laptop: Any) -> None:
    first = prepared(tiny_job, laptop)
    assert [path.suffix for path in folder.iterdir()] == [".program"]
    second = prepared(tiny_job, laptop)
    assert isinstance(second.program, Program)
    assert (second.was_cached, second.program) == (True, first.program)


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"nonsense", lambda data: data[:-20]])
def test_an_unreadable_entry_counts_as_none(
    damage: Callable[[bytes], bytes], folder: Path, tiny_job: Make, laptop: Any
) -> None:
    first = prepared(tiny_job, laptop)
    entry = stored(folder, "*.program")
    entry.write_bytes(damage(entry.read_bytes()))
    again = prepared(tiny_job, laptop)
    assert (again.was_cached, again.program) == (False, first.program)


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_job: Make, laptop: Any
) -> None:
    (tmp_path / "orchestrate").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not cache.prepare(laptop.take(2), tiny_job()).was_cached
    cache.remember("entry", b"data")
    with pytest.raises(OSError, match="Not a directory"):
        cache.recall("entry")


def test_a_number_that_is_none_is_counted_again(folder: Path, tiny_job: Make, laptop: Any) -> None:
    first = cache.prepare(laptop.take(2), tiny_job()).plan
    count = stored(folder, "*.number")
    assert int(count.read_text()) > 0
    known = count.read_text()
    count.write_text("twelve")
    assert cache.prepare(laptop.take(2), tiny_job()).plan == first
    assert count.read_text() == known


def test_the_users_cache_folder_is_obeyed_if_it_is_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for said, kept in (
        ("/elsewhere", "/elsewhere/orchestrate"),
        ("relative", "/home/someone/.cache/orchestrate"),
        ("", "/home/someone/.cache/orchestrate"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", said)
        assert cache.cache_folder() == Path(kept)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path("/home/someone/.cache/orchestrate")


def test_keys_depend_on_content_and_not_on_order() -> None:
    assert cache.key_of({"a": 1, "b": [2]}) == cache.key_of({"b": [2], "a": 1})
    assert len({cache.key_of(f) for f in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {})}) == 5


def test_keys_depend_on_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before: Any = cache.key_of({"a": 1})
    monkeypatch.setattr(cache, "code_digest", lambda: "other code")
    assert cache.key_of({"a": 1}) != before
