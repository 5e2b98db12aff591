"""RECON, SIE, VICReg: losses against closed forms and loops, the decoder's structure, where gradients flow, views and
latents."""

import itertools
import math

import common
import recon_xattn as rx

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_distributed import on_ranks
from test_run import content, same
from test_ser import no_copies  # noqa: F401

OBJECTIVES = ("recon", "sie", "vicreg", "supervised")


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def args_for(objective="recon", **changes):
    tiny = dict(batch_size=8, img_size=16, patch_size=4, neck=32, embed_dim=24, decoder_depth=2, proj_hidden=16)
    values = rx.values_in_force(rx.Args(objective=objective))
    return rx.Args(**values | dict(objective=objective) | tiny | changes)


def random_images():
    """32 of four classes."""
    images = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=common.rng("test"))
    return common.ImageSet(images=images, labels=torch.arange(32) % 4)


def setup(objective="recon", posed=False, **changes):
    """(args, model in float64, views, z) of one step on random images."""
    args = args_for(objective, **changes)
    rx.check(args)
    families = rx.known_families(args, False)
    policies = rx.make_policies(args, False)
    draw = rx.partial(rx.draw_views, args, policies, families)
    loader = common.Loader(random_images(), policies, draw, args, torch.device("cpu"))
    views, params, _ = next(loader.batches([0]))
    z = rx.latent(families, params["2"], 16)
    model = rx.build(args, torch.device("cpu"), z.shape[1] if objective == "sie" else 4).double()
    return args, model, {k: v.double() for k, v in views.items()}, z


# ---- VICReg, SIE ------------------------------------------------------------------------------------

SQUARE = t([1, 1], [1, -1], [-1, 1], [-1, -1])


@pytest.mark.parametrize(
    "z1, z2, terms, paper, ours",
    [
        (t([1, 2], [3, 4]), t([1, 2], [3, 4]), (0, 0, 8), 8, 8),
        (torch.zeros(4, 3).double(), torch.zeros(4, 3).double(), (0, 0.99, 0), 24.75, 9.9),
        (t([0, 0], [2, 0]), t([0, 0], [0, 2]), (2, 0.495, 0), 62.375, 24.95),
        (SQUARE, SQUARE, (0, 0, 0), 0, 0),
        (SQUARE / 2, SQUARE / 2, (0, 0.422563, 0), 10.56408, 4.22563),
        (
            t([1, 0, 2], [0, 1, 0], [-1, 0, 1]),
            t([1, 1, 0], [0, 1, 1], [0, -1, 1]),
            (0.888889, 0.211282, 0.555556),
            28.05982,
            11.55726,
        ),
    ],
)
def test_N13_vicreg_values(z1, z2, terms, paper, ours):
    for weights, value in (((25, 25, 1), paper), ((10, 10, 1), ours)):
        out = rx.vicreg(z1, z2, rx.Args(sim_weight=weights[0], var_weight=weights[1], cov_weight=weights[2]))
        assert [out[k].item() for k in ("L_sim", "L_var", "L_cov")] == pytest.approx(terms, abs=1e-4)
        assert out["L_ssl"].item() == pytest.approx(value, abs=1e-4)


def test_T6_variance_has_a_gradient_at_collapse():
    z = torch.zeros(4, 3, requires_grad=True)
    rx.variance(z).backward()
    assert torch.isfinite(z.grad).all()


def test_split_loss_value():
    inv1, inv2 = t([1, 0], [0, 1], [-1, -1]), t([1, 1], [0, 1], [0, -1])
    equi1, equi2 = t([1, 2], [0, 1], [-1, 0]), t([2, 1], [1, 0], [0, -1])
    model = rx.SIE(torch.nn.Identity(), args_for("sie", proj_hidden=2), 4).double()
    swap, nothing = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.zeros(2, 2)
    W = torch.stack([nothing, nothing, swap, torch.eye(2)], 2).double()  # (out, in, K)
    model.W.weight.data = W.view(4, 4)
    p = model.predict(equi1, t([0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0.6, 0.8]))
    assert torch.allclose(p, t([1, 2], [1, 0], [-0.8, -0.6]))
    out = rx.split_loss(inv1, inv2, equi1, equi2, p, rx.Args())
    expected = dict(L_sim=1 / 3, L_equi=0.466667, L_var=0.052820, L_var_predicted=0.0, L_cov=3.680556, loss=9.642093)
    assert {k: out[k].item() for k in expected} == pytest.approx(expected, abs=1e-5)


