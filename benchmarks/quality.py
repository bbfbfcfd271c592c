"""
Our phase 0 beside BabyLLaVA's own language model, on the same tokens for the same wall-clock time.

    pip install transformers
    python benchmarks/quality.py --data data/childes --minutes 8 --zorro DIR

Theirs is transformers' GPT2LMHeadModel with BabyLLaVA's settings: 8 layers, width 256, 32 heads,
MLP 1024, dropout 0.15, 8 rows of 2048 tokens a step, lr 5e-4, AdamW (0.9, 0.95), decay 0.1, clip 1,
cosine with 3 % warm-up. Such a step is long on a CPU, so a third run gives the same GPT-2 our rows,
rate and dropout: what is left of the difference is the model's. Ours is the GPT of model.py at the
same depth and width, with train.py's optimizer. All take turns, step by step, so that whatever
else the machine does slows all alike; each one's learning rate falls to 0 as its own share of the
time runs out. All are scored by eval.py.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import checkpoint
import config
import eval as evaluation
import watch
from batches import TextBatches
from config import knob
from data import Data
from model import GPT, BabyLLaVA, GPTConfig


@dataclasses.dataclass
class Config(config.Knobs):
    data: str = "data/childes"  # a folder that `data.py pairs --text FILE` wrote
    minutes: float = knob(8.0, low=0.01, high=10000.0)  # of training, each
    zorro: str = ""  # a folder of Zorro's .txt files; empty: bits per character alone
    rows: int = knob(8, low=1, high=4096)  # ours: rows a step ...
    length: int = knob(256, low=2, high=1 << 20)  # ... of this many tokens
    lr: float = knob(2e-3, low=0.0)  # ours, at its highest
    dropout: float = knob(0.1, low=0.0, high=0.9)  # ours
    seed: int = knob(1, low=0, high=2**32 - 1)  # of weights and order
    device: str = ""  # cpu or cuda; empty: cuda where there is one


class Peer(torch.nn.Module):
    """GPT2LMHeadModel, called as eval.py calls a BabyLLaVA."""

    def __init__(self, vocab_size, length, dropout):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=length,
            n_embd=256,
            n_layer=8,
            n_head=32,
            n_inner=1024,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.net = GPT2LMHeadModel(config)
        self.length = length

    @property
    def gpt(self):
        """What eval.py asks a GPT for."""
        return SimpleNamespace(
            device=next(self.net.parameters()).device,
            config=SimpleNamespace(block_size=self.length),
        )

    def inputs(self, batch, image_format, seed, step):
        return batch.to(self.gpt.device, image_format)

    def forward(self, tokens, targets=None, positions=None, images=None, tiles=None, first=0):
        """As BabyLLaVA.forward, of words alone."""
        logits = self.net(tokens).logits.flatten(0, 1)
        if positions is not None:
            logits = logits[positions]
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=-100)
        return logits, loss


def training(net, batches, rows, lr, piece, seconds, device):
    """A generator: each next() is one step, its rows `piece` at a time to save memory; yields the
    seconds spent and tokens seen so far."""
    learning = list(net.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in learning if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    spent, step = 0.0, 0
    while spent < seconds:
        clock = time.perf_counter()
        done = spent / seconds
        rate = (
            min((step + 1) / 10, done / 0.03)
            if done < 0.03
            else 0.5 + 0.5 * math.cos(math.pi * (done - 0.03) / 0.97)
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * max(rate, 1e-3)
        batch = batches.read(*batches.plan(step))
        tokens, targets = (
            torch.as_tensor(part, device=device).view(rows, -1)
            for part in (batch.tokens, batch.targets)
        )
        for x, y in zip(tokens.split(piece), targets.split(piece)):
            (net(x, y)[1] * piece / rows).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        step += 1
        spent += time.perf_counter() - clock
        yield spent, step * rows * batches.T


def main(argv):
    settings = config.load(Config, argv, __doc__)
    dataset, device = Data(settings.data), checkpoint.choose_device(settings.device)
    vocabulary, seconds = dataset.meta["vocab_size"], 60 * settings.minutes
    torch.manual_seed(settings.seed)
    ours = BabyLLaVA(
        GPT(GPTConfig(vocabulary, settings.length, 8, 8, n_embd=256, dropout=settings.dropout))
    )
    nets = {
        "ours": (ours, settings.length, settings.rows, settings.lr, settings.rows),
        "GPT-2, BabyLLaVA's settings": (Peer(vocabulary, 2048, 0.15), 2048, 8, 5e-4, 1),
        "GPT-2, our rows and rate": (
            Peer(vocabulary, settings.length, settings.dropout),
            settings.length,
            settings.rows,
            settings.lr,
            settings.rows,
        ),
    }
    runs, spent = {}, {}
    for name, (net, _, rows, lr, piece) in nets.items():
        net.to(device).train()
        batches = TextBatches(dataset, "train", rows, settings.seed, net)
        runs[name] = training(net, batches, rows, lr, piece, seconds, device)
        spent[name] = (0.0, 0)
    told = 0.0
    while min(spent.values())[0] < seconds:
        name = min(spent, key=lambda name: spent[name][0])
        spent[name] = next(runs[name])
        if min(spent.values())[0] - told > 60:
            told = min(spent.values())[0]
            print(f"{told / 60:.1f} of {settings.minutes:g} minutes each", file=sys.stderr)
    counts = dataset.meta["splits"]["val"]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}\n\n| model | "
        "parameters | tokens seen | minutes | bits per character | Zorro |\n" + "|---" * 6 + "|"
    )
    for name, (net, *_) in nets.items():
        net.eval()
        with torch.no_grad():
            batches = TextBatches(dataset, "val", 1, 0, net)
            loss = watch.val_loss(net, batches, dataset.image_format)
        bits = loss / math.log(2) * counts["text"] / counts["characters"]
        grammar = "-"
        if settings.zorro:
            loaded = SimpleNamespace(model=net, tokenizer=dataset.tokenizer, device=device)
            grammar = (
                f"{evaluation.zorro(settings.zorro, loaded, 256)['all']['accuracy']['score']:.3f}"
            )
        print(
            f"| {name} | {sum(p.numel() for p in net.parameters()):,} | {spent[name][1]:,} | "
            f"{spent[name][0] / 60:.1f} | {bits:.3f} | {grammar} |",
            flush=True,
        )


if __name__ == "__main__":
    config.run(main)
