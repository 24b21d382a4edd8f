"""Files with bits flipped, ends cut off, parts swapped and values of the wrong type."""

import argparse
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import run_script
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from data import build_dataset, decode
from dino_train import train
from folders import _indexed, _read_index
from harness.flags import as_plain_data, parse_config
from harness.opened_network import open_network
from harness.weights import load_weights
from models import DinoModel, DinoProjectionHead, load_tensors, save_tensors
from tar_shards import _opened


def flip(content: bytes, draws: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    return bytes(changed)


def cut(content: bytes, draws: random.Random) -> bytes:
    return content[: draws.randrange(len(content))]


def swap(content: bytes, draws: random.Random) -> bytes:
    """Let two stretches of 16 bytes change places."""
    one, other = sorted(draws.randrange(len(content) - 16) for _ in range(2))
    changed = bytearray(content)
    changed[one : one + 16], changed[other : other + 16] = (
        content[other : other + 16],
        content[one : one + 16],
    )
    return bytes(changed[: len(content)])


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip,
    "cut": cut,
    "swap": swap,
}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("name", ["ckpt", "state"])
def test_damaged_tensors_are_one_line_or_what_was_saved(
    name: str, kind: str, tiny_run: Path, tmp_path: Path
) -> None:
    file = tiny_run / f"{name}.safetensors"
    content, expected = file.read_bytes(), load_tensors(file)
    damaged, draws = tmp_path / file.name, random.Random(0)
    num_refused = 0
    for number in range(60):
        # every second one within the header, which is a small part of the file
        start = content[:3000] if number % 2 else content
        damaged.write_bytes(MUTATIONS[kind](start, draws) + content[len(start) :])
        try:
            tensors, texts = load_tensors(damaged)
        except ValueError as error:
            assert str(damaged) in str(error)
            assert "\n" not in str(error)
            num_refused += 1
        else:
            assert same(tensors, expected[0])
            assert texts == expected[1]
    assert num_refused >= 50


def test_flipped_bit_names_the_file_and_the_copy_to_go_back_to(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.safetensors"
    save_tensors(path, {"a": torch.arange(4.0)}, {"metadata": "{}"})
    (tmp_path / "ckpt-00000007.safetensors").write_bytes(path.read_bytes())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: tensors_crc32 is ") as raised:
        load_tensors(path)
    assert str(raised.value).startswith(str(path))
    assert str(raised.value).endswith(f"; to go back to: {tmp_path}/ckpt-00000007.safetensors")


def test_changed_metadata_is_seen_without_reading_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"a": torch.arange(4.0)}, {"metadata": '{"step": 20}'})
    path.write_bytes(path.read_bytes().replace(b": 20", b": 21"))
    with pytest.raises(ValueError, match="texts_crc32"):
        load_tensors(path, only_metadata=True)


@pytest.mark.parametrize("name", ["tensors_crc32", "texts_crc32"])
def test_checksum_whose_own_name_is_damaged_is_missed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.safetensors"
    save_tensors(path, {"a": torch.arange(4.0)}, {"metadata": "{}"})
    path.write_bytes(path.read_bytes().replace(name.encode(), name.replace("e", "f").encode()))
    with pytest.raises(ValueError, match="is damaged"):
        load_tensors(path)


def test_every_type_has_a_checksum_and_other_writers_files_load(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "transposed": torch.arange(6).view(2, 3).t(),
    }
    save_tensors(tmp_path / "own.safetensors", tensors, {"a": "b"})
    loaded, texts = load_tensors(tmp_path / "own.safetensors")
    assert same(loaded, tensors)
    assert texts == {"a": "b"}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, tmp_path / "other.safetensors")
    assert same(load_tensors(tmp_path / "other.safetensors")[0], tensors)


