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
MACHINE = ["device", "processor", "instruction_sets", "cpu_capability", "cores", "l3_mib", "threads"]
CASE = ["model", "lora", "batch", "tokens", "dtype", "padding", "repeats", "seed", "date"]
VERSIONS = ["torch", "transformers", "opacus", "peft"]
FIELDS = [
    *("method", "kind", "seconds_median", "ratio_to_plain", "peak_memory_ratio", "peak_memory_mib"),
    *("max_rel_error", "gradient_rel_error", "seconds", "kernels", "products"),
    *(*MACHINE, *VERSIONS, *CASE),
]
NO_NORMS = {"plain", "EL2N"}  # EL2N is a norm at the output, over no parameters
PEERS = {"opacus ghost", "opacus grad sample", "torch.func", "loop", "loop weighted"}
CERTIFICATES = {"certificate": "weighted", "certificate (scores)": "scores"}


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


def on_one_thread(script, *options):
    """The finished process of a script."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, FOLDER / script, *options], env=environment, capture_output=True, text=True, timeout=300)


def test_every_method_runs_and_its_norms_are_the_loops(tmp_path):
    out = tmp_path / "results" / "tiny.jsonl"
    options = ["--model", "tiny", "--batch", "4", "--tokens", "12", "--repeats", "2", "--seed", "3", "--out", str(out)]
    done = on_one_thread("gradient_norms.py", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    by_name = {row["method"]: row for row in rows}
    assert len(by_name) == len(rows) == 18
    certificates = {name: by_name.pop(name) for name in CERTIFICATES}
    assert [row for row in by_name.values() if list(row) != FIELDS] == []
    assert PEERS | {"plain", "engine scores", "engine weighted"} <= set(by_name)
    assert {name for name, row in by_name.items() if row["kind"] == "weighted"} == PEERS - {"loop"} | {
        "engine weighted",
        "engine weighted (with certificate)",
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
        assert row["device"] == row["processor"] and row["threads"] == 1 and row["torch"] == torch.__version__
        assert (row["kernels"] == "oneDNN") is (row["products"]["oneDNN"] > 0) and row["products"]["torch"] > 0
    assert by_name["plain"]["ratio_to_plain"] == by_name["plain"]["peak_memory_ratio"] == 1
    assert all(by_name[name]["kernels"] == "torch" for name in by_name if name in PEERS or "torch kernels" in name)
    # the embeddings are nearly all of this model: gradients of 4 samples are 4 models more, scores keep no gradient at all
    assert by_name["engine scores"]["peak_memory_ratio"] < 0.7 < 2 < by_name["opacus grad sample"]["peak_memory_ratio"]
    # a verified step costs a plain backward pass or so more; four of a thousand are verified
    for name, kind in CERTIFICATES.items():
        row, bare, checked = certificates[name], by_name[f"engine {kind}"], by_name[f"engine {kind} (with certificate)"]
        extra = [with_it - without for with_it, without in zip(checked["seconds"], bare["seconds"], strict=True)]
        assert row["kind"] == kind and row["seconds"] == pytest.approx(extra, rel=1e-2, abs=1e-6)
        assert row["share_of_1000_steps"] == pytest.approx(4 * sum(extra) / sum(bare["seconds"]) / 1000, rel=1e-2, abs=1e-8)
        assert set(MACHINE + VERSIONS + CASE + ["kernels"]) < set(row)


@pytest.mark.parametrize("options", [("tiny-llama",), ("tiny-llama", "--lora", 4), ("tiny-t5",), ("tiny-t5", "--lora", 4)], ids=str)
def test_llama_and_t5(bench, capsys, options):
    """Exact in every row, and adapters alone have gradients; a row that cannot be says why."""
    rows = lines_of(bench, capsys, "--batch", 3, "--tokens", 8, "--model", *options)
    expected = {"last layer closed form"} if "llama" in options[0] else {"opacus ghost", "opacus grad sample"}
    if "--lora" in options:  # adapters leave layer norms frozen, and T5's table of positions, at which Opacus stumbles
        expected = {"engine layer-norm scores", *({"last layer closed form"} & expected)}
    assert {name for name, row in rows.items() if "error" in row} == expected
    for name, row in rows.items():
        assert row["model"] == options[0] and row["lora"] == (4 if "--lora" in options else 0)
        if name not in NO_NORMS | expected | set(CERTIFICATES):
            assert row["max_rel_error"] < 1e-5 and (row["gradient_rel_error"] or 0) < 1e-5
    arguments = bench.parse(["--batch", "3", "--tokens", "8", "--model", *map(str, options)])
    trained = [name for name, p in bench.build_case(arguments, arguments.device).model.named_parameters() if p.requires_grad]
    if "--lora" in options:
        assert all("lora_" in name or name.startswith(("score.", "classifier.")) for name in trained) and len(trained) >= 9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(bench, capsys, dtype):
    rows = lines_of(bench, capsys, "--batch", 3, "--tokens", 8, "--dtype", dtype)
    assert [row["error"] for row in rows.values() if "error" in row] == []
    errors = {name: row["max_rel_error"] for name, row in rows.items() if name not in NO_NORMS | set(CERTIFICATES)}
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
    assert max(row["max_rel_error"] for name, row in rows.items() if name not in NO_NORMS | set(CERTIFICATES)) < 1e-5
    for model in ("tiny-llama", "tiny-t5"):  # causal, and with a mean over the words that are there
        options = ["--model", model, "--padding", "real", "--batch", 4, "--tokens", 24, "--methods", "engine weighted,torch.func"]
        rows = lines_of(bench, capsys, *options)
        assert [row["error"] for row in rows.values() if "error" in row] == []
        assert max(rows[name]["max_rel_error"] for name in ("engine weighted", "torch.func")) < 1e-5


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
    assert checked.error_of_norms(norms * 1.01, "all") == pytest.approx(0.01, rel=1e-3)
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
    ("script", "options", "said"),
    [
        ("gradient_norms", ["--methods", "engine scores,opacus"], "no method 'opacus'; there are plain, engine scores"),
        ("gradient_norms", ["--batch", "0"], "--batch: expected a whole number of 1 or more, got '0'"),
        ("gradient_norms", ["--repeats", "many"], "--repeats: expected a whole number of 1 or more, got 'many'"),
        ("gradient_norms", ["--lora", "-1"], "--lora: expected a whole number of 0 or more, got '-1'"),
        ("gradient_norms", ["--tokens", "513"], "--tokens: expected a whole number from 1 to 512, got '513'"),
        ("gradient_norms", ["--device", "cuda:77"], "device 'cuda:77' is not available"),
        ("gradient_norms", ["--device", "mps"], "device 'mps' is not available"),
        ("gradient_norms", ["--out", "{folder}"], "cannot write to"),
        ("importance_head", ["--out", "{file}/rows.jsonl"], "cannot write to"),
        ("selective_step", ["--out", "{file}"], "is not a file of JSON lines"),
        ("selective_step", ["--batch", "1"], "--batch: expected a whole number of 2 or more"),
        ("score_dataset", ["--seed", "-1"], "--seed: expected a whole number from 0 to 4294967295, got '-1'"),
        ("score_dataset", ["--growth-of", "0"], "--growth-of: expected a whole number of 1 or more"),
        ("equal_time", ["--seconds", "nan"], "--seconds: expected seconds above 0, got 'nan'"),
        ("equal_time", ["--data", "no such data"], "no data set is called"),
        ("equal_time", ["--data", "shop", "--test-pairs", "1"], "no query of the test part fits into --test-pairs 1"),
        ("gpu", ["--out", "{folder}", "--device", "cpu"], "the full size needs a GPU"),
        ("gpu", ["--out", "{file}", "--size", "tiny", "--device", "cpu"], "cannot write to"),
        ("gpu", ["--out", "{folder}", "--parts", "tests,tea", "--size", "tiny"], "no part 'tea'; there are tests"),
        ("gpu", ["--size", "tiny"], "the following arguments are required: --out"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_measured(bench, tmp_path, capsys, script, options, said):
    (tmp_path / "a file").write_text("notes, not rows")
    (tmp_path / "a folder").mkdir()
    given = [option.format(folder=tmp_path / "a folder", file=tmp_path / "a file") for option in options]
    with pytest.raises(SystemExit) as refusal:
        importlib.import_module(script).main(given)
    assert refusal.value.code == 2 and said in capsys.readouterr().err
    assert (tmp_path / "a file").read_text() == "notes, not rows" and not list((tmp_path / "a folder").iterdir())


def test_an_interrupted_run_keeps_the_rounds_that_were_complete(bench, capsys, monkeypatch, tmp_path):
    calls, out = [], tmp_path / "rows.jsonl"

    def interrupted(case):
        def step():
            calls.append(1)
            if len(calls) == 5:  # inspected, in a round that warms up, in two that are timed, in the middle of the third
                raise KeyboardInterrupt

        return contextlib.nullcontext(step)

    monkeypatch.setattr(bench.Bench, "inspect", lambda self, method: {"peak_bytes": 1} | dict(step=self.seconds(method)))
    monkeypatch.setitem(bench.METHODS, "loop", bench.Method("loop", "scores", interrupted, None))
    options = ["--model", "tiny", "--batch", "2", "--tokens", "4", "--repeats", "9", "--methods", "loop,EL2N", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        bench.main(options)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["plain", "loop", "EL2N"] and all(len(row["seconds"]) == 2 for row in rows)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    calls[:] = [1, 1, 1]  # now in the round that warms up
    with pytest.raises(KeyboardInterrupt):
        bench.main(options)
    later = [json.loads(line) for line in out.read_text().splitlines()][3:]
    assert [row["error"] for row in later] == ["stopped before a round was timed"] * 3


def test_a_terminated_script_keeps_its_rows(tmp_path):
    """As a scheduler ends it: SIGTERM, status 130."""
    out = tmp_path / "rows.jsonl"
    options = ["--model", "tiny", "--batch", "4", "--tokens", "8", "--repeats", "100000", "--device", "cpu", "--out", str(out)]
    command = [sys.executable, "-u", FOLDER / "selective_step.py", *options]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    seen = b""
    while b"| 4/100001" not in seen and process.poll() is None:
        seen += os.read(process.stderr.fileno(), 4096)
        seen = seen.replace(b"| 5/", b"| 4/").replace(b"| 6/", b"| 4/").replace(b"| 7/", b"| 4/")
    process.terminate()
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "interrupted; what was measured before is kept" in said, said[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4 and len({len(row["seconds"]) for row in rows}) == 1 and len(rows[0]["seconds"]) >= 2


def test_a_line_that_was_cut_short_stays_a_line_of_its_own(bench, tmp_path):
    record = importlib.import_module("record")
    out = tmp_path / "new" / "rows.jsonl"
    record.check_writable(out)
    assert not out.exists()
    record.append(out, [{"a": 1}])
    out.write_text(out.read_text() + '{"b": ')
    record.append(out, [{"c": 3}, {"d": 4}])
    assert out.read_text().splitlines() == ['{"a": 1}', '{"b": ', '{"c": 3}', '{"d": 4}']


def test_the_machine_in_words(bench, monkeypatch):
    record = importlib.import_module("record")
    cpu = torch.device("cpu")
    # two cores of two threads each, in one package
    fake = [
        {"model name": "A Processor", "flags": "sse avx2 amx_bf16 avx512f", "physical id": "0", "core id": str(n // 2)} for n in range(4)
    ]
    monkeypatch.setattr(record, "_processors", lambda: fake)
    found = record.machine(cpu)
    assert list(found) == MACHINE and found["device"] == found["processor"] == "A Processor" and found["cores"] == 2
    assert found["instruction_sets"] == ["avx2", "avx512f", "amx_bf16"] and found["threads"] == torch.get_num_threads()
    monkeypatch.setattr(record, "_processors", lambda: [{"Features": "asimd sve"}] * 3)  # Arm names neither cores nor the model
    found = record.machine(cpu)
    assert found["instruction_sets"] == ["asimd", "sve"] and found["cores"] == 3 and found["device"]
    monkeypatch.setattr(record, "_processors", lambda: [])
    assert record.machine(cpu)["cores"] == os.cpu_count() and record.machine(cpu)["instruction_sets"] == []


def test_kernels_are_counted_not_assumed(bench):
    x = torch.randn(8, 8)

    def step():
        return x @ x, torch.addmm(x, x, x), torch.bmm(x[None], x[None])

    assert bench.products_of(bench.profiled(step)[1]) == {"oneDNN": 0, "torch": 3}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        product = bench.profiled(lambda: torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], ""))
        assert bench.products_of(product[1]) == {"oneDNN": 1, "torch": 0}


def test_everything_for_a_gpu_at_toy_size(tmp_path):
    """The one command, on a processor: every part runs, and every line says what it is, where and when."""
    done = on_one_thread("gpu.py", "--out", str(tmp_path / "found"), "--device", "cpu", "--size", "tiny", "--budget", "280")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in (tmp_path / "found").glob("*.jsonl")}
    assert set(lines) == {"parts", "tests", "engine", "memory", "selective", "scoring", "training"}
    every = [row for rows in lines.values() for row in rows]
    assert len({row["date"] for row in every}) == 1 and all(row["size"] == "tiny" and row["threads"] == 1 for row in every)
    assert all(
        {"part", *MACHINE, "torch", "transformers", "opacus", "python", "array_api_compat", "started_by"} <= set(row) for row in every
    )
    assert (
        [row["part"] for row in lines["parts"]] == [part for part in PARTS_OF_GPU if part in {row["part"] for row in every}] == PARTS_OF_GPU
    )
    assert all(row["status"] == "ran" and row["wrong"] == row["absent"] == [] and row["seconds"] > 0 for row in lines["parts"])
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert printed == [{name: row[name] for name in ("part", "size", "status", "seconds", "wrong", "absent")} for row in lines["parts"]]
    assert {row["outcome"] for row in lines["tests"]} <= ({"passed"} if torch.cuda.is_available() else {"skipped"}) and lines["tests"]
    assert all(row["test"].startswith("tests/test_") and row["message"] for row in lines["tests"] if row["outcome"] == "skipped")
    check_engine_rows(lines["engine"])
    for row in lines["memory"]:
        assert row["batch"] in (2, 4) and row["peak_memory_mib"] > 0 and "error" not in row
        assert (row["peak_memory_ratio"] == 1) is (row["method"] == "plain")
    assert {row["samples_trained"] for row in lines["selective"]} == {2, 4} and len(lines["selective"]) == 4
    (scored,) = lines["scoring"]
    assert scored["samples_per_second"] == pytest.approx(40 / scored["seconds_score_dataset_median"], rel=1e-3)
    assert scored["max_rel_difference"] < 1e-6
    check_curve(lines["training"])
    assert (tmp_path / "found" / "training.png").read_bytes().startswith(b"\x89PNG")


PARTS_OF_GPU = [
    *("tests", "engine bfloat16", "engine llama", "training", "scoring", "selective", "engine float32", "engine float16", "memory"),
]


def check_engine_rows(rows):
    bounds = {"engine float32": 1e-5, "engine bfloat16": 0.05, "engine llama": 0.05, "engine float16": 0.05}
    for part, bound in bounds.items():
        found = {row["method"]: row for row in rows if row["part"] == part}
        assert {"plain", "engine scores", "engine weighted", "opacus ghost", "torch.func", "loop", *CERTIFICATES} <= set(found)
        assert not any("error" in row for row in found.values())
        assert {row["lora"] for row in found.values()} == ({8} if part == "engine llama" else {0})
        assert max(row["max_rel_error"] for name, row in found.items() if name not in NO_NORMS | set(CERTIFICATES)) < bound


def check_curve(rows):
    assert [(row["weighting"], row["step"]) for row in rows] == [(n, k) for k in (2, 4, 6) for n in ("uniform", "importance", "inverse")]
    for row in rows:
        assert row["data"] == "SIMULATED" and row["dtype"] == "bfloat16" and row["train_loss"] > 0 and row["test_loss"] > 0
        assert 0 <= row["test_accuracy"] <= 1 and row["test_accuracy"] * 16 % 1 == 0
    assert all(later["seconds"] > earlier["seconds"] for earlier, later in zip(rows, rows[3:], strict=False))


def test_a_short_training_learns(bench):
    """The simulated task can be learned: a tiny model gets from chance to well above it, with every weighting."""
    module = importlib.import_module("simulated_training")
    size = module.Size("tiny", batch=32, tokens=16, steps=60, every=60, texts=128, rate=3e-3)
    rows = list(module.train(size, 0, torch.device("cpu")))
    assert [row["weighting"] for row in rows] == ["uniform", "importance", "inverse"]
    assert min(row["test_accuracy"] for row in rows) > 0.8


def test_parts_that_fail_leave_the_others(tmp_path):
    """Raising, dying, hanging, lacking a package, or without time: each says so in its line, and what it wrote is kept."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(folder=str(FOLDER)))
    options = ["--out", tmp_path / "found", "--device", "cpu", "--size", "tiny", "--budget", "120"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "found" / "parts.jsonl").read_text().splitlines()]
    found = {row["part"]: (row["status"], row["wrong"]) for row in lines}
    assert found == {
        "raises": ("failed", ["ValueError: no luck"]),
        "dies": ("failed", ["its process ended with status 9"]),
        "hangs": ("failed", ["no end within 10 s"]),
        "lacks": ("left out", ["not installed: no_such_package"]),
        "runs": ("ran", []),
    }
    assert [json.loads(line)["row"] for line in (tmp_path / "found" / "rows.jsonl").read_text().splitlines()] == ["hung", "fine"]


