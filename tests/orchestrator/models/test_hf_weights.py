"""Weights of folders: what transformers itself loads is the oracle; what does not fit, is damaged or new is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comms.errors import ModelError
from orchestrator.config.job_file import load_job
from orchestrator.models.model_builder import BuiltModel, build
from orchestrator.verbs import train

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 40,
}


def built(name: str, **args: object) -> BuiltModel:
    return build(name, args, device="cpu", dtype=torch.float32, seed=0, shifted=False)


def refusal(name: str, **args: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        built(name, **args)
    assert caught.value.problem and caught.value.where and caught.value.hint
    return caught.value


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two layers, with a head of two classes."""
    path = tmp_path_factory.mktemp("weights") / "bert"
    built("hf:bert:classification", **{**SIZES, "num_hidden_layers": 2}).module.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose head is its embedding."""
    path = tmp_path_factory.mktemp("weights") / "tied"
    built("hf:llama", **SIZES, num_key_value_heads=2, tie_word_embeddings=True).module.save_pretrained(path)
    return path


@pytest.fixture
def copy(bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert, tmp_path / "copy"))


def configured(folder: Path, **values: object) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return str(folder)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    there = expected.state_dict()
    assert found.state_dict().keys() == there.keys()
    assert all(torch.equal(value, there[name]) for name, value in found.state_dict().items())


def test_a_folder_in_shards_of_pytorchs_own_or_in_half_precision_is_read_as_transformers_reads_it(
    bert: Path, tied: Path, tmp_path: Path
) -> None:
    from transformers import BertForSequenceClassification, LlamaForCausalLM

    whole = LlamaForCausalLM.from_pretrained(tied, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    half = LlamaForCausalLM.from_pretrained(tied, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder, expected in ((tied, whole), (tmp_path / "shards", whole), (tmp_path / "half", half.float())):
        found = built(str(folder))
        assert_same(found.module, expected)
        assert found.module.lm_head.weight is found.module.model.embed_tokens.weight and not found.said
    old = Path(shutil.copytree(bert, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors")))
    plain = BertForSequenceClassification.from_pretrained(bert)
    torch.save(plain.state_dict(), old / "pytorch_model.bin")
    assert_same(built(str(old)).module, plain)


def test_a_folder_named_like_a_configuration_is_its_own_or_refused(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2-tiny").mkdir()
    assert type(built("hf:gpt2-tiny").module).__name__ == "GPT2LMHeadModel", "it holds no model"
    for name in ("llama-tiny", "bert"):
        shutil.copytree(tied, name)
        for said in (name, f"hf:./{name}"):
            assert built(said).module.config.hidden_size == SIZES["hidden_size"]
        error = refusal(f"hf:{name}")
        assert "is a known configuration and a folder here" in error.problem and f"hf:./{name}" in error.hint


def test_nothing_is_drawn_while_weights_are_loaded(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    built(f"hf:{bert}")
    assert capfd.readouterr() == ("", "")


def test_a_new_head_and_an_old_one_are_said(bert: Path) -> None:
    assert built(str(bert)).said == ()
    new, old = built(f"{bert}:masked").said
    assert new == f"{bert}: drawn from the seed: cls.predictions.bias (6 tensors)"
    assert old == f"{bert}: not used: bert.pooler.dense.bias (4 tensors)"


def test_shapes_that_differ_are_named_with_both(bert: Path, copy: Path) -> None:
    said = "bert.embeddings.LayerNorm.bias is [16] in the weights, [32] by the configuration (and 37 more)"
    assert refusal(str(bert), hidden_size=32).problem == said
    assert refusal(configured(copy, hidden_size=32)).problem == said
    assert "classifier.bias is [2] in the weights, [5]" in refusal(str(bert), num_labels=5).problem


@pytest.mark.parametrize("head", ["", ":classification"])
@pytest.mark.parametrize(
    ("layers", "said"),
    [(1, r"does not take bert.encoder.layer.1\..* \(16 tensors"), (3, r"lack bert.encoder.layer.2\..* \(16 tensors")],
)  # fmt: skip
def test_layers_that_only_one_side_has_are_refused_also_with_a_head(
    bert: Path, head: str, layers: int, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        built(f"{bert}{head}", num_hidden_layers=layers)


def test_weights_of_another_model_are_refused(bert: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bert, tmp_path / "other"))
    for tensors in ({}, {"zzz": torch.ones(2)}):
        torch.save(tensors, other / "pytorch_model.bin")
        (other / "model.safetensors").unlink(missing_ok=True)
        for head in ("", ":classification"):
            error = refusal(f"{other}{head}")
            assert "the weights lack bert.embeddings" in error.problem and "save_pretrained" in error.hint


@pytest.mark.parametrize("content", [b"", b"hello", 1000])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_damaged_files_are_refused_by_name(bert: Path, copy: Path, name: str, content: bytes | int) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").unlink()
    if name.endswith("json"):
        (copy / "model-00001-of-00001.safetensors").write_bytes(whole)
    (copy / name).write_bytes(content if isinstance(content, bytes) else whole[:content])
    error = refusal(str(copy))
    assert error.problem.startswith("the weights cannot be read: ") and error.where == str(copy)


def test_adapters_and_missing_shards_are_refused(tied: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(str(copy)).problem
    built(str(tied)).module.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    next((tmp_path / "shards").glob("*2-of*")).unlink()
    assert "model-00002-of" in refusal(str(tmp_path / "shards")).problem


@pytest.mark.parametrize(
    ("args", "said"),
    [({"dtype": "bfloat16"}, "dtype has no effect"), ({"torch_dtype": "bfloat16"}, "torch_dtype has no effect"),
     ({"use_cache": True}, "use_cache has no effect: it stays False"), ({"model_type": "gpt2"}, "has no effect"),
     ({"architectures": ["GPT2LMHeadModel"]}, "has no effect"), ({"attn_implementation": "eager"}, "has no effect"),
     ({"to_dict": 3}, "unknown option 'to_dict'"), ({"num_attention_heads": 0}, "zero"),
     ({"hidden_act": "nope"}, "KeyError 'nope'"), ({"rope_parameters": {"rope_type": "nope"}}, "nope"),
     ({"intermediate_size": -1}, "negative dimension")],
)  # fmt: skip
def test_options_without_effect_or_sense_are_refused(tied: Path, args: dict[str, object], said: str) -> None:
    assert said in refusal(str(tied), **args).problem
    assert built(str(tied), use_cache=False).module.config.use_cache is False


def test_options_of_parts_are_checked_as_those_of_the_whole() -> None:
    assert "hiden_size" in refusal("hf:clip", text_config={"hiden_size": 3}).problem


@pytest.mark.parametrize(
    ("values", "said"),
    [({"architectures": "X"}, "no list of names"), ({"architectures": ["GPT2LMHeadModel"]}, "no model of kind bert"),
     ({"num_attention_heads": 0}, "zero"), ({"hidden_size": "x"}, "hidden_size")],
)  # fmt: skip
def test_configurations_without_sense_are_refused(copy: Path, values: dict[str, object], said: str) -> None:
    assert said in refusal(configured(copy, **values)).problem


def test_train_warns_of_a_head_that_is_new(
    bert: Path, laptop: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "import torch\nrows = [{'input_ids': torch.arange(4), 'labels': torch.arange(4) % 2}] * 2\n"
    (tmp_path / "mine.py").write_text(rows)
    own = [f"model={bert}:masked", f"data={tmp_path}/mine.py:rows"]
    given = [*own, "steps=1", "global_batch=2", "validation.every=0"]
    train.run(laptop.take(1), load_job(None, given), folder=tmp_path / "run")
    assert (
        f"warning: {bert}: drawn from the seed: cls.predictions.bias (6 tensors)" in capsys.readouterr().err
    )
