"""A few steps of a run that writes nothing: what it would take, and what its network would see."""

import time
from pathlib import Path

import torch
from torch import Tensor

from data import MultiCrop
from monitor import Monitor, print_rows, write_picture
from outlook import duration, peak_memory
from pictures import crop_cells, sheet
from run_io import unused_path

WARM_UP, STEPS, SECONDS = 2, 12, 30  # steps not timed, steps timed at most, their time
AHEAD = 2  # batches that a worker makes ahead: until they are used up, none seems to wait


class DryRun:
    """Which steps are timed, and what they tell."""

    def __init__(self, monitor: Monitor, num_workers: int) -> None:
        self.monitor, self.began = monitor, time.monotonic()
        steady = WARM_UP + AHEAD * num_workers
        self.starts = {WARM_UP + 1, steady + 1}
        self.last_step = min(monitor.total_steps, steady + STEPS)

    def begin(self, step: int) -> None:
        """Start the clock before the steps after the warm-up, and anew once batches are due."""
        if step in self.starts:
            self.monitor.restart_clock()
            self.began = time.monotonic()

    def is_over(self, step: int) -> bool:
        """Tell whether this process has seen enough; slow steps do not wait for the workers."""
        return step > WARM_UP and time.monotonic() - self.began > SECONDS

    def report(self, crops: list[Tensor], multi_crop: MultiCrop) -> None:
        """Print what the timed steps tell of the run, and write crops.png under an unused name."""
        monitor = self.monitor
        if not monitor.accelerator.is_main_process:
            return
        seconds = time.perf_counter() - monitor.since
        speed, batch = monitor.num_images / seconds, monitor.num_images / monitor.num_timed
        folder = monitor.run.folder if monitor.run.is_named else Path()
        folder.mkdir(parents=True, exist_ok=True)
        file = unused_path(folder, "crops", ".png")
        cells = [
            cell
            for row in range(min(8, len(crops[0])))
            for cell in crop_cells(crops, multi_crop.mean, multi_crop.std, row)
        ]
        title = f"crops of {len(cells) // len(crops)} images, as the network sees them"
        write_picture(file, sheet(title, cells, len(crops)))
        time_left, steps = monitor.total_steps * batch / speed, monitor.total_steps
        device = "device" if torch.cuda.is_available() else "process"
        step_time = f"{batch / speed:.3g} s a step, over {monitor.num_timed}"
        rows = {
            "speed": f"{speed:.3g} images/s, {step_time}",
            "waiting": f"{monitor.waited / seconds:.0%} of the time, for data",
            "memory": f"{peak_memory():.2f} GiB at most, of the {device}",
            "whole run": f"{duration(time_left)} for {steps:,} steps, less k-NN and saving",
            "crops": str(file),
        }
        monitor.say(f"dry run: nothing but {file.name} was written")
        print_rows(monitor.console, rows)
