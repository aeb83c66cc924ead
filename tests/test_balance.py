"""Balanced steps against autograd, coefficients against their definitions, and cosines against gradients written out."""

import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import balance_ranks
import numpy as np
import pytest
import torch
from balance_ranks import AUTOMATIC, OBJECTIVES, WEIGHTS, batch_of, joined, two_towers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import nnls
from tiny import tiny_frame, tiny_pair
from torchjd.aggregation import MGDA, PCGrad, UPGrad
from torchjd.linalg import QuadprogProjector

from recsys_importance.balance import (
    BALANCES,
    balanced_backward,
    coefficients,
    cosines,
    objective_cosines,
    objective_norms,
    sample_cosines,
)
from recsys_importance.models import PairCollator, add_lora
from recsys_importance.objectives import ListCollator, ListDataset, Objectives, click, display, purchase, relevance
from recsys_importance.plots import conflict
from recsys_importance.reference import gradient_norms_by_loop, one_sample

NAMES = OBJECTIVES.names


# --- coefficients -----------------------------------------------------------------------------------------------------------------------


@st.composite
def jacobians(draw, largest: int = 5) -> torch.Tensor:
    """(K, n) gradients whose lengths differ by up to 10^6; some depend on each other, some conflict, some are zero."""
    count, width = draw(st.integers(1, largest)), draw(st.integers(1, 6))
    entries = st.integers(-4, 4).map(float)
    rows = draw(arrays.arrays(np.float64, (count, width), elements=entries))
    lengths = draw(arrays.arrays(np.float64, (count, 1), elements=st.sampled_from([1e-3, 0.1, 1.0, 7.0, 1e3])))
    return torch.tensor(rows * lengths)


def relative_gains(jacobian: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """<g_k, d> over ||g_k|| times the length that d would have if nothing cancelled: below zero, objective k rises."""
    norms = jacobian.norm(dim=1)
    length = (c.abs() * norms).sum()
    return torch.where(norms > 0, jacobian @ (c @ jacobian) / (norms * length).clamp_min(1e-300), 0.0)


@given(jacobians())
def test_upgrad_and_mgda_let_no_objective_rise(jacobian):
    for balance in ("upgrad", "mgda"):
        c = coefficients(jacobian @ jacobian.T, balance)
        assert (c >= 0).all() and relative_gains(jacobian, c).min() > -1e-6


@given(jacobians())
def test_mgda_is_the_shortest_convex_combination(jacobian):
    """Of a convex problem: the point is feasible, and no gradient has a smaller inner product with it than it has with itself."""
    gramian = jacobian @ jacobian.T
    c, there = coefficients(gramian, "mgda"), jacobian.norm(dim=1) > 0
    if not there.any():
        assert c.tolist() == [0.0] * len(c)
        return
    assert c.sum().item() == pytest.approx(1) and (c >= 0).all() and (c[~there] == 0).all()
    slack = (gramian @ c)[there] - c @ gramian @ c
    assert (slack / gramian.diagonal()[there].sqrt() > -1e-4 * jacobian.norm(dim=1)[there].min()).all()


@given(jacobians(largest=2))
def test_mgda_of_two_is_the_closed_form(jacobian):
    """Désidéri (2012): the point of the segment from g1 to g2 that is nearest to 0."""
    if len(jacobian) < 2 or (jacobian.norm(dim=1) == 0).any():
        return
    g1, g2 = jacobian
    span = (g1 - g2).square().sum()
    share = ((g2 - g1) @ g2 / span).clamp(0, 1) if span > 0 else torch.tensor(0.5)
    shortest = share * g1 + (1 - share) * g2
    c = coefficients(jacobian @ jacobian.T, "mgda")
    assert (c @ jacobian - shortest).norm() <= 1e-4 * jacobian.norm(dim=1).min()


@given(jacobians())
def test_upgrad_is_the_mean_of_projections_on_the_dual_cone(jacobian):
    """The projection of g_k on {d: J d >= 0} is g_k + J^T x with the x >= 0 that makes it shortest: a least-squares problem."""
    norms = jacobian.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, jacobian / norms, 0.0).numpy()
    expected = sum(g + nnls(unit.T, -g)[0] @ unit for g in jacobian.numpy()) / len(jacobian)
    c = coefficients(jacobian @ jacobian.T, "upgrad")
    assert np.linalg.norm((c @ jacobian).numpy() - expected) <= 1e-4 * float(norms.max())
    assert (c[norms[:, 0] == 0] == 0).all()


