"""Training data at the size of ColPali's: how long it takes to start, and how much memory.

    python -m bench.data [--folder data/bench] [--rows 118000] [--pages 39000] [--batches 500]

Input: the last commit of this repository, with recipes/demo.yaml. Output: one table; the generated set stays in the
folder, all else is done in two temporary clones, one with the generated set and one with the demo. `start` goes from
`run.build_trainer`, which first loads the training pairs, to the first batch of the Trainer's own data loader, imports
excluded and no page features kept, so that each page of a batch is read and decoded. Memory is what the kernel counts
for the largest process (RSS), and for all of them together with shared pages counted once (PSS, 5 samples a second).

The no-op `dvc repro` goes over all four stages. Only fetch-data and verify have run before it: training on 118,000
rows takes days here, so both clones get the same stand-ins for what train and eval write, by `dvc commit`. A no-op
compares hashes and never reads what such a file says.
"""

import argparse
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from PIL import Image, ImageDraw, ImageFont

from colintern.core.recipes import render_recipe
from colintern.data.formats import TrainingRow, write_training_split

ROOT = Path(__file__).parents[1]
SHARDS, DEV_PAGES, NO_OPS = 12, 200, 5
TOPICS = "revenue costs staff energy water risks sales taxes debts rents wages prices".split()
FONT = ImageFont.load_default_imagefont()  # 1 ms a page, where the outline font takes 6
STAND_INS = ("experiments/colintern/adapter_model.safetensors", "results/mteb_evaluation/task.json")


class Ran(NamedTuple):
    """What a command did: wall seconds, peak memory in MB of its largest process and of all of them, its output."""

    seconds: float
    largest: float
    together: float
    output: str


def generate(folder: Path, rows: int, pages: int) -> None:
    """Write `rows` rows over `pages` pages in shards, and a dev split; nothing where the folder is there."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    for shard in range(SHARDS):
        numbers = range(pages * shard // SHARDS, pages * (shard + 1) // SHARDS)
        # The rows of page n are those from rows * n // pages on: three or four each.
        found = [row for n in numbers for row in _rows(n, rows * (n + 1) // pages - rows * n // pages)]
        path = write_training_split(partial, "train", found)
        os.replace(path, path.with_name(f".{shard}"))
    for shard in range(SHARDS):
        os.replace(partial / "data" / f".{shard}", partial / "data" / f"train-{shard:05}-of-{SHARDS:05}.parquet")
    write_training_split(partial, "test", [row for n in range(DEV_PAGES) for row in _rows(pages + n, 1)])
    os.replace(partial, folder)


def _rows(number: int, queries: int) -> list[TrainingRow]:
    page, png = Image.new("L", (224, 336), "white"), io.BytesIO()
    draw = ImageDraw.Draw(page)
    for line, topic in enumerate(TOPICS):
        text = f"{topic} {number * 7919 * (line + 1) % 999983}"
        draw.text((10, 15 + 25 * line), text, fill="black", font=FONT)
    page.save(png, "PNG", compress_level=1)
    asked = (f"What are the {TOPICS[(number + n) % len(TOPICS)]} of report {number}?" for n in range(queries))
    return [TrainingRow(png.getvalue(), f"{number}.png", query) for query in asked]


def run(command: list[str], place: Path) -> Ran:
    """Run a command in a clone.

    Raises:
        SystemExit: with its output, where it fails.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PYTHONPATH": str(place), "PATH": path, "TQDM_DISABLE": "1"}
    started, together = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = psutil.Popen([sys.executable, "-m", *command], cwd=place, env=env, stdout=output, stderr=output)
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            together = max(together, _pss(process))
            time.sleep(0.2)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if ended[1]:
        raise SystemExit(f"{' '.join(command)} in {place}:\n{text}")
    return Ran(seconds, ended[2].ru_maxrss / 1024, together / 2**20, text)


def _pss(process: psutil.Process) -> int:
    total = 0
    with suppress(psutil.NoSuchProcess):
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                total += each.memory_full_info().pss
    return total


