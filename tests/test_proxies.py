"""Stand-ins for the norm against hand formulas, autograd sample by sample, and the engine's exact norm over the same parameters."""

import copy

import pytest
import torch
from tiny import tiny_config, tiny_frame, tiny_pair
from torch.nn import functional

from recsys_importance.gradients import gradient_norms
from recsys_importance.models import PairCollator, PairDataset, pair_logits
from recsys_importance.objectives import cross_entropy, squared_error
from recsys_importance.proxies import error_norms, last_layer_norms
from recsys_importance.reference import gradient_norms_by_loop

COUNT = 6


def pair_and_batch(architecture):
    pair, dataset = tiny_pair(architecture), PairDataset(tiny_frame(COUNT))
    batch = PairCollator(pair)([dataset[i] for i in range(COUNT)])
    batch["labels"] = torch.linspace(0, 1, COUNT)  # graded, as Chorus's are
    return pair.model, batch


@pytest.fixture(scope="module")
def classifier():
    """BERT with three classes, whose output is a transformers ModelOutput, and a batch for it."""
    from transformers import BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(tiny_config(num_labels=3)).eval()
        batch = {"input_ids": torch.randint(4, 25, (COUNT, 7)), "labels": torch.randint(3, (COUNT,))}
    return model, batch


def class_loss(model, batch):
    return functional.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"], reduction="none")


def mlp(*, bias=True, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3, bias=bias), torch.nn.Tanh())
        batch = {"x": torch.randn(COUNT, 5), "y": torch.randint(3, (COUNT,))}
    return model.to(dtype), batch | {"x": batch["x"].to(dtype)}


def mlp_loss(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


# Errors at the output -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_binary_losses_have_the_errors_of_the_hand_formulas(architecture):
    model, batch = pair_and_batch(architecture)
    with torch.no_grad():
        p = torch.sigmoid(pair_logits(model, batch).double())
    residual = (p - batch["labels"]).abs()
    assert residual.min() < 0.5 * residual.max()
    torch.testing.assert_close(error_norms(model, cross_entropy, batch).double(), residual, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(error_norms(model, squared_error, batch).double(), 2 * residual * p * (1 - p), rtol=1e-5, atol=1e-6)


def test_softmax_cross_entropy_has_the_error_of_the_paper(classifier):
    model, batch = classifier
    with torch.no_grad():
        p = torch.softmax(model(input_ids=batch["input_ids"]).logits, dim=1)
    expected = (p - torch.eye(3)[batch["labels"]]).norm(dim=1)
    norms = error_norms(model, class_loss, batch)
    assert norms.dtype == torch.float32 and norms.shape == (COUNT,) and not norms.requires_grad
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)


def test_all_outputs_that_the_loss_uses_count_and_others_do_not():
    class Heads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.unused = torch.nn.Linear(5, 2), torch.nn.Linear(5, 4), torch.nn.Linear(5, 1)

        def forward(self, x):
            return {"one": self.one(x), "rest": (self.two(x), self.unused(x), x.argmax(1))}

    def loss(model, batch):
        out = model(batch["x"])
        return out["one"].square().sum(1) + 3 * out["rest"][0].sum(1)

    model, (_, batch) = Heads(), mlp()
    expected = (4 * model.one(batch["x"]).square().sum(1) + 4 * 9).sqrt()  # gradients 2 z of one, 3 for each of four of two
    torch.testing.assert_close(error_norms(model, loss, batch), expected.detach())


def test_float64_and_a_loss_that_works_in_place():
    model, batch = mlp(dtype=torch.float64)

    def in_place(model, batch):
        z = model(batch["x"])
        z[:, 0] *= 2
        return functional.cross_entropy(z, batch["y"], reduction="none")

    z = model(batch["x"]).detach()
    p = torch.softmax(z * torch.tensor([2.0, 1.0, 1.0]), dim=1) - torch.eye(3)[batch["y"]]
    norms = error_norms(model, in_place, batch)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, (p * torch.tensor([2.0, 1.0, 1.0])).norm(dim=1), rtol=1e-12, atol=0)


def test_half_precision_norms_are_added_up_in_float32():
    model, batch = mlp()

    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = model(batch["x"])
        assert z.dtype == torch.bfloat16
        return functional.cross_entropy(z.float(), batch["y"], reduction="none")

    norms = error_norms(model, loss, batch)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, error_norms(model, mlp_loss, batch), rtol=0.02, atol=0)
    torch.testing.assert_close(
        last_layer_norms(model, loss, batch, "2"), gradient_norms(model, loss, batch, parameters="2.*"), rtol=0.02, atol=0
    )


# The last layer -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["classifier.classifier", "classifier.bert.pooler.dense"])
def test_last_layer_norms_of_a_cross_encoder_are_the_engines_and_the_loops(layer):
    model, batch = pair_and_batch("cross_encoder")
    norms = last_layer_norms(model, cross_entropy, batch, layer)
    torch.testing.assert_close(norms, gradient_norms(model, cross_entropy, batch, parameters=f"{layer}.*"), rtol=1e-5, atol=0)
    exact = gradient_norms_by_loop(model, cross_entropy, batch, parameters=f"{layer}.*", dtype=torch.float64)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)
    assert norms.max() > 1.1 * norms.min()


