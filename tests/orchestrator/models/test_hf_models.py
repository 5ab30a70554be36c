"""Hugging Face models: a head for every task, folders with weights, and what is refused."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from comms.errors import ModelError
from orchestrator.models.hf_models import HEADS
from orchestrator.models.model_builder import BuiltModel, build

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {**SMALL, "vocab_size": 40}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
SOUND = {**SMALL, "conv_dim": [8], "conv_stride": [5], "conv_kernel": [10], "num_feat_extract_layers": 1,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 40}  # fmt: skip
PAIR = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 40}  # fmt: skip
SPEECH = {**PAIR, "num_mel_bins": 8, "max_source_positions": 8, "pad_token_id": 0, "decoder_start_token_id": 1,
          "bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": []}  # fmt: skip


def built(name: str, args: Mapping[str, object], shifted: bool = True, seed: int = 0) -> BuiltModel:
    return build(name, args, device="cpu", dtype=torch.float32, seed=seed, shifted=shifted)


@pytest.mark.parametrize(
    ("name", "args", "kind"),
    [
        ("hf:bert", TEXT, "BertForMaskedLM"), ("hf:bert:causal", {**TEXT, "is_decoder": True}, "BertLMHeadModel"),
        ("hf:bert:classification", TEXT, "BertForSequenceClassification"),
        ("hf:bert:tokens", TEXT, "BertForTokenClassification"), ("hf:bert:qa", TEXT, "BertForQuestionAnswering"),
        ("hf:bert:choice", TEXT, "BertForMultipleChoice"), ("hf:vit", IMAGE, "ViTForImageClassification"),
        ("hf:bart", PAIR, "BartForConditionalGeneration"), ("hf:whisper", SPEECH, "WhisperForConditionalGeneration"),
        ("hf:wav2vec2:ctc", SOUND, "Wav2Vec2ForCTC"), ("hf:gpt2:GPT2LMHeadModel", {}, "GPT2LMHeadModel"),
    ],
)  # fmt: skip
def test_every_head_trains_on_its_example_with_its_own_loss(
    name: str, args: dict[str, object], kind: str, one_thread: None
) -> None:
    if name.endswith("GPT2LMHeadModel"):
        args = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 40}
    model = built(name, args)
    assert type(model.module).__name__ == kind and model.module.training
    loss = model.module(**model.example_batch(2, 6)).loss
    loss.backward()
    assert loss.isfinite() and any(p.grad is not None for p in model.module.parameters())


def test_attention_is_sdpa_or_else_eager() -> None:
    assert built("hf:bert", TEXT).module.config._attn_implementation == "sdpa"
    squeezed = {**SMALL, "vocab_size": 40, "embedding_size": 16}
    assert built("hf:squeezebert", squeezed).module.config._attn_implementation == "eager"


def test_dropout_stays_as_the_configuration_has_it() -> None:
    rates = {m.p for m in built("hf:bert", TEXT).module.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.1}


def test_labels_of_the_users_own_data_are_shifted_by_the_model_itself() -> None:
    model, tokens = built("hf:llama-tiny", {}, shifted=False), torch.arange(12).reshape(2, 6)
    logits = model.module(input_ids=tokens).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model.module(input_ids=tokens, labels=tokens).loss, expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "bert"
    built("hf:bert", TEXT, seed=7).module.save_pretrained(path)
    return path


def test_a_folder_gives_the_weights_that_are_in_it(folder: Path) -> None:
    saved = built("hf:bert", TEXT, seed=7).module.state_dict()
    for name in (f"hf:{folder}", str(folder), f"{folder}:masked"):
        found = built(name, {}).module.state_dict()
        assert found.keys() == saved.keys() and all(torch.equal(found[k], saved[k]) for k in saved)


def test_a_head_that_a_folder_lacks_is_drawn_from_the_seed_if_it_is_named(folder: Path) -> None:
    one, same, other = (built(f"{folder}:classification", {}, seed=s).module for s in (0, 0, 1))
    saved = built(str(folder), {}).module
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    body = saved.bert.encoder.state_dict()
    assert all(torch.equal(value, body[name]) for name, value in one.bert.encoder.state_dict().items())


def test_a_folder_without_weights_or_without_some_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match="has no weights") as caught:
        built(str(tmp_path), {})
    assert caught.value.hint.endswith("config.json")
    text = (folder / "config.json").read_text().replace("BertForMaskedLM", "BertForTokenClassification")
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"the weights lack classifier.bias \(2 tensors\)"):
        built(str(tmp_path), {})


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [("hf:bert:nosuch", "bert has no head 'nosuch'", "masked, causal"),
     ("hf:bert:BertModel", "BertModel has no loss", "name a head"),
     ("hf:nosuch", "no configuration 'nosuch'", "model_type")],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_with_what_can(name: str, said: str, hint: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        built(name, {})
    assert hint in caught.value.hint


def test_every_head_names_an_auto_class_of_transformers() -> None:
    import transformers

    assert all(hasattr(transformers, auto) for auto, _ in HEADS.values())
