"""Differential fuzz: random nets of every rule, tied, shared, frozen and raw parameters, against the loop over samples in float64.

python tests/fuzz_gradients.py --nets 400 --seed 0
"""

import argparse
import copy
import random
import warnings

import torch
from torch import nn
from torch.nn import functional

from recsys_importance.gradients import gradient_norms, weighted_backward
from recsys_importance.importance import Weighting
from recsys_importance.reference import weighted_backward_by_loop

WIDTH, WORDS = 6, 9
SHAPES = [(4, 5), (3, 3), (2, 2), (1, 4), (1, 1), (4, 1), (2, 6), (6, 6), (5, 2)]


class UnitRMSNorm(nn.Module):
    """1 + weight, as Gemma has it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Transposed(nn.Module):
    """A module over channels in the second dimension, for (B, T, d)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.mT).mT


class Raw(nn.Module):
    """Parameters used directly, in one of several ways."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        sizes = {"matrix": (WIDTH, WIDTH), "class": (1, 1, WIDTH), "positions": (1, 8, WIDTH), "scalar": ()}
        self.p = nn.Parameter(torch.zeros(sizes.get(way, (WIDTH,))))

    def forward(self, x):
        match self.way:
            case "scale":
                return x * torch.sigmoid(self.p)
            case "shift":
                return self.p + x
            case "scalar":
                return x * self.p.exp()
            case "matrix":
                return x @ self.p
            case "class":
                return torch.cat([self.p.expand(len(x), -1, -1), x], 1)[:, : x.shape[1]]
            case "positions":
                return x + self.p[:, : x.shape[1]]
            case "where":
                return torch.where(x > 0, x, self.p)


class Attention(nn.Module):
    """Attention with biases of distances, added in one of several ways."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.query, self.key, self.bias = way, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Embedding(15, 2)

    def forward(self, x):
        heads = lambda y: y.unflatten(2, (2, -1)).transpose(1, 2)  # noqa: E731
        place = torch.arange(x.shape[1])
        bias = self.bias(place[:, None] - place[None] + 7).permute(2, 0, 1)
        if self.way == "expand":
            bias = bias[None].expand(len(x), -1, -1, -1).contiguous()
        if self.way == "repeat":
            bias = bias.repeat(len(x), 1, 1).view(len(x), 2, *bias.shape[1:])
        if self.way == "mask":
            bias = bias + torch.full((1, 1, 1, x.shape[1]), -0.5, dtype=x.dtype)
        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(x)
        if self.way == "sdpa":
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        return ((query @ key.mT + bias).softmax(-1) @ value).transpose(1, 2).flatten(2)


class TorchAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


LAYERS = {
    "linear": lambda choice: nn.Linear(WIDTH, WIDTH, bias=choice.random() < 0.5),
    "layer norm": lambda choice: nn.LayerNorm(WIDTH),
    "rms norm": lambda choice: nn.RMSNorm(WIDTH),
    "unit rms norm": lambda choice: UnitRMSNorm(WIDTH),
    "convolution": lambda choice: Transposed(nn.Conv1d(WIDTH, WIDTH, 3, padding="same", groups=choice.choice([1, 2, 6]))),
    "group norm": lambda choice: Transposed(nn.GroupNorm(choice.choice([1, 2, 3]), WIDTH)),
    "batch norm": lambda choice: Transposed(nn.BatchNorm1d(WIDTH)),
    "prelu": lambda choice: Transposed(nn.PReLU(choice.choice([1, WIDTH]))),
    "raw": lambda choice: Raw(choice.choice(["scale", "shift", "scalar", "matrix", "class", "positions", "where"])),
    "attention": lambda choice: Attention(choice.choice(["", "expand", "repeat", "mask", "sdpa"])),
    "torch's attention": lambda choice: TorchAttention(WIDTH, 2, batch_first=True, bias=choice.random() < 0.5),
    "positions": lambda choice: nn.Embedding(8, WIDTH),
    "bag": lambda choice: nn.EmbeddingBag(WORDS, WIDTH, mode=choice.choice(["sum", "mean", "max"])),
    "field": lambda choice: nn.Embedding(WORDS, WIDTH),
}
WAYS = ["again", "tied", "tokens", "rows", "tanh", *LAYERS]


