"""Match regular expressions against module names in bounded time, whoever wrote the expression.

Python's `re` tries every way to match: `(a+)+$` takes longer than anybody waits for a name of 40 letters.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable

from colintern.params import UserError

MAX_MATCH_SECONDS = 5.0
MAX_PLAIN_CHARS = 1000
MAX_PLAIN_OPERATORS = 3  # repetitions and alternatives of one expression that is matched at once: cubic at worst
MATCH = """
import json, re, sys
pattern, names = json.load(sys.stdin)
json.dump([name for name in names if re.fullmatch(pattern, name)], sys.stdout)
"""


def match_names(pattern: str, names: Iterable[str], key: str) -> set[str]:
    """Return the names that `pattern` matches whole, found in a process of their own where it could take long.

    Args:
        pattern: a regular expression.
        names: names of modules.
        key: the setting that the expression is the value of, for the message.

    Raises:
        re.error: it is not a regular expression.
        UserError: it takes longer than `MAX_MATCH_SECONDS`.
    """
    names = list(names)
    if _is_plain(pattern):
        return {name for name in names if re.fullmatch(pattern, name)}
    command = [sys.executable, "-I", "-S", "-c", MATCH]
    try:
        done = subprocess.run(
            command, input=json.dumps([pattern, names]), capture_output=True, text=True, timeout=MAX_MATCH_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{key}: {pattern[:200]!r} takes more than {MAX_MATCH_SECONDS:g} s to match against {len(names)} module "
            f"names; write it without repetitions inside a repeated group, as in (a+)+"
        ) from error
    if done.returncode:
        raise re.error(f"cannot be matched: {done.stderr.strip().rpartition(chr(10))[2]}")
    return set(json.loads(done.stdout))


def _is_plain(pattern: str) -> bool:
    """Return whether the expression is short, repeats no group and has few repetitions and alternatives."""
    text = pattern.replace("(?:", "(")
    operators = re.findall(r"[*+?{|]", text)
    return len(text) <= MAX_PLAIN_CHARS and len(operators) <= MAX_PLAIN_OPERATORS and not re.search(r"\)[*+?{]", text)
