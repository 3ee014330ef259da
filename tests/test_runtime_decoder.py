"""The loop on a hand-made decoder whose tokens tell of every column it was ever given."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vtr_export.errors import ArtifactError, InputError
from vtr_export.runtime.decoder import Decoder
from vtr_export.runtime.generation import generate, survivors
from vtr_export.runtime.model import Model
from vtr_export.runtime.sampling import Options, Sampler, distribution
from vtr_export.runtime.session import OnnxRuntime

VOCAB, IMAGE, TOKENS = 97, 4, 3
HEADER = '<ir_version: 10, opset_import: ["": 21]>'
# one cut: the last column of every vision pair goes; the next token is a checksum of the cache
DECODER = f"""
{HEADER}
g (float[B, S, 1] inputs_embeds, int64[B, T] attention_mask, int64[B, S] position_ids, int64[B, V] vision_index,
   float[B, 1, P, 1] "past_key_values.0.key", float[B, 1, P, 1] "past_key_values.0.value",
   float[B, 1, Q, 1] "past_key_values.1.key", int64[B, R] "past_mask.0")
 => (float[B, 1, {VOCAB}] logits, float[B, 1, PP, 1] "present.0.key", float[B, 1, PP, 1] "present.0.value",
     float[B, 1, QQ, 1] "present.1.key", int64[B, RR] "present_mask.0", int64[B, K] "kept.0")
{{
  zero = Constant <value_int = 0> ()
  one = Constant <value_ints = [1]> ()
  heads = Constant <value_ints = [1]> ()
  tail = Constant <value_ints = [-1]> ()
  vocab = Constant <value_int = {VOCAB}> ()
  big = Constant <value_ints = [1000000]> ()
  minus = Constant <value_ints = [-1]> ()
  onoff = Constant <value_floats = [0.0, 1.0]> ()
  values = Unsqueeze (inputs_embeds, heads)
  place = Cast <to = 1> (position_ids)
  place3 = Unsqueeze (place, tail)
  keys = Unsqueeze (place3, heads)
  "present.0.key" = Concat <axis = 2> ("past_key_values.0.key", keys)
  "present.0.value" = Concat <axis = 2> ("past_key_values.0.value", values)
  full = Shape <start = 1, end = 2> (position_ids)
  past = Shape <start = 2, end = 3> ("past_key_values.0.key")
  now = Slice (attention_mask, past, big, one)
  vision = Shape <start = 1, end = 2> (vision_index)
  has = Min (vision, one)
  left = Sub (full, has)
  zeros = Constant <value_ints = [0]> ()
  left0 = Squeeze (left)
  step = Constant <value_int = 1> ()
  columns = Range (zero, left0, step)
  rows = Shape <start = 0, end = 1> (position_ids)
  wide = Concat <axis = 0> (rows, left)
  "kept.0" = Expand (columns, wide)
  later = GatherElements <axis = 1> (now, "kept.0")
  "present_mask.0" = Concat <axis = 1> ("past_mask.0", later)
  kept3 = Unsqueeze ("kept.0", tail)
  narrowed = GatherElements <axis = 1> (inputs_embeds, kept3)
  narrow = Unsqueeze (narrowed, heads)
  "present.1.key" = Concat <axis = 2> ("past_key_values.1.key", narrow)
  k = Squeeze ("present.0.key", minus)
  v = Squeeze ("present.0.value", minus)
  product = Mul (k, v)
  mask1 = Unsqueeze (attention_mask, heads)
  real = Cast <to = 1> (mask1)
  seen = Mul (product, real)
  sum0 = ReduceSum <keepdims = 0> (seen, minus)
  k1 = Squeeze ("present.1.key", minus)
  mask2 = Unsqueeze ("present_mask.0", heads)
  real2 = Cast <to = 1> (mask2)
  seen1 = Mul (k1, real2)
  sum1 = ReduceSum <keepdims = 0> (seen1, minus)
  total = Add (sum0, sum1)
  whole = Cast <to = 7> (total)
  token = Mod (whole, vocab)
  logits = OneHot <axis = -1> (token, vocab, onoff)
}}
"""
EMBEDDING = f"{HEADER} g (int64[B, S] input_ids) => (float[B, S, 1] inputs_embeds) {{\n a = Constant <value_ints = [-1]> ()\n f = Cast <to = 1> (input_ids)\n inputs_embeds = Unsqueeze (f, a)\n }}"
VISION = f"{HEADER} g (float[N, 3, 1, 1] pixel_values) => (float[N, 3, 1] image_features) {{\n a = Constant <value_ints = [-1]> ()\n image_features = Squeeze (pixel_values, a)\n }}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("graphs")

    def session(name: str, text: str) -> OnnxRuntime:
        onnx.save(onnx.parser.parse_model(text), folder / name)
        return OnnxRuntime(folder / name)

    decoder = Decoder(session("decoder.onnx", DECODER))
    return Model(
        session("vision.onnx", VISION), session("embedding.onnx", EMBEDDING), decoder, IMAGE
    )


class Oracle:
    """The same checksum over a row's whole history, from lists."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.narrow: list[float] = []

    def feed(self, values: list[float], *, cut: bool) -> int:
        self.values += values
        self.narrow += values[:-1] if cut else values
        checksum = sum(place * value for place, value in enumerate(self.values)) + sum(self.narrow)
        return int(checksum) % VOCAB

    def answer(self, values: list[float], count: int, ends: set[int], *, cut: bool) -> list[int]:
        tokens: list[int] = []
        token = self.feed(values, cut=cut)
        while token not in ends:
            tokens.append(token)
            if len(tokens) == count:
                break
            token = self.feed([float(token)], cut=False)
        return tokens


