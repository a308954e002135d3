"""The rules of training health: on recorded runs, on curves made for each, and as they are said while a run goes."""

import dataclasses
import itertools
import json
import math
import os
import re
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from bench.curves import EXPECTED, FOLDER, TUNED_ON, judge
from colintern.monitoring.guide import get_recommended_bounds
from colintern.monitoring.health import (
    BAD,
    OK,
    WARN,
    LossCurve,
    apply_rules,
    assess_run,
    findings_to_json,
    format_finding,
    format_health,
)
from colintern.monitoring.monitors import LossCurveMonitor, ThroughputMonitor, check_throughput, get_memory_share
from colintern.params import load_params, load_recipe

CURVES = sorted(FOLDER.glob("*.json"))
PARAMS = dataclasses.replace(load_recipe(ROOT / "recipes" / "demo.yaml"), epochs=4, warmup_steps=10)
CHANCE = 0.03
BOUNDS = get_recommended_bounds(1_028_224)  # of demo/base: lr 3e-3 to 1e-2, batch 32
REMEDIES = {
    "good": "",
    "good, cosine, batch 32": "",
    "lr 5e-5": "lr: 0.003;",
    "lr 2e-2": "lr: 0.0067,",
    "batch 2, 1 epoch": "batch_size: 32",
    "1 epoch": "epochs: 5",
    "head frozen": "",
    "queries shuffled": "whether the queries belong to their pages",
}


def test_there_are_enough_curves():
    runs = [json.loads(file.read_text()) for file in CURVES]
    assert len(runs) >= 20 and {run["setting"] for run in runs} == set(EXPECTED)
    assert sum(run["seed"] != TUNED_ON for run in runs) * 3 >= len(runs), "a third is held out"


@pytest.mark.parametrize("file", CURVES, ids=lambda file: file.stem)
def test_a_recorded_run_is_judged_by_what_was_done_to_it(file):
    found, judgement = judge(file)
    assert judgement.verdict == EXPECTED[found["setting"]]
    assert REMEDIES[found["setting"]] in judgement.remedy
    assert bool(judgement.remedy) == (judgement.verdict != "learned")
    assert max(map(len, format_health(judgement).splitlines())) <= 80


@pytest.mark.parametrize("name", ["good", "lr_2e-2", "lr_5e-5"])
def test_more_digits_and_longer_logs_change_no_verdict(name):
    """Rows between, as with half the logging_steps, and rows left out."""
    found, judgement = judge(FOLDER / f"{name}-0.json")
    params = dataclasses.replace(load_params(), **found["params"])
    chance = judgement_chance(found)
    losses = [row for row in found["log"] if "loss" in row]
    rest = [row for row in found["log"] if "loss" not in row]
    assert assess_run([*losses[1::2], *rest], params, chance, BOUNDS).verdict == judgement.verdict
    exact = [row | {"loss": row["loss"] * (1 + 1e-5)} for row in losses]
    assert assess_run([*exact, *rest], params, chance, BOUNDS).verdict == judgement.verdict


def judgement_chance(found) -> float:
    return sum(1 / math.log2(rank + 1) for rank in range(1, 6)) / found["pages"]


def curve(
    share=lambda x: 0.2 + 0.9 * math.exp(-6 * x),
    norm=lambda x: 1.5,
    lr=None,
    dev=(0.4, 0.6, 0.7, 0.8),
    rows=40,
    pages=32,
):
    """A log of 4 epochs, 200 steps: loss as a share of log(pages), gradient norm and lr as functions of 0 < x <= 1."""
    lr = lr or (lambda x: min(x / 0.05, (1 - x) / 0.95) * PARAMS.lr)
    log = [
        {
            "step": 200 * i // rows,
            "epoch": 4 * i / rows,
            "loss": share(i / rows) * math.log(pages),
            "grad_norm": norm(i / rows),
            "learning_rate": lr(i / rows),
        }
        for i in range(1, rows + 1)
    ]
    return log + [{"step": 50 * n, "epoch": n, "eval_ndcg_at_5": score} for n, score in enumerate(dev, start=1)]


