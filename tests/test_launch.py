"""The launch scripts against a cloud that is a folder: what they ask, and what they do when a slice is taken away."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
TPU = LAUNCH / "tpu_vm.sh"
WHERE = ("--zone", "us-a")

# A cloud with one slice of one host: its state is a file, its disk a folder; what it was asked is written down.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CLOUD/asked"
case "$3 $4" in
  "tpu-vm create")
    if [ -e "$CLOUD/none_left" ]; then rm "$CLOUD/none_left"; exit 1; fi
    rm -rf "$CLOUD/host" && mkdir "$CLOUD/host" && echo READY > "$CLOUD/state" ;;
  "tpu-vm describe") cat "$CLOUD/state" ;;
  "tpu-vm delete") rm "$CLOUD/state" ;;
  "tpu-vm scp") cp "$5" "$CLOUD/host/sora-jax/" ;;
  "tpu-vm ssh") cd "$CLOUD/host" && bash -c "${@: -1}" ;;
esac
"""
# Neither wheels nor environments are made: a wheel is any file, and the environment's program is `what`.
PYTHON = """#!/usr/bin/env bash
printf 'python3 %s\\n' "$*" >> "$CLOUD/asked"
case "$*" in
  *"pip wheel"*) touch "$7/sora_jax-0-py3-none-any.whl" ;;
  *"uv venv"*) mkdir -p env/bin && cp "$CLOUD/what" env/bin/sora-jax ;;
esac
"""


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("gcloud", GCLOUD), ("python3", PYTHON)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CLOUD", str(tmp_path))
    return tmp_path


def program(cloud: Path, text: str) -> None:
    (cloud / "what").write_text(f"#!/usr/bin/env bash\n{text}\n")
    (cloud / "what").chmod(0o755)


