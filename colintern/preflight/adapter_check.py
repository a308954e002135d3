"""Check that an adapter folder contains what a training run saves: trained weights, its own head, and its base.

It is compared with what its identity.json recorded when it was trained: the hashes of the base's files, and the
statistics of the weights it started from (colintern/modeling/weights.py).
"""

import os
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.modeling.adapter_files import (
    ADAPTER,
    AdapterFiles,
    adapter_weight_stats,
    find_faults,
    read_adapter_files,
)
from colintern.modeling.loading import load_model, read_processor
from colintern.modeling.retriever import build_meta_model
from colintern.storage.hub import Repo
from colintern.storage.identity import IDENTITY_FILE, read_identity
from colintern.storage.manifest import get_digests
from colintern.storage.paths import suggest_adapter_source

TOLERANCE = 1e-4  # of an element of a unit vector, merged against unmerged in float32
QUERY = "what does the invoice of 12 March come to"


class CheckedAdapter(NamedTuple):
    """The weights in an adapter folder, and its identity.json."""

    files: AdapterFiles
    identity: dict[str, Any]


class AdapterCheckResult(NamedTuple):
    """The result of one check."""

    name: str
    ok: bool
    found: str


def read_adapter(folder: Path) -> CheckedAdapter:
    """Read an adapter folder, without its base.

    Raises:
        UserError: A file is missing, truncated, or not what it should be.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give that of an adapter, such as experiments/colintern")
    for name in (*ADAPTER, IDENTITY_FILE):
        if not os.path.lexists(folder / name):
            raise UserError(f"{folder / name}: missing; {suggest_adapter_source(folder)}")
    files, identity = read_adapter_files(folder), read_identity(folder)
    missing = [key for key in ("base", "start", "params") if key not in identity]
    missing += [f"base.{key}" for key in ("folder", "revision", "files") if key not in identity.get("base", {})]
    if not missing and "head" not in identity["start"]:
        missing = ["start.head"]
    if missing:
        raise UserError(
            f"{folder / IDENTITY_FILE}: does not say what training started from (no {missing[0]}), so it is older than "
            "this check; train it again with this version, such as with dvc repro -f train"
        )
    return CheckedAdapter(files, identity)


def find_base(adapter: CheckedAdapter, base: str | None) -> Path:
    """Return the folder of the adapter's base: `base`, or the one that the adapter names."""
    if base:
        return root() / base
    entry = adapter.identity["base"]
    if entry["revision"]:
        return Repo("base", entry["folder"], entry["revision"], "model").snapshot_folder
    return root() / entry["folder"]


def check_adapter(adapter: CheckedAdapter, base: Path) -> list[AdapterCheckResult]:
    """Run all checks, the cheapest first; the merge is checked only where all others pass."""
    base_result = _check_base(adapter, base)
    faults: dict[str, str] = {}
    for fault in find_faults(adapter.files, build_meta_model(str(base), None) if base_result.ok else None):
        faults.setdefault(fault.check, f"{fault.message} ({fault.file})")
    num_weights = len(adapter.files.weights) + len(adapter.files.head)
    num_trained = sum(".lora_B" in name for name in adapter.files.weights)
    results = [
        AdapterCheckResult("finite", True, f"{num_weights} weights without NaN or infinity"),
        _check_shape(adapter),
        AdapterCheckResult("trained", True, f"all {num_trained} lora_B are non-zero (trained)"),
        _check_head(adapter),
    ]
    results = [AdapterCheckResult(r.name, False, faults[r.name]) if r.ok and r.name in faults else r for r in results]
    results.append(base_result)
    if all(result.ok for result in results):
        return [*results, _check_merge(adapter, base)]
    return [*results, AdapterCheckResult("merged", False, "not tried, because of the above")]


def _check_shape(adapter: CheckedAdapter) -> AdapterCheckResult:
    now, start = adapter_weight_stats(adapter.files.weights, adapter.files.head), adapter.identity["start"]
    for name in sorted(now.keys() | start.keys()):
        count, count_at_start = (groups.get(name, {"tensors": 0})["tensors"] for groups in (now, start))
        if count != count_at_start:
            found = f"{name}: {count} weights, but training started with {count_at_start}"
            return AdapterCheckResult("whole", False, found)
    num_modules = sum(".lora_A" in name for name in adapter.files.weights)
    return AdapterCheckResult("whole", True, f"LoRA on {num_modules} modules, as when training started")


