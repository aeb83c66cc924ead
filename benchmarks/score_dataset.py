"""Scoring a whole data set: throughput against the bare engine on the same batches, and whether memory grows with the samples.

Prints one JSON line; benchmarks/README.md says how to run it and how to read the line. The texts are synthetic.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from cases import BERT
from gradient_norms import products_of, profiled
from record import machine, now, output_file, processor_or_gpu, publish, rounded, script, seed, versions, whole_number
from tqdm import tqdm
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from recsys_importance.gradients import gradient_norms
from recsys_importance.models import PairCollator, PairDataset, PairModel, TwoTower, to_device
from recsys_importance.objectives import cross_entropy
from recsys_importance.scoring import score_dataset

WORDS = [f"word{number}" for number in range(5000)]
SPANS = {"text_a": (1, 6), "text_b": (5, 41)}  # words in a made-up query and product title: 1 to 5 and 5 to 40
BATCH = 32


def build_pair(model: str, seed: int, device: torch.device) -> PairModel:
    """Two towers of the model's size with random weights, and a tokenizer of one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names)
    torch.manual_seed(seed)
    encoder = BertModel(BertConfig(vocab_size=BertConfig().vocab_size, **BERT[model]), add_pooling_layer=False)
    return PairModel(TwoTower(encoder).to(device).eval(), fast)


def synthetic_pairs(count: int, seed: int) -> pd.DataFrame:
    """Made-up pairs of about the lengths of queries and product titles."""
    draw = np.random.default_rng(seed)
    text = {side: [" ".join(draw.choice(WORDS, size)) for size in draw.integers(*span, count)] for side, span in SPANS.items()}
    labels = draw.integers(2, size=count).astype(np.float64)
    return pd.DataFrame(text | {"label": labels, "sample_id": [f"synthetic-{number:06d}" for number in range(count)]})


class Recorded:
    """A collator that keeps the batches it makes."""

    def __init__(self, collate: PairCollator):
        self.collate, self.batches = collate, []

    def __call__(self, rows: list) -> dict:
        self.batches.append(self.collate(rows))
        return self.batches[-1]


def throughput(arguments: argparse.Namespace, pair: PairModel, seconds: dict[str, list[float]], *, until: float = float("inf")) -> dict:
    """Fill in the seconds of both per round, interleaved, after one round that warms up and records the batches; returns what checks them.

    until: no run begins after this time of time.monotonic(). A measurement cut short, by that or by an exception, leaves what it had.
    """
    device = next(pair.model.parameters()).device
    dataset = PairDataset(synthetic_pairs(arguments.samples, arguments.seed))
    recorded = Recorded(PairCollator(pair))
    score_dataset(pair.model, cross_entropy, dataset, recorded, batch_size=BATCH, progress=False)
    batches = [to_device(batch, device) for batch in recorded.batches]
    ids = [name for batch in batches for name in batch["sample_id"]]
    if sorted(ids) != sorted(dataset.columns["sample_id"]):
        raise RuntimeError("score_dataset did not collate each sample once, so its batches cannot be scored again one for one")

    def bare() -> list[torch.Tensor]:
        return [gradient_norms(pair.model, cross_entropy, batch, check=False).cpu() for batch in batches]

    def whole() -> pd.DataFrame:
        return score_dataset(pair.model, cross_entropy, dataset, recorded.collate, batch_size=BATCH, progress=False)

    norms = pd.Series(torch.cat(bare()), index=ids)
    scores = whole().set_index("sample_id")["score"]
    products = products_of(profiled(bare)[1]) if device.type == "cpu" else None
    order = random.Random(arguments.seed)
    rounds = [name for _ in range(arguments.repeats) for name in order.sample(["bare", "score_dataset"], 2)]
    for name in tqdm(rounds, desc="throughput", unit="run", file=sys.stderr):
        if time.monotonic() > until:
            break
        start = time.perf_counter()
        (bare if name == "bare" else whole)()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {
        "max_rel_difference": rounded(float((scores / norms.loc[scores.index] - 1).abs().max())),
        "kernels": "oneDNN" if products and products["oneDNN"] else "torch",
        "products": products,
    }


