"""What a calibration leaves to paste into a cluster file: keys, section by section, as text.

Where the file is known the figures fit what it says already: a message by itself can be no quicker than a stage of a
collective, no protocol reaches more of a card than `efficiency` says. What contradicts that is moved as far as needed,
and the text says so, so that the changed file is valid.
"""

from collections.abc import Iterator

from comms.algorithms.in_network import NAME as IN_NETWORK
from comms.calibration.calibration import Constants
from comms.collectives.schedule import Op
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.links import Link
from comms.units import Quantity, format_quantity
from orchestrator.config.hardware.line_rates import LineRate
from orchestrator.config.hardware.link_calibration import Calibration

DIGITS = 3
RINGS = {Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.BROADCAST, Op.REDUCE}  # fitted as rings
Blocks = dict[str, list[str]]  # keys by section


def paste(calibration: Calibration) -> str:
    """The keys below the section they belong to."""
    tables = ", ".join(table.name for table in calibration.tables)
    lines: list[str] = []
    for section, keys in _blocks(calibration).items():
        lines += [f"# under {section}; fitted to {tables}", *keys]
    return "\n".join(lines) + "\n"


def time_in_words(seconds: float) -> str:
    """To as many digits as are pasted."""
    return format_quantity(seconds, Quantity.TIME, DIGITS)


def _blocks(calibration: Calibration) -> Blocks:
    line = calibration.line
    if calibration.link is not None:
        link = calibration.link.link
        if line is None:
            return {"scale_up, pcie or nics": [_latency(link.latency_s), *_bandwidth(link.bytes_per_s)]}
        return _message(link, line)
    assert calibration.fabric is not None
    constants = calibration.fabric.constants
    stage_s = constants.latency_s + constants.handshake_s
    if line is None:
        least = time_in_words(stage_s)
        where = f"scale_up or pcie, with a latency of {least} or more (between hosts: give --cluster)"
        bandwidth = _bandwidth(calibration.fabric.fabrics[0].link.bytes_per_s)[:1]
        return {where: [*bandwidth, *_library(calibration, stage_s, 1.0)]}
    return _collective(calibration, constants, line, stage_s)


def _message(link: Link, line: LineRate) -> Blocks:
    """Latency and rate of a message by itself."""
    at, blocks = line.sections, Blocks()
    _add_latency(blocks, line, max(link.latency_s, at.stage_s), raised=link.latency_s < at.stage_s)
    share = link.bytes_per_s / line.alone.bytes_per_s
    if not at.has_efficiency:
        rate = _bandwidth(link.bytes_per_s)[:1]
    elif share > 1:
        rate = _bandwidth(link.bytes_per_s)
    else:
        rate = [_efficiency(max(share, at.least_efficiency), raised=share < at.least_efficiency)]
    blocks.setdefault(at.rate, []).extend(rate)
    return blocks


def _collective(calibration: Calibration, constants: Constants, line: LineRate, stage_s: float) -> Blocks:
    """Setup and protocols, and what of a message by itself must give way to them."""
    at, blocks = line.sections, Blocks()
    issued_s = stage_s
    if at.switch_s is not None:
        # A stage through the root takes as much longer than one through a switch as a message does.
        issued_s = max(0.0, at.switch_s - max(0.0, at.message_s - stage_s))
    blocks[at.library] = _library(calibration, issued_s, constants.share)
    if _rounded(stage_s) > at.message_s:
        _add_latency(blocks, line, stage_s, raised=True)
    share = max(constants.share * part for _, _, part in _ways(calibration))
    if _rounded(share) > at.most_share:
        blocks.setdefault(at.rate, []).append(_efficiency(share, raised=True))
    return blocks


def _library(calibration: Calibration, stage_s: float, share: float) -> list[str]:
    assert calibration.fabric is not None
    constants = calibration.fabric.constants
    eager_s = max(0.0, stage_s - constants.handshake_s)
    lines = [f"setup: {time_in_words(constants.setup_s)}", "protocols:"]
    for suffix, algorithm, part in _ways(calibration):
        lines.append(_protocol(f"pipelined{suffix}", algorithm, stage_s, share * part, "pipelined: true"))
        if constants.eager_share is not None:
            rate = share * part * constants.eager_share
            lines.append(_protocol(f"eager{suffix}", algorithm, eager_s, rate, ""))
    return lines


def _ways(calibration: Calibration) -> Iterator[tuple[str, str, float]]:
    """Suffix of a protocol's name, the algorithm that it was fitted with, and its part of the fitted share."""
    ops = {table.curve.op for table in calibration.tables}
    yield "", _rings(calibration.line) if ops <= RINGS else "", 1.0
    assert calibration.fabric is not None
    share = calibration.fabric.fabrics[0].in_network_share
    if share is not None:
        # Of an all-reduce over n chips an n-th moves twice (`calibration`), which the algorithm does not know.
        n = max(table.curve.num_chips for table in calibration.tables)
        twice = n / (n + 1) if Op.ALL_REDUCE in ops else 1.0
        yield " in network", IN_NETWORK, share * twice


def _rings(line: LineRate | None) -> str:
    """The algorithm whose rings reach the line rate; empty where several do."""
    if line is None or line.together.bytes_per_s <= line.alone.bytes_per_s:
        return "ring"
    return "hierarchical ring" if isinstance(line.tier.shape, Tree) else ""


def _protocol(name: str, algorithm: str, latency_s: float, share: float, more: str) -> str:
    only = f"algorithms: [{algorithm}]" if algorithm else ""
    parts = [f"name: {name}", only, _latency(latency_s), f"share: {share:.{DIGITS}g}", more]
    return f"  - {{{', '.join(part for part in parts if part)}}}"


def _add_latency(blocks: Blocks, line: LineRate, seconds: float, *, raised: bool) -> None:
    """Also for the next tier outwards, if that said less."""
    at, why = line.sections, "  # no less than a stage of a collective" if raised else ""
    if at.latency:
        blocks.setdefault(at.latency, []).insert(0, _latency(seconds) + why)
    if _rounded(seconds) > at.outer_s:
        blocks.setdefault(at.outer, []).append(_latency(seconds) + "  # no less than further in")


def _latency(seconds: float) -> str:
    return f"latency: {time_in_words(seconds)}"


def _efficiency(share: float, *, raised: bool) -> str:
    why = "  # no less than in a collective" if raised else ""
    return f"efficiency: {share:.{DIGITS}g}{why}"


def _bandwidth(rate: float) -> list[str]:
    return [f"bandwidth: {format_quantity(rate, Quantity.DATA_RATE, DIGITS)}", "efficiency: 1"]


def _rounded(figure: float) -> float:
    """As it is pasted."""
    return float(f"{figure:.{DIGITS}g}")
