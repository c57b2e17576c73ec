"""A folder of one's own: the right frames at the right times, undistorted, and clear words about the rest."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from sora_jax.data.captions import read_folder
from sora_jax.data.clips import Window, windows
from sora_jax.data.sources import FolderSource, WorldClips
from sora_jax.data.video_io import UnreadableError, count_frames, fit, probe, read_image, read_video
from sora_jax.data.world import WorldSource
from sora_jax.errors import UserError

CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4"}
LOSSLESS = {"libx264": {"qp": "0"}, "libvpx-vp9": {"lossless": "1"}, "mpeg4": {"qmin": "1", "qmax": "1"}}


def write_video(path, frames, rate=24, times=None, codec=None, aspect=None, gop=12, options=None):
    """Frames [T, H, W, 3]; `times` in milliseconds instead of a constant rate."""
    codec = codec or CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or LOSSLESS[codec])
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        stream.codec_context.gop_size = gop
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = index if times is None else times[index]
            frame.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def numbered(count, height=32, width=48):
    """Frames whose brightness is their number: 16 + 4 i (the range that 4:2:0 video keeps exactly)."""
    return np.stack([np.full((height, width, 3), 16 + 4 * index, np.uint8) for index in range(count)])


def numbers(frames):
    return np.round((frames.astype(float).mean(axis=(1, 2, 3)) - 16) / 4).astype(int).tolist()


def read(path, fps, start=0, count=None):
    timing, rate = probe(path), Fraction(fps)
    count = count_frames(timing, rate) - start if count is None else count
    return numbers(read_video(path, timing, [(start + i) / rate for i in range(count)], height=32, width=48))


# ---------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize(("rate", "fps"), [(24, 8), (24, 24), (30, 8), (25, 10), (12, 24), (24, 16)])
def test_resampling_takes_the_frame_at_or_before(tmp_path, suffix, rate, fps):
    path = tmp_path / f"a{suffix}"
    write_video(path, numbered(30), rate)
    assert read(path, fps) == [j * rate // fps for j in range(-(-30 * fps // rate))]


def test_avi_with_reordered_frames(tmp_path):
    path = tmp_path / "a.avi"
    write_video(path, numbered(30, 64, 96), 24, codec="libx264", gop=250, options={"crf": "23"})
    with av.open(str(path)) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert stamps != sorted(stamps), "the case that matters is here"
    assert read(path, 8) == list(range(0, 30, 3))
    assert read(path, 8, start=4, count=3) == [12, 15, 18]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_timestamps_count_and_not_the_rate(tmp_path, suffix):
    times = [0, 40, 400, 440, 480, 900, 1000, 1100]  # a phone's video: uneven
    path = tmp_path / f"a{suffix}"
    write_video(path, numbered(8), times=times)
    expected = [max(i for i, t in enumerate(times) if t <= 125 * j) for j in range(9)]
    assert read(path, 8)[:9] == expected == [0, 1, 1, 1, 4, 4, 4, 4, 6]


@pytest.mark.parametrize("suffix", CODECS)
def test_windows_in_the_middle_are_those_of_the_whole(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_video(path, numbered(50, 32, 48), 24, gop=7)
    whole = read(path, 12)
    assert len(whole) == 25
    for start in (0, 5, 13, 20):
        assert read(path, 12, start, count=5) == whole[start : start + 5]


def test_gif(tmp_path):
    path = tmp_path / "a.gif"
    frames = [Image.fromarray(frame) for frame in numbered(6)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[120, 130] * 3)
    assert read(path, 8) == [0, 1, 2, 3, 4, 5]
    assert read(path, 4) == [0, 2, 4]


def test_windows_are_of_1_plus_4k_frames_and_never_padded():
    assert windows(42, 17) == [Window(0, 17), Window(17, 17), Window(34, 5)]
    for count in range(80):
        cut = windows(count, 9)
        assert all(w.length % 4 == 1 and w.length >= 5 for w in cut)
        assert [w.length for w in cut[:-1]] == [9] * (len(cut) - 1)
        ends = [0, *(w.start + w.length for w in cut)]
        assert [w.start for w in cut] == ends[:-1]
        assert 0 <= count - ends[-1] <= 4


# --------------------------------------------------------------------------------------------------------------- space


def scene(height=48, width=80):
    """Black, a red square of 16 x 16 in the middle and a white one of 8 x 8 in the upper left corner."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[height // 2 - 8 : height // 2 + 8, width // 2 - 8 : width // 2 + 8] = (255, 0, 0)
    frame[:8, :8] = 255
    return frame


