"""One GPU: its memory and one stream. Nothing else here speaks to CUDA."""

from typing import Any

from numpy.typing import NDArray

from vtr_export.errors import UnavailableError

_ELSEWHERE = "run it where the GPU is; the artifact it was built from runs here on the CPU"
_NO_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorStubLibrary", "cudaErrorNoDevice")


class Cuda:
    """The first visible device (``CUDA_VISIBLE_DEVICES`` chooses) through cuda-python."""

    def __init__(self) -> None:
        """UnavailableError without cuda-python, driver or GPU."""
        self._api = _import()
        count = self._ask("cudaGetDeviceCount")
        if not count:
            raise UnavailableError("this machine has no NVIDIA GPU", hint=_ELSEWHERE)
        self._ask("cudaSetDevice", 0)
        attributes = self._api.cudaDeviceAttr
        major, minor = (
            self._ask("cudaDeviceGetAttribute", attribute, 0)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.sm = 10 * int(major) + int(minor)  # 86 is SM 8.6
        self._stream = self._ask("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking)

    @property
    def stream(self) -> int:
        """The handle on which everything happens in order."""
        return int(self._stream)

    def allocate(self, size_bytes: int) -> int:
        """The address of new device memory; UnavailableError when there is not as much."""
        error, address = self._api.cudaMalloc(size_bytes)
        if error == self._api.cudaError_t.cudaErrorMemoryAllocation:
            self._api.cudaGetLastError()  # it is reported once more otherwise
            free, total = self._ask("cudaMemGetInfo")
            raise UnavailableError(
                f"the GPU has no {size_bytes} bytes left ({free} of {total} are free)",
                hint="ask with fewer images or rows, or build for less: vtr build --max-batch, "
                "--max-vision-tokens, --max-text-tokens",
            )
        self._check("cudaMalloc", error)
        return int(address)

    def free(self, address: int) -> None:
        """Waits for the device."""
        self._ask("cudaFree", address)

    def upload(self, array: NDArray[Any], address: int) -> None:
        """In stream order; ``array`` (contiguous) must live until ``synchronize``."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, address: int, array: NDArray[Any]) -> None:
        """In stream order; ``array`` (contiguous) is filled after ``synchronize``."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def synchronize(self) -> None:
        """Wait until everything asked for so far is done."""
        self._ask("cudaStreamSynchronize", self._stream)

    def _copy(self, to: int, source: int, size_bytes: int, kind: str) -> None:
        if size_bytes:
            way = getattr(self._api.cudaMemcpyKind, kind)
            self._ask("cudaMemcpyAsync", to, source, size_bytes, way, self._stream)

    def _ask(self, name: str, *arguments: Any) -> Any:
        """The one result, or the tuple of them."""
        error, *results = getattr(self._api, name)(*arguments)
        self._check(name, error)
        return results[0] if len(results) == 1 else tuple(results)

    def _check(self, name: str, error: Any) -> None:
        if error == self._api.cudaError_t.cudaSuccess:
            return
        if error.name in _NO_DRIVER:
            raise UnavailableError(
                f"this machine has no NVIDIA driver and GPU that CUDA can use ({error.name})",
                hint=_ELSEWHERE,
            )
        raise RuntimeError(f"{name}: {error.name}")


def _import() -> Any:
    try:
        from cuda.bindings import runtime  # type: ignore[import-untyped]  # it ships no types
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("cuda"):
            raise
        raise UnavailableError(
            "running an engine needs cuda-python, which is not installed",
            hint="pip install cuda-bindings",
        ) from error
    return runtime
