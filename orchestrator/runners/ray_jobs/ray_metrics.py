"""Ray metrics: what a run is doing, in the cluster's dashboard and for who collects its metrics (Prometheus).

Gauges of Ray's own, named `ray_orchestrate_...` at every node's metrics port, with the run as a tag.
"""

from collections.abc import Mapping
from typing import Any

SHOWN = {  # what a step's record calls it, and what it is
    "step": "steps that are done",
    "loss": "loss of the last step",
    "grad_norm": "norm of its gradients",
    "step_time_s": "seconds that it took",
    "tokens_per_s": "tokens, or samples of what has none, per second",
    "predicted_step_time_s": "seconds that it takes on the chips that the cluster file describes",
}


class RayMetrics:
    """A sink of a run that is on a cluster of Ray's."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._gauges: dict[str, Any] = {}
        for name, said in SHOWN.items():
            gauge = Gauge(f"orchestrate_{name}", description=said, tag_keys=("run",))
            gauge.set_default_tags({"run": run})
            self._gauges[name] = gauge

    def __call__(self, record: Mapping[str, object]) -> None:
        """The numbers of a step."""
        for name, gauge in self._gauges.items():
            if isinstance(value := record.get(name), int | float):
                gauge.set(value)
