"""The guide's debugging checklist as checks: each returns pass, warn or fail with the remedy.

`fail` means that this run cannot do what params.yaml says; training stops before it loads a model. `warn` means that
it can, but that by the guide or by a measurement it does poorly. The bounds depend on the size of the base: the guide's
numbers are for InternVL3.5-1B, those for the demo were measured (README, sensitivity). No check of the environment
stops training.
"""

import logging
from collections.abc import Callable, Mapping
from textwrap import fill
from typing import NamedTuple, TypeVar

from huggingface_hub import constants
from transformers import InternVLConfig

from colintern.core.errors import UserError
from colintern.core.rules import parse_mixture
from colintern.modeling.kernels import get_kernel_repo, require_downloaded
from colintern.modeling.lora import FLOAT32, LoraReport, find_lora_errors, find_lora_warnings, report_lora_on_meta
from colintern.modeling.retriever import build_meta_model
from colintern.monitoring.guide import DEMO, RecommendedBounds, get_recommended_bounds
from colintern.params import Params, describe_demo_base
from colintern.preflight.environment import Environment, Machine, probe_machine
from colintern.storage.hub import OfflineError, Repo
from colintern.training.checkpoints import required_disk_bytes

logger = logging.getLogger(__name__)

PASS, WARN, FAIL = "pass", "warn", "fail"
GB = 1e9
MIN_FREE_BYTES = 2 * 2**30  # left free by the feature cache
MIN_DRIVERS = {"12": "525.60.13", "13": "580.65.06"}  # of a CUDA series, on Linux: NVIDIA, CUDA release notes
GUIDE_GPU_BYTES = 16 * 2**30  # the guide's smallest GPU


class RunFacts(NamedTuple):
    """What a run is checked by; `counts` are modules and parameters, see `lora.report_lora`."""

    params: Params
    counts: LoraReport
    machine: Machine

    @property
    def bounds(self) -> RecommendedBounds:
        """Return the recommended settings for this size of the base."""
        return get_recommended_bounds(self.counts.total_parameters)

    @property
    def is_demo(self) -> bool:
        """Return whether the base has the demo's size."""
        return self.bounds.name == DEMO


class CheckResult(NamedTuple):
    """`status` is pass, warn or fail; `remedy` says exactly what to do, "" where nothing is to be done."""

    name: str
    status: str
    found: str
    remedy: str = ""


Status = tuple[str, str] | tuple[str, str, str]  # status, found, remedy
Facts = TypeVar("Facts")


def _check_epochs(facts: RunFacts) -> Status:
    have, want = facts.params.epochs, facts.bounds.epochs
    if have >= want:
        return PASS, f"{have}, at least {want} for this size ({facts.bounds.name})"
    return WARN, f"{have}, below {want} (the guide: 5; not measured here at this size)", f"epochs: {want}"


def _check_batch_size(facts: RunFacts) -> Status:
    have, want = facts.params.batch_size, facts.bounds.batch
    if have >= want:
        return PASS, f"{have}: each query against {have} pages, whatever micro_batch_size is"
    seen = "at 8 the demo collapses" if facts.is_demo else "the guide: 64, but its 16 x 4 compares with 16"
    return WARN, f"{have}, below {want} ({seen})", f"batch_size: {want}; micro_batch_size bounds the memory"


def _check_learning_rate(facts: RunFacts) -> Status:
    (low, high), have = facts.bounds.lr, facts.params.lr
    seen = f"{low:g} to {high:g} for {facts.bounds.name}: {facts.bounds.lr_source}"
    if low <= have <= high:
        return PASS, f"{have:g}, within {seen}"
    return WARN, f"{have:g}, not within {seen}", f"lr: a number from {low:g} to {high:g}"


def _check_lora(facts: RunFacts) -> Status:
    modules, trained = facts.counts.lora_modules, facts.counts.trainable_parameters
    if not trained:
        return FAIL, "no module gets LoRA, nothing is trained", "lora_targets: take those of `colintern recipe`"
    return PASS, f"rank {facts.params.lora_rank} on {modules} modules, {trained:,} parameters"


