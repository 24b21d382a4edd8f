"""Images a second of a training step without data, by part, and its share of the machine's peak.

    python benchmarks/bench_step.py --arch dino_vits16 resnet18
    python benchmarks/bench_step.py --arch dino_vits16 --batch 8 --original PATH

The step is the paper's: 2 crops of 224 and 8 of 96 px, K 65,536, AdamW, clipping by parameter. The
plain form is the same networks in the paper's algorithm: a backbone call for each crop size, the
loss of pairs, clipping, EMA and AdamW by parameter. `--original` is the code of a checkout of
facebookresearch/dino. Where lightly is installed, its networks, loss and moving average are
compared; lightly-train uses the same loss and head. All at one precision. The arithmetic an image
(GFLOP) is counted in ours, which leaves some of the plain form's out, and stands for all rows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import baseline
import measure
import peers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import Config, RunConfig
from dino_train import build_networks
from harness.command import run_command
from harness.distributed import has_compiler, make_accelerator
from harness.flags import is_installed
from losses import DinoLoss
from models import RESNETS, TIMM_NAMES, DinoModel, ModelConfig, update_teacher_EMA
from optimizers import clip_gradients

K = 65536  # prototypes
TEMP = 0.04  # of the teacher
CLIP = 3.0  # largest norm of a gradient
MOMENTUM = 0.996  # of the teacher's moving average
Marks = list[tuple[str, float]]


@dataclass(frozen=True)
class Options:
    arch: tuple[str, ...] = ("dino_vits16", "resnet18")
    batch: int = 16 if not torch.cuda.is_available() else 128
    precision: Literal["no", "bf16"] = "bf16" if torch.cuda.is_available() else "no"
    compile: bool = torch.cuda.is_available() and has_compiler()  # ours
    original: Path | None = None  # a checkout of facebookresearch/dino, compared too
    rounds: int = 5
    threads: int | None = None
    plain: bool = True  # the plain form, compared too


def autocast(options: Options) -> torch.autocast:
    is_on = options.precision == "bf16"
    return torch.autocast(measure.device().type, torch.bfloat16, enabled=is_on)


def model_config(arch: str) -> ModelConfig:
    return ModelConfig(arch=arch, projection_hidden_dim=2048, projection_output_dim=K)


def networks(arch: str) -> tuple[DinoModel, DinoModel]:
    config = model_config(arch)
    student, teacher = DinoModel.from_config(config), DinoModel.from_config(config)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def our_step(arch: str, options: Options) -> Callable[[list[Tensor]], Marks]:
    device = measure.device()
    config = Config(model=model_config(arch), run=RunConfig(compile=options.compile))
    system, optimizer = build_networks(config, make_accelerator(options.precision))
    system = system.to(device).train()
    student, teacher = system.student, system.teacher
    loss_of = DinoLoss(K).to(device)
    if options.compile:
        loss_of.use_torch_compile()

    def step(crops: list[Tensor], by_part: bool = False) -> Marks:
        marks: Marks = []

        def mark(name: str) -> None:
            if by_part:  # waits for the device, as training does not
                marks.append((name, now()))

        mark("")

        with autocast(options):
            with torch.no_grad():
                targets = teacher(crops[:2])
            mark("teacher")
            features = student._features_of_crops(crops)
            mark("student's backbone")
            logits = student.projection_head(features.flatten(end_dim=1))
            logits = logits.unflatten(0, features.shape[:2])
        # float32, as Accelerate gives what was computed under autocast
        logits, targets = logits.float(), targets.float()
        loss = loss_of(logits, targets, TEMP, overwrite_student=True)
        mark("head and loss")
        loss.backward()
        mark("backward")
        clip_gradients(student.parameters(), CLIP)
        mark("clip")
        optimizer.step()
        optimizer.zero_grad()
        mark("optimizer")
        loss_of.update_center(targets)
        update_teacher_EMA(student, teacher, MOMENTUM)
        mark("center and EMA")
        return marks

    return step


def by_parameter(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clip, step and average, one parameter after the other."""
    for param in student.parameters():
        if param.grad is not None:
            norm = param.grad.norm().item()
            if norm > CLIP:
                param.grad.mul_(CLIP / (norm + 1e-6))
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.mul_(MOMENTUM).add_((1 - MOMENTUM) * other.detach())


def plain_step(arch: str, options: Options) -> Callable[[list[Tensor]], None]:
    device = measure.device()
    student, teacher = (network.to(device).train() for network in networks(arch))
    loss_of = baseline.PairwiseLoss(K).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, foreach=False)

    def step(crops: list[Tensor]) -> None:
        with autocast(options):
            with torch.no_grad():
                targets = teacher(crops[:2])
            logits = student(crops)
        loss = loss_of(logits, targets, TEMP)
        loss.backward()
        by_parameter(student, teacher, optimizer)
        loss_of.update_center(targets)

    return step