def verdicts(log, params=PARAMS) -> dict[str, str]:
    return {
        f.name: f.verdict for f in apply_rules(LossCurve(log, params, CHANCE, BOUNDS, is_done=True)) if f.verdict != OK
    }


def test_a_good_curve_breaks_no_rule():
    judgement = assess_run(curve(), PARAMS, CHANCE, BOUNDS)
    assert (judgement.verdict, judgement.why, judgement.remedy) == ("learned", "", "")
    assert [f.verdict for f in judgement.findings] == [OK] * 8


@pytest.mark.parametrize(
    ("log", "broken", "verdict"),
    [
        (curve(share=lambda x: math.nan if x > 0.5 else 1.0), {"finite": BAD}, "diverged"),
        (curve(norm=lambda x: math.inf if x > 0.9 else 1.0), {"finite": BAD}, "diverged"),
        (
            curve(share=lambda x: 1.0, norm=lambda x: 0.001, dev=(0.03,) * 4),
            {"loss now": BAD, "early loss": BAD, "loss by epoch": BAD, "gradient norm": BAD, "dev NDCG@5": BAD},
            "collapsed",
        ),
        (curve(dev=(0.5, 0.3, 0.1, 0.04)), {"dev NDCG@5": BAD}, "collapsed"),
        (curve(dev=(0.5, 0.9, 0.8, 0.6)), {"dev NDCG@5": WARN}, "learned"),
        (curve(share=lambda x: 1.0 - 0.1 * x), {"early loss": BAD, "loss by epoch": BAD}, "too slow"),
        (curve(share=lambda x: 1.1 - 0.3 * x), {"early loss": BAD, "loss by epoch": WARN}, "too slow"),
        (curve(share=lambda x: max(0.7, 1.1 - 3 * x)), {"loss by epoch": WARN}, "undertrained"),
        (curve(norm=lambda x: 30.0 if round(x * 40) % 10 == 0 else 1.5), {"gradient norm": WARN}, "learned"),
        (curve(norm=lambda x: 30.0 if round(x * 40) % 3 == 0 else 1.5), {"gradient norm": BAD}, "learned"),
        (curve(share=lambda x: 0.3 + 0.06 * (round(x * 40) % 2)), {"steady loss": WARN}, "learned"),
        (curve(share=lambda x: 0.3 + 0.2 * (round(x * 40) % 2)), {"steady loss": BAD}, "learned"),
        (curve(lr=lambda x: x * PARAMS.lr), {"learning rate": BAD}, "learned"),
        (curve(lr=lambda x: (1 - x) * 2 * PARAMS.lr), {"learning rate": BAD}, "learned"),
    ],
)
def test_each_rule_speaks_where_it_is_broken(log, broken, verdict):
    found = verdicts(log)
    assert {name: found.get(name) for name in broken} == broken
    judgement = assess_run(log, PARAMS, CHANCE, BOUNDS)
    assert judgement.verdict == verdict
    assert all(f.remedy for f in judgement.findings if f.verdict != OK)


def test_a_warm_up_longer_than_a_quarter_of_the_run_is_told_and_one_longer_than_the_run_is_bad():
    assert verdicts(curve(), dataclasses.replace(PARAMS, warmup_steps=60))["learning rate"] == WARN
    rising = curve(lr=lambda x: x * PARAMS.lr / 2)
    assert verdicts(rising, dataclasses.replace(PARAMS, warmup_steps=400))["learning rate"] == BAD


def test_hard_negatives_count_as_pages_of_the_batch():
    """The loss of a model that knows nothing is log(96) with two negatives a row: 4.56, not 3.47."""
    params = dataclasses.replace(PARAMS, negatives=2)
    flat = curve(share=lambda x: 1.0, pages=96, dev=(0.5,) * 4)
    assert assess_run(flat, params, CHANCE, BOUNDS).verdict == "collapsed"
    fallen = curve(share=lambda x: 0.9, pages=32, dev=(0.5,) * 4)  # above log(32) x 0.85, far below log(96)
    assert assess_run(fallen, PARAMS, CHANCE, BOUNDS).verdict == "too slow"
    assert verdicts(fallen, params)["loss by epoch"] == WARN


