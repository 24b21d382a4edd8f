"""Train DINO: a student learns from multi-crop views to match a teacher, its moving average.

    python dino_train.py                                      # quick start, minutes
    python dino_train.py --data /imagenet --arch dino_vits16
    python dino_train.py --config recipes/NAME.yaml --data PATH --epochs 50
    python dino_train.py --resume runs/NAME
    accelerate launch --config_file launch/one_node.yaml dino_train.py ...   # several GPUs

Start here; every flag stands below, by concern:

    --data PATH        images: a folder, tar or list; without it, textures drawn by code
    --arch NAME        the network: dino_vits16, resnet50, resnet10_half (small), any of timm's
    --config NAME      a recipe of recipes/, a file like these, or a run's folder; flags override it
    --epochs N         passes over the images
    --minutes N        about as many epochs as fit into that time on this machine
    --batch-size N     images in a micro-batch of each process
    --output-dir PATH  folder for the run's files; without it, a new one in runs/
    --resume FOLDER    go on with a run that was stopped or killed
    --dry-run          take a few steps, tell the time and memory of the run, draw its crops

Source: DINO, arXiv 2104.14294. Axes: b batch, v student views, t teacher views, d features,
k output_dim.
"""

from harness.waiting import NOTE as NOTE_ON_CORES  # before torch, whose threads it concerns

# isort: split

import gc
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from config import Config, OptimConfig
from data import Cropper, hash_keys
from eval_knn import knn_accuracy
from harness.bf16_on_cpu import pad_small_images
from harness.command import in_epochs, print_rows, run_command, stop_requests
from harness.convolutions import multiply_for_weight_gradients, products_are_faster
from harness.distributed import has_compiler, lay_out, stop_with_launcher
from harness.fast_backbone import share_drop_path, skip_unread_tokens
from harness.flags import QUICKSTART, parse_config
from harness.monitor import Monitor, duration
from harness.online_knn import OnlineKnn
from harness.outlook import DryRun, FirstSteps, introduce, tracked_settings
from harness.run import Run
from harness.run_lock import FolderLock
from harness.saved_run import TrainingState
from harness.terminal import printable_name
from harness.weights import load_weights
from losses import DinoLoss, koleo_loss
from models import DinoModel, update_teacher_EMA
from multicrop import MultiCrop
from optimizers import build_optimizer, clip_gradients, set_rates

# ---------------------------------------------------------------- schedules


def cosine_schedule(
    step: int, total_steps: int, start: float, end: float, warmup_steps: int = 0
) -> float:
    """Return the value at `step`: linear from 0 to `start`, then half a cosine towards `end`.

    As in the original, the last step of the warm-up has `start` already, and the first of the
    cosine has it again; `end` would be the value of step `total_steps`, one after the last.
    """
    if step < warmup_steps:
        return start * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


class Rates(NamedTuple):
    """What a step trains with."""

    epoch: int
    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float


def schedules(config: Config, step: int, steps_per_epoch: int, images_per_step: int) -> Rates:
    """Return what step `step` (from 0) trains with; `images_per_step` is of all processes."""
    optim, teacher = config.optim, config.teacher
    epoch = step // steps_per_epoch
    total_steps = optim.epochs * steps_per_epoch
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    peak = optim.lr * images_per_step / 256  # the linear scaling rule; min_lr is not scaled
    teacher_temp = teacher.teacher_temp
    if epoch < teacher.warmup_teacher_temp_epochs:  # by epoch, with both ends, as in the original
        progress = epoch / max(1, teacher.warmup_teacher_temp_epochs - 1)
        low = teacher.warmup_teacher_temp
        teacher_temp = low + (teacher_temp - low) * progress
    return Rates(
        epoch=epoch,
        lr=cosine_schedule(step, total_steps, peak, optim.min_lr, warmup_steps),
        weight_decay=cosine_schedule(step, total_steps, optim.weight_decay, optim.weight_decay_end),
        teacher_momentum=cosine_schedule(step, total_steps, teacher.teacher_momentum, 1.0),
        teacher_temp=teacher_temp,
    )


# ---------------------------------------------------------------- networks


