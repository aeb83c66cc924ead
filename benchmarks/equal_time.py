"""Chorus at equal time: training on all of each batch, on the half that a forward-only score keeps, and on a random half.

Every method trains the pre-trained pair model for the same number of seconds, evaluation not counted, with a learning rate that falls
linearly with the time that is left. One JSON line per evaluation; benchmarks/README.md says how to run it and how to read the lines.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from gradient_norms import append, device_name, rounded, version_of
from tqdm import tqdm

from recsys_importance import data
from recsys_importance.evaluation import evaluate
from recsys_importance.importance import Weighting
from recsys_importance.models import PairCollator, PairDataset, load_pair_model, pick_device, predict, to_device
from recsys_importance.objectives import cross_entropy
from recsys_importance.selective import forward_scores, selective_backward
from recsys_importance.trainer import EpochSampler

HALF = Weighting(exponent=0, threshold=0.5, threshold_on="quantile")
BATCH, TOKENS, RATE = 16, 40, 5e-5


def random_scores(model, loss, batch):
    return torch.rand(len(batch["labels"]), device=batch["labels"].device)


def plain(model, batch) -> int:
    cross_entropy(model, batch).mean().backward()
    return len(batch["labels"])


def half_by(score):
    def step(model, batch) -> int:
        return len(selective_backward(model, cross_entropy, batch, HALF, score=score).kept)

    return step


METHODS = {"uniform": plain, "half kept by the forward score": half_by(forward_scores), "random half": half_by(random_scores)}


def run(method: str, seed: int, train: pd.DataFrame, test: pd.DataFrame, arguments: argparse.Namespace) -> list[dict]:
    """One training run: a row per evaluation with the training seconds, pairs seen and pairs trained so far."""
    pair = load_pair_model("minilm", seed=seed, device=arguments.device)
    device = next(pair.model.parameters()).device
    dataset, collate = PairDataset(train), PairCollator(pair, TOKENS)
    sampler = EpochSampler(len(dataset), seed=seed, batch=BATCH, lengths=dataset.lengths())
    optimiser = torch.optim.AdamW(pair.model.parameters(), lr=RATE, weight_decay=0.01)
    torch.manual_seed(seed)
    rows, spent, seen, trained, queue = [], 0.0, 0, 0, []
    with tqdm(total=arguments.seconds, desc=f"{method}, seed {seed}", unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s") as bar:
        for share in (k / arguments.evaluations for k in range(arguments.evaluations + 1)):
            while spent < share * arguments.seconds:
                start = time.perf_counter()
                if not queue:
                    queue = list(sampler)
                    sampler.set_epoch(sampler.epoch + 1)
                rows_now, queue = queue[:BATCH], queue[BATCH:]
                batch = to_device(collate([dataset[i] for i in rows_now]), device)
                pair.model.train()
                optimiser.zero_grad()
                trained += METHODS[method](pair.model, batch)
                torch.nn.utils.clip_grad_norm_(pair.model.parameters(), 1.0)
                for group in optimiser.param_groups:
                    group["lr"] = RATE * max(1 - spent / arguments.seconds, 0.0)
                optimiser.step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seen += len(rows_now)
                passed = time.perf_counter() - start
                spent += passed
                bar.update(min(passed, max(arguments.seconds - bar.n, 0)))
            summary = evaluate(test, predict(pair, test, max_length=TOKENS)).summary
            rows.append({"seconds": rounded(spent), "pairs_seen": seen, "pairs_trained": trained, "ndcg@10": rounded(summary["ndcg@10"])})
    return rows


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="chorus")
    parser.add_argument("--pairs", type=int, default=800, help="training pairs")
    parser.add_argument("--test-pairs", type=int, default=700)
    parser.add_argument("--seconds", type=float, default=45.0, help="training time of a run")
    parser.add_argument("--evaluations", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    arguments = parser.parse_args(given)
    split = data.split_by_query(data.load(arguments.data), fractions=(0.6, 0.0, 0.4), seed=0)
    sizes = split.test.groupby("query_id").size().sample(frac=1, random_state=0).cumsum()
    test = split.test[split.test["query_id"].isin(sizes.index[sizes <= arguments.test_pairs])]
    setting = {
        "data": arguments.data,
        "test_pairs": len(test),
        "device": device_name(pick_device(arguments.device)),
        "threads": torch.get_num_threads(),
        **{name: version_of(name) for name in ("torch", "transformers")},
        **{name: getattr(arguments, name) for name in ("pairs", "evaluations")},
        "budget_s": arguments.seconds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for seed in range(arguments.seeds):
        train = split.train.sample(min(arguments.pairs, len(split.train)), random_state=seed)
        for method in METHODS:
            rows = [{"method": method, "seed": seed} | row | setting for row in run(method, seed, train, test, arguments)]
            for row in rows:
                print(json.dumps(row))
            if arguments.out:
                append(arguments.out, rows)


if __name__ == "__main__":
    main()
