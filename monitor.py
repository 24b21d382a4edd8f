"""What a run tells: its progress, log, curves and errors; and the signals that it hears."""

import io
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from config import Config
from data import ImageDataset, Sample
from distributed import launch_line
from outlook import KNOBS, collapse_of, header, peak_memory, warnings
from pictures import curves
from run_io import Run, RunError, write_bytes

LONG = 1000  # steps that a collapse lasts before it is named, where an epoch has more
MOST_UNREADABLE = 0.01  # of the images; more are no accident


def print_rows(console: Console, rows: dict[str, str]) -> None:
    """Print names and texts below each other; no table, which would cut long paths."""
    for name, text in rows.items():
        console.print(f"[bold]{name:10}[/]  {escape(text)}", soft_wrap=True)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG whole or not at all. Raises OSError naming it."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    write_bytes(path, content.getvalue())


class Monitor:
    """What a run tells, in log.jsonl, trackers and terminal, without waiting for the device."""

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        dataset: ImageDataset,
        first: int,
        total_steps: int,
    ) -> None:
        self.run, self.accelerator, self.dataset = run, accelerator, dataset
        self.first, self.total_steps = first, total_steps
        self.console = Console(quiet=not accelerator.is_main_process)
        self.progress = Progress(
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TextColumn("ETA"), TimeRemainingColumn()),
            console=self.console,
            disable=not (self.console.is_terminal and accelerator.is_main_process),
        )
        self.bar = self.progress.add_task("starting", total=total_steps, completed=first)
        self.losses: dict[int, Tensor] = {}  # by step, not yet read from the device
        self.unreadable = set(run.saved.get("unreadable", []))
        self.new_unreadable: set[int] = set()
        self.failure = ""  # of writing the log
        self.collapse = ""  # what the teacher has been for long
        self.output_dim = run.config["model"]["projection_output_dim"]
        self.restart_clock()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def introduce(self, config: Config, student: nn.Module, why_no_knn: str) -> None:
        """Say what is about to be trained, what is likely not meant, and where it goes on."""
        self.console.print(header(config, self.accelerator, len(self.dataset), student))
        if why_no_knn:
            self.say(f"no k-NN during training: {why_no_knn}")
        for warning in warnings(config, self.accelerator, len(self.dataset), student):
            self.say(f"warning: {warning}")
        if config.run.resume:
            self.say(f"resumed {self.run.folder} after step {self.first:,} of {self.total_steps:,}")
        for change in self.run.taken_over:
            self.say(f"taken over: {change}")

    def restart_clock(self) -> None:
        """Leave out of images/s what was done since the last step. A sync point."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.since, self.num_images, self.waited = time.perf_counter(), 0, 0.0
        self.num_timed = 0  # steps

    def next_batch(self, batches: Iterator) -> Sample:
        """Take a batch; the time that it takes is waiting for data, on a GPU while it works."""
        asked = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - asked
        self.new_unreadable |= set(batch.index[batch.index != batch.source].tolist())
        return batch

    def add(self, step: int, loss: Tensor, num_images: int) -> None:
        self.losses[step] = loss.detach()
        self.num_images += num_images
        self.num_timed += 1
        self.progress.update(self.bar, completed=step)

    def log(self, step: int, epoch: float, values: dict) -> None:
        """Write a line; a failure is kept for the step's end, where all processes stop."""
        if self.accelerator.is_main_process and not self.run.is_dry:
            try:
                with open(self.run.log_file, "a") as file:
                    file.write(json.dumps({"step": step, "epoch": round(epoch, 4)} | values) + "\n")
            except OSError as error:
                text = f"cannot write {self.run.log_file}: {error.strerror}; {self.run.kept()}"
                self.failure = text
        figures = {name: value for name, value in values.items() if not isinstance(value, list)}
        self.accelerator.log(figures, step=step)

    def draw_curves(self) -> None:
        """Draw curves.png anew from the log; a failure is said, and ends nothing."""
        if not self.accelerator.is_main_process:
            return
        file = self.run.folder / "curves.png"
        try:
            log = [json.loads(line) for line in self.run.log_file.read_text().splitlines()]
            write_picture(file, curves(log, self.output_dim))
        except Exception as error:  # whatever it is, a run goes on without the picture
            self.say(f"warning: cannot draw {file}: {error}")

    def watch(self, step: int, steps_per_epoch: int, figures: dict, metrics: dict) -> dict:
        """Give {"collapse": kind} where the teacher has been collapsed for long, else {}.

        Long is an epoch, or LONG steps of a longer one. What it has been since when is kept in the
        saved `metrics`, so that a resumed run says the same. A name and what to change are printed
        once.
        """
        kind = collapse_of(figures["teacher_entropy"], figures["kl"], self.output_dim)
        known = metrics.pop("collapse", None)
        if not kind:
            if self.collapse:
                self.say(f"step {step:,}: the teacher is no longer {self.collapse}")
            self.collapse = ""
            return {}
        if known is None or known["kind"] != kind:
            known = {"kind": kind, "since": step}
        metrics["collapse"] = known
        if step - known["since"] < min(steps_per_epoch, LONG):
            return {}
        if self.collapse != kind:
            self.collapse = kind
            self.say(f"warning: step {step:,}: {self.collapse_text(known)}")
        return {"collapse": kind}

    def collapse_text(self, known: dict) -> str:
        kind, since = known["kind"], known["since"]
        return f"collapse: the teacher is {kind} since step {since:,}; {KNOBS[kind]}"

    def log_step(self, step: int, epoch: float, loss: float, lr: float, more: dict) -> None:
        seconds = time.perf_counter() - self.since
        speed, waited = self.num_images / seconds, self.waited / seconds
        values = {"loss": loss, "lr": lr, "images_per_second": speed, "data_wait": waited}
        self.log(step, epoch, values | {"peak_memory_gib": peak_memory()} | more)
        text = f"loss {loss:.3f}  lr {lr:.1e}  {speed:.0f} images/s"
        self.progress.update(self.bar, description=text)
        if not self.run.is_dry:  # which is timed as a whole
            self.restart_clock()

    def say_how_to_resume(self, step: int) -> None:
        self.say(f"stopped after step {step:,} of {self.total_steps:,}; to go on:")
        folder = shlex.quote(str(self.run.folder))
        self.say(f"  {launch_line(self.accelerator)} dino_train.py --resume {folder}")

    def check_finite(self) -> float:
        """Give the last loss, the mean over processes; FloatingPointError at the first not finite.

        A collective, and a sync point: all processes stop at the same step.
        """
        values = torch.stack(list(self.losses.values()))
        values = self.accelerator.reduce(values, reduction="mean").tolist()
        for step, value in zip(self.losses, values, strict=True):
            if not math.isfinite(value):
                said = f"the loss is {value} at step {step:,}"
                raise FloatingPointError(f"{said}; {self.run.kept()}")
        self.losses.clear()
        return values[-1]

    def report_unreadable(self, step: int, epoch: float) -> None:
        """Name the images that could not be decoded, once each; RunError if they are too many.

        A collective.
        """
        new = set().union(*self.run.agreement.gather(self.new_unreadable)) - self.unreadable
        self.new_unreadable = set()
        self.unreadable |= new
        if new:
            reasons = [self.dataset.why_unreadable(index) for index in sorted(new)]
            self.log(step, epoch, {"unreadable": reasons})
            for reason in reasons:
                self.say(f"{reason}; replaced by the next")
        num, total = len(self.unreadable), len(self.dataset)
        if num > MOST_UNREADABLE * total:
            reasons = [self.dataset.why_unreadable(i) for i in sorted(self.unreadable)[:10]]
            more = [f"and {num - 10} more, in {self.run.log_file}"] if num > 10 else []
            text = f"{num} of {total:,} images cannot be decoded, more than {MOST_UNREADABLE:.0%}:"
            raise RunError("\n  ".join([text, *reasons, *more]))


STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT]
STOP_SIGNALS += [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []  # Slurm's warning


def iterate(loader: DataLoader) -> Iterator:
    """Begin to iterate, with workers that outlive signals to the process group.

    They inherit the signals as blocked, from their first moment on: the main process decides.
    RuntimeError, which names it as a worker's, where one dies.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return _batches(iter(loader))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return _batches(iter(loader))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _batches(batches: Iterator) -> Iterator:
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:  # a worker's sockets close before it has ended
        time.sleep(1)  # in which torch's handler of its end raises, and says what killed it
        raise RuntimeError(f"DataLoader worker ended: {error!r}") from error


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect STOP_SIGNALS, so that the step is finished; a second Ctrl-C raises."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_command(main: Callable[[], object]) -> None:
    """Run a script's main; wrong input ends it with one line and code 2, a broken run with 1.

    Processes that fail alike leave the line to the first, of the run or of their node.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RunError) as error:
        text = str(error).strip() or type(error).__name__
        if not isinstance(error, RunError):
            # a worker's error arrives as its whole traceback, whose last line is the message
            text = text.splitlines()[-1]
        # wrong input is each node's own, what ends a run is agreed on, a file may fail anywhere
        agreed = isinstance(error, FloatingPointError | RunError)
        speaks = os.environ.get("RANK" if agreed else "LOCAL_RANK", "0") == "0"
        if speaks or isinstance(error, OSError):
            print(f"error: {text}", file=sys.stderr)
        sys.exit(1 if agreed else 2)
    except RuntimeError as error:  # raised anywhere, also by torch's signal handler
        reason = (str(error).strip().splitlines() or [""])[0]
        if "DataLoader worker" in reason:
            hint = "out of memory? then fewer --num-workers; what was saved can be resumed"
            text = f"a process that decodes images died: {reason} ({hint})"
        elif isinstance(error, torch.OutOfMemoryError):
            text = f"{reason} Try a smaller --batch-size with more --accumulation-steps."
        elif isinstance(error, dist.DistError) or "gloo" in reason:
            text = f"another process of the run ended: {reason}"
        else:
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(1)