def test_hypernetwork_is_linear_in_z():
    model = rx.SIE(torch.nn.Identity(), args_for("sie", proj_hidden=6), 5).double()
    x, z = torch.randn(3, 6).double(), torch.randn(3, 5).double()
    made = torch.stack([(model.W.weight @ z[i]).view(6, 6) @ x[i] for i in range(3)])  # row-major (out, in)
    assert torch.allclose(model.predict(x, z), made) and torch.allclose(model.predict(x, 2 * z), 2 * made)
    assert model.predict(x, 0 * z).abs().max() == 0
    assert model.W.weight.abs().max() <= 5**-0.5


# ---- sizes ------------------------------------------------------------------------------------------


def test_parameter_counts_of_the_paper():
    count = lambda m: sum(p.numel() for p in m.parameters())
    args = rx.Args(recipe="imagenet")
    with torch.device("meta"):
        backbone = rx.NeckViT(arch="vit_small")
        model = rx.Recon(backbone, args, None)
        small = rx.NeckViT(arch="vit_small", img_size=32, patch_size=4)
        cifar = rx.Recon(small, rx.Args(recipe="cifar10", patch_size=4, img_size=32), None)
        sie = rx.SIE(backbone, args, 4)
    assert count(backbone) - count(backbone.neck) == 21_664_896 and count(backbone.neck) == 197_120
    assert count(small) - count(small.neck) == 21_337_728
    assert count(model.g_inv) == 1_513_472 and count(model.cross) == 445_248 and count(model.blocks[0]) == 444_864
    decoder = lambda m: count(m.cross) + count(m.blocks) + count(m.pixels)
    assert decoder(model) == 2_818_176 and decoder(cifar) == 2_679_216
    assert count(sie.inv) == 2_365_440 and count(sie.W) == 4_194_304


# ---- the decoder --------------------------------------------------------------------------------------


def test_patches_and_back():
    x = torch.randn(2, 3, 8, 8)
    patches = torch.stack([x[:, :, r : r + 4, c : c + 4].flatten(1) for r in (0, 4) for c in (0, 4)], 1)
    assert torch.equal(rx.unpatchify(patches, 4), x)


@pytest.fixture(scope="module")
def decoder():
    _, model, _, _ = setup()
    return model.eval()


def test_images_of_a_batch_do_not_see_each_other(decoder):
    t1, t2 = torch.randn(2, 4, 16, 32).double()
    drawn = decoder.decode(t1, t2)
    t1[2], t2[3] = torch.randn(2, 16, 32)
    changed = (decoder.decode(t1, t2) - drawn).flatten(1).abs().amax(1)
    assert (changed > 1e-6).tolist() == [False, False, True, True] and changed[:2].max() < 1e-12


def test_the_decoder_knows_view_2_only_through_attention(decoder):
    """If all tokens of view 1 are equal there is nothing to choose: view 2 has no say. With one token neither."""
    z1 = torch.randn(3, 1, 24).double().expand(3, 16, 24)
    a, b = (decoder.cross(torch.randn(3, 16, 24).double(), z1) for _ in range(2))
    assert (a - b).abs().max() < 1e-9
    block = rx.CrossBlock(24, torch.zeros(1, 1, 24)).double()
    z1 = torch.randn(3, 1, 24).double()
    a, b = (block(torch.randn(3, 1, 24).double(), z1) for _ in range(2))
    assert torch.allclose(a, b)


def test_key_and_value_have_no_positions(decoder):
    z1, z2 = torch.randn(2, 3, 16, 24).double()
    assert torch.allclose(decoder.cross(z2, z1), decoder.cross(z2, z1[:, torch.randperm(16)]))


def test_cross_attention_equals_the_loop(decoder):
    block, (z1, z2) = decoder.cross, torch.randn(2, 1, 16, 24).double()
    q, kv = block.q(block.norm_q(z2))[0], block.kv(block.norm_kv(z1))[0]
    k, v = kv[:, :24], kv[:, 24:]
    rows = []
    for i in range(16):
        w = torch.stack([q[i] @ k[j] / math.sqrt(24) for j in range(16)]).exp()  # one head of 24
        rows.append(sum(w[j] / w.sum() * v[j] for j in range(16)))
    h = block.positions[0] + block.out(torch.stack(rows))
    assert torch.allclose(block(z2, z1)[0], h + block.mlp(block.norm(h)))


