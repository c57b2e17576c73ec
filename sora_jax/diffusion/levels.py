"""Which noise level each group of tokens has in training: one draw teaches one skill.

A group is one latent frame of one video of a packed row. Every video of a row draws a mode by the weights of
`LevelsConfig`:

    uniform   one level for the whole video                                      text to video
    per_frame an independent level per frame (Chen et al. 2024, arXiv:2407.01392)  extending, frame by frame
    first     the first frame is given, one level for the rest                    animating a still
    last      the last frame is given
    both      the first and the last frame are given                              connecting
    random    a random set of frames, never all, is given                         extending, filling in
    rolling   levels rise evenly from frame to frame (Ruhe et al. 2024, arXiv:2402.09470)  films of any length
    shots     a random set of whole shots, not none and not all, is given         storyboards, joining clips
    inside    the rest of each frame around a rectangle is given (`masks`)        inpainting
    outside   a rectangle of each frame is given                                  outpainting
    blocks    a random set of blocks of each frame is given

What is given has level 0, is marked `given`, and carries no loss. What a video cannot have becomes `uniform`: a video
of one frame all modes but the spatial ones, a video of one shot `shots`.

A window that begins inside a span, without the latent of the span's first frame, is always `rolling`. Nothing else
would say that its first latent stands for four frames: attention sees differences of positions alone. A rolling film
is one such window after another; its beginning is a video with its first latent, whose frames wait at the highest level
until the ramp has come down to them.

Levels follow a logit-normal density, sigma = sigmoid(N(mean, std)) (Esser et al. 2024, arXiv:2403.03206, section
3.1), moved towards noise by the resolution shift: a video of n tokens has shift = `shift` * sqrt(n / `shift_tokens`)
(section 5.3.2). Those of `rolling` are evenly spaced before the shift, as a sampler's are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sora_jax.diffusion.flow import shift_level, spread
from sora_jax.diffusion.masks import MASKS, masked_tokens
from sora_jax.errors import UserError


@dataclass(frozen=True)
class ModeWeights:
    """How often each mode is drawn, in proportion; the order is that of the mode numbers, and is kept."""

    uniform: float = 0.6
    per_frame: float = 0.1
    first: float = 0.15
    last: float = 0.05
    both: float = 0.05
    random: float = 0.05
    rolling: float = 0.0
    shots: float = 0.0
    # Those of `masks.MASKS`, in that order; none after them.
    inside: float = 0.0
    outside: float = 0.0
    blocks: float = 0.0


MODES = tuple(field.name for field in fields(ModeWeights))
# How many modes the draw is among at least. Later ones join it only where one has a weight: the number of modes is part
# of what a seed draws, and runs from before there were more shall go on as they began.
_ALWAYS_DRAWN = MODES.index("random") + 1


@dataclass(frozen=True)
class LevelsConfig:
    """The density of levels and the mix of modes."""

    mean: float = 0.0  # of the logit-normal density; > 0 trains more on noise
    std: float = 1.0
    shift: float = 1.0  # at `shift_tokens` tokens
    shift_tokens: int = 0  # 0: the same shift for every size
    low: float = 0.0  # of the density, the part between these levels is drawn from
    high: float = 1.0
    modes: ModeWeights = ModeWeights()

    def __post_init__(self) -> None:
        weights = [getattr(self.modes, mode) for mode in MODES]
        if min(weights) < 0 or sum(weights) <= 0:
            raise UserError(f"level mode weights must be >= 0 and not all 0, not {self.modes}")
        if self.shift <= 0 or self.std <= 0:
            raise UserError(f"level shift and std must be > 0, not {self.shift} and {self.std}")
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"levels.low and levels.high must be 0 <= low < high <= 1, not {self.low} and {self.high}")

    @property
    def trained_modes(self) -> tuple[str, ...]:
        """Those that are drawn at all."""
        return tuple(mode for mode in MODES if getattr(self.modes, mode) > 0)


class RowIndex(NamedTuple):
    """The index arrays of packed rows that levels depend on (`tokens.packing.PackedRows`)."""

    positions: Int[Array, "B N 3"]
    segment_ids: Int[Array, "B N"]
    prompt_ids: Int[Array, "B N"]  # the shots of a video have consecutive ones
    level_ids: Int[Array, "B N"]
    group_segment: Int[Array, "B G"]
    group_frame: Int[Array, "B G"]
    group_count: Int[Array, "B G"]


class Levels(NamedTuple):
    """The levels of packed rows. E is G, and G + 1 where a mode gives parts of frames: the tokens of these parts are of
    the last group, whose level is always 0."""

    sigma: Float[Array, "B E"]  # in [0, 1]; 0 where given and where no video has the group
    given: Bool[Array, "B E"]
    mode: Int[Array, "B G"]  # the number of the mode of the group's video, an index into MODES
    level_ids: Int[Array, "B N"]  # the group of each token: those of the rows but for tokens that a mask gives


def draw_levels(key: Key[Array, ""], config: LevelsConfig, rows: RowIndex) -> Levels:
    """Draw a mode and levels for each video of `rows`."""
    keys = _keys(key)
    mode = _draw_mode(keys.mode, config.modes, rows, windows=config.modes.rolling > 0)
    shift = _shift(config, rows)

    # one level per video, one per frame, or a ramp of them
    video_normal = _per_video(rows, jax.random.normal(keys.level, mode.shape))
    frame_normal = jax.random.normal(keys.frame, mode.shape)
    chosen = jnp.where(mode == MODES.index("per_frame"), frame_normal, video_normal)
    if (config.low, config.high) != (0, 1):
        chosen = _between(chosen, *(_unshifted(level, shift, config) for level in (config.low, config.high)))
    sigma = shift_level(jax.nn.sigmoid(config.mean + config.std * chosen), shift)
    if config.modes.rolling > 0:
        part = _per_video(rows, jax.random.uniform(keys.ramp, mode.shape))
        sigma = jnp.where(mode == MODES.index("rolling"), _ramp(config, rows, shift, part), sigma)
    sigma = jnp.clip(sigma, config.low, config.high)  # of what rounding did
    return _give(keys, config.modes, rows, mode, sigma)


def fixed_levels(
    key: Key[Array, ""], config: LevelsConfig, rows: RowIndex, mode: str, part: Float[Array, ""] | float
) -> Levels:
    """Levels to validate `mode` at: what is given is drawn by `key`, and levels follow from `part`, in [0, 1).

    What is made has the level that lies this part of the way from `levels.low` to `levels.high`. With `per_frame` each
    frame is ahead by a share of its own, and begins again at the end: parts that are spaced evenly take every frame
    through levels that are. With `rolling`, `part` is how far the ramp still is from where it comes down to. Videos
    that cannot have the mode have another (`Levels.mode`).
    """
    keys = _keys(key)
    alone = ModeWeights(**{name: float(name == mode) for name in MODES})
    of_video = _draw_mode(keys.mode, alone, rows, windows=config.modes.rolling > 0)
    parts = jnp.full(of_video.shape, part)
    if mode == "per_frame":
        parts = (parts + jax.random.uniform(keys.frame, parts.shape)) % 1.0
    sigma = config.low + (config.high - config.low) * parts
    if mode == "rolling":
        sigma = jnp.clip(_ramp(config, rows, _shift(config, rows), parts), config.low, config.high)
    return _give(keys, alone, rows, of_video, sigma)


# -------------------------------------------------------------------------------------------------------- of each video


class _Keys(NamedTuple):
    """One for each thing that is drawn."""

    mode: Key[Array, ""]
    level: Key[Array, ""]
    frame: Key[Array, ""]
    share: Key[Array, ""]
    open: Key[Array, ""]
    subset: Key[Array, ""]
    ramp: Key[Array, ""]
    shots: Key[Array, ""]
    mask: Key[Array, ""]


def _keys(key: Key[Array, ""]) -> _Keys:
    first = jax.random.split(key, 6)  # those that there were before there were more; a split depends on its number
    return _Keys(*first, *(jax.random.fold_in(key, number) for number in range(len(first), len(_Keys._fields))))


def _per_video(rows: RowIndex, values: Float[Array, "B V"]) -> Float[Array, "B G"]:
    """A value for each video of a row (a row has at most G videos), seen from its groups."""
    return spread(values, jnp.maximum(rows.group_segment - 1, 0))


def _most_of_video(rows: RowIndex, values: Int[Array, "B G"]) -> Int[Array, "B G"]:
    """The largest of the values of a video's groups, none of which is negative."""
    same = rows.group_segment[:, :, None] == rows.group_segment[:, None, :]
    return jnp.max(jnp.where(same, values[:, None, :], 0), axis=-1)


