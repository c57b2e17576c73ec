"""The authors' layout: our names for it in the hands of the reference's converter, and files that torch wrote."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from sora_jax import Pipeline
from sora_jax.errors import UserError
from sora_jax.weights import original
from sora_jax.weights.original import load_original, save_original
from sora_jax.weights.torch_file import read_torch_file


@pytest.fixture(scope="module", params=["t2v", "ti2v", "a14b"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    import reference

    theirs = reference.pipeline(request.param)
    folder = tmp_path_factory.mktemp("model")
    pipe = Pipeline.load(reference.save(theirs, folder / "diffusers"), dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        tiny_autoencoder(patch, pipe)
        save_original(folder / "original", pipe.folder)
    return theirs, pipe, epath.Path(folder / "original")


def test_the_references_converter_reads_our_names(models):
    from diffusers.loaders import single_file_utils as converters

    theirs, pipe, path = models
    first = path / "high_noise_model" if pipe.folder.transformer_2 is not None else path
    files = [
        (first / "diffusion_pytorch_model.safetensors", converters.convert_wan_transformer_to_diffusers, "transformer")
    ]
    if not pipe.folder.autoencoder_config.is_residual:  # it knows the 2.1 form, of two residual blocks a level, alone
        assert pipe.folder.autoencoder_config.num_res_blocks == 2
        files.append((path / "Wan2.1_VAE.safetensors", converters.convert_wan_vae_to_diffusers, "vae"))
    for file, convert, component in files:
        expected = {name: value.numpy() for name, value in getattr(theirs, component).state_dict().items()}
        converted = convert(load_file(file))
        assert converted.keys() == expected.keys()
        for name, value in converted.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


def tiny_autoencoder(monkeypatch: pytest.MonkeyPatch, pipe: Pipeline) -> None:
    """The name of an autoencoder's file stands for its sizes; here for those of the tiny one."""
    config = pipe.folder.autoencoder_config
    monkeypatch.setattr(original, "AUTOENCODERS", {f"Wan2.{2 if config.is_residual else 1}_VAE": config})


def test_what_was_saved_loads_and_samples_the_same(models, monkeypatch):
    _, pipe, path = models
    tiny_autoencoder(monkeypatch, pipe)
    again = Pipeline.load(path, dtype="float32")
    size = {"height": 2 * pipe.stride.height, "width": 2 * pipe.stride.width}
    options = {"frames": 5, "steps": 2, "shift": 5.0, "guidance": 4.0, "output": "latents", **size}
    np.testing.assert_array_equal(
        again.sample("a red ball", **options).latents, pipe.sample("a red ball", **options).latents
    )


def test_files_that_torch_wrote(models, monkeypatch, tmp_path):
    """A .pth of each dtype, parameters and views among them; and as the whole of a folder."""
    import torch

    _, pipe, path = models
    tensors = {
        name: torch.from_numpy(value) for name, value in load_file(path / "models_t5_umt5-xxl-enc.safetensors").items()
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.save({name: torch.nn.Parameter(value.to(dtype)) for name, value in tensors.items()}, tmp_path / "x.pth")
        found = read_torch_file(epath.Path(tmp_path / "x.pth"))
        assert {name: tensor.shape for name, tensor in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}

    folder = epath.Path(shutil.copytree(path, tmp_path / "published"))
    (folder / "models_t5_umt5-xxl-enc.safetensors").unlink()
    torch.save(tensors, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tiny_autoencoder(monkeypatch, pipe)
    loaded = load_original(folder)
    np.testing.assert_array_equal(loaded.text_encoder["embed"][...], pipe.folder.text_encoder["embed"][...])


def test_bad_torch_files_are_refused_in_one_line(tmp_path):
    import torch

    good = tmp_path / "good.pth"
    torch.save({"a": torch.arange(12.0).reshape(3, 4)}, good)
    for name, make, says in (
        ("cut", lambda p: p.write_bytes(good.read_bytes()[:-40]), "is not a PyTorch checkpoint"),
        ("text", lambda p: p.write_text("hello"), "is not a PyTorch checkpoint"),
        ("ints", lambda p: torch.save({"a": torch.arange(3)}, p), "LongStorage"),
        ("code", lambda p: torch.save({"a": print}, p), "print"),
        ("strided", lambda p: torch.save({"a": torch.ones(3, 4).T}, p), "not stored in one piece"),
        ("nested", lambda p: torch.save({"model": {"a": torch.ones(2)}}, p), "no plain table of tensors"),
    ):
        path = tmp_path / f"{name}.pth"
        make(path)
        with pytest.raises(UserError, match=says) as error:
            read_torch_file(epath.Path(path))
        assert "\n" not in str(error.value)
