"""
From text to tokens and back, and from a caption or a conversation to a training sample.

    train_bpe_plain    byte-pair encoding, learnt from word counts
    Tokenizer          text <-> ids, by byte pairs or whole words
    caption_sample     images and a caption -> tokens and their loss mask
    chat_sample        a conversation, in a chat template -> tokens and their loss mask

A new chat template is an entry in TEMPLATES. The vocabularies of other people's models are read by
pretrained/tokenizer_json.py.
"""

import base64
import codecs
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import tiktoken

from config import UserError, regular
from fast.bpe import train_bpe

# A text is split into words with the space before them, numbers, punctuation and other space; byte
# pairs are merged only within these pieces. Only \w, \d and \s are used, because Python's re (which
# counts) and tiktoken's regex (which encodes) agree on them.
PATTERN = r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+| ?_+|\s+"
SPECIALS = ("<pad>", "<eos>", "<image>")
SPECIAL_PATTERN = r"<\|?\w+\|?>"  # the form of a special token in a chat template


# ---------------------------------------------------------------------------------------------
# Learning byte pairs


def merge(word, pair, new):
    """`word`, a list of ids, with each occurrence of `pair` replaced by the id `new`.

    merge([1, 2, 3, 1, 2], (1, 2), 4) is [4, 3, 4]."""
    merged, k = [], 0
    while k < len(word):
        if tuple(word[k : k + 2]) == pair:
            merged.append(new)
            k += 2
        else:
            merged.append(word[k])
            k += 1
    return merged


def train_bpe_plain(counts, merges):
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) learnt from {word: count}.

    Returns {bytes: rank}, 256 + `merges` at most: start from single bytes and merge the commonest
    pair of neighbours, again and again. A tie goes to the pair with the smaller ids. Stops early
    when no pair occurs twice. Slow; fast.bpe.train_bpe returns the same."""
    vocabulary = [bytes([i]) for i in range(256)]
    words = [list(word.encode("utf-8")) for word in counts]
    while len(vocabulary) < 256 + merges:
        pairs = Counter()
        for word, count in zip(words, counts.values()):
            for pair in pairwise(word):
                pairs[pair] += count
        commonest = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if commonest is None or pairs[commonest] < 2:
            break
        new = len(vocabulary)
        vocabulary.append(vocabulary[commonest[0]] + vocabulary[commonest[1]])
        words = [merge(word, commonest, new) for word in words]
    return {token: rank for rank, token in enumerate(vocabulary)}


# ---------------------------------------------------------------------------------------------
# The tokenizer


def check_ranks(ranks, kind):
    """Raise ValueError for an incomplete vocabulary {bytes: id}: ids must be 0 to n - 1, and a BPE
    vocabulary needs a token for every byte."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("a vocabulary whose ids are not 0 to n - 1, each once")
    if kind == "bpe" and any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("a vocabulary without a token for each byte")


class Tokenizer:
    """Text <-> ids. ranks: {bytes: id}; kind: "bpe" (encoded by tiktoken) or "word".

    The ids of SPECIALS follow the ranks. Text never becomes a special token: "<eos>" in a
    transcript is five characters. BPE restores exactly the text it was given; with whole words, a
    word outside the vocabulary becomes <unk>.

    A space is put before the text and removed again on decoding, so that a word has the same token
    at the start of a line and inside it: the tests score single words, which the model must know
    from sentences."""

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

    @property
    def start(self):
        """The tokens before every caption: [bos], or [] if the vocabulary has none."""
        return [] if self.bos is None else [self.bos]

    def encode(self, text):
        """The ids of a text, without special tokens."""
        if self.kind == "bpe":
            return self.encoding.encode_ordinary(" " + text) if text else []
        unknown = self.words["<unk>"]
        return [self.words.get(word, unknown) for word in text.split()]

    def encode_segment(self, text, after="start"):
        """The ids of a segment of a conversation. after: what precedes it, "start" (nothing),
        "special" (a special token) or "text"; no space is put before a segment after text.

        For our vocabularies "start" and "special" are the same; those of Llama and Mistral write a
        first word differently at the very start of a text."""
        if self.kind == "word":
            return self.encode(text)
        return self.encoding.encode_ordinary(text if after == "text" else " " + text)

    def pieces(self, tokens):
        """Yield the text that each token adds; "" for a special token, or for one that ends within
        a character. Joined they are the text, except a character that is cut off at the end."""
        utf8, at_start = codecs.getincrementaldecoder("utf-8")("replace"), True
        for token in tokens:
            piece = ""
            if token < len(self.ranks) and self.kind == "bpe":
                text = utf8.decode(self.encoding.decode_single_token_bytes(int(token)))
                # The first piece loses its space; "", of an incomplete character, is not the first.
                piece = text.removeprefix(" ") if at_start else text
                at_start = at_start and not text
            elif token < len(self.ranks):
                piece = self.spelling[int(token)] if at_start else " " + self.spelling[int(token)]
                at_start = False
            yield piece

    def decode(self, tokens):
        """The text of ids, special tokens left out."""
        tokens = [int(token) for token in tokens if token < len(self.ranks)]
        if self.kind == "bpe":
            return self.encoding.decode(tokens).removeprefix(" ")
        return " ".join(self.spelling[token] for token in tokens)

    @classmethod
    def train(cls, lines, vocab_size):
        """A BPE tokenizer of `vocab_size` ids, special tokens included, from lines of text."""
        counts = Counter()
        for line in lines:
            counts.update(re.findall(PATTERN, " " + line))
        merges = vocab_size - 256 - len(SPECIALS)
        return cls(train_bpe(counts, merges, merge))  # fast/ cannot import merge() from here

    @classmethod
    def of_words(cls, path):
        """A word-level tokenizer from a {"word": id} JSON file. Its ids are kept; its own <pad> and
        <eos>, if any, are not used. Raises UserError."""
        try:
            words = json.loads(Path(regular(path)).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        complete = isinstance(words, dict) and "<unk>" in words and "" not in words
        # key=str, because the values of a JSON may be anything
        if not complete or sorted(words.values(), key=str) != sorted(range(len(words)), key=str):
            raise UserError(f"{path}: want {{word: id}} with ids 0 to n - 1 and an <unk>")
        return cls({word.encode("utf-8"): i for word, i in words.items()}, "word")

    def dump(self):
        """The ranks in tiktoken's text format: base64 and rank, one token a line."""
        by_rank = sorted(self.ranks.items(), key=lambda item: item[1])
        return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in by_rank)

    @classmethod
    def parse(cls, text, kind):
        """The tokenizer whose dump() is `text`."""
        lines = (line.split() for line in text.splitlines())
        return cls({base64.b64decode(token): int(rank) for token, rank in lines}, kind)

    def digest(self):
        """A sha256 of the vocabulary, in hexadecimal."""
        return hashlib.sha256(f"{self.kind}\n{self.dump()}".encode()).hexdigest()


