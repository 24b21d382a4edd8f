"""Processes: an Accelerator for every launch line, guards, sharded tensors, common decisions.

Accelerate takes some launch lines for others without a word: two independent runs, DDP for FSDP, or
one process for several. `make_accelerator` stops there, and says what to type.
"""

import ctypes
import os
import re
import shutil
import signal
import sys
import sysconfig
import warnings
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Literal

import psutil
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

# the main process may take long over what others wait for: a download, a scan, a file
PATIENCE = timedelta(hours=3)

# ---------------------------------------------------------------- launching


def make_accelerator(
    mixed_precision: str | None = None,
    log_with: Literal["tensorboard", "wandb"] | None = None,
) -> Accelerator:
    """Build the Accelerator of this launch: one process, DDP or FSDP2, on a GPU or the CPU.

    Raises ValueError, naming what to type, for a launch that would do something else.
    """
    plugin = None
    if is_set("ACCELERATE_USE_DEEPSPEED") or is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("need --multi_gpu or --use_fsdp, got DeepSpeed or Megatron-LM")
    for name in ("FSDP_ACTIVATION_CHECKPOINTING", "FSDP_OFFLOAD_PARAMS"):
        if is_set(name):
            raise ValueError(f"{name.lower()} is not supported: set it to false")
    if is_set("ACCELERATE_USE_FSDP"):
        if mixed_precision == "fp16":
            raise ValueError("FSDP trains in bf16 or float32, got --mixed-precision fp16")
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            # FSDP1's name for it is no truth value
            reshard_after_forward=None if os.environ.get("FSDP_VERSION") == "2" else True,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,  # with it any BatchNorm model crashes
            # autocast casts, not FSDP: its one policy for all units breaks LayerNorm or BatchNorm
            mixed_precision_policy=MixedPrecisionPolicy(),
        )
        plugin.transformer_cls_names_to_wrap = None  # the system names them
        # nothing is done in place on what the networks return
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    if mixed_precision in (None, "no"):  # float32 is meant, not TF32, which cuDNN would take
        torch.backends.cudnn.allow_tf32 = False
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        log_with=log_with,
        fsdp_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        project_dir=".",  # trackers want one; the run's folder, once it is known
    )
    _check_launch(accelerator)
    _use_all_cores(accelerator)
    return accelerator


def is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


