"""A cache with holes is read around, within reason; other data or another config than a run began with is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_run
from tiny_run import finish, lines, start

from sora_jax.data.latents import BadRecordError, LatentSource
from sora_jax.data.loader import make_loader
from sora_jax.errors import UserError
from sora_jax.models.tokenizer import ByteTokenizer

pytestmark = pytest.mark.faults
CLIPS = 40
ROWS = {"tokenize": ByteTokenizer().encode, "rows": 2, "row_tokens": 24, "row_text": 24}


@pytest.fixture
def cache(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "latents", tmp_path / "latents"))


def corrupt(cache: Path, shards: int) -> list[str]:
    """Flip one byte of a record in each of the first `shards` files; which records cannot be read then."""
    for file in sorted(cache.glob("*.arrayrecord"))[:shards]:
        data = bytearray(file.read_bytes())
        data[data.index(b"clip ") + 7] ^= 16
        file.write_bytes(data)
    source = LatentSource(cache)
    broken = []
    for index in range(len(source)):
        try:
            source[index]
        except BadRecordError:
            broken.append(str(index))
    return broken


def test_a_corrupt_record_is_left_out_and_counted(cache: Path):
    broken = corrupt(cache, 1)
    assert len(broken) == 1
    with make_loader(LatentSource(cache), epochs=1, **ROWS) as batches:
        texts = b"".join(bytes(int(i) - 3 for i in batch["text_tokens"].ravel() if i > 2) for batch in batches)
        assert batches.stats.bad_records == 1
    missing = [index for index in range(CLIPS) if f"clip {index}clip".encode() not in texts + b"clip"]
    assert [str(index) for index in missing] == broken


def test_too_many_corrupt_records_are_refused(cache: Path):
    assert len(corrupt(cache, 3)) == 3  # of 40: more than 5 %
    with (
        make_loader(LatentSource(cache), epochs=1, **ROWS) as batches,
        pytest.raises(UserError, match=r"^3 of \d+ records could not be read, more than 5% allow[^\n]*$"),
    ):
        list(batches)


@pytest.mark.slow
def test_a_run_says_what_it_leaves_out(home: Path, cache: Path, tmp_path: Path):
    assert len(corrupt(cache, 1)) == 1
    said = finish(start(home, tmp_path / "run", f"--config.data.latents={cache}"))
    assert said.count("1 records of the latent cache cannot be read and are left out") == 1
    assert len(lines(tmp_path / "run")) == tiny_run.STEPS


@pytest.mark.slow
def test_another_config_or_other_data_is_refused_in_one_line(home: Path, cache: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    more = f"--config.data.latents={cache}"
    finish(start(home, workdir, more, "--config.train.steps=3"))

    line = finish(start(home, workdir, more, "--config.optimizer.b2=0.5"), 2).splitlines()[-1]
    assert line.startswith("sora-jax: error: ")
    assert "optimizer.b2: 0.99 -> 0.5" in line
    assert "--force" in line

    shutil.rmtree(cache)
    tiny_run.make_cache(cache, clips=CLIPS + 8)
    line = finish(start(home, workdir, more), 2).splitlines()[-1]
    assert line.startswith("sora-jax: error: ")
    assert "40" in line or "36" in line
    assert "48" in line or "44" in line
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3], "nothing was trained"
