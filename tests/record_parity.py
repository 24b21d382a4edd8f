"""Record what the original DINO code computes, as the reference for the parity tests.

    git clone https://github.com/facebookresearch/dino PATH_TO_DINO_CHECKOUT
    git -C PATH_TO_DINO_CHECKOUT checkout 7c446df
    git clone https://github.com/facebookresearch/dinov2 PATH_TO_DINOV2_CHECKOUT
    git -C PATH_TO_DINOV2_CHECKOUT checkout b8931f7
    python tests/record_parity.py PATH_TO_DINO_CHECKOUT PATH_TO_DINOV2_CHECKOUT

It imports the modules of those checkouts, runs them on random inputs with fixed seeds and writes
`parity.safetensors` next to itself. Everything is float32 unless noted. The keys:

head.<variant>.state.<key>       state dict of the head before the forward, in training mode;
                                 variants: default, gain (learnt weight_g, away from 1), bn
head.<variant>.input, .output    (6, 24) and (6, 40)
loss.student, .teacher           float64 logits, (step, view, batch, class): 5 and 2 views
loss.epochs                      int64, the epoch passed at each step
loss.values, .student_grads      float64, the loss and its gradient to loss.student, per step
loss.centers                     float64 (steps + 1, 1, class): before each step, after the last
loss.teacher_temps               float64, the teacher temperature of each epoch
schedule.<name>.args, .values    float64 [base, final, epochs, steps per epoch, warmup epochs]
                                 and the value of every step
lars.<case>.args                 float64 [lr, weight_decay]
lars.<case>.initial.<i>, .final.<i>, .grads.<i>
                                 parameter i before and after all steps; its gradients (step, ...)
knn.train_features, .train_labels, .test_features, .test_labels
                                 unit-length features and int64 labels of 7 classes
knn.ks, .top1, .top5             int64 numbers of neighbours and float64 accuracies in percent
                                 at temperature 0.07; no value hangs on the order of tied classes
clip.grads.<i>, .clipped.<i>     gradient of parameter i before and after clipping at norm 0.5
clip.norms                       the norms before clipping
positions.embed                  (1, 1 + 4 * 4, 6) position embeddings, class token first
positions.<height>x<width>       what they become for so many patches
koleo.features, .values, .grads  (2, 9, 6) features of two views, DINOv2's KoLeo of each view and
                                 the gradient of their sum
sinkhorn.logits, .targets        (12, 20) teacher logits and DINOv2's targets at temperature 0.05

The metadata holds `param_groups`, a JSON object with the parameter names of the gain head that
are `regularized` and `not_regularized`, and `source` and `torch`, the versions used.
"""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from runpy import run_path
from types import ModuleType

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

SOURCE = "facebookresearch/dino 7c446df, facebookresearch/dinov2 b8931f7"
GROUPS = ("regularized", "not_regularized")  # in the order of the original's list

Tensors = dict[str, Tensor]


def record_heads(vits: ModuleType, utils: ModuleType) -> tuple[Tensors, dict[str, list[str]]]:
    torch.manual_seed(0)
    variants = {"default": {}, "gain": {"norm_last_layer": False}, "bn": {"use_bn": True}}
    out: Tensors = {}
    groups: dict[str, list[str]] = {}
    for variant, kw in variants.items():
        head = vits.DINOHead(in_dim=24, out_dim=40, hidden_dim=16, bottleneck_dim=8, **kw)
        for param in head.parameters():
            if param.requires_grad:  # in the default and bn heads weight_g is frozen at 1
                param.data.add_(0.2 * torch.randn_like(param))
        out |= {f"head.{variant}.state.{k}": v.clone() for k, v in head.state_dict().items()}
        out[f"head.{variant}.input"] = x = torch.randn(6, 24)
        out[f"head.{variant}.output"] = head(x).detach()
        if variant == "gain":
            names = {id(p): name for name, p in head.named_parameters()}
            for key, group in zip(GROUPS, utils.get_params_groups(head), strict=True):
                groups[key] = [names[id(p)] for p in group["params"]]
    return out, groups


def record_loss(main_dino: ModuleType) -> Tensors:
    torch.manual_seed(1)
    student = torch.randn(5, 5, 4, 20, dtype=torch.float64, requires_grad=True)
    teacher = 0.3 * torch.randn(5, 2, 4, 20, dtype=torch.float64)
    epochs = [0, 1, 2, 3, 5]
    criterion = main_dino.DINOLoss(20, 5, 0.04, 0.07, 3, 6).double()
    values, centers = [], [criterion.center.clone()]
    for s, t, epoch in zip(student, teacher, epochs, strict=True):
        # The original wants the views concatenated, view by view.
        values.append(criterion(s.flatten(0, 1), t.flatten(0, 1), epoch))
        centers.append(criterion.center.clone())
    # A step's loss depends on its own logits only: the sum has every step's gradient.
    (student_grads,) = torch.autograd.grad(torch.stack(values).sum(), student)
    return {
        "loss.student": student.detach(),
        "loss.teacher": teacher,
        "loss.epochs": torch.tensor(epochs),
        "loss.values": torch.stack(values).detach(),
        "loss.student_grads": student_grads,
        "loss.centers": torch.stack(centers),
        "loss.teacher_temps": torch.from_numpy(criterion.teacher_temp_schedule),
    }


