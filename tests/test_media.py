"""Files out and in: what is written is what was asked for, carries its record, and appears whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest

from sora_jax import media
from sora_jax.errors import UserError
from sora_jax.media import check_writable, media_bytes, read_media, write_media
from sora_jax.record import GENERATED, Record

RECORD = Record(
    prompt='a "red" ball, rødt;\nbounces = twice',
    seed=2**40 + 1,
    model="world-1",
    negative_prompt="blur",
    frames=17,
    height=32,
    width=48,
    steps=30,
    guidance=4.5,
    solver="unipc",
    shift=1.0,
    given={"image": "first.png"},
    extra={"watermark": "none"},
)


def clip(frames: int = 17, height: int = 32, width: int = 48) -> np.ndarray:
    """A red ball that moves over a blue gradient, anti-aliased, as uint8 [T, H, W, 3]; it rests in the last frames."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    ground = np.stack([20 + 0 * x, 60 + y, 150 + 2 * x], axis=-1)
    out = []
    for t in range(frames):
        inside = np.clip(8 - np.hypot(y - height / 2, x - 8 - 2.3 * min(t, 12)), 0, 1)[..., None]
        out.append(inside * np.array([220, 40, 30]) + (1 - inside) * ground)
    return np.stack(out).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.webm", "a.gif", "a.npy", "frames", "A.MP4"])
def test_round_trip(tmp_path, name):
    frames = clip()
    write_media(frames, tmp_path / name, RECORD, fps=8, scale=2)
    back = read_media(tmp_path / name)
    assert back.frames.dtype == np.uint8
    assert back.frames.shape == (17, 64, 96, 3)
    assert back.fps == 8
    assert back.record == dataclasses.replace(RECORD, fps=8)
    # What is shown enlarged is every pixel as a 2x2 block; lossy codecs stay close to it.
    enlarged = np.kron(frames, np.ones((1, 2, 2, 1), np.uint8))
    assert psnr(back.frames, enlarged) > 35


def test_one_frame_is_a_lossless_png(tmp_path):
    frames = clip(1)
    write_media(frames, tmp_path / "a.png", RECORD)
    back = read_media(tmp_path / "a.png")
    np.testing.assert_array_equal(back.frames, frames)
    assert back.record is not None
    assert back.record.prompt == RECORD.prompt


@pytest.mark.parametrize("fps", [1, 8, 12.5, 23.976, 60])
def test_frame_rate_survives(tmp_path, fps):
    write_media(clip(5), tmp_path / "a.mp4", RECORD, fps=fps)
    back = read_media(tmp_path / "a.mp4")
    assert back.fps == pytest.approx(fps, rel=1e-4)
    assert len(back.frames) == 5


def test_gif_lasts_as_long_as_the_clip(tmp_path):
    from PIL import Image, ImageSequence

    write_media(clip(17), tmp_path / "a.gif", RECORD, fps=8)
    with Image.open(tmp_path / "a.gif") as picture:
        total = sum(frame.info["duration"] for frame in ImageSequence.Iterator(picture))
    assert total == pytest.approx(1000 * 17 / 8, abs=10)


def test_floats_are_the_same_as_their_bytes(tmp_path):
    frames = clip(5)
    write_media(frames.astype(np.float32) / 255, tmp_path / "a.npy", RECORD)
    np.testing.assert_array_equal(read_media(tmp_path / "a.npy").frames, frames)


def test_odd_sizes_keep_their_size_and_say_what_that_costs(tmp_path):
    frames = clip(5, 31, 45)
    with pytest.warns(UserWarning, match="45x31 is odd.*4:4:4"):
        write_media(frames, tmp_path / "a.mp4", RECORD)
    back = read_media(tmp_path / "a.mp4")
    assert back.frames.shape == frames.shape
    assert psnr(back.frames, frames) > 35


def test_the_file_says_that_a_model_made_it(tmp_path):
    import av

    write_media(clip(5), tmp_path / "a.mp4", RECORD)
    with av.open(str(tmp_path / "a.mp4")) as container:
        tags = dict(container.metadata)
    assert tags["title"] == RECORD.prompt
    assert json.loads(tags["comment"])["digital_source_type"] == GENERATED
    assert "trainedAlgorithmicMedia" in tags["description"]


def test_a_comment_of_another_program_is_no_record():
    assert Record.from_json("made with love") is None
    assert Record.from_json('{"prompt": "x"}') is None
    assert Record.from_json("[1]") is None


