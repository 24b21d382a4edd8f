"""The teacher's k-NN during training: it shows what the loss does not."""

from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset, Subset

from data import index_folder, permutation
from distributed import copy_buffers_of_main
from eval_knn import knn_accuracy
from features import evaluation_splits, features_of_splits
from monitor import Monitor
from run_io import Run


def teacher_knn(
    model: nn.Module, splits: tuple[Dataset, Dataset], config: dict, accelerator: Accelerator
) -> float:
    """Give the k-NN top-1 in % (k 20) of the teacher, in eval mode meanwhile. A collective."""
    model.eval()
    forward = partial(model, features_only=True)
    num_workers = config["data"]["num_workers"]
    # eager, since its batch sizes would each be compiled anew
    with torch.compiler.set_stance("force_eager"), accelerator.autocast():
        tensors = features_of_splits(forward, splits, config, accelerator, 256, num_workers)
    model.train()
    return knn_accuracy(*tensors, ks=(20,))[20][0]


class OnlineKnn:
    """Which images k-NN remembers and is tested on, and after which steps; `why_not` if never.

    Made by all processes together.
    """

    def __init__(self, run: Run, steps_per_epoch: int, total_steps: int) -> None:
        self.config, self.steps_per_epoch = run.config, steps_per_epoch
        settings = run.config["run"]
        self.interval, self.total_steps = settings["knn_every"] * steps_per_epoch, total_steps
        self.splits: tuple[Dataset, Dataset] | None = None
        self.why_not = "--dry-run" if run.is_dry else "--knn-every 0"
        if self.interval and not run.is_dry:
            try:
                memory, test = evaluation_splits(run.config, index_folder(run.folder))
                order = permutation(len(memory), 0)[: settings["knn_images"]]
                self.splits, self.why_not = (Subset(memory, order.tolist()), test), ""
            except ValueError as error:
                self.why_not = str(error)
        sizes = self.splits and [len(split) for split in self.splits]
        run.require_same(sizes, "images to evaluate with")

    def evaluate(self, step: int, model: nn.Module, monitor: Monitor, metrics: dict) -> None:
        """Measure the teacher after `step`, log and print it, and keep it in `metrics`."""
        copy_buffers_of_main(model)
        top1 = teacher_knn(model, self.splits, self.config, monitor.accelerator)
        metrics |= {"knn_top1": top1, "knn_step": step}
        metrics.setdefault("knn_top1_untrained", top1)
        monitor.log(step, step / self.steps_per_epoch, {"knn_top1": top1})
        monitor.say(f"step {step:,}: k-NN top-1 {top1:.1f} %")

    def is_due(self, step: int) -> bool:
        is_last = step == self.total_steps
        return self.splits is not None and (is_last or step % self.interval == 0)
