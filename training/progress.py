"""
The bookkeeping of the loop: progress bar, speed, time left, log.jsonl, and steps that are not
finite.
"""

import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import UserError


class Clock:
    """The time left of a run of several phases. Phases take time in proportion to their
    arithmetic. work: {phase: FLOP}."""

    def __init__(self, work):
        self.work, self.done, self.seconds = work, 0.0, 0.0  # of finished phases

    def finish(self, name, seconds):
        self.done += self.work.pop(name, 0.0)
        self.seconds += seconds

    def left(self, name, share, seconds):
        """Seconds to the end of the last phase, when a share of this one has taken so long."""
        own = self.work.get(name, 0.0)
        rate = (self.seconds + seconds) / max(self.done + own * share, 1e-9)  # seconds per FLOP
        later = sum(flop for other, flop in self.work.items() if other != name)
        return seconds / share * (1 - share) + later * rate


def peak_memory(device):
    """Most megabytes of memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)


class Progress:
    """Counts and logs the steps of a phases.Run. clock: the run's Clock, or None."""

    def __init__(self, run, clock=None):
        self.run, self.log = run, Path(run.settings.out) / "log.jsonl"
        self.whole, self.began = clock, time.perf_counter()
        is_first = run.processes.is_first
        self.bar = tqdm(total=run.steps, initial=run.start, desc=run.name, disable=not is_first)
        self.clock, self.units = time.perf_counter(), 0  # units seen since the clock's time
        self.unchecked = []  # (step, rows, loss, gradient norm) of steps not checked yet

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.whole:
            self.whole.finish(self.run.name, time.perf_counter() - self.began)
        self.bar.close()

    @contextmanager
    def paused(self):
        """Leave the time spent here (validating, saving) out of the speed."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    def add(self, step, plan, loss, norm):
        """Count a step, check it when it is due, and log it every log_every steps.

        loss, norm: tensors; they are read only when due, because reading stalls a GPU."""
        settings, unit = self.run.settings, self.run.phase.unit
        self.bar.update()
        self.units += len(plan.rows) * plan.length  # padding counts too
        self.unchecked.append((step, plan.rows, loss, norm))
        is_due = step % settings.log_every == 0
        if is_due and self.run.processes.world > 1:
            dist.all_reduce(loss)
        skipped = False
        if is_due or settings.skip_bad_steps or (step + 1) % settings.save_every == 0:
            skipped = self.check()
        if is_due and not skipped:
            speed = round(self.units / (time.perf_counter() - self.clock))
            shown = f"loss {float(loss):.3f}, {speed:,} {unit}{self.time_left(step)}"
            self.bar.set_postfix_str(shown)
            entry = {
                "loss": round(float(loss), 5),
                "lr": self.run.optimizers[0].param_groups[0]["lr"],
                "grad_norm": round(float(norm), 5),
                unit: speed,
                "memory_mb": peak_memory(self.run.processes.device),
                "time": round(time.time(), 1),
            }
            self.run.processes.record(self.log, phase=self.run.name, step=step, **entry)

    def time_left(self, step):
        """ ", 7:41 to the end of phase2" if phases follow this one."""
        if not self.whole or len(self.whole.work) < 2:
            return ""
        share = (step + 1 - self.run.start) / (self.run.steps - self.run.start)
        left = self.whole.left(self.run.name, share, time.perf_counter() - self.began)
        return f", {tqdm.format_interval(left)} to the end of {[*self.whole.work][-1]}"

    def check(self):
        """Whether any unchecked step was skipped because its loss or gradient is not finite.
        Raises UserError if more are than --skip_bad_steps allows."""
        steps, self.unchecked = self.unchecked, []
        if not steps:
            return False
        run = self.run
        finite = torch.stack([loss + norm for _, _, loss, norm in steps]).isfinite().tolist()
        bad = [(step, rows) for (step, rows, _, _), good in zip(steps, finite) if not good]
        for step, rows in bad:
            run.skipped += 1
            if run.skipped > run.settings.skip_bad_steps:
                numbers = ", ".join(map(str, rows.tolist()))
                saved = "none was saved"
                if run.path.exists():
                    saved = f"{run.path} holds the last good step"
                raise UserError(
                    f"{run.name} step {step}: the loss or the gradient of rows {numbers} is not "
                    f"finite; {saved}; lower {run.name}_lr, fix the data, or give --skip_bad_steps"
                )
            run.processes.record(self.log, phase=run.name, step=step, skipped=rows.tolist())
        return bool(bad)
