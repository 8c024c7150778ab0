"""Files, names and rows made to do harm: each is refused in words, or harmless."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import sqlite3
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.text import Text
from torch import Tensor

from hpo.cli.console import SafeConsole, cell
from hpo.cli.tables import to_json, trials_csv
from hpo.config.data import DataConfig
from hpo.config.study import StudyFile, load_config, parse_study
from hpo.config.toml import parse_assignments
from hpo.data import user_code
from hpo.data.dataset import open_data
from hpo.errors import ConfigError, Damaged, DataError, InputError, StorageError
from hpo.formatting import printable
from hpo.paths import Home
from hpo.reports.study import study_report
from hpo.reports.training import training_report
from hpo.search import retention
from hpo.search import study as studies
from hpo.search.status import read_status
from hpo.search.sync import Checkpoints
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.leases import Lease
from hpo.trained.run import TrainedRun, load_run
from hpo.training.checkpoint import Checkpoint
from hpo.training.pretrained import read_file
from tests.harness.fakes import study_file
from tests.harness.filled import EVIL, Trial, fill, trained
from tests.harness.formats import make_cars
from tests.harness.images import make_folder
from tests.harness.trained import pictures, predict, tiny_config, train_run

TOUCHED = "touched"


class Code:
    """What a pickle may hold: a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What stands if somebody's code was run."""
    return tmp_path / TOUCHED


# Weights and checkpoints


def plain_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Code(mark)))


def in_a_checkpoint(path: Path, mark: Path) -> None:
    torch.save({"model": {}, "optimizer": Code(mark)}, path)


def in_a_checkpoint_of_the_old_format(path: Path, mark: Path) -> None:
    torch.save({"model": Code(mark)}, path, _use_new_zipfile_serialization=False)


