"""Which images, which labels: what a folder, a tar, a folder of tars or a list of paths holds.

    found = find_images("pets", image_suffixes=(".jpg", ".png"))
    found.train.images   # paths as bytes, or TarImages
    found.train.classes  # (n,) names, or None without classes
    found.test           # the same of a split to evaluate on, or None
    found.notes          # what was entered, left out and left alone, in words

An image's class is the first folder that it lies in. A folder that is the only one is entered
first; `train`, `val` and `test` are splits. Nothing is left out without a note, but for hidden
files and what systems leave behind. Needs tar_shards.py beside it, and NumPy. Axis: n images.
"""

import contextlib
import csv
import hashlib
import io
import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tar_shards import TarImages, as_bytes, scan_tars

# ---------------------------------------------------------------- names

# small letters; what each of these folders is
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
LEFT_BY_SYSTEMS = {"__MACOSX", "@eaDir", "Thumbs.db", "$RECYCLE.BIN", "System Volume Information"}
MOST_SPLITS = 5  # among more folders, bullet_train and test_tube are classes
# small letters; of two such folders side by side, only the images' is data
IMAGE_FOLDERS = {"image", "images", "img", "imgs", "jpegimages"}
ANNOTATION_FOLDERS = {
    "annotation",
    "annotations",
    "ground_truth",
    "groundtruth",
    "gt",
    "label",
    "labels",
    "mask",
    "masks",
    "segmentation",
    "segmentationclass",
    "segmentationobject",
    "segmentations",
}
# DCF, the cameras' standard, calls folders by a number from 100 on and five capital letters, digits
# or underscores: 100APPLE, 101CANON. Where the five are all digits, they must be a date, as in
# 10160425: folder 101, a year that ends in 6, April 25. Other numbers are classes.
CAMERA_FOLDER = re.compile(r"[1-9]\d{2}(?=\d*[A-Z_])[A-Z0-9_]{5}")
CAMERA_FOLDER_BY_DATE = re.compile(r"[1-9]\d{2}\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")
# pictures that this project draws; their first bytes say so
DRAWN = re.compile(r"((attention|crops|curves|neighbours|pca|scatter).*|\d{6})\.(png|gif)")
DRAWN_MARK = b"drawn by DINO"


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is hidden, or what an operating system leaves behind."""
    return name.startswith(".") or name in LEFT_BY_SYSTEMS


def in_one_form(name: str) -> str:
    """Return a name in Unicode's form NFC: macOS stores an accent as a letter of its own."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _shown(name: str) -> str:
    """Return a name with a backslash and a code for each character that a terminal would obey."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def some_of(names: Collection[str], most: int = 3) -> str:
    """Return the first names and how many more there are: `a, b, c and 7 more`."""
    first = ", ".join(_shown(name) for name in list(names)[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most:,} more"


def by_numbers(name: str) -> str:
    """Return a key that sorts names by the numbers in them: frame-10 after frame-9."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), name)


def images_in(folder: Path, image_suffixes: Collection[str]) -> list[Path]:
    """Return the images that lie in a folder itself, in the order of the numbers in their names."""
    images = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in image_suffixes and not is_hidden(path.name)
    ]
    return sorted(images, key=lambda path: by_numbers(path.name))


def number_of(num: int, word: str) -> str:
    """Return `1 image` or `1,200 images`."""
    return f"{num:,} {word}" if num == 1 else f"{num:,} {word}s"


# ---------------------------------------------------------------- walk


Stamp = tuple[int, int]  # of a tar or folder, as _stamp returns it


