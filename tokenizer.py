"""
Text to tokens and back: byte-pair encoding learnt from a corpus, or a fixed vocabulary of words;
and how a caption becomes a sample. Conversations: templates.py; other people's vocabularies:
tokenizer_json.py.
"""

import base64
import codecs
import hashlib
import heapq
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import tiktoken

from checks import check_ranks
from config import UserError, regular

# Words with the space before them, numbers, punctuation, other space. Plain \w and \d, because
# Python's re (which counts) and tiktoken's regex (which encodes) both know them.
PATTERN = r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+| ?_+|\s+"
SPECIALS = ("<pad>", "<eos>", "<image>")


# ---------------------------------------------------------------------------------------------
# Learning byte pairs


def merge(word, pair, new):
    """`word`, a list of ids, with each occurrence of `pair` replaced by the id `new`."""
    merged, k = [], 0
    while k < len(word):
        if tuple(word[k : k + 2]) == pair:
            merged.append(new)
            k += 2
        else:
            merged.append(word[k])
            k += 1
    return merged


def train_bpe(counts, merges):
    """Byte-pair encoding learnt from {word: count}: {bytes: rank}, 256 + `merges` at most.

    Works on distinct words, each merge touching only the words it occurs in; a heap holds the
    pairs, stale entries are dropped when they surface. Ties go to the smaller ids. Stops early
    when no pair occurs twice. (Sennrich et al. 2016, arXiv 1508.07909.)"""
    vocabulary = [bytes([i]) for i in range(256)]
    words = [list(word.encode("utf-8")) for word in counts]
    weights = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs, and in which words
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += weights[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while len(vocabulary) < 256 + merges and heap:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            continue  # stale: the pair was counted anew since
        if -count < 2:
            break
        new = len(vocabulary)
        vocabulary.append(vocabulary[pair[0]] + vocabulary[pair[1]])
        changed = Counter()
        for i in where.pop(pair):
            merged = merge(words[i], pair, new)
            for old_pair in pairwise(words[i]):
                changed[old_pair] -= weights[i]
            for new_pair in pairwise(merged):
                changed[new_pair] += weights[i]
                where[new_pair].add(i)
            words[i] = merged
        for other, difference in changed.items():
            if difference:
                pairs[other] += difference
                heapq.heappush(heap, (-pairs[other], other))
        pairs.pop(pair)
    return {token: rank for rank, token in enumerate(vocabulary)}


# ---------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """Text <-> ids. `ranks` {bytes: id}; kind "bpe" (tiktoken does the work) or "word".

    Specials come after the ranks. Text can never produce one: "<eos>" in a transcript is five
    characters. BPE gives back exactly the text it was given; words outside a word-level
    vocabulary become <unk>, which that vocabulary must hold. A space is put before the text, and
    taken off again, so that a word is the same token at the start of a line as within it: the
    tests ask for single words, which must be the ones that were learnt in sentences."""

    def __init__(self, ranks, kind="bpe"):
        check_ranks(ranks, kind)
        self.ranks, self.kind = ranks, kind
        self.specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
        self.pad, self.eos, self.image = self.specials.values()
        self.bos, self.stops = None, (self.eos,)
        self.vocab_size = len(ranks) + len(self.specials)
        if kind == "bpe":
            self.encoding = tiktoken.Encoding(
                "nanobabyllava",
                pat_str=PATTERN,
                mergeable_ranks=ranks,
                special_tokens=self.specials,
            )
        else:
            self.words = {token.decode("utf-8"): i for token, i in ranks.items()}
            self.spelling = {i: word for word, i in self.words.items()}

    def encode(self, text):
        """The ids of a text, without specials."""
        if self.kind == "bpe":
            return self.encoding.encode_ordinary(" " + text) if text else []
        unknown = self.words["<unk>"]
        return [self.words.get(word, unknown) for word in text.split()]

    def encode_exactly(self, text, begins="text"):
        """The ids of a stretch of a conversation. begins: "text" at the very start, True after a
        special, False elsewhere, where no space is put before it."""
        if self.kind == "word":
            return self.encode(text)
        return self.encoding.encode_ordinary(" " + text if begins else text)

    def pieces(self, tokens):
        """Yield the text that each token adds, "" for one that ends within a character or is a
        special. Together they are the text, a character cut off at the end excepted."""
        utf8, beginning = codecs.getincrementaldecoder("utf-8")("replace"), True
        for token in tokens:
            piece = ""
            if token < len(self.ranks) and self.kind == "bpe":
                text = utf8.decode(self.encoding.decode_single_token_bytes(int(token)))
                piece = text.removeprefix(" ") if beginning else text
                beginning = beginning and not text
            elif token < len(self.ranks):
                piece = self.spelling[int(token)] if beginning else " " + self.spelling[int(token)]
                beginning = False
            yield piece

    def decode(self, tokens):
        """Text of ids; specials are left out."""
        tokens = [int(token) for token in tokens if token < len(self.ranks)]
        if self.kind == "bpe":
            return self.encoding.decode(tokens).removeprefix(" ")
        return " ".join(self.spelling[token] for token in tokens)

    @classmethod
    def train(cls, lines, vocab_size):
        """BPE of `vocab_size` ids, specials included, from an iterable of lines."""
        counts = Counter()
        for line in lines:
            counts.update(re.findall(PATTERN, " " + line))
        return cls(train_bpe(counts, vocab_size - 256 - len(SPECIALS)))

    @classmethod
    def of_words(cls, path):
        """Word-level from a {"word": id} file, ids kept; its own <pad> and <eos> go unused."""
        try:
            words = json.loads(Path(regular(path)).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        whole = isinstance(words, dict) and "<unk>" in words and "" not in words
        if not whole or sorted(words.values(), key=str) != sorted(range(len(words)), key=str):
            raise UserError(f"{path}: want {{word: id}} with ids 0 to n - 1 and an <unk>")
        return cls({word.encode("utf-8"): i for word, i in words.items()}, "word")

    def dump(self):
        """The ranks in tiktoken's text form: a line of base64 and rank for each token."""
        by_rank = sorted(self.ranks.items(), key=lambda item: item[1])
        return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in by_rank)

    @classmethod
    def parse(cls, text, kind):
        """The tokenizer that dump() wrote."""
        lines = (line.split() for line in text.splitlines())
        return cls({base64.b64decode(token): int(rank) for token, rank in lines}, kind)

    def digest(self):
        """What tells one vocabulary from another: a sha256 in hexadecimal."""
        return hashlib.sha256(f"{self.kind}\n{self.dump()}".encode()).hexdigest()


# ---------------------------------------------------------------------------------------------
# A sample


def caption_sample(tokenizer, caption, images=1):
    """(tokens, learn) of an image (or several) and what was said over it, LLaVA's "plain".

        tokens   <image>  a  red  ball  <eos>
        learn       0     1   1    1     1

    The last position of the image predicts the first word, and <eos> is learnt too: a model that
    is never shown an end never stops."""
    before = [] if tokenizer.bos is None else [tokenizer.bos]
    before += [tokenizer.image] * images
    words = [*tokenizer.encode(caption), tokenizer.eos]
    return before + words, [0] * len(before) + [1] * len(words)
