"""What the backward pass computes anew changes no gradient; what the forward pass keeps lies where the policy says."""

from __future__ import annotations

import dataclasses
import math
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx
from one_video import one_video

from sora_jax.config import Config, from_dict
from sora_jax.errors import UserError
from sora_jax.models import attention
from sora_jax.models.layers import UNROLLED
from sora_jax.models.structure import shapes_of, structure_of
from sora_jax.models.transformer import REMAT, Transformer, TransformerConfig
from sora_jax.runtime import reaches_host_memory
from sora_jax.shapes import Extent
from sora_jax.sharding import make_mesh
from sora_jax.training import diffusion_stage
from sora_jax.training.stage import Context

CONFIG = TransformerConfig(
    n_layers=UNROLLED + 1,  # so that layers are scanned
    n_heads=2,
    head_dim=8,
    ffn_dim=16,
    in_channels=2,
    out_channels=2,
    text_dim=4,
    frequency_dim=8,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [{"data": 1}, {"sequence": 2}, pytest.param({"sequence": 4}, marks=pytest.mark.runs)],
    ids=["one", "all-to-all", "and ring"],
)
def test_gradients_are_those_of_keeping_everything(axes: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    """Of scanned layers and of rows that devices cut between them."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    rng = np.random.default_rng(0)
    shapes = shapes_of(lambda rngs: Transformer(CONFIG, rngs=rngs))
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.3, size=p.shape), jnp.float32), shapes)
    tokens, condition = one_video(rng, Extent(2, 2, 8), channels=8, text=(6, 4))

    def gradients(remat: str) -> nnx.State:
        config = dataclasses.replace(CONFIG, remat=remat)
        structure = structure_of(lambda rngs: Transformer(config, rngs=rngs))

        def loss(params: nnx.State) -> jax.Array:
            return jnp.sum(jnp.sin(nnx.merge(structure, params)(tokens, jnp.full((1, 1), 500.0), condition)))

        with jax.set_mesh(make_mesh(axes, jax.devices()[: math.prod(axes.values())])):
            return jax.jit(jax.grad(loss))(params)

    expected = gradients("none")
    for remat in sorted(set(REMAT) - {"none"}):
        for found, exact in zip(jax.tree.leaves(gradients(remat)), jax.tree.leaves(expected), strict=True):
            assert np.linalg.norm(found - exact) <= 1e-5 * np.linalg.norm(exact), remat


def test_a_device_without_the_hosts_memory_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def device(*kinds: str) -> SimpleNamespace:
        return SimpleNamespace(addressable_memories=lambda: [SimpleNamespace(kind=kind) for kind in kinds])

    assert reaches_host_memory.__wrapped__(device("device", "pinned_host"))
    assert not reaches_host_memory.__wrapped__(device("device"))
    monkeypatch.setattr(diffusion_stage, "reaches_host_memory", lambda device: False)
    config = from_dict({"transformer": {"remat": "offload"}})
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    context = Context(config, epath.Path(tmp_path), mesh, optax.identity(), jnp.dtype("float32"), print)
    with pytest.raises(UserError, match=r"transformer\.remat=offload .* cannot reach .*; transformer\.remat=full"):
        diffusion_stage.diffusion_stage(context)


# -------------------------------------------------------------------------------------------------------- where it lies


def wide(remat: str) -> Config:
    """Scanned layers of rows that take the TPU's attention kernel."""
    transformer = {
        "n_layers": UNROLLED + 4,
        "n_heads": 4,
        "head_dim": 128,
        "ffn_dim": 1024,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 16,
        "frequency_dim": 16,
        "remat": remat,
    }
    text = {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    data = {"row_tokens": 4096, "row_text": 128, "groups": 8}
    return from_dict({"transformer": transformer, "text_encoder": text, "data": data, "train": {"batch_size": 2}})


@pytest.mark.plans
def test_each_policy_takes_less_of_a_tpu_than_the_one_before():
    """The compiler's own numbers for a train step on a v5e: the device's memory, and the host's."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the tpu extra")
    from jax.experimental import topologies

    from sora_jax.bench.programs import peak_bytes, training_program

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh({"fsdp": 2, "sequence": 2}, devices)
    peaks = {}
    for remat in REMAT:
        compiled = training_program(wide(remat), mesh, jnp.dtype("bfloat16")).compile()
        peaks[remat] = peak_bytes(compiled)
        on_host = compiled.memory_analysis().host_temp_size_in_bytes
        # of each layer, in bfloat16: what came in, and what attention gave, of one row's half
        kept = (UNROLLED + 4) * 2 * (4096 // 2) * 512 * 2
        assert on_host >= kept if remat == "offload" else on_host == 0, remat
    assert list(peaks) == ["none", "dots", "full", "offload"]
    assert sorted(peaks.values(), reverse=True) == list(peaks.values()), peaks
