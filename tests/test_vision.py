"""The eye: strict loading, positions, views, DINO's loss and its probe."""
import argparse

import numpy as np
import pytest
import torch

import sample
import vision
from data import DataError
from vision import DINO, ViT, build_tower, linear_probe, preprocess


def tower(seed=0, **shape):
    torch.manual_seed(seed)
    net = ViT(**{**dict(size=32, patch=8, width=64, depth=2, heads=1), **shape}).eval()
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.1)
    return net


def test_parameters_carry_dinos_names():
    names = {name.replace("blocks.0.", "") for name in tower(depth=1).state_dict()}
    assert names == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
                     "norm.weight", "norm.bias"} | {
        f"{layer}.{kind}" for kind in ("weight", "bias")
        for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return model.eval()


def old_names(state):
    """Hugging Face's names as the checkpoints of its earlier releases have them."""
    pairs = [("attention.q_proj", "attention.attention.query"), ("k_proj", "attention.key"),
             ("v_proj", "attention.value"), ("o_proj", "output.dense")]
    if "layers.0.layernorm_before.bias" in state:
        pairs += [("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
                  ("layers.", "encoder.layer.")]
    for old, new in pairs:
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


@pytest.mark.parametrize("rename", [dict, old_names, lambda s: wrapped(s, "vit.")])
@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_a_hugging_face_tower_gives_their_codes_output(kind, rename):
    """Independent code, random weights: the same output at the native and at other sizes."""
    transformers = pytest.importorskip("transformers")
    mlp = {"intermediate_size": 512} if kind == "ViT" else {"mlp_ratio": 4}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=40, patch_size=8,
        layer_norm_eps=1e-6, hidden_act="gelu", **mlp)
    theirs = randomised(getattr(transformers, f"{kind}Model")(config))
    ours = build_tower(rename(theirs.state_dict()))
    registers = getattr(config, "num_register_tokens", 0)
    assert ours.shape()["registers"] == registers and (kind == "ViT") != ours.shape()["scaled"]
    for size in (40, 64, 24):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            more = {"interpolate_pos_encoding": True} if kind == "ViT" else {}
            y = theirs(x, **more).last_hidden_state
            y = torch.cat([y[:, :1], y[:, 1 + registers:]], 1)
            assert (ours(x) - y).abs().max() < 1e-4
    again = vision.make_tower(ours.shape())
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), ours(x))


def test_facebooks_names_tell_dinov2_and_its_registers():
    for shape in (dict(scaled=True), dict(scaled=True, registers=4, offset=0.0, antialias=True)):
        net = tower(**shape)
        loaded = build_tower(net.state_dict() | {"mask_token": torch.zeros(1, 64)})
        x = torch.randn(2, 3, 24, 24)
        assert loaded.shape() == net.shape() and torch.equal(loaded(x), net(x))
        assert net(x).shape == (2, 1 + 9, 64)  # registers are not handed on


def test_the_resnext_is_transformers_resnet_but_for_its_groups():
    transformers = pytest.importorskip("transformers")
    theirs = randomised(transformers.ResNetModel(transformers.ResNetConfig(
        depths=[1, 2, 1, 1], hidden_sizes=[256, 512, 1024, 2048], layer_type="bottleneck")))
    state = {}
    for key, value in theirs.state_dict().items():
        key = key.replace("embedder.embedder.convolution", "conv1")
        key = key.replace("embedder.embedder.normalization", "bn1")
        for stage in range(4):
            key = key.replace(f"encoder.stages.{stage}.layers.", f"layer{stage + 1}.")
        for k in range(3):
            key = key.replace(f"layer.{k}.convolution", f"conv{k + 1}")
            key = key.replace(f"layer.{k}.normalization", f"bn{k + 1}")
        key = key.replace("shortcut.convolution", "downsample.0")
        state[key.replace("shortcut.normalization", "downsample.1")] = value
    ours = build_tower(state)
    assert ours.shape()["groups"] == 1 and ours.shape()["depths"] == [1, 2, 1, 1]
    for size in (64, 96):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            y = theirs(x).last_hidden_state.flatten(2).transpose(1, 2)
            scale = y.abs().max()
            assert (ours(x)[:, 1:] - y).abs().max() < 1e-4 * scale
            assert (ours(x)[:, 0] - y.mean(1)).abs().max() < 1e-4 * scale


