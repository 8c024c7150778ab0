"""Images whose labels stand in a CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpo.config.data import DataConfig
from hpo.config.study import parse_study
from hpo.config.template import starter_file
from hpo.config.train import TrainConfig
from hpo.data.csv_labels import has_metadata, list_csv, read_rows, summarize_csv
from hpo.data.dataset import describe, open_data, open_test
from hpo.errors import ConfigError, DataError
from hpo.paths import Home
from hpo.storage.database import Database
from hpo.trained.dry_run import check
from hpo.trained.inference import evaluate_run
from tests.harness.images import make_folder
from tests.harness.trained import tiny_config, train_run
from tests.unit.test_objective import search

FILES = [f"class{label}/{i:04}.png" for label in range(3) for i in range(8)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", count=8)


def write(root: Path, *lines: str, name: str = "labels.csv", encoding: str = "utf-8") -> Path:
    path = root / name
    path.write_bytes("\n".join([*lines, ""]).encode(encoding))
    return path


def listed(root: Path, more: str = "", header: str = "file,label") -> Path:
    """Every image with the name of its folder, as `class0`; `more` has what follows on each line,
    {i} being its number."""
    lines = [f"{file},{file[:6]}{more.format(i=i)}" for i, file in enumerate(FILES)]
    return write(root, header, *lines)


def config(labels: Path, **values: Any) -> DataConfig:
    return DataConfig(**{"dataset": "csv", "labels": str(labels), "image_size": 12, **values})


def test_a_csv_of_a_folder_is_that_folder(root: Path, tmp_path: Path) -> None:
    data = open_data(config(listed(root)), tmp_path / "cache")
    folder = DataConfig(dataset="folder", root=str(root), image_size=12)
    same = open_data(folder, tmp_path / "cache")
    assert data.fingerprint == same.fingerprint
    assert (data.classes, data.train.names) == (same.classes, same.train.names)
    assert data.warnings == ()
    elsewhere = write(tmp_path, *(root / "labels.csv").read_text().split())
    there = open_data(config(elsewhere, root=str(root)), tmp_path / "cache")
    assert there.fingerprint == same.fingerprint


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom"])
def test_forms_of_the_file(root: Path, delimiter: str, encoding: str) -> None:
    lines = [["Note", " LABEL ", "File"], *([f'"é{delimiter} ""x"', "é", f] for f in FILES[:5]),
             *(["", "b ", f".\\{f}".replace("/", "\\")] for f in FILES[5:9])]  # fmt: skip
    lines[1][0] = f'"two\nlines{delimiter} "'
    for line in lines[2:6]:
        line[0] = '"a ""quoted"" word"'
    text = "\r\n".join(delimiter.join(line) for line in [*lines[:4], [""], *lines[4:]])
    data = text.encode("utf-16-le" if encoding == "utf-16-le-bom" else encoding)
    path = root / "x.csv"
    path.write_bytes(b"\xff\xfe" * (encoding == "utf-16-le-bom") + data)
    rows = read_rows(path)
    assert [(row.file, row.label) for row in rows] == [
        *((f, "é") for f in FILES[:5]),
        *((f, "b") for f in FILES[5:9]),
    ]
    assert [row.line for row in rows][:4] == [3, 4, 5, 7]


BAD: dict[str, tuple[list[str], str]] = {
    "no columns": (["photo,kind", "a,b"], "must name the columns file and label .*has photo, ki"),
    "no header": (["class0/0000.png,a"], "must name the columns file and label"),
    "empty": ([], "must name the columns file and label .* it has none"),
    "no rows": (["file,label"], "no rows below the header"),
    "two of one": (["file,label,Label", "a,b,c"], "2 columns are called label"),
    "two names": (["file,file_name,label", "a,b,c"], "2 columns are called file"),
    "two files": (["image,path,label", "a,b,c"], "image and path may each be the column file"),
    "two labels": (["file,target,class", "a,b,c"], "target and class may each be the column label"),
    "short row": (
        ["file,label", "class0/0000.png", "class0/0001.png,a"],
        r"rows without the 2 values of the header: line 2 \(1 values\)",
    ),
    "long row": (["file,label", "a, b.png,x"], r"line 2 \(3 values\); a value with ',' in it"),
    "no label": (["file,label", "class0/0000.png,", "class0/0001.png,  "],
                 r"2 rows cannot be used:\n  no label: line 2 \(class0/0000\.png\), line 3"),
    "no file": (["file,label", ",a"], "no file: line 2"),
    "absolute": (["file,label", "/etc/passwd,a", "C:\\x.png,a", "\\\\host\\x.png,b"],
                 r"an absolute path.*: line 2 \(/etc/passwd\), line 3 \(C:.*, line 4"),
    "outside": (["file,label", "../x.png,a", "a/../../x.png,b", "..\\x.png,b"],
                r"a path that leaves the root: line 2 \(\.\./x\.png\), line 3 .*line 4"),
    "split": (["file,label,split", "class0/0000.png,a,holdout"],
              r"an unknown split \(allowed: train, val, test.*: line 2 \(holdout\)"),
    "several": (["file,label", ",a", "/x,b", "class0/0000.png,"], "3 rows cannot be used:"),
    "missing": (["file,label", "class0/0000.png,a", "class0/nought.png,b", "class1,b"],
                r"2 files missing in .*: line 3 \(class0/nought\.png\), line 4 \(class1\); add"),
    "none there": (["file,label", "x/0.png,a", "x/1.png,b"],
                   r"none of its 2 files exists: .*paths are below .*data\.root"),
    "another label": (
        ["file,label", "class0/0000.png,a", "./class0/0000.png,b"],
        r"the label, split or group .* earlier row: line 3 \(class0/0000\.png, as in line 2\)",
    ),
    "another split": (["file,label,split", "class0/0000.png,a,train", "class0/0000.png,a,test"],
                      "the label, split or group of a file"),
    "one class": (["file,label", "class0/0000.png,a", "class0/0001.png,a"], "only one class"),
    "no train": (["file,label,split", "class0/0000.png,a,test", "class1/0001.png,b,val"],
                 "no row belongs to train"),
    "unknown class": (["file,label,split", "class0/0000.png,a,", "class0/0001.png,b,",
                       "class0/0002.png,c,test"],
                      "labels of test that do not occur in train: line 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_named(root: Path, case: str) -> None:
    lines, message = BAD[case]
    labels = write(root, *lines)
    with pytest.raises(DataError, match=message) as caught:
        describe(config(labels))
    assert str(caught.value).startswith(str(labels))


def test_other_encodings_and_files_are_refused(root: Path) -> None:
    labels = write(root, "file,label", "a.png,x", "b.png,café", encoding="latin-1")
    with pytest.raises(
        DataError, match=r"neither UTF-8 nor UTF-16 .* \(line 3\); save it as UTF-8"
    ):
        describe(config(labels))
    with pytest.raises(DataError, match=r"nought\.csv: No such file .*set data\.labels"):
        describe(config(root / "nought.csv"))
    with pytest.raises(DataError, match=r"no metadata\.csv in it"):
        describe(config(root))
    (root / "big.csv").write_text("file,label\n" + "x" * 200_000 + ",a\n")
    with pytest.raises(DataError, match="not a CSV file: field larger"):
        describe(config(root / "big.csv"))
    (root / "wide.csv").write_bytes("file,label\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"neither UTF-8 nor UTF-16 .* \(line 1\)"):
        describe(config(root / "wide.csv"))
    write(root, "file,label", f"{'x' * 300}.png,a", f"{'y/' * 3000}z,b", f"{FILES[0]},c")
    with pytest.raises(DataError, match="2 files missing in"):
        describe(config(root / "labels.csv"))
    (root / "image.csv").write_bytes((root / FILES[0]).read_bytes())
    with pytest.raises(DataError, match="neither UTF-8 nor UTF-16"):
        describe(config(root / "image.csv"))


def test_files_that_are_missing_may_be_left_out(root: Path, tmp_path: Path) -> None:
    labels = listed(root)
    (root / FILES[1]).unlink()
    (root / FILES[9]).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 file missing in .*line 3 \(class0/0001\.png\)"):
        open_data(config(labels), tmp_path / "cache")
    data = open_data(config(labels, skip_unreadable=True), tmp_path / "cache")
    told = f"1 file of labels.csv missing, left out: line 3 ({FILES[1]})"
    assert data.warnings == (told,)
    assert any(FILES[9] in one for one in data.unreadable)


def test_names_in_the_other_form_of_unicode(root: Path) -> None:
    """A Mac writes e and its accent apart."""
    (root / FILES[0]).rename(root / "cafe\u0301.png")
    (root / FILES[1]).rename(root / "th\u00e9.png")
    rows = ["caf\u00e9.png,a", "the\u0301.png,b"]
    listing = list_csv(write(root, "file,label", *rows), root)
    assert [name for name, _ in listing.parts["all"]] == ["cafe\u0301.png", "th\u00e9.png"]


def test_rows_that_repeat_another_count_once(root: Path, tmp_path: Path) -> None:
    labels = listed(root)
    with labels.open("a") as file:
        file.write(f"{FILES[0]},class0\n./{FILES[0]},class0\n")
    data = open_data(config(labels), tmp_path / "cache")
    (told,) = data.warnings
    assert told.startswith("2 rows of labels.csv repeating a file: line 26 (class0/0000.png, as in")
    assert sum(map(sum, (c.values() for c in describe(config(labels)).values()))) == len(FILES)


def test_splits_may_be_given_in_part(root: Path, tmp_path: Path) -> None:
    def split(row: int) -> str:
        return ["", "Test", "", "train"][row % 4]

    labels = write(root, "file,label,split", *(f"{f},{f[:6]},{split(i)}"
                                               for i, f in enumerate(FILES)))  # fmt: skip
    test = open_test(config(labels), tmp_path / "cache")
    assert test is not None
    assert test.names == tuple(sorted(FILES[1::4], key=test.names.index))
    data = open_data(config(labels), tmp_path / "cache")
    assert sorted(data.train.names + data.val.names) == sorted({*FILES} - {*FILES[1::4]})
    assert data.warnings == ("12 rows of labels.csv without a split: assigned to train",)
    given = write(root, "file,label,split", *(f"{f},{f[:6]},{'VALID' if i % 2 else 'train'}"
                                              for i, f in enumerate(FILES)))  # fmt: skip
    assert sorted(open_data(config(given), tmp_path / "cache").val.names) == sorted(FILES[1::2])


def test_a_column_of_groups_is_kept_together(root: Path, tmp_path: Path) -> None:
    labels = write(root, "file,label,group", *(f"{f},{f[:6]},{'' if i % 8 == 7 else f'g{i % 4}'}"
                                               for i, f in enumerate(FILES)))  # fmt: skip
    data = open_data(config(labels, val_fraction=0.25, test_fraction=0.25), tmp_path / "cache")
    test = open_test(config(labels, val_fraction=0.25, test_fraction=0.25), tmp_path / "cache")
    assert test is not None
    seen = [{FILES.index(name) % 4 for name in images.names if FILES.index(name) % 8 != 7}
            for images in (data.train, data.val, test)]  # fmt: skip
    assert sum(map(len, seen)) == len(set().union(*seen)) == 4
    folder = open_data(config(listed(root), group_by=r"regex:\d{4}"), tmp_path / "cache")
    numbers = [{name[-8:] for name in images.names} for images in (folder.train, folder.val)]
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["007", "7", "10"], ("007", "7", "10")),
        (["b", "a", "C"], ("C", "a", "b")),
        (["cafe\u0301", "caf\u00e9", "x"], ("caf\u00e9", "x")),
    ],
)
def test_the_order_of_the_classes(root: Path, labels: list[str], order: tuple[str, ...]) -> None:
    rows = [f"{file},{labels[i % 3]}" for i, file in enumerate(FILES)]
    assert list_csv(write(root, "file,label", *rows), root).classes == order


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": "csv"}, r"data\.labels: none: dataset = \"csv\" needs the file"),
        ({"dataset": "folder", "root": "x", "labels": "y.csv"}, "only with dataset = .csv."),
        ({"labels": "y.csv"}, "only with dataset = .csv."),
    ],
)
def test_labels_belong_to_a_csv(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.parse({"data": values})


def test_the_data_are_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = """[study]
name = "toy"
trials = 1
[train.data]
dataset = "csv"
labels = "here/labels.csv"
[space]
optimizer.lr = [0.1]
"""
    data = parse_study(text, "toy.toml").config({"optimizer.lr": 0.1}).data
    assert (data.labels, data.root) == (str(tmp_path / "here/labels.csv"), None)
    assert (data.folder, data.title) == (str(tmp_path / "here"), data.labels)


@pytest.mark.parametrize("header", ["file_name,class", "Image,Target", "path,label,class"])
def test_other_names_of_the_columns(root: Path, tmp_path: Path, header: str) -> None:
    more = ",x" * (header.count(",") - 1)  # a column of the exact name is the one
    same = open_data(config(listed(root, more, header)), tmp_path / "cache")
    assert same.fingerprint == open_data(config(listed(root)), tmp_path / "cache").fingerprint


def flatten(part: Path) -> None:
    """Move the images of a split out of their class folders, beside a metadata.csv."""
    rows = []
    for image in sorted(part.glob("*/*.png")):
        label, name = image.parent.name, f"{image.parent.name}-{image.name}"
        rows.append(f"{name},{label}")
        image.rename(part / name)
    for folder in part.glob("*/"):
        folder.rmdir()
    write(part, "file_name,label", *rows, name="metadata.csv")


def test_hugging_faces_image_folders(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "hf", {"train": 4, "validation": 3, "test": 2})
    as_folder = DataConfig(dataset="folder", root=str(root), image_size=12)
    folders = open_data(as_folder, tmp_path / "cache")
    for part in root.iterdir():
        flatten(part)
    own = config(root)
    assert (own.folder, own.title) == (str(root), str(root))
    data, test = open_data(own, tmp_path / "cache"), open_test(own, tmp_path / "cache")
    assert (len(data.train), len(data.val)) == (len(folders.train), len(folders.val)) == (12, 9)
    assert test is not None
    assert len(test) == 6
    assert "train/class0-0000.png" in data.train.names
    text = starter_file(root, summarize_csv(root))
    found = parse_study(text, "hf.toml").config({}).data
    assert (found.dataset, found.labels) == ("csv", str(root))


def test_a_metadata_file_above_the_splits(root: Path) -> None:
    write(root, "file_name,text", f"{FILES[0]},a flower", name="metadata.csv")
    assert not has_metadata(root)  # captions: the classes are by folder
    write(root, "image,path,label", name="metadata.csv")
    with pytest.raises(DataError, match="may each be the column file"):
        has_metadata(root)
    (root / "metadata.csv").unlink()
    assert not has_metadata(root)
    with pytest.raises(DataError, match=r"no metadata\.csv in it or in its train/"):
        list_csv(root, root)
    make_folder(root, {"train": 1, "dev": 1})
    lines = [f"{part}/{label}/0000.png,{label}" for part in ("train", "dev")
             for label in ("class0", "class1")]  # fmt: skip
    write(root, "file_name,label", *lines, name="metadata.csv")
    assert has_metadata(root)
    parts = list_csv(root, root).parts
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 2, "val": 2}


def test_a_first_study_file_of_a_csv_works(
    root: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(root)
    monkeypatch.chdir(root)
    text = starter_file(Path("labels.csv"), summarize_csv(Path("labels.csv")))
    file = parse_study(text, "labels.toml")
    assert file.name == "labels"
    assert f"labels = '{root}/labels.csv'" in text or f'labels = "{root}/labels.csv"' in text
    small = text.replace('architecture = "resnet18"', 'architecture = "small_cnn"')
    found = check(parse_study(small.replace('stem = "small"', ""), "labels.toml"),
                  home=home, device="cpu", workers=1, threads=1)  # fmt: skip
    assert sum(found.data["train"].values()) == 18


def test_a_search_and_an_evaluation(root: Path, database: Database, home: Home) -> None:
    labels = listed(root)
    text = f"""
