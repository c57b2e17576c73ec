"""Which network denoises at which level: one for all, or two experts split at a level (Wan 2.2 A14B), of which only the
one at work is on the devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sora_jax.models.transformer import MODEL_TIME
from sora_jax.sharding import param_shardings
from sora_jax.weights.layout import ModelFolder


class Expert(NamedTuple):
    """Parameters on the devices, and whether they are those for low noise."""

    params: nnx.State
    low: bool


def on_devices(params: nnx.State, mesh: Mesh | None) -> nnx.State:
    """Parameters that lie on the host, placed on `mesh` or the default device; others as they are. They leave the
    devices when the caller lets go of them."""
    if not isinstance(jax.tree.leaves(params)[0], np.ndarray):
        return params
    if mesh is None:
        return jax.tree.map(jax.device_put, params)
    return jax.tree.map(jax.device_put, params, jax.tree.broadcast(param_shardings(params, mesh), params))


class Experts:
    """The transformers of a model. Two are kept on the host, and moved to the devices in turn."""

    def __init__(self, folder: ModelFolder, mesh: Mesh | None):
        self._boundary, self._mesh = folder.boundary, mesh
        self._one = folder.transformer
        self._hosted: tuple[nnx.State, nnx.State] | None = None
        if folder.transformer_2 is not None:
            high, low = (jax.tree.map(np.asarray, params) for params in (folder.transformer, folder.transformer_2))
            self._hosted = (high, low)
        self._active: Expert | None = None

    def at(self, level: float, *, whole_times: bool) -> Expert:
        """The expert for `level`. As in the reference the boundary is compared with the model's time, which is the one
        that the solver's grid has been shifted to and, where `whole_times`, cut to a whole number."""
        if self._hosted is None or self._boundary is None:
            return Expert(self._one, False)
        time = np.float32(level) * np.float32(MODEL_TIME)
        low = bool((np.floor(time) if whole_times else time) < self._boundary * MODEL_TIME)
        if self._active is None or self._active.low != low:
            self._active = None  # its memory is free before the other's is taken
            self._active = Expert(on_devices(self._hosted[low], self._mesh), low)
        return self._active