def _check_head(adapter: CheckedAdapter) -> AdapterCheckResult:
    now = adapter_weight_stats({}, adapter.files.head)["head"]["sha256"]
    start = adapter.identity["start"]["head"]["sha256"]
    if now != start:
        found = f"head.safetensors is another one: sha256 {now}, trained over {start}"
        return AdapterCheckResult("head", False, found)
    return AdapterCheckResult("head", True, "the one it was trained over, to the bit")


def _check_base(adapter: CheckedAdapter, base: Path) -> AdapterCheckResult:
    expected = adapter.identity["base"]["files"]
    if missing := [name for name in expected if not (base / name).is_file()]:
        found = f"{base / missing[0]}: missing; give the adapter's base with --base FOLDER"
        return AdapterCheckResult("base", False, found)
    paths = [base / name for name in expected]
    for path, want, have in zip(paths, expected.values(), get_digests().hash_files(paths), strict=True):
        if have != want:
            hashes = f"sha256 {have['sha256'][:12]}, trained on {want['sha256'][:12]}"
            return AdapterCheckResult("base", False, f"{path}: {hashes}: another base")
    return AdapterCheckResult("base", True, f"{len(expected)} files of {base}, as when it was trained")


def _check_merge(adapter: CheckedAdapter, base: Path) -> AdapterCheckResult:
    """Compare embeddings of a page and a query with the adapter beside the base, and merged into it."""
    params = adapter.identity["params"]
    limits = {key: params[key] for key in ("max_visual_tokens", "max_query_tokens") if key in params}
    page = Image.new("RGB", (600, 800), "white")
    ImageDraw.Draw(page).text((40, 60), "Invoice, 12 March\n\nTotal 318.40", fill="black", font_size=40)
    embeddings: list[Tensor] = []
    for merge in (False, True):  # one after the other: two models of 8B do not fit everywhere
        try:
            model = load_model(adapter.files.folder, base=str(base), merge=merge, dtype=torch.float32)
        except UserError as error:
            return AdapterCheckResult("merged", False, f"cannot be loaded: {str(error).partition(chr(10))[0]}")
        processor = read_processor(adapter.files.folder, model, **limits)
        vectors = [*embed_pages(model, processor, [page], 1), *embed_queries(model, processor, [QUERY], 1)]
        embeddings.append(torch.cat(vectors))
        del model
    difference = (embeddings[0] - embeddings[1]).abs().max().item()
    found = (
        f"at most {difference:.1e} from unmerged over {len(embeddings[0])} tokens of a page and a query "
        f"(bound {TOLERANCE:g})"
    )
    return AdapterCheckResult("merged", difference <= TOLERANCE, found)


def format_adapter_table(adapter: CheckedAdapter, results: list[AdapterCheckResult]) -> str:
    """Format the statistics, the results and the verdict, at most 80 columns wide but for file names."""
    now, start = adapter_weight_stats(adapter.files.weights, adapter.files.head), adapter.identity["start"]
    lines = [f"adapter {adapter.files.folder}, trained on {adapter.identity['base']['folder']}"]
    lines.append(f"{'':<38}{'weights':>8}{'std at start':>14}{'std now':>10}")
    for name in sorted(now.keys() | start.keys()):
        current, initial = (side.get(name, {"tensors": 0, "std": float("nan"), "sha256": ""}) for side in (now, start))
        same = "same" if current["sha256"] == initial["sha256"] else "changed"
        label = name.removeprefix("language_model.")
        lines.append(f"{label:<38}{current['tensors']:>8}{initial['std']:>14.5g}{current['std']:>10.4g}  {same}")
    for result in results:
        text = f"{'ok' if result.ok else 'NO':<4}{result.name:<9}{result.found}"
        lines += wrap(text, 80, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False)
    failed = [result.name for result in results if not result.ok]
    reasons = [name for name in failed if name != "merged"] or failed  # a merge that was not tried is no reason
    return "\n".join([*lines, f"verdict: refused for {', '.join(reasons)}" if reasons else "verdict: trained"])
