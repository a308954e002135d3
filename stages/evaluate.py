"""eval: the trained adapter, the base before training and the baselines on mteb's retrieval tasks.

    python -m stages.evaluate

Input: params.yaml, experiments/colintern, data/manifest.json and what it names. Output: mteb's own files and what each
query scored below results/mteb_evaluation, all means in its eval.json; metrics/eval.json, plots/eval.csv (tasks) and
plots/benchmarks.csv (means); times go to logs/eval-timing.json, which is no out. Tasks that a run of the same model has
finished are taken from .scratch.
"""

from pathlib import Path
from textwrap import fill

from colintern.core.errors import exit_on_user_error
from colintern.params import describe_demo_base, load_params
from colintern.storage.files import format_json, write_csv
from colintern.storage.manifest import ensure_inputs, set_arrow_cache
from colintern.storage.outs import purge_finished_checkpoints, verify_dvc_outputs


@exit_on_user_error()
def main() -> None:
    """Run the stage."""
    params = load_params()
    purge_finished_checkpoints()  # DVC starts this stage when training is recorded
    verify_dvc_outputs()
    set_arrow_cache()
    ensure_inputs(params, evaluation=True)
    from colintern.analysis.score_tables import format_score_table
    from colintern.data.benchmarks import (
        resolve_benchmarks,  # only now: `datasets` reads the environment when it is imported
    )
    from colintern.encoding.loading import get_encoder_settings
    from colintern.evaluation.baselines import add_baselines
    from colintern.evaluation.models import make_eval_models
    from colintern.evaluation.results import (
        BENCHMARK_COLUMNS,
        TASK_COLUMNS,
        list_benchmark_rows,
        list_task_rows,
        merge_means,
        summarize_scores,
    )
    from colintern.evaluation.run import evaluate_models

    resolve_benchmarks(params.benchmarks)  # a misspelt name is refused before anything else is looked at
    out = Path("results/mteb_evaluation")
    settings = get_encoder_settings(params)
    models = make_eval_models(settings, Path("experiments/colintern"), params.eval_untrained)
    models = add_baselines(params, models)
    scores = evaluate_models(models, params, out)
    Path("metrics").mkdir(exist_ok=True)
    (out / "eval.json").write_text(format_json(merge_means(scores)))
    Path("metrics/eval.json").write_text(format_json(summarize_scores(scores)))
    write_csv(Path("plots/eval.csv"), list_task_rows(scores["trained"]), TASK_COLUMNS)
    write_csv(Path("plots/benchmarks.csv"), list_benchmark_rows(scores), BENCHMARK_COLUMNS)
    print(format_score_table(scores))
    if note := describe_demo_base(params.base, params.benchmarks):
        print(fill(note, 80))


if __name__ == "__main__":
    main()
