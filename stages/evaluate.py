"""eval: the trained adapter, and the base before training, on mteb's retrieval tasks.

    python -m stages.evaluate

Input: params.yaml, experiments/colintern, data/manifest.json and what it names. Output: mteb's own files below
results/mteb_evaluation, metrics/eval.json, plots/eval.csv; times go to logs/eval-timing.json, which is no out.
"""

import csv
import os
from pathlib import Path

from colintern.jsonfile import dumps
from colintern.manifest import ready
from colintern.params import exit_on_user_error, load, root


@exit_on_user_error()
def main() -> None:
    params = load()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ["HF_DATASETS_CACHE"] = str(root() / "data" / ".arrow")
    ready(params, evaluation=True)
    from colintern import evaluation  # only now: `datasets` reads the environment when it is imported

    scores = evaluation.evaluate_adapter(params, Path("experiments/colintern"), Path("results/mteb_evaluation"))
    for folder in ("metrics", "plots"):
        Path(folder).mkdir(exist_ok=True)
    Path("metrics/eval.json").write_text(dumps(evaluation.report(scores["trained"], scores.get("untrained"))))
    with open("plots/eval.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ("benchmark", "task", "model", *evaluation.METRICS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(evaluation.score_rows(scores))
    print(evaluation.table(scores))


if __name__ == "__main__":
    main()
