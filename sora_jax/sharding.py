"""The mesh, the one table from logical axes to mesh axes, and the only sharding calls in the package.

Parameters carry the names of their axes (`layers.param(..., axes=("embed", "mlp"))`), activations get theirs
from `constrain(x, ("batch", "tokens", "embed"))`. `RULES` says which mesh axis each name lies on.

A parameter stacked by `lax.scan` has one more leading axis than its names: that axis is "layers", never sharded.
The table as logical -> mesh axes, with collisions rejected, follows jax-ml/jax-llm-examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sora_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

RULES: Mapping[str, tuple[str, ...] | str | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "tokens": "sequence",
    "heads": "tensor",
    "frames": None,
    "rows": "sequence",  # of latents and pixels: convolutions exchange their borders
    "columns": None,
    # parameters
    "embed": "fsdp",
    "mlp": "tensor",
    "qkv": "tensor",
    "vocab": "tensor",
    "channels_in": None,
    "channels_out": "fsdp",
    "layers": None,
}


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with axes `MESH_AXES`.

    `sizes` gives the length of each axis; missing ones are 1, and one may be -1: it takes what is left.
    With no sizes at all, every device goes to `data`.
    Raises `UserError` when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(sizes) if sizes else {"data": -1}
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise UserError(f"unknown mesh axis {unknown[0]!r}; the axes are {', '.join(MESH_AXES)}")
    lengths = [sizes.get(axis, 1) for axis in MESH_AXES]
    if lengths.count(-1) > 1:
        raise UserError(f"only one mesh axis may be -1, not {lengths.count(-1)}")
    fixed = int(np.prod([n for n in lengths if n != -1]))
    if -1 in lengths and fixed >= 1 and len(devices) % fixed == 0:
        lengths[lengths.index(-1)] = len(devices) // fixed
    if min(lengths) < 1 or int(np.prod(lengths)) != len(devices):
        text = ", ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, lengths, strict=True))
        raise UserError(f"mesh {text} does not multiply to the {len(devices)} devices there are")
    # Auto axes: the model code states constraints, XLA propagates the rest.
    return Mesh(
        np.array(devices).reshape(lengths), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    )


def spec(axes: Sequence[str | None], rules: Mapping[str, Any] = RULES) -> PartitionSpec:
    """The mesh axes that named array axes lie on; refuses to lay two array axes on one mesh axis."""
    entries: list[tuple[str, ...] | str | None] = []
    taken: set[str] = set()
    for name in axes:
        if name is not None and name not in rules:
            raise ValueError(f"unknown logical axis {name!r}: add it to sharding.RULES")
        mesh_axes = None if name is None else rules[name]
        for mesh_axis in (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ():
            if mesh_axis in taken:
                raise ValueError(f"axes {tuple(axes)} put mesh axis {mesh_axis!r} to use twice")
            taken.add(mesh_axis)
        entries.append(mesh_axes)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """State where the named axes of an activation lie; the identity outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def mesh_size(axis: str) -> int:
    """Devices along that axis of the mesh in use; 1 outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def shard_over_mesh(
    function: Callable[..., jax.Array], in_specs: tuple[PartitionSpec, ...], out_specs: PartitionSpec
) -> Callable[..., jax.Array]:
    """`function` applied to each device's part, for kernels that XLA cannot partition; as it is without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree like `params` (an NNX state, abstract or real) with the `NamedSharding` of each parameter.

    An axis that its mesh axes do not divide stays whole: small models on large meshes replicate what is small anyway.
    """

    def place(variable: nnx.Variable) -> NamedSharding:
        shape = variable.get_value().shape
        axes = variable.get_metadata().get("axes", (None,) * len(shape))
        axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
        entries = list(spec(axes))
        for i, entry in enumerate(entries):
            names = (entry,) if isinstance(entry, str) else entry or ()
            if shape[i] % int(np.prod([mesh.shape[name] for name in names])):
                entries[i] = None
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree.map(place, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


class DataPart(NamedTuple):
    """This process makes slice `part` of `parts` equal slices of every batch's rows."""

    part: int
    parts: int


def data_part(mesh: Mesh) -> DataPart:
    """Which rows of a batch lie on this process's devices. Processes that share rows, as where `sequence` or `tensor`
    spans several, have the same part and make the same rows.

    Raises `UserError` where the mesh cuts rows so that a process has no slice of its own.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    held: dict[int, set[int]] = {}  # shards by process
    where: Mapping[Any, tuple[slice, ...]] = batch_sharding(mesh).devices_indices_map((shards,))
    for device, index in where.items():
        held.setdefault(device.process_index, set()).update(range(shards)[index[0]])
    size = len(held[jax.process_index()])
    for own in held.values():
        first = min(own)
        if own != {*range(first, first + size)} or first % size:
            text = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
            raise UserError(
                f"mesh {text} gives the {len(held)} processes unequal slices of a batch: make data x fsdp a multiple "
                "or a divisor of their number"
            )
    part, parts = min(held[jax.process_index()]) // size, shards // size
    return DataPart(part, parts)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data axes; what the loader's arrays are placed with."""
    return NamedSharding(mesh, spec(("batch",)))
