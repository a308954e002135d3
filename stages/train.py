"""train: LoRA and the projection head, by contrast within the batch.

    python -m stages.train

Input: params.yaml, data/manifest.json and what it names. Output: experiments/colintern (the adapter, its head,
processor, trainer_state.json, identity.json, health.json), metrics/train.json, plots/train.csv and plots/dev.csv. An
interrupted run resumes from its last checkpoint. `launch` says in how many processes; under a launcher its own are
joined. Exit 2 where a check of `colintern doctor` on model or machine fails, 3 when the study that started this run
stops it, 5 when the loss is not finite, 6 when one page does not fit the memory, 75 after SIGTERM or Ctrl-C, with a
checkpoint.
"""

import os
import sys
from pathlib import Path

if not sys.stderr.isatty():
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from colintern.core.errors import exit_on_user_error
from colintern.data.training_set import load_training_data
from colintern.params import load_params
from colintern.storage.manifest import ensure_inputs
from colintern.storage.outs import verify_dvc_outputs


@exit_on_user_error()
def main() -> None:
    """Run the stage."""
    params = load_params()
    from colintern.training.distributed import init_distributed, maybe_launch_workers

    maybe_launch_workers(params.launch, params.batch_size, params.threads, "stages.train")
    with init_distributed(params.threads) as context:
        context.run_on_rank0_and_broadcast(verify_dvc_outputs)
        # A flipped bit costs seconds here, and a training run later.
        context.run_on_rank0_and_broadcast(lambda: bool(load_training_data(params, force=True)))
        base = context.run_on_rank0_and_broadcast(lambda: ensure_inputs(params, force=True))
        from colintern.preflight.checks import run_preflight

        run_preflight(params, base)
        # Only now: when `datasets` is imported, it reads whether it may use the hub.
        from colintern.monitoring.monitors import LossCurveMonitor, ThroughputMonitor
        from colintern.monitoring.progress import ProgressReporter
        from colintern.monitoring.tracker import TrackerCallback, check_tracker
        from colintern.training.run import train
        from colintern.tuning.pruning import make_pruning_callbacks

        check_tracker(params.tracker)
        throughput = ThroughputMonitor(params)
        progress = ProgressReporter(params.batch_size * (1 + params.negatives))
        observers = [throughput, LossCurveMonitor(params), progress, *make_pruning_callbacks(context, throughput)]
        if params.tracker != "none" and context.is_main_process:
            observers.append(TrackerCallback(params))
        metrics = train(params, Path("experiments/colintern"), context, observers)
        if context.is_main_process:
            print(" ".join(f"{key}={value}" for key, value in metrics.items()))


if __name__ == "__main__":
    main()
