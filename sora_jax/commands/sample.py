"""`sora-jax sample`: prompts in, videos out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sora_jax.commands.flags import parse_mesh
from sora_jax.commands.jobs import Job, batches, plan, warn_of_unknown_words
from sora_jax.errors import UserError
from sora_jax.runtime import is_chief

if TYPE_CHECKING:
    import numpy as np

    from sora_jax.pipeline import Progress
    from sora_jax.record import Record
    from sora_jax.sheet import Strip
    from sora_jax.video import Video

HELP = "make videos from prompts"
CLUSTER = True
EXAMPLES = """
    sora-jax sample "a red ball bounces on a blue floor"
    sora-jax sample "a green square slides left" --seed 7 --steps 50 --out slide.gif --scale 4
    sora-jax sample "a red ball falls" "a blue ball rests" --out videos/
    sora-jax sample "the ball rolls away" --image first.png
    sora-jax sample --prompts prompts.txt --out videos/ --json
    sora-jax sample "a star orbits" --num-videos 6 --out stars/ --sheet stars.png
    sora-jax sample --like ball.mp4 --seed 8
    sora-jax sample --prompts prompts.txt --out videos/ --batch-size 4 --mesh data=4,sequence=2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("prompt", nargs="*", metavar="PROMPT", help="what the video shows; several prompts make several")
    what.add_argument(
        "--prompts", metavar="FILE", help=".txt: a prompt a line; .csv or .jsonl: prompt, negative_prompt, seed, out"
    )
    what.add_argument("--negative-prompt", metavar="TEXT", help="what it should not show")
    what.add_argument("--image", metavar="FILE", help="the first frame")
    what.add_argument("--last-image", metavar="FILE", help="the last frame; such a video has 1 + 1 + 4k frames")
    what.add_argument("--like", metavar="FILE", help="take prompt and settings from a file that this command wrote")
    size = parser.add_argument_group("size (default: what the model was trained for)")
    size.add_argument("--frames", type=int, metavar="T", help="1 + 4k")
    size.add_argument("--seconds", type=float, metavar="S", help="instead of --frames: 1 + 4 round(S fps / 4)")
    size.add_argument("--height", type=int, metavar="PIXELS")
    size.add_argument("--width", type=int, metavar="PIXELS")
    how = parser.add_argument_group("how")
    how.add_argument("--model", metavar="MODEL", help="a shipped name, a model folder or URL, or a workdir (world)")
    how.add_argument(
        "--lora",
        action="append",
        metavar="FILE[=WEIGHT]",
        help="low-rank adapters to merge into the model; repeatable; of two experts into both, or high:FILE, low:FILE",
    )
    how.add_argument(
        "--lora-live", action="store_true", help="keep adapters beside the kernels, which stay as they are"
    )
    how.add_argument("--steps", type=int, metavar="N", help="solver steps; more is slower and finer")
    how.add_argument("--guidance", type=float, metavar="W", help="how strongly the prompt is followed; 1 = as trained")
    how.add_argument("--guidance-low", type=float, metavar="W", help="that of a second expert, for low noise")
    how.add_argument("--solver", metavar="NAME", help="unipc, dpmpp_2m, euler or heun")
    how.add_argument("--shift", type=float, metavar="S", help="time spent at high noise; larger for larger videos")
    how.add_argument("--seed", type=int, metavar="N", help="the same seed makes the same video (0)")
    how.add_argument(
        "--num-videos", type=int, default=1, metavar="N", help="of each prompt, with seeds SEED, SEED + 1 ..."
    )
    how.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="videos at once; with 1, each is the same in any company"
    )
    how.add_argument("--dtype", metavar="DTYPE", default="auto", help="auto, float32 or bfloat16")
    how.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="spread the model over devices, say fsdp=4,sequence=2; data=N cuts a batch "
        "(one device; of several processes all: sequence=-1)",
    )
    how.add_argument(
        "--offload", action="store_true", help="keep text encoder and autoencoder on the host while the steps are made"
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "-o",
        "--out",
        metavar="PATH",
        help="file (.mp4 .mov .webm .gif .png .npy), a folder for the frames, or FOLDER/ to put SLUG-SEED.mp4 in",
    )
    files.add_argument("--sheet", metavar="FILE", help="also one picture (.png) with frames of all videos, captioned")
    files.add_argument("--fps", type=float, metavar="N", help="frames a second in the file (the model's own)")
    files.add_argument("--scale", type=int, default=1, metavar="N", help="enlarge each pixel to NxN in the file")
    files.add_argument("--force", action="store_true", help="overwrite files")
    files.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> dict[str, Any]:
    _refuse_empty(args)
    like = _record_of(args.like) if args.like else None
    jobs = plan(args, like)
    settings = _settings(args, like)
    writes = is_chief()  # of several processes all make every video, and the first writes and speaks
    for job in jobs if writes else ():
        _check_out(job.out, settings.get("frames"), args.force)
    if args.sheet and writes:
        if not args.sheet.endswith(".png"):
            raise UserError(f"--sheet writes a picture: a .png, not {args.sheet}")
        _check_out(args.sheet, 1, args.force)
    if args.scale < 1:
        raise UserError(f"--scale must be a whole number >= 1, not {args.scale}")
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be a whole number >= 1, not {args.batch_size}")
    if args.fps is not None and not 0 < args.fps <= 1000:
        raise UserError(f"--fps must lie in (0, 1000], not {args.fps:g}")
    mesh = parse_mesh(args.mesh) if args.mesh is not None else spread_over_processes()
    given = _given_files(args, like)
    images: dict[str, Any] = {role: _read_image(file) for role, file in given.items()}

    started = time.perf_counter()
    from sora_jax.media import check_scale
    from sora_jax.pipeline import Pipeline

    lora = _loras(args.lora) if args.lora else like.lora if like else None
    model = args.model or (like.model if like else "world")
    with _progress(str(model)) as progress:
        pipe = Pipeline.load(
            model,
            mesh=mesh,
            dtype=args.dtype,
            lora=lora,
            lora_live=args.lora_live,
            offload=args.offload,
            progress=progress,
        )
    seconds = {"load": time.perf_counter() - started, "compile and sample": 0.0, "decode": 0.0, "write": 0.0}
    if writes:
        warn_of_unknown_words(jobs, pipe.name, pipe.folder.defaults.card)
    for text in {text for job in jobs for text in (job.prompt, job.negative_prompt or "")}:
        pipe.folder.tokenizer.encode(text)  # one that is too long is found before the first video is made
    if "last_image" in images and not settings.keys() & {"frames", "seconds"}:
        settings["frames"] = pipe.folder.defaults.frames + 1
    extent = pipe.extent(**{name: settings.get(name) for name in ("frames", "seconds", "height", "width")})
    check_scale(extent.height, extent.width, args.scale)
    for job in jobs if writes else ():
        _check_out(job.out, extent.frames, args.force)
    made = []
    shown: list[tuple[Strip, Record]] = []  # on the sheet
    for batch in batches(jobs, args.batch_size):
        with _progress(batch[0].prompt[:40]) as progress:
            clock = Clock(progress)
            videos = pipe.sample(
                [job.prompt for job in batch],
                seed=[job.seed for job in batch],
                negative_prompt=batch[0].negative_prompt,
                batch_size=len(batch),
                progress=clock,
                **settings,
                **images,
            )
            clock.finish()
        writing = time.perf_counter()
        for job, video in zip(batch, videos, strict=True):
            video = dataclasses.replace(video, record=dataclasses.replace(video.record, given=given))
            made.append(_describe(video, job, args.fps))
            if writes:
                _write(video, job.out, args)
                shown += [(_strip(video), video.record)] if args.sheet else []
                _report(made[-1], args.json)
        seconds["compile and sample"] += clock.sampled
        seconds["decode"] += clock.decoded
        seconds["write"] += time.perf_counter() - writing
    if shown:
        _write_sheet(shown, args)
    seconds["total"] = time.perf_counter() - started
    if writes:
        print(" · ".join(f"{name} {value:.1f} s" for name, value in seconds.items()), file=sys.stderr)
    return {"model": pipe.name, "videos": made, "seconds": seconds} | ({"sheet": args.sheet} if args.sheet else {})


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_empty(args: argparse.Namespace) -> None:
    """A script's empty variable is no wish for the default."""
    for name in ("prompts", "image", "last_image", "like", "model", "mesh", "out", "sheet"):
        if getattr(args, name) == "":
            raise UserError(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out")


def _settings(args: argparse.Namespace, like: Record | None) -> dict[str, Any]:
    """What goes to `Pipeline.sample` beside prompt and seed: flags first, then the file that is taken after."""
    names = ("frames", "seconds", "height", "width", "steps", "guidance", "guidance_low", "solver", "shift")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "frames" in settings and "seconds" in settings:
        raise UserError("--frames and --seconds say the same thing; give one of them")
    for name in names:
        # The record holds the frame count that seconds came to.
        recorded = getattr(like, name, None)
        if recorded is not None and not (name == "frames" and "seconds" in settings):
            settings.setdefault(name, recorded)
    return settings


def spread_over_processes() -> dict[str, int] | None:
    """Where nothing is said: one device does it all; of several processes all devices share the tokens, which needs no
    more memory of each."""
    import jax

    return {"sequence": -1} if jax.process_count() > 1 else None


def _loras(named: list[str]) -> dict[str, float]:
    """FILE=WEIGHT pairs; the weight is 1 where there is none."""
    loras = {}
    for one in named:
        file, _, weight = one.rpartition("=") if "=" in one else (one, "", "1")
        try:
            loras[file] = float(weight)
        except ValueError:
            raise UserError(f"--lora {one} should end in a number: FILE=WEIGHT") from None
    return loras


def _given_files(args: argparse.Namespace, like: Record | None) -> dict[str, str]:
    """The files whose frames are given, by the name of `Pipeline.sample`'s argument."""
    named = {"image": args.image, "last_image": args.last_image}
    files = {role: file or (like.given.get(role) if like else None) for role, file in named.items()}
    return {role: file for role, file in files.items() if file}


def _read_image(file: str) -> np.ndarray:
    """One picture, uint8 [H, W, 3]."""
    from sora_jax.media import read_media

    frames = read_media(file).frames
    if len(frames) != 1:
        raise UserError(f"{file} holds {len(frames)} frames; a picture is needed here")
    return frames[0]


def _record_of(path: str) -> Record:
    from sora_jax.media import read_media

    record = read_media(path).record
    if record is None:
        raise UserError(f"{path} holds no record of how it was made; only files that sora-jax wrote do")
    return record


def _check_out(out: str, frames: int | None, force: bool) -> None:
    from sora_jax.media import check_writable

    check_writable(out, frames=frames, overwrite=force)


# ---------------------------------------------------------------------------------------------------------------------
# What is made
# ---------------------------------------------------------------------------------------------------------------------


def _write(video: Video, out: str, args: argparse.Namespace) -> None:
    from sora_jax.media import write_media

    assert video.frames is not None
    write_media(
        video.frames,
        out,
        video.record,
        fps=video.fps if args.fps is None else args.fps,
        scale=args.scale,
        overwrite=args.force,
    )


def _strip(video: Video) -> Strip:
    """What a sheet shows of a video: a long one need not stay in memory for it."""
    from sora_jax.sheet import COLUMNS, Strip, chosen

    assert video.frames is not None
    return Strip([(video.frames[chosen([len(video.frames)], COLUMNS)[0]], video.record.prompt)])


def _write_sheet(shown: Sequence[tuple[Strip, Record]], args: argparse.Namespace) -> None:
    """Its record is the first video's, with the prompts of all."""
    from sora_jax.media import write_media
    from sora_jax.sheet import contact_sheet

    prompts = dict.fromkeys(record.prompt for _, record in shown)
    record = dataclasses.replace(shown[0][1], prompt="\n".join(prompts))
    write_media(contact_sheet([strip for strip, _ in shown])[None], args.sheet, record, overwrite=args.force)


def _describe(video: Video, job: Job, fps: float | None) -> dict[str, Any]:
    assert video.frames is not None
    count, height, width, _ = video.frames.shape
    return {
        "path": job.out,
        "frames": count,
        "height": height,
        "width": width,
        "fps": video.fps if fps is None else fps,
        "record": json.loads(video.record.to_json()),
    }


def _report(made: dict[str, Any], quiet: bool) -> None:
    if not quiet:
        print(made["path"], flush=True)
    length = made["frames"] / made["fps"]
    print(
        f"{made['frames']} frames of {made['width']}x{made['height']} at {made['fps']:g} fps = {length:.2f} s",
        file=sys.stderr,
    )


class Clock:
    """Told of the work's progress; splits its time at the last solver step: compile and sample, then decode."""

    def __init__(self, then: Progress):
        self.then = then
        self.started = self.stepped = self.ended = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            self.stepped = time.perf_counter()
        self.then(stage, done, total)

    def finish(self) -> None:
        self.ended = time.perf_counter()

    @property
    def sampled(self) -> float:
        return self.stepped - self.started

    @property
    def decoded(self) -> float:
        return self.ended - self.stepped


@contextmanager
def _progress(title: str) -> Iterator[Progress]:
    """A bar on a terminal, nothing in a log; of several processes the first has it."""
    if not (sys.stderr.isatty() and is_chief()):
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"{title}: {stage}", total=total)
            bar.update(tasks[stage], completed=done)

        yield show
