"""jobs: commands of ours as jobs of a Ray cluster, and as manifests of the schedulers that start such clusters."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from comms.errors import ConfigError
from comms.units import DASH, format_seconds
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import DEFAULT_CLUSTER, cluster_path, load_cluster
from orchestrator.config.schema import Section, nearest, validate
from orchestrator.config.yaml_file import Document, Location
from orchestrator.runners.ray_jobs.job_command import JobCommand, job_command
from orchestrator.runners.ray_jobs.manifests import KubeRaySettings, SlurmSettings, kuberay, slurm
from orchestrator.verbs.inputs.options import VERBS, JobsOptions
from orchestrator.views.console import Console, Table

if TYPE_CHECKING:
    from orchestrator.runners.ray_jobs.job_client import JobClient, JobFacts

SettingsT = TypeVar("SettingsT", bound=Section)
KINDS = ("kuberay", "slurm")
OF_SUBMIT = ("working_dir", "follow", "overrides")
USED = {"submit": ("working_dir", "follow"), "logs": ("follow",), "emit": ("overrides", "working_dir")}
COMMANDS = tuple(verb for verb in VERBS if verb not in ("jobs", "doctor"))


def main(options: JobsOptions, console: Console) -> int:
    """The `jobs` verb."""
    _require_used(options)
    if options.action == "emit":
        return _emit(options, console)
    from orchestrator.runners.ray_jobs.job_client import JobClient

    client = JobClient(options.address)
    if options.action == "submit":
        return _submit(options, client, console)
    if options.action == "list":
        found = client.jobs()
        console.results({"jobs": [_document(each) for each in found]}, (_table(found, client.where),))
        return 0
    name = _one_name(options)
    if options.action == "logs":
        return _logs(client, name, options.follow, console)
    found = [client.stop(name) if options.action == "stop" else client.job(name)]
    console.results(_document(found[0]), (_table(found, client.where),))
    return 0


def _require_used(options: JobsOptions) -> None:
    for name in OF_SUBMIT:
        if getattr(options, name) and name not in USED.get(options.action, ()):
            flag = "--set" if name == "overrides" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect on `jobs {options.action}`", flag, "leave it out")
    if options.action == "emit" and options.address is not None:
        raise ConfigError("`jobs emit` asks no cluster", "--address", "leave it out")
    if options.action == "list" and options.words:
        raise ConfigError(f"`jobs list` takes no {options.words[0]!r}", "jobs list", "leave it out")


def _one_name(options: JobsOptions) -> str:
    if len(options.words) != 1:
        problem = f"`jobs {options.action}` takes one job, not {len(options.words)}"
        raise ConfigError(problem, "jobs", "give its name, as `orchestrate jobs list` shows it")
    return options.words[0]


def _submit(options: JobsOptions, client: "JobClient", console: Console) -> int:
    command = _command(options.words, options.working_dir, console)
    folder = (options.working_dir or Path.cwd()).resolve()
    with console.phase("submit"):
        name = client.submit(command, folder)
    if not options.follow:
        console.results({"job": name, "command": command.text}, (_submitted(name, command),))
        return 0
    console.say(f"job {name}: Ctrl-C leaves it running, `orchestrate jobs stop {name}` ends it")
    return _logs(client, name, True, console)


def _submitted(name: str, command: JobCommand) -> Table:
    rows = [("job", name), ("command", command.text)]
    rows += [(each, f"orchestrate jobs {each} {name}") for each in ("status", "logs", "stop")]
    return Table("submitted", rows)


def _command(words: Sequence[str], folder: Path | None, console: Console) -> JobCommand:
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}", "--working-dir", "give one that is there")
    command = job_command(words, COMMANDS, folder or Path.cwd())
    for each in command.elsewhere:
        console.warn(f"{each} does not travel with the job: it must be there on the cluster")
    return command


def _logs(client: "JobClient", name: str, follow: bool, console: Console) -> int:
    if not follow:
        text = client.logs(name)
        console.results({"job": name, "logs": text}, text=text)
        return 0
    parts: list[str] = []
    found = client.follow(name, parts.append if console.as_json else console.stream)
    if console.as_json:
        console.results({**_document(found), "logs": "".join(parts)})
    console.say(f"job {name}: {found.status.lower()}")
    return 0 if found.status == "SUCCEEDED" else 1


def _document(found: "JobFacts") -> dict[str, object]:
    return {**asdict(found), "is_over": found.is_over}


def _table(found: "Sequence[JobFacts]", where: str) -> Table:
    rows = [(each.job, each.status.lower(), _took(each), each.command, each.message) for each in found]
    return Table(f"jobs of {where}", rows, ("job", "status", "took", "command", "message"))


def _took(found: "JobFacts") -> str:
    if found.started_s is None:
        return DASH
    return format_seconds((found.ended_s or time.time()) - found.started_s)


def _emit(options: JobsOptions, console: Console) -> int:
    kind = options.words[0] if options.words else ""
    if kind not in KINDS:
        problem = f"{kind!r} is nothing to emit" if kind else "nothing to emit is named"
        raise ConfigError(problem, "jobs emit", nearest(kind, KINDS))
    command = _command(options.words[1:], options.working_dir, console)
    cluster = _cluster_of(command, options.working_dir or Path.cwd())
    if kind == "kuberay":
        text = kuberay(command, cluster, _settings(options.overrides, KubeRaySettings))
    else:
        text = slurm(command, cluster, _settings(options.overrides, SlurmSettings))
    console.results({"kind": kind, "manifest": text}, text=text)
    return 0


def _cluster_of(command: JobCommand, folder: Path) -> Cluster:
    """The cluster that the command is about: its machines are what is asked for."""
    named = command.value("--cluster") or DEFAULT_CLUSTER
    chips = command.value("--chips")
    if chips is not None and not chips.isdecimal():
        raise ConfigError(f"{chips!r} is no number of chips", "--chips", "give a whole number")
    path = folder / named if (folder / named).is_file() else cluster_path(named)
    return load_cluster(path).take(int(chips) if chips else None)


def _settings(overrides: Sequence[str], kind: type[SettingsT]) -> SettingsT:
    given = [text.partition("=") for text in overrides]
    for name, separator, value in given:
        if not (name and separator and value):
            raise ConfigError(
                f"cannot read {name + separator + value!r}", "--set", "write it like image=NAME"
            )
    places: dict[Location, str] = {(name,): f"--set {name}={value}" for name, _, value in given}
    return validate(Document("--set", {name: value for name, _, value in given}, places), kind)
