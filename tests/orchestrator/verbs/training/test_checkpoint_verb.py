"""checkpoint: what is listed, what is found damaged, and what comes back from the formats of others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from comms.errors import ModelError, RunError
from orchestrator.config.job_file import load_job
from orchestrator.planning.job_parts import job_parts
from orchestrator.planning.start_weights import started_from
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoint
from orchestrator.runs.checkpoints.formats import read
from partitioner.layout.parallel_plan import Plan

Make = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("undrawn", "one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, train_job: Make) -> Path:
    folder: Path = train_job(
        tmp_path_factory.mktemp("run") / "run", Plan(dp=2, zero=1), "checkpoints.every=2", "dtype=bf16"
    )
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def newest(run: Path) -> Path:
    found = checkpoint.latest(run).checkpoint
    assert found is not None
    return found.folder


def test_what_a_run_has_is_listed_with_its_plan(orchestrate_json: Make, orchestrate: Make, run: Path) -> None:
    first, last = orchestrate_json("checkpoint", "ls", run)["checkpoints"]
    assert (first["step"], last["step"], last["problem"]) == (2, 4, None)
    assert last["plan"].startswith("dp2 tp1 pp1 zero1") and last["age_s"] >= 0 and last["nbytes"] > 0
    ran = orchestrate("checkpoint", "ls", newest(run))
    assert ran.code == 0 and "step-000004" in ran.out and "step-000002" not in ran.out


def test_every_byte_is_verified_and_the_exit_code_tells(orchestrate: Make, copied: Path) -> None:
    assert orchestrate("checkpoint", "verify", copied).code == 0
    path = newest(copied) / "model-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert orchestrate("checkpoint", "ls", copied).code == 0
    ran = orchestrate("checkpoint", "verify", copied, "--json")
    assert ran.code == 1
    problems = [each["problem"] for each in json.loads(ran.out)["checkpoints"]]
    assert problems[0] is None and "digest" in problems[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ls", "."), "neither a run nor a checkpoint"),
        (("verify", "{run}", "there"), "TARGET has no effect on verify"),
        (("ls", "{run}", "--to", "dcp"), "--to has no effect on ls"),
        (("convert", "{run}"), "convert needs a TARGET and --to"),
        (("convert", "{run}", "{run}", "--to", "dcp"), "the target exists"),
        (("convert", "{run}", "there", "--to", "hf"), "none of transformers"),
        (("convert", ".", "there", "--to", "dcp"), "there are no weights here"),
        (("convert", "nowhere", "there", "--to", "dcp"), "no such file or folder"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(
    words: tuple[str, ...],
    said: str,
    orchestrate: Make,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = orchestrate("checkpoint", *(word.format(run=run) for word in words))
    assert ran.code == 2 and said in ran.err and "do: " in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_dcp_folder_becomes_the_same_checkpoint_again(orchestrate: Make, run: Path, tmp_path: Path) -> None:
    assert orchestrate("checkpoint", "convert", run, tmp_path / "dcp", "--to", "dcp").code == 0
    assert (
        orchestrate("checkpoint", "convert", tmp_path / "dcp", tmp_path / "back", "--to", "checkpoint").code
        == 0
    )
    one, other = (checkpoint.open_checkpoint(each) for each in (newest(run), tmp_path / "back"))
    assert one.manifest == other.manifest
    pairs = [
        {(e.part, e.name, e.state): v for e, v in checkpoint.load(each).parts()} for each in (one, other)
    ]
    assert pairs[0].keys() == pairs[1].keys()
    assert all(torch.equal(value, pairs[1][key]) for key, value in pairs[0].items())


def test_safetensors_hold_the_model_alone(orchestrate: Make, run: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "model.safetensors", tmp_path / "folder"):
        assert orchestrate("checkpoint", "convert", run, target, "--to", "safetensors").code == 0
        assert read(target).tensors.keys() == read(run).tensors.keys()
    ran = orchestrate("checkpoint", "convert", tmp_path / "folder", tmp_path / "back", "--to", "checkpoint")
    assert ran.code == 2 and "weights alone" in ran.err and "--set weights=" in ran.err


@pytest.mark.parametrize("kind", ["run", "checkpoint", "safetensors", "dcp"])
def test_training_starts_from_weights_of_any_kind(
    kind: str, orchestrate: Make, run: Path, tmp_path: Path, tiny_job: Make
) -> None:
    path = {"run": run, "checkpoint": newest(run)}.get(kind, tmp_path / "weights")
    if kind in ("safetensors", "dcp"):
        orchestrate("checkpoint", "convert", run, path, "--to", kind)
    model = job_parts(tiny_job("model_args.vocab=256", "dtype=bf16", f"weights={path}"), "cpu").model
    expected = read(run).tensors
    found = dict(model.module.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert model.said == ()
    wide = job_parts(tiny_job("model_args.vocab=256", f"weights={path}"), "cpu").model
    assert "taken from torch.bfloat16 as torch.float32" in wide.said[0]


def test_weights_that_do_not_fit_are_listed(run: Path, tmp_path: Path, tiny_job: Make) -> None:
    held = dict(read(run).tensors)
    names = sorted(held)
    held["other"] = held.pop(names[0])
    held[names[1]] = held[names[1]].reshape(-1)
    save_file({name: value.clone() for name, value in held.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError) as caught:
        job_parts(tiny_job("model_args.vocab=256", f"weights={tmp_path / 'odd.safetensors'}"), "cpu")
    for said in (f"{names[0]} is missing", "other is not of this model", f"{names[1]} is ["):
        assert said in caught.value.problem
    (tmp_path / "odd.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ModelError, match="cannot be read"):
        read(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("verb", ["plan", "simulate", "train"])
def test_weights_that_are_not_there_are_missed_by_every_verb(
    verb: str, orchestrate: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = orchestrate(verb, "--chips", "1", "--model", "builtin:gpt-nano", "--set", "weights=nowhere")
    assert ran.code == 2 and "there are no weights 'nowhere'" in ran.err


def test_a_run_without_a_whole_checkpoint_gives_no_weights(copied: Path) -> None:
    for folder in (copied / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("{}")
    with pytest.raises(RunError, match="no complete checkpoint"):
        read(copied)


def test_a_folder_of_transformers_comes_and_goes(
    orchestrate: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of hf:gpt2, small: its weights are read back by transformers itself, and by a run that starts from them."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = "model_args={n_layer: 1, n_embd: 16, n_head: 2, n_positions: 16, vocab_size: 256}"
    words = ("--model", "hf:gpt2", "--set", sizes, "--seq", 8, "--global-batch", 2, "--steps", 1, "--chips", 1,
             "--runner", "inline", "--set", "validation.every=0")  # fmt: skip
    assert orchestrate("train", *words, "--run-dir", "run").code == 0
    assert orchestrate("checkpoint", "convert", "run", "hf", "--to", "hf").code == 0
    theirs = dict(transformers.GPT2LMHeadModel.from_pretrained("hf").named_parameters())
    held = read(Path("run")).tensors
    assert theirs.keys() <= held.keys() | {"lm_head.weight"}
    assert all(torch.equal(value, held[name]) for name, value in theirs.items())
    assert orchestrate("checkpoint", "convert", "hf", "again.safetensors", "--to", "safetensors").code == 0
    assert all(torch.equal(value, held[name]) for name, value in load_file("again.safetensors").items())
    job = load_job(None, ["model=hf:gpt2", sizes, "weights=again.safetensors"])
    module = job_parts(job, "cpu").model.module
    assert all(torch.equal(value, held[name]) for name, value in module.named_parameters())


def test_a_dcp_folder_of_a_plain_loop_is_read(tmp_path: Path, tiny_model: Make) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    module = tiny_model("cpu").module
    for name, whole in (("nested", {"model": module.state_dict(), "step": 7}), ("flat", module.state_dict())):
        save(whole, storage_writer=FileSystemWriter(str(tmp_path / name)), no_dist=True)
        held = read(tmp_path / name).tensors
        assert held.keys() == module.state_dict().keys()
        other = tiny_model("cpu")
        with torch.no_grad():
            for value in other.module.parameters():
                value.zero_()
        started_from(other, str(tmp_path / name))
        assert all(torch.equal(value, held[n]) for n, value in other.module.named_parameters())
