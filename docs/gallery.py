"""Makes docs/gallery.md and its pictures, each section by the command that is printed in it.

    python docs/gallery.py            # all sections, some minutes on two cores
    python docs/gallery.py wrong      # one of them
    python docs/gallery.py --page     # the page alone, from the pictures that there are

The prompts of a section lie in docs/gallery/NAME.jsonl. They were written down before anything was made of them, and
the seed is 0: nothing here was chosen by its result.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gallery.md"
ACROSS = 4  # moving pictures in a row of the page


class Section(NamedTuple):
    """The videos of one command, and its sheet."""

    name: str
    title: str
    text: str
    flags: str = ""


SECTIONS = (
    Section("plain", "What it was trained for", "One or two objects, 17 frames of 64x64."),
    Section("wide", "Other shapes, the same weights", "64x96 pixels.", "--height 64 --width 96 --out runs/gallery/"),
    Section(
        "seeds",
        "One prompt, five seeds",
        "What a prompt leaves open is drawn anew.",
        "--num-videos 5 --out runs/gallery/",
    ),
    Section(
        "wrong",
        "What goes wrong",
        "What it is bad at (orbits of two, collisions, walls), and what it never saw: three objects, and relations. "
        "How often each goes right is in [world.md](world.md).",
    ),
)
HEAD = """# Gallery

Videos of `world-1`, the model that ships with the package, on two CPU cores; `python docs/gallery.py` makes this page
and all that is on it. Prompts were written down before anything was made of them, and the seed is 0: nothing was chosen
by its result.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="?", choices=[section.name for section in SECTIONS], help="one section (all)")
    parser.add_argument("--page", action="store_true", help="make no videos")
    args = parser.parse_args()
    for section in SECTIONS:
        if not args.page and args.which in (None, section.name):
            subprocess.run([*shlex.split(command(section)), "--force"], check=True, cwd=ROOT)
    PAGE.write_text("\n".join([HEAD, *(part for section in SECTIONS for part in shown(section))]))


def command(section: Section) -> str:
    made = f"--prompts docs/gallery/{section.name}.jsonl --sheet docs/gallery/{section.name}.png"
    return f"sora-jax sample {made} {section.flags}".rstrip()


def shown(section: Section) -> list[str]:
    """A section of the page: its command, its moving pictures where it keeps any, and its sheet."""
    rows = [json.loads(line) for line in (PAGE.parent / "gallery" / f"{section.name}.jsonl").read_text().splitlines()]
    moving = [(row["prompt"], Path(row["out"])) for row in rows if "out" in row]
    parts = [f"## {section.title}", "", section.text, "", f"    {command(section)}", ""]
    for start in range(0, len(moving), ACROSS):
        some = moving[start : start + ACROSS]
        pictures = [f'<img src="gallery/{out.name}" width="160" alt="{prompt}">' for prompt, out in some]
        blank = [""] * (ACROSS - len(some))
        if not start:
            parts += ["| " * ACROSS + "|", "| --- " * ACROSS + "|"]
        parts += [f"| {' | '.join([*pictures, *blank])} |", f"| {' | '.join([*(p for p, _ in some), *blank])} |"]
    return [*parts, *([""] if moving else []), f"![{section.title}](gallery/{section.name}.png)", ""]


if __name__ == "__main__":
    main()