# ---- a whole step ---------------------------------------------------------------------------------------


def test_which_half_learns_from_what():
    """L_recon: no gradient to g_inv and to the neck's first half, some to its second half from both views; L_ssl: the
    reverse."""
    args, model, views, z = setup()
    out, _ = model(views)
    for name, half, other in (("L_recon", slice(16, 32), slice(0, 16)), ("L_ssl", slice(0, 16), slice(16, 32))):
        model.zero_grad()
        out[name].backward(retain_graph=True)
        grad = model.backbone.neck.weight.grad
        assert grad[half].abs().max() > 0 and grad[other].abs().max() == 0
        moved = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
        touched = {n.split(".")[0] for n in moved}
        assert touched == {"backbone", *(("g_equi", "cross", "blocks", "pixels") if name == "L_recon" else ("g_inv",))}
    t1, t2 = (model.backbone.patches(views[v]).detach().requires_grad_() for v in "12")
    F.mse_loss(model.decode(t1, t2), views["2"]).backward()
    assert all(v.grad[..., 16:].abs().max() > 0 and v.grad[..., :16].abs().max() == 0 for v in (t1, t2))


def test_N10_swapping_the_views_changes_the_reconstruction_only():
    args, model, views, _ = setup()
    a, _ = model(views)
    b, _ = model({"1": views["2"], "2": views["1"]})
    assert a["L_ssl"].item() == pytest.approx(b["L_ssl"].item(), rel=1e-9)
    assert abs(a["L_recon"].item() - b["L_recon"].item()) > 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_N14_N16_T7_8_pairs_are_overfitted(objective):
    args, model, views, z = setup(objective)
    model, views, labels = model.float(), {k: v.float() for k, v in views.items()}, torch.arange(8) % 4
    optimizer, values = torch.optim.Adam(model.parameters(), lr=2e-3), []
    for _ in range(60):
        out, y = model(views, z, labels)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        values.append(out["L_recon" if objective == "recon" else "loss"].item())
    share = 0.7 if objective == "vicreg" else 0.5  # 8 rows cannot be uncorrelated in 32 dimensions
    assert values[-1] < share * values[0] and y.shape == (8, 32)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_makes_the_host_wait_for_no_copy(objective, request):
    args, model, views, z = setup(objective)
    model, views = model.to("meta"), {name: x.to("meta") for name, x in views.items()}
    with request.getfixturevalue("no_copies"):
        out, _ = model(views, z, torch.zeros(8, dtype=torch.long))
        out["loss"].backward()
    assert out["loss"].is_meta and any(p.grad is not None for p in model.parameters())


def train(objective, steps=3):
    """Tiny training in float64 -> (losses, gradients of the first step), as numpy."""
    args, data = args_for(objective), random_images()
    policies, device = rx.make_policies(args, False), torch.device("cpu")
    loader = common.Loader(data, policies, rx.partial(rx.draw_views, args, policies, common.FAMILIES), args, device)
    model, losses = rx.build(args, device, 15 if objective == "sie" else 4).double(), []
    optimizer, ddp = torch.optim.SGD(model.parameters(), lr=0.01), common.distributed(model)
    for step in range(steps):
        views, params, rows = next(loader.batches([step]))
        z = rx.latent(common.FAMILIES, params["2"], 16)
        out, _ = ddp({k: v.double() for k, v in views.items()}, z, data.labels[rows["1"]])
        optimizer.zero_grad()
        out["loss"].backward()
        losses.append([common.all_reduce(v.detach().double()).item() / common.world_size() for v in out.values()])
        if step == 0:
            gradients = [p.grad.clone().numpy() for p in model.parameters()]
        optimizer.step()
    return losses, gradients


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_N1_N3_2_processes_train_the_same_model(objective, tmp_path):
    (losses, gradients), *_ = on_ranks(1, tmp_path, train, objective)
    scale = max(abs(g).max() for g in gradients)
    for other_losses, other_gradients in on_ranks(2, tmp_path, train, objective):
        assert torch.allclose(torch.tensor(other_losses), torch.tensor(losses), rtol=1e-8, atol=0)
        for a, b in zip(gradients, other_gradients):
            assert abs(a - b).max() <= 1e-8 * max(abs(a).max(), 1e-3 * scale)


TINY_MODEL = "--arch vit_pico --neck 16 --embed-dim 24 --decoder-depth 2 --proj-hidden 16"


