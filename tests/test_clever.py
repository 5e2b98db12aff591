"""CLeVER, DDCL and their bases: losses against closed forms, what learns from what, schedules, VMamba's scan,
deformations."""

import json
import math

import clever
import common

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from test_distributed import on_ranks
from test_run import content, same

VARIANTS = [("dino", "clever"), ("dino", "none"), ("simsiam", "ddcl"), ("simsiam", "none")]


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def args_for(base="dino", equi="clever", **changes):
    values = clever.values_in_force(clever.Args(base=base, recipe="blocks", data="blocks"))
    small = dict(
        base=base,
        equi=equi,
        arch="vit_pico",
        img_size=16,
        patch_size=4,
        local_size=8,
        local_crops=2 * (base == "dino"),
        batch_size=8,
        proj_hidden=16,
        bottleneck=8,
        head_dim=24,
        head_dim_equi=20 if base == "dino" else 24,
    )
    args = clever.Args(**values | small | changes)
    clever.check(args)
    return args


def step(base="dino", equi="clever", seed=0, **changes):
    """(args, model in float64, views) of one step on random images."""
    args = args_for(base, equi, **changes)
    data = common.ImageSet(
        images=torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=common.rng("test", seed))
    )
    policies = clever.make_policies(args)
    loader = common.Loader(data, policies, clever.partial(clever.draw_views, args, policies), args, torch.device("cpu"))
    views, _, _ = next(loader.batches([0]))
    return args, clever.build(args, torch.device("cpu")).double(), {k: v.double() for k, v in views.items()}


# ---- losses -------------------------------------------------------------------------------------------


def uniform(K):
    return torch.full((2, K), 1 / K).double()


def one_hot(*classes, K):
    return F.one_hot(torch.tensor(classes), K).double()


@pytest.mark.parametrize("K, entropy", [(65536, 11.0903548890), (4096, 8.3177661667)])
def test_N13_similarity_and_entropy_of_uniform_outputs(K, entropy):
    u, e = uniform(K), one_hot(0, 5, K=K)
    assert clever.cross_entropy(e, u.log()).item() == pytest.approx(entropy) and clever.cross_entropy(
        u, u.log()
    ).item() == pytest.approx(entropy)
    assert clever.similarity(u, u.log(), "cos").item() == pytest.approx(1) and clever.similarity(
        u, u.log(), "dot"
    ).item() == pytest.approx(1 / K)
    assert clever.similarity(e, u.log(), "cos").item() == pytest.approx(K**-0.5) and clever.similarity(
        e, u.log(), "dot"
    ).item() == pytest.approx(1 / K)
    assert clever.similarity(e, e.log(), "cos").item() == clever.similarity(e, e.log(), "dot").item() == 1
    assert clever.similarity(e, one_hot(1, 4, K=K).log(), "cos").item() == 0


def test_N13_three_classes():
    q, p = F.softmax(t([0.04, 0, 0]) / 0.04, 1), F.log_softmax(t([0, 0.1, 0]) / 0.1, 1)
    assert q[0].tolist() == pytest.approx([0.5761169, 0.2119416, 0.2119416])
    values = clever.cross_entropy(q, p), clever.similarity(q, p, "cos"), clever.similarity(q, p, "dot")
    assert [v.item() for v in values] == pytest.approx([1.3395032, 0.6855389, 0.2891254])


@pytest.mark.parametrize("crops, pairs", [(10, 18), (2, 2), (8, 14)])
def test_pairs(crops, pairs):
    seen = []
    clever.over_pairs(lambda q, p: seen.append((q, p)) or 0.0, "AB", "ABCDEFGHIJ"[:crops])
    assert len(seen) == len(set(seen)) == pairs and not {("A", "A"), ("B", "B")} & set(seen)


def test_cosines_of_simsiam_and_ddcl():
    z = t([1, 0], [0, 1])
    assert (
        clever.cosines(z, z, z, z).item() == 1
        and clever.cosines(-z, -z, z, z).item() == -1
        and clever.cosines(z.flip(0), z.flip(0), z, z).item() == 0
    )
    signs = t([1, 0], [0, -1])
    assert clever.cosines(signs, signs, z, z).abs().item() == 0  # +1 and -1 cancel: the modulus comes after the mean
    p = (t([3, 4]) * 1e-10).requires_grad_()
    assert clever.cosines(p, p, t([1, 0]), t([1, 0])).item() == pytest.approx(0.03)  # below eps
    p = t([3, 4]).requires_grad_()
    clever.cosines(p, p.detach(), t([1, 0]), t([1, 0])).abs().backward()
    assert p.grad[0].tolist() == pytest.approx([0.064, -0.048])  # half of (.128, -.096): one of two terms


