"""The benchmark scripts run at toy size: their lines have the fields that README.md explains, and every method's numbers are right.

Whether the numbers are small is not asked here: timings of a toy on a shared machine say nothing.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recsys_importance.data import DatasetUnavailable, load

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
FIELDS = [
    *(
        "method",
        "kind",
        "seconds_median",
        "ratio_to_plain",
        "peak_memory_ratio",
        "max_rel_error",
        "gradient_rel_error",
        "seconds",
        "kernels",
    ),
    *("device", "threads", "torch", "transformers", "opacus"),
    *("model", "batch", "tokens", "dtype", "padding", "repeats", "seed", "date"),
]
NO_NORMS = {"plain", "EL2N"}  # EL2N is a norm at the output, over no parameters
PEERS = {"opacus ghost", "opacus grad sample", "torch.func", "loop", "loop weighted"}


@pytest.fixture(scope="module")
def bench():
    """gradient_norms.py as a module."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("gradient_norms")
    finally:
        sys.path.remove(str(FOLDER))
        torch.set_num_threads(threads)


def lines_of(bench, capsys, *options):
    bench.main(["--model", "tiny", "--repeats", "1", *map(str, options)])
    return {row["method"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}


def test_every_method_runs_and_its_norms_are_the_loops(tmp_path):
    out = tmp_path / "results" / "tiny.jsonl"
    options = ["--model", "tiny", "--batch", "4", "--tokens", "12", "--repeats", "2", "--seed", "3", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, FOLDER / "gradient_norms.py", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert [row for row in rows if list(row) != FIELDS] == []
    by_name = {row["method"]: row for row in rows}
    assert len(by_name) == len(rows) == 14
    assert PEERS | {"plain", "engine scores", "engine weighted"} <= set(by_name)
    assert {name for name, row in by_name.items() if row["kind"] == "weighted"} == PEERS - {"loop"} | {
        "engine weighted",
        "engine weighted (torch kernels)",
    }
    for name, row in by_name.items():
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert min(row["seconds"]) <= row["seconds_median"] <= max(row["seconds"])
        assert row["ratio_to_plain"] > 0 and row["peak_memory_ratio"] > 0
        assert row["max_rel_error"] is None if name in NO_NORMS else row["max_rel_error"] < 1e-5
        assert (row["gradient_rel_error"] is not None) is (row["kind"] == "weighted")
        assert row["gradient_rel_error"] is None or row["gradient_rel_error"] < 1e-5
        assert (row["model"], row["batch"], row["tokens"], row["dtype"], row["repeats"], row["seed"]) == ("tiny", 4, 12, "float32", 2, 3)
        assert row["device"] and row["threads"] == 1 and row["torch"] == torch.__version__
    assert by_name["plain"]["ratio_to_plain"] == by_name["plain"]["peak_memory_ratio"] == 1
    assert all(by_name[name]["kernels"] == "torch" for name in by_name if name in PEERS or "torch kernels" in name)
    # the embeddings are nearly all of this model: gradients of 4 samples are 4 models more, scores keep no gradient at all
    assert by_name["engine scores"]["peak_memory_ratio"] < 0.7 < 2 < by_name["opacus grad sample"]["peak_memory_ratio"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(bench, capsys, dtype):
    rows = lines_of(bench, capsys, "--batch", 3, "--tokens", 8, "--dtype", dtype)
    assert [row["error"] for row in rows.values() if "error" in row] == []
    errors = {name: row["max_rel_error"] for name, row in rows.items() if name not in NO_NORMS}
    assert max(errors.values()) < 0.05
    assert errors["loop"] > 1e-5  # autocast was on: float32 would be nearer


def test_real_padding(bench, capsys):
    try:
        load("chorus")
    except DatasetUnavailable as error:
        pytest.skip(str(error))
    arguments = bench.parse(["--model", "tiny", "--batch", "4", "--tokens", "24", "--padding", "real"])
    batch = bench.build_case(arguments, arguments.device).batch
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 24)
    assert 0 < batch["attention_mask"].sum() < 4 * 24 and batch["attention_mask"][:, 0].all()
    rows = lines_of(bench, capsys, "--batch", 4, "--tokens", 24, "--padding", "real")
    assert [row["error"] for row in rows.values() if "error" in row] == []
    assert max(row["max_rel_error"] for name, row in rows.items() if name not in NO_NORMS) < 1e-5


def test_a_method_that_fails_says_why_and_leaves_the_others(bench, capsys, monkeypatch):
    def broken(case):
        raise RuntimeError("out of\nluck")

    def infinite(case):
        return contextlib.nullcontext(lambda: torch.full((2,), torch.inf))

    for name, prepare in (("loop", broken), ("torch.func", infinite)):
        monkeypatch.setitem(bench.METHODS, name, bench.Method(name, "scores", prepare))
    rows = lines_of(bench, capsys, "--batch", 2, "--tokens", 5, "--methods", "loop,torch.func,engine weighted,opacus ghost")
    assert list(rows) == ["plain", "loop", "torch.func", "engine weighted", "opacus ghost"]
    assert rows["loop"]["error"] == "RuntimeError: out of luck" and rows["loop"]["seconds_median"] is None
    assert "norms of 2 of 2 samples are not finite" in rows["torch.func"]["error"]
    assert all("error" not in rows[name] and rows[name]["seconds_median"] > 0 for name in ("plain", "engine weighted", "opacus ghost"))


def test_errors_are_measured_not_assumed(bench):
    """A method whose norms or gradient are 1% off is reported as 1% off."""
    arguments = bench.parse(["--model", "tiny", "--batch", "3", "--tokens", "6"])
    checked = bench.Bench(bench.build_case(arguments, arguments.device), arguments.device)
    with checked.ready(bench.METHODS["engine weighted"]) as step:
        norms = step()
    assert checked.error_of_norms(norms * 1.01, "*") == pytest.approx(0.01, rel=1e-3)
    for parameter in checked.case.model.parameters():
        parameter.grad *= 1.01
    assert checked.error_of_gradient(norms) == pytest.approx(0.01, rel=1e-3)


def test_a_peer_leaves_the_model_as_it_was(bench):
    arguments = bench.parse(["--model", "tiny", "--batch", "2", "--tokens", "5"])
    case = bench.build_case(arguments, arguments.device)
    before = {name: sorted(module.__dict__) for name, module in case.model.named_modules()}
    attention = case.model.config._attn_implementation
    checked = bench.Bench(case, arguments.device)
    for name in PEERS:
        with checked.ready(bench.METHODS[name]) as step:
            step()
    assert {name: sorted(module.__dict__) for name, module in case.model.named_modules()} == before
    assert not any(module.training or module._forward_hooks or module._backward_hooks for module in case.model.modules())
    assert not any(hasattr(parameter, "grad_sample") for parameter in case.model.parameters())
    assert case.model.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "engine scores,opacus"], "no method 'opacus'; there are plain, engine scores"),
        (["--batch", "0"], "--batch and --repeats of 1 or more"),
        (["--tokens", "513"], "--tokens from 1 to 512"),
        (["--device", "cuda:77"], "device 'cuda:77' is not available"),
    ],
)
def test_options_that_make_no_sense_are_refused(bench, capsys, options, said):
    with pytest.raises(SystemExit):
        bench.main(["--model", "tiny", *options])
    assert said in capsys.readouterr().err


