"""Tables on terminals of any width: no line is wider, no word and no number is cut, and nothing is left out."""

from io import StringIO

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.views.table_drawing import LEAST_WORDS, draw_table

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=LEAST_WORDS), min_size=1, max_size=6).map(" ".join)
NUMBERS = st.tuples(st.integers(0, 999), st.sampled_from(["us", "GB/s", "%", ""])).map(
    lambda p: f"{p[0]} {p[1]}".strip()
)


@st.composite
def tables(draw):
    """Heads and rows: a column of words, then numbers and more words."""
    columns = [WORDS, *draw(st.lists(st.sampled_from([WORDS, NUMBERS]), max_size=6))]
    rows = draw(st.lists(st.tuples(*columns), min_size=1, max_size=5))
    return tuple(draw(WORDS) for _ in columns), rows


def drawn(width, rows, heads):
    out = StringIO()
    draw_table(Console(file=out, width=width), "title", rows, heads)
    return out.getvalue().splitlines()


@given(table=tables(), width=st.integers(40, 120))
def test_a_table_fits_and_says_every_word_and_number(table, width):
    heads, rows = table
    lines = drawn(width, rows, heads)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for cell in (cell for row in rows for cell in row):
        if cell[0].isdigit():
            assert cell in text
        for word in cell.split():
            assert word in text


def test_a_table_with_room_has_its_heads_on_one_line():
    lines = drawn(80, [("ring", "27.1 ms"), ("tree", "3 ms")], ("algorithm", "time of the chosen"))
    assert "  algorithm   time of the chosen" in lines[2]


def test_rows_that_do_not_fit_become_records():
    heads = ("algorithm", "time", "bandwidth", "limited by")
    lines = drawn(40, [("halving-doubling", "27.1 ms", "4.33 GB/s", "ethernet, by far")], heads)
    assert [line.split()[0] for line in lines[1:] if line.strip()] == [
        "algorithm",
        "time",
        "bandwidth",
        "limited",
    ]