def test_the_penalty_on_a_toy():
    h_I, h_V = torch.nn.Linear(2, 3).double(), torch.nn.Linear(1, 3).double()
    for h, w, b in ((h_I, 2, 1), (h_V, 1, 0)):
        torch.nn.init.constant_(h.weight, w)
        torch.nn.init.constant_(h.bias, b)
    loss = (clever.squared_norm(h_V) - clever.squared_norm(h_I)).abs()
    loss.backward()
    assert loss.item() == 24 and h_I.weight.grad.unique().tolist() == [4] and h_I.bias.grad.unique().tolist() == [2]
    assert h_V.weight.grad.unique().tolist() == [-2] and h_V.bias.grad.unique().tolist() == [0]
    same = (clever.squared_norm(h_I) - clever.squared_norm(h_I)).abs()
    assert same.item() == 0


@pytest.mark.parametrize("base, equi", [("dino", "clever"), ("simsiam", "ddcl")])
def test_the_whole_loss_equals_its_formula(base, equi):
    args, model, views = step(base, equi, alpha=0.9, beta=0.7, lambda_preg=0.01)
    torch.manual_seed(0)
    out, _ = model(views)
    heads = [model.heads] if base == "dino" else [model.projectors, model.predictors]
    squares = lambda h: sum(
        float((p.detach() ** 2).sum()) for n, p in h.named_parameters() if not n.endswith("original0")
    )
    penalty = sum(abs(squares(h["equi"]) - squares(h["inv"])) for h in heads) / len(heads)
    assert out["L_PReg"].item() == pytest.approx(penalty, rel=1e-9)
    if base == "dino":
        o = [model.backbone(views[v]) for v in "1234"]
        teach = [model.teacher["backbone"](views[v]) for v in "12"]
        CL = Orth = 0.0
        for i in range(2):
            for v in range(4):
                if i != v:
                    q = F.softmax(model.teacher["heads"]["inv"](teach[i][:, : model.inv]) / 0.04, 1)
                    CL -= (q * F.log_softmax(model.heads["inv"](o[v][:, : model.inv]) / 0.1, 1)).sum(1).mean() / 6
                    Q, P = (
                        F.softmax(model.teacher["heads"]["equi"](teach[i][:, model.inv :]) / 0.04, 1),
                        F.softmax(model.heads["equi"](o[v][:, model.inv :]) / 0.1, 1),
                    )
                    Orth += ((Q * P).sum(1) / Q.norm(dim=1) / P.norm(dim=1)).mean().abs() / 6
    else:
        o = [model.backbone(views[v]) for v in "12"]
        sides = {}
        for name, part in (("inv", slice(None, model.inv)), ("equi", slice(model.inv, None))):
            z = [model.projectors[name](v[:, part]) for v in o]
            p = [model.predictors[name](v) for v in z]
            unit = lambda v: v / v.norm(dim=1, keepdim=True)
            sides[name] = sum((unit(p[a]) * unit(z[1 - a])).sum(1).mean() for a in (0, 1)) / 2
        CL, Orth = -sides["inv"], sides["equi"].abs()
    assert out["L_CL"].item() == pytest.approx(CL.item(), rel=1e-6) and out["L_Orth"].item() == pytest.approx(
        Orth.item(), rel=1e-6
    )
    assert out["loss"].item() == pytest.approx((0.9 * CL + 0.7 * Orth + 0.01 * penalty).item(), rel=1e-6)


def touched(model, value):
    model.zero_grad()
    value.backward(retain_graph=True)
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("base, equi", [("dino", "clever"), ("simsiam", "ddcl")])
def test_which_head_learns_from_what(base, equi):
    args, model, views = step(base, equi)
    made = []
    model.backbone.register_forward_hook(lambda *args: made.append(args[2]))
    out, _ = model(views)
    for name, own, other in (("L_CL", "inv", "equi"), ("L_Orth", "equi", "inv")):
        names = touched(model, out[name])
        assert any(n.startswith("backbone") for n in names) and any(
            f".{own}." in f".{n}" or f"s.{own}." in n for n in names if not n.startswith("backbone")
        )
        assert not any(f"s.{other}." in n for n in names) and not any(n.startswith("teacher") for n in names)
        (grad,) = torch.autograd.grad(out[name], made[0], retain_graph=True)
        inside = grad[:, : model.inv] if own == "inv" else grad[:, model.inv :]
        outside = grad[:, model.inv :] if own == "inv" else grad[:, : model.inv]
        assert inside.abs().max() > 0 and outside.abs().max() == 0
    names = touched(model, out["L_PReg"])
    assert names and not any(n.startswith(("backbone", "teacher")) for n in names)


