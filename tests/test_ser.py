"""SER: the group and its action, both losses against closed forms and loops, sizes, where gradients flow."""

import itertools
import math
from functools import partial

import common
import ser

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

GROUP = [(k, f) for k in range(4) for f in range(2)]


def transform(x, k, f):
    """Flip horizontally f times, then k quarter turns counter-clockwise, on the last two dimensions."""
    return (x.flip(-1) if f else x).rot90(k, (-2, -1))


def t(*values):
    return torch.tensor(values)


# ---- the group ----------------------------------------------------------------------------------


def test_N11_relative_group_element_leads_from_view_1_to_view_2():
    x = torch.randint(0, 1000, (5, 5))
    for (k1, f1), (k2, f2) in itertools.product(GROUP, GROUP):
        k, f = ser.relative(t(k1), t(f1), t(k2), t(f2))
        assert torch.equal(transform(transform(x, k1, f1), int(k), int(f)), transform(x, k2, f2))


@pytest.mark.parametrize("g1, g2, g", [((1, 1), (2, 0), (3, 1)), ((3, 0), (1, 1), (0, 1))])
def test_N11_relative_group_element_values(g1, g2, g):
    assert tuple(int(v) for v in ser.relative(t(g1[0]), t(g1[1]), t(g2[0]), t(g2[1]))) == g


def test_N11_action_is_the_permutation_of_the_image_transform():
    z = torch.randn(8, 14, 14, 3, dtype=torch.float64)
    k, f = t(*[g[0] for g in GROUP]), t(*[g[1] for g in GROUP])
    out = ser.act(z, k, f, (14, 14))
    expected = torch.stack([transform(m.permute(2, 0, 1), *g).permute(1, 2, 0) for m, g in zip(z, GROUP)])
    assert (out - expected).abs().max() < 1e-6
    assert torch.equal(out[0], ser.act(z[:1], t(0), t(0), (14, 14))[0])


def test_action_on_one_hot_maps_is_a_permutation_matrix():
    z = torch.eye(12).view(1, 3, 4, 12).expand(8, -1, -1, -1)
    for (k, f), m in zip(GROUP, z):
        out = ser.act(m[None], t(k), t(f), (3, 4) if k % 2 == 0 else (4, 3)).flatten(1, 2)[0]
        assert (out.round() - out).abs().max() < 1e-6
        assert torch.equal(out.round().sum(0), torch.ones(12)) and torch.equal(out.round().sum(1), torch.ones(12))


@pytest.mark.parametrize("k, f", GROUP)
def test_action_across_grids_is_transform_then_resize(k, f):
    z = torch.randn(1, 12, 17, 4, dtype=torch.float64)
    out = ser.act(z, t(k), t(f), (16, 11)).permute(0, 3, 1, 2)
    expected = F.interpolate(transform(z.permute(0, 3, 1, 2), k, f), (16, 11), mode="bicubic", align_corners=False)
    assert (out - expected).abs().max() < 1e-5


@pytest.mark.parametrize("k, f", GROUP)
def test_action_reads_output_cell_p_at_the_inverse_image_of_p(k, f):
    """On the ramp (x, y) of normalised coordinates the output at p is D^T p, away from the border."""
    centres = lambda n: (2 * torch.arange(n) + 1) / n - 1
    ramp = lambda h, w: torch.stack(torch.meshgrid(centres(w), centres(h), indexing="xy"), -1)
    power = torch.linalg.matrix_power
    D = power(t([0.0, 1.0], [-1.0, 0.0]), k) @ power(t([-1.0, 0.0], [0.0, 1.0]), f)
    out = ser.act(ramp(12, 17)[None], t(k), t(f), (16, 11))[0]
    error = out - ramp(16, 11) @ D  # rows: (D^T p)^T = p^T D
    assert error[3:-3, 3:-3].abs().max() < 0.02  # bicubic bends a ramp a little


