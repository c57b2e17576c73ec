"""What training would make of a data set: how full its rows are, how even its steps, and what it would leave out.

Everything is planned as `train` plans it, from the headers of a latent cache, or from a folder of videos before it is
encoded; no latents are read, unless each record is to be checked.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

from etils import epath

from sora_jax.config import Config
from sora_jax.data.latents import BadRecordError, LatentHeader, LatentSource
from sora_jax.data.plans import (
    CAPTION_TOO_LONG,
    CLIP_TOO_LONG,
    LONG_CAPTIONS,
    PlannedStep,
    Unreadable,
    first_state,
    planned_steps,
)
from sora_jax.data.sources import FolderSource
from sora_jax.data.stream import Elements, LoaderOptions, Records
from sora_jax.errors import UserError
from sora_jax.shapes import Stride, latent_extent
from sora_jax.tokens.planning import imbalance, row_cost
from sora_jax.training.diffusion_stage import caption_tokenizer, loader_options
from sora_jax.training.pretrained import load_autoencoder


@dataclass(frozen=True)
class DataReport:
    """Shares are in [0, 1]; means are over the steps that were planned, at least those of one epoch."""

    source: str
    clips: int  # an epoch, that can be read
    shapes: dict[str, int]  # "FxHxW" of the latents -> clips, most first
    packing: str
    row: tuple[int, int, int]  # tokens, text places and groups, at most
    rows: int  # a step
    shards: int  # slices of a step's rows that are held against each other
    steps_per_epoch: float
    clips_per_step: float
    programs: int  # of the step: shapes of its batches
    fill_tokens: float
    fill_text: float
    fill_groups: float
    imbalance_mean: float  # (max - mean) / mean of the cost of a step's shards
    imbalance_max: float
    left_out: dict[
        str, float
    ]  # of an epoch, by reason; of those that would end the run unless it is told otherwise, too
    ends_the_run: list[str]  # reasons among these that do, with this config
    examples: dict[str, list[str]]  # some of what is left out, by reason


class _Planned:
    """A folder as the records it will be."""

    def __init__(self, folder: FolderSource, stride: Stride, channels: int):
        self._folder, self._stride, self._channels = folder, stride, channels

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int, /) -> NoReturn:
        raise BadRecordError("it is not encoded yet")

    def header(self, index: int) -> LatentHeader:
        return self._folder.header(index, self._stride, self._channels)


def data_report(path: str, config: Config, *, shards: int | None = None, read: bool = False) -> DataReport:
    """Plan an epoch of the cache or folder `path` as the diffusion stage of `config` would.

    `shards` is the number of devices that share the rows of a step; by default each row has its own, where imbalance is
    largest. `read` reads every record, so that bit rot is found. Raises `UserError` for what is neither cache nor
    folder.
    """
    given = LoaderOptions(**loader_options(config))
    if shards is not None and given.rows % shards:
        raise UserError(f"train.batch_size {given.rows} cannot be split over {shards} devices")
    source, examples = _open(path, config)
    shapes, examples["corrupt"] = _shapes(source, read)
    counted: dict[str, float] = {reason: len(names) for reason, names in examples.items()}

    # What fits no row is counted here, whatever the run does with it.
    options = LoaderOptions(**{**loader_options(config), "skip_misfits": True})
    steps = _one_epoch(source, caption_tokenizer(config).places, options)
    # The last of the clips that were read wait for a row yet, so steps are counted by the clips that are in them.
    last, clips_out = steps[-1], Counter(steps[-1].left_out)
    del clips_out[LONG_CAPTIONS]
    epoch = len(source) * (1 - clips_out.total() / last.read)  # clips of one that are not left out
    counted |= {reason: count * len(source) / last.read for reason, count in last.left_out.items()}
    filled = [_fill(step, options) for step in steps]
    costs = [[row_cost([e.shape(options.patch).tokens for e in row], options.quadratic) for row in step.rows]
             for step in steps]  # fmt: skip
    uneven = [imbalance(each, shards) for each in costs]
    placed = sum(step.clips for step in steps)
    ends = [reason for reason in (CLIP_TOO_LONG, CAPTION_TOO_LONG) if counted.get(reason) and not given.skip_misfits]
    return DataReport(
        source=path,
        clips=sum(shapes.values()),
        shapes=dict(shapes.most_common()),
        packing=options.packing,
        row=(options.row_tokens, options.row_text, options.row_groups),
        rows=options.rows,
        shards=shards or options.rows,
        steps_per_epoch=len(steps) * epoch / placed,
        clips_per_step=placed / len(steps),
        programs=len({step.sizes for step in steps}),
        fill_tokens=statistics.mean(fill[0] for fill in filled),
        fill_text=statistics.mean(fill[1] for fill in filled),
        fill_groups=statistics.mean(fill[2] for fill in filled),
        imbalance_mean=statistics.mean(uneven),
        imbalance_max=max(uneven),
        left_out={reason: count for reason, count in counted.items() if count},
        ends_the_run=ends,
        examples={reason: names for reason, names in examples.items() if names},
    )


def _open(path: str, config: Config) -> tuple[Any, dict[str, list[str]]]:
    """The records that training would have, and what was or will be left out when they are encoded."""
    data = config.data
    folder = epath.Path(path.split(",", maxsplit=1)[0])
    if (folder / "manifest.json").exists():
        source = LatentSource(path, stop=-data.held_out or None)
        return source, {"unreadable when encoded": source.skipped}
    if path == "world":
        raise UserError(
            "the world's clips are reported on when they are encoded: sora-jax encode world --clips 1000 --out DIR"
        )
    if not folder.is_dir():
        raise UserError(f"{path} is neither a latent cache nor a folder of videos")
    autoencoder = load_autoencoder(data.autoencoder)[0]
    size: dict[str, Any] = {"frames": data.frames, "height": data.height, "width": data.width}
    videos = FolderSource(path, fps=data.fps, step=autoencoder.stride.time, **size)
    latent_extent(videos.extents[0], autoencoder.stride)  # says what sizes there can be
    left_out = {"unreadable": videos.unreadable, "video too short": videos.too_short}
    return _Planned(videos, autoencoder.stride, autoencoder.z_dim), left_out


def _one_epoch(source: Records, tokenize: Any, options: LoaderOptions) -> list[PlannedStep]:
    """The steps of at least an epoch: plans of several steps are taken whole."""
    taken: list[PlannedStep] = []
    for step in planned_steps(Elements(source, tokenize, options), first_state(), Unreadable(source, [])):
        taken.append(step)
        if step.read >= len(source) and not step.state["done"]:
            break
    return taken


def _fill(step: PlannedStep, options: LoaderOptions) -> tuple[float, float, float]:
    used = [sum(sizes) for sizes in zip(*(e.shape(options.patch) for row in step.rows for e in row), strict=True)]
    tokens, text, groups = (n / (len(step.rows) * places) for n, places in zip(used, step.sizes, strict=True))
    return tokens, text, groups


def _shapes(source: Any, read: bool) -> tuple[Counter[str], list[str]]:
    """How many clips have latents of each size, and which records cannot be read: their headers, or with `read` all."""
    if read and not isinstance(source, LatentSource):
        raise UserError("only what is encoded can be read through: give a latent cache")
    shapes: Counter[str] = Counter()
    corrupt: list[str] = []
    for index in range(len(source)):
        try:
            header = source[index].header if read else source.header(index)
            shapes["x".join(map(str, header.shape[:3]))] += 1
        except BadRecordError as error:
            corrupt.append(str(error))
    return shapes, corrupt
