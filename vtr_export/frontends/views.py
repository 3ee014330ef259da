"""Elements of a stored tensor in another order or number: where they lie, without reading them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from vtr_export.checkpoint import DTYPE_BITS, TensorRef

Loop: TypeAlias = tuple[int, int]  # how many, and how many elements apart


class UnfollowedError(ValueError):
    """A step that cannot be followed without reading the elements."""


@dataclass(frozen=True)
class View:
    """``axes``: of each axis its loops, outermost first; ``start``: the first element."""

    ref: TensorRef
    axes: tuple[tuple[Loop, ...], ...]
    start: int = 0

    @classmethod
    def of(cls, ref: TensorRef) -> "View":
        """The whole tensor; UnfollowedError where it is a part in pieces, or lies between bytes."""
        if ref.loops or DTYPE_BITS[ref.dtype] % 8:
            raise UnfollowedError(f"{ref.name} lies in pieces")
        steps = [math.prod(ref.shape[axis + 1 :]) for axis in range(len(ref.shape))]
        return cls(ref, tuple(((size, step),) for size, step in zip(ref.shape, steps, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        """As people see it."""
        return tuple(math.prod(count for count, _ in loops) for loops in self.axes)

    def transpose(self, one: int, other: int) -> "View":
        """With two axes exchanged."""
        axes = list(self.axes)
        axes[one], axes[other] = axes[other], axes[one]
        return replace(self, axes=tuple(axes))

    def narrow(self, axis: int, start: int, length: int) -> "View":
        """``length`` places of an axis from ``start`` on."""
        loops, first = _narrowed(_merged(self.axes[axis]), start, length)
        axes = (*self.axes[:axis], loops, *self.axes[axis:][1:])
        return replace(self, axes=axes, start=self.start + first)

    def split(self, sizes: Sequence[int], axis: int) -> tuple["View", ...]:
        """Parts behind each other along an axis; UnfollowedError unless they are all of it."""
        if sum(sizes) != self.shape[axis]:
            raise UnfollowedError(f"{self.ref.name}: no parts of {list(sizes)}")
        starts = (sum(sizes[:number]) for number in range(len(sizes)))
        return tuple(self.narrow(axis, *pair) for pair in zip(starts, sizes, strict=True))

    def reshape(self, shape: Sequence[int]) -> "View":
        """With the same elements in the same order."""
        known = math.prod(size for size in shape if size != -1)
        sizes = [math.prod(self.shape) // known if size == -1 else size for size in shape]
        if math.prod(sizes) != math.prod(self.shape):
            raise UnfollowedError(f"{self.ref.name}: {self.shape} is not {list(shape)}")
        left = _merged(loop for loops in self.axes for loop in loops)[::-1]
        stack = list(left)
        return replace(self, axes=tuple(_taken(stack, size) for size in sizes))

    def stored(self) -> TensorRef:
        """For those who read it."""
        item = DTYPE_BITS[self.ref.dtype] // 8
        loops = _merged(loop for axis in self.axes for loop in axis)
        run = loops[-1][0] if loops and loops[-1][1] == 1 else 1
        outer = loops[:-1] if run > 1 else loops
        return replace(
            self.ref,
            shape=self.shape,
            offset=self.ref.offset + self.start * item,
            size_bytes=math.prod(self.shape) * item,
            loops=tuple((count, step * item) for count, step in outer),
        )


def _merged(loops: Iterable[Loop]) -> tuple[Loop, ...]:
    """The same in as few loops as there can be."""
    found: list[Loop] = []
    for count, step in loops:
        if found and found[-1][1] == count * step:
            found[-1] = (found[-1][0] * count, step)
        elif count != 1:
            found.append((count, step))
    return tuple(found)


def _narrowed(loops: tuple[Loop, ...], start: int, length: int) -> tuple[tuple[Loop, ...], int]:
    """Loops of a part of an axis, and its first element."""
    if not loops:
        return (), 0
    (_, step), inner = loops[0], loops[1:]
    block = math.prod(count for count, _ in inner)
    number, rest = divmod(start, block)
    if not rest and not length % block:
        return ((length // block, step), *inner), number * step
    if rest + length > block:
        raise UnfollowedError("a part that begins and ends within rows of another order")
    found, first = _narrowed(inner, rest, length)
    return found, number * step + first


def _taken(stack: list[Loop], size: int) -> tuple[Loop, ...]:
    """Loops of ``size`` elements from the end of ``stack``."""
    found: list[Loop] = []
    while size > 1:
        count, step = stack.pop()
        whole = math.gcd(count, size)
        if whole not in (count, size):
            raise UnfollowedError("an axis that joins parts of others")
        found.append((whole, step * (count // whole)))
        if whole < count:
            stack.append((count // whole, step))
        size //= whole
    return tuple(found)
