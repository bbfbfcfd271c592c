"""
The language model, the projector, and BabyLLaVA: tower, projector and language model in one.

An image enters the stream of tokens as P placeholder ids; their embeddings are overwritten with
what the projector makes of the tower's features, and the words after them attend to what was seen:

    <image> x P   look , a red ball ! <eos>        loss on the words and <eos> only

Parameter names follow Hugging Face's Llama (q, k, v and gate, up are each stacked into one), so
that such a checkpoint maps 1:1. No file, no argv, no print in here. A new block, another attention
or another projector is a change in this file alone.
Letters: B batch, T sequence length, C model width, H heads, D head width, V vocabulary, N images,
P image tokens an image, E vision width, S image side in pixels, K targets.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

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
    attention: str = "auto"  # backends, see kernels.py
    norm: str = "auto"

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or -(-8 * self.n_embd // 96) * 32

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
    def __init__(self, width, backend):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.backend = backend

    def forward(self, x):
        return rms_norm(x, self.weight, 1e-5, None, self.backend)

    def add(self, x, branch):
        """(x + branch, norm(x + branch)) in one pass over memory."""
        normed, total = rms_norm(branch, self.weight, 1e-5, x, self.backend)
        return total, normed


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), halves paired as in Llama.

    x (B, T, H, D), cos and sin (T, 1, D / 2): each pair turns by its position's angle."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of the positions so far, of each layer: (layers, 2, B, length, H_kv, D)."""

    def __init__(self, config, like, batch, length):
        shape = (config.n_layer, 2, batch, length, config.n_kv_head, config.head_width)
        self.kv, self.length = like.new_zeros(shape), 0

    def extend(self, layer, k, v):
        """Write the new positions' k and v (B, T, H_kv, D); return those of all so far."""
        end = self.length + k.shape[1]
        self.kv[layer, 0, :, self.length : end] = k
        self.kv[layer, 1, :, self.length : end] = v
        return self.kv[layer, 0, :, :end], self.kv[layer, 1, :, :end]


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
        self.qkv_proj = nn.Linear(config.n_embd, outputs, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, positions):
        B, T, C = x.shape
        heads = self.qkv_proj(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_width)
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        qk = rotate(qk, positions.cos, positions.sin)
        q, k = qk.split([self.heads, self.kv_heads], dim=2)  # (B, T, H, D) each
        if positions.cache is not None:
            k, v = positions.cache.extend(self.layer, k, v)
        if positions.maps is not None:
            positions.maps.append(attention_weights(q, k, positions.prefix))
        y = attention(q, k, v, positions.prefix, backend=self.backend)
        return F.dropout(self.o_proj(y.reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.gate_up_proj = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return F.dropout(self.down_proj(F.silu(gate) * up), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm residuals: x = x + attention(norm(x)), then x = x + mlp(norm(x)).

    Each sum is taken inside the norm that follows it, so x comes and goes in two parts: what was
    summed so far, and the branch that the last layer computed and nobody has added yet."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm)
        self.mlp = MLP(config)

    def forward(self, x, branch, positions):
        if branch is None:  # the first block: nothing to add yet
            normed = self.input_layernorm(x)
        else:
            x, normed = self.input_layernorm.add(x, branch)
        x, normed = self.post_attention_layernorm.add(x, self.self_attn(normed, positions))
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
        self.norm = RMSNorm(config.n_embd, config.norm)
        exponents = torch.arange(0, config.head_width, 2).float() / config.head_width
        frequencies = config.rope_theta**-exponents  # (D / 2,)
        angles = torch.outer(torch.arange(config.block_size).float(), frequencies)[:, None]
        self.register_buffer("cos", angles.cos(), persistent=False)  # (block_size, 1, D / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # GPT-2's init: what adds to the stream starts smaller
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * config.n_layer) ** 0.5 if adds else 0.02
                nn.init.normal_(parameter, std=std)

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

    def forward(self, x, prefix=0, cache=None, maps=None):
        """x (B, T) ids or (B, T, C) embeddings, which come after what is in the cache; `prefix`
        leading positions are seen by all."""
        x = self.embed(x) if x.ndim == 2 else x
        start = cache.length if cache is not None else 0
        end = start + x.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens, but block_size is {self.config.block_size}")
        positions = Positions(self.cos[start:end], self.sin[start:end], prefix, cache, maps)
        branch = None
        for layer in self.layers:
            x, branch = layer(x, branch, positions)
        if cache is not None:
            cache.length = end
        return self.norm.add(x, branch)[1]

    def head(self, hidden):
        return F.linear(hidden, self.embed_tokens.weight)  # tied: (..., C) -> (..., V)


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
        return nn.Linear(width_in, width_out)
    layers = [nn.Linear(width_in, width_out)]
    for _ in range(int(kind[3]) - 1):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


class BabyLLaVA(nn.Module):
    """A GPT and, if given, a projector and a tower (see vision.py for what a tower promises).

    image_token: the placeholder's id; select_layer, keep_cls: what is taken from the tower;
    image_attention: "causal", or "full" where leading images may see the whole of themselves."""

    def __init__(
        self,
        gpt,
        projector=None,
        tower=None,
        image_token=None,
        select_layer=-1,
        keep_cls=False,
        image_attention="causal",
    ):
        super().__init__()
        self.gpt, self.projector, self.tower = gpt, projector, tower
        self.image_token, self.select_layer = image_token, select_layer
        self.keep_cls, self.image_attention = keep_cls, image_attention

    def image_tokens(self, size):
        """P, of an image of size x size pixels."""
        return self.tower.num_patches(size) + self.keep_cls

    def encode_images(self, pixels):
        """What the tower makes of pixels (N, 3, S, S): (N, P, E), CLS first if it is kept."""
        return self.tower(pixels, self.select_layer)[:, 0 if self.keep_cls else 1 :]

    def embed(self, tokens, images=None):
        """Token embeddings with the placeholders overwritten, in order, by projected features.

        tokens (B, T); images: features (N, P, E), pixels (N, 3, S, S) or None -> (B, T, C). The
        caller sees to it that there are exactly N * P placeholders (checking here would stall a
        GPU at each step)."""
        x = self.gpt.embed(tokens)
        if images is None:
            return x
        features = self.encode_images(images) if images.ndim == 4 else images
        projected = self.projector(features.to(self.gpt.embed_tokens.weight.dtype)).flatten(0, 1)
        is_image = tokens == self.image_token
        order = is_image.flatten().cumsum(0).sub(1).clamp(min=0)  # which of the N * P stands here
        placed = projected[order.view_as(tokens)].to(x.dtype)  # (B, T, C)
        return torch.where(is_image[..., None], placed, x)

    def prefix(self, tokens, images):
        """How many leading positions all may see: the images', where they attend in full."""
        if self.image_attention == "causal" or images is None:
            return 0
        P = images.shape[1] if images.ndim == 3 else self.image_tokens(images.shape[-1])
        return len(images) // len(tokens) * P

    def forward(self, tokens, targets=None, positions=None, images=None):
        """(logits, mean loss over the targets that are not -100, or None).

        positions (K,): the places in the flattened (B * T) whose logits (K, V) are wanted, with
        targets (K,); None: all, logits (B, T, V), targets (B, T) or flat. Where few positions
        have a target, the head on all of them would be the most expensive layer."""
        hidden = self.gpt(self.embed(tokens, images), self.prefix(tokens, images))
        if positions is not None:
            hidden = hidden.flatten(0, 1)[positions]  # (B, T, C) -> (K, C)
        logits = self.gpt.head(hidden)
        if targets is None:
            return logits, None
        flat = logits.view(-1, logits.shape[-1]).float()
        return logits, F.cross_entropy(flat, targets.flatten(), ignore_index=-100)

    # ---- the calls by which train.py's loop knows a model (DINO's are in dino.py)

    def inputs(self, batch, image_format, seed, step):
        """What forward() takes, from a batches.Batch."""
        return batch.to(self.gpt.device, image_format)

    def after_step(self, progress):
        pass

    # ---- generation

    @torch.no_grad()
    def generate(
        self,
        tokens,
        images=None,
        max_new_tokens=50,
        temperature=0.0,
        top_k=0,
        stop=None,
        generator=None,
    ):
        """Yield the next token of each row, (B,), until all rows have said `stop` or had enough.

        tokens (B, T) begins the text; images fill its placeholders. temperature 0 is greedy;
        top_k keeps the k likeliest, 0 all. A row that has stopped goes on yielding `stop`.
        Keys and values are cached: after the prompt each step costs one position.
        Raises ValueError when placeholders and features do not match or the prompt is empty."""
        images = self.encode_images(images) if images is not None and images.ndim == 4 else images
        placeholders = (
            int((tokens == self.image_token).sum()) if self.image_token is not None else 0
        )
        given = 0 if images is None else images.shape[0] * images.shape[1]
        if placeholders != given or not tokens.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens with {placeholders} image placeholders for "
                f"{given} image features: they must match, and the text not be empty"
            )
        config = self.gpt.config
        room = min(config.block_size, tokens.shape[1] + max_new_tokens)
        x, prefix = self.embed(tokens, images), self.prefix(tokens, images)
        cache = KVCache(config, x, len(x), room)
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(room - tokens.shape[1]):
            logits = self.gpt.head(self.gpt(x, prefix, cache)[:, -1]).float()  # (B, V)
            token = choose_token(logits, temperature, top_k, generator)
            if stop is not None:
                token = token.masked_fill(done, stop)
                done |= token == stop
            yield token
            if done.all():
                return
            x = self.gpt.embed(token[:, None])

    @torch.no_grad()
    def attention_maps(self, tokens, images):
        """What each position attends to, mean over layers and heads: (B, T, T), rows sum to 1."""
        maps = []
        self.gpt(self.embed(tokens, images), self.prefix(tokens, images), maps=maps)
        return torch.stack(maps).mean((0, 2))


def choose_token(logits, temperature, top_k, generator):
    """A token of each row of logits (B, V): the likeliest, or one drawn at this temperature."""
    if temperature < 1e-6:  # below, fp32 has no numbers for logits / temperature
        return logits.argmax(-1)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    chances = (logits / temperature).softmax(-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]