# ---------------------------------------------------------------------------------------------
# Captions


def caption_sample(tokenizer, caption, images=1):
    """(tokens, loss_mask) of one or more images and their caption: LLaVA's "plain" format.

        tokens      <image>  a  red  ball  <eos>
        loss_mask      0     1   1    1     1

    The last image token predicts the first word. <eos> is in the loss too: a model that is never
    shown an end never stops."""
    before = tokenizer.start + [tokenizer.image] * images
    words = [*tokenizer.encode(caption), tokenizer.eos]
    return before + words, [0] * len(before) + [1] * len(words)


def expand(tokens, image, counts):
    """Tokens with the i-th <image> repeated counts[i] times: a placeholder for each image token."""
    counts, expanded = iter(counts), []
    for token in tokens:
        expanded += [token] * (next(counts) if token == image else 1)
    return expanded


# ---------------------------------------------------------------------------------------------
# Conversations


@dataclass(frozen=True)
class Template:
    """A chat template: how a conversation is written.

    In its texts {} is replaced by what is said, {bos} and {eos} by the vocabulary's tokens, and
    <name> and <|name|> by special tokens of the vocabulary. The loss is on the answer and its end.

    user      a question, up to where the answer starts
    answer    the answer
    end       what closes it: {eos} or a special token, at which generation stops, and text
    begin     before the conversation
    system    around a system text; without this field one is refused
    between   after an answer, before the next question
    picture   an <image> before a question that does not place its images itself
    models    language models whose folders get this template if they have no chat template

    And of templates that are read from a folder's Jinja (pretrained/chat_templates.py):

    lead      between the images and the words of a question
    past      how turns that are answered already stand in a prompt, with {question} and {answer},
              where that differs from training: LLaVA-1.5's writes no eos there; "": as in training
    own       read from the folder of its vocabulary: a <name> that is no token there is plain text
    """

    user: str
    answer: str = "{}"
    end: str = "{eos}"
    begin: str = "{bos}"
    system: str = ""
    between: str = ""
    picture: str = "<image>\n"
    models: tuple = ()
    lead: str = ""
    past: str = ""
    own: bool = False


TEMPLATES = {
    "llama3": Template(
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    ),
    # Qwen's
    "chatml": Template(
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        system="<|im_start|>system\n{}<|im_end|>\n",
        between="\n",
        begin="",
        models=("qwen2",),
    ),
    "mistral": Template("[INST] {} [/INST]", " {}", models=("mistral",)),
    # Vicuna's, used by LLaVA-1.5
    "v1": Template("USER: {} ASSISTANT:", " {}", system="{} ", models=("llama",)),
    # BabyLLaVA-V2's: v1 without a system text and without a newline after a picture. (Its code
    # writes a space before the first USER; our vocabularies put one there anyway.)
    "baby_v1": Template("USER: {} ASSISTANT:", " {}", picture="<image>"),
    # The words alone. A question ends with its question mark and an answer with <eos>: enough for
    # the toy world, whose small vocabulary would spell USER and ASSISTANT letter by letter.
    "bare": Template("{}", " {}", begin="", picture="<image>"),
}


