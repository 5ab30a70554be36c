"""What a chip must do: a model captured, laid out over chips, cut into stages and lowered to one Program per role.

    program = partitioner.partition(module, batch, partitioner.Plan(dp=2, tp=2))

What is here is the interface for Python; it is imported when first used, so that `import partitioner` loads no torch.
"""

from typing import TYPE_CHECKING

from lazy_loader import attach

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

__getattr__, __dir__, __all__ = attach(
    __name__,
    submod_attrs={
        "capture.graph_units": ["capture_graph"],
        "layout.parallel_plan": ["Plan", "plan_from_yaml", "plan_to_yaml"],
        "layout.pipeline_schedules": ["PipelineSchedule"],
        "lowering.lower": ["StepShape", "lower", "partition"],
        "program.machine": ["Machine"],
        "program.peak_memory": ["peak_memory"],
        "program.program": ["Program"],
        "program.program_codec": ["decode", "encode"],
        "program.program_text": ["to_text"],
        "program.static_check": ["check_program"],
    },
)
