"""What is the loop's own; what it shares with the engine is in test_both_ways."""

import numpy as np
import pytest
import torch
from tiny import perceptron, points, residual, tiny_pair
from twins import ARCHITECTURES, Remembering, pair_batch

from recsys_importance.importance import Weighting
from recsys_importance.objectives import cross_entropy
from recsys_importance.reference import gradient_norms_by_loop, weighted_backward_by_loop


def test_a_million_squares_are_added_up_exactly():
    """The gradient is 0.3 in each of 1,200,000 entries; added up in float32, the norm would be wrong in its fourth digit."""
    model = torch.nn.Linear(1, 1_200_000, bias=False)
    norms = gradient_norms_by_loop(model, lambda model, batch: model(batch["x"]).sum(1), {"x": torch.full((1, 1), 0.3)})
    torch.testing.assert_close(
        norms.double(), torch.tensor([float(np.float32(0.3)) * 1_200_000**0.5], dtype=torch.float64), rtol=6e-8, atol=0
    )


@pytest.mark.parametrize(
    ("reduce", "shape"),
    [(lambda losses: losses.mean(), r"\(\)"), (lambda losses: losses[:, None], r"\(1, 1\)"), (lambda losses: losses.repeat(2), r"\(2,\)")],
)
def test_a_loss_that_is_not_per_sample_is_refused(reduce, shape):
    for action in (gradient_norms_by_loop, lambda *args: weighted_backward_by_loop(*args, Weighting())):
        with pytest.raises(ValueError, match=rf"the loss of a batch of one has shape {shape}, expected \(1,\)"):
            action(perceptron(), lambda model, batch: reduce(residual(model, batch)), points())


def test_dropout_is_the_same_in_the_norm_and_in_the_gradient():
    torch.manual_seed(0)
    model = Remembering().train()
    batch = {"x": torch.randn(5, 16), "y": torch.randn(5)}
    step = weighted_backward_by_loop(model, residual, batch, Weighting())
    masks = torch.cat(model.masks[:5])  # the noise of the passes whose norms were taken
    assert len({tuple(mask.tolist()) for mask in masks}) == 5
    x = batch["x"] * masks
    each = 2 * (x @ model.linear.weight[0] - batch["y"]).detach()[:, None] * x
    norms = each.norm(dim=1)
    torch.testing.assert_close(step.norms, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.linear.weight.grad[0], (norms / norms.mean() * each.T).mean(1), rtol=1e-5, atol=1e-6)


# --- on a GPU ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_on_a_gpu_are_those_of_the_cpu(architecture):
    pair, batch = pair_batch(architecture)
    on_gpu = tiny_pair(architecture, device="cuda").model
    moved = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    expected = gradient_norms_by_loop(pair.model, cross_entropy, batch)
    torch.testing.assert_close(gradient_norms_by_loop(on_gpu, cross_entropy, moved).cpu(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_dropout_on_a_gpu_is_the_same_in_the_norm_and_in_the_gradient():
    torch.manual_seed(0)
    model = Remembering().cuda().train()
    batch = {"x": torch.randn(5, 16, device="cuda"), "y": torch.randn(5, device="cuda")}
    state = torch.cuda.get_rng_state()
    weighted_backward_by_loop(model, residual, batch, Weighting())
    assert torch.equal(torch.cuda.get_rng_state(), state)
    x = batch["x"] * torch.cat(model.masks[:5])
    each = 2 * (x @ model.linear.weight[0] - batch["y"]).detach()[:, None] * x
    norms = each.norm(dim=1)
    torch.testing.assert_close(model.linear.weight.grad[0], (norms / norms.mean() * each.T).mean(1), rtol=1e-4, atol=1e-5)
