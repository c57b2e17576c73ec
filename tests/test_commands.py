"""Commands beside `sample`: export, eval and bench, and the warning about words that a model never read."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from sora_jax import cli
from sora_jax.canvas import Canvas
from sora_jax.commands import jobs as asked
from sora_jax.config import load_config
from sora_jax.data.world import heldout_prompts
from sora_jax.data.world.words import world_prompts, world_words
from sora_jax.errors import UserError
from sora_jax.evaluation import continuation, filters
from sora_jax.pipeline import Pipeline
from sora_jax.record import Record
from sora_jax.video import Video
from sora_jax.vocabulary import nearest_prompt, unknown_words, words_of
from sora_jax.weights import original
from sora_jax.weights.layout import load_folder
from sora_jax.weights.original import save_original


def run(capsys, *argv: object) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr."""
    code = cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ---------------------------------------------------------------------------------------------------------- export


def test_export_keeps_every_weight(tmp_path, capsys, tiny_model):
    code, out, _ = run(capsys, "export", tiny_model, tmp_path / "mine-2", "--json")
    assert code == 0
    document = json.loads(out)
    before, after = Pipeline.load(tiny_model).folder, Pipeline.load(tmp_path / "mine-2").folder
    leaves = 0
    for name in ("transformer", "autoencoder", "text_encoder"):
        for a, b in zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)), strict=True):
            np.testing.assert_array_equal(a, b)
            leaves += a.size
    assert document["parameters"] == leaves
    assert document["bytes"] == size(tmp_path / "mine-2")
    assert after.defaults.version == "mine-2"


def test_export_in_half_precision_is_half_the_size(tmp_path, capsys, tiny_model):
    assert run(capsys, "export", tiny_model, tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    (full,), (half,) = (list((path / "vae").glob("*.safetensors")) for path in (tiny_model, tmp_path / "half"))
    assert half.stat().st_size < 0.75 * full.stat().st_size  # names and shapes are not halved


def test_the_model_card_shows_what_was_measured(tmp_path, capsys, tiny_model):
    metrics: dict = {"color": {"value": 0.925, "low": 0.88, "high": 0.95}}
    metrics["gravity"] = dict.fromkeys(("value", "low", "high"))  # null: nothing fell
    (tmp_path / "eval.json").write_text(json.dumps({"suite": "world", "n": 200, "metrics": metrics}))
    flags = ("--name", "ball-3", "--evaluation", tmp_path / "eval.json")
    assert run(capsys, "export", tiny_model, tmp_path / "out", *flags)[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# ball-3" in card
    assert "| color | 0.925 | 0.88 to 0.95 |" in card
    assert "gravity" not in card
    assert "## Licence" in card


def test_export_does_not_overwrite_unasked(tmp_path, capsys, tiny_model):
    target = tmp_path / "out"
    assert run(capsys, "export", tiny_model, target)[0] == 0
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    code, _, err = run(capsys, "export", tiny_model, target, "--name", "other")
    assert code == 2
    assert "--force overwrites it" in err[-1]
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert run(capsys, "export", tiny_model, target, "--name", "other", "--force")[0] == 0
    assert Pipeline.load(target).name == "other"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "int8"], 'weights cannot be written as "int8"'),
        (["--layout", "orignal"], 'unknown layout "orignal": did you mean "original"'),
        (["--layout", "original"], "this model reads bytes: use the layout diffusers"),
        (["--evaluation", "none.json"], "none.json does not exist"),
        (["--evaluation", __file__], "is not what sora-jax eval --json prints"),
    ],
)
def test_export_mistakes_are_one_line(tmp_path, capsys, tiny_model, flags, message):
    code, out, err = run(capsys, "export", tiny_model, tmp_path / "out", *flags)
    assert (code, out) == (2, "")
    assert message in err[-1]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ verify-model