def pixels(images: int, times: int = 1) -> dict[str, np.ndarray]:
    values = np.arange(1, 1 + images * 3, dtype=np.float32).reshape(images, 3, 1, 1)
    return {"pixel_values": values * times}


def test_one_row_and_its_continuation(model: Model) -> None:
    oracle, cache = Oracle(), model.decoder.empty(1)
    for turn in range(3):
        row = [7, *[IMAGE] * TOKENS, 11 + turn, 13]
        features = model.encode(pixels(1, turn + 1)).features
        values = [7.0, *features.ravel().tolist(), 11.0 + turn, 13.0]
        done = generate(model, cache, [row], features, (), Options(), ends=(), limit=6)
        expected = oracle.answer(values, 6, set(), cut=True)
        assert list(done.tokens[0]) == expected
        assert done.finish == ("length",)
        cache = done.cache
        oracle.feed([float(expected[-1])], cut=False)  # the last token was not fed yet
        cache = model.extend(cache, np.array(expected[-1:])).cache
        assert cache.lengths.tolist() == [len(oracle.values)]


def test_a_batch_of_unlike_rows_is_its_rows(model: Model) -> None:
    rows = [[9, *[IMAGE] * TOKENS, 5], [8, 6], [*[IMAGE] * TOKENS, 1, *[IMAGE] * TOKENS, 2, 3]]
    features = model.encode(pixels(3)).features
    batch = model.pad(rows)
    assert batch.input_ids.shape == (3, 3 + 6)
    done = generate(
        model, model.decoder.empty(3), rows, features, (), Options(), ends={30}, limit=8
    )
    flat = iter(features.reshape(-1).tolist())
    for row, tokens in zip(rows, done.tokens, strict=True):
        values = [next(flat) if token == IMAGE else float(token) for token in row]
        assert list(tokens) == Oracle().answer(values, 8, {30}, cut=True)


def test_an_end_token_ends_a_row_alone(model: Model) -> None:
    rows = [[5, 6], [9, 2, 40]]
    free = generate(model, model.decoder.empty(2), rows, None, (), Options(), ends=(), limit=9)
    end = free.tokens[0][3]
    seen: list[int] = []
    done = generate(
        model,
        model.decoder.empty(2),
        rows,
        None,
        (),
        Options(),
        ends={end},
        limit=9,
        on_token=seen.append,
    )
    for row, tokens in enumerate(done.tokens):
        whole = free.tokens[row]
        cut = whole.index(end) if end in whole else len(whole)
        assert tokens == whole[:cut]
        assert done.finish[row] == ("stop" if end in whole else "length")
    assert tuple(seen) == done.tokens[0]