def record_schedules(utils: ModuleType) -> Tensors:
    cases = {
        "lr": (5e-4 * 2, 1e-6, 7, 13, 2),
        "weight_decay": (0.04, 0.4, 7, 13, 0),
        "momentum": (0.996, 1, 7, 13, 0),
        "no_warmup_short": (1.0, 0.1, 3, 1, 0),
        "warmup_one_step": (1.0, 0.1, 3, 1, 1),
    }
    out: Tensors = {}
    for name, args in cases.items():
        out[f"schedule.{name}.args"] = torch.tensor(args, dtype=torch.float64)
        out[f"schedule.{name}.values"] = torch.from_numpy(utils.cosine_scheduler(*args))
    return out


def record_lars(utils: ModuleType) -> Tensors:
    torch.manual_seed(2)
    out: Tensors = {}
    for case, (lr, decay) in {"resnet_recipe": (0.3, 1e-6), "large_decay": (0.3, 0.04)}.items():
        out[f"lars.{case}.args"] = torch.tensor([lr, decay], dtype=torch.float64)
        params = [nn.Parameter(torch.randn(shape)) for shape in [(8, 5), (5,), (4, 3, 2, 2)]]
        grads = [0.1 * torch.randn(6, *p.shape) for p in params]
        groups = [{"params": params[::2]}, {"params": params[1:2], "weight_decay": 0.0}]
        optimizer = utils.LARS(groups, lr=lr, weight_decay=decay)
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            out |= {f"lars.{case}.initial.{i}": p.detach().clone(), f"lars.{case}.grads.{i}": g}
        for step in range(6):
            for p, g in zip(params, grads, strict=True):
                p.grad = g[step].clone()
            optimizer.step()
        out |= {f"lars.{case}.final.{i}": p.detach() for i, p in enumerate(params)}
    return out


def record_knn(eval_knn: ModuleType) -> Tensors:
    torch.manual_seed(396)  # a draw where no tie or near-tie decides a count
    means = torch.randn(7, 16)
    data: Tensors = {}
    for split, size in {"train": 300, "test": 100}.items():
        labels = torch.randint(7, (size,))
        features = means[labels] + 2.5 * torch.randn(size, 16)
        data |= {f"{split}_features": normalize(features, dim=1), f"{split}_labels": labels}
    ks = [10, 20, 100, 200]
    results = [eval_knn.knn_classifier(*data.values(), k, 0.07, num_classes=7) for k in ks]
    top1, top5 = torch.tensor(results, dtype=torch.float64).unbind(1)
    data |= {"ks": torch.tensor(ks), "top1": top1, "top5": top5}
    return {f"knn.{key}": value for key, value in data.items()}


def record_clip(utils: ModuleType) -> Tensors:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3, bias=False))
    out: Tensors = {}
    for i, (p, scale) in enumerate(zip(model.parameters(), [0.3, 0.1, 0.5], strict=True)):
        p.grad = scale * torch.randn_like(p)
        out[f"clip.grads.{i}"] = p.grad.clone()
    out["clip.norms"] = torch.tensor(utils.clip_gradients(model, 0.5))
    return out | {f"clip.clipped.{i}": p.grad for i, p in enumerate(model.parameters())}


def record_positions(vits: ModuleType) -> Tensors:
    torch.manual_seed(4)
    vit = vits.VisionTransformer([32], patch_size=8, embed_dim=6, depth=0)
    out: Tensors = {"positions.embed": vit.pos_embed.detach()}
    for height, width in [(2, 2), (3, 5), (2, 8), (4, 4), (6, 6)]:
        tokens = torch.empty(1, 1 + height * width, 6)
        positions = vit.interpolate_pos_encoding(tokens, 8 * height, 8 * width)
        out[f"positions.{height}x{width}"] = positions.detach()
    return out


def record_koleo(koleo: dict) -> Tensors:
    torch.manual_seed(5)
    features = torch.randn(2, 9, 6, requires_grad=True)
    values = torch.stack([koleo["KoLeoLoss"]()(view) for view in features])
    values.sum().backward()
    tensors = {"features": features, "values": values, "grads": features.grad}
    return {f"koleo.{name}": tensor.detach() for name, tensor in tensors.items()}


def record_sinkhorn(dinov2_loss: dict) -> Tensors:
    torch.manual_seed(6)
    logits = torch.randn(12, 20).tanh()  # as of unit vectors
    targets = dinov2_loss["DINOLoss"](20).sinkhorn_knopp_teacher(logits, 0.05)
    return {"sinkhorn.logits": logits, "sinkhorn.targets": targets}


def main() -> None:
    parser = argparse.ArgumentParser(description="Record what the original DINO code computes.")
    parser.add_argument("checkout", type=Path, help="a checkout of facebookresearch/dino")
    parser.add_argument("dinov2", type=Path, help="a checkout of facebookresearch/dinov2")
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout.resolve()))
    modules = ["utils", "main_dino", "vision_transformer", "eval_knn"]
    utils, main_dino, vits, eval_knn = map(import_module, modules)
    # The original's loss averages its center over processes, so it needs a group, if of one.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tensors, groups = record_heads(vits, utils)
    tensors |= record_loss(main_dino) | record_schedules(utils) | record_lars(utils)
    tensors |= record_knn(eval_knn) | record_clip(utils) | record_positions(vits)
    losses_of_dinov2 = args.dinov2 / "dinov2" / "loss"
    tensors |= record_koleo(run_path(str(losses_of_dinov2 / "koleo_loss.py")))
    tensors |= record_sinkhorn(run_path(str(losses_of_dinov2 / "dino_clstoken_loss.py")))
    dist.destroy_process_group()
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    versions = {"source": SOURCE, "torch": torch.__version__}
    metadata = versions | {"param_groups": json.dumps(groups)}
    save_file(tensors, Path(__file__).with_name("parity.safetensors"), metadata)


if __name__ == "__main__":
    main()
