"""check-params: refuse a params.yaml with an unknown, missing or invalid key.

    python -m stages.check_params

Input: params.yaml. Output: data/params-check.txt, always the same line; exit 2 with all problems.
"""

from pathlib import Path

from colintern.params import exit_on_user_error, load


@exit_on_user_error()
def main() -> None:
    load()
    out = Path("data/params-check.txt")
    out.parent.mkdir(exist_ok=True)
    out.write_text("every key of params.yaml is valid\n")


if __name__ == "__main__":
    main()
