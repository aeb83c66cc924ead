"""Chorus at equal time: training on all of each batch, on the half that a forward-only score keeps, and on a random half.

Every method trains the pre-trained pair model for the same number of seconds, evaluation not counted, with a learning rate that falls
linearly with the time that is left. One JSON line per evaluation; benchmarks/README.md says how to run it and how to read the lines.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import pandas as pd
import torch
from record import machine, now, output_file, processor_or_gpu, publish, rounded, script, seconds, versions, whole_number
from tqdm import tqdm

from recsys_importance import data
from recsys_importance.evaluation import evaluate
from recsys_importance.importance import Weighting
from recsys_importance.models import PairCollator, PairDataset, load_pair_model, predict, to_device
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


def run(method: str, seed: int, train: pd.DataFrame, test: pd.DataFrame, arguments: argparse.Namespace) -> Iterator[dict]:
    """One training run: a row per evaluation with the training seconds, pairs seen and pairs trained so far."""
    pair = load_pair_model("minilm", seed=seed, device=arguments.device)
    device = next(pair.model.parameters()).device
    dataset, collate = PairDataset(train), PairCollator(pair, TOKENS)
    sampler = EpochSampler(len(dataset), seed=seed, batch=BATCH, lengths=dataset.lengths())
    optimiser = torch.optim.AdamW(pair.model.parameters(), lr=RATE, weight_decay=0.01)
    torch.manual_seed(seed)
    spent, seen, trained, queue = 0.0, 0, 0, []
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
            yield {"seconds": rounded(spent), "pairs_seen": seen, "pairs_trained": trained, "ndcg@10": rounded(summary["ndcg@10"])}


def test_pairs(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """Whole queries in a fixed random order, as many as fit into so many pairs."""
    sizes = rows.groupby("query_id").size().sample(frac=1, random_state=0).cumsum()
    return rows[rows["query_id"].isin(sizes.index[sizes <= most])]


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="chorus")
    parser.add_argument("--pairs", type=whole_number(BATCH), default=800, help="training pairs")
    parser.add_argument("--test-pairs", type=whole_number(1), default=700)
    parser.add_argument("--seconds", type=seconds, default=45.0, help="training time of a run")
    parser.add_argument("--evaluations", type=whole_number(1), default=3)
    parser.add_argument("--seeds", type=whole_number(1), default=3)
    parser.add_argument("--device", type=processor_or_gpu, default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--out", type=output_file, help="file of JSON lines to add to")
    arguments = parser.parse_args(given)
    try:
        arguments.split = data.split_by_query(data.load(arguments.data), fractions=(0.6, 0.0, 0.4), seed=0)
    except (ValueError, data.DatasetUnavailable) as error:
        parser.error(str(error))
    arguments.test = test_pairs(arguments.split.test, arguments.test_pairs)
    if arguments.test.empty:
        parser.error(f"no query of the test part fits into --test-pairs {arguments.test_pairs}; give more")
    return arguments


def main(given: list[str] | None = None) -> None:
    arguments = parse(given)
    setting = {
        "data": arguments.data,
        "test_pairs": len(arguments.test),
        "kernels": "torch",  # no method here runs the engine
        **machine(arguments.device),
        **versions("torch", "transformers"),
        **{name: getattr(arguments, name) for name in ("pairs", "evaluations")},
        "budget_s": arguments.seconds,
        "date": now(),
    }
    for seed in range(arguments.seeds):
        train = arguments.split.train.sample(min(arguments.pairs, len(arguments.split.train)), random_state=seed)
        for method in METHODS:
            for row in run(method, seed, train, arguments.test, arguments):
                publish([{"method": method, "seed": seed} | row | setting], arguments.out)


if __name__ == "__main__":
    script(main)
