"""A short weighted training of BERT with random weights on a made-up task, three weightings step by step side by side; for gpu.py.

The task is SIMULATED and easy on purpose: what its curves show is that training with importance runs and learns on this machine, in this
precision. They say nothing about which weighting is better on real data, and come from one seed.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from cases import BERT, cross_entropy
from record import rounded
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from recsys_importance.gradients import weighted_backward
from recsys_importance.importance import Weighting

WEIGHTINGS = {"uniform": Weighting(exponent=0), "importance": Weighting(), "inverse": Weighting(exponent=-1)}
COLOURS = {"uniform": "#000000", "importance": "#D55E00", "inverse": "#0072B2"}  # apart for colour-blind readers too
WORDS = 100  # half of them said more often in texts of label 0, half in those of label 1
OWN, FLIPPED = 0.75, 0.2  # share of a text's words that are of its own label's half; share of training labels that are wrong


@dataclass(frozen=True)
class Size:
    model: str
    batch: int
    tokens: int
    steps: int
    every: int  # steps between two rows
    texts: int  # to test on
    rate: float


SIZES = {
    "full": Size("bert-base", batch=32, tokens=64, steps=300, every=10, texts=512, rate=5e-5),
    "tiny": Size("tiny", batch=8, tokens=8, steps=6, every=2, texts=16, rate=1e-3),
}


def simulated_texts(count: int, tokens: int, generator: torch.Generator) -> dict:
    """Texts of random words, (N, T), and their labels, (N,); the first word is the classifier's."""
    labels = torch.randint(2, (count,), generator=generator)
    own = torch.rand(count, tokens, generator=generator) < OWN
    half = torch.where(own, labels[:, None], 1 - labels[:, None])
    words = torch.randint(WORDS // 2, (count, tokens), generator=generator) * 2 + half + 2
    words[:, 0] = 1
    return {"input_ids": words, "labels": labels}


def flipped(batch: dict, generator: torch.Generator) -> dict:
    wrong = torch.rand(len(batch["labels"]), generator=generator) < FLIPPED
    return batch | {"labels": torch.where(wrong, 1 - batch["labels"], batch["labels"])}


class Run:
    """One model in training: the same weights, texts and rate for every weighting."""

    def __init__(self, weighting: Weighting, size: Size, seed: int, device: torch.device):
        torch.manual_seed(seed)
        with device:
            self.model = BertForSequenceClassification(BertConfig(vocab_size=WORDS + 2, **BERT[size.model])).train()
        self.model.to(device)
        self.weighting, self.seconds, self.losses = weighting, 0.0, []
        self.loss = partial(cross_entropy, autocast=partial(torch.autocast, device.type, dtype=torch.bfloat16))
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=size.rate, weight_decay=0.01)
        warm = max(size.steps // 10, 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: min((step + 1) / warm, (size.steps - step) / max(size.steps - warm, 1))
        )

    def step(self, batch: dict) -> None:
        start = time.perf_counter()
        self.optimiser.zero_grad(set_to_none=True)
        found = weighted_backward(self.model, self.loss, batch, self.weighting)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.losses.append(float(found.losses.mean()))  # waits for the device
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def test(self, batch: dict) -> dict:
        """Loss and accuracy on held-out texts, whose labels are all right."""
        self.model.eval()
        losses, right = [], []
        for rows in torch.arange(len(batch["labels"]), device=batch["labels"].device).split(64):
            with torch.autocast(rows.device.type, dtype=torch.bfloat16):
                logits = self.model(input_ids=batch["input_ids"][rows]).logits.float()
            labels = batch["labels"][rows]
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
            right.append(logits.argmax(1) == labels)
        self.model.train()
        return {"test_loss": float(torch.cat(losses).mean()), "test_accuracy": float(torch.cat(right).float().mean())}


def train(size: Size, seed: int, device: torch.device, *, until: float = float("inf")) -> Iterator[dict]:
    """A row for each weighting every few steps, all at the same step. until: no step begins after this time of time.monotonic()."""
    generator = torch.Generator().manual_seed(seed)
    test = {name: value.to(device) for name, value in simulated_texts(size.texts, size.tokens, generator).items()}
    runs = {name: Run(weighting, size, seed, device) for name, weighting in WEIGHTINGS.items()}
    task = {"data": "SIMULATED", "labels_flipped": FLIPPED, "model": size.model, "batch": size.batch, "tokens": size.tokens}
    task |= {"dtype": "bfloat16", "rate": size.rate, "steps": size.steps, "seed": seed}
    for number in tqdm(range(1, size.steps + 1), desc="training", unit="step"):
        if time.monotonic() > until:
            return
        batch = flipped(simulated_texts(size.batch, size.tokens, generator), generator)
        batch = {name: value.to(device) for name, value in batch.items()}
        for run in runs.values():
            run.step(batch)
        if number % size.every == 0 or number == size.steps:
            for name, run in runs.items():
                found = {"train_loss": sum(run.losses) / len(run.losses), **run.test(test), "seconds": run.seconds}
                run.losses.clear()
                yield {"weighting": name, "step": number} | {key: rounded(value) for key, value in found.items()} | task


def draw(rows: list[dict], path: Path) -> None:
    """The curves as a picture: loss on the training batches, and accuracy on held-out texts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    last = {}
    for name, colour in COLOURS.items():
        found = [row for row in rows if row["weighting"] == name]
        last[name] = found[-1]["test_accuracy"]
        steps = [row["step"] for row in found]
        axes[0].plot(steps, [row["train_loss"] for row in found], color=colour, label=name)
        axes[1].plot(steps, [row["test_accuracy"] for row in found], color=colour, label=name)
    axes[0].set(xlabel="step", ylabel="loss on training batches (labels as given)")
    axes[1].set(xlabel="step", ylabel="accuracy on held-out texts (labels right)")
    axes[0].legend()
    reached = ", ".join(f"{name} {value:.2f}" for name, value in last.items())
    figure.suptitle(f"SIMULATED task, one seed: accuracy after {rows[-1]['step']} steps: {reached}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def curve(size: str, device: torch.device, picture: Path, write: Callable[[list[dict]], None], *, until: float) -> list[dict]:
    """Train, hand over each row as it comes, and draw the curves where matplotlib is installed; returns the rows."""
    rows = []
    try:
        for row in train(SIZES[size], 0, device, until=until):
            write([row])
            rows.append(row)
    finally:
        if rows and importlib.util.find_spec("matplotlib") is not None:
            draw(rows, picture)
    return rows