def a_bomb(path: Path, mark: Path) -> None:
    """60 million numbers in some 200 kB."""
    torch.save({"w": torch.zeros(60_000_000)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 500_000


HARMFUL: list[Callable[[Path, Path], None]] = [
    *(plain_pickle, in_a_checkpoint, in_a_checkpoint_of_the_old_format, a_bomb)
]


@pytest.mark.parametrize("make", HARMFUL)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_are_read_without_running_code(
    tmp_path: Path, mark: Path, make: Callable[[Path, Path], None], name: str
) -> None:
    make(tmp_path / name, mark)
    with pytest.raises(DataError, match=r"holds code|compressed|cannot be read"):
        read_file(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("make", HARMFUL)
def test_so_is_a_checkpoint(tmp_path: Path, mark: Path, make: Callable[[Path, Path], None]) -> None:
    path = tmp_path / "epoch-1.ckpt"
    make(path, mark)
    with pytest.raises(Damaged, match=r"holds code|compressed"):
        Checkpoint.load(path)
    assert not mark.exists()


def test_a_pickle_does_harm_where_it_is_unpickled(tmp_path: Path, mark: Path) -> None:
    """Or these tests would show nothing."""
    plain_pickle(tmp_path / "w.pth", mark)
    pickle.loads((tmp_path / "w.pth").read_bytes())
    assert mark.is_dir()


def test_weights_of_a_trained_run(run_copy: TrainedRun, mark: Path) -> None:
    image = next(Path(str(run_copy.config.data.root)).rglob("*.png"))
    plain_pickle(run_copy.seeds[0].files.weights, mark)
    with pytest.raises(DataError, match=r"weights\.safetensors: cannot be read"):
        predict(load_run(run_copy.path), [image])
    assert not mark.exists()


# Pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A black picture of one bit a pixel; its rows are all zeros, so they pack a thousandfold."""
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    body = b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


PACKED = zlib.compress(bytes(100_000_000), 9)
BOMBS = {
    "pixels": lambda: png(12_000, 9_000),
    "a text": lambda: png(20, 20, chunk(b"zTXt", b"Comment\0\0" + PACKED)),
    "a profile": lambda: png(20, 20, chunk(b"iCCP", b"profile\0\0" + PACKED)),
    "an international text": lambda: png(20, 20, chunk(b"iTXt", b"a\0\1\0\0\0" + PACKED)),
}
MANY = r"12000 x 9000 pixels, data\.max_pixels allows 50000000|too large"


@pytest.mark.parametrize("kind", BOMBS)
def test_a_picture_that_grows(
    tmp_path: Path, home: Home, kind: str, trained_run: TrainedRun
) -> None:
    root = make_folder(tmp_path / "photos", count=6)
    content = BOMBS[kind]()
    assert len(content) < 250_000
    (root / "class0" / "bomb.png").write_bytes(content)
    config = DataConfig(dataset="folder", root=str(root), image_size=16)
    with pytest.raises(DataError, match=MANY) as caught:
        open_data(config, home.cache)
    assert "class0/bomb.png" in str(caught.value)
    without = open_data(config.model_copy(update={"skip_unreadable": True}), home.cache)
    assert [name.split(" ")[0] for name in without.unreadable] in (["class0/bomb.png"], [])
    (found,) = predict(trained_run, [root / "class0" / "bomb.png"])
    assert re.search(MANY, found.error or "")


def test_a_picture_that_grows_behind_its_box(tmp_path: Path, home: Home) -> None:
    """Of a car all pixels would be decoded to cut out its box."""
    root = make_cars(tmp_path / "cars")
    bomb = next((root / "stanford_cars" / "cars_train").iterdir())
    bomb.write_bytes(BOMBS["pixels"]())
    config = DataConfig(dataset="stanford_cars", root=str(root), image_size=16, crop_to_box=True)
    with pytest.raises(DataError, match=MANY) as caught:
        open_data(config, home.cache)
    assert bomb.name in str(caught.value)


def test_a_picture_that_grows_in_a_data_set_of_ones_own(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("bomb.png").write_bytes(BOMBS["pixels"]())
    Path("with_a_bomb.py").write_text(
        "import io\nfrom pathlib import Path\nfrom PIL import Image\n\n"
        "def load(root, split):\n"
        "    return [(Image.open(io.BytesIO(Path('bomb.png').read_bytes())), 0)]\n"
    )
    config = DataConfig(dataset="with_a_bomb:load", root=str(tmp_path), image_size=16)
    with pytest.raises(DataError, match=MANY):
        open_data(config, home.cache)


def test_a_document_that_runs_a_program_is_no_picture(tmp_path: Path, home: Home) -> None:
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    root = make_folder(tmp_path / "photos", count=6)
    Image.new("RGB", (20, 20)).save(root / "class0" / "x.eps")
    (root / "class0" / "x.eps").rename(root / "class0" / "x.jpg")
    config = DataConfig(dataset="folder", root=str(root), image_size=16)
    with pytest.raises(DataError, match=r"class0/x\.jpg \(not an image\)"):
        open_data(config, home.cache)


def test_links_in_a_folder_of_photographs(tmp_path: Path, home: Home) -> None:
    """They are followed, wherever they lead, to pictures alone; in circles and pipes never."""
    root = make_folder(tmp_path / "photos", count=6)
    outside = make_folder(tmp_path / "elsewhere", count=2, seed=1) / "class0"
    (root / "class0" / "linked").symlink_to(outside)
    (root / "class0" / "circle").symlink_to(root)
    (root / "class0" / "self").symlink_to(root / "class0")
    (root / "class0" / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(root / "class0" / "pipe.png")
    config = DataConfig(dataset="folder", root=str(root), image_size=16)
    data = open_data(config, home.cache)
    names = {*data.train.names, *data.val.names}
    assert all("circle" not in name and "self" not in name for name in names)
    assert not any(name.endswith(("endless.png", "pipe.png")) for name in names)
    assert any(name.startswith("class0/linked/") for name in names)
    secret = tmp_path / "secret"
    secret.write_text("password")
    (root / "class0" / "secret.png").symlink_to(secret)
    with pytest.raises(DataError, match=r"class0/secret\.png \(not an image\)") as caught:
        open_data(config, home.cache)
    assert "password" not in str(caught.value)


# Names

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp"


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "a/b", "..", ".hidden", "-rf", "--storage=x", "", " ", "a b", "a'b", 'a"b'),
        *("a;b", "a\n", "a\nb", "a\r", "a\0", "x" * 65, "x" * 10_000, ESCAPES, "<b>x</b>", "[x]"),
    ],
)
def test_a_study_name(name: str) -> None:
    text = f"[study]\nname = {json.dumps(name)}\n[space]\noptimizer.lr = [0.1, 0.2]"
    with pytest.raises(ConfigError, match=r"study\.name: .*allowed: 1 to 64 letters") as caught:
        parse_study(text, "x.toml")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["label", "reason"])
def test_escapes_are_shown_and_not_obeyed(kind: str) -> None:
    for console in (SafeConsole, Console):
        out = io.StringIO()
        console(file=out, force_terminal=True, width=200).print(Text(ESCAPES, "bold red"))
        harmless = "\x1b[2J" not in out.getvalue() and "\x9b" not in out.getvalue()
        assert harmless is (console is SafeConsole)  # else this test would show nothing
    assert printable(ESCAPES) == "\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\u202egnp"
    assert printable("tab\tand\nline, é, 日本, \u200d") == "tab\tand\nline, é, 日本, \u200d"
    assert "\x9b" not in to_json({kind: ESCAPES})
    assert json.loads(to_json({kind: "\x1b"})) == {kind: "\x1b"}


def test_a_reason_in_every_view(
    database: Database, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    from hpo.cli.main import main

    fill(database, study_file(trials=1), [Trial("failed", (), f"{ESCAPES}[red]{EVIL}")])
    for command in ("trial toy 0", "trials toy --format csv", "trials toy --format json",
                    "status toy", "list", "trials toy"):  # fmt: skip
        with pytest.raises(SystemExit):
            main([*command.split(), "--storage", url])
        said = capsys.readouterr()
        assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(said.out + said.err), command
    page = study_report(database, "toy")
    assert EVIL not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_class_folders_with_markup(tmp_path: Path, home: Home) -> None:
    """From folders on disk to the rendered page of a trained run, and to the terminal."""
    names = ["<b onclick=alert(1)>cat", '"><script>alert(2)<script>', "[red]dog" + ESCAPES]
    root = pictures(tmp_path)
    for part in ("train", "val", "test"):
        for number, name in enumerate(names):
            (root / part / f"class{number}").rename(root / part / name)
    run = train_run(tiny_config(root), tmp_path / "run", home, seeds=1)
    assert set(run.classes) == set(names)
    page = training_report(run)
    for name in names[:2]:
        assert name not in page
    assert "&lt;b onclick=alert(1)&gt;cat" in page
    assert "<script>alert" not in page


def test_figures_cannot_leave_their_script(tmp_path: Path) -> None:
    page = training_report(
        trained(tmp_path, classes=["cat", "</script><script>alert(1)</script>", "dog"])
    )
    assert "<script>alert" not in page


# TOML


def test_a_huge_study_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with path.open("wb") as file:
        for _ in range(50):
            file.write(b"# " + b"x" * 1_000_000 + b"\n")
    began = time.process_time()
    for load in (StudyFile.load, load_config):
        with pytest.raises(ConfigError, match="larger than 1,000,000 bytes: not a study file"):
            load(path)
    assert time.process_time() - began < 1


NESTED = {
    "arrays": "x = " + "[" * 50_000 + "]" * 50_000,
    "tables": "x = " + "{a = " * 20_000 + "1" + "}" * 20_000,
    "dots": "x" + ".a" * 100_000 + " = 1",
    "header": "[" + ".".join(["a"] * 100_000) + "]\nx = 1",
    "quoted dots": '[space]\n"' + ".".join(["a"] * 100_000) + '" = [1, 2]',
    "spaces": '[space]\n"' + ".".join(["a b"] * 100_000) + '" = [1, 2]',
    "few": "[space]\noptimizer.lr = [0.1, 0.2]\n[train]\ndata" + ".a" * 700 + " = 1",
    "options": "[space]\noptimizer.lr = [0.1, 0.2]\n[train]\nmodel.options" + ".a" * 700 + " = 1",
    "listed": "[space]\noptimizer.lr = [0.1, 0.2]\n[train]\nmodel.options.a = "
    + "[" * 400 + "]" * 400,
    "digits": "[train]\nepochs = 1" + "0" * 100_000 + "\n[space]\noptimizer.lr = [0.1, 0.2]",
}  # fmt: skip


@pytest.mark.parametrize("kind", NESTED)
def test_a_deeply_nested_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(NESTED[kind])
    for load in (StudyFile.load, load_config):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert len(str(caught.value)) < 1000
        assert str(path) in str(caught.value)


def test_a_deeply_nested_override(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[space]\noptimizer.lr = [0.1, 0.2]")
    for item in ("x" + ".a" * 100_000 + "=1", "epochs=" + "[" * 100_000, "epochs=1" + "0" * 9999):
        with pytest.raises(ConfigError) as caught:
            StudyFile.load(path, parse_assignments([item]))
        assert len(str(caught.value)) < 1000


# Spreadsheets


@pytest.mark.parametrize("first", "=+-@\t\r")
def test_a_formula_in_a_csv(database: Database, first: str) -> None:
    formula = f'{first}HYPERLINK("http://x")'
    fill(database, study_file(trials=1), [Trial("failed", (), formula)])
    text = trials_csv(read_status(database, "toy"))
    shown = printable(formula).replace('"', '""')
    assert (f"'{shown}" if first != "\r" else f"\\r{shown[2:]}") in text
    assert f",{first}" not in text.replace(",-", "") or first == "-"
    assert cell(-0.5) == "-0.5"  # a number stays one


# The database


def change(database: Database, table: str, column: str, value: str) -> None:
    """As somebody would who may write the database."""
    with sqlite3.connect(
        str(database.url.database)
    ) as connection:  # foreign keys are not looked at
        connection.execute(f"UPDATE {table} SET {column} = ?", [value])
    connection.close()


@pytest.mark.parametrize("bad", ["../../../../victim", "/victim", "x/../../../../victim", "."])
def test_a_row_leads_to_no_file_outside(
    database: Database, tmp_path: Path, home: Home, bad: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    study = fill(database, study_file(trials=1), [Trial("complete", (0.5,))])
    change(database, "hpo_epochs", "checkpoint", bad)
    (row,) = records.read_epochs(database, study.uuid)[0]
    lease = Lease(study.uuid, 1, 0, 2, "token", "w", 30.0)
    checkpoints = Checkpoints(study.directory(home), None, lease)
    with pytest.raises(StorageError, match="somebody changed it"):
        checkpoints.newest([row], lambda path, rows: None)
    change(database, "hpo_attempts", "number", bad)
    retention.apply_retention(study, home)
    change(database, "hpo_studies", "uuid", bad)
    with pytest.raises(StorageError, match="somebody changed it"):
        studies.delete(studies.load(database, "toy"), home, force=True)
    assert (victim / "file").read_text() == "precious"
    assert not home.root.exists()
    assert records.find_study(database, "toy") is not None  # nothing of it was begun


# Runs and modules


TAMPERED = {
    "run.json": ["{", "[]", "{}", '"x"', "[" * 100_000, '{"classes": 3}', "\x00", b"\xe9"],
    "seed-0/metrics.json": ["", "[]", "{}", '{"test": 3, "val": null}', "[" * 100_000],
    "config.toml": ["x = [", "x" * 2_000_000, "epochs = 'many'"],
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_run_that_somebody_edited(run_copy: TrainedRun, name: str) -> None:
    run_folder = run_copy.path
    original = (run_folder / name).read_bytes()
    for content in TAMPERED[name]:
        data = content if isinstance(content, bytes) else content.encode()
        (run_folder / name).write_bytes(data)
        with pytest.raises(InputError, match=name.rpartition("/")[2]):
            load_run(run_folder)
    (run_folder / name).write_bytes(original)
    load_run(run_folder)


@pytest.mark.parametrize(
    "name",
    [
        *("os:system", "subprocess:Popen", "builtins:exec", "shutil:rmtree", "posix:system"),
        *("torch.hub:load", "torchvision.models:resnet18", "torch:load", "sys:exit", "pip:main"),
        *("importlib.metadata:version", "antigravity:geohash", "__main__:main"),
    ],
)
def test_a_module_from_elsewhere_is_never_imported(
    run_copy: TrainedRun, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the packages themselves lie under the working directory, as in .venv."""
    monkeypatch.chdir(Path(sys.prefix).parent)
    before = set(sys.modules)
    with pytest.raises(ImportError, match=r"there is no .*\.py, and no folder"):
        user_code.find(name)
    assert set(sys.modules) - before == set()
    config = run_copy.files.config
    old = 'architecture = "small_cnn"'
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, f'architecture = "{name}"'))
    image = next(Path(str(run_copy.config.data.root)).rglob("*.png"))
    with pytest.raises(ConfigError, match="looked for in the working directory"):
        predict(load_run(run_copy.path), [image])


def test_a_data_set_from_elsewhere_is_never_imported(tmp_path: Path, home: Home) -> None:
    """`os.rename(root, "train")` would move the folder away."""
    root = make_folder(tmp_path / "photos", count=6)
    for name in ("os:rename", "shutil:move", "os:symlink"):
        with pytest.raises(DataError, match="cannot be imported"):
            open_data(DataConfig(dataset=name, root=str(root), image_size=16), home.cache)
    assert root.is_dir()


def test_a_module_of_ones_own_is_found_but_hides_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("mine_alone", "antigravity"):
        (tmp_path / f"{name}.py").write_text("def build(): return 3")
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "nets.py").write_text("def build(): return 4")
    assert user_code.find("mine_alone:build")() == 3
    assert user_code.find("a_package.nets:build")() == 4
    with pytest.raises(ImportError, match="also the name of an installed module; rename yours"):
        user_code.find("antigravity:build")
    shutil.rmtree(tmp_path / "a_package")


def test_a_tensor_is_a_tensor(tmp_path: Path) -> None:
    """What is harmless is read."""
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pth")
    found: dict[str, Tensor] = read_file(tmp_path / "w.pth")
    assert torch.equal(found["w"], torch.ones(3))
