"""What a reduction must know of a vision tower, before any graph."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """How the tokens of one image (or tile) lie: row by row."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """How many they are."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Tower:
    """A vision tower that gives every image (or tile) the same number of tokens.

    ``grid`` is of the tokens that the projector takes, ``width`` wide each; a token covers
    ``merge`` by ``merge`` patches of the tower's own ``patches``, which ``hidden`` numbers describe
    in each of ``layers`` layers. ``layers_run`` of these feed the projector, which makes each token
    ``projected`` wide by ``projector_macs`` multiply-adds. A class token stands before the patches
    where ``has_cls``. ``is_own``: each token is one of the tower's own, none stands for several.
    """

    grid: Grid
    patches: Grid
    merge: int
    width: int
    hidden: int
    heads: int
    intermediate: int
    layers: int
    layers_run: int
    has_cls: bool
    projected: int
    projector_macs: int
    is_own: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether no reduction took tokens before."""
        covered = self.grid.rows * self.merge, self.grid.columns * self.merge
        return covered == (self.patches.rows, self.patches.columns)

    @property
    def sequence(self) -> int:
        """Rows of the tower's residual stream."""
        return self.patches.tokens + self.has_cls

    @property
    def last_layer_flops(self) -> int:
        """Of all that runs only for the last layer's queries and keys, where it feeds nothing."""
        if self.layers == self.layers_run:
            return 0
        rows, width = self.sequence, self.hidden
        layer = 8 * rows * width**2 + 4 * rows**2 * width + 4 * rows * width * self.intermediate
        return (self.layers - self.layers_run - 1) * layer + 4 * rows * width**2
