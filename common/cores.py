"""
All cores: work that is shared by a pool of processes, and work beside this process.
"""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading


def begin_worker():
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def work_all(work, jobs):
    return [work(job) for job in jobs]


def on_all_cores(work, jobs, window=512, together=16):
    """Yield work(job) for each job, in order, worked on by all cores, `together` at a time.

    At most `window` results are in memory at a time."""
    workers = concurrent.futures.ProcessPoolExecutor(
        os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count(),
        initializer=begin_worker,
    )
    waiting, together = collections.deque(), min(together, window)
    try:
        for start in range(0, len(jobs), together):
            waiting.append(workers.submit(work_all, work, jobs[start : start + together]))
            if len(waiting) * together >= window:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:  # Ctrl-C, or whoever asked has enough: what nobody has begun is not begun any more
        workers.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------
# One process beside this one


def begin(work, *arguments):
    """Begin work(*arguments) in a process of its own, beside what this one does; it is killed with
    this one, or it would go on writing into what the next run writes."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(
        target=work_aside, args=(ours, theirs, work, *arguments), daemon=True
    )
    process.start()
    theirs.close()
    process.lifeline = ours  # open as long as this process lives, and has it
    return process


def work_aside(ours, theirs, work, *arguments):
    """What the system complains of is this process's exit code, and 100, for end() to tell. Of
    Ctrl-C it hears through the process that began it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ours.close()
    threading.Thread(target=die_with, args=(theirs,), daemon=True).start()
    try:
        work(*arguments)
    except OSError as error:
        sys.exit(100 + error.errno if error.errno else 1)


def die_with(lifeline):
    """Nothing is ever said on it, but it closes where the process at its other end dies."""
    lifeline.poll(None)
    os._exit(1)


def end(process, path):
    """Wait for a process that writes to a path. Raises OSError where it could not, RuntimeError
    where it ended otherwise: it has shown its traceback."""
    process.join()
    if process.exitcode > 100:
        raise OSError(process.exitcode - 100, os.strerror(process.exitcode - 100), path)
    if process.exitcode:
        raise RuntimeError(f"what writes {path} ended with {process.exitcode}")