def _first_frame(rows: RowIndex) -> Int[Array, "B G"]:
    """0 for videos, and 1 for windows that begin after the first latent."""
    begins = (rows.group_frame == 0).astype(jnp.int32)
    return 1 - _most_of_video(rows, begins)


def _shots(rows: RowIndex) -> tuple[Int[Array, "B G"], Int[Array, "B G"], Int[Array, "B G"]]:
    """Which shot of its video a group is in, how many that one has, and the number of the shot in its row, all from 0
    but the count."""
    groups = rows.group_segment.shape[1]
    in_group = (rows.level_ids[..., None] == jnp.arange(groups)) & (rows.segment_ids[..., None] > 0)
    prompt = jnp.max(jnp.where(in_group, rows.prompt_ids[..., None], 0), axis=1)  # [B, G]
    last = _most_of_video(rows, prompt)
    most = rows.level_ids.shape[1]  # a row has fewer prompts than tokens
    first = most - _most_of_video(rows, most - prompt)
    return prompt - first, last - first + 1, jnp.maximum(prompt - 1, 0)


def _draw_mode(key: Key[Array, ""], weights: ModeWeights, rows: RowIndex, *, windows: bool) -> Int[Array, "B G"]:
    """The mode of each video, as it can have it; `windows` says that some may begin inside a span."""
    last = max(number for number, name in enumerate(MODES) if getattr(weights, name) > 0)
    among = jnp.array([getattr(weights, name) for name in MODES[: max(last + 1, _ALWAYS_DRAWN)]])
    drawn = jax.random.categorical(key, jnp.log(among / among.sum()), shape=rows.group_segment.shape)
    mode = _per_video(rows, drawn.astype(jnp.float32)).astype(jnp.int32)
    can = rows.group_count > 1
    if last >= MODES.index(MASKS[0]):
        can |= mode >= MODES.index(MASKS[0])
    if weights.shots > 0:
        can &= (mode != MODES.index("shots")) | (_shots(rows)[1] > 1)
    mode = jnp.where(can, mode, MODES.index("uniform"))
    return jnp.where(_first_frame(rows) > 0, MODES.index("rolling"), mode) if windows else mode