WRONG = [3, "text", None, [], {}, -1, 0, True, 1e300]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ckpt", "state"])
def test_metadata_of_the_wrong_type_is_one_line(name: str, tiny_run: Path, tmp_path: Path) -> None:
    """Rewritten by another program, with no checksum."""
    file = tiny_run / f"{name}.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        texts = opened.metadata()
    texts = {key: text for key, text in texts.items() if not key.endswith("crc32")}
    draws, run = random.Random(0), tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes((tiny_run / "config.yaml").read_bytes())
    for _ in range(40 if name == "ckpt" else 15):  # a state that is read begins a run
        key = draws.choice([*texts])
        changed = json.loads(texts[key])
        place, names = changed, []
        while isinstance(place, dict) and place:
            names.append(draws.choice([*place]))
            inner = place[names[-1]]
            if not isinstance(inner, dict) or draws.random() < 0.2:
                break
            place = inner
        place[names[-1]] = draws.choice(WRONG)
        save_file(tensors, run / file.name, metadata=texts | {key: json.dumps(changed)})
        try:
            if name == "ckpt":
                network = open_network(run / file.name)
                assert network.crops
                assert network.canvas_size > 0
            else:
                train(parse_config(["--resume", str(run)]))
        except (ValueError, OSError) as error:
            assert len(str(error).splitlines()) == 1, names


def test_damaged_state_is_one_line_and_ends_with_code_2(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for path in tiny_run.iterdir():
        (run / path.name).write_bytes(path.read_bytes())
    content = bytearray((run / "state.safetensors").read_bytes())
    content[-5] ^= 4
    (run / "state.safetensors").write_bytes(content)
    result = run_script("dino_train", "--resume", run, "--epochs", 3)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"{run}/state.safetensors is damaged" in result.stderr


# ---------------------------------------------------------------- files of others, and kept scans


def mutate(content: bytes, kind: str, number: int, draws: random.Random) -> bytes:
    """Change a file; every second time within its first 3,000 bytes, where its structure is."""
    start = content[:3000] if number % 2 else content
    return MUTATIONS[kind](start, draws) + content[len(start) :]


def end_of_index(
    folder: Path, kind: str, num: int, draws: random.Random
) -> Iterator[tuple[str, str]]:
    """Yield how each mutation of a kept scan ended, and the error's text."""
    write_tar(folder / "a.tar", tarfile.PAX_FORMAT)
    source, suffixes, kept = str(folder / "a.tar"), (".png",), folder / "kept"
    expected = _indexed(source, suffixes, kept)
    (file,) = kept.iterdir()
    content = file.read_bytes()
    for number in range(num):
        file.write_bytes(mutate(content, kind, number, draws))
        try:
            found = _read_index(file, source)
        except Exception as error:
            yield "traceback", repr(error)
            continue
        is_same = found is not None and found.keys() == expected.keys()
        is_same = is_same and all(np.array_equal(found[key], expected[key]) for key in found)
        yield ("clean" if found is None or is_same else "silent"), ""


def end_of_error(error: Exception, file: Path) -> tuple[str, str]:
    """Return how a mutation ended that raised an error: clean where it is a line with the file."""
    is_line = isinstance(error, ValueError | OSError) and "\n" not in str(error)
    return ("clean" if is_line and str(file) in str(error) else "traceback"), repr(error)


class Tiny(nn.Linear):
    """A backbone of a few weights."""

    output_dim = 4

    def __init__(self) -> None:
        super().__init__(3, 4)


def end_of_pth(
    folder: Path, kind: str, num: int, draws: random.Random, is_old: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield how each mutation of an original's .pth ended: as a full checkpoint with arguments."""
    model = DinoModel(Tiny(), DinoProjectionHead(4, 8, 4, 16))
    weights = {
        f"module.{name.replace('projection_head.', 'head.')}": tensor
        for name, tensor in model.state_dict().items()
    }
    optimizer = {"param_groups": [{"lr": np.float64(0.1)}]}
    content = {"teacher": weights, "optimizer": optimizer, "args": argparse.Namespace(arch="x")}
    file = folder / "checkpoint.pth"
    torch.save(content, file, _use_new_zipfile_serialization=not is_old)
    written = file.read_bytes()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number in range(num):
        file.write_bytes(mutate(written, kind, number, draws))
        try:
            load_weights(model, str(file))
        except Exception as error:
            yield end_of_error(error, file)
        else:
            yield ("clean" if same(model.state_dict(), expected) else "silent"), ""
        model.load_state_dict(expected)


def write_tar(path: Path, tar_format: int) -> None:
    """Write a tar of five PNGs, with a class beside one, a long name, and a tar within it."""

    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))

    png = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(png, "PNG")
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w", format=tar_format) as tar:
        add(tar, "ä.png", png.getvalue())
    with tarfile.open(path, "w", format=tar_format) as tar:
        add(tar, "cats/1.png", png.getvalue())
        add(tar, "cats/1.cls", b"7")
        add(tar, "dogs/2.png", png.getvalue())
        add(tar, f"dogs/{'n' * 200}.png", png.getvalue())
        add(tar, "birds.tar", inner.getvalue())
        add(tar, "dogs/4.png", png.getvalue())


