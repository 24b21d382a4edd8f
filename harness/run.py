"""A run and its folder: what is saved, when, and how it goes on.

runs/NAME/config.yaml         the finished configuration; --config reproduces the run
runs/NAME/log.jsonl           one line a logged step and evaluation
runs/NAME/ckpt.safetensors    the teacher, with all that evaluating it needs
runs/NAME/state.safetensors   all that an exact resume needs, on any number of processes

Run.prepare -> build the networks -> run.load -> run.open -> the loop asks what_is_due and saves.
"""

import json
import math
import re
import secrets
import shlex
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import NamedTuple

import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from config import SETTINGS, Config
from data import ImageDataset, Sample, StepSampler, build_dataset, collate
from folders import cache_folder
from harness.command import RunError, copy_whole, iterate, unused_path, write_whole
from harness.decoded_once import DecodedOnce, ImageMemory
from harness.distributed import Agreement, join_processes, make_accelerator
from harness.flags import as_plain_data, check_values, finish, fit_batch
from harness.run_lock import FolderLock
from harness.saved_run import SavedRun, TrainingState
from models import load_tensors, save_checkpoint, save_tensors, what_is_left


class Due(NamedTuple):
    """What follows a step, in all processes alike."""

    reads_loss: bool  # from the device, which has to be waited for
    logs: bool
    evaluates: bool
    saves: bool
    ends: bool


# names of a run's numbered copies
NUMBERED_FILE = r"(state|ckpt)-(\d{8}|epoch-\d{4,})\.safetensors"
# Names of a run's own files while they are written, which a kill leaves; the last is how
# safetensors calls any file. Others are left alone, such as a table of features that embed.py
# writes to the same folder.
LEFT_BY_A_KILL = r"\.tmp-(config|log|curves|state|ckpt)[^/]*|\.tmp[A-Za-z0-9]{6}"


def _time_of(file: Path) -> float:
    return file.stat().st_mtime


def sound_lines(content: bytes) -> tuple[list[tuple[int, str]], list[bytes]]:
    """Return a log's lines with their steps, and the damaged ones: cut off, or not a log's."""
    sound: list[tuple[int, str]] = []
    damaged: list[bytes] = []
    for line in content.split(b"\n"):
        if not line:
            continue
        try:
            text = line.decode()
            values = json.loads(text)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError, too
            values = None
        step = values.get("step") if isinstance(values, dict) else None
        if type(step) is int and step >= 0:
            sound.append((step, text))
        else:
            damaged.append(line)
    return sound, damaged


