"""Are the guide's settings any good here? A study of the demo in which they stand beside those of params.yaml.

    python -m bench.study [--trials 20] [--workers 2] [--study guide]

Input: bench/study.yaml, params.yaml, a pipeline that has run once (dvc repro). The first two trials have the guide's
values and those of params.yaml; where the guide gives none of a key, that of params.yaml. The others are those of
`colintern tune`, by as many workers as asked for. Printed: its table and importance, then for each key the values of
the best quarter of the trials and whether the guide's is among them, and the CPU-seconds of the trials. A study that
was stopped is resumed. Ends with a line RESULT.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from colintern.core.errors import exit_on_user_error
from colintern.monitoring.guide import MIN_BATCH_SIZE
from colintern.params import load_params

SPACE = Path(__file__).with_suffix(".yaml")
# Its "Critical Training Parameters" and LoraConfig, for 1B: the smallest base that its rules are for. Epochs, its 5,
# are not searched: more of them are better here whatever else is set, and would only be paid for (see the README).
GUIDE = {"lr": 5e-5, "lora_rank": 32, "lora_dropout": 0.1, "warmup_steps": 100, "batch_size": MIN_BATCH_SIZE}


def prepare_study(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return the study with its first two trials queued, its search space, and the guide's settings."""
    from colintern.tuning.search_space import read_search_space
    from colintern.tuning.studies import open_study
    from colintern.tuning.study_storage import StudyStorage, silence_optuna

    silence_optuna()
    params = load_params()
    space = read_search_space(params, SPACE)
    study = open_study(StudyStorage("", name, 30), space, params)
    current = {key: getattr(params, key) for key in space.distributions}
    guide = {key: GUIDE.get(key, value) for key, value in current.items()}
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(guide)
        study.enqueue_trial(current)
    return study, space, guide


def is_within(distribution: Any, values: list[Any], value: Any) -> bool:
    """Check whether a value is one of a categorical key's values, or between the lowest and the highest of them."""
    from optuna.distributions import CategoricalDistribution

    is_categorical = isinstance(distribution, CategoricalDistribution)
    return value in values if is_categorical else min(values) <= value <= max(values)


def print_judgement(study: Any, space: Any, guide: dict[str, Any]) -> None:
    """Print where the guide's settings stand among the best quarter of the trials, and the line RESULT."""
    from optuna.distributions import CategoricalDistribution

    from colintern.tuning.study_report import collect_results, format_value
    from colintern.tuning.trials import CPU_SECONDS

    results = collect_results(study, space)
    rows, best = results.rows, results.complete
    quarter = best[: max(1, len(rows) // 4)]
    print(f"\nthe best quarter: {len(quarter)} of {len(rows)} trials, dev NDCG@5 from {quarter[-1].score:.4f}")
    print(f"{'key':<14}{'best quarter':<22}{'guide':<10}")
    inside = 0
    for key, distribution in space.distributions.items():
        values = sorted(row.values[key] for row in quarter)
        shown = f"{format_value(values[0])} to {format_value(values[-1])}"
        if isinstance(distribution, CategoricalDistribution):
            shown = ", ".join(map(format_value, dict.fromkeys(values)))
        is_inside = is_within(distribution, values, guide[key])
        inside += is_inside
        mark = "inside" if is_inside else "outside"
        mark += "" if key in GUIDE else " (params.yaml's: the guide gives none)"
        print(f"{key:<14}{shown:<22}{format_value(guide[key]):<10}{mark}")
    [guide_row] = [row for row in rows if row.values == guide][:1]
    place = sum((row.score or 0) > (guide_row.score or 0) for row in rows) + 1
    print(f"the guide's settings together: dev NDCG@5 {guide_row.score:.4f}, place {place} of {len(rows)}")
    trials = study.get_trials(deepcopy=False)
    seconds = [trial.user_attrs[CPU_SECONDS] for trial in trials if CPU_SECONDS in trial.user_attrs]
    print(
        f"CPU-seconds of each trial: {', '.join(f'{s:.0f}' for s in seconds)}; of the first 10: {sum(seconds[:10]):.0f}"
    )
    print(
        f"RESULT best={best[0].score:.4f} guide={guide_row.score:.4f} guide_place={place} keys_inside={inside} "
        f"keys={len(space.distributions)} cpu_seconds_of_10={sum(seconds[:10]):.0f}"
    )


@exit_on_user_error()
def main() -> None:
    """Run the study, and print how the guide's settings do in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--study", default="guide")
    args = parser.parse_args()
    study, space, guide = prepare_study(args.study)
    command = [sys.executable, "-m", "colintern", "tune", "--space", str(SPACE)]
    command += ["--trials", str(args.trials), "--study", args.study]
    workers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(args.workers - 1)]
    codes = [subprocess.run(command).returncode, *(worker.wait() for worker in workers)]
    if any(codes):
        sys.exit(max(codes))
    print_judgement(study, space, guide)


if __name__ == "__main__":
    main()
