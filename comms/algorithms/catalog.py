"""The catalog: what an algorithm tells of itself, and all algorithms of this package by operation and name.

An algorithm is one module here with a tuple ALGORITHMS: the schedule (rounds of messages, as data), the outline for
groups that fold evenly, and all that choosing, timing and laying out need to know of it. The modules are found by
listing the package. Of a module whose algorithms do not suit a group (`Needs`) no function is called.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import import_module
from itertools import accumulate
from operator import mul
from pkgutil import walk_packages

from comms.algorithms.rounds import Ranks
from comms.collectives.outline import Outline
from comms.collectives.schedule import Op, Schedule
from comms.networks.groups import Level, Levels

ANY_NUMBER = 64  # of levels
MOST_PEERS = 64
MANY_PEERS = (Op.ALL_TO_ALL, Op.GATHER, Op.SCATTER)
ROOTED = (Op.BROADCAST, Op.REDUCE, Op.GATHER, Op.SCATTER)


class Joined(StrEnum):
    """How the subgroups of a level are joined."""

    ANYHOW = "anyhow"
    BY_SWITCH = "by switch"  # all reach each other alike
    IN_RING = "in ring"  # each reaches its neighbours only
    BY_ADDING_SWITCH = "by adding switch"  # it adds and copies what passes


@dataclass(frozen=True, slots=True)
class Needs:
    """What an algorithm needs of the levels of a group that part anything."""

    innermost: Joined = Joined.ANYHOW
    outer: Joined = Joined.ANYHOW  # all but the innermost
    min_levels: int = 0
    max_levels: int = ANY_NUMBER
    # Levels up to which the outline is right where a switch limits all that passes it, or both directions share a wire.
    # Pools take it that all members send and receive alike, at one level at a time: 0 where they do not, 1 where
    # messages of one round cross several levels.
    most_shared: int = ANY_NUMBER


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One algorithm for some operations; another may have the same name for other operations."""

    name: str
    rank: int  # a module's own: of equally fast algorithms that of the lowest rank is taken, then the first of a module
    ops: tuple[Op, ...]
    make: Callable[[Op, Ranks], Schedule]
    # From operation, bytes and levels, and where `cut` is given pieces: what representative chips send, None where the
    # algorithm does not suit.
    sketch: Callable[..., Outline | None]
    cut: Callable[[Op, float, Levels], int] | None = None  # in how many pieces a buffer goes
    needs: Needs = Needs()
    rail_aligned: bool = False  # messages between subgroups join members with the same inner digits
    by_default: bool = True  # else it is only looked at where a library offers it
    is_hierarchy: bool = False  # may be laid out over subgroups that a topology suggests
    to_all_at_once: bool = False  # a chip sends to all others in one round
    peers: Callable[[Levels], int] | None = (
        None  # with how many others of a level a chip exchanges parts at once
    )
    in_ranges: bool = True  # what a rank holds of one level is one range of chunks
    adding_switches: int = 0  # levels from the inside whose switches add: these are helper ranks
    hidden_latency_s: Callable[[Levels], float] | None = None  # in adding switches, which no message shows

    def outline(self, op: Op, nbytes: float, levels: Levels) -> Outline | None:
        """What representative chips send; None where the algorithm does not suit these levels."""
        if not self.suits(op, levels):
            return None
        if self.cut is None:
            return self.sketch(op, nbytes, levels)
        return self.sketch(op, nbytes, levels, self.cut(op, nbytes, levels))

    def schedule(self, op: Op, num_ranks: int, nbytes: float, levels: Levels) -> Schedule:
        """The messages of all ranks. Without levels the group counts as one flat level."""
        pieces = self.cut(op, nbytes, levels) if self.cut is not None and levels else 1
        return self.make(op, Ranks.over(levels, num_ranks, pieces))

    def suits(self, op: Op, levels: Levels) -> bool:
        """Whether levels are as the algorithm needs them; its outline may still be None."""
        needs = self.needs
        parting = [level for level in levels if level.fanout > 1]
        if not needs.min_levels <= len(parting) <= needs.max_levels:
            return False
        if parting and not _is_joined(parting[0], needs.innermost):
            return False
        if needs.outer is not Joined.ANYHOW and not all(
            _is_joined(each, needs.outer) for each in parting[1:]
        ):
            return False
        # A root's collective does not have all members send and receive alike either.
        limit = 0 if op in ROOTED else needs.most_shared
        return len(levels) <= limit or not any(level.shared for level in levels)

    def has_many_peers(self, op: Op, levels: Levels) -> bool:
        """Whether each chip of a hierarchy exchanges parts with more than MOST_PEERS others of one level at once.

        Libraries keep connections and buffers for a few, and what a message costs by itself is not modelled. Who
        scatters, gathers or sends everyone something else has no other way.
        """
        return self.peers is not None and op not in MANY_PEERS and self.peers(levels) > MOST_PEERS


def cut_by(
    rule: Callable[[Outline], int], sketch: Callable[..., Outline | None]
) -> Callable[[Op, float, Levels], int]:
    """As many pieces as a rule says of an outline in one piece; one where there is none."""

    def pieces(op: Op, nbytes: float, levels: Levels) -> int:
        whole = sketch(op, nbytes, levels)
        return rule(whole) if whole is not None else 1

    return pieces


def algorithms(op: Op) -> Mapping[str, Algorithm]:
    """All for an operation by name: of equally fast ones the first is taken."""
    return _by_op()[op]


def algorithm_of(op: Op, name: str) -> Algorithm:
    """The one by a name that is known."""
    return algorithms(op)[name]


def names(op: Op) -> tuple[str, ...]:
    """The names of all for an operation."""
    return tuple(algorithms(op))


def considered(op: Op, num_chips: int) -> tuple[str, ...]:
    """What an automatic choice looks at where libraries do not say what they offer.

    Not that each chip exchanges parts with more than MOST_PEERS others at once where there are other ways.
    """
    has_few = num_chips <= MOST_PEERS + 1 or op in MANY_PEERS
    return tuple(
        name
        for name, each in algorithms(op).items()
        if each.by_default and (has_few or not each.to_all_at_once)
    )


def spans(levels: Levels) -> tuple[tuple[Level, int], ...]:
    """The levels that part anything, each with the members of one subgroup inside it."""
    inner = accumulate((level.fanout for level in levels), mul, initial=1)
    return tuple((level, size) for level, size in zip(levels, inner, strict=False) if level.fanout > 1)


@cache
def _by_op() -> Mapping[Op, Mapping[str, Algorithm]]:
    package = import_module("comms.algorithms")
    modules = [import_module(each.name) for each in walk_packages(package.__path__, f"{package.__name__}.")]
    found = [each for module in modules for each in getattr(module, "ALGORITHMS", ())]
    found.sort(key=lambda each: each.rank)
    return {op: {each.name: each for each in found if op in each.ops} for op in Op}


def _is_joined(level: Level, joined: Joined) -> bool:
    if joined is Joined.BY_SWITCH:
        return not level.ring
    if joined is Joined.IN_RING:
        return level.ring
    return joined is Joined.ANYHOW or level.reduces
