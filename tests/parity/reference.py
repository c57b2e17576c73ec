"""Tiny random models of the Wan family, written by the PyPI packages that define them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

WORDS = [
    "a",
    "red",
    "blue",
    "ball",
    "cube",
    "bounces",
    "slides",
    "falls",
    "on",
    "the",
    "floor",
    "to",
    "left",
    "right",
    "and",
    "then",
    "rests",
    "雨",
    "é",
]


def tokenizer() -> Any:
    """UMT5's kind: unigram pieces with a metaspace, an end-of-text id at the end; of a few words and all letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0 - 0.01 * n) for n, word in enumerate(WORDS)]
    pieces += [(letter, -6.0 - 0.01 * n) for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz,.!'")]
    core = Tokenizer(models.Unigram(pieces, unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<pad>", "</s>", "<unk>")])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def randomize(module: torch.nn.Module, seed: int, scale: float = 1.0) -> Any:
    """Random everywhere: what is zero at the start of training hides what it multiplies."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1 or "gamma" in name:
                value.copy_((0.0 if "bias" in name else 1.0) + 0.2 * noise)
            else:
                fan_in = max(value[0].numel(), 1)
                value.copy_(scale * noise / fan_in**0.5)
    return module.eval()


def text_encoder(**sizes: int) -> Any:
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3} | sizes
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer()) + 7, feed_forward_proj="gated-gelu", tie_word_embeddings=True, **sizes
    )
    return randomize(transformers.UMT5EncoderModel(config), 1)


def transformer(*, channels: int = 4, seed: int = 2, **sizes: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2} | sizes
    return randomize(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), in_channels=channels, out_channels=channels, text_dim=24, freq_dim=16, **sizes
        ),
        seed,
    )


def autoencoder_21(**sizes: Any) -> Any:
    sizes = {"base_dim": 6, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2} | sizes
    rng = np.random.default_rng(3)
    model = diffusers.AutoencoderKLWan(
        **sizes,
        temperal_downsample=[False, True, True],
        latents_mean=rng.normal(size=sizes["z_dim"]).tolist(),
        latents_std=rng.uniform(0.5, 2.0, sizes["z_dim"]).tolist(),
    )
    return randomize(model, 4)


def autoencoder_22(**sizes: Any) -> Any:
    sizes = {"base_dim": 6, "decoder_base_dim": 8, "z_dim": 6, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1} | sizes
    rng = np.random.default_rng(5)
    model = diffusers.AutoencoderKLWan(
        **sizes,
        temperal_downsample=[False, True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=rng.normal(size=sizes["z_dim"]).tolist(),
        latents_std=rng.uniform(0.5, 2.0, sizes["z_dim"]).tolist(),
    )
    return randomize(model, 6)


def scheduler(solver: str = "unipc", shift: float = 5.0) -> Any:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if solver == "unipc":
        return diffusers.UniPCMultistepScheduler(**flow, num_train_timesteps=1000)
    if solver == "dpmpp_2m":
        return diffusers.DPMSolverMultistepScheduler(**flow, num_train_timesteps=1000)
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


def pipeline(kind: str = "t2v", solver: str = "unipc", shift: float = 5.0) -> Any:
    """`kind`: "t2v" (2.1), "a14b" (2.2, two experts), "ti2v" (2.2, a level per token)."""
    ti2v = kind == "ti2v"
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=autoencoder_22() if ti2v else autoencoder_21(),
        scheduler=scheduler(solver, shift),
        transformer=transformer(channels=6 if ti2v else 4),
        transformer_2=transformer(seed=7) if kind == "a14b" else None,
        boundary_ratio=0.875 if kind == "a14b" else None,
        expand_timesteps=ti2v,
    )


def save(model: Any, path: Path) -> Path:
    model.save_pretrained(path, safe_serialization=True)
    # The package writes its own class's name where the open models say T5TokenizerFast.
    config = path / "tokenizer" / "tokenizer_config.json"
    values = json.loads(config.read_text()) | {"tokenizer_class": "T5TokenizerFast"}
    config.write_text(json.dumps(values))
    return path


def clean(prompt: str) -> str:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return prompt_clean(prompt)
