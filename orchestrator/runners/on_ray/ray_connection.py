"""Ray connection: joins a cluster, or starts a Ray of our own that leaves nothing behind.

A Ray of our own keeps its files in a folder of its own, removed at the end; if this process is killed, a `janitor`
does it. A cluster is joined as it is: its resources, its token and its runtime environment are its owner's. Our own
packages travel to its machines, so that all of them run the same code; what these need must be installed there.
"""

import errno
import importlib.util
import logging
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

from comms.errors import ClusterError, RunError
from kernels.memory import inherited
from orchestrator.config.hardware.cluster_file import CONFIGS
from orchestrator.models.user_code import PACKAGE_FOLDERS
from orchestrator.runners.on_ray import janitor
from orchestrator.runners.on_ray.placement import RayNode
from orchestrator.runners.on_ray.ray_address import RayAddress, RayKind

OBJECT_STORE_BYTES = 80 << 20  # Ray's least: tensors do not go through its store
SAME_PRIORITY = {"worker_niceness": 0}  # else whatever else runs here goes before the actors
REACH_S = 10.0  # for the port of a cluster to answer
ANSWER_S = 1.0  # for one that has answered before
SHORT_FOLDER = "/tmp"  # Ray's sockets have names of at most 107 characters
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's own, in what runs as a job
NAMESPACE = "orchestrate"
QUIET = {
    "log_to_driver": False,
    "logging_level": logging.CRITICAL,
}  # what goes wrong is told by our own errors
TOKEN_HINT = (
    "give Ray its token: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
)


Raylets: TypeAlias = Mapping[str, tuple[str, int]]  # by the name of a node, where Ray listens on it


class RayConnection:
    """A Ray to work with. `close` ends what was started here, and nothing else."""

    def __init__(self, address: RayAddress) -> None:
        self.address = address
        self._ray = _imported()
        self._folder: str | None = None
        self._janitor: subprocess.Popen[bytes] | None = None
        self._is_ours = False
        _draw_apart()
        if self._ray.is_initialized():  # by who called us
            return
        _quieten(self._ray)
        self._is_ours = True  # also one that came up halfway
        try:
            if address.kind is RayKind.OWN:
                self._start()
            else:
                self._join()
        except BaseException:
            self.close()
            raise

    def machines(self) -> list[RayNode]:
        """The nodes that are up."""
        return [RayNode(node["NodeManagerAddress"], node["Resources"]) for node in self._nodes()]

    def raylets(self) -> Raylets:
        """Of the nodes that are up."""
        return {
            node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"]) for node in self._nodes()
        }

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def free(self) -> dict[str, float]:
        """What nobody holds, in all."""
        return dict(self._ray.available_resources())

    def close(self) -> None:
        """Leave Ray; one of our own ends, with its files."""
        if self._is_ours:
            self._ray.shutdown()
            self._is_ours = False
        if self._janitor is not None and self._folder is not None:
            janitor.clean(self._folder)
            with suppress(OSError):
                self._janitor.communicate(janitor.DONE)
            self._janitor = None

    def _start(self) -> None:
        base = SHORT_FOLDER if os.access(SHORT_FOLDER, os.W_OK) else None
        self._folder = tempfile.mkdtemp(prefix="orc-ray-", dir=base)
        command = [sys.executable, "-I", "-S", janitor.__file__, self._folder]
        self._janitor = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        with inherited():
            self._ray.init(
                address="local", num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES, _temp_dir=self._folder, _system_config=SAME_PRIORITY, **QUIET,
            )  # fmt: skip

    def _join(self) -> None:
        where = f"{self.address.text} ({self.address.said})"
        if (place := self.address.place) is not None:
            _require_open(place, where)
        own: dict[str, Any] = {}
        if not is_job():  # which has what it was submitted with
            own["runtime_env"] = {"py_modules": travelling_folders(), "excludes": ["__pycache__"]}
        with _explained(self._ray, where):
            self._ray.init(address=self.address.text, namespace=NAMESPACE, **own, **QUIET)


def is_job() -> bool:
    """Whether this process is the entry point of a job that was submitted to a cluster."""
    return JOB_VARIABLE in os.environ


def travelling_folders() -> list[str]:
    """The packages, and the shipped cluster files where they lie beside them."""
    beside = PACKAGE_FOLDERS["orchestrator"].parent / CONFIGS
    return [str(folder) for folder in (*PACKAGE_FOLDERS.values(), *([beside] if beside.is_dir() else []))]


def _imported() -> Any:
    try:
        import ray
    except ImportError as error:
        hint = "pip install 'ray[default]>=2.60', or use --runner inline"
        raise RunError("Ray is not installed", "--runner ray", hint) from error
    return ray


@contextmanager
def _explained(ray: Any, where: str) -> Iterator[None]:
    """What Ray raises while it joins, in our words."""
    try:
        yield
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError("the cluster asks for a token", where, TOKEN_HINT) from error
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split())
        hint = f"is it up (`ray status`)? if it asks for a token, {TOKEN_HINT}"
        if "ersion mismatch" in said:
            hint = "use the Ray and the Python of the cluster: pip install ray==VERSION"
        elif "node" in said and ("ip" in said or "raylet" in said):
            hint = (
                "run on a node of the cluster, submit it (`orchestrate jobs submit`), or use ray://host:10001"
            )
        raise ClusterError(f"the cluster was not joined: {said[:300]}", where, hint) from error


def _require_open(place: tuple[str, int], where: str) -> None:
    """Raise ClusterError where nobody listens: Ray itself would try for minutes."""
    try:
        socket.create_connection(place, REACH_S).close()
    except OSError as error:
        said = error.strerror or str(error)
        hint = "is the cluster up (ray status), and is this its address? ray start prints it"
        raise ClusterError(f"nobody answers: {said}", where, hint) from error


def is_gone(node: str, raylets: Raylets) -> bool:
    """Whether it is certain that nobody listens on a node any more; silence alone may have other reasons."""
    if (place := raylets.get(node)) is None:
        return False
    try:
        socket.create_connection(place, ANSWER_S).close()
    except OSError as error:
        return error.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH)
    return False


def _quieten(ray: Any) -> None:
    """What goes wrong is told by our own errors, in three lines; Ray would print its raylets' logs beside them."""
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    vars(ray._private.worker)["print_to_stdstream"] = lambda *_, **__: None


def _draw_apart() -> None:
    """Give Ray's modules a `random` of their own: what users' code draws meanwhile follows from a seed."""
    spec = importlib.util.find_spec("random")
    assert spec is not None and spec.loader is not None
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ray" and vars(module).get("random") is random:
            vars(module)["random"] = own