BROKEN = """
import os, sys, time

sys.path.insert(0, {folder!r})
import gpu


def raises(task):
    raise ValueError("no luck")


def dies(task):
    os._exit(9)


def hangs(task):
    task.write([{{"row": "hung"}}])
    time.sleep(100)


def runs(task):
    task.write([{{"row": "fine"}}])
    return []


gpu.GRACE, gpu.IMPORTED = 1.0, ("gpu",)
gpu.PARTS = {{
    part.name: part
    for part in (
        gpu.Part("raises", "rows", 60, raises),
        gpu.Part("dies", "rows", 60, dies),
        gpu.Part("hangs", "rows", 3, hangs),
        gpu.Part("lacks", "rows", 60, runs, ("no_such_package",)),
        gpu.Part("runs", "rows", 60, runs),
    )
}}
if __name__ == "__main__":
    gpu.script(gpu.main)
"""


def test_a_used_up_budget_leaves_parts_out(bench, monkeypatch, tmp_path, capsys):
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "usable", lambda context, device: True)
    monkeypatch.setattr(module, "run_part", lambda *given: pytest.fail("a part was begun"))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    options = ["--out", str(tmp_path / "found"), "--device", "cpu", "--size", "tiny", "--budget", "12", "--parts", "scoring,memory"]
    assert module.main(options) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["part"], row["status"], row["wrong"]) for row in lines] == [
        (name, "left out", ["the budget of 12 s was used up"]) for name in ("scoring", "memory")
    ]


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
    fields = [*FIELDS, "ratio_to_bare"]
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
