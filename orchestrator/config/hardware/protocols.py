"""Protocols of a tier, from what a file says to what `comms` reckons with.

A file gives two sets of figures: of a message by itself (latency, efficiency) and of a stage of a collective, in place
of them (a protocol's latency and share, both as `orchestrate calibrate links` prints them). A collective runs as one
kernel and pays its setup once; a message by itself pays for being issued each time. So the link gets the better of
both, protocols what they lack of it, and what issuing a message adds (`issue_s`) stands apart: no cost counts twice.
A stage may take longer, too, where a library's kernels have a thread of the host send over a network card.
"""

from collections.abc import Sequence

from comms.algorithms.catalog import names as algorithm_names
from comms.collectives.schedule import Op
from comms.errors import ClusterError
from comms.networks.links import Protocol
from orchestrator.config.hardware.cluster import Library
from orchestrator.config.hardware.network_sections import LibrarySection, ProtocolSection
from orchestrator.config.schema import nearest
from orchestrator.config.yaml_file import Document, Location


def best_share(efficiency: float, sections: Sequence[ProtocolSection]) -> float:
    """What the links reach at best, alone or in a collective."""
    return max([efficiency, *(each.share for each in sections if each.share is not None)])


def library_of(
    section: LibrarySection,
    latency_s: float,
    efficiency: float,
    best: float,
    document: Document,
    at: Location,
) -> Library:
    """A tier's library, where a message by itself has this latency and efficiency, and its links reach `best`."""
    latencies = [latency_s if each.latency is None else each.latency for each in section.protocols]
    shares = [efficiency if each.share is None else each.share for each in section.protocols]
    _check(section.protocols, shares, best, document, at)
    if not section.protocols:
        return Library(section.setup)
    base = min([latency_s, *latencies])
    protocols = tuple(
        Protocol(
            each.name, latency - base, share / best, each.pipelined, tuple(each.algorithms), tuple(each.ops)
        )
        for each, latency, share in zip(section.protocols, latencies, shares, strict=True)
    )
    return Library(section.setup, protocols, latency_s - base)


def _check(
    sections: Sequence[ProtocolSection],
    shares: Sequence[float],
    best: float,
    document: Document,
    at: Location,
) -> None:
    """Raises ClusterError for names given twice, and for a share that the links do not reach."""
    names = [each.name for each in sections]
    for number, (name, share) in enumerate(zip(names, shares, strict=True)):
        where = document.where((*at, "protocols", number))
        known = tuple(dict.fromkeys(known for op in Op for known in algorithm_names(op)))
        for algorithm in sections[number].algorithms:
            if algorithm not in known:
                raise ClusterError(f"there is no algorithm {algorithm!r}", where, nearest(algorithm, known))
        for op in sections[number].ops:
            if op not in list(Op):
                raise ClusterError(
                    f"there is no operation {op!r}", where, nearest(op, tuple(str(each) for each in Op))
                )
        if name in names[:number]:
            raise ClusterError(f"two protocols are named {name!r}", where, "give each its own name")
        if share > best:
            problem = f"protocol {name!r} has a share of {share}, above the efficiency of {best}"
            raise ClusterError(problem, where, "raise the `efficiency` of the links")