def end_of_tar(
    folder: Path, kind: str, num: int, draws: random.Random, tar_format: int = tarfile.PAX_FORMAT
) -> Iterator[tuple[str, str]]:
    """Yield how each mutation of a tar ended: opened, and every image in it decoded."""
    file = folder / "images.tar"
    write_tar(file, tar_format)
    content = file.read_bytes()
    expected = what_tar_holds(file)
    for number in range(num):
        file.write_bytes(mutate(content, kind, number, draws))
        _opened.cache_clear()
        try:
            held = what_tar_holds(file)
        except Exception as error:
            yield end_of_error(error, file)
        else:
            is_told = None in held or held == expected
            yield ("clean" if is_told else "silent"), ""


def what_tar_holds(file: Path) -> list[tuple | None]:
    """Return every image's class and pixels, None for one that cannot be decoded."""
    dataset = build_dataset(str(file))
    held: list[tuple | None] = []
    for index in range(len(dataset)):
        try:
            image = decode(dataset.images[index], dataset.levels)
        except ValueError:
            held.append(None)
        else:
            label = None if dataset.labels is None else int(dataset.labels[index])
            held.append((label, image.tolist()))
    return held


def end_of_recipe(
    folder: Path, kind: str, num: int, draws: random.Random
) -> Iterator[tuple[str, str]]:
    """Yield how each mutation of a run's config.yaml ended: read as a recipe."""
    expected = parse_config(["--data", "patterns"])
    file = folder / "config.yaml"
    content = yaml.safe_dump(as_plain_data(expected)).encode()
    for number in range(num):
        file.write_bytes(mutate(content, kind, number, draws))
        try:
            config = parse_config(["--data", "patterns", "--config", str(file)])
        except ValueError as error:
            is_one_line = str(file) in str(error) and "\n" not in str(error)
            yield ("clean" if is_one_line else "traceback"), str(error)
        except BaseException as error:  # also SystemExit, of flags that could not be read
            yield "traceback", repr(error)
        else:
            config = replace(config, run=expected.run)
            yield ("clean" if config == expected else "silent"), ""


# how many of 100 mutations may be taken for another file, of which no checksum tells
OTHERS = {
    "recipe": (end_of_recipe, 60),
    "index": (end_of_index, 0),
    "pth": (end_of_pth, 0),
    "old_pth": (partial(end_of_pth, is_old=True), 60),
    "pax_tar": (end_of_tar, 60),
    "gnu_tar": (partial(end_of_tar, tar_format=tarfile.GNU_FORMAT), 60),
}


@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "recipe" else ()) for name in OTHERS],
)
def test_damaged_files_of_others_are_one_line_or_can_be_used(
    name: str, kind: str, tmp_path: Path
) -> None:
    end_of, most_silent = OTHERS[name]
    num = 10 if name == "recipe" else 40  # a recipe is read in a third of a second
    ends = list(end_of(tmp_path, kind, num, random.Random(0)))
    assert not [text for end, text in ends if end == "traceback"]
    num_silent = sum(end == "silent" for end, _ in ends)
    assert num_silent <= most_silent * len(ends) / 100
