"""The engine as people train, and what it refuses; what it shares with the loop is in test_both_ways."""

import numpy as np
import pytest
import torch
from tiny import Through, perceptron, points, residual, tiny_pair
from twins import (
    ARCHITECTURES,
    WEIGHTINGS,
    Remembering,
    gradient_in,
    gradients_of_the_whole_batch,
    nan_label,
    off,
    pair_batch,
)

from recsys_importance import gradients
from recsys_importance.gradients import RULES, Whole, gradient_norms, rule, sample_gradients, weighted_backward
from recsys_importance.importance import Weighting
from recsys_importance.objectives import cross_entropy, squared_error
from recsys_importance.reference import in_dtype


@pytest.mark.parametrize(
    ("reduce", "shape"),
    [(lambda losses: losses.mean(), r"\(\)"), (lambda losses: losses[:, None], r"\(6, 1\)"), (lambda losses: losses.repeat(2), r"\(12,\)")],
)
def test_a_loss_that_is_not_per_sample_is_refused(reduce, shape):
    for action in (gradient_norms, lambda *args: weighted_backward(*args, Weighting())):
        with pytest.raises(ValueError, match=rf"the loss of a batch of 6 has shape {shape}, expected \(6,\)"):
            action(perceptron(), lambda model, batch: reduce(residual(model, batch)), points())


def test_dropout_is_the_same_in_the_norm_and_in_the_gradient():
    torch.manual_seed(0)
    model = Remembering().train()
    batch = {"x": torch.randn(5, 16), "y": torch.randn(5)}
    step = weighted_backward(model, residual, batch, Weighting(), check=False)
    (masks,) = model.masks  # one forward pass
    assert len({tuple(mask.tolist()) for mask in masks}) == 5
    x = batch["x"] * masks
    each = 2 * (x @ model.linear.weight[0] - batch["y"]).detach()[:, None] * x
    norms = each.norm(dim=1)
    torch.testing.assert_close(step.norms, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.linear.weight.grad[0], (norms / norms.mean() * each.T).mean(1), rtol=1e-5, atol=1e-6)


def test_a_batch_s_gradients_at_hand_until_they_are_added():
    model, batch = perceptron(), points()
    model[0].bias.requires_grad_(False)
    exact = gradients_of_the_whole_batch(model, residual, batch)
    found = sample_gradients(model, residual, batch, parameters="0.*", loss_scale=8.0)
    torch.testing.assert_close(found.losses, residual(model, batch).detach(), rtol=1e-6, atol=0)
    of_first = gradients_of_the_whole_batch(model, residual, batch, {"0.weight"})
    torch.testing.assert_close(found.norms, of_first.norm(dim=1), rtol=1e-5, atol=0)
    assert all(p.grad is None for p in model.parameters()) and not found.norms.requires_grad
    weights = torch.tensor([2.0, 0, 1, -1, 0.5, 3])
    found.add(weights)
    assert off(gradient_in(model), 8 * weights @ exact) < 1e-5 and model[0].bias.grad is None
    before = gradient_in(model).clone()
    with pytest.raises(ValueError, match="already added and let go; run sample_gradients again"):
        found.add(weights)
    assert torch.equal(gradient_in(model), before)


# --- as people train --------------------------------------------------------------------------------------------------------------------


def exact_gradients(model, loss, batches) -> torch.Tensor:
    """(N, P) gradients of all samples of several batches, one forward pass each: with the random numbers that a loop would draw."""
    return torch.cat([gradients_of_the_whole_batch(model, loss, batch) for batch in batches])


def double_pair(architecture: str, *, dropout: float = 0.1, count: int = 7):
    """A pair model in float64 and train mode, and a batch of its samples."""
    pair, batch = pair_batch(architecture, count)
    model = tiny_pair(architecture, dropout=dropout).model.double().train()
    return model, in_dtype(batch, torch.float64)


def cut(batch: dict, sizes) -> list[dict]:
    """Micro-batches of these sizes, together the batch."""
    ends = np.cumsum(sizes)
    return [{name: value[end - size : end] for name, value in batch.items()} for size, end in zip(sizes, ends, strict=True)]


ACCUMULATED = WEIGHTINGS | {
    "inverse root": Weighting(exponent=-0.5),
    "uniform": Weighting(exponent=0),
    "inverse root, clip": Weighting(exponent=-0.5, clip=1.2),
    "uniform over a quantile": Weighting(exponent=0, threshold=0.4, threshold_on="quantile"),
    "inverse root over a quantile": Weighting(exponent=-0.5, threshold=0.4, threshold_on="quantile"),
}


