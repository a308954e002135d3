"""Training curves of good and bad runs of the demo, and what the rules of `colintern.monitoring.health` say of them.

    python -m bench.curves                     # the confusion table of tests/curves, a second
    python -m bench.curves --record [SETTING]  # trains what is not there yet of 24 runs: half a minute of CPU each

Each run trains on 320 pages (two queries each) and is measured on 60 dev pages, which the rules see, and on 60 test
pages, which they do not. Only the runs of seed 0 were looked at while the rules were written; those of the other seeds
were recorded after that, and are shorter where the setting does not say how long.
"""

import argparse
import dataclasses
import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colintern.monitoring.guide import get_recommended_bounds
from colintern.monitoring.health import COLLAPSED, LEARNED, TOO_SLOW, UNDERTRAINED, RunHealth, assess_run
from colintern.params import Params, load_params

FOLDER = Path(__file__).parents[1] / "tests" / "curves"
PAGES, DEV, TEST, SEEDS = 320, 60, 60, (0, 2, 1)
TUNED_ON = 0  # seed
BOUNDS = get_recommended_bounds(1_028_224)  # of demo/base, which all of them are of
SHORTER = 3  # epochs, where the seed is not 0 and the setting does not say
SMALL = {"batch_size": 16, "micro_batch_size": 16, "lr": 4e-3, "epochs": 5, "warmup_steps": 20, "threads": 1}
WITHOUT_HEAD = [r"language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"]
SHUFFLED = "queries shuffled"
SETTINGS: dict[str, dict[str, Any]] = {
    "good": {},
    "good, cosine, batch 32": {"batch_size": 32, "micro_batch_size": 32, "lr": 6e-3, "lr_scheduler": "cosine"},
    "lr 5e-5": {"lr": 5e-5},
    "lr 2e-2": {"lr": 2e-2},
    "batch 2, 1 epoch": {"batch_size": 2, "micro_batch_size": 2, "epochs": 1},
    "1 epoch": {"epochs": 1},
    "head frozen": {"lora_targets": WITHOUT_HEAD},
    SHUFFLED: {},
}

# The verdict that is right, by what was done to the run and not by what came of it.
EXPECTED = {
    "good": LEARNED,
    "good, cosine, batch 32": LEARNED,
    "lr 5e-5": TOO_SLOW,
    "lr 2e-2": COLLAPSED,
    "batch 2, 1 epoch": COLLAPSED,
    "1 epoch": UNDERTRAINED,
    "head frozen": LEARNED,
    SHUFFLED: COLLAPSED,
}
VERDICTS = (LEARNED, UNDERTRAINED, TOO_SLOW, COLLAPSED)


def record(setting: str, seed: int, params: Params, base: Path) -> dict[str, Any]:
    """Train once; the rows of the log, rounded to four digits, the params that are not as in params.yaml, and the
    score on test pages."""
    from transformers import set_seed

    from colintern.encoding.page_features import Page, PageFeatures
    from colintern.modeling.lora import add_lora
    from colintern.modeling.processor import ColIntern3_5Processor
    from colintern.modeling.retriever import ColIntern3_5
    from colintern.training.pairs import TrainingDataset, TrainingPair
    from colintern.training.run import assemble_trainer, build_training_arguments
    from colintern.training.trainer import RetrievalEvaluator
    from demo.corpus import generate_corpus

    params = dataclasses.replace(params, workers=0, save_steps=10**6, **changes(setting, seed))

    def pairs(split: str, pages: int, queries: int) -> list[TrainingPair]:
        drawn = generate_corpus(split, pages, queries, seed=7)
        return [TrainingPair(query, Page.from_image(page.image)) for page in drawn for query in page.queries]

    set_seed(seed)
    model = ColIntern3_5.from_pretrained(base, seed=seed, dtype="float32", attn_implementation="sdpa")
    processor = ColIntern3_5Processor.from_pretrained(
        base, max_visual_tokens=params.max_visual_tokens, max_query_tokens=params.max_query_tokens
    )
    wrapped = add_lora(model, params.lora_targets, params.lora_rank, params.lora_alpha, params.lora_dropout)
    train, dev, test = pairs("train", PAGES, 2), pairs("dev", DEV, 1), pairs("test", TEST, 1)
    if setting == SHUFFLED:
        queries = [pair.query for pair in train]
        random.Random(seed).shuffle(queries)
        train = [pair._replace(query=query) for pair, query in zip(train, queries, strict=True)]
    features = PageFeatures(wrapped, processor, Path(".scratch/curves"), 1.0, "exact")
    features.precompute([pair.page for pair in (*train, *dev, *test)], workers=0)
    with tempfile.TemporaryDirectory() as scratch:
        args = build_training_arguments(params, Path(scratch), quiet=True)
        args.eval_steps = len(train) // params.batch_size
        evaluator = RetrievalEvaluator(dev, features, params.eval_batch_size)
        trainer = assemble_trainer(params, wrapped, processor, args, evaluator, TrainingDataset(train, features))
        trainer.train()
    evaluator = RetrievalEvaluator(test, features, params.eval_batch_size)
    log = [row for row in trainer.state.log_history if "loss" in row or "eval_ndcg_at_5" in row]
    return {
        "setting": setting,
        "seed": seed,
        "params": changes(setting, seed),
        "pages": DEV,
        "test_ndcg_at_5": evaluator.compute_ndcg(*evaluator.embed(wrapped, processor)),
        "log": [{key: float(f"{value:.4g}") for key, value in row.items()} for row in log],
    }


