# prunelab in a few commands; `make help` lists them.
# Needs GNU make and Python 3.11 or newer with pip.  Everything it installs goes into .uv and .venv, in this folder.

PYTHON ?= python3
OUT ?= out
# How many test files run side by side, each on one core.
JOBS ?= 2

VENV := .venv
UV := .uv/bin/uv
RUN := $(VENV)/bin/python
READY := $(VENV)/.prunelab-ready
BENCH := $(VENV)/.prunelab-bench
DOCS := $(VENV)/.prunelab-docs
BESIDE := --numprocesses $(JOBS) --dist loadfile

# Notebooks run on the kernel of .venv, whatever else is installed for this user.
export JUPYTER_PREFER_ENV_PATH := 1
export JUPYTER_PLATFORM_DIRS := 1
export UV_PYTHON_DOWNLOADS := never
# Like pip, trust the certificates of the system where it has some (a proxy of a company may need that).
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt),)
UV_SYSTEM_CERTS ?= 1
export UV_SYSTEM_CERTS
endif
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help setup tour test lab lint types unit notebooks test-browser test-matrix papermill zoo bench docs format lock clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## build the environment in .venv; tour, test and lab do it by themselves

tour: setup ## prune a trained ResNet-20 on real images: runs notebooks/00_tour.ipynb into out/
	@$(RUN) -m prunelab.course.notebook run notebooks/00_tour.ipynb --out $(OUT)

test: lint types unit notebooks ## run everything that CI runs
	@echo
	@echo "OK: lint, types, unit tests and notebooks have all passed."

lab: setup ## open the notebooks in JupyterLab
	@$(RUN) -m jupyterlab --notebook-dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

lint: setup ## check style and format (ruff), and that every import is declared (deptry)
	@echo "== lint"
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m deptry examples notebooks prunelab
	@$(RUN) -m deptry bench binder data docs sweeps tests --ignore DEP002,DEP004

types: setup ## check types (mypy)
	@echo "== types"
	@$(RUN) -m mypy

unit: setup ## run the tests and the examples in docstrings (pytest)
	@echo "== unit tests"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest $(BESIDE)

notebooks: setup ## run every notebook from top to bottom (pytest with nbval)
	@echo "== notebooks"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest $(BESIDE) --nbval-lax --nbval-current-env notebooks

test-browser: setup ## move every widget in JupyterLab, in a real browser; needs chromium; ONLY="-k 13_" for some
	@echo "== widgets in a browser"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses $(JOBS) --dist load tests/browser $(ONLY)

test-matrix: setup ## run the tests with the oldest and newest PyTorch, on Python 3.10 to 3.13; writes docs/matrix.md (hours)
	@$(RUN) -m tests.matrix --jobs $(JOBS)

papermill: setup ## run every notebook three times more: with other parameters, and with two other seeds
	@$(RUN) -m prunelab.course.notebook vary notebooks/*.ipynb --out $(OUT)/varied

zoo: $(BENCH) ## trace and cut every model of torchvision, and 44 of timm; writes bench/zoo.md (half an hour)
	@$(RUN) -m bench.zoo --out bench/zoo.md

bench: $(BENCH) ## measure it beside other libraries, into bench/peers.md; QUICK=1 is short, DATA=full uses all of CIFAR-10
	@$(RUN) -m bench.peers $(if $(QUICK),--quick) --data $(or $(DATA),mini)
	@$(if $(QUICK),,$(RUN) -m bench.peers --readme)

docs: $(DOCS) ## build the site from notebooks, pages and docstrings into out/site, and check its links
	@rm -rf $(OUT)/site $(OUT)/site-doctrees
	@$(RUN) -m sphinx --quiet --nitpicky --fail-on-warning --builder html \
		--doctree-dir $(OUT)/site-doctrees docs $(OUT)/site
	@$(RUN) docs/sitetools/links.py $(OUT)/site
	@if $(RUN) docs/sitetools/links.py --online $(OUT)/site; then \
		$(RUN) -m sphinx --quiet --builder linkcheck --doctree-dir $(OUT)/site-doctrees docs $(OUT)/site-links && \
		echo "links to other sites: all answer"; \
	else echo "links to other sites: not checked (no network)"; fi
	@echo "Ready: $(OUT)/site/index.html"

format: setup ## put code and notebooks into the house format (ruff)
	@$(RUN) -m ruff check --fix
	@$(RUN) -m ruff format

lock: $(UV) ## resolve requirements.lock again; UPGRADE=--upgrade takes the newest versions
	@$(UV) pip compile --universal --python-version 3.11 --no-emit-index-url --quiet $(UPGRADE) \
		--annotation-style line --custom-compile-command "make lock" \
		--extra notebooks --extra test pyproject.toml --output-file requirements.lock
	@$(UV) pip compile --universal --python-version 3.11 --no-emit-index-url --quiet $(UPGRADE) \
		--annotation-style line --custom-compile-command "make lock" --constraint requirements.lock \
		--extra bench pyproject.toml --output-file bench/requirements.lock
	@$(UV) pip compile --universal --python-version 3.11 --no-emit-index-url --quiet $(UPGRADE) \
		--annotation-style line --custom-compile-command "make lock" --constraint requirements.lock \
		--extra docs pyproject.toml --output-file docs/requirements.lock
	@echo "requirements.lock: $$(grep -c == requirements.lock) packages; run 'make test' with it before you commit it."

clean: ## remove what the commands wrote: caches and out/, but not .venv
	@sed -n "s,^/,docs/,p" docs/.gitignore | xargs rm -rf
	@rm -rf out dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -not -path './.uv/*' -prune -exec rm -rf {} +
	@find . -name .ipynb_checkpoints -not -path './.venv/*' -prune -exec rm -rf {} +

# uv comes into a folder of its own: this needs pip, but neither root, nor the venv module's ensurepip.
$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "prunelab's pinned environment needs Python 3.11 or newer, but '$(PYTHON)' is none."; \
		echo "Name another one, as in: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12"; \
		echo "(README.md shows how to install prunelab with plain pip, on Python 3.10 too.)"; exit 1; }
	@$(PYTHON) -m pip --version >/dev/null || { \
		echo "'$(PYTHON)' has no pip: install it (on Debian and Ubuntu: python3-pip) and try again."; exit 1; }
	@echo "[1/3] the installer, uv"
	@PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 \
		$(PYTHON) -m pip install --quiet --upgrade --target .uv uv

# The libraries that prunelab is measured beside; prunelab itself never imports them.
$(BENCH): bench/requirements.lock | setup
	@$(UV) pip install --quiet --python $(RUN) --requirement bench/requirements.lock
	@touch $@

# What builds the site.
$(DOCS): docs/requirements.lock | setup
	@$(UV) pip install --quiet --python $(RUN) --requirement docs/requirements.lock
	@touch $@

$(READY): requirements.lock pyproject.toml | $(UV)
	@echo "[2/3] the packages of requirements.lock; on Linux a download of about 3 GB, most of it PyTorch, once"
	@$(RUN) -c '' 2>/dev/null || \
		$(UV) venv --quiet --clear --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	@$(UV) pip install --python $(RUN) --requirement requirements.lock
	@echo "[3/3] prunelab itself, editable"
	@$(UV) pip install --quiet --python $(RUN) --no-deps --editable .
	@touch $@
	@echo "Ready: $(VENV)"
