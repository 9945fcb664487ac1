# Everything runs in a virtual environment of its own, .venv, made at first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo study test lint format clean

help:
	@echo "make demo    set up, then run the whole job on the embedded miniature model (CPU, minutes)"
	@echo "make study   set up, then train and evaluate every arm of the study (a GPU, or a CPU and hours);"
	@echo "             BASE_MODEL=... with that Stable Diffusion, SEEDS=42,43 with other training seeds"
	@echo "make test    set up, then run every test (CPU, no network beyond the packages)"
	@echo "make lint    check format and style"
	@echo "make format  mend format and style"
	@echo "make clean   remove the virtual environment and processed_data/"

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/installed
	$(BIN)/python preprocess.py
	$(BIN)/python train.py --demo
	$(BIN)/python train_experiment_protected.py --demo
	$(BIN)/python inference.py --demo --overwrite --lora-dir lora_weights/demo_runs --output-dir results/demo
	@echo
	@echo "Open this page to see what each adapter learned and what it spoiled:"
	@echo "  $(CURDIR)/results/demo/comparison/report.html"

study: .venv/installed
	test -f processed_data/captions.jsonl || $(BIN)/python preprocess.py
	$(BIN)/python study.py $(if $(BASE_MODEL),--base-model "$(BASE_MODEL)",--demo) $(if $(SEEDS),--seeds $(SEEDS))

test: .venv/installed-dev
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv processed_data
