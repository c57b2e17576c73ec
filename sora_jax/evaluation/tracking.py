"""Finding the world's objects in a video by their colours, with numpy alone.

Objects are saturated and grounds are muted, so an object is a connected patch of one hue. Hues are read in the
chroma plane, v = rgb - mean(rgb), where light and shadow change only the length of v. Within a patch, coverage is
measured softly (how far each pixel has gone from the ground's chroma to the object's), which gives centres to a
fraction of a pixel and shapes that survive blur and noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int8, UInt8

from sora_jax.data.world.outlines import shape_distance
from sora_jax.data.world.scene import COLORS, SHAPES, SQUARE_HALF, STAR_REACH, TRIANGLE_REACH

_PALETTE = np.array(list(COLORS.values()), np.float32)
_CHROMA = _PALETTE - _PALETTE.mean(1, keepdims=True)  # [colours, 3]
_LENGTH = np.linalg.norm(_CHROMA, axis=1)
_HUES = _CHROMA / _LENGTH[:, None]
_MIN_CHROMA, _MIN_SATURATION = 40.0, 0.28  # of |v| and |v| / max(rgb); the most colourful ground has 44 and 0.21
_MIN_AREA = 14.0  # square units: less is an edge or noise
_GATE = 16.0  # units that an object may move between two frames: the fastest fall makes 13

_AREA = {  # of each shape with radius 1
    "ball": np.pi,
    "square": (2 * SQUARE_HALF) ** 2,
    "triangle": 0.75 * np.sqrt(3) * TRIANGLE_REACH**2,
    "star": 5 * STAR_REACH * (STAR_REACH / 2) * np.sin(np.pi / 5),
}


class Blobs(NamedTuple):
    """All patches of a video; M of them, ordered by frame."""

    frame: np.ndarray  # [M] int
    color: np.ndarray  # [M] int, index in COLORS
    centers: np.ndarray  # [M, 2] (x, y) pixels
    areas: np.ndarray  # [M] pixels
    clipped: np.ndarray  # [M] bool: touches the border of the frame
    misfit: np.ndarray  # [M, shapes]: share of the area by which a drawing of each shape differs


@dataclass(frozen=True, eq=False)
class Track:
    """One object through time. Frames in which it is not seen hold nan."""

    color: str
    centers: Float[np.ndarray, "T 2"]  # (x, y), pixels
    areas: Float[np.ndarray, " T"]  # pixels
    clipped: Bool[np.ndarray, " T"]  # touches the border of the frame
    misfit: Float[np.ndarray, "T shapes"]  # see `Blobs`

    @property
    def seen(self) -> np.ndarray:
        """Bool [T]."""
        return ~np.isnan(self.areas)

    @property
    def whole(self) -> np.ndarray:
        """Bool [T]: seen, cut by the border by no more than its tips, and not half behind something."""
        seen = self.seen
        if not seen.any():
            return seen
        areas = np.where(seen, self.areas, 0)
        # half behind something: much smaller than both what comes before and what comes after
        before, after = np.maximum.accumulate(areas), np.maximum.accumulate(areas[::-1])[::-1]
        hidden = areas <= 0.85 * np.minimum(before, after)
        return seen & ~hidden & (~self.clipped | (areas > 0.9 * areas.max()))

    def shape_in(self, frames: np.ndarray) -> tuple[str, float]:
        """The shape that fits best over the chosen frames (bool [T]), and its median misfit."""
        chosen = self.whole & frames
        if not chosen.any():
            chosen = self.seen & frames
        if not chosen.any():
            return "", float("inf")
        misfit = np.median(self.misfit[chosen], axis=0)
        best = int(misfit.argmin())
        return SHAPES[best], float(misfit[best])

    @property
    def shape(self) -> str:
        """The shape that fits best, or "" when none does."""
        name, misfit = self.shape_in(np.ones(len(self.areas), bool))
        return name if misfit < 0.4 else ""

    @property
    def radii(self) -> np.ndarray:
        """Float64 [T]: the radius its area means for its shape; nan where it is not seen."""
        return np.sqrt(self.areas / _AREA[self.shape or "ball"])


@dataclass(frozen=True, eq=False)
class Tracking:
    """What was found in a video."""

    tracks: tuple[Track, ...]  # longest first
    counts: Int[np.ndarray, " T"]  # patches in each frame
    blobs: Blobs
    labels: Int8[np.ndarray, "T H W"]  # index in COLORS, -1 for ground
    unit: float


def _smooth(planes: np.ndarray) -> np.ndarray:
    """A 3 x 3 binomial filter over the last two axes; borders are repeated."""
    for axis in (-2, -1):
        n = planes.shape[axis]
        before = np.take(planes, np.maximum(np.arange(n) - 1, 0), axis)
        before += np.take(planes, np.minimum(np.arange(n) + 1, n - 1), axis)
        planes = 0.5 * planes + 0.25 * before
    return planes


def _label(video: np.ndarray) -> np.ndarray:
    """Hue index of every pixel that is colourful enough to belong to an object, else -1; int8 [T, H, W]."""
    red, green, blue = _smooth(np.ascontiguousarray(np.moveaxis(video, -1, 0)))  # planes: reducing over 3 is slow
    brightest = np.maximum(np.maximum(red, green), blue)
    gray = (red + green + blue) / 3
    squared = (red - gray) ** 2 + (green - gray) ** 2 + (blue - gray) ** 2
    colorful = squared > np.maximum(_MIN_CHROMA, _MIN_SATURATION * brightest) ** 2
    labels = np.full(video.shape[:3], -1, np.int8)
    # the hues sum to 0, so that gray falls out of the product
    labels[colorful] = (np.stack([red[colorful], green[colorful], blue[colorful]], -1) @ _HUES.T).argmax(-1)
    return labels


def _components(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """8-connected patches of equal label within each frame: int32 [T, H, W] ids from 0 (-1: ground), and how many.

    Works on horizontal runs of equal labels: runs that touch in neighbouring rows share the least of their numbers,
    again and again until nothing changes.
    """
    _, height, width = labels.shape
    rows = labels.reshape(-1, width)
    edge = np.ones((len(rows), width + 1), bool)
    edge[:, 1:-1] = rows[:, 1:] != rows[:, :-1]
    run_row, start = np.nonzero(edge[:, :-1])
    end = np.nonzero(edge[:, 1:])[1] + 1
    value = rows[run_row, start]
    keep = value >= 0
    run_row, start, end, value = run_row[keep], start[keep], end[keep], value[keep]
    if not len(run_row):
        return np.full(labels.shape, -1, np.int32), 0
    # pairs of runs in neighbouring rows: for each run, those of the next row that begin before it ends and end after
    order = run_row * (width + 2)
    low = np.searchsorted(order + end, order + (width + 2) + start, side="left")
    high = np.searchsorted(order + start, order + (width + 2) + end, side="right")
    counts = np.maximum(high - low, 0)
    first = np.repeat(np.arange(len(run_row)), counts)
    second = np.repeat(low - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    joined = (value[first] == value[second]) & (run_row[second] % height != 0)
    first, second = first[joined], second[joined]
    parent = np.arange(len(run_row))
    while True:
        least = np.minimum(parent[first], parent[second])
        after = parent.copy()
        np.minimum.at(after, first, least)
        np.minimum.at(after, second, least)
        after = after[after]
        if (after == parent).all():
            break
        parent = after
    _, number = np.unique(parent, return_inverse=True)
    ids = np.full(rows.shape, -1, np.int32)
    lengths = end - start
    columns = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(start, lengths)
    ids[np.repeat(run_row, lengths), columns] = np.repeat(number, lengths)
    return ids.reshape(labels.shape), int(number.max()) + 1


def _core(labels: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours have their label: edges between colours, one pixel wide, have none. [T, H, W]"""
    core = labels >= 0
    core[:, 1:] &= labels[:, 1:] == labels[:, :-1]
    core[:, :-1] &= labels[:, :-1] == labels[:, 1:]
    core[:, :, 1:] &= labels[:, :, 1:] == labels[:, :, :-1]
    core[:, :, :-1] &= labels[:, :, :-1] == labels[:, :, 1:]
    return core