def test_without_orthogonality_and_penalty_it_is_the_base_on_the_invariant_part():
    args, model, views = step(beta=0.0, lambda_preg=0.0)
    out, _ = model(views)
    names = touched(model, out["loss"])
    assert out["loss"].item() == out["L_CL"].item() and not any("heads.equi" in n for n in names)
    _, plain, _ = step(equi="none")
    assert set(plain.heads) == {"inv"} and plain.inv == plain.backbone.dim

    class Cut(torch.nn.Module):  # plain DINO whose encoder ends where the invariant part does
        def __init__(self, whole):
            super().__init__()
            self.whole, self.dim = whole, model.inv

        def forward(self, x):
            return self.whole(x)[:, : self.dim]

    base = clever.DINO(Cut(model.backbone), args_for(equi="none"), model.inv).double()
    base.heads.load_state_dict({k: v for k, v in model.heads.state_dict().items() if k.startswith("inv")})
    base.teacher["heads"].load_state_dict(base.heads.state_dict())
    base.teacher["backbone"] = Cut(model.teacher["backbone"])
    model.centre_inv.zero_()
    assert base(views)[0]["loss"].item() == pytest.approx(model(views)[0]["loss"].item(), rel=1e-9)


def test_what_simsiam_alone_does():
    for equi, zero in (("none", True), ("ddcl", False)):
        _, model, _ = step("simsiam", equi, arch="resnet_pico")
        assert all(
            (m.bn2.weight == 0).all() == zero for m in model.backbone.modules() if isinstance(m, clever.BasicBlock)
        )
        assert model.projectors["inv"][-2].bias.requires_grad is not zero and set(model.projectors) == (
            {"inv"} if zero else {"inv", "equi"}
        )


def test_the_teacher_has_no_stochastic_depth():
    _, model, _ = step(drop_path=0.3)
    rates = lambda m: [d.drop_prob for d in m.modules() if isinstance(d, clever.DropPath)]
    assert max(rates(model.backbone)) == pytest.approx(0.3) and max(rates(model.teacher)) == 0


@pytest.mark.parametrize(
    "base, recipe, arch, expected",
    [
        (
            "dino",
            "imagenet100",
            "vit_small",
            dict(
                arch="vit_small",
                epochs=200,
                lr=5e-4,
                batch_size=512,
                warmup_epochs=10,
                weight_decay=0.04,
                weight_decay_end=0.4,
                momentum=0.996,
                clip=3.0,
                local_crops=8,
                head_dim=65536,
                head_dim_equi=65536,
                bottleneck=256,
                drop_path=0.1,
                freeze_last_epochs=1,
                teacher_temp=(0.04, 0.04),
                inv_ratio=0.8,
                beta=1.0,
                lambda_preg=0.001,
                crop_scale=(0.4, 1.0),
                local_scale=(0.05, 0.4),
                lr_end=1e-6,
            ),
        ),
        ("dino", "imagenet", "vmamba_tiny", dict(epochs=100, drop_path=0.2)),
        ("dino", "cifar10", "vmamba_tiny", dict(drop_path=0.0)),
        (
            "simsiam",
            "imagenet100",
            "vit_small",
            dict(
                arch="resnet50",
                equi="ddcl",
                epochs=200,
                lr=0.05,
                batch_size=256,
                warmup_epochs=30,
                weight_decay=1e-4,
                clip=None,
                local_crops=0,
                head_dim=2048,
                bottleneck=512,
                crop_scale=(0.2, 1.0),
                lr_end=0.0,
            ),
        ),
        ("simsiam", "cifar10", "vit_small", dict(arch="resnet18", img_size=32)),
    ],
)
def test_values_in_force(base, recipe, arch, expected):
    values = vars(
        clever.Args(**clever.values_in_force(clever.Args(base=base, data="imagefolder", recipe=recipe, arch=arch)))
    )
    assert {k: values[k] for k in expected} == expected


