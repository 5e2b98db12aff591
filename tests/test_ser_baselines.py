"""What SER is compared to: AugSelf, STL, EquiMod, E-SSL, their layer and their views; the 2+4 variant."""

import itertools
import math

import common
import ser

import pytest
import torch
import torch.nn.functional as F
from test_ser import loop_nt_xent, setup

BASELINES = ("augself", "stl", "equimod", "essl")
ALL = ("crop", "color", "flip", "blur", "solarize", "rotation")


def outputs(args, model, views):
    """{view: tokens after block equi_layer}, as the terms get them."""
    layer, e = args.equi_layer, {}
    for view, x in views.items():
        y, tokens = model.backbone.trace(x, (layer,))
        e[view] = tokens[layer] if layer else y[:, None]
    return e


# ---- every combination ----------------------------------------------------------------------------


@pytest.mark.parametrize("base", ser.BASES)
@pytest.mark.parametrize("equi", BASELINES)
@pytest.mark.parametrize("layer", [0, 2])
def test_N14_T7_a_step_of_every_combination_trains_what_it_should(base, equi, layer):
    """L_equiv reaches the blocks up to its layer and its own head, L_inv the base's heads; nothing reaches a
    teacher."""
    args, model, views, params = setup(equi, base, equi_layer=layer, local_size=8)
    out, y = model(views, params)
    expected = out["L_inv"].item() + args.equi_weight * out["L_equiv"].item()
    assert out["loss"].item() == pytest.approx(expected, rel=1e-9) and y.shape == (16, 32)
    out["L_equiv"].backward(retain_graph=True)
    depth = layer or len(model.backbone.blocks)
    for name, p in model.named_parameters():
        touched = name.startswith(("equi.", *(f"backbone.blocks.{k}." for k in range(depth)), "backbone.cls_token"))
        touched |= name.startswith("backbone.norm") and layer == 0
        if base != "mocov3":  # which freezes them
            touched |= name.startswith(("backbone.patch_embed", "backbone.pos_embed"))
        grad = 0 if p.grad is None else p.grad.abs().max().item()
        assert (grad > 0) == touched, name
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("equi, layer", [("augself", 2), ("stl", 0), ("equimod", 2), ("essl", 0)])
def test_N16_l_equiv_falls_when_32_images_are_overfitted(equi, layer):
    args, model, views, params = setup(equi, equi_layer=layer, local_size=8, batch_size=32)
    model, views = model.float(), {k: v.float() for k, v in views.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    values = []
    for _ in range(25):
        out, _ = model(views, params)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        values.append(out["L_equiv"].item())
    assert min(values[-5:]) < 0.9 * values[0]


# ---- AugSelf --------------------------------------------------------------------------------------


def test_N11_N13_augself_of_equal_views_aims_at_zero():
    args, model, views, params = setup("augself", equi_params=ALL, blur=(0.5, 0.5), solarize=(0.5, 0.5))
    w = model.equi.describe(params["1"])
    assert all(torch.equal(w[kind] - w[kind], torch.zeros_like(w[kind])) for kind in ALL)
    for head in model.equi.heads.values():
        torch.nn.init.zeros_(head[-1].weight)
        torch.nn.init.zeros_(head[-1].bias)
    out = model.equi(outputs(args, model, {"1": views["1"], "2": views["1"]}), {"1": params["1"], "2": params["1"]})
    assert all(out[f"L_{kind}"].item() == 0 for kind in ("crop", "color", "blur", "solarize"))
    assert out["L_rotation"].item() == pytest.approx(math.log(4)) and out["L_flip"].item() == pytest.approx(math.log(2))


def test_N6_N10_augself_equals_the_loop():
    """Every target written out per sample and direction, from the raw parameters; swapping the views negates the
    targets and so leaves the symmetric loss as it is."""
    args, model, views, params = setup("augself", equi_params=ALL, blur=(0.5, 0.5), solarize=(0.5, 0.5))
    e = outputs(args, model, views)
    out = model.equi(e, params)
    width = (0.8, 0.8, 0.4, 0.2)  # factors 0.6 to 1.4, of saturation 0.8 to 1.2, hue -0.1 to 0.1

    def crop(p, i):
        top, left, height, width = (float(p[key][i]) for key in ("top", "left", "height", "width"))
        centre = left + width / 2
        return [top + height / 2, 1 - centre if p["flip"][i] else centre, height, width]

    def color(p, i):
        raw = [float(p[key][i]) - 1 for key in ("brightness", "contrast", "saturation")] + [float(p["hue"][i])]
        return [a / b for a, b in zip(raw, width)]

    describe = dict(
        crop=crop,
        color=color,
        blur=lambda p, i: [float(p["sigma"][i])],
        solarize=lambda p, i: [128 / 255 if p["solarize"][i] else 1.0],
    )
    y = {v: e[v][:, 0] for v in "12"}
    for kind in ALL:
        total, n = 0.0, 16
        both = torch.cat([torch.cat([y["1"], y["2"]], 1), torch.cat([y["2"], y["1"]], 1)])
        predicted = model.equi.heads[kind](both).detach()  # batch norm sees both directions
        for row in range(2 * n):
            a, b, i = *(("1", "2") if row < n else ("2", "1")), row % n
            p1, p2, h = params[a], params[b], predicted[row]
            if kind == "rotation":
                total += float(torch.logsumexp(h, 0) - h[(int(p1["rot90"][i]) - int(p2["rot90"][i])) % 4])
            elif kind == "flip":
                same = bool(p1["flip"][i]) == bool(p2["flip"][i])
                total += math.log1p(math.exp(-float(h[0]))) if same else math.log1p(math.exp(float(h[0])))
            else:
                d = [s - t for s, t in zip(describe[kind](p1, i), describe[kind](p2, i))]
                total += sum((math.tanh(float(v)) - t) ** 2 for v, t in zip(h, d)) / len(d)
        assert out[f"L_{kind}"].item() == pytest.approx(total / (2 * n), rel=1e-5), kind
    swapped = model.equi({"1": e["2"], "2": e["1"]}, {"1": params["2"], "2": params["1"]})
    assert all(swapped[key].item() == pytest.approx(out[key].item(), rel=1e-9) for key in out)
    assert out["L_equiv"].item() == pytest.approx(sum(v.item() for k, v in out.items() if k != "L_equiv"))


# ---- STL ------------------------------------------------------------------------------------------


def test_stl_transforms_two_images_alike_but_for_flip_and_blur():
    _, _, _, params = setup("stl", blur=(0.5, 0.5), recipe="imagenet")
    aligned = ("top", "left", "height", "width", "brightness", "contrast", "saturation", "hue", "order", "gray")
    for p in params.values():
        assert all(torch.equal(p[key][0::2], p[key][1::2]) for key in aligned)
        assert not torch.equal(p["flip"][0::2], p["flip"][1::2]) and not torch.equal(p["sigma"][0::2], p["sigma"][1::2])
        assert not torch.equal(p["top"][0::4], p["top"][2::4])
    assert not torch.equal(params["1"]["top"], params["2"]["top"])


def test_stl_cuts_the_same_box_out_of_images_of_any_size():
    first = ser.Args(equi="stl", data="imagefolder", recipe="imagenet")
    args = ser.Args(**ser.values_in_force(first) | dict(equi="stl", batch_size=32))
    policies = ser.make_policies(args)
    sizes = torch.tensor([[375, 500], [500, 375], [100, 900], [64, 64]]).repeat(8, 1)
    for name, (_, draws) in ser.draw_views(args, policies, common.rng(0)).items():
        box = dict(draws)
        policies[name].crop.place(box, sizes)
        assert all(torch.equal(box[key][0::2], box[key][1::2]) for key in ("top", "left", "height", "width"))


def by_hand(project, x):
    """Linear-BN-ReLU-Linear of a batch (n, D), the batch norm at its initial weight 1 and bias 0."""
    h = x @ project[0].weight.T
    h = (h - h.mean(0)) / ((h - h.mean(0)).square().mean(0) + 1e-5).sqrt()
    return h.clamp(min=0) @ project[3].weight.T


def test_stl_equals_the_loop():
    """Its projectors see each view, each prediction, and the even and odd halves of t as batches of their own."""
    args, model, views, params = setup("stl")
    e, m = outputs(args, model, views), model.equi
    out = m(e, params)
    y1, y2 = e["1"][:, 0], e["2"][:, 0]
    t12, t21 = m.transformation(torch.cat([y1, y2], 1)), m.transformation(torch.cat([y2, y1], 1))
    W = lambda t: (m.hypernetwork.weight @ t).view(32, 32)
    partner = {i: i + 1 if i % 2 == 0 else i - 1 for i in range(16)}
    assert all(partner[partner[i]] == i for i in partner)
    y1_hat = torch.stack([W(t21[partner[i]]) @ y2[i] for i in range(16)])
    y2_hat = torch.stack([W(t12[partner[i]]) @ y1[i] for i in range(16)])
    z = torch.cat([by_hand(m.project, y1), by_hand(m.project, y2)])
    z_hat = torch.cat([by_hand(m.project, y1_hat), by_hand(m.project, y2_hat)])
    t = torch.cat([t12, t21])
    L_trans = loop_nt_xent(by_hand(m.project_t, t[0::2])[:, None], by_hand(m.project_t, t[1::2])[:, None], 0.2)
    assert out["L_trans"].item() == pytest.approx(L_trans, rel=1e-6)
    expected = loop_nt_xent(z[:, None], z_hat[:, None], 0.2) + 0.1 * L_trans
    assert out["L_equiv"].item() == pytest.approx(expected, rel=1e-6)

    # An involution: partners swapped before or after give the same.
    swap = [i ^ 1 for i in range(16)]
    assert torch.allclose(m.apply_partners(t12[swap], y1[swap]), m.apply_partners(t12, y1)[swap])


# ---- EquiMod --------------------------------------------------------------------------------------


def test_equimod_describes_a_view_in_18_numbers():
    p = dict(
        top=torch.tensor([0.1, 0.0]),
        left=torch.tensor([0.2, 0.0]),
        height=torch.tensor([0.5, 1.0]),
        width=torch.tensor([0.6, 1.0]),
        flip=torch.tensor([True, False]),
        brightness=torch.tensor([1.2, 1.0]),
        contrast=torch.tensor([0.9, 1.0]),
        saturation=torch.tensor([1.1, 1.0]),
        hue=torch.tensor([0.05, 0.0]),
        order=torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]]),
        gray=torch.tensor([False, True]),
        sigma=torch.tensor([1.5, 0.0]),
        solarize=torch.tensor([True, False]),
    )
    expected = [
        [0.1, 0.2, 0.5, 0.6, 1, 1, 2, 0, 3, 1, 1.2, 0.9, 1.1, 0.05, 0, 1, 1.5, 1],
        [0, 0, 1, 1, 0, 0, 0, 1, 2, 3, 1, 1, 1, 0, 1, 0, 0, 0],
    ]
    assert torch.allclose(ser.EquiMod.describe(p), torch.tensor(expected))


