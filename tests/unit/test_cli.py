"""The commands from outside: what they print, what they refuse, and what they leave behind."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpo import __version__
from hpo.api.study import Study as PublicStudy
from hpo.cli import options, storage
from hpo.cli.init import study_file_of, wished
from hpo.cli.main import COMMANDS, main
from hpo.cli.status import Tail
from hpo.errors import Conflict, InputError, Interrupted
from hpo.paths import Home
from hpo.search import study as studies
from hpo.storage import leases
from hpo.storage.database import Database, connect
from hpo.storage.optuna import FencedStorage
from hpo.workers.worker import Worker
from tests.harness.fakes import InstantTrials, study_file
from tests.harness.filled import Trial, fill
from tests.harness.images import make_folder

NAMES = [name for commands in COMMANDS.values() for name in commands]
WHOLE_NAMES = [*NAMES, *(f"storage {name}" for name in storage.COMMANDS)]

STUDY = """\
[study]
name = "toy"
trials = 2
pruner = "none"
[train]
epochs = 1
[space]
optimizer.lr = {low = 1e-4, high = 1e-1, log = true}
"""


@dataclass
class Called:
    """What one command did."""

    code: int
    out: str
    err: str


Hpo = Callable[..., Called]


@pytest.fixture
def hpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hpo:
    """Calls `hpo` in an empty working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HPO_HOME")
    monkeypatch.setattr(sys, "argv", ["hpo"])
    monkeypatch.setenv("COLUMNS", "160")

    def call(*args: object) -> Called:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        said = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Called(end.value.code, said.out, said.err)

    return call


@pytest.fixture
def toy(hpo: Hpo) -> Database:
    """The default database with a finished study `toy` of three trials and an open one, `open`."""
    home = Home.default()
    home.root.mkdir()
    database = connect(Home.default().storage)
    for name, budget in (("toy", 3), ("open", 3)):
        studies.create(database, study_file(trials=budget, name=name))
    study = studies.load(database, "toy")
    storage = FencedStorage(database)
    trials = InstantTrials(study, storage, epochs=2)
    Worker(study, storage, trials, home=home, worker_id="w-1").run(threading.Event())
    return database


def test_help_lists_every_command(hpo: Hpo) -> None:
    called = hpo("--help")
    assert called.code == 0
    assert all(f" {name} " in called.out for name in NAMES)


@pytest.mark.parametrize("name", WHOLE_NAMES)
def test_every_command_explains_itself(hpo: Hpo, name: str) -> None:
    called = hpo(*name.split(), "--help")
    assert called.code == 0
    assert "Example: " in called.out
    assert f"hpo {name}" in called.out.partition("Example: ")[2]


@pytest.mark.parametrize("name", ["", "init", "trials", "storage copy"])
def test_help_shows_flags_and_arguments_bare(hpo: Hpo, name: str) -> None:
    shown = hpo(*name.split(), "--help").out
    assert "--help" in shown
    assert not set("{}") & set(shown)
    assert not {"<bool>", "--no-force"} & set(shown.split())


@pytest.mark.usefixtures("toy")
def test_a_shell_completes_commands_and_studies(
    hpo: Hpo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("_HPO_COMPLETE", "complete_bash")
    for line, found in (("hpo sto", ["storage", "stop"]), ("hpo trials t", ["toy"])):
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        assert sorted(hpo().out.split()) == sorted(found)
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path}/none.db")
    called = hpo()
    assert (called.out.split(), called.err) == ([], "")
    assert not (tmp_path / "none.db").exists()


def test_version(hpo: Hpo) -> None:
    assert hpo("--version").out == f"hpo {__version__}\n"


