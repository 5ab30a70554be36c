"""comms: what does it take to move these bytes, by which algorithm, and which links decide?

One collective over all chips of a cluster, a range of sizes (`--sweep`), or the latency of every tier (`--tiers`).
Needs neither torch nor ray. What is asked for and has no effect is said.
"""

from pathlib import Path

from comms.algorithms.direct import all_to_allv
from comms.collectives.schedule import Op, Schedule
from comms.errors import ConfigError, located
from comms.networks.fabrics.edge_list import EdgeList
from comms.selection.choice import AUTO
from comms.selection.collective import answer_to
from comms.selection.question import Answer, Fidelity, Question
from comms.selection.size_sweep import SizeSweep, sweep_sizes
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import DEFAULT_CLUSTER, cluster_path, load_cluster
from orchestrator.config.hardware.latency_tiers import latency_tiers
from orchestrator.verbs.inputs.comms_inputs import (
    FLAGS,
    OTHERWISE,
    check_picture,
    is_uneven,
    read_algorithm,
    read_op,
    read_parts,
    read_size,
    read_sizes,
    say_ignored,
    write_picture,
)
from orchestrator.verbs.inputs.options import CommsOptions
from orchestrator.views.console import Console
from orchestrator.views.network import comms_report

DEFAULT_SIZE = "64 MiB"
MAX_NAMED = 4


def main(options: CommsOptions, console: Console) -> int:
    """Answer what the options ask. Raises UserError."""
    check_picture(options.plot)
    whole = load_cluster(options.cluster or cluster_path(DEFAULT_CLUSTER))
    with located("network", OTHERWISE, FLAGS):
        if options.tiers:  # of a cluster that grows as asked for, every tier that it may get
            return _tiers(whole if options.chips is None else whole.take(options.chips), options, console)
        cluster = whole.take(options.chips)
        if any(fault.slowdown > 1 for fault in cluster.conditions.chips):
            console.warn("`slowdown` of chips has no effect here, where nothing computes: simulate counts it")
        _warn_of_idle(cluster, console)
        question = (_uneven if is_uneven(options.op) else _even)(cluster, options, console)
        found: Answer | SizeSweep
        if options.sweep is None:
            found = answer_to(question, console.phase)
        else:
            found = sweep_sizes(question, read_sizes(options.sweep), console.phase)
        _show(found, cluster.name, options.plot, console)
    return 0


def _warn_of_idle(cluster: Cluster, console: Console) -> None:
    """What the cluster file has and no message uses."""
    for tier in cluster.network.tiers:
        if isinstance(tier.shape, EdgeList) and (idle := tier.shape.idle_edges):
            named = ", ".join(f"{edge.a} - {edge.b}" for edge in idle[:MAX_NAMED]) + ", ..." * (
                len(idle) > MAX_NAMED
            )
            console.warn(f"links that carry nothing, as others beside them have less latency: {named}")


def _even(cluster: Cluster, options: CommsOptions, console: Console) -> Question:
    """A collective in which all chips do alike."""
    algorithm, num_chips = read_algorithm(options.algorithm, options.op), cluster.num_chips
    op = read_op(options.op) if isinstance(algorithm, str) else algorithm.op
    if not isinstance(algorithm, str) and algorithm.num_ranks != num_chips:
        problem = f"a schedule of {algorithm.num_ranks} ranks, but {num_chips} chips"
        raise ConfigError(problem, str(options.algorithm), f"take --chips {algorithm.num_ranks}")
    if op is Op.BARRIER:
        say_ignored(console, {"--size": options.size}, "a barrier moves no bytes")
        if options.sweep is not None:
            raise ConfigError("a barrier has no size to vary", "--sweep", "leave --sweep out")
    if options.sweep is not None:
        say_ignored(console, {"--size": options.size}, "--sweep gives the sizes")
    if num_chips == 1:
        given = {"--algorithm": options.algorithm, "--fidelity": options.fidelity}
        say_ignored(console, given, "one chip has all it needs")
    nbytes = 0.0 if op is Op.BARRIER else read_size(options.size or DEFAULT_SIZE, "--size")
    return _question(cluster, op, nbytes, options, algorithm)


def _uneven(cluster: Cluster, options: CommsOptions, console: Console) -> Question:
    """An all-to-all whose parts are in a file."""
    if options.sweep is not None:
        raise ConfigError("the sizes of parts come from a file", "--sweep", "leave --sweep out")
    parts = read_parts(options.size, cluster.num_chips)
    say_ignored(console, {"--algorithm": options.algorithm}, "every part goes straight to its chip")
    made = all_to_allv(parts) if cluster.num_chips > 1 else AUTO
    return _question(cluster, Op.ALL_TO_ALL, float(parts.sum(axis=1).max()), options, made)


def _question(
    cluster: Cluster, op: Op, nbytes: float, options: CommsOptions, algorithm: str | Schedule
) -> Question:
    if cluster.num_chips == 1:
        algorithm = AUTO
    return Question(
        network=cluster.network,
        num_chips=cluster.num_chips,
        op=op,
        nbytes=nbytes,
        algorithm=algorithm if isinstance(algorithm, str) else AUTO,
        schedule=None if isinstance(algorithm, str) else algorithm,
        fidelity=None if options.fidelity is None else Fidelity(options.fidelity),
        described=cluster.conditions,
        chips_per_host=cluster.chips_per_host,
    )


def _show(found: Answer | SizeSweep, cluster: str, plot: Path | None, console: Console) -> None:
    """What was found, with its warnings before and its picture after."""
    for warning in found.warnings:
        console.warn(warning)
    if isinstance(found, Answer):
        console.results(comms_report.document(found, cluster), comms_report.tables(found, cluster))
    else:
        tables = comms_report.sweep_tables(found, cluster)
        console.results(comms_report.sweep_document(found, cluster), tables)
    if plot is not None:
        from orchestrator.views.network.bandwidth_plot import sweep_png
        from orchestrator.views.network.topology_plot import topology_png

        png = topology_png(found, cluster) if isinstance(found, Answer) else sweep_png(found, cluster)
        write_picture(png, plot, console)


def _tiers(cluster: Cluster, options: CommsOptions, console: Console) -> int:
    flags = ("op", "size", "algorithm", "fidelity", "sweep", "plot")
    given = {f"--{flag}": getattr(options, flag) for flag in flags}
    say_ignored(console, given, "--tiers is about single messages")
    with console.phase("tiers"):
        rows = latency_tiers(cluster.network, cluster.chip_types)
    name = cluster.name
    console.results(comms_report.tiers_document(rows, name), comms_report.tiers_tables(rows, name))
    return 0
