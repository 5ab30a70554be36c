"""The front door: what `partitioner` offers a stranger, as the documentation shows it."""

import re
from pathlib import Path

import pytest
import torch

import partitioner
from comms.errors import PartitionError

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def blocks() -> list[str]:
    """The Python of the page's section on this package."""
    section = re.search(r"^## partitioner$(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None
    return re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)


def test_every_block_of_the_page_runs(one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks():
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "all_reduce sum dp" in said
    assert "is not freed by the end of schedule step" in said
    assert names["machine"].done


def test_the_page_shows_every_name() -> None:
    shown = set(re.findall(r"partitioner\.(\w+)", "".join(blocks())))
    assert set(partitioner.__all__) - shown == {"Program"}  # the value that all of them are about
    assert set(partitioner.__all__) <= set(dir(partitioner))


def test_there_is_nothing_else_at_the_door() -> None:
    with pytest.raises(AttributeError, match="no attribute 'split'"):
        partitioner.split  # noqa: B018


def test_a_batch_that_does_not_split_is_refused(one_thread: None) -> None:
    module = torch.nn.Linear(4, 1)
    with pytest.raises(PartitionError, match="7 samples do not split into 2 parts"):
        partitioner.partition(module, {"input": torch.randn(7, 4)}, partitioner.Plan(dp=2))
