"""Start training runs by fork, from a process that has imported everything: no seconds of imports.

    python tests/launcher.py < requests > answers

A request is a line of JSON: `flags` of dino_train.py; `world` processes of it, under `fsdp` or DDP;
`out`, a folder for what they print; and what kills them all with SIGKILL: `kill_after` seconds, or
`kill_at` a function's call, as ["module.name", number]. `file_limit_after` is [number, bytes]: no
larger file can be written from the `number`-th save on. `nan_at` is [rank, number]: that process's
`number`-th batch of crops is NaN. `script` is another one's name, `env` more of the environment.
The answer is a line with the exit codes.
"""

import contextlib
import importlib
import json
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType

import data
import dino_train
import embed
import eval_copies
import eval_knn
import eval_linear
import eval_retrieval
import eval_segmentation
import eval_video
from harness import bf16_on_cpu, command, distributed

# imported before the fork
SCRIPTS = {
    "dino_train": dino_train,
    "embed": embed,
    "eval_knn": eval_knn,
    "eval_linear": eval_linear,
    "eval_copies": eval_copies,
    "eval_retrieval": eval_retrieval,
    "eval_segmentation": eval_segmentation,
    "eval_video": eval_video,
}


class FsdpOnCpu(Accelerator):
    """Accelerate's own FSDP2 on CPUs, which it offers on GPUs only: relabelled once it is built."""

    def __init__(self, fsdp_plugin: object = None, **kwargs: object) -> None:
        super().__init__(fsdp_plugin=fsdp_plugin, **kwargs)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = fsdp_plugin
        assert self.is_fsdp2


def before(name: str, number: int, action: Callable[[], object]) -> None:
    """Do something before the `number`-th call of a function."""
    module_name, *names, attribute = name.split(".")
    owner = importlib.import_module(module_name)
    for part in names:
        owner = getattr(owner, part)
    function, calls = getattr(owner, attribute), []

    def count(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == number:
            action()
        return function(*args, **kwargs)

    setattr(owner, attribute, count)


def spoil_crops(number: int) -> None:
    """Make the `number`-th batch of crops NaN."""
    forward, calls = data.MultiCrop.forward, []

    def spoilt(*args: object) -> list[torch.Tensor]:
        calls.append(1)
        crops = forward(*args)
        return [crop * math.nan for crop in crops] if len(calls) == number else crops

    data.MultiCrop.forward = spoilt


def child(request: dict, rank: int, port: int) -> None:
    world = request.get("world", 1)
    out = os.open(Path(request["out"]) / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    bf16_on_cpu.CPUINFO = Path(os.devnull)  # float32, also where the CPU is fast in bf16
    os.environ |= request.get("env", {})
    if world > 1 or request.get("fsdp"):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
    if request.get("fsdp"):
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        distributed.Accelerator = FsdpOnCpu
    if request.get("kill_at"):
        before(*request["kill_at"], lambda: os.kill(os.getpid(), signal.SIGKILL))
    if request.get("file_limit_after"):
        number, limit = request["file_limit_after"]
        limits = resource.RLIMIT_FSIZE, (limit, limit)
        before("harness.run.Run.save", number, lambda: resource.setrlimit(*limits))
    if request.get("nan_at") and request["nan_at"][0] == rank:
        spoil_crops(request["nan_at"][1])
    script = request.get("script", "dino_train")
    sys.argv = [f"{script}.py", *map(str, request["flags"])]
    code = 1
    try:
        command.run_command(SCRIPTS[script].main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(request: dict) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(request.get("world", 1)):
        pid = os.fork()
        if pid == 0:
            child(request, rank, port)
        pids.append(pid)
    deadline = time.monotonic() + request.get("kill_after", 120)
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline or -signal.SIGKILL in codes.values():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 10
        else:
            time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(launch(json.loads(line))), file=answers, flush=True)
