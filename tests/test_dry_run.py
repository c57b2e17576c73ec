"""`train --dry-run`: what a run would be made of, against counts by hand, and without a trace on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run

from sora_jax import cli

# tiny_run's text encoder: embeddings, a layer's q, k, v, o, its relative positions (32 buckets for 2 heads), a gated
# MLP of 8, and two norms of the layer and one at the end.
TEXT_ENCODER = 384 * 8 + 4 * 8 * (2 * 4) + 32 * 2 + 3 * 8 * 8 + 2 * 8 + 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_home(tmp_path_factory.mktemp("dry"))


def dry_run(capsys, home: Path, *more: str) -> tuple[int, str, str]:
    argv = ["train", "--dry-run", "--config", str(home / "tiny.py"), "--workdir", str(home / "run"), *more]
    code = cli.main([*argv, "--config.train.mesh.data=2", "--config.train.mesh.fsdp=4", "--config.train.batch_size=8"])
    out, err = capsys.readouterr()
    return code, out, err


def parts(counts: dict[str, int], module: str) -> int:
    return sum(n for name, n in counts.items() if name.split(".")[0] == module)


def test_the_document_says_what_a_run_would_be_made_of(capsys, home: Path):
    code, out, err = dry_run(capsys, home, f"--config.data.latents={home / 'latents'}", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
    assert found["config"]["transformer"]["head_dim"] == 8
    assert found["config"]["train"]["keep"] == 3  # a default
    assert parts(found["parameters"], "text_encoder") == TEXT_ENCODER
    # 8 rows of 24 tokens with 2 channels, 6 noise levels and 24 text tokens
    assert found["batch"]["tokens"] == ["float32", [8, 24, 2]]
    assert found["batch"]["positions"][1] == [8, 24, 3]
    assert found["batch"]["group_segment"][1] == [8, 6]
    assert found["batch"]["text_ids"][1] == [8, 24]
    total = sum(found["parameters"].values())
    memory = found["memory"]
    # float32, and most of it cut over 4 devices
    assert total < memory["weights"] < 2 * total
    assert memory["average"] == memory["weights"]
    assert found["peak_bytes"] > sum(memory.values())
    assert not (home / "run").exists()


def test_latents_that_are_yet_to_be_made_are_not_made(capsys, home: Path):
    code, out, err = dry_run(capsys, home)
    assert code == 0, err
    assert "mesh: data=2, fsdp=4, tensor=1, sequence=1 (8 devices)" in out
    assert f"{TEXT_ENCODER:,}" not in out.split("parameters that learn")[0]
    assert f"100000 clips of the world would first be encoded into {home / 'run' / 'latents'}" in out
    assert "[8, 24, 2]" in out
    assert not (home / "run").exists()


def test_what_a_run_would_refuse_is_refused(capsys, home: Path):
    code, out, err = dry_run(capsys, home, "--config.train.batch_size=9", "--config.data.latents=/nothing/there")
    assert (code, out) == (2, "")
    assert "/nothing/there" in err.splitlines()[-1]
    assert not (home / "run").exists()


def test_so_is_a_place_that_a_run_cannot_have(capsys, monkeypatch, home: Path, tmp_path: Path):
    """Before anything is made, and the same by `train`; "" would be the folder that one happens to be in."""
    monkeypatch.chdir(tmp_path)
    config = ["--config", str(home / "tiny.py"), f"--config.data.latents={home / 'latents'}"]
    for more, says in (
        (["--workdir", ""], 'a run needs a workdir, and "" names none'),
        (["--workdir", "s3://bucket/run"], "checkpoints go to a folder or to gs://"),
        (["--workdir", "run", "--profile", "20:9"], "--profile 20:9 ends with step 28, and the run with step 24"),
    ):
        for dry in (["--dry-run"], []):
            assert cli.main(["train", *config, *more, *dry]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert says in err.splitlines()[-1]
    assert cli.main(["checkpoint", "ls", "s3://bucket/run"]) == 2
    assert "checkpoints go to a folder or to gs://" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_other_stages_too(capsys, tmp_path: Path):
    for stage, field, shape in (("world_text", "text_tokens", 128), ("world_autoencoder", "clips", 3)):
        argv = ["train", "--dry-run", "--json", "--config", stage, "--workdir", str(tmp_path / "run")]
        code = cli.main([*argv, "--config.train.batch_size=8"])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert json.loads(out)["batch"][field][1][-1] == shape
    assert not (tmp_path / "run").exists()
