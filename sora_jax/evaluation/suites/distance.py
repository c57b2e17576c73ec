"""How far clips of held-out prompts are from true clips as a whole, beside the noise floor and two yardsticks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sora_jax.canvas import text_to_video
from sora_jax.data.world import Mix, WorldSource, heldout_prompts
from sora_jax.errors import UserError
from sora_jax.evaluation import filters
from sora_jax.evaluation.distribution import LEAST, compare
from sora_jax.evaluation.suites import Asked
from sora_jax.pipeline import Pipeline


def run(pipe: Pipeline, asked: Asked) -> dict[str, Any]:
    """Three sets of n clips of one distribution: the model is given the prompts of the first and makes its own, the
    others are true. `autoencoder` is the second true set after the model's autoencoder, `still` its first frames."""
    n, extent = asked.n, asked.extent(pipe)
    if n < LEAST:
        raise UserError(f"a distance between sets needs --n {LEAST} or more, not {n}")
    frames, height, width = extent
    source = WorldSource(asked.seed, 3 * n, "heldout", frames, height, width, asked.mix or Mix())
    prompts = heldout_prompts(n, asked.seed, frames=frames, height=height, width=width, mix=asked.mix)
    sets: dict[str, list[np.ndarray]] = {"true": [], "also_true": [], "still": [], "autoencoder": [], "distance": []}
    for indices in _batches(n, asked.batch_size):
        true = [item["frames"] for item in source.batch([n + k for k in indices])]
        also_true = np.stack([item["frames"] for item in source.batch([2 * n + k for k in indices])])
        made = asked.make(pipe, [text_to_video(prompts[k].text, extent) for k in indices], _seeds(asked, indices))
        sets["true"].append(filters.encode_all(np.stack(true)))
        sets["also_true"].append(filters.encode_all(also_true))
        sets["still"].append(filters.encode_all(np.repeat(also_true[:, :1], frames, axis=1)))
        sets["autoencoder"].append(filters.encode_all(pipe.decode(pipe.encode(also_true))))
        sets["distance"].append(filters.encode_all(made))
        asked.progress(indices[-1] + 1, n)
    features = {name: np.concatenate(parts) for name, parts in sets.items()}
    metrics = compare(features.pop("true"), features.pop("also_true"), asked.seed, **features)
    order = ("distance", "floor", "autoencoder", "still")
    return {
        "suite": "distance",
        "n": n,
        "metrics": {name: metrics[name] for name in order},
        "encoder": {"name": filters.NAME, "fingerprint": filters.fingerprint()},
        "size": {"frames": frames, "height": height, "width": width},
    }


def _batches(n: int, size: int) -> list[range]:
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def _seeds(asked: Asked, indices: Sequence[int]) -> list[int]:
    return [asked.seed + k for k in indices]
