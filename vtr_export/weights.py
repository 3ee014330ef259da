"""Weights go from checkpoint to artifact in one streamed pass, or stay where they are."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NoReturn, TypeAlias

import numpy as np
import onnx_ir as ir

from vtr_export.checkpoint import TensorRef, read_header
from vtr_export.errors import CheckpointError, WeightError
from vtr_export.runs import elements
from vtr_export.streams import CHUNK_BYTES, Array, Lane, ShardReader, Sink, fill, open_shard

ONNX_DTYPES = {
    "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "F32": ir.DataType.FLOAT,
    "F64": ir.DataType.DOUBLE, "BOOL": ir.DataType.BOOL,
    "U8": ir.DataType.UINT8, "U16": ir.DataType.UINT16, "U32": ir.DataType.UINT32,
    "U64": ir.DataType.UINT64, "I8": ir.DataType.INT8, "I16": ir.DataType.INT16,
    "I32": ir.DataType.INT32, "I64": ir.DataType.INT64,
}  # fmt: skip
LINKABLE = frozenset(ONNX_DTYPES) - {"F64"}  # no kernel of a decoder takes float64
ALIGNMENT = 4096  # a page: ONNX Runtime maps tensors that start on one
INLINE_BYTES = 1024
TILE = 64  # rows of a transposed block: its cache lines fit the first-level cache
# The smallest magnitude that rounds to infinity.
OVERFLOW = {
    ir.DataType.FLOAT16: 65520.0,
    ir.DataType.BFLOAT16: (2 - 2.0**-8) * 2.0**127,
    ir.DataType.FLOAT: (2 - 2.0**-24) * 2.0**127,
    ir.DataType.DOUBLE: math.inf,
}

Progress: TypeAlias = Callable[[int, int], None]  # checkpoint bytes read, of how many


class CheckpointTensor(ir.LazyTensor):
    """One tensor of a checkpoint, cast and transposed when asked for; never keeps its data.

    ``dtype`` and ``shape`` are those after casting and transposing. ``numpy()`` reads anew each
    time, and lets NaN and overflow pass: ``write_weights`` finds them. Raises CheckpointError for
    a stored dtype that cannot be exported, ValueError for a cast or transposition without sense.
    """

    __slots__ = ("ref", "transpose")

    def __init__(
        self, ref: TensorRef, *, name: str, dtype: ir.DataType, transpose: bool = False
    ) -> None:
        source = source_dtype(ref)
        if dtype != source and not {dtype, source} <= set(OVERFLOW):
            raise ValueError(f"{ref.name}: no cast from {source} to {dtype}")
        if transpose and len(ref.shape) != 2:
            raise ValueError(f"{ref.name}: only matrices are transposed, not {ref.shape}")
        self.ref, self.transpose = ref, transpose
        shape = ir.Shape(ref.shape[::-1] if transpose else ref.shape, frozen=True)
        super().__init__(lambda: _load(ref, dtype, transpose), dtype, shape, name=name)

    def __repr__(self) -> str:
        turned = ", transposed" if self.transpose else ""
        return f"{self._repr_base()}({self.ref.name!r} in {self.ref.shard.name}{turned})"


@dataclass(frozen=True)
class WrittenFile:
    """A weight file of the artifact."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class WeightsReport:
    """What became of the weights. ``shards`` are sha256 of whole files, of headers if linked."""

    files: dict[str, WrittenFile] = field(default_factory=dict)  # by name in the graphs' folder
    shards: dict[str, str] = field(default_factory=dict)  # by file name; only those in use
    weights_scanned: bool = False
    tensors: int = 0  # stored once each, however many graphs use them
    seconds: float = 0.0


@dataclass(frozen=True)
class _Weight:
    """What two initializers have in common when they are the same weight."""

    ref: TensorRef
    dtype: ir.DataType
    transpose: bool

    @property
    def size_bytes(self) -> int:
        return int(math.prod(self.ref.shape) * self.dtype.itemsize)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape[::-1] if self.transpose else self.ref.shape


@dataclass(frozen=True)
class _Place:
    """Where a weight goes: at ``offset`` of the file ``location``; inline when that is empty."""

    location: str
    offset: int


_Users: TypeAlias = dict[_Weight, list[tuple[str, ir.Value]]]  # with the name of the graph