def test_the_diagnostics_end_at_the_floor_and_not_in_infinity():
    head = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    out = clever.diagnostics("equi", head, 0 * torch.ones(3, 2))
    assert {k: v.item() for k, v in out.items()} == pytest.approx(dict(log_h_equi=-37, log_z_equi=-37))
    assert clever.diagnostics("inv", head, torch.tensor([[3.0, 4], [0, 5]]))["log_z_inv"].item() == pytest.approx(
        math.log10(25)
    )


def test_centres_and_their_update():
    args, model, views = step()
    before = model.centre_equi.clone()
    with torch.no_grad():
        both = model.teacher["backbone"](torch.cat([views["1"], views["2"]]))
        mean = model.teacher["heads"]["equi"](both[:, model.inv :]).mean(0)
    for n in (1, 2, 3):
        model(views)
        assert torch.allclose(model.centre_equi, (1 - 0.9**n) * mean) and before.abs().max() == 0
    assert model.centre_inv.shape == (24,) and model.centre_equi.shape == (20,)


def test_prototypes_have_norm_1_and_do_not_care_for_their_length():
    head = clever.DINOHead(6, args_for(), 24).double()
    z = torch.randn(5, 6).double()
    logits = head(z)
    assert logits.abs().max() <= 1
    logits.square().sum().backward()
    v = head.last.parametrizations.weight.original1
    assert (v.grad * v).sum(1).abs().max() < 1e-12 and head.last.parametrizations.weight.original0.grad is None
    v.data *= 3
    assert torch.allclose(head(z), logits)


# ---- sizes -----------------------------------------------------------------------------------------------


def count(m):
    return sum(p.numel() for p in m.parameters())


@pytest.mark.parametrize(
    "arch, dim, clever_inv, ddcl_inv",
    [
        ("vit_tiny", 192, 153, 154),
        ("vit_small", 384, 307, 307),
        ("vmamba_tiny", 768, 614, 614),
        ("resnet18", 512, 409, 410),
        ("resnet50", 2048, 1638, 1638),
    ],
)
def test_where_the_representation_is_split(arch, dim, clever_inv, ddcl_inv):
    assert (math.floor(dim * 0.8), round(dim * 0.8)) == (clever_inv, ddcl_inv)
    if arch in ("vit_tiny", "resnet18"):
        for equi, expected in (("clever", clever_inv), ("ddcl", ddcl_inv)):
            args = args_for("dino" if equi == "clever" else "simsiam", equi, arch=arch)
            model = clever.build(args, torch.device("cpu"))
            assert model.inv == expected == model.get_submodule(model.evaluated).description["inv"]


def test_parameter_counts_and_sizes_at_the_start():
    with torch.device("meta"):
        heads = {d: clever.DINOHead(d, clever.Args(), 65536) for d in (307, 77, 384, 1638)}
        assert {d: count(h) for d, h in heads.items()} == {
            307: 22_194_432,
            77: 21_723_392,
            384: 22_352_128,
            1638: 24_920_320,
        }
        args = clever.Args(**clever.BASES["simsiam"])
        model = clever.SimSiam(common.ResNet("resnet50"), args, 1638)
        assert (count(model.projectors["inv"]), count(model.projectors["equi"]), count(model.predictors["inv"])) == (
            11_753_472,
            9_238_528,
            2_100_224,
        )
        assert (
            count(
                clever.SimSiam(
                    common.ResNet("resnet50"), clever.dataclasses.replace(args, equi="none"), 2048
                ).projectors["inv"]
            )
            == 12_593_152
        )
        assert (
            count(clever.VMamba()) == 29_480_064
            and count(common.ViT("vit_tiny")) == 5_524_416
            and count(common.ResNet("resnet50")) == 23_508_032
        )
    torch.manual_seed(0)
    K = 4096
    head = clever.DINOHead(307, clever.Args(), K)
    assert clever.squared_norm(head).item() == pytest.approx(K / 3 + 0.8192 * 307 + 1887.44, rel=0.01)
    model = clever.SimSiam(type("Encoder", (torch.nn.Identity,), dict(dim=80))(), args, 64)  # equi="ddcl"
    assert clever.squared_norm(model.projectors["equi"]).log10().item() == pytest.approx(
        3.788, abs=0.002
    ) and clever.squared_norm(model.predictors["inv"]).log10().item() == pytest.approx(3.136, abs=0.005)


