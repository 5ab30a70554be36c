"""orchestrate: plan, simulate and run the training of any PyTorch model on a described cluster of chips.

The functions here are the whole Python interface. They are imported when first used, so that `import orchestrator`
costs neither torch nor ray.
"""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from orchestrator.config.hardware.cluster_file import load_cluster
    from orchestrator.config.job_file import load_job
    from orchestrator.runners.timing.prediction import simulate
    from orchestrator.verbs.distribute import distribute
    from orchestrator.verbs.plan import partition
    from orchestrator.verbs.scale import scale
    from orchestrator.verbs.train import run
    from orchestrator.verbs.verify import verify

__getattr__, __dir__, __all__ = attach(
    __name__,
    submod_attrs={
        "config.hardware.cluster_file": ["load_cluster"],
        "config.job_file": ["load_job"],
        "runners.timing.prediction": ["simulate"],
        "verbs.distribute": ["distribute"],
        "verbs.plan": ["partition"],
        "verbs.scale": ["scale"],
        "verbs.train": ["run"],
        "verbs.verify": ["verify"],
    },
)
