# Everything runs in the virtual environment .venv, which is created at first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo demo-recipe demo-protected study test lint format clients platforms clean

help:
	@echo "make demo    prepare, train and evaluate the embedded miniature (CPU, minutes)"
	@echo "make study   train and evaluate every arm of the study (GPU, or hours on a CPU)"
	@echo "             BASE_MODEL=... another base model, SEEDS=42,43 other training seeds"
	@echo "make test    run all tests (CPU; network only for the packages)"
	@echo "make lint    check format and style"
	@echo "make format  fix format and style"
	@echo "make clients    load our adapter files in other programs (installs them; COMFYUI=... its folder)"
	@echo "make platforms  can the requirements be installed on other systems?"
	@echo "make clean   delete .venv, .venv-clients and processed_data/"

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is Python " + sys.version.split()[0] + ", but 3.11 or newer is needed; choose another: make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/installed
	$(BIN)/python preprocess.py
	@$(MAKE) --no-print-directory -j2 demo-recipe demo-protected
	$(BIN)/python inference.py --demo --overwrite --lora-dir lora_weights/demo_runs --output-dir results/demo --steps 14
	@echo
	@echo "What each adapter learned, and what else it changed:"
	@echo "  $(CURDIR)/results/demo/comparison/report.html"

# Half the study's steps, here and in generation: the verdicts are the same (bench/LOG.md). Both at the same time, on one
# core each: more threads would wait for one another.
demo-recipe:
	OMP_NUM_THREADS=1 $(BIN)/python train.py --demo --max-steps 400
demo-protected:
	OMP_NUM_THREADS=1 $(BIN)/python train_experiment_protected.py --demo --max-steps 400

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

clients: .venv/installed
	$(BIN)/python bench/clients.py $(if $(COMFYUI),--comfyui "$(COMFYUI)")

platforms: .venv/installed
	$(BIN)/python bench/platforms.py

clean:
	rm -rf .venv .venv-clients processed_data
