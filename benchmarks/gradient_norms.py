"""Per-sample gradient norms and importance-weighted steps: this package's engine against its peers, in time, memory and error.

One JSON line per method; benchmarks/README.md says how to run it and how to read the lines.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler is used for its record, not for its log

import torch
from cases import DTYPES, MODELS, Case, build_case
from record import described, machine, now, output_file, processor_or_gpu, publish, rounded, script, seed, versions, whole_number
from tqdm import tqdm

from recsys_importance.gradients import gradient_norms, weighted_backward
from recsys_importance.gradients import kernels as choice
from recsys_importance.importance import Weighting
from recsys_importance.proxies import error_norms, last_layer_norms
from recsys_importance.reference import gradient_norms_by_loop, weighted_backward_by_loop

CHECKED_SAMPLES = 3  # whose norms are compared with the float64 loop
CHECKS_IN_1000_STEPS = 4  # the engine's own schedule: steps 1, 10, 100 and 1,000


# Methods --------------------------------------------------------------------------------------------------------------------------------
# Each is a context manager: what it does before its `yield` and after (wrapping the model, taking hooks off) is not timed. It yields the
# step, which returns the norms, (B,), or None; a weighted step leaves the gradient of sum_i w_i l_i with w = norm / sum of norms in .grad.

Step = Callable[[], torch.Tensor | None]


@dataclass(frozen=True)
class Method:
    name: str
    kind: str  # plain, scores or weighted
    prepare: Callable[[Case], contextlib.AbstractContextManager[Step]]
    parameters: str | None = "all"  # over which the norms are taken, a name of Family.parts; None for a score that is no such norm
    kernels: str | None = None  # which matrix kernels the engine may use; None for methods that are not the engine


@contextlib.contextmanager
def plain(case: Case) -> Iterator[Step]:
    yield lambda: case.loss(case.model, case.batch).mean().backward()


# With kernels "auto" the engine may multiply with oneDNN in place of torch's own kernels, which the other methods could do too if torch
# did. The rows "(torch kernels)" show what the algorithm saves, the difference what the kernels do. `check` says of every step whether the
# engine verifies it against autograd; left to itself it does so ever more rarely, which is a matter of a run and not of a step.
def engine_scores(parameters: str, kernels: str, *, check: bool = False):
    @contextlib.contextmanager
    def prepare(case: Case) -> Iterator[Step]:
        with engine_kernels(kernels):
            yield partial(gradient_norms, case.model, case.loss, case.batch, parameters=case.family.parts[parameters], check=check)

    return prepare


def engine_weighted(kernels: str, *, check: bool = False):
    @contextlib.contextmanager
    def prepare(case: Case) -> Iterator[Step]:
        with engine_kernels(kernels):
            yield lambda: weighted_backward(case.model, case.loss, case.batch, Weighting(), check=check).norms

    return prepare


@contextlib.contextmanager
def engine_kernels(kernels: str):
    before, choice.KERNELS = choice.KERNELS, kernels
    try:
        yield
    finally:
        choice.KERNELS = before


@contextlib.contextmanager
def el2n(case: Case) -> Iterator[Step]:
    yield lambda: error_norms(case.model, case.loss, case.batch)


@contextlib.contextmanager
def last_layer(case: Case) -> Iterator[Step]:
    yield lambda: last_layer_norms(case.model, case.loss, case.batch, case.family.parts["head"].removesuffix(".*"))


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
        batch, optimizer = case.peers_batch(), torch.optim.SGD(case.trainable)

        def step():
            DPTensorFastGradientClipping(wrapped, optimizer, case.loss(wrapped, batch)).backward()
            return wrapped.per_sample_gradient_norms

        yield step


@contextlib.contextmanager
def opacus_grad_sample(case: Case) -> Iterator[Step]:
    """Per-sample gradients written out, then their norms and weighted sum, as Opacus's optimizer clips and adds them."""
    from opacus.grad_sample import GradSampleModule

    with opacus_wrapped(GradSampleModule, case) as wrapped:
        batch, parameters = case.peers_batch(), case.trainable

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
        tokens = batch["input_ids"].shape[1]
        hidden = (batch["attention_mask"] == 0)[:, None, None].expand(-1, 1, tokens, -1)
        if case.family.causal:
            hidden = hidden | torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).triu(1)
        batch["attention_mask"] = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, torch.finfo(torch.float32).min)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
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
        Method("engine scores", "scores", engine_scores("all", "auto"), kernels="auto"),
        Method("engine weighted", "weighted", engine_weighted("auto"), kernels="auto"),
        Method("engine scores (with certificate)", "scores", engine_scores("all", "auto", check=True), kernels="auto"),
        Method("engine weighted (with certificate)", "weighted", engine_weighted("auto", check=True), kernels="auto"),
        Method("engine scores (torch kernels)", "scores", engine_scores("all", "torch"), kernels="torch"),
        Method("engine weighted (torch kernels)", "weighted", engine_weighted("torch"), kernels="torch"),
        Method("engine layer-norm scores", "scores", engine_scores("norms", "auto"), "norms", "auto"),
        Method("engine head scores", "scores", engine_scores("head", "auto"), "head", "auto"),
        Method("EL2N", "scores", el2n, None),
        Method("last layer closed form", "scores", last_layer, "head"),
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
        """Peak memory in bytes, parameters included, kernels and errors, in a run of its own."""
        if method.kernels is not None:
            self.seconds(method)  # an engine that tries kernels out on first use has made its choice after this
        with self.ready(method) as step:
            norms, peak, products = (self.on_gpu if self.device.type == "cuda" else self.on_cpu)(step)
        if norms is not None and not torch.isfinite(norms).all():
            raise ValueError(f"norms of {int((~torch.isfinite(norms)).sum())} of {len(norms)} samples are not finite in {norms.dtype}")
        return {
            "peak_bytes": peak,
            "max_rel_error": None if norms is None or method.parameters is None else self.error_of_norms(norms, method.parameters),
            "gradient_rel_error": self.error_of_gradient(norms) if method.kind == "weighted" else None,
            "kernels": "oneDNN" if products and products["oneDNN"] else "torch",
            "products": products,
        }

    def peak(self, method: Method) -> int:
        """Peak memory of one step in bytes, parameters included."""
        with self.ready(method) as step:
            return (self.on_gpu if self.device.type == "cuda" else self.on_cpu)(step)[1]

    def on_gpu(self, step: Step):
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        norms = step()
        torch.cuda.synchronize(self.device)
        return norms, torch.cuda.max_memory_allocated(self.device), None

    def on_cpu(self, step: Step):
        norms, events = profiled(step)
        peak = peak_of(events)
        if not peak:
            raise RuntimeError("the profiler recorded no allocation; this torch build has no memory profiling")
        return norms, self.parameter_bytes + peak, products_of(events)

    def error_of_norms(self, norms: torch.Tensor, parameters: str) -> float:
        """Largest relative difference from the loop in float64, which runs without autocast."""
        if parameters not in self.exact:
            few = {name: value[:CHECKED_SAMPLES] for name, value in self.case.batch.items()}
            pattern = self.case.family.parts[parameters]
            self.exact[parameters] = gradient_norms_by_loop(
                self.case.model, self.case.exact_loss, few, parameters=pattern, dtype=torch.float64
            )
        exact = self.exact[parameters]
        return float(((norms[: len(exact)].detach().double() - exact) / exact).abs().max())

    def error_of_gradient(self, norms: torch.Tensor) -> float:
        """L2 distance of .grad from a plain backward pass of the losses weighted by the method's own norms, relative to that."""
        found = {p: p.grad for p in self.case.trainable}
        self.clear()
        weights = (norms / norms.sum()).detach()
        (weights * self.case.loss(self.case.model, self.case.batch)).sum().backward()
        pairs = [(found[p].double(), p.grad.double()) for p in found]
        return float(sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(b.square().sum() for _, b in pairs).sqrt())


