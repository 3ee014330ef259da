"""Calls through cuda-python and the driver it finds: load machine code, launch, compare.

``python cuda_child.py IMAGE``. A process of its own, because cuda-python keeps the driver it found
first. The image was compiled before: NVRTC itself asks a driver for more than ours has.
"""

import sys
from pathlib import Path
from unittest import mock

import pytest
from kernel_on_host import DTYPES
from test_plugin_kernel import Sizes, check, draw

from vtr_export.backends.tensorrt import kernel
from vtr_export.errors import EngineError

with pytest.raises(EngineError, match="CUDA_ERROR_INVALID_IMAGE"):
    kernel.Launcher(b"no image")
print("no image")
images = {86: Path(sys.argv[1]).read_bytes()}  # the driver's device is an 8.6
with mock.patch.object(kernel, "compile_image", images.__getitem__):
    launcher = kernel.launcher()
    assert kernel.launcher() is launcher
sizes = Sizes(kv_heads=2, group=4, head_dim=64, image=200, width=64)
for dtype in DTYPES:
    for asks in ("last", "text"):
        check(launcher, draw(sizes, 1, padded=False, keep=70, dtype=dtype, asks=asks))
    print(dtype)
long = draw(Sizes(1, image=4, text=99_000, past=0, width=1), 2, padded=False, keep=0)
assert long.shape.shared_bytes > 48 << 10
check(launcher, long)
print("long")
