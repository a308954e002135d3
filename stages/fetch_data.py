"""fetch-data: put base, kernel, training pages and pages to evaluate on disk, name every file, see every row.

    python -m stages.fetch_data

Input: params.yaml. Output: data/manifest.json (file, size, sha256, repository, revision) and the bytes it names, of
which those from the hub lie in its own cache; data/quarantine.json, the rows that are left out and why;
data/rows.parquet, the rows that are trained on; data/survey.json, the data in numbers. Exit 2 for too many rows left
out, for a training set without rows, for an evaluation set with a fault, and for a page in two splits; exit 7 when the
hub cannot be reached and the cache lacks something.
"""

from pathlib import Path

from colintern.core.errors import exit_on_user_error
from colintern.data import index
from colintern.ingest.checks import check, check_benchmarks, quarantine
from colintern.ingest.collected import MAX_QUERY_CHARACTERS
from colintern.ingest.scan import look, usable
from colintern.ingest.sources import GeneratedSets, fetch, parts, tokenizer
from colintern.params import load
from colintern.statistics.survey import survey
from colintern.storage.files import dumps
from colintern.storage.manifest import MANIFEST, QUARANTINE, SURVEY, is_local_benchmark, set_arrow_cache
from demo.dataset import write_evaluation_set, write_training_set


@exit_on_user_error()
def main() -> None:
    params = load()
    tasks = {}
    if not all(map(is_local_benchmark, params.benchmarks)):
        set_arrow_cache()
        from colintern.data.benchmarks import hub_data  # only now: it imports mteb, which takes seconds

        tasks = hub_data(params)
    manifest, own = fetch(params, tasks, GeneratedSets(write_training_set, write_evaluation_set))
    check_benchmarks(params.benchmarks, manifest["evaluation"])
    Path("data").mkdir(exist_ok=True)
    seen = look(parts(params, manifest))
    bad, rows = quarantine(seen, own)
    Path(QUARANTINE).write_text(dumps({"rows": bad}))  # before anything below may refuse the data
    check(seen, bad, rows, params.max_bad_fraction)
    found = survey(seen, tokenizer(manifest))
    for name, facts in found.items():
        if cut := facts.get("queries cut"):
            print(f"{name}: {cut} of {facts['queries']} queries have more than {MAX_QUERY_CHARACTERS} characters; cut")
    Path(SURVEY).write_text(dumps(found))
    index.write(usable(seen))
    Path(MANIFEST).write_text(dumps(manifest))
    print(f"{len(bad)} of {sum(rows.values())} rows in {QUARANTINE}")
    named = [("base", manifest["base"])]
    named += [("kernel", manifest["kernel"])] if manifest["kernel"] else []
    named += [*(("train", part) for part in manifest["train"])]
    for name, part in [*named, *manifest["evaluation"].items()]:
        size = sum(file["size"] for file in part["files"].values())
        print(f"{name:<31.31} {part['folder']:<27.27} {len(part['files']):>3} files {size / 1e6:>7.1f} MB")


if __name__ == "__main__":
    main()
