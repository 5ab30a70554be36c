"""Networks: the tiers of links between chips, from one chip to the whole data centre, and how groups fold over them.

Chips are numbered so that neighbours in number are neighbours in the network: the groups of a tier of size
s are the chips [0, s), [s, 2s), ... Sizes nest: each is a multiple of the one inside it,
except the outermost, which may end with a part of a group. A message between
two chips uses the innermost tier with a group that holds both.

Each group of a tier has a copy of the tier's shape, with ports of its own: a chip on NVLink and a network card sends
over both at once. Where messages of a tier use the wires of the next one and only turn round earlier (two chips
behind one PCIe switch, two hosts under one leaf), the tier is `part_of_next` and the wires are there once.

A tier of one chip stands for what is inside the chip: its figures are reported, but no message of the network uses it.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

from comms.errors import CommsError
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.groups import Lattice, Level, Levels, Members, group_size, num_members, sharing
from comms.networks.layers import Switch
from comms.networks.links import PLAIN, Link, Protocol
from comms.networks.shapes import Shape
from comms.networks.tiered import Fabric, TieredTopology

# The size of the outermost tier where a cluster may grow to as many chips as are asked for.
UNBOUNDED = 2**62
MOST_PORTS = 64  # of one shape: a torus has one per dimension


class TierKind(StrEnum):
    """Where the wires of a tier run."""

    ON_CHIP = "on_chip"
    SCALE_UP = "scale_up"
    PCIE = "pcie"
    SCALE_OUT = "scale_out"


@dataclass(frozen=True, slots=True)
class Tier:
    """One level of the network: groups of `size` chips, and the shape that joins the chips of each."""

    name: str
    kind: TierKind
    size: int  # chips in one group at this tier
    shape: Shape
    source: str = ""  # where the figures come from, in words
    setup_s: float = 0.0  # of a collective that crosses this tier, once
    protocols: tuple[Protocol, ...] = (PLAIN,)  # ways to move a message, the fastest is taken
    part_of_next: bool = False  # its wires are those of the next tier
    issue_s: float = 0.0  # what a message by itself takes more than a stage of a collective

    def __post_init__(self) -> None:
        if self.size < 1 or self.setup_s < 0 or not self.protocols:
            problem = "a tier needs at least one chip, one protocol and no negative time"
            raise CommsError(problem, f"tier {self.name!r}")
        if self.size > 1 and self.shape.num_chips < self.size:
            problem = f"a shape of {self.shape.num_chips} chips cannot join {self.size}"
            raise CommsError(problem, f"tier {self.name!r}")

    @property
    def link(self) -> Link:
        """What one message alone has between chips that meet in this tier."""
        return self.shape.link

    @property
    def loaded_link(self) -> Link:
        """What each chip has when all chips of the group send to others that they meet in this tier."""
        return self.shape.loaded_link


@dataclass(frozen=True, slots=True)
class Network:
    """Tiers from the innermost to the outermost; the outermost holds all chips."""

    tiers: tuple[Tier, ...]

    def __post_init__(self) -> None:
        if not self.tiers:
            raise CommsError("a network needs at least one tier")
        if len({tier.name for tier in self.tiers}) < len(self.tiers):
            names = ", ".join(tier.name for tier in self.tiers)
            raise CommsError(f"two tiers have one name ({names})", hint="give each its own")
        if self.tiers[-1].part_of_next:
            raise CommsError("there is no next tier", f"tier {self.tiers[-1].name!r}")
        for inner, outer in zip(self.tiers, self.tiers[1:], strict=False):
            is_outermost = outer is self.tiers[-1]
            if outer.size <= inner.size or (outer.size % inner.size and not is_outermost):
                raise CommsError(
                    f"tier {outer.name!r} of {outer.size} chips does not hold whole groups of "
                    f"{inner.size} (tier {inner.name!r})"
                )
            if inner.part_of_next and outer.shape.cut(inner.size) != inner.shape:
                problem = f"its shape is not what tier {outer.name!r} has for {inner.size} chips"
                raise CommsError(problem, f"tier {inner.name!r}")

    @classmethod
    def of(cls, *tiers: tuple[int, Link]) -> "Network":
        """Switches over switches, from the inside: (chips below one, what a message has from chip to chip)."""
        return cls(
            tuple(
                switched(f"switch {at + 1}", size, link, TierKind.SCALE_OUT if at else TierKind.SCALE_UP)
                for at, (size, link) in enumerate(tiers)
            )
        )

    def tier_for(self, members: Members) -> Tier:
        """The innermost tier with one group that holds all members (at least one), of a Lattice those of any copy."""
        if isinstance(members, Lattice):
            for tier in self.tiers[:-1]:
                alone = members.alone and members.highest < tier.size
                if alone or sharing(members, tier.size) == members.num_chips:
                    return tier
            return self.tiers[-1]
        low, high = min(members), max(members)
        for tier in self.tiers:
            if low // tier.size == high // tier.size:
                return tier
        raise CommsError(f"chip {high} is outside the network of {self.tiers[-1].size} chips")

    def take(self, num_chips: int) -> "Network":
        """What the first `num_chips` chips need of the network; its outermost tier has exactly that size."""
        kept = [tier for tier in self.tiers if tier.size < num_chips]
        outer = next((tier for tier in self.tiers if tier.size >= num_chips), None)
        if outer is None or num_chips < 1:
            raise CommsError(f"{num_chips} chips do not fit in a network of {self.tiers[-1].size}")
        if outer.size > num_chips:
            shape = outer.shape.cut(num_chips)
            outer = replace(outer, size=num_chips, shape=shape)
        return Network((*kept, replace(outer, part_of_next=False)))

    def inside(self, tier: Tier, protocol: Protocol) -> tuple[tuple[str, Protocol], ...]:
        """By tier within another one, what its own figures say of a protocol by this name."""
        tiers = self.tiers[: self.tiers.index(tier)]
        return tuple(
            (each.name, own) for each in tiers for own in each.protocols if own.name == protocol.name
        )

    def topology(self, num_chips: int | None = None) -> TieredTopology:
        """All wires between the first `num_chips` chips (None: all), and the routes over them."""
        if num_chips is not None:
            return self.take(num_chips).topology()
        if self.tiers[-1].size == UNBOUNDED:
            problem = "a network for any number of chips has no topology"
            raise CommsError(problem, hint="say for how many chips")
        names = tuple(tier.name for tier in self.tiers)
        return TieredTopology(self.tiers[-1].size, names, tuple(self._fabric(at) for at in self._owners()))

    def levels(self, members: Members, aligned: bool = False) -> Levels | None:
        """How a group folds over the tiers: one level for each at which members meet, none for one chip.

        Members are numbered in ascending order of their chips; of a list only they are busy, of a Lattice all
        its copies. `aligned` promises that messages between subgroups join members with the same inner digits (as
        hierarchical algorithms send), which keeps rails apart. None where the group sits unevenly on a tier: full
        fidelity prices it.
        """
        if not _ascends(members, self.tiers[-1].size):
            return None
        levels = self._folded(members, aligned, len(self.tiers))
        assert levels is None or num_members(levels) == group_size(members)
        return levels

    def levels_as_if_even(self, members: Members, aligned: bool = False) -> Levels | None:
        """How a group that has no `levels` would fold if its subgroups further out were alike: an assumption.

        The levels of the innermost tiers, as many as the group fills evenly, and one more for all that is further
        out: as if every two subgroups met over the whole of the tier that holds all members, each with what the
        fullest switches on the way leave it (`Tree.level_between`). That is too slow rather than too fast where
        tiers further out have less to give. None where that is one level or none (members sit unevenly on the
        innermost tier, or do not meet there), and where what joins the subgroups is no tree.
        """
        if not _ascends(members, self.tiers[-1].size):
            return None
        for at in reversed(range(1, len(self.tiers))):
            inside = self._folded(members, aligned, at)
            if inside is not None:
                levels = (*inside, *self._further_out(members, at, num_members(inside)))
                return levels if len(levels) > 1 and num_members(levels) == group_size(members) else None
        return None

    def _folded(self, members: Members, aligned: bool, num_tiers: int) -> Levels | None:
        """The levels of the innermost tiers; None where members that share a block of one sit unevenly on it."""
        names = {tier.name for tier in self.tiers}
        owners = self._owners()
        found: list[Level] = []
        inner = 1
        for at in sorted({*(owner for owner in owners if owner < num_tiers), num_tiers - 1}):
            tier = self.tiers[at]
            if tier.size == 1:
                continue
            patterns = _patterns(members, tier.size, is_last=at == len(self.tiers) - 1)
            ways = {tier.shape.levels(pattern, inner, aligned) for pattern in patterns}
            levels = ways.pop() if len(ways) == 1 else None
            if levels is None:
                return None
            first_port = next(owner for owner in owners if owner >= at) * MOST_PORTS
            found += [
                replace(
                    each,
                    tier=each.tier if each.tier in names else tier.name,
                    port=first_port + each.port,
                )
                for each in levels
            ]
            inner = tier.size
        return tuple(found)

    def _further_out(self, members: Members, at: int, subgroup: int) -> Levels:
        """One level between subgroups of `subgroup` members that share a block of the tier inside `at`, or none."""
        subgroups = group_size(members) // subgroup
        tier = self.tier_for(members)
        if subgroups == 1 or not isinstance(tier.shape, Tree):
            return ()
        inside = members if isinstance(members, Lattice) else tuple(chip % tier.size for chip in members)
        level = tier.shape.level_between(inside, self.tiers[at - 1].size, subgroups)
        port = next(owner for owner in self._owners() if owner >= self.tiers.index(tier)) * MOST_PORTS
        return (replace(level, tier=tier.name, port=port),)

    def _owners(self) -> tuple[int, ...]:
        """The tiers that have wires of their own between chips."""
        return tuple(i for i, tier in enumerate(self.tiers) if tier.size > 1 and not tier.part_of_next)

    def _fabric(self, owner: int) -> Fabric:
        """A tier's shape; its wires count to the tiers that they are named for, else to the owner."""
        tier = self.tiers[owner]
        names = [each.name for each in self.tiers]
        tiers = tuple(names.index(name) if name in names else owner for name in tier.shape.tiers)
        return Fabric(tier.shape, tier.size, tiers)


