PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest
LAUNCH := $(BIN)/accelerate launch --config_file accelerate_configs/single.yaml

.PHONY: demo test test-gpu test-lowest stress quality engine-costs clean

demo: .venv/installed
	rm -rf runs/demo
	$(LAUNCH) -m lora_dist.train --config demo
	$(BIN)/python -m lora_dist.predict --adapter runs/demo/adapter --images demo:digits/validation --top_k 3 \
		--output runs/demo/predictions.jsonl --grid runs/demo/predictions.png
	@head -n 3 runs/demo/predictions.jsonl
	@echo "pictures of the predictions: runs/demo/predictions.png"
	@echo "curves: $(BIN)/tensorboard --logdir runs"

# A file of tests stays on one worker; a launch takes a core or two.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile

# The tests with the marker gpu, which see the GPUs.
test-gpu: .venv/installed-dev
	$(BIN)/python -m pytest -m gpu tests/gpu

stress: .venv/installed-dev
	(date -I; uname -sr; nproc --all) > tests/records/stress.txt
	STRESS=1 STRESS_RECORD=$(CURDIR)/tests/records/stress.txt $(BIN)/python -m pytest --timeout=7200 tests/launch/test_kills.py \
		tests/unit/model/test_malformed.py tests/unit/training/saving | tail -n 1 >> tests/records/stress.txt

# With the lowest releases that pyproject.toml allows, in an environment of its own: some gigabytes to download.
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tests/helpers/lora_dist_testing/lowest.py > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/pip install -q -r $(LOWEST)/requirements.txt -e .
	(date -I; $(LOWEST)/bin/python -V; cat $(LOWEST)/requirements.txt) > tests/records/lowest.txt
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile tests/unit \
		> $(LOWEST)/pytest.log; \
		code=$$?; tail -n 1 $(LOWEST)/pytest.log | tee -a tests/records/lowest.txt; exit $$code

# Needs Linux and root, for a loopback interface of its own.
engine-costs: .venv/installed-dev
	rm -f tests/benchmarks/results/engine_costs.csv
	for model in vit_b vit_l; do for engine in ddp zero1 zero2 zero3 fsdp2; do \
		OMP_NUM_THREADS=1 unshare -n sh -c "ip link set lo up; $(BIN)/accelerate launch --main_process_port 0 \
			--config_file accelerate_configs/$${engine}_cpu.yaml tests/benchmarks/engine_costs.py $$model" || exit 1; \
	done; done

quality: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf runs/demo .pytest_cache .mypy_cache .ruff_cache

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch torchvision
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	touch $@

# deepspeed builds against the torch that is there, so it comes after it.
.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,dev,deepspeed,heif,onnx,serve,sweep,timm,wandb]'
	touch $@
