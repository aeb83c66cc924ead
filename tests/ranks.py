"""What each of two processes does under DistributedDataParallel for test_certificate: a list of cases, their outcomes written to a file."""

import datetime
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from recsys_importance.gradients import gradient_norms, weighted_backward
from recsys_importance.importance import Weighting

COUNTS = {"one batch": ([4], [3]), "micro-batches": ([2, 2], [1, 2])}  # samples in each batch of rank 0 and of rank 1
WEIGHTINGS = {
    "article": Weighting(),
    "clip": Weighting(exponent=2, clip=1.5),
    "inverse": Weighting(exponent=-0.5),
    "quantile": Weighting(threshold=0.4, threshold_on="quantile"),
    "uniform over a quantile": Weighting(exponent=0, threshold=0.4, threshold_on="quantile"),
    "annealed": Weighting(anneal=(0, 1)),
}
PROGRESS = 0.3


class Model(nn.Module):
    """Tokens to a number, with a layer that only some batches use, one that none uses and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm, self.linear, self.head = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.extra, self.unused, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False)

    def forward(self, ids, extra):
        x = self.frozen(torch.tanh(self.linear(self.norm(self.tokens(ids)))))
        if extra.any():
            x = x + extra[:, None, None] * self.extra(x)
        return self.head(x).mean(1)[:, 0]


def model() -> Model:
    torch.manual_seed(0)
    built = Model().double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


def loss(model, batch):
    return (model(batch["ids"], batch["extra"]) - batch["y"]) ** 2


def joined() -> dict:
    """Seven samples; the extra layer is for two of the first four, all of them rank 0's."""
    generator = torch.Generator().manual_seed(0)
    ids, y = torch.randint(9, (7, 5), generator=generator), torch.randn(7, dtype=torch.float64, generator=generator)
    return {"ids": ids, "y": y, "extra": torch.tensor([0, 1, 0, 1, 0, 0, 0]).double()}


def parts(counts: tuple, rank: int) -> list[dict]:
    """The rank's batches, cut from the joined one: first all of rank 0, then all of rank 1."""
    start = sum(counts[0]) if rank else 0
    mine = {name: value[start : start + sum(counts[rank])] for name, value in joined().items()}
    columns = {name: value.split(counts[rank]) for name, value in mine.items()}
    return [{name: column[k] for name, column in columns.items()} for k in range(len(counts[rank]))]


def gradients(wrapped) -> dict:
    return {name: None if p.grad is None else p.grad.clone() for name, p in wrapped.module.named_parameters()}


def attempt(wrapped, batches, weighting) -> dict:
    """What a weighted backward gives, or the error it raises; and .grad afterwards."""
    try:
        step = weighted_backward(wrapped, loss, batches[0] if len(batches) == 1 else batches, weighting, progress=PROGRESS)
        return {"step": tuple(step), "gradients": gradients(wrapped)}
    except ValueError as error:
        return {"error": str(error), "gradients": gradients(wrapped)}


def outcomes(rank: int) -> dict:
    found = {}
    for name, counts in COUNTS.items():
        for kind, weighting in WEIGHTINGS.items():
            found[name, kind] = attempt(DistributedDataParallel(model()), parts(counts, rank), weighting)
        for place, where in (("first", 0), ("last", -1)):
            for broken in range(2):
                wrapped, batches = DistributedDataParallel(model()), parts(counts, rank)
                wrapped.module.head.weight.grad = torch.ones_like(wrapped.module.head.weight)
                if rank == broken:
                    batches[where]["y"] = batches[where]["y"] * float("nan")
                found[name, f"NaN in rank {broken}'s {place}"] = attempt(wrapped, batches, WEIGHTINGS["clip"])
                found[name, f"after NaN in rank {broken}'s {place}"] = attempt(wrapped, parts(counts, rank), WEIGHTINGS["article"])
        wrapped = DistributedDataParallel(model(), find_unused_parameters=True)
        loss(wrapped, parts(counts, rank)[0]).mean().backward()  # a plain step leaves torch's own hooks on the parameters
        wrapped.zero_grad()
        found[name, "after a plain step"] = attempt(wrapped, parts(counts, rank), WEIGHTINGS["clip"])
        found[name, "added"] = attempt(wrapped, parts(counts, rank), WEIGHTINGS["clip"])
        wrapped.zero_grad()
        loss(wrapped, parts(counts, rank)[0]).mean().backward()
        found[name, "a plain step afterwards"] = {"gradients": gradients(wrapped)}
    wrapped = DistributedDataParallel(model(), find_unused_parameters=True)
    found["norms"] = gradient_norms(wrapped, loss, parts(COUNTS["one batch"], rank)[0])
    loss(wrapped, parts(COUNTS["one batch"], rank)[0]).mean().backward()
    found["a plain step after norms"] = gradients(wrapped)
    return found


def main(rank: int, folder: Path, outcomes=outcomes) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    patience = datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=patience)
    torch.save(outcomes(rank), folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
