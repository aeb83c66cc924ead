"""What holds for gradient norms and the weighted step both ways, by the engine and by the loop over samples: by hand, against finite
differences and against whole-batch autograd."""

import math

import numpy as np
import pytest
import torch
from tiny import perceptron, points, residual, tiny_config, tiny_frame, tiny_pair, tiny_tokenizer
from twins import ARCHITECTURES, WEIGHTINGS, gradient_in, gradients_of_the_whole_batch, nan_label, norms_by_differences, pair_batch

from recsys_importance import gradients, reference
from recsys_importance.importance import Weighting
from recsys_importance.models import CrossEncoder, PairCollator, PairDataset, PairModel, TwoTower
from recsys_importance.objectives import LOSSES, cross_entropy
from recsys_importance.reference import batch_size_of, chosen_parameters

WAYS = {
    "engine": (gradients.gradient_norms, gradients.weighted_backward),
    "loop": (reference.gradient_norms_by_loop, reference.weighted_backward_by_loop),
}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.fixture
def gradient_norms(way):
    return way[0]


@pytest.fixture
def weighted_backward(way):
    return way[1]


# --- norms ------------------------------------------------------------------------------------------------------------------------------


def test_linear_model_by_hand(gradient_norms):
    linear, batch = torch.nn.Linear(3, 1), points()
    slope = 2 * (batch["x"] @ linear.weight[0] + linear.bias - batch["y"]).abs()
    torch.testing.assert_close(gradient_norms(linear, residual, batch), slope * (batch["x"].square().sum(1) + 1).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient_norms(linear, residual, batch, parameters="weight"), slope * batch["x"].norm(dim=1), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(gradient_norms(linear, residual, batch, parameters="bias"), slope, rtol=1e-5, atol=0)


def test_perceptron_against_finite_differences(gradient_norms):
    model, batch = perceptron().double(), points(dtype=torch.float64)
    np.testing.assert_allclose(gradient_norms(model, residual, batch), norms_by_differences(model, residual, batch), rtol=1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bert_against_finite_differences(architecture, gradient_norms):
    from transformers import BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=4, num_hidden_layers=1, intermediate_size=4, max_position_embeddings=12, num_labels=1)
    if architecture == "two_tower":
        model = TwoTower(BertModel(tiny_config(**sizes), add_pooling_layer=False))
    else:
        model = CrossEncoder(BertForSequenceClassification(tiny_config(**sizes)))
    pair, frame = PairModel(model.eval(), tiny_tokenizer()), tiny_frame(3, seed=2)
    batch = PairCollator(pair, max_length=12)([PairDataset(frame)[i] for i in range(3)])
    exact = gradient_norms(model, cross_entropy, batch, dtype=torch.float64)
    batch["labels"] = batch["labels"].double()
    np.testing.assert_allclose(exact, norms_by_differences(model.double(), cross_entropy, batch), rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pairs_against_whole_batch_autograd(architecture, loss, gradient_norms):
    pair, batch = pair_batch(architecture)
    expected = gradients_of_the_whole_batch(pair.model, LOSSES[loss], batch).norm(dim=1)
    norms = gradient_norms(pair.model, LOSSES[loss], batch)
    assert norms.shape == (5,) and norms.dtype == torch.float32 and not norms.requires_grad
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-7)
    assert norms.max() > 1.05 * norms.min()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_company_change_nothing(architecture, gradient_norms):
    pair = tiny_pair(architecture)
    frame = tiny_frame(6).assign(label=1.0)
    frame.loc[0, ["text_a", "text_b"]] = ["red mug", "red cup"]
    frame.loc[5, "text_b"] = " ".join(["steel"] * 40)
    collate, rows = PairCollator(pair), [PairDataset(frame)[i] for i in range(6)]
    together, alone = collate(rows), [collate([row]) for row in rows]
    padding = [sum(int((x == 0).sum()) for name, x in batch.items() if name.endswith("attention_mask")) for batch in (together, *alone)]
    assert padding[0] > 40 and padding[1:] == [0] * 6
    norms = gradient_norms(pair.model, cross_entropy, together, dtype=torch.float64)
    one_by_one = torch.cat([gradient_norms(pair.model, cross_entropy, batch, dtype=torch.float64) for batch in alone])
    torch.testing.assert_close(norms, one_by_one, rtol=1e-9, atol=1e-12)
    reversed_batch = collate(rows[::-1])
    torch.testing.assert_close(gradient_norms(pair.model, cross_entropy, reversed_batch).flip(0), norms.float(), rtol=1e-4, atol=1e-6)


def test_float64_is_computed_on_a_copy(gradient_norms):
    pair, batch = pair_batch("two_tower")
    before = {name: value.clone() for name, value in pair.model.state_dict().items()}
    wide = gradient_norms(pair.model, cross_entropy, batch, dtype=torch.float64)
    assert wide.dtype == torch.float64
    assert all(value.dtype == torch.float32 and torch.equal(value, before[name]) for name, value in pair.model.state_dict().items())
    assert batch["labels"].dtype == torch.float32
    double = tiny_pair("two_tower").model.double()
    expected = gradients_of_the_whole_batch(double, cross_entropy, batch | {"labels": batch["labels"].double()}).norm(dim=1)
    torch.testing.assert_close(wide, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_norms(pair.model, cross_entropy, batch).double(), wide, rtol=1e-4, atol=0)


def test_gradients_already_there_are_left_alone(gradient_norms):
    model, batch = perceptron(), points()
    residual(model, batch).sum().backward()
    before = gradient_in(model).clone()
    gradient_norms(model, residual, batch), gradient_norms(model, residual, batch, dtype=torch.float64)
    assert torch.equal(gradient_in(model), before)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-12, 1e12, 1e25, 1e30])
