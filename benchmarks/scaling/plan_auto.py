"""`--plan auto` against exhaustive search: in each case every plan that the job leaves open is simulated.

The best of those that fit is compared with the plan that is taken, both by what `simulate` says of the taken plan's own
Program. Twenty cases of models, clusters, chips and batches.   python -m scaling.plan_auto [--cases 20]
"""

import argparse
import time

from support.harness import report

from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import Job, load_job
from orchestrator.planning.job_capture import JobCapture
from orchestrator.planning.plan_space import open_plans, samples_of
from orchestrator.planning.sketches import Sketches
from orchestrator.runners.timing.fastest_plan import fastest_plan, prepare
from orchestrator.runners.timing.prediction import simulate
from partitioner.layout.parallel_plan import Plan

# model, cluster, chips, global batch, seq, more of the job
CASES: tuple[tuple[str, str, int, int, int, tuple[str, ...]], ...] = (
    ("builtin:gpt-nano", "laptop", 8, 16, 64, ()),
    ("builtin:gpt-mini", "laptop", 8, 32, 128, ()),
    ("builtin:gpt-mini", "two-host-ethernet", 4, 16, 128, ()),
    ("builtin:gpt-small", "laptop", 8, 8, 512, ("dtype=bf16",)),
    ("builtin:gpt-small", "pcie-workstation", 4, 8, 1024, ("dtype=bf16",)),
    ("builtin:gpt-small", "dgx-a100", 8, 32, 1024, ("dtype=bf16",)),
    ("builtin:gpt-small", "dgx-a100", 64, 64, 1024, ("dtype=bf16",)),
    ("builtin:gpt-medium", "dgx-a100", 16, 16, 1024, ("dtype=bf16",)),
    ("builtin:gpt-medium", "dgx-h100-superpod", 32, 64, 1024, ("dtype=bf16",)),
    ("builtin:gpt-large", "tenstorrent-galaxy", 32, 32, 1024, ("dtype=bf16",)),
    ("builtin:gpt-1.3b", "dgx-a100", 8, 16, 2048, ("dtype=bf16",)),
    ("builtin:gpt-1.3b", "dgx-a100", 64, 64, 2048, ("dtype=bf16",)),
    ("builtin:gpt-1.3b", "dgx-a100", 1024, 512, 2048, ("dtype=bf16",)),
    ("builtin:gpt-1.3b", "dgx-a100", 1024, 1024, 2048, ("dtype=bf16",)),
    ("builtin:gpt-1.3b", "laptop", 8, 16, 2048, ("dtype=bf16",)),
    ("builtin:gpt-2.7b", "dgx-h100-superpod", 16, 32, 2048, ("dtype=bf16",)),
    ("builtin:gpt-2.7b", "tpu-v5p-pod", 64, 64, 2048, ("dtype=bf16",)),
    ("builtin:gpt-6.7b", "dgx-a100", 32, 32, 2048, ("dtype=bf16",)),
    ("builtin:gpt-6.7b", "dgx-a100", 128, 32, 2048, ("dtype=bf16", "plan.zero=1")),
    ("builtin:gpt-13b", "dgx-a100", 64, 32, 2048, ("dtype=bf16",)),
)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=len(CASES))
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for case in CASES[: options.cases]:
        rows.append(compared(*case))
        report("plan_auto", rows)  # what is there is kept


def compared(
    model: str, cluster_name: str, chips: int, batch: int, seq: int, more: tuple[str, ...]
) -> dict[str, object]:
    """One case."""
    cluster = load_cluster(cluster_path(cluster_name)).take(chips)
    job = load_job(None, (f"model={model}", f"global_batch={batch}", f"seq={seq}", *more))
    capture = JobCapture(job)
    started = time.process_time()
    taken = fastest_plan(cluster, capture)
    searched = time.process_time() - started
    sketches = Sketches(capture, samples_of(open_plans(job, cluster, chips), batch))
    plans = open_plans(job, cluster, sketches.num_units)
    started = time.process_time()
    times = {
        plan: seconds for plan in plans if (seconds := exhausted(plan, job, cluster, sketches)) is not None
    }
    everything = time.process_time() - started
    best = min(times, key=lambda plan: times[plan])
    auto = simulate(prepare(cluster, job, taken, capture=capture).program, cluster)
    return {
        "model": model, "cluster": cluster_name, "chips": chips, "global_batch": batch, "plans": len(plans),
        "fit": len(times), "taken": str(taken), "best": str(best), "taken_step_s": auto.step_time_s,
        "best_step_s": times[best], "taken_over_best": auto.step_time_s / times[best], "taken_fits": auto.fits,
        "median_over_best": sorted(times.values())[len(times) // 2] / times[best],
        "search_cpu_s": searched, "exhaustive_cpu_s": everything,
    }  # fmt: skip


def exhausted(plan: Plan, job: Job, cluster: Cluster, sketches: Sketches) -> float | None:
    """Seconds of a step; None for what does not fit, or cannot be split so."""
    samples = job.global_batch // (plan.dp * plan.microbatches)
    program = sketches.program(plan, samples)
    result = simulate(program, cluster)
    return result.step_time_s if result.fits else None


if __name__ == "__main__":
    main()
