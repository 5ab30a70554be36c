"""orchestrate: plan, simulate and run the training of any PyTorch model on a described cluster of chips.

The functions here are the whole Python interface. They are imported when first used, so that `import orchestrator`
costs neither torch nor ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.config.hardware.cluster_file import load_cluster
    from orchestrator.config.job_file import load_job
    from orchestrator.runners.timing.prediction import simulate
    from orchestrator.verbs.distribute import distribute
    from orchestrator.verbs.plan import partition
    from orchestrator.verbs.train import run
    from orchestrator.verbs.verify import verify

__all__ = ["distribute", "load_cluster", "load_job", "partition", "run", "simulate", "verify"]

_HOMES = {
    "distribute": "orchestrator.verbs.distribute",
    "load_cluster": "orchestrator.config.hardware.cluster_file",
    "load_job": "orchestrator.config.job_file",
    "partition": "orchestrator.verbs.plan",
    "run": "orchestrator.verbs.train",
    "simulate": "orchestrator.runners.timing.prediction",
    "verify": "orchestrator.verbs.verify",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
