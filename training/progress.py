"""
The bookkeeping of the loop: progress bar, speed, log.jsonl, and steps that are not finite.
"""

import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import UserError


class Progress:
    """Counts and logs the steps of a phases.Run."""

    def __init__(self, run):
        self.run, self.log = run, Path(run.settings.out) / "log.jsonl"
        is_first = run.processes.is_first
        self.bar = tqdm(total=run.steps, initial=run.start, desc=run.name, disable=not is_first)
        self.clock, self.units = time.perf_counter(), 0  # units seen since the clock's time
        self.unchecked = []  # (step, rows, loss, gradient norm) of steps not checked yet

    def __enter__(self):
        return self

    def __exit__(self, *error):
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
            speed = {unit: round(self.units / (time.perf_counter() - self.clock))}
            self.bar.set_postfix(loss=f"{float(loss):.3f}", **speed)
            lr = self.run.optimizers[0].param_groups[0]["lr"]
            entry = {"loss": round(float(loss), 5), "lr": lr, **speed}
            self.run.processes.record(self.log, phase=self.run.name, step=step, **entry)

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