def test_equimod_equals_the_loop():
    """On asymmetric views; the batch norms of parameters and predictor see both views as one batch."""
    args, model, views, params = setup("equimod", blur=(1.0, 0.1), solarize=(0.0, 0.2))
    e, m = outputs(args, model, views), model.equi
    out = m(e, params)
    u0, u1, u2 = (m.project(e[view][:, 0]) for view in ("plain", "1", "2"))
    # Batch norm, at its initial weight 1 and bias 0.
    norm = lambda v: (v - v.mean(0)) / (v.var(0, unbiased=False) + 1e-5).sqrt()
    a = norm(norm(torch.cat([m.describe(params["1"]), m.describe(params["2"])]).double()) @ m.embed[1].weight.T)
    u_hat = norm(torch.stack([m.predict[0].weight @ torch.cat([u0[i % 16], a[i]]) for i in range(32)]))
    u = torch.cat([u1, u2])
    expected = loop_nt_xent(u[:, None], u_hat[:, None], 0.2)
    assert len(m.predict) == 2 and out["L_equiv"].item() == pytest.approx(expected, rel=1e-5)
    cosine = lambda a, b: F.cosine_similarity(a, b, 0).item()
    gain = [cosine(u[i], u_hat[i]) - cosine(u[i], u0[i % 16]) for i in range(32)]
    assert out["cosine_gain"].item() == pytest.approx(sum(gain) / 32, abs=1e-6)


