"""Monitor a training run while it runs: warn about its loss curve at once, and measure its use of the machine.

Step time, waiting for data, memory and GPU use depend on the clock and on other processes, so they are printed and
written to logs/, and are in nothing that DVC compares. The GPU's part was never run: there was none where this was
written.
"""

import logging
import statistics
import subprocess
import time
from pathlib import Path

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from colintern.core.project import root
from colintern.monitoring.guide import get_recommended_bounds
from colintern.monitoring.health import (
    BAD,
    HEALTH,
    OK,
    WARN,
    HealthFinding,
    LossCurve,
    RunHealth,
    apply_rules,
    assess_run,
    findings_to_json,
    format_finding,
    format_health,
    make_finding,
    suggest_lower_lr,
)
from colintern.params import Params
from colintern.storage.files import format_json
from colintern.training.trainer import ContrastiveTrainer, RunCallback

logger = logging.getLogger(__name__)
MAX_SECONDS_PER_PAIR = 10 / 64  # the guide's warning sign on a GPU: 10 s a step of 64 pairs
SEVERITIES = (OK, WARN, BAD)
QUERY_GPU_USE = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")
CLOCK_METRICS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


class LossCurveMonitor(RunCallback):
    """Warns when a health rule fires or gets worse; writes health.json and reports the verdict at the end."""

    def __init__(self, params: Params):
        self.params = params
        self.reported: dict[str, int] = {}  # worst severity so far, by rule

    def on_trainer_init(self, trainer: ContrastiveTrainer) -> None:
        """Look up the bounds for the base and the score of a random ranking."""
        self.bounds = get_recommended_bounds(
            sum(p.numel() for n, p in trainer.model.named_parameters() if ".lora_" not in n)
        )
        self.random_ndcg = trainer.evaluator.random_ndcg
        trainer.hint = f"try {suggest_lower_lr(self.params, self.bounds)}"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Do not repeat the warnings of a run that is resumed."""
        self.reported = {finding.name: SEVERITIES.index(finding.verdict) for finding in self._apply_rules(state)}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Print findings that are new or worse."""
        for finding in self._apply_rules(state):
            severity = SEVERITIES.index(finding.verdict)
            if severity > self.reported.get(finding.name, 0):
                logger.info(f"step {state.global_step}:\n{format_finding(finding)}")  # above a progress bar
                self.reported[finding.name] = severity

    def save_artifacts(self, trainer: ContrastiveTrainer, folder: Path) -> dict[str, float | str]:
        """Write health.json and print the report; return the verdict."""
        health = self.assess_state(trainer.state)
        masked_pairs = trainer.metric_accumulator.total_false_negatives
        result = {"verdict": health.verdict, "masked_pairs": masked_pairs} | findings_to_json(health.findings)
        (folder / HEALTH).write_text(format_json(result))
        logger.info(format_health(health))
        return {"verdict": health.verdict}

    def assess_state(self, state: TrainerState) -> RunHealth:
        """Assess a finished run."""
        return assess_run(state.log_history, self.params, self.random_ndcg, self.bounds)

    def _apply_rules(self, state: TrainerState) -> list[HealthFinding]:
        return apply_rules(LossCurve(state.log_history, self.params, self.random_ndcg, self.bounds, is_done=False))


