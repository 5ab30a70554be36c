"""check: is this file valid? Answers for cluster, job, chip and sweep files; the file says which it is by its
`kind`.

Raises the file's own errors, all at once; a report means that the file is valid. Reads no other file than the
catalog, and needs neither torch nor ray. Another kind of file is one more entry in CHECKERS.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from comms.errors import ConfigError, located
from comms.networks.conditions import HEALTHY, Described, check_links
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
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
    """A valid file, and what it says in a few lines."""

    path: str
    kind: str
    lines: tuple[str, ...]


def main(options: CheckOptions, console: Console) -> int:
    """Print what the file describes."""
    report = check(options.file)
    rows = tuple((line,) for line in report.lines)
    console.results(asdict(report), (Table(f"{report.path}: a valid {report.kind} file", rows),))
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
    return CheckReport(str(path), kind, CHECKERS[kind](document))


def _check_cluster(document: Document) -> tuple[str, ...]:
    cluster = cluster_from(document)
    if cluster.conditions.links:  # links that there are not, and chips that are cut off from the others
        taken = cluster.take(None)
        with located(cluster.origin):
            check_links(taken.conditions, taken.network.topology())
    chips = _types(cluster)
    price = _amount(cluster.usd_per_hour, Quantity.HOURLY_PRICE)
    power = _amount(cluster.watts, Quantity.POWER)
    return (
        f"{cluster.name}: {_hosts(cluster)} of {chips}, {cluster.device}",
        *map(_tier_line, cluster.network.tiers),
        f"{_count(cluster.num_chips)}: {price}, {power}",
        *_condition_lines(cluster.conditions),
    )


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
    loaded, alone = (
        format_quantity(link.bytes_per_s, Quantity.DATA_RATE) for link in (tier.loaded_link, tier.link)
    )
    rate = loaded if loaded == alone else f"{loaded} ({alone} alone)"
    latency = format_quantity(tier.link.latency_s + tier.issue_s, Quantity.TIME)
    facts = [f"{tier.name}: {size}{_shape(tier)}", rate, latency]
    if tier.setup_s:
        facts.append(f"{format_quantity(tier.setup_s, Quantity.TIME)} a collective")
    return ", ".join(facts)


def _count(num_chips: int) -> str:
    return f"{num_chips} chip{'s' if num_chips > 1 else ''}"


def _shape(tier: Tier) -> str:
    """What joins the chips where it is not a switch; figures are then those between neighbours."""
    shape = tier.shape
    if isinstance(shape, Torus):
        dims = " x ".join(map(str, shape.dims))
        return f" ({'torus' if any(shape.wraps) else 'mesh'} of {dims})"
    if isinstance(shape, FullMesh):
        return " (full mesh)"
    return f" ({type(shape).__name__.lower()})" if not isinstance(shape, Tree) else ""


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


def _check_job(document: Document) -> tuple[str, ...]:
    job = job_from(document)
    degrees = " ".join(
        f"{axis} {'auto' if degree is None else degree}"
        for axis, degree in (("dp", job.plan.dp), ("tp", job.plan.tp), ("pp", job.plan.pp))
    )
    named = (job.model, job.data, job.loss, job.optimizer.name, job.lr_schedule.name, job.validation.data)
    names_code = any(is_reference(name) for name in named if name)
    size = "samples" if job.has_own_data else f"x {job.seq} tokens"
    return (
        f"{job.model} on {job.data}, {job.dtype}, {job.optimizer.name}",
        *(["names of your code are not looked up here, but by plan and train"] if names_code else []),
        f"{job.steps} steps of {job.global_batch} {size}",
        f"plan: {degrees}, zero {job.plan.zero}, {job.plan.schedule}",
    )


def _check_chip(document: Document) -> tuple[str, ...]:
    validate(document, ChipFile)
    chip = described_chip(document, None)
    size = format_quantity(chip.memory_bytes, Quantity.SIZE)
    rate = format_quantity(chip.memory_bytes_per_s, Quantity.DATA_RATE)
    peaks = [
        f"{dtype} {format_quantity(peak, Quantity.COMPUTE_RATE)}"
        for dtype, peak in chip.peak_flops_per_s.items()
    ]
    return (
        f"{chip.name} ({chip.year}), {chip.kind}: {', '.join(peaks)}",
        f"memory {size} at {rate}",
    )


def _check_sweep(document: Document) -> tuple[str, ...]:
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
    return (f"{' and '.join(sweep.modes)} scaling on {sweep.cluster}: {counts} chips", *lines)


# One entry per kind of file: from a document to the lines of its report.
CHECKERS: dict[str, Callable[[Document], tuple[str, ...]]] = {
    "cluster": _check_cluster,
    "job": _check_job,
    "chip": _check_chip,
    "sweep": _check_sweep,
}
