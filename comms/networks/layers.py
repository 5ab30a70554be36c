"""Layers: what a tree of switches consists of from the inside out, and how a group of chips folds over it.

A layer is a row of equal switches and the wires that lead up to them from the layer inside (from the chips, for
the innermost). Everything that can be said of a tree without counting its wires is said here by arithmetic.

Rates of a fold assume what its algorithms do: messages of one round leave all subgroups alike, and each subgroup gets
as much as it sends, so that wires used in both directions and switches passed twice have half for each.

Not folded (None): groups that sit unevenly on a layer, switches that take packets in before they send them on, and
messages that keep to one of several paths. Full fidelity prices those.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

from comms.networks.groups import Lattice, Level, Levels, Members, group_size, sharing
from comms.networks.links import Link


class Spread(StrEnum):
    """How messages spread over the parallel paths of a trunk."""

    ADAPTIVE = "adaptive"  # the packets of each over all of them
    HASHED = "hashed"  # each on one, by a hash of where its ends are
    BY_TARGET = "by_target"  # each on one, in turn by where it goes


@dataclass(frozen=True, slots=True)
class Switch:
    """The switches of one layer."""

    tier: str = "switch"
    reduces: bool = False  # can add and copy what passes
    forward_nbytes: float = 0.0  # taken in before it sends on: 0 cut-through, a packet, inf the whole message
    # What its wires from below bring at once, over what it passes on; 1: no limit.
    oversubscription: float = 1.0


SWITCH = Switch()


@dataclass(frozen=True, slots=True)
class Trunk:
    """The links from each switch of a layer to the next layer; `rails` switches share a group of `size` chips."""

    size: int  # chips below one group of switches
    link: Link  # one direction of one path
    to: Switch = SWITCH  # where it leads
    paths: int = 1
    rails: int = 1
    duplex: bool = True  # else both directions share the rate


@dataclass(frozen=True, slots=True)
class Layer:
    """Switches of one layer, and the wires to them from below: one from every child to every plane."""

    switch: Switch
    size: int  # chips under a group of switches, or as many as there are
    rails: int  # switches in a group
    chips: int  # under one switch
    count: int  # switches, not counting planes
    planes: int  # switches side by side that share their children
    latency_s: float  # of a wire from below
    bytes_per_s: float  # of one such wire
    duplex: bool
    backplane: float  # bytes per second through one switch; inf without a limit

    @property
    def bytes_per_s_up(self) -> float:
        """What one child has upwards, over all planes; half of a shared medium."""
        return self.bytes_per_s * self.planes * (1.0 if self.duplex else 0.5)


def half_latencies(totals: Sequence[float]) -> tuple[float, ...]:
    """Latency of the wires into each layer, from that of a message between chips that meet there.

    A message crosses each layer's wires twice, so that each gets half of what its layer adds. A layer that is
    quicker than one inside it would need negative wires: it counts as just as slow.
    """
    # Tables say what a message between chips that meet in a layer takes in all; wires need what each layer adds.
    reached = 0.0
    halves = []
    for total in totals:
        halves.append(max(0.0, total - reached) / 2)
        reached = max(reached, total)
    return tuple(halves)


def alone(layers: Sequence[Layer]) -> Link:
    """What one message has between chips that meet in the last of these layers."""
    rate = min(min(layer.bytes_per_s, layer.backplane) for layer in layers)
    return Link(_latency_s(layers), rate)


def loaded(layers: Sequence[Layer]) -> Link:
    """What each chip has when all of them send to chips that they meet in the last of these layers."""
    under = [1, *(layer.chips for layer in layers)]
    return Link(_latency_s(layers), _share(layers, under))


def folded(layers: Sequence[Layer], members: Members, inner: int, aligned: bool) -> Levels | None:
    """One level for every layer in which members meet; chips in one block of `inner` meet elsewhere.

    `aligned` promises that messages between subgroups join members with the same inner digits, so that they stay on
    their rail. None where the group cannot be folded; see the module.
    """
    counts = _counts(layers, members)
    rails = _rails(layers, members)
    together = sharing(members, inner)
    forwards = any(layer.switch.forward_nbytes for layer in layers)
    if counts is None or rails is None or together is None or forwards or not _nests(layers, inner):
        return None
    period, used = rails
    # Rails are apart up to the layer that joins them. Messages surely keep to theirs where all members are on one, and
    # where members with the same inner digits are and only they talk to each other.
    stays_on_rail = used == 1 or (aligned and inner % period == 0)
    counted = list(zip(layers, counts, strict=True))
    under = [1, *(count // used if layer.rails > 1 else count for layer, count in counted)]
    if isinstance(members, Lattice):  # its copies keep all other chips busy
        under = [1, *(layer.chips for layer in layers)]
    levels: list[Level] = []
    for at, (layer, count) in enumerate(counted):
        if layer.size <= inner or count <= together:
            continue
        crossed = layers[: at + 1]
        # With planes a message's rate depends on which paths happen to be chosen: arithmetic cannot say.
        if (layer.rails > 1 and not stays_on_rail) or any(each.planes > 1 for each in crossed):
            return None
        link = alone(crossed)
        # A lone message of a copy meets those of the other copies under the same inner trunks.
        below = zip(crossed, [1, *counts], under, strict=False)
        rate = min(link.bytes_per_s, *(each.bytes_per_s_up * mine / every for each, mine, every in below))
        level = Level(
            layer.switch.tier,
            count // together,
            link.latency_s,
            rate,
            together * _share(crossed, under),
            reduces=layer.switch.reduces,
            shared=any(isfinite(each.backplane) or not each.duplex for each in crossed),
        )
        levels.append(level)
        together = count
    return tuple(levels)


def _counts(layers: Sequence[Layer], members: Members) -> list[int] | None:
    """[layers] Members in each group of switches that has any; None where groups differ."""
    counts: list[int] = []
    for layer in layers[:-1]:
        count = sharing(members, layer.size)
        if count is None:
            return None
        counts.append(count)
    return [*counts, group_size(members)]


def _rails(layers: Sequence[Layer], members: Members) -> tuple[int, int] | None:
    """After how many chips the rails repeat, and how many of them members use; None where that differs."""
    railed = [at for at, layer in enumerate(layers) if layer.rails > 1]
    if not railed:
        return 1, 1
    rails = layers[railed[0]].rails
    width = layers[railed[0] - 1].size if railed[0] else 1
    if any(layers[at].rails != rails for at in railed):
        return None
    # Chips that far apart in number are on the same rail.
    period = width * rails
    if isinstance(members, Lattice):
        if any(stride % period for stride, _ in members.steps if stride > period):
            return None  # further along, members have other rails
        per_period, per_rail = sharing(members, period), sharing(members, width)
        return (period, per_period // per_rail) if per_period and per_rail else None
    used: dict[int, set[int]] = {}
    for chip in members:
        used.setdefault(chip // period, set()).add(chip // width % rails)
    distinct = {frozenset(each) for each in used.values()}
    return (period, len(distinct.pop())) if len(distinct) == 1 else None


def _nests(layers: Sequence[Layer], inner: int) -> bool:
    """Whether each block of a layer holds whole blocks of `inner` or lies in one; what is over all chips does."""
    sizes = [layer.size for layer in layers if layer.size < layers[-1].size]
    return all(size % inner == 0 or inner % size == 0 for size in sizes)


def _latency_s(layers: Sequence[Layer]) -> float:
    return 2 * sum(layer.latency_s for layer in layers)


def _share(crossed: Sequence[Layer], under: Sequence[int]) -> float:
    """What each sender has of the tightest wires and switches, `under` of them below each: chips, layer 0, ..."""
    # A wire up is shared by all below it. A switch on the way is passed twice, out and in, by what each sender below it
    # sends and gets; the one where messages turn round only once.
    wires = min(layer.bytes_per_s_up / below for layer, below in zip(crossed, under, strict=False))
    passed = zip(crossed[:-1], under[1:], strict=False)  # on the way out and on the way in
    switches = [layer.backplane * layer.planes / (2 * below) for layer, below in passed]
    turned = crossed[-1].backplane * crossed[-1].planes / under[len(crossed)]
    return min(wires, turned, *switches)
