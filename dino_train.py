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
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import data
from config import QUICKSTART, Config, parse_config, resolve, settle_precision
from data import ImageDataset, MultiCrop, StepSampler, hash_keys
from distributed import (
    has_compiler,
    lay_out,
    make_accelerator,
    stop_with_launcher,
)
from dry_run import DryRun
from fast_backbone import convolve_linear, skip_unread_tokens
from losses import DinoLoss
from models import DinoModel, update_teacher_EMA
from monitor import Monitor, iterate, print_rows, run_command, stop_requests
from online_knn import OnlineKnn
from optimizers import build_optimizer, clip_gradients, set_rates
from run_io import Run, RunError, TrainingState
from weights import load_weights

# ---------------------------------------------------------------- schedules


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
        if features_only:  # the head too: FSDP2 gathers a model for its own forward alone
            return self.teacher(crops, return_backbone_features=True)[0]
        with torch.no_grad():
            features, teacher_logits = self.teacher(crops[:2], return_backbone_features=True)
        return self.student(crops), teacher_logits, features


def build_networks(config: Config, accelerator: Accelerator) -> tuple[DinoSystem, Optimizer]:
    """Build student, teacher and optimizer, the same in every process, ready to be prepared."""
    torch.manual_seed(config.run.seed)
    student = DinoModel.from_config(config.model)
    if config.run.init_from:
        for line in load_weights(student, config.run.init_from, config.run.init_network):
            accelerator.print(line)
    teacher = DinoModel.from_config(replace(config.model, drop_path_rate=0.0, pretrained=False))
    teacher.load_state_dict(student.state_dict())
    compiles = config.run.compile and has_compiler()
    for network in (student, teacher):
        skip_unread_tokens(network.backbone)
        if accelerator.device.type == "cpu" and not compiles:
            convolve_linear(network.backbone)
    system = lay_out(DinoSystem(student, teacher), accelerator, config.run.sync_bn, compiles)
    fused = accelerator.scaler is None
    return system, build_optimizer(student, config.optim.optimizer, fused)


class StepMeans:
    """Means over a step's micro-batches, and of what is logged over all processes too."""

    def __init__(self, dino_loss: DinoLoss, teacher_temp: float, is_logged: bool) -> None:
        self.dino_loss, self.teacher_temp, self.is_logged = dino_loss, teacher_temp, is_logged
        self.losses: list[Tensor] = []
        self.teacher_logits: list[Tensor] = []  # (k,) each, for the center
        self.figures: list[Tensor] = []  # the entropy, then (t d) of the mean direction

    def add(self, loss: Tensor, teacher_logits: Tensor, features: Tensor) -> None:
        self.losses.append(loss.detach())
        self.teacher_logits.append(teacher_logits.float().mean(dim=(0, 1)))
        if self.is_logged:  # with the center that the loss used
            entropy = self.dino_loss.teacher_entropy(teacher_logits, self.teacher_temp)
            direction = F.normalize(features.float(), dim=-1).mean(dim=1) / len(features) ** 0.5
            self.figures.append(torch.cat([entropy[None], direction.flatten()]))

    @property
    def loss(self) -> Tensor:
        return torch.stack(self.losses).mean()

    def log_figures(self, loss: float, accelerator: Accelerator) -> dict[str, float]:
        """Give teacher entropy, KL divergence and features' spread. A collective, a sync point.

        `loss` is the step's mean over all processes.
        """
        means = accelerator.reduce(torch.stack(self.figures).mean(dim=0), reduction="mean")
        entropy = means[0].item()
        # the deviation of directions of length 1 follows from their mean: 0 when all are one
        spread = (1 - means[1:].square().sum()).clamp(min=0).sqrt().item()
        return {"teacher_entropy": entropy, "kl": loss - entropy, "feature_spread": spread}