def write_weights(
    models: Mapping[str, ir.Model], folder: Path, *, progress: Progress | None = None
) -> WeightsReport:
    """Stream every CheckpointTensor into ``folder/<name>.onnx.data``; graphs then point there.

    A weight that several initializers or graphs use is stored once, in the file of the first
    graph. Weights below 1 KiB stay in the graphs. Raises WeightError for the first NaN, infinity
    or value beyond the dtype's range, CheckpointError for a shard that is not what its name in
    the hub cache says; the graphs are then as they were. Holds at most two tensors at a time.
    """
    start = time.perf_counter()
    users = _users(models)
    places, sizes = _layout(users)
    inline: dict[_Weight, Array] = {}
    readers: list[ShardReader] = []
    with ExitStack() as stack:
        sinks = {name: stack.enter_context(Sink(folder / name, sizes[name])) for name in sizes}
        hashing, writing = stack.enter_context(Lane()), stack.enter_context(Lane())
        advance = _meter({weight.ref.shard for weight in places}, progress)
        for shard, weights in groupby(places, key=lambda weight: weight.ref.shard):
            with ShardReader(shard, hashing, advance) as reader:
                readers.append(reader)
                for weight in weights:
                    parts = _parts(weight, reader)
                    if places[weight].location:
                        _send(parts, places[weight], sinks, writing)
                    else:
                        inline[weight] = np.concatenate([*parts]).reshape(weight.shape)
    shards = {reader.shard.name: reader.digest() for reader in readers}
    _point(users, places, folder, inline)
    files = {name: WrittenFile(sizes[name], sink.hash.hexdigest()) for name, sink in sinks.items()}
    return WeightsReport(files, shards, True, len(users), time.perf_counter() - start)


def link_weights(models: Mapping[str, ir.Model], folder: Path) -> WeightsReport:
    """Point every CheckpointTensor at its bytes in the shards of ``folder``; write and read none.

    Locations are plain shard names: a session finds them in the checkpoint's folder. The graphs
    must cast and transpose by themselves (ValueError where a tensor still asks for it). Raises
    CheckpointError for a dtype no kernel takes, and for a shard in another folder.
    """
    start = time.perf_counter()
    users = _users(models)
    for weight in users:
        _check_linkable(weight, folder)
    headers = {shard.name: read_header(shard)[1] for shard in {w.ref.shard for w in users}}
    _point(users, {w: _Place(w.ref.shard.name, w.ref.offset) for w in users}, folder, {})
    seconds = time.perf_counter() - start
    return WeightsReport({}, dict(sorted(headers.items())), False, len(users), seconds)


def source_dtype(ref: TensorRef) -> ir.DataType:
    """The ONNX dtype of a tensor as stored; CheckpointError when there is none."""
    if ref.dtype not in ONNX_DTYPES:
        raise CheckpointError(
            f"tensor {ref.name!r} is stored as {ref.dtype}, which cannot be exported",
            where=str(ref.shard),
            hint="start from a float16, bfloat16 or float32 checkpoint",
        )
    return ONNX_DTYPES[ref.dtype]


def cast(values: Array, dtype: ir.DataType) -> Array:
    """``values`` as ``dtype``, to nearest even; the same array when nothing changes."""
    target = dtype.numpy()
    if values.dtype == target:
        return values
    with np.errstate(all="ignore"):
        if values.dtype == ir.DataType.BFLOAT16.numpy() and target == np.float16:
            values = values.astype(np.float32)
        return values.astype(target)


def _load(ref: TensorRef, dtype: ir.DataType, transpose: bool) -> ir.TensorProtocol:
    values = np.empty(ref.shape, source_dtype(ref).numpy())
    with open_shard(ref.shard) as file:
        elements(ref, lambda part, offset: fill(file, part, offset, ref.shard))(values, 0)
    values = cast(values, dtype)
    return ir.Tensor(np.ascontiguousarray(values.T) if transpose else values, dtype=dtype)


def _users(models: Mapping[str, ir.Model]) -> _Users:
    """The initializers that use each weight, with the name of their graph, in order."""
    users: _Users = defaultdict(list)
    for name, model in models.items():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, CheckpointTensor):
                users[_Weight(tensor.ref, tensor.dtype, tensor.transpose)].append((name, value))
    return users


