"""The chip catalog: every file reads, every figure says where it comes from, and missing dtypes fall back."""

import math
import pickle
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import ChipError
from comms.units import Quantity, format_quantity, parse
from kernels.chips import (
    CATALOG,
    FALLBACKS,
    ChipKind,
    NocShape,
    chip_document,
    chip_keys,
    load_chip,
    parse_chip,
)

FIGURES = {
    ("memory", "bandwidth"): (Quantity.DATA_RATE, "memory_bytes_per_s"),
    ("cores", "clock"): (Quantity.FREQUENCY, "clock_hz"),
    ("tdp",): (Quantity.POWER, "tdp_w"),
    ("launch",): (Quantity.TIME, "launch_s"),
}


def test_the_catalog_has_forty_six_chips():
    assert len(chip_keys()) == 46


@pytest.mark.parametrize("key", chip_keys())
def test_every_chip_reads_and_every_figure_has_a_source(key):
    chip = load_chip(key)
    document = yaml.safe_load((CATALOG / f"{key}.yaml").read_text())
    bare = ("kind", "version", "key", "name", "vendor", "year", "class")
    figures = [name for name, value in document.items() if name not in bare and "value" in value]
    sections = [name for name in document if name not in bare and name not in figures]
    paths = figures + [f"{section}.{figure}" for section in sections for figure in document[section]]
    assert chip.key == key
    assert all(chip.sources[path].strip() for path in paths)
    assert chip.sources["launch"]


@pytest.mark.parametrize("key", chip_keys())
def test_every_chip_has_what_a_roofline_needs(key):
    chip = load_chip(key)
    assert chip.memory_bytes > 0
    assert chip.memory_bytes_per_s > 0
    assert all(chip.peak(dtype) > 0 for dtype in ("bf16", "fp16", "tf32", "fp32", "fp64", "fp8", "int8"))
    assert chip.peak("fp64") <= chip.peak("fp32") <= chip.peak("bf16")
    assert 0 < chip.matmul_efficiency <= 1
    assert 0 < chip.memory_efficiency <= 1
    assert chip.cores > 0


def test_known_figures_of_an_a100():
    chip = load_chip("nvidia_a100_sxm_80gb")
    assert chip.peak("bf16") == 312e12
    assert chip.memory_bytes == 80 * 10**9
    assert chip.memory_bytes_per_s == 2.039e12
    assert (chip.tdp_w, chip.usd_per_hour, chip.list_usd) == (400.0, 1.75, None)
    assert chip.scaleup is not None
    assert chip.scaleup.bytes_per_s == 300e9
    assert chip.matmul_efficiency == 0.869
    assert "recalled" in chip.sources["tdp"]


@pytest.mark.parametrize("key", [k for k in chip_keys() if k.startswith(("cerebras", "graphcore"))])
def test_chips_without_main_memory_use_their_sram(key):
    chip = load_chip(key)
    assert chip.memory_is_sram
    assert chip.memory_bytes == chip.sram_bytes
    assert chip.memory_bytes_per_s == chip.sram_bytes_per_s


def test_on_chip_hops_are_seconds():
    noc = load_chip("tenstorrent_wormhole_n150").noc
    assert noc is not None
    assert noc.hop_latency_s == pytest.approx(9e-9)
    assert noc.hop_bytes_per_s == 32e9
    assert noc.entry_latency_s == pytest.approx(5e-9)
    assert (noc.shape, noc.dims, noc.networks) == (NocShape.ONE_WAY_TORUS, (10, 12), 2)
    assert noc.multicasts


def test_cores_that_no_grid_is_known_of():
    noc = load_chip("graphcore_gc2").noc
    assert (noc.shape, noc.dims, noc.hop_latency_s) == (None, (), None)
    assert noc.memory_latency_s == pytest.approx(6 / 1.6e9)
    assert noc.loaded_latency_factor == 1.24