@pytest.fixture
def small(folder):
    data = ["--data", "imagefolder", "--data-dir", str(folder), "--recipe", "cifar10", "--img-size", "16"]
    run = "--batch-size 12 --epochs 2 --warmup-epochs 1 --workers 0 --device cpu"
    return [*data, *run.split(), *TINY_MODEL.split()]


@pytest.mark.parametrize(
    "variant",
    [
        "recon",
        "sie",
        "sie --sie-single",
        "sie --sie-params rotation crop",
        "sie --known-fraction 0.5",
        "vicreg",
        "supervised",
        "supervised --known-fraction 0.5",
    ],
)
def test_N7_every_variant_trains_and_resumes_to_the_same_bits(variant, small, tmp_path, capsys):
    small = [*small, "--objective", *variant.split()]
    rx.main([*small, "--out", str(tmp_path / "whole")])
    rx.main([*small, "--out", str(tmp_path / "halved"), "--max-steps", "1"])
    rx.main([*small, "--out", str(tmp_path / "halved"), "--resume"])
    assert same(*(content(tmp_path / name / "checkpoint.pt") for name in ("whole", "halved")))
    assert (tmp_path / "whole" / "reconstruction.png").exists() == (variant == "recon")
    assert "k-NN accuracy" in capsys.readouterr().out