def clone(place: Path, train_data: str) -> Path:
    """A clone whose params.yaml is the demo recipe with other training data and no page features."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(place)], check=True)
    text = render_recipe(place / "recipes" / "demo.yaml")
    for key, value in (("train_data", train_data), ("feature_cache_gb", "0.0")):
        text, count = re.subn(rf"(?m)^{key}: .*$", f"{key}: {value}", text)
        assert count == 1, key
    (place / "params.yaml").write_text(text)
    (place / "dvc.lock").unlink()
    return place


def start(batches: int) -> None:
    """In a separate process: from params to the first batch, and `batches` more. Prints one line of JSON."""
    from colintern.data.training_set import load_training_data
    from colintern.params import load_params
    from colintern.storage.manifest import ensure_base
    from colintern.training.pairs import load_training_pairs
    from colintern.training.run import build_trainer

    params = load_params()
    base = ensure_base(params.base, params.base_revision)
    began, worked = time.perf_counter(), time.process_time()
    trainer = build_trainer(params, base, Path(".scratch/bench"))
    loader = iter(trainer.get_train_dataloader())
    next(loader)
    first, worked = time.perf_counter(), time.process_time() - worked
    for _ in range(batches):
        next(loader)
    ended = time.perf_counter()
    found = load_training_pairs(load_training_data(params), params.negatives)
    facts = {
        "start_s": first - began,
        "start_cpu_s": worked,
        "rows_per_s": batches * params.batch_size / (ended - first),
        "index_s": time.perf_counter() - ended,
        "rows": len(found["train"]),
        "pages": len({pair.page.key for pair in found["train"]}),
    }
    print(json.dumps(facts))


def no_ops(places: list[Path]) -> list[float]:
    """Median seconds of `dvc repro` in each clone where nothing is to be done, in turns."""
    for place in places:
        for name in STAND_INS:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(b"stand-in " * 100_000)
        run(["dvc", "commit", "-q", "-f", "train", "eval"], place)
    seconds: list[list[float]] = [[] for _ in places]
    for _ in range(NO_OPS):
        for place, taken in zip(places, seconds, strict=True):
            done = run(["dvc", "repro"], place)
            assert done.output.count("didn't change, skipping") == 4, done.output
            taken.append(done.seconds)
    return [statistics.median(taken) for taken in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "bench", help="of the generated set")
    parser.add_argument("--rows", type=int, default=118_000)
    parser.add_argument("--pages", type=int, default=39_000)
    parser.add_argument("--batches", type=int, default=500, help="a loader process is at its largest after 400")
    parser.add_argument("--start", action="store_true", help="what a measured process does")
    args = parser.parse_args()
    if args.start:
        start(args.batches)
        return
    folder = args.folder.absolute() / f"{args.rows}-rows-{args.pages}-pages"
    began = time.perf_counter()
    generate(folder, args.rows, args.pages)
    made = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as top:
        big, demo = clone(Path(top, "big"), "data/own/pages"), clone(Path(top, "demo"), "demo")
        (big / "data" / "own").mkdir(parents=True)
        (big / "data" / "own" / "pages").symlink_to(folder)
        fetched = run(["dvc", "repro", "fetch-data"], big)
        starts = [run(["bench.data", "--start", "--batches", str(args.batches)], big) for _ in range(2)]
        for place in (big, demo):
            run(["dvc", "repro", "verify"], place)
        no_op, demo_no_op = no_ops([big, demo])
    report(folder, made, fetched, starts, no_op, demo_no_op)


def report(folder: Path, made: float, fetched: Ran, starts: list[Ran], no_op: float, demo_no_op: float) -> None:
    """Print the table and its summary in one line."""
    first, later = (json.loads(ran.output.splitlines()[-1]) for ran in starts)
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    lines: list[tuple[str, str, Any]] = [
        ("generated set, MB", "mb", size / 1e6),
        ("time to generate it, s (0: it was there)", "generate_s", made),
        ("rows", "rows", first["rows"]),
        ("pages", "pages", first["pages"]),
        ("dvc repro fetch-data, s", "fetch_s", fetched.seconds),
        ("  its largest process, MB", "fetch_rss_mb", fetched.largest),
        ("  all its processes, MB", "fetch_pss_mb", fetched.together),
        ("first start: params to the first batch, s", "first_start_s", first["start_s"]),
        ("later start, s", "later_start_s", later["start_s"]),
        ("  CPU time of it, without the loader's processes, s", "start_cpu_s", later["start_cpu_s"]),
        ("  of it the training pairs, s", "index_s", later["index_s"]),
        ("batching, rows/s", "rows_per_s", later["rows_per_s"]),
        ("  its largest process, MB", "rss_mb", max(ran.largest for ran in starts)),
        ("  all its processes, MB", "pss_mb", max(ran.together for ran in starts)),
        ("no-op dvc repro, s", "noop_s", no_op),
        ("no-op dvc repro of the demo, s", "demo_noop_s", demo_no_op),
        ("  ratio", "noop_ratio", no_op / demo_no_op),
    ]
    for label, _, value in lines:
        print(f"{label:<52}{value:>12,.2f}" if isinstance(value, float) else f"{label:<52}{value:>12,}")
    print("RESULT " + " ".join(f"{name}={round(value, 2)}" for _, name, value in lines))


if __name__ == "__main__":
    main()