class ThroughputMonitor(RunCallback):
    """Measures the steps, and the time between them that is not logging, evaluation or saving: waiting for data.

    Only this process counts: a resumed run starts again from zero.
    """

    def __init__(self, params: Params) -> None:
        self.params = params
        self.step_seconds: list[float] = []
        self.wait_seconds = self.last_time = self.memory_share = 0.0
        self.gpu_use_shares: list[float] = []
        self.gpu_query: subprocess.Popen[str] | None = None

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Start to measure the wait for data."""
        self.last_time = time.perf_counter()

    on_evaluate = on_save = on_epoch_begin

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Measure the wait for data."""
        now = time.perf_counter()
        self.wait_seconds, self.last_time = self.wait_seconds + now - self.last_time, now

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Measure the step; it has read the loss, so that the GPU has finished."""
        now = time.perf_counter()
        self.step_seconds.append(now - self.last_time)
        self.last_time = now

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Measure memory and GPU use."""
        self.memory_share = max(self.memory_share, get_memory_share())
        # The query runs beside the next steps: waiting for it would leave the GPU idle, which it would then report.
        if torch.cuda.is_available() and (self.gpu_query is None or self.gpu_query.poll() is not None):
            if self.gpu_query and (share := read_gpu_use(self.gpu_query)) is not None:
                self.gpu_use_shares.append(share)
            self.gpu_query = start_gpu_query()
        self.last_time = time.perf_counter()

    def summarize_steps(self) -> dict[str, float]:
        """Return the measurements, {} if no step was made; those of the GPU only where there is one."""
        if not self.step_seconds:
            return {}
        summary = {
            "step_seconds": statistics.median(self.step_seconds),
            "slowest_tenth_seconds": statistics.quantiles([*self.step_seconds, self.step_seconds[-1]], n=10)[-1],
            "data_wait_share": self.wait_seconds / (self.wait_seconds + sum(self.step_seconds)),
            "memory_share": self.memory_share,
        }
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            summary["gpu_memory_share"] = torch.cuda.max_memory_reserved() / total
        if self.gpu_use_shares:
            summary["gpu_use_share"] = statistics.mean(self.gpu_use_shares)
        return summary

    def save_artifacts(self, trainer: ContrastiveTrainer, folder: Path) -> dict[str, float | str]:
        """Write logs/train-timing.json and print the findings."""
        summary = self.summarize_steps()
        findings = check_throughput(summary, self.params)
        log = trainer.state.log_history
        timing = {key: value for row in log for key, value in row.items() if key in CLOCK_METRICS} | summary
        path = root() / "logs" / "train-timing.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(format_json(timing | {"health": findings_to_json(findings)}))
        for finding in findings:
            logger.info(format_finding(finding))
        return {}


def check_throughput(summary: dict[str, float], params: Params) -> list[HealthFinding]:
    """Check the measurements of `ThroughputMonitor.summarize_steps` that are there."""
    findings = []

    def check_share(key: str, name: str, warn: float, bad: float, source: str, remedy: str) -> None:
        if (share := summary.get(key)) is not None:
            rule = f"above {warn} warn, above {bad} bad ({source})"
            findings.append(make_finding(name, rule, share > warn, share > bad, share, f"{share:.1%}", remedy))

    if "step_seconds" in summary:
        median, slowest = summary["step_seconds"], summary["slowest_tenth_seconds"]
        max_seconds = MAX_SECONDS_PER_PAIR * params.batch_size * (1 + params.negatives)
        is_slow = "gpu_memory_share" in summary and median > max_seconds
        rule = "slowest tenth over 3 x the median warn; on a GPU over 10 s for 64 pairs (guide) bad"
        seen = f"{median:.3g} s, slowest tenth {slowest:.3g} s"
        remedy = "what else runs on this machine? `colintern recommend` predicts the time of a step"
        findings.append(make_finding("step time", rule, slowest > 3 * median, is_slow, median, seen, remedy))
    more_workers = f"workers: {params.workers + 2}, or more feature_cache_gb"
    check_share("data_wait_share", "data wait", 0.1, 0.3, "guide: GPU used below 70 %", more_workers)
    check_share("memory_share", "main memory", 0.8, 0.9, "guide", "fewer workers, or more memory")
    smaller = f"micro_batch_size: {max(1, params.micro_batch_size // 2)}; the gradient stays the same"
    check_share("gpu_memory_share", "GPU memory", 0.9, 0.95, "guide", smaller)
    if (share := summary.get("gpu_use_share")) is not None:
        rule = "below 0.9 warn, below 0.7 bad (guide)"
        remedy = "see data wait; else a larger micro_batch_size"
        seen = f"{share:.1%} on average"
        findings.append(make_finding("GPU use", rule, share < 0.9, share < 0.7, share, seen, remedy))
    return findings


def get_memory_share(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the share in use of main memory, or of a container's limit if larger; 0 if Linux does not report it."""
    if not meminfo.is_file():
        return 0.0
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    total, free = (int(rows[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
    share = 1 - free / total
    limit, current, stat = (cgroup / name for name in ("memory.max", "memory.current", "memory.stat"))
    if limit.is_file() and (max_bytes := limit.read_text().strip()).isdigit():
        # Inactive page cache can be reclaimed at any time.
        inactive = int(dict(line.split() for line in stat.read_text().splitlines())["inactive_file"])
        share = max(share, (int(current.read_text()) - inactive) / int(max_bytes))
    return share


def start_gpu_query() -> "subprocess.Popen[str] | None":
    """Start nvidia-smi, which reports the use of the GPU; return None if there is none."""
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    try:
        return subprocess.Popen((*QUERY_GPU_USE, gpu), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def read_gpu_use(query: "subprocess.Popen[str]") -> float | None:
    """Return the share of the last sixth of a second to second in which the GPU was busy; None if not reported."""
    try:
        return int(query.communicate()[0]) / 100
    except ValueError:
        return None
