"""What well-known GPUs do, from their data sheets: starting values, where nobody has measured.

A plan made from them is marked as assumed. Knows no file and no plan.
"""

import re
from dataclasses import dataclass
from typing import Any

# What an H200 was measured to reach of its own data sheet, so what another card is taken to reach of its: copies over
# PCIe (55.5 of 64 GB/s; 50.8 each way at once), copies within its memory (4.3 of 4.8 TB/s), products (690 of 989 TFLOP/s
# in bfloat16, 45 of 67 in float32, 60 of 67 in float64), messages over NVLink (280 of 450 GB/s), memory left to a rank.
LINK, BOTH, MEMORY, HALF, SINGLE, DOUBLE, HOP, CAPACITY = 0.87, 0.79, 0.9, 0.7, 0.67, 0.9, 0.62, 0.95
STAGED_HOP = 4.1e9  # bytes/s of messages through host memory, measured on two H200s: of cards without NVLink
PCIE4, PCIE5 = 32e9, 64e9  # bytes/s each way, 16 lanes


@dataclass(frozen=True)
class Card:
    """A data sheet: bytes, bytes/s each way, and flop/s without sparsity. `words`: which a device's name must have."""

    words: tuple[str, ...]
    device: str
    capacity: float
    memory: float
    half: float  # bfloat16 and float16, sums in float32
    single: float
    double: float
    link: float
    nvlink: float  # 0: none
    source: str

    def rates(self) -> dict[str, Any]:
        """Fields of Rates, of what the card itself decides; of two figures where no more is known."""
        values = {
            "host_to_device": self.link * LINK,
            "device_to_host": self.link * LINK,
            "both_directions": self.link * BOTH,
            "device_memory": self.memory * MEMORY,
            "hop": self.nvlink * HOP or STAGED_HOP,
            "device_capacity": self.capacity * CAPACITY,
        }
        half = _two_figures(self.half * HALF)
        matmul = {"float64": self.double * DOUBLE, "float32": self.single * SINGLE, "bfloat16": half, "float16": half}
        return {
            "device": self.device,
            **{name: _two_figures(value) for name, value in values.items()},
            "matmul": {dtype: _two_figures(value) for dtype, value in matmul.items()},
        }


A100, H100 = "NVIDIA A100 data sheet (2021)", "NVIDIA H100 data sheet (2023)"
# The first whose words a name has; each card's usual form stands after its others.
CARDS = (
    Card(("A100", "40GB"), "NVIDIA A100 40GB", 40e9, 1.555e12, 312e12, 19.5e12, 19.5e12, PCIE4, 300e9, A100),
    Card(("A100", "PCIe"), "NVIDIA A100 80GB PCIe", 80e9, 1.935e12, 312e12, 19.5e12, 19.5e12, PCIE4, 0, A100),
    Card(("A100",), "NVIDIA A100 80GB", 80e9, 2.039e12, 312e12, 19.5e12, 19.5e12, PCIE4, 300e9, A100),
    Card(("H100", "PCIe"), "NVIDIA H100 PCIe", 80e9, 2e12, 756e12, 51e12, 51e12, PCIE5, 0, H100),
    Card(("H100",), "NVIDIA H100 80GB", 80e9, 3.35e12, 989e12, 67e12, 67e12, PCIE5, 450e9, H100),
    Card(
        *(("H200",), "NVIDIA H200", 141e9, 4.8e12, 989e12, 67e12, 67e12, PCIE5, 450e9),
        "NVIDIA H200 data sheet (2024); rates.py has what was measured",
    ),
    # 1/64 of float32 in float64: the data sheets of the next two do not say it; NVIDIA Ada architecture whitepaper.
    Card(("L40S",), "NVIDIA L40S", 48e9, 864e9, 362e12, 91.6e12, 1.4e12, PCIE4, 0, "NVIDIA L40S data sheet (2023)"),
    Card(
        *(("RTX", "4090"), "NVIDIA GeForce RTX 4090", 24e9, 1.008e12, 165e12, 82.6e12, 1.3e12, PCIE4, 0),
        "NVIDIA Ada GPU architecture whitepaper (2022), appendix A",
    ),
    Card(
        *(("B200",), "NVIDIA B200", 180e9, 8e12, 2250e12, 80e12, 40e12, PCIE5, 900e9),
        "NVIDIA DGX B200 data sheet (2024): an eighth of the system; NVIDIA Blackwell architecture brief (2024)",
    ),
)


def card_of(name: str) -> Card | None:
    """The card of a device's name, as CUDA or a person says it: `NVIDIA A100-SXM4-80GB`, `a100`. None: unknown."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return next((card for card in CARDS if words.issuperset(map(str.lower, card.words))), None)


def _two_figures(value: float) -> float:
    return float(f"{value:.2g}")
