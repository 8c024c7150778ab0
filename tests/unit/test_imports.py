"""The floors of the house, and what the command line may load."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpo
from hpo.cli import storage
from hpo.cli.main import COMMANDS
from hpo.storage.database import connect
from tests.harness.fakes import study_file
from tests.harness.filled import Trial, fill

PACKAGE = Path(hpo.__file__).parent
CORE = "core"
BASE = (CORE, "config", "data", "training", "storage")
BELOW = {
    CORE: set(),
    "config": {CORE},
    "data": {CORE, "config"},
    "training": {CORE, "config", "data"},
    "storage": {CORE},
    "search": {*BASE},
    "doctor": {*BASE, "search"},
    "workers": {*BASE, "search"},
    "trained": {*BASE, "search"},
    "reports": {*BASE, "search", "trained"},
    "dashboard": {*BASE, "search", "reports"},
    "api": {*BASE, "search", "workers", "trained", "reports"},
    "cli": {*BASE, "search", "doctor", "workers", "trained", "reports", "dashboard", "api"},
}
"""The floors that each floor may import, beside itself."""

OWNERS = {
    "torch": (
        "hpo.training",
        "hpo.search.trial",
        "hpo.search.trackers",
        *(f"hpo.trained.{name}" for name in ("cost", "dry_run", "plain", "retrain", "inference")),
    ),
    "torchvision": ("hpo.training", "hpo.data.torchvision", "hpo.trained.plain"),
    "sqlalchemy": ("hpo.storage", "hpo.doctor"),
    "ray": ("hpo.workers.launchers.ray",),
    "grpc": ("hpo.workers.launchers.ray",),
}
"""Who may import a library at all, inside functions too."""

HEAVY = ("torch", "torchvision", "optuna", "plotly", "sklearn", "sqlalchemy", "ray", "numpy", "PIL")
COMMAND_NAMES = [name for commands in COMMANDS.values() for name in commands]


def modules() -> dict[str, ast.Module]:
    """Every module of the package by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def floor(module: str) -> str:
    """The floor of `hpo.<...>`; what stands in no folder is the core."""
    part = module.split(".")[1] if "." in module else ""
    return part if part in BELOW else CORE


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(node: ast.AST, *, nested: bool) -> Iterator[str]:
    """Modules imported under `node`, those for type checkers left out; `nested`: inside functions
    as well."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            whole = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (one if one in MODULES else str(child.module) for one in whole)
        elif is_for_types(child):
            assert isinstance(child, ast.If)
            yield from (name for part in child.orelse for name in imports(part, nested=nested))
        elif nested or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, nested=nested)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_only_downward(module: str) -> None:
    if module == "hpo.__main__":
        return  # the door of the house
    here = floor(module)
    inside = {one for one in imports(MODULES[module], nested=True) if one.startswith("hpo.")}
    wrong = {one for one in inside if floor(one) not in BELOW[here] | {here}}
    assert not wrong, f"{module} ({here}) imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_library_has_one_owner(library: str) -> None:
    users = {
        module
        for module, tree in MODULES.items()
        if library in {one.split(".")[0] for one in imports(tree, nested=True)}
    }
    wrong = {user for user in users if not user.startswith(OWNERS[library])}
    assert not wrong, f"{library} is imported by {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("module", [one for one in MODULES if floor(one) == CORE])
def test_the_core_is_light(module: str) -> None:
    if module == "hpo.__main__":
        return  # the door of the house
    loaded = {one.split(".")[0] for one in imports(MODULES[module], nested=False)}
    assert not loaded & set(HEAVY)


def test_commands_load_heavy_modules_inside_functions_only() -> None:
    for module, tree in MODULES.items():
        if floor(module) == "cli":
            loaded = {one.split(".")[0] for one in imports(tree, nested=False)}
            assert not loaded & set(HEAVY), module


def loaded_by(code: str, folder: Path) -> set[str]:
    """Modules in memory after `code` in a fresh process, with the packages that they are in."""
    script = f"import sys\n{code}\nprint(chr(10) + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder, env={**os.environ, "HPO_HOME": str(folder / "runs")},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


CALL = "from hpo.cli.main import main\ntry:\n    main({args!r})\nexcept SystemExit as end:\n    "
CALL += "assert end.code in {codes!r}, end.code"


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    names = [*COMMAND_NAMES, *(f"storage {name}" for name in storage.COMMANDS)]
    calls = [["--help"], ["--version"], *([*name.split(), "--help"] for name in names)]
    code = "\n".join(CALL.format(args=args, codes=(0,)) for args in calls)
    assert not loaded_by(code, tmp_path) & set(HEAVY)


def test_a_look_loads_what_it_shows(tmp_path: Path) -> None:
    """Looks are typed often: neither Optuna nor anything that they do not show, of hpo either."""
    (tmp_path / "runs").mkdir()
    database = connect(f"sqlite:///{tmp_path}/runs/hpo.db")
    fill(database, study_file(), [Trial("complete", (0.5, 0.6)), Trial("pruned", (0.2,))])
    database.dispose()
    calls = [["list"], ["status", "toy"], ["trials", "toy"], ["trial", "toy", "0"],
             ["workers", "toy"]]  # fmt: skip
    code = "\n".join(CALL.format(args=args, codes=(0,)) for args in calls)
    loaded = loaded_by(code, tmp_path)
    assert {"sqlalchemy", "hpo.cli.status", "hpo.search.status"} <= loaded
    unneeded = {*HEAVY, "alembic", "scipy", "pandas", "filelock", "rich.progress", "rich.markdown"}
    unneeded |= {"sqlalchemy.orm", "sqlalchemy.dialects.mysql", "hpo.data.folders"}
    unneeded |= {"hpo.cli.search", "hpo.cli.results", "hpo.cli.workers", "hpo.storage.optuna"}
    assert not loaded & (unneeded - {"sqlalchemy"})


def test_looking_for_faults_loads_no_torch(tmp_path: Path) -> None:
    code = CALL.format(args=["storage", "check"], codes=(2,))
    assert not loaded_by(code, tmp_path) & {"torch", "torchvision", "plotly", "sklearn"}


TINY = """
[study]
name = "tiny"
trials = 1
sampler = "random"
[train]
epochs = 1
data.dataset = "digits"
model.cnn.filters = [4]
[space]
optimizer.name = ["sgd", "adamw"]
"""


def test_a_worker_loads_what_its_study_needs(tmp_path: Path) -> None:
    """torchvision takes a second to import, scikit-learn another, and torch._dynamo a third with
    170 MB: none of it for the small network on digits."""
    (tmp_path / "tiny.toml").write_text(TINY)
    code = CALL.format(args=["worker", "tiny.toml", "--device", "cpu"], codes=(0,))
    loaded = loaded_by(code, tmp_path)
    assert {"torch", "optuna", "hpo.training.train"} <= loaded
    unneeded = {"torchvision", "sklearn", "scipy", "pandas", "plotly", "torch._dynamo", "sympy"}
    assert not loaded & unneeded


def test_the_supervisor_loads_no_torch(tmp_path: Path) -> None:
    code = "import hpo.cli.search, hpo.api.study, hpo.data.dataset, hpo.workers.supervisor"
    code += ", hpo.training.metrics, hpo.reports.progress"
    assert "torch" not in loaded_by(code, tmp_path)
