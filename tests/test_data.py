"""Tokenizer, bins and batches, against slow counts, hashes and what went in."""
import hashlib
import json
import re
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import data
import toyworld
from data import DataError, Tokenizer

TEXT = ["look , a red ball !", "the ball is red .", "that 's a bear .", "a ball , a ball , a bear"]


def slow_bpe(counts, merges):
    """The definition: recount everything, join the commonest pair, again."""
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    vocabulary = [bytes([i]) for i in range(256)]
    for _ in range(merges):
        pairs = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        rank = {token: i for i, token in enumerate(vocabulary)}
        pairs = {p: c for p, c in pairs.items() if c > 1}
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], rank[p[0]], rank[p[1]]))
        vocabulary.append(best[0] + best[1])
        for word, parts in words.items():
            k = 0
            while k < len(parts) - 1:
                if (parts[k], parts[k + 1]) == best:
                    parts[k:k + 2] = [best[0] + best[1]]
                k += 1
    return vocabulary


def test_bpe_learns_what_the_definition_says():
    rng = np.random.RandomState(0)
    lines = TEXT + ["aaaa aaa abab", "".join(rng.choice(list("ab c"), 300))]
    counts = Counter(w for line in lines for w in re.findall(data.PATTERN, line))
    assert list(data.train_bpe(counts, 60)) == slow_bpe(counts, 60)


@pytest.mark.parametrize("text", [
    "", " ", "a", "look , a red ball !", "  two  spaces\tand\nlines ", "naïve ÅÖ ß 日本 🎈",
    "x_1__y ²³ ½ don't e\u0301", "<eos> <image> <|endoftext|>", "\u200d\ufeff\x00"])
def test_bpe_gives_back_exactly_what_it_was_given(text):
    tokenizer = Tokenizer.train(TEXT, 300)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(t < len(tokenizer.ranks) for t in tokens)  # no text can forge a special token
    again = Tokenizer.parse(tokenizer.dump(), "bpe")
    assert again.encode(text) == tokens and again.vocab_size == tokenizer.vocab_size


def test_thousands_of_merges_take_seconds():
    rng = np.random.RandomState(0)
    words = ["".join(map(chr, rng.randint(97, 123, rng.randint(2, 9)))) for _ in range(9000)]
    lines = (" ".join(words[i] for i in rng.zipf(1.3, 12) % 9000) for _ in range(30000))
    start = time.perf_counter()
    assert Tokenizer.train(lines, 6000).vocab_size == 6000
    assert time.perf_counter() - start < 30


def test_word_level_vocabulary_keeps_its_ids(tmp_path):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({"<pad>": 0, "<unk>": 1, "a": 2, "ball": 3}))
    tokenizer = Tokenizer.of_words(path)
    assert tokenizer.encode("a ball zebra") == [2, 3, 1]
    assert tokenizer.decode([2, 3]) == "a ball" and tokenizer.vocab_size == 4 + 3
    path.write_text(json.dumps({"a": 5}))
    with pytest.raises(DataError, match="ids 0 to n - 1"):
        Tokenizer.of_words(path)


def test_the_toy_world_is_the_same_bytes_everywhere():
    digest = hashlib.sha256()
    rng = np.random.RandomState(7)
    for _ in range(40):
        scene = toyworld.random_scene(rng, toyworld.THINGS)
        digest.update(toyworld.utterance(scene, rng).encode())
        digest.update(toyworld.film(scene, rng, 32, toyworld.THINGS).tobytes())
    assert digest.hexdigest()[:16] == "37a5dc627a572b17"


def test_held_out_pairs_are_never_filmed_or_spoken_of():
    rng = np.random.RandomState(0)
    held = [(c, k) for k in toyworld.THINGS for c in toyworld.COLOURS
            if toyworld.held_out(toyworld.Thing(k, c))]
    assert len(held) == 16 and len({k for _, k in held}) == 16
    said = ""
    for _ in range(4000):
        scene = toyworld.random_scene(rng, toyworld.THINGS)
        assert not any(map(toyworld.held_out, scene.things))
        said += toyworld.utterance(scene, rng) + "\n"
    for colour, kind in held:
        assert f"{colour} {kind}" not in said and f"the {kind} is {colour}" not in said
    assert all(kind in said for kind in toyworld.THINGS)


