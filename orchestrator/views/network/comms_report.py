"""Comms report: answers about collectives, and the tiers of a network, as JSON values and as tables.

Sizes that are whole powers of two are written so (64 MiB), as people ask for them; rates are decimal.
"""

from collections.abc import Sequence
from dataclasses import asdict

from comms.collectives.schedule import Op
from comms.selection.choice import TierShare
from comms.selection.question import Answer, Question
from comms.selection.site import WireLoad
from comms.selection.size_sweep import SizeSweep
from comms.units import DASH, format_percent, format_scaled, format_seconds
from orchestrator.config.hardware.latency_tiers import Row
from orchestrator.views.console import Table
from orchestrator.views.network.node_names import node_names

MOST_CANDIDATES = 6  # of a table; JSON has all
NO_LIMIT = 0.05  # a tier that would save less of the time than this limits nothing by itself
NO_TIER = (
    "where no single tier limits, tiers are balanced or most is setup; --fidelity full shows the busiest wire"
)
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size_in_words(nbytes: float) -> str:
    """`64 MiB` where that is exact, else as everywhere."""
    for power in range(len(_BINARY) - 1, -1, -1):
        whole, rest = divmod(nbytes, 1024**power)
        if not rest and (whole >= 1 or not power):
            return f"{whole:.0f} {_BINARY[power]}" if whole < 10_000 else format_scaled(nbytes, "B")
    return format_scaled(nbytes, "B")


def document(answer: Answer, cluster: str) -> dict[str, object]:
    """One answer as JSON values."""
    question, cut = answer.question, answer.bisection
    return {
        "cluster": cluster,
        "op": str(question.op),
        "nbytes": question.nbytes,
        "num_chips": question.num_chips,
        "seconds": answer.seconds,
        "setup_s": answer.setup_s,
        "algorithm": answer.algorithm,
        "protocol": answer.protocol,
        "reason": answer.reason,
        "algbw_bytes_per_s": answer.algbw_bytes_per_s,
        "busbw_bytes_per_s": answer.busbw_bytes_per_s,
        "per_tier": _per_tier(answer),
        "limiting_link": limiting_link(answer),
        "bisection_bytes_per_s": None if cut is None else cut.bytes_per_s,
        "fidelity": str(answer.fidelity),
        "num_messages": answer.full.result.num_messages if answer.full else None,
        "candidates": [asdict(each) for each in answer.candidates],
        "notes": [*answer.notes, *answer.warnings],
        "left_out": list(answer.left_out),
        "elapsed_s": answer.elapsed_s,
        "loading_s": answer.loading_s,
    }


def sweep_document(sweep: SizeSweep, cluster: str) -> dict[str, object]:
    """A sweep as JSON values: one row per size."""
    first = sweep.answers[0]
    return {
        "cluster": cluster,
        "op": str(first.question.op),
        "num_chips": first.question.num_chips,
        "rows": [
            {
                "nbytes": each.question.nbytes,
                "seconds": each.seconds,
                "algorithm": each.algorithm,
                "protocol": each.protocol,
                "algbw_bytes_per_s": each.algbw_bytes_per_s,
                "busbw_bytes_per_s": each.busbw_bytes_per_s,
                "limiting_link": limiting_link(each),
                "fidelity": str(each.fidelity),
                "candidates": [asdict(candidate) for candidate in each.candidates],
            }
            for each in sweep.answers
        ],
        "choices": [asdict(each) for each in sweep.ranges],
        "notes": [*sweep.notes, *sweep.warnings],
        "left_out": list(sweep.left_out),
        "elapsed_s": sweep.elapsed_s,
        "loading_s": sweep.loading_s,
    }


def limiting_link(answer: Answer) -> dict[str, object] | None:
    """The busiest wire where every message was moved, else the tier that would save most if it cost nothing."""
    wire = answer.busiest_wire
    if wire is not None:
        tail, head = _ends(answer, wire)
        return {"tier": wire.tier, "from": tail, "to": head, "busy": wire.busy}
    tier = answer.limiting_tier
    if tier is None:
        return None
    return {"tier": tier.tier, "level": answer.tiers.index(tier), "saved_s": tier.saved_s}


