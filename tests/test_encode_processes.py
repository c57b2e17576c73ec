"""Several processes write one cache: each shard by one of them, and whoever goes on ends with what one alone makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from process_tree import arguments_of, descendants, environment_of
from test_latents_cache import INFO, record

from sora_jax.data.latents import CacheInfo, LatentSource, LatentWriter
from sora_jax.errors import UserError

LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"
CLIPS = 80


# ------------------------------------------------------------------------------------------------- the files, in turn


def write(writer: LatentWriter, shards, stop_at: int | None = None) -> None:
    for shard in shards:
        with writer.shard(shard) as out:
            for index in range(shard.start, shard.stop):
                if shard.number == stop_at:
                    raise KeyboardInterrupt
                out.add(record(index, frames=1 + index % 3))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def open_shared(folder: Path, processes: int, info: CacheInfo = INFO) -> list[LatentWriter]:
    sizes = {"clips": 20, "clips_per_shard": 2, "shared": True}
    return [LatentWriter(folder, info, **sizes, first=process == 0) for process in range(processes)]


def test_a_cache_of_several_writers_is_that_of_one(tmp_path: Path):
    alone = LatentWriter(tmp_path / "alone", INFO, clips=20, clips_per_shard=2)
    write(alone, alone.missing())

    folder = tmp_path / "shared"
    writers = open_shared(folder, 3)
    manifest = (folder / "manifest.json").read_bytes()
    for process in (2, 0, 1):
        write(writers[process], writers[process].missing()[process::3])
        assert (folder / "manifest.json").read_bytes() == manifest, "nobody writes to what all read"
    with pytest.raises(UserError, match="not finished"):
        LatentSource(folder)
    writers[0].gather()
    writers[1].reload()
    assert contents(folder) == contents(tmp_path / "alone")
    assert (writers[1].count, writers[1].missing()) == (20, [])


def test_what_a_killed_process_has_finished_is_kept_by_any_number_that_go_on(tmp_path: Path):
    alone = LatentWriter(tmp_path / "alone", INFO, clips=20, clips_per_shard=2)
    write(alone, alone.missing())
    folder = tmp_path / "shared"
    first, second = open_shared(folder, 2)
    write(first, first.missing()[0::2])
    with pytest.raises(KeyboardInterrupt):
        write(second, second.missing()[1::2], stop_at=5)  # has finished 1 and 3
    (folder / "latents-00005.arrayrecord.1234abcd.partial").write_bytes(b"left by SIGKILL")
    (folder / "latents-00007.arrayrecord").write_bytes(b"finished, and killed before it was told")
    # A shard that was told of and then cut short by a full disk is made anew.
    torn = folder / "latents-00003.arrayrecord"
    torn.write_bytes(torn.read_bytes()[:-9])
    writers = open_shared(folder, 3)
    assert [shard.number for shard in writers[2].missing()] == [3, 5, 7, 9]
    for process, writer in enumerate(writers):
        write(writer, writer.missing()[process::3])
    again = LatentWriter(folder, INFO, clips=20, clips_per_shard=2)  # nobody gathered: whoever opens it next does
    assert again.missing() == []
    assert contents(folder) == contents(tmp_path / "alone")


def test_a_folder_that_only_the_first_process_sees_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be seen from here: all processes must write to one folder"):
        LatentWriter(tmp_path / "elsewhere", INFO, clips=20, clips_per_shard=2, shared=True, first=False)
    (tmp_path / "latents-00000.json").write_text("{}")
    LatentWriter(tmp_path / "new", INFO, clips=2)
    (tmp_path / "new" / "latents-00000.json").write_text("{}")
    with pytest.raises(UserError, match=r"latents-00000.json tells of no shard of latents .*: delete it"):
        LatentWriter(tmp_path / "new", INFO, clips=2)


# ---------------------------------------------------------------------------------------------------- the real command


def command(model: Path, out: Path) -> list[str]:
    size = ["--frames", "5", "--height", "16", "--width", "16", "--batch-size", "1", "--shard-size", "1"]
    encode = [sys.executable, "-m", "sora_jax", "encode", "world", "--clips", str(CLIPS), "--seed", "3", *size]
    return [*encode, "--autoencoder", str(model), "--out", str(out), "--json"]


def encode(home: Path, model: Path, out: Path, processes: int) -> dict:
    """What the command reports, run to its end in so many processes."""
    local = [str(LOCAL), "--devices", "1", str(processes)]
    done = subprocess.run([*local, *command(model, out)], check=False, env=tiny_run.environment(home),
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("{") == 1, "the first process speaks for all"
    return json.loads(done.stdout)


def told_of(out: Path) -> set[int]:
    """The shards that are finished and not yet in the manifest."""
    return {int(path.stem.removeprefix("latents-")) for path in out.glob("latents-*.json")}


@pytest.mark.pods
def test_a_process_killed_in_the_middle_and_another_number_that_goes_on(tiny_model: Path, tmp_path: Path):
    alone = encode(tmp_path, tiny_model, tmp_path / "alone", 1)
    assert (alone["clips"], alone["made"], alone["programs"]) == (CLIPS, CLIPS, 1)

    for going_on in (1, 3):
        out = tmp_path / f"shared-{going_on}"
        parent = subprocess.Popen([LOCAL, "--devices", "1", "2", *command(tiny_model, out)],
                                  env=tiny_run.environment(tmp_path), stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True)  # fmt: skip
        while parent.poll() is None and not {0, 1} <= {number % 2 for number in told_of(out)}:
            time.sleep(0.002)
        victim = next(pid for pid in descendants(parent.pid)
                      if "encode" in arguments_of(pid) and "JAX_PROCESS_ID=1" in environment_of(pid))  # fmt: skip
        os.kill(victim, signal.SIGKILL)
        _, errors = parent.communicate(timeout=120)
        assert parent.returncode != 0, errors
        told = told_of(out)
        assert 0 < len(told) < CLIPS, "it was in the middle"

        rest = encode(tmp_path, tiny_model, out, going_on)
        assert rest["clips"] == CLIPS
        assert 0 < rest["made"] <= CLIPS - len(told), "what was finished is not made again"
        assert contents(out) == contents(tmp_path / "alone")
        assert [r.source for r in LatentSource(out)] == [f"world/train/3/{i}" for i in range(CLIPS)]
