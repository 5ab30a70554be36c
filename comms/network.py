"""Networks: the tiers of links between chips, from inside one chip to the whole data centre.

Chips are numbered so that neighbours in number are neighbours in the network: the groups of a tier of size
s are the chips [0, s), [s, 2s), ... Sizes nest: each is a multiple of the one inside it,
except the outermost, which may end with a part of a group. A message between
two chips uses the innermost tier with a group that holds both.

Not modelled: routes inside a tier, and which flows share a wire. A tier's link is what every one of its chips
has when all of them communicate at once (four chips behind one NIC have a quarter of it each).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from comms.links import Link

# The size of the outermost tier where a cluster may grow to as many chips as are asked for.
UNBOUNDED = 2**62


class TierKind(StrEnum):
    """Where the wires of a tier run."""

    ON_CHIP = "on_chip"
    SCALE_UP = "scale_up"
    PCIE = "pcie"
    SCALE_OUT = "scale_out"


@dataclass(frozen=True, slots=True)
class Tier:
    """One level of the network: groups of `size` chips, and the link each chip has inside its group."""

    name: str
    size: int  # chips in one group at this tier
    link: Link  # per chip, per direction, before oversubscription
    kind: TierKind
    oversubscription: float = 1.0  # bandwidth below this tier's switches / bandwidth above them
    source: str = ""  # where the figures come from, in words

    def __post_init__(self) -> None:
        if self.size < 1 or self.oversubscription < 1:
            raise ValueError(f"tier {self.name!r}: size and oversubscription must be at least 1")

    @property
    def loaded_link(self) -> Link:
        """The link when every chip of the group sends at once: bandwidth / oversubscription."""
        return Link(self.link.latency_s, self.link.bytes_per_s / self.oversubscription)


@dataclass(frozen=True, slots=True)
class Network:
    """Tiers from the innermost to the outermost; the outermost holds all chips."""

    tiers: tuple[Tier, ...]

    def __post_init__(self) -> None:
        if not self.tiers:
            raise ValueError("a network needs at least one tier")
        for inner, outer in zip(self.tiers, self.tiers[1:], strict=False):
            is_outermost = outer is self.tiers[-1]
            if outer.size <= inner.size or (outer.size % inner.size and not is_outermost):
                raise ValueError(
                    f"tier {outer.name!r} of {outer.size} chips does not hold whole groups of "
                    f"{inner.size} (tier {inner.name!r})"
                )

    def tier_for(self, chips: Sequence[int]) -> Tier:
        """The innermost tier with one group that holds all of `chips` (not empty). O(len(chips))."""
        low, high = min(chips), max(chips)
        for tier in self.tiers:
            if low // tier.size == high // tier.size:
                return tier
        raise ValueError(f"chip {high} is outside the network of {self.tiers[-1].size} chips")

    def take(self, num_chips: int) -> "Network":
        """What the first `num_chips` chips need of the network; its outermost tier has exactly that size."""
        kept = [tier for tier in self.tiers if tier.size < num_chips]
        outer = next((tier for tier in self.tiers if tier.size >= num_chips), None)
        if outer is None:
            raise ValueError(f"{num_chips} chips do not fit in a network of {self.tiers[-1].size}")
        return Network((*kept, replace(outer, size=num_chips)))
