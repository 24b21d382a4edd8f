"""The teacher's k-NN during training: it shows what the loss does not."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, Subset

from data import permutation
from harness.evaluation import Preparation, evaluation_splits, features_of_splits
from harness.monitor import Monitor
from harness.run import Run

KNN_BATCH = 256  # images of a forward pass


@torch.no_grad()
def copy_buffers_of_main(module: nn.Module) -> None:
    """Copy the main process's buffers, BatchNorm's statistics, to the others. A collective."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


class OnlineKnn:
    """Evaluate the teacher by k-NN after the steps where that is due; `why_not` says why never.

    `knn_accuracy` is eval_knn's. All processes have to build it, together.
    """

    def __init__(self, run: Run, knn_accuracy: Callable[..., dict]) -> None:
        self.run = run
        self.knn_accuracy = knn_accuracy
        self.interval = run.config.run.knn_every * run.steps_per_epoch  # steps
        self.metrics = run.saved.metrics  # of the last evaluation
        self.preparation = Preparation.of_run(run.config)
        self.splits: tuple[Dataset, Dataset] | None = None
        self.why_not = ""
        if run.config.run.dry_run:
            self.why_not = "--dry-run"
        elif not self.interval:
            self.why_not = "--knn-every 0"
        else:
            try:
                self.splits = self._open_splits()
            except ValueError as error:
                self.why_not = str(error)
        sizes = None if self.splits is None else [len(split) for split in self.splits]
        run.agreement.require_same(sizes, "images to evaluate with")

    def _open_splits(self) -> tuple[Dataset, Dataset]:
        memory, test = evaluation_splits(self.preparation)
        some = permutation(len(memory), 0)[: self.run.config.run.knn_images]
        return Subset(memory, some.tolist()), test

    def is_due(self, step: int) -> bool:
        if self.splits is None:
            return False
        return step == self.run.total_steps or step % self.interval == 0

    def catch_up(self, model: nn.Module, monitor: Monitor) -> dict:
        """Evaluate the untrained teacher, or what a stop put off; return the metrics there are."""
        step = self.run.steps_before
        if self.is_due(step) and self.metrics.get("knn_step") != step:
            return self.evaluate(step, model, monitor)
        return self.metrics

    def evaluate(self, step: int, model: nn.Module, monitor: Monitor) -> dict:
        """Measure the teacher after a step, log and print it, and return the run's metrics."""
        copy_buffers_of_main(model)
        top1 = self._top1(model)
        untrained = self.metrics.get("knn_top1_untrained", top1)
        self.metrics = {"knn_top1": top1, "knn_step": step, "knn_top1_untrained": untrained}
        monitor.log(step, {"knn_top1": top1})
        monitor.say(f"step {step:,}: the teacher's k-NN top-1 {top1:.1f} %")
        return self.metrics

    def _top1(self, model: nn.Module) -> float:
        """Return the teacher's k-NN top-1 in % (k 20), in eval mode meanwhile. A collective."""
        accelerator = self.run.accelerator
        teacher_features = partial(model, features_only=True)
        model.eval()
        # eager, since each of its batch sizes would be compiled anew
        with torch.compiler.set_stance("force_eager"), accelerator.autocast():
            tensors = features_of_splits(
                teacher_features,
                self.splits,
                self.preparation,
                accelerator,
                batch_size=KNN_BATCH,
                num_workers=self.run.config.data.num_workers,
            )
        model.train()
        return self.knn_accuracy(*tensors, ks=(20,))[20][0]
