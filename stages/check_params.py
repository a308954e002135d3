"""check-params: validate params.yaml; fail on an unknown, missing or invalid key.

    python -m stages.check_params

Input: params.yaml. Output: data/params-check.txt, whose content never changes, so that a valid edit reruns no other
stage. Lists all problems and exits with 2 if there are any.
"""

from pathlib import Path

from colintern.core.errors import exit_on_user_error
from colintern.params import load_params


@exit_on_user_error()
def main() -> None:
    """Run the stage."""
    load_params()
    out = Path("data/params-check.txt")
    out.parent.mkdir(exist_ok=True)
    out.write_text("every key of params.yaml is valid\n")


if __name__ == "__main__":
    main()