def place(setting: str, seed: int) -> Path:
    return FOLDER / f"{setting.replace(', ', '-').replace(' ', '_')}-{seed}.json"


def changes(setting: str, seed: int) -> dict[str, Any]:
    """The params of a run that are not those of params.yaml."""
    return SMALL | ({"epochs": SHORTER} if seed else {}) | SETTINGS[setting]


def record_all(settings: list[str], base: Path, seeds: tuple[int, ...] = SEEDS) -> None:
    params = load_params()
    FOLDER.mkdir(exist_ok=True)
    for seed in seeds:
        for setting in settings:
            file = place(setting, seed)
            if not file.is_file():
                found = record(setting, seed, params, base)
                file.write_text(json.dumps(found).replace("}, {", "},\n {") + "\n")
                print(f"{file.name}: test NDCG@5 {found['test_ndcg_at_5']:.3f}", flush=True)


def judge(file: Path) -> tuple[dict[str, Any], RunHealth]:
    """A recorded run and what the rules say of it."""
    found = json.loads(file.read_text())
    chance = sum(1 / math.log2(rank + 1) for rank in range(1, 6)) / found["pages"]
    return found, assess_run(found["log"], dataclasses.replace(load_params(), **found["params"]), chance, BOUNDS)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Expected (rows) against judged (columns), counted."""
    counts = Counter(rows)
    lines = [f"{'expected':<14}" + "".join(f"{name:>14}" for name in VERDICTS)]
    for expected in VERDICTS:
        lines.append(f"{expected:<14}" + "".join(f"{counts[expected, name] or '.':>14}" for name in VERDICTS))
    return "\n".join(lines)


def judge_all() -> str:
    """Every recorded run, the confusion tables and the RESULT line."""
    lines = [f"{'run':<30}{'test NDCG@5':>12}  {'expected':<14}judged"]
    groups: dict[str, list[tuple[str, str]]] = {"tuned on": [], "held out": []}
    for file in sorted(FOLDER.glob("*.json")):
        found, judgement = judge(file)
        expected = EXPECTED[found["setting"]]
        wrong = "" if judgement.verdict == expected else "  WRONG"
        name = f"{found['setting']}, seed {found['seed']}"
        lines.append(f"{name:<30}{found['test_ndcg_at_5']:>12.3f}  {expected:<14}{judgement.verdict}{wrong}")
        groups["tuned on" if found["seed"] == TUNED_ON else "held out"].append((expected, judgement.verdict))
    result = "RESULT"
    for name, rows in groups.items():
        lines += ["", f"{name}: expected (rows) against judged (columns)", table(rows)]
        key = name.replace(" ", "_")
        result += f" {key}_right={sum(a == b for a, b in rows)} {key}={len(rows)}"
    return "\n".join([*lines, "", result])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs="*", metavar="SETTING", choices=list(SETTINGS))
    args = parser.parse_args()
    if args.record is not None:
        import torch

        torch.set_num_threads(1)
        record_all(args.record or list(SETTINGS), Path("demo/base"))
    print(judge_all())


if __name__ == "__main__":
    main()