def find_blobs(video: np.ndarray, unit: float) -> tuple[Blobs, np.ndarray]:
    """Every patch of an object's colour in a uint8 video [T, H, W, 3], and the labels [T, H, W]."""
    _, height, width = video.shape[:3]
    video = video.astype(np.float32)
    labels = _label(video)
    ids, count = _components(labels)
    flat = ids.ravel()
    inside = np.flatnonzero(flat >= 0)
    owner = flat[inside]
    area = np.bincount(owner, minlength=count)
    core = _core(labels).ravel()[inside]
    cores = np.bincount(owner, weights=core, minlength=count)
    keep = np.flatnonzero((area >= _MIN_AREA * unit**2) & (cores >= 6 * unit**2))
    empty = np.zeros(0)
    if not len(keep):
        nothing = Blobs(
            empty.astype(int),
            empty.astype(int),
            np.zeros((0, 2)),
            empty,
            empty.astype(bool),
            np.zeros((0, len(SHAPES))),
        )
        return nothing, labels

    y, x = inside // width % height, inside % width
    position = np.full(count, -1)
    position[keep] = np.arange(len(keep))
    chosen = position[owner] >= 0
    owner, x, y, where, core = position[owner][chosen], x[chosen], y[chosen], inside[chosen], core[chosen]
    m = len(keep)
    left, top, right, bottom = np.full(m, width), np.full(m, height), np.full(m, -1), np.full(m, -1)
    np.minimum.at(left, owner, x)
    np.minimum.at(top, owner, y)
    np.maximum.at(right, owner, x)
    np.maximum.at(bottom, owner, y)
    frame, color = np.zeros(m, int), np.zeros(m, int)
    frame[owner] = where // (width * height)
    color[owner] = labels.ravel()[where]
    clipped = (left == 0) | (top == 0) | (right == width - 1) | (bottom == height - 1)

    # Windows of one size round the patches, moved to lie inside the frame; what other patches own does not count
    size_x = min(int((right - left).max()) + 5, width)
    size_y = min(int((bottom - top).max()) + 5, height)
    x0 = np.clip((left + right + 1 - size_x) // 2, 0, width - size_x)
    y0 = np.clip((top + bottom + 1 - size_y) // 2, 0, height - size_y)
    xs, ys = x0[:, None, None] + np.arange(size_x), y0[:, None, None] + np.arange(size_y)[:, None]
    index = (frame[:, None, None], ys, xs)
    near = (
        (xs >= left[:, None, None] - 2)
        & (xs <= right[:, None, None] + 2)
        & (ys >= top[:, None, None] - 2)
        & (ys <= bottom[:, None, None] + 2)
    )
    owners = ids[index]
    owners = np.where(owners >= 0, position[owners], -1)
    mine = owners == np.arange(m)[:, None, None]
    near &= mine | (owners < 0)
    amount = np.einsum("myxc,mc->myx", video[index], _HUES[color])  # the hues sum to 0: gray falls out
    # walls, floors and gradients differ from row to row
    ground = _masked_median(amount, (owners < 0) & (labels[index] < 0))[..., None]
    solid = _masked_median(amount.reshape(m, -1), mine.reshape(m, -1))[:, None, None]
    share = (amount - ground) / np.maximum(solid - ground, 1.0)
    cover = np.clip((share - 0.5) * 1.5 + 0.5, 0, 1) * near
    mass = np.maximum(cover.sum((1, 2)), 1e-6)
    center_x = (cover * (xs + 0.5)).sum((1, 2)) / mass
    center_y = (cover * (ys + 0.5)).sum((1, 2)) / mass
    misfit = np.empty((m, len(SHAPES)))
    dx = (xs + 0.5 - center_x[:, None, None]).astype(np.float32)
    dy = (ys + 0.5 - center_y[:, None, None]).astype(np.float32)
    for number, shape in enumerate(SHAPES):
        r = np.sqrt(mass / _AREA[shape]).astype(np.float32)[:, None, None]
        drawn = np.clip(0.5 - shape_distance(shape, dx, dy, r), 0, 1)
        misfit[:, number] = np.abs(drawn - cover).sum((1, 2)) / mass
    blobs = Blobs(frame, color, np.stack([center_x, center_y], -1), mass, clipped, misfit)
    order = np.argsort(frame, kind="stable")
    return Blobs(*(field[order] for field in blobs)), labels


def _masked_median(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Median over the last axis of the values where mask holds; 0 where it holds nowhere."""
    counts = mask.sum(-1, keepdims=True)
    ranked = np.sort(np.where(mask, values, np.inf), axis=-1)
    middle = np.take_along_axis(ranked, np.maximum(counts - 1, 0) // 2, axis=-1)
    return np.where(counts > 0, middle, 0.0)[..., 0]


def _link(blobs: Blobs, frames: int, unit: float) -> list[list[int]]:
    """Chains of patches of one colour: each frame's patches go to the nearest chains, nearest pairs first."""
    chains: list[list[int]] = []
    for t in range(frames):
        here = [int(blob) for blob in np.flatnonzero(blobs.frame == t)]
        pairs = []
        for number, chain in enumerate(chains):
            last = chain[-1]
            gap = t - blobs.frame[last]
            places = [blobs.centers[last]]
            if len(chain) > 1:
                step = blobs.centers[last] - blobs.centers[chain[-2]]
                places.append(blobs.centers[last] + step * gap / max(blobs.frame[last] - blobs.frame[chain[-2]], 1))
            for blob in here:
                if blobs.color[blob] == blobs.color[last]:
                    distance = min(float(np.hypot(*(blobs.centers[blob] - place))) for place in places)
                    if distance < (_GATE + 2.5 * (gap - 1)) * unit:
                        pairs.append((distance, number, blob))
        used_chains: set[int] = set()
        used_blobs: set[int] = set()
        for _, number, blob in sorted(pairs):
            if number not in used_chains and blob not in used_blobs:
                chains[number].append(blob)
                used_chains.add(number)
                used_blobs.add(blob)
        chains.extend([blob] for blob in here if blob not in used_blobs)
    return chains


def track(frames: UInt8[np.ndarray, "T H W 3"]) -> Tracking:
    """Objects of the world in a uint8 video [T, H, W, 3]."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"a video is uint8 [T, H, W, 3], not {frames.dtype} {frames.shape}")
    length, height, width = frames.shape[:3]
    unit = min(height, width) / 64
    blobs, labels = find_blobs(frames, unit)
    names = list(COLORS)
    tracks = []
    for chain in _link(blobs, length, unit):
        members = np.array(chain)
        at = blobs.frame[members]
        centers, areas = np.full((length, 2), np.nan), np.full(length, np.nan)
        clipped, misfit = np.zeros(length, bool), np.full((length, len(SHAPES)), np.nan)
        centers[at], areas[at] = blobs.centers[members], blobs.areas[members]
        clipped[at], misfit[at] = blobs.clipped[members], blobs.misfit[members]
        tracks.append(Track(names[blobs.color[chain[0]]], centers, areas, clipped, misfit))
    tracks.sort(key=lambda one: -int(one.seen.sum()))
    counts = np.bincount(blobs.frame, minlength=length)
    return Tracking(tuple(tracks), counts, blobs, labels, unit)