class _Walk:
    """What a folder and all folders in it hold; each real folder is looked into once."""

    def __init__(self, root: str, suffixes: Collection[str]) -> None:
        self.root = root
        self.suffixes = suffixes
        self.images: list[str] = []  # all names are relative to the root, with / between folders
        self.tars: list[str] = []
        self.folders: dict[str, Stamp] = {}  # each with its stamp from before it was looked into
        self.closed: list[str] = []  # folders that may not be read
        self.runs: list[str] = []  # folders of runs and of Python environments
        self.drawn: list[str] = []
        self.known_links: list[str] = []  # to folders that were read, or that hold the root
        self.no_files: list[str] = []  # broken links, pipes, devices that are called as images are
        self.other_suffixes: Counter[str] = Counter()
        self._seen: set[tuple[int, int]] = set()
        self._walk()

    def _walk(self) -> None:
        """Look into real folders first: what is linked besides has its real name then."""
        above = Path(os.path.realpath(self.root)).parents  # links to these would lead back here
        self._seen = {_identity(os.stat(folder)) for folder in above}
        folders, links = [""], []
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            more_folders, more_links = self._look_into(folder)
            folders += more_folders
            links = sorted(links + more_links)

    def _look_into(self, folder: str) -> tuple[list[str], list[str]]:
        """Note what a folder holds, and return the folders and links to folders in it."""
        path = os.path.join(self.root, folder) if folder else self.root
        try:
            status = os.stat(path)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            self.closed.append(folder or self.root)
            return [], []
        if _identity(status) in self._seen:
            self.known_links.append(folder)
            return [], []
        self._seen.add(_identity(status))
        self.folders[folder] = _stamp(status)
        names = {entry.name for entry in entries}
        if {"config.yaml", "log.jsonl"} <= names or "pyvenv.cfg" in names:
            self.runs.append(folder or self.root)
            return [], []
        folders: list[str] = []
        links: list[str] = []
        for entry in entries:
            if is_hidden(entry.name):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if not entry.is_dir():
                    self._note_file(name, entry)
                elif entry.is_symlink():
                    links.append(name)
                else:
                    folders.append(name)
            except OSError:  # a link to what may not be looked at
                self.closed.append(name)
        return folders, links

    def _note_file(self, name: str, entry: os.DirEntry) -> None:
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in self.suffixes and suffix != ".tar":
            self.other_suffixes[suffix] += 1
        elif not entry.is_file():
            self.no_files.append(name)
        elif suffix == ".tar":
            self.tars.append(name)
        elif DRAWN.fullmatch(entry.name) and was_drawn_here(entry.path):
            self.drawn.append(name)
        else:
            self.images.append(name)

    @property
    def is_whole(self) -> bool:
        """Tell whether everything that is there could be read."""
        return not (self.closed or self.no_files)

    def notes(self) -> list[str]:
        """Return what was left out, in words."""
        lines = {
            "may not be read": self.closed,
            "of runs or Python environments": self.runs,
            "pictures that were drawn here": self.drawn,
            "links to folders that were read already": self.known_links,
            "broken links or no files": self.no_files,
        }
        notes = [
            f"left out, {reason}: {len(names):,} ({some_of(names)})"
            for reason, names in lines.items()
            if names
        ]
        return notes + _note_of_suffixes(self.other_suffixes)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _stamp(status: os.stat_result) -> Stamp:
    """Return size and time of change of a tar or folder, which adding to it changes."""
    return status.st_size, status.st_mtime_ns