@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize(("bias", "frozen"), [(True, ()), (True, ("bias",)), (True, ("weight",)), (False, ())])
def test_last_layer_norms_in_float64_for_each_choice_of_parameters(layer, bias, frozen):
    model, batch = mlp(bias=bias, dtype=torch.float64)
    for name in frozen:
        getattr(model[int(layer)], name).requires_grad_(False)
    exact = gradient_norms_by_loop(model, mlp_loss, batch, parameters=f"{layer}.*")
    torch.testing.assert_close(last_layer_norms(model, mlp_loss, batch, layer), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_norms(model, mlp_loss, batch, parameters=f"{layer}.*"), exact, rtol=1e-12, atol=0)


def test_class_head_of_bert(classifier):
    model, batch = classifier
    with torch.no_grad():
        h = model.bert(batch["input_ids"]).pooler_output
    by_hand = error_norms(model, class_loss, batch) * (h.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(last_layer_norms(model, class_loss, batch, "classifier"), by_hand, rtol=1e-5, atol=0)


# What both leave alone ------------------------------------------------------------------------------------------------------------------


def score_both(model, batch):
    error_norms(model, cross_entropy, batch)
    last_layer_norms(model, cross_entropy, batch, "classifier.classifier")


def test_the_body_runs_forward_only_and_nothing_is_left_behind():
    model, batch = pair_and_batch("cross_encoder")
    modes = []
    handle = model.classifier.bert.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    before = copy.deepcopy(model.state_dict())
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            score_both(model, batch)
            assert torch.is_grad_enabled() is enabled
    handle.remove()
    assert modes == [False] * 4
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_error_inside_the_loss_leaves_nothing_behind_either():
    model, batch = pair_and_batch("cross_encoder")

    def failing(model, batch):
        cross_entropy(model, batch)
        raise KeyError("no such column")

    for action in (error_norms, lambda *a: last_layer_norms(*a, "classifier.classifier")):
        with pytest.raises(KeyError, match="no such column"):
            action(model, failing, batch)
        assert torch.is_grad_enabled() and not any(module._forward_hooks for module in model.modules())


def test_the_mode_of_the_model_is_kept():
    model, batch = pair_and_batch("cross_encoder")
    model.train()
    torch.manual_seed(0)
    noisy = error_norms(model, cross_entropy, batch)
    torch.manual_seed(0)
    assert torch.equal(error_norms(model, cross_entropy, batch), noisy) and model.training
    assert not torch.allclose(error_norms(model.eval(), cross_entropy, batch), noisy)


# Refusals -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [error_norms, lambda *a: last_layer_norms(*a, "2")], ids=["error_norms", "last_layer_norms"])
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda m, b: mlp_loss(m, b).mean(), r"shape \(\), expected \(6,\)"),
        (lambda m, b: m(b["x"]), r"shape \(6, 3\), expected \(6,\)"),
        (lambda m, b: mlp_loss(m, b).tolist(), r"shape list, expected \(6,\)"),
        (lambda m, b: mlp_loss(m, b) + m(b["x"]).sum(1), "2 times, expected once"),
        (lambda m, b: b["x"].sum(1), "0 times, expected once"),
        (lambda m, b: 0 * m(b["x"]).detach().sum(1), "does not depend on the output"),
        (
            lambda m, b: mlp_loss(m, b) * torch.tensor([1, 1, torch.nan, 1, 1, 1]),
            "1 of 6 norms are NaN or infinite, the first for sample 'c'",
        ),
    ],
)
def test_losses_that_cannot_be_scored_are_refused(score, loss, said):
    model, batch = mlp()
    with pytest.raises(ValueError, match=said):
        score(model, loss, batch | {"sample_id": list("abcdef")})


def test_an_output_without_samples_is_refused():
    class Total(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sum()

    with pytest.raises(ValueError, match=r"output has shape \(\) in a batch of 6; expected the samples as first dimension"):
        error_norms(Total(5, 1), lambda m, b: m(b["x"]) * b["x"][:, 0], {"x": torch.randn(6, 5)})


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("3", "layer '3' is Tanh, expected a Linear layer, such as 0, 2"),
        ("head", "layer 'head' does not exist, expected a Linear layer, such as 0, 2"),
    ],
)
def test_layers_that_are_not_there_or_not_linear_are_refused(layer, said):
    model, batch = mlp()
    with pytest.raises(ValueError, match=said):
        last_layer_norms(model, mlp_loss, batch, layer)


def test_layers_whose_norm_is_no_product_are_refused():
    model, batch = pair_and_batch("cross_encoder")
    with pytest.raises(ValueError, match=r"input of shape \(6, \d+, 64\), expected \(6, d\).*parameters='classifier.bert.encoder"):
        last_layer_norms(model, cross_entropy, batch, "classifier.bert.encoder.layer.1.output.dense")
    two_towers, batch = pair_and_batch("two_tower")
    with pytest.raises(ValueError, match="2 times, expected once"):
        last_layer_norms(two_towers, cross_entropy, batch, "encoder.encoder.layer.1.output.dense")
    model, batch = mlp()
    for p in model[2].parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="layer '2' are frozen"):
        last_layer_norms(model, mlp_loss, batch, "2")
    square = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5))
    square[2].weight = square[0].weight
    with pytest.raises(ValueError, match="weight of '2' is shared by 0, 2"):
        last_layer_norms(square, mlp_loss, {"x": torch.randn(6, 5), "y": torch.zeros(6).long()}, "2")
