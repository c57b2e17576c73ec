"""Real weights of an open model, beside the reference on the same files: opt-in, for a machine with a network.

    HF_HUB_OFFLINE=0 SORA_JAX_REAL_WEIGHTS=Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        pytest -n 0 -m parity tests/parity/test_real_weights.py

takes a name on the Hugging Face hub or a folder. Of the 1.3B it fetches 29 GB once, and needs about 64 GB of memory:
both are in float32, one after the other.
"""

from __future__ import annotations

import gc
import os

import jax
import pytest
from comparing import assert_same_frames, draw, our_frames, sizes, their_frames

from sora_jax import Pipeline
from sora_jax.weights.shipped import find_model
from sora_jax.weights.verify import verify_folder

MODEL = os.environ.get("SORA_JAX_REAL_WEIGHTS", "")

pytestmark = pytest.mark.skipif(not MODEL, reason="SORA_JAX_REAL_WEIGHTS names no model: see the top of the file")


def test_the_files_are_whole():
    for verdict in verify_folder(find_model(MODEL)):
        assert not verdict.strange, verdict
        assert verdict.published in (None, verdict.parameters), verdict


def test_frames_are_the_reference_s():
    path = find_model(MODEL)
    pipe = Pipeline.load(path, dtype="float32")
    noise, size, shift = draw(pipe), sizes(pipe), pipe.folder.scheduler.shift
    ours = our_frames(pipe, noise, solver="unipc", shift=shift)
    del pipe
    jax.clear_caches()
    gc.collect()

    import diffusers
    import torch

    theirs = diffusers.WanPipeline.from_pretrained(path, dtype=torch.float32)
    theirs.scheduler = diffusers.UniPCMultistepScheduler.from_config(theirs.scheduler.config, flow_shift=shift)
    theirs.set_progress_bar_config(disable=True)
    assert_same_frames(ours, their_frames(theirs, noise, size, guidance_scale=4.0))
