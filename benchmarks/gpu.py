"""Everything that only a GPU can show, in one command of at most eight minutes, from the source tree:

    PYTHONPATH=. python benchmarks/gpu.py --out FOLDER

The tests marked gpu; the engine against its peers on BERT-base in bfloat16, float16 and float32 and on a Llama with adapters; peak memory;
selective steps; scoring; a short training. Each part runs in a process of its own with a time limit: one that fails, or whose packages are
missing, says so in its line, and the others go on. benchmarks/README.md says how to read what is written.

The exit status is 0 if every part ran, 1 if one failed or was left out, 130 after an interruption.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a process that asked the driver for its GPUs could not fork others that use them

import torch
from record import append, check_writable, described, machine, now, processor_or_gpu, rounded, script, seconds, versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GRACE = 5.0  # seconds that a part gets beyond its limit to write what it has
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pandas", "pyarrow", "scikit-learn", "peft", "opacus", "pytest", "hypothesis")
IMPORTED = (  # once, before the processes of the parts are forked
    *("gradient_norms", "selective_step", "score_dataset", "simulated_training"),
    *("opacus.grad_sample", "peft", "pytest", "torch._dynamo", "matplotlib.pyplot"),
)
METHODS = (
    *("engine scores", "engine weighted", "engine scores (with certificate)", "engine weighted (with certificate)"),
    *("opacus ghost", "opacus grad sample", "torch.func", "loop"),
)


@dataclass(frozen=True)
class Task:
    """What a part is given: where it runs, at which size, until when (time.monotonic()), and where its lines go."""

    device: torch.device
    size: str  # full or tiny
    until: float
    folder: Path
    write: Callable[[list[dict]], None]


@dataclass(frozen=True)
class Part:
    name: str
    file: str  # of its lines
    limit: float  # seconds
    run: Callable[[Task], list[str]]  # returns what went wrong, in words; an exception is also an answer
    needs: tuple[str, ...] = ()  # modules without which it cannot run
    better_with: tuple[str, ...] = ()  # modules without which something in it has an error


# Parts ----------------------------------------------------------------------------------------------------------------------------------


def tests(task: Task) -> list[str]:
    """A line for each test marked gpu; those that cannot be imported here have a line too."""
    import pytest

    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    if task.size == "tiny":
        files = [min(files, key=lambda path: path.stat().st_size)]
    seen = Outcomes(task)
    os.chdir(ROOT)
    options = ["-m", "gpu", "-q", "--no-header", "--durations=0", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    pytest.main([*options, *map(str, files)], plugins=[seen])
    return seen.wrong if seen.count else ["no test was found"]


class Outcomes:
    """A pytest plugin that writes a line for each test as it ends."""

    def __init__(self, task: Task):
        self.task, self.count, self.wrong = task, 0, []

    def note(self, test: str, outcome: str, seconds: float, message: str = "") -> None:
        self.count += 1
        if outcome not in ("passed", "skipped"):
            self.wrong.append(f"{test} {outcome}")
        self.task.write([{"test": test, "outcome": outcome, "seconds": rounded(seconds), "message": " ".join(message.split())[:500]}])

    def pytest_runtest_setup(self, item) -> None:
        import pytest

        if time.monotonic() > self.task.until:
            self.wrong.append(f"{item.nodeid} left out")
            pytest.skip("left out: the time limit of this part was reached")

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:
            self.note(report.nodeid, report.outcome, report.duration, "" if report.passed else said_by(report))

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.note(report.nodeid, "not collected", 0.0, said_by(report))


def said_by(report) -> str:
    """Why a test was skipped, or what it failed with."""
    if isinstance(report.longrepr, tuple):  # file, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else str(report.longrepr)[-500:]


def engine(model: str, dtype: str, *, batch: int = 64, tokens: int = 128, lora: int = 0) -> Callable[[Task], list[str]]:
    """The rows of gradient_norms.py for one model and precision."""

    def run(task: Task) -> list[str]:
        import gradient_norms

        small = ["--model", {"llama-1b": "tiny-llama"}.get(model, "tiny"), "--batch", "4", "--tokens", "12", "--repeats", "1"]
        full = ["--model", model, "--batch", str(batch), "--tokens", str(tokens), "--repeats", "5"]
        options = ["--dtype", dtype, "--lora", str(lora), "--device", str(task.device), "--methods", ",".join(METHODS)]
        arguments = gradient_norms.parse([*(full if task.size == "full" else small), *options])
        rows = gradient_norms.rows_of(arguments, task.write, until=task.until)
        missing = set(METHODS) - {row["method"] for row in rows}
        return [f"{name}: no row" for name in sorted(missing)] + [
            f"{row['method']}: {row['error']}" for row in rows if "error" in row and row["method"].startswith(("plain", "engine"))
        ]

    return run


def memory(task: Task) -> list[str]:
    """Peak memory of one step as the batch grows."""
    import gradient_norms
    from cases import build_case

    names, wrong = ("plain", "engine scores", "engine weighted", "engine weighted (with certificate)", "opacus ghost"), []
    model, tokens, batches = ("bert-base", 128, (16, 64, 256)) if task.size == "full" else ("tiny", 12, (2, 4))
    for batch in batches:
        options = ["--model", model, "--tokens", str(tokens), "--batch", str(batch), "--dtype", "bfloat16", "--device", str(task.device)]
        arguments = gradient_norms.parse([*options, "--methods", ",".join(names)])
        bench = gradient_norms.Bench(build_case(arguments, task.device), task.device)
        bench.seconds(gradient_norms.METHODS["plain"])  # what a first step allocates once is in every peak after it
        peaks: dict[str, int] = {}
        for name in names:
            if time.monotonic() > task.until:
                return [*wrong, f"batch {batch}, {name}: left out, the time limit was reached"]
            row = {"method": name, "model": model, "batch": batch, "tokens": tokens, "dtype": "bfloat16"}
            try:
                peaks[name] = bench.peak(gradient_norms.METHODS[name])
            except Exception as error:  # out of memory, most likely; a smaller batch may still fit for the next method
                row["error"] = described(error)
                wrong += [f"batch {batch}, {name}: {row['error']}"] if name != "opacus ghost" else []
            peak, plain = peaks.get(name), peaks.get("plain")
            row |= {"peak_memory_mib": rounded(peak / 2**20) if peak else None}
            task.write([row | {"peak_memory_ratio": rounded(peak / plain) if peak and plain else None}])
    return wrong


def selective(task: Task) -> list[str]:
    import selective_step

    full = ["--model", "bert-base", "--batch", "64", "--tokens", "128", "--repeats", "9"]
    tiny = ["--model", "tiny", "--batch", "4", "--tokens", "8", "--repeats", "1"]
    arguments = selective_step.parse([*(full if task.size == "full" else tiny), "--device", str(task.device)])
    return [] if selective_step.rows_of(arguments, task.write, until=task.until) else ["no round was complete"]


def scoring(task: Task) -> list[str]:
    import score_dataset

    full, tiny = ["--model", "bert-base", "--samples", "2048", "--repeats", "3"], ["--model", "tiny", "--samples", "40", "--repeats", "1"]
    arguments = score_dataset.parse([*(full if task.size == "full" else tiny), "--device", str(task.device)])
    return [] if score_dataset.row_of(arguments, None, task.write, until=task.until) else ["no round was complete"]


def training(task: Task) -> list[str]:
    import simulated_training

    rows = simulated_training.curve(task.size, task.device, task.folder / "training.png", task.write, until=task.until)
    return [] if rows else ["no row was reached"]


PAIRS = ("pandas", "pyarrow", "tokenizers")
PEERS = ("opacus",)
PARTS = {
    part.name: part
    for part in (
        Part("tests", "tests", 75, tests, ("pytest",), ("hypothesis", *PAIRS)),
        Part("engine bfloat16", "engine", 60, engine("bert-base", "bfloat16"), (), PEERS),
        Part("engine llama", "engine", 65, engine("llama-1b", "bfloat16", batch=16, tokens=256, lora=8), ("peft",), PEERS),
        Part("training", "training", 90, training, (), ("matplotlib",)),
        Part("scoring", "scoring", 45, scoring, PAIRS),
        Part("selective", "selective", 20, selective, ("pandas",)),
        Part("engine float32", "engine", 50, engine("bert-base", "float32"), (), PEERS),
        Part("engine float16", "engine", 40, engine("bert-base", "float16"), (), PEERS),
        Part("memory", "memory", 30, memory, (), PEERS),
    )
}


# Running them ---------------------------------------------------------------------------------------------------------------------------


def array_api() -> str | None:
    """Where array-api-compat comes from, which weights need: its own package, or the copy that scikit-learn or SciPy carries of it."""
    if importlib.util.find_spec("array_api_compat") is not None:
        return "array-api-compat"
    for package, copy in (("scikit-learn", "sklearn.externals.array_api_compat"), ("scipy", "scipy._lib.array_api_compat")):
        try:
            sys.modules["array_api_compat"] = importlib.import_module(copy)
            sys.modules["array_api_compat.torch"] = importlib.import_module(f"{copy}.torch")
        except ImportError:
            sys.modules.pop("array_api_compat", None)
            continue
        return package
    return None


def absent(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def at_work(pipe, name: str, device: str, size: str, until: float, folder: Path, setting: dict) -> None:
    """One part, in a process of its own; sends what went wrong."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.dup2(2, 1)  # what libraries print is progress; the lines are in the files
    array_api()
    part = PARTS[name]

    def write(rows: list[dict]) -> None:
        append(folder / f"{part.file}.jsonl", [{"part": name, "size": size} | row | setting for row in rows])

    try:
        pipe.send(part.run(Task(torch.device(device), size, until, folder, write)))
    except KeyboardInterrupt:
        pipe.send(["stopped"])
    except BaseException as error:
        pipe.send([described(error)])


