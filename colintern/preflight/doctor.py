"""The guide's debugging checklist as rules: each looks at facts and says pass, warn or fail, and what to do.

`fail` means that this run cannot do what params.yaml says; training stops before it loads a model. `warn` means that it
can, and that the guide or a measurement of ours says what comes of it. What holds depends on the size of the base: the
guide's numbers are for InternVL3.5-1B, those for the demo were measured (README, sensitivity).
"""

from collections.abc import Callable
from textwrap import fill
from typing import Any, NamedTuple

from colintern.core.errors import UserError
from colintern.core.rules import split_kernel
from colintern.modeling.attention import lacking
from colintern.modeling.lora import FLOAT32, examine, faults, notes
from colintern.modeling.modeling_colintern import meta_model
from colintern.monitoring.guide import DEMO, RecommendedBounds, get_recommended_bounds
from colintern.params import Params
from colintern.preflight.machine import Machine, machine
from colintern.training.checkpoints import required_disk_bytes

PASS, WARN, FAIL = "pass", "warn", "fail"
GB = 1e9
RESERVE = 2 * 2**30  # left free by the feature cache
DRIVERS = {"12": "525.60.13", "13": "580.65.06"}  # oldest Linux driver of a CUDA series: NVIDIA, CUDA release notes
GUIDE_GPU = 16 * 2**30  # the guide's least GPU


class Facts(NamedTuple):
    """`counts`: see `lora.count`."""

    params: Params
    counts: dict[str, Any]
    machine: Machine

    @property
    def bounds(self) -> RecommendedBounds:
        return get_recommended_bounds(self.counts["total_parameters"])

    @property
    def demo(self) -> bool:
        return self.bounds.name == DEMO


class Finding(NamedTuple):
    """`status` is pass, warn or fail; `remedy` says exactly what to do, "" where there is nothing to."""

    name: str
    status: str
    found: str
    remedy: str = ""


Answer = tuple[str, str] | tuple[str, str, str]  # status, found, remedy


def epochs(facts: Facts) -> Answer:
    have, want = facts.params.epochs, facts.bounds.epochs
    if have >= want:
        return PASS, f"{have}, at least {want} for this size ({facts.bounds.name})"
    return WARN, f"{have}, below {want} (the guide: 5; not measured here at this size)", f"epochs: {want}"


def batch(facts: Facts) -> Answer:
    have, want = facts.params.batch_size, facts.bounds.batch
    if have >= want:
        return PASS, f"{have}: each query against {have} pages, whatever micro_batch_size is"
    seen = "at 8 the demo collapses" if facts.demo else "the guide: 64, but its 16 x 4 compares with 16"
    return WARN, f"{have}, below {want} ({seen})", f"batch_size: {want}; micro_batch_size bounds the memory"


def learning_rate(facts: Facts) -> Answer:
    (low, high), have = facts.bounds.lr, facts.params.lr
    seen = f"{low:g} to {high:g} for {facts.bounds.name}: {facts.bounds.lr_source}"
    if low <= have <= high:
        return PASS, f"{have:g}, within {seen}"
    return WARN, f"{have:g}, not within {seen}", f"lr: a number from {low:g} to {high:g}"


def lora_on(facts: Facts) -> Answer:
    modules, trained = facts.counts["lora_modules"], facts.counts["trainable_parameters"]
    if not trained:
        return FAIL, "no module gets LoRA, nothing is trained", "lora_targets: take those of `colintern recipe`"
    return PASS, f"rank {facts.params.lora_rank} on {modules} modules, {trained:,} parameters"


def targets(facts: Facts) -> Answer:
    counts = facts.counts
    if wrong := faults(counts):
        return FAIL, wrong[0].removeprefix("lora_targets: "), "colintern verify names every fault"
    whole = 7 * counts["layers"] + 1
    if counts["lora_modules"] != whole:
        said = notes(counts)[:1] or ["some projections are left out"]
        return WARN, f"{counts['lora_modules']} modules of {whole}: {said[0]}", "colintern verify shows each pattern"
    return PASS, f"{whole} modules: 7 in each of {counts['layers']} layers, and the head"


def head(facts: Facts) -> Answer:
    if not facts.counts["head"]:
        return FAIL, "custom_text_proj is not adapted: its random projection stays", "add custom_text_proj to it"
    return PASS, "custom_text_proj, {} -> {}".format(*facts.counts["head"])


def vision(facts: Facts) -> Answer:
    hit = facts.counts["adapted_vision_modules"]
    if hit:
        return FAIL, f"{hit} modules of tower or projector get LoRA", r"begin lora_targets with language_model\."
    tower, projector = facts.counts["frozen_vision_modules"], facts.counts["frozen_projector_modules"]
    return PASS, f"{tower} modules of the tower and {projector} of the projector stay as they are"


def bf16(facts: Facts) -> Answer:
    device = facts.machine.gpu or "the CPU"
    if facts.params.dtype == "float32":
        if facts.demo:
            return PASS, "float32, which a base of this size is trained in; the guide's bf16 is for 1B"
        return WARN, "float32 takes twice the memory of the guide's bfloat16", "dtype: bfloat16"
    if facts.machine.bf16:
        return PASS, f"bfloat16, which {device} computes in"
    return WARN, f"bfloat16 is emulated by {device}: right, but slow", "a GPU of compute capability 8.0 or newer"


