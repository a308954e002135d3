# The environment that runs `dvc repro` on a GPU machine: hash-locked packages in /opt/venv, git, a C++ compiler.
#   make image                              builds it as `colintern`; `make docker-repro` runs it, see docs/container.md
#   make image FLASH_ATTN=2.8.3.post2       the same with flash-attn compiled in (an hour or more)
# No project code is inside: the repository is mounted at its own path, so DVC sees the same paths as on the host.
# torch's wheels carry CUDA, cuDNN and NCCL, so a plain Python base is enough; the driver comes with `--gpus all`.
# `docker/prove.sh` proves every RUN line where there is neither an engine nor an image registry.

# The digest is that of the multi-platform index. 3.11 is the oldest Python the lock file is made for.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm@sha256:d29f48a31a8b408ed19272ca1e7b10ebae13b240a27e862d3d4217c528e2e0c3
# Empty for none, else a version that has a lock file docker/flash-attn-VERSION.txt.
ARG FLASH_ATTN=

FROM ${PYTHON_IMAGE} AS base
# g++: Triton compiles a C stub for each kernel, torch.compile (`compile: true`) C++ on a CPU, flash-attn its kernels.
# Debian keeps only the newest build of a package on its mirrors: a pinned version stops building within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*


# ---- dev: what .devcontainer/devcontainer.json opens; `make check` there installs the same lock into .venv.
FROM base AS dev
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash dev \
    && install -d -o dev -g dev /home/dev/.cache /home/dev/.cache/huggingface /var/tmp/dvc
USER 1000:1000


# ---- env: the locked environment. uv and its cache stay behind in this stage.
FROM base AS env
# Compiled here because the user who runs the image may not write into /opt/venv.
ENV UV_COMPILE_BYTECODE=1 \
    UV_CACHE_DIR=/var/cache/uv \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:/opt/uv/bin:$PATH
COPY docker/uv.txt requirements.txt /build/
RUN python -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --require-hashes -r /build/uv.txt
RUN --mount=type=cache,target=/var/cache/uv \
    uv venv /opt/venv \
    && uv pip install --require-hashes -r /build/requirements.txt


# ---- env-flash: the same with flash-attn, compiled by the nvcc that NVIDIA ships as wheels beside torch's own CUDA
# wheels: same CUDA version, same Python and C library as the image, all of it hash-locked.
FROM env AS env-flash
ARG FLASH_ATTN
# 80 A100, 90 H100 and H200, 100 B200, 120 RTX 50; cards of series 8.6 and 8.9 run the code for 80. Fewer compile faster.
ARG FLASH_ATTN_CUDA_ARCHS="80;90;100;120"
# What is left out, of ALIBI DROPOUT LOCAL SOFTCAP UNEVEN_K, none of which our model uses: half the time. A call that
# needs it is refused; other models that `colintern evaluate` runs may (head sizes other than multiples of 32: UNEVEN_K).
ARG FLASH_ATTN_WITHOUT=
# Compilers at a time, each of up to 9 GB; empty: half the cores, and no more than memory holds.
ARG MAX_JOBS=
COPY docker/flash-build.txt docker/flash-attn-${FLASH_ATTN}.txt /build/
# FORCE_BUILD: otherwise its setup.py downloads a prebuilt wheel that no hash covers. No cache: uv would hand out a wheel
# compiled against an older torch. The wheels have libcudart.so.13 only, the linker looks for libcudart.so.
RUN CUDA_HOME="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13" \
    && for part in $FLASH_ATTN_WITHOUT; do \
         case $part in ALIBI|DROPOUT|LOCAL|SOFTCAP|UNEVEN_K) CPPFLAGS="$CPPFLAGS -DFLASHATTENTION_DISABLE_$part" ;; \
           *) echo "FLASH_ATTN_WITHOUT: $part is none of ALIBI DROPOUT LOCAL SOFTCAP UNEVEN_K" >&2; exit 2 ;; \
         esac; \
       done \
    && export CUDA_HOME CPPFLAGS NVCC_APPEND_FLAGS="$CPPFLAGS" FLASH_ATTENTION_FORCE_BUILD=TRUE UV_NO_CACHE=1 \
    && uv pip install --require-hashes --no-deps -r /build/flash-build.txt \
    && ln -s libcudart.so.13 "$CUDA_HOME/lib/libcudart.so" \
    && uv pip install --require-hashes --no-deps --no-build-isolation -r "/build/flash-attn-${FLASH_ATTN}.txt" \
    && uv pip uninstall -r /build/flash-build.txt \
    && rm "$CUDA_HOME/lib/libcudart.so" \
    && python -c 'from flash_attn import flash_attn_func, flash_attn_varlen_func'


# Takes env or env-flash; a builder that prunes unused stages (BuildKit, buildah) never runs the other one.
# hadolint ignore=DL3006
FROM env${FLASH_ATTN:+-flash} AS env-chosen


# ---- the image
FROM base
# The last resort: DVC commits each experiment and fails without an identity. The repository's own user.name and the
# GIT_AUTHOR_* and GIT_COMMITTER_* variables go before it.
RUN git config --system user.name colintern \
    && git config --system user.email colintern@localhost
# Any uid may run the image (`--user "$(id -u):$(id -g)"`), so these two belong to everyone, like /tmp.
RUN install -d -m 1777 /home/colintern /cache /cache/huggingface /cache/dvc
COPY --from=env-chosen /opt/venv /opt/venv
COPY --chmod=755 docker/colintern docker/entrypoint /usr/local/bin/
# HOME and USER: a uid without a passwd entry has neither, and DVC and torch ask for them, under `docker exec` too.
# /cache is there to be mounted: what is downloaded, and the file hashes DVC keeps outside the repository.
# No PYTHONPATH and no installed package: `python -m stages.train` takes the library from the folder it is started in,
# and for a queued experiment that is DVC's copy, not the main checkout.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/colintern \
    USER=colintern \
    HF_HOME=/cache/huggingface \
    DVC_SITE_CACHE_DIR=/cache/dvc \
    PYTHONUNBUFFERED=1
USER 1000:1000
ENTRYPOINT ["/usr/local/bin/entrypoint"]
CMD ["dvc", "repro"]
