"""Damage to checkpoints is found and walked around; what does not fit, or was never whole, is not used."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from saved_states import (
    KEY,
    OPTIMIZER,
    bits,
    data_files,
    make_params,
    one_device,
    same_bits,
    save_three,
    shapes,
    state_at,
)

from sora_jax.errors import UserError
from sora_jax.training import checkpoint
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.optimizer import OptimizerConfig, make_optimizer
from sora_jax.training.state import TrainState, abstract_state, make_init

# Where a write fails, callbacks of TensorStore come too late for the loop of asyncio that waited for them.
late_callbacks = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
pytestmark = [pytest.mark.faults, late_callbacks]


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return one_device()


@pytest.fixture(scope="module")
def like() -> TrainState:
    return shapes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_three(tmp_path / "checkpoints")


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
    assert same_bits(bits(restored.state), bits(state_at(2)))
    assert len(said) == 1
    assert "checkpoint 3 is damaged" in said[0]
    # the run goes on from there, over the damaged step
    checkpoints.save(3, state_at(4), {"step": 3})
    assert checkpoints.restore(like).step == 3
    assert same_bits(bits(checkpoints.restore(like).state), bits(state_at(4)))
    checkpoints.close()


def test_no_good_step_is_an_error_and_not_a_fresh_start(folder, like):
    for step in (1, 2, 3):
        flip_a_bit(folder / str(step))
    checkpoints = Checkpoints(folder, say=lambda line: None)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(steps 1, 2, 3\)"):
        checkpoints.restore(like)
    checkpoints.close()


def test_a_step_whose_commit_failed_is_never_the_newest(folder, like):
    """The system refuses to write more than 16 bytes to a file, as it does on a full disk: the failure is told in one
    line, here and not at the save after, and the step before is intact."""
    checkpoints = Checkpoints(folder)
    with files_no_longer_than(16):
        checkpoints.save(9, state_at(9), {})
        with pytest.raises(UserError, match=r"^checkpoint 9 cannot be written to .*: File too large"):
            checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3]
    assert checkpoints.restore(like).step == 3
    checkpoints.save(9, state_at(9), {})  # with room again
    assert checkpoints.restore(like).step == 9
    assert same_bits(bits(checkpoints.restore(like).state), bits(state_at(9)))
    checkpoints.close()
    again = Checkpoints(folder)
    assert again.steps() == [1, 2, 3, 9]
    assert not list(folder.glob("*tmp*"))
    again.close()
    gc.collect()  # what was left of the failure is heard of here, and not in the tests of another file


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """For this process and all that it writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


def test_an_array_that_older_versions_did_not_save_begins_at_zero_where_that_is_allowed(tmp_path, like):
    old = state_at(3)
    old = old.replace(norms=None)  # a tree without these leaves
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, old, {})
    with pytest.raises(UserError, match=r"checkpoint 3 lacks the array norms\.count"):
        checkpoints.restore(like)
    restored = checkpoints.restore(like, since=("norms",)).state
    checkpoints.close()
    assert same_bits(bits(restored.replace(norms=None)), bits(old))
    assert [float(leaf) for leaf in jax.tree.leaves(restored.norms)] == [0, 0, 0]
    assert jax.tree.structure(restored) == jax.tree.structure(like)
