"""Token ids, prompts and batches against the checkpoint's own AutoProcessor."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from vtr_export.errors import ArtifactError, InputError
from vtr_export.reference.inputs import pad_batch as reference_batch
from vtr_export.reference.inputs import vision_index_of
from vtr_export.runtime import text as text_room
from vtr_export.runtime.batch import pad_batch, positions
from vtr_export.runtime.chat import ChatTemplate
from vtr_export.runtime.images import ImageInputs, Seen
from vtr_export.runtime.processor import Processor
from vtr_export.runtime.text import Detokenizer

LLAVA_TEMPLATE = (
    "{% for message in messages %}\n"
    "  {% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}\n"
    "  {# images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
BOS_TEMPLATE = "{{ bos_token }}" + tiny_models.CHAT_TEMPLATE
TOOLED_TEMPLATE = (
    "{% set seen = namespace(count=0) %}{% for message in messages %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{% continue %}{% endif %}"
    "{% set seen.count = seen.count + 1 %}{{ dict(text=part.text) | tojson }}{% endfor %}"
    "{% endfor %}<image>{{ seen.count }} {{ strftime_now('%Y') }} {{ tools is none }} {{ eos_token }}"
)
QUESTIONS = [
    "what colour is the seven ?",
    "  which?  ",
    "",
    "ünïcode 東京 🦒 unknown words",
    "a\nb\tc",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_checkpoint(
        tiny_models.tiny_llava(layers=2), tmp_path_factory.mktemp("clip")
    )


def bytelike_tokenizer(folder: Path, style: str) -> None:
    """A byte-level BPE, or LLaMA's byte-fallback BPE in its old or new form; tokens of the tiny one."""
    raw = Tokenizer(
        models.BPE(byte_fallback=style != "byte-level", unk_token="<unk>", fuse_unk=True)
    )
    if style == "byte-level":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
    else:
        letters = [f"<0x{byte:02X}>" for byte in range(256)] + [
            *"▁abcdefghijklmnopqrstuvwxyzüU",
            "▁a",
            "▁w",
        ]
        raw.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        if style == "prepend":
            raw.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        else:
            raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    vocab = {token: index for index, token in enumerate([*tiny_models.SPECIAL, *letters])}
    merges = [] if style == "byte-level" else [("▁", "a"), ("▁", "w")]
    raw.model = models.BPE(
        vocab, merges, byte_fallback=style != "byte-level", unk_token="<unk>", fuse_unk=True
    )
    raw.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tiny_models.SPECIAL]
    )
    raw.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tiny_models.BOS)]
    )
    raw.save(str(folder / "tokenizer.json"))