def test_a_whole_model_is_verified(capsys, tiny_model):
    code, out, _ = run(capsys, "verify-model", tiny_model)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[::2]] == ["transformer", "vae", "text_encoder"]
    code, out, _ = run(capsys, "verify-model", "world", "--json")
    assert code == 0
    by_name = {one["component"]: one for one in json.loads(out)["components"]}
    folder = Pipeline.load("world").folder
    assert by_name["transformer"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(folder.transformer))
    everything = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(folder.autoencoder)])
    assert by_name["vae"]["largest"] == pytest.approx(np.abs(everything).max())
    assert by_name["vae"]["deviation"] == pytest.approx(everything.std(), rel=1e-4)
    assert by_name["vae"]["dtypes"] == ["BF16"]


WAN = Path(__file__).parent / "fixtures" / "wan_t2v"


def test_the_authors_files_are_verified_too(capsys, tmp_path, monkeypatch):
    """The same numbers under the authors' names: only the hash, which names go into, is another."""
    model = load_folder(WAN)
    monkeypatch.setattr(original, "AUTOENCODERS", {"Wan2.1_VAE": model.autoencoder_config})  # a name stands for sizes
    save_original(tmp_path / "model", model)
    found = []
    for path in (WAN, tmp_path / "model"):
        code, out, _ = run(capsys, "verify-model", path, "--json")
        assert code == 0
        components = json.loads(out)["components"]
        found.append({one.pop("component"): one for one in components})
        assert all(one.pop("sha256") and one.pop("tensors") for one in components)
    for name, one in found[0].items():
        assert found[1][name].pop("deviation") == pytest.approx(one.pop("deviation"), rel=1e-6)  # another order of sums
        assert found[1][name] == one
    (tmp_path / "model" / "Wan2.1_VAE.safetensors").unlink()
    code, out, err = run(capsys, "verify-model", tmp_path / "model")
    assert (code, out, "should hold one file of the autoencoder" in err[-1]) == (2, "", True)
    (tmp_path / "empty").mkdir()
    code, out, err = run(capsys, "verify-model", tmp_path / "empty")
    assert (code, out, "is not a model folder" in err[-1]) == (2, "", True)


def test_an_autoencoder_of_other_sizes_has_no_place_in_the_authors_layout(capsys, tmp_path):
    """The fixture is Wan in all but its sizes, which no file of that layout would tell."""
    code, out, err = run(capsys, "export", WAN, tmp_path / "out", "--layout", "original")
    assert (code, out) == (2, "")
    assert "Wan2.1_VAE or Wan2.2_VAE, stands for sizes and statistics of latents, and this one has others" in err[-1]
    assert not (tmp_path / "out").exists()


def test_sizes_of_the_authors_files_that_cannot_be_are_refused(tmp_path, monkeypatch):
    model = load_folder(WAN)
    monkeypatch.setattr(original, "AUTOENCODERS", {"Wan2.1_VAE": model.autoencoder_config})
    save_original(tmp_path / "model", model)
    path = epath.Path(tmp_path / "model")
    config, text = path / "config.json", path / "models_t5_umt5-xxl-enc.safetensors"
    written = json.loads(config.read_text())
    for heads in (0, 5):  # of a width of 24
        config.write_text(json.dumps(written | {"num_heads": heads}))
        with pytest.raises(UserError, match=f"dim 24 is not shared evenly by num_heads {heads}"):
            original.open_original(path)
    config.write_text(json.dumps(written))
    tensors = load_file(text)
    for name, other in (
        ("token_embedding.weight", np.ones(5, np.float32)),
        ("blocks.0.pos_embedding.embedding.weight", np.ones((32, 0), np.float32)),
        ("blocks.0.ffn.fc1.weight", np.array(1, np.float32)),
    ):
        save_file(tensors | {name: other}, text)
        with pytest.raises(UserError, match="is not a UMT5 encoder: its tensors have other axes"):
            original.open_original(path)


@pytest.mark.parametrize(
    ("value", "why"), [(np.nan, "1 of .* numbers are not finite"), (5e4, "holds 5e"), (None, "is all zeros")]
)
def test_numbers_that_cannot_be_are_named(capsys, tiny_model, tmp_path, value, why):
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "blocks.1.attn1.to_q.weight"
    if value is None:
        tensors[name][:] = 0
    else:
        tensors[name][2, 3] = value
    save_file(tensors, file)
    code, _, err = run(capsys, "verify-model", tmp_path / "model")
    assert code == 2
    assert re.search(f"has 1 tensors .* transformer: {name} {why}", err[-1])
    del tensors[name]
    save_file(tensors, file)
    code, _, err = run(capsys, "verify-model", tmp_path / "model")
    assert (code, f'lacks tensor "{name}"' in err[-1]) == (2, True)


