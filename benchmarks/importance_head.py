"""What the importance head adds to a plain and to a weighted step, and what it costs to score samples with it.

One JSON line per method, with the fields of gradient_norms.py and `ratio_to_bare`; benchmarks/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
from collections.abc import Iterator

from cases import BERT, DTYPES, Case, build_case
from gradient_norms import METHODS, Bench, Method, Step, complete_rounds, lines, measure, setting_of
from record import output_file, processor_or_gpu, publish, rounded, script, seed, whole_number

from recsys_importance.gradients import gradient_norms, weighted_backward
from recsys_importance.head import ImportanceHead
from recsys_importance.importance import Weighting


def taught(case: Case) -> ImportanceHead:
    """A head that has learned from the batch once, so that its prediction is a full one."""
    head = ImportanceHead(case.model)
    head.learn(gradient_norms(case.model, head.watch(case.loss), case.batch, check=False))
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
        found = weighted_backward(case.model, head.watch(case.loss), case.batch, Weighting(), check=False)
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


def with_ratios(results: dict[str, dict], setting: dict) -> Iterator[dict]:
    """The rows of gradient_norms.py, and what each method with a head takes next to the same without."""
    results = complete_rounds(results)
    for row in lines(results, list(MEASURED), setting):
        bare, own = (results.get(name, {"error": ""}) for name in (BARE.get(row["method"]), row["method"]))
        both = "error" not in bare and "error" not in own
        ratio = statistics.median(a / b for a, b in zip(own["seconds"], bare["seconds"], strict=True)) if both else None
        yield row | {"ratio_to_bare": rounded(ratio)}


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BERT, default="minilm")
    parser.add_argument("--batch", type=whole_number(1), default=16, help="samples in the batch")
    parser.add_argument("--tokens", type=whole_number(1, 512), default=64, help="tokens per sample, at most 512")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 and float16 through autocast")
    parser.add_argument("--padding", choices=("none", "real"), default="none", help="real: pairs of Chorus, padded to --tokens")
    parser.add_argument("--repeats", type=whole_number(1), default=15, help="timed rounds, after one that warms up")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", type=processor_or_gpu, default="cpu", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--out", type=output_file, help="file of JSON lines to add to")
    parser.set_defaults(lora=0)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    arguments = parse(given)
    setting, results = setting_of(arguments), {}
    case = build_case(arguments, arguments.device)
    gc.freeze()  # the collection before every step then passes over the libraries
    try:
        measure(Bench(case, arguments.device), list(MEASURED), arguments.repeats, arguments.seed, results)
    finally:
        gc.unfreeze()
        publish(list(with_ratios(results, setting)), arguments.out)


if __name__ == "__main__":
    script(main)
