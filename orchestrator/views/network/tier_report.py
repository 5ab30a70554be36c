"""Tier report: the latency tiers of a cluster as JSON values and as a table."""

from collections.abc import Sequence
from dataclasses import asdict

from comms.units import DASH, format_scaled, format_seconds
from orchestrator.config.hardware.latency_tiers import Row
from orchestrator.views.console import Table


def document(rows: Sequence[Row], cluster: str) -> dict[str, object]:
    """As JSON values; a figure that is not known is null."""
    return {"cluster": cluster, "tiers": [asdict(row) for row in rows]}


def tables(rows: Sequence[Row], cluster: str) -> tuple[Table, ...]:
    """To read: figures, then where they come from."""
    figures = tuple(
        (
            str(number),
            row.between,
            format_seconds(row.latency_s),
            _ratio(row.ratio),
            format_scaled(row.bytes_per_s, "B/s"),
            format_scaled(row.loaded_bytes_per_s, "B/s"),
            DASH if row.hops is None else str(row.hops),
        )
        for number, row in enumerate(rows, 1)
    )
    heads = ("", "from - to", "latency", "to the one above", "rate alone", "rate when all send", "hops")
    told: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        told.setdefault(_source(row), []).append(str(number))
    sources = tuple((", ".join(numbers), source) for source, numbers in told.items())
    return (
        Table(f"latency tiers of {cluster}, one small message", figures, heads),
        Table("where the figures come from", sources, ("rows", "source")),
    )


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return DASH
    return f"{ratio:,.0f} x" if ratio >= 100 else f"{ratio:.3g} x"


def _source(row: Row) -> str:
    loaded = f"; x {row.loaded_factor:.3g} when all send" if row.loaded_factor else ""
    return f"{row.source or 'the cluster file'}{loaded}"
