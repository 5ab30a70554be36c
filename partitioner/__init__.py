"""What a chip must do: a model captured, laid out over chips, cut into stages and lowered to one Program per role.

    program = partitioner.partition(module, batch, partitioner.Plan(dp=2, tp=2))

What is here is the interface for Python; it is imported when first used, so that `import partitioner` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partitioner.capture.graph_units import capture_graph
    from partitioner.layout.parallel_plan import Plan, plan_from_yaml, plan_to_yaml
    from partitioner.layout.pipeline_schedules import PipelineSchedule
    from partitioner.lowering.lower import StepShape, lower, partition
    from partitioner.program.machine import Machine
    from partitioner.program.peak_memory import peak_memory
    from partitioner.program.program import Program
    from partitioner.program.program_codec import decode, encode
    from partitioner.program.program_text import to_text
    from partitioner.program.static_check import check_program

__all__ = [
    "Machine",
    "PipelineSchedule",
    "Plan",
    "Program",
    "StepShape",
    "capture_graph",
    "check_program",
    "decode",
    "encode",
    "lower",
    "partition",
    "peak_memory",
    "plan_from_yaml",
    "plan_to_yaml",
    "to_text",
]

_HOMES = {
    "Machine": "partitioner.program.machine",
    "PipelineSchedule": "partitioner.layout.pipeline_schedules",
    "Plan": "partitioner.layout.parallel_plan",
    "Program": "partitioner.program.program",
    "StepShape": "partitioner.lowering.lower",
    "capture_graph": "partitioner.capture.graph_units",
    "check_program": "partitioner.program.static_check",
    "decode": "partitioner.program.program_codec",
    "encode": "partitioner.program.program_codec",
    "lower": "partitioner.lowering.lower",
    "partition": "partitioner.lowering.lower",
    "peak_memory": "partitioner.program.peak_memory",
    "plan_from_yaml": "partitioner.layout.parallel_plan",
    "plan_to_yaml": "partitioner.layout.parallel_plan",
    "to_text": "partitioner.program.program_text",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
