"""Processes: an Accelerator for every launch line, guards, networks laid out, common decisions.

Accelerate takes some launch lines for others without a word: two independent runs, DDP for FSDP, or
one process for several. `join_processes` and `make_accelerator` stop there, and say what to type.
"""

import ctypes
import os
import shutil
import signal
import sys
import sysconfig
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Literal

import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._triton import has_triton

from harness.command import is_launched
from harness.freed_memory import keep_freed_memory

# Processes wait for each other this long, since the main one may have to download, scan or write.
PATIENCE = timedelta(hours=3)

# ---------------------------------------------------------------- launching


def join_processes() -> PartialState:
    """Join the processes of this launch, one or several, on GPUs or CPUs.

    For what comes before the precision is known, with which an Accelerator is built. Raises
    ValueError, naming what to type, for a launch that would do something else.
    """
    if is_set("ACCELERATE_USE_DEEPSPEED") or is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("need --multi_gpu or --use_fsdp, got DeepSpeed or Megatron-LM")
    for name in ("FSDP_ACTIVATION_CHECKPOINTING", "FSDP_OFFLOAD_PARAMS"):
        if is_set(name):
            raise ValueError(f"{name.lower()} is not supported: set it to false")
    processes = PartialState(cpu=is_on_cpu(), timeout=PATIENCE)
    _check_launch(processes)
    _use_all_cores(processes)
    if processes.device.type == "cpu":
        keep_freed_memory()
    return processes


def make_accelerator(
    mixed_precision: str | None = None,
    log_with: Literal["tensorboard", "wandb"] | None = None,
) -> Accelerator:
    """Build the Accelerator of this launch: one process, DDP or FSDP2, on a GPU or the CPU.

    Raises ValueError, naming what to type, for a launch that would do something else.
    """
    processes = join_processes()
    if mixed_precision == "fp16" and processes.device.type == "cpu":  # Accelerate takes float32
        raise ValueError("--mixed-precision fp16 needs a GPU: on a CPU take bf16 or no")
    uses_fsdp = is_set("ACCELERATE_USE_FSDP")
    if mixed_precision in (None, "no"):  # float32 is meant, not TF32, which cuDNN would take
        torch.backends.cudnn.allow_tf32 = False
    accelerator = Accelerator(
        cpu=processes.device.type == "cpu",
        mixed_precision=mixed_precision,
        log_with=log_with,
        fsdp_plugin=_fsdp_plugin() if uses_fsdp else None,
        project_dir=".",  # trackers need one; the run sets its folder once it is known
    )
    if uses_fsdp and not accelerator.is_fsdp2:
        raise ValueError(_without_fsdp(accelerator.device.type))
    return accelerator


def _fsdp_plugin() -> FullyShardedDataParallelPlugin:
    # FSDP2 warns of changes in place to what a module returns. The loss makes one, which is safe:
    # it overwrites the logits with their gradient, outside of autograd (losses.py).
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        # With --fsdp_version 1 the launcher puts the name of a strategy, such as FULL_SHARD, into a
        # variable that is then read as true or false; a value given here is taken in its place.
        reshard_after_forward=None if os.environ.get("FSDP_VERSION") == "2" else True,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,  # with it any BatchNorm model crashes
        # autocast casts, not FSDP: its one policy for all units breaks LayerNorm or BatchNorm
        mixed_precision_policy=MixedPrecisionPolicy(),
    )
    plugin.transformer_cls_names_to_wrap = None  # lay_out names them on the system
    return plugin


