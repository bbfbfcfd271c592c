"""
Many processes: torchrun with 1, 2 and 4 of them, and two nodes; see reliability.py. And what all of
these tries share: how a command is run.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# a small toy world for all phases
TOY = (
    "toy_v2 --name=w --size=16 --scenes=150 --clips=30 --moments=20 --lines=2000 --items=120 "
    "--games=140 --replay=20 --questions=10 --vocab_size=400"
)
SMALL = (
    "--data=data/w --out=out/w --patch=8 --vision_width=16 "
    "--vision_depth=2 --vision_heads=2 --prototypes=16 --n_layer=2 --n_head=2 --n_embd=16 "
    "--block_size=700 --vision_batch=8 "
    "--language_batch=8 --phase1_batch=8 --phase2_batch=8 --phase3_batch=8 --device=cpu "
    "--vision_steps=60 --language_steps=80 --phase1_steps=80 --phase2_steps=80 --phase3_steps=80 "
    "--eval_every=40 --save_every=15 --log_every=1 --evaluate=False"
)


def command(script, *flags):
    words = [word for flag in flags for word in flag.split()]
    return [sys.executable, str(ROOT / script), *words]


def environment(**more):
    return {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **more}


def call(words, folder, **more):
    """Run a command to its end; returns (exit code, what it wrote to stderr)."""
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, env=environment(**more), check=False
    )
    return done.returncode, done.stderr


def must(words, folder, **more):
    code, said = call(words, folder, **more)
    if code:
        sys.exit(f"{' '.join(words)}: {said[-3000:]}")


# ---------------------------------------------------------------------------------------------
# Many processes


def torchrun(processes, *flags, port=29571):
    words = [word for flag in flags for word in flag.split()]
    more = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    return [sys.executable, *more, *words]


def train_flags(out, *more):
    return f"{ROOT}/train.py", SMALL.replace("out/w", f"out/{out}"), *more


def furthest(a, b):
    """The largest difference between the weights of two checkpoints."""
    one, two = (torch.load(path, weights_only=True) for path in (a, b))
    one, two = (found.get("dino") or found["weights"] for found in (one, two))
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in one)


PHASES = ("vision", "language", "phase1", "phase2", "phase3")


def ranks(home, settings):
    must(command("data.py", TOY), home)
    must(command("train.py", SMALL.replace("out/w", "out/1x1")), home)
    print("| processes x micro-batches | " + " | ".join(PHASES) + " |")
    print("|---" * (1 + len(PHASES)) + "|")
    for processes, pieces in ((1, 4), (2, 1), (2, 2), (4, 1), (4, 2)):
        out = f"{processes}x{pieces}"
        must(torchrun(processes, *train_flags(out, f"--grad_accum={pieces}")), home)
        far = [furthest(home / f"out/1x1/{n}.pt", home / f"out/{out}/{n}.pt") for n in PHASES]
        print(f"| {processes} x {pieces} | " + " | ".join(f"{d:.1e}" for d in far) + " |")
    print("the largest difference of a weight from one process's\n")
    for before, after in ((2, 4), (4, 1)):
        out = f"from{before}to{after}"
        run = start(torchrun(before, *train_flags(out)), home)
        wait_for(lambda out=out: (home / f"out/{out}/language.pt").exists())
        end(run)
        must(torchrun(after, *train_flags(out)), home)
        far = max(furthest(home / f"out/1x1/{n}.pt", home / f"out/{out}/{n}.pt") for n in PHASES)
        print(f"killed with {before} processes, gone on with {after}: {far:.1e}")
    for name, signals in (("dies", signal.SIGKILL), ("stops", signal.SIGSTOP)):
        out = f"one_{name}"
        run = start(torchrun(2, *train_flags(out, "--phase3_steps=100000", "--patience=0.2")), home)
        wait_for(lambda out=out: (home / f"out/{out}/phase3.pt").exists())
        clock = time.perf_counter()
        workers = workers_of(run)
        os.kill(workers[1], signals)
        run.wait(timeout=600)
        took = time.perf_counter() - clock
        kill(workers)  # one that is stopped hears nothing else
        ends = f"the job ends after {took:.0f} s, exit {run.returncode}"
        print(f"a rank {name} (--patience=0.2): {ends}")
    restarts(home)


def restarts(home, tries=5):
    """A process is killed under torchrun --max-restarts=1, whose store lives on in two ways."""
    far = []
    for number in range(2 * tries):
        out = f"restarted{number}"
        words = torchrun(2, "--max-restarts=1", *train_flags(out))
        if number % 2:
            meeting = "--rdzv_backend=c10d --rdzv_endpoint=localhost:29573"
            words = [word for word in words if not word.startswith("--master_port")]
            words[3:3] = meeting.split()
        run = start(words, home)
        wait_for(lambda out=out: (home / f"out/{out}/language.pt").exists())
        os.kill(workers_of(run)[number // 2 % 2], signal.SIGKILL)
        run.wait(timeout=600)
        if run.returncode == 0:
            ends = [(home / f"out/1x1/{n}.pt", home / f"out/{out}/{n}.pt") for n in PHASES]
            far.append(max(furthest(*pair) for pair in ends))
    ways = f"{len(far)} of {2 * tries} started again, furthest weight {max(far, default=0):.1e}"
    print(f"a rank is killed, --max-restarts=1, static and c10d in turn: {ways}\n")


def start(words, folder):
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def end(run):
    workers = workers_of(run)  # torchrun's are in sessions of their own
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    kill(workers)


def kill(workers):
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds=300):
    limit = time.time() + seconds
    while not condition():
        if time.time() > limit:
            sys.exit("what was waited for did not come")
        time.sleep(0.05)


def workers_of(run):
    """The processes that a torchrun started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        rank = [word for word in words if word.startswith(b"RANK=")]
        if rank and int(parent) == run.pid:
            found[int(rank[0][5:])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def nodes(home, settings):
    """Two agents in two network namespaces, joined by a cable."""
    run = lambda line: subprocess.run(line.split(), capture_output=True, check=False).returncode
    names = [f"node{os.getpid()}{letter}" for letter in "ab"]
    lines = [f"ip netns add {name}" for name in names]
    lines += [f"ip link add {names[0]}v type veth peer name {names[1]}v"]
    for i, name in enumerate(names):
        lines += [f"ip link set {name}v netns {name}"]
        lines += [f"ip netns exec {name} ip addr add 10.91.7.{i + 1}/24 dev {name}v"]
        lines += [f"ip netns exec {name} ip link set {end} up" for end in (f"{name}v", "lo")]
    try:
        if any(map(run, lines)):
            print("nodes: not measured, network namespaces are not allowed here\n")
            return
        must(command("data.py", TOY), home)
        must(command("train.py", SMALL.replace("out/w", "out/one")), home)
        flags = "--nnodes=2 --master_addr=10.91.7.1 --node_rank="
        agents = []
        for i, name in enumerate(names):
            words = torchrun(1, flags + str(i), *train_flags("two"))
            agent = subprocess.Popen(
                ["ip", "netns", "exec", name, *words],
                cwd=home,
                env=environment(GLOO_SOCKET_IFNAME=f"{name}v"),
                stderr=subprocess.PIPE,
                text=True,
            )
            agents.append(agent)
        said = [agent.communicate(timeout=600)[1][-2000:] for agent in agents]
        codes = [agent.returncode for agent in agents]
        if any(codes):
            sys.exit(f"nodes: {codes}, {said}")
        far = [furthest(home / f"out/one/{n}.pt", home / f"out/two/{n}.pt") for n in PHASES]
        print(f"two nodes of one process each, over a network: furthest weight {max(far):.1e}\n")
    finally:
        for name in names:
            run(f"ip netns del {name}")