@pytest.mark.parametrize("weighting", ACCUMULATED.values(), ids=ACCUMULATED)
@pytest.mark.parametrize("sizes", [(7,), (3, 2, 2), (1, 6)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_train_mode_and_accumulation_are_a_plain_loop_s(architecture, sizes, weighting):
    """Dropout on: norms and gradients are those of plain passes under the same seed, weighted over all micro-batches together."""
    model, batch = double_pair(architecture)
    batches = cut(batch, sizes)
    torch.manual_seed(5)
    exact = exact_gradients(model, cross_entropy, batches)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    step = weighted_backward(model, cross_entropy, batches, weighting, progress=0.5)
    assert torch.equal(torch.get_rng_state(), after)  # the noise goes on; no mask comes twice
    norms = exact.norm(dim=1)
    weights = weighting(norms, progress=0.5)
    torch.testing.assert_close(step.norms, norms, rtol=1e-10, atol=0)
    torch.testing.assert_close(step.weights, weights, rtol=1e-10, atol=0)
    assert off(gradient_in(model), weights @ exact / 7) < 1e-10
    assert off(exact_gradients(model.eval(), cross_entropy, batches), exact) > 0.01  # dropout did something


def test_micro_batches_are_one_batch_and_add_to_the_gradient_there():
    model, batch = double_pair("two_tower", dropout=0)
    for weighting in ACCUMULATED.values():
        model.zero_grad()
        whole = weighted_backward(model, cross_entropy, batch, weighting, progress=0.5)
        once = gradient_in(model).clone()
        parts = weighted_backward(model, cross_entropy, cut(batch, (4, 1, 2)), weighting, progress=0.5)
        assert off(gradient_in(model), 2 * once) < 1e-10
        for found, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_a_micro_batch_without_any_gradient_counts_as_samples_of_weight_zero():
    model, batch = perceptron().double(), points(7, dtype=torch.float64)
    batch["size"] = torch.tensor([0.0, 0, 0, 1, 2, 3, 4]).double()
    loss = lambda model, batch: batch["size"] * residual(model, batch)  # noqa: E731
    for weighting in (Weighting(), Weighting(clip=1.5)):
        model.zero_grad()
        weighted_backward(model, loss, batch, weighting)
        whole = gradient_in(model).clone()
        model.zero_grad()
        step = weighted_backward(model, loss, cut(batch, (3, 4)), weighting)
        assert off(gradient_in(model), whole) < 1e-10 and (step.weights[:3] == 0).all()


@pytest.mark.parametrize("weighting", [Weighting(), Weighting(clip=1.5)], ids=["one pass", "two passes"])
@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize(("loss", "change", "message"), [(residual, nan_label, "NaN"), (lambda m, b: residual(m, b).mean(), dict, "shape")])
def test_an_error_in_the_second_micro_batch_leaves_the_gradient_as_it_was(loss, change, message, there_before, weighting):
    model, (first, second) = perceptron(), cut(points(), (4, 2))
    if there_before:
        residual(model, first).sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    of_each = lambda model, batch: (residual if batch is first else loss)(model, batch)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        weighted_backward(model, of_each, [first, change(second)], weighting)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert (parameter.grad is None and gradient is None) or torch.equal(parameter.grad, gradient)


def test_a_batch_that_is_a_pair_is_refused():
    """(x, y), as a TensorDataset gives it: a list of micro-batches it is not."""
    for action in (gradient_norms, lambda *given: weighted_backward(*given, Weighting())):
        with pytest.raises((ValueError, TypeError), match="dict"):
            action(perceptron(), residual, tuple(points().values()))


def test_no_micro_batches_are_refused():
    with pytest.raises(ValueError, match="expected a batch or a list of micro-batches, got an empty list"):
        weighted_backward(perceptron(), residual, [], Weighting())


def test_a_batch_as_a_tokenizer_returns_it_is_a_batch():
    from transformers import BatchEncoding

    model, batch = perceptron(), points()
    norms = weighted_backward(model, residual, batch, Weighting()).norms
    once = gradient_in(model).clone()
    for given in (BatchEncoding(batch), [BatchEncoding(part) for part in cut(batch, (4, 2))]):
        assert torch.allclose(weighted_backward(model, residual, given, Weighting()).norms, norms, rtol=1e-5)
    assert off(gradient_in(model), 3 * once) < 1e-5
    assert torch.equal(gradient_norms(model, residual, BatchEncoding(batch)), norms)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_train_mode_without_dropout_is_eval_mode_and_the_mode_stays(architecture):
    model, batch = double_pair(architecture, dropout=0)
    modes = [module.training for module in model.modules()]
    training = gradient_norms(model, cross_entropy, batch)
    assert [module.training for module in model.modules()] == modes and all(modes)
    torch.testing.assert_close(training, gradient_norms(model.eval(), cross_entropy, batch), rtol=1e-10, atol=0)
    assert not any(module.training for module in model.modules())


def test_several_losses_summed():
    model, batch = double_pair("cross_encoder", dropout=0)
    both = lambda model, batch: 0.7 * cross_entropy(model, batch) + 0.3 * squared_error(model, batch)  # noqa: E731
    apart = [gradients_of_the_whole_batch(model, loss, batch) for loss in (cross_entropy, squared_error)]
    exact = 0.7 * apart[0] + 0.3 * apart[1]
    step = weighted_backward(model, both, batch, Weighting())
    torch.testing.assert_close(step.norms, exact.norm(dim=1), rtol=1e-10, atol=0)
    assert off(gradient_in(model), step.weights @ exact / 7) < 1e-10


def test_gradient_clipping_comes_after():
    model, batch = double_pair("two_tower", dropout=0)
    step = weighted_backward(model, cross_entropy, batch, Weighting())
    expected = step.weights @ gradients_of_the_whole_batch(model, cross_entropy, batch) / 7
    size = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    torch.testing.assert_close(size, expected.norm(), rtol=1e-10, atol=0)
    assert off(gradient_in(model), 0.01 * expected / expected.norm()) < 1e-4


# rescue of norms that float32 cannot square, with dropout and with weights


@pytest.mark.parametrize("sizes", [(6,), (2, 4)], ids=str)
@pytest.mark.parametrize("weighting", [Weighting(), Weighting(clip=1.5)], ids=["article", "clip"])
@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e25, 1e30])
def test_tiny_and_large_gradients_in_training(scale, weighting, sizes):
    """One more pass for norms outside float32's squares draws the same dropout masks, and the noise goes on as after one pass."""
    model, batch = perceptron(dropout=0.5).train(), points()
    times = lambda factor: lambda model, batch: factor * residual(model, batch)  # noqa: E731
    torch.manual_seed(2)
    exact = exact_gradients(model, residual, cut(batch, sizes)).double()
    after = torch.get_rng_state()
    torch.manual_seed(2)
    step = weighted_backward(model, times(scale), cut(batch, sizes), weighting)
    assert torch.equal(torch.get_rng_state(), after)
    norms = exact.norm(dim=1)
    torch.testing.assert_close(step.norms.double() / scale, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(step.weights.double(), weighting(norms), rtol=1e-5, atol=0)
    assert off(gradient_in(model).double() / scale, weighting(norms) @ exact / 6) < 1e-5


def test_samples_of_very_different_size_in_one_batch():
    linear, batch = torch.nn.Linear(3, 1, bias=False), points()
    batch["size"] = torch.tensor([1e-30, 1e-12, 1.0, 1e12, 1e25, 1e30])
    loss = lambda model, batch: batch["size"] * model(batch["x"])[:, 0]  # noqa: E731
    step = weighted_backward(linear, loss, batch, Weighting(exponent=-0.5))
    each = batch["size"].double()[:, None] * batch["x"].double()
    weights = Weighting(exponent=-0.5)(each.norm(dim=1))
    torch.testing.assert_close(step.norms.double(), each.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(step.weights.double(), weights, rtol=1e-5, atol=0)
    assert off(linear.weight.grad[0], weights @ each / 6) < 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e25])
