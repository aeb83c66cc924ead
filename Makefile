# On a fresh machine with Python 3.11 to 3.13, make and git:
#   make study    sets up .venv, runs the main study, prints its table and where its report is
#   make test     sets up .venv and runs every test
# `make help` lists the rest.

# Which Python makes .venv. Only read when .venv is missing or when given on the command line.
PYTHON ?= python3
# A further wheel index for torch, for example PyTorch's CPU wheels: make TORCH_INDEX=https://download.pytorch.org/whl/cpu test
TORCH_INDEX ?=

STUDY ?= weighted_bert
BACKEND ?=
DATA ?=
PARAMS ?=
CONFIG ?=
ARGS ?=

# The environment's programs. Given on the command line, that environment is used as it is: make BIN="$CONDA_PREFIX"/bin test
BIN := "$(CURDIR)"/.venv/bin
SETUP := $(if $(filter command line,$(origin BIN)),,setup)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PYTHON_GIVEN := $(filter-out file,$(origin PYTHON))
README := $(BIN)/jupyter-nbconvert nbs/index.ipynb --to markdown --log-level WARN --output-dir . --output README \
	--TemplateExporter.extra_template_basedirs=nbs --template _readme --NbConvertApp.output_files_dir=nbs/images \
	--NbConvertBase.display_data_priority="['image/png', 'text/markdown', 'text/plain']" \
	--TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=remove-input

# Notebooks run in their own folders, so a relative data folder is made absolute here.
ifdef RECSYS_IMPORTANCE_DATA
export RECSYS_IMPORTANCE_DATA := $(shell { cd "$(RECSYS_IMPORTANCE_DATA)" 2>/dev/null && pwd; } || printf %s "$(RECSYS_IMPORTANCE_DATA)")
endif

.DEFAULT_GOAL := help
.PHONY: help setup study test bench lab check sync lint format export readme constraints hooks

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  Variables: STUDY=weighted_bert DATA=auto|chorus|shop|path/to/file.csv BACKEND=pytorch|tensorflow PARAMS="noise=0.2 seeds=3" CONFIG=file.yaml for study,'
	@echo '  ARGS="-k name" for test, ARGS="--repeats 15" for bench, PYTHON=python3.12 and TORCH_INDEX=https://... (a further wheel index for torch) for set-up.'