def red_extent(frame):
    """(top, bottom, left, right) of the red square: the weighted area where red outweighs blue."""
    red = (frame[..., 0].astype(float) - frame[..., 2]) / 255
    rows, columns = red.max(axis=1), red.max(axis=0)
    return (
        float(rows.sum()),
        float(columns.sum()),
        *(float((line * np.arange(len(line))).sum() / line.sum()) for line in (rows, columns)),
    )


@pytest.mark.parametrize(("height", "width"), [(48, 80), (24, 40), (24, 24), (24, 16), (12, 40), (96, 96)])
def test_fit_keeps_shapes_and_centre(height, width):
    frame = fit(scene(), height, width)
    assert frame.shape == (height, width, 3)
    scale = max(height / 48, width / 80)
    tall, wide, row, column = red_extent(frame)
    assert tall == pytest.approx(wide, rel=0.06)
    assert tall == pytest.approx(16 * scale, rel=0.06)
    assert (row, column) == (pytest.approx((height - 1) / 2, abs=0.2), pytest.approx((width - 1) / 2, abs=0.2))


def test_fit_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(fit(scene(), 48, 80), scene())


def test_pixels_that_are_not_square(tmp_path):
    """A DV camera's video: 40 stored columns shown as 80."""
    squeezed = fit(scene(), 48, 40, Fraction(1, 2))
    np.testing.assert_allclose(red_extent(squeezed)[:2], [16, 8], rtol=0.1)
    path = tmp_path / "a.mp4"
    write_video(path, np.stack([squeezed] * 12), aspect=Fraction(2))
    frame = read_video(path, probe(path), [Fraction(0)], height=48, width=80)[0]
    tall, wide, *_ = red_extent(frame)
    assert tall == pytest.approx(wide, rel=0.1)