def test_the_remedy_follows_from_the_cause():
    dead = assess_run(curve(share=lambda x: 1.0, norm=lambda x: 0.001), PARAMS, CHANCE, BOUNDS)
    slow = assess_run(curve(share=lambda x: 1.0 - 0.1 * x), PARAMS, CHANCE, BOUNDS)
    short = assess_run(curve(share=lambda x: max(0.7, 1.1 - 3 * x)), PARAMS, CHANCE, BOUNDS)
    assert dead.remedy.startswith("lr: 0.003, the lowest for a base of this size, or more warmup_steps than 10;")
    assert slow.remedy.startswith("lr: 0.01, the highest for a base of this size, and epochs: 8;")
    assert short.remedy == "epochs: 8"


FAULTY_CURVES = [
    curve(share=lambda x: math.nan if x > 0.5 else 1.0),
    curve(share=lambda x: 1.0, norm=lambda x: 0.001),
    curve(share=lambda x: 1.0 - 0.1 * x),
    curve(share=lambda x: max(0.7, 1.1 - 3 * x)),
    curve(share=lambda x: 0.3 + 0.2 * (round(x * 40) % 2)),
    curve(norm=lambda x: 30.0 if round(x * 40) % 3 == 0 else 1.5),
    curve(dev=(0.5, 0.9, 0.8, 0.6)),
    curve(dev=(0.5, 0.3, 0.1, 0.04)),
]


@pytest.mark.parametrize("size", [1_028_224, 905_300_000, 4_700_000_000])
def test_remedies_stay_within_the_bounds_and_the_training_pairs(size):
    bounds = get_recommended_bounds(size)
    low, high = bounds.lr
    rates = (low / 30, low, (low * high) ** 0.5, high, 30 * high)
    for log, lr, batch, epochs in itertools.product(FAULTY_CURVES, rates, (2, 8, 32, 64, 4096), (1, 4, 8)):
        scaled = [row | {"epoch": row["epoch"] * epochs / 4} for row in log]
        params = dataclasses.replace(PARAMS, lr=lr, batch_size=batch, epochs=epochs)
        pairs = LossCurve(scaled, params, CHANCE, bounds, is_done=True).num_pairs
        assert pairs == 200 // epochs * batch
        for finding in assess_run(scaled, params, CHANCE, bounds).findings:
            assert bool(finding.remedy) == (finding.verdict != OK)
            for value in re.findall(r"\blr: ([\d.e-]+)", finding.remedy):
                assert low <= float(value) <= high and float(value) != lr, finding
            for value in re.findall(r"\bbatch_size: (\d+)", finding.remedy):
                assert max(batch + 1, bounds.batch) <= int(value) <= pairs, finding
            for value in re.findall(r"\bepochs: (\d+)", finding.remedy):
                assert int(value) > epochs, finding
            assert "fewer epochs" not in finding.remedy or epochs > bounds.epochs, finding


def test_a_batch_larger_than_the_data_is_suggested_with_more_pairs():
    few = [row | {"epoch": row["epoch"] * 10} for row in curve(share=lambda x: 1.0 - 0.1 * x)]  # 5 steps an epoch
    params = dataclasses.replace(PARAMS, batch_size=4, epochs=40)
    assert (
        "more training pairs: batch_size 32 is recommended, an epoch has only 20;"
        in assess_run(few, params, CHANCE, BOUNDS).remedy
    )


def test_a_run_of_one_epoch_is_too_slow_where_its_first_quarter_was():
    """The first curve is that of the demo with lr 5e-5: 0.94 of log(32) after a quarter, 0.80 at the end."""
    params = dataclasses.replace(PARAMS, epochs=1)
    slow, short = (
        assess_run([row | {"epoch": row["epoch"] / 4} for row in curve(share)], params, CHANCE, BOUNDS)
        for share in (lambda x: 0.8 + 0.46 * math.exp(-4.8 * x), lambda x: max(0.7, 1.1 - 3 * x))
    )
    assert (slow.verdict, slow.remedy[:9]) == ("too slow", "lr: 0.01,")
    assert (short.verdict, short.remedy) == ("undertrained", "epochs: 5")


