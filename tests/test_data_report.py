"""`sora-jax data report`: what it says of caches and folders whose content is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_jax import cli
from sora_jax.data.latents import BadRecordError, CacheInfo, LatentRecord, LatentSource, LatentWriter

CONFIG = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.transformer = {"n_layers": 1, "n_heads": 1, "head_dim": 8, "ffn_dim": 16, "patch": (1, 1, 1)}
    config.data = {"held_out": 4, "row_tokens": 24, "row_text": 40, "groups": 24, "image_share": 0.0,
                   "caption_dropout": 0.0, "autoencoder": AUTOENCODER, "frames": 5, "height": 16, "width": 16}
    config.train = {"batch_size": 2}
    return config
"""


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = cli.main(["data", "report", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> Path:
    (tmp_path / "tiny.py").write_text(CONFIG.replace("AUTOENCODER", repr(str(tiny_model))))
    return tmp_path


def make_cache(folder: Path, count: int = 84) -> Path:
    """In turn clips of 4, 8 and 12 tokens and captions of 8 ids; one of 28 tokens, and the 21st could not be read."""
    writer = LatentWriter(folder, CacheInfo("noise", "0", (4, 16, 16), 2, {"noise": 0}), clips=count + 1)
    (shard,) = writer.missing()
    with writer.shard(shard) as out:
        for index in range(count + 1):
            if index == 20:
                out.skip("b.mp4: torn")
                continue
            frames = 7 if index == 30 else 1 + index % 3
            latents = np.zeros((frames, 2, 2, 2), np.float16)
            out.add(LatentRecord(latents, (f"clip {index:02}",), (), 8.0, str(index), (4 * frames - 3, 32, 32)))
    return folder


def test_report_of_a_cache(capsys, home: Path):
    make_cache(home / "latents")
    code, out, err = run(capsys, home / "latents", "--config", home / "tiny.py", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["clips"] == 80  # and 4 held out
    assert report["shapes"] == {"2x2x2": 27, "1x2x2": 26, "3x2x2": 26, "7x2x2": 1}
    assert report["left_out"]["unreadable when encoded"] == 1
    assert report["left_out"]["clip too long"] == pytest.approx(1, rel=0.5)
    assert report["ends_the_run"] == ["clip too long"]
    assert report["examples"]["unreadable when encoded"] == ["b.mp4: torn"]
    # Rows of 24 tokens are filled without a rest by 4, 8 and 12, unless five captions of 8 ids are there before.
    assert 0.95 < report["fill_tokens"] <= 1
    assert 0 <= report["imbalance_mean"] <= report["imbalance_max"]
    # 79 clips of 8 tokens in the mean, in steps of 48
    assert report["steps_per_epoch"] * report["clips_per_step"] == pytest.approx(79, rel=0.02)
    assert report["steps_per_epoch"] == pytest.approx(79 * 8 / 48, rel=0.06)
    assert report["fill_text"] == pytest.approx(report["clips_per_step"] * 8 / 80)
    assert (report["row"], report["rows"], report["shards"], report["programs"]) == ([24, 40, 24], 2, 2, 1)

    skipping = ("--config.data.skip_misfits=True", "--config.data.packing=buckets")
    code, out, err = run(capsys, home / "latents", "--config", home / "tiny.py", "--shards", 1, *skipping)
    assert code == 0, err
    assert "80 clips an epoch" in out
    assert "1 clip too long\n" in out
    assert "0.0% of a step's mean cost over 1 devices" in out
    assert "is what fills rows first" not in out
    # Rows with room for one caption hold one clip, of 8 tokens in the mean: a third of 24.
    code, out, err = run(capsys, home / "latents", "--config", home / "tiny.py", "--config.data.row_text=8")
    assert "data.row_text is what fills rows first: about 24 would let tokens fill them" in out
    assert "26 3x2x2" in out


def unreadable(source: LatentSource) -> bool:
    try:
        return len(list(source)) != len(source)
    except BadRecordError:
        return True


def test_report_finds_what_has_rotted(capsys, home: Path):
    cache = make_cache(home / "latents")
    path = cache / "latents-00000.arrayrecord"
    whole = path.read_bytes()
    for position in range(1000, len(whole)):  # some bytes are padding
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        if unreadable(LatentSource(cache)):
            break
    reports = []
    for flags in ((), ("--read",)):
        code, out, err = run(capsys, cache, "--config", home / "tiny.py", "--json", *flags)
        assert code == 0, err
        reports.append(json.loads(out))
    assert "corrupt" not in reports[0]["left_out"]
    assert reports[1]["left_out"]["corrupt"] == 1
    assert "latents-00000.arrayrecord, record" in reports[1]["examples"]["corrupt"][0]
    assert reports[1]["clips"] == 79


def test_report_of_a_folder_before_it_is_encoded(capsys, home: Path):
    (home / "mine").mkdir()
    for index in range(21):
        Image.fromarray(np.full((20, 30, 3), 10 * index, np.uint8)).save(home / f"mine/{index:02}.png")
        (home / f"mine/{index:02}.txt").write_text("x" * 50 if index == 3 else "grey")
    code, out, err = run(capsys, home / "mine", "--config", home / "tiny.py", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["shapes"] == {"1x2x2": 21}  # 8 x 8 pixels a latent
    assert report["clips"] == 21
    assert report["left_out"] == {"caption too long": pytest.approx(1, rel=0.2)}
    assert report["ends_the_run"] == ["caption too long"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere is neither a latent cache nor a folder of videos"),
        (["world"], "sora-jax encode world --clips 1000 --out DIR"),
        (["latents", "--shards", "3"], "train.batch_size 2 cannot be split over 3 devices"),
        (["latents", "--shards", "0"], "--shards must be >= 1, not 0"),
        (["latents", "--config.data.packing=boxes"], "\"data.packing\" cannot be 'boxes'"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, home: Path, argv, message):
    monkeypatch.chdir(home)
    code, out, err = run(capsys, *argv, "--config", "tiny.py")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert cli.main(["data", "rapport", "x"]) == 2
    assert 'unknown action "rapport": did you mean "report"?' in capsys.readouterr().err