SIE_OF_BLOCKS = "--objective sie --data blocks --recipe blocks --img-size 32"


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--known-fraction 0.2", ("--known-fraction 0.2", "recon")),
        (f"{SIE_OF_BLOCKS} --sie-params blur", ("--sie-params blur", "rotation color")),
        ("--embed-dim 130", ("--embed-dim 130",)),
        ("--sie-single", ("--sie-single", "--objective sie")),
        ("--objective vicreg --sie-params blur", ("--sie-params", "--objective sie")),
        (f"{SIE_OF_BLOCKS} --sie-single", ("--sie-single", "poses")),
        ("--data blocks --recipe blocks --img-size 32 --crop-scale 0.9 0.95", ("--crop-scale", "poses")),
        ("--patch-size 16", ("--patch-size 16", "single patch")),
        ("--data imagefolder --recipe ade20k", ("--recipe ade20k", "3diebench")),
        ("--lr nan", ("--lr nan",)),
    ],
)
def test_mistakes(argv, words, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "N_OBJECTS", dict(train=20, test=20))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if "--data blocks" in argv:
        small = [flag for flag in small if flag not in small[2:4]]  # without --data-dir
    with pytest.raises(SystemExit) as end:
        rx.main([*small, *argv.split(), "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.strip().splitlines()) == 1 and all(w in err for w in words)


# ---- views and latents ------------------------------------------------------------------------------------


def drawn_params(n=64, **changes):
    args = args_for("sie", batch_size=n, **changes)
    families = rx.known_families(args, False)
    policies = rx.make_policies(args, False)
    draws = rx.draw_views(args, policies, families, common.rng(0))
    params = {v: p for v, (_, p) in draws.items()}
    for v in params:
        policies[v].crop.place(params[v], torch.full((n, 2), 16))
    return families, policies, params


def test_N6_view_2_is_a_transformation_of_view_1():
    """At the identity of every family both views are the same crop; with the families they are not."""
    x = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    families, policies, params = drawn_params(8, sie_params=("flip",))
    still = params["2"] | {key: torch.full_like(params["2"][key], value) for key, value in rx.IDENTITY.items()}
    assert torch.allclose(policies["1"](x, params["1"]), policies["2"](x, still), atol=2e-5)
    flipped = policies["2"](x, params["2"])
    one = policies["1"](x, params["1"])
    for a, b, f in zip(one, flipped, params["2"]["flip"]):
        assert torch.allclose(b, a.flip(2) if f else a, atol=2e-5)
    assert 0 < params["2"]["flip"].sum() < 8


def test_N6_N11_latents_of_all_families():
    families, _, params = drawn_params()
    z, p = rx.latent(families, params["2"], 16), params["2"]
    assert z.shape == (64, 15) and torch.equal(z[:, 0], torch.ones(64))  # K = 1 + 14
    for i in range(4):
        phi = math.radians(float(p["angle"][i]))
        row = [
            1,
            math.sin(phi),
            math.cos(phi) - 1,
            *((float(p[k][i]) - 1) / 0.4 for k in ("brightness", "contrast", "saturation")),
            float(p["hue"][i]) / 0.1,
            float(p["sigma"][i]) / 2,
            float(p["shift_y"][i]) / 4,
            float(p["shift_x"][i]) / 4,
            float(p["recrop_top"][i] + p["recrop_height"][i] / 2) - 0.5,
            float(p["recrop_left"][i] + p["recrop_width"][i] / 2) - 0.5,
            float(p["recrop_height"][i]) - 1,
            float(p["recrop_width"][i]) - 1,
            float(p["flip"][i]),
        ]
        assert z[i].tolist() == pytest.approx(row, abs=1e-6)
    identity = {k: torch.full_like(p[k], v) for k, v in rx.IDENTITY.items()}
    assert torch.equal(rx.latent(families, identity, 16), torch.eye(15)[:1].expand(64, 15))


@pytest.mark.parametrize(
    "families, K",
    [(("rotation",), 3), (("color",), 5), (("blur",), 2), (("translation",), 3), (("crop",), 5), (("flip",), 2)],
)
def test_only_the_named_family_happens(families, K):
    there, _, params = drawn_params(sie_params=families)
    assert there == families and rx.latent(there, params["2"], 16).shape == (64, K)
    moved = {key for key, value in rx.IDENTITY.items() if (params["2"][key] != value).any()}
    assert moved == {key for name in families for key in rx.KEYS[name]}


def test_one_family_at_a_time():
    _, _, params = drawn_params(240, sie_single=True)
    moved = {key: params["2"][key] != value for key, value in rx.IDENTITY.items()}
    happens = [torch.stack([moved[key] for key in rx.KEYS[name]]).any(0) for name in common.FAMILIES]
    happens = torch.stack(happens)  # (families, n)
    assert happens.sum(0).max() == 1 and (happens.sum(1) >= 5).all()


def test_latents_of_poses():
    angles = [[math.pi / 2, 0, 0], [0, math.pi / 2, 0], [0.1, 0.2, 0.3], [0.3, -0.2, 0.5]]
    hues = dict(floor_hue=torch.tensor([0.1, 0.4, 0.9, 0.2]), light_hue=torch.tensor([0.0, 0.5, 0.5, 0.1]))
    factors = dict(rotation=common.quaternion_from_angles(torch.tensor(angles)), **hues)
    z = rx.pose_latent(("rotation", "color"), factors, torch.tensor([0, 2]), torch.tensor([1, 3]))
    assert z[0].tolist() == pytest.approx([-0.5, 0.5, -0.5, 0.5, 0.3, 0.5], abs=1e-6)
    assert z[1].tolist() == pytest.approx([0.097355, -0.173903, 0.137116, 0.970299, -0.7, -0.4], abs=1e-6)


def loader_of_pairs(data, batch_size):
    args = args_for("sie", batch_size=batch_size, img_size=4)
    policies = rx.make_policies(args, True)
    draw = rx.partial(rx.draw_views, args, policies, ())
    return common.Loader(data, policies, draw, args, torch.device("cpu"), rx.ObjectPairs(data.groups))


def test_pairs_show_two_views_of_each_object_once_an_epoch():
    groups = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 3, 3, 1, 2])
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 4, 4).contiguous()
    loader = loader_of_pairs(common.ImageSet(images=images, groups=groups), batch_size=2)
    assert loader.steps_per_epoch == 2
    seen, epoch = set(), []
    for step in range(40):
        made, rows = loader[step]
        i, j = rows["1"], rows["2"]
        assert torch.equal(groups[i], groups[j]) and (i != j).all()
        assert [made[view][0][:, 0, 0, 0].tolist() for view in ("1", "2")] == [i.tolist(), j.tolist()]
        epoch = [*epoch, *groups[i].tolist()][-4:]
        assert step % 2 == 0 or sorted(epoch) == [0, 1, 2, 3]
        seen |= set(zip(i.tolist(), j.tolist()))
    possible = {(a, b) for a, b in itertools.permutations(range(12), 2) if groups[a] == groups[b]}
    assert seen <= possible and len(seen) > 0.8 * len(possible)


