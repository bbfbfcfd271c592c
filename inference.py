"""
A trained model at work: pictures and words in, words or their likelihoods out.

    open_model          a checkpoint of train.py, or a folder of a LLaVA
    read_pictures       files -> pictures
    embed_pictures      pictures -> the embeddings of their image tokens
    make_prompt         the tokens of a caption's start or of a question
    nll_after           how likely given words are
    generate_text       words, greedily
    answer_prompts      the same for prompts of any lengths
    answer_dialogues    several questions in a row, with the model's own answers in between
    score_text          how likely a text is after pictures, and whether greedy decoding gives it
    attention_of        where in the pictures each word of an answer looked

Letters: N images, S image side in pixels, E vision width, C model width.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
from common.images import read_picture, to_pixels
from common.shards import is_shards
from common.tiles import arrange
from config import UserError
from tokenizer import TEMPLATES, chat_sample, end_tokens, expand, with_pictures

QUESTION = "what is this ?"  # for a chat model, if no question is given


def open_model(path, device="cpu", dtype=""):
    """The checkpoint.Loaded of a file that train.py wrote or of a LLaVA folder. dtype "": that of
    its weights."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 for convolutions too, as for matrix products
    if Path(path).is_dir() and not is_shards(path):
        from pretrained import huggingface  # imported only if a folder is given

        return huggingface.load(path, device, dtype)
    loaded = checkpoint.load(path)
    if dtype:
        loaded.model.to(getattr(torch, dtype))
        if loaded.model.gpt is not None:
            loaded.model.gpt.set_rotary()  # in fp32 again
    loaded.model.to(device)
    return loaded


# ---------------------------------------------------------------------------------------------
# Pictures


def read_pictures(loaded, paths, others=0):
    """The Pictures of some files that are shown together, with so many others; see
    ImageFormat.beside_others()."""
    image_format = loaded.image_format
    if len(paths) + others > 1:
        image_format = image_format.beside_others()
    return [read_picture(path, image_format) for path in paths]


@torch.no_grad()
def encode_frames(loaded, frames, batch=64):
    """Features (N, num_features, E) of frames (N, S, S, 3) uint8, in the model's dtype."""
    features = []
    for start in range(0, len(frames), batch):
        pixels = to_pixels(frames[start : start + batch], loaded.image_format, loaded.device)
        features.append(loaded.model.encode_images(pixels))
    return torch.cat(features)


@torch.no_grad()
def embed_pictures(loaded, pictures):
    """The embeddings of each picture's image tokens: a list of (tokens, C)."""
    model, embeds = loaded.model, []
    if model.projector is None:
        raise UserError("this checkpoint cannot see: give one of phase 1 or later, or no --image")
    features = encode_frames(loaded, np.concatenate([picture.frames for picture in pictures]))
    side = int(model.image_tokens(loaded.image_format.size) ** 0.5) if model.tiled else 0
    first = 0
    for picture in pictures:
        own = features[first : first + len(picture.frames)]
        first += len(picture.frames)
        arrangement = None
        if model.tiled:
            arranged = arrange(*picture.grid, side, max_tiles=loaded.image_format.max_tiles)
            arrangement = [torch.tensor(part, device=loaded.device) for part in arranged]
        embeds.append(model.embed_images(own, arrangement))
    return embeds


def join_embeds(rows, device):
    """The embeddings of all pictures of some rows, [[(tokens, C), ...], ...], as one (M, C); None
    if there are no pictures."""
    embeds = [embed for row in rows for embed in row]
    return torch.cat(embeds).to(device) if embeds else None


# ---------------------------------------------------------------------------------------------
# Likelihoods


