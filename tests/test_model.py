"""The GPT, its kernels' references and generation, against fp64, Llama and a full forward."""

import numpy as np
import pytest
import torch

from common.images import ImageFormat, to_pixels
from kernels import attention, rms_norm, visible
from model import (
    GPT,
    BabyLLaVA,
    GPTConfig,
    Positions,
    cross_entropy,
    make_projector,
    rotary_frequencies,
    rotate,
)
from vision import ViT


def tiny(how={}, **changes):  # noqa: B006
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "block_size": 40, "n_layer": 2, "n_head": 4, "n_embd": 32}
    gpt = GPT(GPTConfig(**sizes | {"n_kv_head": 2} | changes))
    for parameter in gpt.parameters():  # larger than at the start, so that mistakes show
        parameter.data.normal_(0, 0.3)
    return BabyLLaVA(gpt, make_projector("mlp2x_gelu", 12, 32), None, image_token=49, **how).eval()


def with_image(P=5, words=(3, 1, 4, 1, 5)):
    torch.manual_seed(1)
    rows = [[49] * P + list(words), [49] * P + list(words)[::-1]]
    return torch.tensor(rows), torch.randn(2, P, 12)


@pytest.mark.parametrize("T, keys", [(1, 1), (7, 7), (1, 9), (3, 9)])
@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_backends_equal_fp64_loops(T, keys, prefix, heads):
    torch.manual_seed(T)
    q = torch.randn(2, T, heads[0], 8)
    k, v = torch.randn(2, 2, keys, heads[1], 8)
    expected = torch.zeros(2, T, heads[0], 8, dtype=torch.float64)
    for b in range(2):
        for h in range(heads[0]):
            for i in range(T):
                at = keys - T + i
                seen = [j for j in range(keys) if j <= at or j < prefix]
                kv = h * heads[1] // heads[0]
                s = k[b, seen, kv].double() @ q[b, i, h].double() / 8**0.5
                expected[b, i, h] = s.softmax(0) @ v[b, seen, kv].double()
    for backend in ("sdpa", "reference", None):
        assert (attention(q, k, v, prefix, backend) - expected).abs().max() < 1e-5


def test_rms_norm_backends_equal_the_formula():
    x, r, w = torch.randn(3, 5, 12), torch.randn(3, 5, 12), torch.randn(12)
    total = (x + r).double()
    expected = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    for backend in ("torch", "reference", None):
        y, stream = rms_norm(x, w, 1e-5, r, backend)
        assert (y - expected).abs().max() < 1e-5 and torch.equal(stream, x + r)
        assert torch.equal(rms_norm(x + r, w, 1e-5, None, backend), y)


def test_no_word_sees_a_later_one():
    model, (tokens, features) = tiny(), with_image()
    before = model(tokens, images=features)[0]
    tokens[:, 8] = 7
    after = model(tokens, images=features)[0]
    assert torch.equal(before[:, :8], after[:, :8]) and not torch.equal(before[:, 8], after[:, 8])
    features[:, 3] += 1
    last = model(tokens, images=features)[0]
    assert torch.equal(after[:, :3], last[:, :3]) and not torch.equal(after[:, 3], last[:, 3])


def test_the_gpt_is_a_llama():
    """Weights mapped over by name to Hugging Face's independent implementation: same logits."""
    transformers = pytest.importorskip("transformers")
    gpt = tiny().gpt
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=gpt.config.n_hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            max_position_embeddings=40,
            tie_word_embeddings=True,
        )
    ).eval()
    state = {}
    for name, value in gpt.state_dict().items():
        if "qkv_proj" in name:
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), value.split([32, 16, 16])):
                state["model." + name.replace("qkv_proj", part)] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate_proj", "up_proj"), value.chunk(2)):
                state["model." + name.replace("gate_up_proj", part)] = rows
        else:
            state["model." + name] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    llama.load_state_dict(state)
    tokens = torch.randint(0, 50, (3, 40))
    with torch.no_grad():
        assert (gpt.head(gpt(tokens)) - llama(tokens).logits).abs().max() < 1e-4


