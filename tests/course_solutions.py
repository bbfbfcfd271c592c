"""
A right solution of each exercise of the course, and four or more typical wrong ones: the right one
with one thing replaced. tests/test_course.py runs the checks on all of them.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

SOLUTIONS = {}  # {name: (function, [(old, new)])}


def wrong(*replacements):
    """A decorator: a right solution, and how to make it wrong."""

    def add(function):
        name = getattr(function, "fn", function).__name__
        SOLUTIONS[name] = function, replacements
        return function

    return add


# ---------------------------------------------------------------------------------------------
# Chapter 0


@wrong(
    ("for line in lines", "for line in set(lines)"),
    ("if any(c.isalpha() for c in word)", ""),
    ('line.split(" ")', "line.replace(\"'s\", '').split(' ')"),
    ("counts.get(word, 0) + 1", "1"),
    ("any(c.isalpha() for c in word)", "word.isalpha()"),
)
def count_words(lines):
    counts = {}
    for line in lines[:2] + lines[2:]:
        for word in (word for word in line.split(" ") if any(c.isalpha() for c in word)):
            counts[word] = counts.get(word, 0) + 1
    return counts


@wrong(
    ("caption.split()", "caption"),
    ("/ len(captions)", "/ max(1, sum(map(len, things)))"),
    ("if not captions", "if False"),
    ("any(", "all("),
    ("any(name in words for name in own)", "sum(name in words for name in own)"),
)
def share_that_names(captions, things):
    if not captions:
        return 0.0
    hits = 0
    for caption, own in zip(captions, things):
        words = caption.split()
        hits += any(name in words for name in own)
    return hits / len(captions)


@wrong(
    ("numbers != i", "numbers == numbers"),
    ("(clips == clips[i]) & (numbers != i)", "abs(numbers - i) == 1"),
    ("numbers != i", "numbers > i"),
    ("np.flatnonzero(", "np.flatnonzero(~("),
    ("clips[i])", "i)"),
)
def other_frames(clips):
    numbers = np.arange(len(clips))
    return [np.flatnonzero((clips == clips[i]) & (numbers != i)) for i in range(len(clips))]


@wrong(
    ("zip(words, words[1:])", "itertools.combinations(words, 2)"),
    ("zip(words, words[1:])", "zip(words[1:], words)"),
    ("(colour, thing) in held_out", "thing in {t for _, t in held_out}"),
    ("any((", "all(("),
    ("line.split()", "line.replace('predred', 'red').split()"),
    ("line.split()", "line.replace('stars', 'star').split()"),
)
def leaks(training, held_out):
    found = []
    for i, line in enumerate(training):
        words = line.split()
        if any((colour, thing) in held_out for colour, thing in zip(words, words[1:])):
            found.append(i)
    return found


# ---------------------------------------------------------------------------------------------
# Chapter 1


@wrong(
    ("+ n", "+ 1"),
    ("zip(word, word[1:])", "zip(word[::2], word[1::2])"),
    ("zip(word, word[1:])", "set(zip(word, word[1:]))"),
    ("zip(word, word[1:])", "(tuple(sorted(p)) for p in zip(word, word[1:]))"),
    ("zip(word, word[1:])", "zip(word, word[2:])"),
)
def count_pairs(words):
    found = {}
    for word, n in words.items():
        for pair in zip(word, word[1:]):
            found[pair] = found.get(pair, 0) + n
    return found


@wrong(
    ("i += 2", "i += 1"),
    ("== pair", "== (2, 2)"),
    ("(word[i], word[i + 1])", "tuple(sorted((word[i], word[i + 1])))"),
    ("i + 1 < len(word)", "i + 2 < len(word)"),
    ("out.append(new)", "out += [new, new]"),
)
def merge(word, pair, new):
    out, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


@wrong(
    ("key=lambda pair: (-seen[pair], pair)", "key=lambda pair: (-seen[pair], [-x for x in pair])"),
    ("+ n", "+ 1"),
    ("256 + step", "257 + step"),
    ("default=0) < 2", "default=0) < 1"),
    ("i += 2", "i += 1"),
    ("min(seen", "max(seen"),
)
def train_bpe(counts, merges):
    words, found = {tuple(word): n for word, n in counts.items()}, []
    for step in range(merges):
        seen = {}
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                seen[pair] = seen.get(pair, 0) + n
        if max(seen.values(), default=0) < 2:
            break
        best = min(seen, key=lambda pair: (-seen[pair], pair))
        found.append(best)
        merged = {}
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    out.append(256 + step)
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            merged[tuple(out)] = n
        words = merged
    return found


@wrong(
    ("/ math.log(2)", ""),
    ("/ characters", "/ len(nll)"),
    ("nll.sum()", "nll.mean()"),
    ("/ math.log(2)", "* math.log(2)"),
)
def bits_per_character(nll, characters):
    return float(nll.sum() / math.log(2) / characters)


@wrong(
    ("logits.logsumexp(-1)", "logits.exp().sum(-1).log()"),
    ("logits.logsumexp(-1)", "logits.logsumexp(0)[: len(targets)].sum()"),
    (".clamp(min=1)", ""),
    ("kept.sum()", "torch.tensor(len(targets))"),
    ("(lost - right)[kept]", "(lost - right)"),
)
def cross_entropy(logits, targets):
    kept = targets != -100
    lost = logits.logsumexp(-1)
    right = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return (lost - right)[kept].sum() / kept.sum().clamp(min=1)


@wrong(
    ("/ D**0.5", ""),
    ("softmax(-1)", "softmax(0)"),
    ("j <= i", "j < i"),
    ("| (j < prefix)", ""),
    ('float("-inf")', "0.0"),
    ("j <= i", "j >= i"),
)
def causal_attention(q, k, v, prefix=0):
    T, D = q.shape
    i, j = torch.arange(T)[:, None], torch.arange(T)
    scores = q @ k.T / D**0.5
    return scores.masked_fill(~((j <= i) | (j < prefix)), float("-inf")).softmax(-1) @ v


@wrong(
    ("x[:, : D // 2], x[:, D // 2 :]", "x[:, ::2], x[:, 1::2]"),
    ("torch.arange(T)", "torch.arange(1, T + 1)"),
    ("-2 * torch", "-torch"),
    ("b * cos + a * sin", "b * cos - a * sin"),
    ("base **", "10000.0 **"),
)
def rotate(x, base=10000.0):
    T, D = x.shape
    angles = torch.arange(T)[:, None] * base ** (-2 * torch.arange(D // 2) / D)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[:, : D // 2], x[:, D // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# ---------------------------------------------------------------------------------------------
# Chapter 2


@wrong(
    ("permute(1, 3, 0, 2, 4)", "permute(3, 1, 0, 2, 4)"),
    ("permute(1, 3, 0, 2, 4)", "permute(1, 3, 2, 4, 0)"),
    ("permute(1, 3, 0, 2, 4)", "permute(1, 3, 0, 4, 2)"),
    ("view(3, n, side, n, side).permute(1, 3, 0, 2, 4)", "view(n, n, 3, side, side)"),
)
def patches(image, side):
    n = image.shape[-1] // side
    return image.view(3, n, side, n, side).permute(1, 3, 0, 2, 4).reshape(n * n, -1)


@wrong(
    (" + bias", ""),
    ("weight.flatten(1)", "weight.permute(0, 2, 3, 1).flatten(1)"),
    ("weight.flatten(1)", "weight.mT.flatten(1)"),
    ("weight.flatten(1).T", "weight.flatten(1).flip(1).T"),
)
def embed_patches(flat, weight, bias):
    return flat @ weight.flatten(1).T + bias


@wrong(
    (".detach()", ""),
    ("(teacher - centre)", "teacher"),
    ("student / student_temperature", "(student - centre) / student_temperature"),
    ("log_softmax(-1)", "softmax(-1).log()"),
    ("sum(-1).mean()", "mean()"),
    ("/ teacher_temperature", "/ student_temperature"),
)
def dino_loss(student, teacher, centre, student_temperature, teacher_temperature):
    p = ((teacher - centre) / teacher_temperature).softmax(-1).detach()
    return -(p * (student / student_temperature).log_softmax(-1)).sum(-1).mean()


@wrong(
    (
        "t.mul_(momentum).add_(s, alpha=1 - momentum)",
        "t.mul_(1 - momentum).add_(s, alpha=momentum)",
    ),
    ("t.mul_(momentum).add_(s, alpha=1 - momentum)", "t = momentum * t + (1 - momentum) * s"),
    (
        "t.mul_(momentum).add_(s, alpha=1 - momentum)",
        "s.mul_(1 - momentum).add_(t, alpha=momentum)",
    ),
    ("t.mul_(momentum).add_(s, alpha=1 - momentum)", "t.copy_(s)"),
    ("with torch.no_grad():", "if True:"),
)
def follow(teacher, student, momentum):
    with torch.no_grad():
        for t, s in zip(teacher, student):
            t.mul_(momentum).add_(s, alpha=1 - momentum)


@wrong(
    ("-torch.special.entr(p.mean(0)).sum()", "-torch.special.entr(p).mean(0).sum()"),
    ("softmax(-1)", "softmax(0)"),
    ("-torch.special.entr(p).sum(-1).mean()", "-(p * p.log()).sum(-1).mean()"),
    ("return float(-a), float(-b)", "return float(-b), float(-a)"),
    ("return float(-a), float(-b)", "return float(-a) / math.log(2), float(-b) / math.log(2)"),
)
def entropies(logits):
    p = logits.double().softmax(-1)
    a, b = -torch.special.entr(p.mean(0)).sum(), -torch.special.entr(p).sum(-1).mean()
    return float(-a), float(-b)


@wrong(
    ("/ features[:split].std(0)", ""),
    ("torch.cat([x, torch.ones(len(x), 1).double()], 1)", "x"),
    ("(x[split:] @ W).argmax(1) == labels[split:]", "(x[:split] @ W).argmax(1) == labels[:split]"),
    ("argmax(1)", "argmin(1)"),
    ("X.T @ Y", "X.T @ Y.flip(1)"),
)
def linear_probe(features, labels, split, decay):
    x = (features - features[:split].mean(0)) / features[:split].std(0)
    x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    X, Y = x[:split], F.one_hot(labels).double()[:split]
    W = torch.linalg.solve(X.T @ X + decay * split * torch.eye(X.shape[1]).double(), X.T @ Y)
    return float(((x[split:] @ W).argmax(1) == labels[split:]).double().mean())


# ---------------------------------------------------------------------------------------------
# Chapter 3


@wrong(
    ("= image_embeds", "= image_embeds[:1]"),
    ("tokens == image_token", "torch.arange(len(tokens)) < len(image_embeds)"),
    ("= image_embeds", "+= image_embeds"),
    ("= image_embeds", "= image_embeds.flip(0)"),
    ("table[tokens].clone()", "table[:len(tokens)]"),
)
def mix(tokens, image_token, table, image_embeds):
    x = table[tokens].clone()
    x[tokens == image_token] = image_embeds
    return x


@wrong(
    ("F.gelu(features", "F.relu(features"),
    ("@ first[0].T + first[1])", "@ first[0].T + first[1], approximate='tanh')"),
    ("F.gelu(features @ first[0].T + first[1])", "(features @ first[0].T + first[1])"),
    (" + second[1]", ""),
)
def project(features, first, second):
    hidden = F.gelu(features @ first[0].T + first[1])
    return hidden @ second[0].T + second[1]


@wrong(
    ("mean((1, 3))", "amax((1, 3))"),
    ("mean((1, 3))", "sum((1, 3))"),
    ("view(n, window, n, window, -1).mean((1, 3))", "view(n * n, window * window, -1).mean(1)"),
    ("mean((1, 3)).view", "mean((1, 3)).transpose(0, 1).reshape"),
    ("mean((1, 3))", "select(3, 0).select(1, 0)"),
)
def pool(projected, window):
    n = math.isqrt(len(projected)) // window
    return projected.view(n, window, n, window, -1).mean((1, 3)).view(n * n, -1)


@wrong(
    ("tokens.count(image_token) != len(counts)", "False"),
    ("left.pop(0)", "left[0]"),
    ("left.pop(0)", "left.pop()"),
    ("[token] * left.pop(0)", "[token] * (left.pop(0) + 1)"),
    ("!= len(counts)", "> len(counts)"),
)
def insert_placeholders(tokens, image_token, counts):
    if tokens.count(image_token) != len(counts):
        raise ValueError("a wrong number of placeholders")
    out, left = [], list(counts)
    for token in tokens:
        out += [token] * left.pop(0) if token == image_token else [token]
    return out


# ---------------------------------------------------------------------------------------------
# Chapter 4


@wrong(
    ("loss_mask[i + 1]", "loss_mask[i]"),
    ("tokens[i + 1]", "tokens[i]"),
    ("out.append(-100)", "out.append(tokens[0])"),
    ("else -100", "else 0"),
    ("range(len(tokens) - 1)", "range(len(tokens) - 2)"),
)
def targets_of(tokens, loss_mask):
    out = [tokens[i + 1] if loss_mask[i + 1] else -100 for i in range(len(tokens) - 1)]
    out.append(-100)
    return out


@wrong(
    ("(step + 1) / warm", "step / warm"),
    ("max(1, int(warmup * steps))", "int(warmup * steps) + 1"),
    ("(step - warm)", "step"),
    ("math.pi * ", "2 * math.pi * "),
    ("(1 + math.cos", "(1 - math.cos"),
)
def learning_rate(step, steps, warmup):
    warm = max(1, int(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2


@wrong(
    ("min(1.0, largest / norm)", "largest / norm"),
    ("sum(float((g**2).sum()) for g in gradients)", "max(float((g**2).sum()) for g in gradients)"),
    ("math.sqrt(", "float("),
    ("g.mul_(", "g.mul("),
    ("return norm", "return norm * min(1.0, largest / norm)"),
)
def clip(gradients, largest):
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    for g in gradients:
        g.mul_(min(1.0, largest / norm))
    return norm


@wrong(
    ("gradient**2", "gradient"),
    ("/ (1 - betas[0] ** t)", ""),
    ("parameter * (1 - lr * weight_decay)", "parameter * (1 - weight_decay)"),
    ('state["t"] = t = state["t"] + 1', "t = 1"),
    ("v.sqrt() + eps", "(v + eps)"),
    ("parameter * (1 - lr * weight_decay)", "parameter.mul_(1 - lr * weight_decay)"),
)
def adamw(parameter, gradient, state, lr, betas, eps, weight_decay):
    if not state:
        state.update(m=torch.zeros_like(parameter), v=torch.zeros_like(parameter), t=0)
    state["t"] = t = state["t"] + 1
    state["m"] = betas[0] * state["m"] + (1 - betas[0]) * gradient
    state["v"] = betas[1] * state["v"] + (1 - betas[1]) * gradient**2
    m, v = state["m"] / (1 - betas[0] ** t), state["v"] / (1 - betas[1] ** t)
    return parameter * (1 - lr * weight_decay) - lr * m / (v.sqrt() + eps)


@wrong(
    ("range(5)", "range(4)"),
    ("x = x / x.norm()", "x = x / x.abs().max()"),
    ("A @ A", "A"),
    ("return x.T if tall else x", "return x"),
    ("-4.7750", "4.7750"),
    ("x = x / x.norm()", "x = x / torch.linalg.matrix_norm(x, 2)"),
)
def orthogonalise(matrix):
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm()
    for _ in range(5):
        A = x @ x.T
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x.T if tall else x


# ---------------------------------------------------------------------------------------------
# Chapter 5


@wrong(
    ("logits[first - 1 : -1]", "logits[first:]"),
    (".mean()", ".sum()"),
    ("log_softmax(-1)", "log_softmax(0)"),
    ("-logits", "logits"),
    ("logits[first - 1 : -1]", "logits[:-1][: len(tokens) - first]"),
)
def score(logits, tokens, first):
    p = -logits[first - 1 : -1].log_softmax(-1)
    return p.gather(-1, tokens[first:, None]).mean()


@wrong(
    ("/ scores.count(min(scores))", ""),
    ("min(scores)", "max(scores)"),
    ("scores[right] == min(scores)", "scores.index(min(scores)) == right"),
    ("scores[right] == min(scores)", "sorted(scores)[1] > scores[right]"),
)
def hit(scores, right):
    return float(scores[right] == min(scores)) / scores.count(min(scores))


@wrong(
    ("/ (1 + z * z / n)", ""),
    ("z * z / (4 * n * n)", "z * z / (4 * n)"),
    ("p + z * z / (2 * n)", "p"),
    ("z = 1.96", "z = 1.645"),
    ("p * (1 - p) / n + z * z / (4 * n * n)", "p * (1 - p) / n"),
)
def wilson_interval(hits, n):
    z = 1.96
    p = hits / n
    middle = p + z * z / (2 * n)
    width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)


@wrong(
    ("(a < b) & (d < c) & ", ""),
    ("& (a < c) & (d < b)", ""),
    ("(a < b)", "(a <= b)"),
    ("(a < c)", "(a <= c)"),
    ("<", ">"),
)
def winoground_group(nll):
    a, b, c, d = nll.flatten(1).T
    return float(((a < b) & (d < c) & (a < c) & (d < b)).double().mean())


@wrong(
    ("(2.5, 97.5)", "(5, 95)"),
    ("after - before", "before - after"),
    ("differences[rows].mean(1)", "np.sort(differences)[rows[:, 0]]"),
    ("differences[rows].mean(1)", "after[rows].mean(1) - before[rows[::-1]].mean(1)"),
    ("RandomState(seed)", "RandomState(seed + 1)"),
)
def bootstrap_difference(before, after, samples, seed):
    differences = after - before
    n = len(differences)
    rows = np.random.RandomState(seed).randint(0, n, (samples, n))
    low, high = np.percentile(differences[rows].mean(1), (2.5, 97.5))
    return differences.mean(), low, high


# ---------------------------------------------------------------------------------------------
# Chapter 6


@wrong(
    ("l * (m - new).exp()", "l"),
    ("torch.maximum(m, part.max())", "part.max()"),
    ('float("-inf")', "0.0"),
    ("(part - new).exp()", "(part - m).exp()"),
    ("range(0, len(x), block)", "range(0, len(x) // block * block, block)"),
)
def online_softmax(x, block):
    m, l = torch.tensor(float("-inf")), torch.tensor(0.0)
    for start in range(0, len(x), block):
        part = x[start : start + block]
        new = torch.maximum(m, part.max())
        l = l * (m - new).exp() + (part - new).exp().sum()
        m = new
    return m, l


@wrong(
    ('other=float("-inf")', "other=0.0"),
    (", mask=inside)\n", ")\n"),
    ("x - tl.max(x, 0)", "x"),
    ("row * columns", "row * BLOCK"),
    ("tl.sum(e, 0)", "tl.max(e, 0)"),
)
@triton.jit
def softmax_kernel(X, Y, columns, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(X + row * columns + at, mask=inside, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(Y + row * columns + at, e / tl.sum(e, 0), mask=inside)


@wrong(
    ("/ columns", "/ BLOCK"),
    (", mask=inside)\n", ")\n"),
    ("+ eps", ""),
    ("row * columns", "row * BLOCK"),
    ("x * w", "x"),
)
@triton.jit
def rms_norm_kernel(X, W, Y, columns, eps, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(X + row * columns + at, mask=inside, other=0.0)
    w = tl.load(W + at, mask=inside, other=0.0)
    y = x * w * tl.rsqrt(tl.sum(x * x, 0) / columns + eps)
    tl.store(Y + row * columns + at, y, mask=inside)


@wrong(
    ("a * shrink", "a"),
    ("l * shrink", "l"),
    ("/ D**0.5", ""),
    ("min(start + block, i + 1)", "start + block"),
    ("return torch.stack(rows)", "return torch.stack(rows) / 2"),
    ("range(0, i + 1, block)", "range(0, i + 1 - block, block)"),
)
def tiled_attention(q, k, v, block):
    T, D = q.shape
    rows = []
    for i in range(T):
        m, l, a = torch.tensor(float("-inf")), torch.tensor(0.0), torch.zeros(D)
        for start in range(0, i + 1, block):
            keys = slice(start, min(start + block, i + 1))
            s = k[keys] @ q[i] / D**0.5
            new = torch.maximum(m, s.max())
            shrink, p = (m - new).exp(), (s - new).exp()
            l, a, m = l * shrink + p.sum(), a * shrink + p @ v[keys], new
        rows.append(a / l)
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------
# Chapter 7


@wrong(
    ("min(int(width * scale) * int(height * scale), width * height)",
     "int(width * scale) * int(height * scale)"),
    ("scale = min(", "scale = max("),
    ("kept - canvas[0] * canvas[1]", "canvas[0] * canvas[1] - kept"),
    ("if score > best_score", "if score >= best_score"),
    ("score = (kept, kept - canvas[0] * canvas[1])", "score = (kept, 0)"),
)  # fmt: skip
def best_canvas(width, height, canvases):
    best, best_score = None, (-1, 0)
    for canvas in canvases:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        score = (kept, kept - canvas[0] * canvas[1])
        if score > best_score:
            best, best_score = canvas, score
    return best


@wrong(
    ("width / height > columns / rows", "width > height"),
    ("return margin, rows - margin, 0, columns", "return margin, margin + covered, 0, columns"),
    ("(rows - covered) // 2", "rows - covered"),
    ("return 0, rows, margin, columns - margin", "return margin, rows - margin, 0, columns"),
    ("int(round(height * (columns / width), 7))", "math.ceil(height * (columns / width))"),
)
def unpad(rows, columns, width, height):
    if width / height > columns / rows:
        covered = int(round(height * (columns / width), 7))
        margin = (rows - covered) // 2
        return margin, rows - margin, 0, columns
    covered = int(round(width * (rows / height), 7))
    margin = (columns - covered) // 2
    return 0, rows, margin, columns - margin


@wrong(
    ("alpha / len(A)", "alpha"),
    ("weight + ", ""),
    ("alpha / len(A)", "alpha / len(B)"),
    ("alpha / len(A)", "1.0"),
    ("weight + ", "weight - "),
)
def merge_lora(weight, A, B, alpha):
    return weight + alpha / len(A) * (B @ A)


@wrong(
    ("[1] * (len(answer) + 1)", "[1] * len(answer) + [0]"),
    ("[0] * len(question)", "[1] * len(question)"),
    ("if not answer or image_token in answer", "if not answer"),
    ("if not answer or image_token in answer", "if image_token in answer"),
    ("+ [end]", "+ [end] * (not tokens)"),
)
def conversation(turns, image_token, end):
    tokens, mask = [], []
    for question, answer in turns:
        if not answer or image_token in answer:
            raise ValueError("an answer without words, or with a picture")
        tokens = tokens + question + answer + [end]
        mask += [0] * len(question) + [1] * (len(answer) + 1)
    return tokens, mask


# ---------------------------------------------------------------------------------------------
# Chapter 8


@wrong(
    ("rank * micro_batches + i", "i * world + rank"),
    ("rank * micro_batches + i", "rank + i"),
    ("batch // (world * micro_batches)", "batch // world"),
    ("range(micro_batches)", "range(1)"),
    ("start + size", "start + size - 1"),
)
def rows_of(rank, world, micro_batches, batch):
    size = batch // (world * micro_batches)
    starts = [(rank * micro_batches + i) * size for i in range(micro_batches)]
    return [list(range(start, start + size)) for start in starts]


@wrong(
    ("/ sum(counts)", "/ len(counts)"),
    ("loss * count", "loss"),
    ("sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)",
     "sum(losses) / len(losses)"),
    ("sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)",
     "sum(losses) / sum(c > 0 for c in counts)"),
)  # fmt: skip
def combine(losses, counts):
    return sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)


@wrong(
    ("3 * width * hidden", "2 * width * hidden"),
    ("2 * kv_heads", "2 * heads"),
    ("+ width\n", "\n"),
    ("+ 2 * width)", ")"),
    ("vocabulary * width", "2 * vocabulary * width"),
)
def count_parameters(vocabulary, width, layers, heads, kv_heads, hidden):
    head = width // heads
    attention = width * (heads + 2 * kv_heads) * head + width * width
    block = attention + (3 * width * hidden + 2 * width)
    return vocabulary * width + layers * block + width


@wrong(
    ("16.0 * parameters", "12.0 * parameters"),
    ("if sharded", "if not sharded"),
    ("/ processes", "/ processes**2"),
    ("16.0 * parameters / processes", "12.0 * parameters / processes + 4.0 * parameters"),
)
def training_memory(parameters, processes, sharded):
    if sharded:
        return 16.0 * parameters / processes
    return 16.0 * parameters


@wrong(
    ("parts = [list(v.clone().chunk(W))", "parts = [list(v.chunk(W))"),
    ("parts[(r + 1) % W][piece] += send", "parts[(r + 1) % W][piece] = send"),
    ("for step in range(W - 1):\n        moving = {r: (r - step)",
     "for step in range(W):\n        moving = {r: (r - step)"),
    ("sent[r] += len(send)", "sent[r] += len(vectors[r])"),
    ("(r + 1 - step) % W", "(r - step) % W"),
)  # fmt: skip
def ring_all_reduce(vectors):
    W = len(vectors)
    parts = [list(v.clone().chunk(W)) for v in vectors]
    sent = [0] * W
    for step in range(W - 1):
        moving = {r: (r - step) % W for r in range(W)}
        copies = {r: parts[r][piece].clone() for r, piece in moving.items()}
        for r, piece in moving.items():
            send = copies[r]
            parts[(r + 1) % W][piece] += send
            sent[r] += len(send)
    for step in range(W - 1):
        moving = {r: (r + 1 - step) % W for r in range(W)}
        copies = {r: parts[r][piece].clone() for r, piece in moving.items()}
        for r, piece in moving.items():
            send = copies[r]
            parts[(r + 1) % W][piece] = send
            sent[r] += len(send)
    return [torch.cat(own) for own in parts], sent


# ---------------------------------------------------------------------------------------------
# Chapter 9


@wrong(
    ("ddof=1", "ddof=0"),
    ("/ math.sqrt(n)", ""),
    ("[n]", "[2]"),
    ("[n]", "[max(2, n - 1)]"),
    ("np.mean(scores), ", "np.median(scores), "),
)
def over_seeds(scores):
    n = len(scores)
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[n]
    return np.mean(scores), t * np.std(scores, ddof=1) / math.sqrt(n)


@wrong(
    (">= seen - 1e-12", "> seen + 1e-12"),
    ("abs(sum(s * d", "(sum(s * d"),
    ("/ 2 ** len(before)", "/ (2 ** len(before) - 1)"),
    ("(1, -1)", "(1, 0)"),
    ("abs(sum(differences))", "max(map(abs, differences))"),
)
def permutation_test(before, after):
    differences = np.subtract(after, before)
    seen, count = abs(sum(differences)), 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        count += abs(sum(s * d for s, d in zip(signs, differences))) >= seen - 1e-12
    return count / 2 ** len(before)


@wrong(
    ("all(known[i:])", "known[i]"),
    ("low > chance", "p > chance"),
    ("return None", "return ages[-1]"),
    ("all(known[i:])", "any(known[i:])"),
    ("1.96**2 / (2 * n)", "0"),
)
def age_of_learning(hits, n, ages, chance):
    known = []
    for h in hits:
        p = h / n
        spread = 1.96 * math.sqrt(p * (1 - p) / n + 1.96**2 / (4 * n * n))
        low = (p + 1.96**2 / (2 * n) - spread) / (1 + 1.96**2 / n)
        known.append(low > chance)
    for i in range(len(ages)):
        if all(known[i:]):
            return ages[i]
    return None


@wrong(
    ("seen > 0.5", "seen >= 0.5"),
    ("only, without, only - without", "without, only, without - only"),
    ("(a & ~b).mean()", "a.mean()"),
    ("only - without", "seen.mean() - blind.mean()"),
    ("(b & ~a).mean()", "b.mean()"),
)
def blind_control(seen, blind):
    a, b = seen > 0.5, blind > 0.5
    only, without = (a & ~b).mean(), (b & ~a).mean()
    return only, without, only - without
