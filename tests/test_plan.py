"""`sora-jax plan`: bytes against sums by hand, FLOPs against the published ones, and the compiler's own numbers."""

from __future__ import annotations

import json

import jax
import pytest

from sora_jax import cli
from sora_jax.bench.plan import PRODUCTS, count_collectives, find_target, plan_sampling, plan_training, with_size
from sora_jax.config import from_dict, load_config, override
from sora_jax.errors import UserError
from sora_jax.shapes import Extent, Stride

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


@pytest.mark.parametrize(("name", "teraflops"), [("wan_1_3b", 283), ("wan_14b", 6523)])
def test_flops_are_the_published_ones(name: str, teraflops: float):
    """Of the blocks' forward pass; embeddings, head and text encoder come on top, in training three times all."""
    made = plan_training(load_config(name, ["train.batch_size=1"]), ONE, {})
    assert 3 * teraflops < made.flops_per_step / 1e12 < 3 * teraflops * 1.03
    sampled = plan_sampling(load_config(name), ONE, {}, 1)
    assert sampled.flops_per_step / made.flops_per_step == pytest.approx(2 / 3)  # with the prompt and without


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


@pytest.mark.slow
def test_the_compiler_agrees_on_the_devices_at_hand():
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


def test_collectives_are_counted_by_kind():
    hlo = """
      %a = f32[8,16]{1,0} all-gather(%x), dimensions={0}
      %b = (bf16[4]{0}, f32[2,2]{1,0}) all-reduce(%y, %z), to_apply=%sum
      %c = f32[16]{0} all-gather-start(%w), dimensions={0}
      %d = f32[16]{0} all-gather-done(%c)
      %e = f32[3]{0} add(%p, %q)
    """
    assert count_collectives(hlo) == {
        "all-gather": {"count": 2, "bytes": 4 * 8 * 16 + 4 * 16},
        "all-reduce": {"count": 1, "bytes": 2 * 4 + 4 * 4},
    }


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


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "name what is planned for"),
        (["--hbm", "0"], "--hbm must be > 0"),
        (["--topology", "v5q-128"], 'unknown topology "v5q-128"; did you mean "v5p-128"'),
        (["--hbm", "16", "--topology", "local"], "name what is planned for"),
        (["--hbm", "16", "--height", "100"], "100"),
        (["--hbm", "16", "--mesh", "fsdp=2"], "does not multiply to the 1 devices"),
        (["--hbm", "16", "--remat", "some"], "unknown remat policy"),
    ],
)
def test_mistakes_are_one_line(flags, says, capsys):
    assert cli.main(["plan", "--config", "wan_1_3b", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err.splitlines()[-1]


def test_only_the_diffusion_stage_is_planned(capsys):
    assert cli.main(["plan", "--config", "world_text", "--hbm", "16"]) == 2
    assert "only the diffusion stage is planned" in capsys.readouterr().err


def test_rows_that_devices_cannot_share_are_refused():
    with pytest.raises(UserError, match="3 rows cannot be split over data x fsdp = 8"):
        plan_training(override(from_dict(TINY), ["train.batch_size=3"]), find_target("local", None), {"fsdp": 8})
