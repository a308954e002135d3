"""Whether an adapter folder holds what a training run left: trained weights, its own head, and its base.

What it is held against was written into its identity.json when it was trained: the hashes of the base's files, and
the statistics of the weights it started from (colintern/modeling/weights.py).
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
from colintern.modeling.adapter_files import ADAPTER, AdapterFiles, find_faults, read_adapter_files
from colintern.modeling.loading import load_model, read_processor
from colintern.modeling.modeling_colintern import meta_model
from colintern.modeling.weights import statistics
from colintern.storage.hub import Repo
from colintern.storage.identity import IDENTITY_FILE, read_identity
from colintern.storage.manifest import get_digests
from colintern.storage.paths import suggest_adapter_source

TOLERANCE = 1e-4  # of an element of a unit vector, merged against unmerged in float32
QUERY = "what does the invoice of 12 March come to"


class Adapter(NamedTuple):
    """What is in the folder; `identity` is its identity.json."""

    files: AdapterFiles
    identity: dict[str, Any]


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str


def read_adapter(folder: Path) -> Adapter:
    """Everything but the base.

    Raises:
        UserError: a file is missing, torn, or not what it should be.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give that of an adapter, such as experiments/colintern")
    for name in (*ADAPTER, IDENTITY_FILE):
        if not os.path.lexists(folder / name):
            raise UserError(f"{folder / name}: missing; {suggest_adapter_source(folder)}")
    files, identity = read_adapter_files(folder), read_identity(folder)
    lacking = [key for key in ("base", "start", "params") if key not in identity]
    lacking += [f"base.{key}" for key in ("folder", "revision", "files") if key not in identity.get("base", {})]
    if lacking or "head" not in identity["start"]:
        raise UserError(
            f"{folder / IDENTITY_FILE}: does not say what training started from (no {(lacking or ['start.head'])[0]})"
            f", so it is older than this check; train it again with this version, such as with dvc repro -f train"
        )
    return Adapter(files, identity)


def base_folder(adapter: Adapter, base: str | None) -> Path:
    """Where the adapter's base is: at `base`, a folder, or where the adapter says."""
    if base:
        return root() / base
    entry = adapter.identity["base"]
    if entry["revision"]:
        return Repo("base", entry["folder"], entry["revision"], "model").snapshot_folder
    return root() / entry["folder"]


def check(adapter: Adapter, base: Path) -> list[Finding]:
    """All findings, in the order of the cheapest first; merging is tried where all else is well.

    Raises:
        UserError: the adapter's configuration cannot be applied to the base it was trained on.
    """
    right_base = _base(adapter, base)
    faults: dict[str, str] = {}
    for fault in find_faults(adapter.files, meta_model(str(base), None) if right_base.ok else None):
        faults.setdefault(fault.check, f"{fault.message} ({fault.file})")
    found = [_finite(adapter), _whole(adapter), _trained(adapter), _head(adapter)]
    found = [Finding(f.name, False, faults[f.name]) if f.ok and f.name in faults else f for f in found]
    found.append(right_base)
    if all(finding.ok for finding in found):
        return [*found, _merged(adapter, base)]
    return [*found, Finding("merged", False, "not tried, because of the above")]


def _finite(adapter: Adapter) -> Finding:
    weights = len(adapter.files.weights) + len(adapter.files.head)
    return Finding("finite", True, f"{weights} weights without NaN or infinity")


def _whole(adapter: Adapter) -> Finding:
    now, start = statistics(adapter.files.weights, adapter.files.head), adapter.identity["start"]
    for name in sorted(now.keys() | start.keys()):
        have, want = (rows.get(name, {"tensors": 0})["tensors"] for rows in (now, start))
        if have != want:
            return Finding("whole", False, f"{name}: {have} weights, but training started with {want}")
    modules = sum(".lora_A" in name for name in adapter.files.weights)
    return Finding("whole", True, f"LoRA on {modules} modules, as when training started")


