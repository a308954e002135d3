"""Environments of slow tests, with packages that the locks do not have; uv makes them below the repository, once."""

import subprocess
import sys
from pathlib import Path

import pytest


def make_environment(folder: Path, *options: str, setup: str = "") -> Path:
    """Return Python of the environment in `folder`; the test is skipped where it cannot be installed.

    Args:
        folder: ignored by git.
        options: of `uv pip install`, with the packages.
        setup: lines of a .pth file, which Python runs when it starts.
    """
    python = folder / "env/bin/python"
    if not (folder / "installed").is_file():
        folder.mkdir(exist_ok=True)
        tools, uv = folder / "tools", folder / "tools/bin/uv"
        for command in (
            [sys.executable, "-m", "venv", tools],
            [tools / "bin/pip", "install", "-q", "uv"],
            [uv, "venv", "-q", "--allow-existing", "--python", sys.executable, folder / "env"],
            [uv, "pip", "install", "-q", "--compile-bytecode", "--python", python, *options],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{options[-1]} cannot be installed here: {done.stderr.strip()[-500:]}")
        [packages] = folder.glob("env/lib/python3*/site-packages")
        (packages / "project.pth").write_text(setup)
        (folder / "installed").touch()
    return python
