"""The head against chain rule, planted relations, explicit averages over labels, and what it must leave alone."""

import copy
import importlib
import json
import math

import pytest
import torch
from tiny import points, tiny_config, tiny_frame, tiny_pair
from torch import distributed
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from recsys_importance.gradients import gradient_norms, weighted_backward
from recsys_importance.head import FEATURES, ImportanceHead
from recsys_importance.importance import Weighting
from recsys_importance.models import PairCollator, PairDataset, pair_logits
from recsys_importance.objectives import (
    ListCollator,
    ListDataset,
    Objectives,
    click,
    cross_entropy,
    display,
    listnet,
    relevance,
    squared_error,
)
from recsys_importance.proxies import error_norms

COUNT = 6


def pair_and_batch(architecture, *, dropout=0.1, tasks=("relevance",), **columns):
    pair, frame = tiny_pair(architecture, dropout=dropout, tasks=tasks), tiny_frame(COUNT)
    dataset = PairDataset(frame, **columns)
    batch = PairCollator(pair)([dataset[i] for i in range(COUNT)])
    batch["labels"] = torch.linspace(0, 1, COUNT)
    return pair.model, batch


def binary(model, batch):
    return functional.binary_cross_entropy_with_logits(model(batch["x"])[:, 0], batch["labels"], reduction="none")


def network(*, outputs=1, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, outputs)).to(dtype).eval()


def binary_points(count=COUNT, seed=0, dtype=torch.float64):
    batch = points(count, seed, dtype)
    return {"x": batch["x"], "labels": (batch["y"] > 0).to(dtype)}


