"""Models: every way to name one builds the same thing each time, and every wrong name says what to do."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from comms.errors import ModelError
from orchestrator.models import hf_models
from orchestrator.models.model_builder import BuiltModel, build
from orchestrator.models.model_specs import (
    GPT_PRESETS,
    HF_CONFIGS,
    ModelSpec,
    SourceKind,
    gpt_options,
    parse_model,
)

TINY = ["builtin:gpt-nano", "hf:gpt2-tiny", "hf:llama-tiny"]
FACTORY = """
import torch
class Net(torch.nn.Module):
    vocab_size = 10
    max_seq = 4
    tp_plan = {"first": "colwise"}
    def __init__(self, width, shared):
        super().__init__()
        self.first = torch.nn.Linear(width, width)
        self.second = self.first if shared else torch.nn.Linear(width, width)
    def forward(self, x):
        return self.second(self.first(x)).square().mean()
class Fed(Net):
    def example_batch(self, batch, seq):
        return {"x": torch.zeros(batch, seq, 3)}
def net(width=3, shared=False):
    return Net(width, shared)
def fed():
    return Fed(3, False)
def text():
    return "no module"
"""


def cpu(
    spec: str, args: Mapping[str, object] | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
):
    return build(spec, args or {}, device="cpu", dtype=dtype, seed=seed)


def loss_of(model: BuiltModel) -> torch.Tensor:
    found = model.module(**model.example_batch(2, 16))
    return found if isinstance(found, torch.Tensor) else found.loss


def num_parameters(model: BuiltModel) -> int:
    return sum(parameter.numel() for parameter in model.module.parameters())


@pytest.mark.parametrize("spec", TINY)
def test_loss_starts_at_a_uniform_guess_and_every_parameter_gets_a_gradient(spec: str) -> None:
    model = cpu(spec)
    loss = loss_of(model)
    assert loss.item() == pytest.approx(math.log(model.vocab_size or 0), abs=0.3)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.module.parameters())


@pytest.mark.parametrize("spec", TINY)
def test_labels_are_not_shifted_again(spec: str) -> None:
    model = cpu(spec)
    batch = model.example_batch(1, 8)
    logits = model.module(input_ids=batch["input_ids"])
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    expected = torch.nn.functional.cross_entropy(logits[0], batch["labels"][0])
    found = model.module(**batch)
    assert torch.allclose(found if isinstance(found, torch.Tensor) else found.loss, expected)


@pytest.mark.parametrize("spec", TINY)
def test_same_seed_same_values_and_the_global_random_state_is_untouched(spec: str) -> None:
    before = torch.get_rng_state()
    first, second, other = cpu(spec), cpu(spec), cpu(spec, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    pairs = zip(first.module.state_dict().values(), second.module.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert loss_of(first) != loss_of(other)


@pytest.mark.parametrize("spec", TINY)
def test_other_dtypes_hold_the_same_values_rounded(spec: str) -> None:
    single, double, half = cpu(spec), cpu(spec, dtype=torch.float64), cpu(spec, dtype=torch.bfloat16)
    for name, value in single.module.named_parameters():
        assert torch.equal(double.module.get_parameter(name), value.double())
        assert torch.equal(half.module.get_parameter(name), value.bfloat16())
    assert loss_of(double).dtype is torch.float64
    assert loss_of(half).item() == pytest.approx(loss_of(double).item(), rel=0.02)


@pytest.mark.parametrize("spec", TINY)
def test_meta_has_the_shapes_and_names_of_the_real_thing(spec: str) -> None:
    real, shapes = cpu(spec), build(spec, {}, device="meta", dtype=torch.float32, seed=0)
    assert {name: value.shape for name, value in real.module.named_parameters()} == {
        name: value.shape for name, value in shapes.module.named_parameters()
    }
    assert all(tensor.is_meta for tensor in shapes.module.state_dict().values())
    assert shapes.example_batch(2, 8)["labels"].is_meta


@pytest.mark.parametrize(
    "spec", [f"builtin:{name}" for name in GPT_PRESETS] + [f"hf:{name}" for name in HF_CONFIGS]
)
def test_every_named_model_builds_as_shapes(spec: str) -> None:
    model = build(spec, {}, device="meta", dtype=torch.bfloat16, seed=0)
    assert model.name == spec


@pytest.mark.parametrize(
    ("spec", "millions"), [("hf:gpt2", 124.44), ("hf:gpt2-xl", 1557.6), ("hf:llama3-8b", 8030.3)]
)
def test_hf_configurations_have_their_published_size(spec: str, millions: float) -> None:
    model = build(spec, {}, device="meta", dtype=torch.bfloat16, seed=0)
    assert num_parameters(model) / 1e6 == pytest.approx(millions, rel=1e-4)


@pytest.mark.parametrize("spec", TINY)
def test_tensor_parallel_plan_names_modules_that_exist(spec: str) -> None:
    model = cpu(spec)
    names = {
        ".".join("*" if part.isdigit() else part for part in name.split("."))
        for name, _ in model.module.named_modules()
    }
    gates = {"blocks.*.mlp.gate"}  # only models with SwiGLU have one
    assert set(model.tp_plan) - gates <= names
    assert set(model.tp_plan.values()) <= {"colwise", "rowwise", "vocab", "fused_qkv"}


def test_rotary_frequencies_of_hf_models_stay_in_fp32() -> None:
    buffers = dict(cpu("hf:llama-tiny", dtype=torch.bfloat16).module.named_buffers())
    assert {buffer.dtype for name, buffer in buffers.items() if "inv_freq" in name} == {torch.float32}


def test_bare_gpt_is_the_default_size_and_args_override_it() -> None:
    assert parse_model("builtin:gpt") == ModelSpec(SourceKind.BUILTIN, "gpt-mini")
    assert num_parameters(cpu("builtin:gpt-nano", {"layers": 4})) > num_parameters(cpu("builtin:gpt-nano"))
    assert num_parameters(cpu("hf:llama-tiny", {"num_hidden_layers": 1})) < num_parameters(
        cpu("hf:llama-tiny")
    )


def test_hf_config_file_builds_like_the_bundled_one(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dict(HF_CONFIGS["llama-tiny"])))
    assert torch.equal(loss_of(cpu(f"hf:{path}")), loss_of(cpu("hf:llama-tiny")))


def test_factories_are_called_with_args_from_files_and_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "my_factory_model.py"
    path.write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    from_file = cpu(f"{path}:net", {"width": 5}, dtype=torch.float64)
    from_module = cpu("my_factory_model:net", {"width": 5}, dtype=torch.float64)
    for model in (from_file, from_module):
        assert (model.vocab_size, model.max_seq, model.tp_plan) == (10, 4, {})
    assert torch.equal(from_file.module.first.weight, from_module.module.first.weight)
    assert num_parameters(cpu("my_factory_model:net", {"shared": True}, dtype=torch.bfloat16)) == 12
    assert build(f"{path}:net", {}, device="meta", dtype=torch.float32, seed=0).module.first.weight.is_meta


def test_a_module_may_bring_its_own_example_batch(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(FACTORY)
    model = cpu(f"{path}:fed")
    batch = model.example_batch(2, 4)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"x": (2, 4, 3)}
    assert model.module(**batch).shape == ()


@pytest.mark.parametrize(
    ("spec", "args", "says"),
    [
        ("builtin:gpt-nanoo", {}, "did you mean 'gpt-nano'"),
        ("hf:gpt3", {}, "did you mean 'gpt2'"),
        ("resnet", {}, "cannot tell what model 'resnet' is"),
        ("builtin:gpt-nano", {"layer": 2}, "did you mean 'layers'"),
        ("builtin:gpt-nano", {"layers": "two"}, "layers is 'two'"),
        ("builtin:gpt-nano", {"layers": True}, "layers is True"),
        ("builtin:gpt-nano", {"layers": 0}, "give at least 1"),
        ("builtin:gpt-nano", {"norm": "batch"}, "choose one of: layer, rms"),
        ("builtin:gpt-nano", {"heads": 5}, "width 64 is not a multiple of heads 5"),
        ("builtin:gpt-nano", {"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ("builtin:gpt-nano", {"width": 60, "rotary": True}, "even head width, got 15"),
        ("hf:llama-tiny", {"hidden": 3}, "unknown option 'hidden'"),
        ("hf:llama-tiny", {"num_attention_heads": 5}, "hidden size"),
        ("hf:no/such/config.json", {}, "cannot read no/such/config.json: No such file"),
        ("no_such.py:net", {}, "no file no_such.py"),
        ("no_such_package.models:net", {}, "no module 'no_such_package.models'"),
        ("math:net", {}, "math has no 'net'"),
        ("math:sqrt", {"x": 1}, "math:sqrt cannot be called so"),
        ("math:gcd", {}, "math:gcd returned a int"),
    ],
)
def test_wrong_names_and_arguments_say_what_to_do(spec: str, args: dict[str, object], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        cpu(spec, args)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "JSON object"),
        ('{"model_type": "nonesuch"}', "model_type 'nonesuch'"),
        ('{"model_type": "t5", "architectures": ["T5Model"]}', "T5Model has no loss"),
    ],
)
def test_wrong_config_files_say_what_to_do(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError) as caught:
        cpu(f"hf:{path}")
    assert says in str(caught.value)


def test_sequences_beyond_the_learned_positions_are_refused() -> None:
    with pytest.raises(ModelError, match="seq 257 is longer than the 256 positions"):
        cpu("hf:gpt2-tiny").example_batch(1, 257)
    assert cpu("builtin:gpt-nano", {"rotary": True}).max_seq is None


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'orchestrate-chips\[hf\]'"):
        cpu("hf:llama-tiny")


def test_options_take_enumerations_as_text() -> None:
    options = gpt_options("gpt-nano", {"norm": "rms", "activation": "swiglu", "kv_heads": None})
    assert (options.norm, options.activation, options.num_kv_heads) == ("rms", "swiglu", 4)
    assert options.hidden_width == 192


def test_spec_prints_as_it_was_written() -> None:
    for text in ("builtin:gpt-nano", "hf:gpt2", "some/file.py:make", "package.module:make"):
        assert str(parse_model(text)) == text


def test_specs_are_read_without_loading_torch() -> None:
    code = "import sys, orchestrator.models.model_specs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_transformers_runs_beside_our_kernels_package() -> None:
    # transformers probes a package called `kernels` and would use it as its kernel hub.
    import kernels

    assert not hasattr(kernels, "__version__")
    assert (
        hf_models.next_token_loss is cpu("hf:gpt2-tiny").module.loss_function.__globals__["next_token_loss"]
    )
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()
    assert loss_of(cpu("hf:llama-tiny")).isfinite()
