"""Makes the tables of docs/world.md, and of speed in docs/open_models.md: a row is one `sora-jax eval` or `bench`.

    python docs/tables.py                         # all that has not been run; goes on where it was stopped
    python docs/tables.py reconstruction speed    # these rows, and these groups of rows
    python docs/tables.py --since 2026-12-01      # also what was run before that day
    python docs/tables.py --list                  # the rows, and which of them are done
    python docs/tables.py --tables                # the pages alone, from the results that there are

A result is a file docs/runs/tables/NAME.json: what `sora-jax COMMAND --json` said, on which machine and when. One that
says "transcribed" was not run by this script: it holds what the page stated by hand when the script came, is marked †
there, and counts as not run. Nobody edits figures by hand: change a row here, and run it. The rows of speed want the
reference beside ours (extra `parity`), and stay as they are without it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tables_page
from running import OtherWork, machine, named, rounded, sora_jax

from sora_jax.commands import bench

RESULTS = Path(__file__).parent / "runs" / "tables"
MODEL = "--model world-1"


@dataclass(frozen=True)
class Row:
    """One command, and a line of a table or several."""

    name: str
    group: str  # the table
    command: str  # of sora-jax, without --json


ROWS = (
    Row("world-64x64", "prompts", f"eval {MODEL} --n 200"),
    Row("world-64x96", "prompts", f"eval {MODEL} --n 200 --height 64 --width 96"),
    Row("world-96x64", "prompts", f"eval {MODEL} --n 200 --height 96 --width 64"),
    Row("reconstruction", "autoencoder", f"eval {MODEL} --suite reconstruction --n 100"),
    Row("ceiling", "ceiling", f"eval {MODEL} --suite ceiling --n 200"),
    Row("ceiling-second", "ceiling", f"eval {MODEL} --suite ceiling --config world_2 --n 100 --height 96 --width 96"),
    Row("first-video-cold", "first-video", f"bench first-video-cold {MODEL}"),
    Row("first-video-warm", "first-video", f"bench first-video-warm {MODEL}"),
    Row("distance", "distance", f"eval {MODEL} --suite distance --n 50"),
    Row("continuation", "continuation", f"eval {MODEL} --suite continuation --n 40"),
    Row("stories", "stories", f"eval {MODEL} --suite stories --n 30"),
    Row("second-world", "second-world", f"eval {MODEL} --config world_2 --n 40"),
    *(Row(name, "speed", f"bench {name}") for name in bench.REFERENCED),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", help="names and groups of rows (all)")
    parser.add_argument("--since", type=day, default=dt.date.min, metavar="YYYY-MM-DD", help="run again what is older")
    parser.add_argument("--list", action="store_true", help="name the rows, run nothing")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    args = parser.parse_args(arguments)
    rows = named(ROWS, args.which)
    if args.list:
        for row in rows:
            sys.stdout.write(f"{_state(row):11}  {row.name:24} {row.group:13} sora-jax {row.command}\n")
        return
    if not args.tables:
        for row in rows:
            if done(row, args.since):
                continue
            if row.group == "speed" and bench.reference_name() is None:
                sys.stderr.write(
                    f"{row.name}: skipped, the reference is not installed (torch, then the extra parity)\n"
                )
                continue
            make(row)
            tables_page.write(ROWS, results())
    tables_page.write(ROWS, results())


def done(row: Row, since: dt.date = dt.date.min) -> bool:
    """Whether it was run, as it is now, and on that day or later."""
    found = result_of(row.name)
    if found is None or "transcribed" in found or found["command"] != row.command:
        return False
    return day(found["date"]) >= since


def make(row: Row) -> None:
    """Runs it, and keeps what came of it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    other, began = OtherWork(), time.monotonic()
    said = parsed(sora_jax(*shlex.split(row.command), "--json"))
    spent = {"seconds": round(time.monotonic() - began, 1), "other_work": other.share()}
    made = {"name": row.name, "command": row.command, "result": said, **spent, **machine()}
    (RESULTS / f"{row.name}.json").write_text(json.dumps(made, indent=1) + "\n")


def parsed(said: str) -> dict[str, Any]:
    """The document that a command printed, its figures to five digits."""
    document = json.loads(said)
    if "metrics" in document:
        return document | {"metrics": {name: rounded(metric) for name, metric in document["metrics"].items()}}
    return document | {"rows": [rounded(row) for row in document["rows"]]}


def result_of(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def results() -> dict[str, dict[str, Any]]:
    return {row.name: found for row in ROWS if (found := result_of(row.name))}


def _state(row: Row) -> str:
    found = result_of(row.name)
    return "done" if done(row) else "" if found is None else "transcribed" if "transcribed" in found else "changed"


def day(text: str) -> dt.date:
    return dt.date.fromisoformat(text)


if __name__ == "__main__":
    main()
