"""
How PyTorch's threads wait for each other on a CPU; imported before torch, which reads it once.

Between two operations the threads of GNU's OpenMP, which PyTorch's builds for Linux use, spin: they
ask again and again, for about 300,000 rounds. On an idle machine that is the fastest way. Beside
other busy processes a thread that spins takes the core from the one that it waits for. After 10,000
rounds a thread sleeps instead: docs/speed.md has what that costs and gains. A value that is set
already is left alone.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
