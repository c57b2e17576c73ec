"""The command line from outside: what it prints where, which code it ends with, and what it leaves on disk."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_preview import holds

from sora_jax import cli, commands
from sora_jax.commands import jobs as asked
from sora_jax.errors import UserError
from sora_jax.media import read_media
from sora_jax.record import Record

PROMPT = "a red ball bounces on a blue floor"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, and in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SORA_JAX_DEBUG", raising=False)
    return tmp_path


def run(capsys, *argv: object) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr."""
    code = cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def error_of(capsys, *argv: object) -> str:
    """The one line of a run that must fail as a user's mistake: code 2, nothing on stdout, no traceback."""
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    if err[0].startswith("sora-jax 0"):  # the head of the run, where it got that far
        err = err[1:]
    assert len(err) == 1, err
    assert err[0].startswith("sora-jax: error: ")
    return err[0]


# ---------------------------------------------------------------------------------------------------------- help


def test_help_names_every_command_under_its_group(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, [])
    for group, names in commands.GROUPS.items():
        assert f"{group}:" in out
        assert all(f"  {name} " in out for name in names)


@pytest.mark.parametrize("name", commands.NAMES)
def test_every_command_teaches_by_examples(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    examples = out.partition("examples:")[2].split("\n")
    assert any(line.strip().startswith(f"sora-jax {name}") for line in examples)


@pytest.mark.parametrize("name", commands.NAMES)
def test_examples_parse(name):
    """What the help shows can be typed as it stands."""
    import shlex

    for line in commands.load(name).EXAMPLES.strip().splitlines():
        words = shlex.split(line, comments=True)
        assert words[:2] == ["sora-jax", name], line
        cli.parse([word for word in words[1:] if word not in words[words.index(">") :]] if ">" in words else words[1:])


def test_nothing_at_all_shows_the_help_and_is_a_mistake(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert "usage:" in out


# ---------------------------------------------------------------------------------------------------------- parsing


def test_flags_stand_between_positionals():
    args = cli.parse(["sample", "one", "--steps", "3", "two", "--seed", "4", "three"])
    assert args.prompt == ["one", "two", "three"]
    assert (args.steps, args.seed) == (3, 4)


def test_overrides_are_taken_in_both_spellings():
    rest, overrides = cli.take_overrides(["--config", "world", "--config.a.b=1", "x", "--config.c", "-2", "--json"])
    assert rest == ["--config", "world", "x", "--json"]
    assert overrides == ["a.b=1", "c=-2"]
    with pytest.raises(UserError, match=r"--config\.a needs a value"):
        cli.take_overrides(["--config.a", "--json"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sampel", PROMPT], 'unknown command "sampel"; did you mean "sample"?'),
        (["--steps", "3", "sample"], "flags come after the command"),
        (["sample", PROMPT, "--step", "3"], 'unknown flag --step; did you mean "--steps"?'),
        (["sample", PROMPT, "--zzzz=3"], "unknown flag --zzzz; see sora-jax sample --help"),
        (["devices", "extra"], 'unexpected argument "extra"'),
        (["sample", PROMPT, "--steps", "ten"], "--steps: 'ten' is not a whole number"),
        (["sample", PROMPT, "--steps", "2.5"], "--steps: '2.5' is not a whole number"),
        (["sample", PROMPT, "--guidance", "strong"], "--guidance: 'strong' is not a number"),
        (["sample", PROMPT, "--seed", "x"], "--seed: 'x' is not a whole number"),
        (["sample", PROMPT, "--steps"], "--steps: expected one argument"),
        (["sample"], "no prompt; say what the video shows"),
        (["sample", ""], "empty prompt"),
        (["sample", "   "], "empty prompt"),
        (["sample", PROMPT, "--num-videos", "0"], "--num-videos must be >= 1"),
        (["sample", PROMPT, "--frames", "5", "--seconds", "1"], "--frames and --seconds say the same"),
        (["sample", PROMPT, "--out", "a.mp5"], 'unknown file type ".mp5"; did you mean ".mp4"?'),
        (["sample", "a", "b", "--out", "a.mp4"], "--out a.mp4 is one file for 2 videos"),
        (["sample", "a", "a"], "two videos would be written to a-0.mp4"),
        (["sample", PROMPT, "--out", "/proc/none/a.mp4"], "/proc/none/a.mp4 cannot be written"),
        (["sample", PROMPT, "--sheet", "a.jpg"], "--sheet writes a picture: a .png, not a.jpg"),
        (["sample", PROMPT, "--sheet", "/proc/none/a.png"], "/proc/none/a.png cannot be written"),
        (["sample", PROMPT, "--batch-size", "0"], "--batch-size must be a whole number >= 1"),
        (["sample", PROMPT, "--scale", "0"], "--scale must be a whole number >= 1"),
        (["sample", PROMPT, "--dtype", "float23"], 'unknown dtype "float23"; did you mean "float32"?'),
        (["sample", PROMPT, "--image", "none.png"], "none.png does not exist"),
        (["sample", PROMPT, "--last-image", "none.png"], "none.png does not exist"),
        (["sample", PROMPT, "--mesh", "fsdp:4"], '--mesh takes AXIS=N,AXIS=N,..., say fsdp=4,sequence=2: "fsdp:4" is'),
        (["sample", PROMPT, "--mesh", ""], "--mesh is empty"),
        (["sample", "--like", "none.mp4"], "none.mp4 does not exist"),
        (["sample", "--prompts", "none.txt"], "none.txt does not exist"),
        (["sample", PROMPT, "--model", ""], "--model is empty"),
        (["sample", PROMPT, "--out", ""], "--out is empty"),
        (["sample", PROMPT, "--last-image="], "--last-image is empty"),
        (["sample", PROMPT, "--out", "videos/.mp4"], "videos/.mp4 is a file type without a name"),
        (["sample", PROMPT, "--seed", str(2**32)], f"from 0 to {2**32 - 1}, not {2**32}"),
        (["sample", PROMPT, "--seed", str(2**32 - 1), "--num-videos", "2"], f"not {2**32}"),
        (["sample", "--prompts", "none.xls"], 'unknown type of prompt file ".xls"'),
    ],
)
def test_mistakes_are_one_line(here, capsys, argv, message):
    assert message in error_of(capsys, *argv)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "6"], "6 frames cannot be made: a video has 1 + 4k frames; nearest: 5 or 9"),
        (["--frames", "0"], "0 frames cannot be made"),
        (["--height", "20"], "height 20 cannot be made: it must be a multiple of 8; nearest: 16 or 24"),
        (["--width", "0"], "width 0 cannot be made"),
        (["--width=-16"], "width -16 cannot be made: it must be a multiple of 8; nearest: 8"),
        (["--scale", "513"], "scale 513 would make 8208x8208 of 16x16"),
        (["--negative-prompt", "x" * 120], "120 bytes long and 95 fit"),
        (["--seconds", "inf"], "seconds must be a finite number"),
        (["--steps", "0"], "steps must be at least 1, not 0"),
        (["--guidance", "nan"], "guidance must be a finite number"),
        (["--shift", "0"], "shift must be a finite number > 0"),
        (["--seed", "-1"], "seed must be a whole number from 0"),
        (["--solver", "eular"], 'did you mean "euler"?'),
        (["--out", "one.png"], "a .png holds one frame, not 5"),
        (["--fps", "0"], "--fps must lie in (0, 1000]"),
    ],
)
def test_what_the_model_cannot_make_is_one_line(here, capsys, tiny_model, flags, message):
    assert message in error_of(capsys, "sample", PROMPT, "--model", tiny_model, *flags)
    assert list(here.iterdir()) == []


