"""A checkpoint read through once, on the host: are all tensors there, are their numbers numbers, and as many as
published?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sora_jax.errors import UserError
from sora_jax.weights.component import CheckedComponent
from sora_jax.weights.layout import INDEX, SECOND
from sora_jax.weights.original import open_model
from sora_jax.weights.safetensors_io import StoredTensor, tensor_reader
from sora_jax.weights.wan import TRANSFORMER

# Of the open models, exact (facts of the family): parameters of a transformer by layers and width.
PUBLISHED = {(30, 1536): 1_418_996_800, (40, 5120): 14_288_491_584, (30, 3072): 4_999_787_712}
WIDE = 1000.0  # no trained tensor of these families has numbers larger than some hundreds


class Strange(NamedTuple):
    """A tensor whose numbers cannot be a trained model's."""

    name: str
    why: str


@dataclass(frozen=True)
class Verdict:
    """One component of a model folder."""

    component: str
    tensors: int
    parameters: int
    published: int | None  # where the sizes are an open model's
    dtypes: tuple[str, ...]
    largest: float  # absolute value
    deviation: float  # of all numbers
    sha256: str  # of all tensors, in the order of their names
    strange: tuple[Strange, ...]


def verify_folder(path: epath.Path, progress: Callable[[str, int, int], None] | None = None) -> list[Verdict]:
    """Every component of a model folder in either layout, one tensor in memory at a time. Raises `UserError`, as
    loading does, for a tensor that is missing, unexpected, cut off or of the wrong shape, and for parts that do not fit
    each other."""
    opened = open_model(path)
    if opened is None:
        raise UserError(f"{path} is not a model folder: it has no {INDEX}, and none of the files of Wan's authors")
    return [_verify(name, component, progress) for name, component in opened.components.items()]


def _verify(name: str, component: CheckedComponent, progress: Callable[[str, int, int], None] | None) -> Verdict:
    stored = component.stored
    digest = hashlib.sha256()
    count, total, squares, largest = 0, 0.0, 0.0, 0.0
    strange: list[Strange] = []
    for done, (key, numbers, raw) in enumerate(_tensors(stored)):
        digest.update(key.encode() + raw)
        wide = numbers.astype(np.float32)
        finite = np.isfinite(wide)
        if not finite.all():
            strange.append(Strange(key, f"{np.count_nonzero(~finite)} of {wide.size} numbers are not finite"))
            wide = wide[finite]
        top = float(np.abs(wide).max(initial=0.0))
        if top > WIDE:
            strange.append(Strange(key, f"holds {top:.3g}"))
        elif wide.ndim > 1 and top == 0.0:
            strange.append(Strange(key, "is all zeros"))
        count += wide.size
        total += float(wide.sum(dtype=np.float64))
        squares += float(np.einsum("i,i->", wide.ravel(), wide.ravel(), dtype=np.float64))  # without a float64 copy
        largest = max(largest, top)
        if progress is not None:
            progress(name, done + 1, len(stored))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(component.params))
    mean = total / max(count, 1)
    return Verdict(
        component=name,
        tensors=len(stored),
        parameters=parameters,
        published=_published(name, component.config),
        dtypes=tuple(sorted({tensor.dtype for tensor in stored.values()})),
        largest=largest,
        deviation=float(np.sqrt(max(squares / max(count, 1) - mean**2, 0.0))),
        sha256=digest.hexdigest(),
        strange=tuple(strange),
    )


def _tensors(stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, np.ndarray, bytes]]:
    with tensor_reader() as read:
        for name in sorted(stored):
            tensor = read(stored[name])
            yield name, tensor, tensor.tobytes()


def _published(name: str, config: Any) -> int | None:
    return PUBLISHED.get((config.n_layers, config.dim)) if name in (TRANSFORMER.folder, SECOND) else None
