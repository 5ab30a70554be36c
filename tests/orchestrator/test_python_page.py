"""Claims about docs/python.md: it shows every name of the front doors, and what it shows runs."""

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def blocks(section: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)


@pytest.mark.parametrize("package", [name for name in SECTIONS if blocks(name)])
def test_what_the_page_shows_of_a_package_runs(package):
    scope = {}
    for block in blocks(package):
        exec(compile(block, f"docs/python.md, {package}", "exec"), scope)


@pytest.mark.parametrize("package", [name for name in SECTIONS if blocks(name)])
def test_the_page_shows_every_name_of_a_front_door_in_a_few_lines(package):
    door = import_module(package)
    shown = set(re.findall(rf"\b{package}\.(\w+)", "\n".join(blocks(package))))
    assert shown == set(door.__all__)
    assert set(door.__all__) <= set(dir(door))
    assert max(len(block.splitlines()) for block in blocks(package)) <= 7