def read_template(description):
    """The Template of {"name", "system"} in a checkpoint or in prepared data, which for a template
    of another model has its "fields" too."""
    fields = description.get("fields")
    if fields:
        return Template(**(fields | {"models": ()}))  # as JSON it is a list
    return TEMPLATES[description["name"]]


class MaskedText:
    """Tokens and their loss mask, built from segments of text.

    Text between two special tokens is encoded as one segment, as it is when the whole conversation
    is formatted first and then tokenized. A segment also ends where the loss mask changes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens, self.loss_mask = tokenizer, [], []
        self.segment, self.after, self.in_loss = "", "start", False

    def flush(self):
        """Encode the segment so far."""
        if self.segment:
            ids = self.tokenizer.encode_segment(self.segment, self.after)
            self.tokens += ids
            self.loss_mask += [int(self.in_loss)] * len(ids)
            self.segment, self.after = "", "text"

    def add(self, text, specials, in_loss):
        """Add text. specials {name: id} are the only names in it that become special tokens; an id
        of None adds nothing. An <image> is never in the loss."""
        if in_loss != self.in_loss:
            self.flush()
            self.in_loss = in_loss
        parts = pattern_of(tuple(specials)).split(text) if specials else [text]
        for part in parts:
            if part not in specials:
                self.segment += part
                continue
            self.flush()
            if specials[part] is not None:
                self.tokens.append(specials[part])
                self.loss_mask.append(int(in_loss and part != "<image>"))
            # After bos we are still at the start: transformers puts bos before a text that is
            # tokenized already.
            if part != "{bos}":
                self.after = "special"


@lru_cache
def pattern_of(names):
    """A pattern that finds any of these names, the longest first."""
    names = sorted(map(re.escape, names), key=len, reverse=True)
    return re.compile(f"({'|'.join(names)})")


def chat_sample(tokenizer, template, turns, system=""):
    """(tokens, loss_mask) of a conversation. turns: [(question, answer)], with None as the last
    answer if the model is to give it. <image> in a question stands for a picture.

        <bos> USER: <image> what is it ? ASSISTANT: a ball <eos> USER: ...
          0     0      0     0   0  0 0      0      1   1    1     0

    Raises UserError if the vocabulary lacks one of the template's special tokens, or for a system
    text that the template has no place for."""
    check_vocabulary(tokenizer, template)
    of_template = tokenizer.specials | {"{bos}": tokenizer.bos, "{eos}": tokenizer.eos}
    of_words = {"<image>": tokenizer.image}  # what people say contains no other special token
    text = MaskedText(tokenizer)

    def add(around, words, in_loss=False):
        before, _, after = around.partition("{}")
        text.add(before, of_template, in_loss)
        text.add(words, of_words, in_loss)
        text.add(after, of_template, in_loss)

    def add_past(question, answer):
        words = {"{question}": question, "{answer}": answer}
        for part in re.split(r"(\{question\}|\{answer\})", template.past):
            specials = of_words if part in words else of_template
            text.add(words.get(part, part), specials, in_loss=False)

    text.add(template.begin, of_template, in_loss=False)
    if system:
        if not template.system:
            raise UserError("this template has no place for a system text: leave it out")
        add(template.system, system)
    is_prompt = turns[-1][1] is None
    for question, answer in turns:
        if not question.startswith("<image>"):  # else with_pictures() put it after the images
            question = template.lead + question
        if is_prompt and template.past and answer is not None:
            add_past(question, answer)
            continue
        add(template.user, question)
        if answer is not None:
            add(template.answer, answer, in_loss=True)
            text.add(template.end, of_template, in_loss=True)
            text.add(template.between, of_template, in_loss=False)
    text.flush()
    return text.tokens, text.loss_mask


def check_vocabulary(tokenizer, template):
    """Raise UserError if a vocabulary lacks one of a template's special tokens."""
    texts = (template.begin, template.system, template.user, template.picture)
    texts = "".join((*texts, template.answer, template.end, template.between))
    for name in [] if template.own else re.findall(SPECIAL_PATTERN, texts):
        if name not in tokenizer.specials:
            raise UserError(f"this template needs {name}, which the vocabulary does not have")


def with_pictures(template, words, count):
    """A question about `count` new pictures: the words as they are if they contain as many
    <image>, else the pictures and the template's lead before them. (chat_sample() puts the lead
    before a question that does not start with a picture.) Raises UserError for another number of
    <image>."""
    placed = words.count("<image>")
    if placed not in (0, count):
        raise UserError(f"{placed} <image> in the question, for {count} pictures that are new")
    return words if placed or not count else template.picture * count + template.lead + words


def end_tokens(tokenizer, template=None):
    """The ids that end an answer: <eos> and the template's own end."""
    ends = set(tokenizer.stops)
    if template is not None:
        names = re.findall(SPECIAL_PATTERN, template.end)
        ends |= {tokenizer.specials[name] for name in names if name in tokenizer.specials}
    return tuple(sorted(ends))