def run_part(context, part: Part, limit: float, arguments: argparse.Namespace, setting: dict) -> dict:
    """The part's line: its status, how long it took, and what went wrong."""
    missing = absent(part.needs)
    if missing:
        return {"status": "left out", "seconds": 0.0, "wrong": [f"not installed: {', '.join(missing)}"]}
    start = time.monotonic()
    outcome, inside = context.Pipe(duplex=False)
    given = (inside, part.name, str(arguments.device), arguments.size, start + limit, arguments.out, setting)
    process = context.Process(target=at_work, args=given)
    try:
        process.start()
    except (EOFError, OSError) as error:
        return {"status": "failed", "seconds": 0.0, "wrong": [f"its process did not start: {described(error)}"]}
    inside.close()
    try:
        wrong = answer(process, outcome, limit + GRACE)
    except BaseException:
        end(process)
        raise
    late = time.monotonic() > start + limit
    status = "failed" if wrong else "cut short" if late else "ran"
    if late and not wrong:
        wrong = [f"its time limit of {limit:.0f} s was reached; the lines are of what was done by then"]
    return {"status": status, "seconds": rounded(time.monotonic() - start), "wrong": wrong}


def answer(process, outcome, patience: float) -> list[str]:
    """What the process says went wrong; one that says nothing in time is ended, after a moment in which it can write what it has."""
    try:
        if outcome.poll(patience):
            return outcome.recv()
        return [f"no end within {patience:.0f} s"]
    except EOFError:
        process.join(GRACE)
        return [f"its process ended with status {process.exitcode}"]
    finally:
        end(process)


