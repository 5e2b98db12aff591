"""Backbones: sizes, positions, the late [CLS], strict loading."""

from functools import partial

import common

import pytest
import torch
import torch.nn.functional as F
import torchvision


def count(m):
    return sum(p.numel() for p in m.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        vit = common.ViT("vit_small")
        assert count(vit) == 21_665_664 and count(vit.blocks[0]) == 1_774_464 and count(vit.patch_embed) == 295_296
        assert count(common.ViT("vit_small", cls_layer=3)) == 21_665_280  # no position for a late [CLS]
        assert vit.blocks[0].attn.num_heads == 6


def test_sincos_positions_term_by_term():
    table, d = common.sincos_positions(3, 5, 16)[0], 4
    for a in range(3):
        for b in range(5):
            w = 10000.0 ** (-torch.arange(d) / d)
            assert torch.allclose(
                table[a * 5 + b], torch.cat([(a * w).sin(), (a * w).cos(), (b * w).sin(), (b * w).cos()]), atol=1e-6
            )


@pytest.mark.parametrize("cls_layer", [0, 3])
@pytest.mark.usefixtures("pico")
def test_positions_on_other_grids(cls_layer):
    vit = common.ViT("vit_pico", img_size=32, patch_size=4, cls_layer=cls_layer, pos="sincos")
    assert torch.equal(vit.positions(8, 8), common.sincos_positions(8, 8, 128)) and not vit.pos_embed.requires_grad
    table = vit.positions(8, 8).view(1, 8, 8, 128).permute(0, 3, 1, 2)
    assert torch.allclose(
        vit.positions(7, 10).view(7, 10, 128).permute(2, 0, 1), F.interpolate(table, (7, 10), mode="bicubic")[0]
    )
    assert vit(torch.randn(2, 3, 28, 40)).shape == (2, 128)


def test_late_cls_leaves_the_map_of_f1_alone():
    vit = common.ViT("vit_pico", img_size=16, patch_size=4, cls_layer=3).eval()
    x = torch.randn(2, 3, 16, 16)
    y, tapped = vit.trace(x, (2, 3, 4))
    assert [tapped[k].shape[1] for k in (2, 3, 4)] == [16, 16, 17]
    with torch.no_grad():
        vit.cls_token += 1
    moved, tapped_again = vit.trace(x, (3, 4))
    assert torch.equal(tapped[3], tapped_again[3]) and not torch.equal(y, moved)


@pytest.mark.usefixtures("pico")
def test_forward_is_timm_s():
    """[CLS] at the input, learned positions: timm's own forward on the same weights."""
    vit = common.ViT("vit_pico", img_size=16, patch_size=4).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(vit(x), super(common.ViT, vit).forward(x), atol=1e-6)
        tokens = vit.forward_intermediates(x, indices=[3], norm=False, intermediates_only=True)[0]  # (2, 128, 4, 4)
        assert torch.allclose(vit.tokens(x, after=4), tokens.permute(0, 2, 3, 1), atol=1e-6)
        last = vit.last_blocks(x)
        assert last.shape == (2, 512) and torch.allclose(last[:, -128:], vit(x), atol=1e-6)
        assert torch.allclose(last[:, 128:256], vit.norm(vit.trace(x, (4,))[1][4][:, 0]), atol=1e-6)


@pytest.mark.parametrize("arch, dim", [("resnet18", 512), ("resnet50", 2048)])
def test_resnet_is_torchvision_s(arch, dim):
    ours, theirs = common.make_backbone(arch, (0,) * 3, (1,) * 3, 64).eval(), getattr(torchvision.models, arch)().eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.fc, x = torch.nn.Identity(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert (
            ours.dim == dim
            and torch.allclose(ours(x), theirs(x), atol=1e-6)
            and torch.equal(ours.last_blocks(x), ours(x))
        )
        assert ours.tokens(x, after=3).shape == (2, 4, 4, dim // 2) and torch.allclose(
            ours.tokens(x, after=4).mean((1, 2)), ours(x), atol=1e-6
        )


def test_resnet_pico_is_a_quarter_as_wide_and_starts_like_the_others():
    pico = common.make_backbone("resnet_pico", (0,) * 3, (1,) * 3, 32, stem="cifar")
    with torch.no_grad():
        assert pico.dim == 128 and pico.tokens(torch.randn(1, 3, 32, 32), after=1).shape == (1, 32, 32, 16)
    for m in pico.modules():
        if isinstance(m, torch.nn.Conv2d):  # He, fan-out
            expected = (2 / (m.out_channels * m.kernel_size[0] ** 2)) ** 0.5
            assert m.bias is None and m.weight.std().item() == pytest.approx(expected, rel=0.15)


def saved(tmp_path, change=lambda state: None):
    vit = common.make_backbone("vit_pico", *common.CIFAR10, img_size=16, patch_size=4, cls_layer=3, pos="sincos")
    state = dict(
        format=common.FORMAT,
        method="ser",
        args={},
        step=0,
        backbone=vit.description,
        backbone_state=vit.state_dict(),
        train_state={},
    )
    change(state)
    common.save_checkpoint(tmp_path / "c.pt", state)
    return vit, tmp_path / "c.pt"


def test_load_backbone_rebuilds_the_encoder(tmp_path):
    vit, path = saved(tmp_path)
    loaded, _ = common.load_backbone(path)
    x = torch.randn(2, 3, 16, 16)
    assert (
        torch.equal(loaded(x), vit.eval()(x))
        and not loaded.training
        and (loaded.mean, loaded.img_size) == (list(common.CIFAR10[0]), 16)
    )
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda s: s["backbone_state"].pop("norm.weight"), "norm.weight"),
        (lambda s: s["backbone_state"].update(extra=torch.zeros(1)), "extra"),
        (lambda s: s["backbone_state"].update({"norm.weight": torch.zeros(7)}), "norm.weight"),
        (lambda s: s["backbone"].update(arch="resnet_pico"), "resnet_pico"),
        (lambda s: s["backbone"].update(arch="resnet_huge"), "--arch resnet_huge"),
    ],
)
def test_C10_load_backbone_is_strict(tmp_path, capsys, change, word):
    _, path = saved(tmp_path, change)
    with pytest.raises(SystemExit) as end:
        common.load_backbone(path)
    err = capsys.readouterr().err.strip()
    assert end.value.code == 2 and word in err and len(err.splitlines()) == 1


