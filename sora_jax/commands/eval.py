"""`sora-jax eval`: how often a model makes what the prompt says, and how close to the truth it comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sora_jax.commands.flags import parse_shots
from sora_jax.errors import UserError, nearest
from sora_jax.record import check_seed

if TYPE_CHECKING:
    from sora_jax.data.world import Mix

HELP = "sample held-out prompts and judge what comes out"
ALONE = True
OVERRIDES = True  # takes --config.a.b=value
EXAMPLES = """
    sora-jax eval --model world
    sora-jax eval --model runs/world --n 50 --steps 15
    sora-jax eval --model world --json > eval.json
    sora-jax eval --model world --width 96 --n 100
    sora-jax eval --model runs/world_2 --config world_2          # prompts of the second world's mix
    sora-jax eval --model world --config world --config.data.mix.occluder=10
    sora-jax eval --model world --suite distance --n 100
    sora-jax eval --model world --suite continuation --n 50
    sora-jax eval --model world --suite stories --shots 9,9 --n 50
    sora-jax eval --model world --suite reconstruction --n 64
    sora-jax eval --suite reconstruction --autoencoder runs/autoencoder
    sora-jax eval --model world --suite reconstruction --source my_videos
    sora-jax eval --model world --suite ceiling --height 96 --width 96    # what the autoencoder lets the checkers see
"""
SUITES = {  # what each asks, and how many clips it asks for if nobody says
    "world": ("held-out prompts, judged by checkers", 200),
    "distance": ("how far their clips are from true ones as a whole, beside the noise floor", 200),
    "continuation": ("held-out first frames, continued: motion masks against the truth, beside two baselines", 100),
    "stories": ("clips with cuts, a prompt for each shot", 100),
    "reconstruction": ("the autoencoder on held-out clips", 200),
    "ceiling": ("true clips of held-out prompts through the autoencoder, judged like made ones", 200),
}
SAMPLED = ("steps", "guidance", "solver")  # flags that go to the sampler as they are
# flags of some suites alone
ONLY = {"source": ("reconstruction",), "shots": ("stories",), "autoencoder": ("reconstruction", "ceiling")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="world", metavar="MODEL", help="a shipped name, a model folder or a workdir")
    parser.add_argument(
        "--suite",
        default="world",
        metavar="NAME",
        help="; ".join(f"{name}: {what}" for name, (what, _) in SUITES.items()),
    )
    parser.add_argument("--config", metavar="NAME|PATH", help="whose mix of the world is asked for (the first world's)")
    parser.add_argument(
        "--source", metavar="world|FOLDER", help="reconstruction: held-out clips of the world, or a folder of videos"
    )
    parser.add_argument("--shots", metavar="T,T,...", help="stories: frames of each shot, 1 + 4k and 9 or more (9,9)")
    parser.add_argument(
        "--autoencoder",
        metavar="MODEL",
        help="reconstruction, ceiling: of this shipped name, model folder or workdir, in place of the model's",
    )
    defaults = ", ".join(f"{name} {n}" for name, (_, n) in SUITES.items())
    parser.add_argument("--n", type=int, metavar="N", help=f"prompts, or clips ({defaults})")
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
        raise UserError(f'unknown suite "{args.suite}"; {nearest(args.suite, SUITES)}')
    n = SUITES[args.suite][1] if args.n is None else args.n
    if n < 1 or args.batch_size < 1:
        raise UserError(f"--n and --batch-size must be >= 1, not {n} and {args.batch_size}")
    check_seed(args.seed)
    check_seed(args.seed + n - 1)  # each video has the next one
    for flag, of in ONLY.items():
        if getattr(args, flag) is not None and args.suite not in of:
            raise UserError(f"--{flag} is for --suite {' or '.join(of)}, not {args.suite}: leave it out")
    shots = parse_shots(args.shots) if args.shots else None
    if args.suite == "stories" and args.frames is not None:
        raise UserError("--shots says how many frames there are: leave --frames out")
    mix = _mix(args)
    from sora_jax.evaluation import suites
    from sora_jax.pipeline import Pipeline

    pipe = Pipeline.load(args.model, dtype=args.dtype)
    asked = suites.Asked(
        n=n,
        seed=args.seed,
        batch_size=args.batch_size,
        frames=args.frames,
        height=args.height,
        width=args.width,
        settings={name: getattr(args, name) for name in SAMPLED},
        mix=mix,
        source=args.source or "world",
        shots=shots,
        autoencoder=args.autoencoder,
        progress=_counter(),
    )
    document = {"model": args.autoencoder or pipe.name, **suites.run(args.suite, pipe, asked)}
    if mix is not None:
        document["config"] = args.config
    if not args.json:
        print(_text(document))
    return document


def _mix(args: argparse.Namespace) -> Mix | None:
    """The mix of the config that is named; None where none is."""
    if args.config is None:
        if args.overrides:
            raise UserError(f"--config.{args.overrides[0]} changes a config: name it, say --config world_2")
        return None
    if args.source not in (None, "world"):
        raise UserError(f"--config says what is asked of the world, and --source is {args.source}: leave one out")
    from sora_jax.config import load_config

    return load_config(args.config, args.overrides).data.mix


def _text(document: dict[str, Any]) -> str:
    lines = [f"{document['suite']}, {document['n']} samples of {document['model']}; 95 % intervals"]
    if "encoder" in document:
        encoder = document["encoder"]
        size = "{frames} frames of {height}x{width}".format(**document["size"])
        lines.append(f"  encoder {encoder['name']} ({encoder['fingerprint']}), {size}: compare with no other")
    width = max(len(name) for name in document["metrics"])
    for name, metric in document["metrics"].items():
        bounds = f"{metric['low']:.3f} to {metric['high']:.3f}"
        lines.append(f"  {name:{max(width, 20)}} {metric['value']:8.3f}   {bounds:18} of {metric['n']}")
    return "\n".join(lines)


def _counter() -> Callable[[int, int], None]:
    """Progress on one line of a terminal; nothing in a log."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show
