"""`sora-jax export`: a run or a model as a folder that others can load."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from sora_jax.weights.layout import ModelFolder

HELP = "write a run's newest checkpoint, or a model, as a model folder"
ALONE = True
EXAMPLES = """
    sora-jax export runs/world exported/world-2
    sora-jax export runs/world exported/world-2 --dtype bfloat16 --evaluation eval.json
    sora-jax export world gs://bucket/world --force
"""

LAYOUTS = ("diffusers", "original", "lora")
LISTED = ("figures", "licence", "words", "prompts")  # facts that the card shows in places of their own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL|WORKDIR", help="a shipped name, a model folder or URL, or a workdir")
    parser.add_argument("out", metavar="OUT", help="folder or URL to write")
    parser.add_argument(
        "--layout",
        default="diffusers",
        metavar="LAYOUT",
        help="diffusers (default); original: the names of Wan's authors, for models of that family; or lora: one file "
        "of the adapters that a run has learned",
    )
    parser.add_argument(
        "--dtype",
        dest="stored_dtype",  # args.dtype is what a command computes in
        default="float32",
        metavar="DTYPE",
        help="of the weights: float32, or bfloat16 at half the size",
    )
    parser.add_argument(
        "--autoencoder",
        metavar="MODEL",
        help="of a run: with this one's decoder, trained on since its latents were made (same encoder)",
    )
    parser.add_argument("--name", metavar="NAME", help="the model's name and version (default: that of OUT)")
    parser.add_argument("--evaluation", metavar="FILE", help="output of eval --json, for the model card")
    parser.add_argument("--force", action="store_true", help="overwrite a model folder")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.stored_dtype not in ("float32", "bfloat16"):
        raise UserError(f'weights cannot be written as "{args.stored_dtype}"; known: bfloat16, float32')
    if args.layout not in LAYOUTS:
        raise UserError(f'unknown layout "{args.layout}": {nearest(args.layout, LAYOUTS)}')
    evaluation = _read_evaluation(args.evaluation) if args.evaluation else {}

    from etils import epath

    from sora_jax.pipeline import Pipeline
    from sora_jax.weights.layout import INDEX, save_folder
    from sora_jax.weights.original import save_original

    out = epath.Path(args.out)
    if args.layout == "lora":
        return _export_adapters(args, out)
    if (out / INDEX).exists() and not args.force:
        raise UserError(f"{args.out} holds a model; --force overwrites it")
    model = (
        _with_autoencoder(args.model, args.autoencoder)
        if args.autoencoder
        else Pipeline.load(args.model, dtype="float32").folder
    )
    defaults = model.defaults
    facts = {**defaults.card, "figures": {**defaults.card.get("figures", {}), **evaluation}}
    defaults = dataclasses.replace(defaults, version=args.name or out.name, card=facts)
    model = dataclasses.replace(model, defaults=defaults)
    if args.layout == "original":
        save_original(out, model, dtype=args.stored_dtype, overwrite=args.force)
    else:
        save_folder(out, model, dtype=args.stored_dtype, card=model_card(model), overwrite=args.force)
    files = [file for pattern in ("*", "*/*") for file in out.glob(pattern) if not file.is_dir()]
    size = sum(file.stat().length for file in files)
    if not args.json:
        print(f"{args.out}: {defaults.version}, {count(model) / 1e6:.1f} M parameters, {size / 1e6:.1f} MB")
    return {"path": args.out, "name": defaults.version, "parameters": count(model), "bytes": size}


def _export_adapters(args: argparse.Namespace, out: Any) -> dict[str, Any]:
    """The adapters of a run as one safetensors file."""
    from etils import epath

    from sora_jax.training.adapters import ADAPTERS
    from sora_jax.training.pretrained import is_workdir, load_run
    from sora_jax.weights.lora import save_lora

    if not is_workdir(args.model):
        raise UserError(f"{args.model} is not the workdir of a run: a model folder has no adapters apart")
    if out.suffix != ".safetensors":
        raise UserError(f"adapters are written as one file: {args.out} should end in .safetensors")
    if out.exists() and not args.force:
        raise UserError(f"{args.out} exists; --force overwrites it")
    run = load_run(epath.Path(args.model))
    if ADAPTERS not in run.params:
        raise UserError(f"{args.model} has trained {', '.join(run.params)} and no adapters (train.learns=lora)")
    save_lora(out, run.config.transformer, run.params[ADAPTERS], dtype=args.stored_dtype)
    size = out.stat().length
    if not args.json:
        print(f"{args.out}: adapters of rank {run.config.transformer.lora_rank}, {size / 1e6:.1f} MB")
    return {"path": args.out, "rank": run.config.transformer.lora_rank, "bytes": size}


def _with_autoencoder(workdir: str, autoencoder: str) -> ModelFolder:
    from etils import epath

    from sora_jax.training.pretrained import is_workdir
    from sora_jax.training.trained import model_of_run

    if not is_workdir(workdir):
        raise UserError(f"--autoencoder goes with the workdir of a run, and {workdir} is none")
    return model_of_run(epath.Path(workdir), autoencoder=autoencoder)


def model_card(model: ModelFolder) -> str:
    """The README.md of a model folder: what it is, how it was made, what was measured, under which licence."""
    defaults, facts = model.defaults, model.defaults.card
    figures = facts.get("figures", {})
    sizes = {
        "transformer": _size(model.transformer),
        "autoencoder": _size(model.autoencoder),
        "text encoder": _size(model.text_encoder),
    }
    lines = [
        "---",
        f"license: {str(facts.get('licence', 'unknown')).lower()}",
        "library_name: sora_jax",
        "pipeline_tag: text-to-video",
        "---",
        "",
        f"# {defaults.version}",
        "",
        f"Text to video, {defaults.width}x{defaults.height}, {defaults.frames} frames at {defaults.fps:g} fps; "
        "weights for sora_jax, in the folder layout of `diffusers`.",
        "",
        "```python",
        "from sora_jax import Pipeline",
        "",
        'Pipeline.load("PATH OF THIS FOLDER").sample("PROMPT").save("video.mp4")',
        "```",
        "",
        "## Model",
        "",
        *(f"- {name}: {n / 1e6:.2f} M parameters" for name, n in sizes.items()),
        f"- sampling defaults: {defaults.steps} steps of {model.scheduler.solver}, guidance {defaults.guidance:g}, "
        f"shift {model.scheduler.shift:g}",
        "",
        "## Data and training",
        "",
        *(f"- {name.replace('_', ' ')}: {facts[name]}" for name in facts if name not in LISTED),
        "",
        "## Figures",
        "",
    ]
    if figures:
        lines += ["| | value | 95 % interval |", "| --- | --- | --- |"]
        lines += [_row(name, value) for name, value in figures.items()]
    else:
        lines += ["None were measured."]
    if facts.get("prompts"):
        lines += ["", "## Prompts it knows", "", *(f"- {prompt}" for prompt in facts["prompts"][:12])]
        lines += [
            "",
            f"It has read {len(facts['words'])} words, which `sora_jax.json` lists; no other has a meaning to it.",
        ]
    lines += ["", "## Licence", "", f"{facts.get('licence', 'Unknown: ask whoever trained it.')}", ""]
    return "\n".join(lines)


def count(model: ModelFolder) -> int:
    return _size(model.transformer) + _size(model.autoencoder) + _size(model.text_encoder)


def _size(params: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _row(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"| {name} | {value['value']:.4g} | {value['low']:.4g} to {value['high']:.4g} |"
    return f"| {name} | {value:.4g} | |"


def _read_evaluation(path: str) -> dict[str, Any]:
    """The metrics of an `eval --json` document: {name: {"value", "low", "high"}}."""
    try:
        metrics = json.loads(Path(path).read_text())["metrics"]
        if all({"value", "low", "high"} <= set(metric) for metric in metrics.values()):
            numbers = ("value", "low", "high")  # null where nothing was counted
            return {name: one for name, one in metrics.items() if all(one[number] is not None for number in numbers)}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is not what sora-jax eval --json prints")
