"""Shipped: the cluster files that come with orchestrate, by bare name.

In a checkout they are in `cluster_configs/` beside the packages; an installed package carries them inside itself.
"""

from pathlib import Path

from comms.errors import ConfigError
from orchestrator.config.schema import nearest

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "cluster_configs", _PACKAGE.parent / "cluster_configs")
DEFAULT_CLUSTER = "laptop"  # where no command line says another


def shipped_clusters() -> dict[str, Path]:
    """Name to file of every shipped cluster, sorted by name."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def cluster_path(text: str) -> Path:
    """The file that `--cluster` means: a path, or the bare name of a shipped cluster. A file of that name wins."""
    path = Path(text)
    if path.is_file():
        return path
    shipped = shipped_clusters()
    if text in shipped:
        return shipped[text]
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(
            "there is no such cluster file", text, f"give a file, or one of {', '.join(shipped)}"
        )
    raise ConfigError("no shipped cluster has this name", f"--cluster {text}", nearest(text, tuple(shipped)))
