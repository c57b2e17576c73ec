"""The world's programs compile for real TPU topologies, and fit; no TPU is needed, only its compiler."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu", reason="the TPU compiler comes with the tpu extra")

pytestmark = pytest.mark.plans

# What one chip has: the memory of a v5e (16 GiB).
HBM = 16 * 2**30


def topology(name: str, **options: object) -> list[jax.Device]:
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


@pytest.fixture(scope="module", params=["v5e:1x1", "v5e:4x4"])
def mesh(request: pytest.FixtureRequest) -> jax.sharding.Mesh:
    from sora_jax.sharding import make_mesh

    if request.param == "v5e:1x1":  # what Colab lends
        return make_mesh({"data": 1}, topology("v5e:1x1", chips_per_host_bounds=(1, 1, 1)))
    return make_mesh({"data": 4, "fsdp": 2, "tensor": 2}, topology(request.param))


def test_world_train_step_fits(mesh):
    from sora_jax.bench.programs import peak_bytes, training_program
    from sora_jax.config import load_config

    compiled = training_program(load_config("world"), mesh, jnp.dtype("bfloat16")).compile()
    peak = peak_bytes(compiled)
    assert peak is not None
    assert 0 < peak < HBM
    text = compiled.as_text()
    # Gradients of one device's rows mean nothing until they are summed with the others'.
    assert ("all-reduce" in text or "reduce-scatter" in text) == (mesh.size > 1)


def test_world_sampler_step_fits(mesh):
    from sora_jax.bench.programs import peak_bytes, sampling_program
    from sora_jax.config import load_config

    compiled = sampling_program(load_config("world"), mesh, jnp.dtype("bfloat16"), rows=max(1, mesh.size)).compile()
    peak = peak_bytes(compiled)
    assert peak is not None
    assert 0 < peak < HBM
