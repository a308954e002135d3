"""Export an adapter merged into its base, as a folder that needs nothing else, with a model card."""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HTTPError

from colintern.core.errors import UserError
from colintern.core.imports import list_reached_modules
from colintern.encoding.loading import get_encoder_settings
from colintern.evaluation.models import make_eval_models
from colintern.evaluation.results import shorten_task_name
from colintern.modeling.configuration_colintern import EMBEDDING_DIM, ColIntern3_5Config
from colintern.modeling.loading import PROCESSOR_CONFIG, read_processor
from colintern.modeling.modeling_colintern import suppress_load_warnings
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.params import Params, is_on_hub
from colintern.preflight.adapter_check import check_adapter, find_base, read_adapter
from colintern.reporting.evaluation import (
    FULL_SIZE,
    Evaluation,
    apply_evaluated_settings,
    compute_intervals,
    find_evaluation,
    read_evaluation,
)
from colintern.reporting.export_vllm import describe_vllm_use, require_stock_tiling, write_vllm_model
from colintern.reporting.html import make_environment
from colintern.scoring.metrics import METRIC_KEYS
from colintern.storage.hub import describe_hub_error
from colintern.storage.identity import fingerprint, get_versions

logger = logging.getLogger(__name__)
HUB_TASK = "visual-document-retrieval"  # the hub's name of it
ENTRY_POINT = "colintern.modeling.custom_st"  # it imports, directly or not, all code that an exported model needs
CODE_HEADER = """\
# Copyright The colintern authors
# SPDX-License-Identifier: Apache-2.0

"""
CODE_TAGS = ("custom_code", "sentence-transformers")  # of a folder that comes with its code
CONFIG_CHANGES: dict[str, dict[str, Any]] = {  # what differs from the files of a base
    "config.json": {
        "architectures": ["ColIntern3_5ForRetrieval"],
        "auto_map": {
            "AutoConfig": "configuration_colintern.ColIntern3_5Config",
            "AutoModel": "modeling_colintern.ColIntern3_5ForRetrieval",
        },
        "model_type": ColIntern3_5Config.model_type,
    },
    PROCESSOR_CONFIG: {"auto_map": {"AutoProcessor": "processing_colintern.ColIntern3_5Processor"}},
}
# For sentence-transformers, and for mteb, which reads the modalities.
SENTENCE_TRANSFORMERS_FILES: dict[str, Any] = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "custom_st.ColIntern3_5Module"}],
    "config_sentence_transformers.json": {
        "model_type": "MultiVectorEncoder",
        "prompts": {"query": "", "document": ""},
        "similarity_fn_name": "maxsim",
        "requirements": {"sentence-transformers": ">=6.2", "transformers": ">=5.23,<6"},
    },
    "sentence_bert_config.json": {"modality_config": {"image": {}, "text": {}}},
}


def export_model(params: Params, folder: Path, out: Path, name: str, for_vllm: bool = False) -> str:
    """Write `out`: weights (safetensors), config, processor, their code, identity.json, README.md.

    With `for_vllm` the layout is that of `write_vllm_model`, without code.

    The adapter is merged in float32, and the weights are then stored in `params.dtype`.

    Returns:
        Why the card has no results, or "".

    Raises:
        UserError: no adapter, or one that `colintern check-adapter` refuses.
    """
    adapter = read_adapter(folder)
    if for_vllm:
        require_stock_tiling(folder, adapter.identity)
        params = replace(params, tiling="stock")
    base = find_base(adapter, None)
    if failed := [finding for finding in check_adapter(adapter, base) if not finding.ok]:
        raise UserError(f"{folder}: {failed[0].name}: {failed[0].found}; see: colintern check-adapter {folder}")
    revision = make_eval_models(get_encoder_settings(params), folder)["trained"].revision
    evaluation, reason = _find_evaluation_of_export(params, revision)
    logger.info(f"export: merging {folder} into its base, writing {out}")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = ColIntern3_5.from_pretrained(folder, base=str(base), merge=True, dtype=torch.float32)
    model.to(getattr(torch, params.dtype))
    bounds = {"max_visual_tokens": params.max_visual_tokens, "max_query_tokens": params.max_query_tokens}
    processor = read_processor(folder, None, **bounds, tiling=params.tiling)
    if for_vllm:
        write_vllm_model(model, processor, base, partial)
    else:
        with suppress_load_warnings():
            model.save_pretrained(partial)
        processor.save_pretrained(partial)
        write_code(partial)
    shutil.copy(folder / "identity.json", partial)
    vllm = describe_vllm_use(processor, params.dtype) if for_vllm else None
    card = render_model_card(name, revision, adapter.identity, evaluation, processor, vllm)
    (partial / "README.md").write_text(card, encoding="utf-8")
    for file in filter(Path.is_file, partial.rglob("*")):  # safetensors makes a file that is its owner's alone
        file.chmod((partial / "README.md").stat().st_mode)
    partial.replace(out)
    return reason


