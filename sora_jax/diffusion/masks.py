"""Which tokens of each frame are given where a part of its space is: rectangles, what is around them, and blocks.

    inside    what lies in a rectangle is made, and all around it is given
    outside   the rectangle is given, and all around it is made
    blocks    each frame is cut into 1 to 8 blocks along each axis, of which a random set is given

A mask is drawn per video and is the same in all of its frames. Sides of rectangles and numbers of blocks are uniform
over what the frame has room for, in tokens; the place of a rectangle is uniform, and so is the share of blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sora_jax.diffusion.flow import spread

MASKS = ("inside", "outside", "blocks")
BLOCKS = 8  # at most, along each axis


def masked_tokens(
    key: Key[Array, ""],
    mask: Int[Array, "B N"],
    positions: Int[Array, "B N 3"],
    segment_ids: Int[Array, "B N"],
    videos: int,
) -> Bool[Array, "B N"]:
    """The tokens that the masks give: `mask` is an index into `MASKS` of each token's video, or -1 for none. A row has
    at most `videos` of them. A mask that would give all of a video gives nothing of it."""
    rows = segment_ids.shape[0]
    rectangle_key, block_key, share_key, field_key = jax.random.split(key, 4)
    video = jnp.maximum(segment_ids - 1, 0)
    place = positions[..., 1:]  # (height, width)

    is_of = (segment_ids[..., None] == 1 + jnp.arange(videos))[..., None]  # [B, N, V, 1]
    room = 1 + jnp.max(jnp.where(is_of, place[:, :, None], 0), axis=1)  # [B, V, 2]

    # a rectangle: its sides, then its place
    sides, corner = jnp.moveaxis(jax.random.uniform(rectangle_key, (rows, videos, 2, 2)), 2, 0)
    size = 1 + _whole(sides, room)
    start = _whole(corner, room - size + 1)
    of_token = spread(jnp.stack([start, start + size, room], axis=2).astype(jnp.float32), video)
    start_N, end_N, room_N = (of_token[:, :, i].astype(jnp.int32) for i in range(3))
    in_rectangle = jnp.all((place >= start_N) & (place < end_N), axis=-1)

    # blocks: which of them a token lies in, and whether that one is given
    counts = 1 + _whole(jax.random.uniform(block_key, (rows, videos, 2)), jnp.minimum(room, BLOCKS))
    counts_N = spread(counts.astype(jnp.float32), video).astype(jnp.int32)
    block = place * counts_N // room_N  # [B, N, 2], each in [0, BLOCKS)
    share = jax.random.uniform(share_key, (rows, videos, 1))
    field = (jax.random.uniform(field_key, (rows, videos, BLOCKS**2)) < share).reshape(rows, -1)
    number = (video * BLOCKS + block[..., 0]) * BLOCKS + block[..., 1]
    in_block = jnp.take_along_axis(field, number, axis=1)

    given = jnp.select([mask == i for i in range(len(MASKS))], [~in_rectangle, in_rectangle, in_block], False)
    given &= segment_ids > 0
    something_left = jnp.any(is_of[..., 0] & ~given[..., None], axis=1)  # [B, V]
    return given & (spread(something_left.astype(jnp.float32), video) > 0.5)


def _whole(uniform: Float[Array, "*any"], count: Int[Array, "*any"]) -> Int[Array, "*any"]:
    """A whole number in [0, count), of a number in [0, 1)."""
    return jnp.minimum(jnp.floor(uniform * count).astype(jnp.int32), count - 1)