class Net(nn.Module):
    """Tokens, steps of (way, layer, residual), and a last step that may be scores against the table of tokens."""

    def __init__(self, choice: random.Random):
        super().__init__()
        self.table, self.steps, self.layers = nn.Embedding(WORDS, WIDTH, padding_idx=choice.choice([None, 0])), [], nn.ModuleList()
        for way in choice.choices(WAYS, k=choice.randint(1, 6)):
            if way in LAYERS:
                self.layers.append(LAYERS[way](choice))
            elif way == "again" and not len(self.layers):
                way = "tanh"
            elif way == "tied":
                self.layers.append(nn.Linear(WIDTH, WIDTH))
                others = [m for m in self.modules() if isinstance(m, nn.Linear) and m.weight.shape == (WIDTH, WIDTH)]
                self.layers[-1].weight = choice.choice(others).weight
            number = choice.randrange(len(self.layers)) if way == "again" else len(self.layers) - 1
            self.steps.append((way, number, choice.random() < 0.5))
        self.last = choice.choice(["", "scores", "module", "product"])

    def forward(self, ids):
        x = self.table(ids)
        for way, number, residual in self.steps:
            y = self.step(way, number, x, ids)
            x = x + y if residual else y
        match self.last:
            case "scores":
                return functional.linear(x, self.table.weight)
            case "product":
                return x @ self.table.weight.T
            case "module":
                return (x * self.table(ids.roll(1, 1))).sum(-1)
        return x

    def step(self, way: str, number: int, x, ids):
        if way == "tokens":
            return x * self.table((ids * 5 + 1) % WORDS)
        if way == "rows":
            return x - self.table.weight[ids]
        if way == "tanh":
            return torch.tanh(x)
        layer = self.layers[number]
        if isinstance(layer, nn.EmbeddingBag):
            return x * layer(ids)[:, None]
        if isinstance(layer, nn.Embedding):
            return x + (layer(torch.arange(x.shape[1])) if layer.num_embeddings == 8 else layer(ids[:, 0] * 7 % WORDS)[:, None])
        return layer(x)


def net(seed: int) -> tuple[nn.Module, dict]:
    """A random net in float64 and eval mode, its weights shaken, some of them frozen, and a batch."""
    choice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    model = Net(choice).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.copy_(torch.randn(WIDTH, generator=generator))
    parameters = list(model.parameters())
    for parameter in choice.sample(parameters, choice.choice([0, 0, len(parameters) // 3])):
        parameter.requires_grad_(False)
    shape = choice.choice(SHAPES)
    return model, {"x": torch.randint(1, WORDS, shape, generator=generator)}


def loss(model, batch):
    outputs = model(batch["x"]).reshape(len(batch["x"]), -1)
    return (functional.softplus(outputs) * torch.linspace(1, 2, outputs.shape[1]).to(outputs)).sum(1)


def error(seed: int) -> float:
    """The largest relative error of a net's norms, and of the gradient of each parameter on the scale of the whole."""
    model, batch = net(seed)
    if not any(p.requires_grad for p in model.parameters()):
        return 0.0
    exact = copy.deepcopy(model)
    try:
        expected = weighted_backward_by_loop(exact, loss, batch, Weighting(exponent=0))
    except ValueError as reason:
        if "does not depend" in str(reason) or "all scores are zero" in str(reason):  # nothing to compare with
            return 0.0
        raise
    norms = gradient_norms(model, loss, batch)
    weighted_backward(model, loss, batch, Weighting(exponent=0))
    if not expected.norms.any():  # a net that is constant in all that is trained: nothing is added to any gradient
        return norms.max().item() if all(p.grad is None for p in model.parameters()) else float("inf")
    floor = 1e-3 * expected.norms.max()
    off = [((norms - expected.norms).abs() / expected.norms.clamp_min(floor)).max()]
    size = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None]).norm()
    for found, wanted in zip(model.parameters(), exact.parameters(), strict=True):
        if (found.grad is None) != (wanted.grad is None):
            return float("inf")
        if wanted.grad is not None:
            off.append((found.grad - wanted.grad).norm() / (wanted.grad.norm() + 1e-3 * size))
    return float(torch.stack(off).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    errors = {}
    warnings.simplefilter("ignore")  # of steps that train nothing
    for seed in range(given.seed, given.seed + given.nets):
        try:
            errors[seed] = error(seed)
        except Exception as reason:  # the net that fails is what one is after
            print(f"net {seed}: {type(reason).__name__}: {reason}")
            errors[seed] = float("inf")
    worst = max(errors, key=errors.get)
    off = sum(value > 1e-10 for value in errors.values())
    print(f"{len(errors)} nets, {off} off by more than 1e-10, worst {errors[worst]:.2g} (net {worst})")


if __name__ == "__main__":
    main()