class DinoSystem(nn.Module):
    """Student and teacher as the one module that Accelerate prepares; all calls go through it."""

    def __init__(self, student: DinoModel, teacher: DinoModel) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)

    def forward(self, crops: list[Tensor] | Tensor, features_only: bool = False) -> tuple | Tensor:
        """Return features and logits, (v, b, d) and (v, b, k), of the student, then of the teacher.

        The teacher sees the two global crops only. With `features_only`, return the teacher's
        features (b, d) of images (b, c, h, w).
        """
        if features_only:
            # the head runs too, unread: FSDP2 gathers weights in DinoModel's own forward only
            teacher_features, _ = self.teacher(crops, return_backbone_features=True)
            return teacher_features
        with torch.no_grad():
            teacher_features, teacher_logits = self.teacher(
                crops[:2], return_backbone_features=True
            )
        student_features, student_logits = self.student(crops, return_backbone_features=True)
        return student_features, student_logits, teacher_features, teacher_logits


def build_networks(
    config: Config, accelerator: Accelerator, init_from: str | None = None
) -> tuple[DinoSystem, Optimizer]:
    """Build student, teacher and optimizer, the same in every process, ready to be prepared."""
    torch.manual_seed(config.run.seed)
    student = DinoModel.from_config(config.model)
    if init_from is not None:
        for line in load_weights(student, init_from, config.run.init_network):
            accelerator.print(printable_name(line))
    # the original's teacher, too, is built without drop path
    teacher = DinoModel.from_config(replace(config.model, drop_path_rate=0.0, pretrained=False))
    teacher.load_state_dict(student.state_dict())
    share_drop_path(student.backbone)
    skip_unread_tokens(student.backbone)
    skip_unread_tokens(teacher.backbone)
    compile_blocks = config.run.compile and has_compiler()
    if accelerator.device.type == "cpu":
        if products_are_faster() and not compile_blocks:  # not tried in compiled blocks
            # weight gradients by matrix products, for layers where oneDNN is slower
            multiply_for_weight_gradients(student.backbone)
        if accelerator.mixed_precision == "bf16":
            # for the others: oneDNN's bf16 gradients of tiny images have entries never written
            pad_small_images(student.backbone)
    system = lay_out(DinoSystem(student, teacher), accelerator, config.run.sync_bn, compile_blocks)
    fused = accelerator.scaler is None  # not in fp16: build_optimizer says why
    return system, build_optimizer(student, config.optim.optimizer, fused)


@dataclass(frozen=True)
class Parts:
    """What the loop trains with, prepared for this launch and on its device."""

    model: nn.Module  # the system, as Accelerate wraps it
    system: DinoSystem
    optimizer: AcceleratedOptimizer
    dino_loss: DinoLoss
    multi_crop: MultiCrop
    state: TrainingState


def build_parts(run: Run) -> Parts:
    """Build networks, optimizer, loss and crops, and restore what the run saved."""
    config, accelerator = run.config, run.accelerator
    init_from = config.run.init_from
    if run.is_resumed:  # its state has all weights; those that it began with may be out of reach
        init_from = None
        config = replace(config, model=replace(config.model, pretrained=False))
    system, optimizer = build_networks(config, accelerator, init_from)
    model, prepared_optimizer = accelerator.prepare(system, optimizer)
    model.train()  # the teacher too: its BatchNorm uses the batch, as in the original
    dino_loss = DinoLoss(
        output_dim=config.model.projection_output_dim,
        student_temp=config.teacher.student_temp,
        center_momentum=config.teacher.center_momentum,
    ).to(accelerator.device)
    multi_crop = MultiCrop(config.crops).to(accelerator.device)
    if config.run.compile and has_compiler() and accelerator.device.type == "cuda":
        multi_crop.use_torch_compile()
        dino_loss.use_torch_compile()
    state = TrainingState(system, dino_loss, optimizer, accelerator.scaler)
    run.load(state)
    return Parts(model, system, prepared_optimizer, dino_loss, multi_crop, state)


# ---------------------------------------------------------------- the loop


