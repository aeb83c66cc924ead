"""Rules of norms, convolutions and bags of embeddings against the loop over samples, and what has no gradient per sample."""

import fuzz_gradients
import pytest
import torch
from test_certificate import certify, certify_each_parameter, numbers, places, readout, shaken
from tiny import Through
from torch import nn

from recsys_importance.gradients import gradient_norms, weighted_backward
from recsys_importance.gradients.rules import _rule_for
from recsys_importance.importance import Weighting


def transformer_norm(model: str, name: str, *given, **options):
    """A norm of an installed transformers model."""
    import importlib

    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)(*given, **options)


class Scaled(nn.Module):
    """A norm with its channels at a dimension of its own, a bias, and a factor of one more vector."""

    def __init__(self, width: int, dimension: int, formula):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.dimension, self.formula = dimension, formula

    def forward(self, x):
        shape = [-1 if d == self.dimension else 1 for d in range(x.ndim)]
        scaled = x / (x.square().mean(self.dimension, keepdim=True) + 1e-3).sqrt()
        return self.formula(scaled, self.weight.reshape(shape), self.bias.reshape(shape))


class ChannelRMSNorm(Scaled):
    pass


def channels(dimension: int, formula=lambda x, w, b: x * w + b):
    return ChannelRMSNorm(6, dimension, formula)


NORMS = {
    "rms": lambda: (nn.RMSNorm(6), numbers(4, 5, 6)),
    "rms, eps": lambda: (nn.RMSNorm(6, eps=0.1), numbers(4, 6)),
    "rms over two dimensions": lambda: (nn.RMSNorm((5, 6)), numbers(4, 3, 5, 6)),
    "rms, no parameters": lambda: (
        nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6, elementwise_affine=False), nn.Linear(6, 3)),
        numbers(4, 5, 6),
    ),
    "rms, called twice": lambda: (Through(lambda m, x: m.norm(torch.tanh(m.norm(x)) + x), norm=nn.RMSNorm(6)), numbers(4, 5, 6)),
    "a norm of channels at 1": lambda: (channels(1), numbers(4, 6, 5)),
    "a norm of channels at 1, as many positions": lambda: (channels(1), numbers(4, 6, 6)),
    "a norm of channels at 2, as many positions": lambda: (channels(2), numbers(4, 6, 6)),
    "a norm of channels at 2, as many positions and samples": lambda: (channels(2), numbers(6, 6, 6)),
    "a norm of 1 + weight": lambda: (channels(2, lambda x, w, b: x * (1 + w) - 3 * b), numbers(4, 5, 6)),
    "a norm on 2-D": lambda: (channels(1), numbers(4, 6)),
    "group norm": lambda: (nn.GroupNorm(2, 6), numbers(4, 6, 5)),
    "group norm 2-D": lambda: (nn.GroupNorm(3, 6), numbers(4, 6)),
    "group norm of images": lambda: (nn.GroupNorm(6, 6), numbers(4, 6, 3, 4)),
    "instance norm": lambda: (nn.InstanceNorm1d(6, affine=True), numbers(4, 6, 5)),
    "instance norm of images": lambda: (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), numbers(4, 6, 3, 4)),
    "batch norm": lambda: (measured(nn.BatchNorm1d(6)), numbers(4, 6)),
    "batch norm of sequences": lambda: (measured(nn.BatchNorm1d(6)), numbers(4, 6, 5)),
    "batch norm of images": lambda: (measured(nn.BatchNorm2d(6)), numbers(4, 6, 3, 4)),
    "batch norm of volumes": lambda: (measured(nn.BatchNorm3d(2)), numbers(4, 2, 3, 4, 2)),
    "prelu": lambda: (nn.PReLU(), numbers(4, 5, 6)),
    "prelu of numbers": lambda: (Through(lambda m, x: m.act(m.linear(x)[:, 0]), linear=nn.Linear(6, 1), act=nn.PReLU()), numbers(4, 6)),
    "prelu of channels": lambda: (nn.PReLU(6), numbers(4, 6, 5)),
    "prelu of channels 2-D": lambda: (nn.PReLU(6), numbers(4, 6)),
}
LANGUAGE = {
    "llama": ("llama", "LlamaRMSNorm"),
    "mistral": ("mistral", "MistralRMSNorm"),
    "qwen2": ("qwen2", "Qwen2RMSNorm"),
    "qwen3": ("qwen3", "Qwen3RMSNorm"),
    "gemma": ("gemma", "GemmaRMSNorm"),
    "gemma2": ("gemma2", "Gemma2RMSNorm"),
    "gemma3": ("gemma3", "Gemma3RMSNorm"),
    "t5": ("t5", "T5LayerNorm"),
    "phi3": ("phi3", "Phi3RMSNorm"),
    "olmo2": ("olmo2", "Olmo2RMSNorm"),
}
NORMS |= {name: (lambda of=of: (transformer_norm(*of, 6), numbers(4, 5, 6))) for name, of in LANGUAGE.items()}
NORMS["convnext, channels first"] = lambda: (
    transformer_norm("convnext", "ConvNextLayerNorm", 6, data_format="channels_first"),
    numbers(4, 6, 3, 6),
)


