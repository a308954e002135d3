"""What a second experiment costs after a `dvc repro` on the demo, and what a search costs.

    python -m bench.second [--trials 10]

A clone of HEAD in a temporary folder, the environment of the caller, an empty feature cache. The tower's work is done
once, by the first run; what is left of `dvc exp run -S lr=...` (train and eval) is what the cache cannot save. With
--trials, `colintern tune` in its stead, against the whole of the first run. Ends with a line RESULT.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LR, NO_CACHE = "0.005", "feature_cache_gb=0"
WHO = {
    f"GIT_{role}_{key}": f"bench{at}"
    for role in ("AUTHOR", "COMMITTER")
    for key, at in (("NAME", ""), ("EMAIL", "@localhost"))
}


class Cost(NamedTuple):
    """Seconds of the clock by stage and of the whole command, its CPU-seconds, and train's own measures."""

    stages: dict[str, float]
    all: float
    cpu: float
    steps: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.stages["train"] + self.stages["eval"]


def run(command: list[str], folder: Path, env: dict[str, str]) -> Cost:
    """Run a command and take the time of DVC's stages from the moments at which it names them."""
    start, before, marks = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN), []
    print(f"$ {' '.join(command)}", flush=True)
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    for line in process.stdout:
        if found := re.search(r"Running stage '([\w-]+)'", line):
            marks.append((found[1], time.monotonic()))
        print(f"  {line}", end="", flush=True)
    if process.wait():
        sys.exit(f"{' '.join(command)}: exit {process.returncode}")
    ends = [at for _, at in marks[1:]] + [time.monotonic()]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    timing = folder / "logs" / "train-timing.json"
    return Cost(
        {name: end - at for (name, at), end in zip(marks, ends[: len(marks)], strict=True)},
        time.monotonic() - start,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        json.loads(timing.read_text()) if timing.is_file() else {},
    )


def compare(runs: dict[str, Cost]) -> None:
    print("\n" + " " * 18 + "".join(f"{name:>14}" for name in runs))
    for stage in ("train", "eval"):
        print(f"{stage + ', s':<18}" + "".join(f"{cost.stages[stage]:>14.1f}" for cost in runs.values()))
    print(f"{'CPU, s, DVC too':<18}" + "".join(f"{cost.cpu:>14.1f}" for cost in runs.values()))
    for key in ("train_runtime", "step_seconds", "data_wait_share"):
        print(f"{key:<18}" + "".join(f"{cost.steps[key]:>14.3f}" for cost in runs.values()))
    first, second, without = runs.values()
    print(
        f"RESULT ratio={second.seconds / first.seconds:.3f} cpu_ratio={second.cpu / first.cpu:.3f} "
        f"uncached_ratio={second.seconds / without.seconds:.3f} uncached_cpu_ratio={second.cpu / without.cpu:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=0, help="of a search; 0: one more experiment")
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as top:
        clone = Path(top) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        (clone / "dvc.lock").unlink(missing_ok=True)  # its outs are not in this clone's cache
        env = os.environ | WHO | {"PYTHONPATH": str(clone), "PYTHONUNBUFFERED": "1"}
        dvc = [sys.executable, "-m", "dvc"]
        begin = run([*dvc, "repro", "fetch-data", "verify"], clone, env)
        first = run([*dvc, "repro"], clone, env)
        subprocess.run(["git", "add", "--all"], cwd=clone, env=env, check=True)
        subprocess.run(["git", "commit", "-qm", "first", "--allow-empty"], cwd=clone, env=env, check=True)
        if trials:
            search = run([sys.executable, "-m", "colintern", "tune", "--trials", str(trials)], clone, env)
            seconds, cpu = begin.all + first.all, begin.cpu + first.cpu
            print(
                f"RESULT trials={trials} ratio={search.all / seconds:.2f} cpu_ratio={search.cpu / cpu:.2f} "
                f"first_seconds={seconds:.1f} search_seconds={search.all:.1f}"
            )
        else:
            experiment = [*dvc, "exp", "run", "-S", f"lr={LR}"]
            second = run(experiment, clone, env)
            compare({"first": first, "second": second, "uncached": run([*experiment, "-S", NO_CACHE], clone, env)})


if __name__ == "__main__":
    main()