def test_cached_generation_equals_the_full_forward():
    model, (tokens, features) = tiny(), with_image()
    steps = list(model.generate(tokens, model.embed_images(features), max_new_tokens=12))
    for token in steps:
        full = model(tokens, images=features)[0][:, -1]
        assert torch.equal(token, full.argmax(-1))
        tokens = torch.cat([tokens, token[:, None]], 1)
    assert len(steps) == 12


def test_generation_stops_at_eos_and_at_the_context():
    model, (tokens, features) = tiny(), with_image()
    first = next(model.generate(tokens, model.embed_images(features)))
    stop = int(first[0])
    steps = torch.stack(
        list(model.generate(tokens, model.embed_images(features), 99, stop=(stop,))), 1
    )
    assert (steps[0] == stop).all()  # row 0 goes on saying stop while row 1 speaks
    assert tokens.shape[1] + steps.shape[1] <= 40
    alone = list(model.generate(tokens[:1], model.embed_images(features[:1]), 99, stop=(stop,)))
    assert len(alone) == 1
    assert (
        len(list(model.generate(tokens, model.embed_images(features), 99))) == 40 - tokens.shape[1]
    )


def test_sampling_keeps_to_top_k_and_to_its_seed():
    model, (tokens, features) = tiny(), with_image()
    draw = lambda seed, **how: torch.stack(
        list(
            model.generate(
                tokens,
                model.embed_images(features),
                10,
                generator=torch.Generator().manual_seed(seed),
                **how,
            )
        )
    )
    assert torch.equal(draw(1, temperature=1.0), draw(1, temperature=1.0))
    assert not torch.equal(draw(1, temperature=1.0), draw(2, temperature=1.0))
    assert torch.equal(draw(1, temperature=1.0, top_k=1), draw(5))


def test_features_fill_the_placeholders_in_order():
    model, (tokens, features) = tiny(), with_image()
    x = model.embed(tokens, model.embed_images(features))
    assert torch.allclose(x[:, :5], model.projector(features), atol=1e-6)
    assert torch.equal(x[:, 5:], model.gpt.embed_tokens(tokens[:, 5:]))
    scattered = torch.tensor([[49, 3, 49, 49, 7, 49, 49]])  # two images of 2 and 3 rows
    y = model.embed(scattered, model.embed_images(features[:1]))
    assert torch.allclose(y[0, [0, 2, 3, 5, 6]], model.projector(features)[0], atol=1e-6)
    with pytest.raises(ValueError, match="5 image placeholders for 10"):
        next(model.generate(scattered, model.embed_images(features)))


@pytest.mark.parametrize("attention, norm", [("sdpa", "torch"), ("triton", "triton")])
def test_the_last_block_may_leave_out_what_nobody_asks_for(attention, norm):
    """From position `first` on all is as it was, and so are the gradients of that part."""
    torch.manual_seed(0)
    sizes = GPTConfig(50, 16, 2, 2, 32, attention=attention, norm=norm)
    gpt, tokens = GPT(sizes), torch.randint(0, 50, (2, 9))
    for prefix in (0, 4):
        whole, part = gpt(tokens, prefix)[:, 5:], gpt(tokens, prefix, first=5)
        assert part.shape == (2, 4, 32) and torch.allclose(whole, part, atol=1e-5)
        given = torch.randn_like(part)
        gradients = [
            torch.autograd.grad((out * given).sum(), list(gpt.parameters()))
            for out in (whole, part)
        ]
        for a, b in zip(*gradients):
            assert torch.allclose(a, b, atol=1e-4)


