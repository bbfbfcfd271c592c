"""
Memory that glibc keeps for the next step instead of returning it to the system after each tensor.

A step allocates the same large tensors as the step before; memory that was returned must be mapped
again, page by page. Only on Linux with glibc; elsewhere these functions do nothing. What it buys:
docs/speed.md.
"""

import ctypes
import sys


def keep_memory():
    """Let the C library keep freed memory."""
    mallopt = c_library("mallopt")
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
    mallopt(-4, 0)  # M_MMAP_MAX: allocate from the heap alone


def return_memory():
    """Return what is free to the system: between batches of many lengths the heap fragments and
    would grow for hours."""
    c_library("malloc_trim")(0)


def c_library(name):
    """A function of the C library, or one that does nothing."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name, lambda *_: None)
