# Two commands do everything on a fresh machine: `make repro` and `make test`. Each sets up what it needs, once.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

PYTHON ?= python3
CMD ?= dvc repro
UV := .tools/bin/uv
ENV := .venv/.installed
# Where it is set, each process compiles torch and all else anew: 8 seconds each time.
unexport PYTHONDONTWRITEBYTECODE
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONUNBUFFERED=1

.PHONY: help repro experiments test test-unit test-slow test-deps check check-style check-types check-workflows \
  check-security env lock stale pr-report sensitivity study soak image docker-repro sbom image-sbom image-proof engine-proof

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

repro: $(ENV)  ## run the pipeline of dvc.yaml on params.yaml
	@$(RUN) dvc repro
	if [ -n "$$(git status --porcelain -- dvc.lock metrics plots)" ]; then
	  echo
	  echo "Next: commit this run as the baseline that experiments are compared with, then run the first experiment:"
	  echo "  git add dvc.lock metrics plots && git commit -m 'Baseline of this machine'"
	  echo "  dvc exp run -S lr=3e-3     # in the environment: source .venv/bin/activate"
	fi

# What only-changed leaves of a wide table: the params that differ and the scores, within 80 columns.
EXPERIMENTS := dvc exp show --no-pager --only-changed --keep '(dev_)?ndcg_at_5' \
  --drop 'Created|Executor|bm25_ndcg_at_5|hybrid_ndcg_at_5|loss|verdict|recall_at_100|ndcg_at_10|trainable|[^:]*/|demo'

experiments: $(ENV)  ## table of experiments; ARGS=-A for those of all commits
	@$(RUN) $(EXPERIMENTS) $(ARGS)

