"""Towers: the promise that all of them keep."""

import pytest
import torch

import vision
from pretrained.convnets import ResNeXt
from training import features
from vision import ViT


def tower(seed=0, **shape):
    torch.manual_seed(seed)
    net = ViT(**{"size": 32, "patch": 8, "width": 64, "depth": 2, "heads": 1} | shape).eval()
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.1)
    return net


def test_parameters_carry_dinos_names():
    names = {name.replace("blocks.0.", "") for name in tower(depth=1).state_dict()}
    assert names == {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
    } | {
        f"{layer}.{kind}"
        for kind in ("weight", "bias")
        for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }


def test_other_sizes_interpolate_positions():
    net = tower()
    assert net(torch.randn(1, 3, 48, 24)).shape == (1, 1 + 6 * 3, 64)
    assert net.position_embeddings(4, 4) is net.pos_embed
    net.pos_embed.data[:, 1:] = torch.arange(4.0).repeat(4)[None, :, None]  # grows to the right
    grown = net.position_embeddings(8, 8)[0, 1:, 0].view(8, 8)
    assert torch.allclose(grown[0], grown[5], atol=1e-4) and (grown[0].diff() > 0).all()


def test_select_layer_is_llavas():
    net, x = tower(), torch.randn(2, 3, 32, 32)
    y = torch.cat([net.cls_token.expand(2, -1, -1), net.patch_embed(x)], 1) + net.pos_embed
    first = net.blocks[0](y)
    assert torch.equal(net(x, -2)[:, 1:], first[:, 1:])
    assert torch.equal(net(x), net.norm(net.blocks[1](first)))
    with pytest.raises(ValueError, match="takes -1 to -2"):
        net(x, -3)


@pytest.mark.parametrize("net", [tower(), ResNeXt((1, 1, 1, 1))], ids=["vit", "resnext"])
def test_every_tower_keeps_the_promise(net):
    assert type(net) in [find_class() for find_class in vision.TOWERS.values()]
    with torch.no_grad():
        y = net(torch.randn(2, 3, 64, 64), -1)
    assert y.shape == (2, 1 + net.num_patches(64), net.width)
    again = vision.build_tower(vision.describe_tower(net))
    again.load_state_dict(net.state_dict())
    assert features.fingerprint(again) == features.fingerprint(net)
    assert net.fault(64, -1) == "" and net.fault(64, -99) and net.fault(4, -1)
    with pytest.raises(ValueError, match="select_layer"):
        net(torch.randn(1, 3, 64, 64), -99)


def test_a_fingerprint_knows_what_no_weight_knows():
    prints = {
        features.fingerprint(tower()),
        features.fingerprint(tower(1)),
        features.fingerprint(tower(heads=2)),
        features.fingerprint(tower(offset=0.0)),
        features.fingerprint(tower(), -2),
        features.fingerprint(tower(), -1, True),
    }
    assert len(prints) == 6 and features.fingerprint(tower()) == features.fingerprint(tower())