def test_equimod_s_18_numbers_keep_what_they_say_on_asymmetric_views():
    """View 1 is always blurred, view 2 rarely: after the batch norm the numbers still tell blur, sigma and
    solarisation of each row."""
    _, model, _, params = setup("equimod", blur=(1.0, 0.1), solarize=(0.0, 0.2), batch_size=32)
    term, seen = model.equi, []
    term.embed[0].register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    e = {view: torch.randn(32, 1, 32, dtype=torch.float64) for view in ("plain", "1", "2")}
    term(e, params)
    said, kept = (torch.cat(v).double() for v in zip(*seen))  # (64, 18), of both views
    kept = F.pad(kept, (0, 1), value=1.0)
    for column in (15, 16, 17):  # blur on, sigma, solarise
        left = said[:, column] - kept @ torch.linalg.lstsq(kept, said[:, column, None], driver="gelsd").solution[:, 0]
        assert 1 - left.square().sum() / (said[:, column] - said[:, column].mean()).square().sum() > 0.999, column


def test_equimods_third_view_is_not_augmented():
    args, model, views, params = setup("equimod")
    images = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=common.rng("test"))  # as in `setup`
    order = torch.randperm(32, generator=common.rng(0, "order", 0))[:16]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in common.BLOCKS)
    plain = (images[order] / 255 - mean) / std
    assert torch.allclose(views["plain"].float(), plain, atol=1e-5) and params["plain"] == {}


