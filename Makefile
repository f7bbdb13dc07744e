# Habits of the house. `make help` lists them; each sets up the environment when it has to.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
DATA ?= hospitals

.DEFAULT_GOAL := help
.PHONY: help setup docs hooks train test test-fast lint format params repro audit bench bench-scale bench-gpu bundle demo ui clean

help: ## list these
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make the virtual environment and install everything into it

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No python3.11, 3.12 or 3.13 found. Install one, or give PYTHON=/path/to/python."; exit 2; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"{sys.executable} is Python {v.major}.{v.minor}; 3.11 to 3.13 is needed. Give PYTHON=/path/to/python.")'
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

train: $(READY) ## the main job: train and test, on 120 phantoms, in two views instead of eight (ARGS="optim.lr=1e-3 ...")
	$(BIN)/python train.py data.phantom.slices=120 data.views=2 $(ARGS)

# worksteal: the tests of a module mostly stay in one process, which makes their fixtures once.
test: $(READY) ## all tests, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "" $(ARGS)

test-fast: $(READY) ## the fast tests, two to five minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(READY) ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## build the documentation site into site/, strictly; runs the notebooks (CHESTCT_DOCS_RUN=0: does not)
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

hooks: $(READY) ## check style, types and imports before each commit
	$(BIN)/pre-commit install

params: $(READY) ## write conf/defaults.yaml and params.yaml anew from the schema
	$(BIN)/python -m chestct.config.compose

audit: $(READY) ## look for what is wrong with the data (ARGS="data=chest_ct data.root=...")
	$(BIN)/python -m chestct audit $(ARGS)

repro: $(READY) ## run the DVC pipeline as far as something changed
	PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro $(ARGS)

demo: $(READY) ## open the web page at http://127.0.0.1:7860 (ARGS="bundle=FOLDER serve.port=...")
	$(BIN)/python serve.py $(ARGS)

bundle: $(READY) ## make the packaged bundle and RESULTS.md's tables down to "What it says" again, from what `chestct data fetch` copied (DATA=FOLDER)
	$(BIN)/python train.py data=hospitals experiment=places 'data.sources.phantom={weight: 0.1}' \
		data.sources.chest_ct.root=$(DATA)/chest-ct data.sources.iq_oth.root=$(DATA)/iq-oth-nccd \
		data.sources.lidc.root=$(DATA)/lidc data.sources.lung_pet_ct_dx.root=$(DATA)/lung-pet-ct-dx \
		'evaluation.threshold="sensitivity>=0.9"' tracking=off hydra.run.dir=runs/bundle
	$(BIN)/python -m chestct export ckpt=runs/bundle/checkpoints/best.ckpt bundle=chestct/models/bundle \
		hydra.run.dir=runs/bundle/export 'evaluation.protocol=[loso,matrix,within,probe]' seeds=3 \
		evaluation.phantoms=100 evaluation.novelty=24 evaluation.robustness=40

ui: $(READY) ## open MLflow on the recorded runs, at http://127.0.0.1:5000 (ARGS="--port 5050")
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 $(ARGS)

bench: $(READY) ## time everything, fifteen minutes; writes docs/benchmarks.md (ARGS="--turns 1", "--data FOLDER --keras PYTHON")
	$(BIN)/python -m benchmarks --json docs/benchmarks.json --write docs/benchmarks.md $(ARGS)

bench-scale: $(READY) ## what slices cost in each step, of 1k to 10k (ARGS="--sizes 1000 10000 100000")
	$(BIN)/python -m benchmarks.scale $(ARGS)

bench-gpu: $(READY) ## what one NVIDIA GPU does: features and full fine-tuning at 224, and how busy it is
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean: ## remove caches (not runs, data or tracking)
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