def _ends(answer: Answer, wire: WireLoad) -> tuple[str, str]:
    """What the nodes are called that a wire joins."""
    assert answer.site is not None
    names = node_names(answer.site.whole, answer.question.chips_per_host)
    return names[wire.tail], names[wire.head]


def _per_tier(answer: Answer) -> list[dict[str, object]]:
    """Levels of the group, each with what crossed the wires of its tier where that was counted."""
    rows = [asdict(share) for share in answer.tiers]
    named = {row["tier"]: row for row in reversed(rows)}  # the innermost level of each tier
    for load in answer.loads:
        if load.tier not in named:
            named[load.tier] = {"tier": load.tier}
            rows.append(named[load.tier])
        tail, head = _ends(answer, load.busiest)
        figures = {key: getattr(load.busiest, key) for key in ("nbytes", "bytes_per_s", "busy")}
        named[load.tier] |= {"nbytes": load.nbytes, "busiest_wire": {"from": tail, "to": head, **figures}}
    return rows


def tables(answer: Answer, cluster: str) -> tuple[Table, ...]:
    """One answer to read."""
    question = answer.question
    chips = f"{question.num_chips} chip{'s' if question.num_chips > 1 else ''}"
    setup = f" (of which {format_seconds(answer.setup_s)} setup and pipeline fill)" if answer.setup_s else ""
    rows = [
        ("time", f"{format_seconds(answer.seconds)}{setup}"),
        ("algorithm", _algorithm(answer.algorithm, answer.protocol)),
        ("why", answer.reason),
    ]
    if answer.busbw_bytes_per_s:
        rows.append(("algorithm bandwidth", format_scaled(answer.algbw_bytes_per_s, "B/s")))
        rows.append(("bus bandwidth", format_scaled(answer.busbw_bytes_per_s, "B/s")))
    if limit := limit_in_words(answer):
        rows.append(("limited by", limit + _why_no_tier(answer)))
    if (cut := answer.bisection) is not None:
        rows.append(("bisection of the chips", f"{format_scaled(cut.bytes_per_s, 'B/s')}, {cut.proof}"))
    rows += [("note", note) for note in answer.notes]
    made = f"{answer.fidelity}, made in {format_seconds(answer.elapsed_s)}"
    rows.append(("fidelity", made if not answer.full else f"{made}, {_messages(answer)}"))
    rows.append(("left out", "; ".join(answer.left_out)))
    head = Table(f"{_what(question)} over {chips} of {cluster}", rows)
    more = (_level_table(answer), _wire_table(answer), _candidate_table(answer))
    return (head, *(table for table in more if table.rows))


def _what(question: Question) -> str:
    """The operation and its size."""
    if question.op is Op.BARRIER:
        return str(question.op)
    if question.is_uneven:
        return f"all_to_allv of at most {size_in_words(question.nbytes)} from a chip (the largest row)"
    return f"{question.op} of {size_in_words(question.nbytes)}"


def _algorithm(name: str, protocol: str) -> str:
    return name if protocol == "plain" else f"{name}, protocol {protocol}"


def _messages(answer: Answer) -> str:
    assert answer.full is not None
    result = answer.full.result
    return f"{result.num_messages:,} message{'s' if result.num_messages != 1 else ''} by {result.method}"


def limit_in_words(answer: Answer) -> str:
    """What decides, in a few words; empty where nothing does."""
    wire = answer.busiest_wire
    if wire is not None:
        ends = " -> ".join(_ends(answer, wire))
        return f"{ends} ({wire.tier}), busy {format_percent(wire.busy)} of the time"
    tier = answer.limiting_tier
    if tier is None:
        return ""
    share = format_percent(tier.saved_s / answer.seconds)
    if tier.saved_s < NO_LIMIT * answer.seconds:
        return f"no single tier (the best saves {share})"
    name = level_names(answer.tiers)[answer.tiers.index(tier)]
    return f"{name}: without it {format_seconds(tier.saved_s)} less ({share})"


def _why_no_tier(answer: Answer) -> str:
    """What limits where no tier does, for the end of a line; empty where one does."""
    tier = answer.limiting_tier
    if answer.loads or tier is None or tier.saved_s >= NO_LIMIT * answer.seconds:
        return ""
    if answer.setup_s > answer.seconds / 2:
        return ": most is setup and pipeline fill"
    balanced = ": pipelined tiers are balanced" if len(answer.tiers) > 1 else ""
    return f"{balanced}; --fidelity full shows the busiest wire"


