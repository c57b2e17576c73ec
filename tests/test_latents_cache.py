"""The latent cache: exact, resumable, and never a mixture."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils.epath import stat_utils
from etils.epath.testing import mock_epath

from sora_jax.data.latents import BadRecordError, CacheInfo, LatentRecord, LatentSource, LatentWriter, ShotHeader
from sora_jax.errors import UserError

INFO = CacheInfo("world", "a" * 64, (4, 16, 16), 3, {"world": {"seed": 0}})


def record(index, frames=2):
    """A clip whose latents are different for each index and exact in float16."""
    latents = (np.arange(frames * 2 * 1 * 3).reshape(frames, 2, 1, 3) + index).astype(np.float16)
    return LatentRecord(latents, (f"clip {index}", "un été"), (f"image {index}",), 8.0, f"s/{index}", (5, 32, 16))


def encode(path, clips=10, per_shard=4, stop_after=None, info=INFO):
    """What the command does; `stop_after` shards the process is killed in the middle of the next one."""
    writer = LatentWriter(path, info, clips=clips, clips_per_shard=per_shard)
    written = []
    for shard in writer.missing():
        with writer.shard(shard) as out:
            for index in range(shard.start, shard.stop):
                if stop_after is not None and len(written) == stop_after and index == shard.start + 1:
                    raise KeyboardInterrupt
                out.add(record(index, frames=1 + index % 3))
        written.append(shard.number)
    return written


def test_what_is_read_is_what_was_written(tmp_path):
    assert encode(tmp_path / "cache") == [0, 1, 2]
    source = LatentSource(tmp_path / "cache")
    assert len(source) == 10
    assert source.info == INFO
    for index in (9, 0, 4, 3, 7):
        found, expected = source[index], record(index, frames=1 + index % 3)
        np.testing.assert_array_equal(found.latents, expected.latents)
        assert found.latents.dtype == np.float16
        assert found.captions == (f"clip {index}", "un été")
        assert (found.captions_image, found.fps, found.source) == ((f"image {index}",), 8.0, f"s/{index}")
        assert found.pixels == (5, 32, 16)
    assert source.sizes == {(1, 2, 1): 4, (2, 2, 1): 3, (3, 2, 1): 3}
    assert source.longest_caption == "un été"  # 8 bytes in UTF-8, one more than "image 9"
    with pytest.raises(IndexError):
        source[10]


def test_a_cache_without_cut_clips_is_what_it_was_before_there_were_any(tmp_path):
    """Byte for byte: other versions read it, and runs that were trained on it know it again."""
    encode(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["version"] == 1
    entry = {"index", "file", "clips", "count", "bytes", "sizes", "longest_caption", "headers", "skipped"}
    assert all(shard.keys() == entry for shard in manifest["shards"])
    text = '{"shape":[2,2,1,3],"captions":["clip 1","un été"],"captions_image":["image 1"],"fps":8.0,"source":"s/1",'
    header = (text + '"pixels":[5,32,16]}').encode()
    assert record(1).to_bytes() == len(header).to_bytes(4, "little") + header + record(1).latents.tobytes()


def test_cut_clips_keep_their_shots(tmp_path):
    shots = (ShotHeader(2, ("a ball", "one ball")), ShotHeader(1, ("a star that falls",)))
    cut = dataclasses.replace(record(5, frames=3), captions=(), shots=shots)
    writer = LatentWriter(tmp_path, INFO, clips=2)
    with writer.shard(*writer.missing()) as out:
        out.add(record(0))
        out.add(cut)
    source = LatentSource(tmp_path)
    np.testing.assert_array_equal(source[1].latents, cut.latents)
    assert (source[0].shots, source[1].shots, source.header(1).shots) == ((), shots, shots)
    assert source.longest_caption == "one ball a star that falls", "which stand in a row together"
    # Readers that take the shots for one clip would train on the wrong thing: they refuse the version.
    assert json.loads((tmp_path / "manifest.json").read_text())["version"] == 2
    assert LatentWriter(tmp_path, INFO, clips=2).missing() == []
    with pytest.raises(BadRecordError, match="its shots have 3 latents of 2"):
        LatentRecord.from_bytes(dataclasses.replace(cut, latents=cut.latents[:2]).to_bytes())


def test_part_of_a_cache_and_other_processes(tmp_path):
    encode(tmp_path)
    train, held_out = LatentSource(tmp_path, stop=-3), LatentSource(tmp_path, start=-3)
    assert [r.source for r in train] == [f"s/{i}" for i in range(7)]
    assert [r.source for r in pickle.loads(pickle.dumps(held_out))] == ["s/7", "s/8", "s/9"]
    with pytest.raises(UserError, match=r"has 10 clips, none of them in \[10:None\]"):
        LatentSource(tmp_path, start=10)


def test_several_caches_are_one_after_another(tmp_path):
    for name, clips in (("a", 5), ("b", 3), ("other", 2)):
        encode(tmp_path / name, clips=clips)
    both = LatentSource(f"{tmp_path / 'a'},{tmp_path / 'b'}")
    assert [r.source for r in both] == [f"s/{i}" for i in [*range(5), *range(3)]]
    held_out = LatentSource(f"{tmp_path / 'a'},{tmp_path / 'b'}", start=-4)
    assert [held_out.header(i).source for i in range(4)] == ["s/4", "s/0", "s/1", "s/2"]
    assert both.identity != LatentSource(tmp_path / "a").identity
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("a" * 64, "b" * 64))
    with pytest.raises(UserError, match="hold latents of two autoencoders"):
        LatentSource(f"{tmp_path / 'a'},{tmp_path / 'other'}")
    with pytest.raises(UserError, match=r"c is not there; `sora-jax encode SOURCE --out .*/c` makes one"):
        LatentSource(f"{tmp_path / 'a'},{tmp_path / 'c'}")
    for path in (f"{tmp_path / 'a'},", ""):
        with pytest.raises(UserError, match="names no folder"):
            LatentSource(path)


def test_interrupted_encoding_goes_on_at_the_first_missing_shard(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path, stop_after=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latents-00000.arrayrecord", "manifest.json"]
    with pytest.raises(UserError, match="not finished: 2 of 3 shards are missing"):
        LatentSource(tmp_path)
    (tmp_path / "latents-00001.arrayrecord.partial").write_bytes(b"left by SIGKILL")
    assert encode(tmp_path) == [1, 2]
    assert not list(tmp_path.glob("*.partial"))
    assert [r.source for r in LatentSource(tmp_path)] == [f"s/{i}" for i in range(10)]
    assert encode(tmp_path) == []


def test_cache_can_grow(tmp_path):
    encode(tmp_path, clips=6)
    assert encode(tmp_path, clips=10) == [1, 2]  # shard 1 held two of its four
    assert [r.source for r in LatentSource(tmp_path)] == [f"s/{i}" for i in range(10)]
    with pytest.raises(UserError, match="already has 10 clips, more than 6"):
        encode(tmp_path, clips=6)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path, clips=11, stop_after=0)  # the last shard again, with one more
    with pytest.raises(UserError, match="not finished: 1 of 3 shards"):
        LatentSource(tmp_path)
    assert encode(tmp_path, clips=11) == [2]
    assert len(LatentSource(tmp_path)) == 11


def test_skipped_clips_are_listed_and_leave_no_hole(tmp_path):
    writer = LatentWriter(tmp_path, INFO, clips=4, clips_per_shard=2)
    for shard in writer.missing():
        with writer.shard(shard) as out:
            out.add(record(shard.start))
            out.skip(f"{shard.start + 1}: torn")
    again = LatentWriter(tmp_path, INFO, clips=4, clips_per_shard=2)
    assert (again.count, again.done, again.skipped) == (2, 4, ["1: torn", "3: torn"])
    assert [r.source for r in LatentSource(tmp_path)] == ["s/0", "s/2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"info": CacheInfo("mine", "b" * 64, (4, 16, 16), 3, INFO.source)}, r"world \(aaaaaaaaaaaa\), not mine \(b"),
        ({"info": CacheInfo("world", "a" * 64, (4, 16, 16), 3, {"world": {"seed": 1}})}, "encoded with world = "),
        ({"per_shard": 5}, "clips per shard = 4, not 5"),
    ],
)
def test_encodings_do_not_mix(tmp_path, change, message):
    encode(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=message):
        encode(tmp_path, **change)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is there and is no latent cache"):
        encode(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "chrome extension"}')
    for use in (encode, LatentSource):
        with pytest.raises(UserError, match="is no manifest of a latent cache"):
            use(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "sora_jax latents"}', "\x00"])
def test_torn_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is no manifest of a latent cache"):
        LatentSource(tmp_path)


def test_newer_manifest(tmp_path):
    encode(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(UserError, match="version 99, newer than this"):
        LatentSource(tmp_path)


def test_missing_folder_and_damaged_shards(tmp_path):
    with pytest.raises(UserError, match="is not there; `sora-jax encode SOURCE --out"):
        LatentSource(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        LatentSource(tmp_path)
    encode(tmp_path)
    shard = tmp_path / "latents-00001.arrayrecord"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(UserError, match=rf"latents-00001.arrayrecord has {len(whole) - 7} bytes, not {len(whole)}"):
        LatentSource(tmp_path)
    assert encode(tmp_path) == [1], "encoding again mends it"
    shard.unlink()
    with pytest.raises(UserError, match=r"latents-00001.arrayrecord is missing"):
        LatentSource(tmp_path)


def test_flipped_byte_is_an_error_and_never_wrong_numbers(tmp_path):
    encode(tmp_path, clips=8)
    path = tmp_path / "latents-00001.arrayrecord"
    whole = path.read_bytes()

    def read(index):
        try:
            return LatentSource(tmp_path)[index]
        except BadRecordError as error:
            return str(error)

    found = 0
    for position in np.linspace(70, len(whole) - 1, 60).astype(int):
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        for index in (2, 4, 5, 6, 7):
            result = read(index)
            if isinstance(result, str):
                assert index >= 4, "the other shard is whole"
                assert f"latents-00001.arrayrecord, record {index - 4}" in result
                found += 1
            else:
                np.testing.assert_array_equal(result.latents, record(index, frames=1 + index % 3).latents)
                assert result.captions == record(index).captions
    assert found


@pytest.mark.parametrize("data", [b"", b"abc", b"\x02\x00\x00\x00{}", b"\xff\xff\xff\xff" * 9])
def test_bytes_that_are_no_record(data):
    with pytest.raises(BadRecordError):
        LatentRecord.from_bytes(data)


def test_cache_in_an_object_store(tmp_path, monkeypatch):
    """gs:// by a store that is a folder: no renames there, whole uploads only, and one local copy to read from."""

    def real(path):
        return Path(str(path).replace("gs://", f"{tmp_path}/store/"))

    def copy(_fn, source, target, overwrite=False):
        real(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(real(source), real(target))

    def refuse(*_, **__):
        raise AssertionError("objects do not rename")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    with mock_epath(
        open=lambda _fn, path, mode="r", **_: open(real(path), mode),
        exists=lambda _fn, path: real(path).exists(),
        isdir=lambda _fn, path: real(path).is_dir(),
        glob=lambda _fn, path: [],
        makedirs=lambda _fn, path, **_: real(path).mkdir(parents=True, exist_ok=True),
        mkdir=lambda _fn, path, **_: real(path).mkdir(parents=True, exist_ok=True),
        copy=copy,
        rename=refuse,
        replace=refuse,
        stat=lambda _fn, path: stat_utils.StatResult(is_directory=False, length=real(path).stat().st_size, mtime=0),
    ):
        assert encode("gs://bucket/cache") == [0, 1, 2]
        assert (tmp_path / "store/bucket/cache/latents-00002.arrayrecord").exists()
        assert [r.source for r in LatentSource("gs://bucket/cache")] == [f"s/{i}" for i in range(10)]
        assert len(list((tmp_path / "local").rglob("*.arrayrecord"))) == 3
        assert encode("gs://bucket/cache") == []
