"""Per-sample gradient norms and weighted steps against finite differences and whole-batch autograd."""

import math

import numpy as np
import pytest
import torch
from tiny import Through, tiny_config, tiny_frame, tiny_pair, tiny_tokenizer

from recsys_importance import gradients
from recsys_importance.gradients import RULES, Whole, gradient_norms, rule, sample_gradients, weighted_backward
from recsys_importance.importance import Weighting
from recsys_importance.models import CrossEncoder, PairCollator, PairDataset, PairModel, TwoTower
from recsys_importance.objectives import LOSSES, cross_entropy, squared_error
from recsys_importance.reference import batch_size_of, chosen_parameters, in_dtype

ARCHITECTURES = ("two_tower", "cross_encoder")


# --- models, losses and slow twins ------------------------------------------------------------------------------------------------


def residual(model, batch):
    """(prediction - y)^2 per sample."""
    return (model(batch["x"])[:, 0] - batch["y"]) ** 2


def perceptron(*, seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1)).eval()


def points(count: int = 6, seed: int = 0, dtype=torch.float32) -> dict:
    rng = np.random.default_rng(seed)
    return {"x": torch.tensor(rng.normal(size=(count, 3)), dtype=dtype), "y": torch.tensor(rng.normal(size=count), dtype=dtype)}


def pair_batch(architecture: str, count: int = 5, seed: int = 0):
    pair, frame = tiny_pair(architecture), tiny_frame(count, seed=seed)
    frame["label"] = np.linspace(0, 1, count)
    dataset = PairDataset(frame)
    return pair, PairCollator(pair)([dataset[i] for i in range(count)])


def norms_by_differences(model, loss, batch, step: float = 1e-5) -> np.ndarray:
    """(B,) norms from central differences of every entry of every trainable parameter; the model is float64."""
    squares = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for place in range(len(flat) if parameter.requires_grad else 0):
                middle = flat[place].item()
                flat[place] = middle + step
                above = loss(model, batch)
                flat[place] = middle - step
                squares = squares + ((above - loss(model, batch)) / (2 * step)) ** 2
                flat[place] = middle
    return squares.sqrt().numpy()


def gradients_of_the_whole_batch(model, loss, batch, names=None) -> torch.Tensor:
    """(B, P) gradients of losses[i] of one forward pass over the whole batch: nothing is cut into samples."""
    chosen = [p for name, p in model.named_parameters() if p.requires_grad and (names is None or name in names)]
    rows = []
    for value in loss(model, batch):
        gradients = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gradients, chosen, strict=True)]))
    return torch.stack(rows)


def gradient_in(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Size of the difference relative to the size of what was expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# --- norms ------------------------------------------------------------------------------------------------------------------------------


def test_linear_model_by_hand():
    linear, batch = torch.nn.Linear(3, 1), points()
    slope = 2 * (batch["x"] @ linear.weight[0] + linear.bias - batch["y"]).abs()
    torch.testing.assert_close(gradient_norms(linear, residual, batch), slope * (batch["x"].square().sum(1) + 1).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient_norms(linear, residual, batch, parameters="weight"), slope * batch["x"].norm(dim=1), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(gradient_norms(linear, residual, batch, parameters="bias"), slope, rtol=1e-5, atol=0)


def test_perceptron_against_finite_differences():
    model, batch = perceptron().double(), points(dtype=torch.float64)
    np.testing.assert_allclose(gradient_norms(model, residual, batch), norms_by_differences(model, residual, batch), rtol=1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bert_against_finite_differences(architecture):
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
def test_pairs_against_whole_batch_autograd(architecture, loss):
    pair, batch = pair_batch(architecture)
    expected = gradients_of_the_whole_batch(pair.model, LOSSES[loss], batch).norm(dim=1)
    norms = gradient_norms(pair.model, LOSSES[loss], batch)
    assert norms.shape == (5,) and norms.dtype == torch.float32 and not norms.requires_grad
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-7)
    assert norms.max() > 1.05 * norms.min()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_company_change_nothing(architecture):
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


def test_float64_is_computed_on_a_copy():
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


def test_gradients_already_there_are_left_alone():
    model, batch = perceptron(), points()
    residual(model, batch).sum().backward()
    before = gradient_in(model).clone()
    gradient_norms(model, residual, batch), gradient_norms(model, residual, batch, dtype=torch.float64)
    assert torch.equal(gradient_in(model), before)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-12, 1e12, 1e25, 1e30])
def test_tiny_and_large_gradients_keep_their_norm(scale):
    """Squares of entries below 1e-23 or above 1e19 leave float32's range; the norms do not."""
    linear, batch = torch.nn.Linear(3, 1, bias=False), points()
    scaled = gradient_norms(linear, lambda model, batch: scale * model(batch["x"])[:, 0], batch)
    torch.testing.assert_close(scaled, (scale * batch["x"].double().norm(dim=1)).float(), rtol=1e-5, atol=0)


