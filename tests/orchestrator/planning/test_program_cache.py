"""The Program cache: by content, whole or not at all, never in the way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning import program_cache as cache
from partitioner.program.program import Program


@pytest.fixture(scope="module")
def program(tiny_program: Callable[..., Program]) -> Program:
    return tiny_program(pp=2, microbatches=2)


def test_a_program_comes_back_equal(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    assert cache.load_program("key", folder) is None
    cache.store_program("key", program, folder)
    assert cache.load_program("key", folder) == program
    assert [path.name for path in folder.iterdir()] == ["key.program"]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x81\xa1"])
def test_an_unreadable_entry_counts_as_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "key.program").write_bytes(content)
    assert cache.load_program("key", tmp_path) is None


def test_a_shortened_entry_counts_as_none(program: Program, tmp_path: Path) -> None:
    cache.store_program("key", program, tmp_path)
    path = tmp_path / "key.program"
    path.write_bytes(path.read_bytes()[:-20])
    assert cache.load_program("key", tmp_path) is None


def test_a_cache_that_cannot_be_written_is_no_error(program: Program, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache.store_program("key", program, blocked)
    cache.store_number("key", 5, blocked)
    assert cache.load_program("key", blocked) is None
    assert cache.load_number("key", blocked) is None


def test_numbers_come_back(tmp_path: Path) -> None:
    cache.store_number("key", 12345, tmp_path)
    assert cache.load_number("key", tmp_path) == 12345
    (tmp_path / "key.number").write_text("twelve")
    assert cache.load_number("key", tmp_path) is None


def test_keys_depend_on_content_and_not_on_order() -> None:
    assert cache.key_of({"a": 1, "b": [2]}) == cache.key_of({"b": [2], "a": 1})
    assert len({cache.key_of(f) for f in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {})}) == 5


def test_keys_depend_on_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before: Any = cache.key_of({"a": 1})
    monkeypatch.setattr(cache, "code_digest", lambda: "other code")
    assert cache.key_of({"a": 1}) != before
