"""Imports point one way (docs/architecture.md), and importing the package is cheap and has no side effects."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sora_jax"

# A room may import rooms of lower layers and itself; rooms of one layer do not see each other.
LAYERS = [
    {"errors", "pytrees"},
    {"shapes", "record", "runtime", "vocabulary", "compile_cache", "config_values"},
    {"sharding", "media", "sheet", "cluster"},
    {"tokens", "diffusion"},
    {"models"},
    {"canvas", "weights", "data"},
    {"settings", "video"},
    {"training"},
    {"experts", "load"},
    {"codec"},
    {"pieces"},
    {"pipeline"},
    {"evaluation"},
    {"bench"},
    {"doctor"},
    {"commands", "supervise"},
    {"cli"},
    {"__main__"},
]
LAYER = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

FILES = sorted(PACKAGE.rglob("*.py"))


# A file at the top that belongs to a room: configs are made of the rooms' own dataclasses, and the loops read them.
ROOM = {"config": "training"}


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    top = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    return ROOM.get(top, top)


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """Every import of a file as (dotted name, line, whether it runs when the file is imported)."""
    found = []

    def walk(node: ast.AST, on_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = on_import
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inside = False
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inside = False
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                # `from sora_jax import media` imports sora_jax.media.
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                found.extend((name, child.lineno, inside) for name in names)
            walk(child, inside)

    walk(ast.parse(path.read_text()), True)
    return found


def ours(name: str) -> str | None:
    """The room that a dotted name lies in, or None for another package or `sora_jax` itself."""
    parts = name.split(".")
    room = ROOM.get(parts[1], parts[1]) if parts[0] == "sora_jax" and len(parts) > 1 else None
    return room if room in LAYER else None


def test_every_room_has_a_layer():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms - set(LAYER) == set(), "say where a new room stands: LAYERS above"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return  # the package's own names are loaded lazily, from everywhere
    for name, line, _ in imports(path):
        target = ours(name)
        if target is not None and target != room:
            assert LAYER[target] < LAYER[room], (
                f"{path}:{line}: {room} imports {target}, which stands above or beside it"
            )


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "data"], ids=lambda path: path.name)
def test_data_is_numpy_only(path):
    for name, line, on_import in imports(path):
        top = name.split(".")[0]
        assert top not in ("jax", "flax", "optax", "orbax"), f"{path}:{line}: data imports {name}"
        assert ours(name) in (None, "errors", "media", "record", "shapes", "tokens", "vocabulary", "data"), (
            f"{path}:{line}: {name}"
        )
        # grain imports jax, so it waits until a loader is made
        assert top != "grain" or path.name == "loader.py" or not on_import, f"{path}:{line}: grain outside a function"


def test_checkers_are_numpy_only():
    path = PACKAGE / "evaluation" / "checkers.py"
    for name, line, _ in imports(path):
        assert name.split(".")[0] not in ("jax", "flax"), f"{path}:{line}: {name}"
        assert ours(name) in (None, "errors", "data", "evaluation"), f"{path}:{line}: {name}"


def test_configs_import_nothing_of_the_package():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        assert not [name for name, _, _ in imports(path) if name.startswith("sora_jax")], path


def declared(*groups: str) -> set[str]:
    """The distributions that pyproject.toml asks for, in the given extras too."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][group] for group in groups)]
    return {re.split(r"[\[<>=~! ]", entry)[0].lower().replace("_", "-") for entries in lists for entry in entries}


# Where the import's name is not the distribution's.
DISTRIBUTION = {
    "PIL": "pillow",
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "skvideo": "scikit-video",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}


def third_party(paths: list[Path]) -> set[str]:
    tops = {name.split(".")[0] for path in paths for name, _, _ in imports(path)}
    local = {path.stem for path in paths} | {"sora_jax"}
    return {DISTRIBUTION.get(top, top).lower().replace("_", "-") for top in tops - local - sys.stdlib_module_names}


def test_dependencies_are_what_is_imported():
    """Those of the extras `weights` and `wandb` are imported where they are needed, and a user without is told so."""
    reference = PACKAGE / "bench" / "reference.py"  # what others do, timed where it is installed
    ours = [path for path in FILES if path != reference]
    assert third_party([*ours, *(PACKAGE.parent / "configs").glob("*.py")]) == declared("weights", "wandb")
    assert third_party([reference]) <= declared("parity")
    eager = {name.split(".")[0] for path in FILES for name, _, on_import in imports(path) if on_import}
    late = {name.replace("-", "_") for name in declared("weights", "wandb", "parity") - declared() - {"sora-jax"}}
    assert not eager & late


def test_test_dependencies_are_declared():
    tests = sorted(Path(__file__).parent.glob("**/*.py"))
    scripts = sorted((PACKAGE.parent / "docs").glob("*.py"))  # which tests import
    skipped_without = declared("parity", "store", "weights") | {"libtpu"}  # parity, faults and plans
    assert third_party([*tests, *scripts]) - declared("test") - skipped_without == set()


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_and_its_help_loads_no_jax():
    assert run_python("import sora_jax, sys; print('jax' in sys.modules)") == "False"
    code = (
        "import sys; from sora_jax import cli; code = cli.main(['sample', '--help']); print(code, 'jax' in sys.modules)"
    )
    assert run_python(code).splitlines()[-1] == "0 False"


def test_importing_every_module_starts_no_backend_and_sets_no_flag():
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES]
    modules = [name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")]
    code = f"""
import importlib, jax
before = dict(jax.config.values)
for name in {modules!r}:
    importlib.import_module(name)
changed = [key for key, value in jax.config.values.items() if before.get(key, value) != value]
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized(), changed)
"""
    assert run_python(code) == "False []"
