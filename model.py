"""
The mind: a GPT, a projector that turns what the eye sees into its kind of vector, and BabyLLaVA,
which is the two together.

An image enters the stream of tokens as P placeholder ids; their embeddings are overwritten with
the projected features, and the words after them can attend to what was seen:

    <image> x P   look , a red ball ! <eos>        loss on the words and <eos> only

Parameter names follow Hugging Face's Llama (q, k, v and gate, up are each stacked into one), so
that such a checkpoint maps 1:1. No file, no argv, no print in here.
Letters: B batch, T sequence length, C model width, H heads, D head width, V vocabulary, N images,
P image tokens an image, E vision width.
"""
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels import attention, attention_weights, choose, rms_norm


@dataclass
class GPTConfig:
    vocab_size: int = 6000
    block_size: int = 1024  # the longest sequence, in tokens, image tokens included
    n_layer: int = 8
    n_head: int = 8
    n_kv_head: int = 0  # fewer than n_head: grouped queries; 0: as many
    n_embd: int = 256
    n_hidden: int = 0  # width of the SwiGLU MLP; 0: 8/3 of n_embd, rounded up to a multiple of 32
    dropout: float = 0.0
    rope_theta: float = 10000.0
    attention: str = "auto"  # backends, see kernels.py
    norm: str = "auto"

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_hidden = self.n_hidden or -(-8 * self.n_embd // 96) * 32
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd {self.n_embd} over n_head {self.n_head}: the head width must "
                             "be a whole, even number (rotary positions turn pairs)")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")


# ---------------------------------------------------------------------------------------------
# The language model


class RMSNorm(nn.Module):
    def __init__(self, width, backend):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.backend = backend

    def forward(self, x, residual=None):
        return rms_norm(x, self.weight, 1e-5, residual, self.backend)


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), halves paired as in Llama.

    x (B, T, H, D), cos and sin (T, 1, D / 2): each pair turns by its position's angle."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.n_head, config.n_kv_head
        self.width = config.n_embd // config.n_head
        self.dropout, self.backend = config.dropout, config.attention
        self.qkv_proj = nn.Linear(config.n_embd, (self.heads + 2 * self.kv_heads) * self.width,
                                  bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None, start=0, maps=None):
        B, T, C = x.shape
        heads = self.qkv_proj(x).view(B, T, self.heads + 2 * self.kv_heads, self.width)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)  # (B, T, H, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:  # (2, B, T_max, H_kv, D): write the new keys, read all so far
            cache[0, :, start:start + T], cache[1, :, start:start + T] = k, v
            k, v = cache[:, :, :start + T]
        if maps is not None:
            maps.append(attention_weights(q, k))
        y = attention(q, k, v, backend=self.backend)
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
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm)
        self.mlp = MLP(config)

    def forward(self, x, residual, *position):
        # x is what the layer before adds and residual the stream it adds to: carried apart, so
        # that adding and normalising are one operation. The first block has nothing to add to.
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x, *position), residual)
        return self.mlp(x), residual