@pytest.mark.parametrize(
    "key", [key for key in chip_keys() if load_chip(key).noc and load_chip(key).noc.dims]
)
def test_a_grid_has_room_for_the_cores_that_are_counted(key):
    chip = load_chip(key)
    dies = 2 if key == "tenstorrent_wormhole_n300" else 1
    assert (
        math.prod(chip.noc.dims) * dies >= 0.88 * chip.cores
    )  # Cerebras counts cores outside the usable rectangle
    assert chip.noc.shape is not None


def test_missing_dtypes_fall_back_as_documented():
    assert load_chip("nvidia_v100_sxm2_32gb").peak("bf16") == 125e12  # from fp16
    assert load_chip("apple_m3_max").peak("bf16") == 14.2e12  # from fp32
    assert load_chip("apple_m3_max").peak("fp64") == 7.1e12  # half of fp32
    assert load_chip("google_tpu_v4").peak("fp32") == 275e12 / 8  # from bf16
    assert load_chip("wave_computing_dpu").peak("bf16") == 90e12  # half of int8
    with pytest.raises(ChipError, match="no peak for 'fp3'"):
        load_chip("nvidia_l4").peak("fp3")


@given(st.sampled_from(chip_keys()), st.sampled_from(sorted(FALLBACKS)))
def test_a_fallback_uses_the_first_published_dtype(key, dtype):
    chip = load_chip(key)
    candidates = [
        chip.peak_flops_per_s[other] * f for other, f in FALLBACKS[dtype] if other in chip.peak_flops_per_s
    ]
    assert chip.peak(dtype) == chip.peak_flops_per_s.get(dtype, candidates[0] if candidates else None)


@given(st.sampled_from(sorted(FIGURES)), st.floats(1e-3, 1e16))
def test_the_catalog_reads_numbers_as_the_cluster_file_does(path, value):
    quantity, field = FIGURES[path]
    text = format_quantity(value, quantity, digits=15)
    document = chip_document("nvidia_l4")
    found = document
    for part in path[:-1]:
        found = found[part]
    found[path[-1]] = text
    assert getattr(parse_chip(document), field) == parse(text, quantity)


def test_chips_are_values():
    chip = load_chip("nvidia_h100_sxm")
    assert pickle.loads(pickle.dumps(chip)) == chip
    assert hash(chip) == hash(parse_chip(chip_document("nvidia_h100_sxm")))


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("class", "gpuu", "class must be one of .*gpu"),
        ("tdp", "400 GB", "tdp: '400 GB' is a size, but a power is expected"),
        ("tdp", 400, "tdp: a power needs a unit, got the bare value 400"),
        ("memory", {"capacity": "80 GB", "type": "hbm"}, "memory.bandwidth is missing"),
        ("peak", {"fp4": "1 TFLOP/s"}, "peak needs a figure"),
        ("cores", {"count": "many"}, "cores.count must be a bare number"),
        ("noc", {"topology": "x", "shape": "toros"}, "noc.shape must be one of mesh, torus, one-way torus"),
        ("noc", {"topology": "x", "multicast": "perhaps"}, "noc.multicast must be yes or no"),
        ("noc", {"topology": "x", "dims": "10 by 12"}, "noc.dims must be sizes such as 10 x 12"),
        ("noc", {"topology": "x", "dims": "0 x 12"}, "noc.dims must be sizes such as 10 x 12"),
    ],
)
def test_a_bad_figure_is_named(section, value, message):
    with pytest.raises(ChipError, match=message):
        parse_chip({**chip_document("nvidia_l4"), section: value})


def test_an_unknown_chip_is_refused():
    with pytest.raises(ChipError, match="not in the catalog"):
        load_chip("nvidia_z9000")


def test_every_kind_has_a_launch_default():
    assert {load_chip(key).kind for key in chip_keys()} <= set(ChipKind)


def test_reading_a_chip_loads_no_torch():
    code = "import sys, kernels.chips as c; c.load_chip('nvidia_l4'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
