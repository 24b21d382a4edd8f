"""DINO's loss: cross-entropy of the centred, sharpened teacher and the student, over all views.
KoLeo, which may be added to it, spreads the features of a batch; Sinkhorn may take the center's
place.

    dino_loss = DinoLoss(output_dim=65536)
    loss = dino_loss(student_logits, teacher_logits, teacher_temp=0.04)  # (v, b, k), (t, b, k)
    dino_loss.update_center(teacher_logits)                              # after the center was used
    loss = loss + 0.1 * koleo_loss(student_features[:2])                 # (v, b, d)

    dino_loss.balance_center(teacher_logits, teacher_temp=0.04)          # Sinkhorn: before the loss

Stands alone: needs torch only. Sources: DINO, arXiv 2104.14294, equations 1 to 4; KoLeo, arXiv
1806.03198, and Sinkhorn, arXiv 2006.09882, as DINOv2 uses them.
Axes: v student views, t teacher views (the first t of the v), b batch, k output_dim, d features.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


class _AllPairsCrossEntropy(torch.autograd.Function):
    """Return the mean over t, v != t and b of H(teacher[t], student[v]); gradient in closed form.

    Each teacher row sums to 1, so the t cross-entropies of one student row need one log-sum-exp and
    one product with the summed targets. The gradient is formed in forward, block by block of rows:
    beyond it, extra memory is a few blocks, where the pairwise loss has v softmaxes.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student: Tensor,
        teacher: Tensor,
        center: Tensor,
        temps: tuple[float, float],
        overwrite_student: bool,
    ) -> Tensor:
        student_temp, teacher_temp = temps
        num_views, batch, output_dim = student.shape
        num_teachers = len(teacher)
        num_pairs = num_teachers * (num_views - 1)
        dtype = torch.promote_types(student.dtype, torch.float32)
        # float16 would round the gradient, which is not yet scaled, to 0
        grad_dtype = dtype if student.dtype == torch.float16 else student.dtype
        grad = None
        if ctx.needs_input_grad[0]:
            if overwrite_student and grad_dtype == student.dtype:
                grad = student
            else:
                grad = torch.empty_like(student, dtype=grad_dtype)
        scale = 1 / (student_temp * batch * num_pairs)  # of the gradient by the logits
        total = torch.zeros((), dtype=dtype, device=student.device)
        # numbers of a block: few enough for a CPU's caches, many enough for a GPU's kernels
        block_numel = 1 << 18 if student.device.type == "cpu" else 1 << 26
        block = max(1, block_numel // output_dim)
        for start in range(0, batch, block):
            rows = slice(start, start + block)
            targets = (teacher[:, rows].to(dtype) - center.to(dtype)) / teacher_temp
            targets = targets.softmax(dim=-1)
            summed = targets.sum(dim=0)
            for view in range(num_views):
                # targets of the teacher views that this one is compared with, summed; their number
                others, num_others = summed, num_teachers
                if view < num_teachers:  # a view is never compared with itself
                    others, num_others = summed - targets[view], num_teachers - 1
                logits = student[view, rows].to(dtype)
                top = logits.amax(dim=-1, keepdim=True)
                exps = (logits - top).mul_(1 / student_temp).exp_()
                norm = exps.sum(dim=-1, keepdim=True)
                log_norm = top / student_temp + norm.log()
                products = torch.dot(others.flatten(), logits.flatten()) / student_temp
                total += num_others * log_norm.sum() - products
                if grad is not None:
                    # scale * (num_others * softmax - others), in the memory of exps
                    exps.mul_(num_others * scale / norm)
                    grad[view, rows] = exps.sub_(others, alpha=scale)
        ctx.grad = grad
        return total / (batch * num_pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad is None:
            raise RuntimeError("the loss was differentiated already: call it again")
        grad, ctx.grad = ctx.grad, None  # handed over: no second copy of it is held
        # whether grad_loss is 1 is asked on a CPU alone: a GPU would have to be waited for
        if grad.device.type != "cpu" or grad_loss != 1:
            grad.mul_(grad_loss.to(grad.dtype))
        return grad, None, None, None, None


def _all_pairs_fused(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: Tensor
) -> Tensor:
    """Return the same loss in a form that torch.compile fuses, and differentiates by itself."""
    num_teachers, num_views = len(teacher), len(student)
    targets = ((teacher.float() - center) / teacher_temp).softmax(dim=-1)
    logits = student.float() / student_temp
    log_norms = logits.logsumexp(dim=-1).sum(dim=1)
    # A pair's cross-entropy is log_norm - (targets * logits).sum(). All pairs of views are summed,
    # then those of a view with itself are taken off: `own`, and the teacher views' log_norms.
    own = (targets * logits[:num_teachers]).sum()
    products = (targets.sum(dim=0) * logits).sum()
    total = num_teachers * log_norms.sum() - log_norms[:num_teachers].sum() - products + own
    return total / (student.shape[1] * num_teachers * (num_views - 1))


class DinoLoss(nn.Module):
    """Centred cross-entropy of all pairs (teacher view, other student view).

    Float32 (float64 for float64 logits), also under autocast. `center` (1, output_dim) is a buffer.
    """

    def __init__(
        self, output_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__()
        if output_dim < 1:
            raise ValueError(f"need output_dim >= 1, got {output_dim}")
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, output_dim))
        self.fused: Callable[..., Tensor] | None = None

    def use_torch_compile(self) -> None:
        """Compute forward by torch.compile from now on: faster on a GPU; needs a C compiler.

        In float32 then, whatever the logits, and `overwrite_student` has no effect.
        """
        self.fused = torch.compile(_all_pairs_fused, dynamic=False)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        teacher_temp: float,
        overwrite_student: bool = False,
    ) -> Tensor:
        """Return the scalar loss of student (v, b, k) and teacher (t, b, k) logits. Eq. 1 to 3.

        The first t student views are the teacher's. Equals, with CE the batch mean:
            mean(CE(softmax((teacher[i] - center) / teacher_temp), student[j] / student_temp)
                 for i in range(t) for j in range(v) if i != j)
        The gradient reaches the student only, and can be taken once. Nothing is changed, except
        with `overwrite_student`: the gradient may then take the memory of the student's logits.
        Raises ValueError for shapes that do not fit.
        """
        k = self.center.shape[-1]
        if student.ndim != 3 or teacher.ndim != 3 or student.shape[1:] != teacher.shape[1:]:
            shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise ValueError(f"need student (v, b, {k}) and teacher (t, b, {k}), got {shapes}")
        if student.shape[-1] != k or not 1 <= len(teacher) <= len(student) or len(student) < 2:
            views = f"{len(student)} and {len(teacher)} views of dimension {student.shape[-1]}"
            raise ValueError(f"need v >= 2 and v >= t >= 1 views of dimension {k}, got {views}")
        with torch.autocast(student.device.type, enabled=False):
            if self.fused is not None:
                # a tensor, since each new number would be compiled anew; filled on the device,
                # since copying it there would wait
                temp = torch.full((), teacher_temp, device=student.device)
                # a copy, since update_center may change it in place before backward reads it
                center = self.center.clone()
                return self.fused(student, teacher.detach(), center, self.student_temp, temp)
            return _AllPairsCrossEntropy.apply(
                student,
                teacher.detach(),
                self.center,
                (self.student_temp, teacher_temp),
                overwrite_student,
            )

    @torch.no_grad()
    def teacher_entropy(self, teacher: Tensor, teacher_temp: float) -> Tensor:
        """Return the mean entropy of teacher (t, b, k): ln(k) when uniform, 0 when one-hot.

        The loss less this is the mean KL divergence from student to teacher.
        """
        log_targets = ((teacher.float() - self.center) / teacher_temp).log_softmax(dim=-1)
        return -(log_targets.exp() * log_targets).sum(dim=-1).mean()

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        """Move the center towards the mean of teacher (..., k), in place. Eq. 4. A collective."""
        rows = teacher.flatten(end_dim=-2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sum_and_count = torch.cat([rows.sum(dim=0), rows.new_full((1,), len(rows))])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sum_and_count)
        mean = sum_and_count[:-1] / sum_and_count[-1]
        self.center.lerp_(mean[None].to(self.center.dtype), 1 - self.center_momentum)

    @torch.no_grad()
    def balance_center(self, teacher: Tensor, teacher_temp: float, iterations: int = 3) -> None:
        """Set the center by which all prototypes take equal shares of teacher (..., k), in place.

        That is Sinkhorn-Knopp on exp(logits / temp), with a row for each image's view and a column
        for each prototype: columns and rows are scaled in turn, each to a sum of 1. Scaling a
        column subtracts a number from that prototype's logits, as a center does. Scaling the rows
        comes last, and the loss's softmax does that: so its targets are Sinkhorn's, with the loss
        as it is. A collective: the rows of all processes count.
        """
        with torch.autocast(teacher.device.type, enabled=False):
            rows = teacher.flatten(end_dim=-2)
            scores = rows.to(torch.promote_types(rows.dtype, torch.float32)) / teacher_temp
            log_column_scales = torch.zeros_like(scores[:1])
            log_row_scales = torch.zeros_like(scores[:, :1])
            for _ in range(iterations):
                log_column_scales = -_log_sum_exp_of_all_rows(scores + log_row_scales)
                log_row_scales = -(scores + log_column_scales).logsumexp(dim=1, keepdim=True)
            self.center.copy_(-teacher_temp * log_column_scales)


