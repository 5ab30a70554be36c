"""Checkpoints of each of 12 plans into each: bit-identical when saved at once, and the next loss the same.

cd benchmarks; python -m state.plan_pairs [--plans dp2,tp2] [--no-ray]

Every plan trains STEPS steps and saves. Each of these runs goes on by each plan (`train --resume DIR --plan FILE
--chips N --runner R`): it saves at once, which must hold the same tensors byte for byte, and takes one more step, whose
loss is compared with that of the run that was not moved. One Ray serves all runs with actors.
"""

import argparse
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from support.harness import report

from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.config.yaml_file import read_yaml
from orchestrator.runs.checkpoints.checkpoint_folder import latest, load, open_checkpoint
from orchestrator.runs.metrics import read_metrics
from orchestrator.verbs import train
from orchestrator.verbs.inputs.options import RunnerKind, TrainOptions
from orchestrator.verbs.training import training_loop
from orchestrator.views.console import Console
from partitioner.layout.parallel_plan import Plan, plan_to_yaml

STEPS = 3
LOSS = 1e-6  # relative: losses are about 5, of which float32 tells 5e-7 apart
JOB = (
    "model=builtin:gpt-nano", "model_args={layers: 4, width: 32, heads: 4, max_seq: 16, vocab: 256}", "seq=16",
    "global_batch=8", f"steps={STEPS + 1}", "validation.every=0", "lr_schedule.warmup_steps=1", "checkpoints.keep=9",
)  # fmt: skip
RAY, INLINE = RunnerKind.RAY, RunnerKind.INLINE
PLANS: Mapping[str, tuple[Plan, RunnerKind]] = {
    "one chip": (Plan(), INLINE),
    "dp2": (Plan(dp=2), RAY),
    "dp4": (Plan(dp=4), INLINE),
    "dp2 zero1": (Plan(dp=2, zero=1), INLINE),
    "dp4 zero1 x2": (Plan(dp=4, zero=1, microbatches=2), RAY),
    "tp2": (Plan(tp=2), RAY),
    "tp4": (Plan(tp=4), INLINE),
    "pp2": (Plan(pp=2, microbatches=4), INLINE),
    "pp4": (Plan(pp=4, microbatches=4), RAY),
    "dp2 tp2 zero1": (Plan(dp=2, tp=2, zero=1), INLINE),
    "tp2 pp2": (Plan(tp=2, pp=2, microbatches=2), INLINE),
    "dp2 tp2 pp2 zero1": (Plan(dp=2, tp=2, pp=2, zero=1, microbatches=2), RAY),
}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--no-ray", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: PLANS[name] for name in options.plans.split(",")}
    if options.no_ray:
        chosen = {name: (plan, INLINE) for name, (plan, _) in chosen.items()}
    with tempfile.TemporaryDirectory() as home, shared_ray(any(r is RAY for _, r in chosen.values())):
        rows = []
        for row in measured(Path(home), chosen):
            print(json.dumps(row), flush=True)
            rows.append(row)
    good = sum(bool(row["same bytes"]) and float(str(row["loss differs by"])) <= LOSS for row in rows)
    worst = max(float(str(row["loss differs by"])) for row in rows)
    summary: dict[str, object] = {
        "from": "all",
        "to": f"{good} of {len(rows)} good",
        "loss differs by": worst,
    }
    report("plan_pairs_inline" if options.no_ray else "plan_pairs", [*rows, summary])


@contextmanager
def shared_ray(is_wanted: bool) -> Iterator[None]:
    """A Ray that all runs use, instead of one each."""
    if not is_wanted:
        yield
        return
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    yield
    ray.shutdown()


def measured(home: Path, plans: Mapping[str, tuple[Plan, RunnerKind]]) -> Iterator[dict[str, object]]:
    """A row for each pair."""
    for name, (plan, runner) in plans.items():
        (home / f"{name}.yaml").write_text(plan_to_yaml(plan))
        trained(home / name, plan, runner)
    for source in plans:
        expected = losses(home / source)[-1]
        for target, (plan, runner) in plans.items():
            folder = home / "moved"
            shutil.copytree(home / source, folder)
            drop_last(folder)
            go_on(folder, home / f"{target}.yaml", plan.num_chips, runner)
            found = losses(folder)
            yield {
                "from": source, "to": target, "runner": runner.value,
                "same bytes": same_bytes(home / source, folder),
                "loss differs by": abs(found[-1] - expected) / expected, "steps": len(found),
            }  # fmt: skip
            shutil.rmtree(folder)


def trained(folder: Path, plan: Plan, runner: RunnerKind) -> None:
    """A run that saves after STEPS steps, and after the one that others are compared with."""
    path = cluster_path("laptop")
    given = load_job(None, (*JOB, f"checkpoints.every={STEPS}"))
    train.run(
        load_cluster(path).take(plan.num_chips), given, plan=plan, runner=runner.value, folder=folder,
        document=dict(read_yaml(path).root), console=quiet(),
    )  # fmt: skip


def drop_last(folder: Path) -> None:
    """As if the run had been killed after STEPS steps were saved."""
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS + 1:06d}")


def go_on(folder: Path, plan: Path, chips: int, runner: RunnerKind) -> None:
    """Resume by another plan; what is there is saved before the first step."""
    options = TrainOptions(resume=folder, plan=plan, chips=chips, runner=runner)
    original = training_loop.Training.run

    def run(self: training_loop.Training, show: Callable[..., None], is_stopping: Callable[[], bool]) -> None:
        self.save_now()
        original(self, show, is_stopping)

    training_loop.Training.run = run  # type: ignore[method-assign]
    try:
        assert train.main(options, quiet()) == 0
    finally:
        training_loop.Training.run = original  # type: ignore[method-assign]


def same_bytes(one: Path, other: Path) -> bool:
    """Whether the checkpoints after STEPS steps hold the same."""
    mine, theirs = tensors_of(one), tensors_of(other)
    return mine.keys() == theirs.keys() and all(
        value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]) for key, value in mine.items()
    )


def tensors_of(run: Path) -> dict[tuple[str, ...], torch.Tensor]:
    """All of the checkpoint after STEPS steps."""
    state = load(open_checkpoint(run / "checkpoints" / f"step-{STEPS:06d}"))
    return {(entry.part, entry.name, entry.state): value for entry, value in state.parts()}


def losses(folder: Path) -> list[float]:
    """Of every step."""
    assert latest(folder).checkpoint is not None
    return [float(str(each["loss"])) for each in read_metrics(folder / "metrics.jsonl")]


def quiet() -> Console:
    """Nobody listens."""
    return Console(out=io.StringIO(), err=io.StringIO())


if __name__ == "__main__":
    main()