def end(process) -> None:
    process.join(1)
    for stop in (process.terminate, process.kill):
        if process.is_alive():
            stop()
            process.join(GRACE)


def started(arguments: argparse.Namespace) -> tuple[object, dict]:
    """How processes are made, and the fields of every line.

    They are forked from a process that has imported everything once and never touches the GPU. Where such a process cannot use the GPU
    all the same, each is started anew, which takes longer.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), str(ROOT), os.environ.get("PYTHONPATH"))))
    context, start = multiprocessing.get_context(arguments.start), arguments.start
    if start == "forkserver":
        context.set_forkserver_preload([name for name in IMPORTED if not absent((name.partition(".")[0],))])
        say("importing ...")
        if not usable(context, arguments.device):
            context, start = multiprocessing.get_context("spawn"), "spawn"
            say("a forked process cannot use the device; each part starts anew")
    setting = machine(arguments.device) | versions(*PACKAGES)
    setting |= {"python": platform.python_version(), "array_api_compat": array_api(), "started_by": start, "date": now()}
    return context, setting


def usable(context, device: torch.device) -> bool:
    """Whether a forked process gets to the device; not so, too, if an import ends the process that is to fork it."""
    process = context.Process(target=touch, args=(str(device),))
    try:
        process.start()
    except (EOFError, OSError):
        return False
    process.join(120)
    fine = process.exitcode == 0
    end(process)
    return fine


def touch(device: str) -> None:
    torch.ones(2, device=device).sum().item()


def run_all(arguments: argparse.Namespace) -> int:
    begun, context, setting, statuses = time.monotonic(), *started(arguments), []
    for number, part in enumerate(arguments.parts, 1):
        left = arguments.budget - (time.monotonic() - begun) - 2 * GRACE
        limit = min(part.limit if arguments.size == "full" else part.limit * 3, left)  # a toy may be tried on a busy machine
        say(f"[{number}/{len(arguments.parts)}] {part.name}: at most {max(limit, 0):.0f} s; {max(left, 0):.0f} s left")
        line = {"part": part.name, "size": arguments.size}
        try:
            if left < 10:
                found = {"status": "left out", "seconds": 0.0, "wrong": [f"the budget of {arguments.budget:.0f} s was used up"]}
            else:
                found = run_part(context, part, limit, arguments, setting)
        except KeyboardInterrupt:
            append(arguments.out / "parts.jsonl", [line | {"status": "interrupted"} | setting])
            raise
        line |= found | {"absent": absent(part.better_with)}
        append(arguments.out / "parts.jsonl", [line | setting])
        print(json.dumps(line), flush=True)
        statuses.append(found["status"])
    ran, took = statuses.count("ran"), time.monotonic() - begun
    say(f"{ran} of {len(statuses)} parts ran, on {setting['device']}, in {took:.0f} s: {arguments.out}")
    return 0 if set(statuses) == {"ran"} else 1


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the lines; an earlier run's stay, with their own date")
    parser.add_argument("--device", type=processor_or_gpu, default="auto", help="auto, cuda, cuda:1, or cpu with --size tiny")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: toys, to try the command anywhere")
    parser.add_argument("--budget", type=seconds, default=480.0, help="seconds for all parts; those for which none are left are left out")
    parser.add_argument("--parts", default="all", help=f"all, or names with commas between them: {', '.join(PARTS)}")
    parser.add_argument("--start", choices=("forkserver", "spawn"), default="forkserver", help="how processes are made; spawn is slower")
    arguments = parser.parse_args(given)
    names = list(PARTS) if arguments.parts == "all" else [name.strip() for name in arguments.parts.split(",")]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(map(repr, unknown))}; there are {', '.join(PARTS)}")
    arguments.parts = [PARTS[name] for name in dict.fromkeys(names)]
    if arguments.device.type != "cuda" and arguments.size == "full":
        parser.error("the full size needs a GPU, and torch sees none here or was told cpu; --size tiny runs anywhere")
    try:
        for name in ("parts", *{part.file for part in arguments.parts}):
            check_writable(arguments.out / f"{name}.jsonl")
    except ValueError as error:
        parser.error(str(error))
    arguments.out = arguments.out.resolve()
    return arguments


def main(given: list[str] | None = None) -> int:
    return run_all(parse(given))


if __name__ == "__main__":
    script(main)
