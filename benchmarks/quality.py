"""
Our phase 0 beside transformers' language models, on the same tokens for the same wall-clock time.

    pip install transformers
    python benchmarks/quality.py --data data/childes --minutes 10 --seeds 1 2 3

All have 8 layers of 256 in 8 heads and a tied head, and see the same rows at the same learning
rates, without dropout (in these minutes nobody sees a row twice): transformers' LlamaForCausalLM,
whose architecture is ours, and its GPT2LMHeadModel. A fourth, --models babyllava, is the latter
with BabyLLaVA's own settings: 32 heads, dropout 0.15, 8 rows of 2,048 tokens a step at 5e-4, which
are made for a GPU. A fifth, --models muon, is ours with Muon for its matrices. AdamW (0.9, 0.95),
decay 0.1, clipping at 1, a cosine after 3 % of warm-up.

All take turns, step by step, so that whatever else the machine does slows all alike; each one's
learning rate falls to 0 as its own share of the time runs out. All are scored by eval.py.
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
import train
from batches import TextBatches
from config import option
from data import Data
from fast.memory import keep_memory
from model import GPT, BabyLLaVA, GPTConfig
from training import validation
from training.optimizer import make_optimizers

NAMES = {
    "ours": "ours",
    "muon": "ours, by Muon",
    "llama": "Llama",
    "gpt2": "GPT-2",
    "babyllava": "GPT-2, BabyLLaVA's settings",
}


@dataclasses.dataclass
class Config(config.Options):
    data: str = "data/childes"  # a folder that `data.py pairs --text FILE` wrote
    models: tuple[str, ...] = option(("ours", "llama", "gpt2"), choices=tuple(NAMES))
    minutes: float = option(10.0, low=0.01, high=10000.0)  # of training, each
    seeds: tuple[int, ...] = (1,)  # of weights and order; one after the other
    zorro: str = ""  # a folder of Zorro's .txt files; empty: bits per character alone
    rows: int = option(8, low=1, high=4096)  # a step ...
    length: int = option(256, low=2, high=1 << 20)  # ... of this many tokens
    lr: float = option(2e-3, low=0.0)  # at its highest
    muon_rate: float = option(2.0, low=0.0)  # Muon's learning rate, in lr
    device: str = ""  # cpu or cuda; empty: cuda where there is one


def language_model(kind, vocab_size, length):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "llama":
        sizes = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=704,  # as ours
            num_hidden_layers=8,
            num_attention_heads=8,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(sizes)
    dropout = 0.15 if kind == "babyllava" else 0.0
    sizes = GPT2Config(
        vocab_size=vocab_size,
        n_positions=length,
        n_embd=256,
        n_layer=8,
        n_head=32 if kind == "babyllava" else 8,
        n_inner=1024,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(sizes)


class Peer(torch.nn.Module):
    """A language model of transformers, called as eval.py calls a BabyLLaVA."""

    def __init__(self, kind, vocab_size, length):
        super().__init__()
        self.net, self.length = language_model(kind, vocab_size, length), length

    @property
    def gpt(self):
        """What eval.py asks a GPT for."""
        return SimpleNamespace(
            device=next(self.net.parameters()).device,
            config=SimpleNamespace(block_size=self.length),
            head=lambda hidden: hidden,
        )

    def hidden_states(self, tokens, image_embeds=None, positions=None, first=0):
        """Its logits, which head() leaves as they are."""
        return self(tokens, positions=positions)[0]

    def inputs(self, batch, image_format, seed, step):
        return batch.to(self.gpt.device, image_format)

    def forward(self, tokens, targets=None, positions=None, images=None, tiles=None, first=0):
        """As BabyLLaVA.forward, of words alone."""
        logits = self.net(tokens, use_cache=False).logits.flatten(0, 1)
        if positions is not None:
            logits = logits[positions]
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=-100)
        return logits, loss


def make(kind, vocab_size, settings, seed):
    """(model, rows a step, learning rate, rows at a time) of one of NAMES."""
    torch.manual_seed(seed)
    if kind == "babyllava":
        return Peer(kind, vocab_size, 2048), 8, 5e-4, 1
    if kind in ("ours", "muon"):
        net = BabyLLaVA(GPT(GPTConfig(vocab_size, settings.length, 8, 8, n_embd=256)))
    else:
        net = Peer(kind, vocab_size, settings.length)
    return net, settings.rows, settings.lr, settings.rows


def training(net, batches, optimizers, rows, piece, seconds, device):
    """A generator: each next() is one step, its rows `piece` at a time to save memory; yields the
    seconds spent and tokens seen so far."""
    spent, step = 0.0, 0
    while spent < seconds:
        clock = time.perf_counter()
        done = spent / seconds
        if done < 0.03:
            rate = min((step + 1) / 10, done / 0.03)
        else:
            rate = 0.5 + 0.5 * math.cos(math.pi * (done - 0.03) / 0.97)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest_lr"] * max(rate, 1e-3)
        batch = batches.read(batches.plan(step))
        tokens, targets = (
            torch.as_tensor(part, device=device).view(rows, -1)
            for part in (batch.tokens, batch.targets)
        )
        for x, y in zip(tokens.split(piece), targets.split(piece)):
            (net(x, y)[1] * piece / rows).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        step += 1
        spent += time.perf_counter() - clock
        yield spent, step * rows * batches.T


def train_all(settings, seed, dataset, device):
    """{kind: (trained model, (seconds, tokens))} of a seed, all by turns for the same time."""
    nets, runs, spent = {}, {}, {}
    seconds, told = 60 * settings.minutes, 0.0
    for kind in settings.models:
        nets[kind], rows, lr, piece = make(kind, dataset.meta["vocab_size"], settings, seed)
        nets[kind].to(device).train()
        batches = TextBatches(dataset, "train", rows, seed, nets[kind])
        name = "muon" if kind == "muon" else "adamw"
        options = train.Config(
            optimizer=name, muon_rate=settings.muon_rate, weight_decay=0.1, beta2=0.95
        )
        groups = [(dict(nets[kind].named_parameters()), lr)]
        optimizers = make_optimizers(options, groups, device)
        runs[kind] = training(nets[kind], batches, optimizers, rows, piece, seconds, device)
        spent[kind] = (0.0, 0)
    while min(spent.values())[0] < seconds:
        kind = min(spent, key=lambda kind: spent[kind][0])
        spent[kind] = next(runs[kind])
        if min(spent.values())[0] - told > 60:
            told = min(spent.values())[0]
            print(f"{told / 60:.1f} of {settings.minutes:g} minutes each", file=sys.stderr)
    return {kind: (net.eval(), spent[kind]) for kind, net in nets.items()}


@torch.no_grad()
def score(net, settings, dataset, device):
    """(bits per character of the validation part, Zorro's accuracy or "-")."""
    counts = dataset.meta["splits"]["val"]
    loss = validation.val_loss(net, TextBatches(dataset, "val", 1, 0, net), dataset.image_format)
    bits = loss / math.log(2) * counts["text"] / counts["characters"]
    if not settings.zorro:
        return bits, "-"
    loaded = SimpleNamespace(model=net, tokenizer=dataset.tokenizer, device=device)
    grammar = evaluation.zorro(settings.zorro, loaded, 256)["all"]["accuracy"]["score"]
    return bits, f"{grammar:.3f}"


def main(argv):
    settings = config.load(Config, argv, __doc__)
    dataset, device = Data(settings.data), checkpoint.choose_device(settings.device)
    if device.type == "cpu":
        keep_memory()  # as train.py does; here it serves all alike
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}\n\n| model | seed "
        "| parameters | tokens seen | minutes | bits per character | Zorro |\n" + "|---" * 7 + "|"
    )
    for seed in settings.seeds:
        for kind, (net, (seconds, tokens)) in train_all(settings, seed, dataset, device).items():
            bits, grammar = score(net, settings, dataset, device)
            size = sum(p.numel() for p in net.parameters())
            print(
                f"| {NAMES[kind]} | {seed} | {size:,} | {tokens:,} | {seconds / 60:.1f} | "
                f"{bits:.3f} | {grammar} |",
                flush=True,
            )


if __name__ == "__main__":
    config.run(main)
