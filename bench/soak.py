"""Kill `dvc repro` at random moments until it is through, again and again, and compare what it ends on.

    python -m bench.soak [--kills 100] [--seed 0] [--folder FOLDER]

Each round deletes the outs of train and eval, and the run cache, in a copy of this repository whose demo is cut down to
160 pages; starts `dvc repro`; kills its whole process group with SIGKILL after a random time; and starts it again,
until it ends by itself. The moments fall into the starts of the stages, steps, saves, evaluation, and DVC's own commit.
DVC writes `.dvc/tmp/rwlock` and `dvc.lock` in place, so a kill can leave them cut off, and DVC then refuses to start:
where it does, what docs/troubleshooting.md says is done here too, and counted as `mended`. Ends with RESULT identical=N
of=N: rounds whose adapter and metrics are those of an undisturbed run, byte for byte.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WATCHED = ("experiments/colintern/adapter_model.safetensors", "experiments/colintern/trainer_state.json",
           "plots/train.csv", "plots/dev.csv", "metrics/train.json", "metrics/eval.json", "dvc.lock")  # fmt: skip
SMALL = {"epochs": 2, "save_steps": 3, "logging_steps": 2, "warmup_steps": 2, "dev_queries": 10, "lora_dropout": 0.1}


def copy(folder: Path) -> None:
    """The tracked files as they are here, with a small demo."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    sources = folder / "colintern" / "data" / "sources.py"
    text, changed = re.subn(r"= 8000, 100, 200", "= 160, 20, 20", sources.read_text())
    assert changed == 1
    sources.write_text(text)
    params = folder / "params.yaml"
    for key, value in SMALL.items():
        text, changed = re.subn(rf"(?m)^{key}: \S+", f"{key}: {value}", params.read_text())
        assert changed == 1, key
        params.write_text(text)
    for command in ("git init -q", "git add -A", "git -c user.name=soak -c user.email=soak@localhost commit -qm soak"):
        subprocess.run(command.split(), cwd=folder, check=True)


def repro(folder: Path, seconds: float | None = None) -> int | None:
    """`dvc repro`; killed, with all it has started, after so many seconds: then None."""
    env = os.environ | {"PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(folder / ".site")}
    with (folder / ".soak.log").open("w") as log:
        started = subprocess.Popen(
            ["dvc", "repro"], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return started.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
            return None


def mend(folder: Path) -> bool:
    """Remove the file that DVC reports as torn, as a user would; return whether there was one."""
    log = (folder / ".soak.log").read_text()
    if "rwlock" in log and "corrupted" in log:
        (folder / ".dvc" / "tmp" / "rwlock").unlink()
    elif "dvc.lock' validation failed" in log or "dvc.lock' is invalid" in log:
        subprocess.run(["git", "checkout", "-q", "dvc.lock"], cwd=folder, check=True)
    else:
        return False
    return True


def forget(folder: Path) -> None:
    """Leave nothing of train and eval: neither outs nor what DVC has kept of them."""
    for name in (
        "experiments",
        "results",
        ".scratch",
        ".dvc/cache",
        "metrics/train.json",
        "metrics/eval.json",
        "dvc.lock",
    ):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def found(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in WATCHED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="colintern-soak-"))
    copy(folder)
    began = time.monotonic()
    assert repro(folder) == 0, (folder / ".soak.log").read_text()[-3000:]
    whole, span = found(folder), time.monotonic() - began
    print(f"an undisturbed run takes {span:.0f} s")
    moments = random.Random(args.seed)
    kills = rounds = identical = mended = 0
    while kills < args.kills:
        forget(folder)
        while (code := repro(folder, moments.uniform(0.2, span) if kills < args.kills else None)) != 0:
            if code is None:
                kills += 1
            elif mend(folder):
                mended += 1
            else:
                break
        rounds += 1
        same = code == 0 and found(folder) == whole
        identical += same
        print(f"round {rounds}: {kills} kills so far, {'the same bytes' if same else 'NOT THE SAME'}", flush=True)
        if not same:
            print((folder / ".soak.log").read_text()[-2000:])
    if not args.folder:
        shutil.rmtree(folder)
    print(f"RESULT kills={kills} rounds={rounds} identical={identical} of={rounds} mended={mended}")


if __name__ == "__main__":
    main()