def test_a_warm_up_that_outlasts_the_run_is_made_shorter():
    """No more of a learning rate that never came to its peak."""
    slow = curve(share=lambda x: 1.0 - 0.1 * x)
    assert assess_run(slow, dataclasses.replace(PARAMS, warmup_steps=400), CHANCE, BOUNDS).remedy == "warmup_steps: 20"


def test_a_ranking_that_was_better_before_asks_for_less_and_not_for_more(capsys):
    """Trial with lr 0.018 of a study: dev 0.454, then chance, while the loss has risen by less than a tenth."""
    replay(curve(share=lambda x: 0.8 if x < 0.4 else 0.84, dev=(0.4, 0.03)))
    said = capsys.readouterr().out
    assert "bad  dev NDCG@5" in said and "lr: 0.003, the lowest" in " ".join(said.split()) and "lr: 0.01" not in said


def test_a_run_of_one_epoch_is_not_told_to_take_fewer():
    found = assess_run(curve(dev=(0.5, 0.9, 0.8, 0.6)), dataclasses.replace(PARAMS, epochs=1), CHANCE, BOUNDS).findings
    assert [f.remedy for f in found if f.name == "dev NDCG@5"] == [
        "lr: 0.003, the lowest for a base of this size, or more warmup_steps than 10"
    ]


def test_what_is_stored_can_be_compared_and_holds_the_remedy():
    found = findings_to_json(assess_run(curve(dev=(0.5, 0.9, 0.8, 0.6)), PARAMS, CHANCE, BOUNDS).findings)
    assert found["wrong"] == {
        "dev NDCG@5": "warn -> fewer epochs, or lr: 0.003, the lowest for a base of this size, or more warmup_steps "
        "than 10"
    }
    assert found["values"]["dev NDCG@5"] == 0.6 and len(found["values"]) == 8


def test_chance_is_high_among_a_few_dev_pages():
    """Of 5 pages a random ranking scores 0.59, and no score is twice that."""
    assert assess_run(curve(dev=(0.7, 0.8, 0.9, 0.95)), PARAMS, 0.59, BOUNDS).verdict == "learned"
    assert assess_run(curve(dev=(0.7, 0.7, 0.7, 0.7)), PARAMS, 0.59, BOUNDS).verdict == "collapsed"


def test_a_symmetric_loss_with_negatives_knows_nothing_below_log_of_the_pages():
    """32 queries, 128 pages: (log 128 + log 32) / 2 = 4.16, and log 128 is 4.85."""
    params = dataclasses.replace(PARAMS, symmetric_loss=True, negatives=3, batch_size=32)
    log = curve(share=lambda x: 1.0, norm=lambda x: 0.001, dev=(0.03,) * 4, pages=64)  # (log 64) is that mean
    judged = assess_run(log, params, CHANCE, BOUNDS)
    assert judged.verdict == "collapsed" and judged.remedy.startswith("lr: 0.003, the lowest")
    assert "1.00 of 4.16" in format_health(judged)


def replay(log, start=0, params=PARAMS) -> LossCurveMonitor:
    """Show a watch the rows one by one, as the Trainer does."""
    watch = LossCurveMonitor(params)
    watch.random_ndcg, watch.bounds = CHANCE, BOUNDS
    ordered = sorted(log, key=lambda row: row["step"])
    watch.on_train_begin(None, SimpleNamespace(log_history=ordered[:start], global_step=0), None)
    for n in range(start + 1, len(ordered) + 1):
        watch.on_log(None, SimpleNamespace(log_history=ordered[:n], global_step=ordered[n - 1]["step"]), None)
    return watch


