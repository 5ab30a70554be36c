"""Tokens/s of 8 simulated chips (dp2 tp2 pp2) over a plain PyTorch loop: one process, same global batch, same cores.

Steps of all candidates alternate in one run, so that a busy machine slows all alike; the figure is the median of the
step-by-step ratios.   python benchmarks/throughput.py [--rounds 7] [--no-ray]
"""

import argparse
import time
from collections.abc import Callable

import torch
from support.harness import median, report, seconds_of

from comms.selection.progress import quiet
from kernels.optimizers import same_kind
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.planning.job_parts import build_model, job_optimizer
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.executing.chip_set import InlineLaunch
from orchestrator.runners.runner import Settings, StepRequest, TensorRunner
from orchestrator.runners.timing.fastest_plan import prepare
from orchestrator.runs.data import split_batch

JOB = (
    "model=builtin:gpt-10m",
    "seq=256",
    "global_batch=32",
    "microbatches=4",
    "plan.dp=2",
    "plan.tp=2",
    "plan.pp=2",
)
LR = 1e-3


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-ray", action="store_true")
    options = parser.parse_args()
    cluster = load_cluster(cluster_path("laptop"))
    prepared = prepare(cluster, load_job(None, JOB))
    batch = random_batch(prepared)
    program, settings = prepared.program, settings_of(prepared)
    runners: dict[str, TensorRunner] = {"inline": InlineLaunch(cluster).connect(program, settings, quiet)}
    if not options.no_ray:
        from orchestrator.runners.on_ray.ray_launch import RayLaunch

        runners["ray, 2 actors"] = RayLaunch(cluster).connect(program, settings, quiet)
    candidates: dict[str, Callable[[], object]] = {"plain PyTorch": plain_loop(prepared, batch)}
    for name, runner in runners.items():
        candidates[name] = stepper(runner, prepared, batch)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for step in candidates.values():
        step()  # warm up
    for _ in range(options.rounds):
        for name, step in candidates.items():
            times[name].append(seconds_of(step))
    for runner in runners.values():
        runner.close()
    tokens = prepared.job.global_batch * prepared.job.seq
    rows = []
    for name, seconds in times.items():
        ratios = [plain / own for plain, own in zip(times["plain PyTorch"], seconds, strict=True)]
        rows.append({"runner": name, "tokens_per_s": tokens / median(seconds), "over_plain": median(ratios),
                     "worst_round": min(ratios), "best_round": max(ratios), "rounds": len(seconds)})  # fmt: skip
    report("throughput", rows)


def settings_of(prepared: Prepared) -> Settings:
    """The job's optimizer and clipping."""
    optimizer = job_optimizer(prepared.job, build_model(prepared.job, "cpu").module)
    return Settings(same_kind(optimizer), prepared.job.clip_norm)


def random_batch(prepared: Prepared) -> dict[str, torch.Tensor]:
    """A global batch of random bytes."""
    job = prepared.job
    generator = torch.Generator().manual_seed(0)
    shape = (job.global_batch, job.seq)
    return {name: torch.randint(0, 256, shape, generator=generator) for name in ("input_ids", "labels")}


def plain_loop(prepared: Prepared, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    """The usual training step on all cores."""
    module = build_model(prepared.job, "cpu").module
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        module(**batch).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return step


def stepper(runner: TensorRunner, prepared: Prepared, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    """One step of a runner that has the model's parameters."""
    module = build_model(prepared.job, "cpu").module
    values = {f"params:{k}": v.detach() for k, v in module.named_parameters()}
    values |= {f"buffer:{k}": v for k, v in module.named_buffers()}
    runner.load(values.__getitem__)
    batches = split_batch(batch, prepared.program)
    return lambda: runner.run(StepRequest("step", LR, batches))


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"took {time.perf_counter() - start:.0f} s")
