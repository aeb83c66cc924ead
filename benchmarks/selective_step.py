"""A step that trains half of its batch, chosen by a forward-only score, against a plain step on all of it.

One JSON line per method; benchmarks/README.md says how to run it and how to read the lines. Model and texts are random: only time is asked.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from cases import BERT, random_batch
from record import machine, now, output_file, processor_or_gpu, publish, rounded, script, versions, whole_number
from record import seed as any_seed
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from recsys_importance.importance import Weighting
from recsys_importance.models import autocast, evaluating, to_device
from recsys_importance.proxies import error_norms
from recsys_importance.selective import fast_bfloat16, samples_of, selective_backward

Step = Callable[[torch.nn.Module, Callable, dict], object]


def loss_of(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Per-sample cross-entropy; under bf16 autocast on a GPU that has it, as training is."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    with autocast(batch["input_ids"].device):
        logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="none")


def plain(model, loss, batch):
    loss(model, batch).mean().backward()


def half_plain(model, loss, batch):
    plain(model, loss, samples_of(batch, range(len(batch["labels"]) // 2)))


def float32_scores(model, loss, batch):
    with evaluating(model):
        return error_norms(model, loss, batch).float()


def selective(model, loss, batch, **options):
    return selective_backward(model, loss, batch, Weighting(exponent=0, threshold=0.5, threshold_on="quantile"), **options).kept


METHODS: dict[str, Step] = {
    "plain": plain,
    "plain on half a batch": half_plain,
    "selective": selective,
    "selective, float32 scores": partial(selective, score=float32_scores),
}


def build(size: str, count: int, tokens: int, seed: int, device: torch.device) -> tuple[torch.nn.Module, dict]:
    """A BERT classifier in train mode, dropout on, and a batch."""
    torch.manual_seed(seed)
    with device:
        model = BertForSequenceClassification(BertConfig(**BERT[size])).train()
    with torch.no_grad():
        model.classifier.weight *= 50  # a new head gives all samples one score to bfloat16's digits; a trained one does not
    return model.to(device), to_device(random_batch(count, tokens, seed), device)


def measure(
    model: torch.nn.Module,
    batch: dict,
    repeats: int,
    seed: int,
    seconds: dict[str, list[float]],
    trained: dict[str, int],
    *,
    until: float = float("inf"),
) -> None:
    """Fill in the seconds of each method per round, in a new random order each round, and how many samples it trained.

    until: no step begins after this time of time.monotonic(). A run cut short, by that or by an exception, leaves what it had measured.
    """
    order = random.Random(seed)
    seconds |= {name: [] for name in METHODS}
    trained |= {"plain": len(batch["labels"]), "plain on half a batch": len(batch["labels"]) // 2}
    on_gpu = batch["input_ids"].is_cuda
    for number in tqdm(range(repeats + 1), desc="rounds", unit="round"):
        for name in order.sample(list(METHODS), len(METHODS)):
            if time.monotonic() > until:
                return
            model.zero_grad(set_to_none=True)
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            kept = METHODS[name](model, loss_of, batch)
            if on_gpu:
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
            if kept is not None:
                trained[name] = len(kept)


def lines(seconds: dict[str, list[float]], trained: dict[str, int], setting: dict) -> list[dict]:
    """A row per method, over the rounds that are complete; none if no round is."""
    rounds = min(map(len, seconds.values()), default=0)
    if not rounds:
        return []
    medians = {name: statistics.median(values[:rounds]) for name, values in seconds.items()}
    return [
        {
            "method": name,
            "seconds_median": rounded(medians[name]),
            "ratio": rounded(medians[name] / medians["plain"]),
            "samples_trained": trained[name],
            "seconds": [rounded(value) for value in seconds[name][:rounds]],
            "kernels": "torch",  # no method here runs the engine
        }
        | setting
        for name in METHODS
    ]


def rows_of(arguments: argparse.Namespace, write: Callable[[list[dict]], None], *, until: float = float("inf")) -> list[dict]:
    """Measure, and hand over the rows, also those of a measurement that is cut short."""
    setting = {
        "case": f"{arguments.model}, B {arguments.batch}, T {arguments.tokens}",
        "scores_in": "bfloat16" if fast_bfloat16(arguments.device) else "float32",
        **machine(arguments.device),
        **versions("torch", "transformers"),
        **{name: getattr(arguments, name) for name in ("model", "batch", "tokens", "repeats", "seed")},
        "date": now(),
    }
    model, batch = build(arguments.model, arguments.batch, arguments.tokens, arguments.seed, arguments.device)
    seconds, trained, rows = {}, {}, []
    try:
        measure(model, batch, arguments.repeats, arguments.seed, seconds, trained, until=until)
    finally:
        rows += lines(seconds, trained, setting)
        write(rows)
    return rows


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BERT, default="minilm")
    parser.add_argument("--batch", type=whole_number(2), default=16, help="samples in the batch, of which half are trained")
    parser.add_argument("--tokens", type=whole_number(1, 512), default=64, help="tokens per sample, at most 512")
    parser.add_argument("--repeats", type=whole_number(1), default=9, help="timed rounds, after one that warms up")
    parser.add_argument("--seed", type=any_seed, default=0)
    parser.add_argument("--device", type=processor_or_gpu, default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--out", type=output_file, help="file of JSON lines to add to")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    arguments = parse(given)
    rows_of(arguments, partial(publish, out=arguments.out))


if __name__ == "__main__":
    script(main)
