"""Find the folder of the pipeline."""

import os
from pathlib import Path

DVC_COPIES = (".dvc", "tmp", "exps")  # where DVC makes copies of a project; those of --temp are in standalone there


def root() -> Path:
    """Return the folder of the pipeline, with the files that git does not track.

    It is the working folder; in the copy that `dvc exp run --temp` or `--queue` makes below .dvc/tmp/exps, it is the
    folder that was copied. DVC_ROOT is not used: in a stage of another DVC project it names that project.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:  # `dvc queue stop --kill` has deleted the copy
        return Path(os.environ.get("DVC_ROOT") or ".")
    parts = here.parts
    for start in range(len(parts) - len(DVC_COPIES), 0, -1):
        if parts[start : start + len(DVC_COPIES)] == DVC_COPIES:
            project, (kind, *inner) = Path(*parts[:start]), parts[start + len(DVC_COPIES) :] or ("",)
            folder = project.joinpath(*(inner[1:] if kind == "standalone" else inner))
            return folder if (folder / "dvc.yaml").is_file() else project
    return Path()
