"""The README's promises: its example runs as printed, its links lead somewhere, its commands exist."""

import os
import re
import subprocess
import sys


def blocks(repository, language):
    return re.findall(rf"```{language}\n(.*?)```", (repository / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_import_examples_run_one_after_the_other(repository, tmp_path):
    examples = blocks(repository, "python")
    assert len(examples) == 5 and all(len(example.splitlines()) <= 14 for example in examples)
    check = "assert len(norms) == 16 and all(p.grad is not None for p in model.parameters()) and run.head.samples > 0"
    apart = "print('-' * 9)"  # sentence-transformers prints its log too
    run = subprocess.run(
        [sys.executable, "-c", "\n".join([*examples[:3], check, apart, examples[3], apart, examples[4]])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"MPLBACKEND": "Agg"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    ours, with_library, in_keras = (part.strip() for part in run.stdout.split("-" * 9))
    quality, names, values = ours.splitlines()
    printed = re.fullmatch(r"NDCG@10 on unseen queries: (\d\.\d\d)", quality)
    assert printed and 0 < float(printed[1]) <= 1
    assert sorted(names.split()) == ["train/coefficient/click", "train/coefficient/relevance"]
    assert all(0 <= float(value) <= 2 for value in values.split()[1:])
    norms = re.fullmatch(r"tf\.Tensor\(\[(.*)\], shape=\(4,\), dtype=float32\)", in_keras)
    assert norms and all(float(norm) > 0 for norm in norms[1].split())
    header, *rows = with_library.splitlines()[:4]
    assert header.split() == ["sample_id", "score"]
    scores = [float(row.split()[-1]) for row in rows]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0 and "'train_loss'" in with_library
    assert [path.name for path in tmp_path.iterdir()] == ["ranker"] and list((tmp_path / "ranker").iterdir()) == []


def test_every_link_and_image_is_a_file(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert len(links) > 15
    assert [link for link in links if not (repository / link).exists()] == []


def test_the_two_commands_come_first(repository):
    first = blocks(repository, "console")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make study", "make test"]


def test_every_notebook_is_on_the_map(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    notebooks = [path.relative_to(repository).as_posix() for path in (repository / "nbs").rglob("*.ipynb") if path.stem != "index"]
    assert [name for name in notebooks if ".ipynb_checkpoints" not in name and f"]({name})" not in text] == []


def test_every_make_target_it_names_exists(repository):
    targets = set(re.findall(r"^([a-z]+):", (repository / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", (repository / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named and named <= targets