def switched(
    name: str, size: int, link: Link, kind: TierKind, oversubscription: float = 1.0, source: str = ""
) -> Tier:
    """One switch that joins `size` chips; `link` is what one message has from chip to chip."""
    port = Link(link.latency_s / 2, link.bytes_per_s)
    return Tier(name, kind, size, Tree(size, port, Switch(name, oversubscription=oversubscription)), source)


def layered(tree: Tree, kind: TierKind, inner: int = 1, source: str = "") -> tuple[Tier, ...]:
    """A tier for each layer of a tree that joins more than the `inner` chips that meet elsewhere."""
    tiers: list[Tier] = []
    for layer in tree.layers:
        size = min(layer.size, tree.num_chips)
        if size > max([inner, *(tier.size for tier in tiers)]):
            tiers.append(
                Tier(
                    layer.switch.tier, kind, size, tree.cut(size), source, part_of_next=size < tree.num_chips
                )
            )
    return tuple(tiers)


def _ascends(members: Members, num_chips: int) -> bool:
    """Raises CommsError where a group is empty, or has a chip twice or one that is not there."""
    if group_size(members) < 1:
        raise CommsError("a group needs at least one chip")
    if isinstance(members, Lattice):
        high = members.highest
    else:
        high = max(members)
        if min(members) < 0 or len(set(members)) < len(members):
            raise CommsError("a group names a chip twice or one below 0", hint="name each chip once")
    if high >= num_chips:
        raise CommsError(f"chip {high} is outside the network of {num_chips} chips")
    return isinstance(members, Lattice) or all(a < b for a, b in pairwise(members))


def _patterns(members: Members, size: int, is_last: bool) -> set[Lattice | tuple[int, ...]]:
    """The ways in which a group lies in blocks of `size` chips; none where arithmetic cannot say."""
    if isinstance(members, Lattice):
        if is_last:
            return {replace(members, alone=members.num_chips == size)}
        return set() if sharing(members, size) is None else {members.within(size)}
    blocks: dict[int, list[int]] = {}
    for chip in members:
        blocks.setdefault(chip // size, []).append(chip % size)
    return {tuple(block) for block in blocks.values()}
