"""The tensors of a PyTorch checkpoint file (.pth), found without torch and without running what the file says.

Such a file is a zip archive, uncompressed: a pickle that describes the tensors, and one entry of raw numbers for each
storage. The pickle is read by an unpickler that knows five names and refuses every other; the tensors are then as those
of a safetensors file, a range of bytes each.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sora_jax.errors import UserError
from sora_jax.weights.safetensors_io import DTYPES, StoredTensor

STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}


class _Storage(NamedTuple):
    dtype: str
    key: str  # of the archive's entry


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # in numbers
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise UserError(f"it holds {module}.{name}, and only float tensors are read")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or dtype not in DTYPES:
            raise UserError(f"it holds a {kind} of {dtype}, and only float tensors are read")
        return _Storage(dtype, str(key))


def read_torch_file(path: epath.Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict by name. Raises `UserError` for what is no such file, or is cut off."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {name.partition("/")[2]: name for name in archive.namelist()}
            described = _Unpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load()
            starts = {key: _start(file, archive.getinfo(name)) for key, name in entries.items()}
    except UserError as error:
        raise UserError(f"{path} is not supported: {error}") from None
    except (zipfile.BadZipFile, KeyError, pickle.UnpicklingError, EOFError, TypeError, ValueError):
        raise UserError(f"{path} is not a PyTorch checkpoint (1.6 or newer), or is cut off") from None
    if not isinstance(described, Mapping) or not all(isinstance(value, _Tensor) for value in described.values()):
        raise UserError(f"{path} is not supported: it is no plain table of tensors")
    return {name: _stored(path, name, tensor, starts) for name, tensor in described.items()}


def _start(file: Any, info: zipfile.ZipInfo) -> int:
    """Where an entry's numbers begin in the archive: behind its header, whose extra field the directory does not
    tell."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise UserError("its entries are compressed")
    file.seek(info.header_offset)
    header = file.read(30)
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _stored(path: epath.Path, name: str, tensor: _Tensor, starts: Mapping[str, int]) -> StoredTensor:
    size = DTYPES[tensor.storage.dtype].itemsize
    dense = tuple(int(np.prod(tensor.shape[i + 1 :])) for i in range(len(tensor.shape)))
    # the stride along an axis of length 1 means nothing
    if any(have != want for n, have, want in zip(tensor.shape, tensor.stride, dense, strict=True) if n > 1):
        raise UserError(f'{path} is not supported: tensor "{name}" is not stored in one piece')
    start = starts[f"data/{tensor.storage.key}"] + size * tensor.offset
    return StoredTensor(path, tensor.storage.dtype, tensor.shape, start, start + size * int(np.prod(tensor.shape)))
