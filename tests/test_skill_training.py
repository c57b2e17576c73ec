"""Given parts, cut clips and windows in a step and a validation: who sees whom, who reads what, what counts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_accumulation import NETWORK, TEXT

from sora_jax.diffusion.levels import MODES, Levels, LevelsConfig, ModeWeights, draw_levels
from sora_jax.models.structure import shapes_of, structure_of
from sora_jax.models.text_encoder import TextEncoder
from sora_jax.models.transformer import Transformer
from sora_jax.tokens.packing import Clip, PackedRows, ShotSize, fill_rows
from sora_jax.training.diffusion_step import DiffusionModules, TokenErrors, diffusion_errors, given_tokens, index_of
from sora_jax.training.diffusion_validation import make_diffusion_validation
from sora_jax.training.metrics import WEIGHT
from sora_jax.training.stage import mean_over


def clip(seed: int, frames: int, size: tuple[int, int], shots: tuple[int, ...] = (), headless: bool = False) -> Clip:
    rng = np.random.default_rng(seed)
    texts = 4 * max(len(shots), 1)
    sizes = tuple(ShotSize(frames, 4) for frames in shots)
    latents = rng.normal(size=(frames, *size, 2)).astype(np.float32)
    return Clip(latents, rng.integers(3, 259, texts).astype(np.int32), sizes, headless)


# A video, a cut clip, an image and a window.
CLIPS = [clip(0, 3, (3, 4)), clip(1, 5, (2, 2), shots=(3, 2)), clip(2, 1, (3, 4)), clip(3, 4, (2, 2), headless=True)]
VIDEO, CUT, IMAGE, WINDOW = range(1, 5)
GROUPS = 3 + 5 + 1 + 4
TOKENS = 36 + 20 + 12 + 16 + 4


def packed(plan: list[list[int]], clips: list[Clip] = CLIPS) -> PackedRows:
    rows = fill_rows(plan, clips, row_tokens=TOKENS, row_text=20, row_groups=GROUPS)
    return jax.tree.map(jnp.asarray, PackedRows(**rows))


ROW = packed([[0, 1, 2, 3]])


@functools.cache
def network(layers: int) -> tuple[DiffusionModules, dict[str, nnx.State]]:
    transformer = dataclasses.replace(NETWORK, n_layers=layers)
    make: dict[str, Any] = {
        "transformer": lambda rngs: Transformer(transformer, rngs=rngs),
        "text_encoder": lambda rngs: TextEncoder(TEXT, rngs=rngs),
    }
    rng = np.random.default_rng(0)  # every parameter random: a fresh head predicts 0 whatever it sees
    params = {
        name: jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(scale=0.4, size=leaf.shape), jnp.float32), shapes_of(one)
        )
        for name, one in make.items()
    }
    return DiffusionModules(**{name: structure_of(one) for name, one in make.items()}), params


def errors(rows: PackedRows, levels: Levels, noise: jax.Array, layers: int = 1) -> TokenErrors:
    modules, params = network(layers)
    with jax.default_matmul_precision("highest"):
        return _errors(modules, params, rows, levels, noise)


_errors = jax.jit(diffusion_errors, static_argnums=0)


def noise_of(rows: PackedRows, seed: int = 5) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), rows.tokens.shape)


def only(**weights: float) -> LevelsConfig:
    return LevelsConfig(modes=ModeWeights(**{**dict.fromkeys(MODES, 0.0), **weights}))


def drawn(rows: PackedRows, *, want: int, **weights: float) -> tuple[Levels, np.ndarray]:
    """Levels of a draw that gives some tokens of clip `want` and not all, and which tokens are given."""
    for seed in range(100):
        levels = draw_levels(jax.random.key(seed), only(**weights), index_of(rows))
        given = np.asarray(given_tokens(levels))
        if 0 < given[np.asarray(rows.segment_ids) == want].mean() < 1:
            return levels, given
    raise AssertionError("no draw gives a part of the clip")


@pytest.mark.parametrize(("mode", "segment"), [("inside", VIDEO), ("blocks", IMAGE), ("shots", CUT)])
def test_what_is_given_is_seen_and_is_neither_noised_nor_counted(mode: str, segment: int):
    levels, given = drawn(ROW, want=segment, **{mode: 1.0})
    here = np.asarray(ROW.segment_ids) == segment
    noise = noise_of(ROW)
    plain = errors(ROW, levels, noise)
    np.testing.assert_array_equal(plain.counted, ~given & (np.asarray(ROW.segment_ids) > 0))
    assert (np.asarray(plain.sigma)[given] == 0).all()

    # Noise that falls on what is given changes nothing that is counted, to the bit.
    other = errors(ROW, levels, jnp.where(jnp.asarray(given)[..., None], 9.0, noise))
    np.testing.assert_array_equal(np.asarray(plain.error)[~given], np.asarray(other.error)[~given])
    # What is given itself is seen by all that is made of its clip, and by no other clip.
    shaken = ROW.replace(tokens=jnp.where(jnp.asarray(given & here)[..., None], ROW.tokens + 3.0, ROW.tokens))
    seen = np.asarray(errors(shaken, levels, noise).error)
    assert (seen[here & ~given] != np.asarray(plain.error)[here & ~given]).all()
    np.testing.assert_array_equal(seen[~here], np.asarray(plain.error)[~here])

    def loss(tokens: jax.Array, noise: jax.Array) -> jax.Array:
        found = errors(ROW.replace(tokens=tokens), levels, noise)
        return jnp.sum(jnp.where(found.counted & jnp.asarray(here), found.error, 0.0))

    to_tokens, to_noise = (np.abs(np.asarray(g)).sum(axis=-1) for g in jax.grad(loss, (0, 1))(ROW.tokens, noise))
    assert (to_tokens[here & given] > 0).all(), "the loss reaches what is given as a condition"
    assert (to_noise[given] == 0).all()
    assert (to_tokens[~here] == 0).all()
    assert (to_noise[here & ~given] > 0).all()


def test_a_token_reads_the_text_of_its_own_shot():
    """With one layer, whose text comes after its tokens have met, no word of another shot can reach a token; with two
    it comes by way of the tokens that read it."""
    levels = draw_levels(jax.random.key(0), only(uniform=1.0), index_of(ROW))
    first_shot = np.asarray(ROW.text_ids) == 2  # of the cut clip, which is the second of the row
    changed = ROW.replace(text_tokens=jnp.where(jnp.asarray(first_shot), 77, ROW.text_tokens))
    prompt, segment = np.asarray(ROW.prompt_ids), np.asarray(ROW.segment_ids)
    assert set(prompt[segment == CUT]) == {2, 3}
    for layers in (1, 2):
        plain, other = (np.asarray(errors(rows, levels, noise_of(ROW), layers).error) for rows in (ROW, changed))
        assert (plain[prompt == 2] != other[prompt == 2]).all()
        assert (plain[prompt == 3] != other[prompt == 3]).all() == (layers == 2)
        assert (plain[prompt == 3] != other[prompt == 3]).any() == (layers == 2)
        np.testing.assert_array_equal(plain[(segment > 0) & (segment != CUT)], other[(segment > 0) & (segment != CUT)])


def test_shots_of_a_clip_see_each_other():
    levels = draw_levels(jax.random.key(0), only(uniform=1.0), index_of(ROW))
    prompt = jnp.asarray(ROW.prompt_ids)
    shaken = ROW.replace(tokens=jnp.where((prompt == 2)[..., None], ROW.tokens + 3.0, ROW.tokens))
    plain, other = (np.asarray(errors(rows, levels, noise_of(ROW)).error) for rows in (ROW, shaken))
    assert (plain[prompt == 3] != other[prompt == 3]).all()


@pytest.mark.parametrize("mode", ["rolling", "shots", "inside", "blocks"])
def test_packed_is_separate(mode: str):
    """Every clip of a row has the errors that it has alone, at the same levels and with the same noise."""
    levels = draw_levels(jax.random.key(3), only(**{"uniform": 0.2, "rolling": 0.2, mode: 5.0}), index_of(ROW))
    noise = noise_of(ROW)
    together = errors(ROW, levels, noise)
    columns = levels.sigma.shape[1]
    place = group = 0
    for number, one in enumerate(CLIPS):
        frames, tokens = len(one.latents), one.latents[..., 0].size
        alone = packed([[number]])
        mine = slice(group, group + frames)
        spare = slice(columns - 1, columns) if columns > GROUPS else slice(0, 0)
        pad = ((0, 0), (0, GROUPS - frames))
        table = {
            name: jnp.concatenate([jnp.pad(x[:, mine], pad), x[:, spare]], axis=1)
            for name, x in (("sigma", levels.sigma), ("given", levels.given))
        }
        ids = levels.level_ids[:, place : place + tokens]
        ids = jnp.where(ids >= GROUPS, GROUPS, ids - group)
        own = Levels(**table, mode=levels.mode, level_ids=jnp.pad(ids, ((0, 0), (0, TOKENS - tokens))))
        its_noise = jnp.zeros_like(noise).at[:, :tokens].set(noise[:, place : place + tokens])
        found = errors(alone, own, its_noise)
        for name in ("error", "counted", "sigma"):
            whole = np.asarray(getattr(together, name))[:, place : place + tokens]
            np.testing.assert_allclose(np.asarray(getattr(found, name))[:, :tokens], whole, rtol=1e-4, atol=1e-5)
        place, group = place + tokens, group + frames


# ---------------------------------------------------------------------------------------------------------- validation


@pytest.mark.slow
def test_each_mode_has_a_validation_loss_over_the_clips_that_can_have_it():
    modules, params = network(1)
    config = only(uniform=1.0, first=0.5, rolling=0.5, shots=0.5, outside=0.5)
    key = jax.random.key(4)
    rows = [ROW, packed([[2, 0], [1, 3]])]
    validate = make_diffusion_validation(modules, config, key)
    with jax.default_matmul_precision("highest"):
        found = {name: float(value) for name, value in mean_over(lambda p, r: validate(p, r), rows)(params).items()}
        only_images = {name: float(value) for name, value in validate(params, packed([[2]])).items()}
    modes = ("first", "rolling", "shots", "outside")
    middles = [f"{(k + 0.5) / 10:.2f}" for k in range(10)]
    names = {"loss", "caption_worth", *(f"loss_{m}" for m in middles), *(f"{mode}_loss" for mode in modes)}
    assert found.keys() == names | {f"{mode}_loss_{m}" for mode in modes for m in middles}

    # `first` by hand: of videos of several frames, and of no window, the first frame at 0 and the others at the level.
    sums = np.zeros((10, 2))
    for batch in rows:
        segment, frame, count = (np.asarray(x) for x in (batch.group_segment, batch.group_frame, batch.group_count))
        windows = np.array(
            [[s > 0 and not (f[g == s] == 0).any() for s in g] for g, f in zip(segment, frame, strict=True)]
        )
        can = (segment > 0) & (count > 1) & ~windows
        for k in range(10):
            given = can & (frame == 0)
            sigma = np.where((segment > 0) & ~given, np.float32((k + 0.5) / 10), 0).astype(np.float32)
            table = Levels(jnp.asarray(sigma), jnp.asarray(given), jnp.zeros(segment.shape, jnp.int32), batch.level_ids)
            noise = jax.random.normal(jax.random.fold_in(key, k), batch.tokens.shape)
            got = errors(batch, table, noise)
            counted = np.take_along_axis(can & ~given, np.asarray(batch.level_ids), axis=1) & np.asarray(got.counted)
            sums[k] += np.asarray(got.error)[counted].sum(), counted.sum()
    for k, middle in enumerate(middles):
        assert found[f"first_loss_{middle}"] == pytest.approx(sums[k, 0] / sums[k, 1], rel=1e-4)
    assert found["first_loss"] == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum(), rel=1e-4)

    # What captions are worth: of the second batch alone, whose two rows change theirs; a row alone has no other.
    assert np.isnan(only_images["caption_worth"])
    there = rows[1].replace(text_tokens=rows[1].text_tokens[::-1], text_ids=rows[1].text_ids[::-1])
    sigma = jnp.where(rows[1].group_segment > 0, 0.95, 0.0)
    nothing = jnp.zeros(sigma.shape, jnp.bool_)
    table = Levels(sigma, nothing, jnp.zeros(sigma.shape, jnp.int32), rows[1].level_ids)
    noise = jax.random.normal(jax.random.fold_in(key, 9), rows[1].tokens.shape)
    right, wrong = (errors(batch, table, noise) for batch in (rows[1], there))
    windows = (np.asarray(rows[1].segment_ids) == 2) & [[False], [True]]  # the second clip of the second row
    counted = np.asarray(right.counted) & ~windows
    by_hand = np.asarray(wrong.error)[counted].mean() - np.asarray(right.error)[counted].mean()
    assert found["caption_worth"] == pytest.approx(by_hand, rel=1e-4)
    assert abs(by_hand) > 1e-3

    # Text to video leaves the window out; of images alone there is that and what is outside a rectangle.
    assert np.isfinite([only_images["loss"], only_images["outside_loss"]]).all()
    assert np.isnan([only_images[f"{mode}_loss"] for mode in modes[:3]]).all()
    whole = [packed([[0, 1, 2]]), ROW]
    with jax.default_matmul_precision("highest"):
        # Noise goes by place, so that what stands before the window has the same.
        one, other = (float(validate(params, batch)["loss"]) for batch in whole)
    assert one == pytest.approx(other, rel=1e-5)


def test_what_is_trained_alone_is_validated_as_it_was():
    modules, params = network(1)
    found = make_diffusion_validation(modules, only(uniform=1.0), jax.random.key(0))(params, ROW)
    levels = [float(value) for name, value in found.items() if name.startswith("loss_")]
    assert len(levels) == 10
    assert {name for name in found if not name.startswith("loss")} == {"caption_worth", "caption_worth" + WEIGHT}
    assert float(found["loss"]) == pytest.approx(np.mean(levels), rel=1e-6)