def _check_lora_targets(facts: RunFacts) -> Status:
    counts = facts.counts
    if errors := find_lora_errors(counts):
        return FAIL, errors[0].removeprefix("lora_targets: "), "colintern verify names every fault"
    num_targets = 7 * counts.layers + 1
    if counts.lora_modules != num_targets:
        [note] = find_lora_warnings(counts)[:1] or ["some projections are left out"]
        return WARN, f"{counts.lora_modules} modules of {num_targets}: {note}", "colintern verify shows each pattern"
    return PASS, f"{num_targets} modules: 7 in each of {counts.layers} layers, and the head"


def _check_head(facts: RunFacts) -> Status:
    if not facts.counts.head:
        return FAIL, "custom_text_proj is not adapted: its random projection stays", "add custom_text_proj to it"
    return PASS, "custom_text_proj, {} -> {}".format(*facts.counts.head)


def _check_vision_frozen(facts: RunFacts) -> Status:
    if num_adapted := facts.counts.adapted_vision_modules:
        return (
            FAIL,
            f"{num_adapted} modules of tower or projector get LoRA",
            r"begin lora_targets with language_model\.",
        )
    tower, projector = facts.counts.frozen_vision_modules, facts.counts.frozen_projector_modules
    return PASS, f"{tower} modules of the tower and {projector} of the projector stay as they are"


def _check_bf16(facts: RunFacts) -> Status:
    device = facts.machine.gpu or "the CPU"
    if facts.params.dtype == "float32":
        if facts.is_demo:
            return PASS, "float32, which a base of this size is trained in; the guide's bf16 is for 1B"
        return WARN, "float32 takes twice the memory of the guide's bfloat16", "dtype: bfloat16"
    if facts.machine.has_bf16:
        return PASS, f"bfloat16, which {device} computes in"
    return WARN, f"bfloat16 is emulated by {device}: right, but slow", "a GPU of compute capability 8.0 or newer"


def _check_attention(facts: RunFacts) -> Status:
    attention, machine = facts.params.attention, facts.machine
    if repo := get_kernel_repo(attention):
        return _check_hub_kernel(repo, facts)
    is_usable = bool(machine.gpu and machine.has_flash_attn and facts.params.dtype == "bfloat16")
    if attention == "flash_attention_2" and not is_usable:
        lacks = "a GPU" if not machine.gpu else "flash-attn" if not machine.has_flash_attn else "dtype: bfloat16"
        remedy = "attention: auto" + ("; or make image FLASH_ATTN=2.8.3.post2" if lacks == "flash-attn" else "")
        return FAIL, f"flash_attention_2 needs {lacks}", remedy
    if is_usable and attention in ("auto", "flash_attention_2"):
        return PASS, "flash_attention_2"
    kernel = attention if attention != "auto" else "sdpa"
    if machine.gpu and not facts.is_demo:
        return WARN, f"{kernel}; the guide: flash attention", "make image FLASH_ATTN=2.8.3.post2, attention: auto"
    return PASS, f"{kernel}; flash attention is for GPUs and bfloat16"


def _check_hub_kernel(repo: Repo, facts: RunFacts) -> Status:
    try:
        require_downloaded(repo)
    except OfflineError as error:
        return WARN, error.reason, "dvc repro fetch-data"
    if facts.machine.gpu and facts.params.dtype == "float32":
        return FAIL, f"{repo.name} needs dtype: bfloat16", "dtype: bfloat16"
    return PASS, f"{repo.name}, at {repo.revision}"