def test_while_it_runs_only_what_is_wrong_is_said_and_once(capsys):
    replay(curve())
    assert capsys.readouterr().out == ""

    replay(curve(dev=(0.03, 0.6, 0.7, 0.8)), params=dataclasses.replace(PARAMS, warmup_steps=25))
    assert capsys.readouterr().out == "", "the first dev score fell into the warm-up"

    collapsed = curve(share=lambda x: 1.0 if x > 0.2 else 0.9, norm=lambda x: 0.01, dev=(0.03,) * 4)
    replay(collapsed)
    said = capsys.readouterr().out
    assert said.count("loss now") == 1 and said.count("bad") >= 3 and "step 55:\nbad  loss now" in said
    assert max(map(len, said.splitlines())) <= 80


def test_a_resumed_run_does_not_repeat_itself_and_is_judged_the_same(capsys):
    log = curve(share=lambda x: 1.0, norm=lambda x: 0.01, dev=(0.03,) * 4)
    replay(log)
    whole = capsys.readouterr().out
    replay(log, start=20)
    rest = capsys.readouterr().out
    assert "loss now" in whole and "loss now" not in rest
    assert "early loss" in whole and "early loss" not in rest


def test_a_log_without_a_whole_epoch_in_it_is_judged_at_its_end():
    """A row every 15 of 18 steps of the only epoch; a row beyond the first epoch only."""
    params = dataclasses.replace(PARAMS, epochs=1)
    short = [{"step": 15, "epoch": 15 / 18, "loss": 3.4, "grad_norm": 2.0, "learning_rate": 1e-3}]
    assert (
        assess_run([*short, {"step": 18, "epoch": 1.0, "eval_ndcg_at_5": 0.3}], params, CHANCE, BOUNDS).verdict
        == "collapsed"
    )
    late = [{"step": 60, "epoch": 1.5, "loss": 0.5, "grad_norm": 2.0, "learning_rate": 1e-3}]
    assert assess_run(late, dataclasses.replace(PARAMS, epochs=2), CHANCE, BOUNDS).verdict == "learned"


def test_the_machines_values_are_judged_by_the_guides_bands():
    good = {"step_seconds": 2.0, "slowest_tenth_seconds": 2.5, "data_wait_share": 0.02, "memory_share": 0.5}
    gpu = {"gpu_memory_share": 0.85, "gpu_use_share": 0.97}
    assert [f.verdict for f in check_throughput(good | gpu, PARAMS)] == [OK] * 5
    poor = {"step_seconds": 30.0, "slowest_tenth_seconds": 31.0, "data_wait_share": 0.35, "memory_share": 0.95}
    worse = check_throughput(poor | {"gpu_memory_share": 0.97, "gpu_use_share": 0.6}, PARAMS)
    assert [f.verdict for f in worse] == [BAD] * 5
    assert all(len(row) <= 80 for f in worse for row in format_finding(f).splitlines())
    assert all(f.remedy for f in worse)
    on_cpu = check_throughput(poor, PARAMS)
    assert [f.verdict for f in on_cpu] == [OK, BAD, BAD], "the guide's seconds are a GPU's"


def test_memory_is_that_of_the_machine_or_of_the_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemAvailable: 400 kB\n")
    group = tmp_path / "group"
    assert get_memory_share(meminfo, group) == pytest.approx(0.6)
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    assert get_memory_share(meminfo, group) == pytest.approx(0.6)
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("950\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 50\n")
    assert get_memory_share(meminfo, group) == pytest.approx(0.9)
    assert 0 < get_memory_share() < 1


def test_without_a_step_nothing_is_measured():
    assert ThroughputMonitor(PARAMS).summarize_steps() == {} and check_throughput({}, PARAMS) == []


def test_nobody_waits_for_what_tells_the_use_of_the_gpu(monkeypatch, tmp_path):
    """It takes a while to start, in which a GPU that waits would be told to be idle."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nsleep 0.5\necho 97\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(uuid="0", total_memory=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    pace = ThroughputMonitor(PARAMS)
    start = time.monotonic()
    pace.on_log(None, None, None)
    pace.on_log(None, None, None)
    assert time.monotonic() - start < 0.4 and pace.gpu_use_shares == []
    pace.gpu_query.wait()
    pace.on_log(None, None, None)
    assert pace.gpu_use_shares == [0.97]
    pace.gpu_query.wait()