def open_run(config: Config) -> tuple[Config, Accelerator, Run, ImageDataset]:
    """Open processes, data and the run's folder, and fill in the config by them."""
    config = settle_precision(config)
    accelerator = make_accelerator(config.run.mixed_precision, config.run.log_with)
    index_folder = data.index_folder(config.run.output_dir or Path("runs", "run"))
    if config.run.dry_run:
        index_folder = None
    with accelerator.local_main_process_first():  # which may have to download or to scan
        dataset = data.build_dataset(config.data.data, index_folder=index_folder)
    config = resolve(config, dataset)
    dataset.seed = config.run.seed
    dataset.transform = partial(data.to_canvas, size=config.data.canvas_size)
    run = Run(config, accelerator, dataset)
    return run.settle(config), accelerator, run, dataset


def train(config: Config) -> dict:
    """Train as `config` says; gives the checkpoint's path and the last step, loss and k-NN.

    Raises ValueError for what cannot be meant, before anything is written; FloatingPointError for
    a loss that is not finite and RunError for a full disk, a dead worker or too many unreadable
    images, with the last good checkpoint kept.
    """
    # ---- what is wrong fails here, before a file is written
    config, accelerator, run, dataset = open_run(config)
    seed = config.run.seed
    optim, device = config.optim, accelerator.device
    rank, world = accelerator.process_index, accelerator.num_processes
    accumulation = accelerator.gradient_accumulation_steps = optim.accumulation_steps
    batch_size = optim.images_per_step(world)

    def sampler(steps: range) -> StepSampler:
        return StepSampler(len(dataset), optim.batch_size, seed, rank, world, steps, accumulation)

    steps_per_epoch = sampler(range(0)).steps_per_epoch
    total_steps = optim.epochs * steps_per_epoch
    knn = OnlineKnn(run, steps_per_epoch, total_steps)

    # ---- student, teacher, loss, optimizer
    if run.saved:  # which holds all weights: what it began with may be gone
        config = replace(config, run=replace(config.run, init_from=None))
    system, optimizer = build_networks(config, accelerator)
    model, stepper = accelerator.prepare(system, optimizer)
    model.train()  # the teacher too: its BatchNorm uses the batch, as in the original
    student, teacher = system.student, system.teacher
    last_layer = list(student.projection_head.last_layer.parameters())
    multi_crop = MultiCrop(config.crops).to(device)
    temp, momentum = config.teacher.student_temp, config.teacher.center_momentum
    dino_loss = DinoLoss(config.model.projection_output_dim, temp, momentum).to(device)
    if config.run.compile and has_compiler() and device.type == "cuda":
        multi_crop.compile()
        dino_loss.compile()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # of the crops
    state = TrainingState(system, dino_loss, optimizer, accelerator.scaler)
    first, metrics = run.load(state)

    # ---- files and terminal
    monitor = Monitor(run, accelerator, dataset, first, total_steps)
    monitor.introduce(config, student, knn.why_not)
    accelerator.wait_for_everyone()  # the others have looked into the folder by now
    with monitor.progress, stop_requests() as stop:  # from before a file is written
        run.open(first)
        if config.run.log_with and not run.is_dry:
            accelerator.project_configuration.logging_dir = str(run.folder)
            accelerator.init_trackers("dino")

        loader = DataLoader(
            dataset,
            batch_sampler=sampler(range(first, total_steps)),
            num_workers=config.data.num_workers,
            collate_fn=data.collate,
            pin_memory=device.type == "cuda",
        )
        last_step, last_loss, saved_at, stop_signal = first, math.nan, time.monotonic(), 0
        dry_run = DryRun(monitor, config.data.num_workers) if run.is_dry else None
        final_step = dry_run.last_step if dry_run else total_steps
        # untrained; or what a stop after this step put off
        if knn.is_due(first) and metrics.get("knn_step") != first:
            knn.evaluate(first, model, monitor, metrics)
        batches = iterate(loader)
        monitor.restart_clock()
        for step in range(first + 1, final_step + 1):
            if dry_run:
                dry_run.begin(step)
            # ---- algorithm 1
            now = schedules(config, step - 1, steps_per_epoch, batch_size)
            set_rates(optimizer, now.lr, now.weight_decay)
            is_logged = step == total_steps or step % config.run.log_every == 0
            means = StepMeans(dino_loss, now.teacher_temp, is_logged)
            for micro in range(accumulation):
                batch = monitor.next_batch(batches)
                crops = data.crops_of(batch, multi_crop, seed, device, stream)
                # drop path draws from torch's generator: seeded by the step, a resumed run repeats
                torch.manual_seed(int(hash_keys(seed, step, micro, rank)))
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        student_logits, teacher_logits, features = model(crops)
                    loss = dino_loss(
                        student_logits, teacher_logits, now.teacher_temp, overwrite_student=True
                    )
                    accelerator.backward(loss)
                means.add(loss, teacher_logits, features)
            if optim.clip_grad:
                accelerator.unscale_gradients(stepper)
                clip_gradients(student.parameters(), optim.clip_grad)
            if now.epoch < optim.freeze_last_layer_epochs:
                for param in last_layer:
                    param.grad = None
            stepper.step()
            stepper.zero_grad()
            if not stepper.step_was_skipped:  # by fp16, whose gradients overflowed
                dino_loss.update_center(torch.stack(means.teacher_logits))  # a collective
                update_teacher_EMA(student, teacher, now.teacher_momentum)

            # ---- log, evaluate, save: all processes alike, so that none waits for another
            epoch = step / steps_per_epoch
            monitor.add(step, means.loss, batch_size)
            minutes = (time.monotonic() - saved_at) / 60
            is_due = dry_run.is_over(step) if dry_run else 0 < config.run.save_minutes <= minutes
            flags = stop[0] if stop else 0, is_due, bool(monitor.failure)
            stop_signal, is_due, has_failed = run.agreement.largest(*flags)
            if has_failed:
                raise RunError(monitor.failure)
            is_last = step == final_step or stop_signal > 0 or (run.is_dry and is_due)
            evaluates = knn.is_due(step) and (step == total_steps or not stop_signal)
            is_kept = config.run.keep_every and epoch % config.run.keep_every == 0
            is_saved = is_last or is_due or is_kept or step % config.run.save_every == 0
            if is_logged or is_saved or evaluates or device.type == "cpu":
                last_loss = monitor.check_finite()
            if is_logged or is_saved:
                monitor.report_unreadable(step, epoch)
            if is_logged:
                figures = means.log_figures(last_loss, accelerator)
                figures |= monitor.watch(step, steps_per_epoch, figures, metrics)
                monitor.log_step(step, epoch, last_loss, now.lr, figures)
            if evaluates:
                knn.evaluate(step, model, monitor, metrics)
            if is_saved:
                run.save(state, step, epoch, metrics, monitor.unreadable)
                saved_at = time.monotonic()
            if (evaluates or is_saved) and not run.is_dry:
                monitor.draw_curves()
                monitor.restart_clock()
            if config.run.stop_on_collapse and monitor.collapse:
                text = monitor.collapse_text(metrics["collapse"])
                raise RunError(f"{text}; {run.kept()}")
            last_step = step
            if is_last:
                break
    accelerator.end_training()
    if dry_run:
        dry_run.report(crops, multi_crop)
    elif last_step < total_steps:
        monitor.say_how_to_resume(last_step)
    if stop_signal and last_step < total_steps:
        sys.exit(128 + stop_signal)
    result = {"folder": str(run.folder), "checkpoint": str(run.checkpoint), "step": last_step}
    unreadable = len(monitor.unreadable)
    return result | {"loss": last_loss, "unreadable_images": unreadable} | metrics


def main() -> None:
    config = parse_config(sys.argv[1:], __doc__)
    stop_with_launcher()
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    if config.run.config == QUICKSTART:
        console.print("quick start: recipes/quickstart.yaml on embedded data; flags override it")
    result = train(config)
    if config.run.dry_run:
        return
    checkpoint, rows = shlex.quote(result["checkpoint"]), {}
    if "knn_top1" in result:
        before, after = result["knn_top1_untrained"], result["knn_top1"]
        rows["k-NN top-1"] = f"{before:.1f} % untrained, {after:.1f} % trained"
    if result["unreadable_images"]:
        rows["unreadable"] = f"{result['unreadable_images']} images, replaced; log.jsonl names them"
    rows |= {"checkpoint": result["checkpoint"], "next": f"python eval_knn.py {checkpoint}"}
    rows[""] = f"python eval_linear.py {checkpoint}"
    print_rows(console, rows)


if __name__ == "__main__":
    run_command(main)
