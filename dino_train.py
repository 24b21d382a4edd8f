"""Train DINO: a student learns from multi-crop views to match a teacher, its moving average.

    accelerate launch dino_train.py                                      # quick start, minutes
    accelerate launch dino_train.py --data /imagenet --arch dino_vits16
    accelerate launch dino_train.py --config recipes/NAME.yaml --epochs 50
    accelerate launch dino_train.py --resume runs/NAME

Source: DINO, arXiv 2104.14294. Axes: b batch, v student views, t teacher views, d features,
k output_dim.
"""

import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

import data
from config import QUICKSTART, Config, parse_config, resolve
from data import MultiCrop, StepSampler, hash_keys, permutation
from eval_knn import evaluation_splits, features_of_splits, knn_accuracy
from losses import DinoLoss
from models import DinoModel, update_teacher_EMA
from run_io import (
    Monitor,
    Run,
    TrainingState,
    ignore_stop_requests,
    run_command,
    stop_requests,
)

# ---------------------------------------------------------------- schedules and optimizer


def cosine_schedule(
    step: int, total_steps: int, start: float, end: float, warmup_steps: int = 0
) -> float:
    """Give the value at `step`: linear from 0 to `start`, then half a cosine towards `end`.

    The original's values: the warm-up reaches both its ends, as np.linspace does, so that `start`
    stands twice; `end` would be reached at step `total_steps`, after the last.
    """
    if step < warmup_steps:
        return start * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


class Schedule(NamedTuple):
    epoch: int
    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float


def schedules(config: Config, step: int, steps_per_epoch: int, batch_size: int) -> Schedule:
    """Give what step `step` (from 0) trains with; `batch_size` is over all processes."""
    optim, teacher, epoch = config.optim, config.teacher, step // steps_per_epoch
    total_steps = optim.epochs * steps_per_epoch
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    peak = optim.lr * batch_size / 256  # the linear scaling rule; min_lr is not scaled
    temp, warmup = teacher.teacher_temp, teacher.warmup_teacher_temp_epochs
    if epoch < warmup:  # by epoch, and both ends reached, as in the original
        low = teacher.warmup_teacher_temp
        temp = low + (temp - low) * epoch / max(1, warmup - 1)
    return Schedule(
        epoch=epoch,
        lr=cosine_schedule(step, total_steps, peak, optim.min_lr, warmup_steps),
        weight_decay=cosine_schedule(step, total_steps, optim.weight_decay, optim.weight_decay_end),
        teacher_momentum=cosine_schedule(step, total_steps, teacher.teacher_momentum, 1.0),
        teacher_temp=temp,
    )


class Lars(torch.optim.SGD):
    """SGD whose first group's gradients are scaled to 0.001 of their parameter's norm, decay added.

    arXiv 1708.03888 by the original's rule. timm's divides by |grad| + decay |param| instead of
    |grad + decay param|, which shortens the updates: by 29 % in our test at a decay of 0.04.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        group = self.param_groups[0]
        params = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        torch._foreach_add_(grads, params, alpha=group["weight_decay"])
        sizes, lengths = (torch.stack(torch._foreach_norm(x)) for x in (params, grads))
        scales = torch.where((sizes > 0) & (lengths > 0), 0.001 * sizes / lengths, 1.0)
        torch._foreach_mul_(grads, list(scales.unbind()))
        decay, group["weight_decay"] = group["weight_decay"], 0.0  # it is in the gradients already
        loss = super().step(closure)
        group["weight_decay"] = decay
        return loss


def build_optimizer(student: nn.Module, name: str) -> torch.optim.Optimizer:
    """Build the optimizer with two groups; the first alone takes weight decay.

    Biases and 1-d parameters are in the second: neither decayed nor adapted by LARS.
    """
    params = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    decayed = [p for name, p in params if p.ndim > 1 and not name.endswith(".bias")]
    others = [p for name, p in params if p.ndim <= 1 or name.endswith(".bias")]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    return (Lars if name == "lars" else torch.optim.SGD)(groups, lr=0.0, momentum=0.9)


@torch.no_grad()
def clip_gradients(params: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale each parameter's gradient to a norm of at most `max_norm`, in place, as the original.

    torch's clip_grad_norm_ has one norm over all of them instead.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1.0).unbind()))


# ---------------------------------------------------------------- training


class DinoSystem(nn.Module):
    """Student and teacher as the one module that Accelerate prepares; all calls go through it."""

    def __init__(self, student: DinoModel, teacher: DinoModel) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)

    def forward(self, crops: list[Tensor] | Tensor, features_only: bool = False) -> tuple | Tensor:
        """Give student logits (v, b, k), teacher logits (t, b, k) and teacher features (t, b, d).

        The teacher sees the two global crops. `features_only`: the teacher's features of images.
        """
        if features_only:
            return self.teacher.backbone(crops)
        with torch.no_grad():
            features, teacher_logits = self.teacher(crops[:2], return_backbone_features=True)
        return self.student(crops), teacher_logits, features


def teacher_knn(
    model: nn.Module, splits: tuple[Dataset, Dataset], config: dict, accelerator: Accelerator
) -> float:
    """Give the k-NN top-1 in % (k 20) of the teacher, in eval mode meanwhile. A collective."""
    model.eval()
    forward = partial(model, features_only=True)
    num_workers = config["data"]["num_workers"]
    tensors = features_of_splits(forward, splits, config, accelerator, 256, num_workers)
    model.train()
    return knn_accuracy(*tensors, ks=(20,))[20][0]


def feature_spread(features: Tensor) -> Tensor:
    """Give the deviation over the batch of features (t, b, d) of length 1: 0 when they collapse."""
    directions = F.normalize(features.float(), dim=-1)
    return directions.std(dim=1, correction=0).norm(dim=-1).mean()


def use_all_cores(accelerator: Accelerator) -> None:
    """Give a CPU process its share of the cores, where accelerate launch has set one thread."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if accelerator.device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))