def test_the_hues_alone_have_a_constant_in_z():
    factors = dict(rotation=torch.eye(4)[:2], floor_hue=torch.tensor([0.1, 0.4]), light_hue=torch.tensor([0.0, 0.5]))
    z = rx.pose_latent(("color",), factors, torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert z[0].tolist() == [1, 0, 0] and z[1].tolist() == pytest.approx([1, 0.3, 0.5])


def test_the_known_part_is_a_share_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 20)[torch.randperm(80)]
    images = torch.arange(80, dtype=torch.uint8).view(80, 1, 1, 1).expand(80, 3, 2, 2)
    data = common.ImageSet(images=images, labels=labels)
    known = common.known_part(data, 0.2, seed=0)
    rows = known.images[:, 0, 0, 0].long()
    assert torch.bincount(known.labels).tolist() == [10, 2, 4] and torch.equal(labels[rows], known.labels)
    assert len(rows.unique()) == 16
    assert torch.equal(rows, common.known_part(data, 0.2, seed=0).images[:, 0, 0, 0].long())
    assert not torch.equal(rows, common.known_part(data, 0.2, seed=1).images[:, 0, 0, 0].long())


def test_the_known_part_of_objects_is_whole_objects():
    groups = torch.arange(24).repeat_interleave(3)
    images, factors = torch.zeros(72, 3, 4, 4, dtype=torch.uint8), dict(rotation=torch.randn(72, 4))
    data = common.ImageSet(images=images, labels=groups % 2, groups=groups, factors=factors)
    known = common.known_part(data, 0.5, seed=0)
    assert known.groups.unique(return_counts=True)[1].tolist() == [3] * 12
    assert known.factors["rotation"].shape == (36, 4)

    # An epoch of pairs visits each object once.
    loader = loader_of_pairs(known, batch_size=4)
    rows = [loader.rows(step) for step in range(3)]
    visited = [g for r in rows for g in known.groups[r["1"]].tolist()]
    assert sorted(visited) == known.groups.unique().tolist() and all((r["1"] != r["2"]).all() for r in rows)


# ---- 3DIEBench ------------------------------------------------------------------------------------------


def test_3diebench_as_published(bench3die, tmp_path, capsys):
    data = common.load_data("3diebench", bench3die, "train", 16)
    assert len(data) == 200 and data.labels.tolist() == [0] * 100 + [1] * 100
    assert torch.equal(data.groups, torch.arange(4).repeat_interleave(50))

    # Image 57 is the second object's seventh.
    latent = np.load(bench3die / "02691156" / "b2" / "latent_7.npy")
    factors = {name: value[57] for name, value in data.factors.items()}
    rotation = common.quaternion_from_angles(torch.tensor(latent[None, :3], dtype=torch.float32))[0]
    assert torch.allclose(factors["rotation"], rotation)
    assert factors["floor_hue"].item() == pytest.approx(latent[3])
    assert factors["light_hue"].item() == pytest.approx(latent[6])
    assert data[torch.tensor([57])][0].shape == (3, 16, 16)

    flags = ["--data", "3diebench", "--data-dir", str(bench3die), "--out", str(tmp_path / "run")]
    run = "--img-size 16 --patch-size 8 --batch-size 4 --epochs 2 --warmup-epochs 1 --device cpu --workers 0"
    sie = "--objective sie --sie-params rotation color"
    rx.main([*flags, *run.split(), *TINY_MODEL.split(), *sie.split()])
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "what, words",
    [
        ("labels", ("train_labels.npy",)),
        ("latent", ("latent_3.npy",)),
        ("shape", ("latent_3.npy", "7 numbers")),
        ("empty", ("latent_3.npy",)),
    ],
)
def test_an_incomplete_3diebench_is_named(bench3die, capsys, what, words):
    if what == "labels":
        (bench3die / "train_labels.npy").unlink()
    elif what == "latent":
        (bench3die / "02691156" / "a1" / "latent_3.npy").unlink()
    elif what == "empty":
        (bench3die / "02691156" / "a1" / "latent_3.npy").write_bytes(b"")
    else:
        np.save(bench3die / "02691156" / "a1" / "latent_3.npy", np.zeros(1))
    with pytest.raises(SystemExit) as end:
        common.load_data("3diebench", bench3die, "train", 16, workers=0)
    err = capsys.readouterr().err
    assert end.value.code == 2 and all(w in err for w in words)


def test_representations_are_float32_under_bfloat16():
    """A mean that is rounded to bfloat16 costs k-NN and probes some of what they measure."""
    backbone = common.make_backbone("vit_pico", *common.CIFAR10, 16, patch_size=4, neck=16)
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone.neck(backbone.run_blocks(x)[0]).dtype == torch.bfloat16
        assert backbone(x).dtype == backbone.patches(x).dtype == torch.float32