def test_bfloat16_norms_are_added_up_in_float32():
    model = torch.nn.Linear(1001, 1, bias=False, dtype=torch.bfloat16)
    norms = gradient_norms(model, lambda model, batch: model(batch["x"])[:, 0], {"x": torch.ones(2, 1001, dtype=torch.bfloat16)})
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.full((2,), math.sqrt(1001)), rtol=1e-6, atol=0)


def test_parameters_of_several_dtypes():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1, dtype=torch.float64))
    batch = points()
    loss = lambda model, batch: model[1](model[0](batch["x"]).double())[:, 0]  # noqa: E731
    expected = gradients_of_the_whole_batch(model, loss, batch).norm(dim=1)
    torch.testing.assert_close(gradient_norms(model, loss, batch).double(), expected.double(), rtol=1e-5, atol=0)


# --- which parameters -----------------------------------------------------------------------------------------------------------------


def test_patterns_choose_and_their_squares_add_up():
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
def test_patterns_that_match_nothing_are_refused(patterns):
    with pytest.raises(ValueError, match=r"no trainable parameter matches .*; there are 4, such as 0\.weight, 0\.bias, 3\.weight, 3\.bias"):
        gradient_norms(perceptron(), residual, points(), parameters=patterns)


def test_frozen_parameters_do_not_count():
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
def test_tied_weights_count_once_with_the_sum_of_their_gradients(dtype):
    torch.manual_seed(0)
    model, batch = Tied(), points()
    assert list(chosen_parameters(model)) == ["first.weight"]
    norms = gradient_norms(model, residual, batch, dtype=dtype)
    expected = norms_by_differences(model.double(), residual, points(dtype=torch.float64))
    np.testing.assert_allclose(norms, expected, rtol=1e-4 if dtype is None else 1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduce", "shape"),
    [(lambda losses: losses.mean(), r"\(\)"), (lambda losses: losses[:, None], r"\(6, 1\)"), (lambda losses: losses.repeat(2), r"\(12,\)")],
)
def test_a_loss_that_is_not_per_sample_is_refused(reduce, shape):
    for action in (gradient_norms, lambda *args: weighted_backward(*args, Weighting())):
        with pytest.raises(ValueError, match=rf"the loss of a batch of 6 has shape {shape}, expected \(6,\)"):
            action(perceptron(), lambda model, batch: reduce(residual(model, batch)), points())


def test_a_norm_that_is_not_finite_names_the_sample():
    batch = points(3)
    batch["y"][1] = float("nan")
    with pytest.raises(ValueError, match="1 of 3 norms are NaN or infinite, the first for sample 1 of the batch"):
        gradient_norms(perceptron(), residual, batch)
    with pytest.raises(ValueError, match="the first for sample 'b'; check its text and label or the learning rate"):
        gradient_norms(perceptron(), residual, batch | {"sample_id": ["a", "b", "c"]})


def test_a_loss_without_the_chosen_parameters_is_refused():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 1), "unused": torch.nn.Linear(3, 1)})
    loss = lambda model, batch: residual(model["used"], batch)  # noqa: E731
    assert torch.equal(gradient_norms(model, loss, points()), gradient_norms(model["used"], residual, points()))
    with pytest.raises(ValueError, match="the loss does not depend on any of the chosen parameters"):
        gradient_norms(model, loss, points(), parameters="unused.*")


@pytest.mark.parametrize(("change", "lengths"), [({"y": torch.zeros(5)}, "'x': 6, 'y': 5"), ({"sample_id": ["a"]}, "'sample_id': 1")])
def test_a_batch_of_unequal_columns_is_refused(change, lengths):
    with pytest.raises(ValueError, match=f"a batch must hold one entry per sample in every column, got lengths .*{lengths}"):
        gradient_norms(perceptron(), residual, points() | change)
    with pytest.raises(ValueError, match="one entry per sample"):
        batch_size_of({"temperature": 2.0})


def test_what_is_not_per_sample_reaches_every_sample():
    batch = points() | {"temperature": torch.tensor(3.0), "name": "all"}
    loss = lambda model, batch: residual(model, batch) * batch["temperature"] * len(batch["name"])  # noqa: E731
    torch.testing.assert_close(
        gradient_norms(perceptron(), loss, batch), 9 * gradient_norms(perceptron(), residual, batch), rtol=1e-5, atol=0
    )


# --- a weighted step --------------------------------------------------------------------------------------------------------------------


