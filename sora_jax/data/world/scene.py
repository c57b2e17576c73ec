"""What a clip of the procedural world is: its vocabulary and the exact truth that travels with every clip.

Coordinates are pixels, x to the right and y down, with the centre of the top-left pixel at (0.5, 0.5). Times are
frames, and lengths named "units" are pixels of a 64-pixel-high world: `unit = min(height, width) / 64` pixels.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from sora_jax.errors import UserError

# Objects are saturated and at least 20 degrees of hue apart; grounds are muted. That is what makes tracking by
# colour exact, and it also looks better than saturated colour on saturated colour.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 45),
    "orange": (244, 132, 24),
    "yellow": (246, 208, 30),
    "green": (44, 160, 70),
    "cyan": (32, 188, 206),
    "blue": (42, 88, 222),
    "purple": (132, 62, 190),
    "pink": (242, 102, 172),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 236),
    "gray": (172, 176, 182),
    "black": (50, 52, 60),
    "blue": (150, 178, 212),
    "green": (164, 198, 166),
    "pink": (230, 192, 200),
    "yellow": (234, 222, 176),
    "purple": (188, 176, 212),
}
FLOORS = ("gray", "blue", "green", "pink", "yellow", "purple")
WALLS = ("white", "gray", "black", "blue", "green", "pink", "yellow", "purple")
FLOOR_COLORS: dict[str, tuple[int, int, int]] = {**GROUNDS, "wooden": (186, 168, 144)}  # wood has a colour of its own
TEXTURES = ("checkered", "dotted", "wooden")  # of floors
OCCLUDERS: dict[str, tuple[int, int, int]] = {"dark": (86, 88, 98), "pale": (212, 212, 208)}

SHAPES = ("ball", "square", "triangle", "star")
SIZES: dict[str, tuple[float, float]] = {"small": (5.8, 6.8), "medium": (8.6, 9.8), "large": (12.0, 13.4)}  # units
DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (1, 0),
    "down-right": (1, 1),
    "down": (0, 1),
    "down-left": (-1, 1),
    "left": (-1, 0),
    "up-left": (-1, -1),
    "up": (0, -1),
    "up-right": (1, -1),
}
MOTIONS = ("slide", "bounce", "fall", "orbit", "grow", "shrink", "rest", "enter", "exit")
KINDS = ("single", "pair", "collision", "occluder", "pan")
# The second world: three objects, how two or three stand, one before another, one that passes another, two that meet,
# one or two behind a wall, no gravity, a camera that moves any way
MORE_KINDS = ("trio", "relation", "depth", "passing", "meeting", "wall", "floating", "travel")
RELATIONS = ("left of", "right of", "above", "below", "between", "in front of", "behind")
LIGHTS = ("dim", "warm", "cool", "left", "right")  # the last two: from that side

GRAVITY = 2.4  # units / frame^2, one law for the whole world
FPS = 8


class Outline(NamedTuple):
    """How far a shape reaches from its centre, as multiples of its radius."""

    half_width: float
    top: float
    bottom: float
    reach: float  # circumscribed circle


SQUARE_HALF = float(np.sqrt(np.pi) / 2)  # a square of radius r has the area of the ball of radius r
TRIANGLE_REACH = 1.4
STAR_REACH = 1.35
OUTLINES: dict[str, Outline] = {
    "ball": Outline(1.0, 1.0, 1.0, 1.0),
    "square": Outline(SQUARE_HALF, SQUARE_HALF, SQUARE_HALF, SQUARE_HALF * float(np.sqrt(2))),
    "triangle": Outline(TRIANGLE_REACH * 0.8660254, TRIANGLE_REACH, TRIANGLE_REACH / 2, TRIANGLE_REACH),
    "star": Outline(STAR_REACH * 0.9510565, STAR_REACH, STAR_REACH * 0.809017, STAR_REACH),
}


class Event(NamedTuple):
    """Something that happens between the frames: `time` is in frames (not rounded), `objects` are indices."""

    kind: str  # "bounce" | "land" | "collision" | "wall" (without gravity, at an edge of the room)
    time: float
    objects: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class WorldObject:
    """One object and where it is in every frame of its shot."""

    shape: str  # of SHAPES
    color: str  # of COLORS
    size: str  # of SIZES
    motion: str  # of MOTIONS, or "float": what it does in the world, not what the camera does
    direction: (
        str  # of DIRECTIONS for slide, enter, exit, float (at first) and a drifting bounce; "clockwise" ... else ""
    )
    centers: Float32[np.ndarray, "T 2"]  # (x, y) in image pixels, the camera's pan included
    radii: Float32[np.ndarray, " T"]  # pixels
    # in [0, 1]: share of its bounding box in the frame and not behind an occluder, less what objects before it cover
    visibility: Float32[np.ndarray, " T"]

    @property
    def combination(self) -> tuple[str, str, str]:
        """(colour, shape, motion): what the held-out split is made of. Each direction of a slide is a motion."""
        motion = f"{self.motion} {self.direction}" if self.motion == "slide" else self.motion
        return self.color, self.shape, motion


class Background(NamedTuple):
    """What stands behind the objects."""

    kind: str  # "plain" | "gradient" (vertical, from wall to floor colour) | "floor"
    wall: str  # of GROUNDS: the plain colour, the top of the gradient, or the wall above the floor
    floor: str  # of GROUNDS: bottom of the gradient or the floor; "" if plain
    horizon: float  # y in pixels where the floor begins; height of the frame when there is no floor
    contact: float  # y in pixels of the line on the floor where objects stand; height when there is no floor
    striped: bool  # soft vertical stripes on the wall, fixed in the world
    phase: float  # of the stripes and of the texture, pixels
    texture: str = ""  # of TEXTURES; "" is an even floor, or none
    level: bool = False  # the stripes are horizontal


class Occluder(NamedTuple):
    """A bar in front of everything, of full height unless it stands on a floor."""

    left: float
    right: float
    color: str  # of OCCLUDERS
    top: float = -np.inf  # y in pixels
    bottom: float = np.inf


class Relation(NamedTuple):
    """How one object stands to others, in every frame of the shot."""

    name: str  # of RELATIONS
    subject: int  # index of the object that is left of, behind, ... the others
    others: tuple[int, ...]  # one, or two for "between"


@dataclass(frozen=True, eq=False)
class Shot:
    """An uncut piece of a clip, with its truth."""

    kind: str  # of KINDS
    objects: tuple[WorldObject, ...]
    background: Background
    pan: Float32[np.ndarray, " T"]  # how far the camera has moved to the right, in pixels
    occluder: Occluder | None = None
    pivot: tuple[float, float] | None = None  # the dot that a lone orbiting object circles
    events: tuple[Event, ...] = ()
    tilt: Float32[np.ndarray, " T"] | None = None  # how far the camera has moved down, in pixels; None: not at all
    relation: Relation | None = None
    order: tuple[int, ...] = ()  # the objects from back to front; () as they are listed
    gravity: bool = True  # without it objects float, and the edges of the room throw them back
    light: str = ""  # of LIGHTS; "" is plain daylight
    same: bool = False  # its first object is that of the shot before: the same shape, colour and size

    @property
    def frames(self) -> int:
        return len(self.pan)

    @property
    def painted(self) -> tuple[WorldObject, ...]:
        """The objects from back to front."""
        return tuple(self.objects[number] for number in self.order) if self.order else self.objects

    @property
    def plain(self) -> bool:
        """Whether it could be of the first world: nothing in it that came later."""
        later = self.background.texture or self.light or self.same
        return self.kind in KINDS and not later


@dataclass(frozen=True, eq=False)
class Scene:
    """A clip of the world: one shot, or several with hard cuts between them."""

    seed: int
    index: int
    height: int
    width: int
    shots: tuple[Shot, ...]

    @property
    def frames(self) -> int:
        return sum(shot.frames for shot in self.shots)

    @property
    def unit(self) -> float:
        """Pixels per unit of length."""
        return min(self.height, self.width) / 64

    @property
    def shot(self) -> Shot:
        """The only shot of an uncut clip."""
        if len(self.shots) != 1:
            raise ValueError(f"this scene is cut into {len(self.shots)} shots: read scene.shots")
        return self.shots[0]

    @property
    def objects(self) -> tuple[WorldObject, ...]:
        return self.shot.objects

    @property
    def background(self) -> Background:
        return self.shot.background

    @property
    def events(self) -> tuple[Event, ...]:
        return self.shot.events


@dataclass(frozen=True)
class Mix:
    """How often each thing happens; every group of weights is normalised over what is possible."""

    # kinds of shot
    single: float = 0.60
    pair: float = 0.25
    collision: float = 0.05
    occluder: float = 0.05
    pan: float = 0.05
    # motions of single objects and of pairs
    slide: float = 0.34
    bounce: float = 0.18
    fall: float = 0.09
    orbit: float = 0.13
    grow: float = 0.07
    shrink: float = 0.06
    rest: float = 0.07
    enter: float = 0.03
    exit: float = 0.03
    # sizes
    small: float = 0.25
    medium: float = 0.50
    large: float = 0.25
    # settings: a floor where the motion leaves the choice, else a plain or a gradient background
    floor: float = 0.40
    gradient: float = 0.25
    striped: float = 0.06
    # pairs: two of the same kind, two kinds with the same motion, two kinds with a motion each
    twins: float = 0.45
    together: float = 0.25
    apart: float = 0.30
    # The second world, of which the first has nothing. Kinds of shot, weighed against those above
    trio: float = 0.0
    relation: float = 0.0
    depth: float = 0.0
    passing: float = 0.0
    meeting: float = 0.0
    wall: float = 0.0
    floating: float = 0.0
    travel: float = 0.0
    # and shares, in [0, 1]: of shots with a light, of floors with a texture, of cuts over which a character stays
    lit: float = 0.0
    textured: float = 0.0
    same: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"the world's mix has weights >= 0: {name} cannot be {weight}")
            if name in SHARES and weight > 1:
                raise UserError(f"the world's mix has {name} as a share in [0, 1]: it cannot be {weight}")

    @property
    def identity(self) -> dict[str, float]:
        """What names the mix in a cache: of the second world only what it has, so that older caches keep their name."""
        later = (*MORE_KINDS, *SHARES)
        return {name: weight for name, weight in vars(self).items() if weight or name not in later}

    @property
    def plain(self) -> bool:
        """Whether all of it is of the first world."""
        return not any(getattr(self, name) for name in (*MORE_KINDS, *SHARES))


SHARES = ("lit", "textured", "same")
HELDOUT_SHARE = 10  # one combination in ten
_SALT = "world-1"


@functools.cache
def is_heldout(combination: tuple[str, str, str]) -> bool:
    """Whether (colour, shape, motion) never occurs in training: a fixed hash, about one combination in ten.

    >>> is_heldout(("red", "ball", "bounce"))
    False
    """
    digest = hashlib.sha256(" ".join((_SALT, *combination)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_SHARE == 0
