"""Scenes to pixels: anti-aliased, and vectorised over clips and frames.

Every object of a batch is a stack of small boxes, one a frame, in which its signed distance is evaluated; coverage
is clip(1/2 - distance, 0, 1). Boxes are composited back to front on uint8 frames: background, shadows, objects, bar;
light comes last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from sora_jax.data.world import lighting
from sora_jax.data.world.outlines import shape_distance
from sora_jax.data.world.scene import (
    COLORS,
    FLOOR_COLORS,
    GROUNDS,
    OCCLUDERS,
    OUTLINES,
    SHAPES,
    Background,
    Occluder,
    Scene,
    Shot,
)
from sora_jax.data.world.textures import texture

_CHUNK = 16  # clips at a time: keeps the boxes of a layer in the cache
_STRIPE_PERIOD = 20.0  # units
_STRIPE_DEPTH = 20.0  # levels darker than the wall, on a black wall lighter


def _boxes(
    canvas: np.ndarray, rows: np.ndarray, x: np.ndarray, y: np.ndarray, half_x: float, half_y: float
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
    """Boxes of one size round (x, y) [M] in frames `rows` [M] of canvas [M', H, W, 3], moved to lie inside.

    Returns the index that reads and writes them, and the distances dx [M, 1, kx], dy [M, ky, 1] to (x, y).
    """
    height, width = canvas.shape[1:3]
    size_x, size_y = min(int(np.ceil(2 * half_x)) + 2, width), min(int(np.ceil(2 * half_y)) + 2, height)
    left = np.clip(np.floor(x - size_x / 2 + 0.5).astype(np.int64), 0, width - size_x)
    top = np.clip(np.floor(y - size_y / 2 + 0.5).astype(np.int64), 0, height - size_y)
    columns = left[:, None, None] + np.arange(size_x)
    lines = top[:, None, None] + np.arange(size_y)[:, None]
    dx = (columns + 0.5 - x[:, None, None]).astype(np.float32)
    dy = (lines + 0.5 - y[:, None, None]).astype(np.float32)
    return (rows[:, None, None], lines, columns), dx, dy


def _blend(canvas: np.ndarray, index: tuple[np.ndarray, ...], cover: np.ndarray, color: np.ndarray) -> None:
    """canvas <- canvas + cover (color - canvas) in the boxes, rounded to nearest."""
    below = canvas[index].astype(np.float32)
    color = color - below
    color *= cover[..., None]
    below += color
    below += 0.5
    canvas[index] = below.astype(np.uint8)


def _darken(canvas: np.ndarray, index: tuple[np.ndarray, ...], factor: np.ndarray) -> None:
    below = canvas[index].astype(np.float32)
    below *= factor[..., None]
    below += 0.5
    canvas[index] = below.astype(np.uint8)


def _stripes(at: np.ndarray, moved: np.ndarray, ground: Background, unit: float) -> np.ndarray:
    """What stripes add to the wall [T, n] at the places [n], for a camera that has moved by [T]; pixels."""
    way = at[None] + moved[:, None] + np.float32(ground.phase)
    wave = np.cos(way * np.float32(2 * np.pi / (_STRIPE_PERIOD * unit)))
    # a softened square wave: reads as stripes, yet shifts by fractions of a pixel without flicker
    return np.clip(0.5 + 1.2 * wave, 0, 1) * np.float32(_STRIPE_DEPTH if ground.wall == "black" else -_STRIPE_DEPTH)


def _ground(shots: Sequence[Shot], height: int, width: int) -> np.ndarray:
    """Backgrounds [n, T, H, W, 3] uint8 of shots of one length."""
    frames = shots[0].frames
    unit = min(height, width) / 64
    canvas = np.empty((len(shots), frames, height, width, 3), np.uint8)
    y = (np.arange(height, dtype=np.float32) + 0.5)[:, None]
    x = np.arange(width, dtype=np.float32) + 0.5
    for out, shot in zip(canvas, shots, strict=True):
        ground = shot.background
        wall = np.array(GROUNDS[ground.wall], np.float32)
        if ground.kind == "gradient":
            column = wall + (np.array(GROUNDS[ground.floor], np.float32) - wall) * (y / height)
        else:
            column = wall * (1.03 - 0.06 * y / max(ground.horizon, 1.0))  # a little light from above
        if ground.striped and ground.level:
            tilt = np.zeros(frames, np.float32) if shot.tilt is None else shot.tilt
            picture = (column + _stripes(y[:, 0], tilt, ground, unit)[..., None])[:, :, None]
        elif ground.striped:
            picture = column[None, :, None] + _stripes(x, shot.pan, ground, unit)[:, None, :, None]
        else:
            picture = column[None, :, None]
        if ground.kind == "floor":
            floor = np.array(FLOOR_COLORS[ground.floor], np.float32)
            depth = (y - ground.horizon) / (height - ground.horizon)
            cover = np.clip(y - ground.horizon + 0.5, 0, 1)
            below = floor * (0.93 + 0.07 * np.clip(depth, 0, 1))
            over = below[:, None]
            if ground.texture:
                moved = shot.pan if shot.pan.any() else shot.pan[:1]
                over = over * texture(ground.texture, height, width, ground.contact, moved, ground.phase)[..., None]
            picture = picture + cover[:, None] * (over - picture)
        out[:] = np.clip(picture + 0.5, 0, 255.5).astype(np.uint8)
    return canvas


def _shadows(canvas: np.ndarray, shots: Sequence[Shot], numbers: list[int], layer: int, unit: float) -> None:
    """A soft ellipse on the floor under each object, fainter and wider with height; none without a floor."""
    chosen = [n for n in numbers if shots[n].background.kind == "floor"]
    if not chosen:
        return
    frames = shots[0].frames
    objects = [shots[n].painted[layer] for n in chosen]
    x = np.concatenate([o.centers[:, 0] for o in objects])
    bottom = np.concatenate([o.centers[:, 1] + OUTLINES[o.shape].bottom * o.radii for o in objects])
    contact = np.repeat([shots[n].background.contact for n in chosen], frames)
    wide = np.concatenate([OUTLINES[o.shape].half_width * o.radii for o in objects])
    lift = np.clip((contact - bottom) / (40 * unit), 0, 1)
    half_x, half_y = wide * (1.15 + 0.35 * lift) + unit, wide * 0.24 + 1.5 * unit
    rows = (np.array(chosen)[:, None] * frames + np.arange(frames)).reshape(-1)
    index, dx, dy = _boxes(canvas, rows, x, contact, float(half_x.max()), float(half_y.max()))
    r = np.sqrt(
        (dx / half_x[:, None, None].astype(np.float32)) ** 2 + (dy / half_y[:, None, None].astype(np.float32)) ** 2
    )
    strength = (0.34 * (1 - 0.75 * lift))[:, None, None].astype(np.float32)
    _darken(canvas, index, 1 - strength * np.clip((1 - r) * 1.8, 0, 1))


def _objects(
    canvas: np.ndarray, shots: Sequence[Shot], shape: str, numbers: list[int], layer: int, unit: float
) -> None:
    """Draws object `layer` of the numbered shots, all of one shape."""
    frames = shots[0].frames
    objects = [shots[n].painted[layer] for n in numbers]
    x = np.concatenate([o.centers[:, 0] for o in objects])
    y = np.concatenate([o.centers[:, 1] for o in objects])
    radius = np.concatenate([o.radii for o in objects])
    rows = (np.array(numbers)[:, None] * frames + np.arange(frames)).reshape(-1)
    base = np.repeat(np.array([COLORS[o.color] for o in objects], np.float32), frames, axis=0)
    reach = OUTLINES[shape].reach * radius + 1
    height, width = canvas.shape[1:3]
    inside = (x > -reach) & (x < width + reach) & (y > -reach) & (y < height + reach)
    if not inside.any():
        return
    x, y, radius, rows, base, reach = (a[inside] for a in (x, y, radius, rows, base, reach))
    index, dx, dy = _boxes(canvas, rows, x, y, float(reach.max()), float(reach.max()))
    r = radius[:, None, None]
    distance = shape_distance(shape, dx, dy, r)
    # Light from above, a darker rim, and on a ball a soft highlight: brightness changes, hue does not
    above = 1.04 - 0.12 * dy / r
    sides = np.repeat([lighting.side(shots[n].light) for n in numbers], frames)[inside]
    if sides.any():
        above = above + (sides.astype(np.float32)[:, None, None] * np.float32(lighting.SHADING)) * dx / r
    light = above * (1 - 0.2 * np.clip(distance / np.float32(1.4 * unit) + 1, 0, 1))
    color = light[..., None] * base[:, None, None, :]
    if shape == "ball":
        shift = np.where(sides > 0, -0.35, 0.35).astype(np.float32)[:, None, None]  # to where the light comes from
        spot = ((dx + shift * r) ** 2 + (dy + 0.4 * r) ** 2) / (0.3 * r) ** 2
        gloss = np.maximum(1 - spot * 0.35, 0)[..., None] * np.float32(0.42)
        color += gloss * (255 - color)
    np.clip(color, 0, 255, out=color)
    _blend(canvas, index, np.clip(0.5 - distance, 0, 1), color)


def _pivots(canvas: np.ndarray, shots: Sequence[Shot], unit: float) -> None:
    """The small neutral dot that a lone orbiting object circles."""
    for number, shot in enumerate(shots):
        if shot.pivot is None:
            continue
        rows = number * shot.frames + np.arange(shot.frames)
        x, y = (np.full(shot.frames, value) for value in shot.pivot)
        index, dx, dy = _boxes(canvas, rows, x, y, 2.5 * unit + 1, 2.5 * unit + 1)
        cover = np.clip(0.5 + 1.8 * unit - np.sqrt(dx * dx + dy * dy), 0, 1)
        tone = 205.0 if shot.background.wall == "black" else 105.0
        _blend(canvas, index, cover, np.full(3, tone, np.float32))


def _bar(frames: np.ndarray, shot: Shot, unit: float) -> None:
    """The occluder over frames [T, H, W, 3] of its clip, with a darker rim."""
    if shot.occluder is None:
        return
    width = frames.shape[2]
    x = np.arange(width, dtype=np.float32) + 0.5
    distance = np.maximum(shot.occluder.left - x, x - shot.occluder.right)
    if shot.occluder.top > -np.inf:
        _standing(frames, shot.occluder, distance, unit)
        return
    cover = np.clip(0.5 - distance, 0, 1)[:, None]
    color = np.array(OCCLUDERS[shot.occluder.color], np.float32) * (
        1 - 0.14 * np.clip(distance / np.float32(2 * unit) + 1, 0, 1)[:, None]
    )
    here = np.flatnonzero(cover[:, 0])
    part = slice(here[0], here[-1] + 1)
    below = frames[:, :, part].astype(np.float32)
    frames[:, :, part] = (below + cover[part] * (color[part] - below) + 0.5).astype(np.uint8)


def _standing(frames: np.ndarray, wall: Occluder, across: np.ndarray, unit: float) -> None:
    """A wall that stands on the floor; `across` [W] is how far a column is outside of it (inside < 0)."""
    y = np.arange(frames.shape[1], dtype=np.float32) + 0.5
    distance = np.maximum(across[None], np.maximum(np.float32(wall.top) - y, y - np.float32(wall.bottom))[:, None])
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    color = np.array(OCCLUDERS[wall.color], np.float32) * (
        1 - 0.14 * np.clip(distance / np.float32(2 * unit) + 1, 0, 1)[..., None]
    )
    rows, columns = (np.flatnonzero(cover[..., 0].any(axis)) for axis in (1, 0))
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    below = frames[:, *part].astype(np.float32)
    frames[:, *part] = (below + cover[part] * (color[part] - below) + 0.5).astype(np.uint8)


def render_shots(shots: Sequence[Shot], height: int, width: int) -> UInt8[np.ndarray, "n T {height} {width} 3"]:
    """Frames [n, T, H, W, 3] uint8 of shots that all have the same number of frames."""
    unit = min(height, width) / 64
    out = np.empty((len(shots), shots[0].frames, height, width, 3), np.uint8)
    for start in range(0, len(shots), _CHUNK):
        part = shots[start : start + _CHUNK]
        video = _ground(part, height, width)
        canvas = video.reshape(-1, height, width, 3)
        layers = max(len(shot.objects) for shot in part)
        members = [[n for n, shot in enumerate(part) if len(shot.objects) > layer] for layer in range(layers)]
        for layer in range(layers):
            _shadows(canvas, part, members[layer], layer, unit)
        _pivots(canvas, part, unit)
        for layer in range(layers):
            for shape in SHAPES:
                numbers = [n for n in members[layer] if part[n].painted[layer].shape == shape]
                if numbers:
                    _objects(canvas, part, shape, numbers, layer, unit)
        for frames, shot in zip(video, part, strict=True):
            _bar(frames, shot, unit)
            lighting.shine(frames, shot.light)
        out[start : start + len(part)] = video
    return out


def render(scenes: Sequence[Scene]) -> UInt8[np.ndarray, "n T H W 3"]:
    """Frames of scenes of one size: uint8 [n, T, H, W, 3], T the sum over the shots.

    A scene's pixels do not depend on what it is rendered with.
    """
    if not scenes:
        raise ValueError("render needs at least one scene")
    height, width = scenes[0].height, scenes[0].width
    lengths = [shot.frames for shot in scenes[0].shots]
    for scene in scenes:
        if (scene.height, scene.width) != (height, width) or [shot.frames for shot in scene.shots] != lengths:
            raise ValueError("scenes rendered together have one size and one list of shot lengths")
    parts = [render_shots([scene.shots[k] for scene in scenes], height, width) for k in range(len(lengths))]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