def _trained(adapter: Adapter) -> Finding:
    up = [name for name in adapter.files.weights if ".lora_B" in name]
    return Finding("trained", True, f"all {len(up)} lora_B have left the zero they start at")


def _head(adapter: Adapter) -> Finding:
    now = statistics({}, adapter.files.head)["head"]["sha256"]
    want = adapter.identity["start"]["head"]["sha256"]
    if now != want:
        return Finding("head", False, f"head.safetensors is another one: sha256 {now}, trained over {want}")
    return Finding("head", True, "the one it was trained over, to the bit")


def _base(adapter: Adapter, base: Path) -> Finding:
    wanted = adapter.identity["base"]["files"]
    if missing := [name for name in wanted if not (base / name).is_file()]:
        return Finding("base", False, f"{base / missing[0]}: missing; give the adapter's base with --base FOLDER")
    paths = [base / name for name in wanted]
    for path, want, have in zip(paths, wanted.values(), get_digests().hash_files(paths), strict=True):
        if have != want:
            return Finding(
                "base", False, f"{path}: sha256 {have['sha256'][:12]}, trained on {want['sha256'][:12]}: another base"
            )
    return Finding("base", True, f"{len(wanted)} files of {base}, as when it was trained")


def _merged(adapter: Adapter, base: Path) -> Finding:
    """Embeddings of a page and a query with the adapter beside the base, and folded into it."""
    params = adapter.identity["params"]
    bounds = {key: params[key] for key in ("max_visual_tokens", "max_query_tokens") if key in params}
    page = Image.new("RGB", (600, 800), "white")
    ImageDraw.Draw(page).text((40, 60), "Invoice, 12 March\n\nTotal 318.40", fill="black", font_size=40)
    seen: list[Tensor] = []
    for merge in (False, True):  # one after the other: two models of 8B do not fit everywhere
        try:
            model = load_model(adapter.files.folder, base=str(base), merge=merge, dtype=torch.float32)
        except UserError as error:
            return Finding("merged", False, f"cannot be loaded: {str(error).partition(chr(10))[0]}")
        processor = read_processor(adapter.files.folder, model, **bounds)
        seen.append(
            torch.cat([*embed_pages(model, processor, [page], 1), *embed_queries(model, processor, [QUERY], 1)])
        )
        del model
    apart = (seen[0] - seen[1]).abs().max().item()
    found = f"at most {apart:.1e} from unmerged over {len(seen[0])} tokens of a page and a query (bound {TOLERANCE:g})"
    return Finding("merged", apart <= TOLERANCE, found)


def table(adapter: Adapter, found: list[Finding]) -> str:
    """The statistics, the findings and the verdict, at most 80 columns wide but for file names."""
    now, start = statistics(adapter.files.weights, adapter.files.head), adapter.identity["start"]
    rows = [f"adapter {adapter.files.folder}, trained on {adapter.identity['base']['folder']}"]
    rows.append(f"{'':<38}{'weights':>8}{'std at start':>14}{'std now':>10}")
    for name in sorted(now.keys() | start.keys()):
        have, was = (side.get(name, {"tensors": 0, "std": float("nan"), "sha256": ""}) for side in (now, start))
        same = "same" if have["sha256"] == was["sha256"] else "changed"
        label = name.removeprefix("language_model.")
        rows.append(f"{label:<38}{have['tensors']:>8}{was['std']:>14.5g}{have['std']:>10.4g}  {same}")
    for finding in found:
        text = f"{'ok' if finding.ok else 'NO':<4}{finding.name:<9}{finding.found}"
        rows += wrap(text, 80, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False)
    bad = [finding.name for finding in found if not finding.ok]
    refused = [name for name in bad if name != "merged"] or bad  # what is not tried is no reason of its own
    return "\n".join([*rows, f"verdict: refused for {', '.join(refused)}" if refused else "verdict: trained"])
