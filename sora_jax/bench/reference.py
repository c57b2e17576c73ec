"""The rows of `wan_rows` as PyTorch's `diffusers` and `transformers` do them; run only where these are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sora_jax.bench.timing import median_seconds
from sora_jax.bench.wan_rows import LATENTS, LAYERS, LEAST, SMALL, TEXT, UMT5, VIDEO, WARM


def _transformer() -> tuple[Any, Any]:
    import diffusers
    import torch

    model = diffusers.WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=LAYERS
    )
    inputs = (torch.randn(1, 16, *LATENTS), torch.full((1,), 500.0), torch.randn(1, TEXT, 4096))
    return model, inputs


def wan_transformer_forward(model: str) -> float:
    import torch

    del model
    network, inputs = _transformer()
    with torch.no_grad():
        return median_seconds(lambda: network(*inputs, return_dict=False), warm=WARM, least=LEAST)


def wan_train_step(model: str) -> float:
    import torch

    del model
    network, inputs = _transformer()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        (network(*inputs, return_dict=False)[0] - 1.0).square().mean().backward()
        optimizer.step()

    return median_seconds(work, warm=WARM, least=LEAST)


def _autoencoder() -> Any:
    import diffusers

    return diffusers.AutoencoderKLWan(**SMALL)


def wan_encode(model: str) -> float:
    import torch

    del model
    network, x = _autoencoder(), torch.rand(1, 3, *VIDEO[1:4])
    with torch.no_grad():
        return median_seconds(lambda: network.encode(x), warm=WARM, least=LEAST)


def wan_decode(model: str) -> float:
    import torch

    del model
    network, x = _autoencoder(), torch.randn(1, SMALL["z_dim"], 5, 16, 16)
    with torch.no_grad():
        return median_seconds(lambda: network.decode(x), warm=WARM, least=LEAST)


def umt5(model: str) -> float:
    import torch
    import transformers

    del model
    network = transformers.UMT5EncoderModel(transformers.UMT5Config(feed_forward_proj="gated-gelu", **UMT5)).eval()
    ids = torch.randint(3, 32_000, (1, TEXT))
    with torch.no_grad():
        return median_seconds(lambda: network(ids, torch.ones_like(ids)), warm=WARM, least=LEAST)


ROWS: dict[str, Callable[[str], float]] = {
    "wan-transformer-forward": wan_transformer_forward,
    "wan-train-step": wan_train_step,
    "wan-encode": wan_encode,
    "wan-decode": wan_decode,
    "umt5": umt5,
}
