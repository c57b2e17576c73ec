"""What the machine offers: devices, the dtype to compute in, memory that is kept, and the persistent compile cache.

Nothing here runs on import; the command line and `Pipeline.load` call it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sora_jax.errors import UserError, nearest

if TYPE_CHECKING:
    import jax
    import jax.numpy as jnp

DTYPES = ("auto", "float32", "bfloat16")
HOST_MEMORY = "pinned_host"  # JAX's name of it


@dataclass(frozen=True)
class Devices:
    """What JAX runs on, and what it leaves idle."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # "AMD EPYC 7B13", "NVIDIA H100 80GB HBM3", "TPU v5 lite"
    count: int
    cores: int  # host cores that this process may use
    dtype: str  # what "auto" means here
    attention: str  # the attention backend
    jax: str  # version
    idle: tuple[str, ...] = ()  # accelerators that are present but not used

    @property
    def line(self) -> str:
        """One line for the head of a log.

        >>> Devices("gpu", "NVIDIA H100", 2, 16, "bfloat16", "blockwise", "0.10.2").line
        '2 x NVIDIA H100 (gpu) · bfloat16 · blockwise attention · jax 0.10.2'
        """
        if self.platform == "cpu":
            where = f"{self.kind}, {self.cores} core{'s' * (self.cores != 1)} (cpu)"
        else:
            where = f"{self.count} x {self.kind} ({self.platform})"
        return f"{where} · {self.dtype} · {self.attention} attention · jax {self.jax}"


def describe_devices(dtype: str = "auto") -> Devices:
    """Start JAX's backend and say what it runs on. `dtype` is what the user asked for."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"JAX finds no device: {reason} (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')})"
        ) from error
    platform = devices[0].platform
    return Devices(
        platform=platform,
        kind=_cpu_name() if platform == "cpu" else devices[0].device_kind,
        count=len(devices),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        dtype=str(compute_dtype(dtype, devices)),
        attention=attention_backend(devices),
        jax=jax.__version__,
        idle=idle_accelerators(platform),
    )


def is_chief() -> bool:
    """Whether this is the only process of its run, or the first of them; starts JAX's backend."""
    import jax

    return jax.process_index() == 0


def reaches_host_memory(device: jax.Device) -> bool:
    """Whether programs of the device may keep arrays in pinned memory of its host."""
    return any(memory.kind == HOST_MEMORY for memory in device.addressable_memories())


def compute_dtype(name: str = "auto", devices: Sequence[jax.Device] | None = None) -> jnp.dtype:
    """The dtype of activations: "auto" is bfloat16 on TPU v4 and later and on NVIDIA SM80 and later, else float32."""
    import jax
    import jax.numpy as jnp

    if name not in DTYPES:
        raise UserError(f'unknown dtype "{name}"; {nearest(name, DTYPES)}')
    if name != "auto":
        return jnp.dtype(name)
    device = (jax.devices() if devices is None else devices)[0]
    fast = False
    if device.platform == "tpu":
        fast = not any(old in device.device_kind for old in ("v2", "v3"))
    elif device.platform in ("gpu", "cuda"):
        # "8.0" on NVIDIA; AMD's devices name an architecture instead, and stay with float32.
        major = str(getattr(device, "compute_capability", "")).partition(".")[0]
        fast = major.isdecimal() and int(major) >= 8
    return jnp.dtype("bfloat16" if fast else "float32")


def attention_backend(devices: Sequence[jax.Device]) -> str:
    """The form that `models.attention` takes for long rows on these devices; the blockwise one runs on all of them."""
    return "splash" if devices[0].platform == "tpu" else "blockwise"


def enable_compile_cache() -> str:
    """Keep compiled programs on disk between runs; returns the folder.

    A cache that the user has set (JAX_COMPILATION_CACHE_DIR, or `jax_compilation_cache_dir`) is left as it is.
    Programs compiled for one CPU may not run on another, so the folder's name holds a fingerprint of this one's
    features: a home directory may be shared by unlike machines.
    """
    import jax

    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen:
        return chosen
    folder = compile_cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""  # a home that cannot be written to only costs time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A first video compiles many small programs; together they cost more than the few large ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return str(folder)


def compile_cache_folder() -> Path:
    """Where compiled programs are kept by the command line; nothing is started or made."""
    if chosen := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(chosen)
    return cache_folder() / f"compiled-{cpu_fingerprint()}"


def cache_folder() -> Path:
    """Where the package keeps what it can make again, for this user; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sora_jax"


# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
    """Where a CPU computes, have glibc keep the memory that is freed; True where it was told to.

    XLA frees the buffers of a program after every call. glibc hands such large pieces back to the system, which gives
    them out again page by page, zeroed: a quarter of a million page faults in each step of the world model's training,
    a fifth of its time. Call it before JAX starts: threads that have an arena of their own keep it. A machine with an
    accelerator, and settings of the user's, are left as they are.
    """
    pinned = os.environ.get("JAX_PLATFORMS", "")
    if pinned != "cpu" and (pinned or idle_accelerators("cpu")):
        return False
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # another C library
        return False
    return all(mallopt(*setting) for setting in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))


# Google's PCI vendor id, and the devices of it that are TPUs (its network cards and disks carry the same vendor).
_GOOGLE = "0x1ae0"
_TPU_DEVICES = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


def idle_accelerators(platform: str, root: Path = Path("/")) -> tuple[str, ...]:
    """One line for each kind of accelerator that the machine under `root` has while JAX runs on `platform`."""
    lines = []
    pinned = os.environ.get("JAX_PLATFORMS", "")
    cause = f"JAX_PLATFORMS={pinned} keeps JAX off it" if pinned else "JAX was installed without it"
    cards = sorted((root / "proc/driver/nvidia/gpus").glob("*"))
    if cards and platform not in ("gpu", "cuda"):
        remedy = "unset it" if pinned else "pip install 'sora-jax[cuda]'"
        lines.append(f"an NVIDIA GPU is present but unused: {cause}; {remedy}")
    if tpu_chips(root) and platform != "tpu":
        remedy = "unset it" if pinned else "pip install 'sora-jax[tpu]'"
        lines.append(f"a TPU is present but unused: {cause}; {remedy}")
    return tuple(lines)


def tpu_chips(root: Path = Path("/")) -> list[Path]:
    """The TPU chips plugged into the machine under `root`."""
    return [
        device
        for device in (root / "sys/bus/pci/devices").glob("*")
        if _read(device / "vendor") == _GOOGLE and _read(device / "device") in _TPU_DEVICES
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cpu_info(*names: str) -> list[str]:
    """The first value of each named line of /proc/cpuinfo ("model name", "flags")."""
    found: dict[str, str] = {}
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return [found[name] for name in names if found.get(name)]


def _cpu_name() -> str:
    import platform

    return next(iter(_cpu_info("model name")), platform.processor() or platform.machine())


def cpu_fingerprint() -> str:
    """Eight digits for this kind of CPU and its features."""
    import platform

    features = "|".join([platform.machine(), *_cpu_info("model name", "flags", "Features")])
    return hashlib.sha256(features.encode()).hexdigest()[:8]
