"""calibrate: which constants do measurements show, and how well do they fit?

`links` reads what nccl-tests print or CSV files (`measured_tables`), one run each, all of the same links.
With a cluster file the line rate is that of its links, and what the file predicts now is held against the tables.
Measurements are read, never made.
"""

from pathlib import Path

from comms.calibration.measured_tables import read_table
from comms.errors import CommsError, ConfigError, located
from comms.text_files import read_text
from orchestrator.config.hardware.line_rates import LineRate, line_rate
from orchestrator.config.hardware.link_calibration import MeasuredTable, calibrate_links
from orchestrator.verbs.inputs.comms_inputs import OTHERWISE, check_picture, read_op, write_picture
from orchestrator.verbs.inputs.options import CalibrateOptions
from orchestrator.views.console import Console
from orchestrator.views.network import calibration_report


def main(options: CalibrateOptions, console: Console) -> int:
    """Read the tables, fit, answer. Raises UserError."""
    check_picture(options.plot)
    with located("tables", OTHERWISE):
        tables = [_read(path, options, console) for path in options.tables]
        lines = _line_rates(tables, options.cluster)
        with console.phase("fit"):
            calibration = calibrate_links(tables, lines)
    console.results(calibration_report.document(calibration), calibration_report.tables(calibration))
    if options.plot is not None:
        from orchestrator.views.network.bandwidth_plot import calibration_png

        write_picture(calibration_png(calibration), options.plot, console)
    return 0


def _read(path: Path, options: CalibrateOptions, console: Console) -> MeasuredTable:
    text = read_text(path, "give nccl-tests output or CSV")
    op = None if options.op is None else read_op(options.op)
    try:
        table = MeasuredTable(path.name, read_table(text, str(path), op, options.chips))
    except CommsError as error:
        hint = error.hint.replace("say the operation", "say the operation (--op)")
        error.hint = hint.replace("the number of chips", "the number of chips (--chips)")
        raise
    if table.curve.op is None and "sendrecv" not in text:
        console.warn(f"{path} names no operation: read as messages from chip to chip; --op says otherwise")
    return table


def _line_rates(tables: list[MeasuredTable], cluster: Path | None) -> list[LineRate]:
    """Of the tier that all tables were measured in, one each; none without a cluster."""
    if cluster is None:
        return []
    found = [line_rate(cluster, table.curve.num_chips) for table in tables]
    for table, line in zip(tables, found, strict=True):
        if line.tier.name != found[0].tier.name:
            first = tables[0]
            raise ConfigError(
                f"{first.curve.num_chips} chips meet in tier {found[0].tier.name!r}, "
                f"{table.curve.num_chips} in {line.tier.name!r}",
                f"{first.name}, {table.name}",
                "calibrate one tier at a time",
            )
    return found
