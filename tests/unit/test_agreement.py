"""Workers with other code or images than their study began with are refused, or recorded."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hpo.config.data import DataConfig
from hpo.config.study import StudyFile
from hpo.data import split
from hpo.data.split import Item
from hpo.errors import ConfigError, Conflict
from hpo.paths import Home
from hpo.reports.study import study_report
from hpo.search import fingerprints
from hpo.search import study as studies
from hpo.search.fingerprints import (
    Code,
    agree_on_code,
    agree_on_images,
    code_of,
    read_code,
    read_overrides,
)
from hpo.search.status import read_status
from hpo.search.study import Study
from hpo.storage import records
from hpo.storage.database import Database, connect
from tests.harness.commands import Hpo, calls
from tests.harness.fakes import study_file
from tests.harness.searches import TINY

LOSS = """
from torch.nn import functional


def loss(logits, labels):
    return functional.cross_entropy(logits, labels)  # <mine>
"""
DATA = """
def load(root, split):
    return None
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a loss and a data set of the user's own."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "losses_of_mine.py").write_text(LOSS)
    (folder / "data_of_mine.py").write_text(DATA)
    monkeypatch.chdir(folder)
    before = list(sys.path)
    yield folder
    sys.path[:] = before
    for name in ("losses_of_mine", "data_of_mine"):
        sys.modules.pop(name, None)


def file_with(train: str = "", space: str = "") -> StudyFile:
    lr = "optimizer.lr = {low = 1e-4, high = 1e-1, log = true}\n"
    return study_file(trials=1, train=f"{TINY}\n{train}", space=lr + space)


def torch_is(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: fingerprints.version(name) for name in fingerprints.LIBRARIES} | {
        "torch": version
    }
    monkeypatch.setattr(fingerprints, "version", found.__getitem__)


