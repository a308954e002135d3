"""fetch-data: put the base model, the training pages and the local benchmarks on disk and name every file.

    python -m stages.fetch_data

Input: params.yaml. Output: data/manifest.json (file, size, sha256, repository, revision) and the bytes it names.
"""

from pathlib import Path

from colintern.jsonfile import dumps
from colintern.manifest import MANIFEST, local
from colintern.params import exit_on_user_error, load
from colintern.sources import fetch


@exit_on_user_error()
def main() -> None:
    params = load()
    if not all(map(local, params.benchmarks)):
        from colintern.benchmarks import check_names  # only now: it imports mteb, which takes seconds

        check_names(params)
    manifest = fetch(params)
    path = Path(MANIFEST)
    path.parent.mkdir(exist_ok=True)
    path.write_text(dumps(manifest))
    parts = [("base", manifest["base"]), *(("train", part) for part in manifest["train"])]
    parts += manifest["evaluation"].items()
    for name, part in parts:
        size = sum(file["size"] for file in part["files"].values())
        print(f"{name:<10} {part['folder']:<40} {len(part['files']):>4} files {size / 1e6:>10.1f} MB")


if __name__ == "__main__":
    main()