class StepMeans:
    """Means over a step's micro-batches; of what is logged, over all processes too."""

    def __init__(self, dino_loss: DinoLoss, teacher_temp: float, is_logged: bool) -> None:
        self.dino_loss = dino_loss
        self.teacher_temp = teacher_temp
        self.is_logged = is_logged
        self.losses: list[Tensor] = []
        self.mean_logits: list[Tensor] = []  # the teacher's, (k,) each, for the center
        self.figures: list[Tensor] = []  # cross-entropy, entropy, (t d) of the mean directions

    def add(
        self, loss: Tensor, cross_entropy: Tensor, teacher_logits: Tensor, features: Tensor
    ) -> None:
        """Add a micro-batch's loss, teacher logits (t, b, k) and teacher features (t, b, d).

        `cross_entropy` is the loss less what is added to DINO's own.
        """
        self.losses.append(loss.detach())
        self.mean_logits.append(teacher_logits.float().mean(dim=(0, 1)))
        if self.is_logged:  # now, while the center is still the one that the loss used
            entropy = self.dino_loss.teacher_entropy(teacher_logits, self.teacher_temp)
            num_views = len(features)
            mean_directions = F.normalize(features.float(), dim=-1).mean(dim=1) / num_views**0.5
            scalars = torch.stack([cross_entropy.detach().to(entropy), entropy])
            self.figures.append(torch.cat([scalars, mean_directions.flatten()]))

    @property
    def loss(self) -> Tensor:
        return torch.stack(self.losses).mean()

    def log_figures(self, accelerator: Accelerator) -> dict[str, float]:
        """Return teacher entropy, KL divergence and the features' spread, over all processes.

        A collective, and a sync point.
        """
        means = accelerator.reduce(torch.stack(self.figures).mean(dim=0), reduction="mean")
        cross_entropy, entropy = means[:2].tolist()
        mean_directions = means[2:]
        # The variance of directions of length 1 is 1 less their mean's square: 0 when all are one.
        # `add` divided them by num_views**0.5: this sum is the mean over views of those squares.
        spread = (1 - mean_directions.square().sum()).clamp(min=0).sqrt().item()
        return {"teacher_entropy": entropy, "kl": cross_entropy - entropy, "feature_spread": spread}


def drop_frozen_gradients(student: DinoModel, optim: OptimConfig, epoch: int) -> None:
    """Drop the gradients of what is frozen in an epoch: no optimizer changes it then.

    BatchNorm's running statistics follow the images all the same, as in every training step.
    """
    frozen: list[nn.Parameter] = []
    if epoch < optim.freeze_last_layer_epochs:
        frozen += student.projection_head.last_layer.parameters()
    if epoch < optim.freeze_backbone_epochs:
        frozen += student.backbone.parameters()
    for param in frozen:
        param.grad = None


class Outcome(NamedTuple):
    """What a run came to."""

    step: int
    loss: float
    metrics: dict  # of the last evaluation
    crops: list[Tensor]  # of the last step


def run_loop(
    run: Run, parts: Parts, knn: OnlineKnn, monitor: Monitor, stop_signals: list[int]
) -> Outcome:
    """Take the run's steps, each as algorithm 1 has it, until it ends or is stopped.

    Raises what `train` does once it has begun.
    """
    config, accelerator = run.config, run.accelerator
    optim, seed, rank = config.optim, config.run.seed, accelerator.process_index
    has_sinkhorn = config.teacher.centering == "sinkhorn"
    model, student, teacher = parts.model, parts.system.student, parts.system.teacher
    optimizer, dino_loss = parts.optimizer, parts.dino_loss
    crops_of = Cropper(parts.multi_crop, seed, accelerator.device)
    metrics = knn.catch_up(model, monitor)
    # of a resumed run: what a kill or a stop left undone is saved before its first step
    if run.lacks_teacher() or run.is_evaluated_anew(metrics):
        run.save(parts.state, run.steps_before, metrics, monitor.collapse_to_save())
    step, loss_value, crops = run.steps_before, math.nan, []
    run.start_loading()
    monitor.restart_clock()
    for step in run.steps():
        # ---- algorithm 1
        rates = schedules(config, step - 1, run.steps_per_epoch, run.images_per_step)
        set_rates(optimizer, rates.lr, rates.weight_decay)
        means = StepMeans(dino_loss, rates.teacher_temp, run.is_logged(step))
        for micro in range(optim.accumulation_steps):
            crops = crops_of(run.next_batch())
            # drop path draws from torch's generator: seeded by the step, a resumed run repeats it
            torch.manual_seed(int(hash_keys(seed, step, micro, rank)))
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    outputs = model(crops)
                student_features, student_logits, teacher_features, teacher_logits = outputs
                if has_sinkhorn:
                    dino_loss.balance_center(teacher_logits, rates.teacher_temp)  # a collective
                # overwrites student_logits by their gradient, to save their memory; a further term
                # of theirs needs overwrite_student=False
                cross_entropy = dino_loss(
                    student_logits, teacher_logits, rates.teacher_temp, overwrite_student=True
                )
                loss = cross_entropy
                if optim.koleo_weight:
                    loss = loss + optim.koleo_weight * koleo_loss(student_features[:2])
                accelerator.backward(loss)
            means.add(loss, cross_entropy, teacher_logits, teacher_features)
            # else these, as large as the logits, would stay in memory during the next forward pass
            del outputs, student_features, student_logits, teacher_features, teacher_logits
        if optim.clip_grad:
            accelerator.unscale_gradients(optimizer)
            clip_gradients(student.parameters(), optim.clip_grad)
        drop_frozen_gradients(student, optim, rates.epoch)
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.step_was_skipped:  # by fp16, whose gradients overflowed
            if not has_sinkhorn:
                dino_loss.update_center(torch.stack(means.mean_logits))  # eq. 4; a collective
            update_teacher_EMA(student, teacher, rates.teacher_momentum)

        # ---- what is due after it, in all processes alike
        monitor.add(step, means.loss)
        due = run.what_is_due(step, stop_signals, monitor.failure, knn.is_due(step))
        if due.reads_loss:
            loss_value = monitor.check_finite()
        if due.logs or due.saves or due.ends:
            monitor.report_unreadable(step)
        if due.logs:
            figures = means.log_figures(accelerator)
            monitor.log_step(step, loss_value, rates.lr, figures)
        if due.evaluates:
            metrics = knn.evaluate(step, model, monitor)
        if due.saves:
            run.save(parts.state, step, metrics, monitor.collapse_to_save())
        if due.evaluates or due.saves:
            monitor.draw_curves()
            monitor.restart_clock()
        monitor.stop_on_collapse()
        if due.ends:
            run.stop_where_failed(monitor.failure)
            break
    return Outcome(step, loss_value, metrics, crops)


