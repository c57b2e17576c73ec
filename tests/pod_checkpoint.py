"""One of several processes of `test_pod_checkpoints`: python pod_checkpoint.py ADDRESS COUNT NUMBER WHAT FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.sharding import make_mesh
from sora_jax.training.checkpoint import Checkpoints

ARRAYS, ROWS, COLUMNS = 8, 8192, 4096  # 8 x 134 MB
LARGEST = 4 * ROWS * COLUMNS
MESHES = {"one": {"data": 1}, "fsdp": {"fsdp": 8}, "tensor": {"data": 2, "tensor": 4}, "sequence": {"sequence": 8}}


def sharding_of(mesh: str) -> NamedSharding:
    """Rows over fsdp, columns over tensor; a sequence axis holds parameters whole."""
    made = make_mesh(MESHES[mesh], jax.devices()[:1] if mesh == "one" else None)
    return NamedSharding(made, PartitionSpec("fsdp", "tensor"))


def truth(number: int, index: tuple[slice, ...], shape: tuple[int, int]) -> np.ndarray:
    """Any part of array `number`: bits that no two places share."""
    rows, columns = (np.arange(size, dtype=np.uint32)[part] for size, part in zip(shape, index, strict=True))
    words = (rows[:, None] * np.uint32(shape[1]) + columns[None, :]) * np.uint32(2654435761) + np.uint32(number)
    return words.view(np.float32)


def state_of(sharding: NamedSharding, shape: tuple[int, int], arrays: int) -> dict[str, jax.Array]:
    return {
        f"a{number}": jax.make_array_from_callback(
            shape, sharding, lambda index, number=number: truth(number, index, shape)
        )
        for number in range(arrays)
    }


def like(sharding: NamedSharding, shape: tuple[int, int], arrays: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {f"a{number}": jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding) for number in range(arrays)}


def wrong(state: dict[str, jax.Array]) -> list[str]:
    """The arrays of which this process holds a shard that has not the bits it should have."""
    return [
        name
        for name, array in state.items()
        for shard in array.addressable_shards
        if not np.array_equal(
            np.asarray(shard.data).view(np.uint32), truth(int(name[1:]), shard.index, array.shape).view(np.uint32)
        )
    ]


def memory(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most since the mark was reset."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[what].split()[0])


def main() -> None:
    address, count, number, what, mesh, folder = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 8 // int(count))
    if int(count) > 1:
        jax.distributed.initialize(
            address, int(count), int(number), initialization_timeout=120, heartbeat_timeout_seconds=30
        )
    shape, arrays = ((ROWS, COLUMNS), ARRAYS) if what.startswith("large") else ((64, 32), 3)
    said: list[str] = []
    checkpoints = Checkpoints(folder, say=said.append)
    sharding = sharding_of(mesh)
    report: dict[str, object] = {"process": jax.process_index()}
    if what.endswith("save"):
        for step in (1,) if what.startswith("large") else (1, 2):
            checkpoints.save(step, state_of(sharding, shape, arrays), {"step": step})
    else:
        checkpoints.newest_good()
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts from here
        before = memory("VmRSS")
        restored = checkpoints.restore(like(sharding, shape, arrays))
        jax.block_until_ready(restored.state)
        held = sum(shard.data.nbytes for array in restored.state.values() for shard in array.addressable_shards)
        report |= {"step": restored.step, "held": held, "growth": memory("VmHWM") - before, "said": said}
        report["wrong"] = wrong(restored.state)
    checkpoints.close()
    sys.stdout.write(f"report {json.dumps(report)}\n")


if __name__ == "__main__":
    main()
