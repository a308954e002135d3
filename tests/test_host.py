"""Settings of the C library's allocator by `configure_cpu_runtime`, read in a separate process."""

import subprocess
import sys

SCRIPT = """
import resource, torch
from colintern.modeling.runtime import configure_cpu_runtime

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12 << 20)  # 48 MB, 12,288 pages; up to 32 MB glibc learns to keep a block by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(2)
faults()
plain = faults()
configure_cpu_runtime(1)
faults()
print(plain, faults(), torch.get_num_threads())
"""


def test_memory_is_kept_for_the_next_tensor():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    plain, settled, threads = map(int, done.stdout.split())
    assert threads == 1
    assert plain > 10_000 and settled < plain / 20, "glibc gives 48 MB back at once, unless told"
