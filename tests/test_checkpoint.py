"""Checkpoints come back to the bit, on any mesh; damage is found and walked around; what does not fit is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.errors import UserError
from sora_jax.models import layers
from sora_jax.sharding import make_mesh
from sora_jax.training import checkpoint
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.optimizer import OptimizerConfig, make_optimizer
from sora_jax.training.state import TrainState, abstract_state, init_state, make_init

OPTIMIZER = make_optimizer(OptimizerConfig(name="muon"), 10)
KEY = jax.random.key(3)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 8):
        self.linear = layers.Linear(width, 16, ("embed", "mlp"), rngs=rngs)
        self.norm = layers.RMSNorm(16, "embed", rngs=rngs)


def make_params(key: jax.Array, width: int = 8) -> dict:
    return {"model": nnx.split(Model(nnx.Rngs(params=key), width), graph=False)[1]}


INIT = make_init(make_params, OPTIMIZER)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def like(mesh: jax.sharding.Mesh) -> TrainState:
    return abstract_state(INIT, KEY, mesh)


def state_at(step: int, mesh: jax.sharding.Mesh) -> TrainState:
    """A state with different bits in every array, NaN and denormals among them."""
    state = init_state(INIT, KEY, mesh)
    rng = np.random.default_rng(step)

    def fill(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf + step
        bits = rng.integers(0, 2**32, leaf.shape, np.uint32)
        return jax.device_put(jnp.asarray(bits.view(np.float32)), leaf.sharding)

    return jax.tree.map(fill, state)


def bits(state: TrainState) -> list[np.ndarray]:
    raw = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(state)
    ]
    return [np.array(leaf).view(np.uint32) for leaf in raw]  # a copy: the arrays may be donated


def same_bits(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def folder(tmp_path: Path, mesh: jax.sharding.Mesh) -> Path:
    """Steps 1, 2 and 3."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        checkpoints.save(step, state_at(step, mesh), {"step": step})
    checkpoints.close()
    return tmp_path / "checkpoints"


def data_files(step: Path) -> list[Path]:
    return sorted((p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


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


# --------------------------------------------------------------------------------------------------------------- damage


def flip_a_bit(step: Path) -> None:
    path = data_files(step)[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(step: Path) -> None:
    path = data_files(step)[-1]
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_file(step: Path) -> None:
    data_files(step)[-1].unlink()


def lose_the_manifest(step: Path) -> None:
    (step / checkpoint.MANIFEST).unlink()


def change_the_notes(step: Path) -> None:
    path = next(path for path in (step / "notes").iterdir() if b"step" in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(b"3", b"4"))


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lose_a_file, lose_the_manifest, change_the_notes])
def test_damage_to_the_newest_step_is_said_and_walked_around(folder, mesh, like, damage):
    damage(folder / "3")
    said: list[str] = []
    checkpoints = Checkpoints(folder, say=said.append)
    restored = checkpoints.restore(like)
    assert restored.step == 2
    assert restored.notes == {"step": 2}
    assert same_bits(bits(restored.state), bits(state_at(2, mesh)))
    assert len(said) == 1
    assert "checkpoint 3 is damaged" in said[0]
    # the run goes on from there, over the damaged step
    checkpoints.save(3, state_at(4, mesh), {"step": 3})
    assert checkpoints.restore(like).step == 3
    assert same_bits(bits(checkpoints.restore(like).state), bits(state_at(4, mesh)))
    checkpoints.close()


def test_no_good_step_is_an_error_and_not_a_fresh_start(folder, like):
    for step in (1, 2, 3):
        flip_a_bit(folder / str(step))
    checkpoints = Checkpoints(folder, say=lambda line: None)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(steps 1, 2, 3\)"):
        checkpoints.restore(like)
    checkpoints.close()


def test_a_step_whose_commit_failed_is_never_the_newest(folder, mesh, like, monkeypatch):
    """As on a full disk: the failure comes up at the next call, and the step before is intact."""

    def no_space(*_: object) -> dict:
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(folder)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_hashes", no_space)
        checkpoints.save(9, state_at(9, mesh), {})
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3]
    assert checkpoints.restore(like).step == 3
    checkpoints.save(9, state_at(9, mesh), {})  # with room again
    assert checkpoints.restore(like).step == 9
    checkpoints.close()
    again = Checkpoints(folder)
    assert again.steps() == [1, 2, 3, 9]
    assert not list(folder.glob("*tmp*"))
    again.close()


def test_opening_to_read_says_nothing_and_silences_nobody_else(folder, caplog):
    Checkpoints(folder, read_only=True).close()
    assert not caplog.records
    logging.getLogger("absl").warning("of somebody else")
    assert [record.message for record in caplog.records] == ["of somebody else"]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_another_shape_is_refused_by_name(folder, mesh):
    wider = abstract_state(make_init(lambda key: make_params(key, 4), OPTIMIZER), KEY, mesh)
    checkpoints = Checkpoints(folder, read_only=True)
    with pytest.raises(UserError, match=r"checkpoint 3: .*model\.linear\.kernel has shape \(8, 16\).* \(4, 16\)"):
        checkpoints.restore(wider)
    checkpoints.close()


def test_another_dtype_is_refused_by_name(folder, like):
    half = like.replace(skipped=jax.ShapeDtypeStruct((), jnp.int16, sharding=like.skipped.sharding))
    checkpoints = Checkpoints(folder, read_only=True)
    with pytest.raises(UserError, match=r"checkpoint 3: skipped has dtype int32, .*int16"):
        checkpoints.restore(half)
    checkpoints.close()


def test_another_tree_is_refused_by_name(folder, mesh, like):
    checkpoints = Checkpoints(folder, read_only=True)
    by_adam = abstract_state(make_init(make_params, make_optimizer(OptimizerConfig(), 10)), KEY, mesh)
    with pytest.raises(UserError, match="checkpoint 3 (lacks|has) the array opt_state"):
        checkpoints.restore(by_adam)
    less = like.replace(ema={"model": {"norm": like.ema["model"]["norm"]}})
    with pytest.raises(UserError, match=r"checkpoint 3 has the array ema\.model\.linear\.bias, which this config"):
        checkpoints.restore(less)
    checkpoints.close()