def test_knn_on_a_known_vote():
    """Two neighbours of class 0 at cosine 0.5 against one of class 1 at 0.6: 2 e^(.5/.07) < e^(.6/.07), so class 1
    wins; with k = 3 and equal weights it would not."""
    at = lambda c: [c, (1 - c * c) ** 0.5]
    train, labels = torch.tensor([at(0.5), at(0.5), at(0.6), at(-0.9)]), torch.tensor([0, 0, 1, 2])
    vote = partial(common.knn, train, labels, torch.tensor([[1.0, 0.0]]), classes=3)
    scores = vote(k=3)
    assert scores.argmax() == 1 and scores[0, 2] == 0
    assert vote(k=3, temperature=1.0).argmax() == 0
    assert torch.equal(vote(k=99), vote(k=4))
    ratio = scores[0, 1] / (scores[0, 0] / 2)
    assert ratio.item() == pytest.approx(4.1727, rel=1e-3)  # exp(0.1 / 0.07)


def test_N15_the_vote_finds_what_is_there_and_nothing_in_noise():
    g, labels = common.rng("vote"), torch.arange(2000) % 4
    noise = torch.randn(2000, 16, generator=g)

    def right(z, labels):
        scores = common.knn(z[:1000], labels[:1000], z[1000:], classes=4)
        return (scores.argmax(1) == labels[1000:]).double().mean().item()

    assert right(F.one_hot(labels, 16) + 0.1 * noise, labels) == 1
    assert abs(right(noise, labels[torch.randperm(2000, generator=g)]) - 0.25) < 3 * (0.25 * 0.75 / 1000) ** 0.5


def test_N15_features_do_not_depend_on_the_size_of_batches():
    shape = dict(img_size=16, patch_size=4, cls_layer=0, pos="learned", drop_path=0.5)
    vit = common.make_backbone("vit_pico", *common.CIFAR10, **shape).double().train()
    images = torch.randint(0, 256, (13, 3, 16, 16), dtype=torch.uint8, generator=common.rng("features"))
    data, device = common.ImageSet(images=images), torch.device("cpu")
    encode = lambda x: vit(x.double())
    whole, *others = (common.features(vit, data, device, encode=encode, batch_size=b) for b in (13, 5, 1))
    assert vit.training  # and what was computed in float64 is given back as float32
    assert all((other - whole).abs().max() <= 2e-7 * whole.abs().max() for other in others)


def test_the_mean_of_a_resnet_is_taken_in_float32_under_autocast():
    net, x = common.make_backbone("resnet_pico", *common.CIFAR10, img_size=16).eval(), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, tapped = net.trace(x, (4,))
    assert tapped[4].dtype == torch.bfloat16 and y.dtype == torch.float32
    assert torch.equal(y, tapped[4].float().mean((1, 2)))
    pooled = net.avgpool(net.trace(x, (4,))[1][4].permute(0, 3, 1, 2)).flatten(1)
    assert torch.equal(net(x), pooled) and net.double()(x.double()).dtype == torch.float64
