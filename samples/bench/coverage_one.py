"""One architecture of coverage.py: exported, and its numbers beside transformers' own."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
import zoo
from coverage import REFUSED, VERIFIED, WRONG
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from zoo_config import Section, tiny_config
from zoo_inputs import image_id, inputs

from vtr_export import Artifact, Schedule, export
from vtr_export.errors import GateError, VtrError
from vtr_export.families import FAMILIES, ModelFacts, read_facts
from vtr_export.frontends import generic
from vtr_export.frontends import transformers as frontend
from vtr_export.reference import (
    Head,
    Reference,
    embed,
    embeddings,
    groups_for,
    image_features,
    load_model,
    positions_for,
)
from vtr_export.runtime.decoder import Decoder
from vtr_export.runtime.model import put
from vtr_export.runtime.positions import Places
from vtr_export.verify.play import forced_passes
from vtr_export.verify.sessions import Forced, Parts

STEPS = 4
DIFFERENCE = 2e-3  # fp32, of logits of unit size
STAGES: dict[str, Any] = {
    "version": 1,
    "prefill": {
        "score": {"query": "text"},
        "stages": [
            {"before_layer": layer, "keep": keep}
            for layer, keep in ((1, "75%"), (2, "50%"), (3, "25%"))
        ],
    },
}
SAVED_AS = {"shieldgemma2": "ShieldGemma2ForImageClassification"}  # which holds the mapping's class
WIDE = {"sliding_window": 512, "attention_chunk_size": 512}  # no prompt of ours is longer
TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
MARKS = (*TYPES, "image_embeds_position_mask")  # 1 where an image's features go
ALONE = ("kosmos-2",)  # transformers counts pads as places when it decodes
NEVER = np.finfo(np.float32).min / 2
Array = NDArray[Any]


def examine(name: str, folder: Path) -> dict[str, Any]:
    """Verdict, way and detail."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    own = _own(name)
    if own is not None:
        return _family(own, folder)
    try:
        model = _tiny(name)
    except ImportError as error:  # of timm, which has some towers
        return _said(REFUSED, "package", str(error).strip().split(".")[0])
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    try:
        facts = read_facts(config, "config.json")
    except VtrError as error:
        return _said(REFUSED, "config", error.message)
    way = "family" if config["model_type"] in FAMILIES else "generic"
    _trace_once()
    try:
        out = {}
        for kind, schedule in (
            ("pruned", Schedule.from_data(STAGES)),
            ("whole", Schedule.unpruned()),
        ):
            out[kind] = folder / kind
            export(schedule, checkpoint, out[kind], verify="none")
    except VtrError as error:
        return _said(REFUSED, "export", error.message)
    model = load_model(checkpoint, checkpoint, torch.float32, attn_implementation="eager")
    return _measured(model, facts, out, way)


def _trace_once() -> None:
    """Both exports are of one checkpoint; the second takes copies of the graphs of the first."""
    load, made = frontend.load, list[frontend.Graphs]()

    def once(*args: Any, **asked: Any) -> frontend.Graphs:
        if not made:
            made.append(load(*args, **asked))
        parts = made[0].vision_encoder, made[0].embed_tokens, made[0].decoder
        return frontend.Graphs(*(part.clone() for part in parts))

    frontend.load = once


def _said(verdict: str, way: str, detail: str) -> dict[str, Any]:
    return {"verdict": verdict, "way": way, "detail": " ".join(detail.split())}


def _own(name: str) -> Any:
    """How tests save a tiny checkpoint of the family with its real processor, if they do."""
    from tiny_families import TINY

    return TINY.get(name)


def _family(save: Any, folder: Path) -> dict[str, Any]:
    """Every gate of its export; unpruned, its answers are transformers' own."""
    from tiny_families import stages

    save(folder / "checkpoint", 0)
    schedule = Schedule.from_data(stages(folder / "checkpoint"))
    try:
        report = export(schedule, folder / "checkpoint", folder / "out", verify="all")
    except GateError as error:
        return _said(WRONG, "family", error.message)
    return _said(VERIFIED, "family", f"{len(report.gates)} gates")


