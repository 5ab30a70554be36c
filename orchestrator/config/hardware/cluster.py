"""Cluster: the chips, hosts and network that a run is planned for, as one frozen value.

A cluster file describes a repeating unit: one or more hosts. `num_hosts` None means that there are as many
of them as a run asks for; `Cluster.take` cuts or repeats the unit to a number of chips. Chip i sits in host
i // chips_per_host, and hosts repeat in the order of the unit.

Assumes that every host has the same number of chips (their types may differ) and the same PCIe tree. Not
modelled: which chip is behind which PCIe switch beyond equal shares in order, and the price of the network
beyond what the hosts' price says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from comms.errors import ClusterError, CommsError
from comms.networks.conditions import HEALTHY, Described, check_chips
from comms.networks.links import PLAIN, Link, Protocol
from comms.networks.network import Network, Tier
from kernels.chips import Chip
from orchestrator.config.hardware.network_sections import MOST_CHIPS, NicSection

MOST_CHIPS_OF_UNIT = 2**17  # where hosts are held one by one


class Device(StrEnum):
    """What a chip of the cluster is when a plan is run with real tensors."""

    SIMULATED = "simulated"  # a coroutine in an actor, on any machine
    CPU = "cpu"  # one core of a host
    CUDA = "cuda"  # one GPU


@dataclass(frozen=True, slots=True)
class Library:
    """What a communication library adds to the links of a tier."""

    setup_s: float = 0.0  # of each collective, once
    protocols: tuple[Protocol, ...] = (PLAIN,)
    issue_s: float = 0.0  # of each message by itself

    def on(self, tier: Tier) -> Tier:
        """The tier with this library."""
        return replace(tier, setup_s=self.setup_s, protocols=self.protocols, issue_s=self.issue_s)


PLAIN_LIBRARY = Library()


@dataclass(frozen=True, slots=True)
class Pcie:
    """A host's PCIe tree: equal switches under one root complex (0: all chips hang on it)."""

    switches: int
    link: Link  # one chip to its switch
    uplink_bytes_per_s: float  # one switch to the root complex
    root: Link  # what chips have that meet there, as far as it is less
    duplex: bool = True
    library: Library = PLAIN_LIBRARY
    source: str = ""
    chip_bytes_per_s: tuple[float, ...] = ()  # each chip's own link, of which `link` has the slowest


@dataclass(frozen=True, slots=True)
class Host:
    """One host: its chips in order, its PCIe tree and cards, and what it adds to price and power."""

    chips: tuple[Chip, ...]
    pcie: Pcie | None  # None: chips share the host's memory
    nics: NicSection | None
    watts: float  # of everything but the chips
    usd_per_hour: float  # of everything but the chips


