"""Manifests of checkpoints: every field with its type and range, and a digest over all of them.

A manifest names tensors as one chip would have them, so that nothing in it depends on a plan. The plan that it was
saved under stands there for the reader, and for the evidence that a run which goes on is the same run: that was made
under it. What is wrong with a file becomes one sentence.
"""

import hashlib
import json
import re
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from comms.errors import PartitionError
from orchestrator.config.schema import Section
from partitioner.layout.parallel_plan import Plan, plan_from_yaml

VERSION = 3
MAX_BYTES = 1 << 30  # of a manifest: a million tensors have a fifth of that
LONGEST = 10**15  # steps, and samples for each of a batch: beyond any run

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Step = Annotated[int, Field(ge=0, le=LONGEST)]
DTYPES = frozenset(
    ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "bool")
) | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


class BadManifest(ValueError):
    """What is wrong with it, in a sentence."""


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"{dtype!r} is no type of numbers")
    return dtype


def _readable(plan: str) -> str:
    try:
        plan_from_yaml(plan)
    except PartitionError as error:
        raise ValueError(error.problem) from error
    return plan


class TensorPart(StrEnum):
    """What a tensor is."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    STATE = "optimizer state"


class TensorEntry(Section):
    """One whole tensor: `name` is that of the parameter or buffer, `state` of what the optimizer keeps of it."""

    part: TensorPart
    name: str
    state: str = ""
    file: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    dtype: Annotated[str, AfterValidator(_known)]

    @property
    def key(self) -> str:
        """Its name in its file."""
        return f"{self.state} of {self.name}" if self.part is TensorPart.STATE else self.name


class FileEntry(Section):
    """One file of tensors."""

    name: Annotated[str, Field(pattern=r"^(model|optimizer)-\d{5}\.safetensors$")]
    nbytes: Annotated[int, Field(ge=8)]
    sha256: Digest


class SeenAgain(Section):
    """What was validated on: how often, digests of the first and last time, whether all were the same."""

    count: Annotated[int, Field(ge=0)] = 0
    digest: str = ""
    is_same: bool = True


class Evidence(Section):
    """What a run that goes on must find again, as it is not in the checkpoint (see `verification.resumed_run`)."""

    data: str
    program: Digest
    last_program: Digest
    settings: dict[str, str]
    batch: str
    validation: SeenAgain
    sources: dict[str, str]
    versions: dict[str, str]


class Manifest(Section):
    """What a checkpoint holds. `sample` is the global index of the next sample, `steps` where the job was to end."""

    format: Literal["orchestrate.checkpoint"] = "orchestrate.checkpoint"
    version: Literal[3] = 3
    step: Step
    steps: Annotated[int, Field(ge=1, le=LONGEST)]
    sample: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]
    plan: Annotated[str, AfterValidator(_readable)]
    rates: tuple[float, ...]
    evidence: Evidence
    files: tuple[FileEntry, ...] = ()
    tensors: tuple[TensorEntry, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        files = [each.name for each in self.files]
        entries = [(each.part is TensorPart.STATE, each.key) for each in self.tensors]
        if len(set(files)) < len(files):
            raise ValueError("a file stands twice")
        if len(set(entries)) < len(entries):
            raise ValueError("a tensor stands twice")
        if {each.file for each in self.tensors} != set(files):
            raise ValueError("tensors and files are not of each other")
        return self

    @property
    def planned(self) -> Plan:
        """The plan that it was saved under."""
        return plan_from_yaml(self.plan)


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as a file's content: its fields, and last the digest of them."""
    fields = manifest.model_dump(mode="json")
    return (json.dumps(fields | {"digest": _digest(fields)}, indent=1) + "\n").encode()


def decode_manifest(data: bytes) -> Manifest:
    """What `encode_manifest` was given. Raises BadManifest for anything else."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadManifest(f"it is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadManifest("it is no JSON object")
    if fields.get("version") != VERSION or type(fields["version"]) is not int:
        said = fields.get("version", "none")
        raise BadManifest(f"its version is {said!r:.20}, this reads version {VERSION}")
    claimed = fields.pop("digest", None)
    try:
        manifest = Manifest.model_validate_json(json.dumps(fields))
    except (ValidationError, ValueError) as error:
        raise BadManifest(_sentence(error)) from error
    if claimed != _digest(fields):
        raise BadManifest("it was changed: its fields do not have its digest")
    return manifest


def _digest(fields: object) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sentence(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return re.sub(r"\s+", " ", str(error))[:200]
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"])) or "it"
    return f"{place}: {first['msg']}"
