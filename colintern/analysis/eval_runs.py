"""Load evaluations from a folder, a git revision or DVC experiments; several seeds are merged into one evaluation."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean, median_low
from typing import NamedTuple

from colintern.core.errors import UserError
from colintern.evaluation.results import QUERY_KEY, UNRECORDED, QueryResult, RunInfo, read_query_results
from colintern.scoring.metrics import METRIC_KEYS

EVALUATION = "results/mteb_evaluation"
RUN_FILE, QUERIES_FILE = "run.json", "queries/trained.parquet"
RANK_NOT_FOUND = 1001  # in place of the rank of a page that is not among mteb's 1,000 best
SEED = "seed"  # key of params.yaml


class EvalRun(NamedTuple):
    """An evaluation. `run`: its run.json (revision, params, data). `queries`: what each query scored."""

    name: str
    run: RunInfo
    queries: list[QueryResult]
    members: Sequence["EvalRun"] = ()  # one for each seed, if there are several; see `merge_eval_runs`


def load_eval_group(name: str) -> EvalRun:
    """Load the evaluation `name`, or those of a list with commas or of a pattern such as `slower-*`, as one.

    Raises:
        UserError: one of them cannot be loaded, a pattern matches no experiment, or they cannot be merged.
    """
    if Path(name).is_dir():
        return load_eval_run(name)
    names = [match for part in name.split(",") for match in _match_experiments(part)]
    if len(names) == 1:
        return load_eval_run(names[0])
    return merge_eval_runs(name, [load_eval_run(member) for member in names])


def _match_experiments(pattern: str) -> list[str]:
    """Return the DVC experiments of the current commit that a pattern matches; a name without `*`, `?`, `[` itself."""
    if not set("*?[") & set(pattern) or Path(pattern).is_dir():
        return [pattern]
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        by_commit = Repo().experiments.ls()
    except DvcException as error:
        raise UserError(f"{pattern!r} is a pattern of DVC experiments, and none can be listed: {error}") from error
    names = [name for experiments in by_commit.values() for name, _ in experiments]
    if matching := [name for name in names if fnmatchcase(name, pattern)]:
        return sorted(matching, key=lambda name: (len(name), name))  # slower-10 after slower-9
    nearest = get_close_matches(pattern, names, cutoff=0.3)
    raise UserError(
        f"{pattern!r} matches no DVC experiment of this commit; "
        + (f"the nearest are {', '.join(nearest)}" if names else "it has none")
        + "; name those of other commits (`dvc exp list --all-commits`) one by one: NAME,NAME"
    )


def merge_eval_runs(name: str, runs: Sequence[EvalRun]) -> EvalRun:
    """Merge evaluations of several seeds: mean scores, median ranks, and the first page that most of them have.

    Raises:
        UserError: two are of one model, or they were evaluated on other data or queries.
    """
    results: dict[tuple[object, ...], list[QueryResult]] = {}
    for run in runs:
        for result in run.queries:
            results.setdefault(get_query_key(result), []).append(result)
    models: dict[str, str] = {}
    for run in runs:
        if models.setdefault(run.run["revision"], run.name) != run.name:
            raise UserError(f"{name}: {models[run.run['revision']]} and {run.name} are the same model; name it once")
        if run.run["data"] != runs[0].run["data"]:
            raise UserError(f"{name}: {runs[0].name} and {run.name} were evaluated on other data; evaluate both again")
    if any(len(of_query) != len(runs) for of_query in results.values()):
        raise UserError(f"{name}: its runs were evaluated on other queries; evaluate all on the same `benchmarks`")
    differing = {key: ", ".join(values) for key, values in _list_param_values(runs).items() if len(values) > 1}
    info: RunInfo = {**runs[0].run, "params": runs[0].run["params"] | differing, "revision": ", ".join(models)}
    return EvalRun(name, info, [_average_results(of_query) for of_query in results.values()], runs)


def _list_param_values(runs: Sequence[EvalRun]) -> dict[str, list[str]]:
    """Return the different values of each setting, in order."""
    params = [UNRECORDED | run.run["params"] for run in runs]
    keys = dict.fromkeys(key for values in params for key in values)
    return {key: sorted({str(values.get(key)) for values in params}) for key in keys}


def _average_results(results: Sequence[QueryResult]) -> QueryResult:
    scores = {key: fmean(result.scores[key] for result in results) for key in METRIC_KEYS}
    rank = median_low(result.rank or RANK_NOT_FOUND for result in results)
    [(first_page, _)] = Counter(result.top_pages[0] for result in results).most_common(1)
    typical = next(result for result in results if result.top_pages[0] == first_page)
    return typical._replace(scores=scores, rank=None if rank == RANK_NOT_FOUND else rank)


def get_query_key(result: QueryResult) -> tuple[object, ...]:
    """Return the values of `QUERY_KEY`."""
    return result[: len(QUERY_KEY)]


def list_seed_scores(run: EvalRun, metric: str) -> dict[tuple[object, ...], list[float]]:
    """Return the scores of each query, by its key, one for each seed."""
    scores: dict[tuple[object, ...], list[float]] = {}
    for member in run.members or [run]:
        for result in member.queries:
            scores.setdefault(get_query_key(result), []).append(result.scores[metric])
    return scores


def describe_seeds(a: EvalRun, b: EvalRun) -> list[str]:
    """Return sentences on what intervals and p cover, and on how the runs of a side differ beside the seed."""
    counts = [max(len(side.members), 1) for side in (a, b)]
    if counts != [1, 1]:
        notes = [f"seeds: {counts[0]} of a, {counts[1]} of b; intervals and p cover queries and seeds"]
        if 1 in counts:
            notes.append("the side with one seed is assumed to have the spread of the other")
        notes.append("queries have mean scores, median ranks and the first page of most seeds")
    elif a.run["revision"] == b.run["revision"]:
        notes = []
    else:
        notes = ["one seed each: intervals and p cover queries, not the spread over seeds"]
    for side, run in {"a": a, "b": b}.items():
        values = _list_param_values(run.members)
        differing = [f"{key} ({', '.join(found)})" for key, found in values.items() if len(found) > 1 and key != SEED]
        if differing:
            notes.append(f"{side}: its runs also differ in {', '.join(differing)}")
        if run.members and len(values.get(SEED, ())) < len(run.members):
            notes.append(f"{side}: several of its runs have the same seed")
    return notes


def load_eval_run(name: str) -> EvalRun:
    """Load the evaluation at a folder (an eval stage's out, or a checkout with one), or else at a revision.

    Raises:
        UserError: there is none, it is older than these files, or DVC's cache lacks it.
    """
    read_file = _open_folder(Path(name)) if Path(name).is_dir() else _open_revision(name)
    try:
        return EvalRun(name, json.loads(read_file(RUN_FILE)), read_query_results(read_file(QUERIES_FILE)))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: its results cannot be read: {error}; evaluate it again: dvc repro -f eval") from error


def _open_folder(folder: Path) -> Callable[[str], bytes]:
    top = next((top for top in (folder, folder / EVALUATION) if (top / RUN_FILE).is_file()), None)
    if top is None:
        raise UserError(
            f"{folder}: holds no {RUN_FILE}, nor does {folder / EVALUATION}; give the folder of an evaluation made by "
            f"the eval stage or by `colintern evaluate`; results of an older version: dvc repro -f eval"
        )

    def read_file(name: str) -> bytes:
        if not (top / name).is_file():
            raise UserError(f"{top / name}: missing; evaluate it again: dvc repro -f eval")
        return (top / name).read_bytes()

    return read_file


def _open_revision(revision: str) -> Callable[[str], bytes]:
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import RevError, SCMError
    from dvc_data.index import DataIndexDirError

    def explain_missing(name: str) -> UserError:
        return UserError(
            f"{revision}: {name} is not in DVC's cache here, nor in a remote, or that revision is older than this "
            "file; get it with `dvc pull` at that revision or `dvc exp pull`, or make it in a checkout of it with "
            "`dvc repro eval`"
        )

    try:
        files = DVCFileSystem(rev=revision, subrepos=True)
        # Its paths begin at git's root, which may hold this pipeline as a sub folder. `repo` opens the revision:
        # `exists` would take an error for "no".
        below = Path(Repo.find_root()).resolve().relative_to(Path(files.repo.scm.root_dir).resolve())
        top = f"{Path('/', below, EVALUATION)}"
        exists = files.exists(top)
    except DataIndexDirError as error:
        raise explain_missing(EVALUATION) from error
    except (RevError, SCMError, DvcException) as error:
        raise UserError(
            f"{revision!r} is no folder here, and no git revision or DVC experiment: {error}; "
            f"`git log --oneline` and `dvc exp list --all-commits` name some, and the workspace is `.`"
        ) from error
    if not exists:
        raise UserError(f"{revision}: has no {EVALUATION}; it was not evaluated there, or dvc.lock was not committed")

    def read_file(name: str) -> bytes:
        try:
            return files.read_bytes(f"{top}/{name}")
        except (OSError, DvcException, DataIndexDirError) as error:
            raise explain_missing(f"{EVALUATION}/{name}") from error

    return read_file
