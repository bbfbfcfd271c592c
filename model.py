"""
The language model, the projector, and BabyLLaVA: a vision tower, a projector and a language model.

An image enters the sequence as P placeholder tokens. Their embeddings are replaced by the projected
features of the tower, and the words after them attend to these:

    <image> x P   look , a red cup ! <eos>         loss on the words and <eos> only

Parameter names are those of Hugging Face's Llama, except that q, k and v are one matrix, and gate
and up another. A new projector is a class here and an entry in PROJECTORS.
Letters: B batch, T sequence length, C model width, H heads, D head width, V vocabulary, N images,
P image tokens an image, E vision width, S image side in pixels, K targets.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fast.products import Linear, linear
from kernels import attention, attention_weights, autocast_dtype, choose, rms_norm


@dataclass
class GPTConfig:
    """The sizes of a GPT. Of these, n_layer to n_hidden, block_size and dropout are options of
    train.py; vocab_size is the data's, and the others come with other people's weights."""

    vocab_size: int
    block_size: int  # the longest sequence in tokens, image tokens included
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int = 0  # fewer than n_head: grouped queries; 0: as many
    n_hidden: int = 0  # width of the MLP; 0: 8/3 of n_embd, rounded up to a multiple of 32
    dropout: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # see rotary_frequencies()
    norm_eps: float = 1e-5
    qkv_bias: bool = False  # Qwen2 has one
    tied: bool = True  # the head shares the weights of the embedding
    attention: str = "auto"  # which backend computes attention, see kernels.py
    norm: str = "auto"  # which backend computes RMSNorm

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or 32 * math.ceil(self.n_embd / 12)  # 8/3 is 32/12
        self.rope_scaling = tuple(self.rope_scaling)

    @property
    def head_width(self):
        return self.n_embd // self.n_head

    def fault(self):
        """Why these sizes do not fit each other, or ""."""
        if self.n_embd % self.n_head or self.head_width % 2:
            return (
                f"n_embd {self.n_embd} over n_head {self.n_head}: the head width must be a "
                "whole, even number (rotary positions turn pairs)"
            )
        if self.n_head % self.n_kv_head:
            return f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}"
        return ""


# ---------------------------------------------------------------------------------------------
# Rotary positions (Su et al. 2021, arXiv 2104.09864), with halves paired as in Llama


def rotary_frequencies(config):
    """The rotation of each pair of dimensions per position, in radians: (D / 2,).

    rope_scaling: (factor,) divides all frequencies. (factor, low, high, length) is Llama 3.1's: a
    pair that turns less than `low` times within `length` tokens is slowed by the factor, one that
    turns more than `high` times is left alone, and those between are interpolated."""
    exponents = torch.arange(0, config.head_width, 2).float() / config.head_width
    frequencies = config.rope_theta**-exponents
    if len(config.rope_scaling) == 1:
        return frequencies / config.rope_scaling[0]
    if config.rope_scaling:
        factor, low, high, length = config.rope_scaling
        turns = length * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / factor
    return frequencies


def rotate(x, cos, sin):
    """Turn each pair (i, i + D / 2) of x (B, T, H, D) by the angle of its position. cos, sin (T, 1,
    D): those of the angles, twice, with a minus before the first half of sin."""
    wide = x if x.dtype == torch.float64 else x.float()
    other = wide.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(wide * cos, other, sin).to(x.dtype)


# ---------------------------------------------------------------------------------------------
# The language model


class RMSNorm(nn.Module):
    """The norm of the GPT; `--norm` chooses its backend.

    For another norm write a class of another name, with add(), and use it in Block and GPT. Give
    its parameters other names than `weight`: then checkpoints and Llama folders with RMSNorm are
    refused, and not misread. docs/contributing.md says what else depends on it."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.eps, self.backend = config.norm_eps, config.norm

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps, None, self.backend)

    def add(self, x, y):
        """(x + y, norm(x + y)), which a GPU computes in one pass over memory."""
        normed, total = rms_norm(y, self.weight, self.eps, residual=x, backend=self.backend)
        return total, normed  # as Block reads it: x, h


