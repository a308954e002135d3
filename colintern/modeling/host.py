"""How a process uses the processor: its threads, and whether it keeps memory that it will ask for again."""

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NEVER = -1


def settle(threads: int) -> None:
    """Let torch compute in so many threads, and keep the memory of tensors that are gone for the next ones.

    glibc gives blocks above 32 MB back to the system at once, which then clears every page of the next tensor: a tenth
    of the demo's training time. The process stays as large as it once was. No effect with another C library.
    """
    torch.set_num_threads(threads)
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)
