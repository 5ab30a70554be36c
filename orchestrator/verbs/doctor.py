"""doctor: is this machine ready to plan, simulate and train?

Each finding is ok, warn (works, but less well) or fail (something will not work), with what to do about it. Modules
are asked for their versions without importing them, except torch and ray, whose import is itself the question. No
actor is started and nothing is written.
"""

import importlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

import psutil

from orchestrator.verbs.inputs.options import DoctorOptions
from orchestrator.views.console import Console, Table

TORCH = "2.13.0"  # capture and sharding use private interfaces of exactly this one
GIB = 2**30
MIN_MEMORY = 4 * GIB  # Ray, two actors and the default model take about half of it
MIN_SHARED_MEMORY = 1 * GIB  # tensors between actors on one host pass through here
SHARED_MEMORY = Path("/dev/shm")
REQUIRED = ("numpy", "msgpack", "pyzmq", "pydantic", "pyyaml", "typer", "rich", "safetensors", "matplotlib")


class Severity(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One thing that was looked at: what was found, and what to do unless it is ok."""

    name: str
    level: Severity
    found: str
    remedy: str = ""


def main(options: DoctorOptions, console: Console) -> int:
    """Print every finding; 1 if one of them is a failure."""
    findings = doctor()
    ready = all(finding.level is not Severity.FAIL for finding in findings)
    rows = tuple((finding.level.value, finding.name, finding.found, finding.remedy) for finding in findings)
    document = {"ready": ready, "findings": [asdict(finding) for finding in findings]}
    console.results(document, (Table("this machine", rows, ("", "what", "found", "what to do")),))
    return 0 if ready else 1


def doctor() -> tuple[Diagnosis, ...]:
    """Everything looked at, in a fixed order."""
    return tuple(finding for check in CHECKS for finding in check())


def _python() -> Iterator[Diagnosis]:
    version = platform.python_version_tuple()
    fits = (3, 11) <= (int(version[0]), int(version[1])) < (3, 14)
    level = Severity.OK if fits else Severity.FAIL
    yield Diagnosis(
        "python", level, platform.python_version(), "" if fits else "use Python 3.11, 3.12 or 3.13"
    )


def _packages() -> Iterator[Diagnosis]:
    for name in REQUIRED:
        version = installed(name)
        if version is None:
            yield Diagnosis(name, Severity.FAIL, "not installed", f"pip install {name}")
        else:
            yield Diagnosis(name, Severity.OK, version)


def _torch() -> Iterator[Diagnosis]:
    version = installed("torch")
    if version is None:
        yield Diagnosis("torch", Severity.FAIL, "not installed", f"pip install torch=={TORCH}")
        return
    yield torch_version(version)
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        yield Diagnosis("torch import", Severity.FAIL, str(error), f"reinstall: pip install torch=={TORCH}")
        return
    yield Diagnosis(
        "torch threads", Severity.OK, f"{torch.get_num_threads()} (one per simulated chip in a run)"
    )
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield Diagnosis(
        "CUDA devices", Severity.OK, ", ".join(devices) or "none: chips are simulated or CPU cores"
    )


def torch_version(version: str) -> Diagnosis:
    """Whether this build of torch is the one that orchestrate is written against."""
    if version.split("+")[0] == TORCH:
        return Diagnosis("torch", Severity.OK, version)
    return Diagnosis("torch", Severity.FAIL, f"{version}, not {TORCH}", f"pip install torch=={TORCH}")


def _ray() -> Iterator[Diagnosis]:
    version = installed("ray")
    if version is None:
        yield Diagnosis(
            "ray", Severity.WARN, "not installed", "pip install ray, or train with --runner inline"
        )
        return
    try:
        importlib.import_module("ray")
    except (ImportError, OSError) as error:
        yield Diagnosis(
            "ray", Severity.WARN, f"{version} does not import: {error}", "train with --runner inline"
        )
        return
    yield Diagnosis("ray", Severity.OK, version)


def _processor() -> Iterator[Diagnosis]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    remedy = "actors on one core take turns: use --runner inline" if usable < 2 else ""
    yield Diagnosis("CPU cores", Severity.WARN if usable < 2 else Severity.OK, f"{usable} usable", remedy)


def _memory() -> Iterator[Diagnosis]:
    memory = psutil.virtual_memory()
    found = f"{size(memory.available)} free of {size(memory.total)}"
    yield enough("memory", memory.available, MIN_MEMORY, found, "close programs, or train a smaller model")


def _shared_memory() -> Iterator[Diagnosis]:
    if not SHARED_MEMORY.is_dir():
        yield Diagnosis(str(SHARED_MEMORY), Severity.WARN, "missing", "actors on one host will be slower")
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    found = f"{size(usage.free)} free of {size(usage.total)}"
    remedy = "enlarge it (in a container: --shm-size=2g), or use --runner inline"
    yield enough(str(SHARED_MEMORY), usage.free, MIN_SHARED_MEMORY, found, remedy)


def enough(name: str, free: int, needed: int, found: str, remedy: str) -> Diagnosis:
    """A warning where fewer than `needed` bytes are free."""
    return (
        Diagnosis(name, Severity.OK, found)
        if free >= needed
        else Diagnosis(name, Severity.WARN, found, remedy)
    )


def _transformers() -> Iterator[Diagnosis]:
    version = installed("transformers")
    if version is None:
        yield Diagnosis(
            "transformers",
            Severity.WARN,
            "not installed: no hf: models",
            "pip install 'orchestrate-chips[hf]'",
        )
    else:
        yield Diagnosis("transformers", Severity.OK, version)


def _name_clash() -> Iterator[Diagnosis]:
    yield kernels_clash(metadata.packages_distributions().get("kernels", []))


def kernels_clash(owners: list[str]) -> Diagnosis:
    """Another distribution installs a `kernels` package over ours, or is taken for it by transformers."""
    others = sorted({owner for owner in owners if owner != "orchestrate-chips"})
    if not others:
        return Diagnosis("kernels package", Severity.OK, "ours alone")
    found = f"also installed by {', '.join(others)}"
    return Diagnosis(
        "kernels package", Severity.FAIL, found, f"pip uninstall {' '.join(others)}, then reinstall ours"
    )


def installed(name: str) -> str | None:
    """The installed version of a distribution; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def size(nbytes: int) -> str:
    """Bytes as GiB, the unit that machines are sold and limited in."""
    return f"{nbytes / GIB:.1f} GiB"


CHECKS: tuple[Callable[[], Iterator[Diagnosis]], ...] = (
    _python,
    _processor,
    _memory,
    _shared_memory,
    _torch,
    _ray,
    _transformers,
    _name_clash,
    _packages,
)
