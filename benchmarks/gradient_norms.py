"""Per-sample gradient norms and importance-weighted steps: this package's engine against its peers, in time, memory and error.

One JSON line per method; benchmarks/README.md says how to run it and how to read the lines.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler is used for its record, not for its log

import torch
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from recsys_importance import gradients
from recsys_importance.importance import Weighting
from recsys_importance.models import pick_device
from recsys_importance.proxies import error_norms, last_layer_norms
from recsys_importance.reference import gradient_norms_by_loop, weighted_backward_by_loop

MODELS = {
    "bert-base": {},
    "minilm": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "tiny": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),  # for the tests
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKED_SAMPLES = 3  # whose norms are compared with the float64 loop


@dataclass(frozen=True)
class Case:
    """What every method is given: a model in eval mode, its per-sample loss, a batch; and the loss without autocast, to compare with."""

    model: torch.nn.Module
    loss: Callable[[torch.nn.Module, dict], torch.Tensor]
    exact_loss: Callable[[torch.nn.Module, dict], torch.Tensor]
    batch: dict

    def peers_batch(self) -> dict:
        """The batch with position and token-type ids of shape (B, T). Left to itself the model looks positions up once for all samples,
        as (1, T), which Opacus takes for a batch of one: https://github.com/meta-pytorch/opacus/issues/841."""
        ids = self.batch["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)  # not expand: Opacus takes a view of it
        return {"token_type_ids": torch.zeros_like(ids)} | self.batch | {"position_ids": positions}


def build_case(arguments: argparse.Namespace, device: torch.device) -> Case:
    torch.manual_seed(arguments.seed)
    # Without dropout, so that train mode, in which alone Opacus records, computes what eval mode does.
    config = BertConfig(num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **MODELS[arguments.model])
    model = BertForSequenceClassification(config).eval()
    build = real_batch if arguments.padding == "real" else random_batch
    batch = build(arguments.batch, arguments.tokens, arguments.seed)
    dtype = DTYPES[arguments.dtype]
    exact_loss = partial(cross_entropy, autocast=contextlib.nullcontext)
    loss = exact_loss if dtype == torch.float32 else partial(cross_entropy, autocast=partial(torch.autocast, device.type, dtype=dtype))
    return Case(model.to(device), loss, exact_loss, {name: value.to(device) for name, value in batch.items()})


def cross_entropy(model: torch.nn.Module, batch: dict, *, autocast) -> torch.Tensor:
    """Per-sample loss, (B,), in float32 or better; the model runs inside the context that `autocast` makes."""
    with autocast():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def random_batch(count: int, tokens: int, seed: int) -> dict:
    """Random words, all samples of full length."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1000, BertConfig().vocab_size, (count, tokens), generator=generator),
        "labels": torch.randint(2, (count,), generator=generator),
    }


def real_batch(count: int, tokens: int, seed: int) -> dict:
    """Chorus pairs as MiniLM's tokenizer (BERT's vocabulary) cuts them, padded to `tokens`."""
    from transformers import AutoTokenizer

    from recsys_importance.data import load
    from recsys_importance.models import encoder_path

    rows = load("chorus").sample(count, random_state=seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder_path("minilm"))
    options = dict(padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
    encoded = tokenizer(rows["text_a"].tolist(), rows["text_b"].tolist(), **options)
    return dict(encoded) | {"labels": torch.tensor((rows["label"] > 0.5).to_numpy(dtype="int64"))}


# Methods --------------------------------------------------------------------------------------------------------------------------------
# Each is a context manager: what it does before its `yield` and after (wrapping the model, taking hooks off) is not timed. It yields the
# step, which returns the norms, (B,), or None; a weighted step leaves the gradient of sum_i w_i l_i with w = norm / sum of norms in .grad.

Step = Callable[[], torch.Tensor | None]


@dataclass(frozen=True)
class Method:
    name: str
    kind: str  # plain, scores or weighted
    prepare: Callable[[Case], contextlib.AbstractContextManager[Step]]
    parameters: str | None = "*"  # over which the norms are taken; None for a score that is no norm over parameters
    kernels: str | None = None  # which matrix kernels the engine uses; None for methods that are not the engine


@contextlib.contextmanager
def plain(case: Case) -> Iterator[Step]:
    yield lambda: case.loss(case.model, case.batch).mean().backward()


# On processors on which MKL multiplies slowly the engine multiplies with oneDNN (kernels "auto"), which the other methods could do too if
# torch did. With "torch" kernels it uses torch's own. The pair shows what the algorithm saves and what the kernel does.
def engine_scores(parameters: str, kernels: str):
    @contextlib.contextmanager
    def prepare(case: Case) -> Iterator[Step]:
        with engine_kernels(kernels):
            yield lambda: gradients.gradient_norms(case.model, case.loss, case.batch, parameters=parameters)

    return prepare


def engine_weighted(kernels: str):
    @contextlib.contextmanager
    def prepare(case: Case) -> Iterator[Step]:
        with engine_kernels(kernels):
            yield lambda: gradients.weighted_backward(case.model, case.loss, case.batch, Weighting()).norms

    return prepare


@contextlib.contextmanager
def engine_kernels(kernels: str):
    before, gradients.KERNELS = gradients.KERNELS, kernels
    try:
        yield
    finally:
        gradients.KERNELS = before


@contextlib.contextmanager
def el2n(case: Case) -> Iterator[Step]:
    yield lambda: error_norms(case.model, case.loss, case.batch)


@contextlib.contextmanager
def last_layer(case: Case) -> Iterator[Step]:
    yield lambda: last_layer_norms(case.model, case.loss, case.batch, "classifier")


@contextlib.contextmanager
def opacus_wrapped(kind: type, case: Case):
    """The model wrapped by an Opacus class, in train mode, in which alone its hooks record; afterwards as it was."""
    wrapped = kind(case.model, loss_reduction="mean")
    case.model.train()
    try:
        yield wrapped
    finally:
        case.model.eval()
        wrapped.to_standard_module()
        for module in case.model.modules():  # left behind by a step that failed
            for name in {"activations", "max_batch_len"} & module.__dict__.keys():
                delattr(module, name)


@contextlib.contextmanager
def opacus_ghost(case: Case) -> Iterator[Step]:
    """Ghost clipping: norms from a first backward pass, then a second one of the weighted losses; its coefficients made importance."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    class ByImportance(GradSampleModuleFastGradientClipping):
        def get_clipping_coef(self):
            norms = self.get_norm_sample()
            return norms / norms.sum()

    with opacus_wrapped(ByImportance, case) as wrapped:
        batch, optimizer = case.peers_batch(), torch.optim.SGD(case.model.parameters())

        def step():
            DPTensorFastGradientClipping(wrapped, optimizer, case.loss(wrapped, batch)).backward()
            return wrapped.per_sample_gradient_norms

        yield step