def test_the_loss_is_the_mean_over_asked_targets():
    model, (tokens, features) = tiny(), with_image()
    targets = torch.full_like(tokens, -100)
    targets[0, 5:8] = torch.tensor([2, 9, 11])
    logits, loss = model(tokens, images=features)[0], model(tokens, targets, images=features)[1]
    by_hand = -logits.double().log_softmax(-1)[0, [5, 6, 7], [2, 9, 11]].mean()
    assert abs(loss - by_hand) < 1e-5


def test_attention_maps_are_distributions_over_the_past():
    model, (tokens, features) = tiny(), with_image()
    maps = model.attention_maps(tokens, model.embed_images(features))
    assert maps.shape == (2, 10, 10) and torch.allclose(maps.sum(-1), torch.ones(2, 10), atol=1e-5)
    assert (maps[:, ~visible(10, 10, 0, "cpu")] == 0).all()


@pytest.mark.parametrize(
    "kind, layers",
    [
        ("linear", "Linear"),
        ("mlp1x_gelu", "Linear"),
        ("mlp2x_gelu", "Linear GELU Linear"),
        ("mlp3x_gelu", "Linear GELU Linear GELU Linear"),
        ("identity", "Identity"),
    ],
)
def test_projectors_are_llavas(kind, layers):
    projector = make_projector(kind, 32, 32)
    parts = [*projector.children()] or [projector]
    names = [type(part).__name__.removesuffix("Projector") for part in parts]
    assert " ".join(names) == layers and projector.num_tokens(5) == 5
    assert projector(torch.randn(2, 5, 32)).shape == (2, 5, 32)
    if kind == "mlp2x_gelu":  # BabyLLaVA's: E = 2048, C = 256
        assert sum(p.numel() for p in make_projector(kind, 2048, 256).parameters()) == 590_336


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp", "resampler", "identity"])
def test_an_unknown_projector_is_refused(kind):
    with pytest.raises(ValueError, match="projector"):
        make_projector(kind, 12, 32)


def test_bad_head_widths_and_overlong_texts_are_refused():
    assert "head width" in GPTConfig(50, 40, 2, n_head=4, n_embd=30).fault()
    assert "no multiple" in GPTConfig(50, 40, 2, n_head=4, n_embd=32, n_kv_head=3).fault()
    with pytest.raises(ValueError, match="head width"):
        GPT(GPTConfig(50, 40, 2, n_head=4, n_embd=30))
    with pytest.raises(ValueError, match="block_size is 40"):
        tiny().gpt(torch.zeros(1, 41, dtype=torch.long))


def test_blocks_are_pre_norm_residuals():
    """Sums taken inside the norms, against x + attention(norm(x)), x + mlp(norm(x)) in fp64."""
    gpt = tiny().gpt.double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    positions = Positions(gpt.cos[:7].double(), gpt.sin[:7].double())
    stream = x
    for block in gpt.layers:
        stream = stream + block.self_attn(block.input_layernorm(stream), positions)
        stream = stream + block.mlp(block.post_attention_layernorm(stream))
    assert (gpt(x) - gpt.norm(stream)).abs().max() < 1e-5


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_image_tokens_see_one_another_where_that_is_asked_for(attention):
    model, (tokens, features) = tiny({"image_attention": attention}), with_image()
    before = model(tokens, images=features)[0]
    changed = features.clone()
    changed[:, 4] += 1  # the last image token
    after = model(tokens, images=changed)[0]
    first_image_token_sees_it = not torch.equal(before[:, 0], after[:, 0])
    assert first_image_token_sees_it == (attention == "full")
    tokens[:, 8] = 7  # words stay causal
    later = model(tokens, images=changed)[0]
    assert torch.equal(after[:, :8], later[:, :8])
    maps = model.attention_maps(tokens, model.embed_images(features))
    assert (maps[0, 0, 1:5] > 0).all() == (attention == "full")
    steps = list(model.generate(tokens, model.embed_images(features), max_new_tokens=6))
    for token in steps:
        assert torch.equal(token, model(tokens, images=features)[0][:, -1].argmax(-1))
        tokens = torch.cat([tokens, token[:, None]], 1)


