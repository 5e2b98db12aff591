"""What must hold of every method's numbers: symmetries and gradients of the losses, schedules, golden losses. Ids as
in test_faults.py."""

import dataclasses
import json
import math
import re
from functools import partial
from pathlib import Path

import ciper
import clever
import common
import recon_xattn
import ser

import pytest
import torch
import torch.nn.functional as F
from test_run import content

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"ser": ser, "recon_xattn": recon_xattn, "ciper": ciper, "clever": clever}


def draw(*shape, key=0):
    return torch.randn(*shape, dtype=torch.float64, generator=common.rng("invariants", key, shape))


def columns(z):
    """What a batch norm without affine makes of z."""
    return (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()


def soft(a, b):
    """Teacher's and student's softmaxes of two views."""
    return [F.softmax(v / 0.4, 1) for v in (a, b)], [F.log_softmax(v, 1) for v in (a, b)]


@dataclasses.dataclass
class Loss:
    """A loss of two views (n, d); whether swapping them or scaling a row changes nothing, and whether it couples the
    batch."""

    fn: callable
    symmetric: bool = True
    scale_free: bool = False
    coupled: bool = True


cells = lambda z: z.unflatten(1, (2, -1))  # (n, 2 cells, d / 2)
LOSSES = {
    "ser nt_xent": Loss(lambda a, b: ser.nt_xent(cells(a), cells(b), 0.5), scale_free=True),
    "ser contrast": Loss(lambda a, b: ser.contrast(a, b, 0.2) + ser.contrast(b, a, 0.2), scale_free=True),
    "ser distill": Loss(
        lambda a, b: ser.distill([a, b], [a, b], torch.zeros(a.shape[1]).to(a), 0.5, 0.4), coupled=False
    ),
    "ser redundancy_reduction": Loss(lambda a, b: ser.redundancy_reduction(columns(a), columns(b), 0.0051)),
    "recon vicreg": Loss(lambda a, b: recon_xattn.vicreg(a, b, recon_xattn.Args())["L_ssl"]),
    "recon split_loss": Loss(
        lambda a, b: recon_xattn.split_loss(
            a[:, :3], b[:, :3], a[:, 3:], b[:, 3:], a[:, 3:].flip(1), recon_xattn.Args()
        )["loss"],
        symmetric=False,
    ),
    "ciper nt_xent": Loss(lambda a, b: ciper.nt_xent(a, b, 0.5), scale_free=True),
    "ciper info_nce": Loss(lambda a, b: ciper.info_nce(a, b, 0.5), scale_free=True),
    "ciper standardise": Loss(lambda a, b: F.mse_loss(a, ciper.standardise(b)), symmetric=False),
    "clever cross_entropy": Loss(lambda a, b: clever.over_pairs(clever.cross_entropy, *soft(a, b)), coupled=False),
    "clever similarity": Loss(
        lambda a, b: clever.over_pairs(partial(clever.similarity, form="cos"), *soft(a, b)), coupled=False
    ),
    "clever cosines": Loss(lambda a, b: clever.cosines(a, b, a, b), scale_free=True, coupled=False),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@each_loss
def test_N9_gradients_are_those_of_finite_differences(loss):
    """Of views that differ, and of views that hardly do."""
    a = draw(4, 6).requires_grad_()
    for b in (draw(4, 6, key=1), a.detach() + 1e-3 * draw(4, 6, key=2)):
        b.requires_grad_()
        fn, keys = loss.fn, (a.detach().clone(), b.detach().clone())
        if loss is LOSSES["clever cosines"]:  # its keys get no gradient
            fn = partial(lambda keys, a, b: clever.cosines(a, b, *keys), keys)
        assert torch.autograd.gradcheck(fn, (a, b))


@each_loss
def test_T6_N9_alike_empty_and_huge_features_give_finite_losses_and_gradients(loss):
    for z1, z2 in (
        (torch.ones(4, 6), torch.ones(4, 6)),
        (torch.zeros(4, 6), torch.zeros(4, 6)),
        (1e4 * draw(4, 6).float(), 1e4 * draw(4, 6, key=1).float()),
    ):
        z1.requires_grad_(), z2.requires_grad_()
        value = loss.fn(z1, z2)
        value.backward()
        assert all(torch.isfinite(v).all() for v in (value, z1.grad, z2.grad) if v is not None)


@each_loss
def test_N10_symmetries(loss):
    """The order of the batch, and where it should be so that of the views and the length of a row, change nothing."""
    a, b, order = draw(6, 6), draw(6, 6, key=1), torch.tensor([3, 0, 5, 1, 4, 2])
    value = loss.fn(a, b).item()
    assert loss.fn(a[order], b[order]).item() == pytest.approx(value, rel=1e-12)
    assert (loss.fn(b, a).item() == pytest.approx(value, rel=1e-12)) == loss.symmetric
    lengths = torch.tensor([0.5, 3, 1, 2, 10, 0.1]).double()[:, None]
    assert (loss.fn(a * lengths, b).item() == pytest.approx(value, rel=1e-12)) == loss.scale_free
    assert loss.fn(a, b[order]).item() != pytest.approx(value, rel=1e-3)  # it knows which rows belong together


@each_loss
def test_N12_parts_of_a_batch_add_up_only_where_images_do_not_meet(loss):
    """Why there is no gradient accumulation: of the losses that compare images with each other it gives other
    gradients."""

    def gradient(*parts):
        a, b = draw(8, 6).requires_grad_(), draw(8, 6, key=1)
        for rows in parts:
            (loss.fn(a[rows], b[rows]) / len(parts)).backward()
        return a.grad

    whole, halves = gradient(slice(None)), gradient(slice(4), slice(4, None))
    error = ((halves - whole).norm() / whole.norm()).item()
    assert error > 0.02 if loss.coupled else error < 1e-12
    assert not any("accum" in f.name for script in SCRIPTS.values() for f in dataclasses.fields(script.Args))


def test_N11_four_quarter_turns_are_none_and_steps_compose():
    x, turn = torch.rand(3, 3, 5, 5), dict(rot90=torch.tensor([1, 2, 3]))
    y = x.clone()
    for _ in range(4):
        y = common.Rot90()(y, turn)
    assert torch.equal(y, x)
    z, g = draw(64, 4, 4, 2), torch.cartesian_prod(*[torch.arange(n) for n in (4, 2, 4, 2)])
    k1, f1, k2, f2 = g.T
    zero = torch.zeros_like(k1)
    both = ser.act(ser.act(z, k1, f1, (4, 4)), k2, f2, (4, 4))
    inverse_k, inverse_f = ser.relative(k1, f1, zero, zero)  # of the first element
    k, f = ser.relative(inverse_k, inverse_f, k2, f2)  # the second after the first
    assert (both - ser.act(z, k, f, (4, 4))).abs().max() < 1e-6
    assert all(v.eq(0).all() for v in ser.relative(k1, f1, k1, f1))
    rotation = common.quaternion_from_angles(draw(5, 3).float())
    still = common.pose_target("pose", dict(rotation=rotation), torch.arange(5), torch.arange(5))
    assert torch.allclose(still, torch.eye(4)[3:].expand(5, 4), atol=1e-6)  # x, y, z, w
    r, session = ciper.change(dict(view=draw(5, 3)), torch.arange(5), torch.arange(5))
    assert r.abs().max() == 0 and session is None


# ---- schedules --------------------------------------------------------------------------------------


def test_N5_schedules_are_those_of_the_papers_code():
    """The rate starts at 0, is at its peak once and falls. At its last used step, T - 1 of T, it has not arrived:
    MoCo-v3's and DINO's code end one step short of the stated final value too. Only MoCo-v3's momentum, of the coming
    step, arrives."""
    epochs, warmup, per_epoch, peak = 10, 2, 8, 0.3
    T, W = epochs * per_epoch, warmup * per_epoch
    rates = [common.warmup_cosine(step / per_epoch, epochs, warmup, peak, 0.01) for step in range(T)]
    assert rates[0] == 0 and rates.index(peak) == W and rates.count(peak) == 1 and all(type(r) is float for r in rates)
    assert rates[: W + 1] == sorted(rates[: W + 1]) and rates[W:] == sorted(rates[W:], reverse=True)
    assert (
        rates[-1] == pytest.approx(0.01 + 0.29 * (1 + math.cos(math.pi * (1 - 1 / (T - W)))) / 2, rel=1e-12)
        and rates[-1] > 0.01
    )
    assert common.warmup_cosine(epochs, epochs, warmup, peak, 0.01) == pytest.approx(0.01)
    momentum = [common.cosine((step + 1) / T, 0.99, 1.0) for step in range(T)]
    assert momentum == sorted(momentum) and momentum[-1] == 1 and momentum[-2] < 1
    decay = [common.cosine(step / T, 0.04, 0.4) for step in range(T)]
    assert (
        decay[0] == pytest.approx(0.04)
        and decay[-1] == pytest.approx(0.4 - 0.36 * (1 + math.cos(math.pi * (1 - 1 / T))) / 2, rel=1e-12)
        and decay[-1] < 0.4
    )
    args = clever.Args(
        lr=0.256, batch_size=256, epochs=epochs, lr_end=0.001
    )  # DINO's table holds both ends of the warm-up: the peak twice
    rates = [clever.learning_rates(args, step, per_epoch, W)[0] for step in range(T)]
    assert rates[0] == 0 and [i for i, r in enumerate(rates) if r == max(rates)] == [W - 1, W] and rates[W] == 0.256
    assert rates[-1] == pytest.approx(0.001 + 0.255 * (1 + math.cos(math.pi * (1 - 1 / (T - W)))) / 2, rel=1e-12)


# ---- whole runs -------------------------------------------------------------------------------------


def flags(script, folder):
    shared = [
        *"--data imagefolder --data-dir".split(),
        str(folder),
        *"--recipe cifar10 --img-size 16 --batch-size 12 --epochs 3 --warmup-epochs 1".split(),
        *"--workers 0 --device cpu --arch".split(),
        "resnet_pico" if script == "ciper" else "vit_pico",
    ]
    return (
        shared
        + dict(
            ser=["--patch-size", "4", "--proj-hidden", "16", "--proj-dim", "8", "--equi-dim", "16"],
            recon_xattn=["--patch-size", "4", "--neck", "16", "--embed-dim", "8"],
            ciper=["--proj-hidden", "16", "--proj-dim", "8"],
            clever=[
                *"--patch-size 4 --local-size 8 --local-crops 1 --head-dim 16 --head-dim-equi 16".split(),
                "--proj-hidden",
                "16",
            ],
        )[script]
    )


GOLDEN = dict(  # losses of six steps: another number is another method, or another torch; change them on purpose only
    ser=[7.465349, 8.195801, 7.764624, 8.543478, 7.243521, 7.711843],
    recon_xattn=[10.213338, 9.925823, 10.105164, 13.810023, 10.503764, 11.433062],
    ciper=[4.013133, 4.603656, 4.305690, 4.348261, 4.292121, 4.138378],
    clever=[3.202791, 3.254079, 3.143973, 2.497103, 2.423683, 2.460196],
)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.usefixtures("pico")
def test_N5_N16_golden_losses_and_rates(script, folder, tmp_path):
    SCRIPTS[script].main(
        [*flags(script, folder), "--lr", "1e-4" if script == "ciper" else "0.02", "--out", str(tmp_path)]
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(
        GOLDEN[script], rel=2e-3 if script == "ciper" else 1e-4
    )  # batch norm of 12 images amplifies rounding
    peak = json.loads((tmp_path / "args.json").read_text())["lr"] * (1 if script == "ciper" else 12 / 256)
    rates = [
        0,
        0.5,
        1,
        *((1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3)),
    ]  # two steps an epoch, one epoch of warm-up
    if script == "clever":
        rates = [0, 1, *((1 + math.cos(math.pi * k / 4)) / 2 for k in range(4))]
    assert [line["lr"] for line in lines] == pytest.approx([peak * r for r in rates], abs=2e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_N14_a_rate_of_0_moves_statistics_and_no_weight(script, folder, tmp_path):
    run, still = (
        [*flags(script, folder), "--lr", "0", "--max-steps", "1", "--out"],
        ["--lr-end", "0"] * (script == "clever"),
    )
    SCRIPTS[script].main([*run, str(tmp_path / "a"), *still])
    SCRIPTS[script].main([*run, str(tmp_path / "b"), *still, "--epochs", "0", "--warmup-epochs", "0"])
    a, b = (
        c["backbone_state"] | c["train_state"]["heads"]
        for c in (content(tmp_path / name / "checkpoint.pt") for name in "ab")
    )
    moved = {k for k in a if not torch.equal(a[k], b[k])}
    statistics = {k for k in a if re.search("running_|num_batches|centre", k)}
    assert a.keys() == b.keys() and moved <= statistics and bool(moved) == bool(statistics), moved - statistics


@pytest.mark.parametrize("what", ["ciper", "predictive", "clever", "ddcl"])
def test_N16_8_images_are_overfitted(what):
    """30 steps on one batch lower what should fall to a stated share of its start."""
    import test_ciper
    import test_clever

    torch.manual_seed(0)
    if what in ("ciper", "predictive"):
        args, model, views, r, _ = test_ciper.step(what)
        call = lambda: model(views, r.float())[0]
    else:
        args, model, views = test_clever.step(
            *dict(clever=("dino", "clever"), ddcl=("simsiam", "ddcl"))[what],
            **dict(arch="resnet_pico", lambda_preg=0.0),
        )
        call = lambda: model(views)[0]
    model.float()
    views.update({k: v.float() for k, v in views.items()})
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    values = []
    for _ in range(30):
        out = call()
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        values.append(out["loss"].item())
    assert values[-1] < dict(ciper=0.5, predictive=0.1, clever=0.6).get(what, 0) * values[0] - 0.15 * (
        what == "ddcl"
    )  # from 0 towards -1


def test_T2_T4_there_is_no_float16_and_what_is_kept_is_float32():
    """bfloat16 has the range of float32, so no loss is scaled; weights, teachers and statistics never leave float32."""
    for source in ROOT.glob("*.py"):
        assert not re.search(r"(?<!b)float16|\.half\(|GradScaler", source.read_text()), source
    assert common.upcast(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    import test_ciper
    import test_clever
    import test_recon

    args = common.parse(ser.Args, ser.values_in_force, ["--base", "dino", "--prototypes", "16", "--proj-hidden", "16"])
    ser.check(args)
    models = [
        ser.build(args, torch.device("cpu")),
        ciper.build(test_ciper.args_for(), torch.device("cpu"), 10),
        clever.build(test_clever.args_for(), torch.device("cpu")),
        recon_xattn.build(test_recon.args_for(), torch.device("cpu"), 4),
    ]
    assert {v.dtype for model in models for v in model.state_dict().values()} <= {torch.float32, torch.int64}
    target, online = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(target.weight), torch.nn.init.ones_(online.weight)
    for _ in range(3000):
        common.ema_update(target, online, 0.999)
    assert target.weight.item() == pytest.approx(1 - 0.999**3000, abs=1e-4)  # bfloat16 stalls at 0.5


def test_T2_autocast_is_bfloat16_on_gpus_alone():
    with pytest.warns(UserWarning) if not torch.cuda.is_available() else common.contextlib.nullcontext():
        on = common.autocast(torch.device("cuda"), "auto")
    assert on.fast_dtype == torch.bfloat16
    for device, amp in (("cpu", "auto"), ("cuda", "off"), ("mps", "auto")):
        assert isinstance(common.autocast(torch.device(device), amp), common.contextlib.nullcontext)


# ---- the global batch -------------------------------------------------------------------------------


@pytest.mark.parametrize("base, equi", [("mocov3", "ser"), ("mocov3", "stl")])
def test_N3_N8_ranks_share_out_one_global_batch_and_no_draw(base, equi, monkeypatch):
    """Rows, crops and draws of W ranks, side by side, are those of one process; no two ranks, steps or epochs draw
    alike."""
    args = ser.Args(
        **ser.values_in_force(ser.Args(base=base, equi=equi))
        | dict(base=base, equi=equi, batch_size=16, img_size=16, patch_size=4, equi_ratio=0.5)
    )
    ser.check(args)
    policies = ser.make_policies(args)
    data = common.ImageSet(
        images=torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=common.rng("test"))
    )

    def batches(world):
        out = []
        for rank in range(world):
            monkeypatch.setattr(common, "world_size", lambda: world)
            monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
            loader = common.Loader(data, policies, partial(ser.draw_views, args, policies), args, torch.device("cpu"))
            out.append([loader[step] for step in range(4)])  # two epochs of two steps
        return out

    whole = batches(1)[0]
    for world in (2, 4):
        parts = batches(world)
        for step, one in enumerate(whole):
            assert torch.equal(torch.cat([part[step][1]["1"] for part in parts]), one[1]["1"])
            for name, (crops, params) in one[0].items():
                assert torch.equal(torch.cat([part[step][0][name][0] for part in parts]), crops)
                assert all(
                    torch.equal(torch.cat([part[step][0][name][1][key] for part in parts]), value)
                    for key, value in params.items()
                )
        drawn = [
            tuple(torch.cat([batch[0]["1"][1][key] for key in ("top", "height", "brightness", "hue")]).tolist())
            for part in parts
            for batch in part
        ]
        assert len(set(drawn)) == len(drawn)
    first, second = (torch.cat([batch[1]["1"] for batch in whole[i : i + 2]]) for i in (0, 2))
    assert (
        torch.equal(first.sort()[0], torch.arange(32))
        and torch.equal(second.sort()[0], torch.arange(32))
        and not torch.equal(first, second)
    )