@contextlib.contextmanager
def opacus_grad_sample(case: Case) -> Iterator[Step]:
    """Per-sample gradients written out, then their norms and weighted sum, as Opacus's optimizer clips and adds them."""
    from opacus.grad_sample import GradSampleModule

    with opacus_wrapped(GradSampleModule, case) as wrapped:
        batch, parameters = case.peers_batch(), list(case.model.parameters())

        def step():
            case.loss(wrapped, batch).mean().backward()
            norms = torch.stack([p.grad_sample.flatten(1).norm(2, dim=1) for p in parameters], dim=1).norm(2, dim=1)
            for p in parameters:
                p.grad = torch.einsum("i,i...", (norms / norms.sum()).to(p.grad_sample.dtype), p.grad_sample).to(p.dtype)
                p.grad_sample = None
            return norms

        yield step


class OneLoss(torch.nn.Module):
    """The loss of one sample, as a module whose parameters are the model's."""

    def __init__(self, case: Case):
        super().__init__()
        self.model, self.loss = case.model, case.loss

    def forward(self, sample: dict) -> torch.Tensor:
        return self.loss(self.model, {name: value[None] for name, value in sample.items()})[0]


@contextlib.contextmanager
def torch_func(case: Case) -> Iterator[Step]:
    """vmap of grad: per-sample gradients written out. With eager attention, for vmap runs the fused kernel sample by sample; and with the
    mask as the (B, 1, T, T) bias that it becomes anyway, for transformers looks into a (B, T) one, which vmap forbids."""
    from torch.func import functional_call, grad, vmap

    batch, module = case.peers_batch(), OneLoss(case)
    if "attention_mask" in batch:
        hidden = (batch["attention_mask"] == 0)[:, None, None].expand(-1, 1, batch["input_ids"].shape[1], -1)
        batch["attention_mask"] = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, torch.finfo(torch.float32).min)
    parameters = dict(module.named_parameters())
    detached = {name: p.detach() for name, p in parameters.items()}
    per_sample = vmap(grad(lambda values, sample: functional_call(module, values, (sample,))), in_dims=(None, 0))

    def step():
        found = per_sample(detached, batch)
        norms = torch.stack([g.flatten(1).norm(2, dim=1) for g in found.values()], dim=1).norm(2, dim=1)
        for name, p in parameters.items():
            p.grad = torch.einsum("i,i...", (norms / norms.sum()).to(p.dtype), found.pop(name))
        return norms

    attention = case.model.config._attn_implementation
    case.model.set_attn_implementation("eager")
    try:
        yield step
    finally:
        case.model.set_attn_implementation(attention)


