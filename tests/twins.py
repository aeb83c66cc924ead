"""Slow twins and small helpers for the tests of gradient norms: finite differences and whole-batch autograd."""

import numpy as np
import torch
from tiny import tiny_frame, tiny_pair

from recsys_importance.importance import Weighting
from recsys_importance.models import PairCollator, PairDataset

ARCHITECTURES = ("two_tower", "cross_encoder")
WEIGHTINGS = {
    "article": Weighting(),
    "sum": Weighting(normalisation="sum"),
    "inverse": Weighting(exponent=-1),
    "clip": Weighting(exponent=2, clip=1.5),
    "threshold": Weighting(threshold=0.4, threshold_on="quantile"),
    "half annealed": Weighting(anneal=(0.25, 0.75)),
}


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


def nan_label(batch):
    return batch | {"y": torch.full_like(batch["y"], float("nan"))}


class Remembering(torch.nn.Module):
    """Dropout that remembers the mask of every pass, then a linear model."""

    def __init__(self):
        super().__init__()
        self.dropout, self.linear, self.masks = torch.nn.Dropout(0.5), torch.nn.Linear(16, 1, bias=False), []

    def forward(self, x):
        mask = self.dropout(torch.ones_like(x))
        self.masks.append(mask)
        return self.linear(x * mask)
