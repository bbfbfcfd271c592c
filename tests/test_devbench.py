"""Machine-DevBench and DevBench: rules against slow loops, the divergence against scipy's kind of
search, corrupted files."""

import itertools
import json
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import one_line

from config import UserError
from tasks import devbench
from tasks.devbench import (
    columns_of,
    machine_devbench,
    read_human,
    read_machine_devbench,
    read_manifest,
)


def subject_of(table, human="", rows=()):
    """A Subject whose NLL of a text after a picture is table[picture, text]."""
    nll = lambda images, texts: np.array([table[pair] for pair in zip(images, texts)])
    return SimpleNamespace(nll=nll, settings=SimpleNamespace(human=human), rows=rows)


def write(path, header, *rows):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


BINS = ("[1,2)", "[2,4)", "[4,8)", "[8,16)")
CATEGORIES = ("counting", "negation")
STYLES = ("realistic", "cartoon")


def release(folder, rng, ties=False):
    """Machine-DevBench's folder: (its trials, {(picture, text): NLL})."""
    trials, table = [], {}
    value = (lambda: float(rng.randint(3))) if ties else rng.rand
    for style in STYLES:
        for part in ("nouns", "adjectives"):
            items = []
            for i in range(23):
                names = [f"images/{style}_{i}_{side}.png" for side in ("pos", "neg")]
                items.append(
                    {
                        "word": f"w{i}",
                        "category": "toys",
                        "caption_positive": f"a w{i}",
                        "caption_negative": "unused",
                        "negative_word": "x",
                        "frequency_count": i,
                        "image_positive": names[0],
                        "image_negative": names[1],
                        "frequency_bin": BINS[rng.randint(4)],
                    }  # fmt: skip
                )
            directory = folder / "Lexical" / part.capitalize()
            trials += [(f"lex_{part}", style, directory, item) for item in items]
            write_manifest(directory / f"manifest_{part}_{style}.json", items)
        for category in CATEGORIES:
            items = [
                {
                    "seq": i,
                    "word": "w",
                    "caption_a": f"{category} a{i}",
                    "freq_bin": BINS[i % 4],
                    "caption_b": f"{category} b{i}",
                    "image_0": f"{style}/{i}_0.png",
                    "image_1": f"{style}/{i}_1.png",
                }  # fmt: skip
                for i in range(17)
            ]
            directory = folder / "Grammatical" / f"gram_{category}"
            trials += [(f"gram_{category}", style, directory, item) for item in items]
            write_manifest(directory / f"manifest_grammatical_{category}_{style}.json", items)
    for task, _, directory, item in trials:
        is_lexical = task.startswith("lex")
        keys = ("image_positive", "image_negative") if is_lexical else ("image_0", "image_1")
        texts = ("caption_positive",) if is_lexical else ("caption_a", "caption_b")
        for key, text in itertools.product(keys, texts):
            table[str(directory / item[key]), item[text]] = value()
    return trials, table


def write_manifest(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"items": items}))


def slow_machine_devbench(trials, table):
    """{name: score} by the published rules, in fractions; a tie is wrong."""
    records = {}
    for task, _, directory, item in trials:
        nll = lambda image, text: table[str(directory / item[image]), item[text]]
        if task.startswith("lex"):
            right = nll("image_positive", "caption_positive") < nll(
                "image_negative", "caption_positive"
            )
            group = item["frequency_bin"]
        else:
            own = nll("image_0", "caption_a") + nll("image_1", "caption_b")
            right = own < nll("image_0", "caption_b") + nll("image_1", "caption_a")
            group = "all"
        group = "[1,4)" if group in ("[1,2)", "[2,4)") else group
        records.setdefault(task, {}).setdefault(group, []).append(Fraction(int(right)))
    mean = lambda values: sum(values) / len(values)
    scores = {
        task: mean([mean(own) for own in groups.values()]) for task, groups in records.items()
    }
    lexical = mean([score for task, score in scores.items() if task.startswith("lex")])
    grammatical = mean([score for task, score in scores.items() if task.startswith("gram")])
    overall = (lexical + grammatical) / 2
    return scores | {"lexical": lexical, "grammatical": grammatical, "overall": overall}


