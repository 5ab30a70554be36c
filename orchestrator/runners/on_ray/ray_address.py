"""Ray address: which Ray carries out a run. One of our own, unless `--address` or Ray's RAY_ADDRESS names another."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from comms.errors import ConfigError

VARIABLE = "RAY_ADDRESS"
OWN, AUTO = "local", "auto"
CLIENT = "ray://"
_PLACE = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.%]+\]):(?P<port>\d{1,5})")


class RayKind(StrEnum):
    """How a Ray is reached."""

    OWN = "started for this run"
    CLUSTER = "cluster"
    CLIENT = "cluster, by its client port"


@dataclass(frozen=True, slots=True)
class RayAddress:
    """Where Ray is; `said` by whom, for messages."""

    kind: RayKind
    text: str
    said: str

    @property
    def place(self) -> tuple[str, int] | None:
        """Host and port; None where Ray itself finds them."""
        found = _PLACE.fullmatch(self.text.removeprefix(CLIENT))
        return (found["host"].strip("[]"), int(found["port"])) if found else None


def ray_address(given: str | None, environment: Mapping[str, str]) -> RayAddress:
    """Which Ray is meant by an `--address` (None: not given) in this environment. Raises ConfigError."""
    text, said = (given, "--address") if given is not None else (environment.get(VARIABLE) or OWN, VARIABLE)
    if text == OWN:
        return RayAddress(RayKind.OWN, text, said)
    if text == AUTO:
        named = environment.get(VARIABLE)
        return ray_address(named, {}) if named and named != AUTO else RayAddress(RayKind.CLUSTER, text, said)
    if text.startswith(("http://", "https://")):
        problem = f"{text} is the dashboard of a cluster, which takes jobs"
        hint = (
            "give the host:port that ray start says, or `orchestrate jobs submit --address URL -- train ...`"
        )
        raise ConfigError(problem, said, hint)
    found = RayAddress(RayKind.CLIENT if text.startswith(CLIENT) else RayKind.CLUSTER, text, said)
    if found.place is None or not 0 < found.place[1] < 1 << 16:
        raise ConfigError(
            f"{text!r} is no address of a Ray", said, "write auto, local, host:port or ray://host:port"
        )
    return found
