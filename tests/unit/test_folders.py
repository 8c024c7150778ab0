"""What folders mean: parts, classes, and what is left out, told or refused."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hpo.config.data import DataConfig
from hpo.data import images
from hpo.data.dataset import describe
from hpo.data.folders import EXTENSIONS, folder_to_test, list_folder, parse_part, summarize_folder
from hpo.errors import DataError

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def make(root: Path, *folders: str, count: int = 4) -> Path:
    """`root` with images in `folders`, each of one colour of its own."""
    for i, name in enumerate(folders):
        (root / name).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            colour = (40 * i % 256, 60 * n % 256, i + n)
            Image.new("RGB", (6, 6), colour).save(root / name / f"{n:03}.png")
    return root


def counts(root: Path) -> dict[str, dict[str, int]]:
    return describe(DataConfig(dataset="folder", root=str(root), image_size=8))


# Parts


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ("Training Testing", "train test"),
        ("train tests", "train test"),
        ("TRAIN eval tests", "train val test"),
        ("train dev test", "train val test"),
        ("training_set test_set", "train test"),
        ("train-images Val-Images", "train val"),
        ("Train Valid TEST", "train val test"),
        ("trainset valset testset", "train val test"),
    ],
)
def test_names_of_parts(tmp_path: Path, names: str, parts: str) -> None:
    make(tmp_path, *(f"{part}/{name}" for part in names.split() for name in ("a", "b")))
    listing = list_folder(tmp_path)
    assert listing.classes == ("a", "b")
    assert sorted(listing.parts) == sorted(parts.split())
    assert listing.warnings == []
    found = summarize_folder(tmp_path)
    assert (found.classes, found.images, set(found.parts)) == (2, 8, set(parts.split()))


@pytest.mark.parametrize("name", ["trainer", "contest", "images", "data", "set", "valley", "testy"])
def test_names_that_are_no_parts(name: str) -> None:
    assert parse_part(name) is None


def test_folders_that_hold_the_same_are_parts_and_refused(tmp_path: Path) -> None:
    make(tmp_path, "one/cat", "one/dog", "one/owl", "two/cat", "two/Dog")
    with pytest.raises(DataError, match=r"one/ and two/ hold the same folders \(cat/ and dog/\)"):
        list_folder(tmp_path)
    assert list_folder(tmp_path, grouped=True).classes == ("one", "two")
    make(tmp_path / "below", *(f"train/{name}" for name in ("one/x", "one/y", "two/x", "two/y")))
    assert list_folder(tmp_path / "below").classes == ("one", "two")


def test_groups_inside_classes_are_no_parts(tmp_path: Path) -> None:
    make(tmp_path, "cat/one", "cat/two", "dog/one", "dog/two")
    with pytest.raises(DataError, match="hold the same folders"):
        counts(tmp_path)
    config = DataConfig(dataset="folder", root=str(tmp_path), group_by="folder", test_fraction=0)
    assert describe(config)["train"].keys() == {"cat", "dog"}


def test_one_inner_folder_of_the_same_name_is_no_part(tmp_path: Path) -> None:
    make(tmp_path, "cat/images", "dog/images")
    assert list_folder(tmp_path).classes == ("cat", "dog")


def test_parts_inside_classes_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "cat/train", "cat/test", "dog/train", "dog/test")
    with pytest.raises(
        DataError, match=r"cat/ holds test/ and train/; parts must be above classes"
    ):
        list_folder(tmp_path)


@pytest.mark.parametrize("name", ["train", "test", "Val", "valid"])
def test_a_class_may_be_called_like_a_part(tmp_path: Path, name: str) -> None:
    make(tmp_path, "airplane", "bus", name)
    listing = list_folder(tmp_path)
    assert set(listing.classes) == {"airplane", "bus", name}
    assert listing.warnings == [
        f"{name}/ has no folders: treated as a class; a part needs one folder per class"
    ]
    assert summarize_folder(tmp_path).classes == 3
    assert folder_to_test(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_part_beside_classes_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path, "cat", "dog", f"{name}/cat", f"{name}/dog")
    with pytest.raises(DataError, match=rf"{name}/ beside cat/ and dog/, which means the {name} p"):
        list_folder(tmp_path)
    with pytest.raises(DataError, match=f"or rename {name}/ if it is a class"):
        summarize_folder(tmp_path)


def test_what_stands_beside_the_parts_is_told(tmp_path: Path) -> None:
    make(tmp_path, "train/a", "train/b", "airplane", "bus")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").touch()
    assert list_folder(tmp_path).warnings == [
        "airplane/ and bus/ beside train/ are not used; if train is a class, rename it"
    ]


def test_a_part_without_classes_says_what_it_holds(tmp_path: Path) -> None:
    make(tmp_path, "train/a", "train/b", "test")
    with pytest.raises(
        DataError, match=r"test: no folders of images; .*its 4 images have no class"
    ):
        list_folder(tmp_path)


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        (["train/train/a", "train/train/b"], "'train'; the folders a/ and b/ are too deep, in "
                                             "train/train/: move these up into train/"),
        (["photos/a", "photos/b"], "folders a/ and b/ are too deep, in photos/: set data.root to "),
        (["x/photos/train/a", "x/photos/train/b", "x/photos/test/a"],
         "folders test/ and train/ are too deep, in x/photos/: set data.root to "),
        (["photos/a", "photos/b", "__MACOSX/photos/a"], "too deep, in photos/"),
    ],
)  # fmt: skip
def test_one_level_too_deep(tmp_path: Path, folders: list[str], says: str) -> None:
    make(tmp_path, *folders)
    with pytest.raises(DataError) as caught:
        list_folder(tmp_path)
    assert says in str(caught.value)


# Names


def test_a_name_in_two_forms_of_unicode_is_one_class(tmp_path: Path) -> None:
    make(tmp_path, f"train/{NFD}", "train/red", f"test/{NFC}", "test/red")
    found = counts(tmp_path)
    assert found["test"] == {NFD: 4, "red": 4}
    make(tmp_path, f"train/{NFC}")
    with pytest.raises(DataError, match=r"two folders are called .*, in two forms of Unicode"):
        list_folder(tmp_path)


# What is left out


@pytest.mark.parametrize(
    "name",
    ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found", ".AppleDouble", "@Recycle",
     "System Volume Information", "#snapshot"],
)  # fmt: skip
@pytest.mark.parametrize("at", ["", "train", "train/a", "train/a/x"])
def test_what_a_nas_or_an_archive_leaves_is_not_there(tmp_path: Path, at: str, name: str) -> None:
    make(tmp_path, "train/a", "train/b")
    before = list_folder(tmp_path)
    make(tmp_path, f"{at}/{name}/0000.jpg")
    assert list_folder(tmp_path) == before


def test_all_extensions_are_of_formats_that_are_opened() -> None:
    Image.init()
    known = Image.registered_extensions()
    for one in EXTENSIONS - {"pjpeg", "pjp", "mpo"}:  # names of JPEG that Pillow does not list
        if f".{one}" in known:
            assert known[f".{one}"] in images.FORMATS, one


@pytest.mark.parametrize("name", ["x.jfif", "x.JPE", "x.avif", "x.jp2", "x.pbm", "x.pjpeg"])
def test_more_extensions_are_read(tmp_path: Path, name: str) -> None:
    make(tmp_path, "a", "b")
    extension = name.partition(".")[2].lower()
    saved = {"jfif": "jpeg", "jpe": "jpeg", "pjpeg": "jpeg", "jp2": "jpeg2000", "pbm": "ppm"}
    file = tmp_path / "a" / name
    Image.new("1" if extension == "pbm" else "RGB", (6, 6)).save(
        file, saved.get(extension, extension)
    )
    assert (f"a/{name}", 0) in list_folder(tmp_path).parts["all"]


def test_other_files_are_counted_by_extension(tmp_path: Path) -> None:
    make(tmp_path, "a", "b")
    for name in ("a/1.heic", "a/2.HEIC", "b/notes.txt", "b/LICENSE", "a/Thumbs.db", "a/.x.raw"):
        (tmp_path / name).touch()
    (tmp_path / "beside.txt").touch()
    assert list_folder(tmp_path).left_out == {"heic": 2, "txt": 1, "": 1}


def test_a_folder_of_heic_says_so(tmp_path: Path) -> None:
    make(tmp_path, "a", "b", "c")
    for file in (tmp_path / "c").iterdir():
        file.rename(file.with_suffix(".heic"))
    for use in (list_folder, summarize_folder, counts):
        with pytest.raises(DataError, match=r"c: no images \(4 files left out: 4 \.heic \(convert"):
            use(tmp_path)


def test_merged_folders_are_told(tmp_path: Path) -> None:
    make(tmp_path, "train/animal/red", "train/animal/green", "train/thing/blue", "train/plain")
    assert list_folder(tmp_path).warnings == [
        "animal/ holds green/ and red/: their images count as animal",
        "thing/ holds blue/: their images count as thing",
    ]
    assert list_folder(tmp_path, grouped=True).warnings == []


# One answer


def _empty_class(root: Path) -> None:
    make(root, "a", "b")
    (root / "c").mkdir()


def _one_class(root: Path) -> None:
    make(root, "a")


@pytest.mark.parametrize("spoil", [_empty_class, _one_class])
def test_a_first_look_gives_the_answer_of_the_loader(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(tmp_path)
    answers = set()
    for use in (list_folder, summarize_folder, counts):
        with pytest.raises(DataError) as caught:
            use(tmp_path)
        answers.add(str(caught.value))
    assert len(answers) == 1