def test_an_unknown_model_names_the_nearest(here, capsys):
    assert 'did you mean "world"?' in error_of(capsys, "sample", PROMPT, "--model", "wrold")


def damage(model: Path, kind: str) -> None:
    """Spoil one tensor of the transformer, with numpy's eyes only: header of 8 bytes length + JSON, then data."""
    file = next((model / "transformer").glob("*.safetensors"))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = "proj_out.weight"
    if kind == "truncated":
        file.write_bytes(data[:-100])
        return
    if kind == "missing":
        del header[name]
    elif kind == "shape":
        header[name]["shape"] = header[name]["shape"][::-1]
    elif kind == "dtype":
        header[name]["dtype"] = "I32"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("kind", ["truncated", "missing", "shape", "dtype"])
def test_a_damaged_model_is_one_line_that_names_the_tensor(here, capsys, tiny_model, kind):
    shutil.copytree(tiny_model, here / "model")
    damage(here / "model", kind)
    line = error_of(capsys, "sample", PROMPT, "--model", "model")
    assert "safetensors" in line
    if kind != "truncated":
        assert "proj_out.weight" in line
    assert [path.name for path in here.iterdir()] == ["model"]


# ---------------------------------------------------------------------------------------------------------- sampling


def test_sample_writes_what_was_asked_for(here, capsys, tiny_model):
    code, out, err = run(capsys, "sample", PROMPT, "--model", tiny_model, "--seed", 3, "--frames", 9, "--scale", 2)
    assert code == 0
    assert out == "a-red-ball-bounces-on-a-blue-floor-3.mp4\n"
    assert err[0].startswith("sora-jax 0")
    assert "float32" in err[0]
    assert "attention" in err[0]
    media = read_media(here / out.strip())
    assert media.frames.shape == (9, 32, 32, 3)
    assert media.fps == 8
    assert media.record is not None
    assert (media.record.prompt, media.record.seed, media.record.model) == (PROMPT, 3, "tiny-1")
    assert (media.record.frames, media.record.height, media.record.steps) == (9, 16, 2)


