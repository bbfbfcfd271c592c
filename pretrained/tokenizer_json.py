"""
Vocabularies in tokenizer.json files: reading other people's, and writing ours.

Two kinds are read, which cover the language models of LLaVA: byte-level BPE (Llama 3, Qwen,
DeepSeek) and SentencePiece-style BPE with byte fallback (Llama 2, Vicuna, Mistral). Both give the
ids of the `tokenizers` package. Other kinds are refused by name.
"""

import codecs
import hashlib
import heapq
import json
import re
import unicodedata
from itertools import pairwise

from config import UserError
from pretrained.split_patterns import read_step, translate
from tokenizer import PATTERN, Tokenizer

MARK = "\u2581"  # SentencePiece's sign for a space


def byte_letters():
    """{letter: byte}: GPT-2's spelling of the 256 bytes in printable characters. Bytes that are
    printable in Latin-1 stand for themselves; the others are U+0100, U+0101, ..., in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


LETTERS = byte_letters()


def steps_of(part):
    """The steps of a normalizer or pre-tokenizer: [] for null, those of a Sequence, or itself."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [step for one in inner for step in steps_of(one)] if inner else [part]


def read_merges(model):
    """The merges [(left, right)], which files have as "left right" or as pairs."""
    merges = model.get("merges", [])
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def refuse(what, part):
    raise UserError(f"tokenizer.json: {what} {json.dumps(part)[:60]} is not supported")


# ---------------------------------------------------------------------------------------------
# Byte pairs, merged by pairs


class Merges:
    """The model of a tokenizer.json: the ids of a piece of text, by merging pairs of tokens.

    Not tiktoken's encoding: that merges whatever makes a known token, these files name the pairs,
    and the same token may be reached by another pair."""

    def __init__(self, model):
        self.ids, self.cache = model["vocab"], {}
        self.unknown = self.ids.get(model.get("unk_token"))
        self.fuses_unknown = bool(model.get("fuse_unk"))
        self.falls_back = bool(model.get("byte_fallback"))
        self.ignores_merges = bool(model.get("ignore_merges"))
        self.merges = {}  # {(left id, right id): (rank, id of both)}
        for rank, (left, right) in enumerate(read_merges(model)):
            for token in (left, right, left + right):
                if token not in self.ids:
                    raise UserError(f"tokenizer.json: merges without {token!r} in the vocabulary")
            pair = self.ids[left], self.ids[right]
            self.merges[pair] = rank, self.ids[left + right]

    def encode(self, piece):
        """The ids of a piece of text."""
        if piece not in self.cache:
            if len(self.cache) > 1 << 17:
                self.cache.clear()
            whole = self.ids.get(piece) if self.ignores_merges else None
            self.cache[piece] = [whole] if whole is not None else self.merge(self.single(piece))
        return self.cache[piece]

    def single(self, piece):
        """The ids of single characters; an unknown one is spelt in bytes, or <unk>, or left out."""
        ids, unknown = [], False  # unknown: whether an <unk> is due
        for char in piece:
            if char in self.ids:
                ids += [self.unknown] * unknown + [self.ids[char]]
                unknown = False
                continue
            in_bytes = [self.ids.get(f"<0x{byte:02X}>") for byte in char.encode("utf-8")]
            if self.falls_back and None not in in_bytes:
                ids += in_bytes
            elif self.unknown is not None:
                ids += [self.unknown] * (unknown and not self.fuses_unknown)
                unknown = True
        return ids + [self.unknown] * unknown

    def merge(self, ids):
        """Merge the neighbours with the earliest merge, again and again. A heap holds the
        candidates; one whose neighbours have changed since, and no longer make the same token, is
        skipped."""
        ids, heap = list(ids), []
        after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids) - 1))

        def consider(left):
            if left >= 0 and after[left] < len(ids):
                found = self.merges.get((ids[left], ids[after[left]]))
                if found:
                    heapq.heappush(heap, (found[0], left, found[1]))

        for left in range(len(ids) - 1):
            consider(left)
        while heap:
            _, left, both = heapq.heappop(heap)
            right = after[left]
            if ids[left] is None or right >= len(ids):
                continue
            found = self.merges.get((ids[left], ids[right]))
            if not found or found[1] != both:
                continue
            ids[left], ids[right] = both, None
            after[left] = after[right]
            if after[right] < len(ids):
                before[after[right]] = left
            consider(before[left])
            consider(left)
        return [i for i in ids if i is not None]


