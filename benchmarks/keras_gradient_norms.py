"""Per-sample gradient norms and importance-weighted steps in Keras: this package's engine against TensorFlow's own ways.

One JSON line per method, with the fields of gradient_norms.py; benchmarks/README.md says how to run it and how to read the lines.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from gradient_norms import lines
from record import described, machine, now, output_file, publish, rounded, script, seed, version_of, versions, whole_number
from tqdm import tqdm

from recsys_importance.importance import Weighting
from recsys_importance.keras.gradients import gradient_norms, gradient_norms_by_tape, sample_gradients
from recsys_importance.keras.start import keras, tf
from recsys_importance.models import encoder_path

TINY = dict(vocabulary_size=50, num_layers=1, num_heads=2, hidden_dim=32, intermediate_dim=64)  # for the tests
CHECKED_SAMPLES = 4  # whose norms are compared with a tape per sample in float64


class Case:
    """What every method is given: a model without dropout, its loss, a batch; and the same in float64, to compare with."""

    def __init__(self, arguments: argparse.Namespace):
        keras.utils.set_random_seed(arguments.seed)
        self.name, self.compiled = arguments.model, arguments.compiled
        self.model, self.loss = self.build("float32"), keras.losses.BinaryCrossentropy(from_logits=True)
        random_numbers, shape = np.random.default_rng(arguments.seed), (arguments.batch, arguments.tokens)
        words = self.model.get_layer("token_embedding").input_dim
        self.x = {
            "token_ids": random_numbers.integers(min(1000, words // 2), words, shape).astype("int32"),
            "segment_ids": np.zeros(shape, dtype="int32"),
            "padding_mask": np.ones(shape, dtype="int32"),
        }
        self.x = {name: tf.constant(values) for name, values in self.x.items()}
        self.y = tf.constant(random_numbers.integers(0, 2, arguments.batch).astype("float32"))

    def build(self, dtype: str):
        import keras_hub

        kind = keras_hub.models.BertBackbone
        if self.name == "tiny":
            backbone = kind(**TINY, dropout=0.0, dtype=dtype)
        else:
            backbone = kind.from_preset(encoder_path(self.name), dropout=0.0, dtype=dtype)
        return keras.Model(backbone.input, keras.layers.Dense(1, dtype=dtype)(backbone.output["pooled_output"]))

    @cached_property
    def exact_norms(self) -> np.ndarray:
        """Norms of the first samples, by a tape for each, of a float64 model of the same weights."""
        model = self.build("float64")
        model.set_weights(self.model.get_weights())
        few, y = {name: values[:CHECKED_SAMPLES] for name, values in self.x.items()}, tf.cast(self.y[:CHECKED_SAMPLES], tf.float64)
        loss = keras.losses.BinaryCrossentropy(from_logits=True, dtype="float64")
        return gradient_norms_by_tape(model, few, y, loss=loss).numpy()

    @property
    def variables(self) -> list:
        return [v.value for v in self.model.trainable_variables]

    def function(self, body: Callable) -> Callable:
        return tf.function(body, jit_compile=self.compiled == "xla")

    def losses(self, x, y):
        """(B,)"""
        return keras.losses.binary_crossentropy(y[:, None], self.model(x, training=False), from_logits=True)


# Methods --------------------------------------------------------------------------------------------------------------------------------
# Each makes a step from a case: a function without arguments that returns the norms, (B,), or None, and the gradient, one tensor or
# tf.IndexedSlices per variable, or None. Weighted ones take w = norm / sum of norms. Tracing and compiling happen in the first steps.

Step = Callable[[], tuple]


def plain(case: Case) -> Step:
    @case.function
    def step(x, y):
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(case.losses(x, y))
        return None, tape.gradient(value, case.variables)

    return lambda: step(case.x, case.y)


def engine_scores(case: Case) -> Step:
    step = case.function(lambda x, y: (gradient_norms(case.model, x, y, loss=case.loss, check=False), None))
    return lambda: step(case.x, case.y)


def engine_weighted(case: Case) -> Step:
    @case.function
    def step(x, y):
        found = sample_gradients(case.model, x, y, loss=case.loss, check=False)
        return found.norms, found.weighted(Weighting(normalisation="sum")(found.norms))

    return lambda: step(case.x, case.y)


def weighted_sums(gradients: list) -> tuple:
    """(norms, sums weighted by them) of per-sample gradients (B, *shape) that are written out."""
    norms = tf.sqrt(tf.add_n([tf.reduce_sum(tf.reshape(g, (tf.shape(g)[0], -1)) ** 2, 1) for g in gradients]))
    return norms, [tf.tensordot(norms / tf.reduce_sum(norms), g, 1) for g in gradients]


def vectorized_map(case: Case) -> Step:
    """One sample's tape, vectorised by TensorFlow."""

    def of_one(sample):
        x, y = tf.nest.map_structure(lambda part: part[None], sample)
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(case.losses(x, y))
        return [tf.convert_to_tensor(g) for g in tape.gradient(value, case.variables)]

    step = case.function(lambda x, y: weighted_sums(tf.vectorized_map(of_one, (x, y))))
    return lambda: step(case.x, case.y)