def test_a_sheet_shows_every_video(here, capsys, tiny_model):
    flags = ("--model", tiny_model, "--out", "made/", "--sheet", "sheet.png", "--json")
    (here / "prompts.jsonl").write_text("".join(f'{{"prompt": "{x}", "out": "{x}.npy"}}\n' for x in ("one", "two")))
    code, out, _ = run(capsys, "sample", "--prompts", "prompts.jsonl", *flags)
    assert code == 0
    assert json.loads(out)["sheet"] == "sheet.png"
    sheet = read_media(here / "sheet.png")
    for name in ("one", "two"):
        for frame in np.load(here / "made" / f"{name}.npy"):
            assert holds(sheet.frames[0], frame.repeat(8, 0).repeat(8, 1)), "enlarged from 16 pixels towards 120"
    assert sheet.record is not None
    assert (sheet.record.prompt, sheet.record.model) == ("one\ntwo", "tiny-1")


def test_json_is_the_only_thing_on_stdout(here, capsys, tiny_model):
    code, out, err = run(
        capsys, "sample", "one", "two", "--model", tiny_model, "--out", "made/", "--num-videos", 2, "--json"
    )
    assert code == 0
    document = json.loads(out)
    assert [video["path"] for video in document["videos"]] == [
        f"made/{name}" for name in ("one-0.mp4", "one-1.mp4", "two-0.mp4", "two-1.mp4")
    ]
    assert all((here / video["path"]).exists() for video in document["videos"])
    assert document["videos"][0]["frames"] == 5
    assert document["seconds"]["total"] > 0
    assert err[0].startswith("sora-jax 0")


def test_json_has_no_nan(here, capsys, monkeypatch):
    """JSON (RFC 8259, section 6) has neither NaN nor Infinity, and other readers than Python's refuse them."""
    found = {"loss": math.nan, "bounds": (0.5, [math.inf, 2]), "step": 3, "name": "NaN", "done": True}
    monkeypatch.setattr(commands.load("devices"), "run", lambda args: found)
    code, out, _ = run(capsys, "devices", "--json")
    assert code == 0
    document = json.loads(out, parse_constant=pytest.fail)
    assert document == {"loss": None, "bounds": [0.5, [None, 2]], "step": 3, "name": "NaN", "done": True}


def test_files_are_overwritten_only_by_force(here, capsys, tiny_model):
    (here / "a.npy").write_text("precious")
    flags = ("sample", PROMPT, "--model", tiny_model, "--out", "a.npy")
    assert "a.npy exists; --force overwrites it" in error_of(capsys, *flags)
    assert (here / "a.npy").read_text() == "precious"
    assert run(capsys, *flags, "--force")[0] == 0
    assert read_media(here / "a.npy").frames.shape == (5, 16, 16, 3)


