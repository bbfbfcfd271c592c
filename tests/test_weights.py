"""Other people's weights, against transformers' own code; nothing is half loaded."""

import argparse
import re

import pytest
import torch
from conftest import one_line

import vision
from config import UserError
from pretrained.convnets import ConvNeXt, ResNeXt
from pretrained.tower_names import CLIP, HUGGING_FACE_VIT, DoesNotFit, read_file, tower_of, vit_like
from pretrained.towers import load_tower
from vision import ViT


def tower(seed=0, **shape):
    torch.manual_seed(seed)
    net = ViT(**{"size": 32, "patch": 8, "width": 64, "depth": 2, "heads": 1} | shape).eval()
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.1)
    return net


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
    pairs = [
        ("attention.q_proj", "attention.attention.query"),
        ("k_proj", "attention.key"),
        ("v_proj", "attention.value"),
        ("o_proj", "output.dense"),
    ]
    if "layers.0.layernorm_before.bias" in state:
        pairs += [
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("layers.", "encoder.layer."),
        ]
    for old, new in pairs:
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def wrapped(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("rename", [dict, old_names, lambda s: wrapped(s, "vit.")])
@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_a_hugging_face_tower_gives_their_codes_output(kind, rename):
    """Independent code, random weights: the same output at the native and at other sizes."""
    transformers = pytest.importorskip("transformers")
    mlp = {"intermediate_size": 512} if kind == "ViT" else {"mlp_ratio": 4}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=40,
        patch_size=8,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
        **mlp,
    )
    theirs = randomised(getattr(transformers, f"{kind}Model")(config))
    ours = tower_of(rename(theirs.state_dict()), heads=2)
    registers = getattr(config, "num_register_tokens", 0)
    assert ours.arguments["registers"] == registers and (kind == "ViT") != ours.arguments["scaled"]
    for size in (40, 64, 24):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            more = {"interpolate_pos_encoding": True} if kind == "ViT" else {}
            y = theirs(x, **more).last_hidden_state
            y = torch.cat([y[:, :1], y[:, 1 + registers :]], 1)
            assert (ours(x) - y).abs().max() < 1e-4
    again = vision.build_tower(vision.describe_tower(ours))
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), ours(x))


def timm_names(state):
    """A transformers ConvNext's state dict under the names of timm and open_clip."""
    pairs = [
        ("embeddings.patch_embeddings", "visual.trunk.stem.0"),
        ("embeddings.layernorm", "visual.trunk.stem.1"),
        ("encoder.", "visual.trunk."),
        ("downsampling_layer", "downsample"),
        (".layers.", ".blocks."),
        ("dwconv", "conv_dw"),
        (".layernorm.", ".norm."),
        ("pwconv", "mlp.fc"),
        ("layer_scale_parameter", "gamma"),
        ("layernorm.", "visual.trunk.head.norm."),
    ]
    for old, new in pairs:
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def facebook_names(state):
    """The same under the names of facebookresearch/ConvNeXt."""
    state = {key.removeprefix("visual.trunk."): value for key, value in timm_names(state).items()}
    pairs = [("stem.", "downsample_layers.0."), ("conv_dw", "dwconv"), ("mlp.fc", "pwconv")]
    for old, new in [*pairs, (".blocks.", "."), ("head.norm.", "norm.")]:
        state = {key.replace(old, new): value for key, value in state.items()}
    return {
        re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", key): value
        for key, value in state.items()
    }


