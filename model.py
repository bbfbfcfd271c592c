"""
The language model, the projector, and BabyLLaVA: tower, projector and language model in one.

An image enters the stream of tokens as P placeholder ids; their embeddings are overwritten with
what the projector makes of the tower's features, and the words after them attend to what was seen:

    <image> x P   look , a red ball ! <eos>        loss on the words and <eos> only

Parameter names follow Hugging Face's Llama, but q, k and v are stacked into one matrix, and gate
and up into another. A new block, attention or projector is a change in this file alone.
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

from fused import Linear, head_loss, linear, rotary_frequencies, split_rotated, swiglu
from kernels import attention, attention_weights, choose, rms_norm


@dataclass
class GPTConfig:
    """Sizes have their defaults in train.py, where people look for them."""

    vocab_size: int
    block_size: int  # the longest sequence, in tokens, image tokens included
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int = 0  # fewer than n_head: grouped queries; 0: as many
    n_hidden: int = 0  # width of the SwiGLU MLP; 0: 8/3 of n_embd, rounded up to a multiple of 32
    dropout: float = 0.0
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # see rotary_frequencies()
    norm_eps: float = 1e-5
    qkv_bias: bool = False  # Qwen2's
    tied: bool = True  # the head is the embedding
    attention: str = "auto"  # backends, see kernels.py
    norm: str = "auto"

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or -(-8 * self.n_embd // 96) * 32
        self.rope_scaling = tuple(self.rope_scaling)

    @property
    def head_width(self):
        return self.n_embd // self.n_head

    def fault(self):
        """Why no model can be made of these sizes, or ""."""
        if self.n_embd % self.n_head or self.head_width % 2:
            return (
                f"n_embd {self.n_embd} over n_head {self.n_head}: the head width must be a "
                "whole, even number (rotary positions turn pairs)"
            )
        if self.n_head % self.n_kv_head:
            return f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}"
        return ""


# ---------------------------------------------------------------------------------------------
# The language model


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.eps, self.backend = config.norm_eps, config.norm

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps, None, self.backend)

    def add(self, x, branch):
        """(x + branch, norm(x + branch)), in as few passes over memory as the backend can."""
        normed, total = rms_norm(branch, self.weight, self.eps, x, self.backend)
        return total, normed


class KVCache:
    """Keys and values of the positions so far, of each layer: (layers, 2, B, room, H_kv, D)."""

    def __init__(self, config, like, batch, room):
        shape = (config.n_layer, 2, batch, room, config.n_kv_head, config.head_width)
        self.kv, self.length, self.room = like.new_zeros(shape), 0, room
        self.layers = [layer.unbind() for layer in self.kv]  # views: (keys, values) of each

    def grow(self, length):
        """Make room for so many positions; at least double it, so that copying stays rare."""
        if length > self.room:
            *before, room, heads, width = self.kv.shape
            kv = self.kv.new_zeros(*before, max(length, 2 * room), heads, width)
            kv[:, :, :, : self.length] = self.kv[:, :, :, : self.length]
            self.kv, self.room = kv, kv.shape[3]
            self.layers = [layer.unbind() for layer in kv]

    def extend(self, layer, k, v):
        """Write the new positions' k and v (B, T, H_kv, D); return those of all so far."""
        (keys, values), T = self.layers[layer], k.shape[1]
        keys.narrow(1, self.length, T).copy_(k)
        values.narrow(1, self.length, T).copy_(v)
        return keys.narrow(1, 0, self.length + T), values.narrow(1, 0, self.length + T)