def test_features_and_frames_give_the_same_words():
    torch.manual_seed(0)
    model = tiny()
    model.tower = ViT(16, 8, 12, 2, 2).eval()
    frames = np.random.RandomState(0).randint(0, 256, (2, 16, 16, 3), np.uint8)
    pixels = to_pixels(frames, ImageFormat(16))
    tokens = torch.tensor([[49] * 4 + [3, 1]] * 2)
    draw = lambda images: torch.stack(
        list(
            model.generate(
                tokens,
                model.embed_images(images),
                12,
                temperature=1.0,
                generator=torch.Generator().manual_seed(5),
            )
        )
    )
    with torch.no_grad():
        features = model.encode_images(pixels)
    assert torch.equal(draw(pixels), draw(features))
    assert model.image_tokens(16) == features.shape[1] == 4


@pytest.mark.parametrize("keep_cls", [False, True])
def test_pooling_is_the_mean_of_what_the_projector_makes_of_neighbours(keep_cls):
    model = tiny({"image_pool": 2, "keep_cls": keep_cls})
    model.tower = ViT(32, 8, 12, 2, 2).eval()
    features = torch.randn(3, 16 + keep_cls, 12)
    with torch.no_grad():
        found = model.embed_images(features).view(3, -1, 32)
        assert model.image_tokens(32) == found.shape[1] == 4 + keep_cls
        for n in range(3):
            rows = [model.projector(row) for row in features[n]]
            cls, patches = rows[: int(keep_cls)], rows[int(keep_cls) :]
            for y in range(2):
                for x in range(2):
                    corner = 8 * y + 2 * x
                    four = [patches[corner + i] for i in (0, 1, 4, 5)]
                    mean = sum(four) / 4
                    assert (found[n, keep_cls + 2 * y + x] - mean).abs().max() < 1e-5
            assert not keep_cls or (found[n, 0] - cls[0]).abs().max() < 1e-5


def test_one_batch_is_learnt_by_heart():
    model, (tokens, features) = tiny(), with_image()
    targets = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
    targets[:, :4] = -100
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        loss = model(tokens, targets, images=features)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rotary_positions_turn_each_pair_by_its_angle(dtype):
    """As complex numbers: (a + ib) e^(i angle)."""
    torch.manual_seed(0)
    config = GPTConfig(50, 40, 2, 4, 32)
    x = torch.randn(2, 5, 3, 8).to(dtype)
    angles = torch.outer(torch.arange(5.0), rotary_frequencies(config))[:, None]
    a, b = x.double().chunk(2, -1)
    turned = torch.complex(a, b) * torch.exp(1j * angles.double())
    expected = torch.cat([turned.real, turned.imag], -1)
    gpt = GPT(config)
    found = rotate(x, gpt.cos[:5], gpt.sin[:5])
    assert found.dtype == dtype
    assert (found - expected).abs().max() < (0.02 if dtype == torch.bfloat16 else 1e-5)


def test_swiglu_is_its_formula():
    mlp = tiny().gpt.layers[0].mlp
    x = torch.randn(3, 5, 32)
    gate, up = (mlp.gate_up_proj.weight.double() @ x.double().mT).mT.chunk(2, -1)
    expected = (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.double().T
    assert (mlp(x) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("targets", [[], [-100, -100]])
def test_a_loss_of_no_targets_is_zero(targets):
    logits = torch.randn(len(targets), 9, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor(targets, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_the_loss_is_the_mean_over_real_targets():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 9), torch.tensor([3, -100, 8, 0, -100, 5])
    rows = [i for i, target in enumerate(targets.tolist()) if target >= 0]
    nll = [-logits[i].double().log_softmax(-1)[targets[i]] for i in rows]
    assert abs(float(cross_entropy(logits, targets)) - float(sum(nll)) / 4) < 1e-6
    with pytest.raises(IndexError):
        cross_entropy(logits, targets.clamp(min=9))
