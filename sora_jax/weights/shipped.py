"""Where a model's name leads: to one that ships with the package, to a folder, or to a hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from sora_jax.errors import UserError, nearest

SHIPPED = Path(__file__).parents[1] / "assets"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_CONFIGS = ("model_index.json", "sora_jax.json", "*/*.json")  # all that a plan reads
# In the layout of `diffusers`, and that of Wan's authors, whose files lie at the top.
HUB_FILES = (
    *HUB_CONFIGS,
    "*/*.safetensors",
    "*/*.model",
    "config.json",
    "diffusion_pytorch_model*",
    "models_t5_*",
    "Wan2.?_VAE.*",
)


def shipped_models(folder: Path = SHIPPED) -> dict[str, Path]:
    """Every model in the package by name: `world-1`, `world-2`, and `world` for the newest of them."""
    versions: dict[str, list[tuple[int, Path]]] = {}
    for path in folder.glob("*-*"):
        family, _, version = path.name.rpartition("-")
        if version.isdecimal() and (path / "model_index.json").exists():
            versions.setdefault(family, []).append((int(version), path))
    named = {path.name: path for found in versions.values() for _, path in found}
    return named | {family: max(found)[1] for family, found in versions.items()}


def find_model(model: epath.PathLike, files: Sequence[str] = HUB_FILES) -> epath.Path:
    """The folder of a shipped model's name, of a path or URL, or of a name on the Hugging Face hub, of which `files`
    (patterns) are fetched.

    Raises `UserError` naming what is known. The network is touched for OWNER/NAME alone, and only where no folder OWNER
    makes that a path.
    """
    shipped = shipped_models()
    if str(model) in shipped:
        return epath.Path(shipped[str(model)])
    path = epath.Path(model)
    if path.exists():
        return path
    if HUB_NAME.fullmatch(str(model)) and not path.parent.exists():
        return _from_hub(str(model), files)
    raise UserError(
        f"unknown model {str(model)!r}, and no folder of that name; {nearest(str(model), shipped or ['world'])}"
    )


def _from_hub(name: str, files: Sequence[str]) -> epath.Path:
    """A copy of the model's files, kept where `huggingface_hub` keeps them; it goes on with one that was cut short."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(
            f"there is no folder {name}; to fetch a model of that name from the Hugging Face hub: "
            "pip install 'sora-jax[weights]'"
        ) from None
    try:
        return epath.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except errors.GatedRepoError:
        raise UserError(f"{name} on the Hugging Face hub wants its terms accepted: do so there, and log in") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"there is no folder {name}, and no model of that name on the Hugging Face hub") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"there is no folder {name}, and the Hugging Face hub cannot be reached: check the network or give a folder"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{name} could not be fetched from the Hugging Face hub: {str(error).splitlines()[0]}"
        ) from None
