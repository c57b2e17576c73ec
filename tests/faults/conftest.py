"""The real command on a tiny run, and what it comes to when nobody disturbs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run

STEPS = 60
LONG = f"--config.train.steps={STEPS}"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def whole(home: Path) -> Path:
    """A run of 60 steps that reads in a thread."""
    tiny_run.finish(tiny_run.start(home, home / "whole", LONG))
    assert len(tiny_run.lines(home / "whole")) == STEPS
    return home / "whole"
