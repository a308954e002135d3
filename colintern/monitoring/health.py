"""Rules of training health: judge a run by its logged rows alone, while it runs and at its end.

A loss is compared with log(P), the loss of a model that cannot distinguish the P pages of a batch: the training guide's
2.40 -> 1.50 is 0.87 to 0.54 of log(16). So every loss here is a share of log(P), or, for a symmetric loss with hard
negatives, whose other half compares the B queries only, of the mean of log(P) and log(B). The rules use neither time
nor machine (see `monitors` for those), and rows rounded to four digits suffice: two runs of one identity, one of them
interrupted, get the same findings. `python -m bench.curves` checks the rules against recorded runs.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean, median
from textwrap import wrap
from typing import NamedTuple

from colintern.monitoring.guide import RecommendedBounds
from colintern.params import Params
from colintern.scoring.metrics import DEV_TITLE, EVAL_KEY

LogRow = dict[
    str, float
]  # as in trainer_state.json: step, epoch, and loss, grad_norm and learning_rate, or a dev score
HEALTH = "health.json"  # in an adapter's folder: the verdict and the value of each rule
OK, WARN, BAD = "ok", "warn", "bad"
# Verdicts of a whole run.
DIVERGED, COLLAPSED, TOO_SLOW, UNDERTRAINED, LEARNED = "diverged", "collapsed", "too slow", "undertrained", "learned"
# Shares of log(P).
UNTRAINED_THRESHOLD = 0.97  # the guide's "too slow" is 2.35 of 2.40, 0.98
SLOW_THRESHOLD = 0.85  # after an epoch
UNDERTRAINED_THRESHOLD = 0.65  # at the end of a run
MAX_JUMP = 0.05  # difference of successive rows
GUIDE_LOSSES = [loss / math.log(16) for loss in (1.50, 1.20, 1.00, 0.85, 0.75)]  # by epoch, of healthy training
MIN_GRAD_NORM = 0.1  # norm
SPIKE_FACTOR = 5  # times the median norm
MIN_ROWS = 3
CHECK_DATA = "look whether the queries belong to their pages"


class HealthFinding(NamedTuple):
    """The result of one rule. `verdict`: ok, warn or bad; `value`: the number that decided; `remedy`: "" where ok."""

    name: str
    verdict: str
    value: float
    seen: str
    rule: str
    remedy: str


class RunHealth(NamedTuple):
    """The verdict on a run, its cause and what to do ("" where it learned), and the findings of all rules."""

    verdict: str
    why: str
    remedy: str
    findings: list[HealthFinding]


class RuleResult(NamedTuple):
    """What a rule returns; None in its place if it is too early or there is nothing to check."""

    is_warning: bool
    is_bad: bool
    value: float
    seen: str
    remedy: str


def make_finding(
    name: str, rule: str, is_warning: bool, is_bad: bool, value: float, seen: str, remedy: str
) -> HealthFinding:
    """Build a finding; bad takes precedence over warning, and what is ok has no remedy."""
    verdict = BAD if is_bad else WARN if is_warning else OK
    return HealthFinding(name, verdict, value, seen, rule, remedy if verdict != OK else "")


class LossCurve:
    """A log history with the quantities that the rules need; `is_done`: the last steps may be in no row."""

    def __init__(
        self, log: Sequence[LogRow], params: Params, random_ndcg: float, bounds: RecommendedBounds, is_done: bool
    ):
        self.params, self.random_ndcg, self.bounds, self.is_done = params, random_ndcg, bounds, is_done
        self.rows = [row for row in log if "loss" in row]
        evaluations = [row for row in log if EVAL_KEY in row]
        self.dev_scores = [row[EVAL_KEY] for row in evaluations]
        self.last_evaluation = evaluations[-1]["step"] if evaluations else 0
        pages = params.batch_size * (1 + params.negatives)
        mirrored = params.batch_size if params.symmetric_loss else pages  # hard negatives have no query
        untrained = (math.log(max(2, pages)) + math.log(max(2, mirrored))) / 2
        self.unit = f"log({pages})" if mirrored == pages else f"{untrained:.2f}"
        self.losses = [row["loss"] / untrained for row in self.rows]
        self.last_tenth = self.losses[-max(1, len(self.losses) // 10) :]
        if self.rows:
            self.step, self.epoch = int(self.rows[-1]["step"]), self.rows[-1]["epoch"]
            self.max_steps = params.epochs * self.step / self.epoch
            # By the steps of an epoch; the data may have up to a batch more.
            self.num_pairs = round(self.max_steps / params.epochs) * params.batch_size

    @property
    def min_dev_score(self) -> float:
        """Return the dev score below which a ranking counts as random; lower where there are only a few pages."""
        return min(2 * self.random_ndcg, (1 + self.random_ndcg) / 2)

    @property
    def rows_after_warmup(self) -> list[LogRow]:
        """Return the rows after the warm-up, or after a fifth of the rows if that is later."""
        fifth = len(self.rows) // 5
        return [row for i, row in enumerate(self.rows) if row["step"] > self.params.warmup_steps and i >= fifth]

    @property
    def early_epoch(self) -> float:
        """Return the epoch after which a loss should have fallen: 1, or a quarter of a run of fewer than four."""
        warm = 2 * self.params.warmup_steps / self.max_steps * self.params.epochs  # not within twice the warm-up
        return min(1, max(self.params.epochs / 4, warm))

    @property
    def early_loss(self) -> float:
        """Return the loss at `early_epoch`."""
        return self.mean_loss_at(self.early_epoch, self.early_epoch)

    def mean_loss_at(self, end: float, length: float) -> float:
        """Return the mean loss of the last quarter of `length` epochs before `end`, else of the row nearest to it."""
        rows = [(row["epoch"], loss) for row, loss in zip(self.rows, self.losses, strict=True)]
        quarter = [loss for epoch, loss in rows if end - length / 4 < epoch <= end]
        return mean(quarter or [min(rows, key=lambda row: abs(row[0] - end))[1]])


def suggest_lower_lr(params: Params, bounds: RecommendedBounds) -> str:
    """Suggest a third of the lr, or the lowest of the bounds, for unstable training."""
    low, high = bounds.lr
    lr = min(max(params.lr / 3, low), high)
    warmup = f"more warmup_steps than {params.warmup_steps}"
    if lr >= params.lr:
        return f"{warmup} (no lr below {low:g} is recommended for a base of this size)"
    return f"lr: {lr:.2g}{', the lowest for a base of this size,' if lr == low else ','} or {warmup}"


def suggest_higher_lr(params: Params, bounds: RecommendedBounds) -> str:
    """Suggest three times the lr, clipped to the bounds, for slow training; at the upper bound also more epochs."""
    low, high = bounds.lr
    lr = min(max(3 * params.lr, low), high)
    epochs = f"epochs: {2 * params.epochs}"
    if lr == params.lr:
        return f"{epochs} (no lr above {high:g} is recommended for a base of this size)"
    return f"lr: {lr:.2g}" + (f", the highest for a base of this size, and {epochs}" if lr == high else "")


def suggest_larger_batch(curve: LossCurve, batch_size: int) -> str:
    """Suggest a batch size, or more data if the data cannot fill it; "" if the batch is as large already."""
    if curve.params.batch_size >= batch_size:
        return ""
    if batch_size > curve.num_pairs:
        return f"more training pairs: batch_size {batch_size} is recommended, an epoch has only {curve.num_pairs}"
    return f"batch_size: {batch_size}"


def suggest_fix(curve: LossCurve) -> str:
    """Suggest what to do about a loss that does not fall."""
    scores = curve.dev_scores
    has_lost_score = bool(scores) and scores[-1] < curve.min_dev_score <= max(scores)
    has_risen = mean(curve.last_tenth) > 1.1 * min(curve.losses)
    is_unstable = gradient_vanished(curve) or has_lost_score or has_risen
    if not is_unstable and curve.params.warmup_steps >= curve.max_steps:  # lr has never reached its peak
        return f"warmup_steps: {int(curve.max_steps / 10)}"
    lr = (suggest_lower_lr if is_unstable else suggest_higher_lr)(curve.params, curve.bounds)
    return "; ".join(filter(None, [lr, suggest_larger_batch(curve, curve.bounds.batch), f"else {CHECK_DATA}"]))


def gradient_vanished(curve: LossCurve) -> bool:
    """Return whether the gradient is gone while the loss is still high."""
    norms = [row["grad_norm"] for row in curve.rows if "grad_norm" in row]
    last_norms = norms[-len(curve.last_tenth) :]
    return bool(norms) and median(last_norms) < MIN_GRAD_NORM and mean(curve.last_tenth) > SLOW_THRESHOLD


Rule = Callable[[LossCurve], RuleResult | None]
RULES: dict[str, tuple[str, Rule]] = {}  # in the order of their findings


def register_rule(name: str, text: str) -> Callable[[Rule], Rule]:
    """Register a rule with the text that describes it."""

    def register(check: Rule) -> Rule:
        RULES[name] = text, check
        return check

    return register


@register_rule("finite", "a loss or norm that is not finite is bad")
def _check_finite(curve: LossCurve) -> RuleResult | None:
    numbers = [row[key] for row in curve.rows for key in ("loss", "grad_norm") if key in row]
    num_wrong = sum(not math.isfinite(number) for number in numbers)
    seen = f"{num_wrong} of {len(numbers)} losses and norms are NaN or infinite"
    return RuleResult(False, num_wrong > 0, num_wrong, seen, suggest_lower_lr(curve.params, curve.bounds))


@register_rule("loss now", f"above {UNTRAINED_THRESHOLD} of log(P) after twice the warm-up warn, after an epoch bad")
def _check_loss_floor(curve: LossCurve) -> RuleResult | None:
    if curve.step <= 2 * curve.params.warmup_steps or len(curve.losses) < 2 * MIN_ROWS:
        return None
    share = mean(curve.last_tenth if len(curve.last_tenth) >= MIN_ROWS else curve.losses[-MIN_ROWS:])
    is_untrained, is_early = share > UNTRAINED_THRESHOLD, not curve.is_done and curve.epoch < 1
    seen = f"{share:.2f} of {curve.unit}"
    return RuleResult(is_untrained, is_untrained and not is_early, share, seen, suggest_fix(curve))


@register_rule(
    "early loss",
    f"above {SLOW_THRESHOLD} of log(P) after an epoch or a quarter run warn, above {UNTRAINED_THRESHOLD} bad",
)
def _check_early_loss(curve: LossCurve) -> RuleResult | None:
    if not curve.is_done and curve.epoch < curve.early_epoch:
        return None
    share = curve.early_loss
    seen = f"{curve.losses[0]:.2f} -> {share:.2f} of {curve.unit}"
    return RuleResult(share > SLOW_THRESHOLD, share > UNTRAINED_THRESHOLD, share, seen, suggest_fix(curve))


@register_rule("loss by epoch", f"above {UNDERTRAINED_THRESHOLD} of log(P) at the end warn, above {SLOW_THRESHOLD} bad")
def _check_loss_by_epoch(curve: LossCurve) -> RuleResult | None:
    epochs = curve.params.epochs
    if not curve.is_done and int(curve.epoch) < epochs:
        return None
    losses = [curve.mean_loss_at(end, 1) for end in range(1, epochs + 1)]
    guide, ours = (" ".join(f"{share:.2f}" for share in shares[:5]) for shares in (GUIDE_LOSSES[:epochs], losses))
    seen = f"{ours}{' ...' if epochs > 5 else ''}; the guide's {guide}"
    remedy = f"epochs: {max(5, 2 * epochs)}" if curve.early_loss <= SLOW_THRESHOLD else suggest_fix(curve)
    return RuleResult(losses[-1] > UNDERTRAINED_THRESHOLD, losses[-1] > SLOW_THRESHOLD, losses[-1], seen, remedy)


@register_rule("steady loss", f"rows that jump by {MAX_JUMP} of log(P) warn, by {2 * MAX_JUMP} bad: oscillating")
def _check_oscillation(curve: LossCurve) -> RuleResult | None:
    num_warm = len(curve.rows_after_warmup)
    if num_warm < 2 * MIN_ROWS:
        return None
    losses = curve.losses[-num_warm:]
    # Second differences ignore a steady fall, and their median the step from one epoch to the next.
    jump = median(abs(b - (a + d) / 2) for a, b, d in zip(losses, losses[1:], losses[2:], strict=False))
    (low, high), lr = curve.bounds.lr, curve.params.lr
    lower = min(max(lr / 2, low), high)
    batch = suggest_larger_batch(curve, max(curve.bounds.batch, 2 * curve.params.batch_size))
    remedy = ", ".join(filter(None, [batch, f"lr: {lower:.2g}" if lower < lr else ""]))
    seen = f"rows jump by {jump:.3f} of {curve.unit}"
    return RuleResult(jump > MAX_JUMP, jump > 2 * MAX_JUMP, jump, seen, remedy)


@register_rule(
    "gradient norm", f"{SPIKE_FACTOR} x the median in 5 % of the rows warn, in 20 % bad; below {MIN_GRAD_NORM} bad"
)
def _check_gradient(curve: LossCurve) -> RuleResult | None:
    norms = [row["grad_norm"] for row in curve.rows_after_warmup if "grad_norm" in row]
    if len(norms) < 2 * MIN_ROWS:
        return None
    usual = median(norms)
    spikes = sum(norm > SPIKE_FACTOR * usual for norm in norms) / len(norms)
    seen = f"{usual:.2g} (guide: 1-3), highest {max(norms):.2g}, {spikes:.0%} spikes"
    is_bad = gradient_vanished(curve) or spikes > 0.2
    return RuleResult(spikes > 0.05, is_bad, usual, seen, suggest_lower_lr(curve.params, curve.bounds))


@register_rule("learning rate", "a warm-up over 0.25 of the run warn; rises after it, or all of the run, bad")
def _check_learning_rate(curve: LossCurve) -> RuleResult | None:
    rows = [row for row in curve.rows if "learning_rate" in row]
    share = curve.params.warmup_steps / curve.max_steps
    rates = [row["learning_rate"] for row in rows if row["step"] > curve.params.warmup_steps + 1]
    is_rising = any(later > earlier * 1.001 for earlier, later in pairwise(rates))
    highest = max((row["learning_rate"] for row in rows), default=0.0)
    is_wrong = is_rising or highest > curve.params.lr * 1.001 or share >= 1
    seen = f"up to {highest:.2g} of {curve.params.lr:g}, warm-up {share:.0%} of {curve.max_steps:.0f} steps"
    return RuleResult(share > 0.25, is_wrong, share, seen, f"warmup_steps: {int(curve.max_steps / 10)}")


@register_rule(DEV_TITLE, "below 0.8 of its best warn, below twice chance bad")
def _check_dev_score(curve: LossCurve) -> RuleResult | None:
    if not curve.dev_scores or (not curve.is_done and curve.last_evaluation <= 2 * curve.params.warmup_steps):
        return None
    last, best, lowest = curve.dev_scores[-1], max(curve.dev_scores), curve.min_dev_score
    seen = f"{last:.3f}, best {best:.3f}, chance {curve.random_ndcg:.3f}"
    fewer = "fewer epochs, or " if curve.params.epochs > curve.bounds.epochs else ""
    remedy = suggest_fix(curve) if last < lowest else fewer + suggest_lower_lr(curve.params, curve.bounds)
    return RuleResult(last < 0.8 * best, last < lowest, last, seen, remedy)


def apply_rules(curve: LossCurve) -> list[HealthFinding]:
    """Return the finding of each rule on the rows so far, in the order of `RULES`; without rules that need more."""
    if not curve.rows:
        return []
    results = ((name, text, check(curve)) for name, (text, check) in RULES.items())
    return [make_finding(name, text, *result) for name, text, result in results if result]


def assess_run(log: Sequence[LogRow], params: Params, random_ndcg: float, bounds: RecommendedBounds) -> RunHealth:
    """Assess a finished run.

    Its verdict is the first that applies: `diverged` (something is not finite), `collapsed` (it ends with the loss of
    an untrained model, or a random ranking), `too slow` (the loss ends high, and was high early), `undertrained` (it
    ends high, but fell from the start), `learned`.
    """
    curve = LossCurve(log, params, random_ndcg, bounds, is_done=True)
    findings = apply_rules(curve)
    by_name = {finding.name: finding for finding in findings}

    def is_judged(name: str, *verdicts: str) -> bool:
        return name in by_name and by_name[name].verdict in verdicts

    is_flat = mean(curve.last_tenth) > UNTRAINED_THRESHOLD
    if is_judged("finite", BAD):
        verdict, cause = DIVERGED, "finite"
    elif is_flat or is_judged(DEV_TITLE, BAD):
        verdict, cause = COLLAPSED, "loss by epoch" if is_flat else DEV_TITLE
    elif is_judged("loss by epoch", WARN, BAD):
        is_slow = is_judged("early loss", WARN, BAD)
        verdict, cause = (TOO_SLOW, "early loss") if is_slow else (UNDERTRAINED, "loss by epoch")
    else:
        return RunHealth(LEARNED, "", "", findings)
    return RunHealth(verdict, f"{cause}: {by_name[cause].seen}", by_name[cause].remedy, findings)


def format_finding(finding: HealthFinding) -> str:
    """Format a finding with its remedy, at most 80 columns wide."""
    text = f"{finding.verdict:<5}{finding.name:<15}{finding.seen}"
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    return "\n".join(wrap(text + remedy, 80, subsequent_indent=" " * 20, break_long_words=False))


def format_health(health: RunHealth) -> str:
    """Format all findings and the verdict with its remedy, which the findings do not repeat; at most 80 columns."""
    last = f"training health: {health.verdict}"
    if health.why:
        last += f"; {health.why} -> {health.remedy}"
    shown = (f._replace(remedy="") if f.remedy == health.remedy else f for f in health.findings)
    return "\n".join([*map(format_finding, shown), *wrap(last, 80, subsequent_indent="  ")])


def findings_to_json(findings: Sequence[HealthFinding]) -> dict[str, dict[str, float | str]]:
    """Return the value of every rule, and verdict and remedy of those that are not ok."""
    return {
        "values": {finding.name: round(finding.value, 4) for finding in findings},
        "wrong": {
            finding.name: f"{finding.verdict} -> {finding.remedy}" for finding in findings if finding.verdict != OK
        },
    }
