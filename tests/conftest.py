import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: the tests are for CPUs, beside a GPU, too

# isort: split

import functools
import io
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
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
from harness import bf16_on_cpu, outlook
from harness.command import run_command
from harness.distributed import cores_per_process
from harness.monitor import Monitor

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=15, help="times that a run is killed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Split --kills into tests of five: `first_kill` is the number of each test's first one."""
    if "first_kill" in metafunc.fixturenames:
        num_kills = metafunc.config.getoption("--kills")
        metafunc.parametrize("first_kill", range(0, num_kills, 5))


@pytest.fixture(scope="session")
def parity() -> dict[str, Tensor]:
    """Numbers recorded by running the original; record_parity.py says how."""
    return load_file(ROOT / "tests" / "parity.safetensors")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what scans find out of the user's cache, in the processes that tests start, too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny networks gain nothing by threads, which wait for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def all_cores() -> Iterator[None]:
    """For a test that trains in earnest."""
    torch.set_num_threads(cores_per_process())
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _float32_on_any_cpu() -> None:
    """Let runs take one precision on all machines: on some CPUs it would be bf16."""
    bf16_on_cpu.CPUINFO = Path(os.devnull)


@pytest.fixture(scope="session", autouse=True)
def _costs_are_counted_once() -> None:
    """What a step will take is computed before each run: of the same tiny one once is enough."""
    cached = functools.cache(outlook.step_cost)
    outlook.step_cost = lambda model, sizes, batch_size: cached(model, tuple(sizes), batch_size)
    outlook.flops_per_second = functools.cache(outlook.flops_per_second)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


MEASURED = ("images_per_second", "data_wait", "peak_memory_gib")  # a run's own, in its log


def stop_at(monkeypatch: pytest.MonkeyPatch, stop_step: int, number: int) -> None:
    """Let a run receive a signal in a step."""
    add = Monitor.add

    def add_and_signal(self: Monitor, step: int, *args: object) -> None:
        add(self, step, *args)
        if step == stop_step:
            signal.raise_signal(number)

    monkeypatch.setattr(Monitor, "add", add_and_signal)


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


TINY_FLAGS = """
    --mixed-precision no
    --arch test_resnet --batch-size 8 --epochs 2 --warmup-epochs 0 --num-local-crops 1
    --projection-hidden-dim 16 --projection-output-dim 16 --projection-bottleneck-dim 8
    --knn-every 1 --lr 0.01 --num-workers 0
""".split()


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


VIT_FLAGS = """
    --mixed-precision no
    --arch test_vit --patch-size 8 --drop-path-rate 0 --epochs 2
    --warmup-epochs 0 --num-local-crops 1 --lr 0.01 --projection-hidden-dim 16
    --projection-output-dim 16 --knn-every 0 --projection-bottleneck-dim 8 --num-workers 0
    --teacher-temp 0.04 --teacher-momentum 0.996 --freeze-last-layer-epochs 1
""".split()


@pytest.fixture(scope="session")
def vit_flags(image_folder: Path) -> list[str]:
    """A run without BatchNorm and drop path: the same on any number of processes."""
    return ["--data", str(image_folder), *VIT_FLAGS]


class Answer(NamedTuple):
    codes: list[int]  # of each process; -9 where it was killed
    text: str  # what they printed, by rank


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Answer]]:
    """Run dino_train.py's main in processes of its own, as launcher.py says."""
    pipe = subprocess.PIPE
    command = [sys.executable, str(ROOT / "tests" / "launcher.py")]
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    folder, numbers = tmp_path_factory.mktemp("launches"), itertools.count()

    def launch(flags: list, **request: object) -> Answer:
        out = folder / str(next(numbers))
        out.mkdir()
        request |= {"flags": [str(flag) for flag in flags], "out": str(out)}
        print(json.dumps(request), file=server.stdin, flush=True)
        codes = json.loads(server.stdout.readline())
        return Answer(codes, "".join(file.read_text() for file in sorted(out.iterdir())))

    yield launch
    server.kill()  # the end of its input might not reach it: forked processes share the pipe
    server.wait()


def same_files(one: Path, other: Path) -> bool:
    return {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