def write_code(folder: Path) -> None:
    """Write copies of the library's files, which load the model without colintern, and the entries that locate them.

    transformers finds the classes by `auto_map`, sentence-transformers by modules.json.
    """
    for file in list_reached_modules(ENTRY_POINT, without=frozenset()):
        text = re.sub(r"^from colintern\.[\w.]*?(\w+) import", r"from .\1 import", file.read_text("utf-8"), flags=re.M)
        (folder / file.name).write_text(CODE_HEADER + text, encoding="utf-8")
    changed = {name: json.loads((folder / name).read_text("utf-8")) | new for name, new in CONFIG_CHANGES.items()}
    for name, content in (changed | SENTENCE_TRANSFORMERS_FILES).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def get_exported_settings(params: Params) -> dict[str, object]:
    """Return the settings of an evaluation that an exported model has too: full embeddings, its bounds and dtype."""
    keys = ("max_query_tokens", "max_visual_tokens", "tiling", "dtype")
    return FULL_SIZE | {key: getattr(params, key) for key in keys}


def _find_evaluation_of_export(params: Params, revision: str) -> tuple[Evaluation | None, str]:
    """Find an evaluation with full embeddings and the exported model's bounds and dtype; else return the reason."""
    try:
        folder = find_evaluation(revision, None, get_exported_settings(params))
        return read_evaluation(apply_evaluated_settings(params, folder), folder), ""
    except UserError as error:  # also where the data has changed since, or is not fetched any more
        return None, str(error)


def push_model(folder: Path, name: str) -> str:
    """Upload the folder to the hub's repository `name`, and return the URL of the commit."""
    logger.info(f"export: pushing {folder} to {name}")
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        return api.upload_folder(repo_id=name, folder_path=folder, commit_message="colintern export").commit_url
    except (HTTPError, OSError) as error:
        raise UserError(
            f"--push: {name}: {describe_hub_error(error)}; `hf auth login` or HF_TOKEN gives the right to write"
        ) from error


def render_model_card(
    name: str,
    revision: str,
    identity: dict[str, Any],
    evaluation: Evaluation | None,
    processor: ColIntern3_5Processor,
    vllm: dict[str, object] | None = None,
) -> str:
    """Render README.md with the results where the hub reads them; without an evaluation the card says so.

    Args:
        name: of the model.
        revision: hash of the adapter's weights.
        identity: the adapter's identity.json.
        evaluation: of the exported model.
        processor: of the exported model.
        vllm: see `describe_vllm_use`; None for a model that comes with its code.
    """
    base = identity["base"]
    data = ModelCardData(
        model_name=name,
        base_model=base["folder"] if is_on_hub(base["folder"]) and base["revision"] else None,
        library_name="vllm" if vllm else "transformers",
        pipeline_tag=HUB_TASK,
        tags=["colpali", "late-interaction", "multi-vector", *([] if vllm else CODE_TAGS), HUB_TASK],
        eval_results=_list_eval_results(evaluation) if evaluation else None,
    )
    rows = []
    for row in compute_intervals(evaluation.queries if evaluation else []):
        label = _escape_cell(row.name if row.benchmark else shorten_task_name(row.name))
        rows.append((label, f"{100 * row.after:.1f}", f"{100 * row.low:.1f} to {100 * row.high:.1f}"))
    settings = {
        key: _escape_cell(", ".join(value) if isinstance(value, list) else str(value))
        for key, value in identity["params"].items()
    }
    text = (
        make_environment(autoescape=False)
        .get_template("card.md")
        .render(
            name=name,
            revision=revision,
            base=base,
            processor=processor,
            dim=EMBEDDING_DIM,
            rows=rows,
            mteb=evaluation.mteb_version if evaluation else "",
            data=sorted(evaluation.run["data"].items()) if evaluation else [],
            settings=sorted(settings.items()),
            fingerprint=fingerprint({key: identity.get(key) for key in ("params", "deps", "versions")}),
            versions=identity.get("versions", {}),
            here=get_versions(),
            vllm=vllm,
        )
    )
    return f"---\n{data.to_yaml().strip()}\n---\n{text}"


def _list_eval_results(evaluation: Evaluation) -> list[EvalResult]:
    scores = {name: values for benchmark in evaluation.scores.values() for name, values in benchmark["tasks"].items()}
    datasets = {task.metadata.name: task.metadata.dataset for _, task in evaluation.pairs}
    return [
        EvalResult(
            task_type=HUB_TASK,
            dataset_type=datasets[name]["path"] if is_on_hub(datasets[name]["path"]) else "local",
            dataset_name=shorten_task_name(name),
            dataset_revision=datasets[name]["revision"],
            metric_type=metric,
            metric_name=metric,
            metric_value=round(100 * values[metric], 3),
        )
        for name, values in scores.items()
        for metric in METRIC_KEYS
    ]


def _escape_cell(text: str) -> str:
    """Escape for a table of Markdown: no bar ends the cell."""
    return text.replace("|", "\\|").replace("\n", " ")
