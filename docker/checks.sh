# shellcheck shell=bash disable=SC2154 # buildah, image, repo, stranger and work are prove.sh's
# What docker/prove.sh holds against the image it has built.

entry=$("${buildah[@]}" inspect --type image --format '{{index .OCIv1.Config.Entrypoint 0}}' localhost/colintern-proof)
history=$(git -c safe.directory="$repo" rev-parse --path-format=absolute --git-common-dir) # a worktree's lies elsewhere

# in_image FOLDER COMMAND...: as `docker run --user 12345:12345 -v repo:repo:ro -v demo:demo -w FOLDER` would. buildah
# leaves the entry point out, so it is named: the one that stands in the image.
in_image() { as_user "$stranger:$stranger" "$@"; }
as_user() {
    local user=$1 folder=$2
    shift 2
    "${buildah[@]}" run --isolation chroot --user "$user" --workingdir "$folder" \
        --volume "$repo:$repo:ro" --volume "$history:$history:ro" \
        --volume "$work/demo:$work/demo" --volume "$work/own:$work/own" "$image" -- "$entry" "$@"
}

# The pipeline in miniature, laid out as ours is: a library, a script in stages/, a parameter, a metric.
write_demo() {
    rm -rf "$work/demo" && mkdir -p "$work/demo/stages" "$work/demo/colintern"
    cd "$work/demo" || exit
    echo 'WEIGHT = 1' >colintern/__init__.py
    echo 'lr: 1' >params.yaml
    cat >stages/train.py <<-'PY'
		import json, pathlib
		import colintern
		lr = int(pathlib.Path("params.yaml").read_text().split(":")[1])
		pathlib.Path("metrics.json").write_text(json.dumps({"score": lr * colintern.WEIGHT}))
	PY
    cat >dvc.yaml <<-'YAML'
		stages:
		  train:
		    cmd: python -m stages.train
		    deps: [stages/train.py, colintern/__init__.py]
		    params: [lr]
		    metrics: [metrics.json: {cache: false}]
	YAML
    chown -R "$stranger:$stranger" "$work/demo"
    cd "$repo" || exit
}

# This repository's tracked files as they are here, as a repository of the stranger: its training is stopped there.
copy_own() {
    rm -rf "$work/own" && mkdir "$work/own"
    git -c safe.directory="$repo" ls-files -z | xargs -0 cp --parents -t "$work/own"
    chown -R "$stranger:$stranger" "$work/own"
    in_image "$work/own" sh -ec 'git init -q -b main && git add -A && git commit -qm start'
}

# expect NAME SCORE LR: the experiment or branch stands in DVC's table with these two figures.
expect() {
    in_image "$work/demo" dvc exp show -A --csv >"$work/table.csv"
    grep -Eq "^($1,|,$1,).*,$2,$3," "$work/table.csv" || die "no $1 with score,lr $2,$3 in $(cat "$work/table.csv")"
    echo "$1: score $2 at lr $3"
}