WEIGHTINGS = {
    "article": Weighting(),
    "sum": Weighting(normalisation="sum"),
    "inverse": Weighting(exponent=-1),
    "clip": Weighting(exponent=2, clip=1.5),
    "threshold": Weighting(threshold=0.4, threshold_on="quantile"),
    "half annealed": Weighting(anneal=(0.25, 0.75)),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_that_of_the_weighted_mean(architecture, weighting):
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


def test_the_gradient_of_a_linear_model_by_hand():
    linear, batch = torch.nn.Linear(3, 1, bias=False), points()
    each = 2 * (batch["x"] @ linear.weight[0] - batch["y"]).detach()[:, None] * batch["x"]  # (B, 3)
    norms = each.norm(dim=1)
    weighted_backward(linear, residual, batch, Weighting())
    torch.testing.assert_close(linear.weight.grad[0], (norms / norms.mean() * each.T).mean(1), rtol=1e-5, atol=1e-6)
    linear.zero_grad()
    weighted_backward(linear, residual, batch, Weighting(normalisation="sum"))
    torch.testing.assert_close(linear.weight.grad[0], (norms / norms.sum() * each.T).mean(1), rtol=1e-5, atol=1e-6)


def test_it_adds_to_the_gradient_that_is_there():
    model, batch = perceptron(), points()
    weighted_backward(model, residual, batch, Weighting())
    once = gradient_in(model).clone()
    weighted_backward(model, residual, batch, Weighting())
    torch.testing.assert_close(gradient_in(model), 2 * once, rtol=1e-6, atol=1e-7)


def test_norms_over_some_parameters_weight_the_gradient_of_all():
    model, batch = perceptron(), points()
    model[0].bias.requires_grad_(False)
    step = weighted_backward(model, residual, batch, Weighting(), parameters="3.*")
    names = {"3.weight", "3.bias"}
    norms = gradients_of_the_whole_batch(model, residual, batch, names).norm(dim=1)
    torch.testing.assert_close(step.norms, norms, rtol=1e-5, atol=0)
    expected = (norms / norms.mean())[:, None] * gradients_of_the_whole_batch(model, residual, batch)
    torch.testing.assert_close(gradient_in(model), expected.mean(0), rtol=1e-5, atol=1e-6)
    assert model[0].bias.grad is None


def test_parameters_that_the_loss_does_not_reach_get_no_gradient():
    """A gradient of zero instead of none would let AdamW decay them."""
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 1), "unused": torch.nn.Linear(3, 1)})
    weighted_backward(model, lambda model, batch: residual(model["used"], batch), points(), Weighting())
    assert model["used"].weight.grad is not None
    assert model["unused"].weight.grad is None and model["unused"].bias.grad is None


def nan_label(batch):
    return batch | {"y": torch.full_like(batch["y"], float("nan"))}


@pytest.mark.parametrize(
    ("loss", "change", "weighting", "options", "message"),
    [
        (residual, nan_label, Weighting(), {}, "norms are NaN or infinite"),
        (lambda model, batch: residual(model, batch).mean(), dict, Weighting(), {}, "has shape"),
        (lambda model, batch: residual(model, batch) * 0, dict, Weighting(), {}, "all scores are zero"),
        (lambda model, batch: residual(model, batch) * (batch["y"] > 0), dict, Weighting(exponent=-1), {}, "infinite weight"),
        (residual, dict, Weighting(threshold=0.99), {}, "leaves none of 6"),
        (residual, dict, Weighting(), dict(progress=2), "progress must be"),
        (residual, dict, Weighting(), dict(parameters="head"), "no trainable parameter matches"),
    ],
)
@pytest.mark.parametrize("there_before", [True, False])
def test_an_error_leaves_the_gradient_as_it_was(loss, change, weighting, options, message, there_before):
    model, batch = perceptron(), points()
    if there_before:
        residual(model, batch).sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        weighted_backward(model, loss, change(batch), weighting, **options)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert (parameter.grad is None and gradient is None) or torch.equal(parameter.grad, gradient)


class Remembering(torch.nn.Module):
    """Dropout that remembers the mask of every pass, then a linear model."""

    def __init__(self):
        super().__init__()
        self.dropout, self.linear, self.masks = torch.nn.Dropout(0.5), torch.nn.Linear(16, 1, bias=False), []

    def forward(self, x):
        mask = self.dropout(torch.ones_like(x))
        self.masks.append(mask)
        return self.linear(x * mask)


def test_dropout_is_the_same_in_the_norm_and_in_the_gradient():
    torch.manual_seed(0)
    model = Remembering().train()
    batch = {"x": torch.randn(5, 16), "y": torch.randn(5)}
    step = weighted_backward(model, residual, batch, Weighting())
    (masks,) = model.masks  # one forward pass
    assert len({tuple(mask.tolist()) for mask in masks}) == 5
    x = batch["x"] * masks
    each = 2 * (x @ model.linear.weight[0] - batch["y"]).detach()[:, None] * x
    norms = each.norm(dim=1)
    torch.testing.assert_close(step.norms, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.linear.weight.grad[0], (norms / norms.mean() * each.T).mean(1), rtol=1e-5, atol=1e-6)


