"""Other people's vocabularies against the `tokenizers` package, and ours in their form."""

import json
import random

import pytest
from conftest import one_line

from config import UserError
from pretrained import tokenizer_json
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
        (lambda c: c["model"]["vocab"].pop("a"), "without b'a'"),
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
