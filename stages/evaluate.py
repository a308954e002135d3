"""eval: the trained adapter, and the base before training, on mteb's retrieval tasks.

    python -m stages.evaluate

Input: params.yaml, experiments/colintern, data/manifest.json and what it names. Output: mteb's own files and what each
query scored below results/mteb_evaluation, metrics/eval.json, plots/eval.csv; times go to logs/eval-timing.json, which
is no out. Tasks that a run of the same model has finished are taken from .scratch.
"""

import csv
from pathlib import Path

from colintern.files.jsonfile import dumps
from colintern.files.manifest import arrow_cache, ready
from colintern.files.outs import check_outs, forget_ended
from colintern.params import exit_on_user_error, load


@exit_on_user_error()
def main() -> None:
    params = load()
    forget_ended()  # DVC starts this stage when training is recorded
    check_outs()
    arrow_cache()
    ready(params, evaluation=True)
    from colintern.data.benchmarks import tasks_for  # only now: `datasets` reads the environment when it is imported
    from colintern.evaluation.scores import METRICS, SIZES, report, score_rows
    from colintern.evaluation.subjects import subjects
    from colintern.evaluation.tasks import evaluate
    from colintern.evaluation.verdicts import table

    tasks_for(params)  # a misspelt name is refused before anything else is looked at
    scores = evaluate(subjects(params, Path("experiments/colintern")), params, Path("results/mteb_evaluation"))
    for folder in ("metrics", "plots"):
        Path(folder).mkdir(exist_ok=True)
    Path("metrics/eval.json").write_text(dumps(report(scores["trained"], scores.get("untrained"))))
    with open("plots/eval.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ("benchmark", "task", "model", *METRICS, *SIZES), lineterminator="\n")
        writer.writeheader()
        writer.writerows(score_rows(scores))
    print(table(scores))


if __name__ == "__main__":
    main()
