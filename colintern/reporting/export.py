"""An adapter folded into its base, as a folder that needs nothing else."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from colintern.core.errors import UserError
from colintern.core.terminal import print_phase
from colintern.evaluation.subjects import subjects
from colintern.modeling.loading import load_processor
from colintern.modeling.modeling_colintern import ColIntern3_5, quiet
from colintern.params import Params
from colintern.preflight.adapter_check import check_adapter, find_base, read_adapter
from colintern.reporting.card import card
from colintern.reporting.evaluated import FULL, Evaluation, as_evaluated, evaluation, find
from colintern.storage.hub import describe_error


def export(params: Params, folder: Path, out: Path, name: str) -> str:
    """Write `out`: weights (safetensors), config, processor, identity.json, README.md; why that has no results, or "".

    The adapter is folded in float32, and the weights are then stored in `params.dtype`.

    Raises:
        UserError: no adapter, or one that `colintern check-adapter` refuses.
    """
    adapter = read_adapter(folder)
    base = find_base(adapter, None)
    wrong = [finding for finding in check_adapter(adapter, base) if not finding.ok]
    if wrong:
        raise UserError(f"{folder}: {wrong[0].name}: {wrong[0].found}; see: colintern check-adapter {folder}")
    revision = subjects(params, folder)["trained"].revision
    found, why = _evaluation(params, revision)
    print_phase(f"export: merging {folder} into its base, writing {out}")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = ColIntern3_5.from_pretrained(folder, base=str(base), merge=True, dtype=torch.float32)
    with quiet():
        model.to(getattr(torch, params.dtype)).save_pretrained(partial)
    load_processor(params, folder).save_pretrained(partial)
    shutil.copy(folder / "identity.json", partial)
    (partial / "README.md").write_text(card(name, revision, adapter.identity, found), encoding="utf-8")
    for file in partial.iterdir():  # safetensors makes a file that is its owner's alone
        file.chmod((partial / "README.md").stat().st_mode)
    partial.replace(out)
    return why


def _evaluation(params: Params, revision: str) -> tuple[Evaluation | None, str]:
    """Of whole embeddings under the bounds and in the type that the folder gets; or why there is none."""
    bounds = {"max_query_tokens": params.max_query_tokens, "max_visual_tokens": params.max_visual_tokens}
    try:
        folder = find(revision, None, FULL | bounds | {"dtype": params.dtype})
        return evaluation(as_evaluated(params, folder), folder), ""
    except UserError as error:  # also where the data has changed since, or is not fetched any more
        return None, str(error)


def push(folder: Path, name: str) -> str:
    """Upload the folder to the hub's repository `name`; the address of the commit.

    Raises:
        UserError: what the hub says, such as a token that may not write.
    """
    print_phase(f"export: pushing {folder} to {name}")
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        return api.upload_folder(repo_id=name, folder_path=folder, commit_message="colintern export").commit_url
    except (HTTPError, OSError) as error:
        raise UserError(
            f"--push: {name}: {describe_error(error)}; `hf auth login` or HF_TOKEN gives the right to write"
        ) from error
