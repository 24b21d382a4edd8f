"""Time and peak memory of the loss, forward and backward, against the loop over pairs of views.

    python benchmarks/bench_loss.py
    python benchmarks/bench_loss.py --k 4096 65536 --batch 64 256 --original PATH

Where lightly is installed, its loss is compared, which lightly-train uses, too. The second table
adds the head's weight-normalised last layer, from the bottleneck of 256 on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import baseline
import measure
import peers
import torch
from torch import Tensor, nn

from harness.command import run_command
from harness.distributed import has_compiler
from harness.flags import is_installed
from losses import DinoLoss
from models import PrototypeLayer

VIEWS = 10  # of the student
TEACHERS = 2  # views of the teacher
TEMP = 0.04  # of the teacher


@dataclass(frozen=True)
class Options:
    k: tuple[int, ...] = (4096, 16384, 65536, 262144)  # prototypes
    batch: tuple[int, ...] = (64, 256, 1024)
    original: Path | None = None  # a checkout of facebookresearch/dino, compared too
    rounds: int = 5
    most_gib: float = 8.0  # of logits times views: larger cases are left out
    threads: int | None = None


def our_loss(k: int) -> DinoLoss:
    """Build the loss as training does: compiled on a GPU."""
    loss = DinoLoss(k).to(measure.device())
    if torch.cuda.is_available() and has_compiler():
        torch._dynamo.config.recompile_limit = 128  # each shape is compiled anew
        loss.use_torch_compile()
    return loss


def losses(k: int, options: Options) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    device = measure.device()
    ours, plain = our_loss(k), baseline.PairwiseLoss(k).to(device)
    found = {
        "pairwise": lambda student, teacher: plain(student, teacher, TEMP),
        "ours": lambda student, teacher: ours(student, teacher, TEMP),
    }
    if options.original:
        main = baseline.load_original(options.original).main
        theirs = main.DINOLoss(k, VIEWS, TEMP, TEMP, 0, 1).to(device)
        theirs.update_center = lambda teacher: None  # ours has it apart
        found["original"] = lambda s, t: theirs(s.flatten(end_dim=1), t.flatten(end_dim=1), 0)
    if is_installed("lightly"):
        lightly = peers.lightly_loss(k).to(device)
        lightly.update_center = lambda teacher: None
        found["lightly"] = lambda s, t: lightly(t.unbind(0), s.unbind(0), teacher_temp=TEMP)
    return found


def on_logits(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> object:
    def call() -> None:
        loss(student, teacher).backward()
        student.grad = None

    return call


def on_bottleneck(loss: Callable, layer: nn.Module, student: Tensor, teacher: Tensor) -> object:
    def call() -> None:
        with torch.no_grad():
            targets = layer(teacher).unflatten(0, (TEACHERS, -1))
        loss(layer(student).unflatten(0, (VIEWS, -1)), targets).backward()
        student.grad = None
        layer.zero_grad()

    return call


def compare(title: str, cases: Callable[[int, int], dict], options: Options, machine: str) -> None:
    rows = []
    for k in options.k:
        for batch in options.batch:
            if VIEWS * batch * k * 4 * 4 > options.most_gib * 2**30:
                rows.append([f"{k:,}", f"{batch:,}", *["too large"] * 2])
                continue
            variants = cases(k, batch)
            seconds = measure.in_turn(variants, options.rounds)
            memory = {name: measure.peak_bytes(call) for name, call in variants.items()}
            mine = memory["ours"]
            row = [f"{k:,}", f"{batch:,}"]
            for name in variants:
                time = measure.median(seconds[name])
                row += [f"{1e3 * time:.1f}", f"{memory[name] / 2**20:,.0f}"]
                if name != "ours":
                    speed = measure.ratio(seconds[name], seconds["ours"])
                    row.append(f"{speed:.1f}x, {mine / max(1, memory[name]):.2f}")
            rows.append(row)
    columns = ["k", "batch"]
    for name in losses(1, options):
        columns += [f"{name} ms", "MiB"]
        if name != "ours":
            columns.append("ours: speed, memory")
    measure.show(title, columns, rows, machine)


def main() -> None:
    options = measure.read(Options, __doc__)
    machine = measure.machine("float32", options.threads)
    if is_installed("lightly"):
        machine += f", {peers.with_version('lightly')}"
    device = measure.device()

    def logits_case(k: int, batch: int) -> dict:
        student = torch.randn(VIEWS, batch, k, device=device, requires_grad=True)
        teacher = torch.randn(TEACHERS, batch, k, device=device)
        found = losses(k, options)
        return {name: on_logits(loss, student, teacher) for name, loss in found.items()}

    def layer_case(k: int, batch: int) -> dict:
        student = torch.randn(VIEWS * batch, 256, device=device)
        student = nn.functional.normalize(student, dim=-1).requires_grad_()
        teacher = torch.randn(TEACHERS * batch, 256, device=device)
        teacher = nn.functional.normalize(teacher, dim=-1)
        ours = PrototypeLayer(256, k, learn_gain=False).to(device)
        plain = nn.utils.parametrizations.weight_norm(nn.Linear(256, k, bias=False)).to(device)
        plain.parametrizations.weight.original0.requires_grad_(False)
        found, mine = losses(k, options), our_loss(k)
        found["ours"] = lambda s, t: mine(s, t, TEMP, overwrite_student=True)  # as in training
        return {
            name: on_bottleneck(loss, ours if name == "ours" else plain, student, teacher)
            for name, loss in found.items()
        }

    compare("loss, logits given", logits_case, options, machine)
    compare("last layer and loss", layer_case, options, machine)


if __name__ == "__main__":
    run_command(main)