def _tiny(name: str) -> Any:
    """The zoo's model, with windows that no prompt fills."""
    config = tiny_config(name)
    names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **SAVED_AS}
    kind = getattr(transformers, names[name])
    config = type(config)(**_widened(config.to_dict()))
    config._attn_implementation = "eager"
    model = kind(config)
    zoo.randomize(model, 0)
    return model.eval()


def _widened(section: Section) -> Section:
    return {
        key: _widened(value)
        if isinstance(value, dict)
        else WIDE[key]
        if key in WIDE and value
        else value
        for key, value in section.items()
    }


@dataclass(frozen=True)
class Asked:
    """Two prompts of unlike length, an image each."""

    ids: Tensor  # [2, S]
    mask: Tensor
    given: Mapping[str, Tensor]  # of both images, as transformers takes them
    feeds: tuple[Mapping[str, Array], ...]  # of each, as the encoder's graph takes them


def _ask(model: Any, ports: Mapping[str, Any]) -> Asked:
    """Images of the one size that the graph takes."""
    generator = torch.Generator().manual_seed(3)
    form = generic.taken(model, torch.float32)[0]
    both, feeds = {}, []
    for _ in range(2):
        drawn = {n: _drawn(f, generator) for n, f in form.feeds.items()}
        feeds.append({n: v.numpy() for n, v in drawn.items() if n in ports})
        for n, v in (*drawn.items(), *form.constants.items()):
            both.setdefault(n, []).append(v)
    counts = []
    for row in range(2):
        alone = {n: v[row] for n, v in both.items()}
        with torch.no_grad():
            counts.append(image_features(model, alone).shape[0])
    image = image_id(model.config)
    words = torch.randint(20, 30, (16,), generator=generator).tolist()
    rows = [
        [1, *words[:3], *[image] * counts[0], *words[3:8]],
        [1, words[8], *[image] * counts[1], *words[9:11]],
    ]
    length = max(map(len, rows)) + 2
    ids = torch.tensor([[0] * (length - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    return Asked(ids, mask, _together(both), tuple(feeds))


def _together(both: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """Of two images, as a processor gives them: places of patches count on."""
    found = {name: torch.cat(values) for name, values in both.items()}
    if (pooling := both.get("image_token_pooling")) is not None:
        patches = both["pixel_values"][0].shape[1]
        second = torch.where(pooling[1] < 0, -1, pooling[1] + patches)
        found["image_token_pooling"] = torch.cat([pooling[0], second])
    return found


def _drawn(feed: Any, generator: torch.Generator) -> Tensor:
    """One image of noise; whole numbers as they are."""
    example = feed.example[:1] if feed.axes[0] == "images" else feed.example
    if not example.is_floating_point():
        return example
    return torch.rand(example.shape, generator=generator) * 2 - 1


def _measured(model: Any, facts: ModelFacts, out: Mapping[str, Path], way: str) -> dict[str, Any]:
    whole, pruned = (Parts.of(f, Artifact.load(f).manifest) for f in (out["whole"], out["pruned"]))
    encoder = whole.open(whole.vision)
    asked = _ask(model, encoder.inputs)
    features = np.concatenate(
        [np.asarray(next(iter(encoder.run(f).values()))) for f in asked.feeds]
    )
    expected = image_features(model, asked.given).numpy()
    features = features.reshape(expected.shape)
    worst = {"encoder": _distance(features, expected)}
    said = _generated(model, asked)
    logits = torch.stack(said.logits, 1).numpy()
    mine = _played(model, facts, whole, asked, features, said.sequences)
    worst["unpruned"] = _distance(mine, logits)
    theirs, kept, kept_vision, tokens = _referred(model, facts, asked)
    worst["pruned"] = _distance(
        _played(model, facts, pruned, asked, features, tokens, (kept, kept_vision)), theirs
    )
    detail = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    good = all(value <= DIFFERENCE for value in worst.values())
    return _said(VERIFIED if good else WRONG, way, detail)


def _distance(mine: Array, theirs: Array) -> float:
    """The largest difference, in standard deviations of what is expected.

    Words that a model never says have the least logit there is, and must have it in both.
    """
    if mine.shape != theirs.shape or not np.isfinite(mine).all():
        return float("inf")
    said, others = theirs > NEVER, mine > NEVER
    if not np.array_equal(said, others):
        return float("inf")
    return float(np.abs(mine[said] - theirs[said]).max() / (theirs[said].std() + 1e-6))


@torch.no_grad()
def _generated(model: Any, asked: Asked) -> Any:
    """Transformers' own: prefill and decode steps of both prompts."""
    if model.config.model_type not in ALONE:
        return _said_by(model, asked)
    both = []
    for row, mask in enumerate(asked.mask):
        given = {name: values[row : row + 1] for name, values in asked.given.items()}
        ids = asked.ids[row, mask != 0][None]
        both.append(_said_by(model, Asked(ids, torch.ones_like(ids), given, ())))
    each = zip(*(said.logits for said in both), strict=True)
    last = [said.sequences[:, -1 - STEPS :] for said in both]
    return SimpleNamespace(logits=[torch.cat(step) for step in each], sequences=torch.cat(last))


def _said_by(model: Any, asked: Asked) -> Any:
    more = {}
    is_image = (asked.ids == image_id(model.config)).long()
    taken = inputs(model).keys()
    for name in MARKS:
        if name in taken:
            more[name] = is_image
    return model.generate(
        input_ids=asked.ids.clamp(max=model.get_input_embeddings().num_embeddings - 1),
        attention_mask=asked.mask,
        **asked.given,
        **more,
        max_new_tokens=1 + STEPS,
        min_new_tokens=1 + STEPS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _played(
    model: Any,
    facts: ModelFacts,
    parts: Parts,
    asked: Asked,
    features: Array,
    tokens: Tensor,
    forced: tuple[Sequence[Array], Sequence[Array]] | None = None,
) -> Array:
    """Logits [2, 1 + STEPS, vocab] of the graphs, told the tokens."""
    session = parts.open(parts.decoder, forced_passes() if forced else ())
    if forced:
        session = Forced(session)
        session.force(*forced)
    decoder = Decoder(session, keep=parts.keep)
    embedding = parts.open(parts.embedding)
    image = image_id(model.config)
    is_image = (asked.ids == image).numpy()
    text = _embedded(embedding, np.where(is_image, 0, asked.ids.numpy()))
    ids, ahead = positions_for(model, asked.ids, asked.mask, asked.given)
    _, index = embed(model, asked.ids, asked.mask, None)
    groups = groups_for(model, asked.ids, asked.mask).numpy()
    following = (asked.mask.sum(1) + ahead).numpy()
    step = decoder(
        decoder.empty(2),
        put(text, np.nonzero(is_image), features),
        asked.mask.numpy(),
        index.numpy(),
        Places(ids.numpy(), following),
        groups,
    )
    if forced:
        first, none = np.zeros((2, 1), np.int64), np.zeros((2, 0), np.int64)
        session.force([first] * len(forced[0]), [none] * len(forced[0]))
    logits = [step.logits]
    for token in tokens[:, -1 - STEPS : -1].T:
        fed = _embedded(embedding, token[:, None].numpy())
        step = decoder(step.cache, fed, np.ones((2, 1), np.int64), np.zeros((2, 0), np.int64))
        logits.append(step.logits)
    return np.stack(logits, 1)


def _embedded(session: Any, ids: Array) -> Array:
    (name,) = session.inputs
    (found,) = session.run({name: ids.astype(np.int64)}).values()
    return np.array(found)


def _referred(model: Any, facts: ModelFacts, asked: Asked) -> tuple[Array, Any, Any, Tensor]:
    """The reference's pruned answer: logits, what it kept, and its tokens."""
    resolved = Schedule.from_data(STAGES).resolve(facts)
    reference = Reference(model.get_decoder(), Head(model), resolved)
    embeds, index = embed(model, asked.ids, asked.mask, asked.given)
    said = reference.generate(
        embeddings(model),
        embeds,
        asked.mask,
        index,
        max_new_tokens=1 + STEPS,
        positions=positions_for(model, asked.ids, asked.mask, asked.given),
        groups=groups_for(model, asked.ids, asked.mask),
    )
    kept = [each.numpy() for each in said.prefill.kept]
    kept_vision = [each.numpy() for each in said.prefill.kept_vision]
    return said.logits.numpy(), kept, kept_vision, said.tokens
