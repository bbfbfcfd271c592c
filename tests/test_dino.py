"""Self-distillation: views, the loss written out, the teacher, and a probe that finds things."""

import numpy as np
import pytest
import torch
from conftest import one_line

import train
from batches import FramePairs
from common.images import ImageFormat
from config import UserError
from dino import DINO, crop, linear_probe, recolour
from pretrained.convnets import ConvNeXt
from vision import ViT

FORMAT = ImageFormat(32)


def tower(seed=0, **shape):
    torch.manual_seed(seed)
    net = ViT(**{"size": 32, "patch": 8, "width": 64, "depth": 2, "heads": 1} | shape).eval()
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.1)
    return net


def pairs(count=4, first=0, size=32, seed=0):
    rng = np.random.RandomState(seed)
    frames, others = rng.randint(0, 256, (2, first + count, size, size, 3), np.uint8)
    return FramePairs(frames[first:], others[first:], first, count)


def make(**how):
    torch.manual_seed(0)
    how = {"prototypes": 8, "hidden": 16, "bottleneck": 4} | how
    return DINO(tower(), tower(1), **how)


def test_views_follow_from_seed_step_and_place_in_the_batch():
    """However a batch is cut, by ranks or micro-batches, each row is seen in the same way."""
    dino = make(local_views=1, mask=0.5)
    whole = dino.inputs(pairs(6), FORMAT, seed=3, step=7)
    for cuts in ((3, 6), (2, 4, 6), (1, 2, 3, 4, 5, 6)):
        first = 0
        for end in cuts:
            rng = np.random.RandomState(0)
            frames, others = rng.randint(0, 256, (2, 6, 32, 32, 3), np.uint8)
            piece = FramePairs(frames[first:end], others[first:end], first, end - first)
            part = dino.inputs(piece, FORMAT, seed=3, step=7)
            n = end - first
            assert torch.equal(part[0][:n], whole[0][first:end])
            assert torch.equal(part[0][n:], whole[0][6 + first : 6 + end])
            assert torch.equal(part[1], whole[1][first:end])
            assert torch.equal(part[2][:n], whole[2][first:end])
            assert torch.equal(part[2][n:], whole[2][6 + first : 6 + end])
            first = end
    assert not torch.equal(dino.inputs(pairs(6), FORMAT, 3, 8)[0], whole[0])


def test_turned_hues_keep_their_mean_and_grey_loses_colour():
    flat = torch.tensor([0.8, 0.3, 0.1])[None, :, None, None].expand(64, 3, 16, 16)
    numbers = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    turned, grey = recolour(flat, numbers, grey=0), recolour(flat, numbers, grey=1)
    assert (grey[:, 0] - grey[:, 2]).abs().max() < 1e-5
    assert len({int(x[:, 0, 0].argmax()) for x in turned}) == 3  # red, green and blue all lead
    inside = turned[((turned > 0.01) & (turned < 0.99)).flatten(1).all(1)]  # none was clipped
    brightness = inside.mean(1) / 0.4
    assert ((brightness > 0.59) & (brightness < 1.41)).all()


def test_crops_keep_to_the_picture():
    ramp = torch.linspace(0, 1, 32).expand(16, 3, 32, 32)
    numbers = torch.rand(16, 8, generator=torch.Generator().manual_seed(0))
    views = crop(ramp, 24, (0.4, 1.0), numbers)
    assert views.shape == (16, 3, 24, 24) and views.min() >= 0 and views.max() <= 1
    rises = views[:, 0, 0, -1] > views[:, 0, 0, 0]
    assert torch.equal(rises, numbers[:, 2] >= 0.5)  # else mirrored


def test_dinos_loss_is_the_sum_written_out():
    dino = make(local_views=2)
    for parameter in dino.teacher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    dino.centre.normal_()
    wide, near, _ = dino.inputs(pairs(), FORMAT, 0, 0)
    assert wide.shape == (8, 3, 24, 24) and near.shape == (8, 3, 16, 16)
    with torch.no_grad():
        head = lambda network, x: network["head"](network["backbone"](x)[:, 0]).double()
        loss, terms = 0.0, 0
        for i in range(2):
            t = ((head(dino.teacher, wide[4 * i : 4 * i + 4]) - dino.centre) / 0.04).softmax(-1)
            for j in range(4):
                x = wide[4 * j : 4 * j + 4] if j < 2 else near[4 * j - 8 : 4 * j - 4]
                if i != j:
                    s = (head(dino.student, x) / 0.1).log_softmax(-1)
                    loss, terms = loss - (t * s).sum() / 4, terms + 1
        assert abs(dino(wide, near)[1] - loss / terms) < 1e-4


