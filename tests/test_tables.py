"""docs/tables.py: commands that parse, results that are kept, and pages that are made of them."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shlex

import pytest
import tables
import tables_page
from tables import ROWS, Row

from sora_jax.commands import bench
from sora_jax.commands import eval as eval_command

BY_NAME = {row.name: row for row in ROWS}
SHARE = {"value": 0.91, "low": 0.875, "high": 0.94, "n": 200}


# ------------------------------------------------------------------------------------------------------------ the rows


def test_every_row_is_a_command_that_parses_and_has_a_place():
    assert len(BY_NAME) == len(ROWS)
    assert {row.group for row in ROWS} == set(tables_page.TABLES)
    for row in ROWS:
        name, *words = shlex.split(row.command)
        parser = argparse.ArgumentParser()
        {"eval": eval_command, "bench": bench}[name].add_arguments(parser)
        args = parser.parse_args([*words, "--json"])
        assert args.json
        if name == "eval":
            assert args.suite in eval_command.SUITES
        else:
            assert args.row == [row.name]
            assert row.name in bench.ROWS


def test_an_unknown_row_is_refused_before_anything_is_run(kept):
    with pytest.raises(SystemExit, match=r"reconstructions; --list"):
        tables.main(["reconstruction", "reconstructions"])
    assert not list(kept.iterdir())


# ------------------------------------------------------------------------------------------------- running and keeping


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of results, empty; no process is started and no page written."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "sora_jax", lambda *command: pytest.fail(f"ran {command}"))
    monkeypatch.setattr(tables_page, "write", lambda rows, results: None)
    return tmp_path


@pytest.fixture
def said(kept, monkeypatch):
    """The commands that are run; each answers with a PSNR."""
    commands: list[tuple[str, ...]] = []

    def answer(*command: str) -> str:
        commands.append(command)
        metric = {"value": 31.2345678, "low": 31.0, "high": None, "n": 100}
        return json.dumps({"model": "world-1", "suite": "reconstruction", "n": 100, "metrics": {"psnr": metric}})

    monkeypatch.setattr(tables, "sora_jax", answer)
    return commands


def keep(folder, row: Row, **more: object) -> None:
    """A result as a run leaves it."""
    found = {"name": row.name, "command": row.command, "date": "2026-12-01", "result": {}}
    (folder / f"{row.name}.json").write_text(json.dumps(found | more))


def test_a_run_leaves_what_the_command_said_and_where(kept, said):
    began = dt.date.today()
    tables.main(["reconstruction"])
    assert said == [("eval", "--model", "world-1", "--suite", "reconstruction", "--n", "100", "--json")]
    found = json.loads((kept / "reconstruction.json").read_text())
    assert found["command"] == "eval --model world-1 --suite reconstruction --n 100"
    assert found["result"]["metrics"]["psnr"] == {"value": 31.235, "low": 31.0, "high": None, "n": 100}
    assert began <= dt.date.fromisoformat(found["date"]) <= dt.date.today()
    assert found["processor"]
    assert found["cores"] >= 1
    assert "transcribed" not in found


def test_figures_of_bench_are_read_too():
    row = {"name": "umt5", "seconds": 0.123456789, "reference": None, "reference_seconds": None, "peak_bytes": 7}
    assert tables.parsed(json.dumps({"rows": [row]})) == {"rows": [row | {"seconds": 0.12346}]}
    with pytest.raises(json.JSONDecodeError):
        tables.parsed("50/100")


@pytest.mark.parametrize(
    ("more", "flags", "runs"),
    [
        ({}, [], False),
        ({}, ["--since", "2026-12-01"], False),
        ({}, ["--since", "2026-12-02"], True),
        ({"transcribed": True}, [], True),
        ({"command": "eval --model world-1 --suite reconstruction --n 50"}, [], True),
    ],
)
def test_a_row_is_run_again_where_its_result_is_not_one_of_its_own(kept, said, more, flags, runs):
    keep(kept, BY_NAME["reconstruction"], **more)
    tables.main(["reconstruction", *flags])
    assert bool(said) == runs


def test_tables_alone_run_nothing(kept):
    tables.main(["--tables"])
    assert not list(kept.iterdir())


def test_speed_without_the_reference_is_skipped_with_a_word(kept, monkeypatch, capsys):
    monkeypatch.setattr(bench, "reference_name", lambda: None)
    tables.main(["speed"])
    assert not list(kept.iterdir())
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(bench.REFERENCED)
    assert all("extra parity" in line for line in lines)


# --------------------------------------------------------------------------------------------------------------- pages


def test_the_pages_are_what_the_results_make():
    for path, text in tables_page.pages(ROWS, tables.results()).items():
        assert path.read_text() == text, f"{path.name} was edited by hand: run docs/tables.py --tables"


def test_every_result_is_of_a_row():
    assert {path.stem for path in tables.RESULTS.glob("*.json")} <= set(BY_NAME)
    for name, found in tables.results().items():
        assert found["name"] == name


def world(**more: object) -> dict[str, object]:
    metrics = {"color": SHARE, "count": SHARE | {"value": 0.89}, "size": SHARE | {"n": 80}}
    ran = {"processor": "P", "cores": 2, "jax": "1", "date": "2026-12-01"}
    return {"result": {"suite": "world", "n": 200, "metrics": metrics}, **ran, **more}


def test_a_figure_has_its_interval_and_is_bold_below_its_target():
    lines = tables_page.prompts_table({"world-64x64": world()})
    assert "| colour | 91 % (88 to 94) | 90 % | not run yet | not run yet |" in lines
    assert "| count | **89 % (88 to 94)** | 90 % | not run yet | not run yet |" in lines
    assert "| size, where named | 91 % (88 to 94), of 80 |  | not run yet | not run yet |" in lines
    assert not any("shape" in line for line in lines)
    assert len({line.count("|") for line in lines}) == 1


def test_what_was_not_run_is_marked_and_says_where_it_is_from():
    rows = [row for row in ROWS if row.group == "prompts"]
    results = {
        "world-64x64": world(transcribed=True, stated="docs/world.md", note="beside tests"),
        "world-64x96": world(),
    }
    assert "| colour | 91 % (88 to 94) † | 90 % | 91 % (88 to 94) | not run yet |" in tables_page.prompts_table(results)
    stated, _, ran = tables_page.notes(rows, results)
    assert stated.startswith("† Stated by hand in docs/world.md on 2026-12-01")
    assert "beside tests" in stated
    assert stated.endswith(": `world-64x64`.")
    assert ran == "Run on P, 2 cores, jax 1; 2026-12-01: `world-64x96`."


def test_small_numbers_have_no_zero_before_the_point():
    metric = {"value": -0.1849, "low": -0.2, "high": 1.349, "n": 50}
    assert tables_page.number(2)(metric) == "-.18 (-.20 to 1.35)"
    assert tables_page.number(4)({"value": 0.00449, "n": 50}) == ".0045"
    assert tables_page.number(2)({"value": 0.0, "n": 50}) == "0"
    assert tables_page.number(2)({"value": 10.05, "low": None, "high": None}) == "10.05"


def speed(seconds: float, theirs: float, work: float = 0.0) -> dict[str, object]:
    row = {"seconds": seconds, "reference": "torch 2", "reference_seconds": theirs}
    return world(result={"rows": [row]}, other_work=work)


def test_speed_is_the_reference_s_time_over_ours_and_their_geometric_mean():
    ratios = (4.0, 0.5, 1.0, 1.0, 1.0)  # whose product is 2
    results = {name: speed(2.0, 2.0 * ratio) for name, ratio in zip(bench.REFERENCED, ratios, strict=True)}
    lines = tables_page.speed_table(results)
    assert lines[2].endswith("| 2 s | 4 x as long | 0.9 x |")
    assert lines[3].endswith("| 2 s | **0.5 x as long** | 0.9 x |")
    assert lines[-1] == f"| geometric mean |  | {2**0.2:.3g} x | 1.0 x |"
    del results["umt5"]
    lines = tables_page.speed_table(results)
    assert lines[-1].endswith("| not run yet |  | 0.9 x |")
    assert not any("geometric" in line for line in lines)


def test_a_time_beside_other_work_says_so():
    rows = [row for row in ROWS if row.group == "speed"]
    (note,) = tables_page.notes(rows, {"wan-encode": speed(1.0, 1.0, work=0.8)})
    assert note == "Run on P, 2 cores, jax 1, torch 2; 2026-12-01: `wan-encode` (beside other work, 0.8 cores)."
