import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from data import draw_patterns
from run_io import run_command

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def parity() -> dict[str, Tensor]:
    """Numbers recorded by running the original; record_parity.py says how."""
    return load_file(ROOT / "tests" / "parity.safetensors")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_script(name: str, *args: object) -> Result:
    """Run a script's main in this process, which saves the seconds that its imports take."""
    main, out, err = import_module(name).main, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        try:
            run_command(main)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def script() -> Callable[..., Result]:
    return run_script


TINY_FLAGS = (
    *("--arch", "resnet10_half", "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "0"),
    *("--num-local-crops", "1", "--projection-hidden-dim", "16", "--projection-output-dim", "16"),
    *("--projection-bottleneck-dim", "8", "--knn-every", "1", "--lr", "0.01", "--num-workers", "0"),
)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 JPEGs of 16 px in two class folders, drawn as the embedded data."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("stripes", "checks"):
        (folder / name).mkdir()
    for index in range(40):
        images = draw_patterns(torch.tensor([10 * index, 10 * index + 1]), size=16)
        for name, image in zip(("stripes", "checks"), images, strict=True):
            TF.to_pil_image(image).save(folder / name / f"{index}.jpg")
    return folder


@pytest.fixture(scope="session")
def tiny_flags(image_folder: Path) -> list[str]:
    """A run of 2 epochs of 10 steps, in about a second."""
    return ["--data", str(image_folder), *TINY_FLAGS]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """The folder of a short finished run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    result = run_script("dino_train", *tiny_flags, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder
