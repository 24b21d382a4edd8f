"""Launches: equal results on any number of processes, and lines that would do something else."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import MEASURED, ROOT, Answer, read_log
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from data import CropConfig, MultiCrop, StepSampler, build_dataset, hash_keys
from dino_train import train
from harness import distributed
from harness.flags import parse_config
from models import DinoModel, get_backbone

Launch = Callable[..., Answer]


# ---------------------------------------------------------------- equal results


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory, vit_flags: list[str]) -> Path:
    """20 steps of 8 images in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    flags = ("--batch-size", "8", "--log-every", "1", "--output-dir", str(folder))
    train(parse_config([*vit_flags, *flags]))
    return folder


@pytest.mark.parametrize(
    ("images", "accumulation", "launch_as"),
    [
        pytest.param(4, 2, {}, id="accumulation", marks=pytest.mark.slow),
        pytest.param(4, 1, {"world": 2}, id="ddp"),
        pytest.param(4, 1, {"world": 2, "fsdp": True}, id="fsdp", marks=pytest.mark.slow),
    ],
)
def test_same_run_on_any_number_of_processes(
    images: int,
    accumulation: int,
    launch_as: dict,
    tmp_path: Path,
    launch: Launch,
    one_process: Path,
    vit_flags: list[str],
) -> None:
    flags = [*vit_flags, "--batch-size", images, "--accumulation-steps", accumulation]
    answer = launch([*flags, "--log-every", 1, "--output-dir", tmp_path / "run"], **launch_as)
    assert set(answer.codes) == {0}, answer.text
    kind = "FSDP" if "fsdp" in launch_as else "DDP" if "world" in launch_as else "cpu"
    assert re.search(rf"device +{launch_as.get('world', 1)} x .*{kind}", answer.text)
    logs = [read_log(folder) for folder in (one_process, tmp_path / "run")]
    assert len(logs[0]) == len(logs[1]) == 20
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "lr", "teacher_entropy"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)
        for key in ("kl", "feature_spread"):
            assert one[key] == pytest.approx(other[key], abs=1e-4)
    for name, tolerance in (("ckpt", 1e-4), ("state", 1e-3)):
        one, other = (
            load_file(folder / f"{name}.safetensors") for folder in (one_process, tmp_path / "run")
        )
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_sinkhorn_balances_the_images_of_all_processes(
    tmp_path: Path, launch: Launch, vit_flags: list[str]
) -> None:
    flags = [*vit_flags, "--centering", "sinkhorn", "--log-every", "1", "--knn-every", "0"]
    train(parse_config([*flags, "--batch-size", "8", "--output-dir", str(tmp_path / "one")]))
    answer = launch([*flags, "--batch-size", "4", "--output-dir", tmp_path / "two"], world=2)
    assert answer.codes == [0, 0], answer.text
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [x["loss"] for x in one] == pytest.approx([x["loss"] for x in two], rel=1e-4)
    centers = [load_file(tmp_path / x / "state.safetensors")["loss.center"] for x in ("one", "two")]
    torch.testing.assert_close(*centers, rtol=1e-3, atol=1e-3)
    assert centers[0].std() > 0.01


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 1), (2, 2), (4, 1), (8, 1)])
def test_same_crops_in_the_same_order_on_any_number_of_processes(
    world: int, accumulation: int, image_folder: Path
) -> None:
    dataset = build_dataset(str(image_folder), canvas_size=16)
    multi_crop = MultiCrop(CropConfig(global_crop_size=16, local_crop_size=8, num_local_crops=1))

    def crops_of_steps(world: int, accumulation: int) -> torch.Tensor:
        """All crops of steps 7 to 12, within an epoch and into the next, in the global order."""
        size = 8 // (world * accumulation)
        of_ranks = []
        for rank in range(world):
            sampler = StepSampler(80, size, 3, rank, world, range(7, 13), accumulation)
            assert len(sampler) == 6 * accumulation
            batches = DataLoader(dataset, batch_sampler=sampler)
            keys = ((b.image, hash_keys(3, b.epoch, b.index)) for b in batches)
            crops = [multi_crop(image, None, key) for image, key in keys]
            of_ranks.append([torch.cat([c.flatten(1) for c in views], dim=1) for views in crops])
        return torch.cat([batch for micro in zip(*of_ranks, strict=True) for batch in micro])

    torch.testing.assert_close(
        crops_of_steps(world, accumulation), crops_of_steps(1, 1), rtol=0, atol=1e-6
    )