def profiled(step: Step) -> tuple[torch.Tensor | None, list]:
    """What the step returns, and the profiler's record of every operation, allocation and release on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = step()
    return result, list(profile.profiler.kineto_results.events())


def peak_of(events: list) -> int:
    """The most bytes that torch's allocator had handed out at one time."""
    held = peak = 0
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def products_of(events: list) -> dict[str, int]:
    """How many matrix products ran on oneDNN's kernels and how many on torch's own: what was chosen, not what was asked for."""
    seen = Counter(event.name() for event in events)
    torch_s = sum(seen[f"aten::{name}"] for name in ("mm", "addmm", "bmm", "baddbmm"))
    return {"oneDNN": sum(count for name, count in seen.items() if name.startswith("mkldnn::")), "torch": torch_s}


def measure(bench: Bench, methods: list[Method], repeats: int, seed: int, results: dict[str, dict], *, until: float = float("inf")) -> None:
    """Fill `results`, per method: its error, or its inspection and the seconds of each round. A failure ends that method only.

    until: no step begins after this time of time.monotonic(). What stopped early, by that or by an exception, leaves what it had measured.
    """
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
                results[method.name] = {"error": described(error)}
                return None

        bench.seconds(METHODS["plain"])  # what a first step allocates once (cuBLAS's workspace) is in every peak after it
        for method in methods:
            if time.monotonic() > until:
                return
            found = attempt(method, bench.inspect)
            if found is not None:
                results[method.name] = found | {"seconds": []}
        for number in range(repeats + 1):
            # In another order each time: what one method leaves in caches and memory falls on different ones.
            for method in order.sample(methods, len(methods)):
                if time.monotonic() > until:
                    return
                if "error" not in results[method.name]:
                    seconds = attempt(method, bench.seconds)
                    if seconds is not None and number:  # the first round warms up
                        results[method.name]["seconds"].append(seconds)
                else:
                    bar.update()


def complete_rounds(results: dict[str, dict]) -> dict[str, dict]:
    """The results without the round that was cut short, if one was; a method that no round timed has an error that says so."""
    running = [len(result["seconds"]) for result in results.values() if "error" not in result]
    count, found = min(running, default=0), {}
    for name, result in results.items():
        found[name] = result
        if "error" not in result:
            found[name] = result | {"seconds": result["seconds"][:count]} | ({} if count else {"error": "stopped before a round was timed"})
    return found


