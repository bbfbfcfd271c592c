"""
Are files of other people read as they are? Files of each kind are made at random, some in the ways
that people make them wrong, and read here and by the reader that the field uses.

    pip install srt webvtt-py "pylangacq<0.20" transformers
    python benchmarks/foreign.py                     # 300 files of each kind
    python benchmarks/foreign.py --kinds csv srt --files 1000 --seed 7

kind        truth
csv         the cells that it was made from
srt         the package srt
vtt         the package webvtt-py
cha         the package pylangacq
json        LLaVA's turns, as its code reads them (llava/train/train.py: preprocess_multimodal and
            the roles of preprocess), for the items that are whole
processor   transformers' pixel_values
tokenizer   ids of the package tokenizers, of 20 texts each
template    transformers' apply_chat_template, for 1 to 3 turns

same: read as the truth; refused: one line; different: read otherwise in silence, which must not be.
"""

import html
import json
import random
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import config  # noqa: E402
from common.files import read_csv, read_json  # noqa: E402
from config import UserError, option  # noqa: E402

KINDS = ("csv", "srt", "vtt", "cha", "json", "processor", "tokenizer", "template")
WORDS = "look a ball ! the red , it 's don't caf\u00e9 2 3 yes where MOM".split()


@dataclass
class Config(config.Options):
    kinds: tuple[str, ...] = option(KINDS, choices=KINDS)  # of files
    files: int = option(300, low=1, high=10**6)  # of each kind
    seed: int = option(0, low=0, high=2**32 - 1)  # of the files


def sentence(rng, most=6):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


# ---------------------------------------------------------------------------------------------
# Each kind: a function of (rng, folder) that makes a file, and returns (ours, truth); ours is None
# if it was refused. A truth of None counts the file as refused by both.


def try_csv(rng, folder):
    header = rng.choice(
        [["image", "caption"], ["image", "caption", "subset"], ["caption", "image"]]
    )
    make = {
        "image": lambda: f"{rng.randint(0, 99)}.png",
        "caption": lambda: sentence(rng) + rng.choice(["", "", ' 5" tall', "  "]),
        "subset": lambda: rng.choice("ab"),
    }
    rows = [[make[name]() for name in header] for _ in range(rng.randint(1, 8))]
    comma = rng.choice([",", ",", ", "])
    how = rng.choice(["bare", "all", "needed", "needed", "open"])

    def cell(text):
        quoted = '"' + text.replace('"', '""') + '"'
        if how == "open" and rng.random() < 0.2 and not text.endswith(".png"):
            return '"' + text
        needed = how == "needed" and (set(text) & set(',"\n') or text != text.strip())
        return quoted if how == "all" or needed else text

    lines = [",".join(header)] + [comma.join(map(cell, row)) for row in rows]
    change = rng.random()
    if change < 0.1:
        lines.insert(rng.randint(1, len(lines)), lines[0])  # the header again
    elif change < 0.2:
        lines[1:] = [f"{i},{line}" for i, line in enumerate(lines[1:])]  # an index
        lines[0] = rng.choice(["", ","]) + lines[0]
    elif change < 0.3:
        lines = [line + "," * rng.randint(1, 3) for line in lines]  # empty columns
    elif change < 0.4:
        lines.insert(rng.randint(1, len(lines)), rng.choice(["", "  ", ","]))
    path = folder / "a.csv"
    path.write_text(rng.choice(["\n", "\r\n"]).join(lines) + "\n", encoding="utf-8", newline="")
    found = read_csv(path, ("image", "caption"), ("caption",))
    return [[row[name] for name in header] for row in found], [[c.strip() for c in r] for r in rows]


MARKED = [*WORDS, "3 < 5", "&amp;", "<i>yes</i>", "{\\an8}no", '<font color="red">big</font>',
          "two\u2028lines", "one\u0085two"]  # fmt: skip


def cues(rng):
    """[(start, end, lines)] of a subtitle."""
    found, time = [], 0.0
    for _ in range(rng.randint(1, 6)):
        start = round(time + rng.random(), 3)
        time = round(start + 3 * rng.random(), 3)
        lines = [
            " ".join(rng.choices(MARKED, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))
        ]
        found.append((start, time, lines))
    return found