# ------------------------------------------------------------------------------------------------------- what is given


def _give(
    keys: _Keys, weights: ModeWeights, rows: RowIndex, mode: Int[Array, "B G"], sigma: Float[Array, "B G"]
) -> Levels:
    """The levels `sigma`, and what is given by modes of which those with a weight may be there."""
    shape, count = mode.shape, rows.group_count
    is_first, is_last = rows.group_frame == 0, rows.group_frame == count - 1
    always_open = jnp.floor(_per_video(rows, jax.random.uniform(keys.open, shape)) * count)
    share = _per_video(rows, jax.random.uniform(keys.share, shape))
    subset = jax.random.uniform(keys.subset, shape) < share
    given = jnp.select(
        [mode == MODES.index(name) for name in ("first", "last", "both", "random")],
        [is_first, is_last, is_first | is_last, subset & (rows.group_frame != always_open)],
        False,
    )
    # two frames, both given, would leave nothing to learn
    given &= ~((mode == MODES.index("both")) & (count == 2) & is_last)
    if weights.shots > 0:
        given |= (mode == MODES.index("shots")) & _given_shots(keys.shots, rows, share)
    used = rows.group_segment > 0
    given &= used
    sigma = jnp.where(used & ~given, sigma, 0.0)
    if not any(getattr(weights, name) > 0 for name in MASKS):
        return Levels(sigma, given, mode, rows.level_ids)

    of_token = spread((mode - MODES.index(MASKS[0])).astype(jnp.float32), rows.level_ids).astype(jnp.int32)
    masked = masked_tokens(keys.mask, of_token, rows.positions, rows.segment_ids, videos=shape[1])
    column = (shape[0], 1)
    return Levels(
        jnp.concatenate([sigma, jnp.zeros(column, sigma.dtype)], axis=1),
        jnp.concatenate([given, jnp.ones(column, bool)], axis=1),
        mode,
        jnp.where(masked, shape[1], rows.level_ids),
    )