def wait_for(device: torch.device) -> None:
    """Wait until a GPU, of any kind, has done what it was given. A sync point."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def is_on_cpu() -> bool:
    """Tell whether this launch is for the CPU: by its environment, or since there is no other."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def _number(name: str, default: int) -> int:
    """Return an environment variable's number, or the default where it is not one."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


# where launchers say how many processes there are: torchrun and accelerate, then kinds of mpirun
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
GPU_LAUNCH = "accelerate launch --multi_gpu --num_processes"


def _launch_on_cpus() -> str:
    """Return what to type for several processes on CPUs."""
    return f"torchrun --nproc_per_node N {Path(sys.argv[0]).name} ..."


def _without_fsdp(device: str) -> str:
    text = f"--use_fsdp would train without FSDP on {device}, which needs GPUs"
    return f"{text}; type: {_launch_on_cpus()}"


def _check_launch(processes: PartialState) -> None:
    """Raise ValueError where processes or Slurm tasks are not what the launch asked for."""
    world, device = processes.num_processes, processes.device.type
    on_cpus = _launch_on_cpus()
    on_gpus = f"{GPU_LAUNCH} N {Path(sys.argv[0]).name} ..."
    launched = max(_number(name, 1) for name in WORLD_SIZES)
    if launched != world and is_set("ACCELERATE_USE_FSDP"):
        raise ValueError(_without_fsdp(device))
    if launched != world:
        text = f"{launched} processes were launched, and each would train alone on {device}"
        raise ValueError(f"{text}; type: {on_cpus} for CPUs, {on_gpus} for GPUs")
    if _is_one_of_several():
        text = "accelerate launch was asked for several processes and started one"
        raise ValueError(f"{text}; type: {on_cpus} for CPUs, {on_gpus} for GPUs")
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    if num_gpus and _number("LOCAL_RANK", 0) >= num_gpus:
        text = f"need a GPU for each process of a node: process {_number('LOCAL_RANK', 0)}"
        advice = f"launch fewer ({GPU_LAUNCH} {num_gpus}), or let all of them see all GPUs"
        raise ValueError(f"{text}, counted from 0, sees only {num_gpus}; {advice}")
    # tasks that know of each other: one a node where each is a torchrun, else one a process
    tasks, joined = _number("SLURM_STEP_NUM_TASKS", 1), _number("GROUP_WORLD_SIZE", world)
    if tasks > 1 and tasks != joined:
        text = f"srun started {tasks} tasks, and each would be a run of its own"
        advice = "type: sbatch launch/slurm.sh ..., which tells them of each other"
        raise ValueError(f"{text}; {advice}")


def _is_one_of_several() -> bool:
    """Tell whether accelerate launch was asked for several processes and started one.

    With --cpu it does. For several processes it sets MASTER_ADDR all the same, but no WORLD_SIZE.
    """
    is_of_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    return is_of_accelerate and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ


def launch_line(accelerator: Accelerator) -> str:
    """Return the words before a script's name that start it as it runs now, on one node.

    Of several nodes' processes it starts those of one: a resumed run shares its batch among them.
    """
    world = min(accelerator.num_processes, num_local_processes())
    if accelerator.is_fsdp2:
        return f"accelerate launch --use_fsdp --fsdp_version 2 --num_processes {world}"
    if world == 1:  # accelerate launch would start a process for each GPU
        return "python"
    if accelerator.device.type == "cpu":
        return f"torchrun --nproc_per_node {world}"
    return f"{GPU_LAUNCH} {world}"


def _use_all_cores(processes: PartialState) -> None:
    """Let a CPU process use its share of the cores, where a launcher has set one thread.

    That cannot be told from a user who set one; OMP_NUM_THREADS=2 and more are kept.
    """
    has_one_thread = os.environ.get("OMP_NUM_THREADS") == "1"
    if processes.device.type == "cpu" and is_launched() and has_one_thread:
        torch.set_num_threads(cores_per_process())


def num_local_processes() -> int:
    """Return how many processes of the run this node has."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


def num_shards() -> int:
    """Return how many processes share the weights: all under FSDP, else one."""
    return max(1, _number("WORLD_SIZE", 1)) if is_set("ACCELERATE_USE_FSDP") else 1


def usual_workers() -> int:
    """Return how many processes decode images where nobody says it."""
    return min(16, max(1, cores_per_process() - 1))


