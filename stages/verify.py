"""verify: wrap the base in LoRA without weights, count what is trained, and stop where the targets are wrong.

    python -m stages.verify

Input: params.yaml, the base's config. Output: metrics/verify.json and the table on the terminal; exit 2 for a target
that matches nothing, a missed custom_text_proj, or a vision module that is hit.
"""

from pathlib import Path

from colintern.jsonfile import dumps
from colintern.lora import add_lora, count, faults, meta_model, table
from colintern.manifest import ready
from colintern.params import UserError, exit_on_user_error, load


@exit_on_user_error()
def main() -> None:
    params = load()
    ready(params)
    model = meta_model(params.base, params.base_revision or None)
    try:
        wrapped = add_lora(model, params.lora_targets, params.lora_rank, params.lora_alpha, params.lora_dropout)
    except ValueError as error:
        raise UserError(f"lora_targets: {error}") from error
    counts = count(wrapped, params.lora_targets)
    print(table(params.base, counts))
    if wrong := faults(counts):
        raise UserError("\n  ".join(wrong))
    path = Path("metrics/verify.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(dumps({key: value for key, value in counts.items() if key not in ("patterns", "head")}))


if __name__ == "__main__":
    main()
