"""
Another projector, as an example of how to add one: a resampler (Alayrac et al. 2022, arXiv
2204.14198), in its smallest form. Learnt queries look at all features of a picture, so it has as
many image tokens as queries, whatever the tower gives.

Importing this file adds `--projector resampler16`: sixteen queries. It needs `--image_pool 1`.
Letters: N images, F features of each, E vision width, C GPT width, Q queries.
"""

import torch
import torch.nn.functional as F
from torch import nn

import model


class Resampler(nn.Module):
    keeps_grid = False

    def __init__(self, kind, width_in, width_out):
        super().__init__()
        self.queries = nn.Parameter(
            0.02 * torch.randn(int(kind.removeprefix("resampler")), width_out)
        )
        self.key_value = nn.Linear(width_in, 2 * width_out)
        self.out = nn.Linear(width_out, width_out)
        self.heads = 4

    def num_tokens(self, features):
        return len(self.queries)

    def forward(self, features):
        """(N, F, E) -> (N, Q, C)."""
        N, C = len(features), self.queries.shape[1]
        q = self.queries.expand(N, -1, -1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.key_value(features).view(N, -1, 2, self.heads, C // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


model.PROJECTORS["resampler[1-9][0-9]*"] = Resampler
