import itertools
import math

import pytest
import torch
from torch import Tensor

import losses
from losses import DinoLoss, koleo_loss


def plain_loss(student: Tensor, teacher: Tensor, center: Tensor, temps: tuple) -> Tensor:
    """The definition: a double loop over views, as in algorithm 1 of the paper."""
    terms = []
    for i, j in itertools.product(range(len(teacher)), range(len(student))):
        if i != j:
            targets = ((teacher[i] - center) / temps[1]).softmax(dim=-1)
            terms.append(
                -(targets * (student[j] / temps[0]).log_softmax(dim=-1)).sum(dim=-1).mean()
            )
    return torch.stack(terms).mean()


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("views", [(2, 2), (10, 2), (3, 1), (4, 3)])
@pytest.mark.parametrize("output_dim", [2, 300])
@pytest.mark.parametrize("temps", [(0.1, 0.04), (1.0, 0.5)])
def test_loss_and_gradient_equal_the_double_loop(
    batch: int, views: tuple[int, int], output_dim: int, temps: tuple[float, float]
) -> None:
    student = torch.randn(views[0], batch, output_dim, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(views[1], batch, output_dim, dtype=torch.float64)
    loss = DinoLoss(output_dim, student_temp=temps[0]).double()
    loss.center.normal_()
    value = loss(student, teacher, temps[1])
    (3 * value).backward()
    grad, student.grad = student.grad, None
    expected = plain_loss(student, teacher, loss.center, temps)
    (3 * expected).backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, student.grad, rtol=1e-10, atol=1e-10)


def test_blocks_of_rows_do_not_change_the_loss() -> None:
    output_dim = 40_000  # three rows a block on the CPU
    student, teacher = torch.randn(3, 8, output_dim), torch.randn(2, 8, output_dim)
    loss = DinoLoss(output_dim)
    expected = plain_loss(student.double(), teacher.double(), loss.center, (0.1, 0.04))
    torch.testing.assert_close(loss(student, teacher, 0.04).double(), expected, rtol=1e-5, atol=0)


def test_loss_with_center_equals_the_original_over_steps(parity: dict) -> None:
    loss = DinoLoss(20).double()
    temps = parity["loss.teacher_temps"]
    for step, epoch in enumerate(parity["loss.epochs"].tolist()):
        student = parity["loss.student"][step].requires_grad_()
        teacher = parity["loss.teacher"][step]
        torch.testing.assert_close(loss.center, parity["loss.centers"][step])
        value = loss(student, teacher, temps[epoch].item())
        value.backward()
        torch.testing.assert_close(value, parity["loss.values"][step], rtol=1e-10, atol=0)
        torch.testing.assert_close(student.grad, parity["loss.student_grads"][step])
        loss.update_center(teacher)
    torch.testing.assert_close(loss.center, parity["loss.centers"][-1], rtol=1e-6, atol=1e-7)


