"""The `conditions:` of a cluster file: what is slow, down, flapping, late or busy, from text to frozen values.

A link is named by two chips that it joins (`from: chip 3, to: chip 4`), or by a chip and a tier (`chip: 7, tier:
scale-out`); tiers by their name, or by their kind, which is the innermost tier of that kind. Chips are numbers,
ranges such as 0-63, or lists of both. What all of this does to a network is said in `conditions`.
"""

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from comms.collectives.schedule import Op
from comms.errors import located
from comms.networks.conditions import (
    Background,
    Between,
    ChipFault,
    Described,
    Flaps,
    Jitter,
    LinkFault,
    Reach,
    check_chips,
)
from comms.networks.network import Network, TierKind
from orchestrator.config.hardware.network_sections import MOST_CHIPS
from orchestrator.config.schema import FieldType, Section, Size, Time, field_error, nearest, word_field
from orchestrator.config.yaml_file import Document

_CHIP = re.compile(r"\s*(?:chip\s*)?([0-9]+)\s*")
_RANGE = re.compile(r"\s*([0-9]+)\s*-\s*([0-9]+)\s*")
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*%\s*")


def _one_chip(value: object) -> int:
    """The number of `3` or `chip 3`."""
    match = _CHIP.fullmatch(str(value))
    if match is None or isinstance(value, bool):
        raise field_error(f"{value!r} is not a chip", "write its number, such as `chip 3`")
    return _number(match.group(1))


def _number(digits: str) -> int:
    """The number of a chip that there may be. Numbers of thousands of digits are not even read."""
    number = int(digits) if len(digits) < 20 else MOST_CHIPS
    if number >= MOST_CHIPS:
        raise field_error(f"no cluster has a chip {digits[:20]}", f"chips are 0 to {MOST_CHIPS - 1}")
    return number


def _chip_numbers(value: object) -> tuple[int, ...]:
    """The numbers of `3`, `0-63` or `[0, 8, 16-31]`, as given, each once."""
    if isinstance(value, list):
        return tuple(dict.fromkeys(chip for part in value for chip in _chip_numbers(part)))
    match = _RANGE.fullmatch(str(value))
    if match is None:
        return (_one_chip(value),)
    first, last = _number(match.group(1)), _number(match.group(2))
    if last < first:
        raise field_error(f"the range {value!r} is empty", "write the smaller number first")
    return tuple(range(first, last + 1))


def _part(value: object) -> float:
    """A part of a whole, `5 %` or `0.05`, as a number from 0, below 1."""
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    part = float(match.group(1)) / 100 if match else value
    if isinstance(part, bool) or not isinstance(part, int | float) or not 0 <= part < 1:
        raise field_error(f"{value!r} is not a part of a whole", "write it like `5 %` or 0.05, below 1")
    return float(part)


_ONE_CHIP = {"type": ["integer", "string"], "examples": [3, "chip 3"]}
_CHIPS = {"type": ["integer", "string", "array"], "examples": [3, "0-63", [0, 8, "16-31"]]}
_PART = {"type": ["number", "string"], "examples": ["5 %", 0.05]}
AChip: TypeAlias = Annotated[int, FieldType(_one_chip, _ONE_CHIP)]
Chips: TypeAlias = Annotated[tuple[int, ...], FieldType(_chip_numbers, _CHIPS)]
Part: TypeAlias = Annotated[float, FieldType(_part, _PART)]


class FlapsSection(Section):
    """Down for a while, again and again; `first` is the first time."""

    down: Time
    every: Time
    first: Time = 0.0


class LinkFaultSection(Section):
    """What is wrong with a link: one of `factor` (of its rate), `down`, `flaps`."""

    from_: AChip | None = Field(None, alias="from")
    to: AChip | None = None
    one_way: bool = False
    chip: Chips | None = None
    tier: str | None = None
    path: int | None = Field(None, ge=0)
    factor: float | None = Field(None, gt=0, le=1)
    down: Literal[True] | None = None
    flaps: FlapsSection | None = None


class ChipFaultSection(Section):
    """Chips that are slow (`slowdown`: times as long for all work) or late (`delay` before each message)."""

    chip: Chips
    slowdown: float = Field(1.0, ge=1)
    delay: Time = 0.0


class JitterSection(Section):
    """Rates of links off by up to a part, messages late by a mean time."""

    rate: Part = 0.0
    delay: Time = 0.0


