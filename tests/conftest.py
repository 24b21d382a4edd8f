import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def parity() -> dict[str, Tensor]:
    """Numbers recorded by running the original; record_parity.py says how."""
    return load_file(ROOT / "tests" / "parity.safetensors")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def run_script(*args: object, **kwargs: object) -> subprocess.CompletedProcess:
    """Run a script of the project as its user does, on the CPU and one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / str(args[0])), *map(str, args[1:])]
    options = {"capture_output": True, "text": True, "check": False, "env": env} | kwargs
    return subprocess.run(command, **options)


@pytest.fixture(scope="session")
def script() -> Callable[..., subprocess.CompletedProcess]:
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
    result = run_script("dino_train.py", *TINY_FLAGS, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder
