"""`verify` of every product of dp, tp, pp and ZeRO-1 on 8 chips, in float64 over 10 steps, for three models.

python benchmarks/verify_matrix.py [--model hf:gpt2-tiny]
"""

import argparse
import time

from support.harness import report

from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.verbs.verify import verify

MODELS = ("builtin:gpt-nano", "hf:gpt2-tiny", "hf:llama-tiny")
CHIPS = 8
FIXED = ("dtype=fp64", "seq=16", "global_batch=16", "microbatches=2")


def main() -> None:
    """Verify and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append")
    options = parser.parse_args()
    rows = []
    for model in options.model or MODELS:
        for dp, tp, pp in degrees():
            for zero in (0, 1) if dp > 1 else (0,):
                start = time.perf_counter()
                rows.append(one(model, dp, tp, pp, zero) | {"seconds": time.perf_counter() - start})
                print(rows[-1], flush=True)
    report("verify_matrix", rows)
    assert all(row["equal"] for row in rows), "a plan differs from one chip"


def degrees() -> list[tuple[int, int, int]]:
    """All (dp, tp, pp) of powers of two with at most 8 chips."""
    sizes = (1, 2, 4, 8)
    return [(d, t, p) for d in sizes for t in sizes for p in sizes if d * t * p <= CHIPS]


def heads(model: str, tp: int) -> tuple[str, ...]:
    """Settings that give the model enough heads for tp; grouped heads where they are few enough."""
    wanted = max(4, tp)
    return {
        "builtin:gpt-nano": (f"model_args.heads={wanted}",),
        "hf:gpt2-tiny": (f"model_args.n_head={wanted}",),
        "hf:llama-tiny": (
            f"model_args.num_attention_heads={wanted}",
            f"model_args.num_key_value_heads={max(2, tp)}",
        ),
    }[model]


def one(model: str, dp: int, tp: int, pp: int, zero: int) -> dict[str, object]:
    """One verification."""
    cluster = load_cluster(cluster_path("laptop")).take(dp * tp * pp)
    settings = (f"model={model}", f"plan.dp={dp}", f"plan.tp={tp}", f"plan.pp={pp}", f"plan.zero={zero}")
    result = verify(cluster, load_job(None, (*FIXED, *settings, *heads(model, tp))))
    share = max(result.parameter_bytes_per_chip) / result.one_chip_parameter_bytes
    return {
        "model": model, "plan": result.plan, "equal": result.equal, "loss_rel": result.errors.loss,
        "grad_rel": result.errors.grad, "param_rel": result.errors.param, "largest_parameter_share": share,
        "largest_flops_share": max(result.flops_per_chip) / result.one_chip_flops,
    }  # fmt: skip


if __name__ == "__main__":
    main()
