"""
Corrupted input of every kind, and what the commands make of it; see reliability.py.

A case is a folder of good files of which one was corrupted, or a command line that was, and the
command that meets it; it follows from a seed and its number. It must end in success or in one line;
not in a traceback, nor after 30 seconds, nor with more than 2 GB, nor with a file written where
none should be. Commands run in forks of one process that has imported everything, so that a case
takes a moment.
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import zipfile
import zlib
from pathlib import Path

from PIL import Image
from processes import SMALL, command, must

from sources import toolbox_prompts

SECONDS, MEGABYTES = 30, 2048
WORLD = (
    "toy --name=w --size=16 --scenes=24 --clip_frames=4 --lines=200 --trials=0.1 --vocab_size=300"
)
FEW = SMALL.replace("=60", "=2").replace("=80", "=2").replace("size=700", "size=96")  # steps
ODD_VALUES = (
    None, True, -1, 0, 1.5, 1e308, 2**70, "", "x", "x" * 9999, "\x00", "../../x", "<image>" * 99,
    [], {}, [[]], [None], {"": ""}, "\ud800", [1] * 999, "NaN", "é",
)  # fmt: skip
ODD_WORDS = (
    "", "0", "-1", "1e9999", "nan", "x", "None", "True", "()", "[1]", "1,2", "'", "\\", "%s",
    "../..", "/dev/zero", "/proc/self/mem", "pipe", "data", "data/w", "cfg.py", "é", "\udc80",
    "1" * 5000, "--",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Good files


def make_good(good):
    """A folder with something of everything, small."""
    good.mkdir()
    must(command("data.py", WORLD), good)
    must(command("train.py", FEW), good)
    must(command("export.py", "out/w/phase2.pt hf"), good)
    flags = [word for word in FEW.split()[1:] if "steps=" not in word and "out=" not in word]
    lines = [word[2:].replace("=", " = ", 1) for word in flags]
    lines = [f'{n} = "{v}"' if not v[0].isdigit() and v != "False" else f"{n} = {v}"
             for n, v in (line.split(" = ") for line in lines)]  # fmt: skip
    (good / "cfg.py").write_text("\n".join([*lines, 'out = "out/x"', "language_steps = 1"]) + "\n")
    make_pictures(good)
    make_tables(good)
    (good / "films").mkdir()
    import test_video  # of tests/: a film whose every frame is known

    test_video.make_film(good / "films" / "a.mkv", seconds=16)
    said = [(i, i + 0.9, f"look , number {i} !") for i in range(16)]
    (good / "films" / "a.srt").write_text(test_video.srt(said))
    rows = [f"{a},{b},{words}" for a, b, words in said]
    (good / "a.csv").write_text("\n".join(["start,end,text", *rows]))
    (good / "a.vtt").write_text("WEBVTT\n\n" + test_video.srt(said).replace(",", "."))
    cha = [f"*MOT:\t{words} \x15{1000 * a}_{int(1000 * b)}\x15" for a, b, words in said]
    (good / "a.cha").write_text("@UTF8\n@Begin\n" + "\n".join(cha) + "\n@End\n", encoding="utf-8")


def make_pictures(good):
    (good / "pictures").mkdir()
    page = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB")
    kinds = ("png", "jpg", "gif", "bmp", "tiff", "webp", "ppm", "png")
    modes = ("RGB", "RGB", "P", "L", "CMYK", "RGB", "RGB", "RGBA")
    for i in range(36):
        page.convert(modes[i % 8]).save(good / "pictures" / f"{i}.{kinds[i % 8]}")
    with zipfile.ZipFile(good / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((good / "pictures").iterdir()):
            archive.write(path, path.name)


def make_tables(good):
    names = sorted(path.name for path in (good / "pictures").iterdir())
    rows = [f"{name},a red ball number {i}" for i, name in enumerate(names * 2)]
    (good / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    (good / "lines.txt").write_text("\n".join(f"look , a ball ! {i}" for i in range(40)))
    talks = [
        {"id": i, "image": names[i], "conversations": [
            {"from": "human", "value": "<image>\nwhat is it ?"}, {"from": "gpt", "value": "a ball"},
        ]} for i in range(len(names))
    ]  # fmt: skip
    (good / "talks.json").write_text(json.dumps(talks))
    items = [
        {
            "utterance": "a ball , look !",
            "frame_filenames": names[3 * i : 3 * i + 3],
            "video_filename": f"v{i}",
        }
        for i in range(12)
    ]
    (good / "train.json").write_text(json.dumps({"data": items}))
    (good / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1, "ball": 2, "look": 3}))
    (good / "tests").mkdir()
    for test, counts, answer in (
        ("picture_vocabulary", [4], "B"),
        ("left_right", [4], "A"),
        ("delayed_response_open", [3], "top left"),
        ("memory", [1] + [2] * 14, "A"),
        ("object_counting", [1], "7"),
    ):
        said = []
        for number, count in enumerate(counts):
            question = toolbox_prompts.write(test, count, "ball")
            if test == "memory" and number == 0:
                question = f"{toolbox_prompts.NEW}(A) <image>"
            said += [{"from": "human", "value": question}]
            said += [{"from": "gpt", "value": answer}]
        item = {"image": names[: sum(counts)], "conversations": said, "subset": "seen"}
        (good / "tests" / f"{test}.json").write_text(json.dumps([item] * 2))
    pair = {"image": names[:2], "phrases": ["a ball", "a cup"]}
    (good / "tests" / "looking_while_listening.json").write_text(json.dumps([pair] * 2))
    asked = [{"from": "human", "value": "<image>what ?"}]
    choice = {"image": names[0], "conversations": asked, "choices": ["a", "b"], "answer": 0}
    (good / "choice.json").write_text(json.dumps([choice] * 2))
    a, b = names[:2]
    rows = [f"lexical,1,{a},{b},a ball,", f"syntax,2,{a},{b},a ball,a cup"]
    header = "task,bin,image1,image2,text1,text2"
    (good / "machine.csv").write_text("\n".join([header, *rows]))
    (good / "manifest.csv").write_text(f"trial,image1,image2,text1\n1,{a},{b},a ball\n")
    (good / "human.csv").write_text("trial,image1,image2\n1,0.7,0.3\n")


# ---------------------------------------------------------------------------------------------
# Corrupting


def replace(path, content):
    """Other content for a file, which may be one file with the good one."""
    path.unlink()
    path.write_bytes(content)


def corrupt_bytes(rng, path):
    """Cut short, made longer, turned over, emptied, doubled; or something else in its place."""
    content = bytearray(path.read_bytes())
    i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    how = rng.randrange(12)
    if how < 3:
        for _ in range(rng.choice((1, 3, 30))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how < 11:
        content = (
            content[:i],
            content[i:],
            content[:i] + rng.randbytes(j - i) + content[j:],
            content[:i] + content[j:],
            content[:j] + content[i:],
            content + rng.randbytes(rng.choice((1, 100))),
            b"",
            content[:i] + bytes(j - i) + content[j:],
        )[how - 3]
    if how < 11:
        return replace(path, bytes(content))
    path.unlink()
    rng.choice((lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to(path.name)))()


def corrupt_text(rng, path):
    """Words dealt, doubled or replaced by odd ones; another encoding."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for _ in range(rng.choice((1, 1, 4))):
        at = rng.randrange(len(lines))
        parts = lines[at].replace(",", " , ").split(" ")
        parts[rng.randrange(len(parts))] = rng.choice(ODD_WORDS).replace("\udc80", "\x00")
        lines[at] = rng.choice((" ".join(parts).replace(" , ", ","), lines[at] * 2, "", lines[0]))
    encoding = rng.choice(("utf-8", "utf-8", "utf-16", "utf-8-sig"))
    replace(path, "\n".join(lines).encode(encoding, "replace"))