check_environment() {
    log "uid $stranger without passwd entry: imports"
    in_image / id
    in_image / python -c "
import os, getpass, pathlib, torch, transformers, peft, mteb, dvc
print('python', os.sys.version.split()[0], 'torch', torch.__version__, 'CUDA', torch.version.cuda,
      'transformers', transformers.__version__, 'peft', peft.__version__, 'dvc', dvc.__version__)
print('user', getpass.getuser(), 'home', pathlib.Path.home(), 'sum', torch.ones(3).cuda().sum().item()
      if torch.cuda.is_available() else torch.ones(3).sum().item())
for folder in (pathlib.Path.home(), os.environ['HF_HOME'], os.environ['DVC_SITE_CACHE_DIR']):
    probe = pathlib.Path(folder, 'probe'); probe.write_text('x'); probe.unlink()
"
    in_image / dvc --version
    if in_image / python -c 'import flash_attn' 2>/dev/null; then
        log "flash-attn, compiled in the image"
        in_image / python -c "
import flash_attn, flash_attn_2_cuda, pathlib
code = pathlib.Path(flash_attn_2_cuda.__file__)
without = [part for part in ('alibi', 'dropout', 'local', 'softcap', 'headdim not being a multiple')
           if f'build does not support {part}'.encode() in code.read_bytes()]
print('flash-attn', flash_attn.__version__, code.stat().st_size // 2**20, 'MiB, refuses:', ', '.join(without) or 'nothing')
"
    fi
    log "the mounted repository belongs to $(stat -c %U "$repo"): git status"
    in_image "$repo" git status --short --branch | head -3
    if [ -f colintern/__main__.py ]; then
        log "the mounted repository's own command"
        in_image "$repo" colintern --help | head -2
    fi
    log "torch.compile with the image's g++, and a C module as Triton builds them for a GPU"
    in_image /tmp python -c "
import torch
from triton.runtime.build import compile_module_from_src
print('compiled on a CPU:', torch.compile(lambda x: (x * 2 + 1).sin().sum())(torch.zeros(8)).item())
source = '''#include <Python.h>
static struct PyModuleDef probe = {PyModuleDef_HEAD_INIT, \"probe\", 0, -1, 0};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&probe); }'''
print('compiled for Triton:', compile_module_from_src(source, 'probe').__name__)
"
}

# What docker/entrypoint is there for; training is stopped in check_signals.
check_entry_point() {
    log "root in a repository of uid $stranger: refused; root in its own: not"
    local code=0
    as_user 0:0 "$work/own" touch refused 2>"$work/refused" || code=$?
    cat "$work/refused"
    { [ "$code" = 2 ] && grep -q 'run it with --user' "$work/refused" && [ ! -e "$work/own/refused" ]; } ||
        die "root was let into another's repository (exit code $code)"
    as_user 0:0 / true || die "root was refused where there is no repository"
    log "no home and no name given: a home that can be written, a name"
    in_image / env -u USER HOME=/nonexistent "$entry" python -c "
import getpass, os, pathlib
(pathlib.Path.home() / 'probe').touch()
print('user', getpass.getuser(), 'home', pathlib.Path.home())"
    log "another's repository is trusted, and no other one"
    in_image "$repo" git config --get-all safe.directory | sort -u >"$work/trusted"
    [ "$(cat "$work/trusted")" = "$repo" ] || die "git trusts $(cat "$work/trusted")"
    in_image / sh -c "HOME=/ git -C '$repo' status || true" 2>&1 | grep -m1 dubious || die "git trusts any repository"
    code=0
    in_image / sh -c 'exit 7' || code=$?
    [ "$code" = 7 ] || die "exit code 7 came back as $code"
}

# stop_at LINE CODE COMMAND: in the copy of this repository, with SIGTERM to the entry point once it prints LINE.
stop_at() {
    local line=$1 expected=$2 code=0 pid waited=0
    shift 2
    : >"$work/own.log"
    # In a session of its own, as an engine starts it: what it sends to all must not reach buildah.
    in_image "$work/own" setsid -w sh -c "echo \$\$ >pid; exec '$entry' $*" >"$work/own.log" 2>&1 &
    until grep -q "^$line" "$work/own.log"; do
        { kill -0 $! 2>/dev/null && [ $((waited += 1)) -lt 1200 ]; } || die "no line $line: $(tail -20 "$work/own.log")"
        sleep 1
    done
    pid=$(cat "$work/own/pid")
    kill -TERM "$pid"
    wait $! || code=$?
    grep -E "^($line|SIG|error|ERROR)" "$work/own.log" | tail -5
    { [ "$code" = "$expected" ] && grep -q 'the same command resumes from' "$work/own.log"; } ||
        die "$* ended with $code, not $expected"
    echo "$* ended with $code; kept: $(cd "$work/own/.scratch" && ls -d train-*/checkpoint-*)"
}

check_signals() {
    log "SIGTERM to the entry point of a real training, as docker stop sends it, and the same command again"
    stop_at 'step ' 255 dvc repro train # DVC's code for any stage that failed
    stop_at 'resuming from ' 75 python -m stages.train
}

check_parts() {
    log "SBOM of /opt/venv"
    in_image / sh -c 'cd /opt/venv/lib/python3*/site-packages && tar -c *.dist-info' |
        PATH="$repo/.venv/bin:$PATH" docker/sbom.sh -o "$work/sbom.json"
    in_image / python -c "
import json, sys
from importlib.metadata import distributions
bom = json.load(sys.stdin)
listed = {(part['name'], part['version']) for part in bom['components']}
missing = {(one.name, one.version) for one in distributions()} - listed
assert not missing and len(listed) > 100, missing
assert not {'cyclonedx-bom', 'mypy', 'pytest'} & dict(listed).keys(), 'development tools are in the image'
print(bom['bomFormat'], bom['specVersion'], 'valid:', len(listed), 'packages, torch', dict(listed)['torch'])
" <"$work/sbom.json"
    log "size"
    "${buildah[@]}" run --isolation chroot --user 0:0 "$image" -- python - <docker/size.py
}

check_experiments() {
    log "dvc in a repository of uid $stranger, no identity configured: repro, two experiments, one in a copy, one queued"
    in_image "$work/demo" sh -ec 'git init -q -b main && dvc init -q && git add -A && git commit -qm start && dvc repro -q
        git add -A && git commit -qm repro && dvc exp run -q -S lr=2 -n second && dvc exp run -q -S lr=3 -n third'
    expect main 1 1
    expect second 2 2
    expect third 3 3
    # Each copy must run the library it was queued with, whatever happens to the main checkout afterwards.
    in_image "$work/demo" sh -ec 'echo "WEIGHT = 10" >colintern/__init__.py && dvc exp run -q --temp -S lr=4 -n copied
        echo "WEIGHT = 100" >colintern/__init__.py && dvc exp run -q --queue -S lr=5 -n queued
        echo "WEIGHT = 7" >colintern/__init__.py && dvc exp run -q --run-all'
    expect copied 40 4
    expect queued 500 5
    in_image "$work/demo" git log -1 --format='committed as %an <%ae>'
}

# What the devcontainer opens.
check_dev_stage() {
    log "stage dev, which the devcontainer opens"
    "${buildah[@]}" bud --isolation chroot --build-arg PYTHON_IMAGE=localhost/stand-in-base --target dev \
        --tag localhost/colintern-dev "$repo" | tail -1
    local dev
    dev=$("${buildah[@]}" from localhost/colintern-dev)
    "${buildah[@]}" run --isolation chroot --volume "$repo:$repo:ro" --workingdir "$repo" "$dev" -- \
        sh -ec 'id; git --version; make --version | head -1; g++ --version | head -1; make -n check | head -3'
    "${buildah[@]}" rm "$dev" >/dev/null
}

check_all() {
    write_demo
    copy_own
    check_parts
    check_entry_point
    check_signals
    check_environment
    check_experiments
    check_dev_stage
}
