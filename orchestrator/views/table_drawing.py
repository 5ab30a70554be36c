"""Tables drawn by rich: numbers stand whole in their columns, words wrap; too narrow for that, each row is a record."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from comms.units import DASH

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

LEAST_WORDS = 12  # characters of a column of words: in fewer it is no longer read as a sentence
AROUND_COLUMN, AROUND_TABLE = 3, 1  # characters that rich adds


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    cells: tuple[str, ...]
    is_number: bool  # of rows; the first column names them

    @property
    def natural(self) -> int:
        """Characters that it takes if nothing wraps."""
        return max(map(len, (self.head, *self.cells)))

    @property
    def least(self) -> int:
        """Characters in which it can be read."""
        longest, words = max(map(len, self.cells), default=0), (*self.cells, self.head)
        whole = longest if self.is_number else min(longest, LEAST_WORDS)
        return max(whole, *(len(word) for text in words for word in text.split()), 0)


def draw_table(
    rich: "RichConsole", title: str, rows: Sequence[tuple[str, ...]], heads: tuple[str, ...] = ()
) -> None:
    """Print a table on a console of rich, no wider than that is."""
    from rich.text import Text

    columns = _columns(rows, heads)
    around = AROUND_COLUMN * len(columns) + AROUND_TABLE
    rich.print(Text(title, style="bold"))
    if heads and sum(each.least for each in columns) + around > rich.width:
        for row in rows:
            pairs = [pair for pair in zip(heads, row, strict=False) if pair[1]]
            _draw(rich, pairs, (), _columns(pairs, ()), is_narrow=False)
    else:
        is_narrow = sum(each.natural for each in columns) + around > rich.width
        _draw(rich, rows, heads, columns, is_narrow=is_narrow)


def _draw(
    rich: "RichConsole",
    rows: Sequence[tuple[str, ...]],
    heads: tuple[str, ...],
    columns: Sequence[_Column],
    *,
    is_narrow: bool,
) -> None:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, show_header=bool(heads))
    for each in columns:
        is_whole = is_narrow and each.is_number and bool(heads)
        head = "\n".join(textwrap.wrap(each.head, each.least)) if is_whole else each.head
        drawn.add_column(Text(head), justify="right" if each.is_number else "left", no_wrap=is_whole)
    for row in rows:
        drawn.add_row(*map(Text, row))
    rich.print(drawn)


def _columns(rows: Sequence[tuple[str, ...]], heads: tuple[str, ...]) -> list[_Column]:
    found = []
    for position in range(max(map(len, (heads, *rows)))):
        cells = tuple(row[position] for row in rows if position < len(row))
        head = heads[position] if position < len(heads) else ""
        found.append(_Column(head, cells, position > 0 and all(map(_is_number, cells))))
    return found


def _is_number(cell: str) -> bool:
    return not cell or cell == DASH or cell.lstrip("+-")[:1].isdigit()
