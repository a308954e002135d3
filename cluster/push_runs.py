"""dvc push --run-cache, and what it leaves out: all files of all runs in the cache, metrics and plots included.

    python cluster/push_runs.py      in the repository, after dvc repro

DVC 3 pushes each run's record, and of files only those that dvc.lock names now and that no `cache: false` keeps in
git. Elsewhere a record with a file missing counts as no run, and the stage is run anew. DVC can collect all of them
(`StageCache.get_used_objs`), but nothing has called that since its push goes by an index. There: dvc repro --pull.
"""

from dvc.exceptions import DvcException
from dvc.repo import Repo


def push(repo: Repo) -> str:
    with repo.lock:
        runs = repo.stage_cache.push(None)
        files = set().union(*repo.stage_cache.get_used_objs(runs).values())
        done = repo.cloud.push(files)
    if done.failed:
        raise SystemExit(f"error: {len(done.failed)} of {len(files)} files were not pushed")
    return f"{len(runs)} runs with {len(files)} files; {len(done.transferred)} files pushed"


if __name__ == "__main__":
    try:
        print(push(Repo()))
    except DvcException as error:
        raise SystemExit(f"error: {error}") from error