@contextlib.contextmanager
def loop(case: Case) -> Iterator[Step]:
    yield lambda: gradient_norms_by_loop(case.model, case.loss, case.batch)


@contextlib.contextmanager
def loop_weighted(case: Case) -> Iterator[Step]:
    yield lambda: weighted_backward_by_loop(case.model, case.loss, case.batch, Weighting()).norms


METHODS = {
    method.name: method
    for method in (
        Method("plain", "plain", plain),
        Method("engine scores", "scores", engine_scores("*", "auto"), kernels="auto"),
        Method("engine weighted", "weighted", engine_weighted("auto"), kernels="auto"),
        Method("engine scores (torch kernels)", "scores", engine_scores("*", "torch"), kernels="torch"),
        Method("engine weighted (torch kernels)", "weighted", engine_weighted("torch"), kernels="torch"),
        Method("engine layer-norm scores", "scores", engine_scores("*LayerNorm*", "auto"), "*LayerNorm*", "auto"),
        Method("engine head scores", "scores", engine_scores("classifier.*", "auto"), "classifier.*", "auto"),
        Method("EL2N", "scores", el2n, None),
        Method("last layer closed form", "scores", last_layer, "classifier.*"),
        Method("opacus ghost", "weighted", opacus_ghost),
        Method("opacus grad sample", "weighted", opacus_grad_sample),
        Method("torch.func", "weighted", torch_func),
        Method("loop", "scores", loop),
        Method("loop weighted", "weighted", loop_weighted),
    )
}


# Measuring ------------------------------------------------------------------------------------------------------------------------------


