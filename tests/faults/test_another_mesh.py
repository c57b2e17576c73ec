"""A state saved on any mesh comes back on any other to the bit, in the places where that mesh wants it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pod_checkpoint import MESHES, like, sharding_of, state_of, wrong

from sora_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.faults
SHAPE, ARRAYS = (64, 32), 3
SHARDS = {"one": (64, 32), "fsdp": (8, 32), "tensor": (64, 8), "sequence": (64, 32)}


@pytest.mark.parametrize("saved_on", MESHES)
def test_every_mesh_reads_what_this_one_saved(tmp_path: Path, saved_on: str):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(sharding_of(saved_on), SHAPE, ARRAYS), {})
    for mesh in MESHES:
        state = checkpoints.restore(like(sharding_of(mesh), SHAPE, ARRAYS)).state
        assert not wrong(state)
        for array in state.values():
            assert array.sharding == sharding_of(mesh)
            assert {shard.data.shape for shard in array.addressable_shards} == {SHARDS[mesh]}
            assert len(array.addressable_shards) == (1 if mesh == "one" else 8)
    checkpoints.close()