def test_like_makes_the_same_video_again(here, capsys, tiny_model):
    settings = ("--seed", 7, "--steps", 3, "--guidance", 1.5, "--solver", "euler", "--shift", 2)
    assert run(capsys, "sample", PROMPT, "--model", tiny_model, *settings, "--out", "a.npy")[0] == 0
    assert run(capsys, "sample", "--like", "a.npy", "--model", tiny_model, "--out", "b.npy")[0] == 0
    a, b = read_media(here / "a.npy"), read_media(here / "b.npy")
    np.testing.assert_array_equal(a.frames, b.frames)
    assert a.record == b.record
    assert run(capsys, "sample", "--like", "a.npy", "--model", tiny_model, "--seed", 8, "--out", "c.npy")[0] == 0
    c = read_media(here / "c.npy")
    assert c.record is not None
    assert (c.record.seed, c.record.steps, c.record.solver) == (8, 3, "euler")
    assert (c.frames != a.frames).any()


def test_an_image_is_the_first_frame_and_in_the_record(here, capsys, tiny_model):
    from PIL import Image

    Image.new("RGB", (16, 16), (200, 30, 30)).save(here / "first.png")
    code, *_ = run(capsys, "sample", PROMPT, "--model", tiny_model, "--image", "first.png", "--out", "a.npy")
    assert code == 0
    record = read_media(here / "a.npy").record
    assert record is not None
    assert record.given == {"image": "first.png"}


def test_a_last_image_is_the_last_frame_and_like_takes_it_again(here, capsys, tiny_model):
    from PIL import Image

    Image.new("RGB", (16, 16), (30, 30, 200)).save(here / "last.png")
    argv = ("sample", "--model", tiny_model, "--mesh", "data=2,fsdp=2,sequence=2", "--out")
    code, _, err = run(capsys, *argv, "a.npy", PROMPT, "--last-image", "last.png")
    assert code == 0, err
    a = read_media(here / "a.npy")
    assert a.frames.shape == (6, 16, 16, 3)
    assert a.record is not None
    assert (a.record.given, a.record.frames, a.record.prompt) == ({"last_image": "last.png"}, 6, PROMPT)
    assert run(capsys, *argv, "b.npy", "--like", "a.npy")[0] == 0
    np.testing.assert_array_equal(read_media(here / "b.npy").frames, a.frames)
    code, _, err = run(capsys, *argv, "c.npy", PROMPT, "--last-image", "last.png", "--frames", "5")
    assert code == 2
    assert "5 frames that end in a given one cannot be made" in err[-1]


def test_ctrl_c_leaves_nothing(here, capsys, tiny_model, monkeypatch):
    from sora_jax.pipeline import Pipeline

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "sample", interrupted)
    code, out, err = run(capsys, "sample", PROMPT, "--model", tiny_model, "--out", "new/a.mp4")
    assert (code, out) == (130, "")
    assert err[-1] == "sora-jax: interrupted"
    assert list(here.iterdir()) == []


def test_a_prompt_that_is_too_long_is_found_before_the_first_video(here, capsys, tiny_model):
    assert "shorten it by" in error_of(capsys, "sample", "short", "long " * 40, "--model", tiny_model)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [MemoryError("(3, 2000000001)"), RuntimeError("INTERNAL: Error dispatching: Out of memory allocating 40 bytes.")],
)
def test_what_does_not_fit_in_memory_is_one_line(here, capsys, monkeypatch, tiny_model, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("sora_jax.pipeline.Pipeline.sample", fail)
    assert "error: out of memory (" in error_of(capsys, "sample", PROMPT, "--model", tiny_model)


def test_the_head_of_a_training_run_names_its_own_dtype(here, capsys):
    (here / "file").touch()
    flags = ("--workdir", "file/run", "--config.train.dtype=bfloat16")
    code, _, err = run(capsys, "train", "--config", "world_text", *flags)
    assert code == 2
    assert "bfloat16" in err[0]
    assert "file/run" in err[-1]
    assert "Errno" not in err[-1]


def test_our_own_defects_keep_their_traceback(here, monkeypatch, tiny_model):
    from sora_jax.pipeline import Pipeline

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Pipeline, "sample", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["sample", PROMPT, "--model", str(tiny_model)])


