"""What every test stands on: the CPU, and shape annotations that are checked while the tests run."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests must not read compiled programs that an older tree wrote, nor leave any behind.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import pytest
from jaxtyping import install_import_hook

# Eight fake devices for the tests of sharding; a configuration and not XLA_FLAGS, so that child processes see one.
jax.config.update("jax_num_cpu_devices", 8)

_hook = install_import_hook("sora_jax", "typechecking.checked")


@pytest.fixture
def one_device_mesh() -> jax.sharding.Mesh:
    """The mesh that most code runs on; `with jax.set_mesh(one_device_mesh):` around annotated initialisers."""
    from sora_jax.sharding import make_mesh

    return make_mesh({"data": 1}, jax.devices()[:1])