def was_drawn_here(path: str) -> bool:
    """Tell whether a picture was drawn by this project: it is no data."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return DRAWN_MARK in file.read(2048)
    return False


def _note_of_suffixes(counts: Counter[str]) -> list[str]:
    """Return a note of the files that are no images, by suffix; none without any."""
    if not counts:
        return []
    kinds = [f"{num:,} {suffix or 'without suffix'}" for suffix, num in counts.most_common()]
    return [f"left out, no images: {some_of(kinds, 5)}"]


# ---------------------------------------------------------------- scan

# Up to so many images above folders, or a hundredth of all where that is more, are strays. More of
# them say that the folders are no classes.
FEW = 5


def _few(num_images: int) -> int:
    return max(FEW, num_images // 100)


def _scan(root: str, suffixes: Collection[str]) -> tuple[dict[str, np.ndarray], bool]:
    """Look through a folder, a tar or a folder of tars.

    Return `names` (n,), `folders`, the `tars` that were read, all relative to the root; `stamps` of
    both, from before they were looked into; `notes`; of tars, too, what scan_tars returns. And
    whether that is the whole: nothing was there that could not be read.
    """
    if os.path.isfile(root):
        return _scan_tars(root, [""], suffixes, folders={}, notes=[]), True
    walk = _Walk(root, suffixes)
    notes = walk.notes()
    are_strays = len(walk.images) <= FEW and not any("/" in name for name in walk.images)
    if walk.tars and are_strays:
        if walk.images:
            notes.append(f"left out, images beside tars: {some_of(sorted(walk.images))}")
        found = _scan_tars(root, sorted(walk.tars), suffixes, walk.folders, notes)
        return found, walk.is_whole
    if walk.tars:
        notes.append(f"left out, tars beside images: {some_of(sorted(walk.tars))}")
    found = {
        "names": as_bytes(sorted(walk.images, key=in_one_form)),
        "folders": as_bytes(walk.folders),
        "tars": as_bytes([]),
        "stamps": np.array(list(walk.folders.values())),
        "notes": as_bytes(notes),
    }
    return found, walk.is_whole


def _scan_tars(
    root: str,
    tars: list[str],
    suffixes: Collection[str],
    folders: dict[str, Stamp],
    notes: list[str],
) -> dict[str, np.ndarray]:
    paths = [Path(root, tar) for tar in tars]
    stamps = [*folders.values(), *(_stamp(os.stat(path)) for path in paths)]
    members = scan_tars(paths, tuple(suffixes))
    other_suffixes = Counter(os.fsdecode(suffix) for suffix in members.pop("other_suffixes"))
    links = [os.fsdecode(name) for name in members.pop("links")]
    notes = notes + _note_of_suffixes(other_suffixes)
    if links:
        notes.append(f"left out, links in tars: {len(links):,} ({some_of(links)})")
    return members | {
        "folders": as_bytes(folders),
        "tars": as_bytes(tars),
        "stamps": np.array(stamps),
        "notes": as_bytes(notes),
    }


# ---------------------------------------------------------------- kept scans

# of an index's form and of what a scan finds: an index of another version is not read
INDEX_VERSION = 7


def cache_folder() -> Path:
    """Return the user's folder for what long scans found: ~/.cache/dino, or by XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino"


def _indexed(
    root: str, suffixes: Collection[str], index_folder: Path | None
) -> dict[str, np.ndarray]:
    """Return what a scan finds, or what it found before where no file or folder has changed since.

    What a scan found is kept in `index_folder` where it took more than a second, or read tars; not
    where something could not be read, since that may change with no trace in a folder's time.
    """
    if index_folder is None:
        found, _ = _scan(root, suffixes)
        return found
    of_what = "\n".join([root, *sorted(suffixes)])
    file = index_folder / f"{hashlib.sha256(os.fsencode(of_what)).hexdigest()[:16]}.npz"
    found = _read_index(file, root)
    if found is not None:
        return found
    start = time.monotonic()
    found, is_whole = _scan(root, suffixes)
    is_long = len(found["tars"]) or time.monotonic() - start > 1
    if is_long and is_whole:
        with contextlib.suppress(OSError):  # an index that cannot be written saves no time
            _write_index(file, root, found)
    return found


