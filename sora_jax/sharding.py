"""The mesh, the one table from logical axes to mesh axes, and the only sharding calls in the package.

Parameters carry the names of their axes (`layers.param(..., axes=("embed", "mlp"))`), activations get theirs
from `constrain(x, ("batch", "tokens", "embed"))`. `RULES` says which mesh axis each name lies on.

A parameter stacked by `lax.scan` has one more leading axis than its names: that axis is "layers", never sharded.
The table as logical -> mesh axes, with collisions rejected, follows jax-ml/jax-llm-examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from sora_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
DCN_AXES = ("dcn_data", "dcn_fsdp")  # how many slices lie along `data` and `fsdp`

AnyMesh = Mesh | AbstractMesh  # what places things; the latter without devices, to reckon with

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

    `sizes` gives the length of each axis within a slice, whose devices have fast links (ICI); missing ones are 1, and
    one may be -1: it takes what is left. `dcn_data` and `dcn_fsdp` say how many slices lie along `data` and `fsdp`,
    over the slow network (DCN); by default all along `data`. An axis is as long as both together, slices outermost:
    {"dcn_data": 2, "data": 2, "fsdp": 8} on two slices of 16 is data=4, fsdp=8.
    With no sizes at all, every device goes to `data`.

    Raises `UserError` when the sizes do not multiply to the devices of a slice, or to the slices.
    """
    array = arrange(list(jax.devices() if devices is None else devices), sizes or {"data": -1})
    # Auto axes: the model code states constraints, XLA propagates the rest.
    return Mesh(array, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def arrange(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """The devices as an array with the axes `MESH_AXES`, as `make_mesh` says.

    Within a TPU's slice the axes follow its torus, the last ones (which talk most) first to have whole rings of it.
    """
    if unknown := sorted(set(sizes) - {*MESH_AXES, *DCN_AXES}):
        raise UserError(f"unknown mesh axis {unknown[0]!r}; the axes are {', '.join((*MESH_AXES, *DCN_AXES))}")
    apart = {axis: sizes.get(axis, -1 if axis == "dcn_data" else 1) for axis in DCN_AXES}
    slices, attribute = _slices(devices, asked=math.prod(n for n in apart.values() if n != -1) > 1)
    text = ", ".join(f"{axis}={n}" for axis, n in apart.items())
    across = _filled(apart, len(slices), f"{text} does not multiply to the {_there_are(len(slices), attribute)}")
    within = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    size = len(slices[0])
    where = f"{size} devices there are"
    if len(slices) > 1:
        lie = ", ".join(f"{axis}={n}" for axis, n in zip(DCN_AXES, across, strict=True))
        where = f"{size} devices of each of {len(slices)} slices ({lie})"
    text = ", ".join(f"{axis}={n}" for axis, n in within.items())
    inner = _filled(within, size, f"mesh {text} does not multiply to the {where}")
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        inner,
        (*across, 1, 1),
        devices,
        process_is_granule=attribute == "process_index",
        allow_split_physical_axes=True,
    )


def _slices(devices: Sequence[Any], *, asked: bool) -> tuple[list[list[Any]], str]:
    """The devices by slice, and by which attribute: TPUs (and some GPUs) know their slice. Of other devices a process
    is a slice where several are `asked` for."""
    found: dict[int, list[Any]] = {}
    attribute = "slice_index"
    for device in devices:
        found.setdefault(getattr(device, attribute, 0), []).append(device)
    if len(found) == 1 and asked and devices[0].platform != "tpu":
        found, attribute = {}, "process_index"
        for device in devices:
            found.setdefault(device.process_index, []).append(device)
    slices = [found[index] for index in sorted(found)]
    if len({len(one) for one in slices}) > 1:
        raise UserError(f"the slices have {', '.join(str(len(one)) for one in slices)} devices: they must have as many")
    return slices, attribute


def _there_are(slices: int, attribute: str) -> str:
    one, several = ("slice", "slices") if attribute == "slice_index" else ("process", "processes")
    return f"1 {one} there is" if slices == 1 else f"{slices} {several} there are"


def _filled(sizes: Mapping[str, int], total: int, wrong: str) -> list[int]:
    """The lengths with -1 filled in, so that they multiply to `total`; `wrong` is the error when they do not."""
    lengths = list(sizes.values())
    if lengths.count(-1) > 1:
        raise UserError(f"only one mesh axis may be -1, not {lengths.count(-1)}: {', '.join(sizes)}")
    fixed = math.prod(n for n in lengths if n != -1)
    if -1 in lengths and fixed >= 1 and total % fixed == 0:
        lengths[lengths.index(-1)] = total // fixed
    if min(lengths) < 1 or math.prod(lengths) != total:
        raise UserError(wrong)
    return lengths


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


def param_shardings(params: Any, mesh: AnyMesh) -> Any:
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


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


class DataPart(NamedTuple):
    """This process makes slice `part` of `parts` equal slices of every batch's rows."""

    part: int
    parts: int


def data_part(mesh: Mesh) -> DataPart:
    """Which rows of a batch lie on this process's devices. Processes that share rows, as where `sequence` or `tensor`
    spans several, have the same part and make the same rows.

    On a torus a process's devices need not be neighbours on the mesh: its slice of the rows then lies in pieces there.

    Raises `UserError` where the mesh cuts rows so that a process has no slice of its own.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    held: dict[int, set[int]] = {}  # shards by process
    where: Mapping[Any, tuple[slice, ...]] = batch_sharding(mesh).devices_indices_map((shards,))
    for device, index in where.items():
        held.setdefault(device.process_index, set()).update(range(shards)[index[0]])
    slices = sorted({tuple(sorted(own)) for own in held.values()})
    if len({len(one) for one in slices}) > 1 or sum(map(len, slices)) != shards:
        text = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
        raise UserError(
            f"mesh {text} gives the {len(held)} processes unequal slices of a batch: make data x fsdp a multiple "
            "or a divisor of their number"
        )
    return DataPart(slices.index(tuple(sorted(held[jax.process_index()]))), len(slices))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data axes; what the loader's arrays are placed with."""
    return NamedSharding(mesh, spec(("batch",)))


def put(array: np.ndarray | jax.Array, place: Sharding | None) -> jax.Array:
    """An array that every process has whole, laid out there; None: on the default device. Of an array that spans
    processes each puts its own pieces, and none asks the others whether theirs are the same."""
    if place is None or place.is_fully_addressable:
        return jax.device_put(array, place)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def gather(array: np.ndarray | jax.Array) -> np.ndarray:
    """The whole array on the host, in every process; all of them have to ask."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
