"""Which network denoises at which level: one for all, or two experts split at a level (Wan 2.2 A14B), of which only the
one at work is on the devices."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sora_jax.models.transformer import MODEL_TIME
from sora_jax.sharding import gather, param_shardings, put
from sora_jax.weights.layout import ModelFolder


def on_devices(params: nnx.State, mesh: Mesh | None) -> nnx.State:
    """Parameters that lie on the host, placed on `mesh` or the default device; others as they are. They leave the
    devices when the caller lets go of them."""
    if not isinstance(jax.tree.leaves(params)[0], np.ndarray):
        return params
    if mesh is None:
        return jax.tree.map(jax.device_put, params)
    return jax.tree.map(put, params, jax.tree.broadcast(param_shardings(params, mesh), params))


class Experts:
    """The transformers of a model. Two are kept on the host, and moved to the devices in turn."""

    def __init__(self, folder: ModelFolder, mesh: Mesh | None):
        self._boundary, self._mesh = folder.boundary, mesh
        self._one = folder.transformer
        self._hosted: tuple[nnx.State, nnx.State] | None = None
        if folder.transformer_2 is not None:
            high, low = (jax.tree.map(gather, params) for params in (folder.transformer, folder.transformer_2))
            self._hosted = (high, low)
        self._active: tuple[bool, nnx.State] | None = None

    def is_low(self, level: float, *, whole_times: bool) -> bool:
        """Whether `level` is the second expert's. As in the reference the boundary is compared with the model's time:
        that of the solver's shifted grid, cut to a whole number where `whole_times`."""
        if self._boundary is None:
            return False
        time = np.float32(level) * np.float32(MODEL_TIME)
        return bool((np.floor(time) if whole_times else time) < self._boundary * MODEL_TIME)

    def params(self, low: bool) -> nnx.State:
        """An expert's parameters, on the devices. Callers should not hold on to them: the other's take their place."""
        if self._hosted is None:
            return self._one
        if self._active is None or self._active[0] != low:
            self._active = None  # its memory is free before the other's is taken
            self._active = (low, on_devices(self._hosted[low], self._mesh))
        return self._active[1]
