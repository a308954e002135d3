"""verify: count what is trained, on the base wrapped in LoRA without weights, and what it is trained on.

    python -m stages.verify

Input: params.yaml, the base's config, data/survey.json. Output: metrics/verify.json, the table on the terminal and
plots/data.csv (`colintern data` prints what it shows); exit 2 for a target that matches nothing, a missed
custom_text_proj, or a vision module that is hit.
"""

from pathlib import Path

from colintern.core.errors import UserError, exit_on_user_error
from colintern.modeling.base_tile import format_a4_tilings, read_base_tile
from colintern.modeling.lora import find_lora_errors, format_lora_report, report_lora_on_meta
from colintern.modeling.retriever import build_meta_model
from colintern.params import load_params
from colintern.statistics.dataset_stats import HISTOGRAM_COLUMNS, iter_histogram_rows, load_dataset_stats
from colintern.storage.files import format_json, write_csv
from colintern.storage.manifest import ensure_inputs
from colintern.storage.outs import verify_dvc_outputs


@exit_on_user_error()
def main() -> None:
    """Run the stage."""
    params = load_params()
    verify_dvc_outputs()
    base = ensure_inputs(params)
    counts = report_lora_on_meta(build_meta_model(base, params.base_revision or None), params)
    print(format_lora_report(params.base, counts))
    print(format_a4_tilings(params.max_visual_tokens, *read_base_tile(Path(base))))
    if wrong := find_lora_errors(counts):
        raise UserError("\n  ".join(wrong))
    found = load_dataset_stats(params.max_visual_tokens, params.tiling)
    Path("metrics").mkdir(exist_ok=True)
    Path("metrics/verify.json").write_text(format_json({"trainable_parameters": counts.trainable_parameters}))
    write_csv(Path("plots/data.csv"), iter_histogram_rows(found), HISTOGRAM_COLUMNS)


if __name__ == "__main__":
    main()