def test_action_keeps_a_patchwise_encoder_equivariant():
    """Mean colour of a patch commutes with the group: cosine 1. The constant map does too, independent maps do not."""
    x = torch.rand(8, 3, 24, 24)
    pool = lambda v: F.avg_pool2d(v, 4).permute(0, 2, 3, 1)
    k, f = t(*[g[0] for g in GROUP]), t(*[g[1] for g in GROUP])
    gx = torch.stack([transform(v, *g) for v, g in zip(x, GROUP)])
    score = F.cosine_similarity(ser.act(pool(x), k, f, (6, 6)), pool(gx), dim=-1).mean()
    assert score > 1 - 1e-6
    noise = torch.randn(2, 8, 6, 6, 64)
    assert F.cosine_similarity(ser.act(noise[0], k, f, (6, 6)), noise[1], dim=-1).mean().abs() < 0.05


# ---- L_equiv ------------------------------------------------------------------------------------


def loop_nt_xent(z1, z2, tau):
    """The formula of the docstring, anchor by anchor, in float64."""
    n, P, _ = z1.shape
    sides, total = (z1.double(), z2.double()), 0.0
    s = lambda a, b: F.cosine_similarity(a, b, dim=0).item() / tau
    for side, i, j in itertools.product((0, 1), range(n), range(P)):
        anchor = sides[side][i, j]
        positive = s(anchor, sides[1 - side][i, j])
        negatives = [s(anchor, z[m, c]) for z in sides for m in range(n) if m != i for c in range(P)]
        total += -positive + math.log(math.exp(positive) + sum(map(math.exp, negatives)))
    return total / (2 * n * P)


@pytest.mark.parametrize("chunk", [1, 200, 2**23])
def test_nt_xent_equals_the_loop(chunk):
    z1, z2 = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert ser.nt_xent(z1, z2, 0.3, chunk).item() == pytest.approx(loop_nt_xent(z1, z2, 0.3), abs=1e-12)


@pytest.mark.parametrize("n, P, tau, value", [(2, 4, 0.3, 0.251064), (3, 2, 0.5, 0.733657), (4, 9, 1.0, 3.038097)])
def test_N13_nt_xent_of_orthonormal_features(n, P, tau, value):
    """All cells of all images orthogonal, both sides equal: -1/tau + ln(e^(1/tau) + 2 (n - 1) P)."""
    z = torch.eye(n * P).view(n, P, -1)
    assert ser.nt_xent(z, z, tau).item() == pytest.approx(value, abs=2e-5)


@pytest.mark.parametrize("n, P, value", [(2, 4, 2.197225), (3, 2, 2.197225), (4, 9, 4.007333), (24, 196, 9.1069)])
def test_N10_N13_nt_xent_of_constant_features(n, P, value):
    z = torch.ones(n, P, 3)
    assert ser.nt_xent(z, 5 * z, 0.3).item() == pytest.approx(value, abs=1e-4)  # scale does not matter


def test_nt_xent_edges():
    z = torch.randn(1, 6, 4, requires_grad=True)
    loss = ser.nt_xent(z, z, 0.3)
    loss.backward()
    assert loss.item() == 0 and z.grad.abs().max() == 0  # one image: no negatives, no gradient
    antipodal = t([[1.0, 0.0]], [[-1.0, 0.0]])
    assert ser.nt_xent(antipodal, antipodal, 0.5).item() == pytest.approx(0.035976, abs=1e-6)
    pairs = torch.eye(4)[:, None]
    assert ser.nt_xent(pairs, pairs, 0.2).item() == pytest.approx(0.039632, abs=1e-6)  # SimCLR's form: one cell


def test_nt_xent_knows_which_cells_correspond():
    z = torch.eye(8).view(2, 4, 8)
    turned = z[:, [1, 0, 2, 3]]
    assert ser.nt_xent(turned, turned, 0.3).item() == pytest.approx(ser.nt_xent(z, z, 0.3).item(), abs=1e-6)
    assert ser.nt_xent(z, turned, 0.3) > ser.nt_xent(z, z, 0.3) + 0.9


def test_N9_nt_xent_gradient_through_the_chunks():
    z1, z2 = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: ser.nt_xent(a, b, 0.5, chunk=30), (z1, z2))