class KVCache:
    """Keys and values of the positions so far: (layers, 2, B, capacity, H_kv, D)."""

    def __init__(self, config, like, batch, capacity):
        shape = (config.n_layer, 2, batch, capacity, config.n_kv_head, config.head_width)
        self.kv, self.length, self.capacity = like.new_zeros(shape), 0, capacity
        self.layers = [layer.unbind() for layer in self.kv]  # views: (keys, values) of each

    def grow(self, length):
        """Make the capacity at least `length`; at least double it, so that copying stays rare."""
        if length > self.capacity:
            *before, capacity, heads, width = self.kv.shape
            kv = self.kv.new_zeros(*before, max(length, 2 * capacity), heads, width)
            kv[:, :, :, : self.length] = self.kv[:, :, :, : self.length]
            self.kv, self.capacity = kv, kv.shape[3]
            self.layers = [layer.unbind() for layer in kv]

    def extend(self, layer, k, v):
        """Store k and v (B, T, H_kv, D) of new positions; return those of all positions so far."""
        (keys, values), T = self.layers[layer], k.shape[1]
        keys.narrow(1, self.length, T).copy_(k)
        values.narrow(1, self.length, T).copy_(v)
        return keys.narrow(1, 0, self.length + T), values.narrow(1, 0, self.length + T)


@dataclass
class Positions:
    """What attention needs besides x: the rotary tables of these positions; `prefix`, the number of
    leading positions that all may attend to; optionally a cache to extend and a list of attention
    maps to fill."""

    cos: torch.Tensor
    sin: torch.Tensor
    prefix: int = 0
    cache: KVCache | None = None
    maps: list | None = None


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.heads, self.kv_heads = config.n_head, config.n_kv_head
        self.head_width, self.layer = config.head_width, layer
        self.dropout, self.backend = config.dropout, config.attention
        outputs = (self.heads + 2 * self.kv_heads) * self.head_width
        self.qkv_proj = Linear(config.n_embd, outputs, bias=config.qkv_bias)
        self.o_proj = Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, positions, first=0):
        """x (B, T, C) -> (B, T - first, C), the outputs of the positions from `first` on."""
        B, T, C = x.shape
        qkv = self.qkv_proj(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_width)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)  # (B, T, H, D)
        q, k = rotate(qk, positions.cos, positions.sin).split([self.heads, self.kv_heads], dim=2)
        if positions.cache is not None:
            k, v = positions.cache.extend(self.layer, k, v)
        q = q[:, first:]  # fewer queries than keys: they belong to the last keys
        if positions.maps is not None:
            positions.maps.append(attention_weights(q, k, positions.prefix))
        y = attention(q, k, v, positions.prefix, backend=self.backend)
        return F.dropout(self.o_proj(y.reshape(B, T - first, C)), self.dropout, self.training)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.gate_up_proj = Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down_proj = Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return F.dropout(self.down_proj(F.silu(gate) * up), self.dropout, self.training)


class Block(nn.Module):
    """x = x + attention(norm(x)), then x = x + mlp(norm(x))."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, positions, first=0):
        """x (B, T, C) -> (B, T - first, C). first: see GPT.forward."""
        attended = self.self_attn(self.input_layernorm(x), positions, first)
        x, h = self.post_attention_layernorm.add(x[:, first:], attended)
        return x + self.mlp(h)


class GPT(nn.Module):
    """Token ids (B, T) or embeddings (B, T, C) -> hidden states (B, T, C); head(hidden) are the
    logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        if config.fault():
            raise ValueError(config.fault())
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.recompute = False  # gradient checkpointing: recompute each block in the backward pass
        self.set_rotary()
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # GPT-2's init: layers that add to the residual start smaller
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * config.n_layer) ** 0.5 if adds else 0.02
                nn.init.normal_(parameter, std=std)

    def set_rotary(self):
        """Compute the tables of rotary positions, always in fp32: (block_size, 1, D). They are in
        no checkpoint, so they are computed even if the model is built on the meta device."""
        with torch.device("cpu"):
            positions = torch.arange(self.config.block_size).float()
            angles = torch.outer(positions, rotary_frequencies(self.config))[:, None]
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer("cos", torch.cat([cos, cos], -1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], -1), persistent=False)

    @property
    def device(self):
        return self.cos.device

    def embed(self, tokens):
        x = self.embed_tokens(tokens)
        # Autocast leaves embeddings in fp32: cast, so that norms and sums move half the bytes.
        dtype = autocast_dtype(x)
        if dtype:
            x = x.to(dtype)
        return F.dropout(x, self.config.dropout, self.training)

    def backends(self, dtype, device=None):
        """The (attention, norm) backends that run in `dtype` on a device, this model's by default.
        Raises ValueError if one that was asked for by name cannot run."""
        # choose() looks only at device, dtype and width
        device = self.device if device is None else device
        query = torch.empty(0, self.config.head_width, dtype=dtype, device=device)
        hidden = torch.empty(0, self.config.n_embd, dtype=dtype, device=device)
        return (
            choose(self.config.attention, "sdpa", query),
            choose(self.config.norm, "torch", hidden),
        )

    def forward(self, x, prefix=0, cache=None, maps=None, first=0):
        """x: ids (B, T) or embeddings (B, T, C), at the positions after those in the cache.
        All positions may attend to the first `prefix` ones.

        first: hidden states are wanted from this position on, (B, T - first, C), so the last block
        computes only their queries and MLP. With 64 image tokens the first word is predicted at
        position 63, and first = 56 skips 56 positions (docs/speed.md: what it saves)."""
        x = self.embed(x) if x.ndim == 2 else x
        start = cache.length if cache is not None else 0
        end = start + x.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens, but block_size is {self.config.block_size}")
        positions = Positions(self.cos[start:end], self.sin[start:end], prefix, cache, maps)
        for layer in self.layers:
            skip = first if layer is self.layers[-1] else 0
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, positions, skip, use_reentrant=False)
            else:
                x = layer(x, positions, skip)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    @property
    def head_weight(self):
        return self.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def head(self, hidden):
        return linear(hidden, self.head_weight)  # (..., C) -> (..., V)


