"""The quickstart runs from its first cell to its last, on a tiny model and with small numbers."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own machinery
def test_it_runs(notebook, tiny_model, tmp_path):
    from nbclient import NotebookClient

    tiny = {
        "MODEL": str(tiny_model),
        "STEPS": 3,
        "SHOWN": 2,
        "CLIPS": 24,
        "TRAIN_STEPS": 4,
        "WORKDIR": str(tmp_path / "run"),
    }
    sizes = {
        "transformer": {"n_layers": 1, "n_heads": 2, "head_dim": 8, "ffn_dim": 16, "text_dim": 16},
        "text_encoder": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "optimizer": {"name": "adamw", "warmup_steps": 1},
        "data": {"held_out": 8},
        "train": {"batch_size": 2},
    }
    flags = [f"--config.{section}.{key}={value}" for section, keys in sizes.items() for key, value in keys.items()]
    flags += ["--config.transformer.in_channels=8", "--config.transformer.out_channels=8"]
    # Clips of 17 frames at 64x64 are 5 x 8 x 8 latents of this autoencoder.
    flags += ["--config.data.row_tokens=320"]
    settings = [f"{name} = {value!r}" for name, value in tiny.items()] + [f"TRAIN_FLAGS = {flags!r}"]
    (at,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    names = {line.partition(" =")[0] for line in notebook.cells[at].source.splitlines() if " = " in line}
    assert {*tiny, "TRAIN_FLAGS"} <= names, "a setting was renamed"
    notebook = nbformat.from_dict(notebook)
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(settings)))

    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    assert (tmp_path / "quickstart.mp4").exists()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    pictures = [
        o for c in notebook.cells for o in c.get("outputs", []) if {"image/gif", "image/png"} & set(o.get("data", {}))
    ]
    assert len(pictures) >= 3  # the video, the moments of the sampler, the loss
