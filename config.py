"""Every setting of a run: default, help, range, and whether a resumed run may change it.

`python dino_train.py --help` shows the comments below as the flags' help; a flag is a field's name.
ModelConfig stands in models.py and CropConfig in multicrop.py, which work without this file.

To add a setting: a field with its help above it and a name that no other section has. Where its
default is None and something else follows from the data, harness.flags.finish fills it in. Runs
saved before a setting was renamed or removed cannot be resumed.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from models import ModelConfig
from multicrop import CropConfig

MINUTES_OF_A_YEAR = 366 * 24 * 60


def setting(default: object, **metadata: object) -> object:
    """Return a field that says more of itself than its default.

    above, most   its numbers are larger than `above` and at most `most`; without, at least 0
    below         its numbers are smaller than this
    may_change    a resumed run may have another value
    of_one_start  it belongs to one start of a run, and is not kept in the run's config.yaml
    """
    unknown = metadata.keys() - {"above", "below", "most", "may_change", "of_one_start"}
    if unknown:
        raise TypeError(f"a setting has no {', '.join(unknown)}")
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataConfig:
    # `patterns` (drawn by code), a folder of images with or without class folders, a tar or a
    # folder of tars, a list of paths (.txt, or .csv with columns path, label, split), or a
    # torchvision set: cifar10, cifar100, stl10, imagenette ... (downloaded to datasets/)
    data: str = "patterns"
    # images to evaluate on: a folder, tar or list; None: the val or test split of --data, else a
    # fixed tenth
    val: str | None = setting(None, may_change=True)
    # labelled images for k-NN and later evaluations, as --data takes them; None: those of --data
    knn_data: str | None = setting(None, may_change=True)
    # take folders called train, val and test for splits, and tars with these words in their names;
    # --no-splits: folders for classes, all tars for one data set
    splits: bool = True
    # LOW HIGH, the values that become black and white in images of more than 8 bits; or such a pair
    # for each band, in the bands' order; None: the 0.1 and 99.9 percentile of up to 64 images, for
    # each band where there are not 1 or 3
    levels: tuple[float, ...] | None = setting(None, above=-math.inf)
    # pixels, side of the square that images are decoded to; None: by their longer side, at most 512
    canvas_size: int | None = setting(None, above=7, most=4096)
    # pixels, side of the center crop of an evaluation [paper: 224]; None: that of the large crops;
    # networks of convolutions often see more in a larger one [FixRes, arXiv 1906.06423]
    eval_size: int | None = setting(None, above=0, most=4096, may_change=True)
    # pixels, shorter side before that center crop [paper: 256 for a crop of 224]; None: in that
    # proportion for photographs, no margin for small images
    eval_resize: int | None = setting(None, above=0, most=4096, may_change=True)
    # workers that decode images, for each process of the run; None: its cores less one, from 1 to
    # 16, or 0 for `patterns`
    num_workers: int | None = setting(None, most=512, may_change=True)
    # keep images in memory once they are decoded, where the processes of a machine together need at
    # most a quarter of its memory for that. Where workers are not forked (macOS, Windows, Python
    # 3.14) it takes --num-workers 0. --no-in-memory: decode them again in each epoch
    in_memory: bool = setting(True, may_change=True)


@dataclass(frozen=True)
class OptimConfig:
    # passes over the data [paper: 100 to 800]
    epochs: int = setting(100, above=0, most=1_000_000, may_change=True)
    # train for about so many minutes on this machine instead: the number of epochs follows from the
    # speed of some first steps, and a resumed run keeps it; k-NN and saving come on top
    minutes: float | None = setting(None, above=0, most=MINUTES_OF_A_YEAR, of_one_start=True)
    # images per process and micro-batch; the header shows the whole batch [paper: 1024 in all]
    batch_size: int = setting(64, above=0, most=1_000_000)
    # micro-batches a step: a larger batch in the same memory
    accumulation_steps: int = setting(1, above=0, most=1_000_000)
    # how the student's weights are updated [paper: adamw; lars for ResNet-50]
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    # learning rate at its peak for 256 images, scaled by the whole batch / 256 [paper: 5e-4 with
    # adamw, 0.03 with sgd, 0.3 with lars]; None: in a recipe 5e-4, else the paper's, but 4e-3 for
    # adamw on ResNets, and a tenth for weights that are trained already
    lr: float | None = setting(None, above=0, most=100, may_change=True)
    # learning rate at the end, not scaled [paper: 1e-6]
    min_lr: float = setting(1e-6, most=100)
    # epochs in which the learning rate rises from 0 [paper: 10]; None: 10; without a recipe, at
    # most a tenth of the run
    warmup_epochs: float | None = setting(None, most=1_000_000)
    # weight decay at the start; none on biases and 1-d parameters [paper: 0.04]
    weight_decay: float = setting(0.04, most=10)
    # weight decay at the end, along a cosine [paper: 0.4]
    weight_decay_end: float = setting(0.4, most=10)
    # largest norm of each parameter's gradient; 0: not clipped [paper: 0 to 3]
    clip_grad: float = setting(3.0, most=1_000_000, may_change=True)
    # weight of KoLeo in the loss, which spreads the student's features of a micro-batch; 0: none
    # [DINOv2: 0.1]
    koleo_weight: float = setting(0.0, most=100)
    # epochs in which the head's last layer is frozen; raise it if the loss does not fall
    # [paper: 1]; None: 1; without a recipe, 0 in runs of fewer than 10 epochs
    freeze_last_layer_epochs: int | None = setting(None, most=1_000_000)
    # epochs in which the whole backbone is frozen and the head alone trains: 1 or 2 with
    # --init-from and a new head, whose first gradients say nothing yet; as slow as other epochs
    freeze_backbone_epochs: int = setting(0, most=1_000_000)

    def images_per_step(self, world: int) -> int:
        """Return the whole batch, over `world` processes and their micro-batches."""
        return self.batch_size * world * self.accumulation_steps


@dataclass(frozen=True)
class TeacherConfig:
    # student temperature, by which logits are divided before the softmax; at 10 all prototypes are
    # alike to it [paper: 0.1]
    student_temp: float = setting(0.1, above=0, most=10)
    # teacher temperature at first; lower it if the loss stays at ln K [paper: 0.04]; None: 0.04;
    # without a recipe, at most --teacher-temp
    warmup_teacher_temp: float | None = setting(None, above=0, most=10)
    # teacher temperature after the warm-up; above 0.07 is unstable [paper: 0.04 to 0.07]; None: in
    # a recipe 0.04, else 0.02 up to 20,000 images, 0.03 up to 50,000, then 0.04
    teacher_temp: float | None = setting(None, above=0, most=10)
    # epochs in which the teacher temperature goes linearly from --warmup-teacher-temp to
    # --teacher-temp [paper: 30, for a teacher_temp of 0.07]
    warmup_teacher_temp_epochs: int = setting(0, most=1_000_000)
    # momentum of the teacher's moving average at first, 1 at the end; about 0.9995 for a whole
    # batch of 256, less for short runs [paper: 0.996]; None: 0.996; without a recipe, less in
    # short runs, so that it averages about a tenth of the run
    teacher_momentum: float | None = setting(None, below=1)
    # what keeps prototypes from taking all images: the center, which is a moving average of the
    # teacher's logits [paper], or sinkhorn, by which all prototypes take equal shares of each batch
    # [DINOv2's larger models]
    centering: Literal["center", "sinkhorn"] = "center"
    # momentum of the center's moving average [paper: 0.9]
    center_momentum: float = setting(0.9, below=1)


@dataclass(frozen=True)
class RunConfig:
    # a recipe of recipes/ by its name, a YAML file like these, or a run's folder; flags override it
    config: Path | None = setting(None, of_one_start=True)
    # folder for the run's files; None: runs/DATA-ARCH, with a number where that is taken
    output_dir: Path | None = setting(None, of_one_start=True)
    # take a few real steps, then print speed, memory and the time that the run will take, and draw
    # crops.png; nothing else is written
    dry_run: bool = setting(False, of_one_start=True)
    # go on with the run of --output-dir; also: --resume FOLDER
    resume: bool = setting(False, of_one_start=True)
    # delete the run that --output-dir holds
    overwrite: bool = setting(False, of_one_start=True)
    # weights to start from: a ckpt.safetensors, an original's .pth, or a name such as dino_vits16;
    # its head too, where it has one; --resume goes on with a run instead
    init_from: str | None = None
    # which network of --init-from, where it holds both
    init_network: Literal["teacher", "student"] = "teacher"
    # fixes the initial weights, the order of the images, their crops and drop path
    seed: int = setting(0, most=1 << 62)
    # precision of the networks; loss, center and EMA are float32; None: accelerate launch's bf16 or
    # fp16, else bf16 on a GPU (fp16 on old ones) and on a CPU that it speeds up, no on other CPUs
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(None, may_change=True)
    # BatchNorm over the batches of all GPUs, where there are several; no effect on CPUs
    sync_bn: bool = True
    # torch.compile the networks' blocks, which takes minutes at first; the default on a GPU
    compile: bool = setting(torch.cuda.is_available(), may_change=True)
    # save the state every so many steps, and at the end
    save_every: int = setting(1000, above=0, most=1_000_000_000, may_change=True)
    # save the state at least every so many minutes; 0: by steps alone
    save_minutes: float = setting(30.0, most=MINUTES_OF_A_YEAR, may_change=True)
    # minutes that a step or an evaluation may take to end after SIGTERM or the like; after them the
    # run ends with what was saved before, since its storage has stalled; 0: as long as it takes
    stop_minutes: float = setting(5.0, most=MINUTES_OF_A_YEAR, may_change=True)
    # above 1, keep so many states and teachers, as state-STEP and ckpt-STEP, the newest among them
    keep_last: int = setting(1, above=0, most=1_000_000, may_change=True)
    # keep a teacher for good every so many epochs, as ckpt-epoch-N; 0: none
    keep_every: int = setting(0, most=1_000_000, may_change=True)
    # steps between lines of log.jsonl
    log_every: int = setting(10, above=0, most=1_000_000_000, may_change=True)
    # largest share of the images that may be unreadable; where there are more, the run ends
    most_unreadable: float = setting(0.01, most=1, may_change=True)
    # end the run where the teacher stays uniform or one-hot
    stop_on_collapse: bool = setting(False, may_change=True)
    # epochs between evaluations of the teacher by k-NN, RankMe and its components' share of
    # variance (without classes by the last two), also before and after the run; 0: never
    knn_every: int = setting(10, most=1_000_000, may_change=True)
    # training images that the k-NN of --knn-every remembers, at most
    knn_images: int = setting(50_000, above=0, most=1_000_000_000, may_change=True)
    # epochs between linear probes of the teacher, on the features that k-NN compares, also before
    # and after the run; a multiple of --knn-every; 0: none. One takes 4 s on a CPU core for 50,000
    # images of 384 features and 10 classes, and grows with all three
    probe_every: int = setting(0, most=1_000_000, may_change=True)
    # a tracker besides log.jsonl
    log_with: Literal["tensorboard", "wandb"] | None = setting(None, may_change=True)


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    run: RunConfig = field(default_factory=RunConfig)


# every section's settings by name: {"optim": {"epochs": its field}}
SETTINGS: dict[str, dict[str, dataclasses.Field]] = {
    section.name: {each.name: each for each in dataclasses.fields(section.default_factory)}
    for section in dataclasses.fields(Config)
}