@torch.no_grad()
def nll_after(loaded, prompts, embeds, words, batch=256):
    """Mean NLL per token of words[i] after prompts[i], lists of tokens: float64 (n,).

    Each placeholder in prompts[i] stands for a row of the embeddings embeds[i], a list of
    (tokens, C); embeds None: no pictures. Computed in the model's dtype, summed in float64.
    Raises UserError for words that are empty or too long, or a score that is not finite."""
    model, scores = loaded.model, np.zeros(len(words))
    if embeds and model.image_attention == "full":
        counts = np.array([sum(map(len, own)) for own in embeds])
        if len(set(counts.tolist())) > 1:  # rows of a batch must have equally many image tokens
            for count in set(counts.tolist()):
                same = np.flatnonzero(counts == count)
                some = [[values[i] for i in same] for values in (prompts, embeds, words)]
                scores[same] = nll_after(loaded, *some, batch)
            return scores
        for prompt in prompts:
            check_leading(model, prompt)
    for start in range(0, len(words), batch):
        own = words[start : start + batch]
        rows = [p + w for p, w in zip(prompts[start : start + batch], own)]
        T = max(map(len, rows)) - 1  # the last token is only a target
        if model.gpt.config.block_size < T or not all(own):
            longest = loaded.tokenizer.decode(max(own, key=len))
            raise UserError(
                f"a phrase makes no tokens, or with what precedes it {T} of them, over the "
                f"model's {model.gpt.config.block_size}: {longest[:40]!r} ..."
            )
        tokens = torch.full((len(own), T), loaded.tokenizer.pad)
        positions, targets, row_of_target = [], [], []
        for i, (row, phrase) in enumerate(zip(rows, own)):
            tokens[i, : len(row) - 1] = torch.tensor(row[:-1])
            first = i * T + len(row) - len(phrase) - 1  # the position that predicts the first word
            positions += range(first, first + len(phrase))
            targets += phrase
            row_of_target += [i] * len(phrase)
        hidden = model.hidden_states(
            tokens.to(loaded.device),
            join_embeds((embeds or [])[start : start + batch], loaded.device),
            torch.tensor(positions, device=loaded.device),
            first=min(position % T for position in positions),
        )
        losses = F.cross_entropy(
            model.gpt.head(hidden).float(),
            torch.tensor(targets, device=loaded.device),
            reduction="none",
        )
        sums = np.bincount(row_of_target, losses.cpu().double().numpy())
        scores[start : start + batch] = sums / [len(phrase) for phrase in own]
    if not np.isfinite(scores).all():
        raise UserError("the model's scores are not finite numbers: its weights are broken")
    return scores


def score_text(loaded, context, text, embeds, template, system=""):
    """(mean NLL per token of a text, whether it is what greedy decoding gives). embeds: of the
    pictures before it. With an empty context the text is a caption, else an answer to that
    question."""
    tokenizer, text = loaded.tokenizer, text.strip()
    if context.replace("<image>", "").strip():
        if "<image>" not in context:
            context = "".join(["<image> "] * len(embeds)) + context
        prompt, _ = chat_sample(tokenizer, template, [(context, None)], system)
        words = tokenizer.encode_segment(template.answer.replace("{}", text), after="text")
    else:
        before = tokenizer.start + [tokenizer.image] * len(embeds)
        prompt = before or [tokenizer.eos]
        words = tokenizer.encode(text)
    prompt = expand(prompt, tokenizer.image, [len(embed) for embed in embeds])
    (loss,) = nll_after(loaded, [prompt], [embeds] if embeds else None, [words])
    tokens = torch.tensor([prompt], device=loaded.device)
    image_embeds = join_embeds([embeds], loaded.device)
    greedy = loaded.model.generate(tokens, image_embeds, len(words))
    return float(loss), [int(token) for token in greedy] == words


# ---------------------------------------------------------------------------------------------
# Words


def check_leading(model, tokens):
    """Raise UserError for a prompt whose images are not all at its start, if they attend to each
    other."""
    if model.image_attention == "full" and not model.leads_alike(torch.tensor([tokens])):
        raise UserError(
            "image_attention=full: this model was trained on images before all words, and here "
            "some stand after words"
        )


def generate_text(loaded, prompts, embeds, stop, max_new_tokens):
    """Greedy continuations of prompts of equal length: a string each. embeds: as in nll_after."""
    for prompt in prompts:
        check_leading(loaded.model, prompt)
    tokens = torch.tensor(prompts, device=loaded.device)
    image_embeds = join_embeds(embeds, loaded.device)
    steps = list(loaded.model.generate(tokens, image_embeds, max_new_tokens, stop=stop))
    return [loaded.tokenizer.decode(row).strip() for row in torch.stack(steps, 1).tolist()]


def question_template(loaded, name=""):
    """(Template, system text) for questions: as Loaded.choose_template() says, or the template
    `bare` for a model that was trained on captions alone."""
    template, system = loaded.choose_template(name)
    return template or TEMPLATES["bare"], system


def answer_prompts(loaded, prompts, embeds, stop, max_new_tokens, batch=32):
    """A greedy answer to each prompt, a string each; prompts of equal length are answered
    together. embeds: as in nll_after."""
    answers = [""] * len(prompts)
    for length in sorted({len(prompt) for prompt in prompts}):
        same = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(same), batch):
            rows = same[start : start + batch]
            own_prompts, own_embeds = [prompts[i] for i in rows], [embeds[i] for i in rows]
            texts = generate_text(loaded, own_prompts, own_embeds, stop, max_new_tokens)
            for i, text in zip(rows, texts):
                answers[i] = text
    return answers