def test_the_published_resnext():
    """resnext50_32x4d has 25,028,904 parameters, 2,049,000 of them in the classifier."""
    net = vision.ResNeXt()
    assert sum(p.numel() for p in net.parameters()) == 25_028_904 - 2_049_000
    state = wrapped(net.state_dict(), "module.backbone.")
    state["module.head.mlp.0.bias"] = torch.ones(1)
    loaded = build_tower({"student": {}, "teacher": state, "epoch": 3})
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert vision.tower_features(loaded, x).shape == (1, 49, 2048)
        assert torch.equal(loaded.train()(x), loaded.eval()(x))  # BatchNorm never learns here
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(),
                                                 net.state_dict().values()))
    with pytest.raises(ValueError, match="gives its last map"):
        vision.tower_features(loaded, x, -2)
    with pytest.raises(ValueError, match="divide by 32, not 240 x 240"):
        vision.tower_features(loaded, torch.randn(1, 3, 240, 240))
    state.pop("module.backbone.layer3.2.bn2.running_var")
    with pytest.raises(ValueError, match="1 keys missing: layer3.2.bn2.running_var"):
        build_tower(state)


def wrapped(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"teacher": wrapped(s, "backbone."), "student": {}},
    lambda s: {"teacher": wrapped(s, "module.backbone.") | {"module.head.mlp": s["norm.bias"]}},
    lambda s: wrapped(s, "encoder.")])
def test_checkpoints_load_whatever_their_wrapping(wrap):
    net = tower()
    loaded = build_tower(wrap(net.state_dict()))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), net(x)) and loaded.shape() == net.shape()


@pytest.mark.parametrize("break_it, message", [
    (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "1 keys missing: blocks.1.mlp.fc2.bias"),
    (lambda s: s.update(extra=s["norm.bias"]), "1 keys left over: extra"),
    (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"norm.bias \(3,\) for \(64,\)"),
    (lambda s: s.pop("pos_embed"), "neither a DINO ViT nor a ResNeXt")])
def test_a_tower_is_never_half_loaded(break_it, message):
    state = tower().state_dict()
    break_it(state)
    with pytest.raises(ValueError, match=message) as error:
        build_tower(state)
    assert "\n" not in str(error.value)


def test_other_sizes_interpolate_positions():
    net = tower()
    assert net(torch.randn(1, 3, 48, 24)).shape == (1, 1 + 6 * 3, 64)
    assert net.positions(4, 4) is net.pos_embed
    net.pos_embed.data[:, 1:] = torch.arange(4.0).repeat(4)[None, :, None]  # grows to the right
    grown = net.positions(8, 8)[0, 1:, 0].view(8, 8)
    assert torch.allclose(grown[0], grown[5], atol=1e-4) and (grown[0].diff() > 0).all()


def test_select_layer_is_llavas():
    net, x = tower(), torch.randn(2, 3, 32, 32)
    y = torch.cat([net.cls_token.expand(2, -1, -1), net.patch_embed(x)], 1) + net.pos_embed
    first = net.blocks[0](y)
    assert torch.equal(vision.tower_features(net, x, -2), first[:, 1:])
    assert torch.equal(vision.tower_features(net, x, -1, keep_cls=True),
                       net.norm(net.blocks[1](first)))
    with pytest.raises(ValueError, match="takes -1 to -2"):
        vision.tower_features(net, x, -3)


def test_extraction_is_the_towers_own_output():
    net, frames = tower(), np.random.RandomState(0).randint(0, 256, (7, 32, 32, 3), np.uint8)
    blocks = np.concatenate([*vision.extract(net, frames, batch=3)])
    expected = vision.tower_features(net, preprocess(frames)).half().numpy()
    assert blocks.shape == (7, 16, 64) and np.abs(blocks - expected).max() < 2e-2
    x = preprocess(frames)[0, :, 0, 0] * torch.tensor(vision.STD) + torch.tensor(vision.MEAN)
    assert torch.allclose(x * 255, torch.tensor(frames[0, 0, 0]).float(), atol=1e-3)


def test_towers_come_from_pth_and_safetensors_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net, x = tower(), torch.randn(1, 3, 32, 32)
    torch.save({"teacher": wrapped(net.state_dict(), "backbone."), "student": {}, "epoch": 7,
                "args": argparse.Namespace(arch="vit_small")}, tmp_path / "dino.pth")
    mixed = net.state_dict() | {"norm.bias": net.norm.bias.detach().bfloat16()}
    safetensors.save_file(mixed, tmp_path / "a.safetensors", {"format": "pt"})
    assert torch.equal(build_tower(sample.read_file(tmp_path / "dino.pth"))(x), net(x))
    loaded = build_tower(sample.read_file(tmp_path / "a.safetensors"))
    assert (loaded(x) - net(x)).abs().max() < 0.1
    content = (tmp_path / "a.safetensors").read_bytes()
    for name, part in (("cut", content[:-8]), ("stub", content[:20]), ("empty", b"")):
        (tmp_path / f"{name}.safetensors").write_bytes(part)
        with pytest.raises(DataError, match="not a checkpoint, or cut short") as error:
            sample.read_file(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value)