class Bench:
    """One case, and what it takes to run a method on it: gradients cleared, errors kept, time, peak memory and error measured."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        self.exact: dict[str, torch.Tensor] = {}  # by parameter pattern
        self.parameter_bytes = sum(p.numel() * p.element_size() for p in case.model.parameters())

    def clear(self) -> None:
        for parameter in self.case.model.parameters():
            parameter.grad = None
        gc.collect()

    @contextlib.contextmanager
    def ready(self, method: Method) -> Iterator[Step]:
        self.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with method.prepare(self.case) as step:
                yield step

    def seconds(self, method: Method) -> float:
        with self.ready(method) as step:
            self.wait()
            start = time.perf_counter()
            step()
            self.wait()
            return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def inspect(self, method: Method) -> dict:
        """Peak memory in bytes, parameters included, and errors, in a run of its own."""
        with self.ready(method) as step:
            norms, peak = (self.on_gpu if self.device.type == "cuda" else self.on_cpu)(step)
        if norms is not None and not torch.isfinite(norms).all():
            raise ValueError(f"norms of {int((~torch.isfinite(norms)).sum())} of {len(norms)} samples are not finite in {norms.dtype}")
        return {
            "peak_bytes": peak,
            "max_rel_error": None if norms is None or method.parameters is None else self.error_of_norms(norms, method.parameters),
            "gradient_rel_error": self.error_of_gradient(norms) if method.kind == "weighted" else None,
        }

    def on_gpu(self, step: Step):
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        norms = step()
        torch.cuda.synchronize(self.device)
        return norms, torch.cuda.max_memory_allocated(self.device)

    def on_cpu(self, step: Step):
        """Peak of what torch's allocator hands out, from the profiler's record of every allocation and release."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            norms = step()
        events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
        held = peak = 0
        for _, change in sorted(((event.start_ns(), event.nbytes()) for event in events), key=lambda pair: pair[0]):
            held += change
            peak = max(peak, held)
        if not peak:
            raise RuntimeError("the profiler recorded no allocation; this torch build has no memory profiling")
        return norms, self.parameter_bytes + peak

    def error_of_norms(self, norms: torch.Tensor, parameters: str) -> float:
        """Largest relative difference from the loop in float64, which runs without autocast."""
        if parameters not in self.exact:
            few = {name: value[:CHECKED_SAMPLES] for name, value in self.case.batch.items()}
            self.exact[parameters] = gradient_norms_by_loop(
                self.case.model, self.case.exact_loss, few, parameters=parameters, dtype=torch.float64
            )
        exact = self.exact[parameters]
        return float(((norms[: len(exact)].detach().double() - exact) / exact).abs().max())

    def error_of_gradient(self, norms: torch.Tensor) -> float:
        """L2 distance of .grad from a plain backward pass of the losses weighted by the method's own norms, relative to that."""
        found = {p: p.grad for p in self.case.model.parameters()}
        self.clear()
        weights = (norms / norms.sum()).detach()
        (weights * self.case.loss(self.case.model, self.case.batch)).sum().backward()
        pairs = [(found[p].double(), p.grad.double()) for p in found]
        return float(sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for _, b in pairs).sqrt())


def engine_multiplies_with(method: Method, case: Case, dtype: torch.dtype) -> str:
    """What the engine's matrix products run on."""
    if method.kernels is None:
        return "torch"
    with engine_kernels(method.kernels):
        return "oneDNN" if gradients._onednn(torch.empty(0, dtype=dtype, device=case.batch["input_ids"].device)) else "torch"


