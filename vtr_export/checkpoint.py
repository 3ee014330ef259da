"""A Hugging Face model folder: its config, and where every tensor lies in its safetensors files."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vtr_export.errors import CheckpointError
from vtr_export.families import RAN, ModelFacts, read_facts
from vtr_export.layouts import find_layout

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
MAX_JSON_BYTES = 100_000_000  # the limit of the safetensors library for a header
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_REPOSITORY = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_DAMAGED = "the file is damaged: download or copy it again"


@dataclass(frozen=True)
class TensorRef:
    """One tensor: ``size_bytes`` bytes at ``offset`` from the start of the file ``shard``.

    A part of a fused tensor, or one in another order, lies in runs of equal size: ``loops`` say how
    many and how many bytes from start to start, the outermost loop first, from ``offset`` on.
    """

    name: str
    shard: Path
    dtype: str  # as safetensors spells it: F16, BF16, F32, …
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    loops: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose headers were read and found consistent; no weight was.

    Where the folder's layout is another, ``config`` and the names of ``tensors`` are transformers',
    and ``files`` are texts by name that stand for the folder's own. So they are where the folder's
    own code was run, whose files are ``code``: name → sha256.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorRef] = field(repr=False)
    shards: tuple[Path, ...]
    headers_sha256: dict[str, str] = field(repr=False)  # by shard file name
    config_sha256: str = ""
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    code: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path, ran: dict[str, Any] | None = None) -> "Checkpoint":
        """Read config and headers of a folder, or of a hub id that lies in the local cache.

        ``ran``: what the folder's own code made of its config. Raises CheckpointError for
        everything that is not a whole safetensors checkpoint. Reads no weights, opens no
        connection.
        """
        folder = find_folder(path)
        config, config_sha256 = read_config(folder)
        _refuse_quantised(folder)
        weight_map = _weight_map(folder)
        shards = tuple(folder / name for name in sorted(set(weight_map.values()) or {SINGLE}))
        tensors: dict[str, TensorRef] = {}
        headers: dict[str, str] = {}
        for shard in shards:
            refs, headers[shard.name] = read_header(shard)
            tensors |= {
                name: ref
                for name, ref in refs.items()
                if weight_map.get(name, shard.name) == shard.name
            }
        for name, shard_name in weight_map.items():
            if name not in tensors:
                _fail(f"{INDEX} says {name!r} is in {shard_name}, which lacks it", folder / INDEX)
        if layout := find_layout(_read_own_config(folder)[0]):
            tensors = layout.tensors(config, tensors)
        files = made_files(folder)
        if ran is not None:
            config, files = ran, {**files, CONFIG: json.dumps(ran, indent=2)}
        code = {} if ran is None else ran[RAN]
        return cls(folder, config, tensors, shards, headers, config_sha256, files, code)


def find_folder(path: str | Path) -> Path:
    """The folder ``path`` names: itself, or the cached snapshot of a hub id. Never downloads."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        _fail(
            "a model is a folder, and this is a file", folder, f"give the folder: {folder.parent}"
        )
    if isinstance(path, Path) or not _REPOSITORY.fullmatch(path):
        _fail("no such model folder", folder, "check the path; a hub id looks like org/name")
    return _cached_snapshot(path)


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """A model folder's configuration in transformers' form, and the sha256 of ``config.json``."""
    config, digest = _read_own_config(folder)
    layout = find_layout(config)
    return (config if layout is None else layout.config(config, folder)), digest


def made_files(folder: Path) -> dict[str, str]:
    """Texts by name that stand for a folder's own files; none where its layout is transformers'."""
    own, _ = _read_own_config(folder)
    if (layout := find_layout(own)) is None:
        return {}
    return layout.files(own, layout.config(own, folder), folder)


def _read_own_config(folder: Path) -> tuple[dict[str, Any], str]:
    file = folder / CONFIG
    if file.is_file():
        return _read_object(file)
    if (folder / "adapter_config.json").is_file():
        _refuse_adapter(folder)
    _fail(
        f"not a model folder: it has no {CONFIG}", folder, "give the folder the model was saved in"
    )


def read_model_facts(folder: Path, ran: dict[str, Any] | None = None) -> ModelFacts:
    """What ``config.json`` of a model folder says of the model's shape; ``ran``: see ``open``."""
    config = read_config(folder)[0] if ran is None else ran
    return read_facts(config, str(folder / CONFIG))


def read_header(shard: Path) -> tuple[dict[str, TensorRef], str]:
    """Every tensor of one safetensors file by name, and the sha256 of its header.

    As strict as the safetensors library: extents fit dtype and shape, do not overlap, leave no
    hole, and end where the file ends.
    """
    if not shard.is_file():
        _fail("a shard of the checkpoint is missing", shard, "download or copy the model again")
    raw, data_start, size_bytes = _header_bytes(shard)
    header = _parse_object(raw[8:], shard)
    header.pop("__metadata__", None)
    refs = {name: _tensor_ref(name, entry, shard, data_start) for name, entry in header.items()}
    _check_extents(refs.values(), shard, data_start, size_bytes)
    return refs, hashlib.sha256(raw).hexdigest()


