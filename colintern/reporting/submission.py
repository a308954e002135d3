"""Write what a submission to mteb's leaderboard needs: task files, model_meta.json, a ModelMeta, a request.

The folder `results` is for mteb's results repository, model_meta.py for mteb itself; the request is an issue there,
which asks for an evaluation on the tasks whose data is not public.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mteb
from mteb.languages.iso_mappings import _hf_langs_to_iso_lang_scripts
from mteb.models import ModelMeta, MultiVectorWrapper
from mteb.models.model_implementations.colpali_models import COLPALI_TRAINING_DATA
from mteb.types import OutputDType

from colintern.core.errors import UserError
from colintern.core.rules import parse_mixture
from colintern.encoding.loading import get_encoder_settings
from colintern.evaluation.models import MODEL_NAME, make_eval_models
from colintern.modeling.configuration_colintern import EMBEDDING_DIM, load_config
from colintern.params import Params, is_on_hub
from colintern.preflight.adapter_check import find_base, read_adapter
from colintern.reporting.evaluation import read_revisions
from colintern.reporting.export import get_exported_settings
from colintern.reporting.html import make_environment
from colintern.storage.files import format_json
from colintern.storage.manifest import SURVEY

logger = logging.getLogger(__name__)
HUB = "https://huggingface.co"
BENCHMARK = "ViDoRe(v3)"  # for whose private tasks the request asks
KNOWN_TRAINING_DATA = {"vidore/colpali_train_set": COLPALI_TRAINING_DATA}  # in mteb's names
MIN_LANGUAGE_SHARE = 0.01  # of the training queries; a rarer language may be a wrong guess
IMPORTS = """\
from mteb.models import ModelMeta, MultiVectorWrapper
from mteb.models.model_meta import ScoringFunction
"""
META_FILE, SETTINGS_FILE = "model_meta.json", "run_settings.jsonl"


class SubmissionFacts(NamedTuple):
    """Facts by the name of their option; None where it was not given."""

    name: str | None  # of the exported model on the hub
    revision: str | None  # its commit there
    license: str | None
    release_date: str | None
    languages: list[str] | None  # None: those of the training queries
    training_datasets: list[str] | None  # None: those of the run, if they are on the hub


def write_submission(params: Params, folder: Path, out: Path, given: SubmissionFacts) -> list[str]:
    """Write `out`: results/OWNER__NAME/COMMIT/, model_meta.py and evaluation_request.md.

    Returns:
        The public tasks of `BENCHMARK` that were not evaluated.

    Raises:
        UserError: facts are missing, each named; mteb refuses one; or no task of mteb was evaluated.
    """
    adapter = read_adapter(folder)
    names = [name for name, _ in parse_mixture(adapter.identity["params"]["train_data"])]
    facts = _complete_facts(given, names)
    revision = make_eval_models(get_encoder_settings(params), folder)["trained"].revision
    files = _find_task_files(revision, params)
    evaluated = next(iter(files.values())).with_name(META_FILE).read_text(encoding="utf-8")
    text_config = load_config(str(find_base(adapter, None))).get_text_config()
    base = adapter.identity["base"]["folder"]
    fields = {
        "adapted_from": base if is_on_hub(base) else None,
        "max_tokens": text_config.max_position_embeddings,
        "public_training_data": f"{HUB}/datasets/{names[0]}" if len(names) == 1 and is_on_hub(names[0]) else None,
    }
    meta = _make_model_meta(json.loads(evaluated), facts, OutputDType.from_str(params.dtype), fields)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write_results(partial / "results" / meta.model_name_as_path() / str(meta.revision), meta, files)
    (partial / "model_meta.py").write_text(_render_model_meta(meta), encoding="utf-8")
    (partial / "evaluation_request.md").write_text(_render_request(meta, files), encoding="utf-8")
    partial.replace(out)
    return [task.metadata.name for task in _list_tasks(is_public=True) if task.metadata.name not in files]


def _complete_facts(given: SubmissionFacts, names: list[str]) -> SubmissionFacts:
    """Add what is known of the training data with these names; raise UserError with the options of what is missing."""
    datasets = given.training_datasets
    if datasets is None and all(map(is_on_hub, names)):
        datasets = sorted(set().union(*(KNOWN_TRAINING_DATA.get(name, {name}) for name in names)))
    facts = given._replace(training_datasets=datasets, languages=given.languages or _read_languages(names))
    if missing := [f"--{key.replace('_', '-')}" for key, value in facts._asdict().items() if value is None]:
        raise UserError(f"--submission: the run does not know all facts that mteb asks for; give {', '.join(missing)}")
    return facts


def _read_languages(names: list[str]) -> list[str] | None:
    """Return the languages of the training queries in mteb's form; None where the survey lacks a data set."""
    survey = json.loads(Path(SURVEY).read_text(encoding="utf-8")) if Path(SURVEY).is_file() else {}
    counts = [survey.get(f"{name} (train)", {}).get("languages, guessed", {}) for name in names]
    if not all(counts):
        return None
    codes = set()
    for by_code in counts:
        least = MIN_LANGUAGE_SHARE * sum(by_code.values())
        codes |= {code for code, count in by_code.items() if count >= least}
    return _hf_langs_to_iso_lang_scripts(sorted(codes - {"unknown"}))