def _given_shots(key: Key[Array, ""], rows: RowIndex, share: Float[Array, "B G"]) -> Bool[Array, "B G"]:
    """One shot that is given and one that is not, and of the others about `share`, of videos of several shots."""
    shot, count, number = _shots(rows)
    open_key, given_key, subset_key = jax.random.split(key, 3)
    place, other = (_per_video(rows, jax.random.uniform(k, shot.shape)) for k in (open_key, given_key))
    is_open = jnp.floor(place * count).astype(jnp.int32)
    is_given = (is_open + 1 + jnp.floor(other * (count - 1)).astype(jnp.int32)) % count  # one of the others
    of_shot = spread(jax.random.uniform(subset_key, shot.shape), number)
    return (shot == is_given) | ((of_shot < share) & (shot != is_open))


# -------------------------------------------------------------------------------------------------------------- levels


def _shift(config: LevelsConfig, rows: RowIndex) -> Float[Array, "B G"]:
    """The resolution shift of each group's video."""
    shift = jnp.full(rows.group_segment.shape, config.shift)
    if config.shift_tokens:
        tokens = jnp.sum(rows.segment_ids[:, None, :] == rows.group_segment[:, :, None], axis=-1)
        shift = shift * jnp.sqrt(jnp.maximum(tokens, 1) / config.shift_tokens)
    return shift


def _ramp(
    config: LevelsConfig, rows: RowIndex, shift: Float[Array, "B G"], part: Float[Array, "B G"]
) -> Float[Array, "B G"]:
    """Levels that rise by 1/n from each of the n frames of a video to the next, when the ramp has `part` of its way
    down to go.

    In a window that way is 1/n: when its first frame is at 0, the window moves on by a frame. In a video with its first
    latent it is the whole height: the film begins as noise, and the ramp comes in from its first frame.
    """
    first = _first_frame(rows)
    frames = jnp.maximum(rows.group_count - first, 1)
    offset = part * jnp.where(first > 0, 1, frames)
    along = jnp.clip((rows.group_frame - first + offset) / frames, 0.0, 1.0)
    low, high = (shift_level(jnp.full_like(shift, level), 1 / shift) for level in (config.low, config.high))
    return shift_level(low + (high - low) * along, shift)


def _unshifted(level: float, shift: Float[Array, "B G"], config: LevelsConfig) -> Float[Array, "B G"]:
    """The standard normal number that becomes `level`."""
    unshifted = shift_level(jnp.full_like(shift, level), 1 / shift)
    return (jax.scipy.special.logit(unshifted) - config.mean) / config.std


def _between(normal: Float[Array, "B G"], low: Float[Array, "B G"], high: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Standard normal numbers as those of the normal density between `low` and `high`: the same quantiles of it."""
    ndtr, ndtri = jax.scipy.special.ndtr, jax.scipy.special.ndtri
    return ndtri(ndtr(low) + ndtr(normal) * (ndtr(high) - ndtr(low)))
