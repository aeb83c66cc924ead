"""Per-sample losses against their closed forms and their derivatives."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_frame, tiny_pair

from recsys_importance.models import PairCollator, PairDataset
from recsys_importance.objectives import LOSSES, Objectives, click, cross_entropy, display, relevance, squared_error

LABELS = [0.0, 1 / 3, 0.5, 2 / 3, 1.0]


class Given(torch.nn.Module):
    """A 'model' whose logits are its parameters."""

    def __init__(self, logits, dtype=torch.float64):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits, dtype=dtype))

    def forward(self, input_ids):
        return self.logits


def batch_of(labels, dtype=torch.float64) -> dict:
    return {"input_ids": torch.zeros(len(labels), 1, dtype=torch.long), "labels": torch.tensor(labels, dtype=dtype)}


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def closed_form(name: str, z: float, y: float) -> tuple[float, float]:
    """(loss, its derivative by the logit)."""
    p = sigmoid(z)
    if name == "cross_entropy":
        return max(z, 0) - z * y + math.log1p(math.exp(-abs(z))), p - y
    return (y - p) ** 2, 2 * (p - y) * p * (1 - p)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", LABELS)
def test_values_and_slopes_are_the_closed_forms(name, label):
    logits = [-30.0, -8.0, -1.5, -0.1, 0.0, 0.3, 2.0, 9.0, 30.0]
    model = Given(logits)
    losses = LOSSES[name](model, batch_of([label] * len(logits)))
    (slopes,) = torch.autograd.grad(losses.sum(), model.logits)
    values, derivatives = zip(*(closed_form(name, z, label) for z in logits), strict=True)
    assert losses.shape == (len(logits),)
    np.testing.assert_allclose(losses.detach(), values, rtol=1e-10, atol=1e-14)  # of a logit of 30, 1e-14 is rounding
    np.testing.assert_allclose(slopes, derivatives, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_depends_on_its_own_logit_only(name):
    model = Given([0.2, -1.0, 3.0])
    losses = LOSSES[name](model, batch_of([1.0, 0.0, 1 / 3]))
    jacobian = torch.stack([torch.autograd.grad(loss, model.logits, retain_graph=True)[0] for loss in losses])
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal())) and (jacobian.diagonal() != 0).all()


@pytest.mark.parametrize("label", LABELS)
def test_a_soft_label_is_least_costly_at_its_own_probability(label):
    grid = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    logits = torch.log(grid / (1 - grid)).tolist()
    for name, loss in LOSSES.items():
        best = float(grid[loss(Given(logits), batch_of([label] * len(logits))).argmin()])
        assert abs(best - min(max(label, 0.001), 0.999)) <= 0.001, name


def test_a_soft_label_costs_the_mixture_of_its_two_ends():
    model, label = Given([-2.0, 0.5, 4.0]), 0.3
    soft, one, zero = (cross_entropy(model, batch_of([value] * 3)) for value in (label, 1.0, 0.0))
    torch.testing.assert_close(soft, label * one + (1 - label) * zero)


def test_confidently_wrong_pulls_hard_or_not_at_all():
    model = Given([-20.0])
    (cross,) = torch.autograd.grad(cross_entropy(model, batch_of([1.0])).sum(), model.logits)
    (square,) = torch.autograd.grad(squared_error(model, batch_of([1.0])).sum(), model.logits)
    assert abs(cross) > 0.999 and abs(square) < 1e-8


@pytest.mark.parametrize("logit", [-1e4, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name, logit):
    model = Given([logit], dtype=torch.float32)
    loss = LOSSES[name](model, batch_of([1.0], dtype=torch.float32))
    (slope,) = torch.autograd.grad(loss.sum(), model.logits)
    assert torch.isfinite(loss).all() and torch.isfinite(slope).all()
    assert loss.item() == pytest.approx({("cross_entropy", -1e4): 1e4, ("squared_error", -1e4): 1}.get((name, logit), 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_widened_before_the_loss(name, dtype):
    model = Given([3.0, -7.0], dtype=dtype)
    losses = LOSSES[name](model, batch_of([1.0, 1 / 3], dtype=torch.float32))
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.detach(), [closed_form(name, 3.0, 1.0)[0], closed_form(name, -7.0, 1 / 3)[0]], rtol=1e-5)


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_losses_of_a_real_batch(architecture):
    pair, frame = tiny_pair(architecture), tiny_frame(5)
    frame["label"] = LABELS
    batch = PairCollator(pair)([PairDataset(frame)[i] for i in range(5)])
    with torch.no_grad():
        logits = pair.model(**{name: value for name, value in batch.items() if name not in ("labels", "sample_id")})
        for name, loss in LOSSES.items():
            expected = [closed_form(name, float(z), y)[0] for z, y in zip(logits, LABELS, strict=True)]
            np.testing.assert_allclose(loss(pair.model, batch), expected, rtol=1e-5, atol=1e-7)


def test_losses_by_name():
    assert LOSSES["cross_entropy"] is cross_entropy and LOSSES["squared_error"] is squared_error


# --- objectives -------------------------------------------------------------------------------------------------------------------------


class GivenTasks(Given):
    """Given logits (B, K), one column a task."""

    tasks = ("relevance", "click", "display")


def test_a_matrix_of_three_objectives_from_one_forward_pass():
    model = GivenTasks([[0.5, -1.0, 2.0], [1.5, 0.0, -3.0]])
    batch = batch_of([1.0, 0.25]) | {
        "clicked": torch.tensor([math.nan, 1.0], dtype=torch.float64),
        "display_weight": torch.tensor([0.5, 3.0], dtype=torch.float64),
    }
    objectives = Objectives(relevance(weight=2.0), click(weight=0.5), display(weight=0.1))
    found = objectives.matrix(model, batch)
    expected = [[closed_form("cross_entropy", 0.5, 1.0)[0], 0, 0],
                [closed_form("cross_entropy", 1.5, 0.25)[0], math.log(2), 3 * closed_form("cross_entropy", -3.0, 1.0)[0]]]  # fmt: skip
    assert found.present.tolist() == [[True, False, False], [True, True, True]]
    np.testing.assert_allclose(found.losses.detach(), expected, rtol=1e-12)
    np.testing.assert_allclose(objectives(model, batch).detach(), np.array(expected) @ [2.0, 0.5, 0.1], rtol=1e-12)
    np.testing.assert_allclose(objectives.only("click")(model, batch).detach(), [0, math.log(2)], rtol=1e-12)
    assert (objectives.names, objectives.weights) == (("relevance", "click", "display"), (2.0, 0.5, 0.1))
    assert objectives.columns == ("clicked", "display_weight")