def rates(seconds: dict[str, list[float]], samples: int) -> dict:
    """The fields of the rounds that are complete: medians, samples a second, and the ratio within a round; empty if none is."""
    rounds = min(len(seconds.get(name, [])) for name in ("bare", "score_dataset"))
    if not rounds:
        return {}
    own, bare = seconds["score_dataset"][:rounds], seconds["bare"][:rounds]
    return {
        "seconds_bare_median": rounded(statistics.median(bare)),
        "seconds_score_dataset_median": rounded(statistics.median(own)),
        "samples_per_second_bare": rounded(samples / statistics.median(bare)),
        "samples_per_second": rounded(samples / statistics.median(own)),
        "ratio": rounded(statistics.median(a / b for a, b in zip(own, bare, strict=True))),
        "seconds_bare": [rounded(value) for value in bare],
        "seconds_score_dataset": [rounded(value) for value in own],
    }


def row_of(
    arguments: argparse.Namespace, growth: dict[str, float] | None, write: Callable[[list[dict]], None], *, until: float = float("inf")
) -> bool:
    """Measure, and hand over the row, also that of a measurement that is cut short; returns whether a round was complete.

    growth: as measured before, if it was.
    """
    setting = {
        "peak_resident_growth_mib": growth,
        "data": "synthetic",
        **machine(arguments.device),
        **versions("torch", "transformers"),
        **{name: getattr(arguments, name) for name in ("model", "samples", "repeats", "seed")},
        "batch": BATCH,
        "date": now(),
    }
    pair = build_pair(arguments.model, arguments.seed, arguments.device)
    seconds, checked = {}, {}
    try:
        checked = throughput(arguments, pair, seconds, until=until)
        return bool(rates(seconds, arguments.samples))
    finally:
        found = rates(seconds, arguments.samples)
        if found:
            write([{"benchmark": "score_dataset"} | found | checked | setting])


def resident_growth(arguments: argparse.Namespace, pair: PairModel, count: int) -> float:
    """By how many MiB scoring `count` samples raises this process's peak of resident memory, the samples themselves left out."""
    dataset = PairDataset(synthetic_pairs(count, arguments.seed))
    before = peak_resident()
    score_dataset(pair.model, cross_entropy, dataset, PairCollator(pair), batch_size=BATCH, progress=False)
    return (peak_resident() - before) / 2**20


def peak_resident() -> int:
    """Bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def growth_in_processes_of_their_own(arguments: argparse.Namespace, counts: list[int]) -> dict[str, float]:
    """`resident_growth` by count; a peak cannot be taken back, so each count gets a fresh process."""
    command = [sys.executable, __file__, "--model", arguments.model, "--seed", str(arguments.seed), "--device", str(arguments.device)]
    running = [subprocess.Popen([*command, "--growth-of", str(count)], stdout=subprocess.PIPE, text=True) for count in counts]
    found = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("scoring in a process of its own failed; its error is above")
    return {str(count): rounded(json.loads(text)) for count, text in zip(counts, found, strict=True)}


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BERT, default="minilm")
    parser.add_argument("--samples", type=whole_number(1), default=512, help="N; memory is compared between N and 4 N")
    parser.add_argument("--device", type=processor_or_gpu, default="cpu", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--repeats", type=whole_number(1), default=5)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--out", type=output_file, help="file of JSON lines to add to")
    parser.add_argument("--growth-of", type=whole_number(1), help="only print by how many MiB the peak grows for so many samples")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    arguments = parse(given)
    if arguments.growth_of:
        pair = build_pair(arguments.model, arguments.seed, arguments.device)
        print(json.dumps(resident_growth(arguments, pair, arguments.growth_of)))
        return
    growth = growth_in_processes_of_their_own(arguments, [arguments.samples, 4 * arguments.samples])
    row_of(arguments, growth, partial(publish, out=arguments.out))


if __name__ == "__main__":
    script(main)
