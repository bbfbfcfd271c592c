"""
Vocabularies in tokenizer.json files: reading other people's, and writing ours.

Two kinds are read, which cover the language models of LLaVA: byte-level BPE (Llama 3, Qwen),
encoded by tiktoken, and SentencePiece-style BPE with byte fallback (Llama 2, Vicuna, Mistral),
encoded here. Both give the ids of the `tokenizers` package. Other kinds are refused by name.
"""

import codecs
import hashlib
import heapq
import json
import unicodedata
from itertools import pairwise

import tiktoken

from config import UserError
from tokenizer import PATTERN, Tokenizer

MARK = "\u2581"  # SentencePiece's sign for a space
# The pattern of a ByteLevel pre-tokenizer that names none: GPT-2's.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


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
# The two kinds


class ByteLevel:
    """Byte-level BPE: bytes in GPT-2's spelling, merged within the pieces that a pattern splits."""

    def __init__(self, content):
        model, pattern = content["model"], None
        for step in steps_of(content["pre_tokenizer"]):
            if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
                pattern = step["pattern"]["Regex"]
            elif step["type"] != "ByteLevel" or step["add_prefix_space"]:
                refuse("the pre-tokenizer", step)
            elif step["use_regex"]:
                pattern = GPT2_PATTERN
        self.normalizers = steps_of(content.get("normalizer"))
        for step in self.normalizers:
            if step["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
                refuse("the normalizer", step)
        self.ids = {self.to_bytes(token): i for token, i in model["vocab"].items()}
        order = [bytes([byte]) for byte in range(256)]
        order += [self.to_bytes(left + right) for left, right in read_merges(model)]
        if model.get("ignore_merges"):  # tokens without a merge count as well
            order += list(self.ids)
        ranks = {token: i for i, token in enumerate(dict.fromkeys(order))}
        missing = [token for token in ranks if token not in self.ids]
        if missing or pattern is None:
            what = f"without {missing[0]!r}" if missing else "without a pattern"
            raise UserError(f"tokenizer.json: a byte-level vocabulary {what}")
        self.id_of_rank = [self.ids[token] for token in ranks]
        self.encoding = tiktoken.Encoding(
            "tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.spelling = {i: token for token, i in self.ids.items()}

    @staticmethod
    def to_bytes(token):
        try:
            return bytes(LETTERS[letter] for letter in token)
        except KeyError:  # a special token in the vocabulary
            return token.encode("utf-8")

    def encode(self, text, after):
        for step in self.normalizers:
            text = unicodedata.normalize(step["type"], text)
        return [self.id_of_rank[rank] for rank in self.encoding.encode_ordinary(text)]


class SentencePiece:
    """BPE over characters, spaces written as U+2581; unknown characters are spelt in bytes."""

    def __init__(self, content):
        model = content["model"]
        self.ids, self.prepends = model["vocab"], "never"
        for step in steps_of(content.get("normalizer")):
            if step["type"] == "Prepend" and step["prepend"] == MARK:
                self.prepends = "each"  # before every segment, even one that starts with a space
            elif step["type"] != "Replace" or step["content"] != MARK:
                refuse("the normalizer", step)
        self.splits = False
        for step in steps_of(content.get("pre_tokenizer")):
            if step["type"] != "Metaspace" or step["replacement"] != MARK:
                refuse("the pre-tokenizer", step)
            self.prepends = step.get("prepend_scheme", "always")
            self.splits = step.get("split", True)
        self.ranks = {merge: i for i, merge in enumerate(read_merges(model))}
        self.unknown = self.ids.get(model.get("unk_token"))
        self.spelling = {i: self.spell(token) for token, i in self.ids.items()}

    @staticmethod
    def spell(token):
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace(MARK, " ").encode("utf-8")

    def encode(self, text, after):
        """after: "start", "special" or "text", see Tokenizer.encode_segment."""
        text = text.replace(" ", MARK)
        at_start = {"each": after != "text", "always": after != "text", "first": after == "start"}
        if at_start.get(self.prepends, False) and (
            self.prepends == "each" or not text.startswith(MARK)
        ):
            text = MARK + text
        words = [text]
        if self.splits:
            words = [MARK * (i > 0) + word for i, word in enumerate(text.split(MARK))]
        return [i for word in words if word for i in self.encode_word(word)]

    def encode_word(self, word):
        """Merge the neighbours with the earliest merge, again and again. A heap holds the
        candidates; one whose neighbours have changed since is skipped."""
        pieces = list(word)
        after, before = list(range(1, len(pieces) + 1)), list(range(-1, len(pieces) - 1))
        heap = []

        def consider(left):
            if left >= 0 and after[left] < len(pieces):
                pair = pieces[left], pieces[after[left]]
                if pair in self.ranks:
                    heapq.heappush(heap, (self.ranks[pair], left, pair))

        for left in range(len(pieces) - 1):
            consider(left)
        while heap:
            _, left, pair = heapq.heappop(heap)
            right = after[left]
            if right >= len(pieces) or (pieces[left], pieces[right]) != pair:
                continue
            pieces[left], pieces[right] = pieces[left] + pieces[right], ""
            after[left] = after[right]
            if after[right] < len(pieces):
                before[after[right]] = left
            consider(before[left])
            consider(left)
        return [i for piece in pieces if piece for i in self.ids_of(piece)]

    def ids_of(self, piece):
        if piece in self.ids:
            return [self.ids[piece]]
        in_bytes = [self.ids.get(f"<0x{byte:02X}>", self.unknown) for byte in piece.encode("utf-8")]
        return [self.unknown] if self.unknown in in_bytes else in_bytes


# ---------------------------------------------------------------------------------------------
# The tokenizer


def special_token(name, i):
    """An entry of tokenizer.json's added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **flags, "special": True}


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
        if "<image>" not in self.specials:  # a language model's own vocabulary
            entry = special_token("<image>", self.image)
            self.content = content | {"added_tokens": [*content["added_tokens"], entry]}
        self.specials["<image>"] = self.image
        try:
            model = content["model"]
            if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix"):
                refuse("the model", {"type": model.get("type")})
            steps = [step["type"] for step in steps_of(content.get("pre_tokenizer"))]
            self.words = ByteLevel(content) if "ByteLevel" in steps else SentencePiece(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"tokenizer.json: an unknown form ({error!r})") from None
        self.vocab_size = roles["vocab_size"]
        self.silent = set(self.specials.values())

    def encode(self, text):
        return self.encode_segment(text)

    def encode_segment(self, text, after="start"):
        return self.words.encode(text, after) if text else []

    def pieces(self, tokens):
        utf8, beginning = codecs.getincrementaldecoder("utf-8")("replace"), True
        for token in tokens:
            piece = ""
            if int(token) not in self.silent and int(token) in self.words.spelling:
                text = utf8.decode(self.words.spelling[int(token)])
                piece = text.removeprefix(" ") if beginning else text
                beginning = beginning and not text
            yield piece

    def decode(self, tokens):
        spelt = self.words.spelling
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