def test_inputs_that_float32_cannot_square(scale):
    """The loss's slope is 1 here, so that no scaling of the loss could help."""
    model, batch = torch.nn.Linear(3, 1, bias=False), points()
    batch["x"] *= scale
    norms = gradient_norms(model, lambda model, batch: model(batch["x"])[:, 0], batch)
    torch.testing.assert_close(norms.double(), batch["x"].double().norm(dim=1), rtol=1e-5, atol=0)


# lower precision


def lowered(loss, dtype):
    """The loss under autocast."""

    def inner(model, batch):
        with torch.autocast("cpu", dtype=dtype):
            return loss(model, batch)

    return inner


@pytest.mark.parametrize("sizes", [(7,), (3, 4)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_autocast(architecture, sizes):
    pair, batch = pair_batch(architecture, 7)
    model, loss, batches = pair.model, lowered(cross_entropy, torch.bfloat16), cut(batch, sizes)
    wide = gradient_norms(model, cross_entropy, batch)
    step = weighted_backward(model, loss, batches, Weighting(clip=2))
    assert off(step.norms, wide) < 0.02 and step.norms.dtype == torch.float32
    found = gradient_in(model).clone()
    model.zero_grad()
    (step.weights * loss(model, batch)).mean().backward()
    assert off(found, gradient_in(model)) < 0.01
    assert not torch.equal(step.norms, wide)  # it did run in bfloat16


def test_bfloat16_autocast_is_no_less_exact_than_plain_autograd():
    """Against float32: the engine's own rounding adds nothing to that of the passes."""
    pair, batch = pair_batch("cross_encoder", 7)
    model, loss = pair.model, lowered(cross_entropy, torch.bfloat16)
    wide = gradients_of_the_whole_batch(model, cross_entropy, batch).norm(dim=1)
    plain = gradients_of_the_whole_batch(model, loss, batch).norm(dim=1)
    found = gradient_norms(model, loss, batch)
    assert off(found, wide) < 1.5 * off(plain, wide) + 1e-3


def test_autocast_around_the_call_changes_no_norm():
    pair, batch = pair_batch("cross_encoder", 7)
    model = pair.model
    inside = weighted_backward(model, lowered(cross_entropy, torch.bfloat16), batch, Weighting())
    expected = gradient_in(model).clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = weighted_backward(model, cross_entropy, batch, Weighting())
    torch.testing.assert_close(around.norms, inside.norms, rtol=1e-5, atol=0)
    assert off(gradient_in(model), expected) < 0.01


@pytest.mark.parametrize("sizes", [(6,), (4, 2)], ids=str)
@pytest.mark.parametrize("weighting", [Weighting(), Weighting(clip=1.5)], ids=["article", "clip"])
def test_fp16_with_loss_scaling(weighting, sizes):
    """The step is that of float32 up to fp16's rounding; norms and losses are not scaled."""
    model, batch = perceptron(), points()
    exact = gradients_of_the_whole_batch(model, residual, batch)
    weights = weighting(exact.norm(dim=1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step = weighted_backward(model, lowered(residual, torch.float16), cut(batch, sizes), weighting, scaler=scaler)
    torch.testing.assert_close(step.norms, exact.norm(dim=1), rtol=0.01, atol=0)
    torch.testing.assert_close(step.losses, residual(model, batch).detach(), rtol=0.02, atol=0.01)
    torch.testing.assert_close(step.weights, weights, rtol=0.02, atol=0)
    assert off(gradient_in(model), 2.0**10 * weights @ exact / 6) < 0.01
    scaler.step(optimizer)
    scaler.update()
    moved = torch.cat([(before[name] - p.detach()).flatten() for name, p in model.named_parameters()])
    assert off(moved, weights @ exact / 6) < 0.01 and scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("sizes", [(6,), (4, 2)], ids=str)
@pytest.mark.parametrize("weighting", [Weighting(), Weighting(clip=1.5)], ids=["article", "clip"])
@pytest.mark.parametrize("where", ["at the loss", "in the second micro-batch", "below the head"])
def test_an_fp16_overflow_is_skipped_and_lowers_the_scale(where, weighting, sizes):
    model, batch = perceptron(), points()
    if where == "below the head":
        with torch.no_grad():
            model[3].weight.copy_(torch.linspace(300, 400, 8))
            batch["y"] += model(batch["x"])[:, 0]  # keeps the error, and so the gradient at the head, at about 1
    elif where == "at the loss":
        batch["y"] += 1000
    else:
        batch["y"][-1] += 1000
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    weighted_backward(model, lowered(residual, torch.float16), cut(batch, sizes), weighting, scaler=scaler)
    assert not torch.isfinite(gradient_in(model)).all()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, there) for p, there in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**9


def test_a_scaler_that_is_switched_off_hides_no_nan():
    """As scripts write it for all precisions: GradScaler(enabled=precision == "fp16")."""
    model, batch = perceptron(), points()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    plain, step = (weighted_backward(model, residual, batch, Weighting(), **options) for options in ({}, {"scaler": scaler}))
    assert all(torch.equal(*values) for values in zip(plain, step, strict=True))
    with pytest.raises(ValueError, match="norms are NaN or infinite"):
        weighted_backward(model, residual, nan_label(batch), Weighting(), scaler=scaler)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_in_bfloat16(architecture):
    """Weights themselves in bfloat16: as exact as autograd's own gradients there."""
    pair, batch = pair_batch(architecture, 7)
    wide = gradients_of_the_whole_batch(pair.model, cross_entropy, batch).norm(dim=1)
    model = pair.model.bfloat16()
    plain = gradients_of_the_whole_batch(model, cross_entropy, batch).float()
    step = weighted_backward(model, cross_entropy, batch, Weighting())
    assert step.norms.dtype == torch.float32 and {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert off(step.norms, wide) < 1.5 * off(plain.norm(dim=1), wide) + 1e-3
    assert off(gradient_in(model), step.weights @ plain / 7) < 0.02


# checkpointing and compilation


def checkpointed(architecture: str, **options):
    model, batch = double_pair(architecture)
    body = model.encoder if architecture == "two_tower" else model.classifier
    body.gradient_checkpointing_enable(options)
    return model, batch


@pytest.mark.parametrize("sizes", [(7,), (3, 4)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_changes_no_number(architecture, sizes):
    (plain, batch), (model, _) = double_pair(architecture), checkpointed(architecture, use_reentrant=False)
    steps = []
    for each in (plain, model):
        torch.manual_seed(4)
        steps.append(weighted_backward(each, cross_entropy, cut(batch, sizes), Weighting(clip=1.5)))
    for found, expected in zip(steps[1], steps[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert off(gradient_in(model), gradient_in(plain)) < 1e-12


def test_checkpointing_and_autocast_together():
    _, batch = pair_batch("cross_encoder")
    norms = []
    for _ in range(2):
        model = tiny_pair("cross_encoder").model.train()
        if norms:
            model.classifier.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)
        step = weighted_backward(model, lowered(cross_entropy, torch.bfloat16), batch, Weighting())
        norms.append(step.norms)
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("parameters", ["*", "*.layer.1.*", ["*.layer.1.*", "classifier.classifier.*"]], ids=str)
def test_reentrant_checkpointing_is_refused(parameters):
    model, batch = checkpointed("cross_encoder", use_reentrant=True)
    with pytest.raises(ValueError, match="reentrant gradient checkpointing .*'use_reentrant': False"):
        gradient_norms(model, cross_entropy, batch, parameters=parameters)


def test_reentrant_checkpointing_of_adapters_is_refused():
    """The embeddings are frozen, so nothing below the checkpoints is recorded that could complain."""
    model, batch = checkpointed("cross_encoder", use_reentrant=True)
    model.classifier.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.1" in name or name.startswith("classifier.classifier"))
    for action in (gradient_norms, lambda *given: weighted_backward(*given, Weighting())):
        with pytest.raises(ValueError, match="reentrant gradient checkpointing"):
            action(model, cross_entropy, batch)


def test_compiled_models():
    model, batch = perceptron(), points()
    expected = gradient_norms(model, residual, batch)
    compiled = torch.compile(model, backend="eager")
    for action in (gradient_norms, lambda *given: weighted_backward(*given, Weighting())):
        with pytest.raises(ValueError, match="compiled model hides its modules; pass model._orig_mod"):
            action(compiled, residual, batch)
    assert torch.equal(gradient_norms(compiled._orig_mod, residual, batch), expected)
    weighted_backward(compiled._orig_mod, residual, batch, Weighting())
    assert all(p.grad is not None for p in compiled.parameters())


def test_a_model_compiled_in_place():
    """model.compile() leaves no wrapper to see: the right norms all the same."""
    model, batch = perceptron(), points()
    expected = gradient_norms(model, residual, batch)
    model.compile(backend="eager")
    model(batch["x"])
    torch.testing.assert_close(gradient_norms(model, residual, batch), expected, rtol=1e-5, atol=0)


def test_a_part_that_is_compiled_is_refused_by_name():
    model, batch = perceptron(), points()
    model[0] = torch.compile(model[0], backend="eager")
    with pytest.raises(ValueError, match=r"compiled.*'0'|'0'.*compiled"):
        gradient_norms(model, residual, batch)


# --- what the engine cannot tell apart ---------------------------------------------------------------------------------------------------


def total(model, batch):
    """Sum of the squared outputs, per sample."""
    return model(batch["x"]).flatten(1).square().sum(1)


def linear(out: int = 4) -> torch.nn.Module:
    return torch.nn.Linear(4, out)


def table(**options) -> torch.nn.Module:
    return torch.nn.Embedding(9, 4, **options)


def vectors(length: int = 5, count: int = 3) -> dict:
    return {"x": torch.randn(count, length, 4, generator=torch.Generator().manual_seed(0))}


def words(length: int = 5, count: int = 3) -> dict:
    return {"x": torch.randint(1, 9, (count, length), generator=torch.Generator().manual_seed(0))}


class Dropped(torch.nn.Module):
    """A raw parameter with dropout."""

    def __init__(self):
        super().__init__()
        self.scale, self.dropout = torch.nn.Parameter(torch.ones(4)), torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(x * self.scale)


OUTSIDE = "is used outside the forward"
REFUSED = {
    "a weight used by einsum": (
        lambda: Through(lambda m, x: torch.einsum("btd,vd->btv", m.table(x), m.table.weight), table=table()),
        words(),
        OUTSIDE + r"[\s\S]*Following its operations did not help: parameter 'table.weight' is used .* by the torch function 'einsum'",
    ),
    "a weight used by a convolution": (
        lambda: Through(lambda m, x: torch.nn.functional.conv1d(m.linear(x).mT, m.linear.weight[..., None]), linear=linear()),
        vectors(),
        OUTSIDE + r"[\s\S]*'conv1d'",
    ),
    "samples and positions in one dimension": (
        lambda: Through(lambda m, x: m.head(m.linear(x).flatten(0, 1)).unflatten(0, x.shape[:2]), linear=linear(), head=linear()),
        vectors(),
        r"module 'head' \(Linear\) returned a tensor of shape \(15, 4\) in a batch of 3 samples; expected the samples as first",
    ),
    "positions first": (
        lambda: Through(lambda m, x: m.head(m.linear(x).transpose(0, 1)).transpose(0, 1), linear=linear(), head=linear()),
        vectors(),
        r"module 'head' \(Linear\) returned a tensor of shape \(5, 3, 4\) in a batch of 3 samples",
    ),
    "a vector for all, as long as the batch": (
        lambda: Through(lambda m, x: x[..., :3] * m.linear(torch.ones(4)), linear=linear(3)),
        vectors(),
        r"module 'linear' \(Linear\).* shape",
    ),
    "a sparse table": (lambda: Through(lambda m, x: m.table(x), table=table(sparse=True)), words(), r"'table' \(Embedding\).*sparse"),
    "a table scaled by frequency": (
        lambda: Through(lambda m, x: m.table(x), table=table(scale_grad_by_freq=True)),
        words(),
        r"'table' \(Embedding\).*scale_grad_by_freq",
    ),
    "a table renormalised": (
        lambda: Through(lambda m, x: m.table(x), table=table(max_norm=1.0)),
        words(),
        r"'table' \(Embedding\).*max_norm",
    ),
    "batch normalisation": (
        lambda: Through(lambda m, x: m.norm(m.linear(x[:, 0])), linear=linear(), norm=torch.nn.BatchNorm1d(4)),
        vectors(),
        "BatchNorm1d takes the batch's own mean and variance",
    ),
    "batch normalisation, sample by sample": (
        lambda: Through(lambda m, x: m.norm(m.linear(x).mT).mT, linear=linear(), norm=torch.nn.BatchNorm1d(4)),
        vectors(),
        "BatchNorm1d takes the batch's own mean and variance",
    ),
    "dropout, sample by sample, of small numbers": (
        lambda: Through(lambda m, x: 1e6 * m.small(1e-6 * x), small=Dropped()),
        vectors(),
        r"module 'small' \(Dropped\) gives another result for sample \d alone than in its batch",
    ),
    "dropout, sample by sample": (
        lambda: Through(
            lambda m, x: m.linear(m.attention(x, x, x)[0]),
            linear=linear(),
            attention=torch.nn.MultiheadAttention(4, 2, 0.5, batch_first=True),
        ),
        vectors(),
        r"module 'attention' \(MultiheadAttention\) gives another result for sample \d alone than in its batch",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_apart_is_refused(case):
    torch.manual_seed(0)
    build, batch, message = REFUSED[case]
    model = build().train()
    by_sample = ["norm", "attention", "small"] if "sample by sample" in case else ()
    for action in (gradient_norms, lambda *given, **options: weighted_backward(*given, Weighting(), **options)):
        with pytest.raises(ValueError, match=message):
            action(model, total, batch, by_sample=by_sample)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def positioned(forward):
    """A layer over inputs and position embeddings; forward: (module, inputs, embeddings of given places) -> outputs."""
    return Through(forward, table=table(), linear=linear())


def up_to(x) -> torch.Tensor:
    """Positions (T,) of inputs (B, T, d)."""
    return torch.arange(x.shape[1])


def distances(x) -> torch.Tensor:
    """How far apart two positions are, (T, T), of inputs (B, T, d)."""
    return (up_to(x)[:, None] - up_to(x)[None]).abs()


UNLIKELY = {
    "positions given a batch dimension afterwards": (lambda: positioned(lambda m, x: m.linear(x + m.table(up_to(x))[None])), vectors()),
    "the first token of such": (lambda: positioned(lambda m, x: m.linear((x + m.table(up_to(x))[None])[:, 0])), vectors()),
    "positions whose batch dimension is taken away": (lambda: positioned(lambda m, x: m.linear(x + m.table(up_to(x)[None])[0])), vectors()),
    "one place for as many positions as samples": (lambda: positioned(lambda m, x: m.linear(x + m.table(up_to(x) * 0 + 4))), vectors(3)),
    "positions backwards, as many as samples": (lambda: positioned(lambda m, x: m.linear(x + m.table(up_to(x).flip(0)))), vectors(3)),
    "the first row of scaled positions": (lambda: positioned(lambda m, x: m.linear(x + (m.table(up_to(x)[None]) / 2)[0])), vectors()),
    "scaled positions given a batch dimension": (lambda: positioned(lambda m, x: m.linear(x + (m.table(up_to(x)) / 2)[None])), vectors()),
    "scaled positions, as many as samples": (lambda: positioned(lambda m, x: m.linear(x + m.table(up_to(x)) / 2)), vectors(3)),
    "normalised positions, as many as samples": (
        lambda: Through(lambda m, x: m.linear(x + m.norm(m.table(up_to(x)))), table=table(), linear=linear(), norm=torch.nn.LayerNorm(4)),
        vectors(3),
    ),
    "one table for tokens and for positions whose first row is taken": (
        lambda: positioned(lambda m, x: m.linear(m.table(up_to(x)[None])[0] + m.table(x))),
        words(),
    ),
    "biases of distances, as many positions as samples": (
        lambda: positioned(lambda m, x: m.linear((x @ x.mT + m.table(distances(x))[..., 0]).softmax(-1) @ x)),
        vectors(3),
    ),
    "biases of distances with the heads in front, as many positions as samples": (
        lambda: positioned(
            lambda m, x: m.linear((((x @ x.mT)[:, None] + m.table(distances(x)).permute(2, 0, 1)[None]).softmax(-1) @ x[:, None]).sum(1))
        ),
        vectors(3),
    ),
    "an output changed in place": (lambda: Through(lambda m, x: m.linear(x).mul_(2), linear=linear()), vectors()),
    "a table's output changed in place": (lambda: positioned(lambda m, x: m.linear(m.table(x).add_(1))), words()),
    "activation in place": (
        lambda: Through(lambda m, x: m.relu(m.linear(x)), linear=linear(), relu=torch.nn.ReLU(inplace=True)),
        vectors(),
    ),
}


@pytest.mark.parametrize("case", UNLIKELY)
def test_never_a_wrong_number(case):
    """The right norms or an error, whichever it is; each sample alone is the judge."""
    torch.manual_seed(0)
    build, batch = UNLIKELY[case]
    model = build().double()
    batch = in_dtype(batch, torch.float64)
    expected = gradients_of_the_whole_batch(model, total, batch).norm(dim=1)
    try:
        found = gradient_norms(model, total, batch)
    except (ValueError, RuntimeError):
        return
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (lambda e, x: {"scale": Whole((e * x).sum((1, 2)))}, r"'scale' of shape"),
        (lambda e, x: {"scale": (e * x).sum(1)}, r"'scale'.*(Outer|Rows|Whole)"),
        (lambda e, x: (e * x).sum(1), r"rule"),
        (lambda e, x: {"shift": Whole(e.sum(1))}, r"the rule for module 'own' \(Own\) gave no term for its parameter 'scale'"),
    ],
    ids=["another shape", "no term", "no dictionary", "another name"],
)
def test_a_wrong_rule_is_named(terms, message):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.scale

    rule(Own)(lambda module, inputs, e: terms(e, inputs[0]))
    try:
        with pytest.raises(ValueError, match=message):
            gradient_norms(Through(lambda m, x: m.own(x), own=Own()), total, vectors())
    finally:
        RULES.pop(f"{Own.__module__}.{Own.__qualname__}")


def test_by_sample_leaves_parameters_out_of_the_loss_s_reach_without_gradient():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.used, self.unused.expand(len(x), 4)

    model = Through(lambda m, x: m.two(x)[0], two=Two())
    weighted_backward(model, total, vectors(), Weighting(), by_sample="two")
    assert model.two.used.grad is not None and model.two.unused.grad is None


class Costly(torch.autograd.Function):
    """The identity; its backward pass counts itself."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, e):
        Costly.passes += 1
        return e


def test_mistakes_that_torch_words_badly_are_said_plainly():
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode.* call this outside it"):
        gradient_norms(perceptron(), residual, points())
    with pytest.raises(ValueError, match="the batch is empty"):
        weighted_backward(perceptron(), residual, points(0), Weighting())
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 1))
    with pytest.raises(ValueError, match="changed in place.*inplace=False"):
        gradient_norms(model, residual, points())
    assert not any(module._forward_hooks for module in model)


@pytest.mark.parametrize("kernels", ["onednn", "torch"])
def test_nothing_is_computed_below_the_lowest_chosen_parameter(kernels, monkeypatch):
    monkeypatch.setattr(gradients.kernels, "KERNELS", kernels)
    model = Through(lambda m, x: m.head(Costly.apply(m.body(m.table(x)))), table=table(), body=linear(), head=linear())
    Costly.passes = 0
    gradient_norms(model, total, words(), parameters="head.*", check=False)
    assert Costly.passes == 0
    gradient_norms(model, total, words(), parameters="table.*", check=False)
    assert Costly.passes == 1


@pytest.mark.parametrize("kernels", ["onednn", "torch"])
def test_hooks_of_others_that_change_inputs_outputs_and_gradients_count(kernels, monkeypatch):
    monkeypatch.setattr(gradients.kernels, "KERNELS", kernels)
    model, batch = perceptron(), points()
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    model[0].register_forward_hook(lambda module, inputs, output: output * 3)
    model[3].register_full_backward_hook(lambda module, through, outputs: (through[0] * 5,))
    expected = gradients_of_the_whole_batch(model, residual, batch)
    torch.testing.assert_close(gradient_norms(model, residual, batch), expected.norm(dim=1), rtol=1e-5, atol=0)
    step = weighted_backward(model, residual, batch, Weighting())
    assert off(gradient_in(model), step.weights @ expected / 6) < 1e-5


def test_hooks_of_others_stay_and_the_engine_s_go():
    model, batch = perceptron(), points()
    seen = []
    model[0].register_forward_hook(lambda *given: seen.append(len(given)))
    weighted_backward(model, residual, batch, Weighting(), check=False)
    assert seen == [3] and len(model[0]._forward_hooks) == 1
    assert not any(module._forward_hooks for module in list(model)[1:])


# --- on a GPU ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_on_a_gpu_are_those_of_the_cpu(architecture):
    pair, batch = pair_batch(architecture)
    on_gpu = tiny_pair(architecture, device="cuda").model
    moved = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    expected = gradient_norms(pair.model, cross_entropy, batch)
    torch.testing.assert_close(gradient_norms(on_gpu, cross_entropy, moved).cpu(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_dropout_on_a_gpu_is_the_same_in_the_norm_and_in_the_gradient():
    torch.manual_seed(0)
    model = Remembering().cuda().train()
    batch = {"x": torch.randn(5, 16, device="cuda"), "y": torch.randn(5, device="cuda")}
    weighted_backward(model, residual, batch, Weighting())
    x = batch["x"] * model.masks[0]
    each = 2 * (x @ model.linear.weight[0] - batch["y"]).detach()[:, None] * x
    norms = each.norm(dim=1)
    torch.testing.assert_close(model.linear.weight.grad[0], (norms / norms.mean() * each.T).mean(1), rtol=1e-4, atol=1e-5)