def test_tiny_and_large_gradients_keep_their_norm(scale, gradient_norms):
    """Squares of entries below 1e-23 or above 1e19 leave float32's range; the norms do not."""
    linear, batch = torch.nn.Linear(3, 1, bias=False), points()
    scaled = gradient_norms(linear, lambda model, batch: scale * model(batch["x"])[:, 0], batch)
    torch.testing.assert_close(scaled, (scale * batch["x"].double().norm(dim=1)).float(), rtol=1e-5, atol=0)


def test_bfloat16_norms_are_added_up_in_float32(gradient_norms):
    model = torch.nn.Linear(1001, 1, bias=False, dtype=torch.bfloat16)
    norms = gradient_norms(model, lambda model, batch: model(batch["x"])[:, 0], {"x": torch.ones(2, 1001, dtype=torch.bfloat16)})
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.full((2,), math.sqrt(1001)), rtol=1e-6, atol=0)


def test_parameters_of_several_dtypes(gradient_norms):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1, dtype=torch.float64))
    batch = points()
    loss = lambda model, batch: model[1](model[0](batch["x"]).double())[:, 0]  # noqa: E731
    expected = gradients_of_the_whole_batch(model, loss, batch).norm(dim=1)
    torch.testing.assert_close(gradient_norms(model, loss, batch).double(), expected.double(), rtol=1e-5, atol=0)


# --- which parameters -----------------------------------------------------------------------------------------------------------------


def test_patterns_choose_and_their_squares_add_up(gradient_norms):
    pair, batch = pair_batch("two_tower")
    parts = ["*.embeddings.*", ["*.layer.0.*", "*.layer.1.*"], ["logit.*"]]
    squares = sum(gradient_norms(pair.model, cross_entropy, batch, parameters=part).double() ** 2 for part in parts)
    whole = gradient_norms(pair.model, cross_entropy, batch).double()
    torch.testing.assert_close(squares.sqrt(), whole, rtol=1e-5, atol=0)
    names = {name for name, _ in pair.model.named_parameters() if ".layer.1.attention." in name}
    assert set(chosen_parameters(pair.model, "*.layer.1.attention.*")) == names and len(names) == 10
    expected = gradients_of_the_whole_batch(pair.model, cross_entropy, batch, names).norm(dim=1)
    found = gradient_norms(pair.model, cross_entropy, batch, parameters="*.layer.1.attention.*")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("patterns", ["head.*", ["head.*", "tail.*"], []])
def test_patterns_that_match_nothing_are_refused(patterns, gradient_norms):
    with pytest.raises(ValueError, match=r"no trainable parameter matches .*; there are 4, such as 0\.weight, 0\.bias, 3\.weight, 3\.bias"):
        gradient_norms(perceptron(), residual, points(), parameters=patterns)


