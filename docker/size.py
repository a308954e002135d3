"""How much room the image takes and what takes it, in MB (1e6 bytes): exit 1 above the budget. Runs in the image.

Counted is what lies on the disk, on the file system of `/` alone: mounted folders and caches are not the image's.
flash-attn is printed, and left out of what the budget is held against: it is there only where it was asked for.
"""

import os
import sys
from importlib.metadata import distributions

BUDGET = 8000  # stated in docs/container.md
SHOWN = 15


def on_disk(top: str) -> int:
    """Bytes of all files below `top` on its file system; a file with several names counts once."""
    device, seen, total = os.stat(top).st_dev, set(), 0
    for folder, folders, files in os.walk(top):
        here = [os.path.join(folder, name) for name in folders]
        folders[:] = [os.path.basename(path) for path in here if os.lstat(path).st_dev == device]
        for name in files:
            about = os.lstat(os.path.join(folder, name))
            if about.st_dev == device and about.st_ino not in seen:
                seen.add(about.st_ino)
                total += about.st_blocks * 512
    return total


def packages() -> dict[str, int]:
    """Name -> bytes of each installed package, as its own list of files has them."""
    found = {}
    for package in distributions():
        paths = (str(file.locate()) for file in package.files or ())
        found[package.name] = sum(os.stat(path).st_size for path in paths if os.path.isfile(path))
    return found


def main(top: str = "/") -> int:
    total, parts = on_disk(top), packages()
    largest = sorted(parts.items(), key=lambda item: -item[1])[:SHOWN]
    print("largest packages, MB: " + ", ".join(f"{name} {size / 1e6:.0f}" for name, size in largest))
    print(f"all {len(parts)} packages {sum(parts.values()) / 1e6:.0f} MB of {total / 1e6:.0f} MB")
    counted = round((total - parts.get("flash-attn", parts.get("flash_attn", 0))) / 1e6)
    if counted > BUDGET:
        print(f"error: the image takes {counted} MB, its budget is {BUDGET} MB (docker/size.py)", file=sys.stderr)
        return 1
    print(f"{counted} MB, within the budget of {BUDGET} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
