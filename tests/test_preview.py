"""`sora-jax data preview`: the sheet that it draws, and the words with which it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sora_jax import cli
from sora_jax.data import world
from sora_jax.media import read_media
from sora_jax.sheet import Strip, chosen, contact_sheet


def test_a_sheet_shows_the_clips_of_the_config(tmp_path: Path, capsys):
    out = tmp_path / "sheet.png"
    flags = ["--n", "2", "--columns", "4", "--height", "48", "--width", "64", "--seed", "5"]
    assert cli.main(["data", "preview", "world", "--sheet", str(out), *flags, "--config.data.mix.floating=1"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    picture = read_media(out).frames[0]
    # frames 0, 5, 11 and 16 of both clips, enlarged by 2 (96 of about 120 pixels), side by side
    mix = world.Mix(single=0.28, pair=0.47, collision=0.15, floating=1.0)
    clips = world.render(world.sample_scenes(5, 2, height=48, width=64, mix=mix))
    for clip in clips:
        for t in (0, 5, 11, 16):
            assert holds(picture, clip[t].repeat(2, 0).repeat(2, 1))


def holds(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether a picture holds another one, pixel by pixel."""
    height, width = part.shape[:2]
    first = (picture[: 1 - height, : 1 - width] == part[0, 0]).all(-1)
    return any((picture[y : y + height, x : x + width] == part).all() for y, x in zip(*np.nonzero(first), strict=True))


def test_cuts_and_stills(tmp_path: Path):
    for flags in (["--shots", "9,5"], ["--frames", "1"]):
        out = tmp_path / "sheet.png"
        assert cli.main(["data", "preview", "world", "--sheet", str(out), "--n", "3", *flags]) == 0
        assert out.stat().st_size > 1000


def test_frames_are_shown_evenly():
    assert [pick.tolist() for pick in chosen([17], 5)] == [[0, 4, 8, 12, 16]]
    assert [pick.tolist() for pick in chosen([9, 9], 6)] == [[0, 4, 8], [0, 4, 8]]
    assert [pick.tolist() for pick in chosen([1], 9)] == [[0]]
    assert [len(pick) for pick in chosen([33, 1], 4)] == [4, 1]


def test_captions_are_written_beneath():
    frames = np.full((3, 64, 64, 3), 200, np.uint8)
    with_words, without = (contact_sheet([Strip([(frames, text)])], columns=3) for text in ("a red ball bounces", ""))
    assert with_words.shape == without.shape
    changed = np.argwhere((with_words != without).any(-1))
    assert len(changed) > 50
    assert changed[:, 0].min() > 28 + 128  # under the frames


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["preview", "world"], "preview needs --sheet OUT.png"),
        (["preview", "world", "--sheet", "x.jpg"], "preview needs --sheet OUT.png, not x.jpg"),
        (["preview", "mine", "--sheet", "x.png"], 'only the world can be previewed, not "mine"'),
        (["preview", "world", "--sheet", "x.png", "--n", "0"], "--n must be in 1 to 100, not 0"),
        (["preview", "world", "--sheet", "x.png", "--shots", "9;9"], "--shots takes numbers of frames, say 9,9"),
        (["preview", "world", "--sheet", "x.png", "--shots", "9,9", "--frames", "9"], "leave --frames out"),
        (["preview", "world", "--sheet", "x.png", "--split", "held-out"], 'did you mean "heldout"'),
        (["preview", "world", "--sheet", "x.png", "--height", "8"], "at least 1 frame and 16 pixels"),
        (["preview", "world", "--sheet", "x.png", "--read"], "--read is not for data preview"),
        (["report", "world", "--sheet", "x.png"], "--sheet is not for data report"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
