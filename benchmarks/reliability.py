"""
Is what is promised kept? Things are broken on purpose, many times, and what came of it is counted.

    python benchmarks/reliability.py                      # all of it
    python benchmarks/reliability.py --what kills --kills 60
    python benchmarks/reliability.py --what inputs --cases 10000
    sudo python benchmarks/reliability.py --what disks nodes   # small disks and networks of its own

kills     kill -9 at random moments of preparing, training, evaluating; then on to the same bits
disks     the disk full at such moments, or read-only: one line, no loss
ranks     1, 2 and 4 processes learn the same; one that dies, that stops, that is started again
nodes     two torchrun agents, each with a network of its own, train as one process does
waiting   how long a loop over as many features as SAYCam has waits for data
soak      many tiny steps through phases 0 to 3: memory, open files
inputs    corrupted input of every kind (see bad_inputs.py): success or one line
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import bad_inputs  # noqa: E402
import endurance  # noqa: E402
import fake_saycam  # noqa: E402
import processes  # noqa: E402
from processes import SMALL, TOY, call, command, environment, must  # noqa: E402

import config  # noqa: E402
from common.files import read_log  # noqa: E402
from config import option  # noqa: E402
from sources import ffmpeg  # noqa: E402

WHAT = ("kills", "disks", "ranks", "nodes", "waiting", "soak", "inputs")


@dataclass
class Config(config.Options):
    what: tuple[str, ...] = option(WHAT, choices=WHAT)  # is tried
    kills: int = option(60, low=1, high=10**6)  # kill -9, over all scenes
    disks: int = option(30, low=1, high=10**6)  # full disks, over all scenes
    cases: int = option(10000, low=1, high=10**8)  # of corrupted input
    steps: int = option(20000, low=100, high=10**9)  # of the soak
    seed: int = option(0, low=0, high=2**32 - 1)  # of moments and corrupted input


# ---------------------------------------------------------------------------------------------
# Scenes: what is done, from what, and what must come of it


@dataclass
class Scene:
    """before: a folder that it starts from; words: the command; made: the file or folder, in a copy
    of that folder, which it makes. A name in a folder that begins with a dot is nobody's business,
    nor is what the log says of speed."""

    name: str
    before: Path
    words: list
    made: str

    def result(self, folder):
        """{file: digest} of what was made; of a checkpoint, of what is in it."""
        made, found = folder / self.made, {}
        for path in sorted(made.rglob("*") if made.is_dir() else [made]):
            if path.is_file() and not path.name.startswith("."):
                found[str(path.relative_to(folder))] = digest(path)
        return found


def digest(path):
    if path.suffix == ".pt":
        whole = hashlib.sha256()
        flatten(torch.load(path, weights_only=True), whole.update)
        return whole.hexdigest()
    if path.name == "log.jsonl":
        entries = [
            [entry["phase"], entry["step"], entry.get("loss"), entry.get("val_loss")]
            for entry in read_log(path)
        ]
        return json.dumps(entries)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flatten(value, update):
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            update(str(key).encode())
            flatten(value[key], update)
    elif isinstance(value, (list, tuple)):
        for element in value:
            flatten(element, update)
    elif isinstance(value, torch.Tensor):
        update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    else:
        update(repr(value).encode())


def make_film(folder):
    """Twenty seconds of film, and its transcript."""
    folder.mkdir(parents=True)
    source = "testsrc2=size=320x180:rate=15:duration=40"
    words = [ffmpeg.find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", source, "-c:v", "mpeg4"]
    subprocess.run([*words, str(folder / "film.mp4")], check=True)
    rows = [f"{2 * i},{2 * i + 1.5},look at number {i} , here it is !" for i in range(19)]
    (folder / "film.csv").write_text("\n".join(["start,end,text", *rows]))


def make_scenes(home):
    """The Scenes, from the first commands to the last, each from where the one before came to."""
    empty, scenes = home / "empty", []
    empty.mkdir()
    fake_saycam.write(empty / "saycam", utterances=(60, 8, 8))
    make_film(empty / "films")
    frames = "--frames saycam/frames.txt --annotations saycam/train.json saycam/val.json"
    video = "--videos films --fps 4 --size 32 --vocab_size 300 --name w"
    scenes = [
        Scene("data.py toy_v2", empty, command("data.py", TOY), "data/w"),
        Scene(
            "data.py saycam",
            empty,
            command("data.py", "saycam --name w --size 32 --vocab_size 300", frames),
            "data/w",
        ),
        Scene("data.py video", empty, command("data.py", "video", video), "data/w"),
    ]
    before = run_on(home, "prepared", scenes[0])
    for name, flags in (
        ("vision", "--phase vision"),
        ("language", "--phase language"),
        ("phase1", "--phase 1"),
        ("phase2", "--phase 2"),
        ("phase3", "--phase 3"),
    ):
        words = command("train.py", SMALL, flags)
        if name == "phase1":
            scenes.append(Scene("features", before, words, "data/w/features"))
        scenes.append(Scene(f"train.py {name}", before, words, "out/w"))
        before = run_on(home, name, scenes[-1])
    words = command("eval.py", "--checkpoint out/w/phase3.pt --data data/w --device cpu")
    scenes.append(Scene("eval.py", before, words, "out/w"))
    return scenes


def run_on(home, name, scene):
    """A folder in which a scene has been played to its end."""
    folder = home / name
    shutil.copytree(scene.before, folder)
    must(scene.words, folder)
    return folder


# ---------------------------------------------------------------------------------------------
# Killed at any moment


def leftovers(folder):
    """What no finished command may leave behind."""
    return [p.name for p in folder.rglob("*") if p.suffix in (".tmp", ".partial", ".done")]


def kill_once(scene, folder, after):
    """Run a scene in a copy of where it starts, and kill it after so many seconds. Returns whether
    it was running then."""
    shutil.copytree(scene.before, folder)
    process = subprocess.Popen(
        scene.words,
        cwd=folder,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    time.sleep(after)
    was_running = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL) if was_running else None
    process.wait()
    return was_running


def kills(home, settings):
    """A kill that came too late, as the machine was faster than the first time, is none: again,
    sooner."""
    scenes, rng, whole = make_scenes(home), random.Random(settings.seed), {}
    equal = {scene.name: [] for scene in scenes}
    for number in range(settings.kills):
        scene = scenes[number % len(scenes)]
        if scene.name not in whole:
            clock = time.perf_counter()
            result = scene.result(run_on(home, f"whole {scene.name}", scene))
            whole[scene.name] = result, time.perf_counter() - clock
        wanted, took = whole[scene.name]
        folder = home / f"killed {number}"
        after = rng.uniform(0.2, 1.0) * took
        while not kill_once(scene, folder, after):
            shutil.rmtree(folder)
            after *= rng.uniform(0.2, 1.0)
        code, said = call(scene.words, folder)
        found, left = scene.result(folder), leftovers(folder)
        equal[scene.name].append(code == 0 and found == wanted and not left)
        if not equal[scene.name][-1]:
            differ = [name for name in wanted if found.get(name) != wanted[name]]
            print(f"  {scene.name}: exit {code}, {differ} differ, {left}, {said[-300:]}")
        shutil.rmtree(folder)
    print("| killed in | times | the same bits after all |\n|---|---|---|")
    for name, same in equal.items():
        print(f"| {name} | {len(same)} | {sum(same)} |")
    total = [same for kept in equal.values() for same in kept]
    print(f"{sum(total)} of {len(total)} kills: the same bytes and bits\n")


# ---------------------------------------------------------------------------------------------
# Disks that are full, read-only, or another's


def mounted(folder, megabytes):
    """Make a folder a small disk of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={int(1024 * megabytes)}k", "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def remount(folder, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def is_one_line(code, said):
    """Whether a command failed with one line, whatever its progress bars said."""
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    return code == 1 and len(lines) == 1 and "Traceback" not in said


def disk_usage(folder):
    """Bytes of the pages that a folder's files take."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


def disks(home, settings):
    probe = home / "probe"
    if not mounted(probe, 1):
        print("disks: not measured, mounting is not allowed here\n")
        return
    subprocess.run(["umount", str(probe)], check=True)
    scenes, rng, rows = make_scenes(home), random.Random(settings.seed), {}
    whole = {scene.name: run_on(home, f"whole {scene.name}", scene) for scene in scenes}
    for number in range(settings.disks):
        scene = scenes[number % len(scenes)]
        folder, how = (
            home / f"disk {number}",
            ("full", "full", "read-only")[number // len(scenes) % 3],
        )
        mounted(folder, 1024)
        shutil.copytree(scene.before, folder, dirs_exist_ok=True)
        grown = disk_usage(whole[scene.name]) - disk_usage(scene.before)
        kept = {p: p.read_bytes() for p in folder.rglob("*.pt")}
        if how == "full":  # room for a part of what is written
            room = shutil.disk_usage(folder).used + grown * rng.uniform(0.0, 0.8)
            remount(folder, f"size={int(room / 1024) // 4 * 4}k")
        else:
            remount(folder, "ro")
        code, said = call(scene.words, folder, TMPDIR=str(home))
        line = is_one_line(code, said)
        intact = all(path.read_bytes() == content for path, content in kept.items())
        remount(folder, "rw,size=1g")
        again, _ = call(scene.words, folder, TMPDIR=str(home))
        same = again == 0 and scene.result(folder) == scene.result(whole[scene.name])
        subprocess.run(["umount", str(folder)], check=True)
        if code:  # else there was room enough
            rows.setdefault((scene.name, how), []).append((line, intact, same))
        if code and not (line and intact and same):
            print(f"  {scene.name}, {how}: {code}, {intact}, {same}: {said[-500:]}")
    print("| disk | of | times | one line | earlier files intact | then the same bits |")
    print("|---" * 6 + "|")
    for (name, how), found in rows.items():
        counts = [sum(column) for column in zip(*found)]
        print(f"| {how} | {name} | {len(found)} | " + " | ".join(map(str, counts)) + " |")
    found = [row for rows_of in rows.values() for row in rows_of]
    print(f"{sum(map(all, found))} of {len(found)}: one line, nothing lost, then the same bits\n")


# ---------------------------------------------------------------------------------------------
# All of it

TRIES = {
    "kills": kills,
    "disks": disks,
    "ranks": processes.ranks,
    "nodes": processes.nodes,
    "waiting": endurance.waiting,
    "soak": endurance.soak,
    "inputs": bad_inputs.main,
}


def main(argv):
    settings = config.load(Config, argv, __doc__)
    torch.set_num_threads(1)
    for what in settings.what:
        clock = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            TRIES[what](Path(folder), settings)
        print(f"({what}: {time.perf_counter() - clock:.0f} s)\n", flush=True)


if __name__ == "__main__":
    config.run(main)
