"""A step that trains half of its batch, chosen by a forward-only score, against a plain step on all of it.

One JSON line per method; benchmarks/README.md says how to run it and how to read the lines. Model and texts are random: only time is asked.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from gradient_norms import MODELS, append, device_name, random_batch, rounded, version_of
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from recsys_importance.importance import Weighting
from recsys_importance.models import autocast, evaluating, pick_device, to_device
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


def measure(model: torch.nn.Module, batch: dict, repeats: int, seed: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each method per round, in a new random order each round; and how many samples it trained."""
    order, seconds, trained = random.Random(seed), {name: [] for name in METHODS}, {"plain": len(batch["labels"])}
    trained["plain on half a batch"] = len(batch["labels"]) // 2
    on_gpu = batch["input_ids"].is_cuda
    for number in tqdm(range(repeats + 1), desc="rounds", unit="round"):
        for name in order.sample(list(METHODS), len(METHODS)):
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
    return seconds, trained


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=pick_device, default="auto")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    arguments = parser.parse_args(given)
    torch.manual_seed(arguments.seed)
    model = BertForSequenceClassification(BertConfig(**MODELS[arguments.model])).to(arguments.device).train()
    batch = to_device(random_batch(arguments.batch, arguments.tokens, arguments.seed), arguments.device)
    with torch.no_grad():
        model.classifier.weight *= 50  # a new head gives all samples one score to bfloat16's digits; a trained one does not
    seconds, trained = measure(model, batch, arguments.repeats, arguments.seed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    setting = {
        "case": f"{arguments.model}, B {arguments.batch}, T {arguments.tokens}",
        "scores_in": "bfloat16" if fast_bfloat16(arguments.device) else "float32",
        "device": device_name(arguments.device),
        "threads": torch.get_num_threads(),
        **{name: version_of(name) for name in ("torch", "transformers")},
        **{name: getattr(arguments, name) for name in ("model", "batch", "tokens", "repeats", "seed")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows = [
        {
            "method": name,
            "seconds_median": rounded(medians[name]),
            "ratio": rounded(medians[name] / medians["plain"]),
            "samples_trained": trained[name],
            "seconds": [rounded(value) for value in seconds[name]],
        }
        | setting
        for name in METHODS
    ]
    for row in rows:
        print(json.dumps(row))
    if arguments.out:
        append(arguments.out, rows)


if __name__ == "__main__":
    main()
