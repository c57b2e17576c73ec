"""Contact sheets: clips as rows of frames, each with its caption beneath."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

_PAPER, _INK, _FAINT = (250, 249, 246), (52, 54, 60), (140, 142, 148)
_MARGIN, _GAP, _CUT = 28, 4, 14  # pixels: round the sheet, between frames, between shots
_CELL = 120  # pixels a frame is enlarged towards
_TEXT, _LINE = 15, 20  # font and line height, pixels
COLUMNS = 9  # frames of a clip
_STILLS = 6  # clips of one frame that share a row, where nothing else is said


class Strip(NamedTuple):
    """A clip on the sheet: its shots, each with frames uint8 [T, H, W, 3] and a caption."""

    shots: Sequence[tuple[np.ndarray, str]]


def chosen(lengths: Sequence[int], columns: int) -> list[np.ndarray]:
    """Which frames of each shot are shown: evenly, the first and the last included, at least one a shot."""
    total = sum(lengths)
    counts = [max(1, min(length, round(columns * length / total))) for length in lengths]
    return [
        np.unique(np.linspace(0, length - 1, n).round().astype(int)) for length, n in zip(lengths, counts, strict=True)
    ]


def _wrapped(text: str, width: float, font: FreeTypeFont | ImageFont) -> list[str]:
    """The text in lines of at most `width` pixels, if its words allow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def contact_sheet(
    strips: Sequence[Strip], *, title: str = "", columns: int = COLUMNS, abreast: int | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws clips of one size: `columns` frames across, a caption beneath, `abreast` clips in a row (1; 6 of stills).

    Frames are enlarged by a whole number. Returns uint8 [H, W, 3].
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_TEXT)
    height, width = strips[0].shots[0][0].shape[1:3]
    scale = max(1, round(_CELL / min(height, width)))
    cell_y, cell_x = height * scale, width * scale
    stills = all(len(frames) == 1 for strip in strips for frames, _ in strip.shots)
    abreast = abreast or (_STILLS if stills else 1)

    placed: list[tuple[int, int, np.ndarray]] = []
    texts: list[tuple[int, int, str]] = []
    y = _MARGIN + (_LINE + 12 if title else 0)
    right = 0
    for start in range(0, len(strips), abreast):
        x, deepest = _MARGIN, 0
        for strip in strips[start : start + abreast]:
            picks = chosen([len(frames) for frames, _ in strip.shots], columns)
            for (frames, caption), pick in zip(strip.shots, picks, strict=True):
                left = x
                for t in pick:
                    placed.append((x, y, frames[t]))
                    x += cell_x + _GAP
                lines = _wrapped(caption, x - left - _GAP, font)
                texts += [(left, y + cell_y + 5 + _LINE * n, line) for n, line in enumerate(lines)]
                deepest = max(deepest, len(lines))
                right = max(right, x - _GAP)
                x += _CUT - _GAP
        y += cell_y + 5 + _LINE * deepest + 14
    right = max(right, _MARGIN + int(font.getlength(title)))

    sheet = np.empty((y + _MARGIN - 14, right + _MARGIN, 3), np.uint8)
    sheet[:] = _PAPER
    for left, top, frame in placed:
        sheet[top : top + cell_y, left : left + cell_x] = frame.repeat(scale, 0).repeat(scale, 1)
    picture = Image.fromarray(sheet)
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((_MARGIN, _MARGIN - 6), title, font=font, fill=_FAINT)
    for left, top, line in texts:
        draw.text((left, top), line, font=font, fill=_INK)
    return np.array(picture)