# ---------------------------------------------------------------- training


def train(config: Config) -> dict:
    """Train as `config` says, and return what the run came to.

    Always: folder, checkpoint, step, loss, unreadable_images, has_labels (which evaluations need).
    If the teacher was evaluated: knn_step, rankme, variance_share_1, _10 and _100, and with classes
    knn_top1 and maybe probe_top1. If it was evaluated before the first step, too:
    knn_top1_untrained or, without classes, rankme_untrained; and worse_since, the step since which
    it has been below that, if it is.

    Raises ValueError for settings that make no sense, before anything is written;
    FloatingPointError for a loss that is not finite; RunError for a full disk, too many unreadable
    images or, with --stop-on-collapse, a collapse; and RuntimeError for a worker that died. The
    last good checkpoint is kept.
    A run that is stopped by a signal exits with 128 + the signal's number.
    """
    with FolderLock() as lock:
        if config.optim.minutes is not None:
            config = replace(config, optim=replace(config.optim, epochs=epochs_that_fit(config)))
            gc.collect()  # the networks of these first steps: objects that hold each other
        return _train(config, lock)


def epochs_that_fit(config: Config) -> int:
    """Return how many epochs --minutes are on this machine, at least one, by some first steps.

    A collective. Nothing is written but the index of a long scan.
    """
    settings = replace(config.run, dry_run=True, overwrite=False)
    if config.run.overwrite:
        settings = replace(settings, output_dir=None)  # the folder holds the old run still
    kind_of_run = DryRun if config.run.dry_run else FirstSteps
    run = kind_of_run.prepare(replace(config, run=settings))
    monitor = Monitor(run)
    monitor.console.quiet = True
    knn = OnlineKnn(run, knn_accuracy)
    with stop_requests() as stop_signals:
        try:
            outcome = run_loop(run, build_parts(run), knn, monitor, stop_signals)
        finally:
            run.stop_loading()
    if run.stop_signal:
        sys.exit(128 + run.stop_signal)
    # the main process's figures, so that all processes choose the same number of epochs
    seconds_a_step, waited_a_step = run.agreement.gather(run.seconds_a_step(outcome.step))[0]
    minutes = config.optim.minutes
    speed = f"at {seconds_a_step:.3g} s a step"
    seconds_an_epoch = seconds_a_step * run.steps_per_epoch
    num_epochs = 60 * minutes / seconds_an_epoch
    decoding_epochs = run.epochs_of_decoding  # math.inf where images are not kept in memory
    if num_epochs > decoding_epochs:  # the epochs after these do not wait for data
        seconds_from_memory = seconds_a_step - waited_a_step
        speed += f", then {seconds_from_memory:.3g} s from memory"
        seconds_left = 60 * minutes - decoding_epochs * seconds_an_epoch
        num_epochs = decoding_epochs + seconds_left / (seconds_from_memory * run.steps_per_epoch)
    epochs = max(1, round(num_epochs))
    text = f"{in_epochs(epochs)} of {run.steps_per_epoch:,} steps"
    run.accelerator.print(f"--minutes {minutes:g}: {text}, {speed}")
    return epochs