def test_the_cache_stays_on_the_device(model: Model) -> None:
    from vtr_export.runtime.session import Resident

    step = model.prefill(model.decoder.empty(1), model.pad([[5, 6]]), None)
    assert all(isinstance(value, Resident) for value in step.cache.values.values())
    assert set(step.cache.values) == {
        name for name in model.decoder.session.inputs if "past" in name
    }


def test_survivors_are_followed_through_the_stages(model: Model) -> None:
    batch = model.pad([[9, *[IMAGE] * 3, 5], [1, *[IMAGE] * 4, 5]])  # S = 2 + 4: one pad in row 0
    assert batch.vision_index.tolist() == [[0, 2, 3, 4], [1, 2, 3, 4]]
    first = np.array([[0, 1, 3, 4, 5], [0, 2, 3, 4, 5]])  # drops row 0's first, row 1's first token
    second = np.array([[0, 1, 3, 4], [0, 1, 3, 4]])
    assert [left.tolist() for left in survivors(batch, (first, second), 0)] == [[1, 2], [2]]
    assert [left.tolist() for left in survivors(batch, (first, second), 1)] == [[1, 2, 3], [1, 3]]


def test_features_and_places_must_agree(model: Model) -> None:
    batch = model.pad([[IMAGE, 5]])
    with pytest.raises(ArtifactError, match="3 image features for 1 places"):
        model.prefill(model.decoder.empty(1), batch, model.encode(pixels(1)).features)


def test_a_cache_that_does_not_close_is_refused(tmp_path: Path) -> None:
    text = f'{HEADER} g (float[N] x, float[N] "past_key_values.0.key") => (float[N] "present.1.key") {{ "present.1.key" = Add (x, "past_key_values.0.key") }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    with pytest.raises(ArtifactError, match=r"past_key_values\.1\.key"):
        Decoder(OnnxRuntime(tmp_path / "g.onnx"))


def test_nan_logits_are_named() -> None:
    with pytest.raises(ArtifactError, match="NaN"):
        Sampler(Options(), 1).pick(np.array([[1.0, np.nan]], np.float32))


@pytest.mark.parametrize(
    "options",
    [
        Options(temperature=0.7), Options(temperature=1.3, top_k=5), Options(temperature=1.0, top_p=0.6),
        Options(temperature=0.9, top_k=7, top_p=0.8), Options(temperature=1.0, top_p=0.01),
    ],
)  # fmt: skip
def test_distributions_are_those_of_transformers(options: Options) -> None:
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(scale=3, size=50).astype(np.float32)
        scores = TemperatureLogitsWarper(options.temperature)(None, torch.from_numpy(logits)[None])
        if options.top_k:
            scores = TopKLogitsWarper(options.top_k)(None, scores)
        if options.top_p < 1:
            scores = TopPLogitsWarper(options.top_p)(None, scores)
        expected = scores.softmax(-1)[0].numpy()
        assert np.allclose(distribution(logits, options), expected, atol=1e-6)


def test_draws_depend_on_the_seed_and_follow_the_distribution() -> None:
    logits = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    options = Options(temperature=1.0, seed=3)
    sampler = Sampler(options, 1)
    drawn = np.array([sampler.pick(logits)[0] for _ in range(4000)])
    again = Sampler(options, 1)
    assert drawn[:50].tolist() == [again.pick(logits)[0] for _ in range(50)]
    share = np.bincount(drawn, minlength=8) / len(drawn)
    assert np.abs(share - distribution(logits[0], options)).max() < 0.03
    other = Sampler(replace(options, seed=4), 1)
    assert drawn[:50].tolist() != [other.pick(logits)[0] for _ in range(50)]


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32)
    options = Options(temperature=1.5, seed=9)
    assert Sampler(options, 3).pick(logits)[0] == Sampler(options, 1).pick(logits[:1])[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0.0},
        {"top_p": 1.5}, {"top_k": -1}, {"seed": -2},
    ],
)  # fmt: skip
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Options(**wrong)  # type: ignore[arg-type]
