"""The gradient of a selective step against the dense weighted gradient, and what is scored, kept, saved and refused."""

import pytest
import torch
from tiny import perceptron, points, residual
from twins import ARCHITECTURES, gradient_in, nan_label, off, pair_batch

from recsys_importance import selective
from recsys_importance.importance import Weighting
from recsys_importance.models import pair_logits
from recsys_importance.objectives import cross_entropy
from recsys_importance.proxies import error_norms
from recsys_importance.selective import forward_scores, samples_of, selective_backward

HALF = Weighting(exponent=0, threshold=0.5, threshold_on="quantile")
WEIGHTINGS = {
    "uniform over the upper half": HALF,
    "article over a quantile": Weighting(threshold=0.4, threshold_on="quantile"),
    "threshold on importance": Weighting(threshold=0.1),
    "clip, nothing dropped": Weighting(exponent=2, clip=1.5),
    "inverse": Weighting(exponent=-1, threshold=0.3, threshold_on="quantile"),
}


def numbers(model, loss, batch):
    """Scores for the rows as the batch gives them."""
    return batch["score"]


def scored(*scores: float) -> dict:
    return points(len(scores)) | {"score": torch.tensor(scores)}


def dense(model, loss, batch, weights) -> torch.Tensor:
    """Gradient of mean_i(w_i l_i) from a training pass over all samples."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((weights * loss(model, batch)).mean(), chosen)
    return torch.cat([g.flatten() for g in gradients])


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr(selective, "fast_bfloat16", lambda device: False)


# --- scores -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_score_is_the_distance_of_probability_and_label(architecture, float32):
    """For binary cross-entropy dl/dz = sigmoid(z) - y, so EL2N is its absolute value; dropout is off, whatever mode the model is in."""
    pair, batch = pair_batch(architecture, count=6)
    with torch.no_grad():
        expected = (torch.sigmoid(pair_logits(pair.model, batch)) - batch["labels"]).abs()
    pair.model.train()
    state = torch.get_rng_state()
    found = forward_scores(pair.model, cross_entropy, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert all(module.training for module in pair.model.modules()) and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in pair.model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_bfloat16_a_score_keeps_two_digits(architecture, monkeypatch):
    pair, batch = pair_batch(architecture, count=12)
    seen = []

    def watched(model, batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return cross_entropy(model, batch)

    found = {}
    for fast in (False, True):
        monkeypatch.setattr(selective, "fast_bfloat16", lambda device, fast=fast: fast)
        found[fast] = forward_scores(pair.model, watched, batch)
    assert seen == [False, True] and found[True].dtype == torch.float32
    difference = (found[True] - found[False]).abs().max().item()
    assert 0 < difference < 0.03  # probabilities: two digits


def test_bfloat16_is_used_where_the_processor_has_it(monkeypatch):
    cpu = torch.device("cpu")
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for having in ((), names[:1], names[1:], names):
        for name in names:
            monkeypatch.setattr(torch.cpu, name, lambda name=name, having=having: name in having, raising=False)
        assert selective.fast_bfloat16(cpu) is bool(having)
    for name in names:
        monkeypatch.delattr(torch.cpu, name)  # a torch without the question
    assert selective.fast_bfloat16(cpu) is False
    assert selective.fast_bfloat16(torch.device("meta")) is False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert selective.fast_bfloat16(torch.device("cuda")) is True


def test_samples_are_taken_from_every_column_in_the_order_asked_for():
    batch = {"x": torch.arange(8).view(4, 2), "name": list("abcd"), "pair": (1, 2, 3, 4), "temperature": torch.tensor(0.5), "note": "all"}
    found = samples_of(batch, torch.tensor([3, 1]))
    assert found["x"].tolist() == [[6, 7], [2, 3]] and found["name"] == ["d", "b"] and found["pair"] == (4, 2)
    assert found["temperature"] is batch["temperature"] and found["note"] == "all"
    assert samples_of(batch, [])["x"].shape == (0, 2)


# --- the step ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_the_dense_weighted_one(architecture, mode, weighting, float32):
    pair, batch = pair_batch(architecture, count=9)
    for module in pair.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    pair.model.train(mode == "train")
    scores = forward_scores(pair.model, cross_entropy, batch)
    weights = weighting(scores)
    expected = dense(pair.model, cross_entropy, batch, weights)
    found = selective_backward(pair.model, cross_entropy, batch, weighting)
    assert off(gradient_in(pair.model), expected) < 2e-6
    torch.testing.assert_close(found.scores, scores, rtol=0, atol=0)
    torch.testing.assert_close(found.weights, weights, rtol=0, atol=0)
    assert found.kept.tolist() == weights.nonzero().flatten().tolist() and found.weights.mean().item() == pytest.approx(1)
    losses = cross_entropy(pair.model, batch).detach()
    torch.testing.assert_close(found.losses, losses[found.kept], rtol=1e-5, atol=1e-6)
    assert not found.losses.requires_grad and pair.model.training is (mode == "train")


def test_only_what_is_kept_goes_through_the_training_pass():
    """Two passes: the score's over all six, without gradient; the training's over the upper half, with the dropout of the model."""
    model, seen = perceptron(dropout=0.5).train(), []
    model.register_forward_hook(lambda module, args, output: seen.append((len(output), output.requires_grad, module[2].training)))
    found = selective_backward(model, residual, points(6), HALF, score=forward_scores)
    upper = found.scores.argsort(descending=True)[:3]
    assert sorted(upper.tolist()) == found.kept.tolist() and found.weights.tolist() == [2 * (i in found.kept) for i in range(6)]
    assert seen == [(6, False, False), (3, True, True)]


def test_dropout_is_drawn_for_those_who_are_kept_as_a_step_on_them_would(float32):
    batch = scored(3.0, 1.0, 2.0, 0.5, 4.0, 1.5)
    model = perceptron(dropout=0.5).train()
    torch.manual_seed(5)
    selective_backward(model, residual, batch, HALF, score=numbers)
    found = gradient_in(model).clone()
    torch.manual_seed(5)
    expected = dense(model, residual, samples_of(batch, [0, 2, 4]), torch.ones(3))
    torch.testing.assert_close(found, expected)
    torch.manual_seed(6)
    assert off(dense(model, residual, samples_of(batch, [0, 2, 4]), torch.ones(3)), expected) > 0.01  # dropout was on


def test_gradients_are_added_to_those_there_are():
    model, batch = perceptron(), scored(3.0, 1.0, 2.0, 0.5)
    selective_backward(model, residual, batch, HALF, score=numbers)
    once = gradient_in(model).clone()
    selective_backward(model, residual, batch, HALF, score=numbers)
    torch.testing.assert_close(gradient_in(model), 2 * once)


def test_equal_scores_at_the_threshold_are_all_kept():
    found = selective_backward(perceptron(), residual, scored(1.0, 1.0, 1.0, 1.0), HALF, score=numbers)
    assert found.kept.tolist() == [0, 1, 2, 3] and found.weights.tolist() == [1, 1, 1, 1]
    found = selective_backward(perceptron(), residual, scored(2.0, 1.0, 1.0, 0.5), HALF, score=numbers)
    assert found.kept.tolist() == [0, 1, 2] and found.weights.tolist() == pytest.approx([4 / 3, 4 / 3, 4 / 3, 0])


def test_a_score_of_zero_is_no_weight_and_no_training():
    found = selective_backward(perceptron(), residual, scored(2.0, 0.0, 6.0), Weighting(), score=numbers)
    assert found.kept.tolist() == [0, 2] and found.weights.tolist() == pytest.approx([0.75, 0, 2.25])


def test_while_annealing_has_not_begun_all_are_trained_alike():
    weighting, batch, model = Weighting(threshold=0.5, threshold_on="quantile", anneal=(0.2, 0.6)), scored(3.0, 1.0, 5.0, 0.5), perceptron()
    for progress, kept in ((0.0, 4), (0.2, 4), (0.4, 4), (0.6, 2), (1.0, 2)):
        model.zero_grad()
        found = selective_backward(model, residual, batch, weighting, score=numbers, progress=progress)
        share = min(max((progress - 0.2) / 0.4, 0), 1)
        expected = [1 + share * (final - 1) for final in (1.5, 0, 2.5, 0)]
        assert len(found.kept) == kept and found.weights.tolist() == pytest.approx(expected)
        assert off(gradient_in(model), dense(model, residual, batch, torch.tensor(expected))) < 1e-6


def test_a_scaler_leaves_the_gradient_scaled():
    model, batch = perceptron(), scored(3.0, 1.0, 2.0, 0.5)
    selective_backward(model, residual, batch, HALF, score=numbers)
    plain = gradient_in(model).clone()
    model.zero_grad()
    selective_backward(model, residual, batch, HALF, score=numbers, scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    torch.testing.assert_close(gradient_in(model), 64 * plain)
    model.zero_grad()
    selective_backward(model, residual, batch, HALF, score=numbers, scaler=torch.amp.GradScaler("cpu", enabled=False))
    torch.testing.assert_close(gradient_in(model), plain)


def test_frozen_parameters_stay_without_gradient():
    model, batch = perceptron(), scored(3.0, 1.0, 2.0, 0.5)
    model[0].requires_grad_(False)
    selective_backward(model, residual, batch, HALF, score=numbers)
    assert model[0].weight.grad is None
    torch.testing.assert_close(gradient_in(model), dense(model, residual, samples_of(batch, [0, 2]), torch.ones(2)))


# --- what is refused --------------------------------------------------------------------------------------------------------------------


def test_a_score_that_is_not_finite_names_the_sample():
    batch = nan_label(points(3)) | {"sample_id": ["a", "b", "c"]}
    with pytest.raises(ValueError, match="3 of 3 norms are NaN or infinite, the first for sample 'a'"):
        selective_backward(perceptron(), residual, batch, HALF)
    with pytest.raises(ValueError, match="1 of 3 norms are NaN or infinite, the first for sample 'b'"):
        selective_backward(perceptron(), residual, scored(1.0, float("inf"), 2.0) | {"sample_id": list("abc")}, HALF, score=numbers)


def test_a_loss_that_is_not_finite_names_the_sample_if_it_is_trained():
    batch = scored(3.0, 1.0, 2.0) | {"sample_id": list("abc")}
    batch["y"][1] = float("nan")
    model, without_the_least = perceptron(), Weighting(threshold=0.4, threshold_on="quantile")
    assert selective_backward(model, residual, batch, without_the_least, score=numbers).kept.tolist() == [0, 2]
    before = gradient_in(model).clone()
    with pytest.raises(ValueError, match="1 of 3 norms are NaN or infinite, the first for sample 'b'"):
        selective_backward(model, residual, batch, Weighting(), score=numbers)
    torch.testing.assert_close(gradient_in(model), before)


def test_a_mean_is_no_loss_per_sample():
    def mean(model, batch):
        return residual(model, batch).mean()

    with pytest.raises(ValueError, match=r"the loss of 2 samples has shape \(\), expected \(2,\), one value per sample"):
        selective_backward(perceptron(), mean, scored(3.0, 1.0, 2.0, 0.5), HALF, score=numbers)
    with pytest.raises(ValueError, match=r"the loss of a batch of 4 has shape \(\), expected \(4,\)"):
        selective_backward(perceptron(), mean, points(4), HALF)


@pytest.mark.parametrize("rule", [HALF, Weighting(exponent=-1, clip=2), Weighting(threshold=0.1)])
def test_where_every_score_is_zero_nothing_trains(rule):
    model = perceptron()
    with pytest.warns(UserWarning, match="every score of the step is 0, so nothing is trained"):
        seen = selective_backward(model, residual, scored(0.0, 0.0), rule, score=numbers)
    assert seen.weights.tolist() == seen.scores.tolist() == [0, 0] and seen.kept.shape == seen.losses.shape == (0,)
    assert seen.kept.dtype == torch.int64 and all(p.grad is None for p in model.parameters())


def test_scores_of_zero_do_not_count_before_they_are_annealed_in():
    """A quarter of the way in, the uniform part is three quarters: the gradient of mean(0.75 l)."""
    model, batch = perceptron(), scored(0.0, 0.0, 0.0)
    seen = selective_backward(model, residual, batch, Weighting(anneal=(0.0, 0.8)), score=numbers, progress=0.2)
    found = gradient_in(model)
    model.zero_grad()
    (0.75 * residual(model, batch)).mean().backward()
    torch.testing.assert_close(found, gradient_in(model))
    assert seen.weights.tolist() == [0.75] * 3 and seen.kept.tolist() == [0, 1, 2]


def test_scores_that_give_no_weights_are_refused():
    with pytest.raises(ValueError, match="1 of 2 scores are negative"):
        selective_backward(perceptron(), residual, scored(1.0, -1.0), HALF, score=numbers)


def test_the_scores_are_those_of_the_proxies(float32):
    model, batch = perceptron(), points(5)
    torch.testing.assert_close(forward_scores(model, residual, batch), error_norms(model, residual, batch))
    with torch.no_grad():
        expected = 2 * (model(batch["x"])[:, 0] - batch["y"]).abs()  # d(z - y)^2/dz
    torch.testing.assert_close(forward_scores(model, residual, batch), expected)