def _write_index(file: Path, root: str, found: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        np.savez(
            temporary,
            version=INDEX_VERSION,
            source=np.array(os.fsencode(root)),
            arrays=sorted(found),
            **found,
        )
        os.replace(temporary, file)
    finally:  # where the disk is full, a file that is cut off
        temporary.unlink(missing_ok=True)


def _read_index(file: Path, root: str) -> dict[str, np.ndarray] | None:
    """Return what was found in a source, or None where that is not known or has changed since."""
    try:
        with np.load(file) as arrays:
            found = dict(arrays)
        is_of_source = (
            found.pop("version") == INDEX_VERSION
            and found.pop("source").item() == os.fsencode(root)
            # the archive's checksums are of the arrays, not of their names
            and found.pop("arrays").tolist() == sorted(found)
            and np.array_equal(found["stamps"], _stamps_of_all(root, found))
        )
    except Exception:  # a damaged file can make NumPy raise anything: the scan is done anew then
        return None
    return found if is_of_source else None


def _stamps_of_all(root: str, found: dict[str, np.ndarray]) -> np.ndarray:
    names = [*found["folders"].tolist(), *found["tars"].tolist()]
    return np.array([_stamp(os.stat(Path(root, os.fsdecode(name)))) for name in names])


# ---------------------------------------------------------------- what lies where


class _Listing(NamedTuple):
    """The images of a source, before splits and classes are told."""

    root: str
    names: list[str]  # relative, in one Unicode form; a tar in a tar counts as a folder
    images: Sequence  # paths as bytes, or TarImages
    labels: list[str] | None  # given by a list or by KEY.cls, "" where none is
    splits: list[str] | None  # given by a list
    notes: list[str]


def _list_source(
    data: Path, suffixes: Collection[str], take_splits: bool, index_folder: Path | None
) -> _Listing:
    root = os.path.abspath(data)  # an index is found again from any working directory
    found = _indexed(root, suffixes, index_folder)
    notes = [os.fsdecode(note) for note in found["notes"].tolist()]
    names = [in_one_form(os.fsdecode(name)) for name in found["names"].tolist()]
    if not len(found["tars"]):
        paths = [os.path.join(os.fsencode(root), name) for name in found["names"].tolist()]
        return _Listing(root, names, np.array(paths, bytes), None, None, notes)
    tars = [os.fsdecode(tar) for tar in found["tars"].tolist()]
    splits = _splits_by_names(root, tars) if take_splits else {}
    folders = [_folder_of_tar(tar, splits.get(tar, ""), take_splits) for tar in tars]
    names = [
        folders[number] + re.sub(r"\.tar/", "/", name, flags=re.IGNORECASE)
        for number, name in zip(found["tar"].tolist(), names, strict=True)
    ]
    members = {key: found[key] for key in ("names", "tar", "offsets", "sizes")}
    members["tars"] = as_bytes(str(Path(root, tar)) for tar in tars)
    given = [in_one_form(os.fsdecode(label)) for label in found["given_classes"].tolist()]
    seen = [not any(is_hidden(part) for part in name.split("/")) for name in names]
    rows = np.flatnonzero(seen)
    names, given = [names[row] for row in rows], [given[row] for row in rows]
    return _Listing(
        root, names, TarImages(members)[rows], given if any(given) else None, None, notes
    )


def _folder_of_tar(tar: str, split: str, take_splits: bool) -> str:
    """Return the folder that a tar's images seem to lie in: train.tar is the split `train`.

    `split` is what its name says beside that of other tars, "" for nothing.
    """
    folder, name = os.path.split(tar)
    stem = os.path.splitext(name)[0]
    if take_splits and stem.lower() in SPLIT_NAMES:
        split = stem
    return "".join(f"{part}/" for part in (folder, split) if part)


def _splits_by_names(root: str, tars: list[str]) -> dict[str, str]:
    """Return the split of each tar of a folder: pets-train-000.tar and pets-val-000.tar.

    {} where a tar or a folder is called like a split itself, and where the names do not hold both
    `train` and another split. Raises ValueError where they do and some hold none, or two.
    """
    parts = [part for tar in tars for part in os.path.splitext(tar)[0].split("/")]
    if any(part.lower() in SPLIT_NAMES for part in parts):
        return {}
    kinds: dict[str, set[str]] = {}
    for tar in tars:
        words = re.findall("[a-z]+", os.path.basename(tar).lower())
        kinds[tar] = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    of_all = set().union(*kinds.values())
    if "train" not in of_all or len(of_all) == 1:
        return {}
    unclear = [tar for tar in tars if len(kinds[tar]) != 1]
    if unclear:
        called = " and ".join(sorted(of_all))
        text = f"{root} holds tars called {called}, but some name none or two: {some_of(unclear)}"
        raise ValueError(f"{text}; need a split in each name, or --no-splits to take all of them")
    return {tar: kind for tar, (kind,) in kinds.items()}


# ---------------------------------------------------------------- lists

COLUMNS = {  # of a list with a header, by what they hold
    "path": ("path", "file", "filename", "file_name", "filepath", "image", "image_path"),
    "label": ("label", "class", "category", "class_name"),
    "split": ("split", "set", "subset"),
}


def is_list(data: Path) -> bool:
    """Tell whether data are a list of paths: a .txt, .csv or .tsv."""
    return data.suffix.lower() in (".txt", ".csv", ".tsv") and data.is_file()


def _read_list(data: Path) -> _Listing:
    """Read lines of paths, or columns of path, label and split; relative to the list's folder."""
    try:
        text = data.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        text = f"{data} is no text in UTF-8: need a path per line, or a CSV, saved as UTF-8"
        raise ValueError(text) from error
    labels = splits = None
    if data.suffix.lower() == ".txt":
        # not splitlines(), which would cut a name at U+2028, too
        names = [line.strip() for line in text.split("\n") if line.strip()]
    else:
        names, labels, splits = _read_columns(data, text)
    paths = [os.path.join(os.path.abspath(data.parent), name) for name in names]
    exists = [os.path.isfile(path) for path in paths]
    rows = [row for row in range(len(paths)) if exists[row]]
    missing = [name for name, is_there in zip(names, exists, strict=True) if not is_there]
    if not names:
        raise ValueError(f"{data} names no file: need paths relative to the list")
    if not rows:
        first = f"the first is {_shown(names[0])}"
        text = f"{data} names {number_of(len(names), 'file')}, none of which exists, {first}"
        raise ValueError(f"{text}: need paths relative to the list")
    notes: list[str] = []
    if missing:
        what = f"{len(missing):,} ({some_of(missing)})"
        notes.append(f"left out, named in the list but not there: {what}")
    return _Listing(
        root=str(data),
        names=[names[row] for row in rows],
        images=as_bytes(paths[row] for row in rows),
        labels=None if labels is None else [in_one_form(labels[row]) for row in rows],
        splits=None if splits is None else [splits[row] for row in rows],
        notes=notes,
    )


def _read_columns(data: Path, text: str) -> tuple[list[str], list[str] | None, list[str] | None]:
    """Return a table's paths, labels and splits; None for a column that it does not have."""
    first_line = text.split("\n", 1)[0]
    delimiter = max("\t;,", key=first_line.count)
    table = io.StringIO(text, newline="")  # which leaves a name with a line break whole
    reader = csv.DictReader(table, delimiter=delimiter, strict=True)
    try:
        header, rows = list(reader.fieldnames or []), list(reader)
    except csv.Error as error:  # such as a quotation mark without another
        raise ValueError(f"{data} is no table after line {reader.line_num}: {error}") from error
    found = {
        kind: next((name for name in header if str(name).strip().lower() in names), None)
        for kind, names in COLUMNS.items()
    }
    if found["path"] is None:
        given = some_of([str(name) for name in header], 8) or "an empty file"
        raise ValueError(f"{data}: need a first line with a column `path`, got {given}")
    columns = {
        kind: None if name is None else [(row[name] or "").strip() for row in rows]
        for kind, name in found.items()
    }
    splits = columns["split"]
    for split in sorted(set(splits or [])):
        if split.lower() not in SPLIT_NAMES:
            raise ValueError(f"{data}: need splits train, val or test, got {split!r}")
    if splits is not None:
        splits = [SPLIT_NAMES[split.lower()] for split in splits]
    return columns["path"], columns["label"], splits


# ---------------------------------------------------------------- splits and classes

# how notes begin by which data.py finds them
NO_CLASSES = "no classes"
EVALUATES_ON = "evaluates on"


class Found(NamedTuple):
    """The images of a split, and the class of each where they have classes."""

    images: Sequence  # paths as bytes, or TarImages
    classes: np.ndarray | None  # (n,) names


class FoundSplits(NamedTuple):
    train: Found
    test: Found | None  # None where the data have no split to evaluate on
    notes: list[str]  # what was entered, left out and left alone


class _Layout:
    """Some images of a listing and the folder in which they are looked at."""

    def __init__(
        self, listing: _Listing, rows: Sequence[int] | None = None, place: str = ""
    ) -> None:
        self.listing = listing
        self.place = place  # "" or a folder with / at its end, below the root
        self.rows = list(range(len(listing.names)) if rows is None else rows)
        self._tops: list[str] | None = None  # computed once: of a million images it takes a second
        self.notes: list[str] = []

    @property
    def path(self) -> str:
        return os.path.join(self.listing.root, self.place).rstrip("/")

    def tops(self) -> list[str]:
        """Return the folder of this place that each image lies in, "" for none."""
        if self._tops is None:
            start = len(self.place)
            names = (self.listing.names[row][start:] for row in self.rows)
            self._tops = [name.partition("/")[0] if "/" in name else "" for name in names]
        return self._tops

    def within(self, folder: str) -> "_Layout":
        """Return the images in a folder of this place."""
        tops = self.tops()
        rows = [row for row, top in zip(self.rows, tops, strict=True) if top == folder]
        return _Layout(self.listing, rows, f"{self.place}{folder}/")

    def keep(self, folders: Collection[str]) -> None:
        """Keep the images in these folders alone."""
        self.rows = [row for row, top in zip(self.rows, self.tops(), strict=True) if top in folders]
        self._tops = None

    def labels(self) -> list[str] | None:
        """Return the classes that are given besides the folders, where all images have one."""
        if self.listing.labels is None:
            return None
        labels = [self.listing.labels[row] for row in self.rows]
        return labels if all(labels) else None

    def note_unlabelled(self, without: str) -> None:
        """Note where some images lack a class and so none is taken, and what follows: `without`."""
        if self.listing.labels is None:
            return
        num = sum(not self.listing.labels[row] for row in self.rows)
        if num:
            of_all = f"{num:,} of {number_of(len(self.rows), 'image')}"
            self.notes.append(f"{without}: {of_all} have no label")

    def found(self, classes: Sequence[str] | None) -> Found:
        images = self.listing.images[np.array(self.rows, np.int64)]
        return Found(images, None if classes is None else np.array(classes))


def find_images(
    data: str | Path,
    image_suffixes: Collection[str],
    take_splits: bool = True,
    index_folder: Path | None = None,
    known_classes: Collection[str] = (),
) -> FoundSplits:
    """Find the images of a folder, a tar, a folder of tars or a list, their splits and classes.

    `take_splits` False takes folders called train, val and test for classes, and all tars and all
    lines of a list for one split. `index_folder` keeps what a long scan found. `known_classes` are
    those of the images that these are compared with: a single one of them is a class, while the
    only folder of other images tells nothing. Raises ValueError, with what to type, where there are
    no images and where it cannot be told what the folders mean.
    """
    data = Path(data)
    listing = (
        _read_list(data)
        if is_list(data)
        else _list_source(data, image_suffixes, take_splits, index_folder)
    )
    notes = listing.notes
    if not listing.names:
        held = "; ".join(_shown(note) for note in notes)
        kinds = "files like .jpg, .png, .tif, .webp, or tars of them"
        raise ValueError(f"no images in {data}: need {kinds}{held and '; ' + held}")
    if is_list(data):
        listing = listing if take_splits else listing._replace(splits=None)
        return _splits_of_list(listing, known_classes)
    layout = _Layout(listing)
    layout = _enter(layout, take_splits, known_classes)
    names_of_splits = _splits_of(layout) if take_splits else {}
    if not names_of_splits:
        train = _with_classes(layout, known_classes)
        return FoundSplits(train, None, [*notes, *layout.notes])
    splits = {kind: layout.within(name) for kind, name in names_of_splits.items()}
    train_layout = _enter(splits["train"], take_splits=False)
    train = _with_classes(train_layout)
    notes = [*notes, *layout.notes, *train_layout.notes]
    kind = next((kind for kind in ("val", "test") if kind in splits), None)
    if kind is None:
        notes += _left_alone(layout, set(layout.tops()) - {names_of_splits["train"]})
        return FoundSplits(train, None, notes)
    known = set() if train.classes is None else set(train.classes.tolist())
    test_layout = _enter(splits[kind], take_splits=False, known_classes=known)
    test = _with_classes(test_layout, known)
    notes += [note for note in test_layout.notes if note not in notes]
    notes += [f"trains on {names_of_splits['train']}", f"{EVALUATES_ON} {names_of_splits[kind]}"]
    alone = set(layout.tops()) - {names_of_splits["train"], names_of_splits[kind]}
    notes += _left_alone(layout, alone)
    return FoundSplits(train, test, notes)


def _left_alone(layout: _Layout, folders: Collection[str]) -> list[str]:
    counts = Counter(layout.tops())
    parts = [
        f"{_shown(folder) or 'above them'} ({number_of(counts[folder], 'image')})"
        for folder in sorted(folders)
    ]
    return [f"left alone: {', '.join(parts)}"] if parts else []


def _splits_of_list(listing: _Listing, known_classes: Collection[str]) -> FoundSplits:
    layouts = {"train": _Layout(listing)}
    if listing.splits is not None:
        layouts = {
            kind: _Layout(listing, [i for i, split in enumerate(listing.splits) if split == kind])
            for kind in ("train", "val", "test")
            if kind in listing.splits
        }
    if "train" not in layouts:
        text = f"{listing.root}: need lines of the split train, got {some_of(layouts)}"
        raise ValueError(f"{text}; --no-splits takes all lines for one set")
    found = {kind: layout.found(layout.labels()) for kind, layout in layouts.items()}
    kind = next((kind for kind in ("val", "test") if kind in found), None)
    notes = list(listing.notes)
    for used in ["train"] if kind is None else ["train", kind]:
        layouts[used].note_unlabelled(NO_CLASSES)
        notes += [note for note in layouts[used].notes if note not in notes]
    if kind is not None:
        notes += ["trains on train", f"{EVALUATES_ON} {kind}"]
    if kind == "val" and "test" in found:
        notes.append(f"left alone: test ({number_of(len(found['test'].images), 'image')})")
    train = found["train"] if known_classes else _without_one_class(found["train"], notes)
    return FoundSplits(train, found.get(kind), notes)


def _enter(layout: _Layout, take_splits: bool, known_classes: Collection[str] = ()) -> _Layout:
    """Enter folders that hold all images, and return where splits, classes or images begin.

    Annotations beside a folder of images, and a few images above class folders, are left out.
    """
    while True:
        counts = Counter(layout.tops())
        num_above = counts.pop("", 0)
        if take_splits and any(name.lower() in SPLIT_NAMES for name in counts):
            return layout
        if not counts or num_above > _few(len(layout.rows)) or _is_of_camera(layout, counts):
            return layout
        if counts.keys() <= set(known_classes):
            return layout  # all folders are known classes, and even a single one is not entered
        annotations = _annotations_among(counts)
        folders = sorted(counts.keys() - annotations)
        has_one_folder = len(folders) == 1
        holds_images_alone = has_one_folder and not any(layout.within(folders[0]).tops())
        # Not entered: a single folder of images that has a few more beside it; or any such folder
        # where classes are known, of which it is none: it is a class of another name.
        if holds_images_alone and (num_above or known_classes):
            return layout
        # Images above the folders are left out; where all images have labels of their own, only if
        # there is one folder, which is entered.
        if num_above and (has_one_folder or layout.labels() is None):
            above = [
                layout.listing.names[row]
                for row, top in zip(layout.rows, layout.tops(), strict=True)
                if not top
            ]
            what = f"{number_of(num_above, 'image')} ({some_of(above)})"
            layout.notes.append(f"left out, above the class folders: {what}")
        if annotations:
            left = ", ".join(f"{name} ({counts[name]:,} images)" for name in sorted(annotations))
            layout.notes.append(f"left out, annotations: {left}")
        if not has_one_folder:
            if layout.labels() is None:
                layout.keep(folders)
            return layout
        entered = layout.within(folders[0])
        entered.notes = layout.notes
        if entered.notes and entered.notes[-1].startswith("entered "):
            entered.notes.pop()  # of folders in each other, the innermost says all
        entered.notes.append(f"entered {_shown(entered.place)}")
        if holds_images_alone:
            entered.notes.append(f"{NO_CLASSES}: all images lie in one folder, {folders[0]}")
        layout = entered


def _annotations_among(folders: Collection[str]) -> set[str]:
    """Return the folders of masks and labels that lie beside a folder called `images`."""
    annotations = {name for name in folders if name.lower() in ANNOTATION_FOLDERS}
    others = {name.lower() for name in folders if name not in annotations}
    return annotations if len(others) == 1 and others <= IMAGE_FOLDERS else set()


def _is_of_camera(layout: _Layout, folders: Collection[str]) -> bool:
    """Tell whether folders are those in which a camera or a phone puts what it takes."""
    is_in_dcim = os.path.basename(layout.path).lower() == "dcim"
    kinds = (CAMERA_FOLDER, CAMERA_FOLDER_BY_DATE)
    return is_in_dcim or all(any(kind.fullmatch(name) for kind in kinds) for name in folders)


def _splits_of(layout: _Layout) -> dict[str, str]:
    """Return the folder of each split, {"train": "Train"}, {} where there are none.

    Raises ValueError where folders may be splits and may be classes.
    """
    counts = Counter(layout.tops())
    num_above = counts.pop("", 0)
    names: dict[str, str] = {}
    for kind in ("train", "val", "test"):
        so_called = [name for name in sorted(counts) if SPLIT_NAMES.get(name.lower()) == kind]
        if len(so_called) > 1:
            held = " and ".join(so_called)
            raise ValueError(f"{layout.path} holds {held}: need one {kind}, or --no-splits")
        if so_called:
            names[kind] = so_called[0]
    if not names:
        _refuse_almost_splits(layout, sorted(counts))
        return {}
    others = sorted(counts.keys() - set(names.values()))
    has_many_above = num_above > _few(len(layout.rows))
    if "train" in names and (len(names) > 1 or not (others or has_many_above)):
        return names
    if others:
        beside, all_there_is = f"beside {some_of(others)}", "all of them for classes"
    elif has_many_above:
        beside, all_there_is = f"beside {number_of(num_above, 'image')}", "all images"
    else:
        beside = "and no train"
        all_there_is = "it for classes" if len(counts) == 1 else "all of them for classes"
    path, first = layout.path, next(iter(names.values()))
    split = f"{path}/{first} to take that split, or " if os.path.isdir(f"{path}/{first}") else ""
    raise ValueError(
        f"{path} holds {some_of(list(names.values()))} {beside}: need {split}--no-splits to take "
        f"{all_there_is}"
    )


def _refuse_almost_splits(layout: _Layout, folders: list[str]) -> None:
    """Raise ValueError where a few folders are called like splits: seg_train, seg_test."""
    if len(folders) > MOST_SPLITS:
        return
    kinds: dict[str, str] = {}
    for name in folders:
        for word in re.findall("[a-z]+", name.lower()):
            if word in SPLIT_NAMES:
                kinds[name] = SPLIT_NAMES[word]
    train = next((name for name, kind in kinds.items() if kind == "train"), None)
    other = next((name for name, kind in kinds.items() if kind != "train"), None)
    if train and other:
        path = layout.path
        is_folder = os.path.isdir(path)  # and no tar
        splits = f"--data {path}/{train} --val {path}/{other}, or " if is_folder else ""
        raise ValueError(
            f"{path} holds {some_of(folders)}, which look like splits: need {splits}--no-splits to "
            "take them for classes"
        )


def _with_classes(layout: _Layout, known_classes: Collection[str] = ()) -> Found:
    """Return the images of a place with the class of each, where they have classes.

    A single class tells nothing of features, but where it is one of those that are known.
    """
    given = layout.labels()
    tops = layout.tops()
    folders = set(tops)
    if given is None and folders != {""}:
        if "" in folders:
            num_above = tops.count("")
            above = f"{number_of(num_above, 'image')} beside them"
            layout.notes.append(f"{NO_CLASSES}: {some_of(sorted(folders - {''}))} have {above}")
            return layout.found(None)
        if _is_of_camera(layout, folders):
            what = f"{some_of(sorted(folders))} are a camera's folders"
            layout.notes.append(f"{NO_CLASSES}: {what}; a .csv may name them as classes")
            return layout.found(None)
    layout.note_unlabelled(NO_CLASSES if folders == {""} else "folders are taken for classes")
    classes = given or tops
    found = layout.found(None if folders == {""} and given is None else classes)
    return found if known_classes else _without_one_class(found, layout.notes)


def _without_one_class(found: Found, notes: list[str]) -> Found:
    """Return images without their class where all have the same, and note that."""
    if found.classes is None or len(set(found.classes.tolist())) > 1:
        return found
    notes.append(f"{NO_CLASSES}: all images are of one, {_shown(found.classes[0])}")
    return found._replace(classes=None)