# of torchrun and accelerate launch, then of kinds of mpirun
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def _check_launch(accelerator: Accelerator) -> None:
    """Raise ValueError where processes, Slurm tasks or FSDP are not what the launch asked for."""
    world, device = accelerator.num_processes, accelerator.device.type
    script = Path(sys.argv[0]).name
    on_cpus, on_gpus = f"torchrun --nproc_per_node N {script} ...", f"{GPU_LAUNCH} N {script} ..."
    if is_set("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        text = f"--use_fsdp would train without FSDP on {device}, which needs GPUs"
        raise ValueError(f"{text}; type: {on_cpus}")
    launched = max(_number(name, 1) for name in WORLD_SIZES)
    if launched != world:
        text = f"{launched} processes were launched, and each would train alone on {device}"
        raise ValueError(f"{text}; type: {on_cpus} for CPUs, {on_gpus} for GPUs")
    if world == 1 and _is_one_of_several():
        text = "accelerate launch was asked for several processes and started one"
        raise ValueError(f"{text}; type: {on_cpus} for CPUs, {on_gpus} for GPUs")
    tasks, nodes = _number("SLURM_STEP_NUM_TASKS", 1), _number("GROUP_WORLD_SIZE", world)
    if tasks > 1 and tasks != nodes:
        text = f"srun started {tasks} tasks, and each would be a run of its own"
        raise ValueError(
            f"{text}; type: sbatch launch/slurm.sh ..., which tells them of each other"
        )


GPU_LAUNCH = "accelerate launch --multi_gpu --num_processes"


def launch_line(accelerator: Accelerator) -> str:
    """Give the words before a script's name that start it as it runs now."""
    world = accelerator.num_processes
    if accelerator.is_fsdp2:
        return f"accelerate launch --use_fsdp --fsdp_version 2 --num_processes {world}"
    if world == 1:
        return "accelerate launch"
    is_cpu = accelerator.device.type == "cpu"
    return f"{'torchrun --nproc_per_node' if is_cpu else GPU_LAUNCH} {world}"


def _is_one_of_several() -> bool:
    """Tell whether accelerate launch was asked for several processes, and then ran one.

    Its launcher for CPUs does; it sets MASTER_ADDR for them all the same.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return False
    try:
        launcher = psutil.Process(os.getppid())
        words = " ".join(launcher.cmdline())
        prepared = "MASTER_ADDR" in os.environ and "MASTER_ADDR" not in launcher.environ()
    except psutil.Error:  # the launcher is gone, or another user's
        return False
    asked = re.search(r"--num[_-]processes[ =](\d+)", words)
    return prepared or (asked is not None and int(asked[1]) > 1)


def _use_all_cores(accelerator: Accelerator) -> None:
    """Give a CPU process its share of the cores, where a launcher has set one thread.

    Which cannot be told from a user who did: OMP_NUM_THREADS=2 and more are kept.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if accelerator.device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(cores_per_process())


def cores_per_process() -> int:
    """Give a process's share of the cores that it may run on."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    # a Slurm task may run on its own cores only
    return _number("SLURM_CPUS_PER_TASK", max(1, cores // _number("LOCAL_WORLD_SIZE", 1)))


def stop_with_launcher() -> None:
    """Receive SIGTERM when the launcher is killed, which may not pass it on. Linux only."""
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        set_death_signal = getattr(ctypes.CDLL(None), "prctl", None)
        if set_death_signal is not None:
            set_death_signal(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# ---------------------------------------------------------------- networks and their shards


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Find a network's blocks: all items of any outermost list of modules of one class."""
    blocks, inner = [], set()
    for module in network.modules():
        if isinstance(module, nn.Sequential | nn.ModuleList) and module not in inner:
            has_parts = len(module) > 0 and any(True for _ in module[0].children())
            if has_parts and all(isinstance(item, type(module[0])) for item in module):
                blocks += module
                inner |= set(module.modules())
    return blocks


def has_compiler() -> bool:
    """Tell whether torch.compile finds what it builds with: a compiler and Python's headers."""
    if torch.cuda.is_available():  # Triton's
        names = (os.environ.get("CC"), "gcc", "clang")
    else:
        names = (os.environ.get("CXX"), "g++", "clang++")
    scheme = sysconfig.get_default_scheme()
    # Debian's default is where pip installs, which has no headers
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return header.is_file() and any(shutil.which(name) for name in names if name)


def lay_out(
    system: nn.Module, accelerator: Accelerator, sync_bn: bool, compile_blocks: bool
) -> nn.Module:
    """Make networks ready to be prepared: their memory format, BatchNorm, blocks to shard.

    Compiled block by block: six graphs for a ViT of any depth, and the state's names stay. Blocks
    with SyncBatchNorm are left as they are: it waits for the device, which breaks their graphs.
    """
    if accelerator.is_fsdp2:  # FSDP2 shards contiguous parameters only
        names = sorted({type(block).__name__ for block in repeated_blocks(system)})
        system._no_split_modules = ["DinoModel", *names]
    else:  # 1.2 times faster for convolutions, no difference for ViTs
        system = system.to(memory_format=torch.channels_last)
    if sync_bn and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        system = timm.layers.convert_sync_batchnorm(system)
    if compile_blocks:
        # blocks share their code, and its graphs: of a ResNet, stages x sizes x student, teacher
        torch._dynamo.config.recompile_limit = 128
        torch._dynamo.config.optimize_ddp = False  # which would cut blocks where buckets end
        for block in repeated_blocks(system):
            if not any(isinstance(module, nn.SyncBatchNorm) for module in block.modules()):
                block.compile(dynamic=False)
    return system


def local(tensor: Tensor) -> Tensor:
    """Give this process's shard of a tensor, or the tensor where it is not sharded; no copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Give a tensor with all its shards. A collective where it has any."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, each process its shard, in place."""
    if isinstance(target, DTensor):
        value = value.to(target.device)
        where = target.device_mesh, target.placements
        value = distribute_tensor(value, *where, src_data_rank=None)  # all have it: no traffic
    target.copy_(value)


def tensor_norms(tensors: Iterable[Tensor]) -> Tensor:
    """Give the 2-norm of each tensor (n,), over all shards. A collective where there are any."""
    tensors = list(tensors)
    norms = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors]))
    if isinstance(tensors[0], DTensor):
        squares = norms.square()
        dist.all_reduce(squares, group=tensors[0].device_mesh.get_group())
        norms = squares.sqrt()
    return norms


@torch.no_grad()
def copy_buffers_of_main(module: nn.Module) -> None:
    """Give every process the main one's buffers, BatchNorm's statistics. A collective."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


# ---------------------------------------------------------------- common decisions


class Agreement:
    """What processes decide in common, over a group of their CPUs, so that no GPU is waited for."""

    def __init__(self) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None

    def largest(self, *values: int) -> list[int]:
        """Give the largest of each value over all processes. A collective."""
        tensor = torch.tensor(values)
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def gather(self, value: object) -> list:
        """Give every process's value, by rank. A collective."""
        if self.group is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values
