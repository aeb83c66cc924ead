"""Per-sample gradient norms against finite differences and whole-batch autograd; scores survive every kind of interruption."""

import functools
import hashlib
import json
import math
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_config, tiny_frame, tiny_pair, tiny_tokenizer

from recsys_importance import gradients
from recsys_importance.gradients import (
    batch_size_of,
    chosen_parameters,
    gradient_norms,
    read_scores,
    score_dataset,
    weighted_backward,
    write_scores,
)
from recsys_importance.importance import Weighting
from recsys_importance.models import CrossEncoder, PairCollator, PairDataset, PairModel, TwoTower
from recsys_importance.objectives import LOSSES, cross_entropy, squared_error

ARCHITECTURES = ("two_tower", "cross_encoder")


# --- models, losses and slow twins ------------------------------------------------------------------------------------------------


def residual(model, batch):
    """(prediction - y)^2 per sample."""
    return (model(batch["x"])[:, 0] - batch["y"]) ** 2


def absolute(model, batch):
    """|prediction - y| per sample."""
    return (model(batch["x"])[:, 0] - batch["y"]).abs()


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
    [(lambda losses: losses.mean(), r"\(\)"), (lambda losses: losses[:, None], r"\(1, 1\)"), (lambda losses: losses.repeat(2), r"\(2,\)")],
)
def test_a_loss_that_is_not_per_sample_is_refused(reduce, shape):
    for action in (gradient_norms, lambda *args: weighted_backward(*args, Weighting())):
        with pytest.raises(ValueError, match=rf"the loss of a batch of one has shape {shape}, expected \(1,\)"):
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
    masks = torch.cat(model.masks[:5])  # the noise of the passes whose norms were taken
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


# --- a whole data set -------------------------------------------------------------------------------------------------------------------


class Points:
    """The samples of `points` as a data set; reading `fails_at` raises."""

    def __init__(self, count: int = 22, *, fails_at: int | None = None, **columns):
        self.columns = points(count, seed=5) | {"sample_id": [f"s{i:03d}" for i in range(count)]} | columns
        self.fails_at = fails_at

    def __len__(self):
        return len(self.columns["sample_id"])

    def __getitem__(self, row):
        if row == self.fails_at:
            raise InterruptedError
        return {name: values[row] for name, values in self.columns.items()}


def stack(rows):
    return {name: [row[name] for row in rows] if name == "sample_id" else torch.stack([row[name] for row in rows]) for name in rows[0]}


SETTINGS = dict(batch_size=3, shard_size=8, progress=False)


def score_points(folder, dataset=None, *, model=None, loss=residual, **changes):
    return score_dataset(model or perceptron(), loss, Points() if dataset is None else dataset, stack, folder, **SETTINGS | changes)


