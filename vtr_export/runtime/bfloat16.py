"""bfloat16 on the host: its bits in uint16, its values in float32, which holds them exactly."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_QUIET = 0x40  # the bit that makes a NaN of a mantissa cut to zero


def to_bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Round to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    cut = (bits >> 16).astype(np.uint16)
    return np.where(np.isnan(values), cut | np.uint16(_QUIET), rounded)


def from_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
