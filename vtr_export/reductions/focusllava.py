"""FocusLLaVA's vision-guided sampler: blocks of the image as fine as a trained router says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Final, Literal, TypeAlias

from vtr_export.reductions.reduction import Form, VisionReduction
from vtr_export.reductions.tokens import Tokens

if TYPE_CHECKING:
    import onnx_ir as ir

    from vtr_export.reductions.tokens import Images
    from vtr_export.reductions.tower import Grid, Tower

SIDE: Final = 4  # of a block, in tokens
SCALES: Final = (1, 4, 16)  # tokens that stand for a block: maxima over 4x4, 2x2 and 1x1
ROUTER: Final = "vision_sampler.router."  # in the names of its weights
PARTS: Final = tuple(f"{ROUTER}{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias"))
Place: TypeAlias = tuple[int, int]


class FocusLLaVA(VisionReduction):
    """Each block of 4 by 4 tokens becomes 1, 4 or 16 maxima; a router looks at it and chooses.

    arXiv 2411.14228, section 3. Data-dependent; blocks row by row, tokens row by row in each, and a
    block at the edge is what is left of one. Nothing is published but the paper, which names no
    sizes, so the router is ours: the mean of a block's features, two linear layers with a GELU
    between, the first of equal logits, the coarsest scale first. It must be trained: see
    ``weights`` for what the checkpoint has to hold.
    """

    PAPER: ClassVar[str] = "2411.14228"
    method: Literal["focusllava"] = "focusllava"

    @property
    def form(self) -> Form:
        """The router looks at each image."""
        return "data-dependent"

    def weights(self, tower: Tower) -> Mapping[str, tuple[int, ...]]:
        """``vision_sampler.router.{0,2}.{weight,bias}``: width → width / 4 → scales, as Linear."""
        inner = _inner(tower)
        shapes = ((inner, tower.width), (inner,), (len(SCALES), inner), (len(SCALES),))
        return dict(zip(PARTS, shapes, strict=True))

    def misfit(self, tower: Tower) -> tuple[str, str] | None:
        """Blocks need rows and columns."""
        if min(tower.grid.rows, tower.grid.columns) > 1:
            return None
        return f"{self.method} cuts the image in blocks, and its tokens lie in no grid", (
            "list it first"
        )

    def count(self, tower: Tower) -> int:
        """All, where every block is at its finest."""
        return tower.grid.tokens

    def flops(self, tower: Tower) -> int:
        """Maxima and means of all features, and the router for each block."""
        routed = 2 * _inner(tower) * (tower.width + len(SCALES))
        return 3 * tower.grid.tokens * tower.width + len(_blocks(tower.grid)) * routed

    def reduce(self, images: Images) -> Tokens:
        """Cut in blocks, choose a scale for each, pack what was chosen."""
        tower = images.tower
        blocks = _cut(images)
        (scales,) = images.call("VtrScales", [blocks], ["scales"])
        chosen = _chosen(images, _choice(images, blocks))
        width = images.constant([tower.grid.tokens], "width")
        source, counts = images.call("VtrPackChosen", [chosen, width], ["places", "counts"])
        candidates = len(_blocks(tower.grid)) * sum(SCALES)
        shape = images.constant([0, candidates, tower.width], "candidates_shape")
        every = images.op("Reshape", [scales, shape], "candidates")
        (features,) = images.call("VtrNarrow", [every, source], ["features"])
        own = images.constant(_own(tower.grid), "own")
        return Tokens(features, counts, images.op("Gather", [own, source], "source", axis=0))


def _inner(tower: Tower) -> int:
    """Width between the router's layers."""
    return max(1, tower.width // 4)


def _blocks(grid: Grid) -> list[list[Place]]:
    """Row and column of each block's places, which may reach over the edge."""
    return [
        [(row, column) for row in range(top, top + SIDE) for column in range(left, left + SIDE)]
        for top in range(0, grid.rows, SIDE)
        for left in range(0, grid.columns, SIDE)
    ]


def _is_there(grid: Grid, place: Place) -> bool:
    """Whether a token lies there."""
    return place[0] < grid.rows and place[1] < grid.columns


def _nearest(grid: Grid, place: Place) -> int:
    """The token there; over the edge the last one before it, which changes no maximum."""
    return min(place[0], grid.rows - 1) * grid.columns + min(place[1], grid.columns - 1)


def _cut(images: Images) -> ir.Value:
    """``[I,B,16,C]``."""
    tower, blocks = images.tower, _blocks(images.tower.grid)
    tokens = [_nearest(tower.grid, place) for block in blocks for place in block]
    order = images.constant(tokens, "order")
    cut = images.op("Gather", [images.features, order], "cut", axis=1)
    shape = images.constant([0, len(blocks), SIDE**2, tower.width], "blocks_shape")
    return images.op("Reshape", [cut, shape], "blocks")


def _choice(images: Images, blocks: ir.Value) -> ir.Value:
    """``[I,B]``: which scale the router takes."""
    grid = images.tower.grid
    flags = [int(_is_there(grid, place)) for block in _blocks(grid) for place in block]
    shape = images.constant([len(flags) // SIDE**2, SIDE**2], "there_shape")
    present = images.op("Reshape", [images.constant(flags, "there"), shape], "present")
    weights = [images.weight(name) for name in PARTS]
    (choice,) = images.call("VtrRoute", [blocks, present, *weights], ["choice"])
    return choice


def _chosen(images: Images, choice: ir.Value) -> ir.Value:
    """``[I,21 B]`` bool: candidates of the scale that was taken, without those over the edge."""
    levels = _levels(images.tower.grid)
    shape = images.constant([len(levels) // sum(SCALES), sum(SCALES)], "levels_shape")
    level = images.op("Reshape", [images.constant(levels, "level"), shape], "levels")
    each = images.op("Unsqueeze", [choice, images.constant([-1], "last")], "each")
    equal = images.op("Equal", [each, level], "equal")
    flat = images.constant([0, len(levels)], "chosen_shape")
    return images.op("Reshape", [equal, flat], "chosen")


def _levels(grid: Grid) -> list[int]:
    """The scale of each candidate, block by block; -1 over the edge."""
    levels = [level for level, count in enumerate(SCALES) for _ in range(count)]
    corners = [0, 0, SIDE // 2, SIDE * SIDE // 2, (SIDE + 1) * SIDE // 2, *range(SIDE**2)]
    return [
        level if _is_there(grid, block[corner]) else -1
        for block in _blocks(grid)
        for level, corner in zip(levels, corners, strict=True)
    ]


def _own(grid: Grid) -> list[int]:
    """Which token each candidate is, -1 for a maximum over several places."""
    several = [-1] * (SCALES[0] + SCALES[1])
    return [
        token
        for block in _blocks(grid)
        for token in (*several, *(_nearest(grid, place) for place in block))
    ]
