"""
Several processes: a pool of workers on all cores, and one process beside this one.
"""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading


def begin_worker():
    """In a worker: ignore Ctrl-C, which the parent handles, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def work_all(work, jobs):
    return [work(job) for job in jobs]


def on_all_cores(work, jobs, window=512, together=16):
    """Yield work(job) for each job, in order, computed on all cores, `together` jobs at a time. At
    most `window` results are in memory."""
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
    finally:  # after Ctrl-C or an early end, cancel the jobs that have not started
        workers.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------
# One process beside this one


def begin(work, *arguments):
    """Start work(*arguments) in another process and return it. It is killed with this process;
    else it would write into the files of the next run."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(
        target=work_aside, args=(ours, theirs, work, *arguments), daemon=True
    )
    process.start()
    theirs.close()
    process.lifeline = ours  # open as long as this process lives
    return process


def work_aside(ours, theirs, work, *arguments):
    """Run work(*arguments) in the new process. The exit code of an OSError is 100 + errno; end()
    turns it back into an OSError. Ctrl-C is handled by the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ours.close()
    threading.Thread(target=die_with, args=(theirs,), daemon=True).start()
    try:
        work(*arguments)
    except OSError as error:
        sys.exit(100 + error.errno if error.errno else 1)


def die_with(lifeline):
    """End this process when the pipe closes, which it does when the parent dies."""
    lifeline.poll(None)
    os._exit(1)


def end(process, path):
    """Wait for a process of begin() that writes to a path. Raises OSError if it could not write,
    RuntimeError if it failed otherwise, after its own traceback."""
    process.join()
    if process.exitcode > 100:
        raise OSError(process.exitcode - 100, os.strerror(process.exitcode - 100), path)
    if process.exitcode:
        raise RuntimeError(f"what writes {path} ended with {process.exitcode}")