# ---------------------------------------------------------------------------------------------
# The two kinds


class ByteLevel:
    """Byte-level BPE: bytes in GPT-2's spelling, merged within the pieces that patterns split."""

    def __init__(self, content):
        self.merges = Merges(content["model"])
        *steps, last = steps_of(content["pre_tokenizer"])
        if last["type"] != "ByteLevel":
            refuse("the pre-tokenizer", last)
        self.steps = [read_step(step) for step in (*steps, last)]
        missing = [letter for letter in LETTERS if letter not in self.merges.ids]
        if missing:
            raise UserError(
                f"tokenizer.json: a byte-level vocabulary without {bytes([LETTERS[missing[0]]])!r}"
            )
        self.spelling = {i: self.to_bytes(token) for token, i in self.merges.ids.items()}
        self.letters = {byte: letter for letter, byte in LETTERS.items()}

    @staticmethod
    def to_bytes(token):
        try:
            return bytes(LETTERS[letter] for letter in token)
        except KeyError:  # a special token in the vocabulary
            return token.encode("utf-8")

    def encode(self, text, after):
        pieces = [text]
        for step in self.steps:
            pieces = [part for piece in pieces for part in step(piece)]
        ids = []
        for piece in pieces:
            ids += self.merges.encode("".join(self.letters[b] for b in piece.encode("utf-8")))
        return ids


class SentencePiece:
    """BPE over characters, spaces written as U+2581; unknown characters are spelt in bytes."""

    def __init__(self, content):
        self.merges = Merges(content["model"])
        self.marks, self.prepends, self.splits = False, "never", False
        for step in steps_of(content.get("pre_tokenizer")):
            if step["type"] != "Metaspace" or step["replacement"] != MARK:
                refuse("the pre-tokenizer", step)
            self.prepends = step.get("prepend_scheme") or (
                "always" if step.get("add_prefix_space", True) else "never"
            )
            self.marks, self.splits = True, step.get("split", True)
        self.spelling = {i: self.spell(token) for token, i in self.merges.ids.items()}

    @staticmethod
    def spell(token):
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(MARK, " ").encode("utf-8")

    def encode(self, text, after):
        text = text.replace(" ", MARK) if self.marks else text
        at_start = {"always": after != "text", "first": after == "start"}
        if at_start.get(self.prepends, False) and not text.startswith(MARK):
            text = MARK + text
        words = [text]
        if self.splits:
            words = [MARK * (i > 0) + word for i, word in enumerate(text.split(MARK))]
        return [i for word in words if word for i in self.merges.encode(word)]


# ---------------------------------------------------------------------------------------------
# Words added to a vocabulary


class AddedTokens:
    """The added_tokens of a tokenizer.json that a text may contain: all but the special ones, which
    text never becomes (the `tokenizers` package calls that encode_special_tokens)."""

    def __init__(self, entries, normalise):
        self.by_content = {normalise(entry["content"]): entry for entry in entries}
        names = sorted(map(re.escape, self.by_content), key=len, reverse=True)
        self.pattern = re.compile("|".join(names)) if names else None

    def split(self, text):
        """[(text, None) or (content, id), ...]: a text cut at the added tokens in it."""
        parts, start, letter = [], 0, translate(r"[\w\u200c\u200d]")
        for found in self.pattern.finditer(text) if self.pattern else ():
            entry, (first, end) = self.by_content[found[0]], found.span()
            in_word = letter.match(text[first - 1 : first]) or letter.match(text[end : end + 1])
            if entry["special"] or (entry.get("single_word") and in_word):
                continue
            if entry.get("lstrip"):
                first = max(start, len(text[:first].rstrip()))
            if entry.get("rstrip"):
                end = len(text) - len(text[end:].lstrip())
            parts.append((text[start:first], None))
            parts += [(found[0], entry["id"])] if end > first else []
            start = max(start, end)
        return [part for part in [*parts, (text[start:], None)] if part[0]]


