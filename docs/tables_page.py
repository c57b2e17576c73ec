"""The tables that docs/tables.py makes, in docs/world.md and docs/open_models.md, from the results of its rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marked import between
from running import QUIET

from sora_jax.commands import bench

if TYPE_CHECKING:
    from tables import Row

DOCS = Path(__file__).parent
MISSING = "not run yet"
MARK = " †"  # of a figure that no row was run for

Result = dict[str, Any]
Results = Mapping[str, Result]
Show = Callable[[Result], str]  # a figure with its interval


def write(rows: Sequence[Row], results: Results) -> None:
    for path, text in pages(rows, results).items():
        path.write_text(text)


def pages(rows: Sequence[Row], results: Results) -> dict[Path, str]:
    """The pages as they should be: each table with what was run where, and its commands."""
    made: dict[Path, str] = {}
    for group, (name, table) in TABLES.items():
        path = DOCS / name
        own = [row for row in rows if row.group == group]
        commands = [f"    sora-jax {row.command}" for row in own]
        lines = [*table(results), "", *notes(own, results), "", *commands]
        made[path] = between(made.get(path) or path.read_text(), group, "\n".join(lines), by="docs/tables.py")
    return made


# -------------------------------------------------------------------------------------------------------------- tables


LAWS = ("color_constancy", "restitution", "gravity", "reflection", "continuity", "permanence", "crossing", "momentum")
PROMPTS = {  # metric: what it is called, and the least share that is wanted
    "color": ("colour", 0.9),
    "shape": ("shape", 0.8),
    "count": ("count", 0.9),
    "motion": ("motion", 0.8),
    "all": ("all of a prompt", 0.6),
    "background": ("background, where named", None),
    "size": ("size, where named", None),
    **{f"physics.{law}": (f"law: {law.replace('color', 'colour').replace('_', ' ')}", None) for law in LAWS},
}
SIZES = ("64x64", "64x96", "96x64")  # height x width
FIRST_VIDEO = {"first-video-cold": ("nothing compiled before", 60), "first-video-warm": ("compiled before", 15)}  # s
SPEED, MEAN_SPEED = 0.9, 1.0  # how long the reference takes over our time, at least: a row, and their geometric mean


def prompts_table(results: Results) -> list[str]:
    """Targets are those of the size that the model is used at."""
    found = [results.get(f"world-{size}") for size in SIZES]
    lines = _head("held-out prompts", SIZES[0], "target", *SIZES[1:])
    lines.append(_line("prompts", *_targeted([str(one["result"]["n"]) if one else MISSING for one in found], "")))
    for metric, (name, least) in PROMPTS.items():
        if not any(metric in one["result"]["metrics"] for one in found if one):
            continue
        cells = [
            cell(one, metric, share, least if size == SIZES[0] else None)
            for size, one in zip(SIZES, found, strict=True)
        ]
        lines.append(_line(name, *_targeted(cells, f"{100 * least:.0f} %" if least else "")))
    return lines


def autoencoder_table(results: Results) -> list[str]:
    found = results.get("reconstruction")
    return [
        *_head(f"{_asked(found)} held-out clips of the world", "PSNR", "target", "SSIM"),
        _line("autoencoder", cell(found, "psnr", decibels, 32), "32 dB", cell(found, "ssim", number(3))),
        _line(
            "a still of the first frame", cell(found, "copy_psnr", decibels), "", cell(found, "copy_ssim", number(3))
        ),
    ]


def ceiling_table(results: Results) -> list[str]:
    """What checkers find in true clips that went through the autoencoder."""
    names = {"ceiling": "the first world, 64x64", "ceiling-second": "the second, 96x96"}
    shown = {metric: name for metric, (name, least) in PROMPTS.items() if least}
    lines = _head("true clips after the autoencoder", "clips", *shown.values())
    for row, name in names.items():
        found = results.get(row)
        lines.append(_line(name, _asked(found), *(cell(found, metric, share) for metric in shown)))
    return lines


def first_video_table(results: Results) -> list[str]:
    lines = _head("the whole command `sora-jax sample`", "", "target")
    for name, (what, most) in FIRST_VIDEO.items():
        found, shown = results.get(name), MISSING
        if found:
            seconds = found["result"]["rows"][0]["seconds"]
            shown = _marked(found, f"{seconds:.3g} s", missed=seconds > most)
        lines.append(_line(what, shown, f"{most} s"))
    return lines


def distance_table(results: Results) -> list[str]:
    found = results.get("distance")
    names = {
        "distance": "`world-1`",
        "autoencoder": "true clips after its autoencoder",
        "still": "stills of true clips",
        "floor": "true clips among each other, and 95 of 100 draws: the noise floor",
    }
    head = f"{_asked(found)} clips"
    if found:
        size, encoder = found["result"]["size"], found["result"]["encoder"]
        head += f" of {size['frames']} frames of {size['height']}x{size['width']}"
        head += f", by `{encoder['name']} ({encoder['fingerprint']})`"
    return [*_head(head, "distance"), *(_line(name, cell(found, key, number(2))) for key, name in names.items())]


def continuation_table(results: Results) -> list[str]:
    found = results.get("continuation")
    who = {
        "model": "`world-1`",
        "copy": "a still of the first frame",
        "neighbour": "nearest neighbour",
        "autoencoder": "the truth after the autoencoder",
        "lead": "lead over the better baseline",
    }
    scores = {"spatial_iou": 2, "spatiotemporal_iou": 2, "weighted_spatial_iou": 2, "mse": 4}  # decimals
    lines = _head(f"{_asked(found)} clips", "where", "where and when", "where and how much", "mean squared error")
    for key, name in who.items():
        lines.append(_line(name, *(cell(found, f"{key}.{score}", number(n)) for score, n in scores.items())))
    return lines


def stories_table(results: Results) -> list[str]:
    names = {
        "cut": "cut where asked, and no other",
        "shot.color": "colour of a shot",
        "shot.shape": "shape",
        "shot.count": "count",
        "shot.motion": "motion",
        "shot.all": "all of a shot",
        "same": "the same character across",
        "all": "all of a clip",
    }
    return _shares(results.get("stories"), "clips", names)


def second_world_table(results: Results) -> list[str]:
    names = {
        "all": "all of a prompt",
        "relation": "relations",
        "physics.momentum": "momentum",
        "physics.permanence": "permanence",
        "physics.weightlessness": "flight without gravity",
    }
    return _shares(results.get("second-world"), "prompts", names)


def speed_table(results: Results) -> list[str]:
    """Ours beside the reference, and the geometric mean where every row was measured."""
    lines, ratios, marked = _head("", "ours", "the reference takes", "target"), [], False
    for name in bench.REFERENCED:
        found = results.get(name)
        if not found:
            lines.append(_line(f"`{name}`: {bench.ROWS[name]}", MISSING, "", f"{SPEED} x"))
            continue
        row = found["result"]["rows"][0]
        # a page that was typed by hand said the ratio alone
        ratio = row["times_as_long"] if "transcribed" in found else row["reference_seconds"] / row["seconds"]
        ratios.append(ratio)
        marked |= "transcribed" in found
        shown = _marked(found, f"{ratio:.3g} x as long", missed=ratio < SPEED)
        seconds = _marked(found, f"{row['seconds']:.3g} s")
        lines.append(_line(f"`{name}`: {bench.ROWS[name]}", seconds, shown, f"{SPEED} x"))
    if len(ratios) == len(bench.REFERENCED):
        mean = statistics.geometric_mean(ratios)
        shown = f"**{mean:.3g} x**" if mean < MEAN_SPEED else f"{mean:.3g} x"
        lines.append(_line("geometric mean", "", shown + MARK * marked, f"{MEAN_SPEED} x"))
    return lines


TABLES: dict[str, tuple[str, Callable[[Results], list[str]]]] = {  # group of rows: its page, and its table there
    "prompts": ("world.md", prompts_table),
    "autoencoder": ("world.md", autoencoder_table),
    "ceiling": ("world.md", ceiling_table),
    "first-video": ("world.md", first_video_table),
    "distance": ("world.md", distance_table),
    "continuation": ("world.md", continuation_table),
    "stories": ("world.md", stories_table),
    "second-world": ("world.md", second_world_table),
    "speed": ("open_models.md", speed_table),
}
TIMED = ("first-video", "speed")  # groups whose figures other work on the machine moves


# --------------------------------------------------------------------------------------------------- what was run where


def notes(rows: Iterable[Row], results: Results) -> list[str]:
    """Where and when the rows were run; and of those marked †, when and where their figures were stated."""
    said: dict[str, list[str]] = {}
    for row in rows:
        if row.name in results:
            found = results[row.name]
            said.setdefault(_where(found), []).append(f"`{row.name}`{_beside(row, found)}")
    lines = [f"{where}: {', '.join(names)}." for where, names in said.items()]
    return "\n\n".join(lines).split("\n") if lines else ["None of it was run yet."]


def _where(found: Result) -> str:
    on = [found["processor"]] if "processor" in found else []
    on += [f"{found['cores']} cores"] if "cores" in found else []
    on += [f"jax {found['jax']}"] if "jax" in found else []
    on += [reference] if (reference := _reference(found)) else []
    on += [found["note"]] if "note" in found else []
    if "transcribed" not in found:
        return f"Run on {', '.join(on)}; {found['date']}"
    said = f"† Stated by hand in {found['stated']} on {found['date']}, not run by `docs/tables.py` yet"
    return said + (f" ({', '.join(on)})" if on else "")


def _reference(found: Result) -> str | None:
    rows = found["result"].get("rows")
    return rows[0]["reference"] if rows else None


def _beside(row: Row, found: Result) -> str:
    """What else the machine did, where that moves the figure."""
    work = found.get("other_work") or 0.0
    return f" (beside other work, {work:.1f} cores)" if row.group in TIMED and work > QUIET else ""


# --------------------------------------------------------------------------------------------------------------- cells


def cell(found: Result | None, name: str, show: Show, least: float | None = None) -> str:
    """A figure; bold where it is below the `least` that is wanted, empty where the run says nothing of it."""
    if found is None:
        return MISSING
    result = found["result"]
    metric = result["metrics"].get(name)
    if metric is None or metric["value"] is None:
        return ""
    text = show(metric)
    if metric.get("n") not in (None, result["n"]):
        text += f", of {metric['n']}"
    return _marked(found, text, missed=least is not None and metric["value"] < least)


def share(metric: Result) -> str:
    return f"{100 * metric['value']:.0f} %" + _interval(metric, lambda x: f"{100 * x:.0f}")


def decibels(metric: Result) -> str:
    return f"{metric['value']:.1f} dB" + _interval(metric, lambda x: f"{x:.1f}")


def number(decimals: int) -> Show:
    """Of that many decimals, and without the zero before them."""

    def short(x: float) -> str:
        return f"{x:.{decimals}f}".replace("0.", ".", 1) if 0 < abs(x) < 1 else f"{x:.{decimals}f}" if x else "0"

    return lambda metric: short(metric["value"]) + _interval(metric, short)


def _interval(metric: Result, short: Callable[[float], str]) -> str:
    low, high = metric.get("low"), metric.get("high")
    return "" if low is None or high is None else f" ({short(low)} to {short(high)})"


def _marked(found: Result, text: str, missed: bool = False) -> str:
    return (f"**{text}**" if missed else text) + MARK * ("transcribed" in found)


def _shares(found: Result | None, of: str, names: Mapping[str, str]) -> list[str]:
    """A table of shares alone: a line for each metric, by what the page calls it."""
    lines = (_line(name, cell(found, key, share)) for key, name in names.items())
    return [*_head(f"{_asked(found)} {of}", ""), *lines]


def _asked(found: Result | None) -> str:
    return str(found["result"]["n"]) if found else "no"


def _targeted(cells: list[str], target: str) -> list[str]:
    return [cells[0], target, *cells[1:]]


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "| --- " * len(cells) + "|"]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
