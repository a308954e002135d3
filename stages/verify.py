"""verify: count what is trained, on the base wrapped in LoRA without weights, and what it is trained on.

    python -m stages.verify

Input: params.yaml, the base's config, data/survey.json. Output: metrics/verify.json and the table on the terminal,
metrics/data.json and plots/data.csv (`colintern data` prints them); exit 2 for a target that matches nothing, a missed
custom_text_proj, or a vision module that is hit.
"""

from pathlib import Path

from colintern.data.inventory import inventory, metrics, write_csv
from colintern.files.jsonfile import dumps
from colintern.files.manifest import ready
from colintern.files.outs import check_outs
from colintern.modeling.lora import METRICS, examine, faults, meta_model, table
from colintern.params import UserError, exit_on_user_error, load


@exit_on_user_error()
def main() -> None:
    params = load()
    check_outs()
    base = ready(params)
    counts = examine(meta_model(base, params.base_revision or None), params)
    print(table(params.base, counts))
    if wrong := faults(counts):
        raise UserError("\n  ".join(wrong))
    found = inventory(params)
    for folder in ("metrics", "plots"):
        Path(folder).mkdir(exist_ok=True)
    summary = {key: counts[key] for key in METRICS}
    Path("metrics/verify.json").write_text(dumps(summary))
    Path("metrics/data.json").write_text(dumps(metrics(found)))
    write_csv(Path("plots/data.csv"), found)


if __name__ == "__main__":
    main()