@pytest.mark.slow
def test_two_identical_runs_of_two_processes_are_bit_identical(
    tmp_path: Path, launch: Launch, tiny_flags: list[str]
) -> None:
    """With BatchNorm, whose statistics are each process's own on the CPU, which is said."""
    for name in "ab":
        flags = [*tiny_flags, "--batch-size", "4", "--log-every", "1"]
        answer = launch([*flags, "--output-dir", tmp_path / name], world=2)
        assert answer.codes == [0, 0], answer.text
    assert "warning: BatchNorm sees 4 images at a time, as only GPUs share them" in answer.text
    one, other = (load_file(tmp_path / name / "state.safetensors") for name in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)
    logs = [read_log(tmp_path / name) for name in "ab"]
    for first, second in zip(*logs, strict=True):
        for measured in MEASURED:
            first.pop(measured, None), second.pop(measured, None)
        assert first == second


def test_evaluation_counts_each_image_once_on_several_processes(
    tmp_path: Path, launch: Launch, script, tiny_run: Path
) -> None:
    alone, several = tmp_path / "alone.json", tmp_path / "several.json"
    checkpoint = tiny_run / "ckpt.safetensors"
    assert script("eval_knn", checkpoint, "--json-out", alone, "--ks", 3, 7).returncode == 0
    flags = [checkpoint, "--json-out", several, "--ks", 3, 7, "--batch-size", 5]
    answer = launch(flags, world=3, script="eval_knn")
    assert answer.codes == [0, 0, 0], answer.text
    assert answer.text.count("weighted k-NN") == 1
    results = [json.loads(path.read_text()) for path in (alone, several)]
    ranks = [result.pop("rankme") for result in results]
    shares = [result.pop("variance_share") for result in results]
    assert results[0] == results[1]
    assert ranks[0] == pytest.approx(ranks[1]) and shares[0] == pytest.approx(shares[1])
    assert results[0]["num_train"] + results[0]["num_test"] == 80


@pytest.mark.slow
def test_loss_that_is_nan_in_one_process_stops_all_at_its_step(
    tmp_path: Path, launch: Launch, vit_flags: list[str]
) -> None:
    flags = [*vit_flags, "--batch-size", "4", "--save-every", "1"]
    answer = launch([*flags, "--output-dir", tmp_path / "run"], world=2, nan_at=[1, 4])
    assert answer.codes == [1, 1]
    assert answer.text.count("error: the loss is nan at step 4; ") == 1
    assert "Traceback" not in answer.text


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_frozen_backbone_stays_bit_for_bit_on_several_processes(
    fsdp: bool, tmp_path: Path, launch: Launch, vit_flags: list[str]
) -> None:
    folder = tmp_path / "run"
    flags = [*vit_flags, "--batch-size", 4, "--epochs", 1, "--freeze-backbone-epochs", 1]
    answer = launch([*flags, "--output-dir", folder], world=2, fsdp=fsdp)
    assert answer.codes == [0, 0], answer.text
    config = parse_config(["--config", str(folder / "config.yaml")])
    torch.manual_seed(config.run.seed)
    initial = DinoModel.from_config(config.model)
    state = load_file(folder / "state.safetensors")
    for role in ("student", "teacher"):
        for name, param in initial.backbone.named_parameters():
            assert torch.equal(state[f"{role}.backbone.{name}"], param), name
        weight = initial.projection_head.mlp[0].weight
        assert not torch.equal(state[f"{role}.projection_head.mlp.0.weight"], weight)


@pytest.mark.slow
def test_steps_that_loss_scaling_skips_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_flags: list[str]
) -> None:
    """With fp16's own scaler, so large that float32's gradients overflow at first."""

    class Scaled(Accelerator):
        def __init__(self, **kwargs: object) -> None:
            super().__init__(**kwargs)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    monkeypatch.setattr(distributed, "Accelerator", Scaled)
    flags = ["--clip-grad", "0", "--save-every", "1", "--keep-last", "99", "--knn-every", "0"]
    flags += ["--freeze-last-layer-epochs", "0"]
    train(parse_config([*tiny_flags, *flags, "--output-dir", str(tmp_path / "run")]))
    states = [load_file(path) for path in sorted((tmp_path / "run").glob("state-*"))]
    assert len(states) == 20
    skipped = 0
    for before, after in itertools.pairwise(states):
        trained = [key for key in before if "running_" not in key and "num_batches" not in key]
        trained = [key for key in trained if key.startswith(("student", "teacher", "loss"))]
        is_same = all(torch.equal(before[key], after[key]) for key in trained)
        assert is_same == (after["scaler.scale"] < before["scaler.scale"]).item()
        skipped += is_same
    assert 1 <= skipped <= 18


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("arch", "kind", "num"),
    [
        ("vit_tiny_patch16_224", "Block", 12),
        ("resnet18", "BasicBlock", 8),
        ("resnet50", "Bottleneck", 16),
        ("convnext_tiny", "ConvNeXtStage", 4),
    ],
)
def test_blocks_are_what_a_network_repeats(arch: str, kind: str, num: int) -> None:
    blocks = distributed.repeated_blocks(get_backbone(arch))
    assert [type(block).__name__ for block in blocks] == [kind] * num