def test_forward_is_pure_and_spares_the_teacher() -> None:
    loss = DinoLoss(5)
    teacher = torch.randn(2, 3, 5, requires_grad=True)
    student = torch.randn(4, 3, 5, requires_grad=True)
    before = teacher.detach().clone(), student.detach().clone()
    values = [loss(student, teacher, 0.04) for _ in range(2)]
    values[0].backward()
    assert values[0] == values[1]
    assert teacher.grad is None
    assert (loss.center == 0).all()
    torch.testing.assert_close((teacher.detach(), student.detach()), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_stay_finite_under_autocast(dtype: torch.dtype) -> None:
    student = (1e4 * torch.randn(4, 3, 50)).to(dtype).requires_grad_()
    teacher = (1e4 * torch.randn(2, 3, 50)).to(dtype)
    loss = DinoLoss(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, 0.04)
        entropy = loss.teacher_entropy(teacher, 0.04)
        loss.update_center(teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert all(x.isfinite().all() for x in (value, entropy, student.grad, loss.center))


def test_autocast_does_not_lower_the_precision() -> None:
    student, teacher, loss = torch.randn(4, 6, 64), torch.randn(2, 6, 64), DinoLoss(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, 0.04)
    torch.testing.assert_close(value, loss(student, teacher, 0.04), rtol=0, atol=0)


def test_center_is_the_moving_average_of_batch_means() -> None:
    loss = DinoLoss(3, center_momentum=0.75)
    expected = torch.zeros(1, 3)
    for _ in range(4):
        teacher = torch.randn(2, 5, 3)
        loss.update_center(teacher)
        expected = 0.75 * expected + 0.25 * teacher.mean(dim=(0, 1))
    torch.testing.assert_close(loss.center, expected)
    assert "center" in loss.state_dict()


def test_entropy_tells_uniform_from_one_hot() -> None:
    loss = DinoLoss(16)
    uniform, one_hot = torch.zeros(2, 3, 16), torch.zeros(2, 3, 16)
    one_hot[..., 4] = 100
    assert loss.teacher_entropy(uniform, 0.04).item() == pytest.approx(math.log(16))
    assert loss.teacher_entropy(one_hot, 0.04).item() == pytest.approx(0, abs=1e-6)
    assert loss(uniform, uniform, 0.04).item() == pytest.approx(math.log(16))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((4, 3, 5), (2, 3, 6)),
        ((4, 3, 5), (2, 2, 5)),
        ((3, 5), (3, 5)),
        ((1, 3, 5), (1, 3, 5)),
        ((2, 3, 5), (3, 3, 5)),
        ((4, 3, 6), (2, 3, 6)),
    ],
)
def test_shapes_that_do_not_fit_are_named(student: tuple, teacher: tuple) -> None:
    with pytest.raises(ValueError, match="need"):
        DinoLoss(5)(torch.zeros(student), torch.zeros(teacher), 0.04)


def test_gradient_takes_the_logits_memory_where_allowed_and_equals_the_pure_one() -> None:
    dino_loss = DinoLoss(33)
    student, teacher = torch.randn(4, 5, 33), torch.randn(2, 5, 33)
    grads = []
    for overwrite in (False, True):
        logits = student.clone().requires_grad_()
        passed = logits * 1.0
        loss = dino_loss(passed, teacher, 0.04, overwrite_student=overwrite)
        assert torch.equal(passed.detach(), student) != overwrite
        loss.backward()
        grads.append(logits.grad)
    assert torch.equal(*grads)


def test_loss_is_differentiated_once() -> None:
    student = torch.randn(3, 2, 8, requires_grad=True)
    loss = DinoLoss(8)(student, torch.randn(2, 2, 8), 0.04)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already: call it again"):
        loss.backward()


def test_gradient_is_scaled_by_what_follows_the_loss() -> None:
    student, teacher = torch.randn(3, 2, 8, requires_grad=True), torch.randn(2, 2, 8)
    (one,) = torch.autograd.grad(DinoLoss(8)(student, teacher, 0.04), student)
    (third,) = torch.autograd.grad(DinoLoss(8)(student, teacher, 0.04) / 3, student)
    torch.testing.assert_close(third, one / 3)