def test_the_student_sees_the_tokens_that_are_kept():
    """A token left out is as if its keys were hidden from all others; the teacher sees all."""
    dino = make(mask=0.5)
    wide, _, kept = dino.inputs(pairs(), FORMAT, 0, 0)
    assert kept.shape == (8, 1 + round(9 / 2)) and (kept[:, 0] == 0).all()
    for row in kept.tolist():
        assert row == sorted(set(row)) and 1 <= row[1] and row[-1] <= 9
    net = dino.student["backbone"].double()
    found = net(wide.double(), kept=kept)
    for image, row, got in zip(wide.double(), kept, found):
        x = net.patch_embed(image[None])
        x = torch.cat([net.cls_token.double(), x], 1) + net.position_embeddings(3, 3)
        x = x[:, row]
        for block in net.blocks:
            x = block(x)
        assert torch.allclose(net.norm(x)[0], got, atol=1e-9)
    one, other = (net(wide.double()[:1], kept=kept[i : i + 1]) for i in (0, 1))
    assert not torch.allclose(one[:, 0], other[:, 0])
    with torch.no_grad():
        dino.student["backbone"].float()
        outputs, masked = dino(wide, None, kept)
        again, whole = dino(wide)
    assert torch.equal(outputs, again) and masked != whole


def test_a_tower_without_patches_takes_no_mask(home):
    flags = ["--vision_tower=convnext", "--conv_stages", "1", "1", "--student_mask=0.5"]
    with pytest.raises(UserError, match="student_mask: a convnext has no patches") as error:
        train.main(["--data=data/tiny", "--out=out/conv", *flags])
    assert one_line(error)


def test_the_centre_is_the_mean_over_all_micro_batches():
    """It once saw only the last one."""
    outputs = []
    for cuts in ([(0, 6)], [(0, 3), (3, 6)], [(0, 2), (2, 4), (4, 6)]):
        dino = make()
        frames, others = np.random.RandomState(0).randint(0, 256, (2, 6, 32, 32, 3), np.uint8)
        for a, b in cuts:
            dino(*dino.inputs(FramePairs(frames[a:b], others[a:b], a, b - a), FORMAT, 0, 0))
        dino.after_step(0.0, taken=True)
        outputs.append(dino.centre.clone())
    assert outputs[0].abs().sum() > 0
    assert all(torch.allclose(outputs[0], other, atol=1e-6) for other in outputs[1:])


def test_a_skipped_step_leaves_nothing_to_the_next():
    """Its outputs, not finite perhaps, were once counted into the next step's centre."""
    centres = []
    for skipped in (False, True):
        dino = make()
        if skipped:
            dino(*dino.inputs(pairs(), FORMAT, 0, 0))
            dino.after_step(0.0, taken=False)
        dino(*dino.inputs(pairs(), FORMAT, 0, 1))
        dino.after_step(0.0, taken=True)
        centres.append(dino.centre)
    assert torch.equal(*centres) and centres[0].abs().sum() > 0


def test_the_teacher_follows_and_is_never_trained():
    dino = make(momentum=0.9)
    dino(*dino.inputs(pairs(), FORMAT, 0, 0))[1].backward()
    assert all(p.grad is None for p in dino.teacher.parameters())
    assert all(p.grad is not None for p in dino.student.parameters())
    slow, fast = dino.teacher["head"].last.weight, dino.student["head"].last.weight
    fast.data += 1.0
    before = slow.clone()
    dino.after_step(0.0, taken=True)
    assert torch.allclose(slow, 0.9 * before + 0.1 * fast)
    before = slow.clone()
    dino(*dino.inputs(pairs(), FORMAT, 0, 1))
    dino.after_step(1.0, taken=True)
    assert torch.equal(slow, before)


@pytest.mark.parametrize("size, patch", [(16, 16), (12, 8)])
def test_small_pictures_still_make_whole_patches(size, patch):
    dino = DINO(*(ViT(patch, patch, 16, 1, 1) for _ in range(2)), prototypes=4, local_views=1)
    big, small, _ = dino.inputs(pairs(size=size), ImageFormat(size), 0, 0)
    assert big.shape[-1] >= patch and small.shape[-1] >= patch


def test_the_probe_finds_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (800,))
    plain = torch.randn(800, 10)
    there = plain + 3 * torch.nn.functional.one_hot(labels, 10)
    assert linear_probe(there, labels, 600) > 0.95
    assert linear_probe(plain, labels, 600) < 0.4


def test_cls_alone_is_the_cls_of_all():
    torch.manual_seed(0)
    towers = (
        ViT(32, 8, 16, 2, 2),
        ViT(32, 8, 16, 2, 2, scaled=True, registers=3),
        ViT(32, 8, 16, 2, 2, cls=False),
        ConvNeXt((1, 1), 16, 4),
    )
    pixels = torch.randn(3, 3, 32, 32)
    for tower in towers:
        alone, whole = tower(pixels, only_cls=True), tower(pixels)
        assert alone.shape == (3, 1, tower.width)
        assert torch.allclose(alone, whole[:, :1], atol=1e-5)
        given = torch.randn_like(alone)
        gradients = [
            torch.autograd.grad((out * given).sum(), list(tower.parameters()), allow_unused=True)
            for out in (alone, whole[:, :1])
        ]
        for a, b in zip(*gradients):
            assert (a is None) == (b is None)
            assert a is None or (a - b).abs().max() < 1e-4 * (1 + b.abs().max())
    middle = ViT(32, 8, 16, 3, 2)
    assert torch.allclose(middle(pixels, -2, True), middle(pixels, -2)[:, :1], atol=1e-6)