# ---------------------------------------------------------------------------------------------
# The tokenizer


def special_token(name, i):
    """An entry of tokenizer.json's added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **flags, "special": True}


def with_token(content, name, i):
    """The content of a tokenizer.json with one more special token. The `tokenizers` package gives
    an added token the next free id, unless the vocabulary has it with another."""
    entries, model = content["added_tokens"], content["model"]
    taken = {entry["id"] for entry in entries} | set(model["vocab"].values())
    if i != max(taken) + 1:
        model = model | {"vocab": model["vocab"] | {name: i}}
    return content | {"added_tokens": [*entries, special_token(name, i)], "model": model}


def read_normalizer(content):
    """The normalizer of a tokenizer.json as a list of functions f(text, begins); begins: whether
    nothing, or a special token, is before the text."""

    def read(step):
        kind = step["type"]
        if kind in ("NFC", "NFD", "NFKC", "NFKD"):
            return lambda text, begins: unicodedata.normalize(kind, text)
        if kind == "Prepend":  # before every piece of text, even one that starts with a space
            return lambda text, begins: step["prepend"] + text if begins and text else text
        if kind == "Replace" and "String" in step["pattern"]:
            old = step["pattern"]["String"]
            return lambda text, begins: text.replace(old, step["content"])
        return refuse("the normalizer", step)

    return [read(step) for step in steps_of(content.get("normalizer"))]


class JsonTokenizer(Tokenizer):
    """A Tokenizer from the content of a tokenizer.json, a dict.

    roles: the ids "eos", "bos" (may be None), "pad" and "image", from the folder's other files;
    "stops": all ids that end an answer; "vocab_size": the number of embeddings."""

    kind = "json"

    def __init__(self, content, roles):
        self.content, self.roles = content, roles
        self.eos, self.bos, self.pad, self.image = (
            roles[name] for name in ("eos", "bos", "pad", "image")
        )
        self.stops = tuple(roles["stops"])
        self.specials = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
        has_image = "<image>" in self.specials
        self.specials["<image>"] = self.image
        try:
            if not has_image:  # a language model's own vocabulary
                self.content = with_token(content, "<image>", self.image)
            model = content["model"]
            if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix"):
                refuse("the model", {"type": model.get("type")})
            if model.get("end_of_word_suffix"):
                refuse("the model", {"end_of_word_suffix": model["end_of_word_suffix"]})
            steps = [step["type"] for step in steps_of(content.get("pre_tokenizer"))]
            self.words = ByteLevel(content) if "ByteLevel" in steps else SentencePiece(content)
            self.normalizers = read_normalizer(content)
            # of two entries for one word the last counts
            added = {entry["content"]: entry for entry in self.content["added_tokens"]}.values()
            as_it_is = [entry for entry in added if not entry.get("normalized")]
            normalised = [entry for entry in added if entry.get("normalized")]
            self.added = AddedTokens(as_it_is, lambda text: text)
            self.added_normalised = AddedTokens(normalised, self.normalise)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"tokenizer.json: an unknown form ({error!r})") from None
        self.vocab_size = roles["vocab_size"]
        self.silent = {self.image} | {e["id"] for e in content["added_tokens"] if e["special"]}
        self.spelling = self.words.spelling | {
            entry["id"]: entry["content"].encode("utf-8") for entry in content["added_tokens"]
        }

    def normalise(self, text, begins=True):
        for step in self.normalizers:
            text = step(text, begins)
        return text

    def encode(self, text):
        return self.encode_segment(text)

    def encode_segment(self, text, after="start"):
        """The ids of a text, as the `tokenizers` package makes them: added tokens are found, the
        text between is normalised, further added tokens are found, the rest is split and merged."""
        ids = []
        for part, added in self.added.split(text):
            if added is not None:
                ids, after = [*ids, added], "special"
                continue
            for words, found in self.added_normalised.split(self.normalise(part, after != "text")):
                ids += self.words.encode(words, after) if found is None else [found]
                after = "special"
        return ids

    def pieces(self, tokens):
        utf8, beginning = codecs.getincrementaldecoder("utf-8")("replace"), True
        for token in tokens:
            piece = ""
            if int(token) not in self.silent and int(token) in self.spelling:
                text = utf8.decode(self.spelling[int(token)])
                piece = text.removeprefix(" ") if beginning else text
                beginning = beginning and not text
            yield piece

    def decode(self, tokens):
        spelt = self.spelling
        kept = [spelt[int(t)] for t in tokens if int(t) in spelt and int(t) not in self.silent]
        return b"".join(kept).decode("utf-8", "replace").removeprefix(" ")

    def dump(self):
        return json.dumps([self.content, self.roles], ensure_ascii=False, sort_keys=True)

    def digest(self):
        return hashlib.sha256(f"{self.kind}\n{self.dump()}".encode()).hexdigest()


def parse_tokenizer(text, kind):
    """The tokenizer whose dump() is `text`, of a Tokenizer's kind or "json"."""
    return JsonTokenizer(*json.loads(text)) if kind == "json" else Tokenizer.parse(text, kind)