def _level_table(answer: Answer) -> Table:
    heads = ("tier", "joins", "latency", "rate of a chip", "saved if free", "share")
    rows = tuple(
        (
            name,
            str(share.fanout),
            format_seconds(share.latency_s),
            format_scaled(share.bytes_per_s, "B/s"),
            format_seconds(share.saved_s),
            format_percent(share.saved_s / answer.seconds if answer.seconds else 0.0),
        )
        for name, share in zip(level_names(answer.tiers), answer.tiers, strict=True)
    )
    return Table("tiers that it crosses, from the inside", rows, heads)


def level_names(tiers: Sequence[TierShare]) -> tuple[str, ...]:
    """The tier of each level; where several are of one tier, as the dimensions of a torus, which of them."""
    names = [share.tier for share in tiers]
    return tuple(
        name if names.count(name) == 1 else f"{name}, dimension {names[: at + 1].count(name)}"
        for at, name in enumerate(names)
    )


def _wire_table(answer: Answer) -> Table:
    heads = ("tier", "bytes over its wires", "busiest wire", "bytes over it", "its rate", "busy")
    rows = tuple(
        (
            load.tier,
            format_scaled(load.nbytes, "B"),
            " -> ".join(_ends(answer, load.busiest)),
            format_scaled(load.busiest.nbytes, "B"),
            format_scaled(load.busiest.bytes_per_s, "B/s"),
            format_percent(load.busiest.busy),
        )
        for load in answer.loads
    )
    return Table("what crossed the wires", rows, heads)


def _candidate_table(answer: Answer) -> Table:
    shown = answer.candidates[:MOST_CANDIDATES] if len(answer.candidates) > 1 else ()
    rows = tuple(
        (
            each.algorithm,
            format_seconds(each.seconds),
            f"{each.seconds / answer.seconds:.2f}" if answer.seconds else DASH,
            str(each.fidelity),
        )
        for each in shown
    )
    left = len(answer.candidates) - len(shown)
    title = f"what was looked at ({left} more in --json)" if left and shown else "what was looked at"
    return Table(title, rows, ("algorithm", "time", "of the chosen", "fidelity"))


def sweep_tables(sweep: SizeSweep, cluster: str) -> tuple[Table, ...]:
    """A sweep to read."""
    first = sweep.answers[0]
    rows = tuple(
        (
            size_in_words(each.question.nbytes),
            format_seconds(each.seconds),
            _algorithm(each.algorithm, each.protocol),
            format_scaled(each.algbw_bytes_per_s, "B/s"),
            format_scaled(each.busbw_bytes_per_s, "B/s"),
            limit_in_words(each),
            str(each.fidelity),
        )
        for each in sweep.answers
    )
    title = f"{first.question.op} over {first.question.num_chips} chips of {cluster}"
    heads = ("size", "time", "algorithm", "algorithm bandwidth", "bus bandwidth", "limited by", "fidelity")
    ranges = tuple(
        (
            size_in_words(each.from_nbytes),
            size_in_words(each.to_nbytes),
            _algorithm(each.algorithm, each.protocol),
        )
        for each in sweep.ranges
    )
    notes = [*sweep.notes, *([NO_TIER] if any(map(_why_no_tier, sweep.answers)) else [])]
    facts = [*(("note", note) for note in notes), ("made in", format_seconds(sweep.elapsed_s))]
    return (
        Table(title, rows, heads),
        Table("where the choice changes", ranges, ("from", "to", "algorithm")),
        Table("how it was made", [*facts, ("left out", "; ".join(sweep.left_out))]),
    )


def tiers_document(rows: Sequence[Row], cluster: str) -> dict[str, object]:
    """The latency tiers of a cluster as JSON values; a figure that is not known is null."""
    return {"cluster": cluster, "tiers": [asdict(row) for row in rows]}


def tiers_tables(rows: Sequence[Row], cluster: str) -> tuple[Table, ...]:
    """The same to read: figures, then where they come from."""
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
    rows_by_source: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        rows_by_source.setdefault(_source(row), []).append(str(number))
    sources = tuple((", ".join(numbers), source) for source, numbers in rows_by_source.items())
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