def test_nt_xent_keeps_little_memory():
    """What autograd saves, and the largest tensor of forward and backward, against the full matrix of logits."""
    n, P = 16, 36
    z = torch.randn(n, P, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest] + [o.numel() for o in tree_leaves(out) if isinstance(o, torch.Tensor)])
            return out

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x), Watch():
        loss = ser.nt_xent(z, z.detach(), 0.3, chunk=2 * P * n * 2 * P)  # one image's rows a chunk
        loss.backward()
    full = (2 * n * P) ** 2
    assert largest <= full / n and sum(saved) < full / 4


# ---- MoCo-v3 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "N, T, value", [(2, 0.2, 0.002686), (4, 0.2, 0.008005), (8, 0.2, 0.018434), (4, 1.0, 1.487337)]
)
def test_N13_contrast_of_orthonormal_embeddings(N, T, value):
    assert ser.contrast(torch.eye(N), torch.eye(N), T).item() == pytest.approx(value, abs=1e-6)


def test_N13_contrast_of_equal_embeddings():
    q = F.normalize(torch.ones(4, 3), dim=1)
    assert ser.contrast(q, q, 0.2).item() == pytest.approx(0.554518, abs=1e-6)  # 2 T ln N


def test_contrast_equals_the_loop():
    q, k = (F.normalize(v, dim=1) for v in torch.randn(2, 5, 3, dtype=torch.float64))
    e = [[math.exp(float(q[i] @ k[j]) / 0.2) for j in range(5)] for i in range(5)]
    rows = [-math.log(e[i][i] / sum(e[i])) for i in range(5)]
    assert ser.contrast(q, k, 0.2).item() == pytest.approx(2 * 0.2 * sum(rows) / 5, abs=1e-12)


# ---- DINO, Barlow Twins -----------------------------------------------------------------------------


@pytest.mark.parametrize("K", [8, 65536])
def test_N13_distill_of_uniform_outputs_is_ln_K(K):
    v = [torch.zeros(2, K)] * 2
    assert ser.distill(v, v, torch.zeros(K), 0.1, 0.04).item() == pytest.approx(math.log(K), rel=1e-5)


def test_distill_equals_the_loop_and_never_compares_a_view_with_itself():
    s, t = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    c = torch.randn(5, dtype=torch.float64)
    total = 0.0
    for i, j, row in itertools.product(range(2), range(2), range(3)):
        if i != j:
            p = [math.exp((t[i, row, k] - c[k]) / 0.05) for k in range(5)]
            q = [math.exp(s[j, row, k] / 0.1) for k in range(5)]
            total -= sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q)) / 6
    assert ser.distill(list(s), list(t), c, 0.1, 0.05).item() == pytest.approx(total, rel=1e-9)


def test_the_centre_follows_the_teacher():
    args, model, views, params = setup("none", "dino")
    before = [model.teacher["head"](model.teacher["backbone"](views[v])) for v in "12"]
    model(views, params)
    assert torch.allclose(model.centre, 0.1 * torch.cat(before).mean(0))
    assert all(p.grad is None for p in model.teacher.parameters())


def test_teacher_temperature_warms_up():
    args, model, views, params = setup("none", "dino", teacher_temp=(0.04, 0.07), teacher_temp_epochs=10.0)
    seen = []
    original = ser.distill
    try:
        ser.distill = lambda *a: seen.append(a[4]) or original(*a)
        for epoch in (0.0, 5.0, 10.0, 50.0):
            model(views, params, epoch)
    finally:
        ser.distill = original
    assert seen == pytest.approx([0.04, 0.055, 0.07, 0.07])


H = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])


@pytest.mark.parametrize("z2, value", [(H, 0.0), (-H, 12.0), (H.roll(1, 1), 3.0153)])
def test_N13_redundancy_reduction_values(z2, value):
    assert ser.redundancy_reduction(H, z2, 0.0051).item() == pytest.approx(value, abs=1e-5)


