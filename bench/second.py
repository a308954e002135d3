"""What a second experiment costs: train + eval of `dvc exp run -S lr=...` after a `dvc repro` on the demo.

    python -m bench.second

A clone of HEAD in a temporary folder, the environment of the caller, an empty feature cache. The tower's work is done
once, by the first run; what is left of the second is what the cache cannot save. Ends with a line RESULT.
"""

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
LR = "0.005"
WHO = {
    f"GIT_{role}_{key}": f"bench{at}"
    for role in ("AUTHOR", "COMMITTER")
    for key, at in (("NAME", ""), ("EMAIL", "@localhost"))
}


class Cost(NamedTuple):
    """Seconds of the clock by stage, CPU-seconds of the whole command, and train's own measures."""

    stages: dict[str, float]
    cpu: float
    steps: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.stages["train"] + self.stages["eval"]


def run(command: list[str], folder: Path, env: dict[str, str]) -> Cost:
    """Run a command of DVC's and take the time of its stages from the moments at which it names them."""
    before, marks = resource.getrusage(resource.RUSAGE_CHILDREN), []
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
        {name: end - at for (name, at), end in zip(marks, ends, strict=True)},
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        json.loads(timing.read_text()) if timing.is_file() else {},
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as top:
        clone = Path(top) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        (clone / "dvc.lock").unlink(missing_ok=True)  # its outs are not in this clone's cache
        env = os.environ | WHO | {"PYTHONPATH": str(clone), "PYTHONUNBUFFERED": "1"}
        dvc = [sys.executable, "-m", "dvc"]
        run([*dvc, "repro", "fetch-data", "verify"], clone, env)
        first = run([*dvc, "repro"], clone, env)
        subprocess.run(["git", "add", "--all"], cwd=clone, env=env, check=True)
        subprocess.run(["git", "commit", "-qm", "first"], cwd=clone, env=env, check=True)
        second = run([*dvc, "exp", "run", "-S", f"lr={LR}"], clone, env)
    print("\n             first   second")
    for stage in ("train", "eval"):
        print(f"{stage:9} {first.stages[stage]:7.1f} s {second.stages[stage]:6.1f} s")
    print(f"{'CPU':9} {first.cpu:7.1f} s {second.cpu:6.1f} s, with DVC's own")
    for key in ("train_runtime", "step_seconds", "data_wait_share"):
        print(f"{key:16} {first.steps[key]:8.3f} {second.steps[key]:8.3f}")
    ratio = second.seconds / first.seconds
    print(
        f"RESULT ratio={ratio:.3f} first_seconds={first.seconds:.1f} second_seconds={second.seconds:.1f} "
        f"cpu_ratio={second.cpu / first.cpu:.3f}"
    )


if __name__ == "__main__":
    main()
