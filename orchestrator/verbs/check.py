"""check: is this file valid? Answers for cluster, job, chip and sweep files; the file says which it is by its
`kind`.

Raises the file's own errors, all at once; a report means that the file is valid. Reads no other file than the
catalog, and needs neither torch nor ray. Another kind of file is one more entry in CHECKERS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from comms.errors import ConfigError, located
from comms.networks.conditions import HEALTHY, Described, check_links
from comms.networks.fabrics.edge_list import EdgeList
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.links import Link
from comms.networks.network import UNBOUNDED, Tier
from comms.units import Quantity, format_quantity
from orchestrator.config.hardware.chip_file import ChipFile, described_chip
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import cluster_from
from orchestrator.config.job_file import is_reference, job_from
from orchestrator.config.schema import nearest, validate
from orchestrator.config.sweep_file import SweepFile
from orchestrator.config.yaml_file import Document, read_yaml
from orchestrator.verbs.inputs.options import CheckOptions
from orchestrator.views.console import Console, Table


@dataclass(frozen=True, slots=True)
class CheckReport:
    """A valid file, and what it says: in a few lines, and as JSON values in base units."""

    path: str
    kind: str
    lines: tuple[str, ...]
    facts: dict[str, object]


MOST_OF_GRAPH = 128  # chips
_Said: TypeAlias = tuple[tuple[str, ...], dict[str, object]]


def main(options: CheckOptions, console: Console) -> int:
    """Print what the file describes."""
    report = check(options.file)
    rows = tuple((line,) for line in report.lines)
    document = {"path": report.path, "kind": report.kind, **report.facts}
    console.results(document, (Table(f"{report.path}: a valid {report.kind} file", rows),))
    return 0


def check(path: str | Path) -> CheckReport:
    """What the valid file at `path` describes. Raises UserError with everything that is wrong with it."""
    document = read_yaml(Path(path))
    kind = document.root.get("kind")
    if not isinstance(kind, str) or kind not in CHECKERS:
        known = " or ".join(CHECKERS)
        problem = "the key 'kind' is missing" if kind is None else f"kind cannot be {kind!r}"
        hint = nearest(kind, tuple(CHECKERS)) if isinstance(kind, str) else f"add `kind:` with {known}"
        raise ConfigError(problem, document.where("kind"), hint)
    return CheckReport(str(path), kind, *CHECKERS[kind](document))


def _check_cluster(document: Document) -> _Said:
    cluster = cluster_from(document)
    if cluster.conditions.links:  # links that there are not, and chips that are cut off from the others
        taken = cluster.take(None)
        with located(cluster.origin):
            check_links(taken.conditions, taken.network.topology())
    chips = _types(cluster)
    price = _amount(cluster.usd_per_hour, Quantity.HOURLY_PRICE)
    power = _amount(cluster.watts, Quantity.POWER)
    lines = (
        f"{cluster.name}: {_hosts(cluster)} of {chips}, {cluster.device}",
        *map(_tier_line, cluster.network.tiers),
        f"{_count(cluster.num_chips)}: {price}, {power}",
        *_condition_lines(cluster.conditions),
    )
    return lines, _cluster_facts(cluster)


def _cluster_facts(cluster: Cluster) -> dict[str, object]:
    """`num_hosts` and the `num_chips` of a tier are null where there may be any number."""
    given = cluster.conditions
    return {
        "name": cluster.name,
        "device": str(cluster.device),
        "num_hosts": cluster.num_hosts,
        "chips_per_host": cluster.chips_per_host,
        "chips": [chip.key for chip in cluster.chip_types],
        "tiers": [_tier_facts(tier) for tier in cluster.network.tiers],
        "num_chips": cluster.num_chips,  # whose price and power follow
        "usd_per_hour": cluster.usd_per_hour,
        "watts": cluster.watts,
        "conditions": {
            "links": len(given.links),
            "chips": len(given.chips),
            "background": len(given.background),
            "jitter_rate": given.jitter.rate,
            "jitter_delay_s": given.jitter.delay_s,
        },
    }


def _tier_facts(tier: Tier) -> dict[str, object]:
    """Figures of a message by itself, and the rate that each gets when all send."""
    dims = list(tier.shape.dims) if isinstance(tier.shape, Torus) else None
    link, loaded = _links(tier)
    return {
        "name": tier.name,
        "kind": str(tier.kind),
        "num_chips": None if tier.size == UNBOUNDED else tier.size,
        "shape": _shape_name(tier) or "switch",
        "dims": dims,
        "latency_s": link and link.latency_s + tier.issue_s,
        "bytes_per_s": link and link.bytes_per_s,
        "loaded_bytes_per_s": loaded and loaded.bytes_per_s,
        "setup_s": tier.setup_s,
    }


def _hosts(cluster: Cluster) -> str:
    if cluster.num_hosts is None:
        return "any number of hosts"
    return f"{cluster.num_hosts} host{'s' if cluster.num_hosts > 1 else ''}"


def _types(cluster: Cluster) -> str:
    names = " + ".join(chip.name for chip in cluster.chip_types)
    return f"{cluster.chips_per_host} x {names}" if len(cluster.chip_types) == 1 else names


def _tier_line(tier: Tier) -> str:
    """How many chips, in which shape, what a message gets, and what a collective pays besides."""
    size = "any number of chips" if tier.size == UNBOUNDED else _count(tier.size)
    facts, (link, loaded_link) = [f"{tier.name}: {size}{_shape(tier)}"], _links(tier)
    if link is None or loaded_link is None:
        facts.append("rates and latencies by `orchestrate comms --tiers`")
    else:
        loaded, alone = (
            format_quantity(each.bytes_per_s, Quantity.DATA_RATE) for each in (loaded_link, link)
        )
        rate = loaded if loaded == alone else f"{loaded} ({alone} alone)"
        facts += [rate, format_quantity(link.latency_s + tier.issue_s, Quantity.TIME)]
    if tier.setup_s:
        facts.append(f"{format_quantity(tier.setup_s, Quantity.TIME)} a collective")
    return ", ".join(facts)


@cache
def _links(tier: Tier) -> tuple[Link | None, Link | None]:
    """What a message has by itself, and when all send; None for a large graph, where it takes time to find all ways."""
    is_large = isinstance(tier.shape, EdgeList) and tier.size > MOST_OF_GRAPH
    return (None, None) if is_large else (tier.link, tier.loaded_link)


def _count(num_chips: int) -> str:
    return f"{num_chips} chip{'s' if num_chips > 1 else ''}"


def _shape(tier: Tier) -> str:
    """What joins the chips where it is not a switch; figures are then those between neighbours."""
    name = _shape_name(tier)
    dims = f" of {' x '.join(map(str, tier.shape.dims))}" if isinstance(tier.shape, Torus) else ""
    return f" ({name}{dims})" if name else ""


def _shape_name(tier: Tier) -> str:
    """Nothing for a switch."""
    shape = tier.shape
    if isinstance(shape, Torus):
        return "torus" if any(shape.wraps) else "mesh"
    if isinstance(shape, FullMesh):
        return "full mesh"
    return "" if isinstance(shape, Tree) else type(shape).__name__.lower()


def _condition_lines(conditions: Described) -> list[str]:
    """How much is out of order; nothing where all is as the data sheets say."""
    parts = (
        ("link", conditions.links),
        ("chip", conditions.chips),
        ("background job", conditions.background),
    )
    counted = [f"{len(some)} {name}{'s' if len(some) > 1 else ''}" for name, some in parts if some]
    counted += ["jitter"] if conditions.jitter != HEALTHY.jitter else []
    return [f"conditions: {', '.join(counted)}"] if counted else []


def _amount(value: float | None, quantity: Quantity) -> str:
    return f"{quantity} not known" if value is None else format_quantity(value, quantity)


def _check_job(document: Document) -> _Said:
    job = job_from(document)
    degrees = " ".join(
        f"{axis} {'auto' if degree is None else degree}"
        for axis, degree in (("dp", job.plan.dp), ("tp", job.plan.tp), ("pp", job.plan.pp))
    )
    named = (job.model, job.data, job.loss, job.optimizer.name, job.lr_schedule.name, job.validation.data)
    names_code = any(is_reference(name) for name in named if name)
    size = "samples" if job.has_own_data else f"x {job.seq} tokens"
    lines = (
        f"{job.model} on {job.data}, {job.dtype}, {job.optimizer.name}",
        *(["names of your code are not looked up here, but by plan and train"] if names_code else []),
        f"{job.steps} steps of {job.global_batch} {size}",
        f"plan: {degrees}, zero {job.plan.zero}, {job.plan.schedule}",
    )
    return lines, {"job": job.model_dump(), "names_own_code": names_code}


def _check_chip(document: Document) -> _Said:
    validate(document, ChipFile)
    chip = described_chip(document, None)
    size = format_quantity(chip.memory_bytes, Quantity.SIZE)
    rate = format_quantity(chip.memory_bytes_per_s, Quantity.DATA_RATE)
    peaks = [
        f"{dtype} {format_quantity(peak, Quantity.COMPUTE_RATE)}"
        for dtype, peak in chip.peak_flops_per_s.items()
    ]
    lines = (
        f"{chip.name} ({chip.year}), {chip.kind}: {', '.join(peaks)}",
        f"memory {size} at {rate}",
    )
    return lines, {
        "key": chip.key,
        "name": chip.name,
        "year": chip.year,
        "class": str(chip.kind),
        "peak_flops_per_s": dict(chip.peak_flops_per_s),
        "memory_bytes": chip.memory_bytes,
        "memory_bytes_per_s": chip.memory_bytes_per_s,
        "usd_per_hour": chip.usd_per_hour,
        "watts": chip.tdp_w,
    }


def _check_sweep(document: Document) -> _Said:
    sweep = validate(document, SweepFile)
    varied = {name: values for name, values in sweep.vary.model_dump().items() if values}
    lines = [f"{name}: {', '.join(map(str, values))}" for name, values in varied.items()]
    if sweep.batch_per_chip is not None:
        lines.append(f"{sweep.batch_per_chip:g} samples per chip in weak scaling")
    if (measured := sweep.measure) is not None:
        lines.append(
            f"measured by {measured.runner} up to {measured.most_chips} chips, {measured.steps} steps each"
        )
    counts = ", ".join(map(str, sweep.chips))
    return (f"{' and '.join(sweep.modes)} scaling on {sweep.cluster}: {counts} chips", *lines), {
        "cluster": sweep.cluster,
        "modes": list(map(str, sweep.modes)),
        "chips": list(sweep.chips),
        "vary": {name: list(values) for name, values in varied.items()},
        "batch_per_chip": sweep.batch_per_chip,
        "measure": None if measured is None else measured.model_dump(mode="json"),
    }


# One entry per kind of file: from a document to what its report says.
CHECKERS: dict[str, Callable[[Document], _Said]] = {
    "cluster": _check_cluster,
    "job": _check_job,
    "chip": _check_chip,
    "sweep": _check_sweep,
}