class BackgroundSection(Section):
    """A collective of other jobs, over and over again."""

    op: Annotated[Op, word_field(tuple(Op)[:-1])]  # all but the last: a barrier moves nothing
    chips: Chips
    size: Size


class ConditionsSection(Section):
    """How the hardware differs from its data sheets; a healthy network by default."""

    seed: int = Field(0, ge=0)
    links: list[LinkFaultSection] = Field(default_factory=list)
    chips: list[ChipFaultSection] = Field(default_factory=list)
    jitter: JitterSection | None = None
    background: list[BackgroundSection] = Field(default_factory=list)


def described(
    section: ConditionsSection, network: Network, num_chips: int | None, here: Document
) -> Described:
    """The conditions of a file, on a network of `num_chips` (None: any number). Raises ClusterError."""
    jitter = section.jitter
    if jitter is not None and not jitter.rate and not jitter.delay:
        raise here.error("this jitter has no effect", "give `rate:` or `delay:`", "jitter")
    if "seed" in section.model_fields_set and jitter is None:
        raise here.error("`seed` has no effect without `jitter`", "remove it, or add `jitter:`", "seed")
    found = Described(
        links=tuple(_link(each, network, here.inside("links", at)) for at, each in enumerate(section.links)),
        chips=tuple(_chip(each, here.inside("chips", at)) for at, each in enumerate(section.chips)),
        jitter=Jitter() if jitter is None else Jitter(jitter.rate, jitter.delay),
        seed=section.seed,
        background=tuple(
            _background(each, here.inside("background", at)) for at, each in enumerate(section.background)
        ),
    )
    if num_chips is not None:
        check_chips(found, num_chips)
    return found


def _link(section: LinkFaultSection, network: Network, at: Document) -> LinkFault:
    ends, reach = (section.from_, section.to), (section.chip, section.tier)
    named = [[part is not None for part in parts] for parts in (ends, reach)]
    if named not in ([[True, True], [False, False]], [[False, False], [True, True]]):
        hint = "give `from:` and `to:`, or `chip:` and `tier:`"
        raise at.error("it is not clear which link is meant", hint)
    effects = (section.factor, section.down, section.flaps)
    if sum(effect is not None for effect in effects) != 1:
        hint = "give one of `factor:`, `down: true` and `flaps:`"
        raise at.error("it is not clear what is wrong with the link", hint)
    if section.factor == 1:
        raise at.error("a factor of 1 has no effect", "give a factor below 1")
    flaps, times = None, section.flaps
    if times is not None:
        with located(at.where("flaps")):
            flaps = Flaps(times.down, times.every, times.first)
    factor = 0.0 if section.down else 1.0 if section.factor is None else section.factor
    return LinkFault(_which(section, network, at), factor, flaps, at.where())


def _which(section: LinkFaultSection, network: Network, at: Document) -> Between | Reach:
    if section.from_ is not None and section.to is not None:
        if section.from_ == section.to:
            raise at.error(f"a link from chip {section.to} to itself", "name two chips")
        if section.path is not None:
            raise at.error("`path` has no effect between two chips", "remove it")
        return Between(section.from_, section.to, not section.one_way)
    assert section.chip is not None and section.tier is not None
    if section.one_way:
        raise at.error("`one_way` has no effect on a chip's links in a tier", "remove it")
    return Reach(section.chip, _tier(section.tier, network, at), section.path)


def _tier(word: str, network: Network, at: Document) -> str:
    """The tier of that name, or the innermost of that kind. Raises ClusterError."""
    tiers = [tier for tier in network.tiers if tier.size > 1]
    known: dict[str, str] = {}
    for kind in TierKind:
        of_kind = [tier.name for tier in tiers if tier.kind == kind]
        known |= {kind.replace("_", "-"): name for name in of_kind[:1]}
    known |= {tier.name: tier.name for tier in tiers}
    if word not in known:
        raise at.error(f"there is no tier {word!r}", nearest(word, known), "tier")
    return known[word]


def _chip(section: ChipFaultSection, at: Document) -> ChipFault:
    if section.slowdown == 1 and not section.delay:
        raise at.error("this has no effect on the chip", "give `slowdown:` or `delay:`")
    return ChipFault(section.chip, section.slowdown, section.delay, at.where())


def _background(section: BackgroundSection, at: Document) -> Background:
    if len(section.chips) < 2:
        raise at.error("one chip alone sends nothing", "give at least two chips")
    return Background(section.op, section.chips, section.size, at.where())
