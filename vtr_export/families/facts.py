"""The shape of a vision-language model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Attends: TypeAlias = Literal["causal", "images", "prompt"]
"""What a token sees beside what came before: nothing; all its image; all its prompt."""
Features: TypeAlias = Literal["tokens", "weights", "keys"]
"""Tokens of the prompt; low-rank weights of layers; keys beside those of text, in one softmax."""
UNCUT: Final[Mapping[str, str]] = {
    "weights": "an image becomes weights of this decoder and has no token in the prompt to drop",
    "keys": "images are keys beside those of text, in one softmax, and cuts of such keys are not "
    "written yet",
}

Sight: TypeAlias = Literal["onward", "latest"]
"""Which images a token sees by cross-attention: all since the last text but one; the last one."""


@dataclass(frozen=True)
class VisionFacts:
    """A vision tower. ``layers_run`` of its ``layers`` feed the projector; the rest are not ours.

    ``tokens`` is the tower's own sequence length per image or tile, CLS included; None, as
    ``image_size``, where images keep their size. ``merge`` by ``merge`` of them become one vision
    token; a resampler makes ``latents`` of an image or tile, however many they are. ``kind`` is the
    tower's own model type, where several may stand in its place.
    ``parameters`` counts what the exported encoder holds (embeddings and ``layers_run``
    layers). Where some layers attend in windows, those are ``window`` by ``window`` vision tokens.
    A patch spans ``frames`` frames. An image is cut into up to ``tiles`` that see each other.
    Learned positions lie ``grid`` by ``grid``, and images take what lies between.
    """

    layers: int
    layers_run: int
    hidden: int
    heads: int
    intermediate: int
    tokens: int | None
    image_size: int | None
    patch_size: int
    channels: int
    has_cls: bool
    parameters: int
    merge: int = 1
    kind: str = ""
    latents: int | None = None
    window: int | None = None
    frames: int = 1
    grid: int | None = None
    tiles: int = 1

    @property
    def keys_per_image(self) -> int:
        """Features of an image that is attended to as keys, of tiles that are none too."""
        assert self.image_size is not None, "of one size"
        side = self.image_size // self.patch_size
        return self.latents or self.tiles * (side**2 + self.has_cls)

    @property
    def patch_values(self) -> int:
        """Numbers in one patch."""
        return self.channels * self.frames * self.patch_size**2


@dataclass(frozen=True)
class Anyres:
    """Images cut into tiles of the tower's size, and one tile more of the whole image.

    An image is fitted into the best of ``pinpoints`` (height, width; pixels). A tile has ``side``
    by ``side`` tokens. What has more tokens than ``max_tiles`` tiles is shrunk; None: nothing is.
    """

    pinpoints: tuple[tuple[int, int], ...]
    side: int
    max_tiles: int | None = None

    def most_tiles(self, size: int) -> int:
        """Of ``size`` pixels that one image may have."""
        return 1 + max(height * width for height, width in self.pinpoints) // size**2


@dataclass(frozen=True)
class ModelFacts:
    """The shape of a vision-language model; sizes in elements, ``dtype`` as torch spells it.

    ``tokens_per_image`` is None where it depends on the image's size. ``projector_macs`` are
    multiply-adds per vision token. ``layer_biases`` counts the biases of one decoder layer, and
    the weights of its norms beyond two and of a router; experts make ``intermediate`` wide.
    ``mrope``: a position is ``sections`` numbers, such as time, row and column.
    ``planes``: features that are added to vision tokens behind these layers, a plane a layer.
    ``answer``: tokens behind a prompt up to which later ones see them all.
    ``marked``: tokens that experts of their own take beside those of images.
    ``value_dim``: values are as wide, where they are not as wide as keys.
    ``context`` ends at ``window`` where some layers see no further back than that. Positions are
    counted from ``first_position``. ``softcap`` bends what attention's softmax takes.
    ``learned_positions`` is how many rows their table has that is added to tokens before layer 0;
    0: positions rotate queries and keys. ``norm_biases`` are the last norm's. ``reads``: tokens
    of the prompt that the vision encoder may read; 0: an image's features are its own.
    ``crosses``: the layers that attend to image features as keys, which are no tokens of the
    prompt; see ``frontends/cross.py``. Empty where features stand among the tokens.
    ``cross_parameters`` is what all of those hold beyond a layer like the others; what they
    attend to is ``cross_width`` wide, where that is not as wide as tokens.
    ``more_embeddings`` are rows of the embedding table behind the vocabulary.
    ``sandwiched``: what attention and MLP give is normed before it joins the residual stream.
    ``features``: what those of an image are to the decoder, and the shape they have for one image
    beyond its keys, where they are no tokens.
    ``estimated``: what the model holds and costs is not counted exactly; its
    ``projector_parameters`` and its tower's are not known.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool
    vocab: int
    context: int
    tied: bool
    dtype: str | None
    tokens_per_image: int | None
    image_token_id: int | None
    vision: VisionFacts | None
    projector_parameters: int
    projector_macs: int
    layer_biases: int = 0
    mrope: bool = False
    sections: int = 3
    planes: tuple[int, ...] = ()
    value_dim: int | None = None
    marked: tuple[int, ...] = ()
    answer: int | None = None
    anyres: Anyres | None = None
    window: int | None = None
    attends: Attends = "causal"
    first_position: int = 0
    estimated: bool = False
    softcap: float | None = None
    learned_positions: int = 0
    norm_biases: int = 0
    reads: int = 0
    crosses: tuple[int, ...] = ()
    sight: Sight = "onward"
    cross_parameters: int = 0
    cross_width: int | None = None
    more_embeddings: int = 0
    sandwiched: bool = False
    features: Features = "tokens"
    feature_shape: tuple[int, ...] = ()

    @property
    def uncut(self) -> str:
        """Why no schedule can drop anything in the decoder; empty where one can."""
        return UNCUT.get(self.features, "")

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a plan made of these facts must say."""
        if self.features == "keys":
            return ("what hyper layers do with an image's keys is not counted",)
        if not self.estimated:
            return ()
        return (
            f"{self.model_type} has no reader of its own: parameters and FLOPs of this decoder are "
            "estimates, its vision encoder is not counted, and takes images of one size",
        )
