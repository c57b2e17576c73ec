"""Which videos `sora-jax sample` is to make: prompts from the command line or a file, their seeds and their paths."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_jax.errors import UserError, nearest
from sora_jax.record import check_seed
from sora_jax.vocabulary import nearest_prompt, unknown_words

if TYPE_CHECKING:
    import argparse

    from sora_jax.record import Record


@dataclass(frozen=True)
class Job:
    """One video that was asked for."""

    prompt: str
    negative_prompt: str | None  # None: the model's own
    seed: int
    out: str


def plan(args: argparse.Namespace, like: Record | None = None) -> list[Job]:
    """Every video to make, each with the path it goes to; raises `UserError` before anything is loaded."""
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in args.prompt]
    if args.prompts:
        rows += read_prompts(Path(args.prompts))
    if not rows and like:
        rows = [{"prompt": like.prompt}]
    if not rows:
        raise UserError('no prompt; say what the video shows: sora-jax sample "a red ball bounces on a blue floor"')
    if args.num_videos < 1:
        raise UserError(f"--num-videos must be >= 1, not {args.num_videos}")
    negative = args.negative_prompt
    if negative is None and like:
        negative = like.negative_prompt
    seed = args.seed if args.seed is not None else like.seed if like else 0
    jobs = []
    for row in rows:
        if not row["prompt"].strip():
            raise UserError("empty prompt; say what the video shows")
        first = seed if row.get("seed") is None else row["seed"]
        check_seed(first)
        check_seed(first + args.num_videos - 1)
        for k in range(args.num_videos):
            name = f"{slug(row['prompt'])}-{first + k}.mp4"
            jobs.append(Job(row["prompt"], row.get("negative_prompt", negative), first + k, row.get("out") or name))
    if args.out and args.out.endswith("/"):
        jobs = [dataclasses.replace(job, out=args.out + job.out) for job in jobs]
    elif args.out and len(jobs) > 1:
        raise UserError(f"--out {args.out} is one file for {len(jobs)} videos; end it in / to name a folder")
    elif args.out:
        jobs = [dataclasses.replace(jobs[0], out=args.out)]
    taken: set[str] = set()
    for job in jobs:
        if job.out in taken:
            raise UserError(f"two videos would be written to {job.out}; give them different seeds or names")
        taken.add(job.out)
    return jobs


def batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Runs of at most `size` jobs that share a negative prompt, in order."""
    for _, alike in itertools.groupby(jobs, key=lambda job: job.negative_prompt):
        some = list(alike)
        yield from (some[i : i + size] for i in range(0, len(some), size))


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of prompts: {"prompt", and where given "negative_prompt", "seed", "out"}."""
    if path.suffix not in (".txt", ".csv", ".jsonl"):
        raise UserError(f'{path}: unknown type of prompt file "{path.suffix}"; known: .txt, .csv, .jsonl')
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error
    rows: list[Any]
    if path.suffix == ".txt":
        rows = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    elif path.suffix == ".csv":
        rows = [{k: v for k, v in row.items() if v not in (None, "")} for row in csv.DictReader(text.splitlines())]
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
            if isinstance(row, dict):  # null is what is not given
                row = {name: value for name, value in row.items() if value is not None}
            rows += [row] if line.strip() else []
    known = ("prompt", "negative_prompt", "seed", "out")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f"{path}, entry {number}: no prompt; its fields are {', '.join(known)}")
        if None in row:  # where csv puts cells that have no column
            raise UserError(f"{path}, entry {number}: more cells than columns; a prompt with commas stands in quotes")
        for name in row:
            if name not in known:
                raise UserError(f'{path}, entry {number}: unknown field "{name}"; {nearest(str(name), known)}')
        for name in ("negative_prompt", "out"):
            if not isinstance(row.get(name, ""), str):
                raise UserError(f"{path}, entry {number}: {name} {row[name]!r} is no text")
        seed = row.get("seed")
        if isinstance(seed, str) and seed.strip().removeprefix("-").isdecimal():
            seed = int(seed)  # csv knows nothing but text
        if seed is not None and type(seed) is not int:  # bool is an int too
            raise UserError(f"{path}, entry {number}: seed {seed!r} is not a whole number")
        row["seed"] = seed
    if not rows:
        raise UserError(f"{path} holds no prompt")
    return rows


def slug(prompt: str, length: int = 60) -> str:
    """A file name from a prompt: its letters and digits, in words.

    >>> slug("A red ball, bouncing!")
    'a-red-ball-bouncing'
    """
    letters = unicodedata.normalize("NFKC", prompt).lower()
    words = "".join(c if c.isalnum() else " " for c in letters).split()
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:length]
        if len(longer) > length:
            break
        name = longer
    return name or "video"


def warn_of_unknown_words(jobs: Sequence[Job], model: str, card: Mapping[str, Any]) -> None:
    """One warning that names every word the model has never read, and the nearest prompt that it has."""
    known = card.get("words")
    if not known:
        return  # a model that does not say what it has read
    strange = {word: job.prompt for job in reversed(jobs) for word in reversed(unknown_words(job.prompt, known))}
    if strange:
        words = ", ".join(f'"{word}"' for word in reversed(strange))
        prompt = list(strange.values())[-1]
        near = nearest_prompt(prompt, card.get("prompts", ()))
        hint = f'; the nearest prompt it knows: "{near}"' if near else ""
        warnings.warn(f"{model} has never read {words}{hint}", stacklevel=2)
