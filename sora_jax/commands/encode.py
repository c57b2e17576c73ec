"""`sora-jax encode`: clips through an autoencoder, once, into a cache that training reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sora_jax.errors import UserError, nearest
from sora_jax.record import check_seed

if TYPE_CHECKING:
    from sora_jax.data.sources import FolderSource, WorldClips
    from sora_jax.data.world import Mix
    from sora_jax.training.encoding import Progress

HELP = "encode clips to a cache of latents for training; goes on where it stopped"
CLUSTER = True  # processes share the shards that are missing
EXAMPLES = """
    sora-jax encode world --clips 100000 --out latents/world
    sora-jax encode world --clips 100000 --out latents/shapes --sizes 64x64,64x96,96x64
    sora-jax encode world --clips 100000 --out latents/cuts --shots 17,9+9    # every second clip is cut in two
    sora-jax encode world --clips 100000 --out latents/pairs --mix single=0.3,pair=0.6
    sora-jax encode my_videos --out latents/mine --height 128 --width 192 --fps 8
    sora-jax encode world --split heldout --clips 256 --out gs://bucket/heldout --autoencoder runs/autoencoder
    sora-jax encode world --clips 100000 --out latents/world --workers 16     # where an accelerator waits for clips
    sora-jax encode my_videos --out gs://bucket/mine      # in as many processes as are started: they share the work
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="world|FOLDER",
        help="the procedural world, or a folder of videos and images with a metadata.csv (path,text) or captions "
        "beside them (cat.mp4, cat.txt); write ./world for a folder of that name",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder or URL of the cache; made, or gone on with")
    parser.add_argument(
        "--autoencoder", default="world", metavar="MODEL", help="a shipped name, model folder or workdir (world)"
    )
    parser.add_argument("--frames", type=int, default=17, metavar="N", help="most frames of a clip, 1 + 4k (17)")
    parser.add_argument("--height", type=int, default=64, metavar="PIXELS", help="of the clips (64)")
    parser.add_argument("--width", type=int, default=64, metavar="PIXELS", help="of the clips (64)")
    parser.add_argument(
        "--sizes", metavar="HxW,HxW,...", help="of the world's clips in turn, in place of --height and --width"
    )
    parser.add_argument(
        "--shots",
        metavar="N,N+N,...",
        help="of the world's clips in turn, in place of --frames: the frames of each shot, 1 + 4k; 9+9 is cut in two",
    )
    parser.add_argument("--fps", type=float, metavar="RATE", help="a folder's videos are sampled at this rate (8)")
    parser.add_argument("--clips", type=int, metavar="N", help="how many clips of the world")
    parser.add_argument("--seed", type=int, metavar="N", help="which clips of the world (0)")
    parser.add_argument(
        "--split", metavar="train|heldout", help="of the world: combinations for training, or never in it"
    )
    parser.add_argument(
        "--mix",
        metavar="NAME=WEIGHT,...",
        help="how often things happen in the world, say pair=0.5,collision=0.2: kinds of shot, motions, sizes; a wrong "
        "name lists them",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="clips encoded at once (16)")
    parser.add_argument("--shard-size", type=int, default=1024, metavar="N", help="clips in a file of the cache (1024)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="that read or render ahead (2)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that do so in place of threads (0)"
    )
    parser.add_argument(
        "--dtype", default="float32", metavar="DTYPE", help="to compute in: float32, or bfloat16, faster and coarser"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    _check_world_flags(args)

    import jax

    from sora_jax.runtime import compute_dtype
    from sora_jax.training.encoding import encode_clips
    from sora_jax.training.pretrained import load_autoencoder

    dtype = compute_dtype(args.dtype)
    config, params = load_autoencoder(args.autoencoder)
    source = _source(args, config.stride.time)
    left_out = list(getattr(source, "unreadable", []))
    too_short = list(getattr(source, "too_short", []))
    with _progress(f"encode {args.source}") as progress:
        encoded = encode_clips(
            source,
            config,
            params,
            args.out,
            name=args.autoencoder,
            batch_size=args.batch_size,
            clips_per_shard=args.shard_size,
            dtype=dtype,
            threads=args.threads,
            workers=args.workers,
            progress=progress,
        )
    left_out += encoded.left_out
    first = jax.process_index() == 0
    for kind, names in (("could not be read", left_out), ("too short", too_short)):
        for name in names if first else ():
            print(f"left out, {kind}: {name}", file=sys.stderr)
    rate = encoded.made / max(encoded.seconds, 1e-9)
    if not args.json and first:
        left = f", {len(left_out) + len(too_short)} left out" if left_out or too_short else ""
        print(f"{args.out}: {encoded.clips} clips, {encoded.made} of them now{left}, {rate:.1f} clips/s")
    return {
        "path": args.out,
        "clips": encoded.clips,
        "made": encoded.made,
        "left_out": left_out,
        "too_short": too_short,
        "programs": encoded.programs,
        "seconds": encoded.seconds,
        "clips_per_second": rate,
    }


def _check_world_flags(args: argparse.Namespace) -> None:
    world = args.source == "world"
    for flag, value, wanted in (
        ("--clips", args.clips, world),
        ("--seed", args.seed, world),
        ("--split", args.split, world),
        ("--sizes", args.sizes, world),
        ("--shots", args.shots, world),
        ("--mix", args.mix, world),
        ("--fps", args.fps, not world),
    ):
        if value is not None and not wanted:
            what = "the world, and this is a folder" if not world else "a folder, and the world has 8 frames a second"
            raise UserError(f"{flag} is for {what}")
    if world and args.clips is None:
        raise UserError("how many clips of the world? give --clips, say --clips 100000")
    if args.split not in (None, "train", "heldout"):
        raise UserError(f'the world has no split "{args.split}"; known: heldout, train')
    if args.seed is not None:
        check_seed(args.seed)


def _source(args: argparse.Namespace, step: int) -> WorldClips | FolderSource:
    from sora_jax.data.sources import FolderSource, WorldClips

    size = {"frames": args.frames, "height": args.height, "width": args.width}
    if args.source == "world":
        which: dict[str, Any] = {"seed": args.seed or 0, "split": args.split or "train"}
        which |= {"sizes": _sizes(args.sizes), "shots": _cuts(args.shots), "mix": _mix(args.mix)}
        return WorldClips(args.clips, **which, **size)
    return FolderSource(args.source, fps=8.0 if args.fps is None else args.fps, step=step, **size)


def _sizes(text: str | None) -> list[tuple[int, int]]:
    """The sizes that "64x64,64x96" names, as (height, width)."""
    found = []
    for part in text.split(",") if text else ():
        height, x, width = part.strip().partition("x")
        if not (x and height.isdecimal() and width.isdecimal()):
            raise UserError(f'--sizes takes HxW,HxW,..., say 64x64,64x96: "{part}" is no size')
        found.append((int(height), int(width)))
    return found


def _cuts(text: str | None) -> list[tuple[int, ...]]:
    """The shots that "17,9+9" names, in frames."""
    found = []
    for part in text.split(",") if text else ():
        shots = part.strip().split("+")
        if not all(length.isdecimal() and int(length) for length in shots):
            raise UserError(f'--shots takes N,N+N,..., say 17,9+9: "{part}" is no list of lengths')
        found.append(tuple(map(int, shots)))
    return found


def _mix(text: str | None) -> Mix:
    """The world's mix with the weights that "pair=0.5,orbit=0.2" gives in place of the usual ones."""
    import dataclasses

    from sora_jax.data.world import Mix

    weights: dict[str, float] = {}
    usual = [field.name for field in dataclasses.fields(Mix)]
    for part in text.split(",") if text else ():
        name, _, weight = part.strip().partition("=")
        if name not in usual:
            raise UserError(f'--mix: nothing in the world is called "{name}": {nearest(name, usual)}')
        try:
            weights[name] = float(weight)
        except ValueError:
            raise UserError(f'--mix takes NAME=WEIGHT,..., say pair=0.5: "{part}" is none') from None
    return dataclasses.replace(Mix(), **weights)


@contextmanager
def _progress(title: str) -> Iterator[Progress]:
    """A bar on a terminal; in a log a line for every tenth. Of several processes the first one shows its own share."""
    import jax

    if jax.process_index():
        yield lambda done, total: None
        return
    if jax.process_count() > 1:
        title = f"{title}, process 1 of {jax.process_count()}"
    if not sys.stderr.isatty():
        said = -1

        def say(done: int, total: int) -> None:
            nonlocal said
            if (tenth := 10 * done // total) > said:
                said = tenth
                print(f"{title}: {done} of {total} clips", file=sys.stderr, flush=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