def jacobian(case: Case) -> Step:
    """The Jacobian of the losses (B,) with respect to every variable."""

    @case.function
    def step(x, y):
        with tf.GradientTape() as tape:
            losses = case.losses(x, y)
        return weighted_sums(tape.jacobian(losses, case.variables))

    return lambda: step(case.x, case.y)


def tape_per_sample(case: Case) -> Step:
    """A loop over samples of one compiled step, which returns the norm only."""

    @case.function
    def norm(x, y):
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(case.losses(x, y))
        return tf.linalg.global_norm([tf.convert_to_tensor(g) for g in tape.gradient(value, case.variables)])

    def step():
        each = [({name: values[i : i + 1] for name, values in case.x.items()}, case.y[i : i + 1]) for i in range(len(case.y))]
        return tf.stack([norm(x, y) for x, y in each]), None

    return step


@dataclass(frozen=True)
class Method:
    name: str
    kind: str  # plain, scores or weighted
    prepare: Callable[[Case], Step]


METHODS = {
    method.name: method
    for method in (
        Method("plain", "plain", plain),
        Method("engine scores", "scores", engine_scores),
        Method("engine weighted", "weighted", engine_weighted),
        Method("vectorized_map", "weighted", vectorized_map),
        Method("jacobian", "weighted", jacobian),
        Method("tape per sample", "scores", tape_per_sample),
    )
}


# Measuring ------------------------------------------------------------------------------------------------------------------------------


def run(step: Step) -> tuple:
    """The step's results, once every device is done."""
    result = step()
    tf.test.experimental.sync_devices()
    return result


def seconds_of(step: Step) -> float:
    gc.collect()
    start = time.perf_counter()
    run(step)
    return time.perf_counter() - start


def resident_bytes(field: str) -> int:
    """VmRSS, what this process holds in memory, or VmHWM, the most it held since the record was last cleared; Linux."""
    found = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(found[0].split()[1]) * 1024


def peak_here(method: Method, arguments: argparse.Namespace) -> dict:
    """Peak memory of a step in this process, after two steps that trace and compile: on a GPU what TensorFlow's allocator hands out, on a
    CPU the resident memory over what the libraries hold, so what the compiler and the allocator keep is in it too."""
    import keras_hub  # noqa: F401  a library too

    before = resident_bytes("VmRSS")
    try:
        step = method.prepare(Case(arguments))
        for _ in range(2):
            run(step)
        gc.collect()
        if tf.config.list_physical_devices("GPU"):
            tf.config.experimental.reset_memory_stats("GPU:0")
            run(step)
            return {"peak_bytes": tf.config.experimental.get_memory_info("GPU:0")["peak"]}
        Path("/proc/self/clear_refs").write_text("5")
        run(step)
        return {"peak_bytes": resident_bytes("VmHWM") - before}
    except Exception as error:
        return {"error": described(error)}


def peak_of(method: Method, given: list[str]) -> dict:
    """`peak_here` in a process of its own: {"peak_bytes"}, or {"error"} if the method fails there or takes the process with it."""
    command = [sys.executable, str(Path(__file__).resolve()), *given, "--peak-of", method.name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"error": f"its process ended with status {done.returncode}: {last[0][:300]}"}
    return json.loads(done.stdout.splitlines()[-1])


def errors_of(method: Method, case: Case, step: Step) -> dict:
    """max_rel_error of the norms against float64, and gradient_rel_error against a plain pass of losses with the method's own weights."""
    norms, gradient = run(step)
    if norms is None:
        return {"max_rel_error": None, "gradient_rel_error": None}
    norms = norms.numpy()
    if not np.isfinite(norms).all():
        raise ValueError(f"norms of {int((~np.isfinite(norms)).sum())} of {len(norms)} samples are not finite")
    found = {"max_rel_error": float(np.abs(norms[:CHECKED_SAMPLES].astype(float) / case.exact_norms - 1).max()), "gradient_rel_error": None}
    if method.kind == "weighted":
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(norms / norms.sum() * case.losses(case.x, case.y))
        pairs = zip(gradient, tape.gradient(value, case.variables), strict=True)
        pairs = [[tf.cast(tf.convert_to_tensor(part), tf.float64) for part in pair] for pair in pairs]
        found["gradient_rel_error"] = float(tf.linalg.global_norm([a - b for a, b in pairs]) / tf.linalg.global_norm([b for _, b in pairs]))
    return found


