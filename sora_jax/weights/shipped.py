"""Where a model's name leads: to one that ships with the package, or to a folder."""

from __future__ import annotations

from pathlib import Path

from etils import epath

from sora_jax.errors import UserError, nearest

SHIPPED = Path(__file__).parents[1] / "assets"


def shipped_models(folder: Path = SHIPPED) -> dict[str, Path]:
    """Every model in the package by name: `world-1`, `world-2`, and `world` for the newest of them."""
    versions: dict[str, list[tuple[int, Path]]] = {}
    for path in folder.glob("*-*"):
        family, _, version = path.name.rpartition("-")
        if version.isdecimal() and (path / "model_index.json").exists():
            versions.setdefault(family, []).append((int(version), path))
    named = {path.name: path for found in versions.values() for _, path in found}
    return named | {family: max(found)[1] for family, found in versions.items()}


def find_model(model: epath.PathLike) -> epath.Path:
    """The folder of a shipped model's name, or of a path or URL. Raises `UserError` naming what is known."""
    shipped = shipped_models()
    if str(model) in shipped:
        return epath.Path(shipped[str(model)])
    path = epath.Path(model)
    if not path.exists():
        raise UserError(
            f"unknown model {str(model)!r}: no folder of that name, and {nearest(str(model), shipped or ['world'])}"
        )
    return path