def test_a_tower_has_a_fingerprint():
    assert vision.fingerprint(tower()) == vision.fingerprint(tower())
    prints = {vision.fingerprint(tower()), vision.fingerprint(tower(1)),
              vision.fingerprint(tower(), -2), vision.fingerprint(tower(), -1, True)}
    assert len(prints) == 4


def test_views_of_two_ranks_are_those_of_one():
    frames = torch.rand(6, 3, 32, 32)
    one = vision.views(frames, 24, (0.4, 1.0), torch.Generator().manual_seed(0))
    halves = [vision.views(frames[3 * r:3 * r + 3], 24, (0.4, 1.0),
                           torch.Generator().manual_seed(0), r, 2) for r in (0, 1)]
    assert one.shape == (6, 3, 24, 24) and torch.equal(torch.cat(halves), one)


def test_turned_hues_keep_their_mean_and_grey_loses_colour():
    flat = torch.tensor([0.8, 0.3, 0.1])[None, :, None, None].expand(64, 3, 16, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in (vision.MEAN, vision.STD))
    turned = vision.views(flat, 16, (1, 1), torch.Generator().manual_seed(0), grey=0) * std + mean
    grey = vision.views(flat, 16, (1, 1), torch.Generator().manual_seed(0), grey=1) * std + mean
    assert (grey[:, 0] - grey[:, 2]).abs().max() < 1e-5
    assert len({int(x[:, 0, 0].argmax()) for x in turned}) == 3  # red, green and blue all lead
    inside = turned[((turned > 0.01) & (turned < 0.99)).flatten(1).all(1)]  # none was clipped
    brightness = inside.mean(1) / 0.4
    assert ((brightness > 0.59) & (brightness < 1.41)).all()


def test_dinos_loss_is_the_sum_written_out():
    torch.manual_seed(0)
    dino = DINO(tower(), tower(1), prototypes=8, hidden=16, bottleneck=4, local_views=2)
    for parameter in dino.teacher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    dino.centre.normal_()
    frames = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    wide, near = dino.views(frames, frames.flip(0), torch.Generator().manual_seed(0))
    assert wide.shape == (8, 3, 24, 24) and near.shape == (8, 3, 16, 16)
    with torch.no_grad():
        head = lambda network, x: network["head"](network["backbone"](x)[:, 0]).double()
        loss, terms = 0.0, 0
        for i in range(2):
            t = ((head(dino.teacher, wide[4 * i:4 * i + 4]) - dino.centre) / 0.04).softmax(-1)
            for j in range(4):
                x = wide[4 * j:4 * j + 4] if j < 2 else near[4 * j - 8:4 * j - 4]
                if i != j:
                    s = (head(dino.student, x) / 0.1).log_softmax(-1)
                    loss, terms = loss - (t * s).sum() / 4, terms + 1
        assert abs(dino(wide, near)[1] - loss / terms) < 1e-4


def test_the_teacher_follows_and_is_never_trained():
    torch.manual_seed(0)
    dino = DINO(tower(), tower(), prototypes=8, hidden=16, bottleneck=4, momentum=0.9)
    frames = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    dino(*dino.views(frames, frames, torch.Generator()))[1].backward()
    assert all(p.grad is None for p in dino.teacher.parameters())
    assert all(p.grad is not None for p in dino.student.parameters())
    slow, fast = dino.teacher["head"].last.weight, dino.student["head"].last.weight
    fast.data += 1.0
    before = slow.clone()
    dino.after_step(0.0)
    assert torch.allclose(slow, 0.9 * before + 0.1 * fast)
    assert torch.allclose(dino.centre, 0.1 * dino.mean) and dino.mean.abs().sum() > 0
    before = slow.clone()
    dino.after_step(1.0)
    assert torch.equal(slow, before)


def test_the_probe_finds_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (800,))
    plain = torch.randn(800, 10)
    there = plain + 3 * torch.nn.functional.one_hot(labels, 10)
    assert linear_probe(there, labels, 600) > 0.95
    assert linear_probe(plain, labels, 600) < 0.4
