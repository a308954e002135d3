"""How a training run goes, judged by its logged rows alone, while it runs and at its end.

A loss says something only beside log(P), the loss of a model that knows nothing of the P pages of a batch: the training
guide's 2.40 -> 1.50 is from 0.87 to 0.54 of log(16). So every loss here is a share of log(P), or, for a symmetric loss
with hard negatives, whose other half knows only the B queries, of the mean of log(P) and log(B). The rules see no clock
and no machine (for those see `watch`), and rows rounded to four digits are enough for them: two runs of one identity,
one of them interrupted, are judged the same. `python -m bench.curves` holds the rules against recorded runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import mean, median
from textwrap import wrap
from typing import Any, NamedTuple

from colintern.monitoring.guide import Bounds
from colintern.params import Params

OK, WARN, BAD = "ok", "warn", "bad"
# Overall verdicts.
DIVERGED, COLLAPSED, TOO_SLOW, UNDERTRAINED, LEARNED = "diverged", "collapsed", "too slow", "undertrained", "learned"
NOTHING = 0.97  # share of log(P) from which a model knows nothing; the guide's "too slow" is 2.35 of 2.40, 0.98
SLOW, UNFIT = 0.85, 0.65  # shares of log(P): after an epoch, and at the end of a run that has learned
GUIDE = [loss / math.log(16) for loss in (1.50, 1.20, 1.00, 0.85, 0.75)]  # its healthy training, by epoch
ROUGH = 0.05  # share of log(P) by which rows may jump
DEAD, JUMP = 0.1, 5  # gradient norm below which nothing moves; times the median that is a spike
MATCH = "look whether the queries belong to their pages"
HEALTH = "health.json"  # in an adapter's folder: the verdict and what each rule found
FEW = 3  # rows without which nothing is said


class Finding(NamedTuple):
    """One rule's answer. `verdict`: ok, warn or bad; `value`: the number it was judged by; `remedy`: "" where ok."""

    name: str
    verdict: str
    value: float
    seen: str
    rule: str
    remedy: str


def judged(name: str, rule: str, warn: bool, bad: bool, value: float, seen: str, remedy: str) -> Finding:
    """A finding; `bad` wins over `warn`, and what is ok has no remedy."""
    verdict = BAD if bad else WARN if warn else OK
    return Finding(name, verdict, value, seen, rule, remedy if verdict != OK else "")


class Health(NamedTuple):
    """The verdict over all, why and what to do ("" where it learned), and every rule's finding."""

    verdict: str
    why: str
    remedy: str
    findings: list[Finding]


