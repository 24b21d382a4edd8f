"""What a run writes and reads back: its folder, saved state, log and terminal.

runs/NAME/config.yaml         the resolved configuration; --config reproduces the run
runs/NAME/log.jsonl           one line a logged step and evaluation
runs/NAME/ckpt.safetensors    the teacher, with all that evaluating it needs
runs/NAME/state.safetensors   all that an exact resume needs
"""

import dataclasses
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from losses import DinoLoss
from models import load_tensors, save_checkpoint, save_tensors

# what a resumed run may have otherwise
CHANGEABLE = {
    *("epochs", "num_workers", "eval_resize", "save_every", "log_every"),
    *("knn_every", "knn_images", "log_with"),
}


@dataclass(frozen=True)
class TrainingState:
    """All that a step changes: with the step's number, all that an exact resume needs."""

    system: nn.Module  # with .student and .teacher
    loss: DinoLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # fp16's

    def tensors(self) -> dict[str, Tensor]:
        """Give the state by name, the optimizer's by its parameter's name."""
        names = {param: name for name, param in self.system.student.named_parameters()}
        tensors = {**self.system.state_dict(), "loss.center": self.loss.center}
        for param, values in self.optimizer.state.items():
            tensors |= {f"optimizer.{names[param]}.{key}": x for key, x in values.items()}
        scaling = self.scaler.state_dict() if self.scaler else {}
        return tensors | {f"scaler.{key}": torch.tensor(x) for key, x in scaling.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave, in place."""
        params = dict(self.system.student.named_parameters())
        parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "scaler": {}, "loss": {}}
        for name in [name for name in tensors if name.split(".")[0] in parts]:
            part, key = name.split(".", 1)
            parts[part][key] = tensors.pop(name)
        self.system.load_state_dict(tensors)
        self.loss.load_state_dict(parts["loss"])
        for name, value in parts["optimizer"].items():
            name, key = name.rsplit(".", 1)
            param = params[name]
            if value.shape == param.shape:  # fused optimizers need the parameter's strides as well
                value = torch.empty_like(param, dtype=value.dtype).copy_(value)
            self.optimizer.state[param][key] = value.to(param.device)
        if self.scaler:
            self.scaler.load_state_dict({key: x.item() for key, x in parts["scaler"].items()})


class Run:
    """A run's folder. Raises ValueError where it is taken; writes nothing before `open`."""

    def __init__(self, config: object) -> None:
        name = f"{Path(config.data.data).name}-{config.model.arch}"
        names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        unused = (path for name in names if not (path := Path("runs", name)).exists())
        self.folder = config.run.output_dir or next(unused)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"need a folder for --output-dir, got the file {self.folder}")
        names = ("config.yaml", "log.jsonl", "ckpt.safetensors", "state.safetensors")
        files = [self.folder / name for name in names]
        self.config_file, self.log_file, self.checkpoint, self.state_file = files
        taken = [file for file in files if file.exists()]
        if taken and not (config.run.resume or config.run.overwrite):
            wanted = "--resume, --overwrite or another --output-dir"
            raise ValueError(f"{self.folder} already holds a run ({taken[0].name}): need {wanted}")
        self.stale = [] if config.run.resume else taken
        # the resolved config as plain data, less what belongs to one start of the run
        self.config = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        for key in ("config", "output_dir", "resume", "overwrite"):
            del self.config["run"][key]

    def open(self, step: int) -> None:
        """Create the folder for a run that goes on after `step`: the log's later lines are cut."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.stale:
            file.unlink()
        self.config_file.write_text(yaml.safe_dump(self.config, sort_keys=False))
        kept = []
        for line in self.log_file.read_text().splitlines() if step else []:
            try:
                kept += [line + "\n"] if json.loads(line)["step"] <= step else []
            except ValueError:  # a line that a kill cut off
                break
        self.log_file.write_text("".join(kept))

    def save(self, state: TrainingState, step: int, epoch: float, metrics: dict) -> None:
        """Write the state after `step` steps, and the teacher with all that evaluating it needs.

        Raises FloatingPointError before a file is touched where a weight is not finite.
        """
        metadata = {"config": self.config, "step": step, "epoch": epoch, "metrics": metrics}
        tensors = state.tensors()
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise FloatingPointError(f"{name} is not finite after step {step:,}; {self.kept()}")
        save_tensors(self.state_file, tensors, {"metadata": json.dumps(metadata)})
        save_checkpoint(self.checkpoint, state.system.teacher, metadata)

    def kept(self) -> str:
        exists = self.checkpoint.exists()
        return f"{self.checkpoint} is kept" if exists else "no checkpoint was saved yet"

    def load(self, state: TrainingState) -> tuple[int, dict]:
        """Restore what `save` wrote: (step, metrics); (0, {}) where nothing was saved yet.

        Raises ValueError naming the flag in which the saved run differs.
        """
        if not self.state_file.exists():
            return 0, {}
        tensors, texts = load_tensors(self.state_file)
        metadata = json.loads(texts["metadata"])
        for section, values in self.config.items():
            for name, value in values.items():
                saved = metadata["config"][section].get(name)
                if saved != value and name not in CHANGEABLE:
                    given = f"--{name.replace('_', '-')} {value}"
                    raise ValueError(f"cannot resume {self.folder} with {given}: it has {saved}")
        state.load(tensors)
        return metadata["step"], metadata["metrics"]


class Monitor:
    """What a run tells, in log.jsonl, trackers and terminal, without waiting for the device."""

    def __init__(self, run: Run, accelerator: Accelerator, start: int, total_steps: int) -> None:
        self.run, self.accelerator = run, accelerator
        self.console = Console(quiet=not accelerator.is_main_process)
        self.progress = Progress(
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TextColumn("ETA"), TimeRemainingColumn()),
            console=self.console,
            disable=not (self.console.is_terminal and accelerator.is_main_process),
        )
        self.bar = self.progress.add_task("starting", total=total_steps, completed=start)
        self.losses: dict[int, Tensor] = {}  # by step, not yet read from the device
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of images/s what was done since the last step."""
        self.since, self.num_images = time.perf_counter(), 0

    def add(self, step: int, loss: Tensor, num_images: int) -> None:
        self.losses[step] = loss.detach()
        self.num_images += num_images
        self.progress.update(self.bar, completed=step)

    def log(self, step: int, epoch: float, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with open(self.run.log_file, "a") as file:
                file.write(json.dumps({"step": step, "epoch": round(epoch, 4)} | values) + "\n")
        self.accelerator.log(values, step=step)

    def log_step(self, step: int, epoch: float, loss: float, lr: float, more: dict) -> None:
        speed = self.num_images / (time.perf_counter() - self.since)
        values = {"loss": loss, "lr": lr, "images_per_second": speed}
        self.log(step, epoch, values | {name: float(value) for name, value in more.items()})
        text = f"loss {loss:.3f}  lr {lr:.1e}  {speed:.0f} images/s"
        self.progress.update(self.bar, description=text)
        self.restart_clock()

    def check_finite(self) -> float:
        """Give the last loss; FloatingPointError at the first that is not finite. A sync point."""
        values = torch.stack(list(self.losses.values())).tolist()
        for step, value in zip(self.losses, values, strict=True):
            if not math.isfinite(value):
                said = f"the loss is {value} at step {step:,}"
                raise FloatingPointError(f"{said}; {self.run.kept()}")
        self.losses.clear()
        return values[-1]


def ignore_stop_requests(worker: int) -> None:
    """Let a loader's worker outlive signals to the process group: the main process decides."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT, so that the step is finished; a second Ctrl-C raises."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_command(main: Callable[[], object]) -> None:
    """Run a script's main; wrong input ends it with one line and code 2, a broken loss with 1."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        # a worker's error arrives as its whole traceback, whose last line is the message
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
