"""
Show a picture, read what the model says.

    python sample.py --image img.jpg                          # a caption
    python sample.py --image a.jpg --image b.jpg              # several pictures in one context
    python sample.py --image img.jpg --prompt "the ball is"   # go on from these words
    python sample.py --prompt "where 's the" --temperature 0.8 --num_samples 3       # words alone
    python sample.py --image img.jpg --attention out.png      # where each word looked
    python sample.py --image img.jpg --checkpoint out/toy_llava15/phase3.pt --chat   # talk about it
    python sample.py --image img.jpg --checkpoint DIR --prompt "What is this?"   # a LLaVA

--checkpoint is a file that train.py wrote or a folder of a LLaVA as Hugging Face keeps them.
Without it, out/toy/phase2.pt (with --chat out/toy_llava15/phase3.pt) or else assets/toy.pt, a small
model of the toy world that comes with the repository. Of a model that has learnt conversations the
prompt is a question, put into its template.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import chat
import checkpoint
import config
import weights
from config import UserError, knob
from inference import begin, draw_attention, read, see
from templates import TEMPLATES, end_tokens


@dataclass
class Config(config.Knobs):
    image: tuple[str, ...] = ()  # a picture file, or several
    prompt: str = ""  # the caption begins with these words; or the question
    chat: bool = False  # hold a conversation: /image FILE, /reset, Ctrl-D
    checkpoint: str = ""  # a .pt or a folder; empty: what configs/toy.py made, else assets/toy.pt
    template: str = knob("", choices=("", "plain", *TEMPLATES))  # of questions; empty: the model's
    system: str = ""  # what is said before all; empty: what the model has learnt with
    num_samples: int = knob(1, low=1, high=10**6)  # how many to say
    max_new_tokens: int = knob(50, low=1, high=10**6)  # for a model that does not stop by itself
    temperature: float = knob(0.0, low=0.0, high=100.0)  # 0: the likeliest; 1: as it was learnt
    top_k: int = knob(0, low=0)  # choose among this many likeliest tokens; 0: all
    seed: int = knob(1, low=0, high=2**63 - 1)  # of the choices
    attention: str = ""  # a PNG to draw, for each word, where in the picture the model looked
    device: str = ""  # cpu, cuda, cuda:1, mps; empty: cuda where there is one
    dtype: str = knob("", choices=("", "float32", "bfloat16"))  # empty: as the weights are kept


def stream_answer(loaded, tokens, embeds, settings, generator, said=(), stop=()):
    """Print an answer as it comes, the words `said` before it first. Returns its tokens."""
    answer = []
    generated = loaded.model.generate(
        torch.tensor([tokens], device=loaded.device),
        torch.cat(embeds) if embeds else None,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        stop,
        generator,
    )

    def stream():
        yield from said
        for token in generated:
            answer.append(int(token))
            yield int(token)

    for piece in loaded.tokenizer.pieces(stream()):
        print(piece, end="", flush=True)
    ended = answer and answer[-1] in stop
    print("" if ended else " ... (stopped at the limit)")
    return answer


def main(argv):
    settings = config.load(Config, argv, __doc__)
    if settings.attention and not settings.image:
        raise UserError("--attention needs an --image to look at")
    shipped = Path(__file__).parent / "assets" / "toy.pt"
    usual = Path("out/toy_llava15/phase3.pt" if settings.chat else "out/toy/phase2.pt")
    default = usual if usual.exists() else shipped
    device = checkpoint.choose_device(settings.device)
    loaded = weights.open_model(settings.checkpoint or default, device, settings.dtype)
    if loaded.model.gpt is None:
        raise UserError(f"{settings.checkpoint}: a tower alone; give one of phase 0 or later")
    template, system = loaded.choose_template(settings.template, settings.system)
    pictures = read(loaded, settings.image)
    embeds = see(loaded, pictures) if pictures else []
    generator = torch.Generator(loaded.device).manual_seed(settings.seed)
    if settings.chat:
        talk = chat.Conversation(loaded, template, system)
        look = lambda path, shown: see(loaded, read(loaded, [path], shown))[0]
        return chat.converse(talk, embeds, settings, generator, look)
    tokens = begin(loaded, embeds, settings.prompt, template, system)
    said = [] if template else loaded.tokenizer.encode(settings.prompt)
    stop = end_tokens(loaded.tokenizer, TEMPLATES.get(template))
    for number in range(settings.num_samples):
        answer = stream_answer(loaded, tokens, embeds, settings, generator, said, stop)
        if settings.attention and number == 0:
            draw_attention(settings.attention, loaded, tokens, answer, embeds, pictures)


if __name__ == "__main__":
    config.run(main)
