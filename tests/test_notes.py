"""What a checkpoint says of its data and code, and what becomes of a run when they are not what they were."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting_run import Counting, config_of, stage_of
from PIL import Image
from tiny_run import make_home

from sora_jax.cli import main
from sora_jax.data.latents import LatentSource
from sora_jax.data.sources import FolderSource
from sora_jax.errors import UserError
from sora_jax.training import loop, notes
from sora_jax.training.checkpoint import Checkpoints
from sora_jax.training.loop import train
from sora_jax.training.stage import Context, Stage

CATS = {"folder": "/data/cats", "clips": 12, "bytes": 3456, "sha256": "ab" * 32}

pytestmark = pytest.mark.usefixtures("quick_training")


class Noted(Counting):
    """Batches that write down which of them were taken."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[int] = []

    def __next__(self) -> np.ndarray:
        self.taken.append(self.state()["next"])
        return super().__next__()


def run(workdir: Path, steps: int, data: list[Any], *, force: bool = False) -> tuple[list[int], list[str]]:
    """The batches that were taken, and what was said."""
    batches, said = Noted(), []

    def make(context: Context) -> Stage:
        return dataclasses.replace(stage_of(batches)(context), data=data)

    train(config_of(f"train.steps={steps}"), workdir, force=force, say=said.append, make_stage=make)
    return batches.taken, said


def test_a_run_goes_on_with_the_same_data(tmp_path: Path):
    run(tmp_path, 2, [CATS])
    taken, said = run(tmp_path, 4, [dict(CATS)])
    assert taken == [2, 3]
    assert not [line for line in said if "code" in line]


def test_other_data_is_refused_in_one_line_that_says_what_differs(tmp_path: Path):
    run(tmp_path, 2, [CATS])
    for data, says in (
        ([CATS | {"clips": 13}], "clips: 12 -> 13"),
        ([CATS, CATS], "sources: "),
        ([CATS | {"mix": {"pair": 0.5}}], "mix: null -> "),
    ):
        with pytest.raises(UserError, match=says) as error:
            run(tmp_path, 4, data)
        assert "\n" not in str(error.value)
        assert "--force" in str(error.value)


def test_with_force_other_data_is_begun_from_its_beginning(tmp_path: Path):
    run(tmp_path, 2, [CATS])
    taken, said = run(tmp_path, 4, [CATS | {"clips": 13}], force=True)
    assert taken == [0, 1]
    (line,) = [line for line in said if "clips: 12 -> 13" in line]
    assert "from its beginning" in line


def test_other_code_is_said_in_one_line_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path, 2, [CATS])
    now = notes.code_version()
    monkeypatch.setattr(notes, "code_version", lambda: now | {"jax": "99.1"})
    taken, said = run(tmp_path, 4, [CATS])
    assert taken == [2, 3]
    (line,) = [line for line in said if "other code" in line]
    assert f"jax: {now['jax']} -> 99.1" in line
    assert "flax" not in line


def test_checkpoints_from_before_there_were_notes_of_data_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_notes = notes.make_notes

    def old(*args: Any) -> dict[str, Any]:
        return {name: note for name, note in make_notes(*args).items() if name in ("config", "batches", "averages")}

    monkeypatch.setattr(loop, "make_notes", old)
    run(tmp_path, 2, [CATS])
    taken, said = run(tmp_path, 4, [CATS | {"clips": 13}])
    assert taken == [2, 3]
    assert not [line for line in said if "code" in line]


def test_versions_are_those_that_are_installed(tmp_path: Path):
    """The commit is git's own answer for a checkout, and empty where there is none."""
    code = notes.code_version()
    for package in ("jax", "flax", "optax", "orbax-checkpoint"):
        shown = subprocess.run(
            [sys.executable, "-c", f"import importlib.metadata as m; print(m.version('{package}'))"],
            check=True,
            capture_output=True,
            text=True,
        )
        assert code[package] == shown.stdout.strip()
    checkout = Path(notes.__file__).parents[2]
    if (checkout / ".git").exists():
        head = subprocess.run(
            ["git", "-C", checkout, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        ).stdout
        assert head.startswith(code["commit"].removesuffix("-dirty"))
        assert len(code["commit"]) >= 12


# ------------------------------------------------------------------------------------------------------------ manifests


def test_the_manifest_of_a_cache_counts_its_clips_and_bytes_and_knows_its_shards(tmp_path: Path):
    folder = make_home(tmp_path) / "latents"
    (manifest,) = LatentSource(folder, stop=-4).manifests
    shards = sorted(folder.glob("*.arrayrecord"))
    assert (manifest["clips"], manifest["bytes"]) == (40, sum(path.stat().st_size for path in shards))
    assert manifest["source"] == {"noise": {"seed": 0}}
    assert json.loads(json.dumps(manifest)) == manifest
    shutil.copytree(folder, tmp_path / "copy")
    assert LatentSource(tmp_path / "copy").manifests == [manifest]
    document = json.loads((folder / "manifest.json").read_text())
    document["shards"][1]["count"] -= 1
    (folder / "manifest.json").write_text(json.dumps(document))
    (changed,) = LatentSource(folder).manifests
    assert {name for name in manifest if manifest[name] != changed[name]} == {"clips", "sha256"}


def test_the_manifest_of_a_folder_is_of_its_files_and_not_of_when_they_were_copied(tmp_path: Path):
    def images(folder: Path, shades: list[int]) -> FolderSource:
        folder.mkdir(exist_ok=True)
        for index, shade in enumerate(shades):
            Image.new("RGB", (16, 16 + shade), (shade,) * 3).save(folder / f"{index}.png")
        return FolderSource(str(folder), frames=1, height=16, width=16, captions=False)

    source = images(tmp_path / "a", [1, 2, 3])
    manifest = source.manifest
    files = list((tmp_path / "a").iterdir())
    assert (manifest["clips"], manifest["bytes"]) == (3, sum(path.stat().st_size for path in files))
    for path in files:
        os.utime(path, (0, 0))
    assert FolderSource(str(tmp_path / "a"), frames=1, height=16, width=16, captions=False).manifest == manifest
    (tmp_path / "a" / "1.png").write_bytes((tmp_path / "a" / "1.png").read_bytes() + b"\0")
    grown = FolderSource(str(tmp_path / "a"), frames=1, height=16, width=16, captions=False).manifest
    assert {name for name in manifest if manifest[name] != grown[name]} == {"bytes", "sha256"}


# ------------------------------------------------------------------------------------------------------------- ls


def test_ls_says_when_by_which_code_and_on_which_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path, 2, [CATS])
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    saved = checkpoints.notes(2)
    checkpoints.close()
    capsys.readouterr()
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split()[0] == "2"
    for part in (saved["saved"], saved["code"]["sora_jax"], saved["code"]["commit"], "/data/cats, 12 clips"):
        assert part in line
    assert main(["checkpoint", "ls", str(tmp_path), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (entry["data"], entry["code"]) == ([CATS], saved["code"])
    for path in (tmp_path / "checkpoints" / "2" / "notes").iterdir():
        path.write_text("{")
    assert main(["checkpoint", "ls", str(tmp_path)]) == 0  # whatever is left is listed
