"""Whether dvc.lock says what the files in git say, without any data, cache or remote: exit 1 where it does not.

`dvc status` compares files, params and commands. What is not in git is not here, so of that only the lock itself can
speak: what one stage wrote must be what the next one read.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


def status() -> dict[str, list[Any]]:
    """Stage -> what DVC found changed."""
    done = subprocess.run(["dvc", "status", "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: dvc status: {done.stderr.strip() or done.stdout.strip()}")
    return json.loads(done.stdout)


def in_git(path: str) -> bool:
    """Whether it belongs into git, or is what git ignores: the outs that DVC keeps."""
    return subprocess.run(["git", "check-ignore", "--quiet", "--", path]).returncode == 1


def changed(found: dict[str, list[Any]]) -> Iterator[str]:
    """A line for each thing that is not as the lock says, but for what is missing because git ignores it."""
    for stage, entries in found.items():
        for entry in entries:
            if isinstance(entry, str):  # "changed command"
                yield f"{stage}: {entry}"
                continue
            for kind, paths in entry.items():
                for path, state in paths.items():
                    if isinstance(state, dict):
                        yield from (f"{stage}: {path}: {key} {word}" for key, word in state.items())
                    elif state not in ("deleted", "not in cache") or in_git(path):
                        yield f"{stage}: {kind}: {path} {state}"


def unchained(lock: dict[str, Any]) -> Iterator[str]:
    """Outs of a stage that another stage's deps have with another hash."""
    outs = {out["path"]: (stage, out.get("md5")) for stage, one in lock.items() for out in one.get("outs", ())}
    for stage, one in lock.items():
        for dep in one.get("deps", ()):
            maker, md5 = outs.get(dep["path"], (stage, dep.get("md5")))
            if md5 != dep.get("md5"):
                yield f"{stage}: read another {dep['path']} than {maker} wrote"


def main() -> None:
    if not Path("dvc.lock").is_file():
        raise SystemExit("error: dvc.lock: missing; run: dvc repro, and commit it")
    try:
        lock = YAML(typ="safe", pure=True).load(Path("dvc.lock"))["stages"]
    except YAMLError as error:
        mend = "git checkout --ours -- dvc.lock metrics plots && dvc repro"
        raise SystemExit(f"error: dvc.lock: is not valid YAML; after a merge: {mend}") from error
    stages = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"]
    gone = [f"{stage}: in dvc.lock, but no longer in dvc.yaml" for stage in lock if stage not in stages]
    found = [*changed(status()), *unchained(lock), *gone]
    for line in found:
        print(line)
    if found:
        print(f"dvc.lock is stale ({len(found)} differences); run `dvc repro` and commit dvc.lock, metrics and plots")
        raise SystemExit(1)
    print(f"dvc.lock is up to date: {', '.join(stages)}")


if __name__ == "__main__":
    main()