@pytest.mark.parametrize("ties", [False, True])
def test_machine_devbench_by_a_slow_loop(tmp_path, ties):
    """Both styles pooled and each alone, to the last digit."""
    trials, table = release(tmp_path, np.random.RandomState(0), ties)
    rows = read_machine_devbench(tmp_path)
    assert len(rows) == len(trials) == 2 * (2 * 23 + 2 * 17)
    for style in (None, *STYLES):
        chosen = [row for row in rows if style in (None, row["subset"])]
        results = machine_devbench(chosen, subject_of(table), "published")
        slow = slow_machine_devbench([t for t in trials if style in (None, t[1])], table)
        assert {name: result["score"] for name, result in results.items()} == {
            name: round(float(score), 4) for name, score in slow.items()
        }
    if not ties:  # fair and published ties are the same without any
        assert results == machine_devbench(chosen, subject_of(table), "fair")


def test_machine_devbench_without_lexical_tasks(tmp_path):
    """overall is then the grammatical mean, as published."""
    trials, table = release(tmp_path, np.random.RandomState(1))
    rows = [row for row in read_machine_devbench(tmp_path) if row["task"].startswith("gram")]
    results = machine_devbench(rows, subject_of(table), "published")
    assert "lexical" not in results
    assert results["overall"]["score"] == results["grammatical"]["score"]


def test_a_constant_model_scores_half_or_nothing(tmp_path):
    path = write(
        tmp_path / "m.csv",
        "task,bin,image1,image2,text1,text2",
        "lexical,high,a,b,s,",
        "order,low,a,b,s,t",
    )
    table = dict.fromkeys(itertools.product("ab", "st"), 1.0)
    for ties, score in (("fair", 0.5), ("published", 0.0)):
        results = machine_devbench(read_machine_devbench(path), subject_of(table), ties)
        assert {results[name]["score"] for name in results} == {score}


@pytest.mark.parametrize(
    "content, why",
    [("{}", "item 0"), ('{"items": [{"word": "x"}]}', "item 0: want"), ("[", "not JSON")],
)
def test_corrupted_manifests(tmp_path, content, why):
    directory = tmp_path / "Lexical" / "Nouns"
    directory.mkdir(parents=True)
    with pytest.raises(UserError, match="no Lexical/Nouns") as error:
        read_machine_devbench(tmp_path)
    assert one_line(error)
    (directory / "manifest_nouns_cartoon.json").write_text(content)
    with pytest.raises(UserError, match=why) as error:
        read_machine_devbench(tmp_path)
    assert one_line(error) and "manifest_nouns_cartoon.json" in str(error.value)


def test_devbench_accuracy_of_pictures_and_of_texts(tmp_path):
    path = write(
        tmp_path / "manifest.csv",
        "image1,image2,image3,image4,text1,text2",
        "a,b,c,d,s,",
        "a,b,c,d,t,",
        "a,,,,s,t",
        "a,b,,,s,t",
    )
    rows = read_manifest(path)
    assert [len(row["images"]) for row in rows] == [4, 4, 1, 2]
    table = {(i, t): v for (i, t), v in zip(itertools.product("abcd", "st"), range(8))}
    results = devbench.devbench(rows, subject_of(table), "fair")
    assert results["accuracy"]["score"] == 1.0  # a is lowest under s and under t; of a, s is
    assert results["accuracy"]["chance"] == pytest.approx((0.25 + 0.25 + 0.5 + 0.5) / 4)
    assert results["group"]["score"] == 0.0  # b with t, 3, is no better than a with t, 1


def test_the_divergence_is_zero_for_the_childrens_own_choices(tmp_path):
    """Scores that are their shares' logarithms over beta: found again, with nothing between."""
    rng, beta, rows, table, lines = np.random.RandomState(1), 3.7, [], {}, []
    for trial in range(1, 9):
        shares = rng.dirichlet(np.ones(4))
        images = [f"{trial}{name}" for name in "abcd"]
        table |= {(image, "s"): -np.log(share) / beta for image, share in zip(images, shares)}
        rows.append(",".join([*images, "s"]))
        lines.append(f"{trial}," + ",".join(f"{share:.12f}" for share in shares))
    manifest = write(tmp_path / "manifest.csv", "image1,image2,image3,image4,text1", *rows)
    human = write(tmp_path / "human.csv", "trial,image1,image2,image3,image4", *lines)
    rows = read_manifest(manifest)
    subject = subject_of(table, str(human), rows)
    results = devbench.devbench(rows, subject, "fair")
    assert results["kl"]["score"] == pytest.approx(0, abs=1e-4)
    assert results["beta"]["score"] == pytest.approx(beta, abs=0.02)


