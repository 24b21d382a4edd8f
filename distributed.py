"""Processes: an Accelerator for every launch line, guards, sharded tensors, common decisions.

Accelerate takes some launch lines for others without a word: two independent runs, DDP for FSDP, or
one process for several. `make_accelerator` stops there, and says what to type.
"""

import ctypes
import os
import shutil
import signal
import warnings
from collections.abc import Iterable
from typing import Literal

import psutil
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

# ---------------------------------------------------------------- launching


def make_accelerator(
    mixed_precision: str | None = None,
    accumulation_steps: int = 1,
    log_with: Literal["tensorboard", "wandb"] | None = None,
) -> Accelerator:
    """Build the Accelerator of this launch: one process, DDP or FSDP2, on a GPU or the CPU.

    Raises ValueError, naming what to type, for a launch that would do something else.
    """
    plugin = None
    if _is_set("ACCELERATE_USE_FSDP"):
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
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        log_with=log_with,
        fsdp_plugin=plugin,
    )
    # set here, since an environment variable overrides the argument
    accelerator.gradient_accumulation_steps = accumulation_steps
    _check_launch(accelerator)
    _use_all_cores(accelerator)
    return accelerator


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def _check_launch(accelerator: Accelerator) -> None:
    """Raise ValueError where processes, Slurm tasks or FSDP are not what the launch asked for."""
    world, device = accelerator.num_processes, accelerator.device.type
    env = {key: int(value) for key, value in os.environ.items() if value.isdigit()}
    if _is_set("ACCELERATE_USE_DEEPSPEED") or _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("need --multi_gpu or --use_fsdp, got DeepSpeed or Megatron-LM")
    if _is_set("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        raise ValueError(
            f"--use_fsdp would train without FSDP on {device}, which needs GPUs; "
            "type: torchrun --nproc_per_node N dino_train.py ..."
        )
    launched = env.get("WORLD_SIZE", 1)
    if launched != world:
        raise ValueError(
            f"{launched} processes were launched, and each would train alone on {device}; "
            "type: torchrun --nproc_per_node N dino_train.py ... for CPUs or NVIDIA GPUs"
        )
    if world == 1 and _is_one_of_several():
        raise ValueError(
            "accelerate launch was asked for several processes and started one; "
            "type: torchrun --nproc_per_node N dino_train.py ... for CPUs, "
            "accelerate launch --multi_gpu --num_processes N dino_train.py ... for GPUs"
        )
    tasks, nodes = env.get("SLURM_STEP_NUM_TASKS", 1), env.get("GROUP_WORLD_SIZE", world)
    if tasks > 1 and tasks != nodes:
        raise ValueError(
            f"srun started {tasks} tasks, and each would be a run of its own; "
            "type: sbatch launch/slurm.sh ..., which tells them of each other"
        )


def _is_one_of_several() -> bool:
    """Tell whether accelerate launch prepared for several processes, and then ran one.

    It sets MASTER_ADDR for --num_processes 2, though its launcher for CPUs starts one.
    """
    if "MASTER_ADDR" not in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return False
    try:
        return "MASTER_ADDR" not in psutil.Process(os.getppid()).environ()
    except psutil.Error:  # the launcher is gone, or another user's
        return False


def _use_all_cores(accelerator: Accelerator) -> None:
    """Give a CPU process its share of the cores, where a launcher has set one thread."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if accelerator.device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(cores_per_process())


def cores_per_process() -> int:
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def stop_with_launcher() -> None:
    """Receive SIGTERM when accelerate launch is killed, which does not pass it on. Linux only."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
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
            if has_parts and len({type(item) for item in module}) == 1:
                blocks += module
                inner |= set(module.modules())
    return blocks


def has_compiler() -> bool:
    """Tell whether torch.compile finds the C compiler that it needs."""
    names = (os.environ.get("CC"), os.environ.get("CXX"), "gcc", "g++", "clang", "cc", "cl")
    return any(shutil.which(name) for name in names if name)


def lay_out(
    system: nn.Module, accelerator: Accelerator, sync_bn: bool, compile_blocks: bool
) -> nn.Module:
    """Make networks ready to be prepared: their memory format, BatchNorm, blocks to shard.

    Compiled block by block: three graphs, whatever the depth, and the state's names stay.
    """
    if accelerator.is_fsdp2:  # FSDP2 shards contiguous parameters only
        names = sorted({type(block).__name__ for block in repeated_blocks(system)})
        system._no_split_modules = ["DinoModel", *names]
    else:  # 1.2 times faster for convolutions, no difference for ViTs
        system = system.to(memory_format=torch.channels_last)
    if sync_bn and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        system = timm.layers.convert_sync_batchnorm(system)
    if compile_blocks:
        for block in repeated_blocks(system):
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
        self.group = dist.new_group(backend="gloo") if several else None

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
