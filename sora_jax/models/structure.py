"""NNX modules as what jitted functions take: their structure, and their parameters as shapes or arrays."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx

Make = Callable[[nnx.Rngs], nnx.Module]


def structure_of(make: Make) -> nnx.GraphDef:
    """A module's structure, without making its parameters."""
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), graph=False)[0]


def shapes_of(make: Make) -> nnx.State:
    """The parameters of a module as shapes, without making it."""
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), graph=False)[1]


def parameters_of(module: nnx.Module) -> nnx.State:
    return nnx.split(module, graph=False)[1]
