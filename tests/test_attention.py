"""Attention over samples against numbers by hand, a loop in plain Python, derivatives by hand and by differences, and its limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import perceptron, points, residual

from recsys_importance.attention import SampleAttention, attention_loss, attention_scores, free_attention
from recsys_importance.gradients import gradient_norms, weighted_backward
from recsys_importance.importance import Weighting, importance
from recsys_importance.scoring import score_dataset, write_scores

KEPT = torch.tensor([True, True, False, True])


def taught(weight, **settings):
    attention = SampleAttention(len(weight), **settings).double()
    attention.weight.data = torch.tensor(weight, dtype=torch.float64)
    return attention


def by_loop(h, weight, temperature=1.0, mask=None):
    """The definition word for word, in Python numbers."""
    powers = [math.exp(sum(x * w for x, w in zip(row, weight, strict=True)) / temperature) for row in h]
    powers = [power if mask is None or kept else 0.0 for power, kept in zip(powers, mask or powers, strict=True)]
    return [power / sum(powers) for power in powers]


def example(count=4, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64), torch.rand(count, generator=generator, dtype=torch.float64)


# The definition -------------------------------------------------------------------------------------------------------------------------


def test_by_hand():
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    attention = taught([math.log(2), math.log(5)])
    torch.testing.assert_close(attention(h), torch.tensor([2, 5, 1]).double() / 8, rtol=1e-15, atol=0)
    halved = taught([math.log(4), math.log(25)], temperature=2.0)
    torch.testing.assert_close(halved(h), torch.tensor([2, 5, 1]).double() / 8, rtol=1e-15, atol=0)
    masked = attention(h, torch.tensor([True, False, True]))
    torch.testing.assert_close(masked, torch.tensor([2, 0, 1]).double() / 3, rtol=1e-15, atol=0)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_untaught_is_uniform_over_what_is_kept(count):
    attention = SampleAttention(5)
    assert torch.equal(attention(torch.randn(count, 5)), torch.full((count,), 1 / count))
    assert torch.equal(attention(torch.randn(4, 5), KEPT), KEPT / 3)


@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from([0.3, 1.0, 4.0]), st.booleans())
def test_the_same_as_the_loop_that_sums_to_one_in_any_order(seed, count, temperature, masked):
    h, _ = example(count, 3, seed)
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else torch.ones(count, dtype=torch.bool)
    mask[0] = True
    attention = taught([0.7, -1.3, 0.4], temperature=temperature)
    found = attention(h, mask if masked else None).detach()
    np.testing.assert_allclose(found, by_loop(h.tolist(), [0.7, -1.3, 0.4], temperature, mask.tolist()), rtol=1e-12)
    assert found.sum().item() == pytest.approx(1, abs=1e-14) and (found[~mask] == 0).all() and (found[mask] > 0).all()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(attention(h[order], mask[order]), found[order], rtol=1e-13, atol=0)


def test_limits_of_the_temperature():
    h = torch.tensor([[0.1], [0.4], [0.3]], dtype=torch.float64)
    assert torch.equal(taught([1.0], temperature=1e-4)(h), torch.tensor([0.0, 1.0, 0.0]).double())
    torch.testing.assert_close(taught([1.0], temperature=1e12)(h), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-11, atol=0)


def test_a_common_shift_changes_nothing_and_large_logits_do_not_overflow():
    h = torch.tensor([[1.0], [2.0], [4.0]])
    attention = taught([1.0]).float()
    torch.testing.assert_close(attention(h + 1024), attention(h), rtol=1e-6, atol=0)  # exact in float32
    assert torch.equal(attention(torch.tensor([[1e30], [-1e30]])), torch.tensor([1.0, 0.0]))
    a = attention(torch.tensor([[-1e4], [-1e4]]))
    assert torch.equal(a, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_under_autocast_too(dtype):
    h = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    attention = SampleAttention(16)
    torch.nn.init.normal_(attention.weight, generator=torch.Generator().manual_seed(2))
    exact = torch.softmax(h.double() @ attention.weight.detach().double(), dim=0)
    for inside in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            found = attention(h)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.detach().double(), exact, rtol=1e-5, atol=0)
    assert attention.to(dtype)(h).dtype == torch.float32
    assert attention.double()(h).dtype == torch.float64


def test_a_masked_sample_may_hold_anything_and_gets_and_gives_no_gradient():
    h, losses = example()
    clean = h.clone()
    h[2], losses[2] = math.nan, math.inf
    h.requires_grad_()
    attention = taught([0.5, -0.2, 0.1])
    attention_loss(losses, attention(h, KEPT), regularisation=0.3, mask=KEPT).backward()
    assert torch.equal(h.grad[2], torch.zeros(3).double()) and torch.isfinite(h.grad).all()
    gradient, attention.weight.grad = attention.weight.grad, None
    attention_loss(losses[KEPT], attention(clean[KEPT]), regularisation=0.3).backward()
    torch.testing.assert_close(gradient, attention.weight.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "width, settings, words", [(0, {}, "width"), (2.0, {}, "width"), (True, {}, "width")]
    + [(2, {"temperature": t}, "temperature must be a positive number") for t in (0, -1.0, math.nan, math.inf)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(width, settings, words):
    with pytest.raises(ValueError, match=words):
        SampleAttention(width, **settings)


def test_wrong_batches_are_refused():
    attention = SampleAttention(2)
    for h in (torch.zeros(3), torch.zeros(3, 5), torch.zeros(3, 2, 1), torch.zeros(3, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"expected one real vector per sample: \(B, 2\)"):
            attention(h)
    with pytest.raises(ValueError, match="empty"):
        attention(torch.zeros(0, 2))
    for mask in (torch.ones(2, dtype=torch.bool), torch.ones(3), torch.ones(3, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match="the mask has shape"):
            attention(torch.zeros(3, 2), mask)
    with pytest.raises(ValueError, match="all 3 samples are left out"):
        attention(torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_their_place(bad):
    h = torch.zeros(3, 2)
    h[1, 0] = bad
    with pytest.raises(ValueError, match="1 of 3 samples are NaN or infinite, the first at index 1"):
        SampleAttention(2)(h)
    losses = torch.tensor([0.0, bad, 0.0])
    for function in (lambda x: attention_loss(x, torch.full((3,), 1 / 3), regularisation=0), lambda x: free_attention(x, regularisation=1)):
        with pytest.raises(ValueError, match=r"of 1 of 3 samples are NaN or infinite, the first at index 1"):
            function(losses)


def test_the_state_is_w_alone_and_survives_saving():
    attention = taught([0.5, -0.2], temperature=3.0)
    assert list(attention.state_dict()) == ["weight"]
    other = SampleAttention(2, temperature=3.0).double()
    other.load_state_dict(attention.state_dict())
    h, _ = example(4, 2)
    assert torch.equal(other(h), attention(h)) and repr(attention) == "SampleAttention(width=2, temperature=3)"


# Learning -------------------------------------------------------------------------------------------------------------------------------


def test_the_gradient_is_the_derived_one_and_that_of_finite_differences():
    """dL/dw = 1/tau sum_i a_i (l_i + lambda log(n a_i) - L) h_i."""
    h, losses = example(6)
    attention, price = taught([0.4, -0.9, 0.3], temperature=0.7), 0.25
    a = attention(h)
    loss = attention_loss(losses, a, regularisation=price)
    loss.backward()
    a, loss = a.detach(), loss.item()
    derived = ((a * (losses + price * (6 * a).log() - loss))[:, None] * h).sum(0) / 0.7
    torch.testing.assert_close(attention.weight.grad, derived, rtol=1e-12, atol=1e-15)
    for k in range(3):
        values = []
        for step in (1e-5, -1e-5):
            weight = [0.4, -0.9, 0.3]
            weight[k] += step
            moved = by_loop(h.tolist(), weight, 0.7)
            values.append(sum(x * (y + price * math.log(6 * x)) for x, y in zip(moved, losses.tolist(), strict=True)))
        assert derived[k].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("mask", [None, KEPT])
def test_uniform_attention_gives_the_mean_loss_at_any_price(mask):
    h, losses = example()
    expected = losses.mean() if mask is None else losses[mask].mean()
    for price in (0.0, 0.1, 100.0):
        loss = attention_loss(losses, SampleAttention(3).double()(h, mask), regularisation=price, mask=mask)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("price", [0.05, 0.5, 5.0])
def test_the_closed_form_is_the_minimum(price):
    _, losses = example(6)
    best = free_attention(losses, regularisation=price)
    powers = [math.exp(-x / price) for x in losses.tolist()]
    np.testing.assert_allclose(best, np.array(powers) / sum(powers), rtol=1e-12)
    least = attention_loss(losses, best, regularisation=price).item()
    assert least == pytest.approx(-price * math.log(sum(powers) / 6), rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = torch.softmax(torch.randn(6, generator=generator, dtype=torch.float64), dim=0)
        divergence = (other * (other / best).log()).sum().item()  # L(a) - L(a*) = lambda KL(a || a*)
        assert attention_loss(losses, other, regularisation=price).item() - least == pytest.approx(price * divergence, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_attention_with_a_coordinate_for_each_sample_learns_the_closed_form_and_without_a_price_collapses(temperature):
    losses = torch.tensor([0.5, 0.1, 0.9, 0.4], dtype=torch.float64)
    for price in (0.4, 0.0):
        attention = SampleAttention(4, temperature=temperature).double()
        optimizer = torch.optim.Adam(attention.parameters(), lr=0.1)
        for _ in range(600):
            optimizer.zero_grad()
            attention_loss(losses, attention(torch.eye(4).double()), regularisation=price).backward()
            optimizer.step()
        found = attention(torch.eye(4).double()).detach()
        if price:
            torch.testing.assert_close(found, free_attention(losses, regularisation=price), rtol=1e-3, atol=1e-4)
            level = -attention.logits(torch.eye(4).double()).detach() * price  # the predicted loss, up to a constant
            torch.testing.assert_close(level - level.mean(), losses - losses.mean(), rtol=0, atol=2e-3)
        else:
            assert found.argmax() == losses.argmin() and found.max() > 0.98


def test_attention_of_exactly_zero_has_a_finite_price_and_gradient():
    losses = torch.tensor([0.2, 0.3], dtype=torch.float64)
    attention = taught([2000.0])  # the second underflows
    a = attention(torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    loss = attention_loss(losses, a, regularisation=0.5)
    loss.backward()
    assert a[1] == 0 and loss.item() == pytest.approx(0.2 + 0.5 * math.log(2)) and torch.isfinite(attention.weight.grad).all()


def test_wrong_losses_and_prices_are_refused():
    third = torch.full((3,), 1 / 3)
    for losses, attention in [(torch.zeros(2), third), (torch.zeros(3, 1), third[:, None]), (torch.zeros(()), third)]:
        with pytest.raises(ValueError, match="one loss per sample"):
            attention_loss(losses, attention, regularisation=1)
    for price in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="regularisation must be a finite number, 0 or more"):
            attention_loss(torch.zeros(3), third, regularisation=price)
    for price in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="regularisation must be a finite number, above 0"):
            free_attention(torch.zeros(3), regularisation=price)
    for wrong in (third / 2, torch.tensor([1.5, -0.5, 0.0])):
        with pytest.raises(ValueError, match="must be shares of the kept samples"):
            attention_loss(torch.zeros(3), wrong, regularisation=1)
    with pytest.raises(ValueError, match="pass the same mask"):
        attention_loss(torch.zeros(4), torch.full((4,), 0.25), regularisation=1, mask=KEPT)


# With the model and the engine ----------------------------------------------------------------------------------------------------------


def shown(model, batch):
    return model[1](model[0](batch["x"]))


def test_with_h_cut_the_model_s_step_is_the_sum_of_a_i_g_i():
    model, batch = perceptron().double(), points(5, dtype=torch.float64)
    attention = taught(torch.linspace(-1, 1, 8).tolist())
    a = attention(shown(model, batch).detach())
    attention_loss(residual(model, batch), a, regularisation=0.2).backward()
    for name, parameter in model.named_parameters():
        own = []
        for i in range(5):
            losses = residual(model, {key: value[i : i + 1] for key, value in batch.items()})
            own.append(torch.autograd.grad(losses.sum(), parameter)[0])
        expected = sum(x * g for x, g in zip(a.detach(), own, strict=True))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-15, msg=name)
    assert attention.weight.grad.norm() > 0


def test_attention_as_a_constant_scales_the_engine_s_norms_and_inside_the_model_it_is_refused():
    model, batch = perceptron().double(), points(5, dtype=torch.float64)
    attention = taught(torch.linspace(-1, 1, 8).tolist())
    a = attention(shown(model, batch)).detach()
    norms = gradient_norms(model, lambda model, batch: a * residual(model, batch), batch)
    torch.testing.assert_close(norms, a * gradient_norms(model, residual, batch), rtol=1e-12, atol=0)
    model.add_module("attention", attention)
    inside = lambda model, batch: model.attention(shown(model, batch)) * (model[3](shown(model, batch))[:, 0] - batch["y"]) ** 2  # noqa: E731
    with pytest.raises(ValueError, match="attention"):
        gradient_norms(model, inside, batch)


def test_attention_that_couples_samples_is_found_out_when_a_data_set_is_scored():
    model, batch = perceptron().double(), points(4, dtype=torch.float64)
    attention = taught(torch.linspace(-2, 2, 8).tolist())
    samples = [{"sample_id": f"s{i}", "x": batch["x"][i], "y": batch["y"][i]} for i in range(4)]

    def collate(rows):
        return {"sample_id": [row["sample_id"] for row in rows]} | {key: torch.stack([row[key] for row in rows]) for key in ("x", "y")}

    with pytest.raises(ValueError, match="checked against autograd.*Samples move or mix"):
        score_dataset(model, lambda model, batch: attention(shown(model, batch)) * residual(model, batch), samples, collate, progress=False)


# As a score -----------------------------------------------------------------------------------------------------------------------------


def test_scores_are_a_sample_s_own_and_their_shares_are_the_attention_over_the_data_set(tmp_path):
    model = perceptron(dropout=0.5).double().train()
    batch = points(7, dtype=torch.float64)
    attention = taught(torch.linspace(-1, 1, 8).tolist(), temperature=0.6)
    samples = [{"sample_id": f"s{i}", "x": batch["x"][i]} for i in range(7)]

    def collate(rows):
        return {"sample_id": [row["sample_id"] for row in rows], "x": torch.stack([row["x"] for row in rows])}

    with_dropout = lambda model, batch: model[2](shown(model, batch))  # noqa: E731
    runs = {
        size: write_scores(
            lambda batch: attention_scores(model, attention, with_dropout, batch), samples, collate, tmp_path / str(size),
            identity={"score": "attention"}, batch_size=size, progress=False,
        )
        for size in (1, 3, 7)
    }  # fmt: skip
    assert model.training and model[2].training
    for frame in runs.values():
        np.testing.assert_allclose(frame["score"], runs[1]["score"], rtol=1e-12)
    over_all = attention(shown(model, batch)).detach()
    np.testing.assert_allclose(importance(runs[3]["score"].to_numpy()), over_all, rtol=1e-12)


def test_the_shift_cancels_and_an_overflow_names_it():
    model, batch = torch.nn.Identity(), {"h": torch.tensor([[1000.0], [1001.0]], dtype=torch.float64)}
    attention = taught([1.0])
    representation = lambda model, batch: model(batch["h"])  # noqa: E731
    with pytest.raises(ValueError, match=r"exp\(1001 - 0\) does not fit float64"):
        attention_scores(model, attention, representation, batch)
    scores = [attention_scores(model, attention, representation, batch, shift=shift) for shift in (1000.0, 900.0)]
    assert scores[0].tolist() == pytest.approx([1, math.e])
    torch.testing.assert_close(importance(scores[0]), importance(scores[1]), rtol=1e-13, atol=0)
    batch["h"][1] = math.nan
    with pytest.raises(ValueError, match="1 of 2 logits are NaN or infinite, the first for sample 1 of the batch"):
        attention_scores(model, attention, representation, batch)


def test_the_exponent_of_a_weighting_is_an_inverse_temperature():
    h, _ = example(6)
    weight, representation = [0.4, -0.9, 0.3], lambda model, batch: model(batch["h"])
    scores = attention_scores(torch.nn.Identity(), taught(weight), representation, {"h": h})
    for power in (2.0, 0.5, -1.0):
        weights = Weighting(exponent=power, normalisation="sum")(scores)
        sign = [x * math.copysign(1, power) for x in weight]
        torch.testing.assert_close(weights, taught(sign, temperature=1 / abs(power))(h).detach(), rtol=1e-12, atol=0)


def test_weights_from_attention_step_as_the_attended_loss_does():
    model, batch = perceptron().double(), points(5, dtype=torch.float64)
    a = taught(torch.linspace(-1, 1, 8).tolist())(shown(model, batch)).detach()
    (a * residual(model, batch)).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    uniform = Weighting(exponent=0)
    weighted_backward(model, lambda model, batch: 5 * a * residual(model, batch), batch, uniform)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-15)