# One process more than there are cores, since some tests wait, and at most four.
PYTEST = $(RUN) python -m pytest --dist loadfile --no-loadscope-reorder \
  -n $$($(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')

test: check  ## all checks, then unit and integration tests
	@$(PYTEST)

test-unit: $(ENV)  ## unit tests alone: no DVC, no training, no servers
	@$(PYTEST) -m unit $$(grep -L '^pytestmark = ' tests/test_*.py)  # the other files are marked as a whole: not imported

test-slow: $(ENV)  ## long tests and further variants; before a change is done
	@$(RUN) python -m pytest -m slow tests

# Chromium opens reports as a reader does; PostgreSQL stores studies whose workers are on several machines. The
# conditions are those of tests/browser.py and tests/postgres.py. Without the right to install, it succeeds with a
# message, since `make test` skips these tests and lists them; it fails where apt-get fails.
test-deps:  ## install the Debian packages that some tests use
	@missing=
	command -v chromium chromium-browser google-chrome >/dev/null || missing="chromium"
	[ -n "$$(compgen -G '/usr/lib/postgresql/*/bin/initdb')" ] || missing="$$missing postgresql"
	if [ -z "$$missing" ]; then exit 0; fi
	leave() { echo "make test-deps: cannot install $$(echo $$missing): $$1; tests that need them are skipped" >&2; exit 0; }
	command -v apt-get >/dev/null || leave "there is no apt-get here"
	sudo=; if [ "$$(id -u)" != 0 ]; then sudo="sudo -n"; fi
	$$sudo true 2>/dev/null || leave "you are not root, and sudo needs a password or is missing"
	$$sudo apt-get update -qq
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing

# mypy takes as long as all other checks.
ifneq ($(filter check test,$(MAKECMDGOALS)),)
MAKEFLAGS += --jobs=2
endif

check: check-style check-types check-workflows check-security  ## style, types, workflows, unsafe code, secrets

# .pre-commit-config.yaml runs these one by one.
check-style: $(ENV)
	@$(RUN) ruff check .
	$(RUN) ruff format --check .

check-types: $(ENV)
	@$(RUN) mypy

check-workflows: $(ENV)
	@$(RUN) check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN) check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml
	$(RUN) zizmor --quiet --offline --no-progress --persona=pedantic .github/workflows

check-security: $(ENV)
	@$(RUN) bandit --quiet --configfile pyproject.toml --recursive colintern stages bench cluster .github/scripts
	git ls-files -z $(SCANNED) | $(RUN) xargs -0 detect-secrets-hook --no-verify \
	  --exclude-lines '_revision: "?[0-9a-f]{40}\b' --exclude-secrets '^(PASSWORD|secret|s3cret|marked%40word)$$'

# Not those that are hashes from end to end.
SCANNED := -- ':!*.lock' ':!requirements*.txt' ':!docker/*.txt' ':!plots' ':!tests/curves' ':!tests/saved_*' ':!demo/base'

env: $(ENV)  ## create .venv from both locks, and nothing else

# The versions that a lock has are kept where pyproject.toml allows them. requirements-dev.txt has what the development
# tools, and the extras that tests run, need beyond requirements.txt, in versions that fit it; what requirements.txt
# holds for other systems than Linux is listed again.
COMPILE = $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --custom-compile-command "make lock" $(ARGS)
lock: $(UV)  ## write both locks; ARGS=--upgrade for newer versions
	@$(COMPILE) -o requirements.txt pyproject.toml
	$(COMPILE) -o requirements-dev.txt pyproject.toml --extra serve --extra stores --group dev \
	  --constraints requirements.txt \
	  $$(sed -nE "/== '(win32|emscripten)'/! s/^([a-zA-Z0-9._-]+)==.*/--no-emit-package \1/p" requirements.txt)

stale: $(ENV)  ## check that dvc.lock matches the files in git
	@$(RUN) python .github/scripts/stale.py

BASE ?= main
pr-report: export BASE := $(BASE)
pr-report: $(ENV)  ## changes of HEAD since BASE=main, as Markdown
	@$(RUN) python .github/scripts/pr_report.py "$$BASE"

sensitivity: $(ENV)  ## the demo at other lr, epochs, batch, rank (24 runs)
	@$(RUN) python -m bench.sensitivity $(ARGS)

study: repro  ## a study of 20 trials on the demo, by two workers
	@$(RUN) python -m bench.study $(ARGS)

soak: $(ENV)  ## kill the pipeline 100 times, compare the adapters
	@$(RUN) python -m bench.soak $(ARGS)

define FIND_ENGINE
for engine in docker podman ""; do
  if [ -z "$$engine" ] || "$$engine" info >/dev/null 2>&1; then break; fi
done
if [ -z "$$engine" ]; then
  echo "make $@: no running docker or podman here (\`docker info\` says why); docker/prove.sh runs the image in a chroot, docker/engine.sh with a docker made for it" >&2; exit 2
fi
endef

# IMAGE_ARGS: options of `build`.
image:  ## build the CUDA image; FLASH_ATTN=VERSION adds flash-attn
	@$(FIND_ENGINE)
	"$$engine" build --build-arg FLASH_ATTN=$(FLASH_ATTN) $(IMAGE_ARGS) -t colintern .
	"$$engine" run --rm -i --user 0 --entrypoint python colintern - <docker/size.py

docker-repro:  ## repro in the image; CMD="dvc exp run" for other commands
	@$(FIND_ENGINE)
	"$$engine" compose version >/dev/null 2>&1 || {
	  echo "make $@: $$engine has no compose here: install docker-compose-plugin, or podman-compose" >&2; exit 2; }
	export COLINTERN_USER="$$(id -u):$$(id -g)" PWD="$(CURDIR)" FLASH_ATTN="$(FLASH_ATTN)"
	export HF_HOME="$${HF_HOME:-$$HOME/.cache/huggingface}" DVC_SITE_CACHE_DIR="$${DVC_SITE_CACHE_DIR:-$$HOME/.cache/colintern-dvc}"
	mkdir -p "$$HF_HOME" "$$DVC_SITE_CACHE_DIR"
	if [ "$$engine" = podman ] && [ "$$(id -u)" != 0 ]; then export PODMAN_USERNS=keep-id; fi
	service=cpu; if nvidia-smi -L >/dev/null 2>&1; then service=gpu; fi
	tty=; [ -t 0 ] || tty=-T
	"$$engine" compose run --rm $$tty "$$service" $(CMD)

sbom: $(ENV)  ## sbom.json: the packages of .venv as CycloneDX 1.6
	@$(RUN) cyclonedx-py environment --output-reproducible --pyproject pyproject.toml -o sbom.json .venv/bin/python

image-sbom: $(ENV)  ## sbom-image.json: those of the image
	@$(FIND_ENGINE)
	"$$engine" run --rm --entrypoint sh colintern -c 'cd /opt/venv/lib/python3*/site-packages && tar -c *.dist-info' \
	  | $(RUN) docker/sbom.sh -o sbom-image.json

image-proof: $(ENV)  ## run the Dockerfile in a chroot (root, 45 GB, 20 minutes)
	@docker/prove.sh

engine-proof:  ## build and run it in docker (root, 40 GB, 30 minutes)
	@docker/engine.sh

$(UV):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "colintern needs Python 3.11 or newer, this is %d.%d" % v[:2])'
	echo "make: installing uv into .tools" >&2
	$(PYTHON) -m venv .tools
	.tools/bin/pip install -q --disable-pip-version-check --require-hashes -r docker/uv.txt

# The colintern command points into this folder (-e), so the code itself is never stale.
$(ENV): requirements.txt requirements-dev.txt $(wildcard pyproject.toml) | $(UV)
	@$(UV) venv -q --allow-existing --python $(PYTHON) .venv
	echo "make: installing $$(grep -h '==' requirements*.txt | wc -l) packages into .venv; this downloads several GB and takes minutes" >&2
	$(UV) pip install --python .venv/bin/python --require-hashes -r requirements.txt -r requirements-dev.txt
	$(UV) pip install -q --python .venv/bin/python --no-deps -e .
	touch $@
