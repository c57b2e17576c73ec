"""Against numbers that PyTorch's `diffusers` made of two tiny models (fixtures/record_wan.py), without torch."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.canvas import lay_out, text_to_video
from sora_jax.errors import UserError
from sora_jax.models.tokenizer import SubwordTokenizer
from sora_jax.pipeline import Pipeline
from sora_jax.shapes import Extent
from sora_jax.tokens.patchify import patchify, unpatchify

FIXTURES = Path(__file__).parent / "fixtures"
PROMPTS = ("a red ball bounces", "  the  BLUE cube &amp; ball\tslides, é ")
BAR = 1e-4  # of the recorded numbers' standard deviation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["t2v", "ti2v"])
def both(request: pytest.FixtureRequest) -> tuple[dict[str, np.ndarray], Pipeline]:
    with np.load(FIXTURES / "wan.npz") as file:
        kind = request.param
        recorded = {name.removeprefix(f"{kind}_"): file[name] for name in file if name.startswith(f"{kind}_")}
    return recorded, Pipeline.load(FIXTURES / f"wan_{kind}", dtype="float32")


def assert_close(ours: np.ndarray, theirs: np.ndarray, bar: float = BAR) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= bar * theirs.std()


def test_prompts_and_their_embeddings(both):
    recorded, pipe = both
    for n, prompt in enumerate(PROMPTS):
        assert pipe.folder.tokenizer.encode(prompt) == recorded[f"ids_{n}"].tolist()
    text, text_ids = pipe.encode_text([[prompt] for prompt in PROMPTS])
    assert_close(text[:, :32], recorded["text"])
    assert not np.any(text[:, 32:])
    assert (np.asarray(text_ids) == 1).all(), "padding is attended"


def test_velocity(both):
    recorded, pipe = both
    canvas = text_to_video("", Extent(5, 4 * pipe.stride.height, 6 * pipe.stride.width))
    layout = lay_out(canvas, pipe.stride, pipe.patch)
    condition = pipe.condition(layout, [[prompt] for prompt in PROMPTS])
    tokens = jnp.asarray(patchify(recorded["latents"], pipe.patch))
    velocity = jax.jit(pipe.velocity)(pipe.params, tokens, jnp.full((2, 2), 0.437), condition)
    assert_close(unpatchify(np.asarray(velocity), Extent(2, 4, 6), pipe.patch), recorded["velocity"])


def test_autoencoder(both):
    recorded, pipe = both
    config = pipe.folder.autoencoder_config
    mean, std = (np.asarray(value, np.float32) for value in (config.latents_mean, config.latents_std))
    latents = (recorded["encoded"] - mean) / std
    assert_close(pipe.encode(recorded["video"]), latents)
    # recorded in half precision
    decoded = (recorded["decoded"].astype(np.float32) + 1.0) / 2.0
    np.testing.assert_allclose(pipe.decode(latents, "float32"), np.clip(decoded, 0, 1), atol=1e-3)


def test_a_whole_pipeline(both):
    recorded, pipe = both
    video = pipe.sample(
        PROMPTS[0],
        negative_prompt="blue",
        frames=5,
        height=4 * pipe.stride.height,
        width=6 * pipe.stride.width,
        steps=6,
        guidance=4.0,
        noise=recorded["noise"],
        output="latents",
    )
    assert_close(video.latents, recorded["made"], 1e-3)


def test_tokenizer_files_that_are_not_umt5s_are_refused():
    definition = (FIXTURES / "wan_t2v" / "tokenizer" / "tokenizer.json").read_text()
    good = SubwordTokenizer.from_files(definition, {})
    assert (good.pad_id, good.eos_id, good.max_length) == (0, 1, 512)
    assert len(good.places("a ball")) == 512
    with pytest.raises(UserError, match="the prompt is 600 pieces long and 511 fit: shorten it by 89"):
        good.encode("a " * 600)
    for text, config, says in (
        ("{", {}, "tokenizer.json cannot be read"),
        (definition, {"eos_token": "<end>"}, 'has no eos_token "<end>"'),
        (definition, {"eos_token": {"content": "<pad>"}}, "does not end a text with its eos_token"),
        (definition, {"eos_token": 3}, "names no eos_token, but 3"),
        (definition, {"eos_token": {}}, "names no eos_token, but {}"),
        (definition, {"model_max_length": "many"}, "model_max_length must be a number >= 1, not 'many'"),
    ):
        with pytest.raises(UserError, match=says):
            SubwordTokenizer.from_files(text, config)