def stamp(seconds, point):
    whole, part = divmod(round(1000 * seconds), 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}{point}{part:03d}"


def spoken(text):
    """The words of a cue without its tags, lower-cased."""
    tags = r"</?(?:v|i|b|u|c|font)(?:[ .][^>]*)?>|\{\\an8\}"
    return " ".join(html.unescape(re.sub(tags, "", text)).split()).lower()


def read_said(path):
    from sources.transcripts import read_transcript

    return [(round(s.start, 3), round(s.end, 3), s.words) for s in read_transcript(path)[0]]


def try_srt(rng, folder):
    import srt

    lines, has_blanks = [], rng.random() < 0.8
    for i, (start, end, words) in enumerate(cues(rng), 1):
        inner = [""] if has_blanks and rng.random() < 0.2 else []
        lines += [
            str(i),
            f"{stamp(start, ',')} --> {stamp(end, ',')}",
            words[0],
            *inner,
            *words[1:],
        ]
        lines += [""] if has_blanks else []
    path, text = folder / "a.srt", "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8", newline=rng.choice(["\n", "\r\n"]))
    if not has_blanks:  # the package wants them
        text = re.sub(r"\n(?=\d+\n\d\d:)", "\n\n", text)
    truth = [
        (c.start.total_seconds(), c.end.total_seconds(), spoken(c.content)) for c in srt.parse(text)
    ]
    return read_said(path), [one for one in truth if re.search(r"\w", one[2])]


def try_vtt(rng, folder):
    import webvtt

    lines = ["WEBVTT" + rng.choice(["", " - a title"]), ""]
    for i, (start, end, words) in enumerate(cues(rng)):
        lines += rng.choice([[], [], ["a name"], [str(i)], ["NOTE", "nobody says this", ""]])
        times = f"{stamp(start, '.')} --> {stamp(end, '.')}"
        lines.append(times + rng.choice(["", " align:start position:0%"]))
        lines += [rng.choice(["", "<v MOT>", "<v.loud FAT>"]) + words[0], *words[1:], ""]
    path = folder / "a.vtt"
    path.write_text("\n".join(lines), encoding="utf-8", newline=rng.choice(["\n", "\r\n"]))
    seconds = lambda t: t.hours * 3600 + t.minutes * 60 + t.seconds + t.milliseconds / 1000
    truth = [
        (round(seconds(c.start_time), 3), round(seconds(c.end_time), 3), spoken(c.raw_text))
        for c in webvtt.read(str(path))
    ]
    return read_said(path), [one for one in truth if re.search(r"\w", one[2])]


CHAT = ["look", "a", "ball", "it's", "(.)", "(..)", "(1.5)", "&-um", "xxx", "ba(ll)", "choo_choo",
        "no:", "bunny@f", "[!]", "<the", "ball>", "\u2021", "\u201e"]  # fmt: skip


def try_cha(rng, folder):
    import pylangacq

    lines, time = ["@UTF8", "@Begin", "@Languages:\teng", "@Participants:\tMOT Mother"], 0
    lines.append("@ID:\teng|x|MOT|||||Mother|||")
    for _ in range(rng.randint(1, 6)):
        words = " ".join(rng.choices(CHAT, k=rng.randint(1, 6)))
        words = words if words.count("<") == words.count(">") else re.sub("[<>]", "", words)
        end = time + rng.randint(1, 4000)
        lines.append(f"*MOT:\t{words} {rng.choice('.?!')} \x15{time}_{end}\x15")
        time = end
    path = folder / "a.cha"
    path.write_text("\n".join([*lines, "@End"]) + "\n", encoding="utf-8")
    reader = pylangacq.Reader.from_files([str(path)])
    truth = []
    for one in reader.utterances():
        words = [token.word for token in one.tokens]
        words = [re.sub("@.*|:", "", w) for w in words if w not in ("\u2021", "\u201e", "xxx")]
        words = " ".join(words).replace("_", " ").lower()
        if re.search(r"\w", words):
            truth.append((one.time_marks[0] / 1000, one.time_marks[1] / 1000, words))
    return read_said(path), truth


def try_json(rng, folder):
    from sources import image_first, read_dialogue

    turns, images = [], rng.randint(0, 2)
    if rng.random() < 0.2:
        turns.append({"from": "system", "value": "Be kind."})
    if rng.random() < 0.2:
        turns.append({"from": "gpt", "value": "Hello."})
    placed = 0
    for _ in range(rng.randint(1, 3)):
        question = sentence(rng)
        while placed < images and rng.random() < 0.7:
            at = rng.choice([0, len(question), question.find(" ") + 1])
            question, placed = question[:at] + "<image>" + question[at:], placed + 1
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": sentence(rng)}]
    names = [f"{i}.png" for i in range(images)]
    item = {
        rng.choice(["image", "images"]): names[0] if images == 1 and rng.random() < 0.5 else names
    }
    item["conversations"] = turns
    change = rng.random()
    if change < 0.1:
        turns.pop()
    elif change < 0.2:
        turns[-1] = {"from": "human", "value": rng.choice([["a"], "again"])}
    elif change < 0.25:
        item["video"] = "a.mp4"
    path = folder / rng.choice(["a.json", "a.jsonl"])
    path.write_text(json.dumps(item if path.suffix == ".jsonl" else [item]))
    (found,) = read_json(path)
    try:
        got, said, system = read_dialogue(found)
    except (ValueError, KeyError, TypeError):
        return None, None
    own = [t for t in turns if t["from"] != "system"]
    own = own[own[0]["from"] == "gpt" :]
    truth = [(t["value"], a["value"].strip()) for t, a in zip(own[::2], own[1::2])]
    one_image = [(image_first(q), a) for q, a in truth]  # as preprocess_multimodal writes it
    for (before, _), (after, _) in zip(truth, one_image):
        if before.count("<image>") == 1:
            assert after == "<image>\n" + before.replace("<image>", "").strip()
    whole = "Be kind." if turns[0]["from"] == "system" else ""
    return (got, said, system), (names, truth, whole)


def try_processor(rng, folder):
    import transformers
    from PIL import Image

    from common.images import to_picture, to_pixels
    from pretrained.hf_config import image_format

    names = ("CLIP", "ViT", "Siglip", "Bit", "Llava")
    name = rng.choice(names) + "ImageProcessor"
    cut = {"height": 28, "width": 28}
    choices = {
        "size": [
            28,
            {"shortest_edge": 28},
            {"shortest_edge": 32},
            cut,
            {"height": 32, "width": 32},
        ],
        "crop_size": [28, cut, cut, {"height": 24, "width": 24}, None],
        "do_center_crop": [True, False, None],
        "do_resize": [True, True, False],
        "resample": [2, 3, 3, 1],
        "do_rescale": [True, True, False],
        "rescale_factor": [1 / 255, 1 / 127.5, 1.0],
        "do_normalize": [True, True, False],
        "image_mean": [[0.5, 0.5, 0.5], [0.485, 0.456, 0.406]],
        "image_std": [[0.5, 0.5, 0.5], [0.229, 0.224, 0.225]],
        "do_pad": [True, False],
    }
    often = ("size", "crop_size")
    settings = {"image_processor_type": name + rng.choice(["", "Fast"])}
    for key, values in choices.items():
        if rng.random() < (0.9 if key in often else 0.3):
            settings[key] = rng.choice(values)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    form = image_format(folder, {"model_type": "llava"}, 28)
    noise = np.random.RandomState(rng.randrange(10**6))
    size = rng.choice([28, 33, 50, 99]), rng.choice([28, 40, 31, 70])
    picture = Image.fromarray(noise.randint(0, 256, (*size, 3), np.uint8))
    processor = getattr(transformers, name).from_pretrained(folder)
    truth = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])
    ours = to_pixels(to_picture(picture, form).frames, form)[0].numpy()
    near = ours.shape == truth.shape
    near = near and np.abs(ours - truth).max() <= 2e-5 * max(1, np.abs(truth).max())
    return bool(near), True


def try_tokenizer(rng, folder):
    import test_tokenizer_json as tests
    import tokenizers

    from pretrained.tokenizer_json import JsonTokenizer

    kinds, change = rng.choice(tests.VARIANTS)
    content = json.loads(tests.KINDS[rng.choice(list(kinds))]().to_str())
    change(content)
    words = rng.sample([*tests.ADDED, "<|im|>", "12"], rng.randint(0, 4))
    flags = {name: rng.random() < 0.3 for name in ("single_word", "lstrip", "rstrip", "normalized")}
    tests.add(content, *words, **flags)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True  # as here, text never becomes a special token
    for entry in content["added_tokens"]:
        entry["id"] = theirs.token_to_id(entry["content"])
    roles = {"eos": 0, "stops": [0], "bos": None, "pad": 0, "image": 10**6, "vocab_size": 10**6}
    ours, texts = JsonTokenizer(content, roles), []
    for _ in range(20):
        text = sentence(rng) + rng.choice(["", "\n", "  ", " 12345", " \u4f60\u597d"])
        for word in rng.sample([*tests.ADDED, "345"], rng.randint(0, 3)):
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice(["", " "]) + word + rng.choice(["", " "]) + text[at:]
        texts.append(text)
    truth = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    return [ours.encode(text) for text in texts], truth


def try_template(rng, folder):
    import jinja_templates
    import test_chat_templates as tests

    from pretrained import hf_config
    from tokenizer import chat_sample, read_template, with_pictures

    name = rng.choice(list(jinja_templates.ALL))
    source, swaps = jinja_templates.ALL[name], [("USER", "Human"), ("user", "user"), (" ", " "),
        ("ASSISTANT", "Bot"), ("'\\n'", "''"), ("### ", "## "), ("You are", "I am")]  # fmt: skip
    for old, new in rng.sample(swaps, 2):
        source = source.replace(old, new)
    jinja_templates.ALL["RANDOM"] = source
    for names in (tests.CHATML, tests.END):
        if name in names and isinstance(names, dict):
            tests.END["RANDOM"] = names[name]
    kind, adds_bos = rng.choice(tests.KINDS)
    theirs, ours = tests.make_folder(folder, "RANDOM", adds_bos, kind)
    del jinja_templates.ALL["RANDOM"]
    tests.END.pop("RANDOM", None)
    described = hf_config.find_template(folder, "llama", ours)
    if described.get("why"):
        return None, None
    template, lists = read_template(described), "'type'" in source
    questions = [sentence(rng) for _ in range(3)]
    turns = [(q, sentence(rng)) for q in questions[: rng.randint(0, 2)]] + [(questions[2], None)]
    images = rng.randint(0, 2) if lists else 0
    system = rng.choice(["", "Be kind."]) if template.system else ""
    messages = tests.messages_of(turns, system, images, lists)
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    truth = theirs(text, add_special_tokens=not text.startswith("<s>"))["input_ids"]
    first = with_pictures(template, turns[0][0], images)
    turns = [(first, turns[0][1]), *turns[1:]]
    tokens, _ = chat_sample(ours, template, turns, system or described["system"])
    return tokens, truth


# ---------------------------------------------------------------------------------------------


def main(argv):
    settings = config.load(Config, argv, __doc__)
    print("| kind | same | refused | different |\n|---|---|---|---|")
    total = 0
    for kind in settings.kinds:
        counts, shown = Counter(), 0
        for number in range(settings.files):
            rng = random.Random(f"{settings.seed} {kind} {number}")
            with tempfile.TemporaryDirectory() as folder:
                try:
                    ours, truth = globals()[f"try_{kind}"](rng, Path(folder))
                except UserError as error:
                    assert "\n" not in str(error)
                    ours = None
            how = "refused" if ours is None else "same" if ours == truth else "different"
            counts[how] += 1
            if how == "different" and shown < 3:
                shown += 1
                print(f"{kind} {number}: {ours!r:.300}\n  truth {truth!r:.300}", file=sys.stderr)
        total += counts["different"]
        print(
            f"| {kind} | {counts['same']} | {counts['refused']} | {counts['different']} |",
            flush=True,
        )
    if total:
        raise UserError(f"{total} files are read otherwise, in silence")


if __name__ == "__main__":
    config.run(main)
