"""Versions that fit and versions that do not, and rows of the report; what needs a process is in tests/faults."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

from sora_jax import cli
from sora_jax.doctor import versions
from sora_jax.doctor.checks import check_disk, check_workdir
from sora_jax.doctor.report import as_text
from sora_jax.doctor.selftest import Row

ROOT = Path(__file__).parent.parent


def test_the_newest_tested_are_those_of_the_constraints():
    held = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for name, (_, newest) in versions.TESTED.items():
        if name not in ("python", "jax"):  # CI runs a second Python with the newest JAX
            assert newest == held[name], name
    assert versions.TESTED["jax"][0] == held["jax"]


def test_what_is_installed_here_fits():
    found = versions.versions()
    assert found["jax"] == metadata.version("jax")
    assert versions.too_old(found) == []


@pytest.mark.parametrize(
    ("version", "specifier", "fits"),
    [
        ("0.10.2", ">=0.10", True),
        ("0.9.9", ">=0.10", False),
        ("0.10.2", "<=0.10.2,>=0.10.1", True),
        ("0.10.3", "<=0.10.2,>=0.10.1", False),
        ("0.0.42.1", "==0.0.42.*", True),
        ("0.0.43", "==0.0.42.*", False),
        ("2.0", "==2.0.0", True),
        ("1.5.dev3+g12", ">1.4,!=1.6", True),
        ("2.1", "~=2.0", True),
        ("3.0", "~=2.0", False),
    ],
)
def test_requirements_are_read(version: str, specifier: str, fits: bool):
    assert versions._meets(version, specifier) == fits


def test_old_new_and_unlike_versions_are_named():
    assert versions.too_old({"jax": "0.9.1"}) == ["jax 0.9.1 is not >=0.10"]
    assert versions.untested({"grain": "0.3.0", "flax": "0.12.8"}) == ["grain 0.3.0 (tested up to 0.2.18)"]
    here = {"python": "3.11.2", "jax": "0.10.2", "jaxlib": "0.10.2", "sora_jax": "0.1"}
    assert versions.differing([here, here]) == []
    unlike = versions.differing([here, here, here | {"jax": "0.10.1", "libtpu": "0.0.42"}])
    assert unlike == [
        "jax is 0.10.2 on 2 and 0.10.1 on 1 processes",
        "libtpu is missing on 2 and 0.0.42 on 1 processes",
    ]


def test_a_workdir_is_tried_and_left_as_it_was(tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    assert check_workdir(str(tmp_path / "new" / "run")).state == "ok"
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "file").write_text("no folder")
    check = check_workdir(str(tmp_path / "file" / "run"))
    assert (check.state, "cannot be written" in check.found, bool(check.remedy)) == ("failed", True, True)
    assert check_disk(str(tmp_path / "not" / "yet")).state in ("ok", "warning")


def test_what_cannot_be_asked_is_a_mistake_of_the_users(capsys):
    for argv, words in (
        (["--devices", "0"], "--devices must be at least 1"),
        (["--timeout", "-1"], "--timeout must be > 0"),
        (["--platform", "tpus"], "invalid choice"),
        (["--workdir", ""], '--workdir "" names no folder'),
        (["--selftest", "--out", "report.txt"], "--out is the name of a JSON file"),
        (["--selftest", "--out", "/nowhere/deep/report.json"], "--out /nowhere/deep/report.json cannot be written"),
    ):
        assert cli.main(["doctor", *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "", "nothing was looked at yet"
        assert words in err


def test_the_text_of_a_report_has_a_line_for_each_row():
    row = Row("products, float32", "ok", 1.25, "TFLOP/s", note="8192 x 8192")
    failed = Row("identity of euler", "failed", 3.0, "numbers differ", 0)
    text = as_text(
        {
            "made": "2030-01-01T00:00:00Z",
            "machine": "Linux",
            "cores": 2,
            "versions": {"jax": "0.10.2"},
            "environment": {"JAX_PLATFORMS": "cpu"},
            "checks": [{"name": "memory", "state": "warning", "found": "1 GiB", "remedy": "end something"}],
            "equality": [failed._asdict()],
            "speed": [row._asdict()],
        }
    )
    assert re.search(r"^warning +memory +1 GiB: end something$", text, re.MULTILINE)
    assert re.search(r"^failed +identity of euler +3 numbers differ \(at most 0\)$", text, re.MULTILINE)
    assert re.search(r"^ok +products, float32 +1.25 TFLOP/s, 8192 x 8192$", text, re.MULTILINE)