@pytest.fixture(params=["words", "byte-level", "prepend", "metaspace"])
def folder(request: pytest.FixtureRequest, clip: Path, tmp_path: Path) -> Path:
    for file in clip.glob("*.js*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes((clip / "chat_template.jinja").read_bytes())
    if request.param != "words":
        bytelike_tokenizer(tmp_path, request.param)
    return tmp_path


def chat_ids(processor: Any, messages: Any) -> list[int]:
    out = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(out["input_ids"][0])


@pytest.mark.parametrize("template", [tiny_models.CHAT_TEMPLATE, LLAVA_TEMPLATE, BOS_TEMPLATE])
def test_chat_token_ids(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    theirs, ours = AutoProcessor.from_pretrained(folder), Processor(folder)
    image = Image.new("RGB", (30, 40))
    for question in QUESTIONS:
        for images in range(3):
            messages: Any = ours.messages(question, images)
            filled = [
                {**message, "content": [part | {"image": image} if part["type"] == "image" else part for part in message["content"]]}
                for message in messages
            ]  # fmt: skip
            text = ours.render(messages)
            assert text == theirs.apply_chat_template(messages, add_generation_prompt=True)
            assert ours.token_ids(text, [Seen(16)] * images, "chat") == chat_ids(theirs, filled)


def test_plain_token_ids(folder: Path) -> None:
    theirs, ours = AutoProcessor.from_pretrained(folder), Processor(folder)
    image = Image.new("RGB", (30, 40))
    for text in [*QUESTIONS, "<image>", "<image> <image>what ?", "<s>what<image>", "a <image>\nb"]:
        count = text.count("<image>")
        expected = theirs(text=text, images=[image] * count or None)["input_ids"][0]
        assert ours.token_ids(text, [Seen(16)] * count) == list(expected)


def test_pixel_values_and_everything_a_tower_needs(clip: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8))
    theirs = AutoProcessor.from_pretrained(clip)(text="<image>", images=image, return_tensors="np")
    inputs = Processor(clip).image_inputs([image])
    assert inputs.feeds["pixel_values"].tobytes() == theirs["pixel_values"].tobytes()
    assert inputs.tokens == theirs["input_ids"].shape[1] - 1


def test_siglip_counts_its_tokens_too(tmp_path: Path) -> None:
    tiny_models.save_checkpoint(tiny_models.tiny_llava(layers=2, tower="siglip"), tmp_path)
    ours = Processor(tmp_path)
    assert ours.image_inputs([Image.new("RGB", (30, 40))]).seen == (Seen(16, (1, 4, 4)),)
    assert ours.image_token_id == tiny_models.IMAGE


@pytest.mark.parametrize("template", [TOOLED_TEMPLATE, LLAVA_TEMPLATE])
def test_the_sandbox_renders_as_transformers_does(clip: Path, template: str) -> None:
    theirs = AutoProcessor.from_pretrained(clip)
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "be <b>brief</b> & \"quoted\""}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "ä?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "seven"}]},
        {"role": "user", "content": [{"type": "text", "text": "and now"}]},
    ]  # fmt: skip
    for ask in (True, False):
        expected = theirs.apply_chat_template(
            conversation, chat_template=template, add_generation_prompt=ask
        )
        assert (
            ChatTemplate(template, "").render(
                conversation, theirs.tokenizer.special_tokens_map, ask=ask
            )
            == expected
        )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception('roles must alternate') }}", "{{ messages.append(1) }}", "{{ messages[7].role }}",
        "{{ namespace(_x=1) }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for a in range(10000000) %}{% endfor %}", "{{ 1 / 0 }}", "{{ messages.nothing.deeper }}",
        "{{ ''|attr('__class__')|attr('__base__') }}{{ raise_exception('no') }}",
    ],
)  # fmt: skip
def test_a_hostile_or_refusing_template_is_an_input_error(template: str) -> None:
    with pytest.raises(InputError, match="refuses") as caught:
        ChatTemplate(template, "chat_template.jinja").render([{"role": "user", "content": "x"}], {})
    assert caught.value.where == "chat_template.jinja"


def test_a_broken_template_is_named() -> None:
    with pytest.raises(ArtifactError, match="broken"):
        ChatTemplate("{% if %}", "chat_template.jinja").render([], {})


def test_the_order_in_which_templates_are_looked_for(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    listed = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "E"}]
    for name, content in [
        ("tokenizer_config.json", json.dumps({"chat_template": listed})),
        ("chat_template.jinja", "D"),
        ("chat_template.json", json.dumps({"chat_template": "C"})),
        ("processor_config.json", json.dumps({"chat_template": "B"})),
    ]:
        (tmp_path / name).write_text(content)
        template = ChatTemplate.load(tmp_path)
        assert template is not None
        assert template.where.endswith(name)
        assert template.lists == (name != "tokenizer_config.json")


def test_tokens_that_only_the_config_knows(clip: Path, tmp_path: Path) -> None:
    for file in clip.glob("*.js*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    bare = json.loads((clip / "tokenizer.json").read_text())
    bare["added_tokens"] = bare["added_tokens"][:3]  # <unk> and <image> stay plain words
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    config = json.loads((clip / "tokenizer_config.json").read_text())
    for extra in [
        {},
        {"boi_token": "<boi>", "extra_special_tokens": ["<extra>", "<pad>"]},
        {"extra_special_tokens": {"eoi_token": "<eoi>"}},
        {"additional_special_tokens": ["<old>"], "extra_special_tokens": None},
        {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True, "special": True}},
        {"added_tokens_decoder": {
            "70": {"content": "<b>", "lstrip": False, "rstrip": False, "single_word": True, "normalized": True, "special": False},
            "9": {"content": "colour", "lstrip": True, "rstrip": True, "single_word": False, "normalized": False, "special": True},
            "2": {"content": "</s>", "lstrip": True, "rstrip": True, "single_word": False, "normalized": False, "special": False},
        }},
    ]:  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | extra))
        theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Processor(tmp_path).tokenizer
        text = "what<image> <boi><eoi><extra><old> colour <b> <b>x </s> <s> y"
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(
            theirs(text)["input_ids"], skip_special_tokens=True
        )
        assert ours.special == theirs.special_tokens_map


