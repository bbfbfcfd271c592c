"""
A model that was trained, at work: what it sees in pictures, and what it says of them.
Letters: N images, S side, P image tokens an image, E vision width, C model width.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

import report
from config import UserError
from images import read_picture, to_pixels
from templates import TEMPLATES, chat_sample, expand, with_pictures
from tiles import arrange

QUESTION = "what is this ?"  # where a model that has learnt conversations is asked nothing


@torch.no_grad()
def encode_frames(loaded, frames, batch=64):
    """Features (N, P, E) of frames (N, S, S, 3) uint8. (In training they are stored in fp16.)"""
    features = []
    for start in range(0, len(frames), batch):
        pixels = to_pixels(frames[start : start + batch], loaded.image_format, loaded.device)
        features.append(loaded.model.encode_images(pixels.to(loaded.dtype)))
    return torch.cat(features)


@torch.no_grad()
def see(loaded, pictures):
    """What stands for each of some images.Pictures in the text: a list of (tokens, C)."""
    model, embeds = loaded.model, []
    if model.projector is None:
        raise UserError("this checkpoint cannot see: give one of phase 1 or later, or no --image")
    features = encode_frames(loaded, np.concatenate([picture.frames for picture in pictures]))
    first = 0
    for picture in pictures:
        own = features[first : first + len(picture.frames)]
        first += len(picture.frames)
        arrangement = None
        if model.tiled:
            side = int(own.shape[1] ** 0.5)
            arranged = arrange(*picture.grid, side, max_tiles=loaded.image_format.max_tiles)
            arrangement = [torch.tensor(part, device=loaded.device) for part in arranged]
        embeds.append(model.project(own, arrangement))
    return embeds


def read(loaded, paths, shown=0):
    """The Pictures of some files, after so many that were shown. OneVision shows several without
    their tiles."""
    image_format = loaded.image_format
    if len(paths) + shown > 1 and image_format.max_tiles:
        image_format = replace(image_format, fit="pad", canvases=())
    return [read_picture(path, image_format) for path in paths]


@torch.no_grad()
def nll_after(loaded, befores, embeds, words, batch=256):
    """Mean NLL per token of words[i], tokens, after befores[i], tokens in which each placeholder
    stands for a row of embeds[i], a list of see()'s; embeds None: there are no pictures. float64
    (n,). Raises UserError where words are too long or none, or a score is no finite number."""
    model, tokenizer, device = loaded.model, loaded.tokenizer, loaded.device
    scores = np.zeros(len(words))
    for start in range(0, len(words), batch):
        own = words[start : start + batch]
        streams = [b + w for b, w in zip(befores[start : start + batch], own)]
        T = max(map(len, streams)) - 1  # the last token is only ever a target
        if model.gpt.config.block_size < T or not all(own):
            longest = tokenizer.decode(max(own, key=len))
            raise UserError(
                f"a phrase makes no tokens, or with what precedes it {T} of them, over the "
                f"model's {model.gpt.config.block_size}: {longest[:40]!r} ..."
            )
        tokens = torch.full((len(own), T), tokenizer.pad)
        positions, targets, owners = [], [], []
        for i, (stream, phrase) in enumerate(zip(streams, own)):
            tokens[i, : len(stream) - 1] = torch.tensor(stream[:-1])
            first = i * T + len(stream) - len(phrase) - 1  # the position that says the first word
            positions += range(first, first + len(phrase))
            targets += phrase
            owners += [i] * len(phrase)
        shown = [e for row in (embeds or [])[start : start + batch] for e in row]
        logits, _ = model(
            tokens.to(device),
            positions=torch.tensor(positions, device=device),
            images=torch.cat(shown).to(device) if shown else None,
            first=min(position % T for position in positions),
        )
        losses = F.cross_entropy(
            logits.float(), torch.tensor(targets, device=device), reduction="none"
        )
        sums = np.bincount(owners, losses.cpu().double().numpy())
        scores[start : start + batch] = sums / [len(phrase) for phrase in own]
    if not np.isfinite(scores).all():
        raise UserError("the model's scores are not finite numbers: its weights are broken")
    return scores


def say(loaded, prompts, embeds, stop, max_new_tokens):
    """What is said, greedily, after prompts of one length: a string each. embeds: as above."""
    shown = [embed for row in embeds for embed in row]
    tokens = torch.tensor(prompts, device=loaded.device)
    images = torch.cat(shown).to(loaded.device) if shown else None
    said = list(loaded.model.generate(tokens, images, max_new_tokens, stop=stop))
    return [loaded.tokenizer.decode(row).strip() for row in torch.stack(said, 1).tolist()]


def caption(loaded, embeds, max_new_tokens=50, batch=100):
    """Greedy captions of pictures, given as see() gives them, one string each."""
    bos, captions = loaded.tokenizer.bos, [None] * len(embeds)
    before = [] if bos is None else [bos]
    for count in sorted({len(embed) for embed in embeds}):  # of alike length together
        alike = [i for i, embed in enumerate(embeds) if len(embed) == count]
        for start in range(0, len(alike), batch):
            rows = alike[start : start + batch]
            prompts = [before + [loaded.tokenizer.image] * count] * len(rows)
            stop = loaded.tokenizer.stops
            said = say(loaded, prompts, [[embeds[i]] for i in rows], stop, max_new_tokens)
            for i, words in zip(rows, said):
                captions[i] = words
    return captions


def begin(loaded, embeds, prompt, template="", system=""):
    """The tokens that an answer goes on from: pictures and a caption's first words, or, with a
    template, a question about them."""
    tokenizer, block_size = loaded.tokenizer, loaded.model.gpt.config.block_size
    if template:
        question = with_pictures(TEMPLATES[template], prompt or QUESTION, len(embeds))
        tokens, _ = chat_sample(tokenizer, TEMPLATES[template], [(question, None)], system)
    else:
        start = [tokenizer.image] * len(embeds) or [tokenizer.eos]
        if tokenizer.bos is not None:
            start = [tokenizer.bos] + [tokenizer.image] * len(embeds)
        tokens = start + tokenizer.encode(prompt)
    tokens = expand(tokens, tokenizer.image, [len(embed) for embed in embeds])
    if len(tokens) >= block_size:
        raise UserError(
            f"{len(embeds)} images and the prompt make {len(tokens)} tokens; this "
            f"model holds {block_size}, its answer included"
        )
    return tokens


def draw_attention(path, loaded, tokens, answer, embeds, pictures):
    """Draw where each word of the answer looked: in its row, the query is the position that
    predicted the word."""
    if loaded.model.tiled:
        raise UserError("--attention: of pictures in tiles no map is drawn")
    whole = torch.tensor([tokens + answer], device=loaded.device)
    maps = loaded.model.attention_maps(whole, torch.cat(embeds))[0]  # (T, T)
    places = (whole[0] == loaded.tokenizer.image).nonzero()[:, 0].view(len(embeds), -1)
    side = int(places.shape[1] ** 0.5)
    places = places[:, -side * side :]  # without CLS
    queries = torch.arange(len(tokens) - 1, len(tokens) + len(answer) - 1)
    looked = maps[queries][:, places].view(len(answer), len(embeds), side, side)
    words = [loaded.tokenizer.decode([token]).strip() or "<eos>" for token in answer]
    frames = [picture.frames[0] for picture in pictures]
    try:
        report.attention_sheet(frames, words, looked.float().cpu().numpy()).save(path)
    except ValueError as error:  # a file name without a known suffix
        raise UserError(f"--attention {path}: {error}") from None
