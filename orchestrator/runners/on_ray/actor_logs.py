"""Actor logs: what the processes of a run wrote to their output, kept in the run's folder, one file per actor.

Read at the end, from the files that Ray keeps on each actor's machine, so that what an actor wrote before it ended is
there too. Of a machine that is gone there is nothing to read, and its actors' files say so.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comms.errors import UserError
from orchestrator.runners.on_ray.ray_connection import Raylets, is_gone
from orchestrator.runs.disk import explained

if TYPE_CHECKING:
    from orchestrator.runners.on_ray.actor import ActorFacts

MAX_BYTES = 1 << 20  # of each stream: the end of what is longer
PATIENCE_S = 5.0  # for another machine to answer
OF_RAY = (b":job_id:", b":actor_name:", b":task_name:")  # lines by which Ray marks whose output follows


def save_logs(facts: Sequence["ActorFacts"], raylets: Raylets, folder: Path) -> None:
    """Write `actor-000.txt` and so on. What cannot be read or written is left out: a run's end is no time to fail."""
    write_logs([each.place for each in facts], outputs(facts, raylets), folder)


def write_logs(places: Sequence[str], written: Mapping[int, str], folder: Path) -> None:
    """What actors at these places wrote, a file each."""
    with suppress(OSError, UserError), explained(folder):
        folder.mkdir(exist_ok=True)
        for actor, place in enumerate(places):
            text = written.get(actor, "its machine did not answer: what it wrote is not known\n")
            with (folder / f"actor-{actor:03d}.txt").open("a", encoding="utf-8") as file:
                file.write(f"actor {actor}, {place}\n{text}")


def read_ends(files: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """The ends of these files of this machine, put together by actor."""
    return {actor: "".join(map(_end_of, paths)) for actor, paths in files.items()}


def outputs(facts: Sequence["ActorFacts"], raylets: Raylets) -> dict[int, str]:
    """What these actors wrote, by their numbers; without those of a machine that is gone or does not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here, by_node = ray.get_runtime_context().get_node_id(), dict[str, dict[int, Sequence[str]]]()
    for actor, each in enumerate(facts):
        by_node.setdefault(each.node, {})[actor] = each.output
    found = read_ends(by_node.pop(here, {}))
    read: Any = ray.remote(num_cpus=0, max_retries=0)(read_ends)
    asked = [
        read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(files)
        for node, files in by_node.items()
        if not is_gone(node, raylets)
    ]
    done = ray.wait(asked, num_returns=len(asked), timeout=PATIENCE_S)[0] if asked else ()
    for each in done:
        with suppress(ray.exceptions.RayError):
            found |= ray.get(each)
    return found


def _end_of(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - MAX_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}\n"
    return b"".join(line for line in lines if not line.startswith(OF_RAY)).decode(errors="replace")
