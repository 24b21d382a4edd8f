"""The teacher's k-NN, RankMe and linear probe during training: they show what the loss does not."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from data import ImageDataset, permutation, require_source
from harness.evaluation import evaluation_splits, features_of_splits, open_split
from harness.feature_quality import RANKME_IMAGES, feature_quality
from harness.linear_probe import probe_accuracy
from harness.monitor import Monitor
from harness.opened_network import Preparation
from harness.run import Run

KNN_BATCH = 256  # images of a forward pass
# A teacher that is worse than before training is reported after this share of the run.
WORSE_SHARE = 0.2
# Where a line of run.changes begins with one of these, earlier figures do not compare: they are of
# other images, or of images prepared otherwise.
OF_IMAGES = ("--val ", "--knn-data ", "--knn-images ", "--eval-size ", "--eval-resize ")


@torch.no_grad()
def copy_buffers_of_main(module: nn.Module) -> None:
    """Copy the main process's buffers, BatchNorm's statistics, to the others. A collective."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def quality_figures(features: Tensor) -> dict[str, float]:
    """Return what features (n, d) say without labels, by the names that the log has."""
    quality = feature_quality(features)
    shares = {f"variance_share_{k}": share for k, share in quality["variance_share"].items()}
    return {"rankme": quality["rankme"]} | shares


def in_words(measured: dict[str, float]) -> str:
    """Return an evaluation as a line has it."""
    texts: list[str] = []
    if "knn_top1" in measured:
        texts.append(f"k-NN top-1 {measured['knn_top1']:.1f} %")
    if "probe_top1" in measured:
        texts.append(f"linear probe {measured['probe_top1']:.1f} %")
    texts.append(f"RankMe {measured['rankme']:.1f}")
    shares = [
        f"{100 * share:.0f} % in {name.removeprefix('variance_share_')}"
        for name, share in measured.items()
        if name.startswith("variance_share_")
    ]
    in_all = ", ".join(texts)
    return f"{in_all}; variance by components: {', '.join(shares)}" if shares else in_all