def nothing_left(model):
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# What the label decides and what it does not --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
@pytest.mark.parametrize("loss", [cross_entropy, squared_error])
def test_one_logit_splits_the_norm_into_error_and_sensitivity(architecture, loss):
    """log ||g|| = log |dl/dz| + log ||dz/dtheta||, the second by autograd sample by sample, in float64."""
    model, batch = pair_and_batch(architecture)
    model, batch = model.double(), batch | {"labels": batch["labels"].double()}
    logits, sensitivity = pair_logits(model, batch), []
    for z in logits:
        found = torch.autograd.grad(z, list(model.parameters()), retain_graph=True, allow_unused=True)
        sensitivity.append(math.sqrt(sum(float(g.square().sum()) for g in found if g is not None)))
    p = torch.sigmoid(logits.detach())
    error = (p - batch["labels"]).abs() * (1 if loss is cross_entropy else 2 * p * (1 - p))
    norms = gradient_norms(model, loss, batch)
    assert torch.allclose(norms.log(), error.log() + torch.tensor(sensitivity, dtype=torch.float64).log(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_an_untaught_head_gives_the_error_norm(architecture):
    model, batch = pair_and_batch(architecture)
    head = ImportanceHead(model)
    assert head.samples == 0
    torch.testing.assert_close(head.scores(model, cross_entropy, batch), error_norms(model, cross_entropy, batch), rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_features_are_those_of_the_definitions(architecture):
    """Each feature again from the transformer's own outputs, without hooks or replay."""
    model, batch = pair_and_batch(architecture)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():  # a new LayerNorm makes all states one length
            parameter.add_(0.2 * torch.randn_like(parameter))
    head = ImportanceHead(model)
    head.watch(cross_entropy)(model, batch)
    errors, features = head._seen()
    sides = ("a_", "b_") if architecture == "two_tower" else ("",)
    encoder = model.encoder if architecture == "two_tower" else model.classifier.bert
    inputs = [{name: batch[side + name] for name in ("input_ids", "attention_mask", "token_type_ids")} for side in sides]
    states = [encoder(**own).last_hidden_state.detach().requires_grad_() for own in inputs]
    masks = [own["attention_mask"] for own in inputs]
    if architecture == "two_tower":
        a, b = (functional.normalize((h * m[..., None]).sum(1) / m.sum(1)[:, None], dim=1) for h, m in zip(states, masks, strict=True))
        z = model.logit((a * b).sum(1))
    else:
        z = model.classifier.classifier(encoder.pooler(states[0]))[:, 0]
    gradients = torch.autograd.grad(z.sum(), states)
    sizes = (len, lambda h: h[0].norm(), lambda h: h.mean(0).norm(), lambda h: h.square().sum(1).mean() ** 0.5)
    expected = torch.empty(COUNT, 6, dtype=torch.float64)
    for i in range(COUNT):
        rows = [h[i][m[i] > 0].detach().double() for h, m in zip(states, masks, strict=True)]  # without padding
        expected[i, 0] = math.log(math.sqrt(sum(float(g[i].double().square().sum()) for g in gradients)))
        expected[i, 1:5] = torch.tensor([sum(math.log(size(h)) for h in rows) / len(rows) for size in sizes], dtype=torch.float64)
    expected[:, 5] = torch.sigmoid(z.detach())
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(errors, (torch.sigmoid(z.detach()) - batch["labels"]).abs(), rtol=1e-4, atol=1e-6)
    assert (features.std(0) > 1e-3).all()


def test_features_do_not_ask_for_the_label():
    model, batch = pair_and_batch("cross_encoder")
    head = ImportanceHead(model)
    found = []
    for labels in (torch.zeros(COUNT), torch.ones(COUNT), torch.linspace(0.1, 0.2, COUNT)):
        head.watch(cross_entropy)(model, batch | {"labels": labels})
        found.append(head._seen()[1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)


def test_with_several_outputs_the_sensitivity_is_taken_in_the_direction_of_the_error():
    model, batch = network(outputs=3), points(dtype=torch.float64)
    batch = {"x": batch["x"], "y": torch.arange(COUNT) % 3}

    def softmax(model, batch):
        return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    head = ImportanceHead(model, hidden="1")
    head.watch(softmax)(model, batch)
    errors, features = head._seen()
    z = model(batch["x"]).detach()
    e = torch.softmax(z, 1) - torch.eye(3)[batch["y"]]
    torch.testing.assert_close(errors, e.norm(dim=1))
    torch.testing.assert_close(features[:, 0], ((e @ model[2].weight).norm(dim=1) / e.norm(dim=1)).log().detach())
    torch.testing.assert_close(features[:, 5], (e.square() * torch.sigmoid(z)).sum(1) / e.square().sum(1))


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_padding_does_not_change_a_score(architecture):
    model, batch = pair_and_batch(architecture)
    head = taught(model, batch)
    longer = {name: functional.pad(value, (0, 5)) if torch.is_tensor(value) and value.ndim == 2 else value for name, value in batch.items()}
    assert any(longer[name].shape != batch[name].shape for name in batch if torch.is_tensor(batch[name]))
    torch.testing.assert_close(head.scores(model, cross_entropy, longer), head.scores(model, cross_entropy, batch), rtol=1e-4, atol=0)
    alone = {name: value[2:3] for name, value in batch.items()}
    torch.testing.assert_close(head.scores(model, cross_entropy, alone), head.scores(model, cross_entropy, batch)[2:3], rtol=1e-4, atol=0)


def test_dropout_is_off_in_scores_and_the_mode_and_random_numbers_are_kept():
    model, batch = pair_and_batch("cross_encoder")
    head = taught(model, batch)
    expected = head.scores(model, cross_entropy, batch)
    modes = {name: module.training for name, module in model.train().named_modules()}
    model.classifier.dropout.eval()
    modes["classifier.dropout"] = False
    state = torch.get_rng_state()
    assert torch.equal(head.scores(model, cross_entropy, batch), expected)
    assert torch.equal(head.expected(model, cross_entropy, batch), head.expected(model.eval(), cross_entropy, batch))
    model.train()
    model.classifier.dropout.eval()
    head.watch(cross_entropy)(model, batch)
    after = torch.get_rng_state()
    head.predict()
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(after, state)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_in_train_mode_the_error_is_that_of_the_pass_itself():
    """Dropout sits between the hidden states and the logit too; the replay has it off, yet the error is the pass's own."""
    model, batch = pair_and_batch("cross_encoder", dropout=0.5)
    head, seen = ImportanceHead(model), []
    model.train()

    def once(model, batch):
        z = pair_logits(model, batch)
        seen.append(z.detach())
        return functional.binary_cross_entropy_with_logits(z, batch["labels"], reduction="none")

    head.watch(once)(model, batch)
    torch.testing.assert_close(head.predict(), (torch.sigmoid(seen[0]) - batch["labels"]).abs())
    with torch.no_grad():
        assert not torch.allclose(pair_logits(model.eval(), batch), seen[0], atol=1e-3)


# Learning -------------------------------------------------------------------------------------------------------------------------------


def taught(model, batch, loss=cross_entropy, **options):
    head = ImportanceHead(model, **options)
    head.learn(gradient_norms(model, head.watch(loss), batch))
    return head


def planted(head, seed=0, count=40):
    """Batches of the network, with norms that follow a linear relation of the head's own features."""
    model, coefficients = network(), torch.tensor([0.5, 0.0, -1.0, 2.0, 0.3, -0.7], dtype=torch.float64)
    batch = binary_points(count, seed)
    head.watch(binary)(model, batch)
    errors, features = head._seen()
    return model, batch, errors * (features @ coefficients + 0.4).exp()


def test_a_planted_relation_is_recovered():
    head = ImportanceHead(network(), hidden="1", ridge=1e-9, memory=1e9)
    for seed in range(5):
        _, _, norms = planted(head, seed)
        head.learn(norms)
    model, batch, norms = planted(head, seed=99)
    torch.testing.assert_close(head.predict(), norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(head.scores(model, binary, batch), norms, rtol=1e-5, atol=0)
    assert head.learn(norms) < 1e-10


def test_f_is_the_ridge_regression_with_fading_weights():
    """The same regression in one go: rows weighted by exp(-later samples / memory), features standardised with these weights."""
    head, ridge, memory = ImportanceHead(network(), hidden="1", ridge=2.0, memory=100.0), 2.0, 100.0
    rows, targets, counts = [], [], (7, 30, 12)
    generator = torch.Generator().manual_seed(1)
    for seed, count in enumerate(counts):
        batch = binary_points(count, seed)
        head.watch(binary)(network(), batch)
        errors, features = head._seen()
        norms = errors * torch.rand(count, generator=generator, dtype=torch.float64)
        rows.append(features)
        targets.append((norms / errors).log())
        head.learn(norms)
    fade = torch.cat([torch.full((n,), math.exp(-sum(counts[k + 1 :]) / memory), dtype=torch.float64) for k, n in enumerate(counts)])
    x, y = torch.cat(rows), torch.cat(targets)
    mean, level = fade @ x / fade.sum(), fade @ y / fade.sum()
    spread = (fade @ (x - mean).square() / fade.sum()).sqrt().clamp_min(0.01)
    standard = (x - mean) / spread
    whole = torch.cat([standard * fade.sqrt()[:, None], math.sqrt(ridge) * torch.eye(6).double()])
    beta = torch.linalg.lstsq(whole, torch.cat([(y - level) * fade.sqrt(), torch.zeros(6).double()])).solution
    new = torch.cat(rows)[:5] + 0.1
    torch.testing.assert_close(head(new), level + (new - mean) / spread @ beta, rtol=1e-7, atol=1e-9)
    assert head.samples == pytest.approx(float(fade.sum())) and list(head.coefficients) == list(FEATURES)
    assert list(head.coefficients.values()) == pytest.approx(beta.tolist(), abs=1e-8)


def test_learn_returns_the_error_before_it_has_learned():
    head = ImportanceHead(network(), hidden="1")
    _, _, norms = planted(head)
    errors, _ = head._seen()
    assert head.learn(norms) == pytest.approx(float((norms / errors).log().square().mean()))
    _, _, norms = planted(head, seed=1)
    predicted = head.predict()
    assert head.learn(norms) == pytest.approx(float((predicted / norms).log().square().mean()))


@pytest.mark.parametrize("weighting", [Weighting(), Weighting(threshold=0.4, threshold_on="quantile")], ids=["one pass", "two passes"])
@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_micro_batches_teach_what_one_batch_teaches(architecture, weighting):
    """Inside the engine, with and without its second pass; and the engine's own result is what it is without a head."""
    model, batch = pair_and_batch(architecture, dropout=0.0)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 4), slice(4, 6))]
    whole, split = ImportanceHead(model), ImportanceHead(model)
    model.train()
    found = weighted_backward(model, whole.watch(cross_entropy), batch, weighting)
    whole.learn(found.norms)
    model.zero_grad()
    found = weighted_backward(model, split.watch(cross_entropy), parts, weighting)
    gradient = [p.grad.clone() for p in model.parameters()]
    split.learn(found.norms)
    torch.testing.assert_close(split.moments, whole.moments, rtol=1e-4, atol=1e-4)
    model.zero_grad()
    bare = weighted_backward(model, cross_entropy, parts, weighting)
    assert torch.equal(bare.norms, found.norms) and torch.equal(bare.weights, found.weights)
    assert all(torch.equal(a, p.grad) for a, p in zip(gradient, model.parameters(), strict=True))


def test_the_head_learns_from_dropout_what_the_engine_saw():
    """A head between the engine and its random numbers changes neither the norms nor what follows."""
    model, batch = pair_and_batch("two_tower", dropout=0.3)
    model.train()
    torch.manual_seed(5)
    bare, after = gradient_norms(model, cross_entropy, batch), torch.rand(3)
    head = ImportanceHead(model)
    torch.manual_seed(5)
    norms = gradient_norms(model, head.watch(cross_entropy), batch)
    head.learn(norms)
    assert torch.equal(norms, bare) and torch.equal(torch.rand(3), after)


def test_a_taught_head_predicts_better_than_the_error_alone():
    model = network()
    head = ImportanceHead(model, hidden="1")
    for seed in range(10):
        batch = binary_points(16, seed)
        head.learn(gradient_norms(model, head.watch(binary), batch))
    new = binary_points(100, 50)
    norms = gradient_norms(model, binary, new)
    ratio = head.scores(model, binary, new) / norms
    without = error_norms(model, binary, new) / norms
    assert ratio.log().std() < 0.5 * without.log().std()
    assert ratio.median() == pytest.approx(1, abs=0.05) and abs(float(without.median()) - 1) > 0.3


# Without labels -------------------------------------------------------------------------------------------------------------------------


def constant_sensitivity():
    """A logit that is linear in points of one length: ||dz/dtheta|| is the same for all, so that f is exact after one batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)).double()
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[0].bias.zero_()
        model[1].weight.mul_(3)
    batch = binary_points(20)
    return model, {"x": functional.normalize(batch["x"], dim=1), "labels": batch["labels"]}


def squared(model, batch):
    return (torch.sigmoid(model(batch["x"])[:, 0]) - batch["labels"]) ** 2


@pytest.mark.parametrize("loss", [binary, squared])
def test_expected_norms_are_the_mean_over_both_labels(loss):
    model, batch = constant_sensitivity()
    head = taught(model, batch, loss, hidden="0")
    torch.testing.assert_close(head.scores(model, loss, batch), gradient_norms(model, loss, batch), rtol=1e-9, atol=0)
    p = torch.sigmoid(model(batch["x"])[:, 0]).detach()
    by_label = [gradient_norms(model, loss, batch | {"labels": torch.full_like(p, value)}) for value in (0.0, 1.0)]
    explicit = (1 - p) * by_label[0] + p * by_label[1]
    torch.testing.assert_close(head.expected(model, loss, {"x": batch["x"]}), explicit, rtol=1e-9, atol=0)
    torch.testing.assert_close(head.expected(model, loss, batch), explicit, rtol=1e-9, atol=0)  # labels that are there are not read
    if loss is binary:
        torch.testing.assert_close(explicit, 2 * p * (1 - p) * math.sqrt(2), rtol=1e-9, atol=0)


def test_expected_norms_of_two_tasks_are_the_mean_over_four_pairs_of_labels():
    """Untaught, a score is the error norm: sqrt(sum_k (weight_k (p_k - y_k))^2) over all four, drawn independently."""
    tasks = ("relevance", "click")
    model, batch = pair_and_batch("cross_encoder", tasks=tasks, clicked=torch.ones(COUNT).numpy())
    objectives = Objectives(relevance(), click(weight=0.5))
    head = ImportanceHead(model)
    unlabelled = {name: value for name, value in batch.items() if name not in ("labels", "clicked")}
    with torch.no_grad():
        p = torch.sigmoid(pair_logits(model, batch))
    explicit = torch.zeros(COUNT)
    for a in (0.0, 1.0):
        for b in (0.0, 1.0):
            chance = (p[:, 0] if a else 1 - p[:, 0]) * (p[:, 1] if b else 1 - p[:, 1])
            explicit += chance * torch.stack([p[:, 0] - a, 0.5 * (p[:, 1] - b)]).norm(dim=0)
    torch.testing.assert_close(head.expected(model, objectives, unlabelled), explicit, rtol=1e-5, atol=0)
    swapped = head.expected(model, objectives, unlabelled, labels={"labels": "click", "clicked": "relevance"})
    by_number = head.expected(model, objectives, unlabelled, labels={"labels": 1, "clicked": 0})
    assert torch.equal(swapped, by_number) and not torch.allclose(swapped, explicit, rtol=1e-3)


def test_objectives_that_share_a_label_draw_it_once_with_the_first_ones_probability():
    tasks = ("click", "display")
    model, batch = pair_and_batch("two_tower", tasks=tasks)
    batch |= {"display_weight": torch.linspace(0.5, 2, COUNT)}
    objectives, head = Objectives(click(), display("propensity")), ImportanceHead(model)
    with torch.no_grad():
        z = pair_logits(model, batch)
        model.logit.weight[1] *= -0.3  # the two tasks disagree
        z = pair_logits(model, batch)
    p, w = torch.sigmoid(z), batch["display_weight"]
    explicit = sum((p[:, 0] if y else 1 - p[:, 0]) * torch.stack([p[:, 0] - y, w * (p[:, 1] - y)]).norm(dim=0) for y in (0.0, 1.0))
    torch.testing.assert_close(head.expected(model, objectives, batch), explicit, rtol=1e-5, atol=0)


# Several tasks, lists, low precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_several_objectives_and_missing_labels(architecture):
    tasks = ("relevance", "click")
    clicked = torch.tensor([1.0, torch.nan, 0.0, torch.nan, 1.0, 0.0]).numpy()
    model, batch = pair_and_batch(architecture, tasks=tasks, clicked=clicked)
    batch["labels"] = torch.tensor([torch.nan, torch.nan, 1.0, 0.0, 1.0, 0.5])
    objectives, head = Objectives(relevance(), click(weight=2.0)), ImportanceHead(model)
    norms = gradient_norms(model, head.watch(objectives), batch)
    assert norms[1] == 0 and (norms[[0, 2, 3, 4, 5]] > 0).all()
    head.learn(norms)
    assert head.samples == COUNT - 1  # the one without any label is left out
    scores = head.scores(model, objectives, batch)
    assert scores[1] == 0 and torch.isfinite(scores).all()
    shape = norms > 0
    assert ((scores / norms)[shape].log().abs() < 0.5).all()


def test_lists_call_the_model_once_for_each_slot():
    pair, frame = tiny_pair("cross_encoder"), tiny_frame(12, queries=3)
    dataset = ListDataset(frame, 4, seed=0)
    batch = ListCollator(pair)([dataset[i] for i in range(len(dataset))])
    objectives, head = Objectives(relevance("listwise")), ImportanceHead(pair.model)
    norms = gradient_norms(pair.model, head.watch(objectives), batch)
    errors, features = head._seen()
    with torch.no_grad():
        slots = {name: x for name, x in batch.items() if torch.is_tensor(x) and x.ndim == 3}
        z = torch.stack([pair_logits(pair.model, {name: x[:, k] for name, x in slots.items()}) for k in range(batch["labels"].shape[1])], 1)
    z.requires_grad_()
    (e,) = torch.autograd.grad(listnet(z, batch["labels"]).sum(), z)
    torch.testing.assert_close(errors, e.norm(dim=1), rtol=1e-4, atol=1e-6)
    compared = errors > 0
    assert compared.any() and torch.isfinite(features[compared]).all()
    probability = (e.square() * torch.sigmoid(z.detach())).sum(1) / e.square().sum(1)
    torch.testing.assert_close(features[compared, 5].float(), probability[compared], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        lengths = torch.stack([one["attention_mask"].sum(1) for one in ({n: x[:, k] for n, x in slots.items()} for k in range(4))], 1)
    tokens = (e.square() * lengths.log()).sum(1) / e.square().sum(1)  # a mean over slots, each with its share in the squared error
    torch.testing.assert_close(features[compared, 1].float(), tokens[compared], rtol=1e-4, atol=1e-5)
    head.learn(norms)
    assert head.samples == int((norms > 0).sum())
    with pytest.raises(ValueError, match=r"label column 'labels' has shape \(3, 4\), expected one label per sample"):
        head.expected(pair.model, objectives, batch)


class Masked(torch.nn.Module):
    """Tokens to a number; what reaches the inner module is not the mask that the outer one was given."""

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.states = torch.nn.Linear(3, 4)

        def forward(self, x, attention_mask):
            return (self.states(x) * attention_mask[..., None]).sum(1).tanh().sum(1)

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x, attention_mask):
        return self.inner(x, attention_mask * torch.tensor([1, 1, 0, 0, 0]))


def test_positions_count_as_the_module_nearest_to_the_hidden_states_has_them():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = Masked(), {"x": torch.randn(COUNT, 5, 3), "mask": torch.ones(COUNT, 5, dtype=torch.int64)}
    head = ImportanceHead(model, hidden="inner.states")
    head.watch(lambda model, batch: model(batch["x"], attention_mask=batch["mask"]))(model, batch)
    assert torch.allclose(head._seen()[1][:, 1], torch.full((COUNT,), math.log(2)).double())  # given by place, and two positions left


def test_a_loss_that_works_in_place():
    model, batch = network(), binary_points()

    def in_place(model, batch):
        z = model(batch["x"])
        z *= 3
        return functional.binary_cross_entropy_with_logits(z[:, 0], batch["labels"], reduction="none")

    p = torch.sigmoid(3 * model(batch["x"])[:, 0]).detach()
    torch.testing.assert_close(ImportanceHead(model, hidden="1").scores(model, in_place, batch), 3 * (p - batch["labels"]).abs())


def in_bfloat16(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return cross_entropy(model, batch)


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_in_the_loss_or_around_it(architecture, inside):
    model, batch = pair_and_batch(architecture)
    head = taught(model, batch)
    exact = head.scores(model, cross_entropy, batch)
    if inside:
        low = head.scores(model, in_bfloat16, batch)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = head.scores(model, cross_entropy, batch)
    assert low.dtype == torch.float32 and not torch.equal(low, exact)
    torch.testing.assert_close(low, exact, rtol=0.1, atol=0.02)
    norms = gradient_norms(model, head.watch(in_bfloat16), batch)
    assert head.learn(norms) < 0.1  # a weighted step under autocast teaches it too


def test_gradient_checkpointing_and_low_rank_adapters():
    peft = pytest.importorskip("peft")
    model, batch = pair_and_batch("cross_encoder", dropout=0.0)
    expected = taught(model, batch).moments
    model.classifier.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.testing.assert_close(taught(model, batch).moments, expected, rtol=1e-5, atol=1e-5)
    model.classifier.gradient_checkpointing_disable()
    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False), model)
    head = taught(model.eval(), batch)
    assert head.samples == COUNT and torch.isfinite(head.scores(model, cross_entropy, batch)).all()


def test_the_hidden_module_of_transformers_models():
    from transformers import BertForSequenceClassification, BertModel

    assert ImportanceHead(tiny_pair("two_tower").model).hidden == "encoder.encoder"
    assert ImportanceHead(tiny_pair("cross_encoder").model).hidden == "classifier.bert.encoder"
    assert ImportanceHead(BertForSequenceClassification(tiny_config())).hidden == "bert.encoder"
    assert ImportanceHead(BertModel(tiny_config())).hidden == "encoder"
    with pytest.raises(ValueError, match="found no transformers encoder inside this model.*hidden='0'"):
        ImportanceHead(network())
    with pytest.raises(ValueError, match="the model has no part 'body'; it has 0, 1, 2"):
        ImportanceHead(network(), hidden="body")


# Edges ----------------------------------------------------------------------------------------------------------------------------------


def test_zero_norms_and_zero_errors_are_left_out():
    model, batch = network(), binary_points()
    batch["labels"][0] = torch.sigmoid(model(batch["x"])[0, 0]).detach()  # no error at all
    head = ImportanceHead(model, hidden="1")
    norms = gradient_norms(model, head.watch(binary), batch)
    assert norms[0] < 1e-15
    norms[0], norms[1] = 0, 0
    head.learn(norms)
    assert head.samples == COUNT - 2 and torch.isfinite(head.moments).all()
    scores = head.scores(model, binary, batch)
    assert scores[0] == 0 and (scores[1:] > 0).all()
    head.watch(binary)(model, batch)
    before = head.moments.clone()
    assert head.learn(torch.zeros(COUNT).double()) == 0.0
    assert torch.equal(head.moments, before)


def test_norms_that_cannot_be_learned_are_refused_and_change_nothing():
    model, batch = pair_and_batch("two_tower")
    head = taught(model, batch)
    before = head.moments.clone()
    for value in (torch.nan, torch.inf):
        norms = gradient_norms(model, head.watch(cross_entropy), batch)
        norms[2] = value
        with pytest.raises(ValueError, match="1 of 6 norms are NaN or infinite, the first for sample 's0002'"):
            head.learn(norms)
    with pytest.raises(ValueError, match=r"norms of shape \(4,\) for 6 watched samples"):
        head.learn(norms[:4])
    with torch.no_grad():
        model.logit.bias += 1
    with pytest.raises(ValueError, match=r"parameters have changed since the loss ran; .* before optimizer.step\(\)"):
        ImportanceHead.predict(head_that_saw(model, batch, change=True))
    with pytest.raises(ValueError, match="no samples were watched"):
        ImportanceHead(model).learn(norms)
    assert torch.equal(head.moments, before)


def head_that_saw(model, batch, *, change):
    head = ImportanceHead(model)
    head.watch(cross_entropy)(model, batch)
    if change:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return head


def test_an_optimizer_step_is_noticed_and_watching_again_forgets():
    model, batch = pair_and_batch("two_tower")
    head = head_that_saw(model, batch, change=True)
    with pytest.raises(ValueError, match="have changed"):
        head.learn(torch.ones(COUNT))
    loss = head.watch(cross_entropy)
    loss(model, {name: value[:2] for name, value in batch.items()})
    assert len(head.predict()) == 2
    head.learn(torch.ones(2))
    with pytest.raises(ValueError, match="no samples were watched"):
        head.predict()


def test_a_batch_is_watched_in_its_first_pass_only():
    """As the engine passes twice where a threshold needs all norms; it does so with the same noise, here it is another."""
    model, batch = pair_and_batch("two_tower", dropout=0.5)
    head, seen = ImportanceHead(model.train()), []

    def loss(model, batch):
        z = pair_logits(model, batch)
        seen.append(z.detach())
        return functional.binary_cross_entropy_with_logits(z, batch["labels"], reduction="none")

    watched = head.watch(loss)
    for _ in range(2):
        watched(model, batch)
    torch.testing.assert_close(head.predict(), (torch.sigmoid(seen[0]) - batch["labels"]).abs())
    assert not torch.allclose(seen[0], seen[1], atol=0.1)


@pytest.mark.parametrize(("setting", "value"), [("memory", 0), ("memory", math.inf), ("ridge", -1.0), ("ridge", math.nan)])
def test_settings_out_of_range(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be a positive number, got {value}"):
        ImportanceHead(network(), hidden="1", **{setting: value})


def test_hooks_and_forwards_are_gone_also_after_errors():
    model, batch = pair_and_batch("cross_encoder")
    head = taught(model, batch)
    head.scores(model, cross_entropy, batch)
    head.expected(model, cross_entropy, batch)
    nothing_left(model)
    calls = []

    def fails_in_the_replay(model, batch):
        calls.append(None)
        losses = cross_entropy(model, batch)
        if len(calls) > 1:
            raise KeyError("no such column")
        return losses

    def fails(model, batch):
        cross_entropy(model, batch)
        raise KeyError("no such column")

    for loss in (fails, fails_in_the_replay):
        with pytest.raises(KeyError, match="no such column"):
            head.scores(model, loss, batch)
        nothing_left(model)
        assert not model.training and torch.is_grad_enabled()


def test_losses_that_go_past_the_model():
    model, batch = pair_and_batch("cross_encoder")
    head = ImportanceHead(model)

    def past(model, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        return model.classifier(**inputs).logits[:, 0]

    for loss, said in (
        (past, "ran outside the model's forward"),
        (lambda model, batch: cross_entropy(model, batch).detach(), "does not depend on the model's output"),
        (lambda model, batch: cross_entropy(model, batch) * torch.nan, "6 of 6 norms are NaN or infinite, the first for sample 's0000'"),
    ):
        with pytest.raises(ValueError, match=said):
            head.scores(model, loss, batch)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        head.scores(model, cross_entropy, batch)
    with pytest.raises(ValueError, match="ran without its part '2'|does not depend on '2'"):
        side = torch.nn.Sequential(torch.nn.Linear(3, 1))
        side.append(torch.nn.Linear(1, 1)).append(torch.nn.Linear(1, 1))
        side.forward = lambda x: side[0](x)
        ImportanceHead(side, hidden="2").scores(side, binary, binary_points(dtype=torch.float32))
    wide = Wide()
    with pytest.raises(ValueError, match=r"returned tensors of shape \[\(6, 3, 1, 1\)\], expected hidden states"):
        ImportanceHead(wide, hidden="one").scores(wide, lambda m, b: m(b["x"]).sum(1), points())


class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Unflatten(1, (3, 1, 1))
        self.two = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.two(self.one(x)).flatten(1)


def test_expected_norms_need_to_know_the_logit_of_a_label():
    model, batch = pair_and_batch("cross_encoder", tasks=("relevance", "click"))

    def both(model, batch):
        return functional.binary_cross_entropy_with_logits(pair_logits(model, batch)[:, 1], batch["labels"], reduction="none")

    head = ImportanceHead(model)
    with pytest.raises(ValueError, match=r"no logit for label column 'labels' among \['relevance', 'click'\]; give labels="):
        head.expected(model, both, batch)
    with torch.no_grad():
        p = torch.sigmoid(pair_logits(model, batch)[:, 1])
    torch.testing.assert_close(head.expected(model, both, batch, labels={"labels": "click"}), 2 * p * (1 - p), rtol=1e-5, atol=0)


# Kept and restored ----------------------------------------------------------------------------------------------------------------------


def test_the_state_is_restored_exactly_and_learning_goes_on_as_if_nothing_had_happened(tmp_path):
    from safetensors.torch import load_file, save_file

    model, batch = pair_and_batch("two_tower")
    head = taught(model, batch)
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    other = ImportanceHead(model)
    other.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert torch.equal(other.scores(model, cross_entropy, batch), head.scores(model, cross_entropy, batch))
    flipped = batch | {"labels": 1 - batch["labels"]}
    for one in (head, other):
        one.learn(gradient_norms(model, one.watch(cross_entropy), flipped))
    assert torch.equal(other.moments, head.moments)
    assert torch.equal(taught(model, batch).moments, taught(model, batch).moments)


def test_moving_or_casting_the_head_keeps_its_float64_state():
    head = ImportanceHead(network(), hidden="1")
    planted_norms = planted(head)[2]
    head.learn(planted_norms)
    before = head.moments.clone()
    for moved in (head.half(), head.to(torch.bfloat16), head.to("meta"), copy.deepcopy(head)):
        assert moved.moments.dtype == torch.float64 and torch.equal(moved.moments, before)
    with pytest.raises(ValueError, match="must be finite float64, got torch.float32"):
        head.load_state_dict({"moments": before.float()})
    with pytest.raises(ValueError, match="must be finite float64"):
        head.load_state_dict({"moments": before * torch.nan})
    assert torch.equal(head.moments, before)


def test_nothing_of_it_reaches_the_model():
    model, batch = pair_and_batch("two_tower")
    before = copy.deepcopy(model.state_dict())
    head = taught(model, batch)
    assert not any(p.requires_grad for p in head.parameters()) and not head.scores(model, cross_entropy, batch).requires_grad
    losses = head.watch(cross_entropy)(model, batch)
    head.predict()
    losses.mean().backward()  # a plain step goes on after the prediction
    gradient = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    cross_entropy(model, batch).mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(gradient, model.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_ranks_learn_what_one_learns(monkeypatch):
    """Each rank's sums enter the head of every rank; here one after the other, with the all-reduce between them written out."""
    model, batch = pair_and_batch("two_tower", dropout=0.0)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 4), slice(4, 6))]
    norms, sums = gradient_norms(model, cross_entropy, batch).split([4, 2]), {}

    def learn(rank, reduce):
        monkeypatch.setattr(distributed, "all_reduce", lambda x, group: reduce(x))
        head = ImportanceHead(model)
        head.watch(cross_entropy)(model, parts[rank])
        return head, head.learn(norms[rank], group="both")

    for rank in (0, 1):
        learn(rank, lambda x, rank=rank: sums.update({rank: x.clone()}))
    (first, a), (second, b) = (learn(rank, lambda x, rank=rank: x.add_(sums[1 - rank])) for rank in (0, 1))
    whole = ImportanceHead(model)
    whole.watch(cross_entropy)(model, batch)
    surprise = whole.learn(torch.cat(norms))
    assert torch.equal(first.moments, second.moments) and a == b == pytest.approx(surprise, rel=1e-4)
    torch.testing.assert_close(first.moments, whole.moments, rtol=1e-4, atol=1e-4)
    assert first.samples == COUNT