def measured(norm: nn.Module) -> nn.Module:
    """With running statistics of its own."""
    generator = torch.Generator().manual_seed(1)
    norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
    norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
    return norm


def marked(*shape, below: int = 7) -> dict:
    """Places from 1 on, and -1 beyond a row's own length, which differs from row to row."""
    batch = places(*shape, below=below - 1)["x"] + 1
    lengths = torch.arange(1, shape[0] + 1).clamp(max=shape[1])
    return {"x": batch.masked_fill(torch.arange(shape[1])[None] >= lengths[:, None], -1)}


def flat_bags(bag, *, last=False, weights=False):
    """As users write it: one list of all places and the offsets of the samples' bags."""

    def forward(m, x):
        there = x >= 0
        flat, lengths = x[there], there.sum(1)
        starts = torch.cat([lengths.new_zeros(1), torch.cumsum(lengths, 0)])
        given = {"per_sample_weights": (1 + flat / 2).to(m.bag.weight)} if weights else {}
        return m.head(m.bag(flat, starts if last else starts[:-1], **given))

    return Through(forward, bag=bag, head=nn.Linear(4, 3))


BAGS = {
    f"{mode}{name}": lambda mode=mode, build=build: build(mode)
    for mode in ("sum", "mean", "max")
    for name, build in {
        "": lambda mode: (nn.EmbeddingBag(7, 4, mode=mode), places(5, 6)),
        ", repeated": lambda mode: (nn.EmbeddingBag(7, 4, mode=mode), places(5, 4, below=3)),
        ", padding": lambda mode: (nn.EmbeddingBag(7, 4, mode=mode, padding_idx=2), places(5, 6, below=4)),
        ", one list": lambda mode: (flat_bags(nn.EmbeddingBag(7, 4, mode=mode)), marked(5, 4)),
        ", one list with its end": lambda mode: (
            flat_bags(nn.EmbeddingBag(7, 4, mode=mode, include_last_offset=True), last=True),
            marked(5, 4),
        ),
        ", one list, padding": lambda mode: (flat_bags(nn.EmbeddingBag(7, 4, mode=mode, padding_idx=2)), marked(5, 4)),
        ", as many places as samples": lambda mode: (flat_bags(nn.EmbeddingBag(7, 4, mode=mode)), marked(3, 1)),
    }.items()
}
BAGS["sum, weights"] = lambda: (flat_bags(nn.EmbeddingBag(7, 4, mode="sum"), weights=True), marked(5, 4))
BAGS["sum, weights, rectangle"] = lambda: (
    Through(lambda m, x: m.bag(x, per_sample_weights=(1 + x).to(m.bag.weight)), bag=nn.EmbeddingBag(7, 4, mode="sum")),
    places(5, 6),
)

CONVOLUTIONS = {
    "1-D": lambda: (nn.Conv1d(4, 6, 3), numbers(3, 4, 8)),
    "1-D, stride and dilation": lambda: (nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=3), numbers(3, 4, 9)),
    "1-D, long": lambda: (nn.Conv1d(2, 3, 2), numbers(2, 2, 90)),
    "2-D": lambda: (nn.Conv2d(3, 5, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), numbers(3, 3, 6, 7)),
    "2-D, no bias": lambda: (nn.Conv2d(3, 5, 3, bias=False), numbers(3, 3, 5, 5)),
    "2-D, patches of a picture": lambda: (nn.Conv2d(3, 5, 4, stride=4), numbers(3, 3, 9, 8)),
    "2-D, one place": lambda: (nn.Conv2d(3, 5, 4), numbers(3, 3, 4, 4)),
    "2-D, groups": lambda: (nn.Conv2d(4, 6, 3, groups=2, padding=1), numbers(3, 4, 5, 4)),
    "2-D, by channel": lambda: (nn.Conv2d(4, 8, 3, groups=4), numbers(3, 4, 5, 4)),
    "2-D, same": lambda: (nn.Conv2d(3, 5, (4, 3), padding="same", dilation=(1, 2)), numbers(3, 3, 6, 7)),
    "2-D, same, circular": lambda: (nn.Conv2d(3, 5, 4, padding="same", padding_mode="circular"), numbers(3, 3, 6, 7)),
    "2-D, reflect": lambda: (nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="reflect"), numbers(3, 3, 6, 7)),
    "2-D, replicate": lambda: (nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="replicate", stride=2), numbers(3, 3, 6, 7)),
    "2-D, called twice": lambda: (
        Through(lambda m, x: m.conv(torch.tanh(m.conv(x))), conv=nn.Conv2d(3, 3, 3, padding=1)),
        numbers(3, 3, 4, 5),
    ),
    "2-D, as many channels as samples": lambda: (nn.Conv2d(3, 3, 3), numbers(3, 3, 3, 3)),
    "3-D": lambda: (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), numbers(3, 2, 3, 4, 3)),
    "tied": lambda: (tied_convolutions(), numbers(3, 3, 4, 5)),
    "bilinear": lambda: (Through(lambda m, x: m.b(x[..., :4], x[..., 2:]), b=nn.Bilinear(4, 5, 3)), numbers(4, 3, 7)),
    "bilinear 2-D, no bias": lambda: (Through(lambda m, x: m.b(x, x.sin()), b=nn.Bilinear(4, 4, 3, bias=False)), numbers(4, 4)),
}