def test_score_dataset(bench, tmp_path, capfd, monkeypatch):
    """Here only its part in this process is not a script of its own: memory is measured in two sub-processes, which are."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "scores.jsonl"
    importlib.import_module("score_dataset").main(["--model", "tiny", "--samples", "40", "--repeats", "1", "--out", str(out)])
    row = json.loads(capfd.readouterr().out)
    assert json.loads(out.read_text()) == row
    assert row["benchmark"] == "score_dataset" and row["data"] == "synthetic" and row["samples"] == 40 and row["model"] == "tiny"
    assert row["max_rel_difference"] < 1e-6
    assert row["ratio"] == pytest.approx(row["seconds_score_dataset_median"] / row["seconds_bare_median"], rel=1e-3)
    assert list(row["peak_resident_growth_mib"]) == ["40", "160"] and min(row["peak_resident_growth_mib"].values()) >= 0


def test_a_selective_step(bench, tmp_path, capsys):
    """Half of each batch is trained, or all of it where it should be; every round times every method once."""
    out = tmp_path / "selective.jsonl"
    options = ["--model", "tiny", "--batch", "6", "--tokens", "8", "--repeats", "3", "--device", "cpu", "--out", str(out)]
    importlib.import_module("selective_step").main(options)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    trained = {row["method"]: row["samples_trained"] for row in rows}
    assert trained == {"plain": 6, "plain on half a batch": 3, "selective": 3, "selective, float32 scores": 3}
    plain = rows[0]["seconds_median"]
    for row in rows:
        assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0 and row["seconds_median"] == sorted(row["seconds"])[1]
        assert row["ratio"] == pytest.approx(row["seconds_median"] / plain, rel=2e-3)
        assert (row["model"], row["batch"], row["tokens"], row["repeats"], row["case"]) == ("tiny", 6, 8, 3, "tiny, B 6, T 8")
        assert row["device"] and row["scores_in"] in ("float32", "bfloat16") and row["threads"] == 1 and row["torch"] == torch.__version__


def test_the_importance_head(bench, tmp_path, capsys):
    out = tmp_path / "head.jsonl"
    options = ["--model", "tiny", "--batch", "4", "--tokens", "8", "--repeats", "2", "--out", str(out)]
    importlib.import_module("importance_head").main(options)
    rows = {row["method"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert [json.loads(line) for line in out.read_text().splitlines()] == list(rows.values())
    fields = [*(name for name in FIELDS if name != "opacus"), "ratio_to_bare"]
    assert [row for row in rows.values() if list(row) != fields] == []
    bare = {"plain with head": "plain", "engine weighted with head": "engine weighted", "head scores": "EL2N"}
    assert list(rows) == [
        "plain",
        "plain with head",
        "engine weighted",
        "engine weighted with head",
        "engine scores",
        "EL2N",
        "head scores",
    ]
    for name, row in rows.items():
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and (row["model"], row["batch"], row["tokens"]) == ("tiny", 4, 8)
        assert (row["ratio_to_bare"] is not None) is (name in bare)
    for name, other in bare.items():
        ratios = [a / b for a, b in zip(rows[name]["seconds"], rows[other]["seconds"], strict=True)]
        assert rows[name]["ratio_to_bare"] == pytest.approx(sum(ratios) / 2, rel=2e-3)
    # a head that learns beside an exact step leaves norms and gradient as they are
    assert rows["engine weighted with head"]["max_rel_error"] < 1e-5 and rows["engine weighted with head"]["gradient_rel_error"] < 1e-5


def test_equal_time(bench, tmp_path, capsys, monkeypatch):
    """A tenth of a second for each method on the simulated shop, with a tiny model in place of the pre-trained one."""
    from tiny import tiny_pair

    module = importlib.import_module("equal_time")
    monkeypatch.setattr(module, "load_pair_model", lambda name, *, seed, device: tiny_pair(seed=seed))
    out = tmp_path / "time.jsonl"
    options = ["--data", "shop", "--pairs", "40", "--test-pairs", "60", "--seconds", "0.1", "--evaluations", "2", "--seeds", "1"]
    module.main([*options, "--device", "cpu", "--out", str(out)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    by_method = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    assert list(by_method) == ["uniform", "half kept by the forward score", "random half"]
    for name, found in by_method.items():
        seconds = [row["seconds"] for row in found]
        assert len(found) == 3 and seconds[0] == 0 and seconds[1] >= 0.05 and seconds[2] >= 0.1
        assert found[0]["pairs_seen"] == found[0]["pairs_trained"] == 0 and found[0]["ndcg@10"] == rows[0]["ndcg@10"]
        for row in found[1:]:
            expected = row["pairs_seen"] if name == "uniform" else row["pairs_seen"] / 2
            assert row["pairs_trained"] == expected and row["pairs_seen"] % 8 == 0 and 0 <= row["ndcg@10"] <= 1


def test_make_bench_runs_the_cases_that_have_targets():
    command = ["make", "--no-print-directory", "--dry-run", "bench", "BIN=bin", "ARGS=--repeats 3"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    recipe = subprocess.run(command, cwd=FOLDER.parent, env=environment, capture_output=True, text=True, check=True)
    lines = recipe.stdout.splitlines()
    assert [line.split(" --out ")[0] for line in lines] == [
        "bin/python benchmarks/gradient_norms.py --model bert-base --batch 8 --tokens 64",
        "bin/python benchmarks/gradient_norms.py --model minilm --batch 16 --tokens 64",
        "bin/python benchmarks/gradient_norms.py --model minilm --batch 16 --tokens 128",
        "bin/python benchmarks/score_dataset.py",
        "bin/python benchmarks/selective_step.py",
        "bin/python benchmarks/importance_head.py",
    ]
    assert all(".jsonl --repeats 3" in line and "benchmarks/results/" in line for line in lines)