def measure(case: Case, methods: list[Method], repeats: int, seed: int, peak: Callable[[Method], dict], results: dict[str, dict]) -> None:
    """Fill `results`, per method: its error, or its peak memory, errors and the seconds of each round. A failure ends that method only.

    An exception from outside, such as an interruption, leaves what was measured before."""
    steps, order = {}, random.Random(seed)
    with tqdm(total=len(methods) * (repeats + 3), unit="step", file=sys.stderr) as bar:

        def attempt(method: Method, action: Callable[[Method], object]):
            bar.set_description(method.name)
            bar.update()
            if "error" in results[method.name]:
                return None
            try:
                return action(method)
            except Exception as error:  # a peer may fail in any way, and must not take the others with it
                if method.name == "plain":
                    raise
                results[method.name] = {"error": described(error)}
                return None

        for method in methods:
            results[method.name] = {"seconds": []}
            results[method.name] |= attempt(method, peak)  # first in a process of its own, which may be killed for its memory
        if "error" in results["plain"]:
            raise RuntimeError(f"plain failed: {results['plain']['error']}")
        for method in methods:
            steps[method.name] = method.prepare(case)
            results[method.name] |= attempt(method, lambda method: errors_of(method, case, steps[method.name])) or {}
        for number in range(repeats + 1):
            # In another order each time: what one method leaves in caches and memory falls on different ones.
            for method in order.sample(methods, len(methods)):
                seconds = attempt(method, lambda method: seconds_of(steps[method.name]))
                if seconds is not None and number:  # the first round warms up
                    results[method.name]["seconds"].append(seconds)


def speed_ups(results: dict[str, dict]) -> Iterator[tuple[str, float]]:
    """How many times the seconds of the weighted engine each method takes: (name, median over rounds)."""
    own = results.get("engine weighted", {}).get("seconds")
    for name, result in results.items():
        if own and len(result.get("seconds", [])) == len(own) and name != "engine weighted":
            yield name, rounded(statistics.median(theirs / mine for theirs, mine in zip(result["seconds"], own, strict=True)))


def processor_fields(gpu: bool) -> dict:
    """What `machine` says of the processor; of a GPU only its name, for what torch says of one holds for torch."""
    name = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0]).get("device_name") if gpu else None
    return machine(torch.device("cpu")) | ({"device": name} if gpu else {})


def threads() -> int:
    given = tf.config.threading.get_intra_op_parallelism_threads() or int(os.environ.get("TF_NUM_INTRAOP_THREADS") or 0)
    return given or len(os.sched_getaffinity(0))


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm", "tiny"), default="minilm")
    parser.add_argument("--batch", type=whole_number(1), default=16, help="samples in the batch")
    parser.add_argument("--tokens", type=whole_number(1, 512), default=64, help="tokens per sample, at most 512")
    parser.add_argument("--compiled", choices=("xla", "graph"), default="xla", help="xla: jit_compile=True, as Keras does; graph: without")
    parser.add_argument("--methods", default="all", help=f"all, or names with commas between them: {', '.join(METHODS)}")
    parser.add_argument("--repeats", type=whole_number(1), default=7, help="timed rounds, after one that warms up")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--out", type=output_file, help="file of JSON lines to add to")
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)  # what this script calls itself with
    arguments = parser.parse_args(given)
    names = list(METHODS) if arguments.methods == "all" else [name.strip() for name in arguments.methods.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"no method {', '.join(map(repr, unknown))}; there are {', '.join(METHODS)}")
    arguments.methods = [METHODS[name] for name in dict.fromkeys(["plain", *names])]  # the ratios need plain
    return arguments


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    arguments = parse(given)
    warnings.simplefilter("ignore")
    if arguments.peak_of:
        print(json.dumps(peak_here(METHODS[arguments.peak_of], arguments)))
        return
    gpu = bool(tf.config.list_physical_devices("GPU"))
    setting = {
        **processor_fields(gpu),
        "threads": threads(),
        **versions("tensorflow", "keras"),
        "keras_hub": version_of("keras-hub"),
        **{name: getattr(arguments, name) for name in ("model", "batch", "tokens")},
        "dtype": "float32",
        "padding": "none",
        **{name: getattr(arguments, name) for name in ("repeats", "seed", "compiled")},
        "date": now(),
    }
    results: dict[str, dict] = {}
    try:
        measure(Case(arguments), arguments.methods, arguments.repeats, arguments.seed, lambda method: peak_of(method, given), results)
    finally:
        for result in results.values():
            result["kernels"] = "XLA" if arguments.compiled == "xla" else "TensorFlow"
        publish(list(lines(results, arguments.methods, setting)), arguments.out)
    for name, ratio in speed_ups(results):
        print(f"{name}: {ratio} times the seconds of engine weighted", file=sys.stderr)


if __name__ == "__main__":
    script(main)
