"""One rank of torchrun + DistributedDataParallel + gloo: waits for its turn on a named pipe, steps, says how long.

    torchrun --nproc-per-node 2 ddp_worker.py FOLDER SAMPLES SEQ

FOLDER holds the pipes `go-RANK`, read here, and `done-RANK`, written here.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from orchestrator.config.job_file import load_job
from orchestrator.planning.job_parts import build_model

LR = 1e-3


def main() -> None:
    """Steps of the numbers that come down the pipe, until it ends."""
    folder, samples, seq = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job = load_job(None, ["model=builtin:gpt-10m", f"seq={seq}", f"global_batch={2 * samples}"])
    module = DistributedDataParallel(build_model(job, "cpu").module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)
    generator = torch.Generator().manual_seed(rank)
    shape = (samples, seq)
    batch = {name: torch.randint(0, 256, shape, generator=generator) for name in ("input_ids", "labels")}
    with (folder / f"done-{rank}").open("w") as done, (folder / f"go-{rank}").open() as go:
        for line in go:
            dist.barrier()
            start = time.perf_counter()
            for _ in range(int(line)):
                optimizer.zero_grad()
                module(**batch).backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
            dist.barrier()
            done.write(f"{time.perf_counter() - start}\n")
            done.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
