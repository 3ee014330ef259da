"""Text becomes token ids and comes back, as transformers' tokenizer of the checkpoint does it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers

from vtr_export.errors import ArtifactError
from vtr_export.runtime.json_files import read_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_NAMED: Final = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
# transformers' clean_up_tokenization, in its order
_CLEAN_UP: Final = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders write for half a character


class Tokenizer:
    """``tokenizer.json`` with the special tokens that ``tokenizer_config.json`` adds to it."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        self._backend = backend
        self.special = _special_tokens(config)  # by name: bos_token, image_token, …
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        backend.add_tokens(_missing_tokens(backend, config, self.special))
        is_bpe = isinstance(backend.model, tokenizers.models.BPE)
        self._cleans_up = bool(config.get("clean_up_tokenization_spaces")) and not is_bpe

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """From a folder with ``tokenizer.json``; ArtifactError names what is missing or broken."""
        file = folder / TOKENIZER
        if not file.is_file():
            raise ArtifactError(
                f"there is no tokenizer: {TOKENIZER} is missing",
                where=str(folder),
                hint=f"put the checkpoint's {TOKENIZER} and {TOKENIZER_CONFIG} there",
            )
        config = read_json(folder / TOKENIZER_CONFIG)
        if "added_tokens_decoder" not in config:
            config |= read_json(folder / SPECIAL_TOKENS_MAP)
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)), config)
        except Exception as error:  # the library raises nothing narrower
            raise ArtifactError(
                f"the tokenizer cannot be read: {error}",
                where=str(file),
                hint="put the checkpoint's own file there",
            ) from error

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; ``special`` adds what the tokenizer puts around a text (``<s>``)."""
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def encode_continued(self, text: str) -> list[int]:
        """Token ids of a text that follows another one: nothing is put before it.

        Encoded after a newline that is taken off again, as transformers does: tokenizers that
        write a space before the first word would write one here.
        """
        newline = self.encode("\n", special=False)
        ids = self.encode("\n" + text, special=False)
        if ids[: len(newline)] == newline:
            return ids[len(newline) :]
        return self.encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        for written, meant in _CLEAN_UP if self._cleans_up else ():
            text = text.replace(written, meant)
        return text

    def id_of(self, token: str) -> int | None:
        """The id of one token, None when the tokenizer does not know it."""
        found: int | None = self._backend.token_to_id(token)
        return found


class Detokenizer:
    """Hands out text piece by piece while tokens arrive; half a character waits for the rest."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None]) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token_id: int) -> None:
        """Take a token; show what is whole."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        if not text.endswith(_UNFINISHED):
            self._advance(text)

    def flush(self) -> None:
        """Show what was held back, whole or not: then the pieces are the decoded text."""
        self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> None:
        if text.startswith(self._shown) and len(text) > len(self._shown):
            piece, self._shown = text[len(self._shown) :], text
            self._show(piece)


def _content(token: object) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens: transformers' own names, and every other ``*_token``."""
    extra = config.get("extra_special_tokens")
    pairs = {**config, **(extra if isinstance(extra, Mapping) else {})}
    found = {
        name: _content(token)
        for name, token in pairs.items()
        if name.endswith("_token") and isinstance(token, str | Mapping)
    }
    order = [*_NAMED, *(name for name in found if name not in _NAMED)]
    return {name: found[name] for name in order if name in found}


def _missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]
) -> list[tokenizers.AddedToken]:
    """Added tokens that the config knows and ``tokenizer.json`` does not list, in id order."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    by_id = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed = [token for _, token in by_id] + list(special.values())
    listed += extra if isinstance(extra, list) else []
    missing: dict[str, tokenizers.AddedToken] = {}
    for token in listed:
        if (content := _content(token)) not in known and content not in missing:
            missing[content] = _added_token(token)
    return list(missing.values())


def _added_token(token: str | Mapping[str, Any]) -> tokenizers.AddedToken:
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True)
    return tokenizers.AddedToken(**{k: v for k, v in token.items() if k != "__type"})
