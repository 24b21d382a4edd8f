"""The tracker of --log-with, by Accelerate: it goes on where the run goes on, and ends no run."""

from collections.abc import Callable

from harness.run import Run


class Tracker:
    """Pass a run's settings and figures on to its tracker, if it has one.

    Where that fails, offline or without a key, one line says so and the run goes on without it.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self.run = run
        self.accelerator = run.accelerator
        self.name = run.config.run.log_with
        self.say = say

    def start(self, settings: dict) -> None:
        """Open the tracker in the run's folder, and log what the run is started with."""
        if self.name is None:
            return
        self.accelerator.project_configuration.logging_dir = str(self.run.folder)
        own = {"tensorboard": self._of_tensorboard, "wandb": self._of_wandb}[self.name]
        self._try(lambda: self.accelerator.init_trackers("dino", settings, {self.name: own()}))

    def _of_tensorboard(self) -> dict:
        # log.jsonl is cut after the saved step. TensorBoard likewise hides what an earlier start,
        # or a run that was overwritten, wrote from purge_step on.
        step = self.run.steps_before
        return {"purge_step": step + 1 if step else 0}

    def _of_wandb(self) -> dict:
        # Steps that W&B has are not logged again: those that are repeated are the same.
        folder = self.run.folder
        return {
            "id": self.run.tracker_id,
            "resume": "allow",
            "name": folder.name,
            "dir": str(folder),
        }

    def log(self, step: int, figures: dict) -> None:
        if self.accelerator.trackers:
            self._try(lambda: self.accelerator.log(figures, step=step))

    def finish(self) -> None:
        for tracker in self.accelerator.trackers:
            self._try(tracker.finish)
        self.accelerator.trackers = []  # else Accelerate finishes them again

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # a tracker can raise anything
            self.accelerator.trackers = []
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.say(f"warning: --log-with {self.name}: {reason}; the run goes on without it")