def unit_of(
    hosts: Sequence[Host], counts: Sequence[int], repeat: int | None
) -> tuple[tuple[Host, ...], int | None]:
    """The hosts that repeat, and how many hosts there are in all. Raises ClusterError for more than MOST_CHIPS.

    So many hosts of one kind cost no more than one.
    """
    num_chips = sum(count * len(host.chips) for host, count in zip(hosts, counts, strict=True))
    if num_chips * (repeat or 1) > MOST_CHIPS:
        raise ClusterError(
            f"{num_chips * (repeat or 1)} chips in one cluster", hint=f"give up to {MOST_CHIPS}"
        )
    if repeat is not None and len(hosts) == 1:
        return (hosts[0],), counts[0] * repeat
    if num_chips > MOST_CHIPS_OF_UNIT:
        hint = f"give up to {MOST_CHIPS_OF_UNIT}, and how often they `repeat`"
        raise ClusterError(f"{num_chips} chips in the hosts that repeat", hint=hint)
    unit = tuple(host for host, count in zip(hosts, counts, strict=True) for _ in range(count))
    return unit, None if repeat is None else repeat * len(unit)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Hardware only: what there is, not what runs on it."""

    name: str
    device: Device
    unit: tuple[Host, ...]  # the hosts that repeat
    num_hosts: int | None  # None: as many as asked for
    network: Network
    actors: int | None  # processes that execute simulated chips; None: one per core
    origin: str  # the file it was read from
    conditions: Described = HEALTHY  # what is slow, down or busy

    @property
    def chips_per_host(self) -> int:
        """Chips in each host."""
        return len(self.unit[0].chips)

    @property
    def num_chips(self) -> int:
        """All chips; of a cluster without a fixed number of hosts, those of one unit."""
        return self.chips_per_host * (self.num_hosts or len(self.unit))

    def host(self, index: int) -> Host:
        """Host `index`; hosts repeat in the order of the unit."""
        return self.unit[index % len(self.unit)]

    def chip(self, index: int) -> Chip:
        """The type of chip `index`."""
        return self.host(index // self.chips_per_host).chips[index % self.chips_per_host]

    @property
    def chip_types(self) -> tuple[Chip, ...]:
        """The distinct chip types, in order of first appearance."""
        return tuple(dict.fromkeys(chip for host in self.unit for chip in host.chips))

    @property
    def usd_per_hour(self) -> float | None:
        """Price of all hosts and chips per hour; None where a chip has no known price."""
        return self._sum(lambda host: (host.usd_per_hour, *(chip.usd_per_hour for chip in host.chips)))

    @property
    def watts(self) -> float | None:
        """Power of all hosts and chips at full load (TDP); None where a chip has no known TDP."""
        return self._sum(lambda host: (host.watts, *(chip.tdp_w for chip in host.chips)))

    @property
    def is_mixed(self) -> bool:
        """Whether its chips are of several kinds."""
        return len(self.chip_types) > 1

    def take(self, num_chips: int | None) -> "Cluster":
        """The cluster of the first `num_chips` chips: part of one host, or whole hosts. None takes all."""
        wanted = self.num_chips if num_chips is None else num_chips
        self._check_take(wanted)
        try:  # a condition on a chip that is not taken would have no effect
            check_chips(self.conditions, wanted)
        except CommsError as error:
            hint = "take more chips, or change `conditions:`"
            raise ClusterError(error.problem, error.where or self.origin, hint) from error
        per_host = min(wanted, self.chips_per_host)
        unit = self.unit
        if wanted < self.chips_per_host:
            unit = (replace(self.unit[0], chips=self.unit[0].chips[:wanted]),)
        hosts = wanted // per_host
        rates = tuple(each for each in self.conditions.rates if each.differ(wanted))
        conditions = replace(self.conditions, rates=rates)
        network = self.network.take(wanted)
        return replace(self, unit=unit[:hosts], num_hosts=hosts, network=network, conditions=conditions)

    def _check_take(self, wanted: int) -> None:
        size = self.chips_per_host
        if wanted < 1:
            raise ClusterError(f"cannot take {wanted} chips", self.origin, "ask for at least one chip")
        if wanted > MOST_CHIPS:
            raise ClusterError(
                f"cannot take {wanted} chips", self.origin, f"ask for at most {MOST_CHIPS} chips"
            )
        if self.num_hosts is not None and wanted > self.num_chips:
            have = f"{self.name} has {self.num_chips} chips ({self.num_hosts} hosts of {size})"
            problem = f"{wanted} chips asked for, but {have}"
            raise ClusterError(problem, self.origin, "ask for fewer, or raise `repeat` in the file")
        if wanted > size and wanted % size:
            low = wanted // size * size
            near = [low] if self.num_hosts and low + size > self.num_chips else [low, low + size]
            problem = f"{wanted} chips are not a whole number of hosts of {size} chips"
            hint = f"ask for {' or '.join(map(str, near))} chips, or for at most {size}"
            raise ClusterError(problem, self.origin, hint)

    def _sum(self, figures: Callable[[Host], Sequence[float | None]]) -> float | None:
        """Figures summed over all hosts, in time that does not grow with their number.

        None where one is not known: a partial sum would pass for the whole.
        """
        total, num_hosts = 0.0, self.num_hosts or len(self.unit)
        for index, host in enumerate(self.unit):
            of_host = 0.0
            for figure in figures(host):
                if figure is None:
                    return None
                of_host += figure
            total += of_host * len(range(index, num_hosts, len(self.unit)))
        return total
