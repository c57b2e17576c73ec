"""`sora-jax plan`: bytes against sums by hand, FLOPs against the published ones, and the compiler's own numbers."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sora_jax import cli
from sora_jax.bench.compute import autoencoder_flops, compute, count_collectives, link_bytes
from sora_jax.bench.memo import remembered
from sora_jax.bench.plan import over_budget, plan_sampling, plan_training, with_size
from sora_jax.bench.programs import autoencoder_program
from sora_jax.bench.reckon import Reckoned, meshes, reckon_training
from sora_jax.bench.rows import loader_sizes
from sora_jax.bench.search import first_that_fits, search_training
from sora_jax.bench.targets import PRODUCTS, find_target
from sora_jax.commands.plan import loader_cost
from sora_jax.config import from_dict, load_config, override
from sora_jax.errors import UserError
from sora_jax.pipeline import Pipeline
from sora_jax.shapes import Extent, Stride
from sora_jax.sharding import make_mesh
from sora_jax.weights.component import config_header
from sora_jax.weights.umt5 import TEXT_ENCODER
from sora_jax.weights.wan import AUTOENCODER, TRANSFORMER

GIB = 2**30
ONE = find_target(None, 80.0)


def elements(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_bytes_of_training_are_those_of_its_parameters():
    """Float32 weights, their average and two moments; the text encoder in bfloat16; a batch of latents and ids."""
    made = plan_training(load_config("wan_1_3b", ["train.batch_size=2"]), ONE, {})
    n = 1_418_996_800
    assert made.parameters == n
    assert made.parts["weights"] == made.parts["average"] == 4 * n
    assert made.parts["optimizer"] == pytest.approx(8 * n, rel=1e-6)  # and a counter
    umt5 = 5_680_910_336
    assert made.parts["kept modules"] == 2 * umt5
    N, L, G = 32_760, 512, 21
    assert made.parts["batch"] == 2 * (N * 64 * 4 + N * 3 * 4 + 3 * N * 4 + 3 * G * 4 + 2 * L * 4)
    assert (made.tokens, made.rows, made.devices) == (2 * N, 2, 1)
    assert made.compile_seconds is made.collectives is None
    assert made.peak_bytes_per_device == sum(made.parts.values())
    assert made.fits == (made.peak_bytes_per_device <= 0.92 * 80 * GIB)


@pytest.mark.parametrize(("name", "published"), [("wan_1_3b", 283e12), ("wan_14b", 6523e12)])
def test_flops_are_the_published_ones(name: str, published: float):
    """The blocks' forward pass by formula is the published figure; embeddings, head and text encoder come on top. In
    training three times what learns, and the text encoder once."""
    config = load_config(name, ["train.batch_size=1"])
    t, N, L = config.transformer, config.data.row_tokens, config.data.row_text
    D, ff = t.dim, t.ffn_dim
    blocks = t.n_layers * (2 * N * (6 * D**2 + 2 * D * ff) + 4 * L * D**2 + 4 * N**2 * D + 4 * N * L * D)
    assert blocks == pytest.approx(published, rel=0.01)
    borders = 2 * N * 64 * D * 2 + 2 * L * (4096 * D + D**2)
    e = config.text_encoder
    inner = e.num_heads * e.d_kv
    text = e.num_layers * (2 * L * (4 * e.d_model * inner + 3 * e.d_model * e.d_ff) + 4 * L**2 * inner)
    made = plan_training(config, ONE, {})
    assert config.train.learns == "transformer"
    assert made.flops_per_step == pytest.approx(3 * (blocks + borders) + text, rel=0.01)
    assert made.executed_flops_per_step > made.flops_per_step  # remat, and attention's own recomputation
    sampled = plan_sampling(load_config(name), ONE, {}, 1)
    assert sampled.flops_per_step == pytest.approx(2 * (blocks + borders), rel=0.01)  # with the prompt and without


def test_recomputation_is_executed_and_does_not_count():
    plain = plan_training(load_config("wan_1_3b", ["train.batch_size=1", "transformer.remat=none"]), ONE, {})
    whole = plan_training(load_config("wan_1_3b", ["train.batch_size=1", "transformer.remat=full"]), ONE, {})
    assert whole.flops_per_step == plain.flops_per_step
    forward = plain.flops_per_step / 3
    assert whole.executed_flops_per_step - plain.executed_flops_per_step == pytest.approx(forward, rel=0.05)


def test_what_learns_decides_what_is_paid_for():
    config = load_config("wan_14b", ["train.batch_size=1"])
    whole = plan_training(config, ONE, {})
    adapters = plan_training(override(config, ["train.learns=lora", "transformer.lora_rank=16"]), ONE, {})
    assert not whole.fits
    assert any("lora" in line for line in whole.advice)
    d, ff, r, layers = 5120, 13824, 16, 40
    of_rank = layers * r * (8 * 2 * d + 2 * (d + ff))
    assert adapters.parts["weights"] == 4 * of_rank
    assert adapters.parts["kept modules"] == 2 * (14_288_491_584 + 5_680_910_336)


def test_a_size_becomes_tokens():
    config = with_size(load_config("wan_14b"), Stride(4, 8, 8), Extent(81, 480, 832), 4)
    assert (config.data.row_tokens, config.data.groups, config.train.batch_size) == (32_760, 21, 4)


TINY = {
    "transformer": {
        "n_layers": 1,
        "n_heads": 2,
        "head_dim": 8,
        "ffn_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "patch": (1, 1, 1),
        "text_dim": 16,
        "frequency_dim": 16,
    },
    "text_encoder": {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "data": {"row_tokens": 32, "row_text": 8, "groups": 2},
    "train": {"batch_size": 8},
}


@pytest.mark.runs
def test_the_compiler_agrees_on_the_devices_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = find_target("local", None)
    made = plan_training(from_dict(TINY), target, {"data": 2, "fsdp": 4})
    assert made.devices == len(jax.devices()) == 8
    assert made.mesh == {"data": 2, "fsdp": 4}
    counted = sum(size for part, size in made.parts.items() if part != "the step itself")
    assert made.argument_bytes_per_device == pytest.approx(counted, rel=0.01)
    assert made.peak_bytes_per_device > made.argument_bytes_per_device / 2
    assert made.compile_seconds is not None
    assert made.collectives
    assert "all-reduce" in made.collectives  # gradients of eight devices' rows are summed
    assert made.fits
    assert made.advice == ()
    assert made.compiled_on is None
    again = plan_training(from_dict(TINY), target, {"data": 2, "fsdp": 4})
    assert again.compiled_on == dt.date.today().isoformat()
    assert dataclasses.replace(again, compiled_on=None) == made  # the seconds are those of the real compilation
    other = plan_training(override(from_dict(TINY), ["optimizer.clip_norm=2"]), target, {"data": 2, "fsdp": 4})
    assert other.compiled_on is None


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Ran out of memory in memory space hbm. Used 35.06G of 31.25G hbm. Exceeded hbm capacity by 3.81G.", 35.06),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (40.61G) exceeds available HBM "
            "(31.25G).",
            40.61,
        ),
    ],
)
def test_what_the_compiler_would_have_needed_is_in_its_refusal(message: str, expected: float):
    assert over_budget(f"RESOURCE_EXHAUSTED: {message}") == pytest.approx(expected * 2**30)


def test_another_refusal_is_one_line():
    with pytest.raises(UserError, match="the compiler refuses the program: INTERNAL: no such kernel"):
        over_budget("INTERNAL: no such kernel\nstack")


def test_an_answer_is_found_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def find() -> dict[str, int]:
        asked.append(len(asked))
        return {"answer": 41 + len(asked)}

    assert remembered(["a", "b"], find) == ({"answer": 42}, None)
    assert remembered(["a", "b"], find) == ({"answer": 42}, dt.date.today().isoformat())
    assert remembered(["ab"], find) == ({"answer": 43}, None)
    assert remembered(["a", "b"], find, again=True) == ({"answer": 44}, None)
    for file in tmp_path.rglob("*.json"):
        file.write_text(file.read_text()[:-9])  # a disk that was full
    assert remembered(["a", "b"], find) == ({"answer": 45}, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(next(tmp_path.rglob("*.json"))))  # no folder can be made there
    assert remembered(["a", "b"], find) == ({"answer": 46}, None)


def test_candidate_meshes_share_everything_evenly():
    config = load_config("wan_1_3b")  # 12 heads, width 1536, MLP 8960
    found = list(meshes(config, 16, 4))
    assert {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 4} in found
    for mesh in found:
        assert math.prod(mesh.values()) == 16
        assert 4 % (mesh["data"] * mesh["fsdp"]) == 0
        assert 12 % mesh["tensor"] == 0
    # rows over data x fsdp in 1, 2 or 4 parts (in 1 + 2 + 3 ways), heads in 1, 2 or 4; what is left is sequence
    assert len(found) == 6 * 3


def test_arithmetic_knows_what_each_axis_saves_and_costs():
    """Against sums by hand: bytes of the state, and what a device sends through its links in a step."""
    config = load_config("wan_1_3b", ["train.batch_size=4", "transformer.remat=none"])
    n, D, layers, tokens = 10**9, 1536, 30, 32_760
    one = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    links, peak = 600e9, 459e12  # of a v5p
    forward = 283e12 + 5.68e9 * 2 * 512  # of the transformer's blocks, and of the text encoder
    products = 4 * 3 * forward / peak
    alone = reckon_training(config, one, "v5p", n, 0)
    assert alone.seconds == pytest.approx(products, rel=0.02)

    def extra(**axes: int) -> float:
        return reckon_training(config, one | axes, "v5p", n, 0).seconds - alone.seconds / math.prod(axes.values())

    fsdp = reckon_training(config, one | {"fsdp": 4}, "v5p", n, 0)
    gathered, scattered = 2 * 2 * n * 3 / 4, 4 * n * 3 / 4
    assert extra(fsdp=4) == pytest.approx((gathered + scattered) / links)
    sequence = reckon_training(config, one | {"sequence": 4}, "v5p", n, 0)
    traded = 2 * layers * 4 * (4 * tokens / 4) * D * 2 * 3 / 4  # four arrays, forward and backward, in bfloat16
    summed = 2 * 4 * n
    assert extra(sequence=4) == pytest.approx((traded + summed) / links)
    assert fsdp.peak_bytes == pytest.approx(sequence.peak_bytes - 20 * n * 3 / 4)  # the same activations on each
    assert extra(sequence=8) > extra(sequence=4)  # 12 heads: 4 x 2, with a ring


def test_the_search_compiles_in_the_order_of_time_and_no_hopeless_mesh():
    base = dataclasses.replace(plan_training(load_config("wan_1_3b", ["train.batch_size=1"]), ONE, {}), remat=None)
    target = find_target(None, 100.0)

    def search(peaks: dict[int, tuple[float, float]], last: bool = False) -> tuple[list[int], bool]:
        """Which meshes are compiled, by their fsdp, when arithmetic and the compiler say so many GiB of each."""
        compiled, said = [], []

        def compile_(mesh):
            compiled.append(mesh["fsdp"])
            peak = int(peaks[mesh["fsdp"]][1] * GIB)
            return dataclasses.replace(base, mesh=dict(mesh), peak_bytes_per_device=peak, fits=peak <= 92 * GIB)

        candidates = [Reckoned({"fsdp": n}, gib * GIB, float(n)) for n, (gib, _) in peaks.items()]
        tried = []
        plan = first_that_fits(candidates, target, compile_, tried, said.append, "remat full", last)
        assert len(tried) == len(compiled)
        return compiled, plan is not None

    assert search({2: (80, 90), 1: (85, 95), 4: (60, 60)}) == ([1, 2], True)  # least time first
    assert search({1: (80, 95), 2: (85, 10), 4: (60, 60)}) == ([1, 4], True)  # 2 should need more than 1 did
    assert search({100: (85, 85), 101: (70, 70)}) == ([101], True)  # about as fast, and smaller
    assert search({1: (500, 10), 2: (400, 10)}) == ([], False)  # hopeless
    assert search({1: (500, 95), 2: (400, 95)}, last=True) == ([2], False)  # something has to be said
    assert search({n: (100 - n, 99) for n in range(1, 9)}) == ([1, 2, 3], False)  # three, and no more


def test_collectives_are_counted_as_often_as_they_run():
    """Results of one device; in a loop of 40 turns 40 times, in a loop within it 40 times 3."""
    hlo = """HloModule step
