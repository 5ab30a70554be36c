"""Job client: Ray's own job interface, with its errors in our words.

A job brings its working folder and our packages along, so that the cluster needs our dependencies only. It is given
time to save when it is stopped.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comms.errors import ClusterError, ConfigError, RunError
from orchestrator.runners.on_ray.ray_connection import TOKEN_HINT, travelling_folders
from orchestrator.runners.ray_jobs.job_command import JobCommand

VARIABLE = "RAY_API_SERVER_ADDRESS"  # Ray's own; goes before what a client is given
STOP_S = 120  # for a job to finish its step and save, after which Ray kills it
YOUNG_S = 120  # for the agents of a cluster that has just been started to come up
LOOK_S = 0.5
# Does not travel; run directories by their numbers, as a package of ours is called `runs` too
LEFT_BEHIND = ["runs/*-[0-9][0-9][0-9][0-9]*", "__pycache__", ".git", ".venv", "venv"]
NOISY = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
OVER = ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What the cluster knows of a job; times in seconds since 1970, None where it has not come to that."""

    job: str
    status: str
    command: str
    started_s: float | None
    ended_s: float | None
    message: str

    @property
    def is_over(self) -> bool:
        """Whether it has ended, whatever way."""
        return self.status in OVER


class JobClient:
    """The jobs of the cluster at `address`: of its dashboard (http://host:8265), or as `train --address` takes it."""

    def __init__(self, address: str | None) -> None:
        try:
            import ray
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise RunError("Ray is not installed", "jobs", "pip install 'ray[default]>=2.60'") from error
        self._ray = ray
        if address is not None:  # by the environment, which Ray asks first
            os.environ[VARIABLE] = address
        self.where = address or os.environ.get(VARIABLE) or os.environ.get("RAY_ADDRESS") or "this machine"
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        _use_token()
        with self._explained():
            self._client: Any = JobSubmissionClient()

    def submit(self, command: JobCommand, folder: Path) -> str:
        """Have the cluster execute a command in a copy of `folder`; the job's name."""
        environment = {
            "working_dir": str(folder), "excludes": LEFT_BEHIND,
            "py_modules": travelling_folders(),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
        }  # fmt: skip
        with self._explained():
            return self._submitted(command.text, environment)

    def _submitted(self, text: str, environment: dict[str, Any]) -> str:
        end = time.monotonic() + YOUNG_S
        while True:
            try:
                return str(self._client.submit_job(entrypoint=text, runtime_env=environment))
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(LOOK_S)

    def jobs(self) -> list[JobFacts]:
        """All jobs that were submitted, latest first."""
        with self._explained():
            found = [_facts(each) for each in self._client.list_jobs() if each.submission_id]
        return sorted(found, key=lambda each: (-(each.started_s or 0.0), each.job))

    def job(self, name: str) -> JobFacts:
        """One of them."""
        with self._explained(name):
            return _facts(self._client.get_job_info(name))

    def logs(self, name: str) -> str:
        """What it has printed."""
        with self._explained(name):
            return str(self._client.get_job_logs(name))

    def follow(self, name: str, show: Callable[[str], None]) -> JobFacts:
        """Show what it prints until it is over."""

        async def shown() -> None:
            async for part in self._client.tail_job_logs(name):
                show(part)

        with self._explained(name):
            asyncio.run(shown())
        return self.ended(name)

    def stop(self, name: str) -> JobFacts:
        """Ask a job to save and end, and wait until it has."""
        with self._explained(name):
            self._client.stop_job(name)
        return self.ended(name)

    def ended(self, name: str) -> JobFacts:
        """A job once it is over; RunError if that takes longer than it may."""
        end = time.monotonic() + STOP_S + 10
        while not (found := self.job(name)).is_over:
            if time.monotonic() > end:
                hint = f"see `orchestrate jobs logs {name}`"
                raise RunError(f"job {name} is still {found.status}", self.where, hint)
            time.sleep(LOOK_S)
        return found

    @contextmanager
    def _explained(self, job: str = "") -> Iterator[None]:
        try:
            yield
        except self._ray.exceptions.AuthenticationError as error:
            raise ClusterError("the cluster asks for a token", self.where, TOKEN_HINT) from error
        except (ConnectionError, OSError) as error:
            hint = "give --address http://HOST:8265, that of the dashboard (ray start prints it)"
            raise ClusterError("no cluster answers that takes jobs", self.where, hint) from error
        except (RuntimeError, ValueError, TypeError) as error:
            said = " ".join(str(error).split())
            if job and ("does not exist" in said or "404" in said):
                raise ConfigError(
                    f"there is no job {job!r}", self.where, "see `orchestrate jobs list`"
                ) from error
            raise RunError(said[:400], self.where, "see whether its Ray is of the same version") from error


def _use_token() -> None:
    """Show the token that this user has, unless the environment says otherwise: a dashboard that wants none ignores it.

    (A cluster that wants none would not hear an actor's owner that does: runs on one leave it to RAY_AUTH_MODE.)
    """
    from ray._private.authentication import authentication_token_setup

    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _facts(found: Any) -> JobFacts:
    started, ended = (None if ms is None else ms / 1000 for ms in (found.start_time, found.end_time))
    name, status = str(found.submission_id), str(getattr(found.status, "value", found.status))
    return JobFacts(
        name, status, str(found.entrypoint), started, ended, " ".join(str(found.message or "").split())
    )
