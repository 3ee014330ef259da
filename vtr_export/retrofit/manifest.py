"""What a folder with a cut foreign decoder says of itself."""

from typing import ClassVar, Literal

from pydantic import PositiveInt

from vtr_export.manifest import Gate, KeepShare, ScheduleFacts, Stage, Versions
from vtr_export.published import FileName, Part, Published, RelativePath, Sha256
from vtr_export.schedule import Resolved


class Original(Part):
    """The graph that was given."""

    file: FileName
    sha256: Sha256
    producer: str


class Facts(Part):
    """What was read off the graph. ``attention`` is how the original wrote each layer's."""

    layers: PositiveInt
    attention: tuple[str, ...]
    heads: PositiveInt | None
    kv_heads: PositiveInt
    head_dim: PositiveInt
    tokens_per_image: PositiveInt | None
    image_token_id: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stages: tuple[Stage, ...]


class DecoderManifest(Published):
    """``manifest.json`` beside a decoder of another tool, with cuts of ours."""

    KIND: ClassVar[str] = "decoder"
    REPLACE: ClassVar[str] = "cut it again: vtr export --onnx DECODER.onnx --force"

    kind: Literal["decoder"] = "decoder"
    versions: Versions
    original: Original
    decoder: RelativePath
    embedding: RelativePath | None = None
    schedule: ScheduleFacts
    model: Facts
    verified: bool
    gates: tuple[Gate, ...]


def stages(schedule: Resolved) -> tuple[Stage, ...]:
    """Where each begins, and what its cut keeps."""
    cuts = [(cut.before_layer, cut.keep) for cut in schedule.cuts]
    shares = [
        (first, KeepShare(numerator=k.numerator, denominator=k.denominator, rounding=k.rounding))
        for first, k in cuts
    ]
    return (
        Stage(first_layer=0),
        *(Stage(first_layer=first, keep=share) for first, share in shares),
    )