@pytest.mark.parametrize("clean", [True, False])
def test_decoding_cleans_up_where_the_config_says(folder: Path, clean: bool) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"clean_up_tokenization_spaces": clean})
    )
    theirs, ours = AutoTokenizer.from_pretrained(folder), Processor(folder).tokenizer
    ids = ours.encode("what colour ? the seven . it n't")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_continued_text_gets_nothing_before_it(folder: Path) -> None:
    tokenizer = Processor(folder).tokenizer
    start, rest = "what a", " what<image>a?"
    joined = tokenizer.encode(start) + tokenizer.encode_continued(rest)
    assert joined == tokenizer.encode(start + rest)


@given(st.text(alphabet="aé東🦒 w\n", max_size=12), st.lists(st.integers(5, 60), max_size=8))
def test_streamed_pieces_are_the_whole_and_split_no_character(
    written: str, noise: list[int]
) -> None:
    for style in ("byte-level", "prepend", "metaspace"):
        tokenizer = streaming_tokenizer(style)
        ids = tokenizer.encode(written) + noise + tokenizer.encode(written)
        pieces: list[str] = []
        detokenizer = Detokenizer(tokenizer, pieces.append)
        for token in ids:
            detokenizer.push(token)
        detokenizer.flush()
        assert "".join(pieces) == tokenizer.decode(ids)
        if not noise:
            assert not any("\ufffd" in piece for piece in pieces)


TOKENIZERS: dict[str, text_room.Tokenizer] = {}


def streaming_tokenizer(style: str) -> text_room.Tokenizer:
    if style not in TOKENIZERS:
        with tempfile.TemporaryDirectory() as folder:
            bytelike_tokenizer(Path(folder), style)
            TOKENIZERS[style] = text_room.Tokenizer.load(Path(folder))
    return TOKENIZERS[style]


def test_what_is_missing_is_named(clip: Path, tmp_path: Path) -> None:
    processor = Processor(tmp_path)
    for part, said in [("tokenizer", r"tokenizer\.json"), ("images", r"preprocessor_config\.json")]:
        with pytest.raises(ArtifactError, match=said):
            getattr(processor, part)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Processor(tmp_path).tokenizer  # noqa: B018
    (tmp_path / "tokenizer.json").write_bytes((clip / "tokenizer.json").read_bytes())
    processor = Processor(tmp_path)
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja"):
        processor.render([])


@pytest.mark.parametrize(
    ("text", "images", "said"),
    [
        ("what ?", 1, "no place"), ("<image> what ?", 0, "places for 1 images, 0"),
        ("<image><image>", 1, "places for 2 images, 1"), ("<image>", 3, "places for 1 images, 3"),
    ],
)  # fmt: skip
def test_images_and_placeholders_must_agree(clip: Path, text: str, images: int, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Processor(clip).token_ids(text, [Seen(16)] * images)
    assert "<image>" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("processor_config.json", {"num_additional_image_tokens": 0}, "15 tokens for an image, the model 16"),
        ("config.json", {"image_token_index": 9}, "image token is 9"),
        ("config.json", {"model_type": "other"}, "not supported"),
    ],
)  # fmt: skip
def test_a_processor_of_another_model_is_refused(
    clip: Path, tmp_path: Path, file: str, change: dict[str, Any], said: str
) -> None:
    for source in clip.glob("*.js*"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / file).write_text(json.dumps(json.loads((clip / file).read_text()) | change))
    processor = Processor(tmp_path)
    with pytest.raises(ArtifactError, match=said):
        _everything(processor)


def _everything(processor: Processor) -> tuple[ImageInputs, int]:
    return processor.image_inputs([Image.new("RGB", (28, 28))]), processor.image_token_id


def test_special_token_names_as_transformers_maps_them(clip: Path) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(clip).special_tokens_map
    assert Processor(clip).tokenizer.special == theirs


ROWS = st.lists(
    st.lists(st.integers(2, 9).map(lambda token: min(token, 4)), min_size=1, max_size=9),
    min_size=1, max_size=4,
)  # fmt: skip


@given(ROWS)
def test_batches_as_the_reference_builds_them(rows: list[list[int]]) -> None:
    batch = pad_batch(rows, 0, 4)
    ids, mask = reference_batch(rows, 0, 4)
    assert (batch.input_ids == ids.numpy()).all()
    assert (batch.attention_mask == mask.numpy()).all()
    index = vision_index_of((ids == 4) & (mask == 1), mask)
    assert (batch.vision_index == index.numpy()).all()
    real = torch.cumsum(mask, 1).numpy() - 1
    assert (positions(batch.attention_mask, ids.shape[1]) == np.maximum(real, 0)).all()
