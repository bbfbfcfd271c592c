"""Other people's vocabularies against the `tokenizers` package, and ours in their form."""

import json
import random

import pytest
from conftest import one_line

from config import UserError
from pretrained import split_patterns, tokenizer_json
from pretrained.tokenizer_json import JsonTokenizer
from tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
from fake_llava import byte_level, sentence_piece  # noqa: E402

WORDS = (
    "the red ball and a cup , don't WE'LL look ! where 's mummy 's blue shoe ? 12 345 x_y".split()
)
ODD = [
    "naïve café 你好 мир",
    "🙂🙂 ok  two  spaces   three",
    "\n\nnew\tline \n x",
    "e\u0301 \u200dzero\u200cwidth",
    " a space before",
    "and after ",
    "\u2581a mark_and_underscore",
    "\u00a0no\u2003break",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


def strings(count=2000):
    """Sentences, odd ones, and noise from all over Unicode."""
    rng = random.Random(0)
    anywhere = lambda: chr(
        rng.choice([rng.randint(32, 126), rng.randint(160, 0x2FFF), rng.randint(0x1F300, 0x1F600)])
    )
    made = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count - 400)]
    made += ["".join(anywhere() for _ in range(rng.randint(1, 30))) for _ in range(391)]
    return made + ODD


TRAINED_ON = strings(600)
KINDS = {
    "llama3": lambda: byte_level(TRAINED_ON, 900),
    "qwen2": lambda: byte_level(TRAINED_ON, 900, nfc=True),
    "llama2": lambda: sentence_piece(False, TRAINED_ON, 900),
    "mistral": lambda: sentence_piece(True, TRAINED_ON, 900),
}


def ours(theirs):
    roles = {"eos": 0, "stops": [0], "bos": None, "pad": 0, "image": 899, "vocab_size": 900}
    return JsonTokenizer(json.loads(theirs.to_str()), roles)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_2000_strings_are_theirs(kind):
    theirs = KINDS[kind]()
    made = ours(theirs)
    tested = strings()
    assert len(tested) == 2000
    different = [
        text
        for text in tested
        if made.encode(text) != theirs.encode(text, add_special_tokens=False).ids
    ]
    assert not different
    for text in tested:
        whole = made.decode(made.encode(text))
        assert "".join(made.pieces(made.encode(text))) == whole
        if kind != "qwen2":  # which composes what was decomposed
            assert whole == text.removeprefix(" ") or kind in ("llama2", "mistral")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read_again(kind):
    made = ours(KINDS[kind]())
    again = tokenizer_json.parse_tokenizer(made.dump(), "json")
    assert again.encode("a red ball 🙂") == made.encode("a red ball 🙂")
    assert again.digest() == made.digest()


def test_stretches_after_a_special_are_as_theirs():
    """Llama 2's mark stands before every stretch, Mistral's before the first one alone."""
    for kind in ("llama2", "mistral"):
        theirs = KINDS[kind]()
        made = ours(theirs)
        whole = theirs.encode("a ball</s>a cup", add_special_tokens=False).ids
        stretches = made.encode_segment("a ball") + [2] + made.encode_segment("a cup", "special")
        assert stretches == whole


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["model"].update(type="Unigram"), "the model"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "the normalizer"),
        (
            lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "the pre-",
        ),
        (lambda c: c["model"]["vocab"].pop("a"), "merges without 'a'"),
        (lambda c: c["model"].pop("vocab"), "an unknown form"),
    ],
)
def test_what_is_not_understood_is_refused(change, message):
    content = json.loads(KINDS["llama3"]().to_str())
    change(content)
    roles = {"eos": 0, "stops": [0], "bos": None, "pad": 0, "image": 899, "vocab_size": 900}
    with pytest.raises(UserError, match=message) as error:
        JsonTokenizer(content, roles)
    assert one_line(error)


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_our_vocabularies_in_their_form_give_the_same_ids(kind, tmp_path):
    made = Tokenizer.train(TRAINED_ON, 700)
    if kind == "word":
        path = tmp_path / "vocab.json"
        words = sorted({word for text in TRAINED_ON for word in text.split()})[:500]
        path.write_text(json.dumps({word: i for i, word in enumerate(["<unk>", *words])}))
        made = Tokenizer.of_words(path)
    content = tokenizer_json.export(made)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in strings():
        assert theirs.encode(text, add_special_tokens=False).ids == made.encode(text), text
        if kind == "bpe":
            assert theirs.decode(made.encode(text)) == made.decode(made.encode(text))
    assert tokenizer_json.undo(content).dump() == made.dump()


# ---------------------------------------------------------------------------------------------
# Files as others write them


