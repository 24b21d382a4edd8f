"""Images in uncompressed tars, read at random without unpacking.

    members = scan_tars([Path("train-000.tar"), Path("train-001.tar")], (".jpg", ".png"))
    images = TarImages(members)     # images[i].read() returns a member's bytes, in any process

A tar may hold images in class folders, webdataset's pairs of KEY.jpg and KEY.cls, or the images of
one class, as those of ImageNet's ILSVRC2012_img_train.tar do. Stands alone: needs NumPy. Axis: n
images.
"""

import functools
import os
import tarfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class TarMember:
    """A file in a tar, which is read from the disk only when asked for."""

    path: str  # of the tar
    name: str
    offset: int  # bytes from the tar's beginning
    size: int  # bytes

    def read(self) -> bytes:
        """Read the member; OSError where the tar is gone or ends too early."""
        content = os.pread(_opened(self.path).fileno(), self.size, self.offset)
        if len(content) < self.size:
            raise OSError(f"{self.path} ends within {self.name}")
        return content

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


@functools.lru_cache(maxsize=64)  # fewer than a process may open, however many shards there are
def _opened(path: str) -> BufferedReader:
    return open(path, "rb")


class TarImages:
    """A sequence of TarMembers, held as arrays: one block of memory for all loader workers.

    Indexed by an array (m,), it returns the TarImages of those.
    """

    def __init__(self, members: dict[str, np.ndarray]) -> None:
        columns = ("names", "tar", "offsets", "sizes", "tars")
        self.members = {name: members[name] for name in columns}  # of what scan_tars returns

    def __len__(self) -> int:
        return len(self.members["names"])

    def __getitem__(self, index: "int | np.ndarray") -> "TarMember | TarImages":
        # all arrays have a row an image, but for `tars`, which their column `tar` points into
        rows = {key: values[index] for key, values in self.members.items() if key != "tars"}
        tars = self.members["tars"]
        if isinstance(index, np.ndarray):
            return TarImages(rows | {"tars": tars})
        return TarMember(
            path=os.fsdecode(tars[rows["tar"]]),
            name=os.fsdecode(rows["names"]),
            offset=int(rows["offsets"]),
            size=int(rows["sizes"]),
        )


LONGEST_CLASS = 1000  # bytes of a KEY.cls
DEEPEST = 4  # tars in each other


class _Image(NamedTuple):
    name: str
    offset: int  # bytes from the tar's beginning
    size: int  # bytes
    given: str  # what KEY.cls says, "" without it


class _Others(NamedTuple):
    """What lies in tars besides the images."""

    suffixes: list[str]  # of files that are no images
    links: list[str]  # that are called as images are


def scan_tars(paths: Iterable[Path], suffixes: Collection[str]) -> dict[str, np.ndarray]:
    """Read the headers of tars, and return what they hold as arrays.

    `tars` are the paths. Each of n images has a row in `names`, `offsets`, `sizes`, `given_classes`
    and `tar`, which is its tar's place in `tars`. Images are the members that end in `suffixes`;
    the name of one in a tar in a tar begins with the inner tar's. `given_classes` are what KEY.cls
    says, "" where there is none; `other_suffixes` (m,) those of all files that are no images,
    `links` the names of links that are not followed: symbolic ones, and hard ones to what is not in
    the tar. Raises ValueError, naming the last member that could be read, for a tar that is
    compressed, damaged or cut off.
    """
    paths = [str(path) for path in paths]
    numbers_of_tars: list[int] = []
    images: list[_Image] = []
    others = _Others([], [])
    for number, path in enumerate(paths):
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            found = list(_images(file, path, end, suffixes, others))
        images += found
        numbers_of_tars += [number] * len(found)
    return {
        "names": as_bytes(image.name for image in images),
        "given_classes": as_bytes(image.given for image in images),
        "other_suffixes": as_bytes(others.suffixes),
        "links": as_bytes(others.links),
        "tars": as_bytes(paths),
        "tar": np.array(numbers_of_tars, np.int64),
        "offsets": np.array([image.offset for image in images], np.int64),
        "sizes": np.array([image.size for image in images], np.int64),
    }


def as_bytes(names: Iterable[str]) -> np.ndarray:
    """Return names as one array of bytes, which all workers share without copies."""
    return np.array([os.fsencode(name) for name in names], bytes)


def _images(
    file: BufferedReader,
    path: str,
    end: int,
    suffixes: Collection[str],
    others: _Others,
    depth: int = 1,
) -> Iterator[_Image]:
    """Yield the images in a tar that ends at byte `end`, and those in the tars in it.

    What else there is goes into `others`.
    """
    if depth > DEEPEST:
        tar = path if len(path) < 200 else f"{path[:200]}..."
        raise ValueError(f"{tar} holds tars in each other: need at most {DEEPEST}")
    images: list[tuple[PurePosixPath, _Member]] = []
    classes: dict[PurePosixPath, str] = {}  # what KEY.cls says of KEY
    for member in _members(file, path, end):
        # tar -P keeps the / at the beginning, and ..
        parts = PurePosixPath(member.name).parts
        name = PurePosixPath(*(part for part in parts if part not in ("/", "..")))
        if name.name.startswith("."):
            continue
        suffix = name.suffix.lower()
        if member.is_link:
            if suffix in suffixes:
                others.links.append(str(name))
        elif suffix == ".tar":
            file.seek(member.offset)
            inner_end = member.offset + member.size
            inner_path = f"{path}:{name}"
            for image in _images(file, inner_path, inner_end, suffixes, others, depth + 1):
                yield image._replace(name=f"{name}/{image.name}")
        elif suffix == ".cls":
            if member.size > LONGEST_CLASS:
                given = f"{name} has {member.size:,} bytes"
                raise ValueError(f"{path}: need a class of at most {LONGEST_CLASS:,}, {given}")
            file.seek(member.offset)
            classes[name.with_suffix("")] = os.fsdecode(file.read(member.size)).strip()
        elif suffix in suffixes:
            images.append((name, member))
        else:
            others.suffixes.append(suffix)
    for name, member in images:
        given = classes.get(name.with_suffix(""), "")
        yield _Image(str(name), member.offset, member.size, given)


class _Member(NamedTuple):
    """What is kept of a header: tarfile's own takes ten times the memory."""

    name: str
    offset: int
    size: int
    is_link: bool  # to what is not in the tar


def _members(file: BufferedReader, path: str, end: int) -> list[_Member]:
    """Return the files and links of a tar that ends at byte `end`.

    A hard link to a file before it is returned as that file by its other name. ValueError where it
    is no whole tar.
    """
    members: list[_Member] = []
    files: dict[str, _Member] = {}
    last = "its beginning"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                last = member.name
                if member.issparse():
                    raise tarfile.ReadError("sparse")
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError("it is cut off")
                tar.members = []  # or all headers stay in memory
                if member.isfile():
                    found = _Member(member.name, member.offset_data, member.size, is_link=False)
                    files[member.name] = found
                elif member.islnk() and member.linkname in files:
                    found = files[member.linkname]._replace(name=member.name)
                elif member.issym() or member.islnk():
                    found = _Member(member.name, member.offset_data, member.size, is_link=True)
                else:
                    continue  # a folder, a pipe or a device
                members.append(found)
            file.seek(tar.offset)
            # tarfile ends quietly at a header that is broken
            if tar.offset < end and any(file.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError("what follows is no header")
    except (tarfile.TarError, EOFError) as error:
        text = f"{path} is damaged, compressed or no tar, at {last}: {error}"
        raise ValueError(text) from error
    return members