def attention(facts: Facts) -> Answer:
    asked, on = facts.params.attention, facts.machine
    if split_kernel(asked):
        return hub_kernel(facts)
    usable = bool(on.gpu and on.flash_attn and facts.params.dtype == "bfloat16")
    if asked == "flash_attention_2" and not usable:
        lacks = "a GPU" if not on.gpu else "flash-attn" if not on.flash_attn else "dtype: bfloat16"
        remedy = "attention: auto" + ("; or make image FLASH_ATTN=2.8.3.post2" if lacks == "flash-attn" else "")
        return FAIL, f"flash_attention_2 needs {lacks}", remedy
    if usable and asked in ("auto", "flash_attention_2"):
        return PASS, "flash_attention_2"
    kernel = asked if asked != "auto" else "sdpa"
    if on.gpu and not facts.demo:
        return WARN, f"{kernel}; the guide: flash attention", "make image FLASH_ATTN=2.8.3.post2, attention: auto"
    return PASS, f"{kernel}; flash attention is for GPUs and bfloat16"


def hub_kernel(facts: Facts) -> Answer:
    asked = facts.params.attention
    try:
        lacks = lacking(asked, facts.params.dtype)
    except UserError as error:
        return WARN, str(error).removeprefix("attention: "), "dvc repro fetch-data"
    if lacks:
        return FAIL, f"{asked} {lacks}", "dtype: bfloat16" if "dtype" in lacks else "attention: auto"
    return PASS, f"{asked}, every file by its hash"


def disk(facts: Facts) -> Answer:
    trained, have = facts.counts["trainable_parameters"], facts.machine.disk_bytes
    must = required_disk_bytes(trained)
    features = max(0.0, facts.params.feature_cache_gb * GB - facts.machine.features_bytes)
    free = f"{have / GB:.1f} GB free"
    if have < must:
        return FAIL, f"{free}; checkpoints and adapter need {must / GB:.1f} GB", "make room on this disk"
    if have < must + features + RESERVE:
        fits = max(0.0, have - must - RESERVE + facts.machine.features_bytes) / GB
        return (
            WARN,
            f"{free}; not for all of feature_cache_gb {facts.params.feature_cache_gb:g}: more pages are computed anew",
            f"make room on this disk, or feature_cache_gb: {fits:.0f}",
        )
    return PASS, f"{free}; at most {(must + features) / GB:.1f} GB needed for checkpoints and page features"


def memory(facts: Facts) -> Answer:
    width = 2 if facts.params.dtype == "bfloat16" else FLOAT32
    weights = width * facts.counts["total_parameters"]
    least = weights + 4 * FLOAT32 * facts.counts["trainable_parameters"]  # weights, gradients, two moments
    on = facts.machine
    where, have = (on.gpu, on.gpu_bytes) if on.gpu else ("main memory", on.memory_bytes)
    said = f"{have / GB:.1f} GB of {where}; weights and optimizer {least / GB:.2g} GB, activations not counted"
    if have < least:
        return FAIL, said, "a smaller base, or more memory"
    if on.gpu and on.memory_bytes < weights:
        return FAIL, f"{on.memory_bytes / GB:.1f} GB of main memory; weights of {weights / GB:.1f} GB", "more memory"
    if on.gpu and have < GUIDE_GPU * 0.95 and not facts.demo:
        return (
            WARN,
            f"{said}; the guide: 16 GB at least",
            "colintern recommend --write, which computes what fits this GPU",
        )
    return PASS, said


def driver(facts: Facts) -> Answer:
    on = facts.machine
    built = f"torch {on.torch} for " + (f"CUDA {on.torch_cuda}" if on.torch_cuda else "the CPU")
    if on.gpu:
        return PASS, f"driver {on.driver or 'unknown'}, {built}, {on.gpu}"
    if facts.demo:
        return PASS, f"{built}; the demo trains on the CPU"
    if not on.cards:
        return WARN, f"no NVIDIA GPU, {built}; a step of 1B on a CPU takes minutes", "train on a machine with a GPU"
    if on.hidden:
        return FAIL, "CUDA_VISIBLE_DEVICES hides the GPU from torch", "unset CUDA_VISIBLE_DEVICES"
    if not on.torch_cuda:
        return FAIL, f"a GPU, but {built}", "make image, or install torch from requirements.txt"
    least = DRIVERS.get(on.torch_cuda.partition(".")[0], "the newest")
    return (
        FAIL,
        f"a GPU that torch cannot use: driver {on.driver or 'missing'}, {built}",
        f"install driver {least} or newer",
    )


Check = Callable[[Facts], Answer]
CHECKS: dict[str, Check] = {
    "epochs": epochs,
    "effective batch": batch,
    "learning rate": learning_rate,
    "LoRA on": lora_on,
    "target modules": targets,
    "head included": head,
    "vision frozen": vision,
    "bf16": bf16,
    "attention kernel": attention,
    "disk": disk,
    "memory": memory,
    "driver and CUDA": driver,
}


def facts_for(params: Params, config: Any, revision: str | None) -> Facts:
    """`config`: that of the base, or where it lies; see `meta_model`."""
    return Facts(params, examine(meta_model(config, revision), params), machine())


def examined(facts: Any, checks: dict[str, Callable[[Any], Answer]]) -> list[Finding]:
    """Every check's finding, in order."""
    return [Finding(name, *check(facts)) for name, check in checks.items()]


def hold(params: Params, base: str) -> None:
    """What training asks before it loads `base`: prints the warnings.

    Raises:
        UserError: a check fails; each is named with its remedy.
    """
    found = examined(facts_for(params, base, params.base_revision or None), CHECKS)
    for finding in found:
        if finding.status == WARN:
            print(fill(f"warning: {finding.name}: {finding.found} -> {finding.remedy}", 80, subsequent_indent="  "))
    if failed := [f"{f.name}: {f.found} -> {f.remedy}" for f in found if f.status == FAIL]:
        raise UserError("this run cannot do what params.yaml says\n  " + "\n  ".join(failed))