def test_frozen_parameters_do_not_count(gradient_norms):
    model, batch = perceptron(), points()
    model[0].weight.requires_grad_(False)
    assert list(chosen_parameters(model)) == ["0.bias", "3.weight", "3.bias"]
    expected = gradients_of_the_whole_batch(model, residual, batch).norm(dim=1)
    torch.testing.assert_close(gradient_norms(model, residual, batch), expected, rtol=1e-5, atol=0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter matches"):
        gradient_norms(model, residual, batch)


class Tied(torch.nn.Module):
    """y = sum(W tanh(W x)) with one W under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).sum(1, keepdim=True)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_tied_weights_count_once_with_the_sum_of_their_gradients(dtype, gradient_norms):
    torch.manual_seed(0)
    model, batch = Tied(), points()
    assert list(chosen_parameters(model)) == ["first.weight"]
    norms = gradient_norms(model, residual, batch, dtype=dtype)
    expected = norms_by_differences(model.double(), residual, points(dtype=torch.float64))
    np.testing.assert_allclose(norms, expected, rtol=1e-4 if dtype is None else 1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------------------------


def test_a_norm_that_is_not_finite_names_the_sample(gradient_norms):
    batch = points(3)
    batch["y"][1] = float("nan")
    with pytest.raises(ValueError, match="1 of 3 norms are NaN or infinite, the first for sample 1 of the batch"):
        gradient_norms(perceptron(), residual, batch)
    with pytest.raises(ValueError, match="the first for sample 'b'; check its text and label or the learning rate"):
        gradient_norms(perceptron(), residual, batch | {"sample_id": ["a", "b", "c"]})


def test_a_loss_without_the_chosen_parameters_is_refused(gradient_norms):
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 1), "unused": torch.nn.Linear(3, 1)})
    loss = lambda model, batch: residual(model["used"], batch)  # noqa: E731
    assert torch.equal(gradient_norms(model, loss, points()), gradient_norms(model["used"], residual, points()))
    with pytest.raises(ValueError, match="the loss does not depend on any of the chosen parameters"):
        gradient_norms(model, loss, points(), parameters="unused.*")


@pytest.mark.parametrize(("change", "lengths"), [({"y": torch.zeros(5)}, "'x': 6, 'y': 5"), ({"sample_id": ["a"]}, "'sample_id': 1")])
def test_a_batch_of_unequal_columns_is_refused(change, lengths, gradient_norms):
    with pytest.raises(ValueError, match=f"a batch must hold one entry per sample in every column, got lengths .*{lengths}"):
        gradient_norms(perceptron(), residual, points() | change)
    with pytest.raises(ValueError, match="one entry per sample"):
        batch_size_of({"temperature": 2.0})


def test_what_is_not_per_sample_reaches_every_sample(gradient_norms):
    batch = points() | {"temperature": torch.tensor(3.0), "name": "all"}
    loss = lambda model, batch: residual(model, batch) * batch["temperature"] * len(batch["name"])  # noqa: E731
    torch.testing.assert_close(
        gradient_norms(perceptron(), loss, batch), 9 * gradient_norms(perceptron(), residual, batch), rtol=1e-5, atol=0
    )


# --- a weighted step --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_that_of_the_weighted_mean(architecture, weighting, weighted_backward):
    pair, batch = pair_batch(architecture)
    losses = cross_entropy(pair.model, batch)
    norms = gradients_of_the_whole_batch(pair.model, cross_entropy, batch).norm(dim=1)
    weights = weighting(norms, progress=0.5)
    expected = torch.autograd.grad((weights.detach() * losses).mean(), list(pair.model.parameters()))
    step = weighted_backward(pair.model, cross_entropy, batch, weighting, progress=0.5)
    torch.testing.assert_close(step.losses, losses.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.norms, norms, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(step.weights, weights, rtol=1e-3, atol=1e-5)
    assert not any(value.requires_grad for value in step) and {value.dtype for value in step} == {torch.float32}
    scale = torch.cat([g.flatten() for g in expected]).norm()
    difference = torch.cat([(p.grad - g).flatten() for p, g in zip(pair.model.parameters(), expected, strict=True)]).norm()
    assert difference < 1e-4 * scale


def test_the_gradient_of_a_linear_model_by_hand(weighted_backward):
    linear, batch = torch.nn.Linear(3, 1, bias=False), points()
    each = 2 * (batch["x"] @ linear.weight[0] - batch["y"]).detach()[:, None] * batch["x"]  # (B, 3)
    norms = each.norm(dim=1)
    weighted_backward(linear, residual, batch, Weighting())
    torch.testing.assert_close(linear.weight.grad[0], (norms / norms.mean() * each.T).mean(1), rtol=1e-5, atol=1e-6)
    linear.zero_grad()
    weighted_backward(linear, residual, batch, Weighting(normalisation="sum"))
    torch.testing.assert_close(linear.weight.grad[0], (norms / norms.sum() * each.T).mean(1), rtol=1e-5, atol=1e-6)


def test_it_adds_to_the_gradient_that_is_there(weighted_backward):
    model, batch = perceptron(), points()
    weighted_backward(model, residual, batch, Weighting())
    once = gradient_in(model).clone()
    weighted_backward(model, residual, batch, Weighting())
    torch.testing.assert_close(gradient_in(model), 2 * once, rtol=1e-6, atol=1e-7)


def test_norms_over_some_parameters_weight_the_gradient_of_all(weighted_backward):
    model, batch = perceptron(), points()
    model[0].bias.requires_grad_(False)
    step = weighted_backward(model, residual, batch, Weighting(), parameters="3.*")
    names = {"3.weight", "3.bias"}
    norms = gradients_of_the_whole_batch(model, residual, batch, names).norm(dim=1)
    torch.testing.assert_close(step.norms, norms, rtol=1e-5, atol=0)
    expected = (norms / norms.mean())[:, None] * gradients_of_the_whole_batch(model, residual, batch)
    torch.testing.assert_close(gradient_in(model), expected.mean(0), rtol=1e-5, atol=1e-6)
    assert model[0].bias.grad is None


def test_parameters_that_the_loss_does_not_reach_get_no_gradient(weighted_backward):
    """A gradient of zero instead of none would let AdamW decay them."""
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 1), "unused": torch.nn.Linear(3, 1)})
    weighted_backward(model, lambda model, batch: residual(model["used"], batch), points(), Weighting())
    assert model["used"].weight.grad is not None
    assert model["unused"].weight.grad is None and model["unused"].bias.grad is None


@pytest.mark.parametrize(
    ("loss", "change", "weighting", "options", "message"),
    [
        (residual, nan_label, Weighting(), {}, "norms are NaN or infinite"),
        (lambda model, batch: residual(model, batch).mean(), dict, Weighting(), {}, "has shape"),
        (lambda model, batch: residual(model, batch) * (batch["y"] > 0), dict, Weighting(exponent=-1), {}, "infinite weight"),
        (residual, dict, Weighting(threshold=0.99), {}, "leaves none of 6"),
        (residual, dict, Weighting(), dict(progress=2), "progress must be"),
        (residual, dict, Weighting(), dict(parameters="head"), "no trainable parameter matches"),
    ],
)
@pytest.mark.parametrize("there_before", [True, False])
def test_an_error_leaves_the_gradient_as_it_was(loss, change, weighting, options, message, there_before, weighted_backward):
    model, batch = perceptron(), points()
    if there_before:
        residual(model, batch).sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        weighted_backward(model, loss, change(batch), weighting, **options)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert (parameter.grad is None and gradient is None) or torch.equal(parameter.grad, gradient)


def test_dropout_differs_between_calls_and_repeats_with_the_seed(weighted_backward):
    model, batch = perceptron(dropout=0.5).train(), points()
    torch.manual_seed(3)
    first, second = (weighted_backward(model, residual, batch, Weighting()).norms for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(weighted_backward(model, residual, batch, Weighting()).norms, first) and not torch.equal(first, second)


def test_bfloat16_parameters_accumulate_in_float32(weighted_backward):
    """512 equal samples: each adds 1/512, which a bfloat16 sum no longer sees once it has reached 1/2."""
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    batch = {"x": torch.ones(512, 2, dtype=torch.bfloat16)}
    weighted_backward(model, lambda model, batch: model(batch["x"])[:, 0], batch, Weighting(exponent=0))
    torch.testing.assert_close(model.weight.grad.float(), torch.ones(1, 2), rtol=2**-8, atol=0)