def test_help_never_shows_the_storage_of_the_environment(
    hpo: Hpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_STORAGE", "postgresql+psycopg://me:hush@server/hpo")
    for name in WHOLE_NAMES:
        assert "hush" not in hpo(*name.split(), "--help").out


def test_an_unknown_command_names_the_nearest(hpo: Hpo) -> None:
    called = hpo("statsu", "x")
    assert called.code == 2
    assert "'status'" in called.err


def here() -> list[str]:
    """What stands in the working directory."""
    return sorted(path.name for path in Path.cwd().iterdir())


def bad(text: str) -> str:
    """The study file with one more line, or a line replaced (`old -> new`)."""
    old, arrow, new = text.partition(" -> ")
    assert not arrow or old in STUDY
    return STUDY.replace(old, new) if arrow else STUDY + text + "\n"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("[study] -> [studdy]", "studdy"),
        ("trials = 2 -> trails = 2", "trials"),
        ("trials = 2 -> trials = 'two'", "study.trials"),
        ("low = 1e-4 -> low = 1.0", "optimizer.lr"),
        ('pruner = "none" -> pruner = "nune"', "none"),
        ("epochs = 1 -> epochs = 1\\nmodel.architecture = 'resnet19'".replace("\\n", "\n"),
         "resnet18"),
        ("epochs = 1 -> epochs = 1\ndata.dataset = 'folder'\ndata.root = 'nowhere'", "nowhere"),
        ("[study] -> [study", "not a TOML file"),
    ],
)  # fmt: skip
def test_a_bad_study_file_creates_nothing(hpo: Hpo, change: str, says: str) -> None:
    Path("toy.toml").write_text(bad(change))
    called = hpo("run", "toy.toml")
    assert called.code == 2
    assert says in called.err
    assert called.err.startswith("hpo: ")
    assert "Traceback" not in called.err
    assert here() == ["toy.toml"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--workers", "0"], "--workers"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "abacus"], "abacus"),
        (["--set", "study.trials"], "KEY=VALUE"),
        (["--set", "epochz=3"], "epochs"),
        (["--storage", "nonsense"], "storage URL"),
        (["--storage", "sqlite:///no/such/folder/hpo.db"], "folder exists"),
    ],
)
def test_bad_options_create_nothing(hpo: Hpo, args: list[str], says: str) -> None:
    Path("toy.toml").write_text(STUDY)
    called = hpo("run", "toy.toml", *args)
    assert called.code == 2
    assert says in called.err
    assert "Traceback" not in called.err
    assert here() == ["toy.toml"]