def test_N13_redundancy_reduction_of_equal_columns():
    z = H[:, :1].expand(-1, 3)
    assert ser.redundancy_reduction(z, z, 0.0051).item() == pytest.approx(6 * 0.0051, abs=1e-6)


def test_clip_each():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.1])
    common.clip_each_([a, b], 0.5)
    assert torch.allclose(a.grad, torch.tensor([0.3, 0.4]), atol=1e-6) and b.grad.item() == pytest.approx(0.1)


@pytest.fixture(scope="module")
def small_model():
    """What the paper trains on, on the meta device: shapes without memory."""
    args = ser.Args(recipe="imagenet", equi="ser", cls_layer=3)
    with torch.device("meta"):
        model = ser.MoCoV3(common.ViT("vit_small", cls_layer=3), args)
        model.equi = ser.SER(384, args)
    return model


def test_parameter_counts_of_the_paper(small_model):
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(small_model.projector) == 19_415_040
    assert count(small_model.predictor) == 2_105_344
    assert count(small_model.equi.projector) == 458_752 and count(small_model.equi.norm) == 768


@pytest.mark.parametrize(
    "name, online", [("AugSelf", 44_209_672), ("STL", 62_176_256), ("EquiMod", 43_271_680), ("ESSL", 43_288_068)]
)
def test_parameter_counts_of_the_baselines(name, online):
    """Online parameters on MoCo-v3 with learned positions, 42,890,752 without any term; decoupled, a LayerNorm more."""
    for layer, norm in ((0, 0), (3, 768)):
        with torch.device("meta"):
            term = getattr(ser, name)(384, ser.Args(recipe="imagenet", equi_layer=layer))
        assert 42_890_752 + sum(p.numel() for p in term.parameters()) == online + norm