def tpu_vm(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([TPU, *arguments], check=False, capture_output=True, text=True, timeout=60)


def asked(cloud: Path) -> list[str]:
    return (cloud / "asked").read_text().splitlines()


RUN = ("--", "train", "--config", "world", "--workdir", "gs://bucket/a run")


def test_up_makes_a_slice_and_runs_the_command_there(cloud):
    program(cloud, 'printf "%s|" "$@" > given; exit 0')
    done = tpu_vm("up", "pod", "--type", "v5e-16", *WHERE, "--spot", "--every", "0", *RUN)
    assert done.returncode == 0, done.stderr
    assert "the run is done" in done.stderr
    assert (cloud / "host/sora-jax/given").read_text() == "train|--config|world|--workdir|gs://bucket/a run|"
    creation = next(line for line in asked(cloud) if "create" in line).split()
    assert creation[3:] == [
        *("create", "pod", *WHERE, "--accelerator-type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite", "--spot")
    ]
    install = next(line for line in asked(cloud) if "uv pip install" in line and line.startswith("python3"))
    assert install.endswith("env/bin/python sora_jax-0-py3-none-any.whl[tpu,gcs]")


def test_a_slice_that_is_taken_away_is_made_again_and_the_run_goes_on(cloud):
    """Preempted at the first start, and then there is none to be had for a while; the bucket outlives the host."""
    (cloud / "bucket").mkdir()
    program(
        cloud,
        'echo start >> "$CLOUD/bucket/starts"\n'
        'if [ "$(wc -l < "$CLOUD/bucket/starts")" = 1 ]; then\n'
        # at once: who asks in between is not told that the state is nothing
        '  touch "$CLOUD/none_left"; echo PREEMPTED > "$CLOUD/next"; mv "$CLOUD/next" "$CLOUD/state"; sleep 30\n'
        "fi",
    )
    done = tpu_vm("up", "pod", "--type", "v6e-8", *WHERE, "--every", "1", *RUN)
    assert done.returncode == 0, done.stderr
    assert "pod is PREEMPTED; making it again" in done.stderr
    assert "that failed; trying again in 1 s" in done.stderr
    assert (cloud / "bucket/starts").read_text() == "start\nstart\n"
    actions = [line.split()[3] for line in asked(cloud) if " tpu-vm " in line and "describe" not in line]
    assert actions.count("delete") == 1
    assert actions.count("create") == 3


@pytest.mark.parametrize(("code", "starts", "expected"), [(2, 1, 2), (1, 2, 0)])
def test_what_fails_is_started_again_and_what_is_refused_is_not(cloud, code, starts, expected):
    program(cloud, f'echo start >> "$CLOUD/starts"; [ "$(wc -l < "$CLOUD/starts")" = 2 ] || exit {code}')
    done = tpu_vm("up", "pod", "--type", "v4-8", *WHERE, "--every", "1", *RUN)
    assert done.returncode == expected, done.stderr
    assert len((cloud / "starts").read_text().splitlines()) == starts


def test_stop_lets_the_run_save(cloud):
    program(cloud, "trap 'touch saved; exit 0' TERM; touch running; while true; do sleep 0.1; done")
    for action in ("create", "install"):
        assert tpu_vm(action, "pod", "--type", "v4-8", *WHERE).returncode == 0
    assert tpu_vm("start", "pod", *WHERE, *RUN).returncode == 0
    host = cloud / "host/sora-jax"
    wait_for(host / "running")
    assert tpu_vm("stop", "pod", *WHERE).returncode == 0
    wait_for(host / "ended")
    assert (host / "saved").exists()
    assert (host / "ended").read_text() == "0\n"


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_dry_run_asks_for_nothing(cloud):
    done = tpu_vm("up", "pod", "--type", "v5p-128", *WHERE, "--queue", "--dry-run", *RUN)
    assert done.returncode == 0, done.stderr
    assert not (cloud / "asked").exists()
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert lines[0][:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert lines[0][-4:] == ["--accelerator-type", "v5p-128", "--runtime-version", "v2-alpha-tpuv5"]
    assert any(line[0] == "python3" for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what to do: up, create, install, start, watch, logs, status, stop or delete"),
        (("frob", "pod"), "unknown action frob"),
        (("create", *WHERE), "give the slice a name"),
        (("create", "pod"), "give a --zone"),
        (("create", "pod", *WHERE), "give a --type, say v5e-16"),
        (("create", "pod", *WHERE, "--type", "v9-8"), "unknown type v9-8; known: v4-N, v5e-N, v5p-N, v6e-N"),
        (("create", "pod", *WHERE, "--type", "tpu7x-8"), "tpu7x-8 is had on Kubernetes: launch/gke"),
        (("create", "pod", *WHERE, "--type", "v6e-x"), "v6e-x does not end in a number of cores or chips"),
        (("create", "pod", "--spots"), "unknown flag --spots"),
        (("start", "pod", *WHERE), "say after -- what sora-jax shall do"),
        (("start", "pod", "train"), "one name, not pod and train"),
        (("create", "pod", "--zone"), "--zone needs a value"),
    ],
)
def test_mistakes_are_one_line(cloud, arguments, message):
    done = tpu_vm(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"tpu_vm.sh: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert not (cloud / "asked").exists()


# --------------------------------------------------------------------------------------------------------------- Slurm

SBATCH = LAUNCH / "slurm.sbatch"


def slurm(cloud: Path, ends: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The batch job with a run that ends so; and what was asked of Slurm."""
    for name, text in (
        ("srun", f'echo "srun $*" >> "$CLOUD/asked"; {ends}'),
        ("scontrol", 'echo "$*" >> "$CLOUD/asked"'),
    ):
        (cloud / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (cloud / "bin" / name).chmod(0o755)
    command = ["bash", SBATCH, "train", "--config", "world", "--workdir", "a b"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"SLURM_JOB_ID": "7"} | environment
    )
    return done, asked(cloud)[1:]


STOPPED = 'echo "{\\"step\\": 5, \\"stopped\\": true}"'


@pytest.mark.parametrize(
    ("ends", "environment", "code", "again"),
    [
        (STOPPED, {}, 0, True),
        (STOPPED.replace("true", "false"), {}, 0, False),
        ("exit 2", {}, 2, False),
        ("exit 134", {}, 0, True),
        ("exit 134", {"SLURM_RESTART_COUNT": "20"}, 134, False),
        ("exit 134", {"SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}, 134, False),
    ],
)
def test_a_job_goes_back_into_the_queue_until_the_run_is_done(cloud, ends, environment, code, again):
    done, requests = slurm(cloud, ends, **environment)
    assert done.returncode == code, done.stderr
    assert requests == ["requeue 7"] * again
    assert asked(cloud)[0] == "srun --kill-on-bad-exit=1 sora-jax train --config world --workdir a b --json"


def test_slurm_dry_run_and_a_job_without_a_command():
    done = subprocess.run(["bash", SBATCH, "--dry-run", "train", "a b"], check=True, capture_output=True, text=True)
    assert shlex.split(done.stdout) == ["srun", "--kill-on-bad-exit=1", "sora-jax", "train", "a b", "--json"]
    for arguments in ([], ["--dry-run"]):
        done = subprocess.run(["bash", SBATCH, *arguments], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert "submit it with a command" in done.stderr


# ---------------------------------------------------------------------------------------------------- GKE and SkyPilot

SUBMIT = LAUNCH / "gke" / "submit.sh"
POD = ("--name", "wan", "--image", "registry/sora:1", "--dry-run")


def submit(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([SUBMIT, *arguments], check=False, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("type_", "topology", "hosts", "chips", "accelerator"),
    [
        ("tpu7x", "4x4x4", 16, 4, "tpu7x"),
        ("v5p", "4x4x8", 32, 4, "tpu-v5p-slice"),
        ("v5e", "16x16", 64, 4, "tpu-v5-lite-podslice"),
        ("v6e", "1x1", 1, 1, "tpu-v6e-slice"),
    ],
)
def test_manifest_has_a_pod_for_every_host(type_, topology, hosts, chips, accelerator):
    command = ["train", "--config", "wan_14b", "--workdir", 'gs://b/a "run" & | \\ NAME']
    done = submit(*POD, "--type", type_, "--topology", topology, "--slices", "3", "--", *command)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (3, hosts, hosts)
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["args"] == command
    assert container["image"] == "registry/sora:1"
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--type", "v4"), "unknown --type v4; known: v5e, v5p, v6e, tpu7x"),
        (("--type", "v5e", "--topology", "4x4x4"), "a topology of v5e has 2 numbers, not 4x4x4"),
        (("--topology", "4by4"), "give a --topology, say 4x4 or 4x4x4"),
        (("--slices", "0"), "--slices 0 is not a number"),
        (("--name", "Wan_1"), "give a --name of small letters, digits and -"),
        (("--nam", "x"), "unknown argument --nam; the command stands after --"),
    ],
)
def test_manifests_that_cannot_be(arguments, message):
    done = submit(*POD, "--type", "v5p", "--topology", "4x4x4", *arguments, "--", "train")
    assert done.returncode == 2
    assert done.stderr == f"submit.sh: {message} (see --help)\n"


def test_skypilot_tells_gpus_who_they_are_and_does_not_repeat_mistakes(tmp_path):
    """Its `run` as the cloud's shell runs it, on the second of two GPU nodes."""
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    home = tmp_path / "env" / "bin"
    home.mkdir(parents=True)
    told = "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"
    for path, text in ((home / "sora-jax", f'echo "$* {told}"; exit $CODE'), (tmp_path / "nvidia-smi", "")):
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def run(code: int, **more: str) -> subprocess.CompletedProcess:
        node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
        here = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code)}
        environment = os.environ | task["envs"] | node | here | {"WORKDIR": "gs://b/run", **more}
        return subprocess.run(["bash", "-c", task["run"]], check=False, capture_output=True, text=True, env=environment)

    assert run(0, FLAGS="--steps 5").stdout == "train --config world --workdir gs://b/run --steps 5 10.0.0.1:8476 2 1\n"
    assert [run(code).returncode for code in (0, 2, 1, 134)] == [0, 0, 1, 134]
    nowhere = run(0, WORKDIR="")
    assert (nowhere.stdout, nowhere.stderr) == ("", "say where: --env WORKDIR=gs://bucket/run\n")