@pytest.mark.slow
@pytest.mark.skipif(not distributed.has_compiler(), reason="torch.compile needs a C compiler")
def test_compiled_blocks_train_alike_in_a_handful_of_graphs(
    tmp_path: Path, vit_flags: list[str]
) -> None:
    """In the state's own names; with drop path too, whose rate differs by block, repeatably."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    losses, states = {}, {}
    for name, *flags in (
        ("eager", "--no-compile", "--drop-path-rate", "0"),
        ("compiled", "--compile", "--drop-path-rate", "0"),
        ("dropped", "--compile", "--drop-path-rate", "0.2"),
        ("again", "--compile", "--drop-path-rate", "0.2"),
    ):
        folder = tmp_path / name
        more = ["--epochs", "1", "--batch-size", "16", "--log-every", "1", "--knn-every", "1"]
        train(parse_config([*vit_flags, *flags, *more, "--output-dir", str(folder)]))
        losses[name] = [line["loss"] for line in read_log(folder) if "loss" in line]
        states[name] = load_file(folder / "state.safetensors").keys()
    assert losses["eager"] == pytest.approx(losses["compiled"], rel=1e-4)
    assert losses["dropped"] == losses["again"] != losses["compiled"]
    # of blocks and of the last one: teacher, student in two sizes, those with drop path
    assert 2 <= counters["stats"]["unique_graphs"] <= 10
    assert all(names == states["eager"] for names in states.values())


# ---------------------------------------------------------------- launch lines that lie

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="these lines are right where there are GPUs")
def test_launch_that_would_do_something_else_stops(tmp_path: Path, tiny_flags: list[str]) -> None:
    flags = [*tiny_flags, "--output-dir", str(tmp_path / "run")]
    started: dict[str, subprocess.Popen] = {}
    for launcher, said in (
        ("--cpu --num_processes 2", "for several processes and started one"),
        (
            "--use_fsdp --fsdp_version 2 --num_processes 2",
            "--use_fsdp would train without FSDP on cpu, which needs GPUs",
        ),
    ):
        command = [*ACCELERATE, *launcher.split(), str(ROOT / "dino_train.py"), *flags]
        started[said] = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
    errors = {said: process.communicate(timeout=120)[1] for said, process in started.items()}
    for said, err in errors.items():
        assert started[said].returncode != 0
        assert said in err
        assert "; type: " in err
        assert err.count("error: ") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"WORLD_SIZE": "4"}, "4 processes were launched, and each would train alone on cpu"),
        ({"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "1"}, "srun started 2 tasks"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "8 processes were launched, and each would train alone"),
    ],
)
def test_processes_that_do_not_know_of_each_other_are_refused(
    env: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed.join_processes()
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        distributed.join_processes()


@pytest.mark.parametrize(
    ("env", "cores"),
    [
        ({}, 12),
        ({"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}, 3),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "3"}, 3),  # srun starts each process
        # srun starts torchrun, which starts all processes of the task
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "8", "TORCHELASTIC_RUN_ID": "none"}, 2),
    ],
)
def test_processes_share_the_cores(env: dict, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    all_cores = set(range(12))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: all_cores, raising=False)
    assert distributed.cores_per_process() == cores


@pytest.mark.parametrize("value", ["true", "True", "1", "yes", "false", "0", "no"])
def test_launch_for_the_cpu_is_told_in_any_word_that_accelerate_takes(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert distributed.is_on_cpu() == (value in ("true", "True", "1", "yes"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "got DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "got DeepSpeed or Megatron-LM"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing is not supported"),
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params is not supported"),
    ],
)
def test_what_is_not_supported_is_named(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=said):
        distributed.make_accelerator()


def test_srun_of_one_launcher_a_node_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert distributed.join_processes().num_processes == 1


def test_line_that_goes_on_starts_the_processes_of_one_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OfTwoNodes:
        num_processes, is_fsdp2, device = 16, False, torch.device("cuda")

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    expected = "accelerate launch --multi_gpu --num_processes 8"
    assert distributed.launch_line(OfTwoNodes()) == expected


def test_launch_files_are_what_accelerate_reads() -> None:
    expected = {
        "one_gpu": (DistributedType.NO, 1, 1),
        "one_node": (DistributedType.MULTI_GPU, 8, 1),
        "several_nodes": (DistributedType.MULTI_GPU, 16, 2),
        "fsdp": (DistributedType.FSDP, 8, 1),
    }
    assert {path.stem for path in (ROOT / "launch").glob("*.yaml")} == expected.keys()
    for name, what in expected.items():
        read = load_config_from_file(str(ROOT / "launch" / f"{name}.yaml"))
        assert (read.distributed_type, read.num_processes, read.num_machines) == what
        assert (read.mixed_precision, read.use_cpu) == ("no", False)
    assert read.fsdp_config["fsdp_version"] == 2


SRUN = """#!{python}
# a node of two tasks; a task that a signal ended decides about the exit code, else the highest one
import os, subprocess, sys, time
flags = [arg for arg in sys.argv[1:] if arg.startswith("--")][:3]
command = sys.argv[1 + len(flags):]
env = dict(SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2", SLURM_JOB_NUM_NODES="1")
tasks = [
    subprocess.Popen(command, env=dict(os.environ, SLURM_PROCID=r, SLURM_LOCALID=r, **env))
    for r in "01"
]
open("tasks.txt", "w").write(" ".join(str(task.pid) for task in tasks))
while None in [task.poll() for task in tasks]:
    if "--kill-on-bad-exit=1" in flags and any(task.returncode for task in tasks):
        [task.kill() for task in tasks if task.returncode is None]
    time.sleep(0.01)
codes = [task.returncode for task in tasks]
sys.exit(128 - min(codes) if min(codes) < 0 else max(codes))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> scontrol.txt
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; fi
"""


@pytest.mark.parametrize(
    ("written", "num_restarts", "flags", "expected"),
    [
        ("never", "0", "--minutes 9 --lr 1", "--output-dir run --minutes 9 --lr 1"),
        ("never", "1", "--minutes 9", "--output-dir run --minutes 9"),
        ("before", "0", "--lr 1", "--resume run --lr 1"),
        ("before", "0", "--lr 1 --overwrite", "--output-dir run --lr 1 --overwrite"),
        ("before", "1", "--lr 1 --overwrite", "--output-dir run --lr 1 --overwrite"),
        ("by the job", "2", "--minutes 9 --config x --overwrite", "--resume run"),
    ],
)
def test_slurm_job_says_what_its_start_is(
    written: str, num_restarts: str, flags: str, expected: str, tmp_path: Path
) -> None:
    """A job may be requeued before its run has written anything, beside an older run's files."""
    for name, text in (("srun", '#!/bin/sh\necho "$@" > srun.txt\n'), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    config, mark = tmp_path / "run" / "config.yaml", tmp_path / "run.job-7"
    if written != "never":
        config.parent.mkdir()
        config.touch()
    if num_restarts != "0":  # the job's first start left it
        mark.touch()
    if written == "before":
        os.utime(config, (1, 1))
    if written == "by the job":
        os.utime(mark, (1, 1))
    job = {
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n",
        "SLURM_RESTART_COUNT": num_restarts,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), "run", *flags.split()]
    subprocess.run(command, cwd=tmp_path, env=os.environ | job, check=True)
    assert not mark.exists()  # the job is over
    words = (tmp_path / "srun.txt").read_text().split()
    assert " ".join(words[words.index("_") + 1 :]) == expected


@pytest.mark.slow
def test_slurm_job_saves_at_the_warning_requeues_and_goes_on(
    tmp_path: Path, vit_flags: list[str]
) -> None:
    """With an srun and an scontrol of our own."""
    (tmp_path / "dino_train.py").symlink_to(ROOT / "dino_train.py")
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "PATH": path,
    }
    flags = [*vit_flags, "--batch-size", "4", "--log-every", "1", "--epochs", "2"]
    # the last flag is for a first start alone: test_slurm_job_says_what_its_start_is
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), "run", *flags, "--overwrite"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(command, cwd=tmp_path, env=os.environ | job, **pipe)
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or not log.read_text():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    for pid in (tmp_path / "tasks.txt").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGUSR1, out
    assert "dino_train.py --resume run" in out
    requeue = f"requeue {job['SLURM_JOB_ID']}"
    assert (tmp_path / "scontrol.txt").read_text().splitlines()[-1] == requeue
    job["SLURM_RESTART_COUNT"] = "1"
    again = subprocess.run(command, cwd=tmp_path, env=os.environ | job, check=False, **pipe)
    assert again.returncode == 0, again.stdout
    assert "resumed run after step" in again.stdout
    assert (tmp_path / "scontrol.txt").read_text().count("requeue") == 1
    assert not list(tmp_path.glob("run.job-*"))
    assert [line["step"] for line in read_log(tmp_path / "run")] == list(range(1, 21))


