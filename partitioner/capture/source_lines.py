"""Lines of the user's code: where an operation of a graph, an error or a call comes from, as `file:line (code)`."""

import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.fx import Node
from torch.fx.proxy import TracerBase

HERE, STDLIB = str(Path(__file__).parent), sysconfig.get_path("stdlib")
TORCH = f"{Path(torch.__file__).parent}/"
PACKAGES = tuple(
    f"{Path(__file__).parents[2] / own}/" for own in ("comms", "partitioner", "kernels", "orchestrator")
)


def is_users(file: str) -> bool:
    """Whether code of this file is of the user's or of a library's: not ours here, not torch's, not Python's own."""
    is_pythons = file.startswith(STDLIB) and "-packages/" not in file
    return not file.startswith((HERE, TORCH, "<")) and not is_pythons


def source_line(node: Node) -> str:
    """`line_of` a node; its name where no line was noted."""
    return line_of(node) or in_module(node.name, str(node.meta.get("module", "")))


def line_of(node: Node) -> str:
    """Where in the user's code a node comes from, with the module that runs it; empty where no line was noted."""
    line = _line_in(str(node.meta.get("stack_trace", "")))
    return in_module(line, str(node.meta.get("module", ""))) if line else ""


def in_module(line: str, path: str) -> str:
    """A line of the user's with the submodule that runs it."""
    return f"{line}, in {path}" if path else line


def loss_line(total: Node) -> str:
    """Where the user's code makes the loss, which is then made a scalar here."""
    while not line_of(total) and total.all_input_nodes:
        total = total.all_input_nodes[0]
    return line_of(total) or "the loss"


def running_line() -> str:
    """The line of the user's that is running."""
    return _told([f for f in traceback.extract_stack() if is_users(f.filename)])


def calling_line() -> str:
    """The line of the user's that has called this project; empty from the command line."""
    frames = traceback.extract_stack()
    return _told([f for f in frames if _calls_us(f.filename)])


def depth_of_call() -> int:
    """How many calls above the one that asks the line is that has called this project: a warning's `stacklevel`."""
    depth = 1
    while not _calls_us(sys._getframe(depth).f_code.co_filename):
        depth += 1
    return depth


def _calls_us(file: str) -> bool:
    return is_users(file) and not file.startswith(PACKAGES)


def first_user_line(error: BaseException) -> str:
    """The innermost line outside torch that an error passed through, or that an operator of the graph comes from."""
    outside = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    of_operator = str(error).partition("Original traceback:")[2]  # which torch adds as it runs a graph
    if not outside or of_operator:
        return _line_in(of_operator) or "the model or its loss"
    return _told(outside)


def _told(frames: list[traceback.FrameSummary]) -> str:
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


@contextmanager
def users_frames() -> Iterator[None]:
    """Traces note the innermost line of the user's, where torch would note those of functions called forward alone."""

    def innermost(_: object, summary: traceback.StackSummary) -> traceback.StackSummary:
        called = next((place for place, f in enumerate(summary) if f.filename.startswith(HERE)), 0)
        found = next((f for f in reversed(summary[called:]) if is_users(f.filename)), None)
        return traceback.StackSummary.from_list([found] if found else [])

    with patch.object(TracerBase, "_filter_traceback_frames", innermost):
        yield


def _line_in(trace: str) -> str:
    """The innermost line outside torch of a traceback's text, if there is one."""
    for entry in reversed(trace.strip().split("File ")):
        place, _, code = entry.partition("\n")
        file, _, rest = place.partition(", line ")
        if rest and not file.strip('"').startswith(TORCH):
            line, path = rest.partition(",")[0], file.strip('"')
            return f"{path}:{line} ({code.strip().partition(chr(10))[0]})"
    return ""
