"""Sweep files: over which numbers of chips a job is scaled, what varies besides, and what is measured here.

A sweep is a cluster, a job, and the product of all that varies. Which batch a point has follows from its mode alone
(`Scaling`), so that weak and strong scaling are that by construction. Not here: what a point comes to (`sweeps`).
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.config.schema import WHOLE, Section, field_error, word_field

Positive = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0)]


class Scaling(StrEnum):
    """Weak: the global batch grows in proportion to the chips. Strong: it is the same for all."""

    WEAK = "weak"
    STRONG = "strong"


class Measured(StrEnum):
    """Who runs the points that are measured: this process, or Ray actors."""

    INLINE = "inline"
    RAY = "ray"


class VarySection(Section):
    """Values that are tried, each with each. `bandwidth` and `latency` multiply those of every link of the network."""

    model: list[str] = Field(default_factory=list)
    batch: list[Positive] = Field(
        default_factory=list
    )  # global batch: of all chips (strong), of the fewest (weak)
    seq: list[Positive] = Field(default_factory=list)
    bandwidth: list[Factor] = Field(default_factory=list)
    latency: list[Factor] = Field(default_factory=list)
    # auto, or degrees that are fixed: tp8, tp4-pp2-zero1
    plan: list[Annotated[str, Field(pattern=r"^(auto|((dp|tp|pp|zero)\d+)(-(dp|tp|pp|zero)\d+)*)$")]] = Field(
        default_factory=list
    )
    actors: list[Positive] = Field(default_factory=list)  # processes of what is measured


class MeasureSection(Section):
    """Real short trainings on simulated chips of this machine, of points with few chips."""

    runner: Annotated[Measured, word_field(Measured)] = Measured.INLINE
    steps: Annotated[int, Field(ge=3)] = 8  # of each; the first two, which warm up, are not counted
    most_chips: Positive = 16


class SweepFile(Section):
    """One sweep file."""

    kind: Literal["sweep"]
    version: Annotated[Literal[1], WHOLE]
    cluster: str = "laptop"  # a file (from the folder of this one), or the name of a shipped one
    job: str | None = None  # a file; without one, the defaults
    overrides: list[str] = Field(default_factory=list, alias="set")  # over the job: a.b=c
    chips: Annotated[list[Positive], Field(min_length=1)]
    modes: Annotated[list[Annotated[Scaling, word_field(Scaling)]], Field(min_length=1)] = Field(
        default_factory=lambda: [Scaling.WEAK]
    )
    # of weak scaling, samples; without it, the global batch of the job over the fewest chips
    batch_per_chip: Factor | None = None
    vary: VarySection = Field(default_factory=VarySection)
    measure: MeasureSection | None = None

    @model_validator(mode="after")
    def _all_reaches_someone(self) -> "SweepFile":
        if self.batch_per_chip is not None and Scaling.WEAK not in self.modes:
            raise field_error("batch_per_chip is of weak scaling", "add weak to modes", "batch_per_chip")
        if self.batch_per_chip is not None and self.vary.batch:
            raise field_error("batch_per_chip beside vary.batch", "leave one out", "batch_per_chip")
        if self.vary.actors and self.measure is None:
            raise field_error("actors run what is measured, and nothing is", "add measure", "vary", "actors")
        for name, values in (("chips", self.chips), ("modes", self.modes)):
            if len(set(values)) < len(values):
                raise field_error(f"{name} has a value twice", "leave one out", name)
        return self