class Refused(Exception):
    """As a store's package has them: no `OSError`."""

    __module__ = "gcsfs.retry"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("Please install gcsfs to access Google Storage"), "pip install 'sora-jax[gcs]'"),
        (ImportError("Install s3fs to access S3"), "pip install s3fs"),
        (KeyError("foo://"), "no store is known by foo://"),
        (Refused("no access\nto bucket"), "or not by this account (Refused: no access to bucket)"),
    ],
)
def test_a_store_that_cannot_be_reached_is_one_line(here, capsys, monkeypatch, error, message):
    def broken(args: object) -> None:
        logging.getLogger("gcsfs").error("out of retries", exc_info=error)
        raise error

    monkeypatch.setattr(commands.load("devices"), "run", broken)
    code, out, err = run(capsys, "devices")
    assert (code, out) == (2, "")
    assert [line for line in err if "error" in line or "Traceback" in line] == err[-1:]
    assert message in err[-1]
    with pytest.raises(type(error)):
        cli.main(["devices", "--debug"])


@pytest.mark.parametrize("error", [ImportError("cannot import name 'x' from 'y'"), KeyError("weight"), KeyError(3)])
def test_other_errors_of_those_kinds_are_defects(here, monkeypatch, error):
    def broken(args: object) -> None:
        raise error

    monkeypatch.setattr(commands.load("devices"), "run", broken)
    with pytest.raises(type(error)):
        cli.main(["devices"])


def test_a_document_has_null_where_json_has_no_number(capsys, monkeypatch):
    found = {"loss": float("nan"), "each": [1.5, float("inf")], "mean": np.float64("nan"), "step": 3, "stopped": False}
    monkeypatch.setattr(commands.load("devices"), "run", lambda args: found)
    code, out, _ = run(capsys, "devices", "--json")
    assert code == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(out, parse_constant=refuse)
    assert read == {"loss": None, "each": [1.5, None], "mean": None, "step": 3, "stopped": False}


def test_debug_shows_where_a_mistake_was_found(here):
    with pytest.raises(UserError):
        cli.main(["sample", "--debug"])


def test_the_console_as_a_user_types_it(here, tiny_model):
    """One real process: stdout holds the path and nothing else, stderr begins with the devices."""
    command = [sys.executable, "-m", "sora_jax", "sample", PROMPT, "--model", str(tiny_model), "--out", "a.mp4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a.mp4\n"
    assert done.stderr.startswith("sora-jax 0")
    assert read_media(here / "a.mp4").frames.shape == (5, 16, 16, 3)


# ---------------------------------------------------------------------------------------------------------- planning


def plan(*argv: str, like: Record | None = None) -> list[asked.Job]:
    return asked.plan(cli.parse(["sample", *argv]), like)


def test_prompts_come_from_files(here):
    (here / "a.txt").write_text("a red ball\n\na blue ball\n")
    (here / "b.csv").write_text('prompt,seed,out\n"a ball, red",4,x.gif\na box,,\n')
    (here / "c.jsonl").write_text('{"prompt": "a ring", "negative_prompt": "blur"}\n')
    assert [job.prompt for job in plan("--prompts", "a.txt")] == ["a red ball", "a blue ball"]
    first, second = plan("--prompts", "b.csv", "--seed", "9")
    assert (first.prompt, first.seed, first.out) == ("a ball, red", 4, "x.gif")
    assert (second.prompt, second.seed, second.out) == ("a box", 9, "a-box-9.mp4")
    (here / "null.jsonl").write_text('{"prompt": "a ring", "negative_prompt": null, "seed": null, "out": null}\n')
    (plain,) = plan("--prompts", "null.jsonl", "--seed", "2")
    assert (plain.negative_prompt, plain.seed, plain.out) == (None, 2, "a-ring-2.mp4")
    (only,) = plan("--prompts", "c.jsonl", "--negative-prompt", "noise")
    assert only.negative_prompt == "blur"


def test_batches_share_a_negative_prompt():
    jobs = [asked.Job(str(i), negative, i, "x") for i, negative in enumerate(["a", "a", "a", "b", "b", "a"])]
    grouped = [[job.seed for job in batch] for batch in asked.batches(jobs, 2)]
    assert grouped == [[0, 1], [2], [3, 4], [5]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.csv", "text\na ball\n", "entry 1: no prompt"),
        ("a.csv", "prompt,sed\na ball,3\n", 'unknown field "sed"; did you mean "seed"?'),
        ("a.csv", "prompt,seed\na ball,x\n", "seed 'x' is not a whole number"),
        ("a.jsonl", '{"prompt": "a"}\n{', "line 2: not JSON"),
        ("a.jsonl", '{"prompt": ""}\n', "empty prompt"),
        ("a.jsonl", '{"prompt": "a", "out": 3}\n', "entry 1: out 3 is no text"),
        ("a.jsonl", '{"prompt": "a", "negative_prompt": []}\n', "entry 1: negative_prompt .. is no text"),
        ("a.jsonl", '{"prompt": "a", "seed": 1.5}\n', "entry 1: seed 1.5 is not a whole number"),
        ("a.jsonl", '{"prompt": "a", "seed": true}\n', "entry 1: seed True is not a whole number"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}\n', "seed must be a whole number from 0"),
        ("a.csv", "prompt,seed\na red ball, on a floor,3\n", "more cells than columns"),
    ],
)
def test_broken_prompt_files_are_one_line(here, name, text, message):
    (here / name).write_text(text)
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        plan("--prompts", name)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red ball, bouncing!", "a-red-ball-bouncing"),
        ("../../etc/passwd", "etc-passwd"),
        ("ein grüner Ball", "ein-grüner-ball"),
        ("!?", "video"),
        ("word " * 40, "-".join(["word"] * 12)),
        ("x" * 100, "x" * 60),
    ],
)
def test_file_names_come_from_prompts(prompt, name):
    assert asked.slug(prompt) == name