def corrupt_json(rng, path):
    """One value somewhere in it replaced by an odd one, left out, or doubled."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    places = []

    def walk(node):
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in list(pairs)[:50]:
            places.append((node, key))
            if isinstance(value, (dict, list)):
                walk(value)

    walk(whole)
    for _ in range(rng.choice((1, 1, 3))):
        node, key = rng.choice(places)
        how = rng.randrange(4)
        if how == 0 and isinstance(node, dict):
            node.pop(key, None)
        elif how == 1 and isinstance(node, list):
            node += node[:1]
        elif isinstance(node, dict) or key < len(node):
            node[key] = rng.choice(ODD_VALUES)
    replace(path, json.dumps(whole).encode("utf-8", "replace"))


def corrupt(rng, path):
    """In one of the ways that its kind has."""
    ways = [corrupt_bytes]
    if path.suffix in (".json",):
        ways += [corrupt_json] * 3
    elif path.suffix in (".csv", ".txt", ".srt", ".vtt", ".cha", ".py", ".tiktoken"):
        ways += [corrupt_text] * 2
    rng.choice(ways)(rng, path)


# ---------------------------------------------------------------------------------------------
# Kinds of cases: each corrupts something in a folder and gives (script, flags, the file at fault)


def one_of(rng, folder, pattern):
    return rng.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))


def corrupted_file(script, flags, *patterns):
    """A kind: a file is corrupted, and a command meets it."""

    def make(rng, folder):
        path = one_of(rng, folder, rng.choice(patterns))
        corrupt(rng, path)
        return script, flags.replace("{}", str(path.relative_to(folder))).split(), path.name

    return make


def configs(rng, folder):
    if rng.randrange(2):
        corrupt(rng, folder / "cfg.py")
    else:
        odd = f"{rng.choice(OPTIONS['train'])} = {rng.choice(ODD_WORDS)}"
        lines = (folder / "cfg.py").read_text() + odd
        replace(folder / "cfg.py", lines.encode("utf-8", "replace"))
    # whatever lines were lost: not the larger world and the many steps that are the defaults
    small = "--data=data/w --language_steps=1"
    return "train", f"cfg.py --phase language {small}".split(), "cfg.py"


# what each script is asked, where a option besides is odd
ASKED = {
    "train": "cfg.py --phase language",
    "sample": "--checkpoint out/w/phase2.pt --image pictures/0.png --max_new_tokens 2",
    "eval": "--checkpoint out/w/phase2.pt --task labeled_s --out out/e",
    "data": "toy --size=16 --scenes=10 --lines=20 --trials=0.01 --vocab_size=260 --name=x",
}
OPTIONS = {}  # script: names of its options
MODULES = {  # script: the module of its main()
    "train": "train",
    "sample": "sample",
    "eval": "eval",
    "export": "export",
    "data": "sources.command",
}


def flags(rng, folder):
    script = rng.choice(sorted(ASKED))
    words = ASKED[script].split()
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice([*OPTIONS[script], "nonsense", "", "-"])
        words.append(f"--{name}={rng.choice(ODD_WORDS)}" if rng.randrange(4) else f"--{name}")
    if rng.randrange(4) == 0:
        words.insert(rng.randrange(len(words)), rng.choice(ODD_WORDS))
    return script, [word.replace("\x00", "") for word in words], ""


def zips(rng, folder):
    path, how = folder / "z.zip", rng.randrange(5)
    if how < 2:
        corrupt(rng, path)
    else:
        path.unlink()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for picture in sorted((folder / "pictures").iterdir()):
                name = picture.name
                if how == 2:  # names that lead elsewhere, or are another's too
                    name = rng.choice(("../", "/etc/", "a/", "a/../b/", "..\\", "")) + name
                archive.write(picture, name)
                if how == 3:
                    archive.write(picture, f"b/{name}")
            if how == 4:
                archive.writestr("0.png", bytes(rng.choice((1, 300)) << 20))
    return "data", "pairs --csv pairs.csv --images z.zip --name x --size 8".split(), ""


def pictures(rng, folder):
    path = one_of(rng, folder, "pictures/*")
    if rng.randrange(3) == 0:  # a PNG that says it is of another size, with the right checksum
        path = folder / "pictures" / "0.png"
        content = bytearray(path.read_bytes())
        for at in rng.choice(((16,), (20,), (16, 20))):
            side = rng.choice((0, 1, 100_000, 60_000, 2**31 - 1))
            content[at : at + 4] = side.to_bytes(4, "big")
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        replace(path, bytes(content))
    else:
        corrupt(rng, path)
    flags = f"--checkpoint out/w/phase2.pt --max_new_tokens 2 --image {path.relative_to(folder)}"
    return "sample", flags.split(), path.name


def bins(rng, folder):
    """Bins and meta.json that do not agree; numbers in them that point nowhere."""
    kinds = ("text", "tokens", "loss_mask", "samples", "image_ids", "images", "frames", "clips")
    path = folder / "data" / "w" / f"train_{rng.choice(kinds)}.bin"
    how = rng.randrange(4)
    if how == 0:
        path = folder / "data" / "w" / rng.choice(("meta.json", "tokenizer.tiktoken"))
    if how < 2:
        corrupt(rng, path)
    else:  # of the same size
        content = bytearray(path.read_bytes())
        at = rng.randrange(len(content) // 8) * 8
        content[at : at + 8] = rng.choice((b"\xff" * 8, b"\x00" * 8, rng.randbytes(8)))
        replace(path, bytes(content))
    few = FEW.replace("out/w", "out/x")
    phase = rng.choice(("--phase language", "--phase vision", "--phase 1"))
    return "train", f"{few} {phase} --init out/w".split(), ""


def stored(rng, folder):
    """Features that are another's."""
    path = one_of(rng, folder, "data/w/features/*.bin")
    corrupt_bytes(rng, path)
    few = FEW.replace("out/w", "out/x")
    return "train", f"{few} --phase 1 --init out/w".split(), path.name