def original_step(arch: str, options: Options) -> Callable[[list[Tensor]], None]:
    """Build the original's networks, loss and clipping into its loop's order."""
    import torchvision

    original, device = baseline.load_original(options.original), measure.device()
    names = {"dino_vits16": ("vit_small", 16), "dino_vits8": ("vit_small", 8)}
    names |= {"dino_vitb16": ("vit_base", 16), "dino_vitb8": ("vit_base", 8)}

    def network() -> nn.Module:
        if arch in names:
            name, patch_size = names[arch]
            backbone = getattr(original.vits, name)(patch_size=patch_size)
            dim = backbone.embed_dim
        else:
            backbone = torchvision.models.get_model(arch)
            dim = backbone.fc.weight.shape[1]
        head = original.vits.DINOHead(dim, K)
        return original.utils.MultiCropWrapper(backbone, head).to(device).train()

    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    loss_of = original.main.DINOLoss(K, 10, TEMP, TEMP, 0, 1).to(device)
    optimizer = torch.optim.AdamW(original.utils.get_params_groups(student))

    def step(crops: list[Tensor]) -> None:
        with autocast(options):
            targets, logits = teacher(crops[:2]), student(crops)
            loss = loss_of(logits, targets, 0)
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        original.utils.clip_gradients(student, CLIP)
        original.utils.cancel_gradients_last_layer(1, student, 1)
        optimizer.step()
        with torch.no_grad():
            for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * other.detach().data)
        measure.synchronize()

    return step


def lightly_step(arch: str, options: Options) -> Callable[[list[Tensor]], None]:
    """Build lightly's networks, loss and moving average, with a call for each crop size."""
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    device = measure.device()
    student = peers.lightly_network(arch, K).to(device).train()
    teacher = peers.lightly_network(arch, K).to(device).train()
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)
    loss_of = peers.lightly_loss(K).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    def step(crops: list[Tensor]) -> None:
        update_momentum(student, teacher, MOMENTUM)
        large, small = torch.cat(crops[:2]), torch.cat(crops[2:])
        with autocast(options):
            with torch.no_grad():
                targets = teacher(large)
            logits = torch.cat([student(large), student(small)])
            loss = loss_of(targets.chunk(2), logits.chunk(len(crops)), teacher_temp=TEMP)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()

    return step


def now() -> float:
    measure.synchronize()
    return time.perf_counter()


def peak_flops(options: Options) -> float:
    """Measure the machine's matrix peak at this precision, in FLOP/s."""
    device, side = measure.device(), 8192 if torch.cuda.is_available() else 2048
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = measure.in_turn({"": lambda: left @ right}, 10)[""]
    return 2 * side**3 / min(seconds)


def main() -> None:
    options = measure.read(Options, __doc__)
    precision = {"no": "float32", "bf16": "bf16 autocast"}[options.precision]
    machine = measure.machine(precision, options.threads)
    device = measure.device()
    torch.set_float32_matmul_precision("highest" if options.precision == "no" else "high")
    peak = peak_flops(options)
    sizes = [224] * 2 + [96] * 8
    crops = [torch.randn(options.batch, 3, size, size, device=device) for size in sizes]
    rows, parts = [], {}
    for arch in options.arch:
        steps = {"ours": our_step(arch, options)}
        if options.plain:
            steps["plain"] = plain_step(arch, options)
        if options.original:
            steps["original"] = original_step(arch, options)
        if is_installed("lightly") and arch in (*TIMM_NAMES, *RESNETS):
            steps[peers.with_version("lightly")] = lightly_step(arch, options)
        # ours, not compiled: the counter sees single operations
        eager = (
            our_step(arch, replace(options, compile=False)) if options.compile else steps["ours"]
        )
        with FlopCounterMode(display=False) as counter:
            eager(crops)
        del eager
        flops = counter.get_total_flops() / options.batch
        for _ in range(3 if options.compile else 0):
            steps["ours"](crops)
        calls = {name: (lambda step=step: step(crops)) for name, step in steps.items()}
        seconds = measure.in_turn(calls, options.rounds)
        times = {name: measure.median(values) for name, values in seconds.items()}
        for name, elapsed in times.items():
            speed = options.batch / elapsed
            row = [f"{arch}, {name}", f"{speed:.1f}", f"{measure.spread(seconds[name]):.0f} %"]
            row += [f"{flops / 1e9:.1f}", f"{100 * speed * flops / peak:.0f} %"]
            rows.append([*row, f"{measure.ratio(seconds[name], seconds['ours']):.2f}x"])
        marks = [steps["ours"](crops, by_part=True) for _ in range(3)]
        for i, (name, _) in enumerate(marks[0][1:], 1):
            spent = [run[i][1] - run[i - 1][1] for run in marks]
            total = [run[-1][1] - run[0][1] for run in marks]
            share = 100 * measure.median(spent) / measure.median(total)
            parts.setdefault(name, []).append(f"{1e3 * measure.median(spent):.1f} ({share:.0f} %)")
    caption = f"{machine}; batch {options.batch}, matrix peak {peak / 1e12:.2f} TFLOP/s"
    columns = ["step", "images/s", "spread", "GFLOP an image", "of the peak", "time to ours"]
    measure.show("training step without data", columns, rows, caption)
    table = [[name, *values] for name, values in parts.items()]
    measure.show("ours by part, ms", ["", *options.arch], table, machine)


if __name__ == "__main__":
    run_command(main)