def test_video_of_a_phone_held_upright(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, np.stack([scene()] * 12))
    data = bytearray(path.read_bytes())
    # The matrix of the track header (ISO 14496-12, 8.3.2): x' = a x + c y + tx, y' = b x + d y. A quarter turn
    # clockwise moves the upper left corner (0, 0) to the upper right.
    matrix = data.index(b"tkhd") + 4 + 40
    for place, value in zip(range(9), (0, 1, 0, -1, 0, 0, 48, 0, 16384), strict=True):
        start = matrix + 4 * place
        data[start : start + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    frame = read_video(path, probe(path), [Fraction(0)], height=80, width=48)[0]
    assert frame[2:6, -6:-2].min() > 200, "white in the upper right corner"
    assert frame[2:6, 2:6].max() < 60
    assert frame[-6:-2].max() < 60


def test_images_are_upright_and_opaque(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: the camera asks to be turned clockwise
    Image.fromarray(scene()).save(tmp_path / "a.png", exif=exif)
    frame = read_image(tmp_path / "a.png", height=80, width=48)
    assert frame.shape == (1, 80, 48, 3)
    np.testing.assert_array_equal(frame[0], np.rot90(scene(), -1))
    glass = np.zeros((8, 8, 4), np.uint8)
    Image.fromarray(glass).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png", height=4, width=4).min() == 255
    Image.fromarray(np.full((9, 9), 77, np.uint8)).save(tmp_path / "c.jpg")
    np.testing.assert_allclose(read_image(tmp_path / "c.jpg", height=4, width=4), 77, atol=1)


# -------------------------------------------------------------------------------------------------------------- folder


@pytest.fixture
def folder(tmp_path):
    """Two videos and an image, captions beside them."""
    (tmp_path / "cats").mkdir()
    write_video(tmp_path / "cats/b.mp4", numbered(50), 24)
    write_video(tmp_path / "a.webm", numbered(30), 12)
    Image.fromarray(scene()).save(tmp_path / "c.PNG")
    (tmp_path / "cats/b.txt").write_text("a cat\n\n  a small cat  \n")
    (tmp_path / "a.txt").write_text("un chien\n")
    (tmp_path / "c.txt").write_text("a square")
    return tmp_path


def test_folder_gives_clips_with_captions(folder):
    source = FolderSource(folder, fps=8, frames=9, height=16, width=16)
    # a.webm: 20 frames at 8 fps; cats/b.mp4: 17 frames
    assert [source[i]["source"] for i in range(len(source))] == [
        "a.webm@0", "a.webm@9", "c.PNG", "cats/b.mp4@0", "cats/b.mp4@9",
    ]  # fmt: skip
    items = source.batch(range(len(source)))
    assert [len(item["frames"]) for item in items] == [9, 9, 1, 9, 5]
    assert all(item["frames"].shape[1:] == (16, 16, 3) and item["frames"].dtype == np.uint8 for item in items)
    assert numbers(items[1]["frames"]) == [j * 12 // 8 for j in range(9, 18)]
    assert numbers(items[4]["frames"]) == [3 * j for j in range(9, 14)]
    assert [item["captions"] for item in items] == [["un chien"]] * 2 + [["a square"]] + [["a cat", "a small cat"]] * 2
    assert [item["captions_image"] for item in items] == [[], [], ["a square"], [], []]
    assert source.unreadable == source.too_short == []


def test_metadata_table(folder):
    (folder / "metadata.csv").write_text(
        "\ufeffpath, text,num_frames,height,width,aspect_ratio,resolution,fps\n"
        'cats/b.mp4,"a cat, asleep",50,32,48,0.66,1536,24\n'
        "c.PNG,a square,1,48,80,0.6,3840,\n"
        "cats/b.mp4,a cat sleeps,50,32,48,0.66,1536,24\n",
        encoding="utf-8",
    )
    found = read_folder(folder)
    assert [(media.name, media.captions) for media in found] == [
        ("cats/b.mp4", ("a cat, asleep", "a cat sleeps")),
        ("c.PNG", ("a square",)),
    ]
    assert len(FolderSource(folder, frames=17, height=16, width=16)) == 2


def test_identity_tells_sources_apart(folder):
    def identity(**options):
        return FolderSource(folder, height=16, width=16, **options).identity

    assert identity() == identity()
    assert identity() != identity(fps=4)
    before = identity()
    (folder / "a.txt").write_text("ein Hund")
    assert identity() != before


def test_too_short_videos_are_listed(folder):
    write_video(folder / "d.mp4", numbered(12), 24)  # 4 frames at 8 fps
    (folder / "d.txt").write_text("short")
    source = FolderSource(folder, fps=8, frames=9, height=16, width=16)
    assert source.too_short == ["d.mp4"]
    assert len(source) == 5
    (folder / "metadata.csv").write_text("path,text\nd.mp4,short\n")
    with pytest.raises(UserError, match="no video in .* is as long as 5 frames at 8 fps"):
        FolderSource(folder)


def test_world_clips_have_many_true_captions():
    source = WorldClips(30, seed=3)
    items = source.batch(range(30))
    for index, item in enumerate(items):
        assert item["frames"].shape == (17, 64, 64, 3)
        assert (len(item["captions"]), len(item["captions_image"])) == (6, 3)
        assert item["source"] == f"world/train/3/{index}"
        np.testing.assert_array_equal(item["frames"], WorldSource(3, 30)[index]["frames"])
    assert np.mean([len(set(item["captions"])) for item in items]) > 4.5, "paraphrases differ"
    again = WorldClips(100, seed=3).batch([7])[0]
    assert again["captions"] == items[7]["captions"], "a clip does not depend on how many there are"
    assert source.identity == WorldClips(100, seed=3).identity != WorldClips(30, seed=4).identity
    # A still shows no motion, so its captions name none.
    verbs = ("bounce", "slide", "fall", "orbit", "grow", "shrink", "move", "drop", "roll", "hop", "glide")
    stills = " ".join(text for item in items for text in item["captions_image"])
    assert not any(verb in stills for verb in verbs)


def test_a_world_of_several_sizes_takes_them_in_turn():
    sizes = [(16, 32), (32, 16), (16, 16)]
    source = WorldClips(400, sizes=sizes, frames=5)
    picked = [0, 63, 64, 130, 200, 5]
    for index, item in zip(picked, source.batch(picked), strict=True):
        height, width = sizes[index // 64 % 3]
        np.testing.assert_array_equal(
            item["frames"], WorldSource(0, 400, frames=5, height=height, width=width)[index]["frames"]
        )
        assert item["source"] == f"world/train/0/{index}"
    assert source.extents == ((5, 16, 32), (5, 32, 16), (5, 16, 16))
    assert source.identity != WorldClips(400, sizes=sizes[:2], frames=5).identity


def test_a_world_of_cut_clips_says_what_each_shot_shows():
    sizes, cuts = [(16, 32), (16, 16)], [(5,), (5, 1, 9)]
    source = WorldClips(400, seed=2, sizes=sizes, shots=cuts)
    picked = [3, 64, 130, 200, 300]
    for index, item in zip(picked, source.batch(picked), strict=True):
        (height, width), cut = sizes[index // 64 % 2], cuts[index // 128 % 2]
        world = WorldSource(2, 400, height=height, width=width, shots=cut)[index]
        np.testing.assert_array_equal(item["frames"], world["frames"])
        assert len(item["captions_image"]) == 3
        if len(cut) == 1:
            assert "shots" not in item
            uncut = WorldClips(400, seed=2, sizes=sizes, frames=5).batch([index])[0]
            assert item["captions"] == uncut["captions"], "it is the clip that an uncut world has"
        else:
            assert item["captions"] == []
            assert [frames for frames, _ in item["shots"]] == [5, 1, 9]
            for shot, (_, captions) in zip(world["scene"].shots, item["shots"], strict=True):
                assert len(captions) == 6
                shapes = {"circle" if thing.shape == "ball" else thing.shape for thing in shot.objects}
                assert any(any(shape in text.replace("ball", "circle") for shape in shapes) for text in captions)
    assert source.extents == ((9, 16, 32), (9, 16, 16), (5, 16, 32), (5, 16, 16), (1, 16, 32), (1, 16, 16))
    assert source.identity["shots"] == [[5], [5, 1, 9]]
    assert "shots" not in WorldClips(400).identity


# ---------------------------------------------------------------------------------------------------------- unreadable


def many(folder, count=39):
    data = (folder / "cats/b.mp4").read_bytes()
    for index in range(count):
        (folder / f"v{index:02}.mp4").write_bytes(data)
        (folder / f"v{index:02}.txt").write_text("a cat")


def broken(data, how):
    if how == "garbage inside":
        middle = bytearray(data)
        middle[len(data) // 3 : len(data) // 2] = b"\x5a" * (len(data) // 2 - len(data) // 3)
        return bytes(middle)
    return {"half": data[: len(data) // 2], "garbage": b"garbage" * 99, "empty": b""}[how]


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("how", ["half", "garbage", "empty"])
def test_broken_files_are_unreadable(tmp_path, suffix, how):
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (30, 32, 48, 3), np.uint8)
    write_video(path, noise, 24)
    path.write_bytes(broken(path.read_bytes(), how))
    with pytest.raises(UnreadableError):
        read(path, 8)


def test_sound_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UnreadableError, match="no video"):
        probe(path)


def test_few_unreadable_clips_are_left_out_and_listed(folder):
    many(folder)
    (folder / "v03.mp4").write_bytes(b"garbage")
    noise = np.random.default_rng(0).integers(0, 255, (50, 32, 48, 3), np.uint8)
    write_video(folder / "v07.mp4", noise, 24)
    (folder / "v07.mp4").write_bytes(broken((folder / "v07.mp4").read_bytes(), "garbage inside"))
    source = FolderSource(folder, fps=8, frames=17, height=16, width=16)
    assert [line.split(":")[0] for line in source.unreadable] == ["v03.mp4"]
    items = source.batch(range(len(source)))
    assert [item["source"] for item in items if not isinstance(item, str)] == [
        "a.webm@0", "c.PNG", "cats/b.mp4@0", *(f"v{i:02}.mp4@0" for i in range(39) if i not in (3, 7))
    ]  # fmt: skip
    assert [line.split(":")[0] for line in source.unreadable] == ["v03.mp4", "v07.mp4@0"]
    assert [item for item in items if isinstance(item, str)] == source.unreadable[1:]


def test_many_unreadable_files_are_refused(folder):
    many(folder)
    for index in (3, 5, 7):
        (folder / f"v{index:02}.mp4").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"3 of 42 files or clips in .* more than the 5% .*: v03.mp4: .*; v05.mp4: "):
        FolderSource(folder)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_folders_that_cannot_be_used(folder, tmp_path_factory):
    def refusal(**options):
        with pytest.raises(UserError) as caught:
            FolderSource(folder, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (folder / "a.txt").unlink()
    assert "1 of 3 files have no caption; the first is a.webm: write a.txt, or a metadata.csv" in refusal()
    assert len(FolderSource(folder, captions=False))
    table = folder / "metadata.csv"
    for text, message in {
        "path,caption\na.webm,x\n": 'has no column "text"; known: caption, path',
        "": 'has no column "path"',
        "path,text\na.webm,dog\ndogs/z.mp4,x\n": "metadata.csv, line 3: dogs/z.mp4 is not there",
        "path,text\na.txt,x\n": 'line 2: "a.txt" is no video or image (.mp4',
        "path,text\n": "metadata.csv lists no videos or images",
        "path,text\na.webm,\n": "1 of 1 files have no caption; the first is a.webm: fill in its text in",
    }.items():
        table.write_text(text)
        assert message in refusal()
    table.write_bytes("path,text\na.webm,é\n".encode("latin-1"))
    assert "metadata.csv is not in UTF-8" in refusal()
    table.unlink()
    assert "16 frames cannot be a clip: it has 1 + 4k; nearest: 13 or 17" in refusal(frames=16)
    assert "fps must be a number > 0" in refusal(fps=0)
    assert "height and width must be >= 1" in refusal(height=0)
    empty = tmp_path_factory.mktemp("empty")
    for path, message in {
        empty: "has no videos or images in it",
        empty / "x": "the data folder .* is not there",
    }.items():
        with pytest.raises(UserError, match=message):
            FolderSource(path)