def transcripts(rng, folder):
    suffix = rng.choice((".srt", ".csv", ".vtt", ".cha"))
    path = folder / "films" / f"a{suffix}"
    if suffix != ".srt":
        (folder / "films" / "a.srt").unlink()
        os.replace(folder / f"a{suffix}", path)
    corrupt(rng, path)
    return "data", "video --videos films --size 8 --vocab_size 300 --name x".split(), path.name


KINDS = {
    "config files": configs,
    "flags": flags,
    "CSV": corrupted_file(
        "data", "pairs --csv {} --images pictures --name x --size 8", "pairs.csv"
    ),
    "CSV of tests": corrupted_file(
        "eval",
        "--checkpoint out/w/phase2.pt --task labeled_s --csv {} --out out/e",
        "data/w/eval/labeled_s.csv",
    ),
    "text": corrupted_file("data", "pairs --text {} --name x --vocab_size 300", "lines.txt"),
    "JSON of conversations": corrupted_file(
        "data", "llava --json {} --images pictures --name x --size 8", "talks.json"
    ),
    "JSON of SAYCam": corrupted_file(
        "data", "saycam --annotations {} --frames pictures --name x --size 8", "train.json"
    ),
    "JSON of words": corrupted_file(
        "data", "pairs --text lines.txt --vocab {} --name x", "vocab.json"
    ),
    "JSON of tests": corrupted_file(
        "eval",
        "--checkpoint out/w/phase2.pt --task toolbox --json tests --images pictures --out out/e",
        "tests/*.json",
    ),
    "JSON of choices": corrupted_file(
        "eval",
        "--checkpoint out/w/phase2.pt --task choice --csv {} --images pictures --out out/e",
        "choice.json",
    ),
    "CSV of Machine-DevBench": corrupted_file(
        "eval",
        "--checkpoint out/w/phase2.pt --task machine_devbench --csv {} --images pictures "
        "--out out/e",
        "machine.csv",
    ),
    "CSVs of DevBench": corrupted_file(
        "eval",
        "--checkpoint out/w/phase2.pt --task devbench --csv manifest.csv --human human.csv "
        "--images pictures --out out/e",
        "manifest.csv",
        "human.csv",
    ),
    "transcripts": transcripts,
    "zips": zips,
    "pictures": pictures,
    "bins": bins,
    "features": stored,
    "checkpoints": corrupted_file(
        "sample", "--checkpoint {} --image pictures/0.png --max_new_tokens 2", "out/w/phase[12].pt"
    ),
    "folders of others": corrupted_file(
        "sample",
        "--checkpoint hf --image pictures/0.png --prompt a --max_new_tokens 2",
        "hf/*.json",
        "hf/*.safetensors",
    ),
}


# ---------------------------------------------------------------------------------------------
# Trying


def play(script, words, folder):
    """In a fork: the command, as from a shell; ends the process."""
    os.setsid()
    os.chdir(folder)
    said = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(1, 0)
    sys.stdin = open(0)  # noqa: SIM115
    # as Python's own: what no encoding has, a lone \udc80 say, is written with a backslash
    sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = [script, *words]
    code = 0
    try:
        sys.modules["config"].run(sys.modules[MODULES.get(script, script)].main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def attempt(script, words, folder):
    """(exit code, None where it took too long; what it said; MB at its largest)."""
    child = os.fork()
    if child == 0:
        try:
            play(script, words, folder)
        finally:  # an error of play's own would go on from here as a second parent
            os._exit(1)
    limit = time.time() + SECONDS
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.time() > limit:
            os.killpg(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
            code = None
            break
        time.sleep(0.002)
    said = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
    return code, said, usage.ru_maxrss / 1024


def fault(code, said, megabytes, folder, before, words=()):
    """What is wrong with how a case ended, or ""; `words` are its command line's."""
    if code is None:
        return f"over {SECONDS} s"
    if megabytes > MEGABYTES:
        return f"{megabytes:.0f} MB"
    if "Traceback" in said or code not in (0, 1, 2):
        return "traceback" if "Traceback" in said else f"exit {code}"
    errors = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    if code and len(errors) != 1:
        return "not one line"
    # "x" is an odd word, and a place to write to; so is whatever odd word the command got as --out
    named = re.findall(r"--out[= ](\S+)", " ".join(words))
    allowed = ["data", "out", "stderr", "x", *(name.split("/")[0] for name in named[-1:])]
    new = {str(path.relative_to(folder)) for path in folder.rglob("*")} - before
    stray = [name for name in new if name.split("/")[0] not in allowed]
    stray += [path.name for path in folder.parent.iterdir() if path != folder]
    return f"wrote {stray[0]}" if stray else ""


def try_cases(numbers, good, seed, home, report):
    """Try these cases, one after the other; write what came of them to a file."""
    for name in MODULES.values():
        importlib.import_module(name)
    for name in ("train", "sample", "eval"):
        OPTIONS[name] = [field.name for field in dataclasses.fields(sys.modules[name].Config)]
    OPTIONS["data"] = [
        f.name for f in dataclasses.fields(importlib.import_module("sources.toy").Config)
    ]
    kinds, found = sorted(KINDS), []
    for number in numbers:
        kind, rng = kinds[number % len(kinds)], random.Random(f"{seed} {number}")
        folder = home / str(number) / "here"
        shutil.copytree(good, folder, copy_function=os.link)
        try:
            script, words, named = KINDS[kind](rng, folder)
            before = {str(path.relative_to(folder)) for path in folder.rglob("*")}
            code, said, megabytes = attempt(script, words, folder)
            wrong = fault(code, said, megabytes, folder, before, words)
            line = said.strip().replace("\r", "\n").split("\n")[-1]
            # or the folder that it is in, or what an odd word led to
            places = (named, "pictures", "films", "hf", " rows ", "/proc/", "/dev/")
            if code == 1 and not wrong and not any(place in line for place in places):
                wrong = "file not named"
            entry = [number, kind, code, wrong, f"{script} {' '.join(words)}"[:300], said[-1500:]]
            found.append(entry)
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)
    Path(report).write_text(json.dumps(found))


def main(home, settings):
    good, cores = home / "good", os.cpu_count()
    make_good(good)
    context, running = multiprocessing.get_context("fork"), []
    clean = {str(p): p.stat().st_mtime_ns for p in good.rglob("*") if p.is_file()}
    for core in range(cores):
        numbers = range(core, settings.cases, cores)
        place, report = home / f"cases{core}", home / f"report{core}.json"
        place.mkdir()
        arguments = (numbers, good, settings.seed, place, report)
        running.append(context.Process(target=try_cases, args=arguments))
        running[-1].start()
    for process in running:
        process.join()
    found = [
        e for core in range(cores) for e in json.loads((home / f"report{core}.json").read_text())
    ]
    print("| corrupted | cases | succeeded | one line | otherwise |\n|---|---|---|---|---|")
    for kind in sorted(KINDS):
        own = [entry for entry in found if entry[1] == kind]
        wrong = [entry for entry in own if entry[3]]
        well = sum(entry[2] == 0 and not entry[3] for entry in own)
        print(f"| {kind} | {len(own)} | {well} | {len(own) - well - len(wrong)} | {len(wrong)} |")
    wrong = [entry for entry in found if entry[3]]
    for number, kind, code, why, words, said in wrong[:200]:
        print(
            f"  {number} {kind}: {why}, exit {code}: {words}\n    {said[-700:]!r}", file=sys.stderr
        )
    after = {str(p): p.stat().st_mtime_ns for p in good.rglob("*") if p.is_file()}
    changed = "none of the good files changed" if clean == after else "GOOD FILES CHANGED"
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{len(found)} cases, {len(wrong)} ended otherwise; {changed}; at most {memory:.0f} MB\n")