def test_fields_of_a_later_version_are_kept():
    later = json.loads(RECORD.to_json()) | {"storyboard": ["a", "b"]}
    record = Record.from_json(json.dumps(later))
    assert record is not None
    assert record.extra["storyboard"] == ["a", "b"]
    assert record.prompt == RECORD.prompt


def test_bytes_are_the_file(tmp_path):
    data = media_bytes(clip(5), ".gif", RECORD)
    (tmp_path / "a.gif").write_bytes(data)
    assert len(read_media(tmp_path / "a.gif").frames) == 5


# What cannot be written


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (clip(5).astype(np.float32) / 127.5 - 1, r"must lie in \[0, 1\]"),
        (np.full((1, 8, 8, 3), np.nan, np.float32), r"must lie in \[0, 1\]"),
        (clip(5).astype(np.int32), "uint8 or floats"),
        (np.zeros((5, 8, 8), np.uint8), r"\[T, H, W, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"\[T, H, W, 3\]"),
    ],
)
def test_wrong_frames_are_refused(tmp_path, frames, message):
    with pytest.raises(UserError, match=message):
        write_media(frames, tmp_path / "a.mp4", RECORD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": float("nan")}, {"scale": 0}, {"scale": 10**6}])
def test_wrong_options_are_refused(tmp_path, options):
    with pytest.raises(UserError):
        write_media(clip(5), tmp_path / "a.mp4", RECORD, **options)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_paths_are_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("x")
    (tmp_path / "old.mp4").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for name, message in [
        ("a.mp5", r'unknown file type "\.mp5"; did you mean "\.mp4"'),
        ("file/a.mp4", "is no folder"),
        ("folder.mp4", "is a folder"),
        ("file", "is a file"),
        ("photos", "other things in it"),
        ("a.png", "one frame, not 17"),
        (".mp4", r"without a name; use video\.mp4"),
    ]:
        with pytest.raises(UserError, match=message):
            check_writable(tmp_path / name, frames=17)
    with pytest.raises(UserError, match="exists; --force"):
        check_writable(tmp_path / "old.mp4", overwrite=False)
    check_writable(tmp_path / "new" / "deeper" / "a.mp4", frames=17)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission_is_found_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.npy", "frames"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_write_that_is_cut_short_leaves_what_was_there(tmp_path, monkeypatch, name, stop):
    write_media(clip(5), tmp_path / name, RECORD)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(source: object, target: object) -> None:
        raise stop

    monkeypatch.setattr(media.os, "replace", fail)  # the last moment before the new file takes its place
    with pytest.raises(stop):
        write_media(clip(9), tmp_path / name, RECORD)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(media.np, "save", fail)
    with pytest.raises(UserError, match="a.npy cannot be written: No space left on device"):
        write_media(clip(5), tmp_path / "a.npy", RECORD)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_frames_is_replaced_whole(tmp_path):
    write_media(clip(9), tmp_path / "frames", RECORD)
    write_media(clip(5), tmp_path / "frames", RECORD)
    assert len(read_media(tmp_path / "frames").frames) == 5


# What cannot be read


@pytest.fixture
def broken(tmp_path):
    """One file of each kind of damage."""
    write_media(clip(), tmp_path / "good.mp4", RECORD)
    data = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "head.mp4").write_bytes(data[:100])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "garbage.png").write_bytes(np.random.default_rng(0).bytes(5000))
    write_media(clip(1), tmp_path / "good.png", RECORD)
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) * 3 // 4])
    (tmp_path / "garbage.npy").write_bytes(b"\x93NUMPY garbage")
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "flat.npy", np.zeros((4, 4), np.uint8))
    (tmp_path / "none").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "nosuffix").write_text("hello")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half.mp4", "truncated"),
        ("head.mp4", "truncated"),
        ("empty.mp4", "is empty"),
        ("garbage.mp4", "not a video"),
        ("garbage.png", "not a picture"),
        ("half.png", "truncated"),
        ("garbage.npy", "not a NumPy array"),
        ("pickled.npy", "not a NumPy array"),
        ("flat.npy", "must be"),
        ("none", "without PNG files"),
        ("text.txt", 'unknown file type ".txt"'),
        ("nosuffix", "without a suffix"),
        ("god.mp4", 'does not exist; did you mean "good.mp4"?'),
        ("nowhere/a.mp4", "does not exist"),
    ],
)
def test_unreadable_files_are_one_line(broken, name, message):
    with pytest.raises(UserError) as caught:
        read_media(broken / name)
    text = str(caught.value)
    assert message in text
    assert name in text
    assert "\n" not in text
