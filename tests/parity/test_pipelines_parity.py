"""Whole pipelines: the same noise, ten guided steps, frames against the reference's; and our export in the
reference's hands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comparing import FRAMES, PROMPT, assert_same_frames, draw, our_frames, sizes, their_frames

from sora_jax import Pipeline
from sora_jax.errors import UserError
from sora_jax.weights.layout import save_folder


@pytest.fixture(scope="module", params=["t2v", "a14b", "ti2v"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Pipeline]:
    import reference

    theirs = reference.pipeline(request.param)
    theirs.set_progress_bar_config(disable=True)
    path = reference.save(theirs, tmp_path_factory.mktemp("model") / request.param)
    return request.param, theirs, Pipeline.load(path, dtype="float32")


@pytest.mark.parametrize("solver", ["unipc", "dpmpp_2m", "euler"])
def test_frames_from_text(both, solver: str):
    import reference

    kind, theirs, pipe = both
    theirs.scheduler = reference.scheduler(solver)
    noise = draw(pipe)
    options = {"guidance_scale": 4.0} | ({"guidance_scale_2": 3.0} if kind == "a14b" else {})
    expected = their_frames(theirs, noise, sizes(pipe), **options)
    made = our_frames(pipe, noise, guidance_low=3.0 if kind == "a14b" else None, solver=solver, shift=5.0)
    assert_same_frames(made, expected)


def test_frames_from_a_first_frame(both):
    kind, theirs, pipe = both
    image = np.random.default_rng(1).integers(0, 256, (*sizes(pipe).values(), 3)).astype(np.uint8)
    noise = draw(pipe)
    if kind != "ti2v":
        with pytest.raises(UserError, match="makes videos from text alone"):
            pipe.sample(PROMPT, image=image, frames=FRAMES, **sizes(pipe))
        return
    import diffusers
    import PIL.Image

    animate = diffusers.WanImageToVideoPipeline(
        tokenizer=theirs.tokenizer,
        text_encoder=theirs.text_encoder,
        vae=theirs.vae,
        scheduler=theirs.scheduler.from_config(theirs.scheduler.config),
        transformer=theirs.transformer,
        expand_timesteps=True,
    )
    animate.set_progress_bar_config(disable=True)
    picture = PIL.Image.fromarray(image)
    expected = their_frames(animate, noise, sizes(pipe), image=picture, guidance_scale=4.0)
    solver = {"UniPCMultistepScheduler": "unipc", "DPMSolverMultistepScheduler": "dpmpp_2m"}.get(
        type(animate.scheduler).__name__, "euler"
    )
    assert_same_frames(our_frames(pipe, noise, image=image, solver=solver), expected)


def test_the_reference_makes_the_same_of_our_export(both, tmp_path):
    """Its tensors are equal to the bit. What it computes from them is, but for its own library: on some processors the
    order of its sums depends on where in memory a file happened to be loaded to."""
    import diffusers

    _, theirs, pipe = both
    path = save_folder(tmp_path / "exported", pipe.folder)
    back = diffusers.WanPipeline.from_pretrained(path)
    back.set_progress_bar_config(disable=True)
    noise = draw(pipe)
    theirs.scheduler = back.scheduler
    for name, module in theirs.components.items():
        if hasattr(module, "state_dict"):
            exported = getattr(back, name).state_dict()
            assert exported.keys() == module.state_dict().keys()
            for key, tensor in module.state_dict().items():
                np.testing.assert_array_equal(exported[key].numpy(), tensor.numpy(), err_msg=f"{name} {key}")
    before = their_frames(theirs, noise, sizes(pipe), guidance_scale=4.0)
    np.testing.assert_allclose(their_frames(back, noise, sizes(pipe), guidance_scale=4.0), before, atol=1e-5)
    assert back.config.boundary_ratio == theirs.config.boundary_ratio
    assert back.config.expand_timesteps == theirs.config.expand_timesteps