def _check_disk(facts: RunFacts) -> Status:
    trained, have = facts.counts.trainable_parameters, facts.machine.disk_bytes
    required = required_disk_bytes(trained)
    features = max(0.0, facts.params.feature_cache_gb * GB - facts.machine.features_bytes)
    free = f"{have / GB:.1f} GB free"
    if have < required:
        return FAIL, f"{free}; checkpoints and adapter need {required / GB:.1f} GB", "free space on this disk"
    if have < required + features + MIN_FREE_BYTES:
        fits = max(0.0, have - required - MIN_FREE_BYTES + facts.machine.features_bytes) / GB
        found = f"{free}; not for all of feature_cache_gb {facts.params.feature_cache_gb:g}: more pages are recomputed"
        return WARN, found, f"free space on this disk, or feature_cache_gb: {fits:.0f}"
    return PASS, f"{free}; at most {(required + features) / GB:.1f} GB needed for checkpoints and page features"


def _check_memory(facts: RunFacts) -> Status:
    width = 2 if facts.params.dtype == "bfloat16" else FLOAT32
    weights = width * facts.counts.total_parameters
    least = weights + 4 * FLOAT32 * facts.counts.trainable_parameters  # weights, gradients, two moments
    machine = facts.machine
    where, have = (machine.gpu, machine.gpu_bytes) if machine.gpu else ("main memory", machine.memory_bytes)
    found = f"{have / GB:.1f} GB of {where}; weights and optimizer {least / GB:.2g} GB, activations not counted"
    if have < least:
        return FAIL, found, "a smaller base, or more memory"
    if machine.gpu and machine.memory_bytes < weights:
        found = f"{machine.memory_bytes / GB:.1f} GB of main memory; weights of {weights / GB:.1f} GB"
        return FAIL, found, "more memory"
    if machine.gpu and have < GUIDE_GPU_BYTES * 0.95 and not facts.is_demo:
        return WARN, f"{found}; the guide: 16 GB at least", "colintern recommend --write, which computes what fits"
    return PASS, found


def _check_driver(facts: RunFacts) -> Status:
    machine = facts.machine
    built = f"torch {machine.torch} for " + (f"CUDA {machine.torch_cuda}" if machine.torch_cuda else "the CPU")
    if machine.gpu:
        return PASS, f"driver {machine.driver or 'unknown'}, {built}, {machine.gpu}"
    if facts.is_demo:
        return PASS, f"{built}; the demo trains on the CPU"
    if not machine.num_cards:
        return WARN, f"no NVIDIA GPU, {built}; a step of 1B on a CPU takes minutes", "train on a machine with a GPU"
    if machine.is_gpu_hidden:
        return FAIL, "CUDA_VISIBLE_DEVICES hides the GPU from torch", "unset CUDA_VISIBLE_DEVICES"
    if not machine.torch_cuda:
        return FAIL, f"a GPU, but {built}", "make image, or install torch from requirements.txt"
    least = MIN_DRIVERS.get(machine.torch_cuda.partition(".")[0], "the newest")
    found = f"a GPU that torch cannot use: driver {machine.driver or 'missing'}, {built}"
    return FAIL, found, f"install driver {least} or newer"


def _check_git(environment: Environment) -> Status:
    if environment.git_error:
        remedy = "git clone the repository: DVC works in a git repository only"
        if "dubious ownership" in environment.git_error:
            remedy = 'git config --global --add safe.directory "$PWD"'
        return FAIL, environment.git_error, remedy
    if environment.num_changed:
        found = f"{environment.commit} and {environment.num_changed} changed files: no commit names this state"
        return WARN, found, "git commit -a"
    if not environment.has_committer:
        remedy = 'git config user.name "Your Name" && git config user.email you@example.com'
        return WARN, f"{environment.commit}, but no committer: dvc exp run on edited files fails", remedy
    return PASS, f"commit {environment.commit}, nothing changed"


def _check_project_path(environment: Environment) -> Status:
    if environment.unsupported_characters:
        remedy = "move the repository to a path of ASCII characters without # and ?"
        characters = environment.unsupported_characters
        return WARN, f"has {characters!r}: DVC fails at --temp, --queue and colintern tune", remedy
    return PASS, "DVC can copy the project for --temp, --queue and colintern tune"


