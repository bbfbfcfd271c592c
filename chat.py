"""
A conversation about pictures: what was said so far, and the loop that reads and answers.

    python sample.py --image a.png --chat --checkpoint out/toy_llava15/phase3.pt

    > what is this ?
    a red ball .
    > /image b.png
    > is it the same ?
    no , it 's a blue ball .

/image FILE shows another picture, /reset forgets everything, Ctrl-D ends it.
"""

from itertools import takewhile

import torch

from config import UserError
from model import KVCache
from templates import TEMPLATES, chat_sample, end_tokens, expand, with_pictures


class Conversation:
    """Turns so far, and the pictures in them: (tokens, C) each, as inference.see gives them.

    Keys and values of what was said are kept, so that a turn costs only what is new in it."""

    def __init__(self, loaded, template, system=""):
        if not template:
            raise UserError(
                "this model has learnt no conversations: give a checkpoint of phase 3, a LLaVA "
                f"folder, or --template, one of {', '.join(TEMPLATES)}"
            )
        self.loaded, self.template, self.system = loaded, TEMPLATES[template], system
        self.stop = end_tokens(loaded.tokenizer, self.template)
        self.reset()

    def reset(self):
        self.turns, self.embeds, self.written = [], [], []
        self.cache = None

    @property
    def room(self):
        return self.loaded.model.gpt.config.block_size

    def write(self, question, embeds):
        """All tokens up to where the answer to a question begins."""
        turns = [*self.turns, (question, None)]
        tokens, _ = chat_sample(self.loaded.tokenizer, self.template, turns, self.system)
        counts = [len(embed) for embed in embeds]
        return expand(tokens, self.loaded.tokenizer.image, counts)

    def ask(self, words, embeds=(), max_new_tokens=50, temperature=0.0, top_k=0, generator=None):
        """Yield the tokens of the answer to `words`, asked over new pictures.

        Raises UserError, and forgets the question, where the context has no room for it."""
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        question = with_pictures(self.template, words, len(embeds))
        shown = [*self.embeds, *embeds]
        tokens = self.write(question, shown)
        if len(tokens) >= self.room:
            raise UserError(
                f"the context is full: with this question {len(tokens)} tokens, the model holds "
                f"{self.room}, its answer included; /reset begins anew"
            )
        room = min(self.room, len(tokens) + max_new_tokens)
        if self.cache is None:
            self.cache = KVCache(model.gpt.config, model.gpt.embed_tokens.weight, 1, room)
        self.cache.grow(room)
        # What was generated may be written in other tokens than it is read back in
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(self.written, tokens[:-1]))
        self.cache.length = min(self.cache.length, len(list(alike)))
        new, known = tokens[self.cache.length :], tokens[: self.cache.length]
        seen = torch.cat(shown)[known.count(tokenizer.image) :] if shown else None
        if not new.count(tokenizer.image):
            seen = None
        generated = model.generate(
            torch.tensor([new], device=self.loaded.device),
            seen,
            max_new_tokens,
            temperature,
            top_k,
            self.stop,
            generator,
            self.cache,
        )
        answer = []
        for token in generated:
            answer.append(int(token))
            yield int(token)
        self.written, self.embeds = tokens + answer, shown
        self.turns.append((question, tokenizer.decode(answer).strip()))
        self.ended = bool(answer) and answer[-1] in self.stop


def converse(talk, embeds, settings, generator, look):
    """Read questions from the keyboard, or a file, and answer them until there are no more.

    embeds: the pictures to begin with; look(path, shown): another one, after so many."""
    options = settings.max_new_tokens, settings.temperature, settings.top_k, generator
    embeds, words = list(embeds), settings.prompt
    while True:
        try:
            words = words or input("> ").strip()
        except EOFError:
            print()
            return
        command, _, argument = words.partition(" ")
        try:
            if command == "/reset":
                talk.reset()
                embeds = []
            elif command == "/image":
                embeds.append(look(argument.strip(), len(talk.embeds) + len(embeds)))
            elif command.startswith("/"):
                print("/image FILE shows a picture, /reset forgets everything, Ctrl-D ends")
            elif words:
                for piece in talk.loaded.tokenizer.pieces(talk.ask(words, embeds, *options)):
                    print(piece, end="", flush=True)
                print("" if talk.ended else " ... (stopped at the limit)")
                embeds = []
        except (UserError, OSError) as error:
            print(error)
        words = ""