def test_trials_have_one_answer_and_babyvlm_columns(world):
    columns = "trial_id", "target_category", "real_category", "image"
    rows = [row for _, row in data.read_csv(world / "data/tiny/eval/labeled_s.csv", columns)]
    for i in range(0, len(rows), 4):
        kinds = [row["real_category"] for row in rows[i:i + 4]]
        assert len(set(kinds)) == 4 and kinds.count(rows[i]["target_category"]) == 1
    for row in (row for _, row in data.read_csv(world / "data/tiny/eval/vtwt.csv",
                                                ("image", "positive_phrase", "negative_phrase"))):
        assert row["positive_phrase"] != row["negative_phrase"]
        assert (world / "data/tiny/eval/images" / row["image"]).exists()


def test_bins_hold_what_was_said(world):
    dataset = data.Data(world / "data/tiny")
    pairs, captions = dataset.open("train", "pairs"), dataset.open("train", "captions")
    assert len(pairs) == 48 and dataset.open("train", "frames").shape == (24, 16, 16, 3)
    assert list(dataset.open("train", "clips")[:4]) == [0, 0, 1, 1]
    rng = np.random.RandomState([1, 0, 1])  # data.Config's seed, the training split, its frames
    for i, (frame, first, length) in enumerate(pairs[:8]):  # two clips, two frames, two utterances
        if i % 4 == 0:
            scene = toyworld.random_scene(rng, toyworld.THINGS)
        if i % 2 == 0:
            shot = toyworld.film(scene, rng, 16, toyworld.THINGS)
            assert np.array_equal(dataset.open("train", "frames")[frame], shot)
        assert dataset.tokenizer.decode(captions[first:first + length - 1]) == \
            toyworld.utterance(scene, rng)
        assert captions[first + length - 1] == dataset.tokenizer.eos


def test_every_row_once_a_pass_and_any_start_the_same():
    order = data.Order(10, seed=3)
    whole = order(0, 45)
    assert all(sorted(whole[i:i + 10]) == list(range(10)) for i in (0, 10, 20, 30))
    assert not np.array_equal(whole[:10], whole[10:20])
    for start in (0, 7, 33, 12):
        assert np.array_equal(data.Order(10, seed=3)(start, 9), whole[start:start + 9])


def test_pair_rows_ask_for_caption_tokens_only(recipe):
    dataset = data.Data(recipe.parent.parent / "data/tiny")
    batches, P = data.PairBatches(dataset, "train", 48), dataset.meta["P"]
    tokens, targets, features = batches(0, 6)
    assert tokens.shape == targets.shape == (6, P + dataset.meta["longest_caption"])
    assert features.shape == (6, P, dataset.meta["E"])
    frames = dataset.open("train", "features")
    for row, card in enumerate(batches.order(0, 6)):
        frame, first, length = batches.pairs[card]
        words = list(batches.captions[first:first + length])
        assert np.array_equal(features[row], frames[frame])
        assert list(targets[row][targets[row] != -100]) == words  # eos is learnt
        assert targets[row, P - 1] == words[0]  # the last image position says the first word
        assert (tokens[row] == dataset.tokenizer.image).sum() == P
    with pytest.raises(DataError, match="over block_size 9: raise"):
        data.PairBatches(dataset, "train", 9)


def test_text_rows_predict_the_next_token(world):
    dataset = data.Data(world / "data/tiny")
    batches = data.TextBatches(dataset, "train", 16)
    stream = dataset.open("train", "text")
    x, y = batches(0, 5)
    for row, card in enumerate(batches.order(0, 5)):
        assert np.array_equal(x[row], stream[card * 16:card * 16 + 16])
        assert np.array_equal(y[row], stream[card * 16 + 1:card * 16 + 17])


def test_the_other_moment_is_of_the_same_clip(world):
    dataset = data.Data(world / "data/tiny")
    batches = data.ClipBatches(dataset, "train")
    frames, others = batches(0, 24)
    stored = dataset.open("train", "frames")
    for card, a, b in zip(batches.order(0, 24), frames, others):
        assert np.array_equal(a, stored[card]) and np.array_equal(b, stored[card ^ 1])  # clip = 2


def test_missing_and_damaged_bins_say_what_to_do(world, tmp_path):
    with pytest.raises(DataError, match="run `python data.py toy` first"):
        data.Data(tmp_path / "toy")
    dataset = data.Data(world / "data/tiny")
    dataset.directory = tmp_path
    (tmp_path / "train_text.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="5 bytes, but meta.json says"):
        dataset.open("train", "text")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), data.writing(tmp_path / "x") as file:
        file.write(b"half")
        1 / 0
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_features_go_on_where_they_stopped(world, tmp_path):
    import shutil
    shutil.copytree(world / "data/tiny", tmp_path / "d")
    dataset = data.Data(tmp_path / "d")
    rows = np.random.RandomState(0).rand(24, 4, 3).astype(np.float16)

    def broken(start):
        yield rows[start:start + 10]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.write_features("train", broken, "a" * 64, (4, 3))
    with open(next((tmp_path / "d").glob("*.partial")), "ab") as file:
        file.write(b"\x01\x02\x03")  # a row cut short by the power failing
    asked = []
    dataset.write_features("train", lambda start: asked.append(start) or [rows[start:]], "a" * 64,
                           (4, 3))
    assert asked == [10]
    assert np.array_equal(data.Data(tmp_path / "d").open("train", "features"), rows)