# ---------------------------------------------------------------------------------------------
# Writing ours


def split_by_lower_ranks(token, ranks):
    """The two tokens that were merged into this one: repeat the merges of its bytes, except for the
    last."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        merged = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        i = merged.index(min(merged))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def export(tokenizer):
    """The content of a tokenizer.json that encodes and decodes like our `tokenizer`."""
    specials = [special_token(name, i) for name, i in tokenizer.specials.items()]
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": specials}
    if tokenizer.kind == "word":
        split = {"type": "Split", "pattern": {"Regex": r"[\s\x1c-\x1f]+"}, "invert": False}
        return content | {
            "normalizer": None,
            "pre_tokenizer": split | {"behavior": "Removed"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": tokenizer.words, "unk_token": "<unk>"},
        }
    letters = {byte: letter for letter, byte in LETTERS.items()}
    spell = lambda token: "".join(letters[byte] for byte in token)
    by_rank = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    merges = [split_by_lower_ranks(t, tokenizer.ranks) for t in by_rank if len(t) > 1]
    # U+200C and U+200D are letters for tiktoken's regex, but not for the tokenizers package
    pattern = PATTERN.replace(r"[^\W\d_]+", r"(?:[^\W\d_]|[\x{200c}\x{200d}])+")
    pattern = pattern.replace(r"[^\s\w]+", r"[^\s\w\x{200c}\x{200d}]+")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    bytes_only["trim_offsets"] = False
    return content | {
        "normalizer": {"type": "Prepend", "prepend": " "},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, bytes_only],
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [bytes_only, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spell(token): tokenizer.ranks[token] for token in by_rank},
            "merges": [[spell(left), spell(right)] for left, right in merges],
        },
    }


def undo(content):
    """The tokenizer of ours whose export() returned this content."""
    model = content["model"]
    if model["type"] == "WordLevel":
        ranks = {word.encode("utf-8"): i for word, i in model["vocab"].items()}
        return Tokenizer(ranks, "word")
    ranks = {bytes(LETTERS[letter] for letter in token): i for token, i in model["vocab"].items()}
    return Tokenizer(ranks)
