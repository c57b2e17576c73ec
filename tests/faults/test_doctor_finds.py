"""What `doctor` is for, done for real: a lock that is held and one that is left behind, devices that are not there, a
backend that hangs, compiled programs cut short, hosts with other versions, a workdir that cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import tiny_run

import sora_jax
from sora_jax import compile_cache
from sora_jax.doctor.checks import check_lock
from sora_jax.doctor.probe import probe

pytestmark = pytest.mark.faults


def environment(home: Path, **more: str) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(home / "compiled")} | more


def doctor(home: Path, *argv: str, **more: str) -> tuple[int, dict, float]:
    """Exit code, the checks by name, and how long it took."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sora_jax", "doctor", "--json", *argv],
        check=False,
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=home,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1), done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    return done.returncode, checks, time.monotonic() - began


# ---------------------------------------------------------------------------------------------------------- libtpu lock

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)  # as libtpu does
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_is_held_by_the_living_and_left_by_the_dead(tmp_path: Path):
    lock = tmp_path / "libtpu_lockfile"
    assert check_lock(lock).found == "none"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    check = check_lock(lock)
    assert check.state == "warning"  # a failure where there is a TPU
    assert f"living process {holder.pid} (" in check.found
    assert "do not remove" in check.remedy
    chip = tmp_path / "sys/bus/pci/devices/0000:00:05.0"
    chip.mkdir(parents=True)
    (chip / "vendor").write_text("0x1ae0\n")
    (chip / "device").write_text("0x0063\n")
    assert check_lock(lock, root=tmp_path).state == "failed"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    check = check_lock(lock)
    assert (check.state, "dead" in check.found) == ("ok", True)
    assert lock.exists(), "it is only looked at"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_lock_left_by_another_user_has_to_be_removed(tmp_path: Path):
    """As anybody but its owner sees it: libtpu makes the file for its owner alone."""
    shared = Path("/tmp") / f"sora_jax-{os.getpid()}"
    shared.mkdir(mode=0o755)
    try:
        lock = shared / "libtpu_lockfile"
        lock.touch(mode=0o600)
        package = Path(sora_jax.__file__).parent.parent
        code = f"import os, sys; sys.path.insert(0, {str(package)!r}); "
        code += "from pathlib import Path; from sora_jax.doctor.checks import check_lock; os.setuid(65534); "
        code += f"check = check_lock(Path({str(lock)!r})); print(check.state, check.remedy)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == f"warning sudo rm {lock}\n"
    finally:
        shutil.rmtree(shared)


# -------------------------------------------------------------------------------------------------------------- devices


def test_a_machine_in_order_and_one_with_other_devices_than_expected(tmp_path: Path):
    code, checks, _ = doctor(tmp_path, "--devices", "1", "--platform", "cpu", "--workdir", str(tmp_path / "run"))
    failed = [check for check in checks.values() if check["state"] == "failed"]
    assert (code, failed) == (0, [])
    assert checks["workdir"]["state"] == "ok"
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    code, checks, _ = doctor(tmp_path, "--devices", "8", "--platform", "tpu", "--workdir", str(tmp_path / "file" / "x"))
    assert code == 1
    assert checks["devices"]["state"] == checks["workdir"]["state"] == "failed"
    assert "tpu was expected and 8 were expected" in checks["devices"]["found"]
    assert "sora-jax[tpu]" in checks["devices"]["remedy"]


def test_a_backend_that_hangs_does_not_hang_the_doctor(tmp_path: Path):
    """A plugin of JAX's, found as those of TPUs and GPUs are, whose start never ends."""
    plugin = tmp_path / "site" / "jax_plugins" / "stuck"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("import time\n\ndef initialize():\n    time.sleep(600)\n")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    code, checks, seconds = doctor(tmp_path, "--timeout", "15", PYTHONPATH=path)
    assert code == 1
    assert "no answer in 15 s" in checks["backend"]["found"]
    assert "it hangs in initialize (__init__.py)" in checks["backend"]["found"]
    assert seconds < 60
    assert checks["versions"]["state"] == "ok", "what needs no backend is still looked at"


def test_a_backend_that_dies_is_told_by_its_own_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    found = probe(120)
    assert found.found is None
    assert "nonsense" in found.error


# ------------------------------------------------------------------------------------------------------------ processes


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def together(home: Path, roots: list[str]) -> list[tuple[int, str]]:
    """`doctor` in a run of a process for each root that the package is imported from: code and stdout of each."""
    port = free_port()
    started = []
    for index, root in enumerate(roots):
        cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(len(roots))}
        cluster |= {"JAX_PROCESS_ID": str(index), "PYTHONPATH": root}
        command = [sys.executable, "-m", "sora_jax", "doctor", "--devices", str(len(roots)), "--timeout", "100"]
        started.append(
            subprocess.Popen(command, env=environment(home, **cluster), stdout=subprocess.PIPE, text=True, cwd=home)
        )
    return [(process.wait(timeout=200), process.communicate()[0]) for process in started]


