"""The Keras benchmark at toy size: its lines have the fields of the PyTorch one, and every method's norms and gradients are right."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
FIELDS = [
    *("method", "kind", "seconds_median", "ratio_to_plain", "peak_memory_ratio", "peak_memory_mib"),
    *("max_rel_error", "gradient_rel_error", "seconds", "kernels", "products"),
    *("device", "processor", "instruction_sets", "cpu_capability", "cores", "l3_mib", "threads", "tensorflow", "keras", "keras_hub"),
    *("model", "batch", "tokens", "dtype", "padding", "repeats", "seed", "compiled", "date"),
]
KINDS = {
    "plain": "plain",
    "engine scores": "scores",
    "engine weighted": "weighted",
    "vectorized_map": "weighted",
    "jacobian": "weighted",
    "tape per sample": "scores",
}
TOY = ["--model", "tiny", "--batch", "3", "--tokens", "5", "--seed", "2"]


@pytest.fixture(scope="module")
def bench():
    """keras_gradient_norms.py as a module."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("keras_gradient_norms")
    finally:
        sys.path.remove(str(FOLDER))


def rows_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.filterwarnings("ignore")
def test_every_method_is_right(bench, monkeypatch, tmp_path, capsys):
    """Memory, a process for each method, is another test's."""
    monkeypatch.setattr(bench, "peak_of", lambda method, given: {"peak_bytes": 200 if method.name == "plain" else 300})
    out = tmp_path / "results" / "tiny.jsonl"
    bench.main([*TOY, "--compiled", "graph", "--repeats", "2", "--out", str(out)])
    rows = rows_of(capsys)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert [row for row in rows if list(row) != FIELDS] == []
    assert {row["method"]: row["kind"] for row in rows} == KINDS
    for row in rows:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert min(row["seconds"]) <= row["seconds_median"] <= max(row["seconds"]) and row["ratio_to_plain"] > 0
        assert row["peak_memory_ratio"] == (1 if row["kind"] == "plain" else 1.5)
        assert row["max_rel_error"] is None if row["kind"] == "plain" else 0 < row["max_rel_error"] < 1e-5
        assert 0 < row["gradient_rel_error"] < 1e-5 if row["kind"] == "weighted" else row["gradient_rel_error"] is None
        assert (row["model"], row["batch"], row["tokens"], row["repeats"], row["seed"]) == ("tiny", 3, 5, 2, 2)
        assert (row["compiled"], row["kernels"], row["dtype"], row["padding"]) == ("graph", "TensorFlow", "float32", "none")
        assert row["device"] and row["threads"] >= 1 and row["tensorflow"] == bench.tf.__version__
        assert row["keras"] == bench.keras.__version__ and row["keras_hub"]


@pytest.mark.filterwarnings("ignore")
def test_a_method_that_fails_has_its_error_in_its_line(bench, monkeypatch, capsys):
    """In its own process, killed for its memory, or here; the others go on."""

    def fails(case):
        def step():
            raise MemoryError("no room\nat all")

        return step

    faulty = bench.Method("jacobian", "weighted", fails)
    monkeypatch.setitem(bench.METHODS, "jacobian", faulty)
    killed = {"error": "its process ended with status -9: no message"}
    monkeypatch.setattr(bench, "peak_of", lambda method, given: killed if method.name == "vectorized_map" else {"peak_bytes": 100})
    bench.main([*TOY, "--repeats", "1", "--methods", "vectorized_map,jacobian,engine scores"])
    rows = {row["method"]: row for row in rows_of(capsys)}
    assert list(rows) == ["plain", "vectorized_map", "jacobian", "engine scores"]
    assert rows["vectorized_map"]["error"] == killed["error"] and rows["jacobian"]["error"] == "MemoryError: no room at all"
    for name in ("vectorized_map", "jacobian"):
        assert all(rows[name][field] is None for field in ("seconds_median", "ratio_to_plain", "peak_memory_ratio", "max_rel_error"))
    assert "error" not in rows["engine scores"] and rows["engine scores"]["max_rel_error"] < 1e-5
    assert rows["plain"]["compiled"] == "xla" and rows["plain"]["kernels"] == "XLA"


def test_plain_must_not_fail(bench, monkeypatch):
    monkeypatch.setattr(bench, "peak_of", lambda method, given: {"error": "its process ended with status -9: no message"})
    with pytest.raises(RuntimeError, match="plain failed: its process ended with status -9"):
        bench.main([*TOY, "--repeats", "1", "--methods", "engine scores"])


def test_peak_memory_is_measured_in_a_process_of_its_own(bench, monkeypatch):
    """At least the model and its gradient; its errors come back as text, and so does how it ended."""
    given = [*TOY, "--compiled", "graph", "--methods", "plain"]
    found = bench.peak_of(bench.METHODS["plain"], given)
    model = bench.Case(bench.parse(given)).model
    assert found["peak_bytes"] > 2 * 4 * sum(int(v.value.shape.num_elements()) for v in model.trainable_variables)
    monkeypatch.setattr(sys, "executable", "false")  # the program that only fails
    assert bench.peak_of(bench.METHODS["plain"], given) == {"error": "its process ended with status 1: no message"}
    lost = bench.Method("plain", "plain", lambda case: 1 / 0)
    assert bench.peak_here(lost, bench.parse(given)) == {"error": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "engine scores,tape"], "no method 'tape'; there are plain, engine scores"),
        (["--batch", "0"], "--batch: expected a whole number of 1 or more"),
        (["--tokens", "513"], "--tokens: expected a whole number from 1 to 512"),
        (["--compiled", "eager"], "invalid choice: 'eager'"),
    ],
)
def test_options_that_make_no_sense_are_refused(bench, capsys, options, said):
    with pytest.raises(SystemExit):
        bench.main([*TOY, *options])
    assert said in capsys.readouterr().err