def test_what_counts(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_with('loss = "losses_of_mine:loss"')
    torch_is("2.14.1+cu130", monkeypatch)
    first = code_of(file)
    assert list(first.parts) == ["hpo sources", "torch", "torchvision", "own losses_of_mine"]
    assert first.parts["torch"] == "2.14"
    torch_is("2.14.9", monkeypatch)
    assert code_of(file) == first
    torch_is("2.15.0", monkeypatch)
    assert code_of(file).differences(first) == ["torch 2.14 -> 2.15"]
    (own / "losses_of_mine.py").write_text(LOSS + "# a remark\n")
    assert code_of(file).differences(first) == ["torch 2.14 -> 2.15"]
    (own / "losses_of_mine.py").write_text(LOSS + "OTHER = 1\n")
    other = code_of(file)
    assert other.fingerprint != first.fingerprint
    assert [line.split()[:2] for line in other.differences(first)] == [
        ["own", "losses_of_mine"], ["torch", "2.14"],
    ]  # fmt: skip
    assert other.sources == {"losses_of_mine": LOSS + "OTHER = 1\n"}


SOURCE = b"""
'A module.'
RATE = 0.1

class Config:
    lr: float = RATE
    'The learning rate.'

    def rate(self, step: int) -> float:
        '''Return it.'''
        return self.lr * 0.5 ** step  # halved
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"# halved", b"# cut in half"),
        (b"'A module.'", b"'Another text.'"),
        (b"'A module.'\n", b""),
        (b"    'The learning rate.'\n", b""),
        (b"Return it.", b"Return the rate of a step."),
        (b"lr * 0.5 ** step", b"lr * 0.5**step"),
        (b"\n", b"\r\n"),
        (b"RATE = 0.1\n", b"RATE = 0.1\n\n\n"),
    ],
)
def test_words_and_layout_do_not_count(old: bytes, new: bytes) -> None:
    assert SOURCE.replace(old, new) != SOURCE
    assert fingerprints.syntax_digest(SOURCE.replace(old, new)) == fingerprints.syntax_digest(
        SOURCE
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"RATE = 0.1", b"RATE = 0.2"),
        (b"0.5 ** step", b"0.5 * step"),
        (b"self.lr", b"RATE"),
        (b"lr: float = RATE", b"lr: float"),
        (b"return self", b"x = 'text'\n        return self"),
        (b"step: int)", b"step: int = 0)"),
        (b"RATE = 0.1", b"RATE = '0.1'"),
    ],
)
def test_what_computes_counts(old: bytes, new: bytes) -> None:
    assert SOURCE.replace(old, new) != SOURCE
    assert fingerprints.syntax_digest(SOURCE.replace(old, new)) != fingerprints.syntax_digest(
        SOURCE
    )


def test_what_does_not_parse_counts_by_its_bytes() -> None:
    assert fingerprints.syntax_digest(b"def") != fingerprints.syntax_digest(b"def  ")


def test_modules_that_only_tell_are_there() -> None:
    root = Path(fingerprints.hpo.__file__).parent
    assert all((root / f"{name}.py").is_file() for name in fingerprints.TELLING)


def test_own_modules_count_where_they_are_searched_too(own: Path) -> None:
    plain = code_of(file_with())
    searched = code_of(file_with(space='loss = ["focal", "losses_of_mine:loss"]'))
    assert set(searched.parts) - set(plain.parts) == {"own losses_of_mine"}


def test_an_own_data_set_counts_by_its_images(own: Path) -> None:
    file = file_with('data = {dataset = "data_of_mine:load", root = ".", image_size = 8}')
    first = code_of(file)
    (own / "data_of_mine.py").write_text(DATA + "# other\n")
    assert code_of(file) == first
    assert code_of(file).sources == {"data_of_mine": DATA + "# other\n"}


@pytest.mark.parametrize("missing", ["nowhere", "nowhere.inside", "losses_of_mine.inside"])
def test_an_own_module_that_is_not_here(own: Path, missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"your module '{missing}' cannot be found"):
        code_of(file_with(f'loss = "{missing}:loss"'))


def test_other_code_is_refused_or_recorded(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _ = studies.create(database, file_with())

    def join(worker: str, *, force: bool = False) -> None:
        agree_on_code(database, study.uuid, study.file, worker=worker, force=force)

    torch_is("2.14.0", monkeypatch)
    fingerprints.require_code(database, study.uuid, study.file)  # it has not begun
    join("first")
    join("second")
    began = code_of(study.file)
    torch_is("2.15.0", monkeypatch)
    here = code_of(study.file)
    for refused in (
        lambda: join("third"),
        lambda: fingerprints.require_code(database, study.uuid, study.file),
    ):
        with pytest.raises(Conflict) as caught:
            refused()
        told = str(caught.value)
        assert here.fingerprint in told
        assert began.fingerprint in told
        assert "\n  torch 2.14 -> 2.15\n" in told
        assert "--force" in told
    assert read_overrides(database, study.uuid) == ()
    join("third", force=True)
    join("third", force=True)
    (forced,) = read_status(database, "toy").forced
    assert (forced.worker, forced.what) == ("third", "code")
    assert forced.differs == ("torch 2.14 -> 2.15",)
    assert (forced.here, forced.study) == (here.fingerprint, began.fingerprint)
    assert read_code(database, study.uuid) == began


def test_other_images_are_refused_or_recorded(database: Database) -> None:
    study, _ = studies.create(database, file_with())
    told: dict[str, list[str]] = {}

    def join(worker: str, fingerprint: str, *, force: bool = False) -> None:
        agree_on_images(
            database, study.uuid, DataConfig(), fingerprint, told.get, worker=worker, force=force
        )

    join("first", "aaaa")
    join("second", "aaaa")
    with pytest.raises(Conflict, match=r"images here \(fingerprint bbbb\) .* \(aaaa\)"):
        join("third", "bbbb")
    join("third", "bbbb", force=True)
    (forced,) = read_overrides(database, study.uuid)
    unknown = "data set digits; which images is not known here"
    assert str(forced) == f"other images (bbbb instead of aaaa: {unknown})"
    told["aaaa"] = ["1 image gone: cat/1.png"]
    with pytest.raises(Conflict, match=r"1 image gone: cat/1\.png"):
        join("fourth", "cccc")
    records_of = records.read_resolved(database, study.uuid, fingerprints.IMAGES)
    assert records_of == {"data digits/0.15/0.15/0/None": "aaaa"}


def test_settings_of_later_versions_count_where_they_are_used(database: Database) -> None:
    study, _ = studies.create(database, file_with())
    for number, data in enumerate([{}, {"folds": 3}, {"background": "black"}]):
        fingerprint = f"{number}"
        agree_on_images(
            database, study.uuid, DataConfig.model_validate(data), fingerprint, lambda _: [],
            worker="any", force=False,
        )  # fmt: skip
    assert not read_overrides(database, study.uuid)


def test_which_images_differ(tmp_path: Path) -> None:
    def entry(name: str, label: int, content: str) -> Item:
        return Item(name, label, content)

    kept = [entry(f"cat/{i}", 0, f"c{i}") for i in range(3)]
    before = {"train": [*kept, entry("cat/gone", 0, "g"), entry("cat/x", 0, "x")], "val": []}
    after = {
        "train": [*kept[:2], entry("cat/new", 0, "n"), entry("cat/x", 0, "y")],
        "val": [kept[2]],
    }
    for name, parts in (("before", before), ("after", after)):
        split.save_listing(tmp_path, name, ["cat"], parts)
    assert split.listing_differences(tmp_path, "before", "after") == [
        "1 image added: cat/new",
        "1 image gone: cat/gone",
        "1 image of other content: cat/x",
        "1 image in another part, because the split depends on all contents: cat/2",
    ]
    assert split.listing_differences(tmp_path, "before", "unseen") == []
    (tmp_path / "listings" / "after.json").write_text("{")
    assert split.listing_differences(tmp_path, "before", "after") == []


@pytest.fixture
def hpo(
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Hpo:
    """Calls `hpo` in the working directory of `own`: exit code, output, errors."""
    return calls(monkeypatch, capsys)


@pytest.fixture
def begun(hpo: Hpo, tmp_path: Path) -> Study:
    """A study with an own loss that another worker, with other code, has begun."""
    (tmp_path / "runs").mkdir()
    database = connect(Home.default().storage)
    study, _ = studies.create(database, file_with('loss = "losses_of_mine:loss"'))
    here = code_of(study.file)
    other = replace(here, parts={**here.parts, "torch": "2.0"})
    assert isinstance(other, Code)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fingerprints, "code_of", lambda _: other)
        agree_on_code(database, study.uuid, study.file, worker="elsewhere", force=False)
    return study


def test_a_forced_worker_is_seen_wherever_one_looks(hpo: Hpo, begun: Study) -> None:
    code, _, told = hpo("worker", "toy", "--device", "cpu", "--threads", 1)
    assert code == 2
    assert told.startswith("hpo: the code here (fingerprint ")
    assert "torch 2.0 -> " in told
    assert begun.snapshot().created == 0
    code, _, _ = hpo(
        "worker", "toy", "--device", "cpu", "--threads", 1, "--force", "--worker-id", "made-to"
    )
    assert code == 0
    words = "other code ("
    assert f"made-to was forced to join: {words}" in hpo("status", "toy")[1]
    assert json.loads(hpo("status", "toy", "--json")[1])["forced"][0]["worker"] == "made-to"
    page = hpo("trial", "toy", 0)[1]
    assert f"attempt 1 was forced: {words}" in page
    assert f"code {read_code(begun.database, begun.uuid)}"[:100] in page
    report = study_report(begun.database, "toy")
    assert f"made-to was forced to join: {words}" in report
    assert "# &lt;mine&gt;" in report  # the source, harmless
    exported = hpo("export", "toy", "-o", "best.toml")
    assert exported[0] == 0
    assert "A worker was forced to work with other code" in Path("best.toml").read_text()


def test_the_source_that_ran_is_kept(hpo: Hpo, begun: Study, own: Path) -> None:
    hpo("worker", "toy", "--device", "cpu", "--threads", 1, "--force")
    (own / "losses_of_mine.py").unlink()
    code, shown, _ = hpo("trial", "toy", 0, "--source")
    assert (code, shown) == (0, f"# losses_of_mine\n{LOSS}")


def test_a_trial_without_own_modules_has_no_source(hpo: Hpo, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    database = connect(Home.default().storage)
    studies.create(database, file_with())
    hpo("worker", "toy", "--device", "cpu", "--threads", 1)
    code, _, told = hpo("trial", "toy", 0, "--source")
    assert code == 2
    assert "names no module of your own" in told


def test_a_worker_without_the_module_takes_no_trial(hpo: Hpo, begun: Study, own: Path) -> None:
    (own / "losses_of_mine.py").unlink()
    code, _, told = hpo("worker", "toy", "--device", "cpu", "--force")
    assert code == 2
    assert "module 'losses_of_mine' cannot be found" in told
    assert begun.snapshot().created == 0


def test_hpo_run_asks_before_it_starts_anything(
    hpo: Hpo, begun: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("toy.toml").write_text(begun.row.source)
    code, _, told = hpo("run", "toy.toml")
    assert code == 2
    assert "torch 2.0 -> " in told
    started: list[bool] = []

    def started_with(*_: object, force: bool, **__: object) -> None:
        started.append(force)
        raise KeyboardInterrupt

    monkeypatch.setattr("hpo.api.study.Study.supervisor", started_with)
    hpo("run", "toy.toml", "--force")
    assert started == [True]


def test_a_module_that_is_missing_creates_no_study(hpo: Hpo, tmp_path: Path) -> None:
    Path("toy.toml").write_text(file_with('loss = "nowhere:loss"').text)
    code, _, told = hpo("run", "toy.toml")
    assert code == 2
    assert "module 'nowhere' cannot be found" in told
    assert not (tmp_path / "runs").exists()
