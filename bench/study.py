"""Are the guide's settings any good here? A study of the demo in which they stand beside those of params.yaml.

    python -m bench.study [--trials 20] [--workers 2] [--study guide]

Input: bench/study.yaml, params.yaml, a pipeline that has run once (dvc repro). The first two trials have the guide's
values and those of params.yaml; where the guide gives none of a key, that of params.yaml. The others are those of
`colintern tune`, by as many workers as asked for. Printed: its table and importance, then for each key the values of
the best quarter of the trials and whether the guide's is among them, and the CPU-seconds of the trials. A study that
was stopped goes on. Ends with a line RESULT.
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

from colintern.core.errors import exit_on_user_error
from colintern.monitoring.guide import MIN_BATCH_SIZE
from colintern.params import load

SPACE = Path(__file__).with_suffix(".yaml")
# Its "Critical Training Parameters" and LoraConfig, for 1B: the smallest base that its rules are for. Epochs, its 5,
# are not searched: more of them are better here whatever else is set, and would only be paid for (see the README).
GUIDE = {"lr": 5e-5, "lora_rank": 32, "lora_dropout": 0.1, "warmup_steps": 100, "batch_size": MIN_BATCH_SIZE}


def prepare(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """The study with its first two trials asked for, what it searches, and the guide's settings."""
    from colintern.tuning.space import read
    from colintern.tuning.store import Store, quiet
    from colintern.tuning.studies import open_study

    quiet()
    params = load()
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(params).items()}
    search = read(values, SPACE)
    study = open_study(Store("", name, 30), search, params)
    own = {one.key: values[one.key] for one in search.space}
    guide = {key: GUIDE.get(key, value) for key, value in own.items()}
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(guide)
        study.enqueue_trial(own)
    return study, search, guide


def within(one: Any, values: list[Any], value: Any) -> bool:
    """Whether a value is one of those, or between the lowest and the highest of them."""
    return value in values if one.choices else min(values) <= value <= max(values)


def judge(study: Any, search: Any, guide: dict[str, Any]) -> None:
    from colintern.tuning.outcome import complete, rows, text
    from colintern.tuning.trials import CPU

    found = rows(study)
    best = complete(found)
    quarter = best[: max(1, len(found) // 4)]
    print(f"\nthe best quarter: {len(quarter)} of {len(found)} trials, dev NDCG@5 from {quarter[-1].score:.4f}")
    print(f"{'key':<14}{'best quarter':<22}{'guide':<10}")
    inside = 0
    for one in search.space:
        values = sorted(row.values[one.key] for row in quarter)
        shown = (
            ", ".join(map(text, dict.fromkeys(values))) if one.choices else f"{text(values[0])} to {text(values[-1])}"
        )
        good = within(one, values, guide[one.key])
        inside += good
        mark = "inside" if good else "outside"
        mark += "" if one.key in GUIDE else " (params.yaml's: the guide gives none)"
        print(f"{one.key:<14}{shown:<22}{text(guide[one.key]):<10}{mark}")
    [asked] = [row for row in found if row.values == guide][:1]
    place = sum((row.score or 0) > (asked.score or 0) for row in found) + 1
    print(f"the guide's settings together: dev NDCG@5 {asked.score:.4f}, place {place} of {len(found)}")
    used = [trial.user_attrs[CPU] for trial in study.get_trials(deepcopy=False) if CPU in trial.user_attrs]
    print(
        f"CPU-seconds of each trial: {', '.join(f'{one:.0f}' for one in used)}; of the first 10: {sum(used[:10]):.0f}"
    )
    print(
        f"RESULT best={best[0].score:.4f} guide={asked.score:.4f} guide_place={place} keys_inside={inside} "
        f"keys={len(search.space)} cpu_seconds_of_10={sum(used[:10]):.0f}"
    )


@exit_on_user_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--study", default="guide")
    args = parser.parse_args()
    study, search, guide = prepare(args.study)
    command = [sys.executable, "-m", "colintern", "tune", "--space", str(SPACE)]
    command += ["--trials", str(args.trials), "--study", args.study]
    others = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(args.workers - 1)]
    codes = [subprocess.run(command).returncode, *(one.wait() for one in others)]
    if any(codes):
        sys.exit(max(codes))
    judge(study, search, guide)


if __name__ == "__main__":
    main()