def contents(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    score_points(folder)
    return contents(folder)


def test_scores_are_the_norms_of_the_batches(tmp_path):
    dataset, model = Points(), perceptron()
    scores = score_points(tmp_path, dataset)
    expected = []
    for start, stop in [(0, 8), (8, 16), (16, 22)]:
        for first in range(start, stop, 3):
            expected.append(gradient_norms(model, residual, stack([dataset[i] for i in range(first, min(first + 3, stop))])))
    assert scores.columns.tolist() == ["sample_id", "score"] and scores["sample_id"].tolist() == dataset.columns["sample_id"]
    assert scores["score"].dtype == np.float32 and scores["sample_id"].dtype == "str" and scores.index.tolist() == list(range(22))
    np.testing.assert_array_equal(scores["score"], torch.cat(expected))
    pd.testing.assert_frame_equal(read_scores(tmp_path), scores)


def test_pairs_are_scored_with_dropout_off_and_modes_come_back(tmp_path):
    pair, frame = tiny_pair(dropout=0.5), tiny_frame(7)
    expected = gradient_norms(pair.model, cross_entropy, PairCollator(pair)([PairDataset(frame)[i] for i in range(7)]))
    pair.model.train()
    pair.model.encoder.embeddings.eval()
    modes = [module.training for module in pair.model.modules()]
    for name, dtype, tolerance in (("narrow", None, 1e-4), ("wide", torch.float64, 1e-4)):
        arguments = (pair.model, cross_entropy, PairDataset(frame), PairCollator(pair), tmp_path / name)
        scores = score_dataset(*arguments, dtype=dtype, batch_size=2, shard_size=3, progress=False)
        np.testing.assert_allclose(scores["score"], expected, rtol=tolerance)
        assert scores["score"].dtype == (np.float32 if dtype is None else np.float64)
    assert [module.training for module in pair.model.modules()] == modes
    assert all(parameter.grad is None for parameter in pair.model.parameters())


def test_the_layout_of_the_shards(tmp_path):
    score_points(tmp_path)
    assert sorted(contents(tmp_path)) == ["identity.json", "scores-00000.parquet", "scores-00001.parquet", "scores-00002.parquet"]
    sizes = [len(pd.read_parquet(tmp_path / f"scores-{shard:05d}.parquet")) for shard in range(3)]
    assert sizes == [8, 8, 6]
    identity = json.loads((tmp_path / "identity.json").read_text())
    assert identity["samples"] == 22 and identity["loss"].startswith("residual ") and identity["parameters"] == ["*"]


@pytest.mark.parametrize("fails_at", [2, 8, 12, 20])
def test_a_run_that_fails_continues_to_the_same_bytes(fails_at, tmp_path, uninterrupted):
    with pytest.raises(InterruptedError):
        score_points(tmp_path, Points(fails_at=fails_at))
    assert len(list(tmp_path.glob("*.parquet"))) == fails_at // 8 and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(
        ValueError, match=f"holds {fails_at // 8 * 8} of 22 scores; run score_dataset again with the same arguments to finish it"
    ):
        read_scores(tmp_path)
    score_points(tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_a_finished_run_is_read_and_not_computed_again(tmp_path, uninterrupted, monkeypatch):
    scores = score_points(tmp_path)
    monkeypatch.setattr(gradients, "gradient_norms", lambda *args, **kwargs: pytest.fail("a finished run was scored again"))
    pd.testing.assert_frame_equal(score_points(tmp_path), scores)
    assert contents(tmp_path) == uninterrupted


def test_losses_of_one_name_but_other_code_or_arguments_are_other_losses(tmp_path):
    score_points(tmp_path / "code", loss=lambda model, batch: residual(model, batch))
    with pytest.raises(ValueError, match="another run .*loss"):
        score_points(tmp_path / "code", loss=lambda model, batch: residual(model, batch) ** 2)
    score_points(tmp_path / "constant", loss=lambda model, batch: residual(model, batch) * 2)
    with pytest.raises(ValueError, match="another run .*loss"):
        score_points(tmp_path / "constant", loss=lambda model, batch: residual(model, batch) * 3)
    score_points(tmp_path / "arguments", loss=functools.partial(scaled, factor=1.0))
    with pytest.raises(ValueError, match="another run .*loss"):
        score_points(tmp_path / "arguments", loss=functools.partial(scaled, factor=2.0))


def scaled(model, batch, factor):
    return factor * residual(model, batch)


def test_a_shard_that_is_lost_is_computed_again(tmp_path, uninterrupted):
    score_points(tmp_path)
    (tmp_path / "scores-00001.parquet").unlink()
    score_points(tmp_path)
    assert contents(tmp_path) == uninterrupted


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_gradients import Points, score_points

class Slow(Points):
    def __getitem__(self, row):
        time.sleep(0.05 if row else 0)
        return super().__getitem__(row)

score_points({folder!r}, Slow())
"""


def test_a_run_that_is_killed_continues_to_the_same_bytes(tmp_path, repository, uninterrupted):
    folder, first = tmp_path / "scores", tmp_path / "scores" / "scores-00000.parquet"
    code = KILLED.format(tests=str(repository / "tests"), folder=str(folder))
    run = subprocess.Popen([sys.executable, "-c", code], cwd=repository, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not first.exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
        errors = run.communicate()[1].decode()
    assert run.returncode == -signal.SIGKILL, errors
    assert first.exists() and not (folder / "scores-00002.parquet").exists()
    score_points(folder)
    assert contents(folder) == uninterrupted


def test_leftovers_of_a_kill_in_the_middle_of_writing_do_no_harm(tmp_path, uninterrupted):
    with pytest.raises(InterruptedError):
        score_points(tmp_path, Points(fails_at=8))
    (tmp_path / "scores-00001.parquet.tmp").write_bytes(b"PAR1 half a shard")
    with pytest.raises(ValueError, match="holds 8 of 22 scores"):
        read_scores(tmp_path)
    score_points(tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_leftovers_of_a_kill_before_the_first_shard_do_no_harm(tmp_path, uninterrupted):
    (tmp_path / "identity.json.tmp").write_text('{"samples": ')
    score_points(tmp_path)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model", dict(model=perceptron(seed=1))),
        ("loss", dict(loss=absolute)),
        ("parameters", dict(parameters="3.*")),
        ("dtype", dict(dtype=torch.float64)),
        ("batch_size", dict(batch_size=4)),
        ("shard_size", dict(shard_size=9)),
        ("samples", dict(dataset=Points(21))),
    ],
)
def test_another_run_is_refused_the_folder(key, change, tmp_path):
    score_points(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=f"holds scores of another run .*{key} .* there, .* now.*; choose another folder or delete this one"
    ):
        score_points(tmp_path, **change)
    assert contents(tmp_path) == before


def test_samples_of_another_name_are_refused_the_folder(tmp_path):
    score_points(tmp_path)
    with pytest.raises(ValueError, match="holds scores of another run: samples 0 to 7 had other contents"):
        score_points(tmp_path, Points(sample_id=[f"t{i:03d}" for i in range(22)]))


@pytest.mark.parametrize("column", ["x", "y"])
def test_the_same_samples_with_other_contents_are_refused_the_folder(column, tmp_path):
    """Labels with noise in them keep their sample_id: the scores of the clean ones must not pass for theirs."""
    clean = Points()
    score_points(tmp_path, clean)
    changed = clean.columns[column].clone()
    changed[4:9] += 1
    with pytest.raises(ValueError, match="another run"):
        score_points(tmp_path, Points(**{column: changed}))


@pytest.mark.parametrize(("first", "second"), [(1, 3), (1, 20)], ids=["in one shard", "in two shards"])
def test_a_sample_id_that_occurs_twice_is_refused(first, second, tmp_path):
    names = [f"s{i:03d}" for i in range(22)]
    names[second] = names[first]
    for _ in range(2):
        with pytest.raises(ValueError, match="sample_id 's001' occurs twice; scores are keyed by sample_id, so it must be unique"):
            score_points(tmp_path, Points(sample_id=names))


def test_a_score_that_is_not_finite_is_refused_and_its_shard_not_written(tmp_path):
    labels = Points().columns["y"].clone()
    labels[10] = float("inf")
    with pytest.raises(ValueError, match="norms are NaN or infinite, the first for sample 's010'"):
        score_points(tmp_path, Points(y=labels))
    assert sorted(contents(tmp_path)) == ["identity.json", "scores-00000.parquet"]
    with pytest.raises(ValueError, match="2 scores are NaN or infinite, the first for sample 's001'"):
        scorer = lambda batch: torch.tensor([1.0, float("nan"), float("inf")])  # noqa: E731
        write_scores(scorer, Points(3), stack, tmp_path / "other", identity={}, progress=False)
    assert sorted(contents(tmp_path / "other")) == ["identity.json"]


def test_an_empty_data_set_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="the data set has no samples to score"):
        score_dataset(perceptron(), residual, [], stack, tmp_path / "scores", **SETTINGS)
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("change", [dict(batch_size=0), dict(shard_size=0), dict(batch_size=-1)])
def test_sizes_below_one_are_refused(change, tmp_path):
    with pytest.raises(ValueError, match="batch_size and shard_size must be 1 or more, got"):
        score_points(tmp_path / "scores", **change)
    assert not (tmp_path / "scores").exists()


def test_a_folder_without_scores(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no scores \(no identity.json\); run score_dataset first"):
        read_scores(tmp_path)


def test_any_scorer_writes_scores(tmp_path):
    scores = write_scores(lambda batch: batch["x"].norm(dim=1), Points(), stack, tmp_path, identity={"score": "length"}, **SETTINGS)
    np.testing.assert_allclose(scores["score"], Points().columns["x"].norm(dim=1), rtol=1e-6)
    with pytest.raises(ValueError, match="score 'length' there, 'other' now"):
        write_scores(lambda batch: batch["x"].norm(dim=1), Points(), stack, tmp_path, identity={"score": "other"}, **SETTINGS)


def test_a_scorer_that_gives_another_number_of_scores_is_refused(tmp_path):
    with pytest.raises(ValueError):
        write_scores(lambda batch: batch["x"].norm(dim=1)[:2], Points(), stack, tmp_path, identity={}, **SETTINGS)
    assert not list(tmp_path.glob("*.parquet"))


def test_memory_holds_one_batch_at_a_time(tmp_path):
    alive, most = weakref.WeakSet(), []

    class Batch(dict):
        """A batch that can be counted."""

        __hash__ = object.__hash__

    def counted(rows):
        most.append(len(alive))
        batch = Batch(stack(rows))
        alive.add(batch)
        return batch

    write_scores(lambda batch: batch["x"].norm(dim=1), Points(80), counted, tmp_path, identity={}, **SETTINGS)
    assert len(most) == 30 and max(most) <= 1  # 10 shards of 8 in batches of 3; the one before may live while the next is made


def test_progress_goes_to_standard_error(tmp_path, capfd):
    score_points(tmp_path / "first", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "scoring" in err and "22/22" in err
    score_points(tmp_path / "first", progress=True)
    assert "22/22" in capfd.readouterr().err
    score_points(tmp_path / "second")
    assert capfd.readouterr() == ("", "")


# --- on a GPU ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_and_scores_on_a_gpu_are_those_of_the_cpu(architecture, tmp_path):
    pair, batch = pair_batch(architecture)
    on_gpu = tiny_pair(architecture, device="cuda").model
    moved = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    expected = gradient_norms(pair.model, cross_entropy, batch)
    torch.testing.assert_close(gradient_norms(on_gpu, cross_entropy, moved).cpu(), expected, rtol=1e-3, atol=1e-5)
    frame = tiny_frame(9)
    arguments = (squared_error, PairDataset(frame), PairCollator(pair))
    scores = [score_dataset(model, *arguments, tmp_path / name, progress=False) for name, model in (("gpu", on_gpu), ("cpu", pair.model))]
    np.testing.assert_allclose(scores[0]["score"], scores[1]["score"], rtol=1e-3)


@pytest.mark.gpu
def test_dropout_on_a_gpu_is_the_same_in_the_norm_and_in_the_gradient():
    torch.manual_seed(0)
    model = Remembering().cuda().train()
    batch = {"x": torch.randn(5, 16, device="cuda"), "y": torch.randn(5, device="cuda")}
    state = torch.cuda.get_rng_state()
    weighted_backward(model, residual, batch, Weighting())
    assert torch.equal(torch.cuda.get_rng_state(), state)
    x = batch["x"] * torch.cat(model.masks[:5])
    each = 2 * (x @ model.linear.weight[0] - batch["y"]).detach()[:, None] * x
    norms = each.norm(dim=1)
    torch.testing.assert_close(model.linear.weight.grad[0], (norms / norms.mean() * each.T).mean(1), rtol=1e-4, atol=1e-5)
