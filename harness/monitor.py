"""What a run tells while it trains: progress, log, curves, unreadable images and collapse."""

import io
import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from harness.command import RunError, write_whole
from harness.distributed import launch_line, wait_for
from harness.pictures import curves, png_mark
from harness.run import Run
from harness.terminal import printable, printable_name
from harness.trackers import Tracker

MOST_NAMED = 10  # unreadable images that the terminal names at a time

# ---------------------------------------------------------------- collapse

# A collapse is reported after one epoch or this many steps, whichever is shorter.
COLLAPSE_STEPS = 1000
# what to change where the teacher has collapsed to this
REMEDIES = {
    "uniform": "lower --teacher-temp and --warmup-teacher-temp, take --use-bn, or fewer prototypes "
    "by --projection-output-dim",
    "one-hot": "raise --teacher-temp and --warmup-teacher-temp, or lower --center-momentum or --lr",
}


def collapse_of(entropy: float, kl: float, output_dim: int) -> str:
    """Return what a teacher of this entropy has collapsed to: `uniform`, `one-hot` or nothing.

    Uniform is an entropy within 2 % of ln K with a student that says the same (KL divergence below
    1 % of ln K); one-hot is an entropy below 1 % of ln K. In the logged steps of the quick start,
    which is healthy, the entropy is 2.3 to 76 % of ln K and the KL divergence above 1.4 % of it.
    """
    highest = math.log(output_dim)
    if entropy > 0.98 * highest and kl < 0.01 * highest:
        return "uniform"
    return "one-hot" if entropy < 0.01 * highest else ""


@dataclass(frozen=True)
class Collapse:
    """What the teacher has collapsed to, and since which logged step."""

    kind: str
    since: int

    def __str__(self) -> str:
        text = f"the teacher has been {self.kind} since step {self.since:,}"
        return f"collapse: {text}; {REMEDIES[self.kind]}"


# ---------------------------------------------------------------- the monitor


def peak_memory(device: torch.device) -> float:
    """Return the most memory in GiB that this process has taken so far, without its workers.

    On CUDA it is the GPU's memory; on Windows without CUDA it is nan.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def three_digits(number: float) -> str:
    """Return a number with three digits, from 100 on as a whole one: `0.658`, `34.3`, `1,386`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """Return a time as `2 d 03 h`, `3 h 05 min`, `4 min 06 s`, or `7 s`."""
    seconds = round(seconds)
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours:02} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    if minutes:
        return f"{minutes} min {seconds % 60:02} s"
    return f"{seconds} s"


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG whole or not at all. Raises OSError naming it."""
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=png_mark())
    write_whole(path, content.getvalue())


def _progress(console: Console) -> Progress:
    """Return a progress bar, which is shown on a terminal alone."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )


class Monitor:
    """Tell of a run in log.jsonl, trackers and terminal; only what logs waits for the device."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.accelerator = run.accelerator
        self.console = Console(quiet=not self.accelerator.is_main_process)
        self.tracker = Tracker(run, self.say)
        self.progress = _progress(self.console)
        self.bar = self.progress.add_task(
            "starting", total=run.last_step, completed=run.steps_before
        )
        self.losses: dict[int, Tensor] = {}  # by step, not yet read from the device
        # of this start: its number, when it ended, and how long data had been waited for by then
        self.first_step: tuple[int, float, float] | None = None
        self.has_told_time = False
        self.epochs_told = int(run.epoch(run.steps_before))
        self.quality = ""  # the last k-NN and RankMe, in words
        self.failure = ""  # of writing the log, which all processes learn of after a step
        saved = run.saved.collapse
        self.collapse = Collapse(**saved) if saved else None
        self.said_collapse = ""  # the kind that was printed
        self.restart_clock()

    def say(self, text: str) -> None:
        self.console.print(printable(text), markup=False, soft_wrap=True)

    # ------------------------------------------------ steps

    def restart_clock(self) -> None:
        """Leave what was done until now out of images/s. A sync point."""
        wait_for(self.accelerator.device)
        self.clock_start = time.perf_counter()
        self.steps_on_clock = 0
        self.waited_before = self.run.waited

    def add(self, step: int, loss: Tensor) -> None:
        """Note that a step is done, and its loss in this process, which is not read yet."""
        self.losses[step] = loss.detach()
        if self.first_step is None:
            self.first_step = step, time.monotonic(), self.run.waited
        self.steps_on_clock += 1
        self.progress.update(self.bar, completed=step)

    def check_finite(self) -> float:
        """Read all losses since the last call, and return the last one's mean over all processes.

        Raises FloatingPointError at the first that is not finite. A collective, and a sync point:
        all processes stop at the same step.
        """
        values = torch.stack(list(self.losses.values()))
        values = self.accelerator.reduce(values, reduction="mean").tolist()
        for step, value in zip(self.losses, values, strict=True):
            if not math.isfinite(value):
                text = f"the loss is {value} at step {step:,}; {self.run.kept()}"
                raise FloatingPointError(f"{text} (README.md: When it does not learn)")
        self.losses.clear()
        return values[-1]

    # ------------------------------------------------ log

    def log(self, step: int, values: dict) -> None:
        """Write a line of log.jsonl, and its figures to the tracker.

        A failure of the file is kept until the next step's end, where all processes stop.
        """
        values = {"epoch": round(self.run.epoch(step), 4)} | values
        if self.accelerator.is_main_process:
            try:
                self.run.append_to_log(json.dumps({"step": step} | values))
            except OSError as error:
                text = f"cannot write {self.run.log_file}: {error.strerror}"
                self.failure = f"{text}; {self.run.kept()}"
        if "rankme" in values:
            knn = f"k-NN {values['knn_top1']:.1f} %, " if "knn_top1" in values else ""
            self.quality = f"{knn}RankMe {values['rankme']:.1f}, "
        figures = {name: value for name, value in values.items() if not isinstance(value, list)}
        self.tracker.log(step, figures)

    def log_step(self, step: int, loss: float, lr: float, figures: dict[str, float]) -> None:
        """Log a step: its loss, what `figures` says of the teacher, speed and memory."""
        seconds = time.perf_counter() - self.clock_start
        speed = self.steps_on_clock * self.run.images_per_step / seconds
        waited = (self.run.waited - self.waited_before) / seconds
        values = {"loss": loss, "lr": lr, "images_per_second": speed, "data_wait": waited}
        values |= {"peak_memory_gib": peak_memory(self.accelerator.device)} | figures
        collapse = self._lasting_collapse(step, figures["teacher_entropy"], figures["kl"])
        if collapse:
            values["collapse"] = collapse
        self.log(step, values)
        text = f"loss {loss:.3f}  lr {lr:.1e}  {three_digits(speed)} images/s"
        self.progress.update(self.bar, description=text)
        self._tell_time(step, loss, speed)
        self.restart_clock()

    def _tell_time(self, step: int, loss: float, speed: float) -> None:
        """Say once how long the run will take; without a terminal, once an epoch how it stands."""
        run = self.run
        if run.config.run.dry_run:  # which ends in a moment, and says so
            return
        first, when, waited = self.first_step
        if step == first:
            return
        seconds_a_step = (time.monotonic() - when) / (step - first)  # evaluations in it
        waited_a_step = (run.waited - waited) / (step - first)
        left = run.seconds_left(step, seconds_a_step, waited_a_step)
        at_speed = f"{three_digits(speed)} images/s"
        if not self.has_told_time and left >= 10:
            self.has_told_time = True
            self.say(f"about {duration(left)} to go, at {at_speed}")
        epoch = run.epoch(step)
        if int(epoch) > self.epochs_told and self.progress.disable:
            self.epochs_told = int(epoch)
            place = f"step {step:,} of {run.total_steps:,}, epoch {epoch:.4g}"
            self.say(f"{place}: loss {loss:.3f}, {self.quality}{at_speed}, {duration(left)} to go")

    def draw_curves(self) -> None:
        """Draw curves.png anew from the log; a failure is said, and ends nothing."""
        if not self.accelerator.is_main_process:
            return
        file = self.run.folder / "curves.png"
        try:
            lines = self.run.log_file.read_text().splitlines()
            output_dim = self.run.config.model.projection_output_dim
            write_picture(file, curves([json.loads(line) for line in lines], output_dim))
        except Exception as error:  # whatever it is, a run goes on without the picture
            self.say(f"warning: cannot draw {file}: {error}")

    # ------------------------------------------------ what is wrong

    def _lasting_collapse(self, step: int, entropy: float, kl: float) -> str:
        """Return what the teacher has been collapsed to for long, or nothing; say it once."""
        output_dim = self.run.config.model.projection_output_dim
        kind = collapse_of(entropy, kl, output_dim)
        if not kind:
            if self.said_collapse:
                self.say(f"step {step:,}: the teacher is no longer {self.said_collapse}")
            self.collapse = None
            self.said_collapse = ""
            return ""
        if self.collapse is None or self.collapse.kind != kind:
            self.collapse = Collapse(kind, since=step)
        if step - self.collapse.since < min(self.run.steps_per_epoch, COLLAPSE_STEPS):
            return ""
        if self.said_collapse != kind:
            self.said_collapse = kind
            self.say(f"warning: step {step:,}: {self.collapse}")
        return kind

    def collapse_to_save(self) -> dict | None:
        """Return since when the teacher has been collapsed: a resumed run then says the same."""
        return asdict(self.collapse) if self.collapse else None

    def stop_on_collapse(self) -> None:
        """Raise RunError where --stop-on-collapse was given and a collapse was said."""
        if self.run.config.run.stop_on_collapse and self.said_collapse:
            raise RunError(f"{self.collapse}; {self.run.kept()}")

    def report_unreadable(self, step: int) -> None:
        """Name the images that could not be decoded, once each; RunError if they are too many.

        The log names all of them, the terminal MOST_NAMED at a time. A collective.
        """
        run = self.run
        new = set().union(*run.agreement.gather(run.new_unreadable)) - run.unreadable
        run.new_unreadable = set()
        run.unreadable |= new
        if new:
            reasons = [printable_name(run.dataset.why_unreadable(index)) for index in sorted(new)]
            self.log(step, {"unreadable": reasons})
        num, total = len(run.unreadable), len(run.dataset)
        most = run.config.run.most_unreadable
        if num > most * total:
            given = f"{num} of {total:,} images cannot be decoded"
            lines = [f"{given}: need at most a share of {most:g}, or a larger --most-unreadable"]
            first = sorted(run.unreadable)[:MOST_NAMED]
            lines += [printable_name(run.dataset.why_unreadable(index)) for index in first]
            if num > MOST_NAMED:
                lines.append(f"and {num - MOST_NAMED} more, in {run.log_file}")
            raise RunError("\n  ".join(lines))
        if new:
            for reason in reasons[:MOST_NAMED]:
                self.say(f"{reason}; replaced by the next")
            if len(reasons) > MOST_NAMED:
                self.say(f"and {len(reasons) - MOST_NAMED} more images, in {run.log_file}")

    def say_how_to_resume(self, step: int) -> None:
        self.say(f"stopped after step {step:,} of {self.run.total_steps:,}; to go on:")
        folder = shlex.quote(str(self.run.folder))
        self.say(f"  {launch_line(self.accelerator)} dino_train.py --resume {folder}")
