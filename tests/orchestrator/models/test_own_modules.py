import subprocess
import sys
from pathlib import Path

import pytest

from comms.errors import ModelError
from orchestrator.models.own_modules import OwnModule, import_modules

FIRST = """
import torch
from second import FACTOR

@torch.library.custom_op("orchestrate_test::scaled", mutates_args=())
def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR
"""
ELSEWHERE = """
import sys
sys.path.insert(0, sys.argv[1])
import first
from pathlib import Path
for file in Path(sys.argv[1]).glob("*.py"):
    text = file.read_text()
from orchestrator.models.own_modules import own_modules
import pickle
sys.stdout.buffer.write(pickle.dumps(own_modules()))
"""


def test_modules_of_another_process_are_imported_from_their_text(tmp_path: Path) -> None:
    import pickle

    import torch

    (tmp_path / "second.py").write_text("FACTOR = 3.0\n")
    (tmp_path / "first.py").write_text(FIRST)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)], capture_output=True, check=True, timeout=100
    )
    modules = pickle.loads(done.stdout)
    assert {name for module in modules for name in module.names} == {"first", "second"}
    for file in tmp_path.glob("*.py"):
        file.unlink()
    import_modules(modules)
    assert torch.ops.orchestrate_test.scaled(torch.ones(1)).item() == 3.0
    assert sys.modules["first"].__file__ == str(tmp_path / "first.py")
    assert import_modules(modules) is None  # they are there already
    for name in ("first", "second"):
        del sys.modules[name]


def test_names_of_one_file_are_one_module() -> None:
    import_modules((OwnModule(("one_name", "another_name"), "/nowhere/one.py", "value = object()\n", False),))
    assert sys.modules["one_name"].value is sys.modules.pop("another_name").value
    del sys.modules["one_name"]


def test_a_module_that_does_not_run_elsewhere_is_named() -> None:
    broken = OwnModule(("reads_a_file",), "/nowhere/reads.py", "open('/nowhere/vocabulary')\n", False)
    with pytest.raises(
        ModelError, match=r"reads.py cannot be imported by an actor: FileNotFoundError"
    ) as caught:
        import_modules((broken,))
    assert caught.value.where == "/nowhere/reads.py"
    assert "reads_a_file" not in sys.modules
