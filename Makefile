# Everything a newcomer needs; `make` alone lists it.
PYTHON ?= python3
PORT   ?= 3000
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo serve screenshots test bench soak fuzz lint model figures lock container container-test secrets dashboards clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(READY)  ## create .venv with the locked dependencies

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0])'
	@echo "Installing the locked dependencies into $(VENV): PyTorch with CUDA, several GB, a minute or more ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: $(READY)  ## serve the bundled model, explain sample pictures over HTTP, write out/
	$(BIN)/python -m scenes.demo --out out

serve: $(READY)  ## serve the bundled model on PORT (3000)
	@echo "The page: http://127.0.0.1:$(PORT)/"
	@echo "Try: curl -s -H 'Accept: image/png' -F image=@out/scene_9.png http://127.0.0.1:$(PORT)/explain -o map.png"
	$(BIN)/parchgrad serve --port $(PORT)

screenshots: $(READY)  ## pictures of the page's views at three widths, in light and dark, written to out/screenshots; needs chromium
	$(BIN)/python -m tests.page.screenshots --out out/screenshots

test: $(READY) lint  ## lint, type-check and run the whole test suite, in two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(READY)  ## ParchGrad beside every peer: time and memory of a map, written to out/
	mkdir -p out
	$(BIN)/python -m benchmarks.peers --curves --json out/bench.json --markdown out/bench.md --chart out/bench.svg

soak: $(READY)  ## 20,000 mixed requests against a served model, memory and descriptors watched
	$(BIN)/python -m benchmarks.soak --requests 20000

fuzz: $(READY)  ## fuzz what reads callers' bytes, SECONDS_EACH (300) a target
	$(BIN)/python -m fuzz all --seconds $(or $(SECONDS_EACH),300)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

model: $(READY)  ## train the bundled model again and build its selection table
	$(BIN)/python -m scenes.train
	$(BIN)/python -m scenes.table
	$(BIN)/python -m scenes.samples

figures: $(READY)  ## print the figures of docs/figures.md
	$(BIN)/python -m scenes.evaluate

container: $(READY)  ## build the image parchgrad:cpu, with Docker or podman (docs/container.md)
	$(BIN)/python deploy/container/build.py cpu

container-test: $(READY)  ## build it without a registry, run it without rights, ask it, stop it; needs root and podman
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/deploy/test_container.py tests/deploy/test_compose.py tests/deploy/test_requirements.py

secrets: secrets/parchgrad_keys secrets/grafana_password  ## a key for callers and Grafana's password, for deploy/compose.yaml

# Containers read them as users of their own: the folder is closed, the files are not. The keys' file holds digests only.
secrets/parchgrad_keys: | $(READY)
	mkdir -p -m 700 secrets
	(umask 077; $(BIN)/parchgrad key new me > secrets/token 2> secrets/said)
	tail -n 1 secrets/said > $@
	rm secrets/said
	chmod 644 $@
	@echo "The caller's token is in secrets/token."

secrets/grafana_password: | $(READY)
	mkdir -p -m 700 secrets
	$(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(24))' > $@
	chmod 644 $@
	@echo "Grafana's password, of its user 'admin', is in $@."

dashboards: $(READY)  ## write deploy/grafana/dashboards from their source, and Kubernetes' copy of the rules
	$(BIN)/python -m deploy.grafana
	$(BIN)/python -m deploy.kubernetes.prometheus_rule

clean:  ## remove what the other targets made
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache

lock:  ## write requirements.lock from what .venv holds
	{ sed '/^[^#]/,$$d' requirements.lock; $(BIN)/python -m pip freeze --exclude-editable --exclude parchgrad \
	    | sed 's/^atheris==.*/&; sys_platform == "linux" and platform_machine == "x86_64" and python_version < "3.12"/'; \
	  $(BIN)/python -m pip freeze --all | grep -E '^(setuptools|wheel)=='; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
