"""
The processes that train together: how they find each other, and how they wait for each other.
"""

import ctypes
import inspect
import os
import signal
import sys
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
from common.files import append_log
from config import UserError, error_line
from fast.memory import keep_memory


@dataclass
class Processes:
    """This process among those that train together, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self):
        return self.rank == 0

    def print(self, line):
        if self.is_first:
            tqdm.write(line)

    def record(self, log, **entry):
        """Append an entry to log.jsonl."""
        if self.is_first:
            append_log(log, entry)

    def wait(self):
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value):
        """The first process's value of something that each has found out."""
        found = [value]
        if self.world > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def end_group(self):
        """End the group of the processes, after their last collective. After an error it is left to
        the end of the process: with NCCL ending it would wait for the others, who wait for us."""
        if dist.is_initialized():
            dist.destroy_process_group()


def is_first_process():
    """Whether this is the only process, or the first of torchrun's."""
    return int(os.environ.get("RANK", 0)) == 0


def end_with_launcher():
    """End this process when torchrun ends, however it does."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() == 1:  # it ended before
            sys.exit(1)


@contextmanager
def reported_once():
    """For what every process of torchrun's does alike: an error is printed by the first alone. It
    then kills torchrun, whose thirty lines of traceback would hide that one. (On several machines
    torchrun is left alone: it must tell the others.)"""
    try:
        yield
    except (UserError, OSError) as error:
        if os.environ.get("GROUP_WORLD_SIZE") != "1" or not hasattr(signal, "SIGKILL"):
            raise
        if is_first_process():
            why = "(torchrun is killed here: its traceback would hide this line)"
            print(error_line(error), why, file=sys.stderr, flush=True)
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # this process ends with torchrun
        sys.exit(1)


def find_device(settings):
    """The torch.device of this process. Raises UserError if this machine has too few GPUs."""
    device, local = checkpoint.choose_device(settings.device), os.environ.get("LOCAL_RANK", "0")
    if device.type != "cuda" or device.index is not None:
        return device
    wanted, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if wanted > count:
        raise UserError(
            f"{wanted} processes on a machine with {count} GPUs: give torchrun "
            f"--nproc_per_node={count}, or train.py --device=cpu"
        )
    return torch.device("cuda", int(local))


def find_processes(settings):
    """The Processes of this process: one of torchrun's, or the only one. Raises UserError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        keep_memory()
    if world > 1:
        patience = timedelta(minutes=settings.patience)
        # NCCL refuses two processes on one GPU, which --device=cuda:0 asks for
        has_own = device.type == "cuda" and checkpoint.choose_device(settings.device).index is None
        how = {"backend": "nccl" if has_own else "gloo", "timeout": patience}
        takes = inspect.signature(dist.init_process_group).parameters
        if has_own and "device_id" in takes:  # from PyTorch 2.3 on
            how["device_id"] = device
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=patience))
            own = agree_on_store(store, rank, world, patience)
            dist.init_process_group(store=own, rank=rank, world_size=world, **how)
        except dist.DistError as error:
            raise UserError(
                f"rank {rank}: {world} processes did not come together within "
                f"{settings.patience:g} minutes (--patience): {str(error).splitlines()[0]}"
            ) from None
    return Processes(rank, world, device)


def agree_on_store(store, rank, world, patience):
    """A part of torchrun's store, under a key prefix that only this launch uses.

    torchrun's store keeps the addresses of dead processes after a restart, so each launch agrees on
    a fresh prefix. Every other rank asks under a random key; rank 0 answers each key with the
    prefix, until each rank has written under the prefix that it is present. Raises DistError."""
    key = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", key)
        store.wait([f"answer/{key}"], patience)
        prefix = store.get(f"answer/{key}").decode()
        store.set(f"{prefix}/present/{rank}", "")
        return dist.PrefixStore(prefix, store)
    prefix, absent = key, set(range(1, world))
    limit = time.monotonic() + patience.total_seconds()
    while absent:
        if time.monotonic() > limit:
            raise dist.DistStoreError(f"ranks {sorted(absent)} did not come")
        for other in absent:
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", prefix)
        absent = {other for other in absent if not store.check([f"{prefix}/present/{other}"])}
        time.sleep(0.02)
    return dist.PrefixStore(prefix, store)


def is_lost_process(error):
    """Whether an error of a collective means that another process ended or does not answer."""
    signs = ("gloo", "Connection closed by peer", "Connection reset", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