@pytest.mark.parametrize("rename", [dict, timm_names, facebook_names])
def test_a_convnext_is_transformers_own(rename):
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(depths=[1, 2, 2, 1], hidden_sizes=[8, 16, 32, 64])
    theirs = randomised(transformers.ConvNextModel(config))
    ours = tower_of(rename(theirs.state_dict()))
    assert ours.arguments == {"depths": [1, 2, 2, 1], "width": 8, "stem": 4, "eps": 1e-6}
    ours.arguments["eps"] = 1e-12
    again = vision.build_tower(vision.describe_tower(ours)).eval()  # ConvNextModel's default
    again.load_state_dict(ours.state_dict())
    for size in (64, 96):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            y = theirs(x).last_hidden_state
            assert y.shape[1:] == (64, size // 32, size // 32)
            assert (again(x)[:, 1:] - y.flatten(2).transpose(1, 2)).abs().max() < 1e-4
            assert (again(x)[:, 0] - y.mean((2, 3))).abs().max() < 1e-4


@pytest.mark.parametrize("size, tokens", [(768, 144), (1024, 256), (1536, 576)])
def test_convllavas_fifth_stage(size, tokens):
    """Its published numbers of tokens, and widths 192 to 3072."""
    with torch.device("meta"):
        net = ConvNeXt((3, 3, 27, 3, 6))
    assert net.num_patches(size) == tokens and net.width == 3072 and not net.fault(size, -1)
    assert net.fault(800, -1) and net.fault(768, -2)


@pytest.mark.parametrize("kind", ["CLIPVision", "SiglipVision"])
def test_clip_and_siglip_are_transformers_own(kind, tmp_path):
    """From a folder, with its config.json, and from a bare state dict of a published width."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, intermediate_size=96, image_size=32, patch_size=10
    )
    theirs = randomised(getattr(transformers, f"{kind}Model")(config))
    theirs.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        states = theirs(x, output_hidden_states=True).hidden_states
    for ours in (load_tower(tmp_path), tower_of(theirs.state_dict(), heads=2)):
        for layer in (-1, -2):
            with torch.no_grad():
                y = ours(x, layer)
                y = y if kind == "CLIPVision" else y[:, 1:]
                assert (y - states[layer]).abs().max() < 1e-4
        assert ours.num_patches(32) == 9


SMALL = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
FOLDERS = [  # (class of transformers, where its features are)
    ("ViTModel", ""),
    ("ViTForImageClassification", "vit"),
    ("ViTForMaskedImageModeling", "vit"),
    ("Dinov2Model", ""),
    ("Dinov2ForImageClassification", "dinov2"),
    ("Dinov2WithRegistersModel", ""),
    ("Dinov2WithRegistersForImageClassification", "dinov2_with_registers"),
    ("CLIPVisionModel", ""),
    ("CLIPForImageClassification", "vision_model"),
    ("SiglipVisionModel", ""),
    ("SiglipForImageClassification", "vision_model"),
]


@pytest.mark.parametrize("name, inner", FOLDERS, ids=[name for name, _ in FOLDERS])
def test_a_folder_of_a_tower_with_or_without_a_classifier(tmp_path, name, inner):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, name)
    config = theirs.config_class
    if config in (transformers.CLIPConfig, transformers.SiglipConfig):
        config = config(vision_config=dict(SMALL), text_config={"num_hidden_layers": 1})
    else:
        config = config(**SMALL)
    theirs = randomised(theirs(config))
    theirs.save_pretrained(tmp_path)
    ours, before_norm = load_tower(tmp_path), "CLIP" in name or "Siglip" in name
    registers = getattr(config, "num_register_tokens", 0) if "Registers" in name else 0
    backbone = getattr(theirs, inner) if inner else theirs
    for size in (32, 48):
        x = torch.randn(2, 3, size, size)
        how = {"interpolate_pos_encoding": True} if "Dinov2" not in name else {}
        with torch.no_grad():
            out = backbone(x, output_hidden_states=True, **how)
            found = ours(x, -2 if before_norm else -1)
        wanted = out.hidden_states[-2] if before_norm else out.last_hidden_state
        if registers:
            wanted = torch.cat([wanted[:, :1], wanted[:, 1 + registers :]], 1)
        if "Siglip" in name:
            found = found[:, 1:]
        assert (found - wanted).abs().max() < 1e-5, size


def test_facebooks_names_tell_dinov2_and_its_registers():
    for shape in (
        {"scaled": True},
        {"scaled": True, "registers": 4, "offset": 0.0, "antialias": True},
    ):
        net = tower(**shape)
        loaded = tower_of(net.state_dict() | {"mask_token": torch.zeros(1, 64)}, heads=1)
        x = torch.randn(2, 3, 24, 24)
        assert loaded.arguments == net.arguments and torch.equal(loaded(x), net(x))
        assert net(x).shape == (2, 1 + 9, 64)  # registers are not handed on


def test_the_resnext_is_transformers_resnet_but_for_its_groups():
    transformers = pytest.importorskip("transformers")
    theirs = randomised(
        transformers.ResNetModel(
            transformers.ResNetConfig(
                depths=[1, 2, 1, 1], hidden_sizes=[256, 512, 1024, 2048], layer_type="bottleneck"
            )
        )
    )
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
    ours = tower_of(state)
    assert ours.arguments["groups"] == 1 and ours.arguments["depths"] == [1, 2, 1, 1]
    for size in (64, 96):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            y = theirs(x).last_hidden_state.flatten(2).transpose(1, 2)
            scale = y.abs().max()
            assert (ours(x)[:, 1:] - y).abs().max() < 1e-4 * scale
            assert (ours(x)[:, 0] - y.mean(1)).abs().max() < 1e-4 * scale


def test_the_published_resnext():
    """resnext50_32x4d has 25,028,904 parameters, 2,049,000 of them in the classifier."""
    net = ResNeXt()
    assert sum(p.numel() for p in net.parameters()) == 25_028_904 - 2_049_000
    state = wrapped(net.state_dict(), "module.backbone.")
    state["module.head.mlp.0.bias"] = torch.ones(1)
    loaded = tower_of({"student": {}, "teacher": state, "epoch": 3})
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert loaded(x)[:, 1:].shape == (1, 49, 2048)
        assert torch.equal(loaded.train()(x), loaded.eval()(x))  # BatchNorm never learns here
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values())
    )
    with pytest.raises(ValueError, match="gives its last map"):
        loaded(x, -2)
    with pytest.raises(ValueError, match="divide by 32, not 240"):
        loaded(torch.randn(1, 3, 240, 240))
    state.pop("module.backbone.layer3.2.bn2.running_var")
    with pytest.raises(DoesNotFit, match="1 keys missing: layer3.2.bn2.running_var"):
        tower_of(state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"teacher": wrapped(s, "backbone."), "student": {}},
        lambda s: {"teacher": wrapped(s, "module.backbone.") | {"module.head.mlp": s["norm.bias"]}},
        lambda s: wrapped(s, "encoder."),
    ],
)
def test_checkpoints_load_whatever_their_wrapping(wrap):
    net = tower()
    loaded = tower_of(wrap(net.state_dict()), heads=1)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), net(x)) and loaded.arguments == net.arguments


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "1 keys missing: blocks.1.mlp.fc2.bias"),
        (lambda s: s.update(extra=s["norm.bias"]), "1 keys left over: extra"),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"norm.bias \(3,\) for \(64,\)"),
        (lambda s: s.pop("pos_embed"), "no ViT, ResNeXt or ConvNeXt"),
    ],
)
def test_a_tower_is_never_half_loaded(break_it, message):
    state = tower().state_dict()
    break_it(state)
    with pytest.raises(DoesNotFit, match=message) as error:
        tower_of(state, heads=1)
    assert one_line(error)


def test_towers_come_from_pth_and_safetensors_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net, x = tower(), torch.randn(1, 3, 32, 32)
    torch.save(
        {
            "teacher": wrapped(net.state_dict(), "backbone."),
            "student": {},
            "epoch": 7,
            "args": argparse.Namespace(arch="vit_small"),
        },
        tmp_path / "dino.pth",
    )
    mixed = net.state_dict() | {"norm.bias": net.norm.bias.detach().bfloat16()}
    safetensors.save_file(mixed, tmp_path / "a.safetensors", {"format": "pt"})
    assert torch.equal(tower_of(read_file(tmp_path / "dino.pth"), 1)(x), net(x))
    loaded = tower_of(read_file(tmp_path / "a.safetensors"), 1)
    assert (loaded(x) - net(x)).abs().max() < 0.1
    content = (tmp_path / "a.safetensors").read_bytes()
    for name, part in (("cut", content[:-8]), ("stub", content[:20]), ("empty", b"")):
        (tmp_path / f"{name}.safetensors").write_bytes(part)
        with pytest.raises(UserError, match="not a checkpoint, or cut short") as error:
            read_file(tmp_path / f"{name}.safetensors")
        assert one_line(error)


def test_the_heads_of_an_unpublished_width_are_not_guessed(tmp_path):
    """A bare state dict of 4 heads used to load, silently, with width / 64 = 1."""
    with pytest.raises(DoesNotFit, match="do not show how many heads"):
        tower_of(tower(heads=4).state_dict())
    torch.save(tower(heads=4).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="bare.pth: a ViT 64 wide.*or a vision.pt") as error:
        load_tower(tmp_path / "bare.pth")
    assert one_line(error)
    published = ViT(16, 8, 192, 1, 3)
    assert tower_of(published.state_dict()).arguments["heads"] == 3


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": "x"}])
def test_what_is_no_state_dict_is_one_clear_line(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth: no(t a| state|either)") as error:
        load_tower(tmp_path / "x.pth")
    assert one_line(error)


def test_our_own_checkpoints_bring_their_tower(recipe):
    net = load_tower(recipe / "phase2.pt")
    assert net.arguments["heads"] == 2
    with pytest.raises(UserError, match="a checkpoint without a tower"):
        load_tower(recipe / "language.pt")


def test_the_widest_published_vits_have_heads_wider_than_64():
    """SigLIP so400m is 1152 wide with 16 heads; width / 64 once gave it 18, silently."""
    with torch.device("meta"):
        siglip = ViT(28, 14, 1152, 1, 16, cls=False, first_norm=False, final_norm=False)
    state = siglip.state_dict()
    assert vit_like(state, 0, CLIP).arguments["heads"] == 16
    with pytest.raises(DoesNotFit, match="how many heads"):
        vit_like(state, 0, HUGGING_FACE_VIT)


def test_safetensors_that_are_not_aligned_keep_their_shapes(tmp_path):
    """A header whose length is no multiple of 8 puts numbers where they cannot be read in place."""
    numbers = torch.arange(6, dtype=torch.float32)
    header = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    header += b" " * (1 + -len(header) % 8)
    content = len(header).to_bytes(8, "little") + header + numbers.numpy().tobytes()
    (tmp_path / "odd.safetensors").write_bytes(content)
    assert torch.equal(read_file(tmp_path / "odd.safetensors")["a"], numbers.view(2, 3))
