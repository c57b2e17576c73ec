"""Machines that are planned for: grids of TPU chips by their own names or by product names, the devices at hand, or one
device of a given size."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from sora_jax.errors import UserError, nearest

GIB = 2**30

# Memory of one JAX device, GiB, and the grids that product names stand for. A name counts chips (v5e, v6e) or cores, of
# which a chip has two: v5p-128 and tpu7x-128 both are 64 chips. To JAX the two cores of a v4 or v5p are one device, and
# those of a tpu7x two.
HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # by chips
CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"}
PRODUCTS = {
    **{f"{kind}-{n}": f"{kind}:{grid}" for kind in ("v5e", "v6e") for n, grid in FLAT.items()},
    **{f"{kind}-{n}": f"{kind}:{grid}" for kind in ("v4", "v5p", "tpu7x") for n, grid in CUBES.items()},
}


@dataclass(frozen=True)
class Target:
    """What a program is planned for. `devices` are None where it is reckoned, not compiled."""

    name: str
    devices: list[Any] | None
    hbm_bytes: int  # of one device
    slices: int = 1  # of that grid, which a slower network connects

    @property
    def kind(self) -> str:
        """Of a grid of TPU chips, "v5p"; of no meaning elsewhere."""
        return self.name.partition(":")[0]

    @property
    def chips(self) -> int:
        """JAX sees two devices on a chip of tpu7x, and one on any other."""
        return max(len(self.devices or [None]) // (2 if self.kind == "tpu7x" else 1), 1)


def find_target(topology: str | None, hbm: float | None) -> Target:
    """`topology` is a grid ("v5p:4x4x4"), a product ("v5p-128"), several slices of one ("2xv5p-128") or "local"; or
    `hbm` GiB of one device are given."""
    if (topology is None) == (hbm is None):
        raise UserError("name what is planned for: --topology GRID (or local), or --hbm GIB for one device")
    if hbm is not None:
        if not 0 < hbm < math.inf:
            raise UserError(f"--hbm must be > 0 and finite, not {hbm:g}")
        return Target(f"one device of {hbm:g} GiB", None, int(hbm * GIB))
    assert topology is not None
    if topology == "local":
        return Target("local", jax.devices(), _local_memory())
    several = re.fullmatch(r"([1-9]\d*)x(\D.*)", topology)
    slices, one = (int(several[1]), several[2]) if several else (1, topology)
    grid = PRODUCTS.get(one, one)
    kind = grid.partition(":")[0]
    if ":" not in grid or kind not in HBM:
        raise UserError(f'unknown topology "{topology}"; {nearest(one, [*PRODUCTS, "local"])}')
    name = f"{grid} x {slices}" if slices > 1 else grid
    return Target(name, _tpu_devices(grid, slices), HBM[kind] * GIB, slices)


def _local_memory() -> int:
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # the CPU computes in the host's memory


def _tpu_devices(grid: str, slices: int) -> list[Any]:
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPU needs the TPU compiler (no TPU): pip install 'sora-jax[tpu]'")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if grid.endswith(":1x1") else {}
    if slices > 1:
        options["num_slices"] = slices
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=grid, **options).devices)
    except Exception as error:  # noqa: BLE001  the compiler's own error, of no narrower type
        raise UserError(f'the TPU compiler knows no topology "{grid}": {str(error).splitlines()[0]}') from None
