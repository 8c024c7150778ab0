"""`--artifacts` from outside: what is refused before anything is created, and where files are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from hpo.cli import search as run_module
from hpo.cli.options import open_study_or_file
from hpo.paths import Home
from hpo.search import study as studies
from hpo.search import sync
from hpo.search.status import read_status
from hpo.storage.database import Database, connect
from tests.harness.commands import Hpo, calls
from tests.harness.fakes import study_file
from tests.harness.searches import TINY, search

STUDY = '[study]\nname = "toy"\ntrials = 4\npruner = "none"\n[space]\noptimizer.lr = [0.1, 0.2]\n'


@pytest.fixture
def hpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hpo:
    """Calls `hpo` in a working directory with toy.toml; gives its code, output and errors."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "toy.toml").write_text(STUDY)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HPO_HOME")
    monkeypatch.setattr(run_module, "work", lambda *_, **__: None)
    return calls(monkeypatch, capsys)


@pytest.fixture
def default(hpo: Hpo) -> Iterator[Database]:
    """The database that `hpo` uses without --storage."""
    found = connect(f"sqlite:///{Home.default().database}")
    yield found
    found.dispose()


def url_of(database: Database) -> str | None:
    uuid = read_status(database, "toy").row.uuid
    found = sync.find(database, uuid, Home.default())
    return None if found is None else found.store.url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://AKIA:topsecret@bucket/x", "its text is not shown"),
        ("/nowhere/to/be/found", "/nowhere/to/be is not there"),
        ("nonsense://x", "Protocol not known"),
        ("file.txt/x", "cannot be"),
    ],
)
@pytest.mark.parametrize("way", ["option", "environment"])
def test_what_cannot_be_used_creates_nothing(
    hpo: Hpo, url: str, expected: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file.txt").write_text("a file")
    if way == "environment":
        monkeypatch.setenv("HPO_ARTIFACTS", url)
    code, out, err = hpo("run", "toy.toml", *(["--artifacts", url] if way == "option" else []))
    assert code == 2
    assert expected in err
    assert "topsecret" not in out + err + hpo("run", "--help")[1]
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["file.txt", "toy.toml"]


def test_the_place_is_kept_and_another_one_refused(
    hpo: Hpo, default: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path.cwd()
    hpo("run", "toy.toml")
    assert url_of(default) is None
    monkeypatch.setenv("HPO_ARTIFACTS", "shared")
    assert hpo("run", "toy.toml")[0] == 1  # no trial is run here, so none was completed
    assert url_of(default) == f"{here}/shared"  # given later than the study
    code, _, err = hpo("run", "toy.toml", "--artifacts", "other")
    assert code == 2
    assert f"{here}/shared" in err
    assert f"{here}/other" in err
    assert not Path("other").exists()
    monkeypatch.delenv("HPO_ARTIFACTS")
    assert hpo("run", "toy.toml")[0] == 1
    assert hpo("run", "toy.toml", "--artifacts", f"file://{here}/shared/")[0] == 1


def test_who_creates_the_study_of_a_file_names_the_place(hpo: Hpo, default: Database) -> None:
    """`hpo worker` and `hpo launch` on a study file."""
    for place in ("shared", "other"):  # the second one finds the study
        open_study_or_file(default, "toy.toml", place)
        assert url_of(default) == f"{Path.cwd()}/shared"
    assert not Path("other").exists()


@pytest.fixture
def searched(hpo: Hpo, default: Database) -> Path:
    """The folder of artifacts of a finished study whose files on this host are gone."""
    Home.default().root.mkdir()
    file = study_file(trials=4, train=TINY)
    study, _ = studies.create(default, file)
    place = sync.check("shared", study.row, default)
    sync.keep(default, study.row, place, Home.default())
    search(default, Home.default(), file)
    shutil.rmtree(Home.default().root / "studies")
    return Path(place, study.uuid)


def test_weights_are_found_there(hpo: Hpo, default: Database, searched: Path) -> None:
    ranked = [trial.number for trial in read_status(default, "toy").ranked()]
    best, worst = ranked[0], ranked[-1]
    path = searched / f"trials/{best}/attempt-1/weights.safetensors"
    assert f"weights of its best epoch: {path}" in hpo("trial", "toy", best)[1]
    assert "weights of" not in hpo("trial", "toy", worst)[1]
    code, out, _ = hpo("export", "toy", "--weights", "w.safetensors")
    assert (code, "w.safetensors: its weights" in out) == (0, True)
    with safe_open("w.safetensors", "pt") as weights:
        assert weights.metadata().items() >= {"study": "toy", "trial": str(best)}.items()
    code, _, err = hpo("export", "toy", "--trial", worst, "--weights", "x.safetensors")
    assert (code, "no weights of trial" in err) == (2, True)
    assert not Path("x.safetensors").exists()
    assert not Path(f"toy.trial-{worst}.toml").exists()
    code, _, err = hpo("export", "toy", "--weights", "w.safetensors", "-o", "y.toml")
    assert (code, "w.safetensors exists" in err) == (2, True)
    assert hpo("export", "toy", "--top", 2, "--weights", "w.safetensors")[0] == 2


def test_a_store_that_is_away_is_told(hpo: Hpo, searched: Path) -> None:
    store = searched.parent
    store.rename(store.with_name("away"))
    code, _, err = hpo("report", "toy")
    assert Path("toy.report.html").exists()
    assert code == 2
    assert "no such folder on this host" in err
    assert hpo("trial", "toy", 0)[0] == 0
    assert hpo("status", "toy", "--json")[0] == 0


def test_the_report_goes_there(hpo: Hpo, searched: Path) -> None:
    code, out, _ = hpo("report", "toy", "-o", "page.html")
    assert code == 0
    assert f"also at {searched}/report.html" in out.replace("\n", "")
    assert (searched / "report.html").read_text() == Path("page.html").read_text()


def test_delete_leaves_nothing_there(hpo: Hpo, searched: Path) -> None:
    assert hpo("delete", "toy", "--yes")[0] == 0
    assert list(searched.parent.iterdir()) == []
