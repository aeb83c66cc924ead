"""What each of two processes does under DistributedDataParallel for test_balance: balanced steps, their outcomes written to a file."""

import sys
from pathlib import Path

import ranks
import torch
from tiny import tiny_frame, tiny_pair
from torch.nn.parallel import DistributedDataParallel

from recsys_importance.balance import balanced_backward, objective_cosines
from recsys_importance.models import PairCollator, PairDataset
from recsys_importance.objectives import Objectives, click, display, purchase, relevance

OBJECTIVES = Objectives(
    relevance(weight=2.0), purchase("squared_error", weight=0.5), click(weight=1.5), display("examination", weight=0.25)
)
COUNTS = {"one batch": ([4], [3]), "micro-batches": ([2, 2], [3])}  # samples in each batch of rank 0 and of rank 1
WEIGHTS = torch.tensor([0.5, 1, 2, 0, 1, 1.5, 0.25])
AUTOMATIC = ("mgda", "upgrad", "pcgrad")


def two_towers():
    """Float64, without dropout, with outputs that differ; one layer is frozen, and one is reached by no loss."""
    pair = tiny_pair("two_tower", dropout=0.0, tasks=OBJECTIVES.names)
    model = pair.model.double()
    model.unused = torch.nn.Linear(2, 2).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.logit.weight.mul_(0.2).add_(0.5 * torch.randn(model.logit.weight.shape, generator=generator))
        model.logit.bias.fill_(-1.5)
    model.encoder.encoder.layer[0].attention.self.query.requires_grad_(False)
    return pair


def joined(pair, count: int = 7) -> list[dict]:
    """Rows of a data set in which what is relevant is rarely clicked; purchases are known of what was clicked only."""
    frame, row = tiny_frame(count), torch.arange(count)
    clicked = (row % 2 == 1).double()
    frame["label"] = (row % 2 == 0).double().numpy()
    frame.loc[3, "label"] = 1.0
    columns = {
        "clicked": clicked,
        "purchased": torch.where(clicked > 0, (row % 3 == 0).double(), torch.nan),
        "examination": 1 / (1 + row % 4).double(),
    }
    dataset = PairDataset(frame, **{name: values.numpy() for name, values in columns.items()})
    return [dataset[i] for i in range(count)]


def batch_of(pair, rows: list[dict]) -> dict:
    batch = PairCollator(pair)(rows)
    return {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in batch.items()}


def parts(pair, counts: tuple, rank: int) -> tuple[list[dict], torch.Tensor]:
    """The rank's batches, cut from the joined rows, first all of rank 0, then all of rank 1; and its sample weights."""
    start, rows = sum(counts[0]) if rank else 0, joined(pair)
    ends = torch.tensor(counts[rank]).cumsum(0).tolist()
    batches = [batch_of(pair, rows[start + end - size : start + end]) for end, size in zip(ends, counts[rank], strict=True)]
    return batches, WEIGHTS[start : start + ends[-1]]


def attempt(wrapped, batches, weights, balance: str) -> dict:
    """What a balanced backward gives, or the error it raises; and .grad afterwards."""
    try:
        step = balanced_backward(wrapped, OBJECTIVES, batches, balance, sample_weights=weights)
        return {"step": tuple(step), "gradients": ranks.gradients(wrapped)}
    except ValueError as error:
        return {"error": str(error), "gradients": ranks.gradients(wrapped)}


def outcomes(rank: int) -> dict:
    found = {}
    for name, counts in COUNTS.items():
        for balance in ("fixed", "sum", *AUTOMATIC):
            pair = two_towers()
            torch.manual_seed(rank)  # as in training, where every rank has random numbers of its own
            found[name, balance] = attempt(DistributedDataParallel(pair.model), *parts(pair, counts, rank), balance)
    pair, plain = two_towers(), Objectives(relevance("squared_error"))
    wrapped = DistributedDataParallel(pair.model, find_unused_parameters=True)
    batches, weights = parts(pair, COUNTS["one batch"], rank)
    plain(wrapped, batches[0]).mean().backward()  # a plain step leaves torch's own hooks on the parameters
    wrapped.zero_grad()
    wrapped.module.logit.bias.grad = torch.ones(4).double()
    broken = [batches[0] | {"labels": batches[0]["labels"] / 0}] if rank == 1 else batches
    found["broken"] = attempt(wrapped, broken, weights, "mgda")
    found["after"] = attempt(wrapped, batches, weights, "mgda")
    found["cosines"] = objective_cosines(wrapped, OBJECTIVES, batches)
    return found


if __name__ == "__main__":
    ranks.main(int(sys.argv[1]), Path(sys.argv[2]), outcomes)
