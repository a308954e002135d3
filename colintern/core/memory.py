"""Recognize out-of-memory errors: torch, CUDA, Python and the C library report them with different types and words."""

import errno
import mmap
import re
import resource
import threading
from pathlib import Path

# Not only OutOfMemoryError: kernels compiled by cuDNN and Triton are loaded outside torch's allocator, which may
# already have reserved all memory; that fails with a plain RuntimeError.
OOM_MESSAGES = (
    *("out of memory", "OUT_OF_MEMORY", "STATUS_ALLOC_FAILED", "DefaultCPUAllocator", "std::bad_alloc"),
    *("Cannot allocate memory", "cannot allocate memory", "can't start new thread", "failed to map segment"),
    *("unable to allocate shared memory", "MemoryError"),
)
OOM_HINT = "give this process more memory, or lower workers, batch_size, micro_batch_size or eval_batch_size"
THREAD_RESERVE_BYTES = 256 * 1024**2  # a stack of 8 MiB, an arena of malloc of up to 128 MiB, and some for Python
MIN_ADDRESS_SPACE_USE = 0.9  # share of `ulimit -v` from which any error counts as out of memory
MAX_MESSAGE_CHARACTERS = 200


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that memory is missing."""
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(message in str(error) for message in OOM_MESSAGES)
    )


def describe_out_of_memory(error: BaseException) -> str:
    """Describe an out-of-memory error in one line; return "" if the error has another cause.

    Any error counts once the process has used nearly all of `ulimit -v`: libraries hide the failed allocation and raise
    an unrelated error later, for example from a half-imported module.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    allowed = ""
    if limit != resource.RLIM_INFINITY:
        allowed = f"; `ulimit -v` allows {limit / 1e9:.1f} GB"
        peak = re.search(r"VmPeak:\s+(\d+) kB", Path("/proc/self/status").read_text())
        is_at_limit = peak is not None and int(peak[1]) * 1024 > MIN_ADDRESS_SPACE_USE * limit
    if not (is_out_of_memory(error) or (allowed and is_at_limit)):
        return ""
    last_line = (str(error).strip().splitlines() or [""])[-1]
    return f"out of memory: {type(error).__name__}: {last_line[:MAX_MESSAGE_CHARACTERS]}{allowed}; {OOM_HINT}"


def patch_thread_start_to_check_memory() -> None:
    """Patch `Thread.start` to raise OSError (ENOMEM) if fewer than THREAD_RESERVE_BYTES of `ulimit -v` are left.

    `Thread.start` waits until the new thread has started; a thread that runs out of memory before that leaves it
    waiting forever.
    """
    start = threading.Thread.start
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY or hasattr(start, "checks_memory"):
        return

    def start_if_memory_is_left(thread: threading.Thread) -> None:
        mmap.mmap(-1, THREAD_RESERVE_BYTES).close()
        start(thread)

    start_if_memory_is_left.checks_memory = True  # type: ignore[attr-defined]
    threading.Thread.start = start_if_memory_is_left  # type: ignore[method-assign,assignment]
