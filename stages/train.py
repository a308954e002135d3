"""train: LoRA and the projection head, by contrast within the batch.

    python -m stages.train

Input: params.yaml, data/manifest.json and what it names. Output: experiments/colintern (the adapter, its head,
processor, trainer_state.json, identity.json, health.json), metrics/train.json, plots/train.csv and plots/dev.csv. An
interrupted run goes on from its last checkpoint. `launch` says in how many processes; under a launcher its own are
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
from colintern.params import load
from colintern.storage.manifest import ready
from colintern.storage.outs import check_outs


@exit_on_user_error()
def main() -> None:
    params = load()
    from colintern.training.processes import joined, start

    start(params, "stages.train")
    with joined(params.threads) as processes:
        processes.first(check_outs)
        # A flipped bit costs seconds here, and a training run later.
        processes.first(lambda: bool(load_training_data(params, force=True)))
        base = processes.first(lambda: ready(params, anew=True))
        from colintern.preflight.doctor import hold

        hold(params, base)
        from colintern.training.runs import train  # only now: `datasets` looks at its import whether it may ask the hub

        metrics = train(params, Path("experiments/colintern"), processes)
        if processes.main:
            print(" ".join(f"{key}={value}" for key, value in metrics.items()))


if __name__ == "__main__":
    main()
