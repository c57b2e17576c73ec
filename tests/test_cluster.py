"""Which cluster a process finds itself in, from its environment, and what it says when that makes no sense."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sora_jax.cluster import Cluster, find_cluster
from sora_jax.errors import UserError

LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"
OUTRIGHT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.fixture
def tpu(tmp_path: Path) -> Path:
    """The root of a machine with a TPU chip (a v5e, by its PCI ids)."""
    device = tmp_path / "sys/bus/pci/devices/0000:00:04.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1ae0\n")
    (device / "device").write_text("0x0063\n")
    return tmp_path


def nobody() -> str:
    raise AssertionError("the metadata server was asked")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (OUTRIGHT, Cluster("environment", "10.0.0.1:1234", 4, 3)),
        (OUTRIGHT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, Cluster("Slurm")),
        ({"SLURM_NTASKS": "2"}, None),  # in the batch script itself, outside of srun
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, Cluster("Open MPI")),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),  # a leftover: no chip is plugged in
    ],
)
def test_without_tpus(environment, expected, tmp_path):
    assert find_cluster(environment, tmp_path, nobody) == expected


@pytest.mark.parametrize(
    ("environment", "answer", "expected"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None, Cluster("TPU slice on Kubernetes")),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, None, Cluster("TPU slice on Kubernetes")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, None),
        ({}, "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3", Cluster("TPU slice")),
        ({}, "unknown:unknown:10.0.0.2", None),
        ({}, "", None),  # Colab lends a chip without a metadata server
        ({"JAX_PLATFORMS": "cpu"}, None, None),
    ],
)
def test_with_a_tpu(environment, answer, expected, tpu):
    assert find_cluster(environment, tpu, nobody if answer is None else lambda: answer) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set and JAX_COORDINATOR_ADDRESS is not: set all of"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is set and JAX_NUM_PROCESSES is"),
        (OUTRIGHT | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 of JAX_NUM_PROCESSES=4 cannot be"),
        (OUTRIGHT | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two is not a whole number"),
    ],
)
def test_nonsense_is_said(environment, message, tmp_path):
    with pytest.raises(UserError, match=message):
        find_cluster(environment, tmp_path, nobody)


# ------------------------------------------------------------------------------------------------------------ local.sh


def local(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([LOCAL, *arguments], check=False, capture_output=True, text=True, timeout=60)


def test_local_starts_as_many_as_asked_and_tells_each_which_it_is():
    told = "; ".join(f'print(os.environ["{name}"])' for name in OUTRIGHT)
    done = local("3", sys.executable, "-c", f"import os; {told}")
    assert done.returncode == 0
    own = [line for line in done.stdout.splitlines() if not line.startswith("[")]
    assert own[1:] == ["3", "0"]
    assert [line for line in done.stdout.splitlines() if line.startswith("[2]")] == [f"[2] {x}" for x in (own[0], 3, 2)]


def test_local_dry_run_prints_commands_that_a_shell_would_take():
    done = local("--dry-run", "--devices", "4", "--port", "77", "2", "echo", "a b")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2
    for process, line in enumerate(done.stdout.splitlines()):
        assert {*line.split()} >= {
            "JAX_COORDINATOR_ADDRESS=127.0.0.1:77",
            f"JAX_PROCESS_ID={process}",
            "JAX_NUM_CPU_DEVICES=4",
        }
        assert subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True).stdout == "a b\n"


def test_local_stops_the_others_when_one_fails():
    script = 'import os, sys, time\nif os.environ["JAX_PROCESS_ID"] == "1": sys.exit(7)\ntime.sleep(50)'
    assert local("2", sys.executable, "-c", script).returncode == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a number of processes and a command"),
        (("2",), "give a number of processes and a command"),
        (("two", "true"), "two is not a number"),
        (("--port", "65536", "2", "true"), "65536 is no port: they end at 65535"),
        (("--device", "4", "2", "true"), "unknown flag --device"),
    ],
)
def test_local_refuses_in_one_line(arguments, message):
    done = local(*arguments)
    assert done.returncode == 2
    assert done.stderr == f"local.sh: {message} (see --help)\n"


def test_nobody_at_the_coordinators_address_is_one_line(tmp_path: Path):
    script = (
        "import sora_jax.cluster as cluster\ncluster.CONNECT_SECONDS = 1\n"
        "import sys; from sora_jax.cli import main\n"
        f"sys.exit(main(['train', '--config', 'world', '--workdir', {str(tmp_path / 'run')!r}]))"
    )
    second = os.environ | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    done = subprocess.run([sys.executable, "-c", script], check=False, env=second, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sora-jax: error: nobody answers at 127.0.0.1:9, the coordinator of this run, for 1 s")
    assert not (tmp_path / "run").exists()
