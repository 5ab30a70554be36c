"""Programs on disk by content: the same model, shapes, plan and code give the same Program without torch.

The key is a digest of everything that decides the result, the code of the partitioner included, so an entry can be
stale only if a model changes without its description changing; models from the user's own files are therefore never
cached. Entries are written whole or not at all.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from comms.errors import PartitionError, UserError
from orchestrator.runs.disk import write_whole
from partitioner.program.program import Program
from partitioner.program.program_codec import decode, encode

FOLDER = Path.home() / ".cache" / "orchestrate"
CODE = ("partitioner", "kernels")
MODEL_CODE = ("models", "planning")


@cache
def code_digest() -> str:
    """Digest of the sources and libraries that turn a model into a Program."""
    orchestrator = Path(__file__).resolve().parents[1]
    rooms = [orchestrator.parent / package for package in CODE] + [orchestrator / room for room in MODEL_CODE]
    digest = hashlib.sha256()
    for path in [path for room in rooms for path in sorted(room.rglob("*.py"))]:
        digest.update(path.name.encode() + path.read_bytes())
    for package in ("torch", "transformers"):
        try:
            digest.update(version(package).encode())
        except PackageNotFoundError:
            digest.update(b"-")
    return digest.hexdigest()


def key_of(facts: Mapping[str, object]) -> str:
    """The cache key of a description (JSON values)."""
    text = json.dumps({"code": code_digest(), **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_program(key: str, folder: Path = FOLDER) -> Program | None:
    """The stored Program, or None; an unreadable entry counts as none."""
    try:
        return decode((folder / f"{key}.program").read_bytes())
    except (OSError, PartitionError):
        return None


def store_program(key: str, program: Program, folder: Path = FOLDER) -> None:
    """Remember a Program; a cache that cannot be written is not an error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{key}.program", encode(program))
    except (OSError, UserError):
        return


def load_number(key: str, folder: Path = FOLDER) -> int | None:
    """A remembered count (parameters of a model)."""
    try:
        return int((folder / f"{key}.number").read_text())
    except (OSError, ValueError):
        return None


def store_number(key: str, value: int, folder: Path = FOLDER) -> None:
    """Remember a count."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.number").write_text(str(value))
    except OSError:
        return