def header(config: Config, accelerator: Accelerator, num_images: int, model: DinoModel) -> Table:
    """Lay out what is about to be trained, on what, and how."""
    optim, crops, world = config.optim, config.crops, accelerator.num_processes
    batch, device = optim.batch_size * world, accelerator.device.type
    backbone, head = (sum(p.numel() for p in part.parameters()) / 1e6 for part in model.children())
    local = f" + {crops.num_local_crops} of {crops.local_crop_size}" * (crops.num_local_crops > 0)
    rows = {
        "arch": f"{config.model.arch}: {backbone:.2f} M parameters, {head:.2f} M in the head, "
        f"K {config.model.projection_output_dim:,}",
        "data": f"{config.data.data}: {num_images:,} images, "
        f"crops 2 of {crops.global_crop_size}{local} px",
        "device": f"{world} x {torch.cuda.get_device_name() if device == 'cuda' else device}, "
        f"mixed precision: {accelerator.mixed_precision}",
        "batch": f"{batch} images, {num_images // batch:,} steps an epoch, {optim.epochs} epochs",
        "optimizer": f"{optim.optimizer}, lr {optim.lr * batch / 256:.3g} "
        f"({optim.lr:g} x {batch} / 256)",
    }
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/]", escape(text))
    return table


def train(config: Config) -> dict:
    """Train as `config` says; gives the checkpoint's path and the last step, loss and k-NN.

    Raises ValueError for what cannot be meant, before anything is written; FloatingPointError for a
    loss that is not finite, with the last good checkpoint kept.
    """
    # ---- what is wrong fails here, before a file is written
    dataset = data.build_dataset(config.data.data)
    config = resolve(config, dataset)
    dataset.transform = partial(data.to_canvas, size=config.data.canvas_size)
    run, optim, seed = Run(config), config.optim, config.run.seed
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.run.mixed_precision,
        log_with=config.run.log_with,
        project_dir=run.folder,
    )
    use_all_cores(accelerator)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    batch_size = optim.batch_size * world
    sampler = partial(StepSampler, len(dataset), optim.batch_size, seed, rank, world)
    steps_per_epoch = sampler(range(0)).steps_per_epoch
    total_steps = optim.epochs * steps_per_epoch
    splits, why_no_knn = None, "--knn-every 0"
    if config.run.knn_every:
        try:
            memory, test = evaluation_splits(run.config)
            order = permutation(len(memory), 0)
            splits = Subset(memory, order[: config.run.knn_images].tolist()), test
        except ValueError as error:
            why_no_knn = str(error)

    # ---- student, teacher, loss, optimizer
    torch.manual_seed(seed)
    student = DinoModel.from_config(config.model)
    teacher = DinoModel.from_config(replace(config.model, drop_path_rate=0.0, pretrained=False))
    teacher.load_state_dict(student.state_dict())
    # channels last: 1.2 times faster for convolutions, no difference for ViTs
    system = DinoSystem(student, teacher).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(student, optim.optimizer)
    model, stepper = accelerator.prepare(system, optimizer)
    model.train()  # the teacher too: its BatchNorm uses the batch, as in the original
    multi_crop = MultiCrop(config.crops).to(device)
    temp, momentum = config.teacher.student_temp, config.teacher.center_momentum
    dino_loss = DinoLoss(config.model.projection_output_dim, temp, momentum).to(device)
    last_layer = list(student.projection_head.last_layer.parameters())
    state = TrainingState(system, dino_loss, optimizer, accelerator.scaler)
    start, metrics = run.load(state) if config.run.resume else (0, {})

    # ---- files and terminal
    monitor = Monitor(run, accelerator, start, total_steps)
    say = monitor.console.print
    say(header(config, accelerator, len(dataset), student))
    if splits is None:
        say(f"no k-NN during training: {why_no_knn}", markup=False)
    warm_ups = {
        "--warmup-epochs": optim.warmup_epochs,
        "--warmup-teacher-temp-epochs": config.teacher.warmup_teacher_temp_epochs,
    }
    for flag, epochs in warm_ups.items():
        if epochs > optim.epochs:
            say(f"warning: {flag} {epochs:g} is longer than the run of {optim.epochs} epochs")
    if config.run.resume:
        say(f"resumed {run.folder} after step {start:,} of {total_steps:,}")
    if accelerator.is_main_process:
        run.open(start)
    if config.run.log_with:
        accelerator.init_trackers("dino")

    def evaluate(step: int) -> None:
        metrics["knn_top1"] = teacher_knn(model, splits, run.config, accelerator)
        metrics.setdefault("knn_top1_untrained", metrics["knn_top1"])
        monitor.log(step, step / steps_per_epoch, {"knn_top1": metrics["knn_top1"]})
        say(f"step {step:,}: k-NN top-1 {metrics['knn_top1']:.1f} %")

    loader = DataLoader(
        dataset,
        batch_sampler=sampler(range(start, total_steps)),
        num_workers=config.data.num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_stop_requests,
    )
    step, last_loss = start, math.nan
    with monitor.progress, stop_requests() as stop:
        if splits and start == 0:
            evaluate(0)
        monitor.restart_clock()
        for step, batch in enumerate(loader, start + 1):
            # ---- algorithm 1
            now = schedules(config, step - 1, steps_per_epoch, batch_size)
            for group in optimizer.param_groups:
                group["lr"] = now.lr
            optimizer.param_groups[0]["weight_decay"] = now.weight_decay
            images, sizes = (x.to(device, non_blocking=True) for x in (batch.image, batch.size))
            places = (x.to(device, non_blocking=True) for x in (batch.epoch, batch.index))
            keys = hash_keys(seed, *places)
            crops = multi_crop(images, sizes, keys)
            # drop path draws from torch's generator: seeded by the step, a resumed run repeats it
            torch.manual_seed(int(hash_keys(seed, step, rank)))
            with accelerator.autocast():
                student_logits, teacher_logits, features = model(crops)
            loss = dino_loss(student_logits, teacher_logits, now.teacher_temp)
            accelerator.backward(loss)
            if optim.clip_grad:
                accelerator.unscale_gradients(stepper)
                clip_gradients(student.parameters(), optim.clip_grad)
            if now.epoch < optim.freeze_last_layer_epochs:
                for param in last_layer:
                    param.grad = None
            stepper.step()
            stepper.zero_grad()
            is_logged = step == total_steps or step % config.run.log_every == 0
            if is_logged:  # with the center that the loss used
                entropy = dino_loss.teacher_entropy(teacher_logits, now.teacher_temp)
                more = {
                    "teacher_entropy": entropy,
                    "kl": loss.detach() - entropy,
                    "feature_spread": feature_spread(features),
                }
            dino_loss.update_center(teacher_logits)  # a collective
            update_teacher_EMA(student, teacher, now.teacher_momentum)

            # ---- log, evaluate, save
            monitor.add(step, loss, batch_size)
            is_last = step == total_steps or bool(stop)
            is_saved = is_last or step % config.run.save_every == 0
            knn_steps = config.run.knn_every * steps_per_epoch
            is_evaluated = splits and (step == total_steps or step % knn_steps == 0)
            if is_logged or is_saved or is_evaluated or device.type == "cpu":
                last_loss = monitor.check_finite()
            if is_logged:
                monitor.log_step(step, step / steps_per_epoch, last_loss, now.lr, more)
            if is_evaluated:
                evaluate(step)
            if is_saved and accelerator.is_main_process:
                run.save(state, step, step / steps_per_epoch, metrics)
            if is_evaluated or is_saved:
                monitor.restart_clock()
            if is_last:
                break
    accelerator.end_training()
    if step < total_steps:
        say(f"stopped after step {step:,} of {total_steps:,}; to go on:")
        folder = shlex.quote(str(run.folder))
        say(f"  accelerate launch dino_train.py --resume {folder}", soft_wrap=True, markup=False)
        sys.exit(128 + stop[0])
    result = {"folder": str(run.folder), "checkpoint": str(run.checkpoint), "step": step}
    return result | {"loss": last_loss} | metrics


def main() -> None:
    config = parse_config(sys.argv[1:], __doc__)
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    if config.run.config == QUICKSTART:
        console.print("quick start: recipes/quickstart.yaml on embedded data; flags override it")
    result = train(config)
    checkpoint, rows = shlex.quote(result["checkpoint"]), {}
    if "knn_top1" in result:
        before, after = result["knn_top1_untrained"], result["knn_top1"]
        rows["k-NN top-1"] = f"{before:.1f} % untrained, {after:.1f} % trained"
    rows |= {"checkpoint": result["checkpoint"], "next": f"python eval_knn.py {checkpoint}"}
    rows[""] = f"python eval_linear.py {checkpoint}"
    for name, text in rows.items():  # no table: it would cut long paths
        console.print(f"[bold]{name:10}[/]  {escape(text)}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