def test_a_model_inside_distributed_data_parallel(tmp_path):
    model, batch = pair_and_batch("two_tower")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped, head = DistributedDataParallel(model), ImportanceHead(model)
        found = weighted_backward(wrapped, head.watch(cross_entropy), batch, Weighting())
        head.learn(found.norms, group=distributed.group.WORLD)
        scores = head.scores(wrapped, cross_entropy, batch)
        assert ImportanceHead(wrapped).hidden == head.hidden
    finally:
        distributed.destroy_process_group()
    assert torch.equal(head.moments, taught(model, batch).moments)
    assert torch.equal(scores, head.scores(model, cross_entropy, batch))


# What it costs --------------------------------------------------------------------------------------------------------------------------


def test_the_benchmark_at_toy_size(repository, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    out = tmp_path / "head.jsonl"
    options = ["--model", "tiny", "--batch", "3", "--tokens", "6", "--repeats", "2", "--out", str(out)]
    importlib.import_module("importance_head").main(options)
    rows = {row["method"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert [json.loads(line) for line in out.read_text().splitlines()] == list(rows.values())
    assert not any("error" in row for row in rows.values()) and rows["engine weighted with head"]["max_rel_error"] < 1e-5
    pairs = {"plain with head": "plain", "engine weighted with head": "engine weighted", "head scores": "EL2N"}
    assert {name for name, row in rows.items() if row["ratio_to_bare"] is not None} == set(pairs)
    for name, bare in pairs.items():
        ratios = [a / b for a, b in zip(rows[name]["seconds"], rows[bare]["seconds"], strict=True)]
        assert rows[name]["ratio_to_bare"] == pytest.approx(sum(ratios) / 2, rel=1e-3)