def pcgrad_of(jacobian: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of Yu et al. (2020) on the gradients themselves."""
    total = torch.zeros_like(jacobian[0])
    for i, g in enumerate(jacobian):
        for j in torch.randperm(len(jacobian)).tolist():
            other = jacobian[j]
            if j != i and g @ other < 0:
                g = g - (g @ other) / (other @ other) * other
        total = total + g
    return total


@given(jacobians(), st.integers(0, 5))
def test_pcgrad_is_its_algorithm_and_follows_the_seed(jacobian, seed):
    jacobian = jacobian[jacobian.norm(dim=1) > 0]
    if not len(jacobian):
        return
    torch.manual_seed(seed)
    c = coefficients(jacobian @ jacobian.T, "pcgrad")
    torch.manual_seed(seed)
    expected = pcgrad_of(jacobian)
    # whether an inner product that is 0 by cancellation counts as negative is rounding, and changes little
    assert (c @ jacobian - expected).norm() <= 1e-9 * (c.abs() * jacobian.norm(dim=1)).sum()


def test_pcgrad_by_hand_and_its_order_matters():
    c = coefficients(torch.tensor([[4.0, -2.0], [-2.0, 2.0]]), "pcgrad")  # g1 + g2 (2 / 2), g2 + g1 (2 / 4)
    assert c.tolist() == pytest.approx([1.5, 2])
    three = torch.tensor([[2.0, 1, 3], [0, -2, -1], [-1, 1, 0]])
    found = set()
    for seed in range(8):
        torch.manual_seed(seed)
        found.add(tuple(coefficients(three @ three.T, "pcgrad").tolist()))
    assert len(found) > 1


def test_fixed_and_sum():
    gramian = torch.eye(3)
    assert coefficients(gramian, "fixed", (2, 0.5, 0)).tolist() == [2, 0.5, 0]
    assert coefficients(gramian, "sum", (2, 0.5, 0)).tolist() == [1, 1, 1]
    for balance in BALANCES:
        assert coefficients(gramian, balance, (1, 1, 1)).dtype == torch.float64


@pytest.mark.parametrize("balance", AUTOMATIC)
def test_the_unit_of_a_loss_does_not_matter(balance):
    """TorchJD takes gradients whose squares sum to less than 1e-4 for zero; here a common factor changes nothing, to 1e-40."""
    gramian = torch.tensor([[4.16, -0.76, 0.1], [-0.76, 0.61, -0.3], [0.1, -0.3, 0.5]], dtype=torch.float64)
    found = []
    for factor in (1.0, 1e-6, 1e-40, 1e40):
        torch.manual_seed(1)
        found.append(coefficients(gramian * factor, balance))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=0)


def test_an_objective_with_a_short_gradient_is_guarded_too():
    """A thousandth of the other's length: TorchJD's regularisation alone, relative to the longest, would let it rise."""
    jacobian = torch.tensor([[1.0, 0.0], [-0.8e-3, 0.6e-3]], dtype=torch.float64)
    gramian = jacobian @ jacobian.T
    c = coefficients(gramian, "upgrad")
    assert relative_gains(jacobian, c).min() > -1e-9
    plain = UPGrad().gramian_weighting(gramian)
    assert relative_gains(jacobian, plain).min() < -0.1


@pytest.mark.parametrize("balance", AUTOMATIC)
def test_a_gradient_that_is_zero_has_no_part(balance):
    jacobian = torch.tensor([[2.0, 0.4], [0.0, 0.0], [-0.5, 0.6]], dtype=torch.float64)
    torch.manual_seed(0)
    c, alone = coefficients(jacobian @ jacobian.T, balance), coefficients(jacobian[[0, 2]] @ jacobian[[0, 2]].T, balance)
    share = 2 / 3 if balance == "upgrad" else 1  # UPGrad's mean is over all three
    assert c[1] == 0
    torch.testing.assert_close(c[[0, 2]], share * alone)
    assert coefficients(torch.zeros(3, 3), balance).tolist() == [0, 0, 0]
    assert coefficients(torch.tensor([[7.0]]), balance).tolist() == pytest.approx([1])
    only = coefficients(torch.diag(torch.tensor([0.0, 3.0])), balance)
    assert only.tolist() == pytest.approx([0, 0.5 if balance == "upgrad" else 1])


@pytest.mark.parametrize("balance", AUTOMATIC)
def test_gradients_along_one_line(balance):
    g = torch.tensor([[0.3, -2.0, 1.0]], dtype=torch.float64)
    opposite = torch.cat([g, -0.5 * g])
    assert (coefficients(opposite @ opposite.T, balance) @ opposite).norm() < 1e-4  # nothing helps both
    alike = torch.cat([g, 2 * g, g])
    d = coefficients(alike @ alike.T, balance) @ alike
    times = {"mgda": 1, "upgrad": 4 / 3, "pcgrad": 4}[balance]  # the shortest, the mean and the sum
    torch.testing.assert_close(d, times * g[0], rtol=1e-4, atol=0)


def test_a_gramian_rounded_to_float32_will_do():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 1000, generator=generator)
    jacobian = torch.cat([rows, rows[:1] - rows[1:], rows[:1] * 3])  # rank 2 of 4
    gramian = (jacobian @ jacobian.T).float()
    assert torch.linalg.eigvalsh(gramian.double())[0] < 0  # rounding
    for balance in ("mgda", "upgrad"):
        c = coefficients(gramian, balance)
        assert relative_gains(jacobian.double(), c).min() > -1e-5


def test_cosines():
    jacobian = torch.tensor([[3.0, 0.0], [0.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    found = cosines(jacobian @ jacobian.T)
    half = -math.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([[1, 0, half], [0, 0, 0], [half, 0, 1]], dtype=torch.float64))
    several = torch.stack([torch.eye(2), torch.ones(2, 2)])
    assert torch.equal(cosines(several * 4), several)


@pytest.mark.parametrize(
    ("gramian", "balance", "weights", "words"),
    [
        (torch.eye(2), "gradnorm", None, "balance must be one of fixed, sum, mgda, upgrad, pcgrad, got 'gradnorm'"),
        (torch.eye(2), "fixed", None, "needs 2 finite weights, one per objective, got None"),
        (torch.eye(2), "fixed", (1.0, math.nan), "needs 2 finite weights"),
        (torch.eye(2), "fixed", (1.0,), "needs 2 finite weights"),
        (torch.ones(2, 3), "sum", None, r"expected a finite \(K, K\) Gramian, got shape \(2, 3\)"),
        (torch.zeros(0, 0), "sum", None, r"got shape \(0, 0\)"),
        (torch.tensor([[1.0, math.nan], [0, 1]]), "upgrad", None, "expected a finite"),
        (torch.tensor([[1.0, 2], [2, 1]]), "mgda", None, "positive semi-definite"),
        (torch.tensor([[1.0, 0.5], [0.1, 1]]), "pcgrad", None, "symmetric"),
    ],
)
def test_what_is_no_gramian_or_balance_is_refused(gramian, balance, weights, words):
    with pytest.raises(ValueError, match=words):
        coefficients(gramian, balance, weights)


@pytest.mark.parametrize("missing", ["torchjd.aggregation", "qpsolvers", "quadprog"])
def test_without_torchjd_one_error_says_what_to_install(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    for balance in AUTOMATIC:
        with pytest.raises(ModuleNotFoundError, match=r"needs TorchJD and its solver: pip install 'recsys_importance\[balance\]'"):
            coefficients(torch.eye(2), balance)
    assert coefficients(torch.eye(2), "sum").tolist() == [1, 1]


# --- a step -----------------------------------------------------------------------------------------------------------------------------


def flat(gradients) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


def trainable(model) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradient_of(value, model) -> torch.Tensor:
    found = torch.autograd.grad(value, trainable(model), allow_unused=True, retain_graph=True)
    return flat([torch.zeros_like(p) if g is None else g for p, g in zip(trainable(model), found, strict=True)])


@cache
def written_out() -> torch.Tensor:
    """(B, K, P): the gradient of every sample and objective of the joined batch, from passes of one sample each."""
    pair = two_towers()
    batch = batch_of(pair, joined(pair))
    return torch.stack(
        [
            torch.stack([gradient_of(OBJECTIVES.only(name)(pair.model, one_sample(batch, i))[0], pair.model) for name in NAMES])
            for i in range(7)
        ]
    )


def explicit(weights=WEIGHTS) -> torch.Tensor:
    """(K, P) Jacobian of mean_i(w_i l_ik) from the written-out gradients."""
    return torch.einsum("i,ikp->kp", weights.double() / len(weights), written_out())


def given_back(model) -> torch.Tensor:
    return flat([torch.zeros_like(p) if p.grad is None else p.grad for p in trainable(model)])


def aggregated(balance: str, jacobian: torch.Tensor) -> torch.Tensor:
    """The direction by TorchJD's aggregator on the Jacobian as it is, or by the weights."""
    fixed = {"fixed": torch.tensor(OBJECTIVES.weights).double(), "sum": torch.ones(4).double()}
    if balance in fixed:
        return fixed[balance] @ jacobian
    small = dict(norm_eps=0.0, reg_eps=1e-10)
    by = {"mgda": MGDA(epsilon=1e-8, max_iters=20_000), "upgrad": UPGrad(projector=QuadprogProjector(**small)), "pcgrad": PCGrad()}
    return by[balance](jacobian)


BOUNDS = {"fixed": 1e-12, "sum": 1e-12, "pcgrad": 1e-10, "upgrad": 1e-6, "mgda": 1e-3}  # MGDA: TorchJD's Frank-Wolfe is the coarser


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("sizes", [[7], [2, 2, 3], [1, 6]], ids=str)
def test_the_gradient_is_that_of_autograd_and_torchjd(balance, sizes):
    """One batch or micro-batches, one of them without a purchase label; sample weights, one of them 0."""
    pair = two_towers()
    rows, ends = joined(pair), np.cumsum(sizes)
    batches = [batch_of(pair, rows[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    torch.manual_seed(4)
    step = balanced_backward(pair.model, OBJECTIVES, batches if len(sizes) > 1 else batches[0], balance, sample_weights=WEIGHTS)
    torch.manual_seed(4)
    jacobian, found = explicit(), given_back(pair.model)
    expected = aggregated(balance, jacobian)
    assert (found - expected).norm() < BOUNDS[balance] * expected.norm()
    assert (found - step.coefficients @ jacobian).norm() < 1e-12 * expected.norm()
    losses, present = OBJECTIVES.matrix(pair.model, batch_of(pair, rows))
    torch.testing.assert_close(step.losses, losses.detach(), rtol=1e-12, atol=0)
    assert torch.equal(step.present, present) and 0 < present[:, 1].sum() < 7
    assert not step.losses.requires_grad
    if balance in ("fixed", "sum"):
        assert step.gramian is None
    else:
        torch.testing.assert_close(step.gramian, jacobian @ jacobian.T, rtol=1e-10, atol=1e-14)
    assert pair.model.unused.weight.grad is None
    assert pair.model.encoder.encoder.layer[0].attention.self.query.weight.grad is None


def test_the_objectives_of_the_tests_do_conflict():
    """Without it, all balances would only differ in length."""
    angles = cosines(explicit() @ explicit().T)
    assert angles.min() < -0.5 and angles.fill_diagonal_(0).max() > 0.5


def test_fixed_is_the_gradient_of_the_weighted_sum():
    pair = two_towers()
    batch = batch_of(pair, joined(pair))
    balanced_backward(pair.model, OBJECTIVES, batch, "fixed")
    expected = gradient_of(OBJECTIVES(pair.model, batch).mean(), pair.model)
    assert (given_back(pair.model) - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("balance", ["sum", "upgrad"])
def test_it_adds_to_what_is_there(balance):
    pair = two_towers()
    batch = batch_of(pair, joined(pair))
    for times in (1, 2):
        balanced_backward(pair.model, OBJECTIVES, batch, balance)
        found = given_back(pair.model)
        if times == 1:
            once = found
    torch.testing.assert_close(found, 2 * once)


@pytest.mark.parametrize("balance", BALANCES)
def test_an_objective_without_a_label_in_the_batch(balance):
    """Purchases unknown: the others are balanced as if there were no such objective, and UPGrad's mean stays over four."""
    pair = two_towers()
    batch = batch_of(pair, joined(pair))
    batch["purchased"] = torch.full((7,), torch.nan).double()
    torch.manual_seed(0)
    step = balanced_backward(pair.model, OBJECTIVES, batch, balance)
    others = [0, 2, 3]
    c = torch.zeros(4).double()
    if balance in ("fixed", "sum"):
        c = coefficients(torch.eye(4), balance, OBJECTIVES.weights)
    else:
        jacobian = explicit(torch.ones(7))[others]
        torch.manual_seed(0)
        c[others] = coefficients(jacobian @ jacobian.T, balance) * (0.75 if balance == "upgrad" else 1)
        assert (step.gramian[1] == 0).all()
    torch.testing.assert_close(step.coefficients, c, rtol=1e-6, atol=1e-9)
    expected = step.coefficients[others] @ explicit(torch.ones(7))[others]
    assert (given_back(pair.model) - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("balance", BALANCES)
def test_without_any_label_or_weight_the_gradient_is_zero_and_there(balance):
    pair = two_towers()
    batch = batch_of(pair, joined(pair))
    step = balanced_backward(pair.model, OBJECTIVES, batch, balance, sample_weights=torch.zeros(7))
    assert given_back(pair.model).abs().max() == 0 and pair.model.logit.weight.grad is not None
    assert torch.isfinite(step.coefficients).all()


@pytest.mark.parametrize("balance", BALANCES)
def test_one_objective_alone(balance):
    pair = two_towers()
    batch, alone = batch_of(pair, joined(pair)), OBJECTIVES.only("click")
    step = balanced_backward(pair.model, alone, batch, balance)
    assert step.coefficients.tolist() == pytest.approx([1])
    expected = explicit(torch.ones(7))[2]
    assert (given_back(pair.model) - expected).norm() < 1e-9 * expected.norm()


def test_only_the_chosen_parameters_are_compared():
    pair = two_towers()
    batch, chosen = batch_of(pair, joined(pair)), "encoder.encoder.layer.1.*"
    step = balanced_backward(pair.model, OBJECTIVES, batch, "upgrad", parameters=chosen, sample_weights=WEIGHTS)
    names = [name for name, p in pair.model.named_parameters() if p.requires_grad]
    sizes = [p.numel() for p in trainable(pair.model)]
    mask = torch.cat([torch.full((size,), name.startswith(chosen[:-1])) for name, size in zip(names, sizes, strict=True)])
    part = explicit()[:, mask]
    assert 0 < mask.sum() < len(mask)
    torch.testing.assert_close(step.gramian, part @ part.T, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(step.coefficients, coefficients(part @ part.T, "upgrad"))
    expected = step.coefficients @ explicit()
    assert (given_back(pair.model) - expected).norm() < 1e-12 * expected.norm()


def test_all_objectives_see_one_dropout_and_the_seed_repeats_it():
    pair = tiny_pair(dropout=0.4, tasks=NAMES)
    batch = {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in batch_of(pair, joined(pair)).items()}
    pair.model.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        pair.model.zero_grad()
        step = balanced_backward(pair.model, OBJECTIVES, batch, "pcgrad")
        found.append((step, given_back(pair.model)))
    assert torch.equal(found[0][1], found[1][1]) and not torch.equal(found[0][1], found[2][1])
    torch.manual_seed(1)
    losses = OBJECTIVES.matrix(pair.model, batch).losses.mean(0)
    expected = found[0][0].coefficients.float() @ torch.stack([gradient_of(value, pair.model) for value in losses])
    assert (found[0][1] - expected).norm() < 1e-5 * expected.norm()


def test_a_step_against_the_direction_lowers_every_objective():
    """To first order is not enough for a user: a short step of UPGrad or MGDA lowers all four losses; the plain sum does not."""
    pair = two_towers()
    batch = batch_of(pair, joined(pair))
    before = OBJECTIVES.matrix(pair.model, batch).losses.mean(0)
    start = [p.detach().clone() for p in pair.model.parameters()]
    change = {}
    for balance in BALANCES:
        pair.model.zero_grad()
        step = balanced_backward(pair.model, OBJECTIVES, batch, balance)
        length = given_back(pair.model).norm()
        with torch.no_grad():
            for p in trainable(pair.model):
                if p.grad is not None:
                    p -= 1e-5 / length * p.grad
            change[balance] = OBJECTIVES.matrix(pair.model, batch).losses.mean(0) - before
            for p, old in zip(pair.model.parameters(), start, strict=True):
                p.copy_(old)
        if step.gramian is not None:
            expected = -1e-5 / length * step.gramian @ step.coefficients
            torch.testing.assert_close(change[balance], expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    for balance in ("upgrad", "mgda"):
        assert change[balance].max() < 1e-3 * change[balance].abs().max()
    assert change["sum"].max() > 0.05 * change["sum"].abs().max()


def test_gradient_checkpointing():
    pair = two_towers()
    batch = batch_of(pair, joined(pair))
    pair.model.train().encoder.gradient_checkpointing_enable({"use_reentrant": False})
    step = balanced_backward(pair.model, OBJECTIVES, batch, "upgrad")
    expected = step.coefficients @ explicit(torch.ones(7))
    assert (given_back(pair.model) - expected).norm() < 1e-12 * expected.norm()


def test_low_rank_adapters():
    pair = tiny_pair(dropout=0.0, tasks=NAMES)
    add_lora(pair, 2)
    batch = PairCollator(pair)(joined(pair))
    with torch.no_grad():
        for name, p in pair.model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
    step = balanced_backward(pair.model, OBJECTIVES, batch, "mgda")
    losses = OBJECTIVES.matrix(pair.model, batch).losses.mean(0)
    expected = step.coefficients.float() @ torch.stack([gradient_of(value, pair.model) for value in losses])
    assert (given_back(pair.model) - expected).norm() < 1e-5 * expected.norm()
    assert all(p.grad is None for p in pair.model.parameters() if not p.requires_grad)


# --- precision --------------------------------------------------------------------------------------------------------------------------


def float32_pair():
    pair = tiny_pair(dropout=0.0, tasks=NAMES)
    return pair, PairCollator(pair)(joined(pair))


def test_autocast_around_it_is_the_forwards_only():
    pair, batch = float32_pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = balanced_backward(pair.model, OBJECTIVES, batch, "upgrad")
        losses = OBJECTIVES.matrix(pair.model, batch).losses.mean(0)
    jacobian = torch.stack([gradient_of(value, pair.model) for value in losses])
    torch.testing.assert_close(step.gramian, jacobian.double() @ jacobian.double().T, rtol=1e-5, atol=1e-9)
    expected = step.coefficients.float() @ jacobian
    assert (given_back(pair.model) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("balance", BALANCES)
def test_a_loss_scale_is_left_in_the_gradient_and_nowhere_else(balance):
    pair, batch = float32_pair()
    torch.manual_seed(0)
    plain = balanced_backward(pair.model, OBJECTIVES, batch, balance)
    expected = given_back(pair.model)
    pair.model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(0)
    scaled = balanced_backward(pair.model, OBJECTIVES, batch, balance, scaler=scaler)
    torch.testing.assert_close(given_back(pair.model), 1024 * expected, rtol=1e-5, atol=1e-5 * 1024 * expected.abs().max().item())
    torch.testing.assert_close(scaled.coefficients, plain.coefficients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scaled.losses, plain.losses)
    if scaled.gramian is not None:
        torch.testing.assert_close(scaled.gramian, plain.gramian, rtol=1e-4, atol=1e-9)
    off = torch.amp.GradScaler("cpu", enabled=False)
    pair.model.zero_grad()
    torch.manual_seed(0)
    balanced_backward(pair.model, OBJECTIVES, batch, balance, scaler=off)
    assert torch.equal(given_back(pair.model), expected)


@pytest.mark.parametrize("balance", BALANCES)
def test_an_overflow_is_skipped_by_the_scaler(balance):
    pair, batch = float32_pair()
    before = flat(p.detach().clone() for p in pair.model.parameters())
    optimizer, scaler = torch.optim.SGD(pair.model.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=3e38)
    step = balanced_backward(pair.model, OBJECTIVES, batch, balance, scaler=scaler)
    assert not torch.isfinite(given_back(pair.model)).all() and torch.isfinite(step.losses).all()
    assert step.coefficients.tolist() == (list(OBJECTIVES.weights) if balance == "fixed" else [1, 1, 1, 1])
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(pair.model.parameters()), before) and scaler.get_scale() == pytest.approx(1.5e38)


# --- mistakes ---------------------------------------------------------------------------------------------------------------------------


class Elsewhere(torch.nn.Module):
    """Gives logits that no trainable parameter enters."""

    tasks = NAMES

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, **inputs):
        return torch.zeros(len(inputs["a_input_ids"]), 4)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"balance": "best"}, "balance must be one of"),
        ({}, {"sample_weights": torch.ones(6)}, r"expected 7 finite sample weights, 0 or more, got shape \(6,\)"),
        ({}, {"sample_weights": torch.full((7,), torch.nan)}, "expected 7 finite sample weights"),
        ({}, {"sample_weights": -torch.ones(7)}, "0 or more"),
        ({}, {"parameters": "decoder.*"}, "no trainable parameter matches"),
        ({}, {"parameters": "unused.*"}, "do not depend on any of the chosen parameters"),
        ({"clicked": torch.tensor([0, 1, torch.inf, 0, 0, 0, 0])}, {}, "the first is that of objective 'click' for sample 's0002'"),
        ({"clicked": torch.zeros(6)}, {}, "one entry per sample"),
    ],
)
@pytest.mark.parametrize("balance", ["sum", "upgrad"])
def test_a_mistake_is_named_and_leaves_the_gradient_alone(balance, change, options, words):
    pair = two_towers()
    batch = batch_of(pair, joined(pair)) | change
    pair.model.logit.bias.grad = torch.ones(4).double()
    with pytest.raises(ValueError, match=words):
        balanced_backward(pair.model, OBJECTIVES, batch, **{"balance": balance} | options)
    assert pair.model.logit.bias.grad.tolist() == [1, 1, 1, 1] and pair.model.logit.weight.grad is None


def test_what_has_nothing_to_go_backward_through_is_refused():
    pair = two_towers()
    batch = batch_of(pair, joined(pair))
    with pytest.raises(ValueError, match="got sizes \\[\\]"):
        balanced_backward(pair.model, OBJECTIVES, [], "sum")
    with pytest.raises(ValueError, match="the losses do not depend on any trainable parameter"):
        balanced_backward(Elsewhere(), OBJECTIVES, batch, "sum")
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        balanced_backward(pair.model, OBJECTIVES, batch, "sum")
    with pytest.raises(ValueError, match="a compiled model goes backward once only"):
        balanced_backward(torch.compile(pair.model), OBJECTIVES, batch, "mgda")
    with torch.no_grad():
        balanced_backward(pair.model, OBJECTIVES, batch, "sum")
    assert given_back(pair.model).norm() > 0


class Rooted(Objectives):
    """A second loss that is 0 everywhere, with a gradient of 0 times infinity."""

    def matrix(self, model, batch):
        losses, present = super().matrix(model, batch)
        return losses * torch.tensor([1.0, 0]) + (losses * 0).sqrt() * torch.tensor([0, 1.0]), present


@pytest.mark.parametrize("balance", ["fixed", "mgda"])
def test_a_gradient_that_is_not_finite_is_an_error(balance):
    pair, batch = float32_pair()
    rooted = Rooted(relevance(), click())
    for measured in (lambda: balanced_backward(pair.model, rooted, batch, balance), lambda: objective_cosines(pair.model, rooted, batch)):
        with pytest.raises(ValueError, match="a gradient is NaN or infinite though all losses are finite"):
            measured()
    assert all(p.grad is None for p in pair.model.parameters())


# --- two processes ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What `balance_ranks.outcomes` gives on each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, balance_ranks.__file__]
    running = [
        subprocess.Popen([*command, str(rank), folder], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)[-3000:]
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def vector(gradients: dict) -> torch.Tensor:
    model = two_towers().model
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert gradients["unused.weight"] is None
    return flat([torch.zeros_like(p) if gradients[name] is None else gradients[name] for name, p in wanted.items()])


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("name", balance_ranks.COUNTS)
def test_two_ranks_give_what_one_process_does(two_ranks, name, balance):
    found, jacobian = [outcome[name, balance] for outcome in two_ranks], explicit()
    for each in found:
        losses, _, c, gramian = each["step"]
        assert torch.equal(c, found[0]["step"][2])  # PCGrad's order too, though each rank has its own seed
        assert (vector(each["gradients"]) - c @ jacobian).norm() < 1e-10 * (c @ jacobian).norm()
        if balance != "pcgrad":
            expected = aggregated(balance, jacobian)
            assert (c @ jacobian - expected).norm() < BOUNDS[balance] * expected.norm()
        if gramian is not None:
            torch.testing.assert_close(gramian, jacobian @ jacobian.T, rtol=1e-10, atol=1e-14)
    assert [len(each["step"][0]) for each in found] == [4, 3]
    pair = two_towers()
    losses = OBJECTIVES.matrix(pair.model, batch_of(pair, joined(pair))).losses.detach()
    torch.testing.assert_close(torch.cat([each["step"][0] for each in found]), losses, rtol=1e-10, atol=0)


def test_a_mistake_on_one_rank_stops_both_and_neither_waits(two_ranks):
    first, second = (outcome["broken"] for outcome in two_ranks)
    assert first["error"] == "the step failed on another rank; its own error says why"
    assert "the first is that of objective 'relevance'" in second["error"]
    for each in (first, second):
        assert each["gradients"]["logit.bias"].tolist() == [1, 1, 1, 1] and each["gradients"]["logit.weight"] is None
    for outcome in two_ranks:
        after = outcome["after"]["gradients"]
        after["logit.bias"] = after["logit.bias"] - 1
        expected = outcome["after"]["step"][2] @ explicit()
        assert (vector(after) - expected).norm() < 1e-10 * expected.norm()


def test_angles_over_two_ranks(two_ranks):
    jacobian = explicit(torch.ones(7))
    for outcome in two_ranks:
        torch.testing.assert_close(outcome["cosines"], cosines(jacobian @ jacobian.T), rtol=0, atol=1e-10)


# --- inside samples ---------------------------------------------------------------------------------------------------------------------


def test_norms_of_each_objective():
    pair = two_towers()
    batch = batch_of(pair, joined(pair))
    found = objective_norms(pair.model, OBJECTIVES, batch)
    torch.testing.assert_close(found, written_out().norm(dim=2), rtol=1e-10, atol=0)
    missing = batch["purchased"].isnan()
    assert (found[missing, 1] == 0).all() and (found[~missing] > 0).all()
    chosen = "encoder.encoder.layer.1.*"
    for k, name in enumerate(NAMES):
        alone = gradient_norms_by_loop(pair.model, OBJECTIVES.only(name), batch, parameters=chosen)
        torch.testing.assert_close(objective_norms(pair.model, OBJECTIVES, batch, parameters=chosen)[:, k], alone, rtol=1e-10, atol=0)
    assert all(p.grad is None for p in pair.model.parameters())


def test_angles_inside_samples():
    pair = two_towers()
    batch = batch_of(pair, joined(pair))
    found = sample_cosines(pair.model, OBJECTIVES, batch)
    gradients = written_out()
    torch.testing.assert_close(found, cosines(gradients @ gradients.mT), rtol=0, atol=1e-10)
    missing = batch["purchased"].isnan()
    assert (found[missing, 1] == 0).all() and (found[missing, :, 1] == 0).all() and found[~missing, 1, 1].tolist() == [1] * (~missing).sum()
    assert 0 < (found < -0.1).double().mean() < 1
    angles = objective_cosines(pair.model, OBJECTIVES, batch)
    jacobian = explicit(torch.ones(7))
    torch.testing.assert_close(angles, cosines(jacobian @ jacobian.T), rtol=0, atol=1e-10)
    torch.testing.assert_close(objective_cosines(pair.model, OBJECTIVES, [batch, batch]), angles)
    assert all(p.grad is None for p in pair.model.parameters())


@pytest.mark.parametrize("factor", [1.0, 1e-5])
def test_angles_in_float32_whatever_the_lengths(factor):
    """Polarisation of the norms as they are would lose the digits of a gradient 100,000 times shorter than the other."""
    pair, batch = float32_pair()
    weighted = Objectives(relevance(), display("propensity"))
    batch["display_weight"] = torch.full((7,), factor)
    found = sample_cosines(pair.model, weighted, batch)
    expected = []
    for i in range(7):
        losses = weighted.matrix(pair.model, one_sample(batch, i)).losses[0]
        rows = torch.stack([gradient_of(value, pair.model) for value in losses]).double()
        expected.append(cosines(rows @ rows.T))
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=0, atol=1e-5)


def test_dropout_is_the_same_for_all_objectives_and_random_numbers_go_on_as_before():
    """Two objectives with one output and one label are one objective, so they agree, dropout or not."""
    pair = tiny_pair(dropout=0.4)
    batch = PairCollator(pair)(joined(pair))
    pair.model.train()
    twice = Objectives(click(), purchase(label="clicked"))
    torch.manual_seed(3)
    norms, inside = objective_norms(pair.model, twice, batch), sample_cosines(pair.model, twice, batch)
    angles, after = objective_cosines(pair.model, twice, batch), torch.rand(1)
    torch.testing.assert_close(norms[:, 0], norms[:, 1], rtol=1e-6, atol=0)
    torch.testing.assert_close(inside, torch.ones(7, 2, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(angles, torch.ones(2, 2).double(), rtol=0, atol=1e-5)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)


def test_an_objective_of_which_nothing_is_known():
    pair = two_towers()
    batch = batch_of(pair, joined(pair)) | {"purchased": torch.full((7,), torch.nan).double()}
    assert (objective_norms(pair.model, OBJECTIVES, batch)[:, 1] == 0).all()
    for angles in (sample_cosines(pair.model, OBJECTIVES, batch)[0], objective_cosines(pair.model, OBJECTIVES, batch)):
        assert torch.isfinite(angles).all() and (angles[1] == 0).all() and angles[0, 0] == 1


def test_lists_of_candidates():
    pair, frame = tiny_pair(dropout=0.0, tasks=("relevance", "click")), tiny_frame(12)
    frame["clicked"] = (np.arange(12) % 4 == 1).astype(float)
    dataset = ListDataset(frame, 3, seed=0, clicked=frame["clicked"].to_numpy())
    batch = ListCollator(pair)([dataset[i] for i in range(len(dataset))])
    ranked = Objectives(relevance("listwise"), click())
    step = balanced_backward(pair.model, ranked, batch, "upgrad")
    losses = ranked.matrix(pair.model, batch).losses.mean(0)
    jacobian = torch.stack([gradient_of(value, pair.model) for value in losses])
    expected = step.coefficients.float() @ jacobian
    assert (given_back(pair.model) - expected).norm() < 1e-5 * expected.norm()
    norms = objective_norms(pair.model, ranked, batch)
    for k, name in enumerate(ranked.names):
        torch.testing.assert_close(norms[:, k], gradient_norms_by_loop(pair.model, ranked.only(name), batch), rtol=1e-4, atol=1e-6)


# --- the figure -------------------------------------------------------------------------------------------------------------------------


def test_the_figure_shows_the_numbers():
    angles = np.array([[1, 0.25, -0.5], [0.25, 1, 0.0], [-0.5, 0.0, 1]])
    inside = np.stack([angles, -angles, angles, np.diag([1.0, 0, 1])])
    figure = conflict(angles, ("a", "b", "c"), title="t", in_samples=inside)
    left, right = ([text.get_text() for text in axis.texts] for axis in figure.axes[:2])
    assert left == ["0.25", "−0.50", "0.00"]
    assert right == ["33%", "67%", "–"]
    for wrong in (dict(cosines=angles * 3), dict(names=["a", "b"]), dict(in_samples=inside[0]), dict(cosines=angles * np.nan)):
        with pytest.raises(ValueError, match="expected"):
            conflict(**dict(cosines=angles, names=["a", "b", "c"], title="t") | wrong)
