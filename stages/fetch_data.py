"""fetch-data: put base, kernel, training pages and pages to evaluate on disk, name every file, scan every row.

    python -m stages.fetch_data

Input: params.yaml. Output: data/manifest.json (file, size, sha256, repository, revision) and the bytes it names (those
from the hub are in its own cache); data/quarantine.json, the rows that are left out and why; data/rows.parquet, the
rows that are trained on; data/survey.json, the data in numbers. Exit 2 for too many rows left out, a training set
without rows, an evaluation set with an error, and a page in two splits; exit 7 when the hub cannot be reached and the
cache lacks something.
"""

from pathlib import Path
from textwrap import fill

from colintern.core.errors import exit_on_user_error
from colintern.core.rules import parse_mixture
from colintern.data.training_set import write_row_index
from colintern.ingest.documents import MAX_QUERY_CHARACTERS
from colintern.ingest.scan import scan_rows, valid_rows
from colintern.ingest.sources import DemoWriters, fetch_inputs, get_tokenizer_path, list_dataset_splits
from colintern.ingest.validation import check_benchmarks, collect_quarantine, validate_data
from colintern.params import describe_demo_base, load_params
from colintern.statistics.survey import survey_rows
from colintern.storage.files import format_json
from colintern.storage.manifest import MANIFEST, QUARANTINE, SURVEY, is_local_benchmark, set_arrow_cache
from demo.dataset import write_evaluation_set, write_training_set


@exit_on_user_error()
def main() -> None:
    """Run the stage."""
    params = load_params()
    tasks = {}
    if not all(map(is_local_benchmark, params.benchmarks)):
        set_arrow_cache()
        from colintern.data.benchmarks import list_hub_datasets  # only now: it imports mteb, which takes seconds

        tasks = list_hub_datasets(params.benchmarks)
    manifest, documents = fetch_inputs(params, tasks, DemoWriters(write_training_set, write_evaluation_set))
    check_benchmarks(params.benchmarks, manifest["evaluation"])
    if note := describe_demo_base(
        params.base, [name for name, _ in parse_mixture(params.train_data)] + list(params.benchmarks)
    ):
        print(fill(note, 80))
    Path("data").mkdir(exist_ok=True)
    scanned = scan_rows(list_dataset_splits(manifest, params.train_data, params.train_corpus))
    quarantine = collect_quarantine(scanned, documents)
    # Written before anything below may refuse the data.
    Path(QUARANTINE).write_text(format_json({"rows": [row._asdict() for row in quarantine.rows]}))
    validate_data(scanned, quarantine, params.max_bad_fraction)
    survey = survey_rows(scanned, get_tokenizer_path(manifest))
    for name, facts in survey.items():
        if cut := facts.get("queries cut"):
            print(f"{name}: {cut} of {facts['queries']} queries have more than {MAX_QUERY_CHARACTERS} characters; cut")
    Path(SURVEY).write_text(format_json(survey))
    write_row_index(valid_rows(scanned))
    Path(MANIFEST).write_text(format_json(manifest))
    print(f"{len(quarantine.rows)} of {quarantine.totals.total()} rows in {QUARANTINE}")
    entries = [("base", manifest["base"]), *(("train", entry) for entry in manifest["train"])]
    entries += manifest["evaluation"].items()
    for name, entry in entries:
        size = sum(file["size"] for file in entry["files"].values())
        print(f"{name:<31.31} {entry['folder']:<27.27} {len(entry['files']):>3} files {size / 1e6:>7.1f} MB")


if __name__ == "__main__":
    main()
