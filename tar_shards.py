"""Images in uncompressed tars, read at random without unpacking.

    members = scan_tars([Path("train-000.tar"), Path("train-001.tar")])
    images = TarImages(members)     # images[i].read() gives a member's bytes, in any process

A tar may hold images in class folders, webdataset's pairs of KEY.jpg and KEY.cls, or one tar a
class, as ImageNet's ILSVRC2012_img_train.tar does. Stands alone: needs NumPy. Axis: n images.
"""

import functools
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath

import numpy as np


@dataclass(frozen=True)
class TarMember:
    path: str
    name: str
    offset: int
    size: int

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

    An array of indices (m,) gives the TarImages of those.
    """

    def __init__(self, members: dict[str, np.ndarray]) -> None:
        self.members = members  # what scan_tars gives

    def __len__(self) -> int:
        return len(self.members["names"])

    def __getitem__(self, index: "int | np.ndarray") -> "TarMember | TarImages":
        if isinstance(index, np.ndarray):
            rows = {key: x if key == "tars" else x[index] for key, x in self.members.items()}
            return TarImages(rows)
        row = {key: values[index] for key, values in self.members.items() if key != "tars"}
        path = os.fsdecode(self.members["tars"][row["tar"]])
        name = os.fsdecode(row["names"])
        return TarMember(path, name, int(row["offsets"]), int(row["sizes"]))


def scan_tars(paths: Iterable[Path], suffixes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read the headers of tars: `names`, `tar`, `offsets`, `sizes` and `classes` (n,), and `tars`.

    Images are the members that end in `suffixes`. A class is what KEY.cls says, or the tar in a
    tar, or the first folder; "" where there is none. Raises ValueError, naming the last member that
    could be read, for a tar that is compressed, damaged or cut off.
    """
    rows, paths = [], [str(path) for path in paths]
    for number, path in enumerate(paths):
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            rows += [(number, *row) for row in _images(file, path, end, suffixes)]
    number, names, offsets, sizes, classes = zip(*rows, strict=True) if rows else [()] * 5
    texts = {"names": names, "classes": classes, "tars": paths}
    members = {key: np.array([os.fsencode(x) for x in values]) for key, values in texts.items()}
    numbers = {"tar": number, "offsets": offsets, "sizes": sizes}
    return members | {key: np.array(values, np.int64) for key, values in numbers.items()}


def _images(
    file: BufferedReader, path: str, end: int, suffixes: tuple[str, ...]
) -> Iterator[tuple[str, int, int, str]]:
    """Yield (name, offset, size, class) of the images in a tar that ends at `end`, and its tars."""
    images, classes = [], {}
    for member in _members(file, path, end):
        name = PurePosixPath(member.name)
        if name.name.startswith("."):
            continue
        if name.suffix == ".tar":
            file.seek(member.offset_data)
            inner_end = member.offset_data + member.size
            for inner, offset, size, _ in _images(file, f"{path}:{name}", inner_end, suffixes):
                yield f"{name}/{inner}", offset, size, name.stem
        elif name.suffix == ".cls":
            file.seek(member.offset_data)
            classes[name.with_suffix("")] = file.read(member.size).decode().strip()
        elif name.suffix.lower() in suffixes:
            images.append((name, member))
    for name, member in images:
        folder = name.parts[0] if len(name.parts) > 1 else ""
        kind = classes.get(name.with_suffix(""), folder)
        yield str(name), member.offset_data, member.size, kind


def _members(file: BufferedReader, path: str, end: int) -> list[tarfile.TarInfo]:
    last, members = "its beginning", []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                last = member.name
                if member.issparse() or member.offset_data + member.size > end:
                    raise tarfile.ReadError("it is cut off" if not member.issparse() else "sparse")
                members += [member] if member.isfile() else []
                tar.members = []  # or all headers stay in memory
            file.seek(tar.offset)
            # tarfile ends quietly at a header that is broken
            if tar.offset < end and any(file.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError("what follows is no header")
    except (tarfile.TarError, EOFError) as error:
        text = f"{path} is damaged, compressed or no tar, at {last}: {error}"
        raise ValueError(text) from error
    return members
