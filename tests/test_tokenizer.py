"""The tokenizer, against slow counts and what went in."""

import json
import re
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from conftest import one_line

import fast.bpe
import tokenizer as module
from config import UserError
from tokenizer import Tokenizer, caption_sample

TEXT = ["look , a red ball !", "the ball is red .", "that 's a bear .", "a ball , a ball , a bear"]


def slow_bpe(counts, merges):
    """The definition: recount everything, join the commonest pair, again."""
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    vocabulary = [bytes([i]) for i in range(256)]
    for _ in range(merges):
        pairs = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        rank = {token: i for i, token in enumerate(vocabulary)}
        pairs = {p: c for p, c in pairs.items() if c > 1}
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], rank[p[0]], rank[p[1]]))
        vocabulary.append(best[0] + best[1])
        for parts in words.values():
            k = 0
            while k < len(parts) - 1:
                if (parts[k], parts[k + 1]) == best:
                    parts[k : k + 2] = [best[0] + best[1]]
                k += 1
    return vocabulary


def test_bpe_learns_what_the_definition_says():
    rng = np.random.RandomState(0)
    lines = TEXT + ["aaaa aaa abab", "".join(rng.choice(list("ab c"), 300))]
    counts = Counter(word for line in lines for word in re.findall(module.PATTERN, line))
    assert list(module.train_bpe_plain(counts, 60)) == slow_bpe(counts, 60)
    assert fast.bpe.train_bpe(counts, 60, module.merge) == module.train_bpe_plain(counts, 60)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a",
        "look , a red ball !",
        "  two  spaces\tand\nlines ",
        "naïve ÅÖ ß 日本 🎈",
        "x_1__y ²³ ½ don't e\u0301",
        "<eos> <image> <|endoftext|>",
        "\u200d\ufeff\x00",
    ],
)
def test_bpe_gives_back_exactly_what_it_was_given(text):
    tokenizer = Tokenizer.train(TEXT, 300)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(token < len(tokenizer.ranks) for token in tokens)  # no text can forge a special
    again = Tokenizer.parse(tokenizer.dump(), "bpe")
    assert again.encode(text) == tokens and again.vocab_size == tokenizer.vocab_size
    assert again.digest() == tokenizer.digest() != Tokenizer.train(TEXT, 270).digest()


@pytest.mark.parametrize("text", ["café 日本 🎈 !", "  a", "a b", "e\u0301 ß"])
def test_streamed_pieces_are_whole_characters_and_add_up(text):
    tokenizer = Tokenizer.train(TEXT, 300)  # knows none of these: a token is a byte
    pieces = list(tokenizer.pieces([*tokenizer.encode(text), tokenizer.eos]))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(tokenizer.encode(text)) + 1


def test_words_are_streamed_with_the_spaces_between(tmp_path):
    (tmp_path / "v.json").write_text(json.dumps({"<unk>": 0, "a": 1, "ball": 2}))
    tokenizer = Tokenizer.of_words(tmp_path / "v.json")
    assert list(tokenizer.pieces([1, 2, tokenizer.eos])) == ["a", " ball", ""]


def test_thousands_of_merges_take_seconds():
    rng = np.random.RandomState(0)
    words = ["".join(map(chr, rng.randint(97, 123, rng.randint(2, 9)))) for _ in range(9000)]
    lines = (" ".join(words[i] for i in rng.zipf(1.3, 12) % 9000) for _ in range(30000))
    start = time.perf_counter()
    assert Tokenizer.train(lines, 6000).vocab_size == 6000
    assert time.perf_counter() - start < 30


def test_a_word_level_vocabulary_keeps_its_ids(tmp_path):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({"<pad>": 0, "<unk>": 1, "a": 2, "ball": 3}))
    tokenizer = Tokenizer.of_words(path)
    assert tokenizer.encode("a ball zebra") == [2, 3, 1]
    assert tokenizer.decode([2, 3]) == "a ball" and tokenizer.vocab_size == 4 + 3


@pytest.mark.parametrize("content", ['{"a": 5}', '{"<unk>": "x"}', "[1]", '{"<unk>": 1}'])
def test_a_bad_vocabulary_is_one_clear_line(tmp_path, content):
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(UserError, match="ids 0 to n - 1") as error:
        Tokenizer.of_words(tmp_path / "vocab.json")
    assert one_line(error)


def test_a_caption_is_learnt_to_its_end_and_its_image_is_not():
    tokenizer = Tokenizer.train(TEXT, 300)
    tokens, learn = caption_sample(tokenizer, "a red ball", images=2)
    words = tokenizer.encode("a red ball")
    assert tokens == [tokenizer.image] * 2 + words + [tokenizer.eos]
    assert learn == [0, 0] + [1] * (len(words) + 1)
