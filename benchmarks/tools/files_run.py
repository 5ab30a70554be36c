"""How much of the house one command walks through: the files of ours in which a function ran.

    python benchmarks/tools/files_run.py simulate --cluster laptop

What counts is a function, method, lambda or comprehension that ran in any thread, also at import; the body of a module
or a class does not. The command runs in a fresh process with nothing cached. `--json` prints the files as a list.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("comms", "kernels", "orchestrator", "partitioner")
INSIDE = "--inside"  # the process that runs the command


def files_of(command: list[str], root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """The files below `root` in which a function ran, sorted; the command's own output goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        environment = {**os.environ, "HOME": folder, "XDG_CACHE_HOME": folder, "PYTHONPATH": str(root)}
        inner = [
            sys.executable,
            str(Path(__file__).resolve()),
            INSIDE,
            str(found),
            str(root),
            ",".join(packages),
        ]
        subprocess.run([*inner, *command], env=environment, cwd=folder, stdout=sys.stderr, check=True)
        files: list[str] = json.loads(found.read_text())
    return files


def watch(root: Path, packages: tuple[str, ...]) -> set[str]:
    """A set that fills with files from now on."""
    seen: set[str] = set()
    wanted = tuple(str(root / package) + os.sep for package in packages)

    def called(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & CO_OPTIMIZED and code.co_filename.startswith(wanted):
            seen.add(code.co_filename)

    threading.setprofile(called)
    sys.setprofile(called)
    return seen


def inside(found: str, root: str, packages: str, command: list[str]) -> None:
    """Run the command line and write down what it ran."""
    seen = watch(Path(root), tuple(packages.split(",")))
    sys.argv = ["orchestrate", *command]
    from orchestrator.cli import main

    try:
        main()
    finally:
        sys.setprofile(None)
        Path(found).write_text(json.dumps(sorted(str(Path(file).relative_to(root)) for file in seen)))


def main() -> None:
    """Print the files and their number."""
    words = sys.argv[1:]
    if words[:1] == [INSIDE]:
        inside(words[1], words[2], words[3], words[4:])
        return
    files = files_of([word for word in words if word != "--json"])
    print(json.dumps(files, indent=2) if "--json" in words else "\n".join([*files, f"{len(files)} files"]))


if __name__ == "__main__":
    main()
