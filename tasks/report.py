"""
Results for people: tables of text, and what the report page (training/page.py) shows of tests.
"""

from tasks.toolbox import CONTROLS

# As the BabyVLM paper reports them: Labeled-S, VTWT, Baby Winoground (group), METEOR.
PAPER = {
    "LLaVA-1.5-7B, web scale (paper)": (0.740, 0.785, 0.427, 0.166),
    "CVCL (paper)": (0.609, 0.649, 0.093, None),
    "BabyLLaVA (paper)": (0.420, 0.625, 0.066, 0.138),
    "BabyLLaVA + transferred captions (paper)": (0.536, 0.693, 0.082, None),
}
HEADER = ("test", "measure", "subset", "score", "95 % interval", "chance", "n")


def rows_of(tasks):
    """Tuples of text under HEADER, one for each figure of eval.py's results.

    tasks: {test: {subset: {measure: {"score", "n", "chance", "ci95"}}}}; chance and ci95 may be
    None, and "all" is a subset too."""
    for task, subsets in tasks.items():
        for subset, measures in subsets.items():
            for measure, result in measures.items():
                interval = "{:.3f} - {:.3f}".format(*result["ci95"]) if result["ci95"] else ""
                chance = f"{result['chance']:.3f}" if result["chance"] is not None else ""
                score = f"{result['score']:.3f}"
                yield (task, measure, subset, score, interval, chance, str(result["n"]))


def table(tasks):
    """Lines of text: HEADER and rows_of, aligned."""
    for row in (HEADER, *rows_of(tasks)):
        yield "{:23} {:20} {:9} {:6} {:14} {:7} {:>5}".format(*row)
    yield from marks(tasks)


def marks(tasks):
    """Lines that name the tests which a control solves."""
    for task, subsets in tasks.items():
        for measure, result in subsets.get("all", {}).items():
            if "solved_by" in result:
                who = result["solved_by"].replace("_", " ")
                yield f"{task} {measure}: the control {who!r} solves it; distrust its name"


def beside_the_paper(tasks, name):
    """Lines: the results of BabyVLM's authors, and those of this checkpoint on their files."""

    def score(task, measure):
        return tasks.get(task, {}).get("all", {}).get(measure, {}).get("score")

    ours = (
        score("labeled_s", "accuracy"),
        score("vtwt", "accuracy"),
        score("baby_winoground", "group"),
        score("caption", "meteor"),
    )
    line = "{:42} {:>9} {:>6} {:>10} {:>7}".format
    yield line("", "Labeled-S", "VTWT", "Winoground", "METEOR")
    for model, scores in (PAPER | {name: ours}).items():
        yield line(model, *("-" if score is None else f"{score:.3f}" for score in scores))


# ---------------------------------------------------------------------------------------------
# For the report page

# {test: (title, the measure that is shown)}; of other tests the first measure
TITLES = {
    "labeled_s": ("Labeled-S: which of four pictures shows the word?", "accuracy"),
    "vtwt": ("VTWT: which of two phrases fits the picture?", "accuracy"),
    "baby_winoground": ("Winoground: two pictures, two phrases, each true of one", "group"),
    "caption": ("Captions: is the thing named, and no other?", "names_thing"),
    "two_by_one": ("Two pictures, one phrase", "accuracy"),
    "two_by_two": ("Two pictures, two phrases", "group"),
    "which_picture": ("Own recordings: over which of four pictures was this said?", "accuracy"),
    "which_utterance": ("Own recordings: which of four was said over this picture?", "accuracy"),
    "choice": ("Multiple choice: is the right answer likeliest?", "likelihood"),
    "grammar": ("Grammar pairs, words alone", "accuracy"),
    "toolbox": ("DevCV Toolbox: mean of its eleven columns", "mean"),
}
SUBSETS = {"all": "all", "seen": "seen pairs", "held_out": "held-out pairs"}


def in_plain(name):
    return name.replace("_", " ")


def in_order(subsets):
    """The names of subsets: all, seen, held out, then the others as they come."""
    return sorted(subsets, key=lambda name: [*SUBSETS, name].index(name))


def shown_measure(test, measures):
    """The measure of a test that stands for it."""
    wanted = TITLES.get(test, ("", ""))[1]
    return wanted if wanted in measures else next(iter(measures))


def groups_of(tasks):
    """[(title, [(label, result, whether it is a control)])] of eval.py's results: each test's chief
    measure, of all items and of each subset, and its controls."""
    groups = []
    for test, subsets in tasks.items():
        measure = shown_measure(test, subsets["all"])
        rows = [
            (SUBSETS.get(name, in_plain(name)), subsets[name][measure], False)
            for name in in_order(subsets)
            if measure in subsets[name]
        ]
        if len(rows) == 1:
            rows = [(in_plain(measure), rows[0][1], False)]
        for control in CONTROLS:
            if control in subsets["all"]:
                rows.append((in_plain(control), subsets["all"][control], True))
        groups.append((title_of(test, measure), rows))
    return groups


def title_of(test, measure):
    """The title of a test, if this is the measure that the title is of; else both names."""
    title, wanted = TITLES.get(test, (in_plain(test).capitalize(), measure))
    return title if measure == wanted else f"{title.partition(':')[0]}: {in_plain(measure)}"


def tiles_of(tasks, most=5):
    """[(number, what it is, note)] of the tests that stand for the others."""
    tiles = []
    for test in [name for name in TITLES if name in tasks] or list(tasks)[:most]:
        subsets = tasks[test]
        measure = shown_measure(test, subsets["all"])
        if test in TITLES and measure != TITLES[test][1]:
            continue  # METEOR is no share of anything
        title = TITLES.get(test, (in_plain(test).capitalize(), ""))[0].partition(":")[0]
        if test.startswith("which_"):
            title = in_plain(test).capitalize()
        first = subsets.get("seen", subsets["all"])[measure]
        label = f"{title}, seen pairs" if "seen" in subsets else title
        notes = []
        if "held_out" in subsets:
            notes.append(f"<i>{subsets['held_out'][measure]['score']:.0%}</i> held-out pairs")
        if "cannot_see" in subsets["all"]:
            notes.append(f"{subsets['all']['cannot_see']['score']:.0%} without pictures")
        if first["chance"] is not None:
            notes.append(f"chance {first['chance']:.0%}")
        tiles.append((f"{first['score']:.0%}", label, "; ".join(notes)))
    return tiles[:most]
