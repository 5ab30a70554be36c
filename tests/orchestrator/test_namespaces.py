"""Two machines by the kernel's own means: namespaces of network and processes, a cable, and a Ray node in each."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from orchestrator.runners.on_ray.ray_connection import SHORT_FOLDER
from orchestrator.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
HEAD, OTHER = "10.77.0.1", "10.77.0.2"
APART = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
HOSTS = """
kind: cluster
version: 1
name: two machines
device: cpu
hosts:
  - count: 2
    chips:
      - name: one CPU core
        class: cpu
        count: 1
        peak: {fp32: 94 GFLOP/s}
        memory: {capacity: 4 GB, bandwidth: 35 GB/s}
    nics: {count: 1, bandwidth: 10 Gb/s, latency: 20 us}
scale_out:
  - {name: ethernet, hosts: any}
"""
# Those of the second namespace see no process of the first, so that no memory is shared
SCRIPT = f"""
set -e
ip link set lo up
unshare --net --pid --fork --mount-proc tail -f /dev/null &
until inner=$(pgrep -P $!); do sleep 0.2; done
ip link add cable type veth peer name end
ip link set end netns $inner
ip addr add {HEAD}/24 dev cable
ip link set cable up
there="nsenter --target $inner --net --pid --mount"
$there ip link set lo up
$there ip addr add {OTHER}/24 dev end
$there ip link set end up
ray start --head --block --node-ip-address {HEAD} --port 6379 --num-cpus 1 --include-dashboard=false \
    --temp-dir "$1" > head.txt 2>&1 &
until ray health-check --address {HEAD}:6379 > /dev/null 2>&1; do sleep 0.2; done
$there ray start --block --address {HEAD}:6379 --node-ip-address {OTHER} --num-cpus 1 > other.txt 2>&1 &
until grep -q "Ray runtime started" other.txt; do sleep 0.2; done
shift
"$@"
ip -json -statistics link show cable > cable.json
"""
TRAIN = (
    "train", "--cluster", "two.yaml", "--model", "builtin:gpt-nano", "--seq", "16", "--global-batch", "4",
    "--steps", "3", "--set", "plan.dp=2", "--set", "validation.every=0",
)  # fmt: skip


def has_namespaces() -> bool:
    if not all(map(shutil.which, ("unshare", "nsenter", "ip", "pgrep"))):
        return False
    cable = [*APART, "ip", "link", "add", "cable", "type", "veth"]
    return subprocess.run(cable, capture_output=True, check=False).returncode == 0


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_tensors_go_over_the_cable_between_two_machines_and_training_is_the_same(tmp_path: Path) -> None:
    if not has_namespaces():
        pytest.skip("this kernel gives its users no namespaces of network")
    (tmp_path / "two.yaml").write_text(HOSTS)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT),
                          "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    ours = [sys.executable, "-m", "orchestrator", *TRAIN]

    def run(*words: str) -> None:
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    far = (*ours, "--address", f"{HEAD}:6379", "--run-dir", "far")
    with tempfile.TemporaryDirectory(prefix="orc-net-", dir=SHORT_FOLDER, ignore_cleanup_errors=True) as rays:
        run(*APART, "bash", "-c", SCRIPT, "bash", rays, *far)
    run(*ours, "--runner", "inline", "--run-dir", "near")
    steps, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("far", "near"))
    assert [each["loss"] for each in steps] == [each["loss"] for each in expected]
    machines = {re.search(r"on (\S+)", file.read_text())[1] for file in (tmp_path / "far" / "logs").iterdir()}  # type: ignore[index]
    assert machines == {HEAD, OTHER}
    sent = json.loads((tmp_path / "cable.json").read_text())[0]["stats64"]["tx"]["bytes"]
    gradients = 4 * 2 * 64 * 64 * 12  # at least those of two layers of width 64, of which half go each way
    assert sent > len(steps) * gradients / 2