class Curve:
    """A log history, made ready for the rules.

    Args:
        log: rows as in trainer_state.json: step, epoch, and loss, grad_norm and learning_rate, or eval_ndcg_at_5.
        chance: NDCG@5 of a random ranking of the dev pages.
        bounds: recommended for the base's size; every remedy stays within them.
        done: the run is over, also where its last steps are in no row.
    """

    def __init__(self, log: Sequence[Mapping[str, Any]], params: Params, chance: float, bounds: Bounds, done: bool):
        self.params, self.chance, self.bounds, self.done = params, chance, bounds, done
        self.rows = [row for row in log if "loss" in row]
        asked = [row for row in log if "eval_ndcg_at_5" in row]
        self.dev = [row["eval_ndcg_at_5"] for row in asked]
        self.asked = asked[-1]["step"] if asked else 0
        pages = params.batch_size * (1 + params.negatives)
        mirrored = params.batch_size if params.symmetric_loss else pages  # a page is asked for queries, no negatives
        ignorant = (math.log(max(2, pages)) + math.log(max(2, mirrored))) / 2
        self.unit = f"log({pages})" if mirrored == pages else f"{ignorant:.2f}"
        self.losses = [row["loss"] / ignorant for row in self.rows]
        self.tail = self.losses[-max(1, len(self.losses) // 10) :]

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def steps(self) -> float:
        """Of the whole run."""
        return self.params.epochs * self.step / self.rows[-1]["epoch"]

    @property
    def pairs(self) -> int:
        """Count the training pairs that the steps of an epoch use; the data may have up to a batch more."""
        return round(self.steps / self.params.epochs) * self.params.batch_size

    @property
    def least(self) -> float:
        """The dev score below which the ranking is chance; lower where there are only a few pages."""
        return min(2 * self.chance, (1 + self.chance) / 2)

    @property
    def warm(self) -> list[Mapping[str, Any]]:
        """The rows after the warm-up, or after a fifth of the rows where that is later."""
        later = len(self.rows) // 5
        return [row for i, row in enumerate(self.rows) if row["step"] > self.params.warmup_steps and i >= later]

    @property
    def epoch_ends(self) -> list[float]:
        """The loss of each epoch that is over, see `ending`."""
        over = self.params.epochs if self.done else int(self.rows[-1]["epoch"])
        return [self.ending(end, 1) for end in range(1, over + 1)]

    @property
    def early(self) -> float:
        """The place, in epochs, where the loss of a run that is fast enough has come down: after an epoch, or a quarter
        of a run of fewer than four, but then not within twice the warm-up."""
        warm = 2 * self.params.warmup_steps / self.steps * self.params.epochs
        return min(1, max(self.params.epochs / 4, warm))

    @property
    def early_loss(self) -> float:
        return self.ending(self.early, self.early)

    def ending(self, end: float, length: float) -> float:
        """The mean loss of the last quarter of so many epochs, or of the row nearest to their end."""
        places = [(row["epoch"], loss) for row, loss in zip(self.rows, self.losses, strict=True)]
        quarter = [loss for place, loss in places if end - length / 4 < place <= end]
        return mean(quarter or [min(places, key=lambda place: abs(place[0] - end))[1]])


class Answer(NamedTuple):
    """What a rule says; None in its place where it is too early to say, or there is nothing to judge."""

    warn: bool
    bad: bool
    value: float
    seen: str
    remedy: str


def suggest_lower_lr(params: Params, bounds: Bounds) -> str:
    """Suggest a third of the lr, or the lowest of the bounds, against an unstable training."""
    low, high = bounds.lr
    lr = min(max(params.lr / 3, low), high)
    warmup = f"more warmup_steps than {params.warmup_steps}"
    if lr >= params.lr:
        return f"{warmup} (no lr below {low:g} is recommended for a base of this size)"
    return f"lr: {lr:.2g}{', the lowest for a base of this size,' if lr == low else ','} or {warmup}"


def suggest_higher_lr(params: Params, bounds: Bounds) -> str:
    """Suggest three times the lr, clipped to the bounds, for a slow training; at the upper bound also more epochs."""
    low, high = bounds.lr
    lr = min(max(3 * params.lr, low), high)
    epochs = f"epochs: {2 * params.epochs}"
    if lr == params.lr:
        return f"{epochs} (no lr above {high:g} is recommended for a base of this size)"
    return f"lr: {lr:.2g}" + (f", the highest for a base of this size, and {epochs}" if lr == high else "")


def suggest_larger_batch(c: Curve, batch_size: int) -> str:
    """Suggest a batch size, or more data where the data cannot fill it; "" where the batch is as large already."""
    if c.params.batch_size >= batch_size:
        return ""
    if batch_size > c.pairs:
        return f"more training pairs: batch_size {batch_size} is recommended, an epoch has only {c.pairs}"
    return f"batch_size: {batch_size}"


def dead(c: Curve) -> bool:
    """Whether the gradient has gone while the loss is still that of a model that knows nothing."""
    norms = [row["grad_norm"] for row in c.rows if "grad_norm" in row]
    return bool(norms) and median(norms[-len(c.tail) :]) < DEAD and mean(c.tail) > SLOW


def cure(c: Curve) -> str:
    """What to do about a loss that does not fall."""
    lost = bool(c.dev) and c.dev[-1] < c.least <= max(c.dev)
    fell = dead(c) or lost or mean(c.tail) > 1.1 * min(c.losses)  # it was better before
    if not fell and c.params.warmup_steps >= c.steps:  # the learning rate never came to its peak
        return f"warmup_steps: {int(c.steps / 10)}"
    lr = (suggest_lower_lr if fell else suggest_higher_lr)(c.params, c.bounds)
    return "; ".join(filter(None, [lr, suggest_larger_batch(c, c.bounds.batch), f"else {MATCH}"]))


def finite(c: Curve) -> Answer | None:
    numbers = [row[key] for row in c.rows for key in ("loss", "grad_norm") if key in row]
    wrong = sum(not math.isfinite(number) for number in numbers)
    seen = f"{wrong} of {len(numbers)} losses and norms are NaN or infinite"
    return Answer(False, wrong > 0, wrong, seen, suggest_lower_lr(c.params, c.bounds))


def known(c: Curve) -> Answer | None:
    if c.step <= 2 * c.params.warmup_steps or len(c.losses) < 2 * FEW:
        return None
    share = mean(c.tail if len(c.tail) >= FEW else c.losses[-FEW:])
    early = not c.done and c.rows[-1]["epoch"] < 1
    return Answer(share > NOTHING, share > NOTHING and not early, share, f"{share:.2f} of {c.unit}", cure(c))


def early_loss(c: Curve) -> Answer | None:
    if not c.done and c.rows[-1]["epoch"] < c.early:
        return None
    share = c.early_loss
    seen = f"{c.losses[0]:.2f} -> {share:.2f} of {c.unit}"
    return Answer(share > SLOW, share > NOTHING, share, seen, cure(c))


def by_epoch(c: Curve) -> Answer | None:
    ends = c.epoch_ends
    if len(ends) < c.params.epochs:
        return None
    guide, ours = (" ".join(f"{share:.2f}" for share in shares[:5]) for shares in (GUIDE[: len(ends)], ends))
    seen = f"{ours}{' ...' if len(ends) > 5 else ''}; the guide's {guide}"
    remedy = f"epochs: {max(5, 2 * c.params.epochs)}" if c.early_loss <= SLOW else cure(c)
    return Answer(ends[-1] > UNFIT, ends[-1] > SLOW, ends[-1], seen, remedy)


def rough(c: Curve) -> Answer | None:
    losses = c.losses[-len(c.warm) :] if c.warm else []
    if len(losses) < 2 * FEW:
        return None
    # Second differences: a steady fall is not rough; their median: nor is the step from one epoch to the next.
    jump = median(abs(b - (a + d) / 2) for a, b, d in zip(losses, losses[1:], losses[2:], strict=False))
    lower = min(max(c.params.lr / 2, c.bounds.lr[0]), c.bounds.lr[1])
    lr = f"lr: {lower:.2g}" if lower < c.params.lr else ""
    remedy = ", ".join(filter(None, [suggest_larger_batch(c, max(c.bounds.batch, 2 * c.params.batch_size)), lr]))
    return Answer(jump > ROUGH, jump > 2 * ROUGH, jump, f"rows jump by {jump:.3f} of {c.unit}", remedy)


def gradient(c: Curve) -> Answer | None:
    norms = [row["grad_norm"] for row in c.warm if "grad_norm" in row]
    if len(norms) < 2 * FEW:
        return None
    usual = median(norms)
    spikes = sum(norm > JUMP * usual for norm in norms) / len(norms)
    seen = f"{usual:.2g} (guide: 1-3), highest {max(norms):.2g}, {spikes:.0%} spikes"
    return Answer(spikes > 0.05, dead(c) or spikes > 0.2, usual, seen, suggest_lower_lr(c.params, c.bounds))


def learning_rate(c: Curve) -> Answer | None:
    rows = [row for row in c.rows if "learning_rate" in row]
    share = c.params.warmup_steps / c.steps
    after = [row["learning_rate"] for row in rows if row["step"] > c.params.warmup_steps + 1]
    rises = any(b > a * 1.001 for a, b in pairwise(after))
    high = max((row["learning_rate"] for row in rows), default=0.0)
    wrong = rises or high > c.params.lr * 1.001 or share >= 1
    seen = f"up to {high:.2g} of {c.params.lr:g}, warm-up {share:.0%} of {c.steps:.0f} steps"
    return Answer(share > 0.25, wrong, share, seen, f"warmup_steps: {int(c.steps / 10)}")


def dev_score(c: Curve) -> Answer | None:
    if not c.dev or (not c.done and c.asked <= 2 * c.params.warmup_steps):
        return None
    last, best = c.dev[-1], max(c.dev)
    seen = f"{last:.3f}, best {best:.3f}, chance {c.chance:.3f}"
    fewer = "fewer epochs, or " if c.params.epochs > c.bounds.epochs else ""
    remedy = cure(c) if last < c.least else fewer + suggest_lower_lr(c.params, c.bounds)
    return Answer(last < 0.8 * best, last < c.least, last, seen, remedy)


RULES: dict[str, tuple[str, Callable[[Curve], Answer | None]]] = {
    "finite": ("a loss or norm that is not finite is bad", finite),
    "loss now": (f"above {NOTHING} of log(P) after twice the warm-up warn, after an epoch bad", known),
    "early loss": (f"above {SLOW} of log(P) after an epoch or a quarter run warn, above {NOTHING} bad", early_loss),
    "loss by epoch": (f"above {UNFIT} of log(P) at the end warn, above {SLOW} bad", by_epoch),
    "steady loss": (f"rows that jump by {ROUGH} of log(P) warn, by {2 * ROUGH} bad: oscillating", rough),
    "gradient norm": (f"{JUMP} x the median in 5 % of the rows warn, in 20 % bad; below {DEAD} bad", gradient),
    "learning rate": ("a warm-up over 0.25 of the run warn; rises after it, or all of the run, bad", learning_rate),
    "dev NDCG@5": ("below 0.8 of its best warn, below twice chance bad", dev_score),
}


def findings(curve: Curve) -> list[Finding]:
    """What each rule says of the rows so far, in the order of `RULES`; without those that cannot say yet."""
    if not curve.rows:
        return []
    answers = ((name, words, rule(curve)) for name, (words, rule) in RULES.items())
    return [judged(name, words, *answer) for name, words, answer in answers if answer]


def health(log: Sequence[Mapping[str, Any]], params: Params, chance: float, bounds: Bounds) -> Health:
    """A finished run, judged: the first that holds of

    - `diverged`: something is not finite;
    - `collapsed`: it ends where it knows nothing: the loss is log(P), or the ranking of the dev pages is chance;
    - `too slow`: the loss ends high, and was so early: after an epoch, or a quarter of a run of fewer than four;
    - `undertrained`: the loss ends high, but was falling from the start;
    - `learned`.
    """
    curve = Curve(log, params, chance, bounds, done=True)
    found = findings(curve)
    by_name = {finding.name: finding for finding in found}

    def is_(name: str, *verdicts: str) -> bool:
        return name in by_name and by_name[name].verdict in verdicts

    flat = mean(curve.tail) > NOTHING
    if is_("finite", BAD):
        verdict, cause = DIVERGED, "finite"
    elif flat or is_("dev NDCG@5", BAD):
        verdict, cause = COLLAPSED, "dev NDCG@5" if not flat else "loss by epoch"
    elif is_("loss by epoch", WARN, BAD):
        slow = is_("early loss", WARN, BAD)
        verdict, cause = (TOO_SLOW, "early loss") if slow else (UNDERTRAINED, "loss by epoch")
    else:
        return Health(LEARNED, "", "", found)
    return Health(verdict, f"{cause}: {by_name[cause].seen}", by_name[cause].remedy, found)


def line(finding: Finding) -> str:
    """One finding with its remedy, at most 80 columns wide."""
    text = f"{finding.verdict:<5}{finding.name:<15}{finding.seen}"
    more = f" -> {finding.remedy}" if finding.remedy else ""
    return "\n".join(wrap(text + more, 80, subsequent_indent=" " * 20, break_long_words=False))


def report(judgement: Health) -> str:
    """Every finding, and the verdict with its remedy, which is then not repeated; at most 80 columns wide."""
    last = f"training health: {judgement.verdict}"
    if judgement.why:
        last += f"; {judgement.why} -> {judgement.remedy}"
    shown = (f._replace(remedy="") if f.remedy == judgement.remedy else f for f in judgement.findings)
    return "\n".join([*map(line, shown), *wrap(last, 80, subsequent_indent="  ")])


def stored(found: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings as JSON: the value of every rule; verdict and remedy of those that are not ok."""
    return {
        "values": {f.name: round(f.value, 4) for f in found},
        "wrong": {f.name: f"{f.verdict} -> {f.remedy}" for f in found if f.verdict != OK},
    }
