"""The card of an exported model: README.md with its results where the hub reads them, and what it was made of."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from colintern.evaluation.scores import METRICS, short
from colintern.params import is_on_hub
from colintern.reporting.evaluated import Evaluation, intervals
from colintern.reporting.html import TEMPLATES
from colintern.storage.identity import fingerprint, versions

TASK = "visual-document-retrieval"  # the hub's name of it


def card(name: str, revision: str, identity: dict[str, Any], found: Evaluation | None) -> str:
    """README.md; `found` is None where no evaluation is at hand, and the card then says so."""
    base = identity["base"]["folder"]
    data = ModelCardData(
        model_name=name,
        base_model=base if is_on_hub(base) and identity["base"]["revision"] else None,
        library_name="colpali",  # not transformers, whose AutoModel would leave out the head
        pipeline_tag=TASK,
        tags=["colpali", "late-interaction", "multi-vector", TASK],
        eval_results=_results(found) if found else None,
    )
    environment = Environment(  # Markdown # nosec B701
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = []
    for row in intervals(found.rows) if found else []:
        name_ = row.name if row.benchmark else short(row.name)
        rows.append((_cell(name_), f"{100 * row.after:.1f}", f"{100 * row.low:.1f} to {100 * row.high:.1f}"))
    body = environment.get_template("card.md").render(
        name=name,
        revision=revision,
        base=identity["base"],
        rows=rows,
        mteb=found.mteb_version if found else "",
        data=sorted(found.run["data"].items()) if found else [],
        settings=[
            (key, _cell(", ".join(value) if isinstance(value, list) else str(value)))
            for key, value in sorted(identity["params"].items())
        ],
        fingerprint=fingerprint({key: identity.get(key) for key in ("params", "deps", "versions")}),
        versions=identity.get("versions", {}),
        here=versions(),
    )
    return f"---\n{data.to_yaml().strip()}\n---\n{body}"


def _results(found: Evaluation) -> list[EvalResult]:
    tasks = {task.metadata.name: task.metadata for _, task in found.pairs}
    scores = {name: values for benchmark in found.scores.values() for name, values in benchmark["tasks"].items()}
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=tasks[name].dataset["path"] if is_on_hub(tasks[name].dataset["path"]) else "local",
            dataset_name=short(name),
            dataset_revision=tasks[name].dataset["revision"],
            metric_type=metric,
            metric_name=metric,
            metric_value=round(100 * values[metric], 3),
        )
        for name, values in scores.items()
        for metric in METRICS
    ]


def _cell(text: str) -> str:
    """In a Markdown table: no bar ends the cell."""
    return text.replace("|", "\\|").replace("\n", " ")