def test_trainable_parameters_of_moco_v3():
    """Positions fixed and patch projection frozen: 42,815,104; SER adds its LayerNorm and projector, 43.3 M."""
    args = ser.Args(recipe="imagenet", equi="none", equi_layer=0)
    ser.check(args)
    model = ser.build(args, torch.device("cpu"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 42_815_104
    W = model.backbone.blocks[0].attn.qkv.weight
    assert W.abs().max() <= (6 / 768) ** 0.5 and W.std().item() == pytest.approx((6 / 768 / 3) ** 0.5, rel=0.01)
    assert model.backbone.patch_embed.proj.weight.abs().max() <= (6 / (768 + 384)) ** 0.5


@pytest.mark.parametrize("batch, ratio, n2", [(2048, 0.01, 24), (128, 0.125, 16), (64, 0.01, 8)])
def test_equi_batch_size(batch, ratio, n2):
    assert ser.equi_batch_size(batch, ratio) == n2


# ---- a whole step ---------------------------------------------------------------------------------


def setup(equi="ser", base="mocov3", **changes):
    """(args, model, policies, views, params) of one step on random images, in float64."""
    tiny = dict(prototypes=32, batch_size=16, img_size=16, patch_size=4, proj_hidden=16, proj_dim=8, equi_dim=16)
    variant = dict(base=base, equi=equi)
    args = ser.Args(**ser.values_in_force(ser.Args(**variant)) | variant | tiny | changes)
    ser.check(args)
    model = ser.build(args, torch.device("cpu")).double()
    policies = ser.make_policies(args)
    images = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=common.rng("test"))
    data = common.ImageSet(images=images)
    loader = common.Loader(data, policies, partial(ser.draw_views, args, policies), args, torch.device("cpu"))
    views, params, _ = next(loader.batches([0]))
    return args, model, {name: x.double() for name, x in views.items()}, params


class NoCopies(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails at an operation on tensors of two devices: the copy within makes the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [v for v in tree_leaves((args, kwargs, out)) if isinstance(v, torch.Tensor) and v.dim()]
        assert len({v.device for v in tensors}) <= 1, func
        return out


@pytest.fixture
def no_copies(monkeypatch):
    """A mode for steps of models and views on the meta device, which plays the GPU; only common.send may copy to it."""
    monkeypatch.setattr(common, "send", lambda x, device: torch.empty(x.shape, dtype=x.dtype, device=device))
    return NoCopies()


@pytest.mark.parametrize("equi", ser.EQUIS)
def test_a_step_makes_the_host_wait_for_no_copy(equi, request):
    changes = dict(blur=(0.5, 0.5), solarize=(0.5, 0.5), local_size=8)
    if equi == "augself":
        changes["equi_params"] = ("crop", "color", "flip", "blur", "solarize", "rotation")
    args, model, views, params = setup(equi, "dino", **changes)
    model, views = model.to("meta"), {name: x.to("meta") for name, x in views.items()}
    with request.getfixturevalue("no_copies"):
        out, _ = model(views, params)
        out["loss"].backward()
    assert out["loss"].is_meta and any(p.grad is not None for p in model.parameters())


def test_the_views_of_b2_are_compiled_once_for_all_grids(monkeypatch):
    graphs, compile = [], torch.compile
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch, "compile", partial(compile, backend=lambda graph, _: graphs.append(1) or graph))
    args, model, views, params = setup("ser", "barlow", equi_layer=1)
    model.backbone.blocks = model.backbone.blocks[:2]
    torch._dynamo.reset()
    for compiled in (False, True):
        losses = []
        for h, w in ((3, 5), (5, 4), (4, 3), (4, 5)):
            for view in ("eq1", "eq2"):
                views[view] = torch.randn(8, 3, 4 * h, 4 * w, dtype=torch.float64, generator=common.rng(h, w))
                params[view] |= dict(grid_h=torch.full((8,), h), grid_w=torch.full((8,), w))
            losses.append(model(views, params)[0]["loss"].item())
        if not compiled:
            expected = losses
            model.compile_encoder()
    assert losses == pytest.approx(expected, rel=1e-9) and len(graphs) == 2  # views of one shape; all others


@pytest.mark.parametrize("base", ser.BASES)
def test_l_equiv_trains_f1_and_its_projector_and_nothing_else(base):
    args, model, views, params = setup(base=base, equi_layer=2)
    out, _ = model(views, params)
    out["L_equiv"].backward()
    for name, p in model.named_parameters():
        touched = name.startswith(("equi.", "backbone.blocks.0.", "backbone.blocks.1."))
        if base != "mocov3":  # which freezes them
            touched |= name.startswith(("backbone.patch_embed.", "backbone.pos_embed"))
        grad = 0 if p.grad is None else p.grad.abs().max().item()
        assert (grad > 0) == touched, name


def test_lambda_0_leaves_the_gradients_of_l_inv():
    args, model, views, params = setup(equi_weight=0.0)
    out, _ = model(views, params)
    weight = model.backbone.blocks[0].attn.qkv.weight
    gradients = [torch.autograd.grad(out[name], weight, retain_graph=True)[0] for name in ("loss", "L_inv")]
    assert torch.equal(*gradients)


def test_N2_without_ser_it_is_moco_v3():
    """L_inv recomputed from the published formulas: both directions, keys from the momentum branch, no gradient
    there."""
    args, model, views, params = setup("none")
    out, _ = model(views, params)
    y = [model.backbone(views[v]) for v in "12"]
    q = [F.normalize(model.predictor(model.projector(v)), dim=1) for v in y]
    k = [F.normalize(model.teacher["head"](model.teacher["backbone"](views[v])), dim=1) for v in "12"]
    ce = lambda q, k: F.cross_entropy(q @ k.T / 0.2, torch.arange(16))
    assert out["loss"].item() == pytest.approx(0.4 * (ce(q[0], k[1]) + ce(q[1], k[0])).item(), rel=1e-9)
    assert out["loss"] is out["L_inv"] and model.backbone.cls_layer == 0
    out["loss"].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert model.backbone.patch_embed.proj.weight.grad is None and model.backbone.pos_embed.grad is None


def test_b2_has_one_crop_for_both_views_and_even_rows():
    args, _, views, params = setup(equi_ratio=0.5)
    assert all(torch.equal(params["eq1"][key], params["eq2"][key]) for key in ("top", "left", "height", "width"))
    assert not torch.equal(params["1"]["top"], params["2"]["top"])
    assert len(params["eq1"]["top"]) == 8 and len(params["1"]["top"]) == 8
    rows = ser.draw_views(args, ser.make_policies(args), common.rng(0))
    b1, b2 = rows["1"][0], rows["eq1"][0]
    assert sorted([*b1.tolist(), *b2.tolist()]) == list(range(16))
    assert [(b2 // 4 == r).sum().item() for r in range(4)] == [2, 2, 2, 2]  # 4 processes: 2 rows each


def test_N6_views_of_b2_are_related_by_g():
    """With photometrics off and equal grids, view 2 of b2 is g applied to view 1, g from `relative`."""
    args, _, views, params = setup(equi_ratio=0.5, jitter=(0.0, 0.0, 0.0, 0.0), equi_area=(1.0, 1.0))
    policies = ser.make_policies(args)
    left_out = (common.Grayscale, common.GridResize)
    for name in ("eq1", "eq2"):
        policies[name].ops = [op for op in policies[name].ops if not isinstance(op, left_out)]
    data = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    x1, x2 = (policies[name](data, params[name]) for name in ("eq1", "eq2"))
    k, f = ser.relative(params["eq1"]["rot90"], params["eq1"]["flip"], params["eq2"]["rot90"], params["eq2"]["flip"])
    for a, b, i, j in zip(x1, x2, k.tolist(), f.tolist()):
        assert torch.equal(transform(a, i, j), b)


@pytest.mark.parametrize("base, equi, L_inv", [("mocov3", "ser", 0.67), ("dino", "ser", 0.9), ("barlow", "ser", 0.5)])
def test_N16_losses_fall_when_32_images_are_overfitted(base, equi, L_inv):
    """30 steps on one fixed batch: L_inv falls to a stated share of its start, the contrast of 16 x 16 cells by a
    tenth."""
    args, model, views, params = setup(equi, base, equi_ratio=0.5, batch_size=32)
    model, views = model.float(), {k: v.float() for k, v in views.items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3 if base == "barlow" else 3e-3)
    if base == "dino":  # from a centred teacher, or the first losses are those of a teacher that says always the same
        model(views, params)
        model.centre *= 10
    centre = model.centre.clone() if base == "dino" else None
    first, _ = model(views, params)
    for _ in range(30):
        if base == "dino":
            model.centre = centre
        out, _ = model(views, params)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    for name in {"L_inv", "L_equiv"} & out.keys():
        assert out[name].item() < dict(L_inv=L_inv, L_equiv=0.93)[name] * first[name].item(), name


def test_flops_of_ser_are_those_of_its_base():
    """Training FLOPs, 256 images a process, ViT-S/16, counted on the meta device: SER over MoCo-v3 <= 1.01."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(equi):
        args = ser.Args(recipe="imagenet", equi=equi, equi_layer=3 if equi == "ser" else 0, batch_size=256)
        ser.check(args)
        views = {}
        n2 = ser.equi_batch_size(256, args.equi_ratio) if equi == "ser" else 0
        with torch.device("meta"):
            model = ser.MoCoV3(common.ViT("vit_small", cls_layer=args.cls_layer, pos="learned"), args)
            model.equi = ser.SER(384, args) if n2 else None
            views = {name: torch.empty(256 - n2, 3, 224, 224) for name in ("1", "2")}
            if n2:
                views |= {name: torch.empty(n2, 3, 224, 224) for name in ("eq1", "eq2")}
        none, cells = torch.zeros(n2, dtype=torch.long), torch.full((n2,), 14)
        group = dict(rot90=none, flip=none.bool(), grid_h=cells, grid_w=cells)
        params = dict(eq1=group, eq2=group)
        with FlopCounterMode(display=False) as counter:
            model(views, params)[0]["loss"].backward()
        return counter.get_total_flops()

    ratio = count("ser") / count("none")
    print(f"FLOPs of SER over MoCo-v3: {ratio:.4f}")
    assert 0.97 < ratio <= 1.01