def test_the_first_values_of_clever():
    """With K = 65,536 prototypes, as derived from Gaussian logits of variance 1/256."""
    torch.manual_seed(0)
    args = clever.Args(local_crops=0)
    student, teacher = clever.DINOHead(16, args, 65536), clever.DINOHead(16, args, 65536)
    z = torch.randn(4, 16)
    with torch.no_grad():
        for other, CL, Orth in ((student, (10.2, 10.5), (0.55, 0.75)), (teacher, (11.1, 11.45), (0.2, 0.3))):
            q, log_p = F.softmax(other(z) / 0.04, 1), F.log_softmax(student(z) / 0.1, 1)
            assert (
                CL[0] < clever.cross_entropy(q, log_p) < CL[1]
                and Orth[0] < clever.similarity(q, log_p, "cos") < Orth[1]
            )


# ---- schedules ---------------------------------------------------------------------------------------------


def test_N4_N5_schedules_of_dino():
    args = clever.Args(**clever.values_in_force(clever.Args(data="imagenet100")))
    rate = lambda s: clever.learning_rates(args, s, 247, 2470)[0]
    assert (
        (args.epochs, args.batch_size, rate(0)) == (200, 512, 0)
        and rate(2469) == pytest.approx(1e-3)
        and rate(2470) == pytest.approx(1e-3)
    )
    assert rate(49_399) == pytest.approx(1.0000011e-6, rel=1e-6)
    assert common.cosine(0.25, args.momentum, 1.0) == pytest.approx(0.9965858, abs=1e-7) and common.cosine(
        0.25, args.weight_decay, args.weight_decay_end
    ) == pytest.approx(0.0927208)


def test_N5_schedules_of_simsiam():
    args = clever.Args(**clever.values_in_force(clever.Args(base="simsiam", data="imagenet100")) | dict(base="simsiam"))
    rates = lambda epoch: clever.learning_rates(args, epoch * 10 + 7, 10, 300)
    assert (
        args.equi == "ddcl"
        and rates(0) == pytest.approx([1e-9, 1e-9])
        and rates(15) == pytest.approx([0.025, 0.025])
        and rates(29)[0] == pytest.approx(0.0483333, abs=1e-6)
    )
    assert rates(30) == [0.05, 0.05] and rates(130) == pytest.approx([0.025, 0.05]) and rates(31)[0] < 0.05


