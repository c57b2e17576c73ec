"""Values of flags that several commands take."""

from __future__ import annotations

from sora_jax.errors import UserError


def parse_mesh(text: str) -> dict[str, int]:
    """The lengths of axes that "fsdp=4,sequence=2" names; which axes and devices there are is the mesh's to say."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, number = part.strip().partition("=")
        if not (axis and equals and number.lstrip("-").isdecimal()):
            raise UserError(f'--mesh takes AXIS=N,AXIS=N,..., say fsdp=4,sequence=2: "{part}" is no axis with a length')
        if axis in sizes:
            raise UserError(f'--mesh gives {axis} twice: "{text}"')
        sizes[axis] = int(number)
    return sizes


def parse_shots(text: str) -> tuple[int, ...]:
    """The frames of each shot that "9,9" names."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f'--shots takes numbers of frames, say 9,9: "{text}" is none')
    return tuple(int(part) for part in parts)