def _check_dvc_remote(environment: Environment) -> Status:
    if environment.default_remote:
        return PASS, f"{environment.default_remote}"
    if remotes := environment.remotes:
        return WARN, f"{', '.join(remotes)}, none the default", f"dvc remote default {remotes[0]}"
    if environment.is_demo:
        return PASS, "none; the demo can be made again anywhere"
    return WARN, "none: nobody else can fetch the adapter", "dvc remote add --default NAME URL"


def _check_hub_access(environment: Environment) -> Status:
    token = "a token is set" if environment.has_token else "no token"
    if not environment.repos:
        return PASS, "nothing of this run comes from the hub"
    names = environment.incomplete_repos
    if not names:
        return PASS, f"all files of {len(environment.repos)} repositories are in the cache"
    if environment.hub_error:
        return FAIL, f"the cache lacks files of {', '.join(names)}; {token}", environment.hub_error
    return PASS, f"{constants.ENDPOINT} will give what the cache lacks ({len(names)} repositories); {token}"


def _check_wandb(environment: Environment) -> Status:
    if environment.wandb_variables and not environment.uses_wandb:
        found = f"{', '.join(environment.wandb_variables)} set, but training sends nothing to W&B"
        return WARN, found, "tracker: wandb; or look at the curves in plots/: dvc plots show"
    if environment.uses_wandb:
        return PASS, "tracker: wandb; where W&B cannot be reached the run is kept in wandb/"
    return PASS, "not used: curves are in plots/, figures in metrics/, both in git"


def _check_base(facts: RunFacts) -> Status:
    # Not of benchmarks, which are no params of training.
    if note := describe_demo_base(facts.params.base, [name for name, _ in parse_mixture(facts.params.train_data)]):
        return WARN, note.removeprefix("note: "), "colintern recipe internvl3_5-1b"
    return PASS, facts.params.base


RUN_CHECKS: dict[str, Callable[[RunFacts], Status]] = {
    "base": _check_base,
    "epochs": _check_epochs,
    "effective batch": _check_batch_size,
    "learning rate": _check_learning_rate,
    "LoRA on": _check_lora,
    "target modules": _check_lora_targets,
    "head included": _check_head,
    "vision frozen": _check_vision_frozen,
    "bf16": _check_bf16,
    "attention kernel": _check_attention,
    "disk": _check_disk,
    "memory": _check_memory,
    "driver and CUDA": _check_driver,
}
ENVIRONMENT_CHECKS: dict[str, Callable[[Environment], Status]] = {
    "git": _check_git,
    "path": _check_project_path,
    "DVC remote": _check_dvc_remote,
    "hub access": _check_hub_access,
    "W&B": _check_wandb,
}


def collect_run_facts(params: Params, config: InternVLConfig | str, revision: str | None) -> RunFacts:
    """Count the modules of the base, given by its config, folder or hub id and commit, and probe this machine."""
    return RunFacts(params, report_lora_on_meta(build_meta_model(config, revision), params), probe_machine())


def run_checks(facts: Facts, checks: Mapping[str, Callable[[Facts], Status]]) -> list[CheckResult]:
    """Run all checks, in order."""
    return [CheckResult(name, *check(facts)) for name, check in checks.items()]


def run_preflight(params: Params, base: str) -> None:
    """Run the checks that training depends on, before it loads `base`; prints the warnings.

    Raises:
        UserError: A check fails; each one is named with its remedy.
    """
    results = run_checks(collect_run_facts(params, base, params.base_revision or None), RUN_CHECKS)
    for result in results:
        if result.status == WARN:
            text = f"warning: {result.name}: {result.found} -> {result.remedy}"
            logger.warning(fill(text, 80, subsequent_indent="  ").removeprefix("warning: "))
    if failures := [f"{r.name}: {r.found} -> {r.remedy}" for r in results if r.status == FAIL]:
        raise UserError("this run cannot do what params.yaml says\n  " + "\n  ".join(failures))