def test_decay_alone_follows_the_closed_form():
    w = torch.nn.Parameter(torch.ones(1).double())
    optimizer = torch.optim.SGD([w], lr=0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(1000):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert w.item() == pytest.approx(0.951635, abs=1e-6)


def test_N14_who_decays():
    _, model, _ = step()
    groups = clever.make_optimizer(model, args_for(), torch.device("cpu")).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ([names[id(p)] for p in g["params"]] for g in groups)
    assert (
        "backbone.cls_token" in decayed
        and "backbone.pos_embed" in decayed
        and all(n.endswith("bias") or "norm" in n for n in plain)
        and plain
    )
    assert not any("original0" in n or n.startswith("teacher") for n in decayed + plain)
    with torch.device("meta"):
        vmamba = clever.DINO(clever.VMamba(), args_for(), 614)
    groups = clever.make_optimizer(vmamba, args_for(), torch.device("cpu")).param_groups
    backbone = {id(p) for p in vmamba.backbone.parameters()}
    assert sum(p.numel() for p in groups[0]["params"] if id(p) in backbone) == 29_396_304
    _, model, _ = step("simsiam", "ddcl")
    groups = clever.make_optimizer(model, args_for("simsiam", "ddcl"), torch.device("cpu")).param_groups
    assert sum(map(len, (g["params"] for g in groups))) == len(list(model.parameters())) and len(
        groups[1]["params"]
    ) == len(list(model.predictors.parameters()))


# ---- VMamba ---------------------------------------------------------------------------------------------------


def test_scan_of_constants():
    one = torch.ones(1, 1, 1, 50).double()
    y = clever.selective_scan(
        one, math.log(2) * one, -torch.ones(1, 1).double(), one[:, 0], one[:, 0], torch.ones(1, 1).double()
    )[0, 0, 0]
    assert y[:4].tolist() == pytest.approx([1.693147, 2.039721, 2.213008, 2.299651], abs=1e-6) and y[
        -1
    ].item() == pytest.approx(2.386294, abs=1e-6)
    assert torch.equal(
        clever.selective_scan(one, one, -one[0, :, :, 0], 0 * one[:, 0], one[:, 0], 3 * one[0, :, :, 0]), 3 * one
    )


@pytest.mark.parametrize("L", [1, 2, 9, 36, 37, 100])
def test_scan_in_chunks_equals_the_recurrence(L):
    g = common.rng("scan", L)
    draw = lambda *shape: torch.randn(*shape, generator=g).double()
    u, delta, A, B, C, D = (
        draw(2, 4, 3, L),
        F.softplus(3 * draw(2, 4, 3, L)),
        -draw(4, 3).exp(),
        draw(2, 4, L),
        draw(2, 4, L),
        draw(4, 3),
    )
    tensors = [v.requires_grad_() for v in (u, delta, A, B, C, D)]
    h, rows = torch.zeros(2, 4, 3).double(), []
    for s in range(L):
        h = (delta[..., s] * A).exp() * h + delta[..., s] * B[:, :, None, s] * u[..., s]
        rows.append(C[:, :, None, s] * h + D * u[..., s])
    y, expected = clever.selective_scan(*tensors), torch.stack(rows, 3)
    assert torch.allclose(y, expected, atol=1e-10)
    weight = draw(*y.shape)
    for a, b in zip(
        torch.autograd.grad((y * weight).sum(), tensors), torch.autograd.grad((expected * weight).sum(), tensors)
    ):
        assert torch.allclose(a, b, atol=1e-9)


def test_a_long_step_overflows_nothing():
    u = torch.ones(1, 1, 1, 400)
    y = clever.selective_scan(u, 1e3 * u, -torch.ones(1, 1), u[:, 0], u[:, 0], torch.zeros(1, 1))
    assert torch.isfinite(y).all() and torch.allclose(y, 1e3 * u)


def test_cross_scan_and_merge():
    x = t([1, 2, 3], [4, 5, 6])[None, None]
    assert ["".join(str(int(v)) for v in row) for row in clever.cross_scan(x)[0, :, 0]] == [
        "123456",
        "142536",
        "654321",
        "635241",
    ]
    assert torch.equal(clever.cross_merge(clever.cross_scan(x), 2, 3), 4 * x)


@pytest.mark.parametrize("size, sides", [(96, (24, 12, 6, 3)), (224, (56, 28, 14, 7))])
def test_maps_of_vmamba(size, sides):
    with torch.device("meta"):
        encoder = common.make_backbone("vmamba_tiny", (0,) * 3, (1,) * 3, size)
        x = torch.randn(1, 3, size, size)
        _, maps = encoder.trace(x, (1, 2, 3, 4))
    assert [tuple(maps[k].shape[1:]) for k in (1, 2, 3, 4)] == [(s, s, 96 * 2**i) for i, s in enumerate(sides)]


# ---- deformations -----------------------------------------------------------------------------------------------


def test_elastic_is_torchvision_s_on_the_same_noise(monkeypatch):
    x = torch.rand(3, 3, 48, 40)
    op = common.Elastic(alpha=100.0, p=1.0)
    params = op.sample(3, common.rng(0))
    y = op(x.clone(), params)
    for image, seed, ours in zip(x, params["elastic"], y):
        noise = common.hash_noise(seed[None], 2 * 48 * 40).view(2, 1, 1, 48, 40).float()
        draws = iter(noise)
        monkeypatch.setattr(torch, "rand", lambda *_, draws=draws: next(draws))
        shift = T.ElasticTransform.get_params([100.0, 100.0], [5.0, 5.0], [48, 40])
        monkeypatch.undo()
        theirs = TF.elastic_transform(image[None], shift, TF.InterpolationMode.BILINEAR)[0]
        assert (ours - theirs).abs().max() < 1e-4


def test_elastic_law():
    op = common.Elastic()
    on = op.sample(4000, common.rng(0))["elastic"] > 0
    assert on.double().mean().item() == pytest.approx(0.5, abs=0.03)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(op(x.clone(), dict(elastic=torch.zeros(2, dtype=torch.int64))), x)
    assert torch.allclose(common.Elastic(alpha=0.0, p=1.0)(x.clone(), dict(elastic=torch.tensor([1, 2]))), x, atol=1e-5)
    noise = common.hash_noise(torch.arange(1, 9), 2 * 160 * 160).view(8, 2, 160, 160).float() * 2 - 1
    shift = 50 * op.smooth.blur(noise, torch.full((8,), 5.0))[:, :, 30:-30, 30:-30]
    assert op.smooth.kernel == 41 and shift.std().item() == pytest.approx(1.63, abs=0.03)
    assert torch.equal(common.hash_noise(torch.tensor([5]), 9), common.hash_noise(torch.tensor([4, 5]), 9)[1:])


def test_complex_views_of_small_images_with_local_crops():
    args, _, views = step(aug="complex_plus", img_size=32, local_size=16, patch_size=8)
    assert {k: tuple(v.shape) for k, v in views.items()} == {
        "1": (8, 3, 32, 32),
        "2": (8, 3, 32, 32),
        "3": (8, 3, 16, 16),
        "4": (8, 3, 16, 16),
    }
    assert all(torch.isfinite(v).all() for v in views.values())
    names = lambda base: [
        type(op).__name__ for op in clever.make_policies(args_for(base, "none", aug="complex_plus", blur=True))["2"].ops
    ]
    assert names("dino") == [
        "HorizontalFlip",
        "Affine",
        "Elastic",
        "ColorJitter",
        "Grayscale",
        "GaussianBlur",
        "Solarize",
        "Normalize",
    ]
    assert names("simsiam") == [
        "ColorJitter",
        "Grayscale",
        "GaussianBlur",
        "HorizontalFlip",
        "Affine",
        "Elastic",
        "Normalize",
    ]


# ---- training -----------------------------------------------------------------------------------------------------


def train(base, equi, arch, steps=2):
    """Tiny training in float64 -> (losses, gradients of the first step), as numpy."""
    args, model, _ = step(base, equi, arch=arch, beta=0.5)
    parameters, losses = [p for p in model.parameters() if p.requires_grad], []
    optimizer, ddp = torch.optim.SGD(parameters, lr=0.01), common.distributed(model)
    for k in range(steps):
        _, _, views = step(base, equi, seed=k, arch=arch)
        out, _ = ddp(views)
        optimizer.zero_grad()
        out["loss"].backward()
        losses.append([common.all_reduce(v.detach().double()).item() / common.world_size() for v in out.values()])
        if k == 0:
            gradients = [p.grad.clone().numpy() for p in parameters]
        optimizer.step()
        if base == "dino":
            model.update_teacher(0.9)
    return losses, gradients


@pytest.mark.parametrize("base, equi, arch", [("dino", "clever", "resnet_pico"), ("simsiam", "ddcl", "resnet_pico")])
def test_N1_N3_2_processes_train_the_same_model(base, equi, arch, tmp_path):
    (losses, gradients), *_ = on_ranks(1, tmp_path, train, base, equi, arch)
    scale = max(abs(g).max() for g in gradients)
    for other_losses, other_gradients in on_ranks(2, tmp_path, train, base, equi, arch):
        assert torch.allclose(torch.tensor(other_losses), torch.tensor(losses), rtol=1e-8, atol=0)
        for a, b in zip(gradients, other_gradients):
            assert abs(a - b).max() <= 1e-8 * max(abs(a).max(), 1e-3 * scale)


@pytest.fixture
def small(folder):
    return [
        *"--data imagefolder --data-dir".split(),
        str(folder),
        *"--recipe cifar10 --img-size 16 --patch-size 4 --batch-size 12 --epochs 3".split(),
        *"--warmup-epochs 1 --proj-hidden 16 --head-dim 24 --head-dim-equi 24 --bottleneck 8".split(),
        *"--local-size 8 --workers 0 --device cpu --max-steps 4".split(),
    ]


@pytest.mark.parametrize("arch", ["vit_pico", "resnet_pico"])
@pytest.mark.parametrize("base, equi", VARIANTS)
def test_N7_every_variant_trains_and_resumes_to_the_same_bits(base, equi, arch, small, tmp_path, capsys):
    """Stopped in the middle of the temperature's and of the weight decay's schedule, with the prototypes frozen
    (dino), or of the warm-up, after which the momentum starts anew (simsiam)."""
    run = [*small, "--base", base, "--equi", equi, "--arch", arch, "--freeze-last-epochs", "2", "--max-steps", "6"]
    run += ["--warmup-epochs", "2"] if base == "simsiam" else []
    run += (
        ["--local-crops", "2", "--teacher-temp", "0.04", "0.07", "--teacher-temp-epochs", "2", "--aug", "complex_plus"]
        if base == "dino"
        else []
    )
    clever.main([*run, "--out", str(tmp_path / "whole")])
    clever.main([*run, "--out", str(tmp_path / "halved"), "--max-steps", "3"])
    clever.main([*run, "--out", str(tmp_path / "halved"), "--resume"])
    whole, halved = (content(tmp_path / name / "checkpoint.pt") for name in ("whole", "halved"))
    assert same(whole, halved)
    if base == "simsiam":  # 4 of its 6 steps warmed up; since then two made the momentum
        assert whole["train_state"]["optimizer"]["param_groups"][1]["lr"] == pytest.approx(0.05 * 12 / 256)
    log = [json.loads(line) for line in (tmp_path / "halved" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [(k - 4 * (base == "simsiam")) / 2 for k in range(6)]
    assert "k-NN accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["dino", "simsiam"])
def test_diagnostics_are_computed_for_the_log_alone(base, small, tmp_path, monkeypatch):
    """Steps without a line in the log have none; the lines that are there are those of a log of every step."""
    calls, diagnostics, lines = [], clever.diagnostics, {}
    monkeypatch.setattr(clever, "diagnostics", lambda *args: calls.append(args[0]) or diagnostics(*args))
    run = [*small, "--base", base, "--arch", "vit_pico", "--local-crops", "0", "--warmup-epochs", "0"]
    for name, logged in (("all", [0, 1, 2, 3]), ("some", [0, 3])):
        calls.clear()
        monkeypatch.setattr(common, "is_logged", lambda _, step, logged=logged: step in logged)
        clever.main([*run, "--out", str(tmp_path / name)])
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        lines[name] = {line["step"]: {k: v for k, v in line.items() if "log_" in k or k == "loss"} for line in log}
        assert list(lines[name]) == logged and len(calls) == 2 * len(logged)
    assert len(lines["some"][3]) == 5 and all(lines["all"][step] == line for step, line in lines["some"].items())


def test_frozen_prototypes_stay_where_they_are(small, tmp_path):
    for epochs, moved in (("1", True), ("2", False)):
        clever.main(
            [
                *small,
                *"--arch vit_pico --local-crops 1 --freeze-last-epochs".split(),
                epochs,
                *"--momentum 1.0 --out".split(),
                str(tmp_path / epochs),
            ]
        )
        state = common.load_checkpoint(tmp_path / epochs / "checkpoint.pt")["train_state"]["heads"]
        for name in ("inv", "equi"):  # 4 steps of 2 epochs; a teacher that never moves
            now, then = (state[f"{who}heads.{name}.last.parametrizations.weight.original1"] for who in ("", "teacher."))
            assert torch.equal(now, then) is not moved


def test_vmamba_trains(small, tmp_path, capsys):
    clever.main(
        [
            *small,
            *"--arch vmamba_tiny --local-crops 1 --max-steps 1 --batch-size 4 --out".split(),
            str(tmp_path / "run"),
        ]
    )
    encoder, _ = common.load_backbone(tmp_path / "run" / "checkpoint.pt")
    assert isinstance(encoder, clever.VMamba) and encoder.inv == 614


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--base", "simsiam", "--equi", "clever"], ("--equi clever", "--base dino")),
        (["--equi", "ddcl"], ("--equi ddcl", "--base simsiam")),
        (["--base", "simsiam", "--local-crops", "4"], ("--local-crops 4", "simsiam")),
        (["--local-size", "10"], ("--local-size 10", "--patch-size 4")),
        (["--warmup-epochs", "3"], ("--warmup-epochs 3",)),
        (["--inv-ratio", "1"], ("--inv-ratio 1",)),
        (["--arch", "vit_pico", "--inv-ratio", "0.001"], ("--inv-ratio 0.001", "0 of 32")),
        (["--base", "simsiam", "--arch", "vit_pico", "--inv-ratio", "0.999"], ("--inv-ratio 0.999", "32 of 32")),
        (["--base", "simsiam", "--orth", "dot"], ("--orth dot", "dino")),
        (["--base", "simsiam", "--momentum", "0.95"], ("--momentum 0.95", "dino", "0.9")),
        (["--teacher-temp", "0.04", "0.07"], ("--teacher-temp 0.04 0.07", "--teacher-temp-epochs")),
        (["--arch", "vmamba_small"], ("--arch vmamba_small", "vmamba_tiny")),
        (["--arch", "vmamba_tiny", "--compile"], ("--compile", "vmamba_tiny", "leave the flag out")),
        (["--recipe", "tdw"], ("--recipe tdw", "cifar10")),
    ],
)
def test_mistakes(argv, words, small, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        clever.main([*small, *argv, "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.strip().splitlines()) == 1 and all(w in err for w in words)