[study]
name = "toy"
trials = 2
pruner = "none"
[train]
epochs = 1
batch_size = 8
data = {{dataset = "csv", labels = "{labels}", image_size = 12, folds = 2}}
model.cnn.filters = [4]
[space]
optimizer.lr = [0.1, 0.01]
"""
    assert search(database, home, parse_study(text, "toy.toml")).count("complete") == 2
    values = {"data.dataset": "csv", "data.root": str(root), "data.labels": str(labels)}
    run = train_run(tiny_config(root, values), home.root / "out", home)
    tests = write(root, "file,label", *(f"{f},{f[:6]}" for f in FILES[:3]), name="few.csv")
    found = evaluate_run(run, data=tests, home=home, device="cpu", force=True)
    assert found.images == 3
    part = [f"{f},{f[:6]},{'test' if i % 2 else 'train'}" for i, f in enumerate(FILES)]
    some = write(root, "file,label,split", *part, name="some.csv")
    assert evaluate_run(run, data=some, home=home, device="cpu", force=True).images == 12
    strange = write(root, "file,label", f"{FILES[0]},dog", name="strange.csv")
    with pytest.raises(DataError, match="does not know the classes dog"):
        evaluate_run(run, data=strange, home=home, device="cpu")
    none = write(root, "file,label,split", f"{FILES[0]},class0,train", name="none.csv")
    with pytest.raises(DataError, match="no row belongs to test; remove the column split"):
        evaluate_run(run, data=none, home=home, device="cpu")