# .venv/.made holds what .venv was made from: its Python version, this folder, the pins. `unfinished` there means that a set-up was
# interrupted, and then .venv is made anew; so it is when the Python version or the folder changed. When only the pins changed, or the file is
# missing because someone else made .venv, the pinned versions are installed into it.
setup: ## set up .venv with the pinned versions (the other targets do it themselves, once)
	@set -eu; \
	made=.venv/.made; \
	version() { "$$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }; \
	have=$$(version .venv/bin/python); \
	want="$$have"; \
	if [ -n '$(PYTHON_GIVEN)' ] || [ -z "$$have" ]; then want=$$(version '$(PYTHON)'); fi; \
	case "$$want" in \
	  3.11 | 3.12 | 3.13) ;; \
	  '') echo "'$(PYTHON)' is not a Python that runs. Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12" >&2; exit 1 ;; \
	  *) echo "'$(PYTHON)' is Python $$want. Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12" >&2; exit 1 ;; \
	esac; \
	key="python $$want, folder $(CURDIR), pins $$(cat pyproject.toml constraints.txt | cksum)"; \
	was=$$(cat "$$made" 2>/dev/null || true); \
	if [ -n "$$have" ] && [ "$$was" = "$$key" ]; then exit 0; fi; \
	case "$$was" in \
	  '' | "python $$want, folder $(CURDIR), pins "*) fresh= ;; \
	  *) fresh=yes ;; \
	esac; \
	if [ -n "$$fresh" ] || [ "$$have" != "$$want" ]; then \
	  if [ -e .venv ]; then echo "Removing the .venv of an interrupted set-up, another Python or another folder"; rm -rf .venv; fi; \
	  echo "Setting up .venv with Python $$want (once; several minutes, most of it the download of torch)"; \
	  mkdir .venv; \
	  echo unfinished > "$$made"; \
	  '$(PYTHON)' -m venv .venv; \
	else \
	  echo "Installing the pinned versions into .venv"; \
	  echo unfinished > "$$made"; \
	fi; \
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') -c constraints.txt torch; \
	$(PIP) install -c constraints.txt -e '.[all]'; \
	$(PIP) check; \
	echo "$$key" > "$$made.tmp"; \
	mv "$$made.tmp" "$$made"; \
	echo ".venv is ready"

study: $(SETUP) ## run a study and say where its report is
	@$(BIN)/recsys-importance study '$(STUDY)' $(if $(DATA),--data '$(DATA)') $(if $(BACKEND),--set 'backend=$(BACKEND)' --folder 'reports/$(STUDY)_$(BACKEND)') $(if $(CONFIG),--config '$(CONFIG)') $(foreach pair,$(PARAMS),--set '$(pair)')

test: $(SETUP) ## run every test, on up to 4 cores
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

bench: $(SETUP) ## measure the engine and its peers on this processor (minutes; see benchmarks/README.md)
	@$(BIN)/python benchmarks/gradient_norms.py --model bert-base --batch 8 --tokens 64 --out benchmarks/results/cpu-bert-base-b8-t64.jsonl $(ARGS)
	@$(BIN)/python benchmarks/gradient_norms.py --model minilm --batch 16 --tokens 64 --out benchmarks/results/cpu-minilm-b16-t64.jsonl $(ARGS)
	@$(BIN)/python benchmarks/gradient_norms.py --model minilm --batch 16 --tokens 128 --out benchmarks/results/cpu-minilm-b16-t128.jsonl $(ARGS)
	@$(BIN)/python benchmarks/score_dataset.py --out benchmarks/results/cpu-score-dataset.jsonl $(ARGS)
	@$(BIN)/python benchmarks/selective_step.py --out benchmarks/results/cpu-selective-step.jsonl $(ARGS)
	@$(BIN)/python benchmarks/importance_head.py --out benchmarks/results/cpu-importance-head.jsonl $(ARGS)

lab: $(SETUP) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

lint: $(SETUP) ## ruff on notebooks, package and tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(SETUP) ## let ruff repair and format the notebooks and tests
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

export: $(SETUP) ## clean the notebooks and export them to the package
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export

readme: $(SETUP) ## build README.md from nbs/index.ipynb
	@rm -f nbs/images/README_*
	@$(README)

check: lint sync ## lint, sync, and the installed versions fit together
	@$(PIP) check

# Everything that is generated is taken out of a copy, made again there and compared with the working tree, which stays as it is.
sync: $(SETUP) ## fail with the difference if clean, export or readme would change anything
	@set -eu; \
	copy=$$(mktemp -d); \
	trap 'rm -rf "$$copy"' EXIT; \
	cp -R nbs recsys_importance settings.ini pyproject.toml README.md "$$copy"; \
	cd "$$copy"; \
	find recsys_importance -name '*.py' -exec grep -liE '^# AUTOGENERATED' {} + | xargs rm -f; \
	rm -f nbs/images/README_*; \
	$(BIN)/nbdev_clean; \
	$(BIN)/nbdev_export; \
	$(README); \
	same=yes; \
	for made in nbs recsys_importance README.md; do \
	  diff -ru -x __pycache__ -x .ipynb_checkpoints "$(CURDIR)/$$made" "$$made" || same=; \
	done; \
	if [ -z "$$same" ]; then echo "Generated files differ (- as they are, + as they should be): make export readme" >&2; exit 1; fi; \
	echo "Notebooks, package and README agree"

# The versions of .venv become the pins; a pin of what is not installed here (for another Python or machine) stays as it is. Local suffixes
# such as +cpu name a build, not a version, and are cut.
constraints: $(SETUP) ## write constraints.txt from .venv, once the tests have passed there
	@set -eu; \
	trap 'rm -f constraints.txt.tmp freeze.tmp' EXIT; \
	$(PIP) freeze --all --exclude pip --exclude-editable > freeze.tmp; \
	if grep ' @ ' freeze.tmp; then echo "Installed from a file or an address, not from the index" >&2; exit 1; fi; \
	{ sed 's/+.*//' freeze.tmp; cat constraints.txt; } > constraints.txt.tmp; \
	{ sed -n '/^#/p' constraints.txt; \
	  awk -F '==' '!/^#/ {name = tolower($$1); gsub(/[-_.]+/, "-", name); if (!seen[name]++) print}' constraints.txt.tmp | LC_ALL=C sort -f; \
	} > freeze.tmp; \
	mv freeze.tmp constraints.txt

hooks: $(SETUP) ## switch on pre-commit and the notebook merge driver in this clone
	@$(BIN)/pre-commit install
	@git config merge.nbdev-merge.name 'merge notebooks cell by cell'
	@git config merge.nbdev-merge.driver '.venv/bin/nbdev_merge %O %A %B %P'
