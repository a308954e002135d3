# Two commands do everything on a fresh machine: `make repro` and `make test`. Each sets up what it needs, once.
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

.PHONY: repro experiments test slow check env lock stale pr-report sensitivity study soak image docker-repro sbom image-proof \
  engine-proof

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
  --drop 'Created|Executor|loss|verdict|recall_at_100|ndcg_at_10|trainable|[^:]*/|requirements|Dockerfile'

experiments: $(ENV)  ## all experiments: what they change and their scores; ARGS=-A for those of all commits
	@$(RUN) $(EXPERIMENTS) $(ARGS)

test: check  ## all tests, a process more than there are cores, since some wait, up to four
	@processes=$$($(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')
	$(RUN) python -m pytest -n $$processes --dist loadfile --no-loadscope-reorder

slow: $(ENV)  ## what pages name and what takes minutes, with sizes cut: measurements, make soak, make study
	@$(RUN) python -m pytest -m slow tests

check: $(ENV)  ## style, types, workflows, unsafe code, secrets
	@$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN) check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml
	$(RUN) zizmor --quiet --offline --no-progress --persona=pedantic .github/workflows
	$(RUN) bandit --quiet --configfile pyproject.toml --recursive colintern stages bench cluster .github/scripts
	git ls-files -z $(SCANNED) | $(RUN) xargs -0 detect-secrets-hook --no-verify \
	  --exclude-lines '_revision: "?[0-9a-f]{40}\b' --exclude-secrets '^(PASSWORD|secret|s3cret|marked%40word)$$'

# Not those that are hashes from end to end.
SCANNED := -- ':!*.lock' ':!requirements.txt' ':!docker/*.txt' ':!plots' ':!tests/curves' ':!demo/base'

env: $(ENV)  ## the environment in .venv alone

lock: $(UV)  ## renew requirements.txt from pyproject.toml
	@$(UV) pip compile -q --upgrade --universal --python-version 3.11 --extra dev --generate-hashes \
	  --no-emit-index-url --custom-compile-command "make lock" -o requirements.txt pyproject.toml

stale: $(ENV)  ## does dvc.lock say what the files in git say; needs no data
	@$(RUN) python .github/scripts/stale.py

BASE ?= main
pr-report: export BASE := $(BASE)
pr-report: $(ENV)  ## what HEAD changes against BASE=main, as Markdown: metrics, params, query by query, dvc.lock
	@$(RUN) python .github/scripts/pr_report.py "$$BASE"

sensitivity: $(ENV)  ## how the demo answers to lr, epochs, batch and rank, three seeds (24 runs)
	@$(RUN) python -m bench.sensitivity $(ARGS)

study: repro  ## a study of 20 trials, two workers: what matters, and are the guide's settings in its best quarter
	@$(RUN) python -m bench.study $(ARGS)

soak: $(ENV)  ## kill the pipeline at 100 random moments; the adapter must be that of an undisturbed run each time
	@$(RUN) python -m bench.soak $(ARGS)

define FIND_ENGINE
for engine in docker podman ""; do
  if [ -z "$$engine" ] || "$$engine" info >/dev/null 2>&1; then break; fi
done
if [ -z "$$engine" ]; then
  echo "make $@: no running docker or podman here (\`docker info\` says why); docker/prove.sh runs the image in a chroot, docker/engine.sh with a docker made for it" >&2; exit 2
fi
endef

image:  ## the CUDA image that runs the same pipeline; FLASH_ATTN=2.8.3.post2 compiles flash-attn in; IMAGE_ARGS for build
	@$(FIND_ENGINE)
	"$$engine" build --build-arg FLASH_ATTN=$(FLASH_ATTN) $(IMAGE_ARGS) -t colintern .
	"$$engine" run --rm -i --user 0 --entrypoint python colintern - <docker/size.py

docker-repro:  ## the same as repro in that image, on the GPU where there is one; CMD="dvc exp run" for another command
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

sbom: $(ENV)  ## sbom.json: every package of .venv as CycloneDX 1.6, validated against its schema
	@$(RUN) cyclonedx-py environment --output-reproducible --pyproject pyproject.toml -o sbom.json .venv/bin/python

image-proof:  ## run every line of the Dockerfile in a chroot (root, 45 GB, about 15 minutes)
	@docker/prove.sh

engine-proof:  ## run image and docker-repro as they are, with a docker made for it (root, 40 GB, about 30 minutes)
	@docker/engine.sh

$(UV):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "colintern needs Python 3.11 or newer, this is %d.%d" % v[:2])'
	echo "make: installing uv into .tools" >&2
	$(PYTHON) -m venv .tools
	.tools/bin/pip install -q --disable-pip-version-check --require-hashes -r docker/uv.txt

# The colintern command points into this folder (-e), so the code itself is never stale.
$(ENV): requirements.txt $(wildcard pyproject.toml) | $(UV)
	@$(UV) venv -q --allow-existing --python $(PYTHON) .venv
	echo "make: installing $$(grep -c '==' requirements.txt) packages into .venv; this downloads several GB and takes minutes" >&2
	$(UV) pip install --python .venv/bin/python --require-hashes -r requirements.txt
	$(UV) pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
	touch $@