def _train(config: Config, lock: FolderLock) -> dict:
    """Train in a folder that is the run's own while the lock is held; returns as `train`."""
    # ---- what is wrong fails here, before a file is written
    kind_of_run = DryRun if config.run.dry_run else Run
    run = kind_of_run.prepare(config, lock)
    knn = OnlineKnn(run, knn_accuracy)
    parts = build_parts(run)
    monitor = Monitor(run)
    introduce(run, monitor, parts.system.student, knn.why_not, knn.num_compared)
    run.accelerator.wait_for_everyone()  # all have seen that the folder is free, or what is in it

    stops_cleanly = stop_requests(config.run.stop_minutes, run.kept)  # at a signal, from here on
    with monitor.progress, stops_cleanly as stop_signals:
        run.open()
        if not config.run.dry_run:
            monitor.tracker.start(tracked_settings(run, parts.system.student))
        try:
            outcome = run_loop(run, parts, knn, monitor, stop_signals)
        finally:
            run.stop_loading()

    monitor.tracker.finish()
    run.accelerator.end_training()
    is_over = outcome.step >= run.total_steps
    if isinstance(run, DryRun):
        run.report(monitor.console, outcome.step, outcome.crops, parts.multi_crop)
    elif not is_over:
        monitor.say_how_to_resume(outcome.step)
    if run.stop_signal and not is_over:
        sys.exit(128 + run.stop_signal)
    has_labels = run.dataset.labels is not None or config.data.knn_data is not None
    if knn.splits:  # k-NN has looked at what tests, too
        has_labels = knn.has_classes
    return {
        "folder": str(run.folder),
        "checkpoint": str(run.checkpoint),
        "step": outcome.step,
        "loss": outcome.loss,
        "unreadable_images": len(run.unreadable),
        "has_labels": has_labels,
        **outcome.metrics,
    }


def main() -> None:
    config = parse_config(sys.argv[1:], __doc__)
    stop_with_launcher()
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    if config.run.config == QUICKSTART and config.data.data == "patterns":
        console.print("quick start: recipes/quickstart.yaml, on drawn textures; flags override it")
    if NOTE_ON_CORES:
        console.print(NOTE_ON_CORES)
    began = time.monotonic()
    result = train(config)
    if not config.run.dry_run:
        print_rows(console, last_words(config, result, time.monotonic() - began))


def last_words(config: Config, result: dict, seconds: float) -> dict[str, str]:
    """Return what is said at a run's end, by row: what it came to, its files, what to type next."""
    rows = {}
    if "knn_top1" in result:
        figures = f"{result['knn_top1']:.1f} % trained, the teacher's"
        if "knn_top1_untrained" in result:
            is_anew = config.run.init_from is None and not config.model.pretrained
            start = "untrained" if is_anew else "at the start"
            figures = f"{result['knn_top1_untrained']:.1f} % {start}, {figures}"
        rows["k-NN top-1"] = figures
    if result["unreadable_images"]:
        rows["unreadable"] = f"{result['unreadable_images']} images, replaced; log.jsonl names them"
    rows["time"] = duration(seconds)
    rows["curves"] = os.path.join(result["folder"], "curves.png")
    rows["checkpoint"] = result["checkpoint"]
    checkpoint, data = shlex.quote(result["checkpoint"]), shlex.quote(config.data.data)
    if result["has_labels"]:
        rows["next"] = f"python eval_knn.py {checkpoint}"
        rows[""] = f"python eval_linear.py {checkpoint}"
    else:
        rows["next"] = f"python visualize.py {checkpoint} {data}"
        rows[""] = f"python embed.py {checkpoint} --data {data} --out features.safetensors"
    return rows


if __name__ == "__main__":
    run_command(main)
