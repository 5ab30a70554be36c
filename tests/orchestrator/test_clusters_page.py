"""Every command of docs/clusters.md, on four raylets of this machine that ask for a token."""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "2", "--model", "builtin:gpt-nano", "--seq", "16", "--chips", "2", "--global-batch", "4"]
OURS = [sys.executable, "-m", "orchestrator"]
LIMIT_S = 200
RAYLETS = """
import sys
from ray.cluster_utils import Cluster
dashboard, client, agent = map(int, sys.argv[1:])
made = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "_system_config": {"worker_niceness": 0}, "include_dashboard": True,
    "dashboard_port": dashboard, "ray_client_server_port": client,
    "dashboard_agent_listen_port": agent})
for _ in range(3):
    made.add_node(num_cpus=1)
print(made.address, flush=True)
sys.stdin.read()
made.shutdown()
"""


def commands() -> list[str]:
    """Those of the page, but what starts a cluster, which `raylets` does."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "clusters.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert sum(line.startswith("ray start") for line in lines) == 2
    return [line for line in lines if not line.startswith("ray start")]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    """That of a user with a token of the cluster's, and no other word of Ray's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("a" * 64)
    scripts = home / "bin"
    scripts.mkdir()
    (scripts / "orchestrate").write_text(f'#!/bin/sh\nexec {shlex.join(OURS)} "$@"\n')
    (scripts / "orchestrate").chmod(0o755)
    path = f"{scripts}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **kept,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
    }


@pytest.fixture(scope="module")
def addresses(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """What the page's words stand for."""
    dashboard, client, agent = (free_port() for _ in range(3))
    process = subprocess.Popen(
        [sys.executable, "-c", RAYLETS, str(dashboard), str(client), str(agent)], stdin=subprocess.PIPE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    address = next(line.strip() for line in process.stdout if re.fullmatch(r"[\d.]+:\d+", line.strip()))
    yield {
        "http://head:8265": f"http://127.0.0.1:{dashboard}",
        "ray://head:10001": f"ray://127.0.0.1:{client}",
        "head:6379": address,
    }
    process.communicate("")


def run(command: str, addresses: dict[str, str], environment: dict[str, str], folder: Path) -> str:
    """What a command prints; made small if it trains."""
    for word, meant in addresses.items():
        command = command.replace(word, meant)
    words = shlex.split(command)
    if "train" in words and "emit" not in words:
        words += SMALL
    if "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment = {**environment, name: value}
    done = subprocess.run(
        words, env=environment, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_commands_of_the_page_work_in_its_order(
    addresses: dict[str, str], environment: dict[str, str], home: Path, tmp_path: Path
) -> None:
    job = ""
    for command in commands():
        printed = run(command.replace("JOB", job), addresses, environment, tmp_path)
        if " train " in command and command.startswith(("orchestrate train", "RAY_ADDRESS")):
            assert "final loss" in printed, command
        if "--follow" in command:
            assert "final loss" in printed
        elif "jobs submit" in command:
            job = re.findall(r"raysubmit_\w+", printed)[0]
        if "jobs logs" in command:
            assert "orchestrator train" in printed
        if "jobs stop" in command:
            assert re.search(rf"{job}\s+(stopped|succeeded)", printed)
        if "ray job submit" in command:
            assert "succeeded" in printed
    assert len(list((home / "orchestrate-runs").iterdir())) == 3
    assert all((folder / "logs").is_dir() for folder in (tmp_path / "runs").iterdir())
