"""Checkpoints come back to the bit, on any mesh."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from saved_states import INIT, KEY, bits, one_device, same_bits, save_three, shapes, state_at

from sora_jax.errors import NoRoomError
from sora_jax.sharding import make_mesh
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.state import TrainState, abstract_state


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return one_device()


@pytest.fixture(scope="module")
def like() -> TrainState:
    return shapes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_three(tmp_path / "checkpoints")


# ---------------------------------------------------------------------------------------------------------- round trips


def test_arrays_and_notes_come_back_to_the_bit_though_their_buffers_were_donated(tmp_path, mesh, like):
    overwrite = jax.jit(
        lambda state: jax.tree.map(lambda x: x * 0 if x.dtype == jnp.float32 else x, state), donate_argnums=0
    )
    state = state_at(5, mesh)
    saved = bits(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state, {"a": [1, 0.1, None], "text": "é"})
    jax.block_until_ready(overwrite(state))  # at once, while the save is under way
    restored = checkpoints.restore(like)
    checkpoints.close()
    assert restored.step == 5
    assert restored.notes == {"a": [1, 0.1, None], "text": "é"}
    assert same_bits(bits(restored.state), saved)
    assert jax.tree.structure(restored.state) == jax.tree.structure(like)
    assert jax.random.key_impl(restored.state.key) == jax.random.key_impl(KEY)


def test_an_empty_folder_has_nothing_to_restore(tmp_path, like):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(like) is None
    checkpoints.close()


def test_a_state_that_has_no_room_is_not_begun(tmp_path, mesh, monkeypatch):
    """One line, before Orbax's threads each find out by themselves."""
    needed = sum(array.nbytes for array in jax.tree.leaves(bits(state_at(1, mesh))))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_at(1, mesh), {})
    checkpoints.wait()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    with pytest.raises(NoRoomError, match=r"^checkpoint 2 cannot be written to .* left; those before it are as they"):
        checkpoints.save(2, state_at(2, mesh), {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    checkpoints.save(2, state_at(2, mesh), {})
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_keep_leaves_the_newest(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30):
        checkpoints.save(step, state_at(step, mesh), {})
    checkpoints.wait()
    assert checkpoints.steps() == [20, 30]
    checkpoints.close()


def test_one_branch_can_be_read_alone(folder, mesh, like):
    checkpoints = Checkpoints(folder, read_only=True)
    restored = checkpoints.restore(like.ema, part="ema")
    checkpoints.close()
    assert same_bits(bits(restored.state), bits(state_at(3, mesh).ema))


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"data": 8}])
def test_another_mesh_reads_the_same_bits(folder, mesh, axes):
    other = make_mesh(axes)
    wanted = abstract_state(INIT, KEY, other)
    checkpoints = Checkpoints(folder, read_only=True)
    restored = checkpoints.restore(wanted)
    checkpoints.close()
    assert same_bits(bits(restored.state), bits(state_at(3, mesh)))
    kernel = restored.state.params["model"]["linear"]["kernel"].get_value()
    assert kernel.sharding == wanted.params["model"]["linear"]["kernel"].get_value().sharding
    assert kernel.sharding.shard_shape(kernel.shape) == (8 // axes.get("fsdp", 1), 16 // axes.get("tensor", 1))


def test_opening_to_read_says_nothing_and_silences_nobody_else(folder, caplog):
    Checkpoints(folder, read_only=True).close()
    assert not caplog.records
    logging.getLogger("absl").warning("of somebody else")
    assert [record.message for record in caplog.records] == ["of somebody else"]