def answer_dialogues(loaded, dialogues, embed, template, system="", max_new_tokens=32, batch=64):
    """(answers, unanswered): for each dialogue a list of answers, one for each question, and how
    many first questions and later questions did not fit into the context, which get "".

    dialogues: [(questions, pictures)], an <image> in a question for each picture. embed(pictures)
    -> the embeddings of pictures that are shown together. The model's own answers stay in the
    context."""
    stop, block_size = end_tokens(loaded.tokenizer, template), loaded.model.gpt.config.block_size
    said, unanswered = [[] for _ in dialogues], [0, 0]
    for number in range(max(len(questions) for questions, _ in dialogues)):
        prompts, all_embeds, asked = [], [], []
        for (questions, pictures), own in zip(dialogues, said):
            if number >= len(questions):
                continue
            so_far = questions[: number + 1]
            embeds = embed(pictures[: sum(question.count("<image>") for question in so_far)])
            turns = [*zip(so_far, own), (so_far[-1], None)]
            tokens, _ = chat_sample(loaded.tokenizer, template, turns, system)
            tokens = expand(tokens, loaded.tokenizer.image, [len(e) for e in embeds])
            if len(tokens) >= block_size:
                own.append("")
                unanswered[number > 0] += 1
                continue
            prompts.append(tokens)
            all_embeds.append(embeds)
            asked.append(own)
        answers = answer_prompts(loaded, prompts, all_embeds, stop, max_new_tokens, batch)
        for own, answer in zip(asked, answers):
            own.append(answer.replace("<image>", ""))  # an untrained model may generate it
    return said, unanswered


def caption_pictures(loaded, embeds, max_new_tokens=50, batch=100):
    """Greedy captions of pictures, given as embed_pictures() returns them: a string each."""
    captions, stop = [None] * len(embeds), loaded.tokenizer.stops
    # pictures with equally many tokens together: generate_text() takes prompts of equal length
    for count in sorted({len(embed) for embed in embeds}):
        same = [i for i, embed in enumerate(embeds) if len(embed) == count]
        prompt = loaded.tokenizer.start + [loaded.tokenizer.image] * count
        for start in range(0, len(same), batch):
            rows = same[start : start + batch]
            own = [[embeds[i]] for i in rows]
            texts = generate_text(loaded, [prompt] * len(rows), own, stop, max_new_tokens)
            for i, text in zip(rows, texts):
                captions[i] = text
    return captions


def attention_of(loaded, tokens, answer, embeds):
    """Where in the pictures each token of an answer looked: (tokens, N, side, side), numpy. It is
    the attention, averaged over layers and heads, of the position that predicted the token; the sum
    over a picture is the share of its attention that is on that picture. tokens: the prompt.
    Raises UserError for a model whose image tokens are not a grid of patches."""
    model = loaded.model
    if model.tiled or not model.projector.keeps_grid:
        raise UserError("--attention: image tokens of this model are not a grid of patches")
    whole = torch.tensor([[*tokens, *answer]], device=loaded.device)
    maps = model.attention_maps(whole, torch.cat(embeds))[0]  # (T, T)
    columns = (whole[0] == loaded.tokenizer.image).nonzero()[:, 0].view(len(embeds), -1)
    side = int(columns.shape[1] ** 0.5)
    columns = columns[:, -side * side :]  # without CLS
    queries = torch.arange(len(tokens) - 1, len(tokens) + len(answer) - 1)
    of_tokens = maps[queries][:, columns].view(len(answer), len(embeds), side, side)
    return of_tokens.float().cpu().numpy()


def brightness(attention):
    """0 to 1 for each patch, for drawing one word's attention (side, side) on a picture: where the
    word looked is brightest, as bright as the share of its attention that is on the picture. So a
    word that ignored the picture stays dark."""
    return attention / max(float(attention.max()), 1e-9) * min(float(attention.sum()), 1.0)


def make_prompt(loaded, embeds, words, template=None, system=""):
    """The tokens before an answer: pictures and the first words of a caption, or with a Template a
    question about the pictures. Raises UserError if they leave no space for an answer."""
    tokenizer, block_size = loaded.tokenizer, loaded.model.gpt.config.block_size
    if template is not None:
        question = with_pictures(template, words or QUESTION, len(embeds))
        tokens, _ = chat_sample(tokenizer, template, [(question, None)], system)
    else:
        before = tokenizer.start + [tokenizer.image] * len(embeds)
        before = before or [tokenizer.eos]  # a text alone follows <bos>, or else an <eos>
        tokens = before + tokenizer.encode(words)
    tokens = expand(tokens, tokenizer.image, [len(embed) for embed in embeds])
    check_leading(loaded.model, tokens)
    if len(tokens) >= block_size:
        longest = max((len(embed) for embed in embeds), default=0)
        fitting = (block_size - 1 - len(tokens) + sum(map(len, embeds))) // max(longest, 1)
        advice = f"; {fitting or 'no'} such image{'s' * (fitting > 1)} would fit" * bool(longest)
        raise UserError(
            f"{len(embeds)} images and the prompt make {len(tokens)} tokens; this model holds "
            f"{block_size}, its answer included{advice}"
        )
    return tokens
