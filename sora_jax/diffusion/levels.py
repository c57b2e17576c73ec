"""Which noise level each group of tokens has in training: one draw teaches one skill.

A group is one latent frame of one video of a packed row. Every video of a row draws a mode by the weights of
`LevelsConfig`:

    uniform   one level for the whole video                                      text to video
    per_frame an independent level per frame (Chen et al. 2024, arXiv:2407.01392)  rolling and extending
    first     the first frame is given, one level for the rest                    animating a still
    last      the last frame is given
    both      the first and the last frame are given                              connecting
    random    a random set of frames, never all, is given                         extending, filling in

A given frame has level 0, is marked `given`, and carries no loss. A video of one frame is always `uniform`.

Levels follow a logit-normal density, sigma = sigmoid(N(mean, std)) (Esser et al. 2024, arXiv:2403.03206, section
3.1), moved towards noise by the resolution shift: a video of n tokens has shift = `shift` * sqrt(n / `shift_tokens`)
(section 5.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sora_jax.diffusion.flow import shift_level, spread
from sora_jax.errors import UserError


@dataclass(frozen=True)
class ModeWeights:
    """How often each mode is drawn, in proportion; the order is that of the mode numbers."""

    uniform: float = 0.6
    per_frame: float = 0.1
    first: float = 0.15
    last: float = 0.05
    both: float = 0.05
    random: float = 0.05


MODES = tuple(field.name for field in fields(ModeWeights))


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


class Levels(NamedTuple):
    """One draw for packed rows."""

    sigma: Float[Array, "B G"]  # in [0, 1]; 0 where given and where no video has the group
    given: Bool[Array, "B G"]
    mode: Int[Array, "B G"]  # the number of the mode of the group's video, an index into MODES


def draw_levels(
    key: Key[Array, ""],
    config: LevelsConfig,
    *,
    group_segment: Int[Array, "B G"],
    group_frame: Int[Array, "B G"],
    group_count: Int[Array, "B G"],
    segment_ids: Int[Array, "B N"],
) -> Levels:
    """Draw levels for rows whose group g is frame `group_frame` of the `group_count` frames of video
    `group_segment`."""
    rows, groups = group_segment.shape
    mode_key, level_key, frame_key, share_key, open_key, subset_key = jax.random.split(key, 6)

    def per_video(values: Float[Array, "B V"]) -> Float[Array, "B G"]:
        """A value for each video of a row (a row has at most G videos), seen from its groups."""
        return spread(values, jnp.maximum(group_segment - 1, 0))

    weights = jnp.array([getattr(config.modes, name) for name in MODES])
    drawn = jax.random.categorical(mode_key, jnp.log(weights / weights.sum()), shape=(rows, groups))
    mode = per_video(drawn.astype(jnp.float32)).astype(jnp.int32)
    mode = jnp.where(group_count > 1, mode, MODES.index("uniform"))

    # which frames are given
    is_first, is_last = group_frame == 0, group_frame == group_count - 1
    always_open = jnp.floor(per_video(jax.random.uniform(open_key, (rows, groups))) * group_count)
    subset = jax.random.uniform(subset_key, (rows, groups)) < per_video(jax.random.uniform(share_key, (rows, groups)))
    given = jnp.select(
        [mode == MODES.index(name) for name in ("first", "last", "both", "random")],
        [is_first, is_last, is_first | is_last, subset & (group_frame != always_open)],
        False,
    )
    # two frames, both given, would leave nothing to learn
    given &= ~((mode == MODES.index("both")) & (group_count == 2) & is_last)

    # levels: one per video, or one per frame
    video_normal = per_video(jax.random.normal(level_key, (rows, groups)))
    frame_normal = jax.random.normal(frame_key, (rows, groups))
    chosen = jnp.where(mode == MODES.index("per_frame"), frame_normal, video_normal)
    shift = jnp.full((rows, groups), config.shift)
    if config.shift_tokens:
        tokens = jnp.sum(segment_ids[:, None, :] == group_segment[:, :, None], axis=-1)
        shift = shift * jnp.sqrt(jnp.maximum(tokens, 1) / config.shift_tokens)
    if (config.low, config.high) != (0, 1):
        chosen = _between(chosen, *(_unshifted(level, shift, config) for level in (config.low, config.high)))
    sigma = shift_level(jax.nn.sigmoid(config.mean + config.std * chosen), shift)
    sigma = jnp.clip(sigma, config.low, config.high)  # of what rounding did

    used = group_segment > 0
    return Levels(jnp.where(used & ~given, sigma, 0.0), given & used, mode)


def _unshifted(level: float, shift: Float[Array, "B G"], config: LevelsConfig) -> Float[Array, "B G"]:
    """The standard normal number that becomes `level`."""
    unshifted = shift_level(jnp.full_like(shift, level), 1 / shift)
    return (jax.scipy.special.logit(unshifted) - config.mean) / config.std


def _between(normal: Float[Array, "B G"], low: Float[Array, "B G"], high: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Standard normal numbers as those of the normal density between `low` and `high`: the same quantiles of it."""
    ndtr, ndtri = jax.scipy.special.ndtr, jax.scipy.special.ndtri
    return ndtri(ndtr(low) + ndtr(normal) * (ndtr(high) - ndtr(low)))
