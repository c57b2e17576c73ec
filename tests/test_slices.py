"""Where devices lie on a mesh: slices outermost, a slice's own torus within, and what does not multiply is said."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from sora_jax.config import load_config
from sora_jax.errors import UserError
from sora_jax.sharding import MESH_AXES, arrange, data_part, make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX tells of a device, as far as a mesh is laid out by it."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "fake"


@dataclasses.dataclass(frozen=True)
class InSlice(Device):
    slice_index: int = 0


@dataclasses.dataclass(frozen=True)
class Chip(InSlice):
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def in_slices(slices: int, size: int) -> list[Device]:
    """Two processes a slice; named in an order that mixes the slices, as a cluster's may be."""
    made = [InSlice(n, n // (size // 2), slice_index=n // size) for n in range(slices * size)]
    return sorted(made, key=lambda device: (device.id % size, device.id))


def torus(x: int, y: int, z: int) -> list[Device]:
    """One slice of v4: a host has 2 x 2 x 1 chips."""
    places = [(i, j, k) for k, j, i in itertools.product(range(z), range(y), range(x))]
    hosts = sorted({(i // 2, j // 2, k) for i, j, k in places}, key=lambda host: host[::-1])
    return [
        Chip(n, hosts.index((i // 2, j // 2, k)), "tpu", "TPU v4", coords=(i, j, k))
        for n, (i, j, k) in enumerate(places)
    ]


def slices_of(array: np.ndarray) -> list:
    return np.vectorize(lambda device: device.slice_index)(array).tolist()


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"fsdp": 8}, (2, 8, 1, 1)),  # slices lie along data unless something else is said
        ({"dcn_data": 2, "fsdp": -1}, (2, 8, 1, 1)),
        ({"dcn_data": 2, "data": 2, "fsdp": 2, "sequence": 2}, (4, 2, 1, 2)),
        ({"dcn_data": 1, "dcn_fsdp": 2, "fsdp": -1, "tensor": 2}, (1, 8, 2, 1)),
        ({"dcn_fsdp": 2, "data": 2, "fsdp": 4}, (2, 8, 1, 1)),
    ],
)
def test_slices_are_outermost(sizes, shape):
    """The outer half of the axis that was named is one slice, the inner half the other."""
    array = arrange(in_slices(2, 8), sizes)
    assert array.shape == shape
    assert sorted(device.id for device in array.flat) == list(range(16))
    axis = 1 if "dcn_fsdp" in sizes else 0
    for number, half in enumerate(np.split(array, 2, axis)):
        assert {device.slice_index for device in half.flat} == {number}


def test_slices_along_two_axes():
    array = arrange(in_slices(4, 2), {"dcn_data": 2, "dcn_fsdp": 2, "fsdp": 2})
    assert slices_of(array[:, :, 0, 0]) == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_of_other_devices_a_process_is_a_slice_where_slices_are_asked_for():
    devices = [Device(n, n // 4) for n in range(8)]
    array = arrange(devices, {"dcn_data": 2, "sequence": 4})
    assert [[device.process_index for device in row] for row in array[:, 0, 0]] == [[0] * 4, [1] * 4]
    assert arrange(devices, {"sequence": 8}).shape == (1, 1, 1, 8)  # and not where they are not
    assert dict(make_mesh({"dcn_data": 1, "fsdp": 8}).shape) == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}


def test_axes_of_one_slice_are_whole_rings_of_its_torus():
    """16 x 4 on 4 x 4 x 4: the tokens of a row go round one whole axis, the parameters over the plane of the others."""
    array = arrange(torus(4, 4, 4), {"fsdp": 16, "sequence": 4})[0, :, 0]
    for ring in array:
        moving = [len({device.coords[axis] for device in ring}) for axis in range(3)]
        assert sorted(moving) == [1, 1, 4]
    assert arrange(torus(4, 4, 1), {"fsdp": 2, "tensor": 2, "sequence": 4}).shape == (1, 2, 2, 4)


def test_rows_belong_to_processes_that_are_no_neighbours_on_the_mesh(monkeypatch):
    """A host has two of the 16 rows, which do not lie side by side, and shares them with the host that has the other
    half of their rings: 8 slices of rows, each of 2 processes, which among them have all rows once."""
    array = arrange(torus(4, 4, 4), {"fsdp": 16, "sequence": 4})
    mesh = Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    rows_of: dict[int, set[int]] = {}
    processes: dict[int, int] = {}
    for process in range(16):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        part, parts = data_part(mesh)
        assert parts == 8
        own = {row for row in range(16) if any(d.process_index == process for d in array[0, row].flat)}
        assert rows_of.setdefault(part, own) == own
        processes[part] = processes.get(part, 0) + 1
    assert sorted(row for own in rows_of.values() for row in own) == list(range(16))
    assert any(max(own) - min(own) > 1 for own in rows_of.values()), "as neighbours they would have proven nothing"
    assert processes == dict.fromkeys(range(8), 2)


@pytest.mark.parametrize(
    ("devices", "sizes", "says"),
    [
        (in_slices(2, 8), {"dcn_data": 3, "fsdp": 8}, "dcn_data=3, dcn_fsdp=1 does not multiply to the 2 slices"),
        (in_slices(2, 8), {"dcn_data": 1, "fsdp": 16}, "dcn_data=1, dcn_fsdp=1 does not multiply to the 2 slices"),
        (in_slices(2, 8), {"dcn_fsdp": 4, "fsdp": 8}, "does not multiply to the 2 slices"),
        (in_slices(2, 8), {"fsdp": 16}, "sequence=1 does not multiply to the 8 devices of each of 2 slices"),
        (torus(2, 2, 1), {"dcn_data": 2, "fsdp": 2}, "dcn_fsdp=1 does not multiply to the 1 slice there is"),
        ([Device(n, n) for n in range(4)], {"dcn_data": 3}, "does not multiply to the 4 processes there are"),
        (in_slices(2, 8)[:-1], {"fsdp": 8}, "the slices have 8, 7 devices: they must have as many"),
        (in_slices(1, 8), {"data": -1, "fsdp": -1}, "only one mesh axis may be -1, not 2"),
        (in_slices(1, 8), {"dcn_data": -1, "dcn_fsdp": -1}, "only one mesh axis may be -1, not 2"),
        (in_slices(1, 8), {"dcn_tensor": 2}, "unknown mesh axis 'dcn_tensor'; the axes are data, fsdp, tensor"),
        (in_slices(1, 8), {"fsdp": 0}, "does not multiply to the 8 devices there are"),
    ],
)
def test_what_does_not_multiply_is_said(devices, sizes, says):
    with pytest.raises(UserError, match=says) as error:
        arrange(devices, sizes)
    assert "\n" not in str(error.value)


def test_a_config_names_slices():
    config = load_config("world", ["train.mesh.dcn_data=2", "train.mesh.fsdp=8", "train.mesh.data=1"])
    array = arrange(in_slices(2, 8), dataclasses.asdict(config.train.mesh))
    assert array.shape == (2, 8, 1, 1)
    with pytest.raises(UserError, match="dcn_data=2, dcn_fsdp=1 does not multiply to the 1 process there is"):
        make_mesh(dataclasses.asdict(config.train.mesh))


# ---------------------------------------------------------------------------------------------------- compiled for TPUs


@pytest.mark.plans
def test_a_train_step_compiles_for_two_slices():
    """Two of v5e:2x2: a sum of gradients goes over both, and what is gathered in every layer over none."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the tpu extra")
    from sora_jax.bench.plan import plan_training
    from sora_jax.bench.targets import find_target

    target = find_target("2xv5e-4", None)
    assert {device.slice_index for device in target.devices} == {0, 1}
    config = load_config("world", ["train.batch_size=8", "transformer.n_layers=1"])
    made = plan_training(config, target, {"dcn_data": 2, "fsdp": 4})
    assert (made.target, made.devices, made.mesh) == ("v5e:2x2 x 2", 8, {"data": 2, "fsdp": 4})
    assert made.method == "compiled"
    assert "links" not in made.seconds_at_best
    # the optimizer's state of a slice is cut over its four devices, and the other slice has it too
    weights = plan_training(config, find_target("v5e-4", None), {"fsdp": 4}).parts["optimizer"]
    assert made.parts["optimizer"] == weights
    with pytest.raises(UserError, match="dcn_data=3, dcn_fsdp=1 does not multiply to the 2 slices there are"):
        plan_training(config, target, {"dcn_data": 3, "fsdp": 4})