@pytest.mark.parametrize("num_teachers", [1, 2])
def test_form_that_is_compiled_equals_the_other_and_its_gradient(num_teachers: int) -> None:
    """By the eager backend, which runs what the compiler is given."""
    plain, fused = DinoLoss(40), DinoLoss(40)
    fused.fused = torch.compile(losses._all_pairs_fused, backend="eager", dynamic=False)
    student, teacher = torch.randn(5, 3, 40), torch.randn(num_teachers, 3, 40)
    results = []
    for dino_loss in (plain, fused):
        dino_loss.update_center(teacher)
        logits = student.clone().requires_grad_()
        loss = dino_loss(logits, teacher, 0.05)
        dino_loss.update_center(teacher + 1)  # in place, before the gradient is asked for
        loss.backward()
        results.append((loss.detach(), logits.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_compiled_loss_equals_the_other_at_every_temperature_in_one_graph() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, fused = DinoLoss(64), DinoLoss(64)
    fused.use_torch_compile()
    student, teacher = torch.randn(4, 3, 64), torch.randn(2, 3, 64)
    for temp in (0.04, 0.05, 0.07):
        grads = []
        for dino_loss in (plain, fused):
            logits = student.clone().requires_grad_()
            dino_loss(logits, teacher, temp).backward()
            grads.append(logits.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def plain_koleo(features: Tensor) -> Tensor:
    """The definition: each image's distance to every other of its view, one by one."""
    total = torch.zeros((), dtype=features.dtype)
    for view in features:
        directions = [row / row.norm() for row in view]
        for i, one in enumerate(directions):
            distances = [(one - other).norm() for j, other in enumerate(directions) if i != j]
            total = total - min(distances).log() / len(directions)
    return total


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 7, 5), (3, 33, 64)])
def test_koleo_and_gradient_equal_the_distances_one_by_one(shape: tuple[int, int, int]) -> None:
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (koleo_loss, plain_koleo):
        value = function(features)
        (grad,) = torch.autograd.grad(value, features)
        results.append((value.detach(), grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_koleo_equals_dinov2s_own(parity: dict[str, Tensor]) -> None:
    views = parity["koleo.features"].requires_grad_()
    value = koleo_loss(views)
    value.backward()
    torch.testing.assert_close(value.detach(), parity["koleo.values"].sum())
    torch.testing.assert_close(views.grad, parity["koleo.grads"])


def test_koleo_is_finite_for_equal_images_and_under_autocast() -> None:
    features = torch.ones(2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = koleo_loss(features)
    value.backward()
    assert value.dtype == torch.float32 and value > 30  # minus ln 1e-8 is 18.4 a view
    assert features.grad.isfinite().all()


def test_koleo_of_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="b >= 2"):
        koleo_loss(torch.randn(2, 1, 8))


# ---------------------------------------------------------------- Sinkhorn


def plain_sinkhorn(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Scale the columns of exp(logits / temp) to equal sums, then its rows, in plain loops."""
    matrix = (logits.double() / temp).exp()
    num_rows, num_columns = matrix.shape
    for _ in range(iterations):
        for column in range(num_columns):
            matrix[:, column] /= matrix[:, column].sum() * num_columns
        for row in range(num_rows):
            matrix[row] /= matrix[row].sum() * num_rows
    return matrix * num_rows


@pytest.mark.parametrize("iterations", [1, 3, 300])
def test_targets_of_the_balanced_center_are_sinkhorns(iterations: int) -> None:
    logits = torch.randn(2, 7, 11, dtype=torch.float64)
    dino_loss = DinoLoss(11).double()
    dino_loss.balance_center(logits, teacher_temp=0.2, iterations=iterations)
    targets = ((logits - dino_loss.center) / 0.2).softmax(dim=-1).flatten(end_dim=1)
    expected = plain_sinkhorn(logits.flatten(end_dim=1), 0.2, iterations)
    torch.testing.assert_close(targets, expected)
    if iterations == 300:  # all prototypes have equal shares by then
        torch.testing.assert_close(targets.sum(dim=0), torch.full((11,), 14 / 11).double())


def test_sinkhorn_equals_dinov2s_own(parity: dict[str, Tensor]) -> None:
    logits = parity["sinkhorn.logits"]
    dino_loss = DinoLoss(logits.shape[-1])
    dino_loss.balance_center(logits, teacher_temp=0.05)
    targets = ((logits - dino_loss.center) / 0.05).softmax(dim=-1)
    torch.testing.assert_close(targets, parity["sinkhorn.targets"], rtol=1e-4, atol=1e-6)


def test_sinkhorn_is_finite_where_exponentials_overflow() -> None:
    dino_loss = DinoLoss(5)
    dino_loss.balance_center(100 * torch.randn(2, 4, 5), teacher_temp=0.02)
    assert dino_loss.center.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dino_loss.balance_center(torch.randn(2, 4, 5, dtype=torch.bfloat16), teacher_temp=0.02)
    assert dino_loss.center.isfinite().all()
