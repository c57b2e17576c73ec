"""Checkpoints and whole runs in a store of objects: the same promises as on a disk, kept without renames.

Nothing is replaced here but the store's address: Orbax, TensorStore and gcsfs speak to it over HTTP, in this process
and in those that are killed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from etils import epath
from object_store import BUCKET, ObjectStore, running_store
from saved_states import INIT, KEY, bits, same_bits, state_at
from test_pod_checkpoints import run

from sora_jax.cli import main
from sora_jax.errors import UserError
from sora_jax.sharding import make_mesh
from sora_jax.supervise import newest_step
from sora_jax.training.checkpoint import MANIFEST, Checkpoints
from sora_jax.training.pretrained import load_run
from sora_jax.training.state import TrainState, abstract_state

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """One for all, because the clients remember its address."""
    with running_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(autouse=True)
def _willing(store: ObjectStore) -> Iterator[None]:
    yield
    store.refused = store.held = ""
    store.reached.clear()


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def like(mesh: jax.sharding.Mesh) -> TrainState:
    return abstract_state(INIT, KEY, mesh)


@pytest.fixture
def folder(store: ObjectStore, mesh: jax.sharding.Mesh, request: pytest.FixtureRequest) -> str:
    """Steps 1, 2 and 3, under a name of this test's own in the bucket."""
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    checkpoints = Checkpoints(f"gs://{BUCKET}/{name}")
    for step in (1, 2, 3):
        checkpoints.save(step, state_at(step, mesh), {"step": step})
    checkpoints.close()
    return name


def steps_in(store: ObjectStore, folder: str) -> set[str]:
    return {name.split("/")[1] for name in store.objects(f"{folder}/")}


# ---------------------------------------------------------------------------------------------------------- round trips


def test_every_object_of_a_step_is_in_its_manifest_and_it_comes_back_to_the_bit(store, folder, mesh, like):
    checkpoints = Checkpoints(f"gs://{BUCKET}/{folder}", keep=2)
    for axes in ({"data": 1}, {"fsdp": 4, "tensor": 2}):
        devices = jax.devices()[: 1 if axes == {"data": 1} else 8]
        restored = checkpoints.restore(abstract_state(INIT, KEY, make_mesh(axes, devices)))
        assert (restored.step, restored.notes) == (3, {"step": 3})
        assert same_bits(bits(restored.state), bits(state_at(3, mesh)))
    listed = json.loads(store.read(f"{folder}/3/{MANIFEST}"))
    there = {name.removeprefix(f"{folder}/3/") for name in store.objects(f"{folder}/3/")}
    assert {name for name in there if not name.endswith(("commit_success.txt", "_METADATA", MANIFEST))} <= set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256(store.read(f"{folder}/3/{name}")).hexdigest() == digest
    checkpoints.save(4, state_at(4, mesh), {"step": 4})
    checkpoints.close()
    assert steps_in(store, folder) == {"3", "4"}


def test_other_stores_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"gs://.*not to s3://bucket/run"):
        Checkpoints("s3://bucket/run")


@pytest.mark.pods
def test_two_processes_save_and_restore_together(store):
    """Each writes objects of its own, which the first must find for the manifest; a damaged step is left by both."""
    run(2, "save", "fsdp", f"gs://{BUCKET}/two")
    for report in run(2, "restore", "tensor", f"gs://{BUCKET}/two"):
        assert (report["step"], report["wrong"], report["said"]) == (2, [], [])
    assert {f"two/2/state/ocdbt.process_{number}/manifest.ocdbt" for number in (0, 1)} <= store.objects("two/2/").keys()
    flip_a_bit(store, "two/2")
    for report in run(2, "restore", "tensor", f"gs://{BUCKET}/two"):
        assert (report["step"], report["wrong"], len(set(report["said"]))) == (1, [], 1)
    assert steps_in(store, "two") == {"1", "2.damaged"}


# --------------------------------------------------------------------------------------------------------------- damage


def largest(store: ObjectStore, prefix: str) -> epath.Path:
    objects = store.objects(prefix)
    return epath.Path(f"gs://{BUCKET}/{max(objects, key=lambda name: objects[name])}")


def flip_a_bit(store: ObjectStore, step: str) -> None:
    path = largest(store, f"{step}/state/")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(store: ObjectStore, step: str) -> None:
    path = largest(store, f"{step}/state/")
    path.write_bytes(path.read_bytes()[:-1])


def lose_an_object(store: ObjectStore, step: str) -> None:
    largest(store, f"{step}/state/").unlink()


def lose_the_manifest(store: ObjectStore, step: str) -> None:
    epath.Path(f"gs://{BUCKET}/{step}/{MANIFEST}").unlink()