def test_dropout_differs_between_calls_and_repeats_with_the_seed():
    model, batch = perceptron(dropout=0.5).train(), points()
    torch.manual_seed(3)
    first, second = (weighted_backward(model, residual, batch, Weighting()).norms for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(weighted_backward(model, residual, batch, Weighting()).norms, first) and not torch.equal(first, second)


def test_bfloat16_parameters_accumulate_in_float32():
    """512 equal samples: each adds 1/512, which a bfloat16 sum no longer sees once it has reached 1/2."""
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    batch = {"x": torch.ones(512, 2, dtype=torch.bfloat16)}
    weighted_backward(model, lambda model, batch: model(batch["x"])[:, 0], batch, Weighting(exponent=0))
    torch.testing.assert_close(model.weight.grad.float(), torch.ones(1, 2), rtol=2**-8, atol=0)


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
    "a weight used by a function": (
        lambda: Through(lambda m, x: torch.nn.functional.linear(m.table(x), m.table.weight), table=table()),
        words(),
        OUTSIDE,
    ),
    "a weight used by a function below its own module": (
        lambda: Through(lambda m, x: m.linear(torch.nn.functional.linear(x, m.linear.weight)), linear=linear()),
        vectors(),
        OUTSIDE,
    ),
    "a table read as a whole": (
        lambda: Through(lambda m, x: m.linear(x + m.table.weight[:5]), table=table(), linear=linear()),
        vectors(),
        OUTSIDE,
    ),
    "a penalty on a weight": (lambda: Through(lambda m, x: m.linear(x) * m.linear.weight.norm(), linear=linear()), vectors(), OUTSIDE),
    "samples and positions in one dimension": (
        lambda: Through(lambda m, x: m.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2]), linear=linear()),
        vectors(),
        r"module 'linear' \(Linear\) returned a tensor of shape \(15, 4\) in a batch of 3 samples; expected the samples as first",
    ),
    "positions first": (
        lambda: Through(lambda m, x: m.linear(x.transpose(0, 1)).transpose(0, 1), linear=linear()),
        vectors(),
        r"module 'linear' \(Linear\) returned a tensor of shape \(5, 3, 4\) in a batch of 3 samples",
    ),
    "a vector for all": (
        lambda: Through(lambda m, x: x * m.linear(torch.ones(4)), linear=linear()),
        vectors(),
        r"returned a tensor of shape \(4,\)",
    ),
    "a vector for all, as long as the batch": (
        lambda: Through(lambda m, x: x[..., :3] * m.linear(torch.ones(4)), linear=linear(3)),
        vectors(),
        r"module 'linear' \(Linear\).* shape",
    ),
    "as many positions as samples": (
        lambda: Through(lambda m, x: m.linear(x + m.table(torch.arange(x.shape[1]))), table=table(), linear=linear()),
        vectors(3),
        r"module 'table' \(Embedding\) was given the places 0 to 2 for 3 samples: .* give positions as \(1, 3\)",
    ),
    "as many positions as samples, not from 0": (
        lambda: Through(lambda m, x: m.linear(x + m.table(torch.arange(x.shape[1]) + 2)), table=table(), linear=linear()),
        vectors(3),
        r"module 'table' \(Embedding\) was given the places 2 to 4 for 3 samples",
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
        r"no rule for the parameters weight, bias of module 'norm' \(BatchNorm1d\)",
    ),
    "batch normalisation, sample by sample": (
        lambda: Through(lambda m, x: m.norm(m.linear(x).mT).mT, linear=linear(), norm=torch.nn.BatchNorm1d(4)),
        vectors(),
        r"module 'norm' \(BatchNorm1d\) gives another result for sample 0 alone",
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


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_nothing_is_computed_below_the_lowest_chosen_parameter(kernels, monkeypatch):
    monkeypatch.setattr(gradients, "KERNELS", kernels)
    model = Through(lambda m, x: m.head(Costly.apply(m.body(m.table(x)))), table=table(), body=linear(), head=linear())
    Costly.passes = 0
    gradient_norms(model, total, words(), parameters="head.*")
    assert Costly.passes == 0
    gradient_norms(model, total, words(), parameters="table.*")
    assert Costly.passes == 1


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_hooks_of_others_that_change_inputs_outputs_and_gradients_count(kernels, monkeypatch):
    monkeypatch.setattr(gradients, "KERNELS", kernels)
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
    weighted_backward(model, residual, batch, Weighting())
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
