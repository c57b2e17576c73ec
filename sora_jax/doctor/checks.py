"""What goes wrong before a run starts: each check looks at one thing and says what it found and what to do."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from etils import epath

from sora_jax import compile_cache
from sora_jax.doctor.probe import Probe
from sora_jax.doctor.versions import differing, too_old, untested, versions
from sora_jax.runtime import compile_cache_folder, idle_accelerators, tpu_chips

GIB = 2**30
LOCK = Path("/tmp/libtpu_lockfile")
LEAST_DISK, SMALL_DISK = 1 * GIB, 10 * GIB  # below: a failure, a warning
SMALL_MEMORY = 2 * GIB

State = Literal["ok", "warning", "failed"]


class Check(NamedTuple):
    """One line of the report."""

    name: str
    state: State
    found: str
    remedy: str = ""  # what to do, where something is wrong

    @property
    def line(self) -> str:
        return f"{self.state:8} {self.name:14} {self.found}" + (f": {self.remedy}" if self.remedy else "")


# ------------------------------------------------------------------------------------------------------------- devices


def check_backend(probed: Probe) -> Check:
    """Whether JAX starts at all."""
    if probed.found is None:
        remedy = "see the checks below; another process may hold the devices, or the driver not answer"
        return Check("backend", "failed", f"JAX does not start ({probed.error})", remedy)
    return Check("backend", "ok", f"JAX started in {probed.seconds:.1f} s")


def check_devices(probed: Probe, count: int | None, platform: str | None) -> Check:
    """The devices of all processes against what was expected of them."""
    found = probed.found
    if found is None:
        return Check("devices", "failed", "none: JAX does not start")
    here = f"{found['count']} x {found['kind']} ({found['platform']})"
    if found["processes"] > 1:
        here += f", {found['local_count']} of them in this process"
    wrong = []
    if platform is not None and found["platform"] != platform:
        wrong.append(f"{platform} was expected")
    if count is not None and found["count"] != count:
        wrong.append(f"{count} were expected")
    if not wrong:
        return Check("devices", "ok", here)
    remedy = {
        "tpu": "pip install 'sora-jax[tpu]', unset JAX_PLATFORMS, and start one process on every host of the slice",
        "gpu": "pip install 'sora-jax[cuda]', unset JAX_PLATFORMS, and look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    }.get(platform or found["platform"], "XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of a CPU")
    return Check("devices", "failed", f"{here}, where {' and '.join(wrong)}", remedy)


def check_idle(probed: Probe, root: Path = Path("/")) -> Check:
    """Accelerators that are plugged in and that JAX does not use."""
    idle = idle_accelerators(probed.found["platform"] if probed.found else "", root)
    if idle:
        return Check("accelerators", "warning", "; ".join(idle))
    return Check("accelerators", "ok", "none stands idle")


def check_processes(probed: Probe) -> Check:
    """Whether the processes of a run see each other, and have the same versions."""
    found = probed.found
    if found is None:
        return Check("processes", "failed", "unknown: JAX does not start")
    if found["processes"] == 1:
        return Check("processes", "ok", "one")
    hosts = found["hosts"]
    here = f"{found['processes']} on {len({host['host'] for host in hosts})} hosts ({found['cluster']}), all answer"
    if unlike := differing(hosts):
        return Check("processes", "failed", f"{here}; {', '.join(unlike)}", "install the same versions on all hosts")
    if len({host["devices"] for host in hosts}) > 1:
        return Check("processes", "warning", f"{here}; not all have the same number of devices")
    return Check("processes", "ok", f"{here}, with the same versions")


# ------------------------------------------------------------------------------------------------------------ libtpu


def check_lock(path: Path = LOCK, root: Path = Path("/")) -> Check:
    """The file that libtpu locks while a process uses the TPU. It stays behind, which does no harm as long as the next
    user may open it."""
    state: State = "failed" if tpu_chips(root) else "warning"  # without a TPU it is in nobody's way
    if not path.exists():
        return Check("libtpu lock", "ok", "none")
    owner = lock_owner(path)
    if owner is not None and owner != os.getpid():
        who = f"living process {owner} ({_command(owner)})" if owner > 0 else "a living process of another container"
        remedy = f"end it (kill {owner}) or wait for it; do not remove the file" if owner > 0 else "end that one"
        return Check("libtpu lock", state, f"{path} is held by {who}, which uses the TPU", remedy)
    if not os.access(path, os.R_OK | os.W_OK):
        left = f"{path} was left behind by a dead process of user {_user(path)}, and this user may not open it"
        return Check("libtpu lock", state, left, f"sudo rm {path}")
    return Check("libtpu lock", "ok", f"{path} was left behind by a process that is dead; nobody holds it")


def lock_owner(path: Path) -> int | None:
    """The process that holds a lock on the file; 0 for one that cannot be seen from here, None where nobody does."""
    there = path.stat()
    device = f"{os.major(there.st_dev):02x}:{os.minor(there.st_dev):02x}"
    try:
        held = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in held:
        fields = line.split()  # "1: POSIX  ADVISORY  WRITE 20258 fe:00:2146353 0 EOF"
        if len(fields) >= 6 and fields[1] != "->" and fields[5] == f"{device}:{there.st_ino}":
            return max(int(fields[4]), 0)
    return None


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "?"
    return b" ".join(words).decode(errors="replace").strip()[:80]


def _user(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:
        return str(path.stat().st_uid)


# ------------------------------------------------------------------------------------------- files, space and versions


def check_workdir(workdir: str) -> Check:
    """Writes a small file there, reads it back, and removes it."""
    folder, text = epath.Path(workdir), uuid.uuid4().hex
    began = time.monotonic()
    try:
        made = [path for path in (folder, *folder.parents) if "://" not in workdir and not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"doctor-{text[:8]}"
        path.write_text(text)
        try:
            back = path.read_text()
        finally:
            path.unlink()
        for parent in made:
            parent.rmdir()
    except Exception as error:  # noqa: BLE001  each kind of store has errors of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = "is it there, and may this machine's account write to it?"
        if isinstance(error, ImportError) or "gcsfs" in reason:
            remedy = "pip install 'sora-jax[gcs]'"
        return Check("workdir", "failed", f"{workdir} cannot be written ({type(error).__name__}: {reason})", remedy)
    if back != text:
        return Check("workdir", "failed", f"{workdir} gives back something else than was written", "use another store")
    return Check("workdir", "ok", f"{workdir}: written, read back and removed in {time.monotonic() - began:.2f} s")


def check_disk(workdir: str | None) -> Check:
    """Free space where a run writes: its workdir, the compile cache, and temporary files."""
    folders = {"temporary files": tempfile.gettempdir(), "compile cache": str(compile_cache_folder())}
    if workdir is None or "://" not in workdir:
        folders["workdir" if workdir else "this folder"] = workdir or "."
    free = {what: shutil.disk_usage(_existing(Path(folder))).free for what, folder in folders.items()}
    tightest = min(free.values())
    found = ", ".join(f"{size / GIB:.1f} GiB for {what}" for what, size in free.items())
    if tightest < LEAST_DISK:
        return Check("disk", "failed", found, "make room: a checkpoint is three to four times the parameters")
    return Check("disk", "warning" if tightest < SMALL_DISK else "ok", found)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def check_memory(probed: Probe) -> Check:
    """Memory that is free on the host and on the first device."""
    available = _available_memory()
    found, state, remedy = [], "ok", ""
    if available is not None:
        found.append(f"{available / GIB:.1f} GiB free on the host")
        if available < SMALL_MEMORY:
            state, remedy = "warning", "end what else runs here; loader workers and checkpoints need some"
    limit = probed.found and probed.found.get("memory_limit")
    if probed.found and limit:
        found.append(f"{(limit - (probed.found.get('memory_in_use') or 0)) / GIB:.1f} GiB on each device")
    return Check("memory", state, ", ".join(found) or "not known", remedy)  # type: ignore[arg-type]


def _available_memory() -> int | None:
    """What the machine has left, or this container of it."""
    free = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
        cgroup = Path("/sys/fs/cgroup")
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int((cgroup / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        pass
    return min(free, default=None)


def check_cache() -> Check:
    """The compile cache; what cannot be read is removed, so that it is made again."""
    folder = compile_cache_folder()
    removed = compile_cache.remove_unreadable(folder)
    kept = compile_cache.programs(folder)
    found = f"{len(kept)} programs, {sum(path.stat().st_size for path in kept) / 2**20:.0f} MiB in {folder}"
    if removed:
        return Check("compile cache", "warning", f"{found}; {len(removed)} could not be read and were removed")
    return Check("compile cache", "ok", found)


def check_versions() -> Check:
    """What is installed against what this package needs, and what it was tested with."""
    found = versions()
    here = ", ".join(f"{name} {text}" for name, text in found.items())
    if faults := too_old(found):
        return Check("versions", "failed", "; ".join(faults), "pip install --upgrade sora-jax")
    if newer := untested(found):
        return Check("versions", "warning", f"newer than was tested: {'; '.join(newer)}")
    return Check("versions", "ok", here)


def all_checks(
    probed: Probe, *, count: int | None, platform: str | None, workdir: str | None, say: Callable[[Check], None]
) -> list[Check]:
    """Every check in turn; `say` gets each as soon as it is known."""
    checks: list[Check] = []
    for look in (
        lambda: check_backend(probed),
        lambda: check_devices(probed, count, platform),
        lambda: check_idle(probed),
        lambda: check_processes(probed),
        check_lock,
        check_versions,
        check_cache,
        lambda: check_disk(workdir),
        lambda: check_memory(probed),
        *([lambda: check_workdir(workdir)] if workdir else []),
    ):
        checks.append(look())
        say(checks[-1])
    return checks