def change_the_notes(store: ObjectStore, step: str) -> None:
    epath.Path(f"gs://{BUCKET}/{step}/notes/metadata").write_text('{"step": 4}')


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lose_an_object, lose_the_manifest, change_the_notes])
def test_damage_is_said_walked_around_and_kept_aside(
    store, folder, mesh, like, damage: Callable[[ObjectStore, str], None]
):
    damage(store, f"{folder}/3")
    left = store.objects(f"{folder}/3/")
    said: list[str] = []
    checkpoints = Checkpoints(f"gs://{BUCKET}/{folder}", say=said.append)
    restored = checkpoints.restore(like)
    assert (restored.step, restored.notes) == (2, {"step": 2})
    assert same_bits(bits(restored.state), bits(state_at(2, mesh)))
    assert ["checkpoint 3 is damaged" in line for line in said] == [True]
    aside = store.objects(f"{folder}/3.damaged/")
    assert {name.replace("/3.damaged/", "/3/"): size for name, size in aside.items()} == left
    # the run goes on from there, over the damaged step, and another process finds all of it
    checkpoints.save(3, state_at(4, mesh), {"step": 3})
    checkpoints.close()
    again = Checkpoints(f"gs://{BUCKET}/{folder}", say=said.append)
    restored = again.restore(like)
    again.close()
    assert restored.step == 3
    assert same_bits(bits(restored.state), bits(state_at(4, mesh)))
    assert len(said) == 1
    assert steps_in(store, folder) == {"1", "2", "3", "3.damaged"}


# TensorStore has more to say of the other arrays after Orbax has given up, and nobody listens any more.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", ["state/*", MANIFEST, "commit_success.txt"])
def test_a_step_that_the_store_refused_is_never_the_newest(store, folder, mesh, like, what: str):
    """As with a quota that is used up: the failure comes up, and the step before is intact."""
    checkpoints = Checkpoints(f"gs://{BUCKET}/{folder}")
    store.refused = f"{folder}/9/{what}"

    def save() -> None:
        checkpoints.save(9, state_at(9, mesh), {})
        checkpoints.wait()

    with pytest.raises((OSError, ValueError), match="(?i)forbidden"):
        save()
    assert checkpoints.steps() == [1, 2, 3]
    assert checkpoints.restore(like).step == 3
    store.refused = ""
    save()  # with room again
    assert checkpoints.restore(like).step == 9
    checkpoints.close()
    again = Checkpoints(f"gs://{BUCKET}/{folder}")
    assert again.steps() == [1, 2, 3, 9]
    again.close()
    assert steps_in(store, folder) == {"1", "2", "3", "9"}


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_home(tmp_path_factory.mktemp("store"))


def start(home: Path, workdir: str) -> subprocess.Popen:
    command = [sys.executable, *tiny_run.flags(home, workdir), "--config.train.steps=9"]
    return subprocess.Popen(command, env=tiny_run.environment(home), stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def comparable(lines: list[str]) -> list[dict]:
    """What of each line does not depend on the clock."""
    timed = ("steps_per_second", "seconds_per_step", "tokens_per_second", "tflops", "data_wait", "mfu", "goodput")
    timed += ("host_gib", "device_gib", "device_peak_gib")
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    "reached", ["state/ocdbt.process_0/d/*", "state/manifest.ocdbt", MANIFEST, "commit_success.txt"]
)
def test_a_run_killed_in_the_middle_of_a_save_goes_on_from_the_step_before(store, home, tmp_path, capsys, reached: str):
    """SIGKILL while the store has not yet answered the upload of one object of step 6; a second start ends the run as
    if it had never been killed, and the store then has what a disk would."""
    local, name = tmp_path / "whole", f"run-{hashlib.sha256(reached.encode()).hexdigest()[:8]}"
    finish(start(home, str(local)))
    store.held = f"{name}/checkpoints/6/{reached}"
    process = start(home, f"gs://{BUCKET}/{name}")
    try:
        assert store.reached.wait(timeout=240)
        # Another process that looks on meanwhile sees the step before, and disturbs nothing.
        before = store.objects(f"{name}/checkpoints/6/").keys()
        assert main(["checkpoint", "verify", f"gs://{BUCKET}/{name}"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["3"]
        assert newest_step(epath.Path(f"gs://{BUCKET}/{name}")) == 3
        assert before <= store.objects(f"{name}/checkpoints/6/").keys()
    finally:
        process.kill()  # SIGKILL
        process.communicate()
    store.held = ""
    errors = finish(start(home, f"gs://{BUCKET}/{name}"))
    assert f"resuming gs://{BUCKET}/{name} at step 3" in errors
    assert comparable(store.read(f"{name}/metrics.jsonl").decode().splitlines()) == comparable(
        (local / "metrics.jsonl").read_text().splitlines()
    )
    assert {"config.json", "metrics.jsonl", "goodput.json", "tensorboard", "checkpoints"} == {
        name.split("/")[1] for name in store.objects(f"{name}/")
    }
    ours, theirs = (
        Checkpoints(f, read_only=True) for f in (f"gs://{BUCKET}/{name}/checkpoints", local / "checkpoints")
    )
    assert ours.steps() == theirs.steps()
    for step in ours.steps():
        assert not ours.fault(step)
        there, here = theirs.arrays(step), ours.arrays(step)
        assert there.keys() == here.keys()
        assert all(there[name].tobytes() == here[name].tobytes() for name in there)
    for each in (ours, theirs):
        each.close()
    params, expected = (jax.tree.leaves(load_run(epath.Path(path)).params) for path in (f"gs://{BUCKET}/{name}", local))
    assert same_bits([np.asarray(leaf) for leaf in params], [np.asarray(leaf) for leaf in expected])
    assert main(["checkpoint", "ls", f"gs://{BUCKET}/{name}"]) == 0
    assert "latents of noise, 40 clips" in capsys.readouterr().out
