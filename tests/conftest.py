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

from eval_knn import run_command

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
    *("--data", "patterns", "--arch", "resnet10_half", "--batch-size", "16", "--epochs", "1"),
    *("--num-local-crops", "1", "--projection-hidden-dim", "16", "--projection-output-dim", "16"),
    *("--projection-bottleneck-dim", "8", "--warmup-epochs", "0", "--knn-every", "1"),
    *("--lr", "0.01", "--global-crop-size", "16", "--local-crop-size", "16"),
)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short finished run on the embedded data."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    result = run_script("dino_train", *TINY_FLAGS, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder
