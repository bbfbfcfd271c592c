"""
What has it learnt? The four BabyVLM tests, grammar pairs, validation loss, and the eye's probes.

    python eval.py --checkpoint out/toy/phase2.pt              # all that the data folder has
    python eval.py --checkpoint out/toy/phase0.pt --zorro DIR  # grammar pairs, words alone
    python eval.py --shuffle                                   # pictures dealt to wrong captions
    python eval.py --task vtwt --csv vtwt.csv --images frames.zip   # BabyVLM's published files

Every score is a mean negative log-likelihood per token of a phrase that follows the picture, in
fp32, lower is better; a tie counts as its fair share. Each accuracy comes with n, chance and a
95 % Wilson interval, and apart for each `subset` that the CSV names. Writes results.json,
report.html and captions.png beside the checkpoint.
"""
import base64
import html
import io
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import configs
import data
import sample
import vision
from data import DataError


@dataclass
class Config:
    checkpoint: str = "out/toy/phase2.pt"  # a .pt that train.py wrote
    data: str = ""  # the folder with eval/*.csv and val bins; empty: the one it was trained on
    task: str = ""  # one of TASKS alone; empty: all that the data folder has
    csv: str = ""  # the task's file; empty: eval/<task>.csv of the data folder
    images: str = ""  # folders or zips of its pictures, one or several; empty: eval/images
    ties: str = "fair"  # fair: a tie counts as its share; published: as in BabyVLM's own scorer
    zorro: str = ""  # a folder of Zorro's .txt files: odd line wrong, even line right
    batch: int = 256  # phrases scored at a time
    shuffle: bool = False  # deal each test's pictures at random: all must fall to chance
    out: str = ""  # where to write; empty: the checkpoint's folder
    device: str = ""  # cpu, cuda, mps; empty: cuda where there is one


# ---------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def phrase_nll(parts, features, rows, phrases, batch=256):
    """Mean NLL per token of phrases[i] after the picture features[rows[i]]: float64 (n,).

    features (N, P, E) or None for words alone, which then follow an <eos>. No <eos> is scored."""
    model, tokenizer = parts.model, parts.tokenizer
    device, scores = model.gpt.cos.device, np.zeros(len(phrases))
    head = [tokenizer.eos] if features is None else [tokenizer.image] * features.shape[1]
    for start in range(0, len(phrases), batch):
        words = [tokenizer.encode(phrase) for phrase in phrases[start:start + batch]]
        T = max(map(len, words)) + len(head)
        if T - 1 > model.gpt.config.block_size:
            raise DataError(f"a phrase makes {T - 1} tokens with what precedes it, over the "
                            f"model's {model.gpt.config.block_size}: {phrases[start][:40]!r} ...")
        stream = torch.full((len(words), T), tokenizer.pad, device=device)
        for i, row in enumerate(words):
            stream[i, :len(head) + len(row)] = torch.tensor(head + row, device=device)
        targets = stream.masked_fill((stream == tokenizer.pad) | (stream == tokenizer.image), -100)
        seen = None if features is None else features[rows[start:start + batch]].to(device)
        logits, _ = model(stream[:, :-1], features=seen)
        losses = F.cross_entropy(logits.float().transpose(1, 2), targets[:, 1:],
                                 reduction="none", ignore_index=-100)  # (n, T - 1)
        lengths = torch.tensor([len(row) for row in words], device=device)
        scores[start:start + batch] = (losses.double().sum(1) / lengths).cpu().numpy()
    return scores


def wilson(hits, n):
    """95 % interval of a proportion of n trials (Wilson 1927); hits may be fractional."""
    z, p = 1.959964, hits / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round((centre + sign * spread) / (1 + z * z / n), 4) for sign in (-1, 1)]


def accuracy(hits, chance):
    """{"accuracy", "chance", "n", "ci95"} of a list of hits, each 0 to 1."""
    return {"accuracy": round(float(np.mean(hits)), 4), "chance": chance, "n": len(hits),
            "ci95": wilson(float(np.sum(hits)), len(hits))}


def lowest(scores, right, ties="fair"):
    """1 if scores[right] is the lowest, 0 if not; 1 / k if k share the lowest, or, by the
    published rule, 1: it puts the target first and lets it keep the place."""
    best = np.flatnonzero(scores == np.min(scores))
    return float(right in best) / (len(best) if ties == "fair" else 1)


def below(*pairs, ties="fair"):
    """The chance that all a < b hold, a tie being a coin's toss: products of 1, 1/2 and 0. By
    the published rule a tie is 0."""
    tie = 0.5 if ties == "fair" else 0.0
    return float(np.prod([1.0 if a < b else tie if a == b else 0.0 for a, b in pairs]))


# ---------------------------------------------------------------------------------------------
# The tests. Each takes rows of its CSV, nll(images, phrases) -> (n,), and the rule for ties, and
# returns its results.


def labeled_s(rows, nll, ties="fair"):
    """Four pictures, one word: under which picture is the word likeliest?"""
    scores = nll([row["image"] for row in rows], [row["target_category"] for row in rows])
    trials = defaultdict(list)
    for row, score in zip(rows, scores):
        trials[row["trial_id"]].append((score, row["target_category"] == row["real_category"]))
    hits = []
    for name, shown in trials.items():
        right = [i for i, (_, is_target) in enumerate(shown) if is_target]
        if len(right) != 1:
            raise DataError(f"labeled_s.csv: trial {name} has {len(right)} pictures of its target")
        hits.append(lowest(np.array([score for score, _ in shown]), right[0], ties))
    return accuracy(hits, 1 / len(shown))


def first_is_lower(pairs, ties):
    return accuracy([lowest(np.array(pair), 0, ties) for pair in zip(*pairs)], 0.5)


def vtwt(rows, nll, ties="fair"):
    """One picture, a true phrase and its foil: which is likelier?"""
    return first_is_lower([nll([row["image"] for row in rows], [row[phrase] for row in rows])
                           for phrase in ("positive_phrase", "negative_phrase")], ties)


def two_by_one(rows, nll, ties="fair"):
    """Two pictures, one phrase: under which is it likelier?"""
    return first_is_lower([nll([row[image] for row in rows], [row["phrase"] for row in rows])
                           for image in ("image", "foil_image")], ties)


def two_by_two(rows, nll, ties="fair"):
    """Two pictures, two phrases, each phrase true of one: scored as Baby Winoground."""
    return baby_winoground([
        {"instance_id": i, "image": row[image], "image_tag": tag,
         "positive_phrase": row["phrase"], "negative_phrase": row["foil_phrase"]}
        for i, row in enumerate(rows)
        for image, tag in (("image", "positive"), ("foil_image", "negative"))], nll, ties)


def baby_winoground(rows, nll, ties="fair"):
    """Two pictures, two phrases, L[picture][phrase], 0 the positive one. The chances are
    those of four scores in random order: four of the 24 orders pass the group rule."""
    scores = nll([row["image"] for row in rows for _ in range(2)],
                 [row[f"{tag}_phrase"] for row in rows for tag in ("positive", "negative")])
    L = defaultdict(dict)
    for row, pair in zip(rows, scores.reshape(-1, 2)):
        L[row["instance_id"]][row["image_tag"]] = pair
    rules = {"image": ((0, 0, 1, 0), (1, 1, 0, 1)), "text": ((0, 0, 0, 1), (1, 1, 1, 0)),
             "group": ((0, 0, 1, 0), (1, 1, 0, 1), (0, 0, 0, 1), (1, 1, 1, 0)),
             "positive_context": ((0, 0, 1, 0), (0, 0, 0, 1)),
             "negative_context": ((1, 1, 0, 1), (1, 1, 1, 0))}
    chance = {"image": 0.25, "text": 0.25, "group": 1 / 6, "positive_context": 1 / 3,
              "negative_context": 1 / 3}
    hits = defaultdict(list)
    for name, m in L.items():
        if set(m) != {"positive", "negative"}:
            raise DataError(f"baby_winoground.csv: instance {name} needs a positive and a negative")
        m = m["positive"], m["negative"]
        for rule, terms in rules.items():
            hits[rule].append(below(*((m[a][b], m[c][d]) for a, b, c, d in terms), ties=ties))
    return {rule: accuracy(hits[rule], chance[rule]) for rule in rules}


def captions(rows, said):
    """METEOR of what was said against one reference each, mean."""
    name, meteor = choose_meteor()
    scores = [meteor(row["text"].split(), line.split()) for row, line in zip(rows, said)]
    return {name: round(float(np.mean(scores)), 4), "n": len(rows), "chance": None,
            "exact": round(float(np.mean([r["text"] == s for r, s in zip(rows, said)])), 4)}


def meteor_exact(reference, said):
    """METEOR (Banerjee and Lavie 2005) with exact matches only, nltk's parameters: 0.9, 3, 0.5.

    nltk's greedy alignment: the last occurrences pair up first. Words are lists of strings."""
    left, matches = list(enumerate(reference)), []
    for i in range(len(said) - 1, -1, -1):
        for k in range(len(left) - 1, -1, -1):
            if left[k][1] == said[i]:
                matches.append((i, left.pop(k)[0]))
                break
    if not matches:
        return 0.0
    matches.sort()
    precision, recall = len(matches) / len(said), len(matches) / len(reference)
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in zip(matches, matches[1:]))
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(matches)) ** 3)


def choose_meteor():
    """("meteor", nltk's with stems and WordNet) where it and its data are installed, else
    ("meteor_exact", ours): two names, because the numbers are not comparable."""
    try:
        from nltk.translate.meteor_score import single_meteor_score
        single_meteor_score(["a"], ["b"])  # unequal words ask WordNet, which may be absent
        return "meteor", single_meteor_score
    except (ImportError, LookupError):
        return "meteor_exact", meteor_exact


def zorro(directory, parts, batch):
    """Grammar pairs: is the right sentence likelier as a whole? Mean over files of accuracies.

    A sentence's log-probability is the sum over its tokens, after an <eos>."""
    files = sorted(Path(directory).glob("*.txt"))
    if not files:
        raise DataError(f"{directory}: no .txt files of sentence pairs")
    results = {}
    for path in tqdm(files, "zorro", unit="file"):
        lines = path.read_text(encoding="utf-8").splitlines()
        lines = [line.lower().strip() for line in lines]
        lengths = np.array([len(parts.tokenizer.encode(line)) for line in lines])
        scores = phrase_nll(parts, None, None, lines, batch) * lengths
        results[path.stem] = accuracy([below((right, wrong)) for wrong, right in
                                       zip(scores[::2], scores[1::2])], 0.5)
    macro = np.mean([result["accuracy"] for result in results.values()])
    return {"accuracy": round(float(macro), 4), "chance": 0.5, "n": len(results),
            "paradigms": results}


# ---------------------------------------------------------------------------------------------
# What train.py watches


@torch.no_grad()
def val_loss(model, batches, batch, limit=0, rank=0, world=1):
    """Mean NLL per target over the first `limit` batches (0: all), in order, always the same."""
    modes = {module: module.training for module in model.modules()}
    device = model.gpt.cos.device
    model.eval()
    count = min(len(batches) // batch or 1, limit or len(batches))
    total = torch.zeros(2, device=device, dtype=torch.float64)
    for i in range(rank, count, world):
        rows = batches(i * batch, min(batch, len(batches)), shuffle=False)
        rows = [torch.as_tensor(part, device=device) for part in rows]
        words = (rows[1] != -100).sum()
        total += torch.stack([model(*rows)[1].double() * words, words.double()])
    if world > 1:
        dist.all_reduce(total)
    for module, mode in modes.items():
        module.training = mode
    return float(total[0] / total[1])


def probe(tower, dataset):
    """{"kind", "colour"}: accuracies of linear probes on a tower, from eval/probe.csv, else {}.

    Fitted on three quarters of the frames, on [CLS, mean of patches] after the last norm."""
    path = dataset.directory / "eval" / "probe.csv"
    if not path.exists():
        return {}
    rows = [row for _, row in data.read_csv(path, ("image", "kind", "colour"))]
    frames = np.stack([data.read_image(path.parent / "images" / row["image"], dataset.meta["S"])
                       for row in rows])
    with torch.no_grad():
        x = torch.cat([tower(vision.preprocess(part, next(tower.parameters()).device)).float().cpu()
                       for part in np.array_split(frames, len(frames) // 256 + 1)])
    x = torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)
    labels = {name: torch.tensor(np.unique([row[name] for row in rows], return_inverse=True)[1])
              for name in ("kind", "colour")}
    return {name: vision.linear_probe(x, y, len(x) * 3 // 4) for name, y in labels.items()}


# ---------------------------------------------------------------------------------------------
# All of it, and the report


def losses(parts, dataset):
    """{"val_loss": ...} and, of a GPT alone, {"bits_per_character": ...}, of a prepared folder."""
    block_size, counts = parts.model.gpt.config.block_size, dataset.meta["splits"]["val"]
    if parts.model.projector is None:
        loss = val_loss(parts.model, data.TextBatches(dataset, "val", block_size), 16)
        return {"val_loss": loss, "bits_per_character":
                loss / math.log(2) * counts["text"] / counts["characters"]}
    tower = vision.fingerprint(parts.tower, parts.meta["select_layer"], parts.meta["keep_cls"])
    if not counts.get("features") or dataset.meta["tower"] != tower:
        return {}
    return {"val_loss": val_loss(parts.model, data.PairBatches(dataset, "val", block_size), 64)}


def run_task(task, path, images, parts, config):
    """(results of a test on the CSV at `path`, rows for the contact sheet, if it has captions)."""
    test, columns = TASKS[task]
    rows = [row for _, row in data.read_csv(path, columns)]
    pictures = [column for column in columns if column.endswith("image")]
    names = sorted({row[column] for row in rows for column in pictures})
    features, kept, sheet = [], [], []
    for frames in read_images(names, images, parts.meta["S"], task):
        features.append(sample.see(parts, frames).cpu())  # once a picture, few in memory
        kept += list(frames) if test is captions else []
    features = torch.cat(features)
    place = {name: i for i, name in enumerate(names)}
    if config.shuffle:
        place = dict(zip(names, np.random.RandomState(0).permutation(len(names))))

    def nll(images, phrases):
        return phrase_nll(parts, features, [place[name] for name in images], phrases, config.batch)

    if test is captions:
        shown = np.stack([kept[place[row["image"]]] for row in rows])
        said = sample.caption(parts, shown, 25)
        sheet = [(frame, row["text"], line) for frame, row, line in zip(shown, rows, said)]
        run = lambda chosen: captions([rows[i] for i in chosen], [said[i] for i in chosen])
    else:
        run = lambda chosen: test([rows[i] for i in chosen], nll, config.ties)
    results = run(range(len(rows)))
    subsets = sorted({row["subset"] for row in rows if row.get("subset")})
    if len(subsets) > 1:
        results["subsets"] = {
            name: run([i for i, row in enumerate(rows) if row["subset"] == name])
            for name in subsets}
    return results, sheet


def evaluate(parts, config):
    """({"tasks": {...}, "val_loss": ..., ...} of a checkpoint, rows for the contact sheet)."""
    if config.ties not in ("fair", "published"):
        raise DataError(f"--ties {config.ties}: fair or published")
    if config.task not in ("", *TASKS) or (config.csv or config.images) and not config.task:
        raise DataError(f"--task {config.task or '(none)'}: one of {', '.join(TASKS)}")
    if config.task and parts.model.projector is None:
        raise DataError(f"{config.checkpoint} cannot see: --task needs one of phase 1 or 2")
    folder = Path(config.data or parts.meta["config"]["data"])
    results = {"checkpoint": config.checkpoint, "phase": parts.meta["phase"], "tasks": {},
               "trained_on": parts.meta["data"], "data": config.csv or str(folder),
               "source": config.csv, "shuffled": config.shuffle, "ties": config.ties}
    sheet = []
    if config.zorro:
        results["tasks"]["zorro"] = zorro(config.zorro, parts, config.batch)
    if not config.csv:  # a CSV of its own needs no prepared folder
        dataset = data.Data(folder)
        results |= {"source": dataset.meta["source"], **losses(parts, dataset)}
    for task in (config.task,) if config.task else TASKS if parts.model.projector else ():
        path = Path(config.csv or folder / "eval" / f"{task}.csv")
        if path.exists() or config.task:
            images = config.images or str(path.parent / "images")
            results["tasks"][task], rows = run_task(task, path, images, parts, config)
            sheet = rows or sheet
    return results, sheet


# Each test with the columns of its CSV: BabyVLM's four, and two forms that any pictures fit.
TASKS = {"labeled_s": (labeled_s, ("trial_id", "target_category", "real_category", "image")),
         "vtwt": (vtwt, ("image", "positive_phrase", "negative_phrase")),
         "baby_winoground": (baby_winoground, ("instance_id", "positive_phrase",
                                               "negative_phrase", "image", "image_tag")),
         "caption": (captions, ("image", "text")),
         "two_by_one": (two_by_one, ("image", "foil_image", "phrase")),
         "two_by_two": (two_by_two, ("image", "foil_image", "phrase", "foil_phrase"))}
# As the BabyVLM paper reports them: Labeled-S, VTWT, Baby Winoground (group), METEOR.
PAPER = {"LLaVA-1.5-7B, web scale (paper)": (0.740, 0.785, 0.427, 0.166),
         "CVCL (paper)": (0.609, 0.649, 0.093, None),
         "BabyLLaVA (paper)": (0.420, 0.625, 0.066, 0.138),
         "BabyLLaVA + transferred captions (paper)": (0.536, 0.693, 0.082, None)}


def read_images(names, places, size, task, batch=256):
    """Yield frames (n, S, S, 3) of pictures, in the order of names, a batch at a time. places:
    folders or zips, a line each. Raises DataError for the first that is missing or damaged."""
    places = places.split("\n")
    index = {place: data.index_frames(place) for place in places if not Path(place).is_dir()}
    frames = []
    for i, name in enumerate(tqdm(names, f"{task} images", unit="image", mininterval=1)):
        there = [place for place in places if place not in index and (Path(place) / name).exists()]
        zips = [place for place in index if Path(name).name in index[place]]
        if not (there or zips):
            raise DataError(f"{' and '.join(places)}: no {name}, which {task} asks for; --images "
                            "takes several folders or zips")
        frame = data.read_image(Path(there[0]) / name, size) if there else data.read_frame(
            (index[zips[0]][Path(name).name], size))
        if isinstance(frame, str):
            raise DataError(frame)
        frames.append(frame)
        if len(frames) == batch or i == len(names) - 1:
            yield np.stack(frames)
            frames = []


def beside_the_paper(tasks, name):
    """Lines: what BabyVLM's authors report, and what this checkpoint scores on their files."""
    group = tasks.get("baby_winoground", {}).get("group", {})
    ours = [*(tasks.get(task, {}).get("accuracy") for task in ("labeled_s", "vtwt")),
            group.get("accuracy"), tasks.get("caption", {}).get("meteor")]
    yield "{:42} {:>9} {:>6} {:>10} {:>7}".format("", "Labeled-S", "VTWT", "Winoground", "METEOR")
    for model, scores in (PAPER | {name: ours}).items():
        cells = ["-" if score is None else f"{score:.3f}" for score in scores]
        yield "{:42} {:>9} {:>6} {:>10} {:>7}".format(model, *cells)


def contact_sheet(sheet, columns=6, rows=6):
    """A PIL picture of frames, each over what was said (black) and what the model says (blue)."""
    chosen = sheet[::max(1, len(sheet) // (columns * rows))][:columns * rows]
    page = Image.new("RGB", (190 * columns, 190 * -(-len(chosen) // columns)), "white")
    draw = ImageDraw.Draw(page)
    for i, (frame, text, said) in enumerate(chosen):
        x, y = 190 * (i % columns) + 8, 190 * (i // columns) + 6
        page.paste(Image.fromarray(frame).resize((128, 128), Image.Resampling.BICUBIC), (x, y))
        for k, (line, ink) in enumerate(((text, "black"), (said, "blue"))):
            draw.text((x, y + 132 + 22 * k), line[:30] + "\n" + line[30:60], ink, font_size=9,
                      spacing=0)
    return page


def rows_of(tasks):
    """(test, measure, subset, score, interval, chance, n) as text, for each number there is."""
    for task, result in tasks.items():
        for subset, part in [("all", result), *result.get("subsets", {}).items()]:
            for measure, r in ({"": part} if "n" in part else part).items():
                if "n" not in r:
                    continue  # the subsets themselves
                name = next(iter(r))  # accuracy, meteor or meteor_exact
                interval = "{:.3f} - {:.3f}".format(*r["ci95"]) if "ci95" in r else ""
                chance = f"{r['chance']:.3f}" if r["chance"] else ""
                yield (task, measure or name, subset, f"{r[name]:.3f}", interval, chance,
                       str(r["n"]))


def report(results, page, log):
    """report.html: one file, no script, nothing fetched."""
    cells = ["<tr><td>" + "<td>".join(row) for row in rows_of(results["tasks"])]
    curves = defaultdict(list)
    for line in log:
        if "loss" in line:
            curves[line["phase"]].append((line["step"], line["loss"]))
    charts = []
    for phase, points in curves.items():
        steps, losses = np.array(points, float).T
        x = 300 * steps / max(steps.max(), 1)
        y = 100 - 96 * (losses - losses.min()) / max(np.ptp(losses), 1e-9)
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        charts.append(f"<figure><svg width=300 height=104><polyline fill=none stroke=navy "
                      f"points='{line}'/></svg><figcaption>{phase}: loss {losses[0]:.3f} to "
                      f"{losses[-1]:.3f} in {int(steps[-1])} steps</figcaption></figure>")
    picture = ""
    if page:
        page.save(buffer := io.BytesIO(), "PNG")
        picture = ("<h2>What was said (black), what the model says (blue)</h2><img src='data:image/"
                   f"png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>")
    loss = f", validation loss {results['val_loss']:.3f}" if "val_loss" in results else ""
    kind = "Toy world: drawn pictures, not SAYCam." if results["source"] == "toy" else \
        f"Data: {html.escape(results['source'])}."
    return ("<!doctype html><meta charset=utf-8><title>nanoBabyLLaVA</title><style>body{font:15px "
            "sans-serif;margin:2em}td,th{padding:2px 12px;text-align:left}figure{display:inline-"
            f"block}}</style><h1>nanoBabyLLaVA</h1><p>{kind} {html.escape(results['checkpoint'])}"
            f"{loss}.<table><tr><th>test<th>measure<th>subset<th>score<th>95 % interval<th>chance"
            f"<th>n{''.join(cells)}</table><h2>Training</h2>{''.join(charts)}{picture}")


def main(argv):
    config = configs.load(Config, argv, __doc__, many=("images",))
    parts = sample.load(config.checkpoint, sample.choose_device(config.device))
    if parts.model is None:
        raise DataError(f"{config.checkpoint}: an eye alone; train.py logs its probes")
    results, sheet = evaluate(parts, config)
    out = Path(config.out or Path(config.checkpoint).parent)
    task = f"_{config.task}" if config.task else ""
    page = contact_sheet(sheet) if sheet else None
    log = out / "log.jsonl"
    log = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    data.write_json(out / f"results{task}.json", results)
    with data.writing(out / f"report{task}.html") as file:
        file.write(report(results, page, log).encode("utf-8"))
    if page:
        with data.writing(out / "captions.png") as file:
            page.save(file, "PNG")
    for row in [("test", "measure", "subset", "score", "95 % interval", "chance", "n"),
                *rows_of(results["tasks"])]:
        print("{:16} {:17} {:9} {:6} {:14} {:7} {:>5}".format(*row))
    if config.csv and config.task in [*TASKS][:4]:  # with what was scored on other files of theirs
        tasks = {}
        for path in out.glob("results_*.json"):
            other = json.loads(path.read_text())
            if other["checkpoint"] == config.checkpoint and other["source"] != "toy":
                tasks |= other["tasks"]
        name = f"this one, trained on {parts.meta['config']['data']}"
        print(*beside_the_paper(tasks, name), sep="\n")
    for name in ("val_loss", "bits_per_character"):
        if name in results:
            print(f"{name} {results[name]:.4f}")
    print(f"written: {out}/results{task}.json, report{task}.html" + ", captions.png" * bool(page))


if __name__ == "__main__":
    configs.run(main, DataError, ValueError)
