"""Posts a report, made from a pull request's own code, as a comment on that pull request; for `workflow_run` only.

The report is untrusted text: it is cut, and whatever Markdown would make of it but headings, tables and emphasis is
taken out of it. Which pull request it belongs to is not read from it: the event names the commit that was run, and the
API the open pull request with that head. Needs GITHUB_EVENT_PATH, GITHUB_REPOSITORY, GITHUB_API_URL and GITHUB_TOKEN.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

MARK = "<!-- colintern report -->"  # of our comment, which the next push updates
BOT = "github-actions[bot]"
LIMIT = 60_000  # characters; GitHub takes 65,536
CUT = "\n\n(cut here: the whole report is the artifact of the run)"


def inert(text: str) -> str:
    """The text without links, images, HTML, mentions, references and code: their marks become entities, and are shown
    as they are. Control characters, and those that turn the direction of writing, are dropped."""
    text = re.sub(r"[^\n\x20-\x7e\u00a0-\u1fff\u2030-\u205e\u2070-\ud7ff\uf900-\ufdff]", "", text)
    text = re.sub(r"[&<>@\[\]!`~\\]", lambda mark: f"&#{ord(mark[0])};", text)
    text = re.sub(r"(?<!-):(?!-)", "&#58;", text)  # https:, mailto:, :emoji:; a table's ---: stays
    text = re.sub(r"(?<=\bwww)\.", "&#46;", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\bGH)-(?=\d)", "&#45;", text, flags=re.IGNORECASE)
    return re.sub(r"(?<!&)#(?=\d)", "&#35;", text)


def body(report: str) -> str:
    """The comment: the report, inert and cut between lines."""
    room = LIMIT
    lines: list[str] = []
    for line in inert(report).splitlines():
        room -= len(line) + 1
        if room < 0:
            return "\n".join([MARK, *lines]) + CUT
        lines.append(line)
    return "\n".join([MARK, *lines])


class Api:
    """GitHub's, of one repository."""

    def __init__(self) -> None:
        self.top = f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}"

    def __call__(self, method: str, path: str, content: dict[str, Any] | None = None, **query: Any) -> Any:
        address = f"{self.top}{path}" + (f"?{urlencode(query)}" if query else "")
        headers = {"Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}", "Accept": "application/vnd.github+json"}
        data = None if content is None else json.dumps(content).encode()
        # The address is the one the runner gives, never a text of the pull request.
        with urlopen(Request(address, data, headers, method=method), timeout=60) as answer:  # nosec B310
            return json.load(answer)

    def every(self, path: str, **query: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for page in range(1, 31):
            part = self("GET", path, per_page=100, page=page, **query)
            found += part
            if len(part) < 100:
                break
        return found


def pull_request(api: Api, run: dict[str, Any]) -> int | None:
    """The number of the open pull request whose head is what was run, None if it has moved on or is closed."""
    source = run["head_repository"]
    heads = api.every("/pulls", state="open", head=f"{source['owner']['login']}:{run['head_branch']}")
    numbers = [
        int(one["number"])
        for one in heads
        if one["head"]["sha"] == run["head_sha"] and (one["head"]["repo"] or {}).get("id") == source["id"]
    ]
    return numbers[0] if len(numbers) == 1 else None


def main(file: Path) -> None:
    run = json.loads(Path(os.environ["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8"))["workflow_run"]
    if run["event"] != "pull_request":
        raise SystemExit(f"error: the run was started by {run['event']}, not by a pull request")
    if file.is_symlink() or not file.is_file():
        raise SystemExit(f"error: {file}: is no file; the run left no report")
    with file.open(encoding="utf-8", errors="replace") as opened:
        text = body(opened.read(LIMIT))
    api = Api()
    number = pull_request(api, run)
    if number is None:
        print(f"no open pull request has {run['head_sha']} as its head: nothing is posted")
        return
    comments = api.every(f"/issues/{number}/comments")
    ours = [one["id"] for one in comments if one["user"]["login"] == BOT and one["body"].startswith(MARK)]
    if ours:
        api("PATCH", f"/issues/comments/{int(ours[0])}", {"body": text})
    else:
        api("POST", f"/issues/{number}/comments", {"body": text})
    print(f"pull request {number}: {'updated' if ours else 'posted'}, {len(text)} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
