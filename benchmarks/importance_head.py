"""What the importance head adds to a plain and to a weighted step, and what it costs to score samples with it.

One JSON line per method, with the fields of gradient_norms.py and `ratio_to_bare`; benchmarks/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from gradient_norms import (
    DTYPES,
    METHODS,
    MODELS,
    Bench,
    Case,
    Method,
    Step,
    append,
    build_case,
    device_name,
    lines,
    measure,
    rounded,
    version_of,
)

from recsys_importance.gradients import gradient_norms, weighted_backward
from recsys_importance.head import ImportanceHead
from recsys_importance.importance import Weighting
from recsys_importance.models import pick_device


def taught(case: Case) -> ImportanceHead:
    """A head that has learned from the batch once, so that its prediction is a full one."""
    head = ImportanceHead(case.model)
    head.learn(gradient_norms(case.model, head.watch(case.loss), case.batch))
    return head


@contextlib.contextmanager
def plain_with_head(case: Case) -> Iterator[Step]:
    """A plain step that also predicts the norms of its samples, from its own forward pass."""
    head = taught(case)

    def step():
        losses = head.watch(case.loss)(case.model, case.batch)
        head.predict()
        losses.mean().backward()

    yield step


@contextlib.contextmanager
def weighted_with_head(case: Case) -> Iterator[Step]:
    """A weighted step that teaches the head its exact norms."""
    head = taught(case)

    def step():
        found = weighted_backward(case.model, head.watch(case.loss), case.batch, Weighting())
        head.learn(found.norms)
        return found.norms

    yield step


@contextlib.contextmanager
def head_scores(case: Case) -> Iterator[Step]:
    """Norms of new samples predicted: a forward pass and the head."""
    head = taught(case)
    yield lambda: head.scores(case.model, case.loss, case.batch)


MEASURED = (
    METHODS["plain"],
    Method("plain with head", "plain", plain_with_head),
    METHODS["engine weighted"],
    Method("engine weighted with head", "weighted", weighted_with_head, kernels="auto"),
    METHODS["engine scores"],
    METHODS["EL2N"],
    Method("head scores", "scores", head_scores, None),
)
BARE = {"plain with head": "plain", "engine weighted with head": "engine weighted", "head scores": "EL2N"}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--batch", type=int, default=16, help="samples in the batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per sample, at most 512")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 and float16 through autocast")
    parser.add_argument("--padding", choices=("none", "real"), default="none", help="real: pairs of Chorus, padded to --tokens")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds, after one that warms up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=pick_device, default="cpu")
    parser.add_argument("--out", type=Path, help="file of JSON lines to add to")
    arguments = parser.parse_args(given)
    case = build_case(arguments, arguments.device)
    setting = {
        "device": device_name(arguments.device),
        "threads": torch.get_num_threads(),
        **{name: version_of(name) for name in ("torch", "transformers")},
        **{name: getattr(arguments, name) for name in ("model", "batch", "tokens", "dtype", "padding", "repeats", "seed")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    gc.freeze()  # the collection before every step then passes over the libraries
    results = measure(Bench(case, arguments.device), list(MEASURED), arguments.repeats, arguments.seed)
    rows = []
    for row in lines(results, list(MEASURED), setting, {method.name: method.kernels or "torch" for method in MEASURED}):
        bare = results.get(BARE.get(row["method"]), {}).get("seconds")
        own = results[row["method"]].get("seconds")
        ratio = statistics.median(a / b for a, b in zip(own, bare, strict=True)) if own and bare else None
        rows.append(row | {"ratio_to_bare": rounded(ratio)})
    for row in rows:
        print(json.dumps(row))
    if arguments.out:
        append(arguments.out, rows)


if __name__ == "__main__":
    main()
