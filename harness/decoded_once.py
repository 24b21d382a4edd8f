"""Images stay in memory once they are decoded, where all of them fit: a file is read once per run.

To decode a photograph of 12 megapixels takes a CPU longer than to train on it at 32 px, and a run
shows it in each epoch. What comes out of decoding is small, and the same each time.
"""

import contextlib
import mmap
import multiprocessing
from math import prod

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data import Sample
from harness.distributed import num_local_processes
from harness.estimate import memory_of_machine

SHARE_OF_MEMORY = 1 / 4  # of the machine's, for the images of all its processes together


def _shared_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return zeros that forked processes share, and that take no memory before they are written.

    Unlike /dev/shm, which Docker makes small, such memory has no limit of its own.
    """
    content = mmap.mmap(-1, prod(shape) * dtype.itemsize)
    return torch.frombuffer(content, dtype=dtype).view(shape)


class DecodedOnce(Dataset):
    """A data set whose images are decoded when they are first asked for, and kept from then on.

    All are squares of `side` pixels. Workers fill the same table. An image that another one stood
    in for is tried again each time, as without.
    """

    def __init__(self, dataset: Dataset, side: int, channels: int) -> None:
        self.dataset = dataset
        # with the channels last, as decoders and `collate` have them
        self.images = _shared_zeros(len(dataset), side, side, channels, dtype=torch.uint8)
        # height, width, label and index of each sample; a height of 0: it is not kept yet
        self.facts = _shared_zeros(len(dataset), 4, dtype=torch.int64)

    @property
    def num_bytes(self) -> int:
        return self.images.nbytes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, row = key if isinstance(key, tuple) else (0, key)
        height, width, label, index = self.facts[row].tolist()
        if height:
            image = self.images[row].permute(2, 0, 1)
            return Sample(image, torch.tensor((height, width)), label, epoch, index, index)
        sample = self.dataset[key]
        if sample.source == sample.index:
            height, width = sample.size.tolist()
            self.images[row] = sample.image.permute(1, 2, 0)
            self.facts[row, 1:] = torch.tensor([width, sample.label, sample.index])
            self.facts[row, 0] = height  # last: another worker may read the row meanwhile
        return sample


class ImageMemory:
    """What this process may keep of decoded images, and what it has given away."""

    def __init__(self, is_wanted: bool, num_workers: int) -> None:
        """Where nothing is wanted, or workers could not share it, there is none."""
        is_shared = num_workers == 0 or multiprocessing.get_context().get_start_method() == "fork"
        of_machine = memory_of_machine() or 0
        share = SHARE_OF_MEMORY * of_machine / num_local_processes()
        self.bytes_left = share if is_wanted and is_shared else 0

    def keep(self, dataset: Dataset, side: int, channels: int) -> Dataset:
        """Return the data set, whose images are kept once they are decoded if they fit."""
        num_bytes = len(dataset) * side**2 * channels
        if num_bytes > self.bytes_left or _is_decoded(dataset):
            return dataset
        with contextlib.suppress(OSError):  # a system may promise no memory in advance
            kept = DecodedOnce(dataset, side, channels)
            self.bytes_left -= kept.num_bytes
            return kept
        return dataset


def _is_decoded(dataset: Dataset) -> bool:
    """Tell whether a data set's images are pixels already, as those that are drawn by code."""
    whole = dataset.dataset if isinstance(dataset, Subset) else dataset
    return isinstance(whole.images, Tensor)