# ---------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_model) -> Path:
    """A diffusion run of the tiny model with one checkpoint, as the loop leaves it."""
    from sora_jax import config as configs
    from sora_jax.bench.programs import training_program
    from sora_jax.sharding import make_mesh
    from sora_jax.training.checkpoint import Checkpoints

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    model = Pipeline.load(tiny_model).folder
    config = configs.override(
        configs.Config(transformer=model.transformer_config, text_encoder=model.text_encoder_config),
        [
            *("train.batch_size=1", "data.row_tokens=8", "data.row_text=64", "data.groups=2", "optimizer.name=adamw"),
            *(f"data.autoencoder={tiny_model}", "sample.frames=5", "sample.height=16", "sample.width=16"),
        ],
    )
    program = training_program(config, make_mesh({"data": 1}, jax.devices()[:1]), jnp.dtype("float32"))
    draw = np.random.default_rng(0)

    def value(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jax.device_put(draw.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)

    state = jax.tree.map(value, program.state)
    folder.mkdir()
    (folder / "config.json").write_text(configs.to_json(config))
    (folder / "metrics.jsonl").write_text(
        '{"step": 5, "validation_loss": 0.5}\n{"step": 9, "validation_loss": 0.4}\n{"st'
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(7, state, {"config": configs.to_dict(config), "batches": {}, "averages": {}})
    checkpoints.close()
    return folder


def test_a_run_is_a_model(tmp_path, capsys, workdir, tiny_model):
    """With the autoencoder it was trained on; exported, it is the same."""
    assert run(capsys, "export", workdir, tmp_path / "out", "--json")[0] == 0
    pipe, exported, encoder = (Pipeline.load(path) for path in (workdir, tmp_path / "out", tiny_model))
    assert pipe.name == "tiny-7"
    assert pipe.extent() == (5, 16, 16)
    assert pipe.folder.tokenizer.max_length == 64
    for name, other in (("transformer", exported), ("text_encoder", exported), ("autoencoder", encoder)):
        ours, theirs = (jax.tree.leaves(getattr(each.folder, name)) for each in (pipe, other))
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| validation_loss | 0.5 |" in card  # of the last validation before the checkpoint
    assert "## Prompts it knows" in card


def test_an_autoencoder_alone_is_no_model(capsys, tmp_path, workdir):
    import shutil

    shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["train"]["stage"] = "autoencoder"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, "sample", "a red ball", "--model", tmp_path / "run", "--out", tmp_path / "a.mp4")
    assert code == 2
    assert "Traceback" not in "".join(err)


def test_checkpoints_are_listed_and_every_byte_is_checked(capsys, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    code, out, _ = run(capsys, "checkpoint", "ls", tmp_path / "run", "--json")
    (entry,) = json.loads(out)["checkpoints"]
    files = [path for path in (tmp_path / "run" / "checkpoints" / str(entry["step"])).rglob("*") if path.is_file()]
    assert (code, entry["bytes"]) == (0, sum(path.stat().st_size for path in files))
    code, out, _ = run(capsys, "checkpoint", "verify", tmp_path / "run")
    assert (code, out.split()[-1]) == (0, "good")
    data = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    code, out, err = run(capsys, "checkpoint", "verify", tmp_path / "run")
    assert code == 2
    assert f"{data.name} has changed" in out
    assert "1 of 1 checkpoints" in err[-1]
    for flags, says in ((("lst", workdir), 'did you mean "ls"'), (("ls", tmp_path), "is not the workdir of a run")):
        code, _, err = run(capsys, "checkpoint", *flags)
        assert (code, says in err[-1]) == (2, True)


# ---------------------------------------------------------------------------------------------------------- eval, bench


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "--suite", "wolrd"], 'unknown suite "wolrd"'),
        (["eval", "--n", "0"], "--n and --batch-size must be >= 1"),
        (["eval", "--seed", "-1"], "seed must be a whole number from 0"),
        (["eval", "--seed", str(2**32 - 1), "--n", "2"], f"not {2**32}"),
        (["eval", "--suite", "storys"], 'did you mean "stories"?'),
        (["eval", "--shots", "9,9"], "--shots is for --suite stories, not world"),
        (["eval", "--autoencoder", "world"], "--autoencoder is for --suite reconstruction or ceiling, not world"),
        (["eval", "--suite", "stories", "--shots", "9,x"], '--shots takes numbers of frames, say 9,9: "9,x" is none'),
        (["eval", "--suite", "stories", "--frames", "9"], "--shots says how many frames there are"),
        (["eval", "--config.data.mix.pair=1"], "name it, say --config world_2"),
        (["eval", "--config", "wrold"], 'did you mean "world"?'),
        (["bench", "loadr"], 'unknown row "loadr"; did you mean "loader"?'),
        (["bench", "loader", "--model", "wrold"], 'did you mean "world"?'),
    ],
)
def test_mistakes_are_one_line(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err[-1]


def test_eval_of_noise_finds_no_objects(capsys, tiny_model, monkeypatch):
    asked = painted(monkeypatch, noise)
    flags = ("--n", 5, "--batch-size", 3, "--frames", 9, "--height", 64, "--width", 64, "--steps", 4, "--json")
    code, out, _ = run(capsys, "eval", "--model", tiny_model, *flags)
    assert code == 0
    document = json.loads(out)
    assert (document["suite"], document["n"], document["model"]) == ("world", 5, "tiny-1")
    assert document["metrics"]["all"]["value"] == 0
    assert all(metric["low"] <= metric["value"] <= metric["high"] for metric in document["metrics"].values())
    assert [(len(drawn), seeds, settings["steps"]) for drawn, seeds, settings in asked] == [
        (3, [0, 1, 2], 4),
        (2, [3, 4], 4),
    ]


def painted(monkeypatch, paint: Callable[[Canvas, int], np.ndarray]) -> list[tuple[list[Canvas], list[int], dict]]:
    """Canvases are painted in place of being sampled; what was asked for is noted."""
    asked = []

    def made(self: Pipeline, drawn: list[Canvas], *, seeds: list[int], **settings: object) -> list[Video]:
        asked.append((list(drawn), seeds, settings))
        record = Record(prompt="", seed=0, model="painted")
        return [Video(paint(one, seed), 8.0, record) for one, seed in zip(drawn, seeds, strict=True)]

    monkeypatch.setattr(Pipeline, "sample_canvases", made)
    return asked


def noise(one: Canvas, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (one.frames, one.height, one.width, 3)).astype(np.uint8)


def test_eval_asks_for_the_mix_of_a_config(capsys, tiny_model, monkeypatch):
    asked = painted(monkeypatch, noise)
    flags = ("--config", "world_2", "--config.data.mix.relation=100", "--n", 4, "--frames", 9, "--width", 64)
    code, out, _ = run(capsys, "eval", "--model", tiny_model, *flags, "--height", 64, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["config"] == "world_2"
    mix = load_config("world_2", ["data.mix.relation=100"]).data.mix
    ((drawn, _, _),) = asked
    assert [one.prompts for one in drawn] == [(prompt.text,) for prompt in heldout_prompts(4, 0, mix=mix)]
    assert document["metrics"]["relation"]["n"] >= 2


def test_eval_of_stories_asks_for_a_prompt_for_each_shot(capsys, tiny_model, monkeypatch):
    asked = painted(monkeypatch, noise)
    flags = ("--shots", "9,13", "--n", 3, "--height", 32, "--width", 32)
    code, out, _ = run(capsys, "eval", "--suite", "stories", "--model", tiny_model, *flags)
    assert code == 0
    assert "stories, 3 samples of tiny-1" in out
    assert re.search(r"shot.color +0.000 +0.000 to 0.\d+ +of 6", out)
    ((drawn, _, _),) = asked
    assert all([span.frames for span in one.spans] == [9, 13] for one in drawn)
    assert all(len(set(one.prompts)) == 2 for one in drawn)


def test_eval_of_continuations_gives_the_first_frame(capsys, tiny_model, monkeypatch):
    """What comes back is a still of it, so the model is the baseline that copies it."""
    asked = painted(monkeypatch, lambda one, seed: np.repeat(one.spans[0].given, one.frames, axis=0))
    monkeypatch.setattr(Pipeline, "encode", lambda self, video: video)
    monkeypatch.setattr(Pipeline, "decode", lambda self, video: video)
    monkeypatch.setattr(continuation, "NEIGHBOURS", 20)
    flags = ("--n", 3, "--frames", 9, "--height", 32, "--width", 32, "--json")
    code, out, _ = run(capsys, "eval", "--suite", "continuation", "--model", tiny_model, *flags)
    assert code == 0
    metrics = json.loads(out)["metrics"]
    assert metrics["model.mse"] == metrics["copy.mse"]
    assert metrics["autoencoder.spatial_iou"]["value"] == 1
    ((drawn, _, _),) = asked
    assert all(one.spans[0].given.shape == (1, 32, 32, 3) for one in drawn)


def test_eval_of_distances_names_its_encoder(capsys, tiny_model, monkeypatch):
    """True clips after an autoencoder that changes nothing are as far as the floor; noise is farther than a still."""
    painted(monkeypatch, noise)
    monkeypatch.setattr(Pipeline, "encode", lambda self, video: video)
    monkeypatch.setattr(Pipeline, "decode", lambda self, video: video)
    flags = ("--n", 8, "--frames", 9, "--height", 32, "--width", 32, "--json")
    code, out, _ = run(capsys, "eval", "--suite", "distance", "--model", tiny_model, *flags)
    assert code == 0
    document = json.loads(out)
    metrics = document["metrics"]
    assert metrics["autoencoder"]["value"] == pytest.approx(metrics["floor"]["value"])
    assert metrics["floor"]["value"] < metrics["still"]["value"] < metrics["distance"]["value"]
    assert document["encoder"] == {"name": filters.NAME, "fingerprint": filters.fingerprint()}
    assert document["size"] == {"frames": 9, "height": 32, "width": 32}


def test_eval_of_an_autoencoder_that_keeps_one_frame(capsys, tiny_model, monkeypatch):
    monkeypatch.setattr(Pipeline, "encode", lambda self, video: video)
    monkeypatch.setattr(Pipeline, "decode", lambda self, video: np.repeat(video[:, :1], video.shape[1], axis=1))
    code, out, _ = run(capsys, "eval", "--suite", "reconstruction", "--model", tiny_model, "--n", 3, "--json")
    assert code == 0
    metrics = json.loads(out)["metrics"]
    # Such an autoencoder is the baseline itself.
    assert metrics["psnr"]["value"] == metrics["copy_psnr"]["value"]
    assert metrics["ssim"]["value"] == metrics["copy_ssim"]["value"]


def test_another_autoencoder_is_judged_in_place_of_the_models(capsys, tiny_model):
    flags = ("--suite", "reconstruction", "--n", 1, "--frames", 5, "--height", 32, "--width", 32, "--json")
    reports = []
    for models in (("--model", "world"), ("--model", tiny_model, "--autoencoder", "world"), ("--model", tiny_model)):
        code, out, err = run(capsys, "eval", *models, *flags)
        assert code == 0, err
        reports.append(json.loads(out))
    its_own, in_its_place, another = reports
    assert in_its_place["model"] == "world"
    for name in ("psnr", "ssim"):
        assert in_its_place["metrics"][name]["value"] == pytest.approx(its_own["metrics"][name]["value"], rel=1e-3)
        assert in_its_place["metrics"][name]["value"] > another["metrics"][name]["value"] + 0.1


@pytest.mark.parametrize(("decode", "right"), [(lambda video: video, 1.0), (np.zeros_like, 0.0)])
def test_the_ceiling_is_what_the_autoencoder_leaves_of_true_clips(capsys, tiny_model, monkeypatch, decode, right):
    monkeypatch.setattr(Pipeline, "encode", lambda self, video: video)
    monkeypatch.setattr(Pipeline, "decode", lambda self, video: decode(video))
    size = ("--frames", 17, "--height", 64, "--width", 96)
    flags = ("--n", 3, "--batch-size", 2, *size, "--config", "world_2", "--json")
    code, out, _ = run(capsys, "eval", "--suite", "ceiling", "--model", tiny_model, *flags)
    assert code == 0
    document = json.loads(out)
    assert (document["suite"], document["n"], document["config"]) == ("ceiling", 3, "world_2")
    assert {document["metrics"][name]["value"] for name in ("color", "shape", "count", "all")} == {right}


@pytest.mark.parametrize("suite", ["world", "ceiling"])
def test_eval_refuses_clips_too_short_to_show_motion(capsys, tiny_model, suite):
    code, _, err = run(capsys, "eval", "--model", tiny_model, "--suite", suite)
    assert code == 2
    assert "motion cannot be judged in 5 frames" in err[-1]


def test_bench_reports_in_its_schema(capsys, tiny_model):
    code, out, _ = run(capsys, "bench", "world-render", "--model", tiny_model, "--json")
    assert code == 0
    (row,) = json.loads(out)["rows"]
    assert list(row) == ["name", "seconds", "reference", "reference_seconds", "peak_bytes"]
    assert row["name"] == "world-render"
    assert 0 < row["seconds"] < 60
    assert row["peak_bytes"] > 10 * 2**20  # an interpreter with numpy is not smaller


def test_every_bench_row_is_described_and_measurable():
    from sora_jax.bench import reference, rows, train_loop, wan_rows
    from sora_jax.commands import bench

    measured = {*rows.ROWS, *wan_rows.ROWS, *train_loop.ROWS} - {row for _, row in bench.BARE.values()}
    assert {name for name in bench.ROWS if not name.startswith("first-video")} == measured
    assert set(bench.REFERENCED) == set(reference.ROWS) == set(wan_rows.ROWS) - set(bench.NAMED_ONLY)


# ---------------------------------------------------------------------------------------------------------- words


def test_words_that_were_never_read_are_named_once_with_the_nearest_prompt():
    card = {"words": ["a", "red", "ball", "bounces", "on", "the", "floor", "falls"]}
    card["prompts"] = ["a ball falls", "a red ball bounces on the floor"]
    jobs = [asked.Job(prompt, None, 0, "x") for prompt in ("a red dragon bounces on the floor", "a Ball flies, flies!")]
    with pytest.warns(UserWarning, match="never read") as caught:
        asked.warn_of_unknown_words(jobs, "world-1", card)
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith('world-1 has never read "dragon", "flies"')
    assert '"a red ball bounces on the floor"' in text


def test_no_warning_where_all_is_known_or_nothing_is_said():
    jobs = [asked.Job("a red ball", None, 0, "x")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked.warn_of_unknown_words(jobs, "world-1", {"words": ["a", "red", "ball"]})
        asked.warn_of_unknown_words(jobs, "open-model", {})


def test_words_of_a_text():
    assert words_of("Two balls, up-left; it's fine.") == ["two", "balls", "up-left", "it's", "fine"]
    assert unknown_words("grün Ball ball", ["ball"]) == ["grün"]
    assert nearest_prompt("anything", []) is None


def test_the_world_knows_its_own_prompts():
    from sora_jax.data.world import COLORS, SHAPES, Mix, prompts

    words = world_words(clips=500)
    assert set(COLORS) <= set(words)
    assert {shape if shape != "circle" else "ball" for shape in SHAPES} <= set(words)
    assert not [prompt for prompt in world_prompts(count=50) if unknown_words(prompt, words)]
    assert not [p.text for p in prompts(100, 3, split="heldout") if unknown_words(p.text, words)]
    # and a world with more in it more words, those of cuts among them
    mix = Mix(relation=0.3, floating=0.2, travel=0.2, lit=0.5, textured=0.5, same=0.7)
    second = world_words(mix, clips=1000)
    assert {"between", "weightlessly", "tilts", "checkered", "dim", "same"} <= set(second) - set(words)
    assert not [p.text for p in prompts(100, 3, split="heldout", mix=mix) if unknown_words(p.text, second)]
