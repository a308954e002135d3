"""fetch-data: put the base model, the training pages and the pages to evaluate on disk and name every file.

    python -m stages.fetch_data

Input: params.yaml. Output: data/manifest.json (file, size, sha256, repository, revision) and the bytes it names, of
which those from the hub lie in its own cache. Exit 7 when the hub cannot be reached and the cache lacks something.
"""

from pathlib import Path

from colintern.jsonfile import dumps
from colintern.manifest import MANIFEST, local
from colintern.params import exit_on_user_error, load
from colintern.sources import fetch


@exit_on_user_error()
def main() -> None:
    params = load()
    tasks = {}
    if not all(map(local, params.benchmarks)):
        from colintern.benchmarks import hub_data  # only now: it imports mteb, which takes seconds

        tasks = hub_data(params)
    manifest = fetch(params, tasks)
    path = Path(MANIFEST)
    path.parent.mkdir(exist_ok=True)
    path.write_text(dumps(manifest))
    parts = [("base", manifest["base"]), ("train", manifest["train"]), *manifest["evaluation"].items()]
    for name, part in parts:
        size = sum(file["size"] for file in part["files"].values())
        print(f"{name:<50} {part['folder']:<60} {len(part['files']):>4} files {size / 1e6:>10.1f} MB")


if __name__ == "__main__":
    main()
