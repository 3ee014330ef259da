"""Target sizes of a resize, by transformers' rules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """One of: an exact size, a shortest edge (with a longest one as limit), or a box to fit."""

    exact: tuple[int, int] | None = None  # height, width
    shortest_edge: int | None = None
    longest_edge: int | None = None
    box: tuple[int, int] | None = None  # height, width


def read_size(value: object, default_to_square: bool) -> Size:
    """From ``size`` of a processor's file: a dict, one number or ``[height, width]``.

    ValueError for keys without a rule here.
    """
    if isinstance(value, bool | str | float):
        raise ValueError(f"size {value!r}")
    if isinstance(value, int):
        return Size(exact=(value, value)) if default_to_square else Size(shortest_edge=value)
    if isinstance(value, list | tuple):
        height, width = value
        return Size(exact=(int(height), int(width)))
    if not isinstance(value, Mapping):
        raise ValueError(f"size {value!r}")
    return _by_keys({name: int(edge) for name, edge in value.items() if edge is not None})


def read_crop(value: object) -> tuple[int, int]:
    """``(height, width)`` of ``crop_size`` or ``pad_size``; ValueError for anything else."""
    exact = read_size(value, default_to_square=True).exact
    if exact is None:
        raise ValueError(f"height and width are needed, not {value!r}")
    return exact


def target_size(size: Size, height: int, width: int) -> tuple[int, int]:
    """``(height, width)`` an image of ``height`` x ``width`` is resized to."""
    if size.exact is not None:
        return size.exact
    if size.box is not None:
        scale = min(size.box[0] / height, size.box[1] / width)
        return int(height * scale), int(width * scale)
    assert size.shortest_edge is not None
    if size.longest_edge is not None:
        return _limited(size.shortest_edge, size.longest_edge, height, width)
    short, long = min(height, width), max(height, width)
    scaled = int(size.shortest_edge * long / short)
    return (scaled, size.shortest_edge) if width <= height else (size.shortest_edge, scaled)


def _by_keys(edges: Mapping[str, Any]) -> Size:
    keys = set(edges)
    if keys == {"height", "width"}:
        return Size(exact=(edges["height"], edges["width"]))
    if keys == {"max_height", "max_width"}:
        return Size(box=(edges["max_height"], edges["max_width"]))
    if keys in ({"shortest_edge"}, {"shortest_edge", "longest_edge"}):
        return Size(shortest_edge=edges["shortest_edge"], longest_edge=edges.get("longest_edge"))
    raise ValueError(f"no rule for a size with {', '.join(sorted(keys)) or 'no keys'}")


def _limited(short: int, limit: int, height: int, width: int) -> tuple[int, int]:
    """The shortest edge to ``short``, unless the longest would pass ``limit``."""
    exact: float = short
    if max(height, width) / min(height, width) * short > limit:
        exact = limit * min(height, width) / max(height, width)
        short = round(exact)
    if short == min(height, width):
        return height, width
    if width < height:
        return int(exact * height / width), short
    return short, int(exact * width / height)
