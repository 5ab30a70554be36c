"""Calibration report: constants with units, what is left over at each point, and what to paste into a cluster file.

A relative error is above zero where the prediction is too slow. Errors are stated from 1 MiB up, where bandwidth
decides, and below, where latency does.
"""

from collections.abc import Sequence
from math import isnan

from comms.calibration.calibration import LARGE_NBYTES, Residual
from comms.collectives.schedule import bus_factor
from comms.units import DASH, format_percent, format_scaled, format_seconds
from orchestrator.config.hardware.link_calibration import Calibration, errors
from orchestrator.views.console import Table
from orchestrator.views.network.calibration_paste import paste, time_in_words
from orchestrator.views.network.comms_report import size_in_words


def document(calibration: Calibration) -> dict[str, object]:
    """As JSON values."""
    line, rate = calibration.line, calibration.line_rate
    return {
        "subject": "links",
        "cluster": None if line is None else line.cluster.name,
        "constants": _constants(calibration),
        "line_rate_bytes_per_s": None if rate is None else rate.bytes_per_s,
        "fitted": _errors(calibration.residuals),
        "held_out": _errors(calibration.held_out),
        "cluster_file_as_it_is": _errors(calibration.as_it_is),
        "paste": paste(calibration),
        "tables": [
            {
                "table": table.name,
                "op": None if table.curve.op is None else str(table.curve.op),
                "num_chips": table.curve.num_chips,
                "points": _points(calibration, number),
            }
            for number, table in enumerate(calibration.tables)
        ],
    }


def _constants(calibration: Calibration) -> dict[str, object]:
    if calibration.link is not None:
        link = calibration.link.link
        return {"latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s}
    assert calibration.fabric is not None
    constants, fabric = calibration.fabric.constants, calibration.fabric.fabrics[0]
    found: dict[str, object] = {
        "setup_s": constants.setup_s,
        "latency_s": constants.latency_s + constants.handshake_s,
        "bytes_per_s": fabric.link.bytes_per_s,
    }
    if calibration.line is not None:
        found["share"] = constants.share
    if constants.eager_share is not None:
        found["eager_latency_s"] = constants.latency_s
        found["eager_share"] = constants.eager_share
    return found


def _errors(residuals: Sequence[Sequence[Residual]] | None) -> dict[str, object]:
    """NaN becomes null."""
    large, small = errors(residuals)
    return {"mean_error_from_1_mib": large, "mean_error_below": small}


def _points(calibration: Calibration, number: int) -> list[dict[str, object]]:
    held = calibration.held_out[number] if calibration.held_out else None
    return [
        {
            "nbytes": each.nbytes,
            "measured_s": each.measured_s,
            "predicted_s": each.predicted_s,
            "error": each.error,
            "held_out_error": None if held is None else held[at].error,
        }
        for at, each in enumerate(calibration.residuals[number])
    ]


def tables(calibration: Calibration) -> tuple[Table, ...]:
    """To read."""
    return (
        Table("constants of the links", _constant_rows(calibration)),
        _error_table(calibration),
        *(_residual_table(calibration, number) for number in range(len(calibration.tables))),
        Table("to paste into a cluster file", tuple((line,) for line in paste(calibration).splitlines())),
    )


def _constant_rows(calibration: Calibration) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if calibration.link is not None:
        link = calibration.link.link
        rows.append(("latency of a message", time_in_words(link.latency_s)))
        rows.append(("rate of a message", _with_share(link.bytes_per_s, calibration)))
    if calibration.fabric is not None:
        constants, fabric = calibration.fabric.constants, calibration.fabric.fabrics[0]
        rows.append(("setup of each collective", time_in_words(constants.setup_s)))
        rows.append(("latency of a stage", time_in_words(constants.latency_s + constants.handshake_s)))
        rows.append(("rate of a chip", _with_share(fabric.link.bytes_per_s, calibration)))
        if constants.eager_share is not None:
            rows.append(("latency of a stage, eager", time_in_words(constants.latency_s)))
            eager = fabric.link.bytes_per_s * constants.eager_share
            rows.append(("rate of a chip, eager", _with_share(eager, calibration)))
    line, rate = calibration.line, calibration.line_rate
    if line is not None and rate is not None:
        words = f"{format_scaled(rate.bytes_per_s, 'B/s')} ({rate.words} in {line.cluster.name})"
        rows.append(("line rate", words))
    elif calibration.fabric is not None:
        rows.append(
            ("line rate", "not known: --cluster gives it, and with it a share that other fabrics have too")
        )
    return rows


def _with_share(rate: float, calibration: Calibration) -> str:
    words, line = format_scaled(rate, "B/s"), calibration.line_rate
    return words if line is None else f"{words} ({format_percent(rate / line.bytes_per_s)} of the line rate)"


def _error_table(calibration: Calibration) -> Table:
    at_all = (
        (f"fitted with {calibration.num_constants} constants", calibration.residuals),
        ("every second point held out, both ways", calibration.held_out),
        ("the cluster file as it is", calibration.as_it_is),
    )
    rows = [
        (name, *(DASH if isnan(error) else format_percent(error) for error in errors(residuals)))
        for name, residuals in at_all
        if residuals is not None
    ]
    return Table("mean error", rows, ("prediction", f"from {size_in_words(LARGE_NBYTES)} up", "below"))


def _residual_table(calibration: Calibration, number: int) -> Table:
    table = calibration.tables[number]
    held = calibration.held_out[number] if calibration.held_out else None
    factor = bus_factor(table.curve.op, table.curve.num_chips)
    rows = tuple(
        (
            size_in_words(each.nbytes),
            format_seconds(each.measured_s),
            format_seconds(each.predicted_s),
            format_scaled(each.nbytes / each.measured_s * factor, "B/s"),
            f"{100 * each.error:+.1f} %",
            DASH if held is None else f"{100 * held[at].error:+.1f} %",
        )
        for at, each in enumerate(calibration.residuals[number])
    )
    what = "messages" if table.curve.op is None else f"{table.curve.op} over {table.curve.num_chips} chips"
    heads = ("size", "measured", "fitted", "measured bus bandwidth", "error", "held out")
    return Table(f"{table.name}: {what}", rows, heads)