def _layout(users: _Users) -> tuple[dict[_Weight, _Place], dict[str, int]]:
    """Every weight's place, in the order of the shards, and the size of every file."""
    places: dict[_Weight, _Place] = {}
    sizes: dict[str, int] = {}
    for weight in sorted(users, key=lambda w: (w.ref.shard, w.ref.offset, w.dtype, w.transpose)):
        if weight.size_bytes < INLINE_BYTES:
            places[weight] = _Place("", 0)
            continue
        location = f"{users[weight][0][0]}.onnx.data"
        offset = -(-sizes.get(location, 0) // ALIGNMENT) * ALIGNMENT
        places[weight] = _Place(location, offset)
        sizes[location] = offset + weight.size_bytes
    return places, sizes


def _point(
    users: _Users, places: Mapping[_Weight, _Place], folder: Path, inline: Mapping[_Weight, Array]
) -> None:
    """Give every initializer the stored weight instead of the lazy one."""
    for weight, values in users.items():
        place = places[weight]
        for _, value in values:
            assert value.name is not None
            if weight in inline:
                value.const_value = ir.Tensor(inline[weight], dtype=weight.dtype, name=value.name)
                continue
            value.const_value = ir.ExternalTensor(
                place.location,
                place.offset,
                weight.size_bytes,
                weight.dtype,
                shape=ir.Shape(weight.shape),
                name=value.name,
                base_dir=folder,
            )


def _check_linkable(weight: _Weight, folder: Path) -> None:
    ref = weight.ref
    if weight.transpose or weight.dtype != source_dtype(ref):
        raise ValueError(f"{ref.name}: a linked weight is neither cast nor transposed")
    hint = "use --weights copy"
    if ref.dtype not in LINKABLE:
        message = f"tensor {ref.name!r} is stored as {ref.dtype}, which no kernel takes: not linked"
        raise CheckpointError(message, where=str(ref.shard), hint=hint)
    if ref.loops:
        message = f"a part of tensor {ref.name!r} lies in pieces, or in another order: not linked"
        raise CheckpointError(message, where=str(ref.shard), hint=hint)
    if ref.shard.parent != folder:
        message = f"tensor {ref.name!r} lies outside {folder}: one folder holds all linked shards"
        raise CheckpointError(message, where=str(ref.shard), hint=hint)


def _meter(shards: set[Path], progress: Progress | None) -> Callable[[int], None]:
    """What readers call with the bytes they read, forwarded as a running total."""
    total = sum(shard.stat().st_size for shard in shards)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return advance


def _send(parts: Iterable[Array], place: _Place, sinks: Mapping[str, Sink], lane: Lane) -> None:
    for part in parts:
        lane.put(sinks[place.location].write, part, place.offset)


def _parts(weight: _Weight, reader: ShardReader) -> Iterator[Array]:
    """The weight as the artifact stores it, in contiguous parts of about a chunk; scanned."""
    if weight.transpose:
        yield from _transposed(weight, reader)
        return
    dtype = source_dtype(weight.ref).numpy()
    count, step = math.prod(weight.ref.shape), CHUNK_BYTES // dtype.itemsize
    read = elements(weight.ref, reader.fill)
    yield np.empty(0, weight.dtype.numpy())
    for start in range(0, count, step):
        values = np.empty(min(step, count - start), dtype)
        read(values, start)
        _scan(values, weight, start)
        yield cast(values, weight.dtype)


def _transposed(weight: _Weight, reader: ShardReader) -> Iterator[Array]:
    """Columns of the stored matrix as rows, some at a time; the matrix is held meanwhile."""
    dtype = source_dtype(weight.ref).numpy()
    rows, columns = weight.ref.shape
    matrix, read = np.empty((rows, columns), dtype), elements(weight.ref, reader.fill)
    step = max(1, CHUNK_BYTES // max(1, columns * dtype.itemsize))
    for start in range(0, rows, step):
        values = matrix[start : start + step]
        read(values, start * columns)
        _scan(values.reshape(-1), weight, start * columns)
    width = max(TILE, CHUNK_BYTES // max(1, rows * dtype.itemsize))
    for start in range(0, columns, width):
        panel = np.empty((min(width, columns - start), rows), dtype)
        for row in range(0, rows, TILE):
            panel[:, row : row + TILE] = matrix[row : row + TILE, start : start + width].T
        yield cast(panel, weight.dtype)


def _scan(values: Array, weight: _Weight, start: int) -> None:
    """WeightError when a value is NaN or infinite, or would be after the cast.

    Compares bit patterns: of signed integers the largest is the worst positive float, of unsigned
    ones the worst negative. ``start`` is the flat index of the first value.
    """
    source = source_dtype(weight.ref)
    if source not in OVERFLOW or not values.size:
        return
    signed, unsigned = np.dtype(f"i{values.itemsize}"), np.dtype(f"u{values.itemsize}")
    with np.errstate(over="ignore"):
        limit = int(np.array(OVERFLOW[weight.dtype]).astype(values.dtype).view(unsigned))
    sign = 1 << (8 * values.itemsize - 1)
    bits = values.view(unsigned)
    if values.view(signed).max() < limit and bits.max() < (limit | sign):
        return
    index = int(np.argmax((bits & unsigned.type(sign - 1)) >= limit))
    _refuse(float(values[index]), weight, start + index)


def _refuse(value: float, weight: _Weight, index: int) -> NoReturn:
    ref = weight.ref
    place = [int(i) for i in np.unravel_index(index, ref.shape)]
    if math.isfinite(value):
        what = f"{value:g}, beyond the range of {weight.dtype.name.lower()}"
        wider = "bf16 or fp32" if weight.dtype == ir.DataType.FLOAT16 else "fp32"
        hint = f"export with --dtype {wider}"
    else:
        what, hint = str(value), "the checkpoint is damaged: download or copy it again"
    message = f"tensor {ref.name!r} holds {what} at {place}"
    raise WeightError(message, where=str(ref.shard), hint=hint)