def _log_sum_exp_of_all_rows(rows: Tensor) -> Tensor:
    """Return the log-sum-exp (1, k) over rows (n, k) of all processes. A collective."""
    own = rows.logsumexp(dim=0, keepdim=True)
    if not dist.is_available() or not dist.is_initialized():
        return own
    of_all = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, own)
    return torch.cat(of_all).logsumexp(dim=0, keepdim=True)


def koleo_loss(features: Tensor) -> Tensor:
    """Return KoLeo of student features (v, b, d): low where each image is far from its nearest.

    That is minus the mean logarithm of the distance from an image's direction to the nearest other
    of the batch in the same view, summed over the views. Float32, also under autocast. Raises
    ValueError for fewer than two images, which have no nearest.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"need features (v, b >= 2, d), got {tuple(features.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        directions = F.normalize(features.to(dtype), dim=-1)
        with torch.no_grad():
            similarities = directions @ directions.mT
            similarities.diagonal(dim1=1, dim2=2).fill_(-2)  # no image is its own nearest
            nearest = similarities.argmax(dim=-1, keepdim=True)
        others = directions.gather(1, nearest.expand_as(directions))
        # 1e-8 twice, as DINOv2 has it: equal images have a distance, and a gradient
        distances = (directions - others + 1e-8).norm(dim=-1)
        return -(distances + 1e-8).log().mean(dim=1).sum()