def isolated(pattern):
    form = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return form | {"invert": False}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DEEPSEEK = [  # V2's five splits, its long list of letters cut; V3's three
    [
        isolated(r"[\r\n]"),
        isolated(r"\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u0370-\u0373]+"),
        isolated(r"\s?[!-/:-~\uff01-\uff0f\u2018-\u201f\u3000-\u3002]+"),
        isolated(r"\s+$"),
        isolated("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
        {"type": "Digits", "individual_digits": True},
        BYTES,
    ],
    [
        isolated(r"\p{N}{1,3}"),
        isolated("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
        isolated(
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?"
            r"[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        BYTES,
    ],
]
GPT4O = isolated(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def add(content, *words, **flags):
    """Add words that are not special to a vocabulary."""
    for word in words:
        own = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False} | flags
        i = max([*content["model"]["vocab"].values(), *(e["id"] for e in content["added_tokens"])])
        content["added_tokens"].append({"id": i + 1, "content": word, "special": False} | own)


def other_pairs(content):
    """Let half of the tokens be made of another pair than the one they were learnt from."""
    rng, vocab, merges = random.Random(0), content["model"]["vocab"], []
    for merge in content["model"]["merges"]:
        token = "".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [list(pair) for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges.append(rng.choice(pairs))
    rng.shuffle(merges)
    content["model"]["merges"] = merges


def splits(*steps):
    return lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [*steps]})


def behaves(behavior, invert=False, pattern=r"\w+"):
    return splits(isolated(pattern) | {"behavior": behavior, "invert": invert}, BYTES)


ADDED = ("<think>", "</tool>", " ball", "'s", "na\u00efve")
VARIANTS = [  # (kinds, what is changed)
    (("llama3", "qwen2"), splits(*DEEPSEEK[0])),
    (("llama3", "qwen2"), splits(*DEEPSEEK[1])),
    (("llama3",), splits(GPT4O, BYTES)),
    (
        ("llama3",),
        splits({"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}),
    ),
    (("llama3",), splits({"type": "Digits", "individual_digits": False}, BYTES)),
    *[(("llama3",), behaves(b)) for b in ("Removed", "Contiguous", "MergedWithPrevious")],
    (("llama3",), behaves("MergedWithNext", invert=True)),
    (("llama3",), behaves("Isolated", pattern=r"[^\S\n]\P{L}|\D\W")),
    (KINDS, lambda c: add(c, *ADDED)),
    (KINDS, lambda c: add(c, *ADDED, normalized=True)),
    (KINDS, lambda c: add(c, *ADDED, lstrip=True, rstrip=True)),
    (KINDS, lambda c: add(c, *ADDED, single_word=True)),
    (KINDS, lambda c: add(c, "<a>", "<a><b>", "<b>")),  # the longest is found
    (KINDS, other_pairs),
    (KINDS, lambda c: c["model"].update(ignore_merges=False)),
    (("llama2", "mistral"), lambda c: c["model"].update(fuse_unk=True, byte_fallback=False)),
    (("llama2", "mistral"), lambda c: c["model"].update(fuse_unk=False, byte_fallback=False)),
    (("llama2",), lambda c: c["model"].update(unk_token=None, byte_fallback=False)),
    (("mistral",), lambda c: c["pre_tokenizer"].update(prepend_scheme="always", split=True)),
    (("mistral",), lambda c: c["pre_tokenizer"].update(prepend_scheme="never")),
]


@pytest.mark.parametrize(
    "kind, change", [(kind, change) for kinds, change in VARIANTS for kind in kinds]
)
def test_the_ids_of_files_as_others_write_them_are_theirs(kind, change):
    content = json.loads(KINDS[kind]().to_str())
    change(content)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True  # as here, text never becomes a special token
    roles = {"eos": 0, "stops": [0], "bos": None, "pad": 0, "image": 99999, "vocab_size": 99999}
    for entry in content["added_tokens"]:
        entry["id"] = theirs.token_to_id(entry["content"])
    made, rng = JsonTokenizer(content, roles), random.Random(0)
    for text in strings(600):
        for word in rng.sample([*ADDED, "<a><b>", "345", "12 \n"], rng.randint(0, 3)):
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice(["", " "]) + word + rng.choice(["", " "]) + text[at:]
        assert made.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_were_added_are_said(kind):
    content = json.loads(KINDS[kind]().to_str())
    add(content, "<think>", "b\u00e9b\u00e9")
    roles = {"eos": 0, "stops": [0], "bos": None, "pad": 0, "image": 99999, "vocab_size": 99999}
    made = JsonTokenizer(content, roles)
    tokens = made.encode("<think>a b\u00e9b\u00e9")
    said = "<think>a b\u00e9b\u00e9" if kind != "llama2" else "<think> a b\u00e9b\u00e9"
    assert made.decode(tokens) == said == "".join(made.pieces(tokens))
    assert made.encode("</s>") != [made.specials["</s>"]]  # nobody says a special token


@pytest.mark.parametrize(
    "pattern",
    [r"\p{Nobody}+", r"\h+", r"[a[b]]", r"[\w&&[^\d]]", r"\p{N}{1,3}+", "a\\", "(a", "[a"],
)
def test_a_pattern_that_has_no_translation_is_refused(pattern):
    content = json.loads(KINDS["llama3"]().to_str())
    splits(isolated(pattern), BYTES)(content)
    with pytest.raises(UserError, match="tokenizer.json: .*pattern|class") as error:
        JsonTokenizer(
            content, {"eos": 0, "stops": [0], "bos": None, "pad": 0, "image": 1, "vocab_size": 9}
        )
    assert one_line(error)


@pytest.mark.parametrize("pattern", [r"\w", r"[^\s\w]", r"[\p{P}\p{S}]"])
def test_a_class_has_the_characters_that_it_has_there(pattern):
    """Every character of Unicode, also those that are younger than this Python."""
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    theirs = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed")
    mine = split_patterns.translate(pattern)
    for start in range(0, len(characters), 4000):
        some = characters[start : start + 4000]
        kept = "".join(piece for piece, _ in theirs.pre_tokenize_str("".join(some)))
        assert kept == "".join(char for char in some if not mine.match(char))