def test_processes_with_other_versions_are_found(tmp_path: Path):
    here = Path(sora_jax.__file__).parent
    other = tmp_path / "other" / "sora_jax"
    shutil.copytree(here, other, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    head = (other / "__init__.py").read_text()
    (other / "__init__.py").write_text(head.replace(f'"{sora_jax.__version__}"', '"9.9.9"'))
    alike = together(tmp_path, [str(here.parent)] * 2)
    assert [code for code, _ in alike] == [0, 0], alike
    assert "2 on 1 hosts (environment), all answer, with the same versions" in alike[0][1]
    assert alike[1][1] == "", "the first speaks for all"
    unlike = together(tmp_path, [str(here.parent), str(other.parent)])
    assert unlike[0][0] == 1
    assert f"sora_jax is {sora_jax.__version__} on 1 and 9.9.9 on 1 processes" in unlike[0][1]


# -------------------------------------------------------------------------------------------------------- compile cache

COMPILE = """
import jax, warnings
warnings.simplefilter("always")
print(jax.jit(lambda x: x * 3 + 1)(2.0))
"""


def cut_short(folder: Path) -> list[Path]:
    """Every program in a cache, cut to half, as a process leaves it that is killed while it writes."""
    files = compile_cache.programs(folder)
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    return files


def test_jax_alone_never_mends_a_program_that_was_cut_short(tmp_path: Path):
    """Why there is something to do: it warns, compiles, and leaves what cannot be read where it is."""
    keep = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    folder = tmp_path / "compiled"

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", COMPILE],
            env=environment(tmp_path, **keep),
            capture_output=True,
            text=True,
            check=True,
        )

    run()
    files = cut_short(folder)
    assert files
    for _ in range(2):
        done = run()
        assert done.stdout == "7.0\n"
        assert compile_cache.UNREADABLE in done.stderr
        assert compile_cache.unreadable(folder) == files
    assert compile_cache.remove_unreadable(folder) == files
    assert compile_cache.UNREADABLE not in run().stderr
    assert compile_cache.programs(folder) == files
    assert compile_cache.unreadable(folder) == []


@pytest.mark.slow
def test_a_run_survives_programs_cut_short_says_so_and_makes_them_anew(tmp_path: Path):
    home = tiny_run.make_home(tmp_path)

    def run(name: str) -> tuple[list[float], str]:
        done = subprocess.run(
            [sys.executable, *tiny_run.flags(home, home / name), "--config.train.steps=3"],
            env=tiny_run.environment(home),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return [line["loss"] for line in tiny_run.lines(home / name)], done.stderr

    losses, _ = run("first")
    files = cut_short(home / "compiled")
    assert len(files) > 3
    again, said = run("second")
    assert again == losses
    warned = [line for line in said.splitlines() if compile_cache.UNREADABLE in line]
    assert len(warned) == 1, said
    assert f"; {len(files)} removed from {home / 'compiled'}; compiling anew" in warned[0]
    assert compile_cache.unreadable(home / "compiled") == []
    assert set(compile_cache.programs(home / "compiled")) >= set(files), "rebuilt"
    assert compile_cache.UNREADABLE not in run("third")[1]


def test_the_doctor_removes_programs_that_cannot_be_read(tmp_path: Path):
    folder = tmp_path / "compiled"
    folder.mkdir()
    whole = zlib.compress(os.urandom(4000))
    flipped = bytearray(whole)
    flipped[2000] ^= 4
    for name, data in (("a", whole), ("b", whole[:1000]), ("c", bytes(flipped)), ("d", b"")):
        (folder / f"jit_{name}-cache").write_bytes(data)
    code, checks, _ = doctor(tmp_path)
    assert code == 0
    assert checks["compile cache"]["state"] == "warning"
    assert "3 could not be read and were removed" in checks["compile cache"]["found"]
    assert [path.name for path in compile_cache.programs(folder)] == ["jit_a-cache"]


# ------------------------------------------------------------------------------------------------------------- selftest


@pytest.mark.slow
def test_the_selftest_passes_here_and_leaves_a_report(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "sora_jax", "doctor", "--selftest", "--out", "report.json"],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=650,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"] < 600
    assert [row["state"] for row in report["equality"]] == ["ok"] * len(report["equality"])
    names = {row["name"] for row in report["equality"]}
    assert {"identity of unipc", "autoencoder by 2, or whole", "sequence = 4 devices, or one"} <= names
    speed = {row["name"]: row for row in report["speed"]}
    assert {"products, float32", "attention, forward", "world-train-step", "world-sampler-step"} <= set(speed)
    assert all(row["found"] > 0 for row in speed.values())
    text = (tmp_path / "report.txt").read_text()
    assert all(row["name"].strip() in text for row in (*report["equality"], *report["speed"], *report["checks"]))