def lines(results: dict[str, dict], methods: list[Method], setting: dict) -> Iterator[dict]:
    """A row for each method that was begun. Results of a method: `seconds`, `peak_bytes`, errors, `kernels` and `products`; or `error`."""
    results = complete_rounds(results)
    base = results.get("plain", {})
    for method in methods:
        if method.name not in results:
            continue
        result = results[method.name]
        numbers = dict.fromkeys(("seconds_median", "ratio_to_plain", "peak_memory_ratio", "peak_memory_mib"))
        if "error" not in result:
            ratios = [own / plain for own, plain in zip(result["seconds"], base["seconds"], strict=True)]
            numbers["seconds_median"] = rounded(statistics.median(result["seconds"]))
            numbers["ratio_to_plain"] = rounded(statistics.median(ratios))
        if result.get("peak_bytes"):
            numbers["peak_memory_ratio"] = rounded(result["peak_bytes"] / base["peak_bytes"])
            numbers["peak_memory_mib"] = rounded(result["peak_bytes"] / 2**20)
        errors = {name: rounded(result.get(name)) for name in ("max_rel_error", "gradient_rel_error")}
        timed = {"seconds": [rounded(seconds) for seconds in result["seconds"]]} if "error" not in result else {"error": result["error"]}
        used = {name: result.get(name) for name in ("kernels", "products")}
        yield {"method": method.name, "kind": method.kind} | numbers | errors | timed | used | setting


def certificates(results: dict[str, dict], setting: dict) -> Iterator[dict]:
    """For weighted steps and for scores, what verifying one step costs, and how much of a run of 1,000 steps that is."""
    results = complete_rounds(results)
    for kind, name in (("weighted", "certificate"), ("scores", "certificate (scores)")):
        bare, checked = (results.get(f"engine {kind}{suffix}", {"error": ""}) for suffix in ("", " (with certificate)"))
        if "error" in bare or "error" in checked:
            continue
        extra = [with_it - without for with_it, without in zip(checked["seconds"], bare["seconds"], strict=True)]
        step, plain = statistics.median(bare["seconds"]), statistics.median(results["plain"]["seconds"])
        yield {
            "method": name,
            "kind": kind,
            "seconds_median": rounded(statistics.median(extra)),
            "ratio_to_plain": rounded(statistics.median(extra) / plain),
            "share_of_1000_steps": rounded(CHECKS_IN_1000_STEPS * statistics.median(extra) / (1000 * step)),
            "seconds": [rounded(seconds) for seconds in extra],
            "kernels": checked["kernels"],
        } | setting


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument(
        "--lora", type=whole_number(0), default=0, help="rank of low-rank adapters (peft), which alone are trained; 0: none"
    )
    parser.add_argument("--batch", type=whole_number(1), default=16, help="samples in the batch")
    parser.add_argument("--tokens", type=whole_number(1, 512), default=64, help="tokens per sample, at most 512")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 and float16 through autocast")
    parser.add_argument("--device", type=processor_or_gpu, default="cpu", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--methods", default="all", help=f"all, or names with commas between them: {', '.join(METHODS)}")
    parser.add_argument("--repeats", type=whole_number(1), default=7, help="timed rounds, after one that warms up")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--padding", choices=("none", "real"), default="none", help="real: pairs of Chorus, padded to --tokens")
    parser.add_argument("--out", type=output_file, help="file of JSON lines to add to")
    arguments = parser.parse_args(given)
    names = list(METHODS) if arguments.methods == "all" else [name.strip() for name in arguments.methods.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"no method {', '.join(map(repr, unknown))}; there are {', '.join(METHODS)}")
    arguments.methods = [METHODS[name] for name in dict.fromkeys(["plain", *names])]  # the ratios need plain
    return arguments


def setting_of(arguments: argparse.Namespace) -> dict:
    """What every row says beside its numbers."""
    given = ("model", "lora", "batch", "tokens", "dtype", "padding", "repeats", "seed")
    return (
        machine(arguments.device)
        | versions("torch", "transformers", "opacus", "peft")
        | {name: getattr(arguments, name) for name in given}
        | {"date": now()}
    )


def rows_of(arguments: argparse.Namespace, write: Callable[[list[dict]], None], *, until: float = float("inf")) -> list[dict]:
    """Measure, and hand over the rows, also those of a measurement that is cut short."""
    setting, results, rows = setting_of(arguments), {}, []
    case = build_case(arguments, arguments.device)
    gc.freeze()  # the collection before every step then passes over the libraries
    try:
        measure(Bench(case, arguments.device), arguments.methods, arguments.repeats, arguments.seed, results, until=until)
    finally:
        gc.unfreeze()
        rows += [*lines(results, arguments.methods, setting), *certificates(results, setting)]
        write(rows)
    return rows


def main(given: list[str] | None = None) -> None:
    arguments = parse(given)
    rows_of(arguments, partial(publish, out=arguments.out))


if __name__ == "__main__":
    script(main)
