"""A family of checkpoints as a table: which of our parameters is which tensor on disk, and how its axes are laid out.

    Row("blocks.self_attn.q.kernel", "blocks.{n}.attn1.to_q.weight", "o i -> i o")

reads both ways. `{n}` runs over the leading axis of our parameter, which stacks the layers. Rows for parameters that a
config does not have (a bias, a shortcut) are skipped, so that one table serves every size; what keeps this honest is
that every parameter must have a row, and every tensor on disk must be one that a row names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from einops import rearrange
from flax import nnx


@dataclass(frozen=True)
class Row:
    """One parameter and its tensor (with `{n}` in `theirs`: its tensors, one a layer)."""

    ours: str
    theirs: str
    axes: str = "... -> ..."  # einops pattern from their axes to ours, of one layer
    sizes: Mapping[str, int] = field(default_factory=dict)  # of axes that are merged in ours
    also: tuple[str, ...] = ()  # further keys under which a file may repeat the tensor

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return rearrange(tensor, self.axes)

    def to_theirs(self, tensor: np.ndarray) -> np.ndarray:
        theirs, ours = self.axes.split(" -> ")
        return rearrange(tensor, f"{ours} -> {theirs}", **self.sizes)

    @property
    def stacked(self) -> bool:
        return "{n}" in self.theirs

    def keys(self, shape: Sequence[int]) -> list[str]:
        """The names on disk of a parameter of ours of that shape, in the order of its layers."""
        return [self.theirs.replace("{n}", str(n)) for n in range(shape[0] if self.stacked else 1)]

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape on disk of (one layer of) a parameter of ours of that shape."""
        return self.to_theirs(np.broadcast_to(np.int8(0), shape[1:] if self.stacked else shape)).shape


def at(ours: str, theirs: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of a submodule, placed where it lies in ours and in theirs."""
    return tuple(replace(row, ours=f"{ours}.{row.ours}", theirs=f"{theirs}.{row.theirs}") for row in rows)


BIAS = Row("bias", "bias")
LINEAR = (Row("kernel", "weight", "o i -> i o"), BIAS)


@dataclass(frozen=True)
class Family:
    """A class of model on disk: where it lies, how its config is read and written, and its table."""

    name: str  # the class in the library that wrote it
    library: str
    folder: str  # of the component in a model folder
    stem: str  # of the weights file
    module: Callable[..., nnx.Module]  # module(config, rngs=...)
    table: Callable[[Any], Sequence[Row]]  # table(config)
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    wide: tuple[str, ...] = ()  # parts of the names of parameters that are float32 at any dtype
