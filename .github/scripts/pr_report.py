"""What a pull request changes, as Markdown on stdout: pr_report.py BASE compares that revision with HEAD.

Metrics and params are in git. What each query scored is in DVC's cache or a remote; where neither is, the report says
what could not be compared, and why.
"""

import subprocess
import sys
from pathlib import Path
from typing import NoReturn

SHOWN = 10  # differences of dvc.lock
STALE = Path(__file__).with_name("stale.py")


def run(*command: str) -> tuple[int, str, str]:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def commit(revision: str) -> str:
    """Its hash, as short as is unique; exit 2 where there is none."""
    code, out, _ = run(
        "git", "rev-parse", "--verify", "--quiet", "--short=10", "--end-of-options", f"{revision}^{{commit}}"
    )
    if code:
        refuse(f"BASE: {revision!r} is no revision here; a shallow clone needs: git fetch origin {revision}")
    return out.splitlines()[-1]


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def section(title: str, nothing: str, *command: str) -> str:
    """What a command prints, which is Markdown; or that it printed nothing; or why it failed."""
    code, out, err = run(*command)
    if code:
        said = (err or out or f"exit {code}").splitlines()[-1]
        return f"### {title}\n\nNot compared: {said.removeprefix('error: ').removeprefix('ERROR: ')}"
    return f"### {title}\n\n{out or nothing}"


def lock() -> str:
    """What stale.py says, its verdict first."""
    _, out, err = run(sys.executable, str(STALE))
    *lines, verdict = (out or err or "could not be checked").splitlines()
    more = [f"and {len(lines) - SHOWN} more: `make stale`"] if len(lines) > SHOWN else []
    return "\n".join([f"### dvc.lock\n\n{verdict}\n", *(f"- {line}" for line in [*lines[:SHOWN], *more])]).rstrip()


def report(revision: str) -> str:
    base, head = commit(revision), commit("HEAD")
    dirty = run("git", "status", "--porcelain", "--untracked-files=no")[1]
    if base == head:
        first = "commit your changes on a branch first" if dirty else "check out the branch to compare"
        refuse(
            f"BASE: {revision!r} is the commit that is checked out, {head}, so there is nothing to compare: {first}, "
            f"or give an older commit, such as make pr-report BASE=HEAD~1"
        )
    parts = [
        f"## {head} against {base}",
        "Changes that are not committed are not in this." if dirty else "",
        section("Metrics", "No metric differs.", "dvc", "metrics", "diff", "--md", "--precision", "4", base, head),
        section("Params", "No param differs.", "dvc", "params", "diff", "--md", base, head),
        section("Query by query", "Nothing to compare.", "colintern", "compare", "--md", base, head),
        lock(),
    ]
    return "\n\n".join(part for part in parts if part)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        refuse("give one revision: pr_report.py BASE")
    print(report(sys.argv[1]))
