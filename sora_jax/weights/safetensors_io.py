"""The safetensors file format, read and written piece by piece.

    8 bytes: length of the header, little-endian · JSON header {name: {dtype, shape, data_offsets}} · the tensors

Done here rather than by the `safetensors` package because a path may be a URL, because writing needs one tensor in
memory and not all, and because a file that is cut off must be refused by the name of the tensor that is not there.
Files are read and not mapped: pages of a mapped file count as the process's memory for as long as the system likes.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from sora_jax.errors import UserError
from sora_jax.weights.files import read_json

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
MAX_HEADER = 100 * 2**20  # bytes; the format's own bound


class StoredTensor(NamedTuple):
    """Where one tensor lies; `start` and `stop` count bytes from the beginning of the file."""

    path: epath.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _read_entries(path: epath.Path) -> tuple[dict[str, Any], int]:
    """The JSON header of one file, and where the tensors begin."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` where it came from")
        header = file.read(length) if len(prefix) == 8 and length <= MAX_HEADER else b""
        if not header or len(header) < length:
            raise UserError(f"{path} is not a safetensors file, or is cut off in its header")
    try:
        entries = json.loads(header)
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise UserError(f"{path} is not a safetensors file: its header is damaged")
    return entries, 8 + length


def read_metadata(path: epath.Path) -> dict[str, str]:
    """What the writer of a file noted beside its tensors."""
    noted = _read_entries(path)[0].get("__metadata__")
    return noted if isinstance(noted, dict) else {}


def read_header(path: epath.Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name; the file is checked to be long enough for each."""
    entries, start = _read_entries(path)
    entries.pop("__metadata__", None)
    size = path.stat().length
    try:
        tensors = {
            name: StoredTensor(
                path,
                str(entry["dtype"]),
                tuple(map(operator.index, entry["shape"])),
                *(start + operator.index(n) for n in entry["data_offsets"]),
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a safetensors file: its header is damaged") from None
    for name, tensor in tensors.items():
        if tensor.stop > size:
            raise UserError(f'{path} is cut off: tensor "{name}" ends at byte {tensor.stop}, the file has {size}')
        expected = DTYPES[tensor.dtype].itemsize * int(np.prod(tensor.shape)) if tensor.dtype in DTYPES else None
        if expected is not None and tensor.stop - tensor.start != expected:
            raise UserError(
                f'{path} is damaged: tensor "{name}" has {tensor.stop - tensor.start} bytes, not {expected}'
            )
    return tensors


def read_headers(folder: epath.Path, stem: str) -> dict[str, StoredTensor]:
    """The tensors of `STEM.safetensors`, or of the shards that `STEM.safetensors.index.json` lists."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise UserError(f"{single} is missing")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise UserError(f"{index} has no weight_map of tensors to files")
    shards = sorted(set(listed.values()))
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        if not (folder / shard).exists():
            raise UserError(f"{folder / shard} is missing, one of {len(shards)} shards in {index.name}")
        tensors |= read_header(folder / shard)
    return tensors


@contextmanager
def tensor_reader() -> Iterator[Callable[[StoredTensor], np.ndarray]]:
    """A function that reads one tensor, in its stored dtype (one of `DTYPES`); each file is opened once."""
    files: dict[epath.Path, BinaryIO] = {}
    with ExitStack() as stack:

        def read(tensor: StoredTensor) -> np.ndarray:
            if tensor.path not in files:
                files[tensor.path] = stack.enter_context(tensor.path.open("rb"))
            files[tensor.path].seek(tensor.start)
            data = files[tensor.path].read(tensor.stop - tensor.start)
            return np.frombuffer(data, DTYPES[tensor.dtype]).reshape(tensor.shape)

        yield read


def write_tensors(
    path: epath.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[np.ndarray],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write `tensors`, in the order and with the shapes of `shapes`, converted to `dtype`, as they come, and notes."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    entries: dict[str, Any] = {
        "__metadata__": {"format": "pt", **metadata}
    }  # without it `transformers` refuses the file
    offset = 0
    for name, shape in shapes.items():
        stop = offset + dtype.itemsize * int(np.prod(shape))
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tensor.shape != tuple(shape):
                raise ValueError(f"tensor {name} has shape {tensor.shape}, announced as {shape}")
            file.write(np.ascontiguousarray(tensor, dtype).tobytes())