%inner (p: f32[4]) -> f32[4] {
  %f = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1}}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = f32[8,16]{1,0} all-gather(%x), dimensions={0}
  %w2 = (s32[], f32[4]) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

%done (p: f32[4]) -> f32[16] {
  %h = f32[16]{0} all-gather(%p), channel_id=7, dimensions={0}
}

%five (p: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%reduce (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[2]{0} reduce-scatter(%p), channel_id=8
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %b = (bf16[4]{0}, f32[2,2]{1,0}) all-reduce(%y, %z), to_apply=%sum
  %c = f32[16]{0} all-gather-start(%w), dimensions={0}, channel_id=7
  %g = f32[16]{0} fusion(%h), kind=kCustom, calls=%done
  %k = (s32[], f32[4]) while(%t), condition=%five, body=%reduce
  %d = f32[16]{0} all-gather-done(%c)
  %e = f32[3]{0} add(%p, %q)
  %s = (f32[2]{0}, f32[8]{0:T(8)S(1)}, u32[], u32[]) collective-permute-start(%e), channel_id=9
  %m1 = f32[6]{0} all-to-all(%a), channel_id=10
  %m = (f32[1]{0}, f32[1]{0}, f32[1]{0}, f32[1]{0}, f32[1]{0}, /*index=5*/f32[1]{0}) all-to-all(%a, %b), channel_id=10
  %w = (s32[], f32[4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"40"}}
}
"""
    found = count_collectives(hlo)
    assert found == {
        "all-gather": {"count": 41, "bytes": 40 * 4 * 8 * 16 + 4 * 16},
        "all-reduce": {"count": 1, "bytes": 2 * 4 + 4 * 4},
        "collective-permute": {"count": 121, "bytes": 120 * 4 * 4 + 4 * 8},
        "reduce-scatter": {"count": 5, "bytes": 5 * 2 * 4},
        "all-to-all": {"count": 2, "bytes": 2 * 6 * 4},  # what `shard_map` makes shares a channel
    }
    permuted = 120 * 4 * 4 + 4 * 8
    assert link_bytes(found) == 40 * 4 * 8 * 16 + 4 * 16 + 2 * (2 * 4 + 4 * 4) + permuted + 5 * 2 * 4 + 2 * 6 * 4


class Chip:
    def __init__(self, kind: str):
        self.device_kind = kind


def test_times_are_arithmetic():
    """8 chips of a v5p: 459 TFLOP/s, 2.76 TB/s of memory and 600 GB/s of links each."""
    found = compute(4e18, 5e18, [Chip("TPU v5p")] * 8, "v5p", 16, 1_000_000, {"memory": 2.76e12, "links": 1.2e12})
    assert found.seconds_at_best == pytest.approx({"products": 5e18 / (8 * 459e12), "memory": 1.0, "links": 2.0})
    half = found.at_mfu["50%"]
    seconds = 4e18 / (8 * 459e12 * 0.5)
    assert half["seconds_per_step"] == pytest.approx(seconds)
    assert half["videos_per_second"] == pytest.approx(16 / seconds)
    assert half["tokens_per_day"] == pytest.approx(86_400 * 1e6 / seconds)
    assert half["chip_hours_per_1000_steps"] == pytest.approx(8 * 1000 * seconds / 3600)
    assert all(row["reachable"] for row in found.at_mfu.values())
    # A program that executes twice the model's operations reaches half of the peak at most, by this count.
    doubled = compute(4e18, 8e18, [Chip("TPU v5p")] * 8, "v5p", 16, 1, {"memory": 0.0, "links": 0.0}).at_mfu
    assert [doubled[share]["reachable"] for share in ("40%", "50%", "60%")] == [True, True, False]
    two_a_chip = compute(4e18, 5e18, [Chip("TPU7x")] * 8, "tpu7x", 16, 1, {"memory": 0.0, "links": 0.0}).at_mfu["50%"]
    assert two_a_chip["chip_hours_per_1000_steps"] * 3.6 == pytest.approx(4 * two_a_chip["seconds_per_step"])
    assert compute(1.0, 1.0, [Chip("cpu")], "local", 1, 1, {}).at_mfu is None


def test_products_are_grids_of_as_many_chips():
    """v5e and v6e are named by chips; v4, v5p and tpu7x by cores, two a chip."""
    for product, grid in PRODUCTS.items():
        kind, _, count = product.partition("-")
        chips = 1
        for side in grid.partition(":")[2].split("x"):
            chips *= int(side)
        assert chips == int(count) // (1 if kind in ("v5e", "v6e") else 2), product


def test_the_command_prints_a_table_or_json(capsys):
    assert cli.main(["plan", "--config", "wan_1_3b", "--hbm", "80", "--batch-size", "1"]) == 0
    table = capsys.readouterr().out
    assert "1.42 B parameters · 1 videos, 32,760 tokens" in table
    assert "optimizer" in table
    assert cli.main(["plan", "--config", "wan_5b", "--hbm", "8", "--sample", "--frames", "81", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {
        "parameters",
        "devices",
        "tokens",
        "flops_per_step",
        "argument_bytes_per_device",
        "peak_bytes_per_device",
    } < set(report)
    assert report["tokens"] == 21 * 22 * 40
    assert report["fits"] is False
    assert any("--offload" in line for line in report["advice"])
    assert cli.main(["plan", "--config", "wan_5b", "--hbm", "80", "--sample", "--seconds", "10", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "10 s are 241 frames at 24 a second" in err  # 1 + 4 round(240 / 4)
    assert json.loads(out)["tokens"] == 61 * 22 * 40


FIXTURES = Path(__file__).parent / "fixtures"


def folder_of(name: str, path: Path) -> Path:
    """The small files of a model of the config `name`, without its weights."""
    config, of = load_config(name), FIXTURES / ("wan_ti2v" if name == "wan_5b" else "wan_t2v")
    index = json.loads((of / "model_index.json").read_text())
    if name == "wan_a14b":
        index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.875}
    parts = ((TRANSFORMER, config.transformer), (AUTOENCODER, config.autoencoder), (TEXT_ENCODER, config.text_encoder))
    for family, sizes in parts:
        (path / family.folder).mkdir(parents=True)
        values = config_header(family, "float32") | family.write_config(sizes)
        (path / family.folder / "config.json").write_text(json.dumps(values))
    for folder in ("tokenizer", "scheduler"):
        shutil.copytree(of / folder, path / folder)
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("name", ["wan_1_3b", "wan_14b", "wan_a14b", "wan_5b"])
@pytest.mark.parametrize("flags", [("--hbm", "80", "--sample"), ("--hbm", "80", "--batch-size", "1")])
def test_a_models_folder_is_planned_as_its_config_is(name: str, flags: tuple[str, ...], tmp_path: Path, capsys):
    reports = []
    for of in (("--config", name), ("--model", str(folder_of(name, tmp_path / "model")))):
        assert cli.main(["plan", *of, *flags, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]


def test_the_parts_of_sampling_are_parameters_in_bfloat16(tmp_path: Path, capsys):
    """The published counts of the 1.3B and of both autoencoders, the sum of UMT5-XXL's matrices."""
    d, heads, ff, layers, vocabulary = 4096, 64, 10240, 24, 256384
    umt5 = vocabulary * d + layers * (4 * d * d + 3 * d * ff + 2 * d + 32 * heads) + d
    for name, transformer, autoencoder in (
        ("wan_1_3b", 1_418_996_800, 126_892_531),
        ("wan_5b", 4_999_787_712, 704_688_668),
    ):
        flags = ["--config", name, "--sample", "--hbm", "80", "--json"]
        assert cli.main(["plan", *flags]) == 0
        parts = json.loads(capsys.readouterr().out)["parts"]
        found = {part: parts[part] for part in ("transformer", "text encoder", "autoencoder")}
        assert found == {"transformer": 2 * transformer, "text encoder": 2 * umt5, "autoencoder": 2 * autoencoder}
        assert cli.main(["plan", *flags, "--offload"]) == 0
        assert set(json.loads(capsys.readouterr().out)["parts"]) == {"transformer", "the step itself"}


def test_a_shipped_model_and_its_size_are_planned(capsys):
    assert cli.main(["plan", "--model", "world", "--sample", "--hbm", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    folder = Pipeline.load("world").folder
    assert report["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(folder.transformer))
    assert report["tokens"] == 5 * 4 * 4  # 17 frames of 64x64


def test_what_is_no_model_is_not_planned(tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    broken = folder_of("wan_1_3b", tmp_path / "broken")
    (broken / "vae" / "config.json").unlink()
    for flags, says in (
        (["--model", str(tmp_path / "empty")], "is no model: it has no model_index.json"),
        (["--model", str(tmp_path / "none")], "unknown model"),
        (["--model", str(broken)], "vae/config.json is missing"),
        (["--model", "world", "--config", "world"], "not allowed with"),
        ([], "one of the arguments --config --model is required"),
        (["--model", "world", "--sample", "--frames", "0"], "--frames must be at least 1, not 0"),
        (["--config", "world", "--hbm", "inf"], "--hbm must be > 0 and finite"),
    ):
        assert cli.main(["plan", *flags, *(["--hbm", "16"] if "--hbm" not in flags else [])]) == 2
        out, err = capsys.readouterr()
        assert (out, says in err.splitlines()[-1]) == ("", True), err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "name what is planned for"),
        (["--hbm", "0"], "--hbm must be > 0"),
        (["--topology", "v5q-128"], 'unknown topology "v5q-128"; did you mean "v5p-128"'),
        (["--hbm", "16", "--topology", "local"], "name what is planned for"),
        (["--hbm", "inf"], "--hbm must be > 0 and finite, not inf"),
        (["--hbm", "16", "--height", "100"], "100"),
        (["--hbm", "16", "--height", "0"], "--height must be at least 1, not 0"),
        (["--hbm", "16", "--frames", "0"], "--frames must be at least 1, not 0"),
        (["--hbm", "16", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--hbm", "16", "--offload"], "--offload is of sampling"),
        (["--hbm", "16", "--mesh", ""], "--mesh takes AXIS=N"),
        (["--hbm", "16", "--mesh", "fsdp=1,fsdp=1"], "--mesh gives fsdp twice"),
        (["--hbm", "16", "--mesh", "fsdp=2"], "does not multiply to the 1 devices"),
        (["--hbm", "16", "--remat", "some"], "unknown remat policy"),
    ],
)
def test_mistakes_are_one_line(flags, says, capsys):
    assert cli.main(["plan", "--config", "wan_1_3b", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config", "world_text", "--hbm", "16"], "the diffusion and autoencoder stages are planned"),
        (["--config", "world_autoencoder", "--hbm", "16"], "is compiled, not reckoned: name a --topology"),
        (["--config", "world_autoencoder", "--hbm", "16", "--sample"], "--sample plans a diffusion model"),
        (["--config", "world", "--hbm", "16", "--search"], "name a --topology"),
        (["--config", "world", "--hbm", "16", "--search", "--remat", "full"], "leave them out"),
    ],
)
def test_what_is_not_planned_is_said(flags, says, capsys):
    assert cli.main(["plan", *flags]) == 2
    assert says in capsys.readouterr().err


def test_rows_that_devices_cannot_share_are_refused():
    with pytest.raises(UserError, match="3 rows cannot be split over data x fsdp = 8"):
        plan_training(override(from_dict(TINY), ["train.batch_size=3"]), find_target("local", None), {"fsdp": 8})


def test_an_autoencoder_costs_what_its_convolutions_cost():
    """`configs/world_autoencoder.py`: 1.0 GFLOP to encode a clip, 9.6 to decode it; three times that to learn both."""
    config = load_config("world_autoencoder", ["train.batch_size=8", "optimizer.name=adamw"])
    mesh = make_mesh({"data": 8})
    whole = autoencoder_flops(config, autoencoder_program(config, mesh, jnp.dtype("bfloat16")), "tpu")
    assert whole[0] == pytest.approx(8 * 3 * (1.0e9 + 9.6e9), rel=0.1)
    assert whole[1] == pytest.approx(whole[0], rel=0.05)  # nothing is made twice
    alone = override(config, ["reconstruction.train_encoder=False", "train.init=world"])
    decoder = autoencoder_flops(alone, autoencoder_program(alone, mesh, jnp.dtype("bfloat16")), "tpu")
    assert whole[0] - decoder[0] == pytest.approx(8 * 2 * 1.0e9, rel=0.25)


def test_the_loader_is_asked_for_clips_of_the_plan():
    config = with_size(load_config("wan_14b"), Stride(4, 8, 8), Extent(81, 720, 1280), 8)
    sizes = json.loads(loader_sizes(config, Stride(4, 8, 8)))
    assert sizes["latents"] == [21, 90, 160, 16]
    assert sizes["row_tokens"] == 75_600


@pytest.mark.slow
def test_the_loader_is_measured_beside_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = override(from_dict(TINY), ["data.frames=5", "data.height=64", "data.width=64"])
    made = plan_training(config, ONE, {})
    assert loader_cost(config, made, False) is None  # nobody knows how fast the device is
    made = dataclasses.replace(made, at_mfu={"50%": {"videos_per_second": 3.0}})
    found = loader_cost(config, made, False)
    assert found is not None
    assert found["clips_per_second"] == 3.0
    assert found["cores"] == pytest.approx(3.0 / found["clips_per_second_of_a_core_here"])
    assert loader_cost(config, made, False) == found  # measured once


# ------------------------------------------------------------------------------------------------------ for real TPUs


def proof(flags: str, tmp_path, monkeypatch, capsys) -> dict:
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the tpu extra")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["plan", *flags.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.plans
def test_the_search_ends_at_the_least_recomputation_on_a_real_grid(tmp_path, monkeypatch):
    """A tiny model fits on every mesh, so that nothing is recomputed, nor sent but gradients."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the tpu extra")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    found = search_training(from_dict(TINY), find_target("v5e:2x2", None), said.append)
    assert found.plan.fits
    assert found.plan.remat == "none"
    assert found.plan.method == "compiled"
    assert len(found.tried) == len(said) == 1
    assert found.tried[0]["mesh"] == found.plan.mesh


@pytest.mark.plans
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "devices", "rows", "frames", "parts"),
    [
        ("--config wan_14b --topology v5p-128 --batch-size 8 --mesh fsdp=8,sequence=8", 64, 8, 21, 8),
        ("--config wan_14b_60s --topology v5p-512", 256, 16, 241, 16),
    ],
)
def test_14b_fits(flags, devices, rows, frames, parts, tmp_path, monkeypatch, capsys):
    """720p, of 81 frames and of a minute: it fits, holds what the state and a batch hold, and costs what the formula
    says."""
    made = proof(flags, tmp_path, monkeypatch, capsys)
    assert made["method"] == "compiled"
    assert made["fits"]
    assert made["peak_bytes_per_device"] <= 0.92 * 95 * GIB
    assert made["devices"] == devices
    n, umt5 = 14_288_491_584, 5_680_910_336
    assert made["parameters"] == n
    N, L, D, ff, layers = frames * 45 * 80, 512, 5120, 13824, 40
    state = (4 + 4 + 4 + 4) * n / parts + 2 * umt5 / parts
    batch = rows / parts * (N * 64 * 4 + N * 3 * 4 + 3 * N * 4 + 3 * frames * 4 + 2 * L * 4)
    assert made["argument_bytes_per_device"] == pytest.approx(state + batch, rel=0.01)
    blocks = layers * (2 * N * (6 * D**2 + 2 * D * ff) + 4 * L * D**2 + 4 * N**2 * D + 4 * N * L * D)
    borders = 2 * N * 64 * D * 2 + 2 * L * (4096 * D + D**2)
    assert made["flops_per_step"] == pytest.approx(rows * 3 * (blocks + borders), rel=0.01)
