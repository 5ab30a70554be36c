"""Sweep page: one HTML file with everything of a sweep, which asks no other place for anything.

Pictures are SVG inside of the page, one for each panel, so that they stand below each other on a narrow screen; tables
scroll by themselves. No script, no font, no date: the same sweep gives the same bytes.
"""

import re
from collections.abc import Sequence
from html import escape

from orchestrator.views.console import Table
from orchestrator.views.scaling.scaling_plot import ChipPanel, panels_svg

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2733; background: #fff; margin: 0 auto; max-width: 1320px;
       padding: 16px; }
h1 { font-size: 1.35rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 28px 0 6px; overflow-wrap: anywhere; }
p, li { max-width: 75ch; overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); gap: 20px; }
figure { margin: 0; border: 1px solid #e1e5ea; border-radius: 6px; padding: 8px; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: 0.85rem; color: #46525f; }
figcaption ul { margin: 6px 0 0; padding-left: 1.2em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 7px; border-bottom: 1px solid #e1e5ea; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; }
td.text { white-space: normal; min-width: 26ch; }
thead th { background: #f4f6f8; }
"""
WORDS = 24  # characters from which on a cell is a text that may take several lines
DECLARATION = re.compile(r"<\?xml.*?\?>\s*|<!DOCTYPE.*?>\s*|<metadata>.*?</metadata>\s*", re.DOTALL)
SIZE = re.compile(
    r'(<svg[^>]*?) width="[^"]*"([^>]*?) height="[^"]*"|(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"'
)


def sweep_page(
    title: str,
    facts: Sequence[str],
    panels: Sequence[ChipPanel],
    tables: Sequence[Table],
    notes: Sequence[str],
) -> str:
    """The page."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{sweep_body(facts, panels, tables, notes)}"
        "</body>\n</html>\n"
    )


def sweep_body(
    facts: Sequence[str], panels: Sequence[ChipPanel], tables: Sequence[Table], notes: Sequence[str]
) -> str:
    """What is in the page, for a notebook as well."""
    parts = [f"<p>{escape(fact)}</p>\n" for fact in facts]
    parts.append(f'<div class="panels">\n{"".join(map(_figure, panels))}</div>\n')
    parts += map(_table, tables)
    parts.append(f"<h2>What is meant</h2>\n{_list(notes)}")
    return "".join(parts)


def _figure(panel: ChipPanel) -> str:
    svg = DECLARATION.sub("", panels_svg([panel]).decode())
    return f"<figure>\n{SIZE.sub(_unsized, svg, count=1)}<figcaption>{_list(panel.notes)}</figcaption>\n</figure>\n"


def _unsized(found: "re.Match[str]") -> str:
    """A picture without sizes of its own takes the width that there is."""
    return "".join(part for part in found.groups() if part)


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>\n"


def _table(table: Table) -> str:
    texts = {place for row in table.rows for place, cell in enumerate(row) if len(cell) > WORDS}
    kinds = [' class="text"' * (place in texts) for place in range(len(table.heads))]
    heads = "".join(f"<th{kind}>{escape(head)}</th>" for kind, head in zip(kinds, table.heads, strict=True))
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.rows)
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table></div>\n"
    )


def _cell(text: str) -> str:
    return f'<td class="text">{escape(text)}</td>' if len(text) > WORDS else f"<td>{escape(text)}</td>"
