"""What every test stands on: the CPU, and shape annotations that are checked while the tests run."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import install_import_hook

# XLA of jax 0.10 has two compilers of fused loops, and programs are ready in three quarters of the time with the older
# one. Later versions know no such flag, and end at one that they do not know.
if jax.__version_info__ < (0, 11):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# Eight fake devices for the tests of sharding; a configuration and not XLA_FLAGS, so that child processes see one.
jax.config.update("jax_num_cpu_devices", 8)

_hook = install_import_hook("sora_jax", "typechecking.checked")


# Tests that compile for a TPU, hold figures against another implementation's, or train for minutes.
OPTIMISED = ("plans", "parity", "learning")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Most of the suite's time goes into compiling programs that run for milliseconds: XLA optimises little here."""
    optimised = any(item.get_closest_marker(name) for name in OPTIMISED)
    jax.config.update("jax_disable_most_optimizations", not optimised)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests read no compiled programs that an older tree wrote, and leave none behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """A test that reaches for another machine fails, with a network or without one."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"a test reaches for the network: {address}")  # no exception that `except Exception` takes
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        if "SORA_JAX_REAL_WEIGHTS" not in os.environ:  # the one test that is asked to
            patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture
def one_device_mesh() -> jax.sharding.Mesh:
    """The mesh that most code runs on; `with jax.set_mesh(one_device_mesh):` around annotated initialisers."""
    from sora_jax.sharding import make_mesh

    return make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def quick_training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One device, and little to compile."""
    from quick_compile import quick_compile

    from sora_jax import sharding

    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch, quick_compile(tmp_path_factory.mktemp("compiled")):
        patch.setattr(sharding, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, devices or jax.devices()[:1]))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of the world model's form, tiny and with random weights: 5 frames of 16x16, 8 fps."""
    from flax import nnx

    from sora_jax.models.autoencoder import Autoencoder, AutoencoderConfig
    from sora_jax.models.text_encoder import TextEncoder, TextEncoderConfig
    from sora_jax.models.tokenizer import ByteTokenizer
    from sora_jax.models.transformer import Transformer, TransformerConfig
    from sora_jax.shapes import Stride
    from sora_jax.weights.defaults import SamplingDefaults, SchedulerDefaults
    from sora_jax.weights.layout import ModelFolder, save_folder

    transformer = TransformerConfig(
        n_layers=2,
        n_heads=2,
        head_dim=8,
        ffn_dim=32,
        in_channels=8,
        out_channels=8,
        patch=Stride(1, 1, 1),
        text_dim=16,
        frequency_dim=16,
    )
    autoencoder = AutoencoderConfig(
        base_dim=4,
        z_dim=8,
        dim_mult=(1, 4, 4),
        num_res_blocks=1,
        temperal_downsample=(True, True),
        is_residual=True,
        patch_size=2,
    )
    text_encoder = TextEncoderConfig(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)

    draw = np.random.default_rng(0)

    def random(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.State:
        """Parameters of a module's shapes; drawn by numpy, for nothing needs compiling then."""
        shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), graph=False)[1]
        return jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw.standard_normal(leaf.shape, np.float32)), shapes)

    model = ModelFolder(
        transformer,
        random(lambda rngs: Transformer(transformer, rngs=rngs)),
        autoencoder,
        random(lambda rngs: Autoencoder(autoencoder, rngs=rngs)),
        text_encoder,
        random(lambda rngs: TextEncoder(text_encoder, rngs=rngs)),
        ByteTokenizer(max_length=96),
        SchedulerDefaults("unipc", 1.0),
        SamplingDefaults("tiny-1", frames=5, height=16, width=16, fps=8.0, steps=2, guidance=2.0),
    )
    path = tmp_path_factory.mktemp("models") / "tiny-1"
    save_folder(path, model)
    return path