class Run:
    """A run: its config, processes, images and folder. Nothing is written before `open`.

    Raises ValueError where the folder is taken or the run in it cannot go on so.
    """

    writes_nothing = False  # so that the folder may hold another run

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        dataset: ImageDataset,
        lock: FolderLock | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.dataset = dataset
        self.agreement = Agreement()
        self.lock = lock or FolderLock()
        self.has_warned_of_lock = False
        self.folder = self._choose_folder(config)
        if (config.run.resume or config.run.overwrite) and self.folder.is_dir():
            self._own_folder()  # before the state is read, which a live run would still change
        self.to_delete = self._files_of_another_run(config)
        self.fingerprint = dataset.fingerprint()
        self.is_resumed = config.run.resume and self.state_file.exists()
        if config.run.resume and not self.is_resumed:
            self._require_nothing_saved()
        self.saved = SavedRun.read(self.state_file) if self.is_resumed else SavedRun()
        self.agreement.require_same(self.saved.step, f"state in {self.folder}")
        self.agreement.require_same(self.fingerprint, f"images in {config.data.data}")
        world = accelerator.num_processes
        if self.is_resumed and world != self.saved.world:
            config = fit_batch(config, self.saved.images_per_step, world)
        self.config = config
        self.image_memory = ImageMemory(config.data.in_memory, config.data.num_workers)
        self.images = self.image_memory.keep(
            dataset, config.data.canvas_size, config.model.channels
        )
        self.changes = self._changes_since_saved() if self.is_resumed else []
        accelerator.gradient_accumulation_steps = config.optim.accumulation_steps
        self.images_per_step = config.optim.images_per_step(world)  # of all processes
        self.steps_per_epoch = self._sampler(range(0)).steps_per_epoch
        self.total_steps = config.optim.epochs * self.steps_per_epoch
        self.last_step = self.total_steps  # that this start takes, if nothing stops it
        self.steps_before = self.saved.step  # which were done before this start
        if self.steps_before > self.total_steps:
            done = f"{self.folder} has made {self.steps_before:,} steps"
            fewest = math.ceil(self.steps_before / self.steps_per_epoch)
            given = f"--epochs {config.optim.epochs}, which is {self.total_steps:,}"
            raise ValueError(f"{done}: need --epochs of at least {fewest}, got {given}")
        self.tracker_id = self.saved.tracker_id  # kept without W&B, too: a later start may have it
        if config.run.log_with == "wandb" and not self.tracker_id:
            self.tracker_id = secrets.token_hex(4)
        self.stop_signal = 0  # number of the signal that ends the run, in all processes
        self.unreadable = set(self.saved.unreadable)
        self.new_unreadable: set[int] = set()  # not yet said
        self.waited = 0.0  # seconds, for batches
        self._batches: Generator | None = None
        self.has_teacher = self.is_resumed and self.checkpoint.exists()  # in its folder
        self.saved_at = time.monotonic()

    @classmethod
    def prepare(cls, config: Config, lock: FolderLock | None = None) -> "Run":
        """Open processes, images and the run's folder, and finish the config by them.

        The folder is the run's own until the `lock` is let go. Raises ValueError for settings that
        make no sense, and for the folder of a live run; nothing is written then.
        """
        check_values(config)
        processes = join_processes()
        with processes.local_main_process_first():  # which may have to download or to scan
            dataset = build_dataset(
                config.data.data,
                index_folder=None if cls.writes_nothing else cache_folder(),
                val=config.data.val,
                take_splits=config.data.splits,
                channels=config.model.channels,
            )
        dataset.seed = config.run.seed
        try:
            survey = dataset.survey()
        except ValueError as error:
            raise ValueError(f"no images in {config.data.data} can be read: {error}") from error
        dataset.notes += survey.notes()
        config = finish(config, dataset, survey, processes.num_processes)
        accelerator = make_accelerator(config.run.mixed_precision, config.run.log_with)
        dataset = dataset.as_canvases(config.data.canvas_size)
        return cls(config, accelerator, dataset, lock)

    @property
    def decodes_once(self) -> bool:
        return isinstance(self.images, DecodedOnce)

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def log_file(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "ckpt.safetensors"

    @property
    def state_file(self) -> Path:
        return self.folder / "state.safetensors"

    # ------------------------------------------------ before the first step

    def _own_folder(self) -> None:
        """Lock the folder. A collective. Raises ValueError in all processes where that fails."""
        error, why_not = "", ""
        if self.accelerator.is_main_process:
            try:
                why_not = self.lock.take(self.folder)
            except ValueError as held:
                error = str(held)
            except OSError as failure:
                error = f"cannot write to {self.folder}: {failure.strerror}"
        error = self.agreement.gather(error)[0]
        if error:
            raise ValueError(error)
        if why_not and not self.has_warned_of_lock:
            self.has_warned_of_lock = True
            text = f"warning: {self.folder} is not locked, {why_not}: start no second run in it"
            self.accelerator.print(text)

    def _choose_folder(self, config: Config) -> Path:
        """Return --output-dir, or a folder in runs that is not there yet. A collective."""
        name = f"{Path(config.data.data).name}-{config.model.arch}"
        unused = self.agreement.gather(unused_path(Path("runs"), name))[0]
        folder = config.run.output_dir or unused
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"need a folder for --output-dir, got the file {folder}")
        return folder

    def _files_of_another_run(self, config: Config) -> list[Path]:
        """Return the files that --overwrite deletes. ValueError where it was not given."""
        files = [self.config_file, self.log_file, self.checkpoint, self.state_file]
        taken = [file for file in files if file.exists()]
        if self.writes_nothing:
            return []
        if config.run.overwrite:
            return taken + self._files(NUMBERED_FILE)
        if taken and not config.run.resume:
            wanted = "--resume, --overwrite or another --output-dir"
            raise ValueError(f"{self.folder} already holds a run ({taken[0].name}): need {wanted}")
        return []

    def _require_nothing_saved(self) -> None:
        """Raise ValueError where a run without state has made steps: it would begin anew."""
        older = self._files(r"state-\d{8}\.safetensors|state\.safetensors\.old")
        older.sort(key=_time_of)
        has_saved = self.checkpoint.exists() or self._files(NUMBERED_FILE)
        if not has_saved and self._last_logged_step() <= self._save_every():
            return  # it was killed before its first save
        text = f"{self.state_file} is missing, and {self.folder} has a run that made steps"
        if older:
            rename = shlex.join(["mv", str(older[-1]), str(self.state_file)])
            raise ValueError(f"{text}; to go back to its newest state: {rename}")
        text = f"{text}: no state is left to resume"
        if self.checkpoint.exists():
            teacher = shlex.quote(str(self.checkpoint))
            raise ValueError(f"{text}; need --init-from {teacher} and another --output-dir")
        raise ValueError(f"{text}; need --overwrite to begin anew")

    def _last_logged_step(self) -> int:
        if not self.log_file.exists():
            return 0
        lines, _ = sound_lines(self.log_file.read_bytes())
        return max((step for step, _ in lines), default=0)

    def _save_every(self) -> int:
        """Return the steps between the saves of the run in the folder, by its config.yaml."""
        try:
            return int(yaml.safe_load(self.config_file.read_text())["run"]["save_every"])
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            return 0

    def _files(self, pattern: str) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [file for file in self.folder.iterdir() if re.fullmatch(pattern, file.name)]

    def _changes_since_saved(self) -> list[str]:
        """Return the settings that differ from the saved run's, as lines to be said.

        Raises ValueError naming every one that a resumed run may not change.
        """
        changes: list[str] = []
        refused: list[str] = []
        has_same_images = self.fingerprint == self.saved.fingerprint
        world = self.accelerator.num_processes
        has_same_batch = self.config.optim.images_per_step(world) == self.saved.images_per_step
        given = as_plain_data(self.config)
        for section, values in self.saved.config.items():
            for name, old in values.items():
                new = given[section][name]
                if new == old:
                    continue
                may_change = SETTINGS[section][name].metadata.get("may_change", False)
                if name in ("data", "splits"):
                    may_change = has_same_images  # which may have moved
                if name in ("batch_size", "accumulation_steps"):
                    may_change = has_same_batch
                flag = f"--{name.replace('_', '-')} {new}"
                if may_change:
                    changes.append(f"{flag} (was {old})")
                else:
                    refused.append(f"{flag}: it has {old}")
        if not refused and not has_same_images:
            images = self.config.data.data
            refused.append(f"the images in {images}: they are not those it began with")
        if refused:
            raise ValueError(f"cannot resume {self.folder} with {'; '.join(refused)}")
        return changes

    def load(self, state: TrainingState) -> None:
        """Restore what the run saved, where it goes on."""
        if self.is_resumed:
            tensors, _ = load_tensors(self.state_file)
            try:
                state.load(tensors)
            except (KeyError, ValueError, RuntimeError, AttributeError) as error:
                reason = " ".join(str(error).split())[:200]
                text = f"{self.state_file} is damaged, or another network's: {reason}"
                raise ValueError(f"{text}{what_is_left(self.state_file)}") from error

    def open(self) -> None:
        """Create and lock the folder, and write its first files.

        What --overwrite names is deleted, and what a kill left; the log's lines after the saved
        step are cut. A collective. Raises ValueError in all processes where it cannot be written.
        """
        self._create_folder()
        self._own_folder()
        error = ""
        if self.accelerator.is_main_process:
            try:
                # anew: another run may have come and gone since the first look
                self.to_delete = self._files_of_another_run(self.config)
                self._write_first_files()
            except OSError as failure:
                error = f"cannot write to {self.folder}: {failure}"
            except ValueError as failure:
                error = str(failure)
        error = self.agreement.gather(error)[0]
        if error:
            raise ValueError(error)

    def _create_folder(self) -> None:
        """Create the folder, another one where a run without --output-dir took it meanwhile.

        A collective. Raises ValueError in all processes where it cannot be created.
        """
        may_exist = self.config.run.output_dir is not None
        is_taken = True
        while is_taken:
            error, is_taken = "", False
            if self.accelerator.is_main_process:
                try:
                    self.folder.mkdir(parents=True, exist_ok=may_exist)
                except OSError as failure:
                    is_taken = self.folder.is_dir() and not may_exist
                    error = f"cannot write to {self.folder}: {failure}"
            error, is_taken = self.agreement.gather((error, is_taken))[0]
            if is_taken:
                before, self.folder = self.folder, self._choose_folder(self.config)
                text = f"another run took {before} meanwhile: this one is in {self.folder}"
                self.accelerator.print(text)
            elif error:
                raise ValueError(error)

    def _write_first_files(self) -> None:
        for file in self.to_delete + self._files(LEFT_BY_A_KILL):
            file.unlink()
        write_whole(self.config_file, yaml.safe_dump(as_plain_data(self.config), sort_keys=False))
        write_whole(self.log_file, self._log_until_now())

    def _log_until_now(self) -> str:
        """Return the log's lines up to the saved step; damaged ones are kept aside, and said."""
        if not self.steps_before or not self.log_file.exists():
            return ""
        sound, damaged = sound_lines(self.log_file.read_bytes())
        if damaged:
            aside = self.log_file.with_name(f"{self.log_file.name}.damaged")
            with open(aside, "ab") as file:
                file.write(b"".join(line + b"\n" for line in damaged))
            text = f"damaged lines of {self.log_file.name}: {len(damaged)}, now in {aside}"
            self.accelerator.print(f"warning: {text}")
        return "".join(f"{line}\n" for step, line in sound if step <= self.steps_before)

    def append_to_log(self, line: str) -> None:
        with open(self.log_file, "a") as file:
            file.write(line + "\n")

    # ------------------------------------------------ steps and batches

    def _sampler(self, steps: range) -> StepSampler:
        return StepSampler(
            num_images=len(self.dataset),
            batch_size=self.config.optim.batch_size,
            seed=self.config.run.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            steps=steps,
            accumulation_steps=self.config.optim.accumulation_steps,
        )

    def steps(self) -> Iterable[int]:
        """Return the numbers of the steps to take, from 1 where nothing was done before."""
        return range(self.steps_before + 1, self.total_steps + 1)

    def epoch(self, step: int) -> float:
        """Return how many passes over the data are done after a step."""
        return step / self.steps_per_epoch

    @property
    def epochs_of_decoding(self) -> float:
        """Return for about how many epochs of this start a process waits for images to be decoded.

        Infinity where they are not kept. One process has kept all of them after its first epoch.
        Each of several meets other images in each epoch until it has decoded all of them, which is
        the work of as many epochs as there are processes.
        """
        return self.accelerator.num_processes if self.decodes_once else math.inf

    def seconds_left(self, step: int, seconds_a_step: float, waited_a_step: float) -> float:
        """Return how long the steps after `step` will take, by the mean of some before.

        Of a step's time it waited `waited_a_step` for data, which is over once all are in memory.
        """
        first_from_memory = self.steps_before + self.epochs_of_decoding * self.steps_per_epoch
        num_from_memory = max(0, self.total_steps - max(step, first_from_memory))
        return (self.total_steps - step) * seconds_a_step - num_from_memory * waited_a_step

    def start_loading(self) -> None:
        """Start the workers that decode this process's batches, from the first step on."""
        loader = DataLoader(
            self.images,
            batch_sampler=self._sampler(range(self.steps_before, self.total_steps)),
            num_workers=self.config.data.num_workers,
            collate_fn=collate,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self._batches = iterate(loader)

    def stop_loading(self) -> None:
        """End the workers, where there are any."""
        if self._batches is not None:
            self._batches.close()

    def next_batch(self) -> Sample:
        """Take the next batch, and note what could not be decoded and how long it was waited for.

        On a GPU, what runs there goes on meanwhile.
        """
        asked = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - asked
        is_replaced = batch.index != batch.source
        self.new_unreadable |= set(batch.index[is_replaced].tolist())
        return batch

    # ------------------------------------------------ after a step

    def is_logged(self, step: int) -> bool:
        return step == self.total_steps or step % self.config.run.log_every == 0

    def _keeps_teacher_for_good(self, step: int) -> bool:
        every = self.config.run.keep_every
        return every > 0 and self.epoch(step) % every == 0

    def what_is_due(
        self, step: int, stop_signals: list[int], failure: str, knn_is_due: bool
    ) -> Due:
        """Decide in common what follows a step, so that all processes do the same. A collective.

        `stop_signals` are those that this process received; `failure` is what went wrong in it, if
        anything: then RunError is raised in all of them.
        """
        settings = self.config.run
        minutes = (time.monotonic() - self.saved_at) / 60
        self.stop_signal, is_late, has_failed = self.agreement.largest(
            stop_signals[0] if stop_signals else 0,
            0 < settings.save_minutes <= minutes,
            bool(failure),
        )
        if has_failed:
            raise RunError(failure)
        is_last_step = step == self.total_steps
        logs = self.is_logged(step)
        evaluates = knn_is_due and (is_last_step or not self.stop_signal)
        ends = is_last_step or self.stop_signal > 0
        saves = bool(
            ends or is_late or step % settings.save_every == 0 or self._keeps_teacher_for_good(step)
        )
        is_on_cpu = self.accelerator.device.type == "cpu"  # where nothing has to be waited for
        reads_loss = logs or evaluates or saves or is_on_cpu
        return Due(reads_loss, logs, evaluates, saves, ends)

    def stop_where_failed(self, failure: str) -> None:
        """Raise RunError in all processes where `failure` is not empty in one. A collective."""
        (has_failed,) = self.agreement.largest(bool(failure))
        if has_failed:
            raise RunError(failure)

    def save(
        self, state: TrainingState, step: int, metrics: dict, collapse: dict | None = None
    ) -> None:
        """Write the state after `step` steps, and the teacher with all that evaluating it needs.

        A collective. Raises, in all processes alike, RunError where the disk is full, and
        FloatingPointError before a file is touched where a weight is not finite.
        """
        tensors = state.whole_tensors(keep=self.accelerator.is_main_process)
        error: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                self._write(tensors, state.system.teacher, step, metrics, collapse)
            except OSError as failure:
                error = RunError(f"{failure}; {self.kept()}")
            except FloatingPointError as failure:
                error = failure
        error = self.agreement.gather(error)[0]
        if error:
            raise error
        self.has_teacher = True
        self.saved_at = time.monotonic()

    def _write(
        self,
        tensors: dict[str, Tensor],
        teacher: nn.Module,
        step: int,
        metrics: dict,
        collapse: dict | None,
    ) -> None:
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                text = f"{name} is not finite after step {step:,}; {self.kept()}"
                raise FloatingPointError(text)
        metadata = {
            "config": as_plain_data(self.config),
            "step": step,
            "epoch": self.epoch(step),
            "metrics": metrics,
        }
        prefix = "teacher."
        teacher_tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        more = {
            "world": self.accelerator.num_processes,
            "fingerprint": self.fingerprint,
            "unreadable": sorted(self.unreadable),
            "collapse": collapse,
            "tracker_id": self.tracker_id,
        }
        texts = {"metadata": json.dumps(metadata | more)}
        if not self.state_file.exists():
            # A run's first state is written before its first teacher, too: wherever a kill falls,
            # a teacher without a state is then one whose state was lost.
            save_tensors(self.state_file, tensors, texts)
        save_checkpoint(self.checkpoint, teacher, metadata, teacher_tensors)
        self.has_teacher = True
        self._write_state(tensors, texts, step)

    def _write_state(self, tensors: dict[str, Tensor], texts: dict[str, str], step: int) -> None:
        """Write state.safetensors last: a run killed before goes on from the state before."""
        if self._keeps_teacher_for_good(step):
            name = f"{self.checkpoint.stem}-epoch-{round(self.epoch(step)):04}"
            copy_whole(self.checkpoint, self.checkpoint.with_stem(name))
        if self.config.run.keep_last == 1:
            save_tensors(self.state_file, tensors, texts)
            return
        numbered_state = self.state_file.with_stem(f"{self.state_file.stem}-{step:08}")
        numbered_checkpoint = self.checkpoint.with_stem(f"{self.checkpoint.stem}-{step:08}")
        save_tensors(numbered_state, tensors, texts)
        copy_whole(self.checkpoint, numbered_checkpoint)
        for stem, newest in (("state", numbered_state), ("ckpt", numbered_checkpoint)):
            older = [
                file for file in self._files(rf"{stem}-\d{{8}}\.safetensors") if file != newest
            ]
            # by time, since a run that went back to an older state has later steps that are older
            older.sort(key=_time_of, reverse=True)
            # the newest is kept besides, whatever the clock says
            for file in older[self.config.run.keep_last - 1 :]:
                file.unlink()
        copy_whole(numbered_state, self.state_file)

    def lacks_teacher(self) -> bool:
        """Tell whether a resumed run has a state but no teacher. A collective.

        A kill came between the two, or the teacher's file is gone.
        """
        is_lacking = self.is_resumed and not self.has_teacher
        return bool(self.agreement.largest(is_lacking)[0])

    def is_evaluated_anew(self, metrics: dict) -> bool:
        """Tell whether a resumed run was evaluated just now, before its first step.

        Its last stop had put that off, or the images to evaluate on are others now. Unless it is
        saved soon, a kill would have it logged twice.
        """
        # by identity: OnlineKnn.catch_up hands the saved dict back where it evaluates nothing
        is_new = metrics is not self.saved.metrics
        return self.is_resumed and is_new and metrics.get("knn_step") == self.steps_before

    def kept(self) -> str:
        """Return what the run still has when it fails, in words."""
        # asks no file system: one that has stalled would not answer
        return f"{self.checkpoint} is kept" if self.has_teacher else "no checkpoint was saved yet"