def test_a_subset_of_which_children_were_not_asked_has_no_divergence(tmp_path):
    lines = "a,b,s,seen", "a,b,s,held_out"
    manifest = write(tmp_path / "manifest.csv", "image1,image2,text1,subset", *lines)
    human = write(tmp_path / "human.csv", "trial,image1,image2", "1,0.6,0.4")
    rows = read_manifest(manifest)
    subject = subject_of({("a", "s"): 0.0, ("b", "s"): 1.0}, str(human), rows)
    for asked, measures in ((rows[:1], {"accuracy", "kl", "beta"}), (rows[1:], {"accuracy"})):
        assert set(devbench.devbench(asked, subject, "fair")) == measures


def test_the_interval_is_of_the_mean_over_bins(tmp_path):
    """One bin of 200 items, one of 10: the mean of both hits 95 of 100 times what it is drawn
    from, which an interval of 210 pooled hits would not."""
    truth, rng, covered = (0.9, 0.4), np.random.RandomState(0), []
    lines = [
        f"lexical,bin{b},{b}_{i},x{b}_{i},s," for b, n in ((0, 200), (1, 10)) for i in range(n)
    ]
    rows = read_machine_devbench(
        write(tmp_path / "m.csv", "task,bin,image1,image2,text1,text2", *lines)
    )
    for _ in range(300):
        table = {}
        for row in rows:
            right = rng.rand() < truth[int(row["bin"][-1])]
            one, two = row["image1"], row["image2"]
            table |= {(one, "s"): 1.0 - right, (two, "s"): 0.5}
        low, high = machine_devbench(rows, subject_of(table), "fair")["lexical"]["ci95"]
        covered.append(low <= np.mean(truth) <= high)
    assert np.mean(covered) > 0.9


def test_the_best_beta_by_brute_force(tmp_path):
    rng = np.random.RandomState(2)
    scores, human = rng.randn(20, 3), rng.dirichlet(np.ones(3), 20)
    rows = [{"trial": str(i)} for i in range(20)]
    own = {str(i): [human[i]] for i in range(20)}
    found = devbench.beside_children(rows, [one[:, None] for one in scores], own)

    def mean(beta):
        model = np.exp(beta * scores) / np.exp(beta * scores).sum(1, keepdims=True)
        return (human * np.log(human / model)).sum(1).mean()

    brute = min((mean(beta), beta) for beta in np.geomspace(0.025, 40, 20000))
    assert found["kl"]["score"] == pytest.approx(brute[0], abs=1e-4)
    assert found["beta"]["score"] == pytest.approx(brute[1], rel=0.01)


def test_columns_are_in_order_of_their_numbers():
    row = {"image10": "k", "image2": "b", "image1": "a", "imagery": "x", "image3": ""}
    assert columns_of(row, "image") == ["a", "b", "k"]


@pytest.mark.parametrize(
    "read, header, row, why",
    [
        (
            read_machine_devbench,
            "task,bin,image1,image2,text1,text2",
            "lexical,x,a,b,s,t",
            "one text",
        ),
        (
            read_machine_devbench,
            "task,bin,image1,image2,text1,text2",
            "order,x,a,b,s,",
            "without a text2",
        ),
        (read_machine_devbench, "task,image1", "lexical,a", "no column bin"),
        (read_manifest, "image1,text1", "a,s", "nothing to choose"),
    ],
)
def test_corrupted_tables(tmp_path, read, header, row, why):
    path = write(tmp_path / "t.csv", header, row)
    with pytest.raises(UserError) as error:
        read(path)
    assert one_line(error) and why in str(error.value) and "t.csv:" in str(error.value)


@pytest.mark.parametrize(
    "line, why",
    [
        ("1,0.5", "2 cells under a header of 3"),
        ("1,x,y", "numbers"),
        ("1,inf,1", "want 2 shares"),
        ("9,1,1", "none of its trials"),
    ],
)
def test_corrupted_shares(tmp_path, line, why):
    manifest = write(tmp_path / "manifest.csv", "image1,image2,text1", "a,b,s")
    human = write(tmp_path / "human.csv", "trial,image1,image2", line)
    with pytest.raises(UserError) as error:
        read_human(human, read_manifest(manifest))
    assert one_line(error) and why in str(error.value)
