"""What named devices can do: one table, dense arithmetic, no sparsity."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vtr_export.errors import InputError


@dataclass(frozen=True)
class Device:
    """Peak figures: bytes per second of memory, FLOP/s at fp32 and at fp16 or bf16.

    ``fused_attention``: the usual runtime there holds no n x n scores.
    """

    name: str
    bandwidth: float
    fp32_flops: float
    fp16_flops: float
    fused_attention: bool = True

    def flops(self, weights: str) -> float:
        """Peak for a weight type; int8 and int4 are weight-only and compute in fp16."""
        return self.fp32_flops if weights == "fp32" else self.fp16_flops


_TABLE: Final = (
    # NVIDIA Jetson Orin NX 16GB data sheet: 128-bit LPDDR5, 102.4 GB/s, 1024 CUDA and 32 tensor
    # cores at 918 MHz. FLOP/s: AGX Orin's below x 1/2 (cores) x 918/1300 (clock).
    Device("orin-nx", 102.4e9, 1.88e12, 15.0e12),
    # NVIDIA Jetson AGX Orin Series technical brief v1.2 (64GB module, 1.3 GHz): 204.8 GB/s, 5.3
    # TFLOPS FP32, 170 sparse INT8 TOPS from the GPU = 85 dense INT8 = 42.5 dense FP16.
    Device("agx-orin", 204.8e9, 5.3e12, 42.5e12),
    # NVIDIA Ada GPU architecture whitepaper v2, appendix A: 1008 GB/s, 82.6 FP32, 165.2 dense FP16
    # with FP32 accumulation.
    Device("rtx-4090", 1008e9, 82.6e12, 165.2e12),
    # NVIDIA H100 data sheet, SXM5: 3.35 TB/s, 67 FP32, 989.4 dense FP16 (1979 with sparsity).
    Device("h100", 3.35e12, 67e12, 989.4e12),
    # A desktop of 8 cores at 3.5 GHz with AVX2 (two 8-wide FMA = 32 FLOP a cycle and core) and two
    # channels of DDR5-4800 (76.8 GB/s). ONNX Runtime's CPU kernels compute fp16 in fp32.
    Device("cpu", 76.8e9, 0.9e12, 0.9e12, fused_attention=False),
)
DEVICES: Final[Mapping[str, Device]] = {device.name: device for device in _TABLE}


def get_device(name: str) -> Device:
    """A device by name."""
    if (device := DEVICES.get(name)) is None:
        raise InputError(f"no device {name!r}", hint=f"one of: {', '.join(DEVICES)}")
    return device
