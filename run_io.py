"""What a run writes and reads back: its folder, saved state, log and terminal.

runs/NAME/config.yaml         the resolved configuration; --config reproduces the run
runs/NAME/log.jsonl           one line a logged step and evaluation
runs/NAME/ckpt.safetensors    the teacher, with all that evaluating it needs
runs/NAME/state.safetensors   all that an exact resume needs, on any number of processes
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn

from data import ImageDataset
from distributed import Agreement, copy_whole, whole
from losses import DinoLoss
from models import load_tensors, save_checkpoint, save_tensors

# what a resumed run may have otherwise
CHANGEABLE = {
    *("epochs", "num_workers", "eval_resize", "compile", "log_every", "log_with"),
    "stop_on_collapse",
    *("save_every", "save_minutes", "keep_last", "keep_every", "knn_every", "knn_images"),
}


# what is the run's own in its folder, besides its four files; the last are safetensors'
KEPT = r"(state|ckpt)-(\d{8}|epoch-\d{4,})\.safetensors"
LEFT_BY_A_KILL = r"\.tmp-.+|\.tmp[A-Za-z0-9]{6}"


class RunError(RuntimeError):
    """What ends a run that had begun well, in all processes alike: exit code 1."""


@dataclass(frozen=True)
class TrainingState:
    """All that a step changes: with the step's number, all that an exact resume needs."""

    system: nn.Module  # with .student and .teacher
    loss: DinoLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # fp16's

    def tensors(self) -> dict[str, Tensor]:
        """Give the state by name, the optimizer's by its parameter's name; sharded as it is."""
        names = {param: name for name, param in self.system.student.named_parameters()}
        tensors = {**self.system.state_dict(), "loss.center": self.loss.center}
        for param, values in self.optimizer.state.items():
            tensors |= {f"optimizer.{names[param]}.{key}": x for key, x in values.items()}
        scaling = self.scaler.state_dict() if self.scaler else {}
        return tensors | {f"scaler.{key}": torch.tensor(x) for key, x in scaling.items()}

    def whole_tensors(self, keep: bool) -> dict[str, Tensor]:
        """Give `tensors` whole and on the CPU where `keep`, else nothing. A collective."""
        kept = {}
        for name, tensor in self.tensors().items():
            tensor = whole(tensor)
            if keep:
                kept[name] = tensor.detach().cpu()
        return kept

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `whole_tensors` gave, in place."""
        params = dict(self.system.student.named_parameters())
        own = {**self.system.state_dict(), "loss.center": self.loss.center}
        scaling = {}
        for name, value in tensors.items():
            part, key = name.split(".", 1)
            if part == "scaler":
                scaling[key] = value.item()
            elif part == "optimizer":
                param, key = params[key.rsplit(".", 1)[0]], key.rsplit(".", 1)[1]
                if value.shape == param.shape:  # in the parameter's strides, for fused optimizers
                    target = torch.empty_like(param, dtype=value.dtype)
                else:  # the step's number: torch keeps it on the CPU unless the optimizer is fused
                    is_fused = self.optimizer.param_groups[0].get("fused")
                    target = torch.empty_like(value, device=param.device if is_fused else "cpu")
                copy_whole(target, value)
                self.optimizer.state[param][key] = target
            else:
                copy_whole(own.pop(name), value)
        if own:
            raise ValueError(f"the saved state lacks {', '.join(list(own)[:3])}")
        if self.scaler:
            self.scaler.load_state_dict(scaling)


class Run:
    """A run's folder. Raises ValueError where it is taken; writes nothing before `open`."""

    def __init__(self, config: object, accelerator: Accelerator, dataset: ImageDataset) -> None:
        self.is_main, self.world = accelerator.is_main_process, accelerator.num_processes
        self.agreement = Agreement()
        self.fingerprint = dataset.fingerprint()
        name = f"{Path(config.data.data).name}-{config.model.arch}"
        unused = unused_path(Path("runs"), name)
        folder = config.run.output_dir or self.agreement.gather(unused)[0]
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"need a folder for --output-dir, got the file {folder}")
        names = ("config.yaml", "log.jsonl", "ckpt.safetensors", "state.safetensors")
        files = [folder / name for name in names]
        self.config_file, self.log_file, self.checkpoint, self.state_file = files
        taken = [file for file in files if file.exists()]
        if taken and not (config.run.resume or config.run.overwrite):
            wanted = "--resume, --overwrite or another --output-dir"
            raise ValueError(f"{folder} already holds a run ({taken[0].name}): need {wanted}")
        self.stale = taken + self._files(KEPT) if config.run.overwrite else []
        self.is_dry = config.run.dry_run  # nothing is written, then
        self.is_named = config.run.output_dir is not None
        self.saved = {}
        if config.run.resume and self.state_file.exists():
            _, texts = load_tensors(self.state_file, only_metadata=True)
            self.saved = json.loads(texts["metadata"])
        self.require_same(self.saved.get("step", 0), f"state in {folder}")
        self.require_same(self.fingerprint, f"images in {config.data.data}")
        self.config: dict = {}
        self.taken_over: list[str] = []

    def _files(self, pattern: str) -> list[Path]:
        exists = self.folder.is_dir()
        return [x for x in self.folder.iterdir() if re.fullmatch(pattern, x.name)] if exists else []

    def require_same(self, value: object, what: str) -> None:
        """Raise ValueError in all processes where `value` is not the same in all. A collective.

        Nodes without a folder in common would go on from different steps, or wait for each other.
        """
        values = self.agreement.gather(value)
        if any(other != values[0] for other in values):
            rank = next(i for i, other in enumerate(values) if other != values[0])
            raise ValueError(f"processes 0 and {rank} do not see the same {what}: need one for all")

    def settle(self, config: object) -> object:
        """Give the config to train by: a resumed run's batch is refit to the processes there are.

        Raises ValueError naming every flag in which the saved run differs.
        """
        if self.saved:
            config = self._refit(config)
        # the resolved config as plain data, less what belongs to one start of the run
        self.config = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        for key in ("config", "output_dir", "resume", "overwrite", "dry_run"):
            del self.config["run"][key]
        return config

    def _refit(self, config: object) -> object:
        """Keep the images a step, whose order an exact resume needs, on another number of GPUs."""
        saved, optim = self.saved["config"]["optim"], config.optim
        given, refused = dataclasses.asdict(config), []
        sections = self.saved["config"].items()
        is_known = all(values.keys() <= given[section].keys() for section, values in sections)
        if not is_known or not {"world", "fingerprint"} <= self.saved.keys():
            raise ValueError(f"cannot resume {self.folder}: another version of this code saved it")
        images = saved["batch_size"] * saved["accumulation_steps"] * self.saved["world"]
        if self.world != self.saved["world"]:
            each, left = divmod(images, self.world)
            if left:
                text = f"{images} images a step need a number of processes that divides them"
                raise ValueError(f"cannot resume {self.folder} on {self.world} processes: {text}")
            batch_size = max(n for n in range(1, optim.batch_size + 1) if each % n == 0)
            optim = replace(optim, batch_size=batch_size, accumulation_steps=each // batch_size)
            config = replace(config, optim=optim)
        here = optim.images_per_step(self.world)
        given = dataclasses.asdict(config)
        for section, values in self.saved["config"].items():
            for name, old in values.items():
                new = json.loads(json.dumps(given[section][name], default=str))
                flag = f"--{name.replace('_', '-')} {new}"
                if new == old:
                    continue
                same_images = name == "data" and self.fingerprint == self.saved["fingerprint"]
                same_batch = name in ("batch_size", "accumulation_steps") and here == images
                if name in CHANGEABLE or same_images or same_batch:
                    self.taken_over.append(f"{flag} (was {old})")
                else:
                    refused.append(f"{flag}: it has {old}")
        if not refused and self.fingerprint != self.saved["fingerprint"]:
            refused.append(f"the images in {config.data.data}: they are not those it began with")
        if refused:
            raise ValueError(f"cannot resume {self.folder} with {'; '.join(refused)}")
        return config

    def open(self, step: int) -> None:
        """Create the folder for a run that goes on after `step`: the log's later lines are cut.

        A collective. Raises ValueError in all processes where it cannot be written.
        """
        if self.is_dry:
            return
        error = ""
        if self.is_main:
            try:
                self._open(step)
            except OSError as failure:
                error = str(failure)
        error = self.agreement.gather(error)[0]
        if error:
            raise ValueError(f"cannot write to {self.folder}: {error}")

    def _open(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=self.is_named or bool(self.saved))
        for file in self.stale + self._files(LEFT_BY_A_KILL):
            file.unlink()
        write_text(self.config_file, yaml.safe_dump(self.config, sort_keys=False))
        kept = []
        exists = step and self.log_file.exists()
        for line in self.log_file.read_text().splitlines() if exists else []:
            try:
                kept += [line + "\n"] if json.loads(line)["step"] <= step else []
            except ValueError:  # a line that a kill cut off
                break
        write_text(self.log_file, "".join(kept))

    def save(
        self,
        state: TrainingState,
        step: int,
        epoch: float,
        metrics: dict,
        unreadable: Iterable[int] = (),
    ) -> None:
        """Write the state after `step` steps, and the teacher with all that evaluating it needs.

        A collective. Raises, in all processes alike, RunError where the disk is full, and
        FloatingPointError before a file is touched where a weight is not finite.
        """
        if self.is_dry:
            return
        tensors = state.whole_tensors(keep=self.is_main)
        error: Exception | None = None
        if self.is_main:
            broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
            metadata = {"config": self.config, "step": step, "epoch": epoch, "metrics": metrics}
            try:
                if broken:
                    text = f"{broken[0]} is not finite after step {step:,}; {self.kept()}"
                    raise FloatingPointError(text)
                prefix = "teacher."
                names = [name for name in tensors if name.startswith(prefix)]
                teacher = {name.removeprefix(prefix): tensors[name] for name in names}
                save_checkpoint(self.checkpoint, state.system.teacher, metadata, teacher)
                more = {"world": self.world, "fingerprint": self.fingerprint}
                more["unreadable"] = sorted(unreadable)
                self._save_state(tensors, json.dumps(metadata | more), step, epoch)
            except OSError as failure:
                error = RunError(f"{failure}; {self.kept()}")
            except FloatingPointError as failure:
                error = failure
        error = self.agreement.gather(error)[0]
        if error:
            raise error

    def _save_state(self, tensors: dict, metadata: str, step: int, epoch: float) -> None:
        """Write the state, after the names that older files keep: a kill before it undoes all."""
        settings, texts = self.config["run"], {"metadata": metadata}
        if settings["keep_every"] and epoch % settings["keep_every"] == 0:
            kept = self.checkpoint.with_stem(f"{self.checkpoint.stem}-epoch-{round(epoch):04}")
            _link(self.checkpoint, kept)
        if settings["keep_last"] == 1:
            return save_tensors(self.state_file, tensors, texts)
        numbered = self.state_file.with_stem(f"{self.state_file.stem}-{step:08}")
        save_tensors(numbered, tensors, texts)
        _link(self.checkpoint, self.checkpoint.with_stem(f"{self.checkpoint.stem}-{step:08}"))
        for file in (self.state_file, self.checkpoint):
            old = self._files(rf"{file.stem}-\d{{8}}{file.suffix}")
            by_age = sorted(old, key=lambda path: path.stat().st_mtime)
            for path in by_age[: -settings["keep_last"]]:
                path.unlink()
        _link(numbered, self.state_file)

    def kept(self) -> str:
        exists = self.checkpoint.exists()
        return f"{self.checkpoint} is kept" if exists else "no checkpoint was saved yet"

    def load(self, state: TrainingState) -> tuple[int, dict]:
        """Restore what `save` wrote: (step, metrics); (0, {}) where nothing was saved yet."""
        if not self.saved:
            return 0, {}
        tensors, _ = load_tensors(self.state_file)
        state.load(tensors)
        return self.saved["step"], self.saved["metrics"]


def unused_path(folder: Path, name: str, suffix: str = "") -> Path:
    """Give the first of `name`, `name`-2, `name`-3 and so on that `folder` does not hold."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(path for x in names if not (path := folder / f"{x}{suffix}").exists())


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError naming it."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def _link(file: Path, name: Path) -> None:
    """Give a file a second name, at once, which a replacement of the file does not change."""
    temporary = name.with_name(f".tmp-{name.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(file, temporary)
    except OSError:  # not every file system has links
        shutil.copyfile(file, temporary)
    os.replace(temporary, name)
    temporary.unlink(missing_ok=True)  # it stays where both were one file already