# ---------------------------------------------------------------------------------------------------------- devices


def test_devices_reports_what_jax_reports(capsys):
    import jax

    code, out, _ = run(capsys, "devices", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["platform"] == "cpu"
    assert document["count"] == len(jax.devices())
    assert document["jax"] == jax.__version__
    assert document["dtype"] == "float32"


def test_an_idle_accelerator_is_named(tmp_path, monkeypatch):
    from sora_jax.runtime import idle_accelerators

    monkeypatch.delenv("JAX_PLATFORMS")
    assert idle_accelerators("cpu", tmp_path) == ()
    (tmp_path / "proc/driver/nvidia/gpus/0000:04:00.0").mkdir(parents=True)
    network, chip = (tmp_path / f"sys/bus/pci/devices/{n}" for n in ("0000:00:05.0", "0000:00:06.0"))
    for device, number in ((network, "0x0042"), (chip, "0x0063")):
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x1ae0\n")
        (device / "device").write_text(f"{number}\n")
    gpu, tpu = idle_accelerators("cpu", tmp_path)
    assert "NVIDIA GPU is present but unused" in gpu
    assert "sora-jax[cuda]" in gpu
    assert "TPU is present but unused" in tpu
    assert idle_accelerators("tpu", tmp_path) == (gpu,)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS=cpu" in idle_accelerators("cpu", tmp_path)[0]
    shutil.rmtree(chip)
    assert len(idle_accelerators("cpu", tmp_path)) == 1  # Google's network card is no TPU


def test_auto_dtype_follows_the_device():
    from types import SimpleNamespace

    from sora_jax.runtime import compute_dtype

    def auto(platform: str, kind: str = "", capability: str | None = None) -> str:
        device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
        return str(compute_dtype.__wrapped__("auto", [device]))

    assert auto("cpu") == "float32"
    assert auto("tpu", "TPU v3") == "float32"
    assert auto("tpu", "TPU v4") == "bfloat16"
    assert auto("tpu", "TPU v5 lite") == "bfloat16"
    assert auto("tpu", "TPU7x") == "bfloat16"
    assert auto("gpu", "NVIDIA A100", "8.0") == "bfloat16"
    assert auto("gpu", "Tesla T4", "7.5") == "float32"
    assert auto("gpu", "AMD Instinct", "gfx942") == "float32"


def test_a_cache_that_the_user_set_is_kept(monkeypatch):
    from sora_jax.runtime import enable_compile_cache

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere/else")
    assert enable_compile_cache() == "/somewhere/else"