# ---- E-SSL ----------------------------------------------------------------------------------------


def test_essl_sees_four_blocks_of_rotations_in_order():
    args, model, views, params = setup("essl", local_size=8)
    assert views["rotated"].shape == (16, 3, 8, 8)
    seen = {}
    term = model.equi
    del model.equi
    model.equi = lambda e, params: seen.update(e) or dict(L_equiv=e["1"].sum())
    model(views, params)
    assert seen["rotated"].shape[0] == 64
    block = views["rotated"]
    for k in range(4):
        assert torch.allclose(seen["rotated"][16 * k : 16 * (k + 1), 0], model.backbone(block))
        block = block.transpose(2, 3).flip(2)  # out[r, c] = in[c, W - 1 - r]: a quarter turn counter-clockwise
    out = term(seen, params)
    logits = term.head(seen["rotated"][:, 0])
    loss = sum((torch.logsumexp(logits[i], 0) - logits[i, i // 16]).item() for i in range(64)) / 64
    assert out["L_equiv"].item() == pytest.approx(loss, rel=1e-9)
    right = sum(int(logits[i].argmax()) == i // 16 for i in range(64))
    assert out["rotation_accuracy"].item() == pytest.approx(right / 64)


# ---- 2 + 4 views ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["mocov3", "dino"])
def test_local_views_give_ten_terms_and_three_pairs(base):
    args, model, views, params = setup("ser", base, local_views=4, local_size=8, equi_ratio=0.5)
    centre = model.centre.clone() if base == "dino" else None
    out, _ = model(views, params)
    both = lambda encoder, i: torch.cat([encoder(views[f"{i}"]), encoder(views[f"eq{i}"])])
    y = [both(model.backbone, i) for i in range(1, 7)]
    t = [both(model.teacher["backbone"], i) for i in (1, 2)]
    total, terms = 0.0, 0
    for i, j in itertools.product(range(6), range(2)):
        if i == j:
            continue
        terms += 1
        if base == "mocov3":
            q = F.normalize(model.predictor(model.projector(y[i])), dim=1)
            k = F.normalize(model.teacher["head"](t[j]), dim=1)
            total += 0.4 * F.cross_entropy(q @ k.T / 0.2, torch.arange(16)).item()
        else:
            p = F.softmax((model.teacher["head"](t[j]) - centre) / 0.04, dim=1)
            total -= (p * F.log_softmax(model.head(y[i]) / 0.1, dim=1)).sum(1).mean().item() / 10
    assert terms == 10 and out["L_inv"].item() == pytest.approx(total, rel=1e-6)
    e = outputs(args, model, views)
    pairs = [model.equi.pair(e[a], params[a], e[b], params[b]).item() for a, b in ser.EQUI_PAIRS]
    assert out["L_equiv"].item() == pytest.approx(sum(pairs), rel=1e-9) and len(set(pairs)) == 3
    same = lambda a, b: all(torch.equal(params[a][key], params[b][key]) for key in ("top", "left", "height", "width"))
    assert same("eq1", "eq2") and same("eq3", "eq4") and same("eq5", "eq6") and not same("eq3", "eq5")
    for name in ser.EQUI_VIEWS[2:]:  # grids around 2 x 2
        assert views[name].shape[2] // 4 in (1, 2, 3) and views[name].shape[0] == 8


def test_photometrics_of_the_2_and_4_views():
    args = ser.Args(recipe="imagenet", local_views=4)
    policies = ser.make_policies(args)

    def probabilities(name):
        found = {type(op).__name__: op.p for op in policies[name].ops if hasattr(op, "p")}
        return [found[op] for op in ("ColorJitter", "Grayscale", "GaussianBlur", "Solarize")]

    assert probabilities("1") == [0.8, 0.2, 1.0, 0.0] and probabilities("2") == [0.8, 0.2, 0.1, 0.2]
    for name in (*ser.VIEWS[2:], *ser.EQUI_VIEWS):
        assert probabilities(name) == [0.8, 0, 0.5, 0]
    assert policies["3"].crop.size == 96 and policies["3"].crop.scale == (0.05, 0.25)
    assert policies["eq1"].crop.size == 224


def test_views_of_the_baselines():
    """Photometrics and crops of each baseline's ImageNet recipe."""

    def view(equi, name, base="mocov3"):
        variant = dict(equi=equi, base=base)
        first = ser.Args(**variant, data="imagefolder", recipe="imagenet")
        args = ser.Args(**ser.values_in_force(first) | variant)
        policy = ser.make_policies(args)[name]
        found = {type(op).__name__: op for op in policy.ops}
        saturation = round(found["ColorJitter"].ranges["saturation"][1] - 1, 3)
        return policy.crop.size, policy.crop.scale, found["GaussianBlur"].p, found["Solarize"].p, saturation

    assert view("augself", "1") == view("augself", "2") == (224, (0.08, 1.0), 0.5, 0.0, 0.4)
    assert view("stl", "1") == view("stl", "2") == (224, (0.2, 1.0), 0.5, 0.0, 0.2)
    assert view("equimod", "2") == (224, (0.08, 1.0), 0.1, 0.2, 0.2)
    assert view("essl", "rotated") == (96, (0.05, 0.14), 0.1, 0.0, 0.2)


@pytest.mark.parametrize(
    "base, equi, weight",
    [
        ("mocov3", "augself", 0.5),
        ("mocov3", "stl", 1.0),
        ("mocov3", "equimod", 1.0),
        ("mocov3", "essl", 0.4),
        ("barlow", "essl", 8.0),
        ("dino", "ser", 0.3),
        ("dino", "equimod", 1.0),
    ],
)
def test_weights_of_the_terms(base, equi, weight):
    args = ser.Args(**ser.values_in_force(ser.Args(base=base, equi=equi, data="imagefolder", recipe="imagenet")))
    assert args.equi_weight == weight and args.equi_layer == (3 if equi == "ser" else 0)
