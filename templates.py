"""
How a conversation becomes a sample: the chat templates of LLaVA's family.

A change of how conversations are worded is made here and only here: ids and the mask of what is
learnt are made together, segment by segment, so that they cannot fall apart.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from config import UserError


@dataclass(frozen=True)
class Template:
    """How a conversation is written. {} is what is said, {bos} and {eos} are the vocabulary's own
    marks, <...> its special tokens. What is learnt is the answer and its end.

    begin: before all; system: around a system text, where there is one; user: around a question, up
    to where the answer begins; answer, end: the answer and what closes it; between: after it;
    picture: an <image> before a question."""

    user: str
    answer: str = "{}"
    end: str = "{eos}"
    begin: str = "{bos}"
    system: str = ""
    between: str = ""
    picture: str = "<image>\n"


TEMPLATES = {
    # Vicuna's, of LLaVA-1.5
    "v1": Template("USER: {} ASSISTANT:", " {}", system="{} "),
    # BabyLLaVA-V2's: the same without a system text and without a line's end after a picture. (The
    # space before its first USER, what an empty system text leaves, our vocabularies put anyway.)
    "baby_v1": Template("USER: {} ASSISTANT:", " {}", picture="<image>"),
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
    ),
    "mistral": Template("[INST] {} [/INST]", " {}"),
    # the words alone: a question ends with its sign and an answer with <eos>, which is enough for
    # the toy world, whose small vocabulary would spell USER and ASSISTANT letter by letter
    "bare": Template("{}", " {}", begin="", picture="<image>"),
}


class Writer:
    """Writes a sample, segment by segment: `tokens`, and for each whether it is learnt.

    Text between two specials is one stretch, encoded as a whole, as others' code does it that first
    writes all the text; but where what is learnt begins or ends, a stretch ends."""

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens, self.learn = tokenizer, [], []
        self.stretch, self.begins, self.learnt = "", "text", False

    def flush(self):
        if self.stretch:
            ids = self.tokenizer.encode_exactly(self.stretch, self.begins)
            self.tokens += ids
            self.learn += [int(self.learnt)] * len(ids)
            self.stretch, self.begins = "", False

    def put(self, text, specials, learnt):
        """Add text; of the tokenizer's special tokens only those in `specials` are taken as such,
        and an <image> is never learnt."""
        if learnt != self.learnt:
            self.flush()
            self.learnt = learnt
        for part in any_of(tuple(specials)).split(text) if specials else [text]:
            if part not in specials:
                self.stretch += part
                continue
            self.flush()
            if specials[part] is not None:
                self.tokens.append(specials[part])
                self.learn.append(int(learnt and part != "<image>"))
            if part != "{bos}":  # which others put before a text that is split already
                self.begins = True


@lru_cache
def any_of(names):
    """A pattern that finds any of these names, the longest that fits."""
    names = sorted(map(re.escape, names), key=len, reverse=True)
    return re.compile(f"({'|'.join(names)})")


def with_pictures(template, words, count):
    """A question about `count` pictures that the conversation has not shown yet: before it, unless
    its words say where, by as many <image>. Raises UserError for another number."""
    said = words.count("<image>")
    if said not in (0, count):
        raise UserError(f"{said} <image> in the question, for {count} pictures that are new")
    return words if said else template.picture * count + words


def check_vocabulary(tokenizer, template):
    """Raise UserError where a vocabulary lacks one of a template's special tokens."""
    written = template.begin + template.system + template.user + template.end
    for name in re.findall(r"<\|\w+\|>", written):
        if name not in tokenizer.specials:
            raise UserError(f"this template needs {name}, which the vocabulary does not have")


def expand(tokens, image, counts):
    """tokens with the i-th <image> written counts[i] times: a placeholder for each of its image
    tokens."""
    counts = iter(counts)
    return [t for token in tokens for t in [token] * (next(counts) if token == image else 1)]


def chat_sample(tokenizer, template, turns, system=""):
    """(tokens, learn) of a conversation: turns [(question, answer)], an answer of None where the
    model is to go on. <image> in a question stands for a picture.

        <bos> USER: <image> what is it ? ASSISTANT: a ball <eos> USER: ...
          0     0      0     0   0  0 0      0      1   1    1     0

    Raises UserError where the vocabulary lacks one of the template's special tokens."""
    check_vocabulary(tokenizer, template)
    specials = tokenizer.specials | {"{bos}": tokenizer.bos, "{eos}": tokenizer.eos}
    pictures = {"<image>": tokenizer.image}
    writer = Writer(tokenizer)

    def put(around, words, learnt=False):
        before, _, after = around.partition("{}")
        writer.put(before, specials, learnt)
        writer.put(words, pictures, learnt)
        writer.put(after, specials, learnt)

    writer.put(template.begin, specials, False)
    if system:
        put(template.system, system)
    for question, answer in turns:
        put(template.user, question)
        if answer is not None:
            put(template.answer, answer, learnt=True)
            writer.put(template.end, specials, learnt=True)
            writer.put(template.between, specials, learnt=False)
    writer.flush()
    return writer.tokens, writer.learn


def end_tokens(tokenizer, template=None):
    """The ids that end what a model says: <eos>, and what the template closes an answer with."""
    ends = set(tokenizer.stops)
    if template is not None and template.end in tokenizer.specials:
        ends.add(tokenizer.specials[template.end])
    return tuple(sorted(ends))
