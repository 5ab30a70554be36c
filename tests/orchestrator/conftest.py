"""What the tests of the command line share: runs of it in this process."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest

from orchestrator import cli


class Ran(NamedTuple):
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def orchestrate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line with these words."""

    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["orchestrate", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code is None or isinstance(stopped.value.code, int)
        return Ran(stopped.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def orchestrate_json(orchestrate: Callable[..., Ran]) -> Callable[..., Mapping[str, Any]]:
    """The JSON of a run that must succeed."""

    def run(*words: object) -> Mapping[str, Any]:
        ran = orchestrate(*words, "--json")
        assert ran.code == 0, ran.err
        document: Mapping[str, Any] = json.loads(ran.out)
        return document

    return run