def cores_per_process() -> int:
    """Return a process's share of the cores that it may run on."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    cores_of_task = _number("SLURM_CPUS_PER_TASK", 0)
    if cores_of_task and "TORCHELASTIC_RUN_ID" not in os.environ:
        return cores_of_task  # each of Slurm's tasks is a process
    return max(1, (cores_of_task or cores) // num_local_processes())


def stop_with_launcher() -> None:
    """Let this process receive SIGTERM when its launcher is killed, which may not pass it on.

    Linux only; elsewhere nothing is done.
    """
    if is_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# ---------------------------------------------------------------- networks laid out


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return a network's blocks: all items of any outermost list of modules of one class."""
    blocks: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for module in network.modules():
        if module in inner or not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        has_parts = len(module) > 0 and any(True for _ in module[0].children())
        if has_parts and all(isinstance(item, type(module[0])) for item in module):
            blocks += module
            inner |= set(module.modules())
    return blocks


def has_compiler() -> bool:
    """Tell whether torch.compile finds what it builds with: a compiler and Python's headers.

    On a GPU it needs Triton, too, which takes GPUs of compute capability 7.0 and above.
    """
    if torch.cuda.is_available() and not is_on_cpu():  # Triton compiles C
        if not has_triton():
            return False
        compilers = [os.environ.get("CC"), "gcc", "clang"]
    else:
        compilers = [os.environ.get("CXX"), "g++", "clang++"]
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's, which is where pip installs and has no headers
        scheme = "posix_prefix"
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return header.is_file() and any(shutil.which(name) for name in compilers if name)


def crashes_in_channels_last(system: nn.Module) -> bool:
    """Tell whether a CPU would write outside of its memory for a network in channels_last.

    With torch 2.14 the gradient of a 1x1 convolution with stride 2 of 3 or 4 channels does that.
    MobileOne and FastViT begin with one.
    """
    return any(
        module.kernel_size == (1, 1) and max(module.stride) > 1 and module.in_channels <= 4
        for module in system.modules()
        if isinstance(module, nn.Conv2d)
    )


def lay_out(
    system: nn.Module, accelerator: Accelerator, sync_bn: bool, compile_blocks: bool
) -> nn.Module:
    """Return networks ready to be prepared: memory format, BatchNorm and blocks to shard are set.

    They are compiled block by block: six graphs for a ViT of any depth, and the state's names stay.
    Blocks with SyncBatchNorm are left as they are: it waits for the device, which breaks graphs.
    """
    if accelerator.is_fsdp2:  # FSDP2 shards contiguous parameters only
        block_names = sorted({type(block).__name__ for block in repeated_blocks(system)})
        system._no_split_modules = ["DinoModel", *block_names]
    elif accelerator.device.type != "cpu" or not crashes_in_channels_last(system):
        # 1.2 times faster for convolutions, no difference for ViTs
        system = system.to(memory_format=torch.channels_last)
    if sync_bn and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        system = timm.layers.convert_sync_batchnorm(system)
    if compile_blocks:
        # Blocks share their code, and its graphs: those of a ResNet are many, one for each stage,
        # crop size, student and teacher.
        torch._dynamo.config.recompile_limit = 128
        torch._dynamo.config.optimize_ddp = False  # it would cut blocks where DDP's buckets end
        for block in repeated_blocks(system):
            if not any(isinstance(module, nn.SyncBatchNorm) for module in block.modules()):
                block.compile(dynamic=False)
    return system


def is_compiled(network: nn.Module) -> bool:
    """Tell whether any module of a network was compiled in place."""
    # torch has no public way to ask (tried with 2.11 and 2.14)
    return any(module._compiled_call_impl is not None for module in network.modules())


# ---------------------------------------------------------------- common decisions


class Agreement:
    """Decide in common with all processes, by a group of their CPUs: no GPU is waited for."""

    def __init__(self) -> None:
        has_others = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if has_others else None

    def largest(self, *values: int) -> list[int]:
        """Return the largest of each value over all processes. A collective."""
        tensor = torch.tensor(values, dtype=torch.int64)
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def gather(self, value: object) -> list:
        """Return every process's value, by rank. A collective."""
        if self.group is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def require_same(self, value: object, what: str) -> None:
        """Raise ValueError in all processes where they do not have the same value. A collective.

        Nodes without a folder in common would go on from different steps, or wait for each other.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                text = f"processes 0 and {rank} do not see the same {what}: need one for all"
                raise ValueError(f"{text} (do all nodes have the folder in common?)")