def test_a_password_is_never_shown(hpo: Hpo, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("toy.toml").write_text(STUDY)
    for url in ("nonsense:secret", "oracle://me:hush@server/hpo"):
        called = hpo("run", "toy.toml", "--storage", url)
        assert called.code == 2
        assert "secret" not in called.out + called.err
        monkeypatch.setenv("HPO_STORAGE", url)
        assert "secret" not in hpo("list").err


@pytest.mark.parametrize(
    "args",
    [
        *(["status", "x"], ["trials", "x"], ["trial", "x", "0"], ["logs", "x"], ["stop", "x"]),
        *(["resume", "x"], ["extend", "x", "--trials", "5"], ["delete", "x", "--yes"]),
        *(
            ["enqueue", "x", "optimizer.lr=0.1"],
            ["export", "x"],
            ["verify", "x"],
            ["report", "x"],
            ["worker", "x"],
        ),
        ["dashboard"],
    ],
    ids=lambda args: args[0],
)
def test_without_studies_each_command_says_how_to_make_one(hpo: Hpo, args: list[str]) -> None:
    called = hpo(*args)
    assert called.code == 2
    assert "hpo run STUDY.toml" in called.err
    assert len(called.err.splitlines()) == 1
    assert here() == []


def test_an_error_in_writing_is_one_line(hpo: Hpo, toy: Database) -> None:
    Path("folder").mkdir()
    for command in (["report", "toy", "-o", "folder"], ["export", "toy", "-o", "/proc/no/x.toml"]):
        called = hpo(*command)
        assert called.code in (1, 2)
        assert called.err.startswith("hpo: ")
        assert command[-1] in called.err
        assert len(called.err.splitlines()) == 1


def test_debugging_shows_the_traceback(hpo: Hpo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_DEBUG", "1")
    called = hpo("status", "x")
    assert called.code == 2
    assert "Traceback" in called.err
    assert "no study 'x'" in called.err.splitlines()[-1]


def test_list(hpo: Hpo, toy: Database) -> None:
    lines = hpo("list").out.splitlines()
    assert lines[0].split() == ["study", "state", "trials", "metric", "best", "workers", "created"]
    assert lines[1].split()[:4] == ["toy", "finished", "3/3", "val_top1"]
    assert lines[2].split()[:3] == ["open", "waiting", "0/3"]


def test_list_without_studies(hpo: Hpo) -> None:
    called = hpo("list")
    assert called.code == 0
    assert "hpo run STUDY.toml" in called.out
    assert here() == []


def test_status(hpo: Hpo, toy: Database) -> None:
    text = hpo("status", "toy").out
    assert "3/3 trials" in text
    assert "3 complete" in text
    told = json.loads(hpo("status", "toy", "--json").out)
    assert (told["finished"], told["budget"], told["state"]) == (3, 3, "finished")


def test_watching_a_finished_study_ends(hpo: Hpo, toy: Database) -> None:
    done = hpo("status", "toy", "--watch")
    assert done.code == 0
    assert "toy is finished: best val_top1" in done.out
    assert "hpo export toy" in done.out


def test_trials_agree_in_all_formats(hpo: Hpo, toy: Database) -> None:
    told = json.loads(hpo("trials", "toy", "--format", "json").out)
    rows = list(csv.DictReader(hpo("trials", "toy", "--format", "csv").out.splitlines()))
    assert [one["number"] for one in told] == [0, 1, 2] == [int(row["number"]) for row in rows]
    for one, row in zip(told, rows, strict=True):
        assert float(row["val_top1"]) == one["value"] == one["params"]["optimizer.lr"]
        assert float(row["optimizer.lr"]) == one["params"]["optimizer.lr"]
        assert len(one["epochs"]) == int(row["epochs"]) == 2
    table = [line.split() for line in hpo("trials", "toy").out.splitlines()]
    assert table[0] == ["trial", "state", "epochs", "val_top1", "time", "lr"]
    best_first = sorted(told, key=lambda one: -one["value"])
    assert [line[:3] for line in table[1:4]] == [
        [str(one["number"]), "complete", "2"] for one in best_first
    ]
    assert table[4] == ["1", "more", "column:", "--wide"], "all were sampled"
    wide = [line.split() for line in hpo("trials", "toy", "--wide").out.splitlines()]
    assert "origin" in wide[0]
    assert wide[4] == []


def test_one_trial(hpo: Hpo, toy: Database) -> None:
    text = hpo("trial", "toy", 1).out
    assert "toy trial 1  complete" in text
    assert "optimizer.lr" in text
    assert "w-1" in text
    assert "val_top1  ▁▁" in text
    called = hpo("trial", "toy", 7)
    assert called.code == 2
    assert "0 to 2" in called.err


def test_logs(hpo: Hpo, toy: Database) -> None:
    assert hpo("logs", "toy").code == 2
    folder = Home.default().study(studies.load(toy, "toy").uuid).logs
    folder.mkdir(parents=True)
    (folder / "w-1.log").write_text("one\ntwo\n")
    assert hpo("logs", "toy").out == "one\ntwo\n"
    assert hpo("logs", "toy", "-f").out == "one\ntwo\n"
    (folder / "w-2.log").write_text("three\n")
    assert sorted(hpo("logs", "toy").out.splitlines()) == [
        *("w-1 | one", "w-1 | two", "w-2 | three")
    ]
    assert hpo("logs", "toy", "--worker", "w-2").out == "three\n"
    called = hpo("logs", "toy", "--worker", "w-3")
    assert called.code == 2
    assert "w-1, w-2" in called.err


def test_a_log_line_is_shown_once_it_is_whole() -> None:
    log = b"one\ntw"
    tail = Tail(lambda seen: {"w": log[seen.get("w", 0) :]})
    assert list(tail.fresh()) == ["one"]
    log = b"one\ntwo\n"
    assert list(tail.fresh()) == ["two"]
    assert list(tail.fresh()) == []


def test_enqueue(hpo: Hpo, toy: Database) -> None:
    assert hpo("enqueue", "open", "optimizer.lr=0.05").code == 0
    called = hpo("enqueue", "open", "optimizer.lr=5.0")
    assert called.code == 2
    assert "optimizer.lr" in called.err
    assert "extend" in hpo("enqueue", "toy", "optimizer.lr=0.05").err


def test_stop_and_resume(hpo: Hpo, toy: Database) -> None:
    assert "hpo resume open" in hpo("stop", "open").out
    assert "stopped" in hpo("status", "open").out
    assert "hpo worker open" in hpo("resume", "open").out
    assert "waiting" in hpo("status", "open").out


def test_extend(hpo: Hpo, toy: Database) -> None:
    assert "toy: 5 trials" in hpo("extend", "toy", "--trials", "5").out
    assert "toy: 7 trials" in hpo("extend", "toy", "--trials", "+2").out
    for args in ([], ["--trials", "7"], ["--trials", "many"], ["--trials", "+0"]):
        assert hpo("extend", "toy", *args).code == 2


def test_delete_asks_first(hpo: Hpo, toy: Database) -> None:
    called = hpo("delete", "toy")
    assert called.code == 2
    assert "--yes" in called.err
    assert hpo("delete", "toy", "--yes").code == 0
    assert "toy" not in hpo("list").out


@pytest.mark.usefixtures("toy")
def test_a_question_is_no_part_of_the_result(hpo: Hpo, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = io.StringIO("n\ny\n")
    monkeypatch.setattr(answer, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", answer)
    called = hpo("delete", "toy", "--json")
    assert (called.code, called.out) == (1, "")
    assert "Delete toy with 3 finished trials?" in called.err
    assert json.loads(hpo("delete", "toy", "--json").out)["deleted"] == "toy"


def test_delete_spares_a_study_at_work(hpo: Hpo, toy: Database) -> None:
    study = studies.load(toy, "open")
    storage = FencedStorage(toy)
    worker = Worker(study, storage, Interrupting(), home=Home.default(), worker_id="w-2")
    worker._fill(study.snapshot())
    assert leases.claim(toy, study.uuid, study.snapshot().free[0], "w-2") is not None
    called = hpo("delete", "open", "--yes")
    assert called.code == 2
    assert "w-2" in called.err
    assert hpo("delete", "open", "--yes", "--force").code == 0


class Interrupting:
    """Trials that a signal ends at once."""

    def run(self, taken: object, control: object) -> None:
        raise Interrupted("stopped")

    def drain(self, taken: object, reason: str, control: object) -> None:
        raise Interrupted("stopped")


def test_export_and_report(hpo: Hpo, toy: Database) -> None:
    assert "toy.best.toml" in hpo("export", "toy").out
    assert "exists" in hpo("export", "toy").err
    assert hpo("export", "toy", "--force").code == 0
    assert hpo("export", "toy", "--top", 2).code == 0
    assert len(list(Path("toy.top").glob("*.toml"))) == 2
    assert hpo("export", "toy", "--top", 2, "--trial", 1).code == 2
    assert hpo("report", "toy", "-o", "page.html").code == 0
    assert "<html" in Path("page.html").read_text()[:1000]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (("failed", "failed"), 1),
        (("pruned", "pruned"), 1),
        (("diverged", "diverged"), 1),
        (("failed", "pruned"), 1),
        (("complete", "failed"), 0),
    ],
)
@pytest.mark.parametrize("flag", ["--quiet", "--plain"])
def test_the_exit_code_says_whether_there_is_a_best_trial(
    hpo: Hpo, outcomes: tuple[str, ...], expected: int, flag: str
) -> None:
    """Of a study that was finished before as well."""
    file = study_file(trials=2)
    Path("hpo_runs").mkdir()
    fill(connect(Home.default().storage), file, [Trial(one, (0.5,), "why") for one in outcomes])
    Path("toy.toml").write_text(file.text)
    called = hpo("run", "toy.toml", flag)
    assert called.code == expected
    assert "toy is finished" in called.out


def test_a_study_that_another_command_stops_ends_with_1(
    hpo: Hpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(study: PublicStudy, *_args: object, **_options: object) -> None:
        study.stop()

    monkeypatch.setattr("hpo.cli.search.work", stopped)
    Path("toy.toml").write_text(study_file(trials=2).text)
    called = hpo("run", "toy.toml")
    assert called.code == 1
    assert "To resume: hpo run toy.toml" in called.out


def test_quiet_is_quiet_about_a_probe(hpo: Hpo, monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(
        study: PublicStudy, *_: object, say: Callable[[str], None], **__: object
    ) -> list[str]:
        study.stop()
        say("probed")
        return ["cpu"]

    monkeypatch.setattr(PublicStudy, "devices", devices)
    monkeypatch.setattr("hpo.cli.search.work", lambda *_, **__: None)
    Path("toy.toml").write_text(study_file(trials=2).text)
    auto = ("run", "toy.toml", "--workers-per-device", "auto")
    assert "probed" not in hpo(*auto, "--quiet").out
    assert "probed" in hpo(*auto, "--plain").out


def test_a_finished_study_ends_at_once_with_its_result(hpo: Hpo, toy: Database) -> None:
    file = study_file(trials=3, name="toy")
    Path("toy.toml").write_text(file.text)
    called = hpo("run", "toy.toml")
    assert called.code == 0
    best = max(one["value"] for one in json.loads(hpo("trials", "toy", "--format", "json").out))
    for part in ("toy is finished", "3 trials finished: 3 complete", f"val_top1 {best:.4f}",
                 "optimizer.lr", "hpo export toy ", "hpo train toy.best.toml"):  # fmt: skip
        assert part in called.out, part


def test_another_definition_is_refused_with_its_difference(hpo: Hpo, toy: Database) -> None:
    Path("toy.toml").write_text(study_file(trials=3, name="toy").text)
    called = hpo("run", "toy.toml", "--set", "epochs=9")
    assert called.code == 2
    assert "train.epochs: 3 -> 9" in called.err


def test_commands_that_are_printed_reach_the_storage(
    hpo: Hpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = connect("sqlite:///other.db")
    assert options.storage_flag(connect(Home.default().storage)) == ""
    assert options.storage_flag(other).startswith(" --storage sqlite:///")
    monkeypatch.setenv("HPO_STORAGE", "sqlite:///other.db")
    assert options.storage_flag(other) == ""


def test_lines_on_a_terminal_break_between_words_and_beside_a_spinner() -> None:
    from hpo.cli.console import SafeConsole, tell

    for terminal, lines in ((True, ["decoding many", "images"]), (False, ["decoding many images"])):
        out = SafeConsole(file=io.StringIO(), force_terminal=terminal, width=16, color_system=None)
        tell(out, "decoding many images")
        assert [one.rstrip() for one in out.file.getvalue().splitlines()] == lines  # type: ignore[attr-defined]
    shown = SafeConsole(file=io.StringIO(), force_terminal=True, width=60)
    with options.working("reading", out=shown):
        tell(shown, "photos.toml written")
    assert "reading" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_init_writes_a_file_once(hpo: Hpo) -> None:
    from PIL import Image

    for name in ("cats", "dogs"):
        folder = Path("photos", name)
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 40), (i, 0, 0)).save(folder / f"{i}.png")
    assert "hpo run photos.toml" in hpo("init", "photos").out
    called = hpo("init", "photos")
    assert called.code == 2
    assert "--force" in called.err
    assert hpo("init", "photos", "--force").code == 0
    assert "did you mean 'photos'" in hpo("init", "phots").err
    Path("photos/cats/3.png").write_text("no image")
    assert "photos.toml was written; then:" in hpo("init", "photos", "--force").err
    Path("photos/cats/3.png").unlink()
    assert hpo("init", "nowhere").code == 2
    spaced = hpo("init", "photos", "-o", "my photos.toml")
    assert "hpo run 'my photos.toml'" in spaced.out
    text = Path("my photos.toml").read_text()
    assert 'name = "my-photos"' in text
    assert "#   hpo run 'my photos.toml'" in text
    files = [f"{name}/{i}.png,{name}\n" for name in ("cats", "dogs") for i in range(3)]
    Path("photos/labels.csv").write_text("file,label\n" + "".join(files))
    assert "hpo run labels.toml" in hpo("init", "photos/labels.csv").out
    assert 'dataset = "csv"' in Path("labels.toml").read_text()
    Path("photos/labels.csv").replace("photos/metadata.csv")
    assert hpo("init", "photos", "--force").code == 0
    assert 'dataset = "csv"' in Path("photos.toml").read_text()
    Path("photos/metadata.csv").replace("photos/labels.csv")
    found = hpo("check", "labels.toml", "--set", "data.image_size=16")
    assert (found.code, "train: 2 images (cats 1, dogs 1)" in found.out) == (0, True), found
    Path("photos/labels.csv").write_text("name\n")
    assert hpo("init", "photos/labels.csv", "--force").code == 2


def test_a_folder_whose_weights_cannot_be_had_begins_nothing(
    hpo: Hpo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("hpo.training.weights.urlopen", offline)
    make_folder(Path("photos"), {"train": 6, "val": 2}, size=(90, 80))
    found = hpo("run", "photos")
    assert found.code == 2
    assert found.err.count("unreachable (no network)") == 2
    assert "or go on without pretrained weights: --from-scratch" in found.err
    assert [path.name for path in Path().iterdir()] == ["photos"]
    found = hpo("init", "photos")
    assert (found.code, found.out.count("unreachable (no network)")) == (0, 2)
    assert "there is no test/: 15% of train/ are kept for the test" in found.out
    assert hpo("run", "photos.toml").err.count("unreachable (no network)") == 2
    assert not Path("hpo_runs").exists()
    assert "for a folder of images" in hpo("run", "photos.toml", "--quick").err


def test_the_file_of_a_folder_is_taken_again_unless_it_is_another(hpo: Hpo) -> None:
    told: list[str] = []
    make_folder(Path("photos"), {"train": 6}, size=(20, 20))
    quick = wished("10m", 4, True, False, "cpu")
    path = study_file_of(Path("photos"), quick, told.append)
    assert "trials = 4" in path.read_text()
    assert 'max_time = "10m"' in path.read_text()
    assert "photos.toml written" in told[0]
    path.write_text(path.read_text().replace("image_size = 20", "image_size = 16"))
    for wish in (quick, wished(None, None, False, False, None)):
        assert study_file_of(Path("photos"), wish, told.append) == path
    assert told[1:] == ["photos.toml is there and is used as it is"] * 2
    with pytest.raises(Conflict, match="was not written with --from-scratch"):
        study_file_of(Path("photos"), wished(None, None, False, True, None), told.append)
    make_folder(Path("other/photos"), {"train": 6}, size=(20, 20))
    with pytest.raises(Conflict, match=r"is not of other/photos: .* -o OTHER\.toml"):
        study_file_of(Path("other/photos"), quick, told.append)
    with pytest.raises(InputError, match="--time 'soon': allowed"):
        wished("soon", None, False, False, None)


def test_schema_is_json(hpo: Hpo) -> None:
    assert json.loads(hpo("schema").out)["title"] == "hpo study file"


@pytest.mark.parametrize(
    "args", [["train", "x.toml"], ["evaluate", "x"], ["predict", "x", "y.png"], ["check", "x.toml"]]
)
def test_missing_files_are_named(hpo: Hpo, args: list[str]) -> None:
    called = hpo(*args)
    assert called.code == 2
    assert "x" in called.err
    assert here() == []


def test_two_configurations_of_one_name_are_refused(hpo: Hpo) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "best.toml").write_text('data.dataset = "digits"\n')
    called = hpo("train", "a/best.toml", "b/best.toml")
    assert called.code == 2
    assert "rename one" in called.err
    assert here() == ["a", "b"]


def test_several_configurations_are_no_choice_by_the_test(
    hpo: Hpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpo.cli.training._train", lambda *_, **__: None)
    for name in ("a", "b"):
        text = 'data.dataset = "digits"\n[provenance]\nstudy = "toy"\n'
        Path(f"{name}.toml").write_text(text)
    called = hpo("train", "a.toml", "b.toml")
    assert "is to choose on the test set" in called.err
    assert "hpo verify toy, then hpo export toy" in called.err
    assert hpo("train", "a.toml").err == ""


def test_a_verification_is_shown_and_outlives_its_study(hpo: Hpo, toy: Database) -> None:
    child = PublicStudy("toy", toy).verification_study(2, 2)
    assert "verifies toy" in hpo("status", child.name).out
    assert "hpo verify toy" in hpo("extend", child.name, "--trials", 9).err
    assert "--seeds 1" in hpo("verify", "toy", "--seeds", 1).err
    assert f"hpo delete {child.name}" in hpo("delete", "toy", "--yes").out


def test_an_unknown_quantisation_is_refused_before_anything_is_written(hpo: Hpo) -> None:
    Path("best.toml").write_text('data.dataset = "digits"\n')
    called = hpo("train", "best.toml", "--quantize", "dinamic", "--device", "cpu")
    assert called.code == 2
    assert "--quantize dinamic: did you mean 'dynamic'?" in called.err
    assert here() == ["best.toml"]


@pytest.mark.slow
def test_run_searches_and_says_what_came_out(hpo: Hpo) -> None:
    Path("toy.toml").write_text(STUDY)
    done = subprocess.run(
        [sys.executable, "-m", "hpo", "run", "toy.toml", "--device", "cpu", "--workers", "1"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == "starting 1 worker: loading torch, reading the images"
    data, lines = rest[:3], rest[3:]
    assert [line.partition(":")[0] for line in data] == ["train", "val", "test"]
    assert lines.pop(0) == "tried first:"
    assert lines.pop(0).startswith("  recommended: ")
    assert lines[0].startswith("toy: 0/2 trials; 1 worker on cpu; sqlite:///")
    assert lines[1] == "pruner none: every trial runs to its end"
    assert lines[2].startswith("tpe draws all 2 trials at random")
    trials = [line.partition("  ")[0] for line in lines if line.startswith("[")]
    assert trials == ["[1/2] trial 0 complete", "[2/2] trial 1 complete"]
    assert "2 trials finished: 2 complete" in done.stdout
    assert "python -m hpo export toy" in done.stdout
    assert "trial 1: complete" in hpo("logs", "toy").out


@pytest.mark.process
def test_a_signal_hands_back_and_says_how_to_go_on(hpo: Hpo) -> None:
    told = Path("told.json")
    Path("toy.toml").write_text(STUDY.replace("trials = 2", "trials = 1000"))
    with subprocess.Popen(
        [sys.executable, "-m", "hpo", "run", "toy.toml", "--device", "cpu", "--workers", "1",
         "--set", "study.seed=3", "--notify", f"cp /dev/stdin {told}"],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if "complete" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(timeout=120) == 130
    again = "toy.toml --set study.seed=3 --workers 1 --device cpu"
    assert f"To resume: python -m hpo run {again}\n" in rest
    assert json.loads(told.read_text())["state"] == "stopped"
    states = {one["state"] for one in json.loads(hpo("trials", "toy", "--format", "json").out)}
    assert "running" not in states


def test_a_reader_that_leaves_is_no_fault(hpo: Hpo, toy: Database) -> None:
    command = f"{sys.executable} -m hpo trials toy --format json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "["
    assert "Traceback" not in done.stderr