@pytest.mark.slow
def test_batch_norms_of_several_gpus_become_one() -> None:
    """The conversion keeps the activation that timm's BatchNormAct2d applies."""

    class TwoGpus:
        is_fsdp2, num_processes, device = False, 2, torch.device("cuda")

    for arch in ("resnet18", "regnetx_002"):
        backbone = get_backbone(arch)
        num_norms = sum(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
        images = torch.randn(2, 3, 64, 64)
        expected = backbone.eval()(images)
        laid_out = distributed.lay_out(backbone, TwoGpus(), sync_bn=True, compile_blocks=False)
        syncs = [m for m in laid_out.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert len(syncs) == num_norms > 0
        torch.testing.assert_close(laid_out.eval()(images), expected, rtol=1e-4, atol=1e-4)
        left = distributed.lay_out(get_backbone(arch), TwoGpus(), False, False)
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in left.modules())
    for sync_bn in (False, True):  # which breaks the graphs of what is compiled
        laid_out = distributed.lay_out(get_backbone("resnet18"), TwoGpus(), sync_bn, True)
        compiled = [m for m in laid_out.modules() if m._compiled_call_impl is not None]
        assert len(compiled) == (0 if sync_bn else 8)


def test_network_that_a_cpu_computes_wrongly_in_channels_last_stays_as_it_is() -> None:
    for arch, is_changed in (("mobileone_s1", False), ("resnet18", True)):
        backbone = get_backbone(arch)
        laid_out = distributed.lay_out(backbone, Accelerator(cpu=True), False, False)
        weights = [m.weight for m in laid_out.modules() if isinstance(m, nn.Conv2d)]
        weight = next(weight for weight in weights if weight.shape[1] > 1 and weight.shape[2] > 1)
        is_channels_last = weight.is_contiguous(memory_format=torch.channels_last)
        assert is_channels_last is is_changed


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = SimpleNamespace(num_processes=8, device=torch.device("cuda"))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for rank, is_refused in ((3, False), (4, True)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        expected = pytest.raises(ValueError, match="process 4, counted from 0, sees only 4")
        with expected if is_refused else nullcontext():
            distributed._check_launch(processes)


def test_compiler_needs_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    header = tmp_path / "Python.h"
    monkeypatch.setattr(distributed.sysconfig, "get_paths", lambda scheme: {"include": tmp_path})
    monkeypatch.setenv("CXX", sys.executable)  # a program, as a compiler is
    assert not distributed.has_compiler()
    header.touch()
    assert distributed.has_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not distributed.has_compiler()