def tied_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, groups=1, dilation=2, padding=2), nn.GroupNorm(3, 3))
    model[2].weight = model[0].weight
    return model


CASES = NORMS | BAGS | CONVOLUTIONS


@pytest.mark.parametrize("case", CASES)
def test_rules(case):
    model, batch = CASES[case]()
    rounding = case in ("gemma", "gemma2", "gemma3")  # they compute in float32 whatever they are given
    certify(shaken(model), readout, batch, engines=("float32", "torch") if rounding else ("float64", "float32", "torch"))
    if not rounding:
        certify_each_parameter(shaken(model), readout, batch)


def test_what_is_called_a_norm_but_holds_more_than_vectors_of_one_length_has_no_rule():
    class MatrixRMSNorm(nn.Module):
        def __init__(self, *shapes):
            super().__init__()
            for k, shape in enumerate(shapes):
                self.register_parameter(f"p{k}", nn.Parameter(torch.ones(shape)))

    assert _rule_for(MatrixRMSNorm((3,), (3,))) is not None
    assert [_rule_for(norm) for norm in (MatrixRMSNorm((3, 3)), MatrixRMSNorm((3,), (4,)), MatrixRMSNorm())] == [None] * 3


@pytest.mark.parametrize(
    "formula",
    [lambda x, w, b: x * w * (1 + b), lambda x, w, b: x * w.square(), lambda x, w, b: x * w.flip(-1) + b, lambda x, w, b: x * w.mean() + b],
    ids=["a product of two vectors", "not linear", "not coordinate by coordinate", "the mean of a vector"],
)
def test_a_norm_of_another_form_is_refused(formula):
    model = shaken(nn.Sequential(nn.Linear(6, 6), channels(2, formula)))
    with pytest.raises(ValueError, match=r"module '1' \(ChannelRMSNorm\).*not linear in each of its vectors"):
        gradient_norms(model, readout, numbers(4, 5, 6))
    certify(model, readout, numbers(4, 5, 6), by_sample="1")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("by_sample", ["norm", ()])
def test_batch_norm_with_the_batch_s_statistics_is_refused(affine, running, by_sample):
    norm = nn.BatchNorm1d(5, affine=affine, track_running_stats=running)
    model = Through(lambda m, x: m.norm(m.linear(x)), linear=nn.Linear(6, 5), norm=norm).train(running)
    for action in (gradient_norms, lambda *given, **options: weighted_backward(*given, Weighting(), **options)):
        with pytest.raises(ValueError, match="BatchNorm1d takes the batch's own mean and variance.*eval mode"):
            action(model, readout, numbers(4, 6), by_sample=by_sample)
    assert not model.norm._forward_pre_hooks


def test_a_bag_that_all_samples_share_is_refused_and_a_sparse_one_too():
    shared = Through(
        lambda m, x: m.head(x + m.bag(torch.tensor([1, 2]), torch.tensor([0]))), bag=nn.EmbeddingBag(7, 6), head=nn.Linear(6, 2)
    )
    with pytest.raises(ValueError, match="that all samples share; give it as one row"):
        gradient_norms(shared, readout, numbers(4, 6))
    with pytest.raises(ValueError, match="without sparse"):
        gradient_norms(nn.EmbeddingBag(7, 4, sparse=True), readout, places(5, 6))


def test_a_picture_without_its_batch_dimension_is_refused():
    model = Through(lambda m, x: m.conv(x).unsqueeze(1), conv=nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="expected inputs of 3 dimensions, samples first"):
        gradient_norms(model, readout, numbers(4, 5))


@pytest.mark.parametrize("seed", range(1000, 1025))
def test_random_nets(seed):
    assert fuzz_gradients.error(seed) <= 1e-10