def measure(bench: Bench, methods: list[Method], repeats: int, seed: int) -> dict[str, dict]:
    """Per method: its error, or its inspection and the seconds of each round. A failure ends that method only."""
    results: dict[str, dict] = {}
    order = random.Random(seed)
    with tqdm(total=len(methods) * (repeats + 2), unit="step", file=sys.stderr) as bar:

        def attempt(method: Method, action: Callable[[Method], object]):
            bar.set_description(method.name)
            bar.update()
            try:
                return action(method)
            except Exception as error:  # a peer may fail in any way, and must not take the others with it
                if method.name == "plain":
                    raise
                results[method.name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
                return None

        bench.seconds(METHODS["plain"])  # what a first step allocates once (cuBLAS's workspace) is in every peak after it
        for method in methods:
            results[method.name] = {"seconds": []}
            found = attempt(method, bench.inspect)
            if found is not None:
                results[method.name] |= found
        for number in range(repeats + 1):
            # In another order each time: what one method leaves in caches and memory falls on different ones.
            for method in order.sample(methods, len(methods)):
                if "error" not in results[method.name]:
                    seconds = attempt(method, bench.seconds)
                    if seconds is not None and number:  # the first round warms up
                        results[method.name]["seconds"].append(seconds)
                else:
                    bar.update()
    return results


def lines(results: dict[str, dict], methods: list[Method], setting: dict, kernels: dict[str, str]) -> Iterator[dict]:
    base = results["plain"]
    for method in methods:
        result = results[method.name]
        numbers = dict.fromkeys(("seconds_median", "ratio_to_plain", "peak_memory_ratio", "max_rel_error", "gradient_rel_error"))
        if "error" not in result:
            ratios = [own / plain for own, plain in zip(result["seconds"], base["seconds"], strict=True)]
            numbers = {
                "seconds_median": rounded(statistics.median(result["seconds"])),
                "ratio_to_plain": rounded(statistics.median(ratios)),
                "peak_memory_ratio": rounded(result["peak_bytes"] / base["peak_bytes"]),
                "max_rel_error": rounded(result["max_rel_error"]),
                "gradient_rel_error": rounded(result["gradient_rel_error"]),
                "seconds": [rounded(seconds) for seconds in result["seconds"]],
            }
        error = {"error": result["error"]} if "error" in result else {}
        yield {"method": method.name, "kind": method.kind} | numbers | error | {"kernels": kernels[method.name]} | setting


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def device_name(device: torch.device) -> str:
    """Model of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    found = [line for line in information.read_text().splitlines() if line.startswith("model name")] if information.exists() else []
    return found[0].split(":", 1)[1].strip() if found else platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def append(path: Path, rows: list[dict]) -> None:
    """Add the rows to a file of JSON lines, all in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--batch", type=int, default=16, help="samples in the batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per sample, at most 512")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 and float16 through autocast")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--methods", default="all", help=f"all, or names with commas between them: {', '.join(METHODS)}")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, after one that warms up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--padding", choices=("none", "real"), default="none", help="real: pairs of Chorus, padded to --tokens")
    parser.add_argument("--out", type=Path, help="file of JSON lines to add to")
    arguments = parser.parse_args(given)
    names = list(METHODS) if arguments.methods == "all" else [name.strip() for name in arguments.methods.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"no method {', '.join(map(repr, unknown))}; there are {', '.join(METHODS)}")
    if arguments.batch < 1 or arguments.repeats < 1 or not 1 <= arguments.tokens <= 512:
        parser.error("expected --batch and --repeats of 1 or more and --tokens from 1 to 512")
    try:
        arguments.device = pick_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    if arguments.device.type not in ("cpu", "cuda"):
        parser.error(f"no peak memory or float64 on {arguments.device}; expected cpu or cuda")
    arguments.methods = [METHODS[name] for name in dict.fromkeys(["plain", *names])]  # the ratios need plain
    return arguments


def main(given: list[str] | None = None) -> None:
    arguments = parse(given)
    device, methods = arguments.device, arguments.methods
    case = build_case(arguments, device)
    setting = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **{name: version_of(name) for name in ("torch", "transformers", "opacus")},
        **{name: getattr(arguments, name) for name in ("model", "batch", "tokens", "dtype", "padding", "repeats", "seed")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    gc.freeze()  # the collection before every step then passes over the libraries
    results = measure(Bench(case, device), methods, arguments.repeats, arguments.seed)
    kernels = {method.name: engine_multiplies_with(method, case, DTYPES[arguments.dtype]) for method in methods}
    rows = list(lines(results, methods, setting, kernels))
    for row in rows:
        print(json.dumps(row))
    if arguments.out:
        append(arguments.out, rows)


if __name__ == "__main__":
    main()
