"""How the demo answers to learning rate, epochs, batch size and rank: NDCG@5 on the held-out pages, three seeds.

    python -m bench.sensitivity [--seeds 0 1 2] [--only good poor]

Input: params.yaml as it is (`good`), data/manifest.json (dvc repro fetch-data). Output: one table; nothing is kept.
Two runs go side by side, one thread each, so a figure differs in the last bits from that of `dvc repro`.
"""

import argparse
import dataclasses
import logging
import os
import statistics
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from colintern.core.errors import exit_on_user_error
from colintern.params import Params, load_params

SETTINGS: dict[str, dict[str, Any]] = {
    "good": {},
    "poor (the guide's)": {"epochs": 1, "batch_size": 2, "micro_batch_size": 2},
    "lr 2e-2": {"lr": 2e-2},
    "lr 5e-4": {"lr": 5e-4},
    "lr 5e-5": {"lr": 5e-5},
    "2 epochs": {"epochs": 2},
    "batch 8": {"batch_size": 8, "micro_batch_size": 8},
    "rank 4": {"lora_rank": 4, "lora_alpha": 4},
}


def run(params: Params) -> tuple[float, float, str]:
    """Train and return NDCG@5 on the test pages before and after, and the verdict of the run."""
    import torch
    from pyarrow.parquet import read_table

    from colintern.data.images import decode_image
    from colintern.encoding.page_features import Page
    from colintern.monitoring.monitors import LossCurveMonitor
    from colintern.storage.manifest import ensure_base, ensure_benchmark
    from colintern.training.pairs import TrainingPair
    from colintern.training.run import build_trainer
    from colintern.training.trainer import RetrievalEvaluator

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    folder = ensure_benchmark("demo")
    corpus = [
        Page.from_image(decode_image(image["bytes"])) for image in read_table(folder / "corpus")["image"].to_pylist()
    ]
    queries = read_table(folder / "queries")["query"].to_pylist()

    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(None):  # only the table is for people
        monitor = LossCurveMonitor(params)
        trainer = build_trainer(
            params, ensure_base(params.base, params.base_revision), Path(scratch), callbacks=[monitor]
        )
        features = trainer.evaluator.features
        test = RetrievalEvaluator(list(map(TrainingPair, queries, corpus)), features, params.eval_batch_size)
        before = test.compute_ndcg(*test.embed(trainer.model, trainer.processor))
        trainer.train()
        after = test.compute_ndcg(*test.embed(trainer.model, trainer.processor))
        return before, after, monitor.assess_state(trainer.state).verdict


@exit_on_user_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="settings that begin with one of these words")
    args = parser.parse_args()
    chosen = {n: s for n, s in SETTINGS.items() if not args.only or n.startswith(tuple(args.only))}
    if not chosen:
        parser.error(f"--only {args.only}: the settings are {', '.join(SETTINGS)}")
    params = load_params()
    os.environ["TQDM_DISABLE"] = "1"  # of the processes started below
    jobs = [(name, seed) for name in chosen for seed in args.seeds]
    changed = [dataclasses.replace(params, threads=1, seed=seed, **chosen[name]) for name, seed in jobs]
    print(f"{'setting':<20}{'seed':>5}{'before':>9}{'NDCG@5':>9}  verdict")
    means: dict[str, list[float]] = {}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for (name, seed), (before, after, state) in zip(jobs, pool.map(run, changed), strict=True):
            print(f"{name:<20}{seed:>5}{before:>9.3f}{after:>9.3f}  {state}", flush=True)
            means.setdefault(name, []).append(after)
    print(f"{'mean over seeds':<34}{'NDCG@5':>9}{'lowest':>9}")
    for name, values in means.items():
        print(f"{name:<34}{statistics.mean(values):>9.3f}{min(values):>9.3f}")
    print(
        "RESULT " + " ".join(f"{n.split(' (')[0].replace(' ', '_')}={statistics.mean(v):.4f}" for n, v in means.items())
    )


if __name__ == "__main__":
    main()