class GPT(nn.Module):
    """tokens (B, T) or embeddings (B, T, C) -> hidden states (B, T, C); logits = head(hidden)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm)
        width = config.n_embd // config.n_head
        turns = config.rope_theta ** -(torch.arange(0, width, 2).float() / width)
        angles = torch.outer(torch.arange(config.block_size).float(), turns)[:, None]  # (T, 1, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # GPT-2's init: what adds to the stream starts smaller
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / ((2 * config.n_layer) ** 0.5 if adds else 1))

    def embed(self, tokens):
        x = self.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):  # then the whole stream is half precision:
            x = x.to(torch.get_autocast_dtype(x.device.type))  # norms are as fast as its bytes
        return F.dropout(x, self.config.dropout, self.training)

    def backends(self, dtype):
        """The (attention, norm) backends that will run on this device in `dtype`.

        Raises ValueError where one that was asked for cannot."""
        width = self.config.n_embd // self.config.n_head
        return (choose(self.config.attention, "sdpa", self.cos.new_empty(0, width, dtype=dtype)),
                choose(self.config.norm, "torch",
                       self.cos.new_empty(0, self.config.n_embd, dtype=dtype)))

    def forward(self, x, cache=None, start=0, maps=None):
        """x (B, T) ids or (B, T, C) embeddings; `start` is the position of the first one."""
        x = self.embed(x) if x.ndim == 2 else x
        if start + x.shape[1] > self.config.block_size:
            raise ValueError(f"{start + x.shape[1]} tokens, but block_size is "
                             f"{self.config.block_size}: shorten the text or raise block_size")
        cos, sin = (t[start:start + x.shape[1]] for t in (self.cos, self.sin))
        residual = None
        for i, layer in enumerate(self.layers):
            x, residual = layer(x, residual, cos, sin, None if cache is None else cache[i], start,
                                maps)
        return self.norm(x, residual)[0]

    def head(self, hidden):
        return F.linear(hidden, self.embed_tokens.weight)  # tied: (..., C) -> (..., V)


# ---------------------------------------------------------------------------------------------
# The projector and the whole


def Projector(kind, features, width):
    """LLaVA's projectors: "linear", "mlpNx_gelu" or "identity", from E = features to C = width.

    mlpNx_gelu is Linear(E, C), then N - 1 times [GELU, Linear(C, C)]: mlp2x_gelu is LLaVA-1.5's.
    Raises ValueError for another kind, or an identity between different widths."""
    if kind == "linear":
        return nn.Linear(features, width)
    if kind == "identity" and features == width:
        return nn.Identity()
    if depth := re.fullmatch(r"mlp([1-9])x_gelu", kind):
        layers = [nn.Linear(features, width)]
        for _ in range(int(depth[1]) - 1):
            layers += [nn.GELU(), nn.Linear(width, width)]
        return nn.Sequential(*layers)
    raise ValueError(f"no projector {kind!r} from width {features} to {width}: "
                     "linear, mlp2x_gelu, mlp3x_gelu ..., or identity between equal widths")


class BabyLLaVA(nn.Module):
    """A GPT and, if given, a projector. `image_token` is the placeholder's id."""

    def __init__(self, gpt, projector=None, image_token=None):
        super().__init__()
        self.gpt, self.projector, self.image_token = gpt, projector, image_token

    def embed(self, tokens, features=None):
        """Token embeddings with the placeholders overwritten, in order, by projected features.

        tokens (B, T), features (N, P, E) or None -> (B, T, C). The caller sees to it that there
        are exactly N * P placeholders (checking here would stall a GPU at each step)."""
        x = self.gpt.embed(tokens)
        if features is None:
            return x
        seen = self.projector(features.to(self.gpt.embed_tokens.weight.dtype)).flatten(0, 1)
        here = tokens == self.image_token
        order = here.flatten().cumsum(0).sub(1).clamp(min=0).view_as(tokens)  # which row of `seen`
        return torch.where(here[..., None], seen[order].to(x.dtype), x)

    def forward(self, tokens, targets=None, features=None):
        """(logits (B, T, V), mean loss over the targets that are not -100, or None)."""
        logits = self.gpt.head(self.gpt(self.embed(tokens, features)))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                       ignore_index=-100)

    @torch.no_grad()
    def generate(self, tokens, features=None, max_new_tokens=50, temperature=0.0, top_k=0,
                 stop=None, generator=None):
        """Yield the next token of each row, (B,), until all rows have said `stop` or had enough.

        tokens (B, T) begins the text; features fill its placeholders. temperature 0 is greedy;
        top_k keeps the k likeliest, 0 all. A row that has stopped goes on yielding `stop`.
        Keys and values are cached: after the prompt each step costs one position.
        Raises ValueError when placeholders and features do not match or the prompt is empty."""
        slots = int((tokens == self.image_token).sum()) if self.image_token is not None else 0
        given = 0 if features is None else features.shape[0] * features.shape[1]
        if slots != given or not tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens with {slots} image placeholders for "
                             f"{given} image features: they must match, and the text not be empty")
        config = self.gpt.config
        room = min(config.block_size, tokens.shape[1] + max_new_tokens)
        x, start = self.embed(tokens, features), 0
        cache = x.new_zeros(config.n_layer, 2, len(x), room, config.n_kv_head,
                            config.n_embd // config.n_head)
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(room - tokens.shape[1]):
            logits = self.gpt.head(self.gpt(x, cache, start)[:, -1]).float()  # (B, V)
            if top_k:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, float("-inf"))
            if temperature:
                chances = (logits / temperature).softmax(-1)
                token = torch.multinomial(chances, 1, generator=generator)[:, 0]
            else:
                token = logits.argmax(-1)
            if stop is not None:
                token = token.masked_fill(done, stop)
                done |= token == stop
            yield token
            if done.all():
                return
            start += x.shape[1]
            x = self.gpt.embed(token[:, None])

    @torch.no_grad()
    def look(self, tokens, features):
        """What each position attends to, mean over layers and heads: (B, T, T), rows sum to 1."""
        maps = []
        self.gpt(self.embed(tokens, features), maps=maps)
        return torch.stack(maps).mean((0, 2))