def cross_entropy(logits, targets):
    """The mean cross-entropy of logits (K, V) over the targets (K,) that are not -100, in fp32; 0
    if all are."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------
# The projector


class PerFeature:
    """A projector that maps each feature by itself: as many image tokens as features, on the same
    grid."""

    keeps_grid = True

    def num_tokens(self, features):
        """How many image tokens are made of so many features of an image."""
        return features


class LinearProjector(PerFeature, Linear):
    def __init__(self, kind, width_in, width_out):
        super().__init__(width_in, width_out)


class MLPProjector(PerFeature, nn.Sequential):
    """mlpNx_gelu: Linear(E, C), then N - 1 times [GELU, Linear(C, C)]. LLaVA-1.5 has mlp2x_gelu."""

    def __init__(self, kind, width_in, width_out):
        layers = [Linear(width_in, width_out)]
        for _ in range(int(kind[3]) - 1):
            layers += [nn.GELU(), Linear(width_out, width_out)]
        super().__init__(*layers)


class IdentityProjector(PerFeature, nn.Identity):
    def __init__(self, kind, width_in, width_out):
        super().__init__()
        if width_in != width_out:
            raise ValueError(f"an identity projector from width {width_in} to {width_out}")


# {pattern of the kind: class}. A class is called with (kind, E, C) and has the two members of
# PerFeature; its forward maps features (N, F, E) to (N, num_tokens(F), C). Tiles, image_pool and
# attention maps need keeps_grid.
PROJECTORS = {
    "linear": LinearProjector,
    "mlp[1-9]x_gelu": MLPProjector,
    "identity": IdentityProjector,
}


def make_projector(kind, width_in, width_out):
    """A projector from width_in = E to width_out = C. Raises ValueError for another kind, or for an
    identity between different widths."""
    for pattern, projector in PROJECTORS.items():
        if re.fullmatch(pattern, kind):
            return projector(kind, width_in, width_out)
    raise ValueError(f"no projector {kind!r}: one of {', '.join(PROJECTORS)}")


# ---------------------------------------------------------------------------------------------
# The whole


class BabyLLaVA(nn.Module):
    """A GPT, optionally with a projector and a tower (see vision.py for the interface of a tower).

    image_token: the id of the placeholder
    select_layer, keep_cls: which features are taken from the tower
    image_pool: 2 averages 2 x 2 image tokens into one, so that more images fit
    image_attention: "causal", or "full": leading images attend to all of themselves; all rows of a
    batch must then start with equally many image tokens, and have no others (leads_alike())
    tiled: images are cut into tiles (see common/tiles.py), with a learnt newline after each row"""

    def __init__(
        self,
        gpt,
        projector=None,
        tower=None,
        image_token=None,
        select_layer=-2,
        keep_cls=False,
        image_attention="causal",
        tiled=False,
        image_pool=1,
    ):
        super().__init__()
        self.gpt, self.projector, self.tower = gpt, projector, tower
        self.image_token, self.select_layer = image_token, select_layer
        self.keep_cls, self.image_attention, self.tiled = keep_cls, image_attention, tiled
        self.image_pool = image_pool
        if tiled:
            self.use_tiles()

    def use_tiles(self):
        """Accept images in tiles from now on, with a newline vector that is still random."""
        if self.image_attention == "full":
            raise ValueError("image_attention=full: images in tiles are unlike in length")
        self.tiled = True
        if not hasattr(self, "image_newline"):
            width = self.gpt.config.n_embd
            self.image_newline = nn.Parameter(torch.empty(width))
            nn.init.normal_(self.image_newline, std=width**-0.5)

    def num_features(self, size):
        """How many features the tower gives of an image of size x size pixels."""
        return self.tower.num_patches(size) + self.keep_cls

    def image_tokens(self, size):
        """P, of an image of size x size pixels."""
        tokens = self.projector.num_tokens(self.num_features(size))
        if self.image_pool > 1:
            tokens = (tokens - self.keep_cls) // self.image_pool**2 + self.keep_cls
        return tokens

    # ---- images: pixels -> features -> projected features -> the embeddings of the placeholders

    def encode_images(self, pixels):
        """Pixels (N, 3, S, S) -> features (N, num_features, E), CLS first if it is kept."""
        pixels = pixels.to(next(self.tower.parameters()).dtype)
        return self.tower(pixels, self.select_layer)[:, 0 if self.keep_cls else 1 :]

    def project(self, features):
        """Features (N, num_features, E) -> projected features (N, P, C), pooled last."""
        projected = self.projector(features.to(self.gpt.embed_tokens.weight.dtype))
        return self.pool(projected) if self.image_pool > 1 else projected

    def pool(self, projected):
        """Means of image_pool x image_pool image tokens; the CLS token is kept."""
        cls, patches = projected.tensor_split([int(self.keep_cls)], dim=1)
        side = math.isqrt(patches.shape[1])
        means = F.avg_pool2d(patches.mT.unflatten(2, (side, side)), self.image_pool)
        return torch.cat([cls, means.flatten(2).mT], 1)

    def arrange(self, projected, arrangement):
        """Projected features (N, P, C) -> (M, C) in the order of the sequence, with newlines.
        arrangement: index (M, k) and weight (M, k), see common/tiles.py."""
        index, weight = arrangement
        newline = self.image_newline[None].to(projected.dtype)
        table = torch.cat([projected.flatten(0, 1), newline])  # index -1 is the newline
        if index.shape[1] == 1:
            return table[index[:, 0]]
        return (table[index] * weight[..., None].to(table.dtype)).sum(1)

    def embed_images(self, images, arrangement=None):
        """Pixels (N, 3, S, S) or features (N, num_features, E) -> the embeddings (M, C) of all
        image tokens, in order. Without an arrangement M = N * P."""
        features = self.encode_images(images) if images.ndim == 4 else images
        projected = self.project(features)
        if arrangement is None:
            return projected.flatten(0, 1)
        return self.arrange(projected, arrangement)

    # ---- the sequence

    def embed(self, tokens, image_embeds=None):
        """Tokens (B, T) -> embeddings (B, T, C), with those of the placeholders replaced, in order,
        by image_embeds (M, C).

        There must be at most M placeholders; embeddings left over are padding. (Checking it here
        would stall a GPU at each step.)"""
        x = self.gpt.embed(tokens)
        if image_embeds is None:
            return x
        is_image = tokens == self.image_token
        number = is_image.flatten().cumsum(0).sub(1).clamp(min=0)  # which image token stands here
        placed = image_embeds[number.view_as(tokens)].to(x.dtype)  # (B, T, C)
        return torch.where(is_image[..., None], placed, x)

    def prefix(self, tokens, image_embeds):
        """The number of leading positions that all may attend to: the image tokens of a row, of
        which every row has equally many."""
        if self.image_attention == "causal" or image_embeds is None:
            return 0
        return len(image_embeds) // len(tokens)

    def leads_alike(self, tokens):
        """Whether each row of tokens (B, T) starts with the same number of placeholders, and has no
        others: what image_attention "full" needs."""
        is_image = tokens == self.image_token
        counts = is_image.sum(1)
        return bool((counts == counts[0]).all() and is_image[:, : counts[0]].all())

    def hidden_states(self, tokens, image_embeds=None, positions=None, first=0, maps=None):
        """Tokens (B, T) and image embeddings (M, C) -> hidden states (B, T - first, C).

        With positions (K,), indices in tokens.flatten(), only the hidden states there: (K, C). None
        of them may be before `first` in its row."""
        x, prefix = self.embed(tokens, image_embeds), self.prefix(tokens, image_embeds)
        hidden = self.gpt(x, prefix, maps=maps, first=first)
        if positions is None:
            return hidden
        T = tokens.shape[1]
        return hidden[positions // T, positions % T - first]

    def forward(self, tokens, targets=None, positions=None, images=None, arrangement=None, first=0):
        """(logits, None), or with targets (None, their mean loss); a target of -100 is left out.

        images, arrangement: see embed_images(). positions, first: see hidden_states(); logits are
        (K, V) and targets (K,), or without positions (B, T, V) and (B, T). Few positions have a
        target, and the head on all of them would be the most expensive layer."""
        image_embeds = None if images is None else self.embed_images(images, arrangement)
        hidden = self.hidden_states(tokens, image_embeds, positions, first)
        logits = self.gpt.head(hidden)
        if targets is None:
            return logits, None
        return None, cross_entropy(logits.flatten(0, -2), targets.flatten())

    # ---- the calls by training, which dino.DINO has too

    def inputs(self, batch, image_format, seed, step):
        """The arguments of forward(), from a batches.Batch."""
        return batch.to(self.gpt.device, image_format)

    def after_step(self, progress, taken):
        pass

    def result(self):
        """The BabyLLaVA that a checkpoint saves."""
        return self

    # ---- generation

    @torch.inference_mode()
    def generate(
        self,
        tokens,
        image_embeds=None,
        max_new_tokens=50,
        temperature=0.0,
        top_k=0,
        stop=(),
        generator=None,
        cache=None,
    ):
        """Yield the next token of each row, (B,), until every row has given one of `stop`.

        tokens (B, T): the prompt; image_embeds (M, C) replace its placeholders. temperature 0 is
        greedy; top_k samples among the k likeliest, 0 among all. A row that has stopped repeats its
        last token. After the prompt, a step costs one position: keys and values are cached. A given
        `cache` holds earlier text and is extended.
        Raises ValueError for an empty prompt or a wrong number of placeholders."""
        has_images = self.image_token is not None
        placeholders = int((tokens == self.image_token).sum()) if has_images else 0
        given = 0 if image_embeds is None else len(image_embeds)
        if placeholders != given or not tokens.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens with {placeholders} image placeholders for "
                f"{given} image embeddings: they must match, and the text not be empty"
            )
        # with a cache the caller has checked the whole text, see inference.check_leading()
        is_whole = cache is None
        if given and is_whole and self.image_attention == "full" and not self.leads_alike(tokens):
            raise ValueError("image_attention=full needs rows that start with all their images")
        x, prefix = self.embed(tokens, image_embeds), self.prefix(tokens, image_embeds)
        if cache is None:
            capacity = min(self.gpt.config.block_size, tokens.shape[1] + max_new_tokens)
            cache = KVCache(self.gpt.config, x, len(x), capacity)
        left = cache.capacity - cache.length - tokens.shape[1]
        done, token = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device), None
        for _ in range(min(left, max_new_tokens)):
            hidden = self.gpt(x, prefix, cache)[:, -1]  # (B, C)
            chosen = choose_token(self.gpt.head(hidden).float(), temperature, top_k, generator)
            token = chosen if token is None else torch.where(done, token, chosen)
            for end in stop:
                done |= token == end
            yield token
            if done.all():
                return
            x = self.gpt.embed(token[:, None])

    @torch.no_grad()
    def attention_maps(self, tokens, image_embeds):
        """Attention averaged over layers and heads: (B, T, T), rows sum to 1."""
        maps = []
        self.hidden_states(tokens, image_embeds, maps=maps)
        return torch.stack(maps).mean((0, 2))


def choose_token(logits, temperature, top_k, generator):
    """A token of each row of logits (B, V): the likeliest, or one sampled at this temperature."""
    if temperature < 1e-6:  # so small that it is greedy
        return logits.argmax(-1)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    chances = (logits / temperature).softmax(-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]