def _cached_snapshot(repository: str) -> Path:
    """The snapshot that ``refs/main`` names in the local hub cache."""
    cache = _cache_folder() / ("models--" + repository.replace("/", "--"))
    hint = f"download it first (hf download {repository}), or give a folder"
    try:
        commit = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        _fail(f"no folder and no cached model is called {repository!r}", cache, hint)
    snapshot = cache / "snapshots" / commit
    if not re.fullmatch(r"[\w.-]+", commit) or commit in (".", "..") or not snapshot.is_dir():
        _fail(f"the cache names a snapshot of {repository!r} that it lacks", cache, hint)
    return snapshot


def _cache_folder() -> Path:
    environment = os.environ
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser()
    base = Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(environment.get("HF_HOME") or base).expanduser() / "hub"


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to shard file name, from the index; empty when one file holds everything."""
    if (folder / SINGLE).exists():
        return {}
    if not (folder / INDEX).exists():
        _refuse_weightless(folder)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _fail("the index has no weight_map", folder / INDEX)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or re.search(r"[/\\\0]", shard):
            _fail(f"the index places {name!r} in {shard!r}, which is no file name", folder / INDEX)
    return weight_map


def _refuse_quantised(folder: Path) -> None:
    """Quantisers that say nothing in ``config.json`` leave a file of their own."""
    for name in _QUANTISED:
        if (folder / name).is_file():
            _fail(
                f"the checkpoint is quantised ({name}); its weights are not plain",
                folder / name,
                "start from the unquantised checkpoint",
            )


def _refuse_weightless(folder: Path) -> NoReturn:
    """Say why a model folder without ``model.safetensors`` and index cannot be read."""
    if (folder / "adapter_config.json").is_file():
        _refuse_adapter(folder)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        _fail(
            f"only pickled weights ({pickles[0]}), which can run code when loaded: not read",
            folder,
            "convert them where you trust them: AutoModelForImageTextToText"
            ".from_pretrained(folder).save_pretrained(new_folder) writes safetensors",
        )
    hint = f"expected {SINGLE}, or {INDEX} and the shards it names"
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        _fail(f"{INDEX} is missing beside {shards[0].name}", folder, hint)
    _fail("the folder has no weights", folder, hint)


def _refuse_adapter(folder: Path) -> NoReturn:
    _fail(
        "only an adapter (adapter_config.json), without the model it belongs to",
        folder,
        "merge it into its base model first: PeftModel.merge_and_unload().save_pretrained(folder)",
    )


def _header_bytes(shard: Path) -> tuple[bytes, int, int]:
    """Length field and header as stored, where the data starts, and the file's size."""
    try:
        size_bytes = shard.stat().st_size
        with shard.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size_bytes - 8 or length > MAX_JSON_BYTES:
                _fail(f"corrupt header: {length} bytes long in a file of {size_bytes}", shard)
            return start + file.read(length), 8 + length, size_bytes
    except OSError as error:
        _fail(f"cannot be read: {error.strerror}", shard, "check the file's permissions")


def _tensor_ref(name: str, entry: Any, shard: Path, data_start: int) -> TensorRef:
    """One header entry, checked on its own: known dtype, whole sizes, extent = dtype x shape."""
    where = f"corrupt header: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _fail(f"{where} needs exactly dtype, shape and data_offsets", shard)
    dtype, shape, extent = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _fail(f"{where} has the unknown dtype {dtype!r}", shard)
    if not _is_sizes(shape) or not _is_sizes(extent) or len(extent) != 2:
        _fail(f"{where} has shape={shape} and data_offsets={extent}", shard)
    begin, end = extent
    if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        _fail(f"{where} takes {end - begin} bytes, but is {dtype} of shape {shape}", shard)
    return TensorRef(name, shard, dtype, tuple(shape), data_start + begin, end - begin)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_extents(refs: Any, shard: Path, data_start: int, size_bytes: int) -> None:
    """Tensors lie one after the other, from the end of the header to the end of the file."""
    end = data_start
    for ref in sorted(refs, key=lambda ref: (ref.offset, ref.size_bytes)):
        if ref.offset != end:
            kind = "overlaps" if ref.offset < end else "leaves a hole after"
            _fail(f"corrupt header: tensor {ref.name!r} {kind} the one before it", shard)
        end = ref.offset + ref.size_bytes
    if end > size_bytes:
        _fail(f"truncated: {size_bytes} bytes where the header needs {end}", shard)
    if end < size_bytes:
        _fail(f"corrupt: {size_bytes - end} bytes after the last tensor", shard)


def read_json(file: Path) -> dict[str, Any]:
    """A small file of a model folder; CheckpointError for what is not one JSON object."""
    return _read_object(file)[0]


def _read_object(file: Path) -> tuple[dict[str, Any], str]:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            _fail(f"larger than {MAX_JSON_BYTES} bytes", file)
        raw = file.read_bytes()
    except OSError as error:
        _fail(f"cannot be read: {error.strerror}", file, "check the file's permissions")
    return _parse_object(raw, file), hashlib.sha256(raw).hexdigest()


def _parse_object(raw: bytes, file: Path) -> dict[str, Any]:
    """A JSON object whose names are unique at every level."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _fail(f"not valid JSON: {error}", file)
    if not isinstance(value, dict):
        _fail("not a JSON object", file)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice")
    return names


def _fail(message: str, where: Path, hint: str = _DAMAGED) -> NoReturn:
    raise CheckpointError(message, where=str(where), hint=hint)
