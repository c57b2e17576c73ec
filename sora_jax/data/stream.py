"""The endless stream of clips that a loader packs: which record comes when, how much of it, and with which caption.

Element e is a pure function of (seed, e): its record, whether it is cut to an image or a shorter clip, which caption it
gets, and whether that is dropped. So neither the number of workers nor a restart changes what comes, and a place in the
stream is a number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from sora_jax.data.latents import BadRecordError, LatentHeader, LatentRecord
from sora_jax.data.workers import Workers, in_processes
from sora_jax.errors import UserError
from sora_jax.shapes import Extent, Stride, token_extent
from sora_jax.tokens.planning import ClipShape, ShotSize

_CHUNK = 16  # elements that travel from a worker at once

Tokenize = Callable[[str], Sequence[int]]


@runtime_checkable
class Records(Protocol):
    """What a loader reads: a `LatentSource`, or a list of records. A source may have a method `header(index)` that is
    cheaper than the whole record."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> LatentRecord: ...


@dataclass(frozen=True)
class LoaderOptions:
    """What a loader makes of its source; all of it but what says how it is read decides which batches come."""

    rows: int  # B: rows a step, of all parts
    row_tokens: int  # N
    row_text: int  # L
    row_groups: int  # G
    patch: Stride = Stride(1, 1, 1)
    seed: int = 0
    image_share: float = 0.0  # of the clips, cut to their first frame, with a caption of that frame
    prefix_share: float = 0.0  # of the clips, cut to a shorter clip of at least 2 latents
    window_share: float = 0.0  # of the clips, without their first latent
    caption_dropout: float = 0.0  # of the clips, with the empty prompt
    shot_dropout: float = 0.0  # of the shots of cut clips, with the empty prompt
    skip_long_captions: bool = False  # of a clip's captions only those that fit a row; else one too long is an error
    skip_misfits: bool = False  # clips that fit no row, or have no caption that does; else one of these is an error
    shuffle: bool = True
    epochs: int | None = None  # None: for ever
    packing: Literal["packed", "buckets"] = "packed"  # see `data.plans`
    look_ahead: int = 16  # clips that a row is chosen from
    plan_steps: int = 1  # steps planned together, so that rows of like cost come in one step
    quadratic: float = 0.0  # a clip of n tokens costs n + this n^2 (`planning.quadratic_share`)
    part: int = 0  # which of `parts` equal slices of the rows this loader fills
    parts: int = 1
    workers: int = 0  # processes that read; 0 = a thread of this one
    prefetch: int = 2  # batches made ahead; 0 = none, in the caller's thread
    stalled_seconds: float = 0.0  # without a batch, after which reading is taken for hung (with prefetch); 0 = never

    def __post_init__(self) -> None:
        for name in ("image_share", "prefix_share", "window_share", "caption_dropout", "shot_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if self.image_share + self.prefix_share + self.window_share > 1:
            windows = f", prefix_share {self.prefix_share} and window_share {self.window_share}"
            others = windows if self.window_share else f" and prefix_share {self.prefix_share}"
            raise UserError(f"image_share {self.image_share}{others} are more than 1 together")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"the loader's seed must be in [0, 2^32), not {self.seed}")
        if not 0 <= self.part < self.parts or self.rows % self.parts:
            raise UserError(f"part {self.part} of {self.parts} of {self.rows} rows cannot be")
        for name, least in (
            ("rows", 1),
            ("row_tokens", 1),
            ("row_text", 1),
            ("row_groups", 1),
            ("look_ahead", 1),
            ("plan_steps", 1),
            ("quadratic", 0),
            ("workers", 0),
            ("stalled_seconds", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be >= {least}, not {getattr(self, name)}")


class Element(NamedTuple):
    """One clip of the stream, as it goes into a row."""

    number: int  # in the stream
    record: int
    size: tuple[int, int, int, int] | None  # (F, h, w, C) of what is used of it; None when it could not be read
    text: np.ndarray  # int32 [L]
    name: str  # where the clip came from, or why it could not be read
    latents: np.ndarray | None = None  # float16, of that size, where they were read at once
    long_captions: int = 0  # of its captions were not to be had, being too long
    shots: tuple[ShotSize, ...] = ()  # of a clip of several
    headless: bool = False  # whether its first latent is left out

    @property
    def channels(self) -> int:
        assert self.size is not None
        return self.size[3]

    def shape(self, patch: Stride) -> ClipShape:
        assert self.size is not None
        extent = token_extent(Extent(*self.size[:3]), patch)
        return ClipShape(extent.volume, len(self.text), extent.frames)


class Cut(NamedTuple):
    """What is used of a clip."""

    latents: slice
    captions: tuple[str, ...]  # one, or one for each of its shots
    shots: tuple[int, ...]  # latents of each shot, where there are several


def cut_and_caption(
    clip: LatentHeader, rng: np.random.Generator, options: LoaderOptions, most_bytes: int = sys.maxsize
) -> Cut:
    """How much is used of a clip: all, the first latents, or all but the first one; and captions that are true of it.

    Captions of more than `most_bytes` are left out where there are others; so much have the shots of a cut clip
    together, with a byte between two of them.

    One or two latents are an image or less than a second, in which hardly anything happens, so these take a caption
    of the first frame; a clip that has none is not cut so short. A cut clip is cut to its first shots, whole ones.
    """
    cut, length, which = rng.random(3)
    frames = clip.shape[0]
    ends = np.cumsum([shot.latents for shot in clip.shots]).tolist()
    shortest = 2 if clip.captions_image else 3
    shorter = ends[:-1] if clip.shots else range(shortest, frames)
    images, prefixes = options.image_share, options.image_share + options.prefix_share
    start, keep = 0, frames
    if frames > 1 and clip.captions_image and cut < images:
        keep = 1
    elif shorter and images <= cut < prefixes:
        keep = shorter[int(length * len(shorter))]
    elif min(ends, default=frames) > 2 and prefixes <= cut < prefixes + options.window_share:
        start = 1

    if clip.shots and keep > 1:
        shots = [shot for shot, end in zip(clip.shots, ends, strict=True) if end <= keep]
        most_each = most_of_shot(most_bytes, len(shots))
        texts = [_choose(shot.captions, rng.random(), most_each) for shot in shots]
        sizes = [shots[0].latents - start, *(shot.latents for shot in shots[1:])]
        return Cut(slice(start, keep), tuple(texts), tuple(sizes) if len(shots) > 1 else ())
    captions = clip.captions_image if keep < min(frames, 3) else clip.captions
    return Cut(slice(start, keep), (_choose(captions, which, most_bytes),), ())


def most_of_shot(most_bytes: int, shots: int) -> int:
    """Bytes that each of several captions may have which stand in a row in place of one, with a place between two."""
    return (most_bytes + 1) // shots - 1


def _choose(captions: Sequence[str], which: float, most_bytes: int) -> str:
    """One of them, by a number in [0, 1), where there are any; not too long, where there is such a one."""
    captions = [text for text in captions if len(text.encode()) <= most_bytes] or list(captions)
    return captions[int(which * len(captions))] if captions else ""


class Elements:
    """The stream by number: `epochs` times all records, in an order that is new each time.

    Of a source that has headers these alone are read, and `latents` when a row is filled: many clips may be planned
    ahead then, and of several loaders that share the rows each reads the latents of its own. Other records are read
    once, whole.

    The order is a permutation per epoch, 8 bytes a record. (Grain's own shuffle finds a place by trial in a block of
    2^16, which takes 4 ms when there are ten records; and seed + 1 has the epochs of seed, moved by one.)
    """

    def __init__(self, source: Records, tokenize: Tokenize, options: LoaderOptions):
        self.source, self.tokenize, self.options = source, tokenize, options
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return sys.maxsize if self.options.epochs is None else self.options.epochs * len(self.source)

    def __getitem__(self, number: int) -> Element:
        options, record = self.options, self.record(number)
        latents: np.ndarray | None = None
        try:
            if hasattr(self.source, "header"):
                header = self.source.header(record)
            else:
                clip = self.source[record]
                header, latents = clip.header, clip.latents
        except BadRecordError as error:
            return Element(number, record, None, np.zeros(0, np.int32), str(error))
        rng = random_stream(options.seed, number)
        most_bytes = options.row_text - 1 if options.skip_long_captions else sys.maxsize
        used = cut_and_caption(header, rng, options, most_bytes)
        captions = used.captions
        if rng.random() < options.caption_dropout:
            captions = ("",) * len(captions)
        if used.shots:
            dropped = rng.random(len(captions)) < options.shot_dropout
            captions = tuple("" if out else text for out, text in zip(dropped, captions, strict=True))
        texts = [np.asarray(self.tokenize(caption), np.int32) for caption in captions]
        shots = tuple(ShotSize(n, len(text)) for n, text in zip(used.shots, texts, strict=False))
        size = (used.latents.stop - used.latents.start, *header.shape[1:])
        most_each = most_of_shot(most_bytes, max(len(header.shots), 1))
        long = sum(len(text.encode()) > most_bytes for text in (*header.captions, *header.captions_image))
        long += sum(len(text.encode()) > most_each for shot in header.shots for text in shot.captions)
        own = None if latents is None else latents[used.latents]
        headless = used.latents.start > 0
        return Element(number, record, size, np.concatenate(texts), header.source, own, long, shots, headless)

    def latents(self, element: Element) -> np.ndarray:
        """Of an element that could be read at all. Raises `BadRecordError`."""
        if element.latents is not None:
            return element.latents
        assert element.size is not None
        start = int(element.headless)
        return self.source[element.record].latents[start : start + element.size[0]]

    def record(self, number: int) -> int:
        epoch, place = divmod(number, len(self.source))
        if not self.options.shuffle:
            return place
        if epoch not in self._orders:
            if len(self._orders) > 1:  # the last two epochs: processes and carried clips straddle them
                self._orders.pop(min(self._orders))
            self._orders[epoch] = random_stream(self.options.seed, epoch, 1).permutation(len(self.source))
        return int(self._orders[epoch][place])


def random_stream(seed: int, number: int, purpose: int = 0) -> np.random.Generator:
    """A stream of random numbers of its own for each number: independent of who draws, and in what order."""
    return np.random.Generator(np.random.Philox(key=[seed + (purpose << 32), number]))


# ------------------------------------------------------------------------------------------------------------- reading


def stream(elements: Elements, start: int, workers: Workers | None = None) -> Generator[Element, None, None]:
    """The elements from number `start` on, in an order that does not depend on the number of workers. `workers` gets to
    know the processes that read."""
    options = elements.options
    if start >= len(elements):
        return
    if options.workers:
        yield from in_processes(elements, start, workers or Workers(options.workers), chunk=_CHUNK)
    else:
        yield from (elements[number] for number in range(start, len(elements)))
