"""`sora-jax eval`: how often a model makes what the prompt says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from sora_jax.errors import UserError

HELP = "sample held-out prompts and judge what comes out"
ALONE = True
EXAMPLES = """
    sora-jax eval --model world
    sora-jax eval --model runs/world --n 50 --steps 15
    sora-jax eval --model world --json > eval.json
    sora-jax eval --model world --width 96 --n 100
    sora-jax eval --model world --suite reconstruction --n 64
    sora-jax eval --model world --suite reconstruction --source my_videos
"""
SUITES = ("world", "reconstruction")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="world", metavar="MODEL", help="a shipped name, a model folder or a workdir")
    parser.add_argument(
        "--suite",
        default="world",
        metavar="NAME",
        help="world: held-out prompts, judged by checkers; reconstruction: the autoencoder on held-out clips",
    )
    parser.add_argument(
        "--source",
        default="world",
        metavar="world|FOLDER",
        help="reconstruction: held-out clips of the world, or a folder of videos",
    )
    parser.add_argument("--n", type=int, default=200, metavar="N", help="prompts, or clips (200)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="which prompts, and the first video's seed (0)"
    )
    parser.add_argument("--frames", type=int, metavar="T", help="of each video, 9 or more (the model's)")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="of each video (the model's)")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="of each video (the model's)")
    parser.add_argument("--steps", type=int, metavar="N", help="solver steps (the model's)")
    parser.add_argument("--guidance", type=float, metavar="W", help="how strongly the prompt is followed (the model's)")
    parser.add_argument("--solver", metavar="NAME", help="unipc, dpmpp_2m, euler or heun (the model's)")
    parser.add_argument("--batch-size", type=int, default=20, metavar="N", help="videos at once (20)")
    parser.add_argument("--dtype", default="auto", metavar="DTYPE", help="auto, float32 or bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.suite not in SUITES:
        raise UserError(f'unknown suite "{args.suite}"; known: {", ".join(SUITES)}')
    if args.n < 1 or args.batch_size < 1:
        raise UserError(f"--n and --batch-size must be >= 1, not {args.n} and {args.batch_size}")
    from sora_jax.pipeline import Pipeline

    pipe = Pipeline.load(args.model, dtype=args.dtype)
    report = _world(pipe, args) if args.suite == "world" else _reconstruction(pipe, args)
    document = {"model": pipe.name, **report}
    if not args.json:
        print(f"{document['suite']}, {document['n']} samples of {pipe.name}; 95 % intervals")
        for name, metric in document["metrics"].items():
            print(f"  {name:20} {metric['value']:8.3f}   {metric['low']:.3f} to {metric['high']:.3f}")
    return document


def _world(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    from sora_jax.evaluation.suite import evaluate

    frames = pipe.extent(args.frames, None, args.height, args.width).frames
    if frames < 9:
        raise UserError(f"motion cannot be judged in {frames} frames; ask for --frames 9 or more")
    names = ("frames", "height", "width", "steps", "guidance", "solver")
    settings = {name: getattr(args, name) for name in names}

    def make(prompts: list[str], seeds: list[int]) -> np.ndarray:
        videos = pipe.sample(prompts, seed=seeds, batch_size=args.batch_size, **settings)
        return np.stack([video.frames for video in videos])

    return evaluate(make, n=args.n, seed=args.seed, batch_size=args.batch_size, progress=_counter())


def _reconstruction(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """PSNR and SSIM of the autoencoder on clips it was not trained on, beside a still of their first frame."""
    from sora_jax.evaluation.reconstruction import evaluate_reconstruction

    source = _clips(pipe, args)
    count = min(args.n, len(source))
    show = _counter()

    def there_and_back(clip: np.ndarray) -> np.ndarray:
        return pipe.decode(pipe.encode(clip[None]))[0]

    def clips() -> Any:
        for index in range(count):
            yield source[index]["frames"]
            show(index + 1, count)

    scores = evaluate_reconstruction(there_and_back, clips())
    return {"suite": "reconstruction", "n": count, "metrics": {k: _mean(v) for k, v in scores.items()}}


def _clips(pipe: Any, args: argparse.Namespace) -> Any:
    """A sequence of {"frames": uint8 [T, H, W, 3], ...} of the model's size."""
    frames, height, width = pipe.extent(args.frames, None, args.height, args.width)
    if args.source == "world":
        from sora_jax.data.world import WorldSource

        return WorldSource(args.seed, args.n, "heldout", frames, height, width)
    from sora_jax.data.sources import FolderSource

    fps = pipe.folder.defaults.fps
    return FolderSource(args.source, fps=fps, frames=frames, height=height, width=width, captions=False)


def _mean(values: list[float]) -> dict[str, float]:
    """The mean over clips and its normal 95 % interval; clips that come back without any error are left out."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if not len(finite):
        return {"value": float("nan"), "low": float("nan"), "high": float("nan")}
    half = 1.96 * finite.std(ddof=1) / np.sqrt(len(finite)) if len(finite) > 1 else 0.0
    return {"value": float(finite.mean()), "low": float(finite.mean() - half), "high": float(finite.mean() + half)}


def _counter() -> Callable[[int, int], None]:
    """Progress on one line of a terminal; nothing in a log."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show
