"""What devices can do at most, for MFU: dense matrix products, by precision.

TFLOP/s without sparsity, from NVIDIA's and AMD's data sheets and architecture white papers (of SXM parts unless the name says otherwise). Half precision sums up in fp32. fp32 is that of the
ordinary cores, where matrix products run; convolutions run in TF32 unless torch is told otherwise, so a convolutional tower in fp32 may pass it.
"""

import re

import torch

HALF, FP32 = "half", "fp32"
# words of the device's name -> TFLOP/s; the first row whose words all occur counts
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("GB200", {HALF: 2500, FP32: 80}),
    ("B200", {HALF: 2250, FP32: 75}),
    ("H200 NVL", {HALF: 835.5, FP32: 60}),
    ("H200", {HALF: 989.4, FP32: 66.9}),
    ("GH200", {HALF: 989.4, FP32: 66.9}),
    ("H100 NVL", {HALF: 835.5, FP32: 60}),
    ("H100 PCIe", {HALF: 756, FP32: 51.2}),
    ("H100", {HALF: 989.4, FP32: 66.9}),
    ("H800", {HALF: 989.4, FP32: 66.9}),
    ("A800", {HALF: 312, FP32: 19.5}),
    ("A100", {HALF: 312, FP32: 19.5}),
    ("A40", {HALF: 149.7, FP32: 37.4}),
    ("A30", {HALF: 165, FP32: 10.3}),
    ("A10", {HALF: 125, FP32: 31.2}),
    ("L40S", {HALF: 362, FP32: 91.6}),
    ("L40", {HALF: 181, FP32: 90.5}),
    ("L4", {HALF: 121, FP32: 30.3}),
    ("V100 PCIE", {HALF: 112, FP32: 14}),
    ("V100", {HALF: 125, FP32: 15.7}),
    ("T4", {HALF: 65, FP32: 8.1}),
    ("RTX A6000", {HALF: 154.8, FP32: 38.7}),
    ("RTX 3090", {HALF: 71, FP32: 35.6}),
    ("RTX 4090", {HALF: 165.2, FP32: 82.6}),
    ("MI300X", {HALF: 1307.4, FP32: 163.4}),
)
WITHOUT_BF16 = ("V100", "T4")
VARIANTS = {"TI", "D", "LAPTOP", "SUPER"}  # other chips than those whose name they add to


def peak_flops(device: torch.device, precision: str, override: float | None = None) -> float | None:
    """FLOP/s of a device at a recipe's precision; None if nobody told. ``override``: TFLOP/s, which counts before the table."""
    if override is not None:
        return override * 1e12
    return known_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def known_peak(name: str, precision: str) -> float | None:
    """FLOP/s of a device by the name that its driver tells; None if the table does not have it, or it has no such arithmetic."""
    words = set(re.split(r"[\s_-]+", name.upper()))
    if words & VARIANTS:
        return None
    found = next(((wanted, tflops) for wanted, tflops in PEAKS if set(wanted.upper().split()) <= words), None)
    if found is None or (precision == "bf16" and found[0].split()[0] in WITHOUT_BF16):
        return None
    return found[1][FP32 if precision == "fp32" else HALF] * 1e12
