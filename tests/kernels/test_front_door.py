"""The front door: what `kernels` offers a stranger, in the few lines that the documentation shows."""

from dataclasses import dataclass

import kernels
from kernels import load_chip, segment_time


@dataclass(frozen=True)
class Product:
    """What a matrix product of n x n bf16 numbers computes and moves."""

    n: int
    target: str = "aten.mm.default"
    outs: tuple[object, ...] = ()

    @property
    def flops(self):
        return 2 * self.n**3

    @property
    def read_bytes(self):
        return 2 * self.write_bytes

    @property
    def write_bytes(self):
        return 2 * self.n**2


def test_every_name_leads_into_the_package():
    assert {getattr(kernels, name).__module__.split(".")[0] for name in kernels.__all__} == {"kernels"}
    assert set(kernels.__all__) <= set(dir(kernels))


def test_a_chip_says_how_long_a_product_takes():
    chip = load_chip("nvidia_h100_sxm")
    time = segment_time([Product(4096)], chip)
    assert time.seconds == 2 * 4096**3 / (chip.peak("fp32") * chip.matmul_efficiency)