@dataclass
class Positions:
    """What attention must know beside x: the rotary tables of these positions, how many leading
    positions all may see, and, where asked for, a cache to extend and a list of maps to fill."""

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
        """x (B, T, C) -> (B, T - first, C): what the positions from `first` on gather."""
        B, T, C = x.shape
        heads = self.qkv_proj(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_width)
        q, k, v = split_rotated(heads, positions.cos, positions.sin, self.kv_heads)
        q = q[:, first:]  # (B, T - first, H, D)
        if positions.cache is not None:
            k, v = positions.cache.extend(self.layer, k, v)
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
        hidden = swiglu(self.gate_up_proj(x))
        return F.dropout(self.down_proj(hidden), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm residuals: x = x + attention(norm(x)), then x = x + mlp(norm(x)).

    Each sum is taken inside the norm that follows it, so x comes and goes in two parts: what was
    summed so far, and the branch that the last layer computed and nobody has added yet."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, branch, positions, first=0):
        """`first`: from which position on the block's output is wanted; all are attended to."""
        if branch is None:  # the first block: nothing to add yet
            normed = self.input_layernorm(x)
        else:
            x, normed = self.input_layernorm.add(x, branch)
        branch = self.self_attn(normed, positions, first)
        x, normed = self.post_attention_layernorm.add(x[:, first:], branch)
        return x, self.mlp(normed)


class GPT(nn.Module):
    """tokens (B, T) or embeddings (B, T, C) -> hidden states (B, T, C); logits = head(hidden)."""

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
        self.recompute = False  # gradient checkpointing: keep no layer's inside, compute it again
        self.set_rotary()
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # GPT-2's init: what adds to the stream starts smaller
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * config.n_layer) ** 0.5 if adds else 0.02
                nn.init.normal_(parameter, std=std)

    def set_rotary(self):
        """Make the tables of rotary positions, always in fp32: (block_size, 1, D / 2)."""
        positions = torch.arange(self.config.block_size).float()
        angles = torch.outer(positions, rotary_frequencies(self.config))[:, None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @property
    def device(self):
        return self.cos.device

    def embed(self, tokens):
        x = self.embed_tokens(tokens)
        # Autocast leaves embeddings in fp32: cast, so that norms and sums move half the bytes.
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return F.dropout(x, self.config.dropout, self.training)

    def backends(self, dtype):
        """The (attention, norm) backends that will run on this device in `dtype`.

        Raises ValueError where one that was asked for cannot."""
        query = self.cos.new_empty(0, self.config.head_width, dtype=dtype)
        stream = self.cos.new_empty(0, self.config.n_embd, dtype=dtype)
        return (
            choose(self.config.attention, "sdpa", query),
            choose(self.config.norm, "torch", stream),
        )

    def forward(self, x, prefix=0, cache=None, maps=None, first=0):
        """x (B, T) ids or (B, T, C) embeddings, which come after what is in the cache; `prefix`
        leading positions are seen by all. first: the last block's output, and so this one, is
        wanted from that position on: (B, T - first, C)."""
        x = self.embed(x) if x.ndim == 2 else x
        start = cache.length if cache is not None else 0
        end = start + x.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens, but block_size is {self.config.block_size}")
        positions = Positions(self.cos[start:end], self.sin[start:end], prefix, cache, maps)
        branch = None
        for layer in self.layers:
            from_here = first if layer is self.layers[-1] else 0
            if self.recompute and torch.is_grad_enabled():
                x, branch = checkpoint(layer, x, branch, positions, from_here, use_reentrant=False)
            else:
                x, branch = layer(x, branch, positions, from_here)
        if cache is not None:
            cache.length = end
        return self.norm.add(x, branch)[1]

    @property
    def head_weight(self):
        return self.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def head(self, hidden):
        return linear(hidden, self.head_weight)  # (..., C) -> (..., V)


# ---------------------------------------------------------------------------------------------
# The projector and the whole


def projector_fault(kind, width_in, width_out):
    """Why there is no Projector of this kind between these widths, or ""."""
    known = kind in ("linear", "identity") or re.fullmatch(r"mlp[1-9]x_gelu", kind)
    if known and (kind != "identity" or width_in == width_out):
        return ""
    return (
        f"no projector {kind!r} from width {width_in} to {width_out}: linear, mlp2x_gelu, "
        "mlp3x_gelu ..., or identity between equal widths"
    )


def Projector(kind, width_in, width_out):
    """LLaVA's projectors: "linear", "mlpNx_gelu" or "identity", from width_in = E to width_out = C.

    mlpNx_gelu is Linear(E, C), then N - 1 times [GELU, Linear(C, C)]: mlp2x_gelu is LLaVA-1.5's.
    Raises ValueError for another kind, or an identity between different widths."""
    if projector_fault(kind, width_in, width_out):
        raise ValueError(projector_fault(kind, width_in, width_out))
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return Linear(width_in, width_out)
    layers = [Linear(width_in, width_out)]
    for _ in range(int(kind[3]) - 1):
        layers += [nn.GELU(), Linear(width_out, width_out)]
    return nn.Sequential(*layers)


class BabyLLaVA(nn.Module):
    """A GPT and, if given, a projector and a tower (see vision.py for what a tower promises).

    image_token: the placeholder's id; select_layer, keep_cls: what is taken from the tower;
    image_pool: 2 makes one token of the mean of 2 x 2 patches, so that many pictures fit;
    image_attention: "causal", or "full" where leading images may see the whole of themselves;
    tiled: pictures come in tiles too (see tiles.py), with a learnt newline after each row."""

    def __init__(
        self,
        gpt,
        projector=None,
        tower=None,
        image_token=None,
        select_layer=-1,
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
        """Take pictures in tiles from now on, with a newline vector that is still random."""
        self.tiled = True
        if not hasattr(self, "image_newline"):
            width = self.gpt.config.n_embd
            self.image_newline = nn.Parameter(torch.randn(width) / width**0.5)

    def image_tokens(self, size):
        """P, of an image of size x size pixels."""
        return self.tower.num_patches(size) // self.image_pool**2 + self.keep_cls

    def encode_images(self, pixels):
        """What the tower makes of pixels (N, 3, S, S): (N, patches, E), CLS first if it is kept."""
        return self.tower(pixels, self.select_layer)[:, 0 if self.keep_cls else 1 :]

    def pool(self, projected):
        """Means of image_pool x image_pool patches, (N, patches, C) -> (N, P, C); CLS stays."""
        cls, patches = projected.tensor_split([int(self.keep_cls)], dim=1)
        side = math.isqrt(patches.shape[1])
        means = F.avg_pool2d(patches.mT.unflatten(2, (side, side)), self.image_pool)
        return torch.cat([cls, means.flatten(2).mT], 1)

    def project(self, images, arrangement=None):
        """The embeddings (M, C) that the placeholders get, one after the other.

        images: pixels (N, 3, S, S), features (N, patches, E), or what this method made of them.
        Without an arrangement M = N * P, all in order; else (index (M, k), weight (M, k)) of
        tiles.py. Pooled last, as LLaVA-NeXT's videos: what the projector finds outlives a mean."""
        if images.ndim == 2:
            return images
        features = self.encode_images(images) if images.ndim == 4 else images
        projected = self.projector(features.to(self.gpt.embed_tokens.weight.dtype))
        projected = (self.pool(projected) if self.image_pool > 1 else projected).flatten(0, 1)
        if arrangement is None:
            return projected
        index, weight = arrangement
        newline = self.image_newline[None].to(projected.dtype)
        table = torch.cat([projected, newline])  # (N * P + 1, C): index -1 is the newline
        if index.shape[1] == 1:
            return table[index[:, 0]]
        return (table[index] * weight[..., None].to(table.dtype)).sum(1)

    def embed(self, tokens, image_embeds=None):
        """Token embeddings with the placeholders overwritten, in order, by project()'s (M, C).

        tokens (B, T) -> (B, T, C). The caller sees to it that there are M placeholders, or fewer if
        the last images are padding (to check here would stall a GPU at each step)."""
        x = self.gpt.embed(tokens)
        if image_embeds is None:
            return x
        is_image = tokens == self.image_token
        order = is_image.flatten().cumsum(0).sub(1).clamp(min=0)  # which of the M stands here
        placed = image_embeds[order.view_as(tokens)].to(x.dtype)  # (B, T, C)
        return torch.where(is_image[..., None], placed, x)

    def prefix(self, tokens, image_embeds):
        """How many leading positions all may see: the images', where they attend in full."""
        if self.image_attention == "causal" or image_embeds is None:
            return 0
        return len(image_embeds) // len(tokens)

    def hidden_states(self, tokens, images=None, arrangement=None, maps=None, first=0):
        """What the GPT makes of tokens (B, T) and images, see project(): (B, T - first, C)."""
        seen = None if images is None else self.project(images, arrangement)
        prefix = self.prefix(tokens, seen)
        return self.gpt(self.embed(tokens, seen), prefix, maps=maps, first=first)

    def forward(self, tokens, targets=None, positions=None, images=None, arrangement=None, first=0):
        """(logits, None); with targets (None, their mean loss), those that are -100 left out.

        positions (K,): the places in the flattened (B * T) whose logits (K, V) are wanted, with
        targets (K,), none of them before position `first` of its row; None: all, logits (B, T, V),
        targets (B, T) or flat. Where few positions have a target, the head on all of them would be
        the most expensive layer."""
        hidden = self.hidden_states(tokens, images, arrangement, first=first)
        if images is None and torch.is_grad_enabled() and not hidden.requires_grad:
            # a text alone, while the projector or the tower alone learns: a gradient of 0, not none
            hidden = hidden + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        if positions is not None:  # b * T + t is b * (T - first) + t - first in shorter rows
            rows = positions // tokens.shape[1]
            hidden = hidden.flatten(0, 1)[positions - first * (rows + 1)]  # (K, C)
        if targets is None:
            return self.gpt.head(hidden), None
        return None, head_loss(hidden.flatten(0, -2), self.gpt.head_weight, targets.flatten())

    # ---- the calls by which train.py's loop knows a model (DINO's are in dino.py)

    def inputs(self, batch, image_format, seed, step):
        """What forward() takes, from a batches.Batch."""
        return batch.to(self.gpt.device, image_format)

    def after_step(self, progress, taken):
        pass

    # ---- generation

    @torch.inference_mode()
    def generate(
        self,
        tokens,
        images=None,
        max_new_tokens=50,
        temperature=0.0,
        top_k=0,
        stop=(),
        generator=None,
        cache=None,
    ):
        """Yield the next token of each row, (B,), until all rows have said one of `stop` or enough.

        tokens (B, T) begins the text; images, see project(), fill its placeholders. temperature 0
        is greedy; top_k keeps the k likeliest, 0 all. A row that has stopped goes on yielding the
        token it stopped with. Keys and values are cached: after the prompt each step costs one
        position. A `cache` that is given holds what came before, and keeps what comes.
        Raises ValueError when placeholders and images do not match or the prompt is empty."""
        seen = None if images is None else self.project(images)
        has_images = self.image_token is not None
        placeholders = int((tokens == self.image_token).sum()) if has_images else 0
        given = 0 if seen is None else len(seen)
        if placeholders != given or not tokens.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens with {placeholders} image placeholders for "
                f"{given} image embeddings: they must match, and the text not be empty"
            )
        config = self.gpt.config
        x, prefix = self.embed(tokens, seen), self.prefix(tokens, seen)
        if cache is None:
            room = min(config.block_size, tokens.shape[1] + max_new_tokens)
            cache = KVCache(config, x, len(x), room)
        room = cache.room - cache.length - tokens.shape[1]
        done, token = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device), None
        for _ in range(min(room, max_new_tokens)):
            hidden = self.gpt(x, prefix, cache, first=x.shape[1] - 1)  # (B, 1, C)
            logits = self.gpt.head(hidden[:, 0]).float()  # (B, V)
            chosen = choose_token(logits, temperature, top_k, generator)
            token = chosen if token is None else torch.where(done, token, chosen)
            for end in stop:
                done |= token == end
            yield token
            if done.all():
                return
            x = self.gpt.embed(token[:, None])

    @torch.no_grad()
    def attention_maps(self, tokens, images):
        """What each position attends to, mean over layers and heads: (B, T, T), rows sum to 1."""
        maps = []
        self.hidden_states(tokens, images, maps=maps)
        return torch.stack(maps).mean((0, 2))


def choose_token(logits, temperature, top_k, generator):
    """A token of each row of logits (B, V): the likeliest, or one drawn at this temperature."""
    if temperature < 1e-6:  # so cold that it always is the likeliest
        return logits.argmax(-1)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    chances = (logits / temperature).softmax(-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]
