"""User code: objects by file and module, and errors with the user's own lines."""

import sys
from pathlib import Path

import pytest

from comms.errors import ModelError
from orchestrator.models.user_code import called, named_object

SOURCE = """
import beside
class Box:
    class Inner: value = 5
def deep(n):
    if n: return deep(n - 1)
    raise ValueError("my own\\ntrouble")
def needs(width, *, depth=2): return width * depth
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delitem(sys.modules, "beside", raising=False)  # another test's
    (tmp_path / "beside.py").write_text("there = True")
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_objects_are_found_in_files_and_modules(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert named_object(f"{mine}:Box.Inner.value", "data") == 5
    assert named_object("math:pi", "data") == __import__("math").pi
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine" / "part.py").write_text("found = 7")
    assert named_object("package_of_mine.part:found", "data") == 7


def test_a_file_is_read_once_and_again_when_it_has_changed(mine: Path) -> None:
    first = named_object(f"{mine}:Box", "model")
    assert named_object(f"{mine}:Box", "data") is first
    mine.write_text(SOURCE + "\nmore = 1\n")
    assert named_object(f"{mine}:Box", "data") is not first


def test_what_a_factory_raises_has_its_own_frames_innermost_first(mine: Path) -> None:
    with pytest.raises(ModelError) as caught:
        called(named_object(f"{mine}:deep", "model"), "mine.py:deep", "model", 1)  # type: ignore[arg-type]
    error = caught.value
    assert error.problem == "mine.py:deep raised ValueError: my own trouble"
    assert error.where == ", from ".join(
        (
            f'{mine}:7 in deep (raise ValueError("my own\\ntrouble"))',
            f"{mine}:6 in deep (if n: return deep(n - 1))",
        )
    )


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [({}, "missing a required argument: 'width'"), ({"width": 1, "hight": 2}, "unexpected keyword argument 'hight'")],
)  # fmt: skip
def test_a_call_that_cannot_be_says_what_is_taken(mine: Path, kwargs: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        called(named_object(f"{mine}:needs", "data"), "mine.py:needs", "data", **kwargs)  # type: ignore[arg-type]
    assert (caught.value.where, caught.value.hint) == ("data", "it is mine.py:needs(width, *, depth=2)")


@pytest.mark.parametrize(
    ("source", "said", "line"),
    [("def net(:", "SyntaxError", "broken.py"), ("import no_such_thing", "ModuleNotFoundError: No module", ":1 in"),
     ("def f():\n    raise OSError('gone')\nf()", "OSError: gone", ":2 in f (raise OSError('gone')), from ")],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_why_and_where(
    tmp_path: Path, source: str, said: str, line: str
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    before = set(sys.modules)
    with pytest.raises(ModelError, match=said) as caught:
        named_object(f"{path}:net", "model")
    assert line in caught.value.where and "orchestrator/" not in caught.value.where
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [("no_file.py:net", "no file no_file.py", "path"), ("no.such.module:net", "no module 'no.such.module'", "install"),
     ("math:net", "math has no 'net'", "it defines acos"), ("json.decoder:Net", "no 'Net'", "it defines JSON"),
     ("torch.optim:AdamV", "no 'AdamV'", "did you mean 'Adam'"), ("torch.nn:linear", "no", "did you mean 'Linear'")],
)  # fmt: skip
def test_a_name_that_is_not_there_is_refused_with_those_that_are(text: str, said: str, hint: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        named_object(text, "loss")
    assert caught.value.where == "loss" and hint in caught.value.hint


def test_code_that_ends_the_process_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import sys\ndef make(): sys.exit(0)\n")
    with pytest.raises(ModelError, match="raised SystemExit: 0") as caught:
        called(named_object(f"{path}:make", "model"), "script.py:make", "model")  # type: ignore[arg-type]
    assert "script.py:2 in make" in caught.value.where
    path.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(ModelError, match="SystemExit: 3"):
        named_object(f"{path}:make", "model")


def test_one_file_is_one_module_whoever_imports_it(tmp_path: Path) -> None:
    (tmp_path / "one_model.py").write_text("class CFG: scale = 1\n")
    (tmp_path / "one_data.py").write_text("import one_model\none_model.CFG.scale = 3\nCFG = one_model.CFG\n")
    first = named_object(f"{tmp_path}/one_model.py:CFG", "model")
    assert named_object(f"{tmp_path}/one_data.py:CFG", "data") is first and first.scale == 3  # type: ignore[attr-defined]


def test_a_file_that_was_imported_before_it_is_named_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "two_model.py").write_text("class CFG: pass\n")
    (tmp_path / "two_data.py").write_text("from two_model import CFG\n")
    first = named_object(f"{tmp_path}/two_data.py:CFG", "data")
    assert named_object(f"{tmp_path}/two_model.py:CFG", "model") is first


def test_neighbours_of_one_name_in_two_folders_are_refused(tmp_path: Path) -> None:
    for folder, value in (("a", 2), ("b", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helping_hands.py").write_text(f"scale = {value}\n")
        (tmp_path / folder / f"of_{folder}.py").write_text("from helping_hands import scale\n")
    assert named_object(f"{tmp_path}/a/of_a.py:scale", "model") == 2
    with pytest.raises(
        ModelError, match=r"imports helping_hands, which is .*not the one beside it"
    ) as caught:
        named_object(f"{tmp_path}/b/of_b.py:scale", "data")
    assert caught.value.hint == "rename helping_hands.py"


def test_a_module_of_this_folder_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "statistics.py").write_text("found = 7\n")
    with pytest.raises(ModelError, match=r"statistics is .*, not statistics.py in this folder"):
        named_object("statistics:found", "model")
    assert named_object("statistics.py:found", "model") == 7