def _find_task_files(revision: str, params: Params) -> dict[str, Path]:
    """Find mteb's files of its public tasks in all evaluations of this revision that an exported model has."""
    files: dict[str, Path] = {}
    left_out = set()
    place = Path("results", MODEL_NAME.replace("/", "__"), revision)
    for folder in read_revisions(get_exported_settings(params)):
        for file in sorted((folder / place).glob("*.json")):
            if file.name == META_FILE:
                continue
            if _is_public_task(mteb.TaskResult.from_disk(file)):
                files.setdefault(file.stem, file)
            else:
                left_out.add(file.stem)
    if left_out:
        logger.info(f"submission: left out, no tasks of mteb {mteb.__version__}: {', '.join(sorted(left_out))}")
    if not files:
        raise UserError(
            f"--submission: no evaluation of revision {revision} with full embeddings has a task of mteb; run: "
            f'colintern evaluate MODEL --benchmarks "{BENCHMARK}"'
        )
    return files


def _is_public_task(result: mteb.TaskResult) -> bool:
    """Return whether a result is of a task of mteb, on the data that mteb pins."""
    try:
        return mteb.get_task(result.task_name).metadata.revision == result.dataset_revision
    except KeyError:
        return False


def _make_model_meta(
    evaluated: dict[str, Any], facts: SubmissionFacts, dtype: OutputDType, fields: dict[str, object]
) -> ModelMeta:
    """Complete the model_meta.json of an evaluation."""
    num_bytes = evaluated["n_parameters"] * dtype.get_dtype().itemsize
    known = {key: evaluated[key] for key in ModelMeta.model_fields if key in evaluated}
    values = {
        "loader": MultiVectorWrapper,
        "loader_kwargs": {"trust_remote_code": True},
        "embed_dim": EMBEDDING_DIM,
        "memory_usage_mb": round(num_bytes / 2**20),
        "framework": ["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
        "reference": f"{HUB}/{facts.name}",
        "training_datasets": set(facts.training_datasets or ()),
    }
    try:
        return ModelMeta.model_validate(known | facts._asdict() | values | fields)
    except ValueError as error:  # pydantic's
        details: list[dict[str, Any]] = error.errors()  # type: ignore[attr-defined]
        problems = {detail["loc"][0]: detail["msg"] for detail in reversed(details)}
        options = (f"--{key.replace('_', '-')}: {message}" for key, message in problems.items())
        raise UserError(f"mteb refuses {'; '.join(options)}") from error


def _write_results(folder: Path, meta: ModelMeta, files: Mapping[str, Path]) -> None:
    folder.mkdir(parents=True)
    settings = set()
    for name, file in files.items():
        shutil.copyfile(file, folder / file.name)
        lines = file.with_name(SETTINGS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
        settings |= {line for line in lines if json.loads(line)["task"] == name}
    (folder / SETTINGS_FILE).write_text("".join(sorted(settings)), encoding="utf-8")
    content = meta.to_dict() | {"training_datasets": sorted(meta.training_datasets or ())}
    (folder / META_FILE).write_text(format_json(content), encoding="utf-8")


def _render_model_meta(meta: ModelMeta) -> str:
    identifier = "".join(letter if letter.isalnum() else "_" for letter in str(meta.name).partition("/")[2].lower())
    return f"{IMPORTS}\n{identifier} = {meta.to_python()}\n"


def _render_request(meta: ModelMeta, files: Mapping[str, Path]) -> str:
    results = [mteb.TaskResult.from_disk(file) for _, file in sorted(files.items())]
    private = [task.metadata.name for task in _list_tasks(is_public=False)]
    template = make_environment(autoescape=False).get_template("evaluation_request.md")
    return template.render(meta=meta, benchmark=BENCHMARK, private=private, results=results) + "\n"


def _list_tasks(is_public: bool) -> list[Any]:
    return [task for task in mteb.get_benchmark(BENCHMARK).tasks if task.metadata.is_public == is_public]