class OnlineKnn:
    """Evaluate the teacher by k-NN, RankMe and a linear probe after the steps where that is due.

    `why_not` says why there is no k-NN; images without classes have RankMe and their components'
    share of variance. `knn_accuracy` is eval_knn's. All processes have to build it, together.
    """

    def __init__(self, run: Run, knn_accuracy: Callable[..., dict]) -> None:
        self.run = run
        self.knn_accuracy = knn_accuracy
        self.interval = run.config.run.knn_every * run.steps_per_epoch  # steps
        self.probe_interval = run.config.run.probe_every * run.steps_per_epoch  # steps
        has_other_images = any(change.startswith(OF_IMAGES) for change in run.changes)
        self.metrics = {} if has_other_images else run.saved.metrics  # of the last evaluation
        self.has_warned = False
        self.preparation = Preparation.of_run(run.config)
        self.splits: tuple[Dataset, ...] = ()  # memory and test; the memory alone without classes
        self.why_not = ""
        if run.config.run.dry_run:
            self.why_not = "--dry-run"
        elif not self.interval:
            self.why_not = "--knn-every 0"
        else:
            with run.accelerator.local_main_process_first():  # which may have to download
                self._open()
        sizes = [len(split) for split in self.splits]
        run.agreement.require_same(sizes, "images to evaluate with")

    def _open(self) -> None:
        knn_data = self.run.config.data.knn_data
        if knn_data is not None:
            require_source(knn_data, "--knn-data")
        try:
            self.splits = self._open_splits()
        except ValueError as error:
            self.why_not = str(error)
        if not self.splits:
            try:
                self.splits = self._open_without_classes()
                self.why_not += "; RankMe alone"
            except ValueError as error:
                if knn_data is not None:  # which was given for nothing else
                    text = f"cannot evaluate on --knn-data {knn_data}: {error}"
                    raise ValueError(f"{text}; --knn-every 0 goes on without it") from error

    def _open_splits(self) -> tuple[Dataset, Dataset]:
        memory, test = evaluation_splits(self.preparation)
        most = self.run.config.run.knn_images
        if len(memory) > most:
            of_all = f"{most:,} of {len(memory):,} images (--knn-images)"
            note = f"k-NN during training compares with {of_all}; eval_knn.py takes all"
            self.run.dataset.notes.append(note)
        return self._some_of(memory, most), self._kept(test)

    def _open_without_classes(self) -> tuple[Dataset]:
        images = open_split(self.preparation, "train")
        images.set_levels(self.preparation.levels)
        return (self._some_of(images, min(RANKME_IMAGES, self.run.config.run.knn_images)),)

    def _some_of(self, images: ImageDataset, most: int) -> Dataset:
        return self._kept(Subset(images, permutation(len(images), 0)[:most].tolist()))

    def _kept(self, images: Dataset) -> Dataset:
        """Return images that each evaluation after the first takes from memory, if they fit."""
        side, channels = self.preparation.size, self.preparation.channels
        return self.run.image_memory.keep(images, side, channels)

    @property
    def has_classes(self) -> bool:
        return len(self.splits) == 2

    @property
    def num_compared(self) -> int | None:
        """Return how many images k-NN compares with, None where there is no k-NN."""
        return len(self.splits[0]) if self.has_classes else None

    def is_due(self, step: int) -> bool:
        return bool(self.splits) and self._is_time(step, self.interval)

    def _is_time(self, step: int, interval: int) -> bool:
        return step == self.run.total_steps or step % interval == 0

    def catch_up(self, model: nn.Module, monitor: Monitor) -> dict:
        """Evaluate the untrained teacher, or what a stop put off; return the metrics there are."""
        step = self.run.steps_before
        if self.is_due(step) and self.metrics.get("knn_step") != step:
            return self.evaluate(step, model, monitor)
        return self.metrics

    def evaluate(self, step: int, model: nn.Module, monitor: Monitor) -> dict:
        """Measure the teacher after a step, log and print it, and return the run's metrics."""
        copy_buffers_of_main(model)
        splits = self._features(model)
        features, labels = splits[0]
        figure = "knn_top1" if self.has_classes else "rankme"
        measured: dict[str, float] = {}
        if self.has_classes:
            test_features, test_labels = splits[1]
            compared = (features, labels, test_features, test_labels)
            measured["knn_top1"] = self.knn_accuracy(*compared, ks=(20,))[20][0]
            if self.probe_interval and self._is_time(step, self.probe_interval):
                measured["probe_top1"] = probe_accuracy(*compared)
        measured |= quality_figures(features)
        kept = {"knn_step": step}
        untrained = f"{figure}_untrained"
        if step == 0:
            kept[untrained] = measured[figure]
        elif untrained in self.metrics:  # else the run began without evaluations, or with others
            kept[untrained] = self.metrics[untrained]
            if measured[figure] < kept[untrained]:
                kept["worse_since"] = self.metrics.get("worse_since", step)
        self.metrics = measured | kept
        is_worse = self._is_worse_for_long(step)
        monitor.log(step, measured | ({"worse_than_untrained": True} if is_worse else {}))
        monitor.say(f"step {step:,}: the teacher's {in_words(measured)}")
        if is_worse and not self.has_warned:
            monitor.say(f"warning: step {step:,}: {self._what_is_worse(figure)}")
        self.has_warned = is_worse
        return self.metrics

    def _is_worse_for_long(self, step: int) -> bool:
        since = self.metrics.get("worse_since", step)
        return step - since >= WORSE_SHARE * self.run.total_steps

    def _what_is_worse(self, figure: str) -> str:
        """Return what has been worse than before training, since when, and what to change."""
        before, since = self.metrics[f"{figure}_untrained"], self.metrics["worse_since"]
        name = f"k-NN top-1 is below the {before:.1f} %"
        if figure == "rankme":
            name = f"RankMe is below the {before:.1f}"
        koleo = "" if self.run.config.optim.koleo_weight else "--koleo-weight 0.1, "
        remedy = f"try {koleo}stronger changes of colour, larger crops or another --lr"
        where = "README.md: When it does not learn"
        return f"{name} of before training since step {since:,}; {remedy} ({where})"

    def _features(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return the teacher's features and the labels of the memory and, with classes, the test.

        In eval mode meanwhile. A collective.
        """
        accelerator = self.run.accelerator
        teacher_features = partial(model, features_only=True)
        model.eval()
        # eager, since each of its batch sizes would be compiled anew
        with torch.compiler.set_stance("force_eager"):
            features = features_of_splits(
                teacher_features,
                self.splits,
                self.preparation,
                accelerator,
                batch_size=KNN_BATCH,
                num_workers=self.run.config.data.num_workers,
            )
        model.train()
        return features