def picture(path, mode, size=(20, 10)):
    image = Image.new("RGB", size, (200, 30, 30))
    if mode == "I;16":
        image = Image.fromarray(np.full(size[::-1], 200 * 256, np.uint16))
    elif mode == "RGBA":
        image = image.convert("RGBA")
    elif mode == "exif":
        image.paste((30, 30, 200), (0, 0, size[0] // 2, size[1]))  # left half blue
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned a quarter to the right: blue goes up
        image.save(path, exif=exif, quality=95)
        return path
    else:
        image = image.convert(mode)
    image.save(path)
    return path


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("L", "png"), ("P", "png"), ("1", "png"),
                                          ("CMYK", "jpg"), ("RGBA", "png"), ("I;16", "png")])
def test_every_kind_of_picture_is_read(tmp_path, mode, suffix):
    frame = data.read_image(picture(tmp_path / f"x.{suffix}", mode), 8)
    assert frame.shape == (8, 8, 3) and frame.dtype == np.uint8
    if mode in ("RGB", "RGBA", "P", "CMYK"):
        assert abs(frame.astype(int) - (200, 30, 30)).max() < 32
    if mode == "I;16":
        assert (frame == 200).all()


def test_a_turned_picture_is_turned_upright(tmp_path):
    frame = data.read_image(picture(tmp_path / "x.jpg", "exif"), 8).astype(int)
    assert (frame[0, :, 2] > 150).all() and (frame[-1, :, 0] > 150).all()


def test_captioned_pictures_and_transcripts_are_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = ["image,caption"]
    for i in range(120):
        picture(tmp_path / f"{i}.png", "RGB")
        rows.append(f'{i}.png,"a ball , number {i}"')
    (tmp_path / "7.png").write_bytes((tmp_path / "8.png").read_bytes()[:45])  # truncated
    (tmp_path / "p.csv").write_text("\n".join(rows))
    (tmp_path / "t.txt").write_text("\n".join(f"line {i} ." for i in range(200)))
    data.main(["pairs", "--csv", "p.csv", "--images", ".", "--text", "t.txt", "--size=16"])
    dataset = data.Data("data/pairs")
    assert dataset.count("train", "frames") == 109 and dataset.count("val", "frames") == 10
    assert "p.csv:9: " in (tmp_path / "data/pairs/skipped.txt").read_text()
    frame, first, length = dataset.open("train", "pairs")[7]  # row 8, since 7 was skipped
    words = dataset.open("train", "captions")[first:first + length - 1]
    assert dataset.tokenizer.decode(words) == "a ball , number 8" and frame == 7
    val = dataset.tokenizer.decode(dataset.open("val", "text"))
    assert "line 18 ." in val and "line 19 ." in val and "line 17 ." not in val
    with pytest.raises(DataError, match="over max_skipped 0.001"):
        data.main(["pairs", "--csv=p.csv", "--images=.", "--size=16", "--max_skipped=0.001"])


@pytest.mark.parametrize("content, message", [
    ("", "no column image, caption"), ("image,caption\n", "no rows below the header"),
    ("image,text\na.png,hi\n", ":1: no column caption"), ("image,caption\na.png,\n", ":2: empty"),
    (None, "No such file")])
def test_a_bad_csv_is_one_clear_line(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "p.csv").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        data.main(["pairs", "--csv=p.csv", "--images=."])
    assert "\n" not in str(error.value)


def test_preparing_holds_no_bin_in_memory(tmp_path):
    config = data.Config(size=64, vocab_size=300)
    frame = np.zeros((64, 64, 3), np.uint8)  # 12 KB; 3,000 of them are 37 MB
    text = lambda: iter(TEXT * 5)
    tracemalloc.start()
    data.prepare(tmp_path, config, {"train": (text, lambda: ((frame + i % 7, i, ["a ball ."])
                                                           for i in range(3000)), 3000)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "train_frames.bin").stat().st_size == 3000 * 64 * 64 * 3
    assert peak < 8e6
