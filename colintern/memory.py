"""Recognise lack of memory: torch, CUDA, Python and the C library each report it in words and types of their own."""

import errno
import re
import resource
from pathlib import Path

# Kernels and what cuDNN and Triton compile are loaded beside torch's allocator, which by then may hold all there is: a
# RuntimeError, and no OutOfMemoryError.
MESSAGES = (
    *("out of memory", "OUT_OF_MEMORY", "STATUS_ALLOC_FAILED", "DefaultCPUAllocator", "std::bad_alloc"),
    *("Cannot allocate memory", "cannot allocate memory", "can't start new thread", "failed to map segment"),
    *("unable to allocate shared memory", "MemoryError"),
)
HINT = "give this process more memory, or lower workers, batch_size, micro_batch_size or eval_batch_size"
FULL_ADDRESS_SPACE = 0.9  # of `ulimit -v`: a library that cannot be loaded is larger than what is left
SHOWN = 200  # characters of an error's last line


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that memory is missing."""
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(message in str(error) for message in MESSAGES)
    )


def describe_out_of_memory(error: BaseException) -> str:
    """Describe a failure for lack of memory in one line; "" if the error has another cause.

    A process that has reached the limit of its address space counts, whatever the error says: libraries swallow the
    lack, and fail later because they are half imported, for example.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    allowed = ""
    if limit != resource.RLIM_INFINITY:
        allowed = f"; `ulimit -v` allows {limit / 1e9:.1f} GB"
        peak = re.search(r"VmPeak:\s+(\d+) kB", Path("/proc/self/status").read_text())
        is_at_limit = peak is not None and int(peak[1]) * 1024 > FULL_ADDRESS_SPACE * limit
    if not (is_out_of_memory(error) or (allowed and is_at_limit)):
        return ""
    last_line = (str(error).strip().splitlines() or [""])[-1]
    return f"out of memory: {type(error).__name__}: {last_line[:SHOWN]}{allowed}; {HINT}"
