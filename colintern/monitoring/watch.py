"""A run while it goes: what is wrong with its curve is said at once, and what it takes of the machine is measured.

Time of a step, waiting for data, memory and use of the GPU depend on the clock and on what else the machine does, so
they go to the terminal and to logs/, and into nothing that DVC compares. The GPU's part was never run: there was none
where this was written.
"""

import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from colintern.monitoring.guide import Bounds
from colintern.monitoring.health import BAD, OK, WARN, Curve, Finding, findings, judged, line
from colintern.params import Params

SECONDS_A_PAIR = 10 / 64  # the guide's warning sign on a GPU: 10 s a step of 64 pairs
WORSE = (OK, WARN, BAD)
QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")


class Watch(TrainerCallback):
    """Says what the rules of `health` find wrong, when they begin to; quiet otherwise."""

    def __init__(self, params: Params, chance: float, bounds: Bounds):
        self.params, self.chance, self.bounds = params, chance, bounds
        self.known: dict[str, int] = {}  # the worst that was said, by rule

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that goes on does not say again what holds already."""
        self.known = {finding.name: WORSE.index(finding.verdict) for finding in self._found(state)}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for finding in self._found(state):
            rank = WORSE.index(finding.verdict)
            if rank > self.known.get(finding.name, 0):
                tqdm.write(f"step {state.global_step}:\n{line(finding)}")  # above the bar, where there is one
                self.known[finding.name] = rank

    def _found(self, state: Any) -> list[Finding]:
        return findings(Curve(state.log_history, self.params, self.chance, self.bounds, done=False))


class Pace(TrainerCallback):
    """Measures steps, and what lies between them and is neither logging nor evaluation nor saving: waiting for data.

    Only what this process did counts: a run that was resumed starts anew.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []  # seconds
        self.waited = self.since = self.memory = 0.0
        self.gpu_use: list[float] = []  # shares
        self.asked: subprocess.Popen[str] | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.waited, self.since = self.waited + now - self.since, now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()  # the loss was read in the step: what the GPU had to do is done
        self.steps.append(now - self.since)
        self.since = now

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory = max(self.memory, memory_share())
        # Answers while the next steps run: waiting for it would leave the GPU idle, and that is what it would tell.
        if torch.cuda.is_available() and (self.asked is None or self.asked.poll() is not None):
            if self.asked and (use := gpu_use(self.asked)) is not None:
                self.gpu_use.append(use)
            self.asked = ask_gpu_use()
        self.since = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    def values(self) -> dict[str, float]:
        """What was measured; nothing where no step was made. Shares are of 1; of the GPU only where there is one."""
        if not self.steps:
            return {}
        found = {
            "step_seconds": statistics.median(self.steps),
            "slowest_tenth_seconds": statistics.quantiles([*self.steps, self.steps[-1]], n=10)[-1],
            "data_wait_share": self.waited / (self.waited + sum(self.steps)),
            "memory_share": self.memory,
        }
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            found["gpu_memory_share"] = torch.cuda.max_memory_reserved() / total
        if self.gpu_use:
            found["gpu_use_share"] = statistics.mean(self.gpu_use)
        return found


def pace_findings(values: dict[str, float], params: Params) -> list[Finding]:
    """The measured values, judged; only those that are there."""
    found = []

    def above(key: str, name: str, warn: float, bad: float, source: str, remedy: str) -> None:
        if (share := values.get(key)) is not None:
            words = f"above {warn} warn, above {bad} bad ({source})"
            found.append(judged(name, words, share > warn, share > bad, share, f"{share:.1%}", remedy))

    if "step_seconds" in values:
        each, slow = values["step_seconds"], values["slowest_tenth_seconds"]
        late = "gpu_memory_share" in values and each > SECONDS_A_PAIR * params.batch_size * (1 + params.negatives)
        words = "slowest tenth over 3 x the median warn; on a GPU over 10 s for 64 pairs (guide) bad"
        seen = f"{each:.3g} s, slowest tenth {slow:.3g} s"
        remedy = "what else runs on this machine? `colintern recommend` predicts the time of a step"
        found.append(judged("step time", words, slow > 3 * each, late, each, seen, remedy))
    more = f"workers: {params.workers + 2}, or more feature_cache_gb"
    above("data_wait_share", "data wait", 0.1, 0.3, "guide: GPU used below 70 %", more)
    above("memory_share", "main memory", 0.8, 0.9, "guide", "fewer workers, or more memory")
    half = f"micro_batch_size: {max(1, params.micro_batch_size // 2)}; the gradient stays the same"
    above("gpu_memory_share", "GPU memory", 0.9, 0.95, "guide", half)
    if (share := values.get("gpu_use_share")) is not None:
        words = "below 0.9 warn, below 0.7 bad (guide)"
        remedy = "see data wait; else a larger micro_batch_size"
        found.append(judged("GPU use", words, share < 0.9, share < 0.7, share, f"{share:.1%} on average", remedy))
    return found


def memory_share(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> float:
    """Share of main memory in use, in a container of what the container may; 0 where Linux does not say."""
    if not meminfo.is_file():
        return 0.0
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    total, free = (int(rows[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
    share = 1 - free / total
    limit, current, parts = (group / name for name in ("memory.max", "memory.current", "memory.stat"))
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        files = dict(line.split() for line in parts.read_text().splitlines())
        # Pages of files that nobody maps can be taken back at any time.
        share = max(share, (int(current.read_text()) - int(files["inactive_file"])) / int(most))
    return share


def ask_gpu_use() -> "subprocess.Popen[str] | None":
    """Start the driver's program that tells it; None where there is none."""
    card = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    try:
        return subprocess.Popen((*QUERY, card), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def gpu_use(asked: "subprocess.Popen[str]") -> float | None:
    """What it told once it has ended: the share of its last moments (a sixth of a second to a second) in which the GPU
    ran a kernel; None if not told."""
    try:
        return int(asked.communicate()[0]) / 100
    except ValueError:
        return None
