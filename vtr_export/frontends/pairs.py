"""Complex numbers, which ONNX has none of, as pairs of real ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Pair:
    """Stands where a complex tensor stood; ``parts`` [..., 2] are real and imaginary."""

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts

    @classmethod
    def of(cls, values: "Pair | Tensor") -> "Pair":
        """A complex constant, or what is a pair already."""
        return values if isinstance(values, Pair) else cls(torch.view_as_real(values))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.view_as_real:
            return args[0].parts
        if func in (Tensor.mul, Tensor.__mul__, Tensor.__rmul__):
            return args[1] * args[0] if isinstance(args[1], Pair) else args[0] * args[1]
        return NotImplemented

    @property
    def shape(self) -> torch.Size:
        """Of the complex tensor."""
        return self.parts.shape[:-1]

    @property
    def ndim(self) -> int:
        """Of the complex tensor."""
        return self.parts.ndim - 1

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.parts.device

    def to(self, device: torch.device) -> "Pair":
        """On another device."""
        return Pair(self.parts.to(device))

    def view(self, *shape: int) -> "Pair":
        """In another shape."""
        return Pair(self.parts.view(*shape, 2))

    def __getitem__(self, index: Any) -> "Pair":
        return Pair(self.parts[index])

    def __mul__(self, other: "Pair | Tensor | float") -> "Pair":
        if isinstance(other, (int, float)):
            return Pair(self.parts * other)
        mine, theirs = self.parts, Pair.of(other).parts
        a, b, c, d = mine[..., 0], mine[..., 1], theirs[..., 0], theirs[..., 1]
        real, imaginary = a * c - b * d, a * d + b * c
        return Pair(torch.cat((real[..., None], imaginary[..., None]), dim=-1))


def hold_pairs(model: Any) -> None:
    """Pairs in the place of ``model``'s complex buffers; they are constants."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_complex():
                delattr(module, name)
                setattr(module, name, Pair.of(buffer))


class Pairs(TorchFunctionMode):
    """Calls that would make complex tensors of real ones that are traced."""

    def __init__(self) -> None:
        super().__init__()
        self._ones: Tensor | None = None  # the last that were made

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ones_like:
            self._ones = func(*args, **(kwargs or {}))
            return self._ones
        if func is torch.polar:
            return self._turned(*args)
        if func is torch.view_as_complex:
            return Pair(args[0])
        return func(*args, **(kwargs or {}))

    def _turned(self, size: Tensor, angle: Tensor) -> Pair:
        """Of that size and angle; ones that nothing is multiplied with leave no shape behind."""
        parts: Sequence[Tensor] = (angle.cos(), angle.sin())
        if size is not self._ones:
            parts = [size * part for part in parts]
        return Pair(torch.cat([part[..., None] for part in parts], dim=-1))
