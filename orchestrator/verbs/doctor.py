"""doctor: is this machine ready to plan, simulate and train?

Each finding is ok, warn (works, but less well) or fail (something will not work), with what to do about it. Modules
are asked for their versions without importing them, except torch and ray, whose import is itself the question. No
actor is started and nothing is written.
"""

import importlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from types import ModuleType

import psutil

from orchestrator.verbs.inputs.options import DoctorOptions
from orchestrator.views.console import Console, Table

TORCH = "2.13.0"  # capture and sharding use private interfaces of exactly this one
GIB = 2**30
MIN_MEMORY = 4 * GIB  # Ray, two actors and the default model take about half of it
MIN_SHARED_MEMORY = 1 * GIB  # tensors between actors on one host pass through here
SHARED_MEMORY = Path("/dev/shm")
REQUIRED = ("numpy", "scipy", "networkx", "numba", "lazy_loader", "msgpack", "pyzmq", "pydantic", "pyyaml", "typer",
            "rich", "psutil", "safetensors", "matplotlib")  # fmt: skip


class Severity(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One thing that was looked at: what was found, and what to do unless it is ok; its figures by themselves."""

    name: str
    level: Severity
    found: str
    remedy: str = ""
    figures: Mapping[str, object] = field(default_factory=dict)


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


def judged(
    name: str, found: str, is_fine: bool, remedy: str, otherwise: Severity = Severity.WARN
) -> Diagnosis:
    """There is nothing to do about what is fine."""
    return Diagnosis(name, Severity.OK, found) if is_fine else Diagnosis(name, otherwise, found, remedy)


def _python() -> Iterator[Diagnosis]:
    version = platform.python_version_tuple()
    fits = (3, 11) <= (int(version[0]), int(version[1])) < (3, 14)
    remedy = "use Python 3.11, 3.12 or 3.13"
    yield judged("python", platform.python_version(), fits, remedy, Severity.FAIL)


def _packages() -> Iterator[Diagnosis]:
    for name in REQUIRED:
        yield _package(name, f"pip install {name}", Severity.FAIL)


def _package(name: str, remedy: str, otherwise: Severity, missing: str = "not installed") -> Diagnosis:
    version = installed(name)
    return judged(name, version or missing, version is not None, remedy, otherwise)


def _torch() -> Iterator[Diagnosis]:
    version = installed("torch")
    if version is None:
        yield _package("torch", f"pip install torch=={TORCH}", Severity.FAIL)
        return
    yield torch_version(version)
    torch = _imported("torch")
    if isinstance(torch, Exception):
        yield Diagnosis("torch import", Severity.FAIL, str(torch), f"reinstall: pip install torch=={TORCH}")
        return
    threads = f"{torch.get_num_threads()} (one per simulated chip in a run)"
    yield Diagnosis("torch threads", Severity.OK, threads, figures={"threads": torch.get_num_threads()})
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = ", ".join(devices) or "none: chips are simulated or CPU cores"
    yield Diagnosis("CUDA devices", Severity.OK, found, figures={"devices": devices})


def torch_version(version: str) -> Diagnosis:
    """Whether this build of torch is the one that orchestrate is written against."""
    is_ours = version.split("+")[0] == TORCH
    found = version if is_ours else f"{version}, not {TORCH}"
    return judged("torch", found, is_ours, f"pip install torch=={TORCH}", Severity.FAIL)


def _ray() -> Iterator[Diagnosis]:
    version = installed("ray")
    ray = None if version is None else _imported("ray")
    if isinstance(ray, Exception):
        found = f"{version} does not import: {ray}"
        yield Diagnosis("ray", Severity.WARN, found, "train with --runner inline")
    else:
        yield _package("ray", "pip install ray, or train with --runner inline", Severity.WARN)


def _imported(name: str) -> ModuleType | Exception:
    """The module, or why it does not import."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        return error


def _processor() -> Iterator[Diagnosis]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    remedy = "actors on one core take turns: use --runner inline"
    yield replace(judged("CPU cores", f"{usable} usable", usable >= 2, remedy), figures={"cores": usable})


def _memory() -> Iterator[Diagnosis]:
    memory = psutil.virtual_memory()
    remedy = "close programs, or train a smaller model"
    yield room("memory", memory.available, memory.total, MIN_MEMORY, remedy)


def _shared_memory() -> Iterator[Diagnosis]:
    if not SHARED_MEMORY.is_dir():
        yield Diagnosis(str(SHARED_MEMORY), Severity.WARN, "missing", "actors on one host will be slower")
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    remedy = "enlarge it (in a container: --shm-size=2g), or use --runner inline"
    yield room(str(SHARED_MEMORY), usage.free, usage.total, MIN_SHARED_MEMORY, remedy)


def room(name: str, free: int, total: int, needed: int, remedy: str) -> Diagnosis:
    """A warning where fewer than `needed` bytes are free; in GiB, the unit that machines are sold and limited in."""
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    figures = {"free_bytes": free, "total_bytes": total, "needed_bytes": needed}
    return replace(judged(name, found, free >= needed, remedy), figures=figures)


def _transformers() -> Iterator[Diagnosis]:
    remedy = "pip install 'orchestrate-chips[hf]'"
    yield _package("transformers", remedy, Severity.WARN, "not installed: no hf: models")


def _name_clash() -> Iterator[Diagnosis]:
    yield kernels_clash(metadata.packages_distributions().get("kernels", []))


def kernels_clash(owners: list[str]) -> Diagnosis:
    """Another distribution installs a `kernels` package over ours, or is taken for it by transformers."""
    others = sorted({owner for owner in owners if owner != "orchestrate-chips"})
    found = f"also installed by {', '.join(others)}" if others else "ours alone"
    remedy = f"pip uninstall {' '.join(others)}, then reinstall ours"
    return judged("kernels package", found, not others, remedy, Severity.FAIL)


def installed(name: str) -> str | None:
    """The installed version of a distribution; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


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
