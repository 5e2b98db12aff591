"""CIPER, SimCLR, predictive, E-SSL: losses against closed forms, targets against torchvision, views of objects, the
data sets."""

import math
import os

import ciper
import common

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from test_distributed import on_ranks
from test_run import content, same

COMBINATIONS = [(o, v) for o, views in ciper.VALID_VIEWS.items() for v in views]


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def args_for(objective="ciper", **changes):
    first = ciper.Args(objective=objective)
    args = ciper.Args(
        **ciper.values_in_force(first)
        | dict(objective=objective, batch_size=8, img_size=16, proj_hidden=16, proj_dim=12)
        | changes
    )
    ciper.check(args)
    return args


# ---- losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "N, both, cross",
    [(2, 1.098612, math.log(2)), (4, 1.945910, math.log(4)), (64, 4.844187, math.log(64)), (256, 6.236370, 5.545177)],
)
def test_N13_contrast_of_equal_embeddings(N, both, cross):
    z = torch.ones(N, 5).double()
    assert ciper.nt_xent(z, z, 0.5).item() == pytest.approx(both, abs=1e-6) and ciper.info_nce(
        z, z, 0.5
    ).item() == pytest.approx(cross, abs=1e-6)


@pytest.mark.parametrize(
    "N, tau, both, cross",
    [
        (2, 1, 0.551445, 0.313262),
        (2, 0.5, 0.239545, 0.126928),
        (4, 0.5, 0.594438, 0.340753),
        (64, 0.5, 2.893270, 2.254038),
        (256, 0.5, 4.248795, 3.569828),
    ],
)
def test_N13_contrast_of_orthonormal_embeddings(N, tau, both, cross):
    z = torch.eye(N).double()
    assert ciper.nt_xent(z, z, tau).item() == pytest.approx(both, abs=1e-6) and ciper.info_nce(
        z, z, tau
    ).item() == pytest.approx(cross, abs=1e-6)


def test_contrast_of_two_pairs_and_of_one():
    z1, z2 = t([1, 0], [0, 1]), t([1, 0], [0, -1])
    assert ciper.nt_xent(z1, z2, 0.5).item() == pytest.approx(1.499084, abs=1e-6) and ciper.info_nce(
        z1, z2, 0.5
    ).item() == pytest.approx(1.126928, abs=1e-6)
    assert ciper.nt_xent(z1[:1], z2[:1], 0.5).item() == 0


def test_N10_nt_xent_equals_the_loop_and_its_symmetries():
    z1, z2 = torch.randn(2, 5, 7).double()
    u = [v / v.norm() for v in [*z1, *z2]]
    total = 0.0
    for i in range(10):
        others = [math.exp(float(u[i] @ u[k]) / 0.2) for k in range(10) if k != i]
        total -= math.log(math.exp(float(u[i] @ u[(i + 5) % 10]) / 0.2) / sum(others))
    value = ciper.nt_xent(z1, z2, 0.2).item()
    order = torch.randperm(5)
    assert value == pytest.approx(total / 10, rel=1e-9)
    for a, b in ((z2, z1), (z1 * torch.rand(5, 1).double(), 3 * z2), (z1[order], z2[order])):
        assert ciper.nt_xent(a, b, 0.2).item() == pytest.approx(value, rel=1e-9)


def test_targets_are_standardised_and_a_constant_one_is_0():
    assert ciper.standardise(t([1], [1], [1], [1], [0]))[:, 0].tolist() == pytest.approx(
        [0.499984] * 4 + [-1.999937], abs=1e-6
    )
    r = ciper.standardise(t([0, 1], [2, 1], [4, 1]))
    assert r[:, 0].tolist() == pytest.approx([-1.2247, 0, 1.2247], abs=1e-4) and r[:, 1].tolist() == [0, 0, 0]
    assert r.square().mean().item() == pytest.approx(0.5, abs=1e-5)  # L_p of a prediction of 0


def step(objective, views="image", seed=0, **changes):
    """(args, model in float64, views, r, session) of one step on random images of 4 objects in 2 sessions."""
    args = args_for(objective, views=views, **changes)
    g = common.rng("test", seed)
    data = common.ImageSet(
        images=torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=g),
        groups=torch.arange(32) // 8,
        factors=dict(session=torch.arange(32) // 4 % 2, view=360 * torch.rand(32, 3, generator=g)),
    )
    policies = ciper.make_policies(args)
    loader = common.Loader(
        data,
        policies,
        ciper.partial(ciper.draw_views, args, policies),
        args,
        torch.device("cpu"),
        ciper.ObjectViews(data) if views == "dataset" else None,
    )
    views, params, rows = next(loader.batches([0]))
    if args.views == "image":
        r, session = torch.cat([ciper.augmentation(params[v], args.drop_aug) for v in "12"]), None
    else:
        changes = [ciper.change(data.factors, rows["0"], rows[v]) for v in "12"]
        r, session = torch.cat([c[0] for c in changes]), torch.cat([c[1] for c in changes])
    model = ciper.build(args, torch.device("cpu"), r.shape[1] + ciper.SESSIONS * (session is not None)).double()
    return args, model, {k: v.double() for k, v in views.items()}, r.double(), session


def test_the_whole_loss_equals_its_formula():
    """CIPER with views, sessions and alpha 0.7, term by term in loops."""
    args, model, views, r, session = step("ciper", "dataset", alpha=0.7)
    out, h1 = model(views, r, session)
    h, h2 = model.backbone(views["0"]), model.backbone(views["2"])
    p = torch.cat([model.predictor(h - h1), model.predictor(h - h2)]).detach()  # (2 N, 3 + 11)
    standard = (r - r.mean(0)) / (r.var(0, correction=0) + 1e-5).sqrt()
    error = sum(float((standard[i, m] - p[i, m]) ** 2) for i in range(16) for m in range(3)) / (16 * 3)
    entropy = sum(-math.log(float(p[i, 3:].exp()[session[i]] / p[i, 3:].exp().sum())) for i in range(16)) / 16
    contrast = ciper.nt_xent(model.projector(h1), model.projector(h2), 0.5).item()
    assert out["L_session"].item() == pytest.approx(entropy, rel=1e-6) and out["L_p"].item() == pytest.approx(
        error + entropy, rel=1e-6
    )
    assert out["loss"].item() == pytest.approx(contrast + 0.7 * (error + entropy), rel=1e-6)


def test_an_anchor_without_augmentation_says_nothing():
    """In eval mode a view that is the anchor itself gives h - h_k = 0, so all predictions are the same."""
    args, model, views, r, _ = step("predictive")
    model.eval()
    out, _ = model(dict.fromkeys("012", views["0"]), r)
    p = model.predictor(torch.zeros(1, model.backbone.dim).double()).detach()
    assert out["L_p"].item() == pytest.approx((ciper.standardise(r) - p).square().mean().item(), rel=1e-9)
    out["loss"].backward()
    assert model.backbone.conv1.weight.grad.abs().max() < 1e-12


def test_gradients_reach_the_encoder_through_the_anchor_too():
    args, model, views, r, _ = step("predictive")
    for v in views.values():
        v.requires_grad_()
    model(views, r)[0]["loss"].backward()
    assert all(views[v].grad.abs().max() > 0 for v in "012")


def test_differences_of_bfloat16_representations_are_taken_in_float32():
    args, model, views, r, _ = step("predictive")
    model, views, r = model.float(), {k: v.float() for k, v in views.items()}, r.float()
    h, seen = [torch.randn(8, model.backbone.dim).bfloat16() for _ in range(3)], []
    model.compiled = (lambda view: h[next(int(k) for k, v in views.items() if v is view)],)
    model.predictor.register_forward_hook(lambda m, inputs, _: seen.append(inputs[0]))
    model(views, r)
    assert torch.equal(seen[0], torch.cat([h[0].float() - h[1].float(), h[0].float() - h[2].float()]))


def test_rotations_are_predicted_from_half_sized_views():
    args, model, views, *_ = step("essl")
    assert views["3"].shape == (8, 3, 8, 8) and set(views) == {"1", "2", "3"}
    out, _ = model(views)
    turned = torch.stack([torch.rot90(views["3"][i], k, (1, 2)) for k in range(4) for i in range(8)])
    scores = model.rotation(model.backbone(turned))
    expected = -scores.log_softmax(1)[torch.arange(32), torch.arange(32) // 8].mean()
    assert out["L_rot"].item() == pytest.approx(expected.item(), rel=1e-9)
    contrast = ciper.info_nce(
        model.projector(model.backbone(views["1"])), model.projector(model.backbone(views["2"])), 0.5
    )
    assert out["loss"].item() == pytest.approx((contrast + 0.4 * expected).item(), rel=1e-9)


# ---- sizes, coordinates ----------------------------------------------------------------------------------


def test_parameter_counts():
    count = lambda m: sum(p.numel() for p in m.parameters())
    with torch.device("meta"):
        encoder = lambda coords: common.ResNet("resnet18", 32, "cifar", coords)
        heads = lambda objective: ciper.Model(encoder(True), ciper.Args(objective=objective), 10)
        assert count(encoder(False)) == 11_168_832 and count(encoder(True)) == 11_169_984
        assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in encoder(True).modules()) == 20
        assert (
            count(heads("ciper").projector) == 5_246_976
            and count(heads("ciper").predictor) == 268_810
            and count(heads("essl").rotation) == 5_263_364
        )
        assert heads("simclr").predictor is None and heads("predictive").projector is None


def test_coordinates_are_those_of_the_view():
    seen = []
    encoder = common.make_backbone("resnet_pico", (0,) * 3, (1,) * 3, 8, stem="cifar", coords=True)
    encoder.conv1.register_forward_hook(lambda m, inputs, _: seen.append(inputs[0]))
    encoder(torch.randn(2, 3, 4, 8))
    x, y = seen[0][:, 3], seen[0][:, 4]
    assert torch.allclose(x, torch.linspace(-1, 1, 8).expand(2, 4, 8)) and torch.allclose(
        y, torch.linspace(-1, 1, 4)[:, None].expand(2, 4, 8)
    )


# ---- image views -------------------------------------------------------------------------------------------


def test_N6_the_target_says_what_torchvision_would_do():
    """The ten numbers of a view, and the order of its colour steps, are all that torchvision needs to make it."""
    args = args_for("ciper", batch_size=16, img_size=24)
    policy = ciper.make_policies(args)["1"]
    x = (
        F.interpolate(torch.rand(16, 3, 6, 6, generator=common.rng(1)), (24, 24), mode="bicubic")
        .clamp(0, 1)
        .mul(255)
        .round()
        .to(torch.uint8)
    )
    params = policy.sample(16, common.rng(0))
    policy.crop.place(params, torch.full((16, 2), 24))
    r, views, (mean, std) = ciper.augmentation(params), policy(x, params), common.BLOCKS
    assert r.shape == (16, 10)
    for image, view, order, numbers in zip(x, views, params["order"], r.double().tolist()):
        left, top, height, width = (round(24 * v) for v in numbers[:4])
        y = TF.resized_crop(image, top, left, height, width, [24, 24], antialias=True).float() / 255
        y = TF.hflip(y) if numbers[4] else y
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for k in order.tolist():
            y = adjust[k](y, numbers[5 + k])
        y = y if numbers[9] else TF.rgb_to_grayscale(y, 3)
        assert (TF.normalize(y, mean, std) - view).abs().max() < 3 / 255 / std[0]
    assert {0, 1} == set(r[:, 4].tolist()) and {0, 1} == set(r[:, 9].tolist())


def test_the_variances_of_the_targets():
    n = 200_000
    policy = ciper.make_policies(args_for("ciper", img_size=32))["1"]
    params = policy.sample(n, common.rng(0))
    policy.crop.place(params, torch.full((n, 2), 32))
    r = ciper.augmentation(params).double()
    assert r.var(0)[4:].tolist() == pytest.approx([0.16, 0.0426667, 0.0426667, 0.0426667, 0.00266667, 0.16], rel=0.03)
    assert (32 * r.mean(0)[:4]).tolist() == pytest.approx([4.311, 4.311, 23.379, 23.379], abs=0.1)
    still = (params["brightness"] == 1) & (params["hue"] == 0)
    assert still.double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(ciper.augmentation(params, ("crop", "gray")), r[:, 4:9].float())


def test_a_dropped_augmentation_is_not_made():
    x = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    args = args_for("ciper", drop_aug=("crop", "jitter", "gray"))
    policy = ciper.make_policies(args)["1"]
    params = policy.sample(8, common.rng(0))
    assert list(params) == ["flip"] and ciper.augmentation(params, args.drop_aug).shape == (8, 1)
    plain = ciper.make_policies(args)["0"](x, {})
    assert torch.allclose(policy(x, params), torch.where(params["flip"][:, None, None, None], plain.flip(3), plain))


# ---- views of objects ----------------------------------------------------------------------------------------


def turntable(objects=3, sessions=2):
    """Factors and groups of a grid of 4 x 2 x 2 views of each object in each session, in random order."""
    grid = torch.cartesian_prod(
        torch.arange(objects),
        torch.arange(sessions),
        torch.arange(4) * 90,
        torch.arange(2) * 20 + 10,
        torch.arange(2) + 3,
    )
    grid = grid[torch.randperm(len(grid), generator=common.rng("turntable"))]
    return common.ImageSet(
        images=torch.zeros(len(grid), 3, 2, 2, dtype=torch.uint8),
        groups=grid[:, 0] * 2 + 1,
        factors=dict(session=grid[:, 1], view=grid[:, 2:].float()),
    )


def test_dataset_views_show_the_object_uniformly():
    data = turntable()
    data = data.subset(
        ((data.groups != 1) | (data.factors["session"] == 1) | (data.factors["view"][:, 0] == 0)).nonzero()[:, 0]
    )  # object 0: 4 images in session 0, 16 in 1
    sampler = ciper.ObjectViews(data)
    items = torch.randperm(len(data))
    rows = [sampler(items, 0, common.rng(i)) for i in range(400)]
    for r in rows[:5]:
        assert torch.equal(r["0"], items) and all(torch.equal(data.groups[r[v]], data.groups[items]) for v in "12")
    shown = torch.cat([torch.cat([r["1"], r["2"]]) for r in rows])
    first = shown[data.groups[shown] == 1]  # of object 0: half of the time in session 0, whatever its number of images
    assert data.factors["session"][first].double().mean().item() == pytest.approx(0.5, abs=0.02)
    count = torch.bincount(first, minlength=len(data))[data.groups == 1].double() / len(first)
    assert sorted(count.tolist()) == pytest.approx([1 / 32] * 16 + [1 / 8] * 4, rel=0.2)


def test_changes_of_view_and_their_variance():
    """All pairs of TDW's 1,008 views of an object: azimuths wrap to [-180, 180)."""
    i = torch.arange(1008)
    view = torch.stack([i % 36 * 10.0, i // 36 % 7 * 10 + 10.0, i // 252 * 0.1 + 0.3], 1)
    pairs = torch.cartesian_prod(i, i)
    r, session = ciper.change(dict(view=view), *pairs.T)
    assert session is None and r[:, 0].min() == -180 and r[:, 0].max() == 170
    r = r.double()
    assert r.var(0, correction=0).tolist() == pytest.approx([10791.67, 800, 0.025], rel=1e-4) and r[
        :, 0
    ].mean().item() == pytest.approx(-5)
    r, session = ciper.change(dict(session=torch.tensor([4, 7])), torch.tensor([0, 1]), torch.tensor([1, 1]))
    assert r.shape == (2, 0) and session.tolist() == [7, 7]
    assert F.cross_entropy(torch.zeros(2, ciper.SESSIONS), session).item() == pytest.approx(2.397895, abs=1e-6)


def is_step(data, i, j):
    same_place = data.groups[i] == data.groups[j] and data.factors["session"][i] == data.factors["session"][j]
    turn, tilt, walk = (data.factors["view"][j] - data.factors["view"][i]).abs().tolist()
    return (
        same_place
        and (turn in (90, 270), tilt == 20, walk == 1).count(True) == 1
        and (turn == 0) + (tilt == 0) + (walk == 0) == 2
    )


def test_the_stream_walks_through_the_views():
    data = turntable()
    sampler = ciper.TimeStream(data, 0.8, seed=0)
    assert all(
        len(ways) == 4 and all(is_step(data, i, k) for k in ways) for i, ways in enumerate(sampler.steps)
    )  # 2 + 1 + 1 neighbours
    streams = [sampler.walk(e) for e in range(60)]
    pairs = [(int(a), int(b)) for s in streams for a, b in zip(s, s[1:])]
    steps = sum(is_step(data, a, b) for a, b in pairs) / len(pairs)
    stays = sum(bool(data.groups[a] == data.groups[b]) for a, b in pairs) / len(pairs)
    switches = sum(
        bool(data.groups[a] == data.groups[b]) and bool(data.factors["session"][a] != data.factors["session"][b])
        for a, b in pairs
    ) / len(pairs)
    assert (
        steps == pytest.approx(0.64, abs=0.03)
        and stays == pytest.approx(0.8, abs=0.03)
        and switches == pytest.approx(0.16, abs=0.02)
    )
    seen = {i for s in streams for i in s.tolist()}
    assert seen == set(range(len(data))) and not torch.equal(streams[0], streams[1])
    rows = sampler(torch.arange(len(data)), 3, None)
    assert torch.equal(rows["1"], streams[3]) and torch.equal(rows["2"], streams[3].roll(-1))


def test_frames_are_neighbours_in_their_session_whatever_their_numbers():
    frames, cell = torch.tensor([7, 2, 4, 1, 3, 9]), torch.tensor([0, 0, 0, 1, 1, 2])
    assert ciper.neighbours(dict(frame=frames), cell) == [[2], [2], [0, 1], [4], [3], []]


# ---- data sets -------------------------------------------------------------------------------------------------


def test_core50_as_published(core50, tmp_path, capsys):
    train, test = (common.load_data("core50", core50, split, 16, sessions=(1, 3)) for split in ("train", "test"))
    assert (
        len(train) == 2 * 10 * 3
        and len(test) == 10 * 3
        and train.factors["session"].unique().tolist() == [0, 2]
        and test.factors["session"].unique().tolist() == [1]
    )
    k = train.paths.index(str(core50 / "s3" / "o7" / "C_03_07_021.png"))
    assert (train.labels[k], train.groups[k], train.factors["frame"][k], train.classes[1]) == (1, 6, 21, "mobile phone")
    assert torch.equal(train[torch.tensor([k])][0], common.open_image(train.paths[k]))
    nested = tmp_path / "up"
    nested.mkdir()
    (nested / "core50_128x128").symlink_to(core50)
    assert len(common.load_data("core50", nested, "train", 16, sessions=(2,))) == 30

    def odd(frame):  # three sessions with a single file
        root = tmp_path / frame.replace("/", "-")
        for s in (1, 2, 3):
            (root / f"s{s}" / "o1").mkdir(parents=True)
        (root / frame).touch()
        return root

    for call, words in (
        (lambda: common.load_data("core50", core50, "train", 16, sessions=(1, 9)), ("found the sessions 1 2 3", "1 9")),
        (lambda: common.load_data("core50", tmp_path / "gone", "train", 16), ("none",)),
        (lambda: common.load_data("core50", core50, "test", 16, sessions=(1, 2, 3)), ("test on the rest",)),
        (
            lambda: common.load_data("core50", odd("s1/o1/C_01_01_000_1.png"), "train", 16, sessions=(1,)),
            ("C_01_01_000_1.png", "not a frame"),
        ),
        (
            lambda: common.load_data("core50", odd("s1/o1/C_13_01_000.png"), "train", 16, sessions=(1,)),
            ("C_13_01_000.png",),
        ),
        (
            lambda: common.load_data("core50", odd("s2/o1/C_02_01_000.png"), "train", 16, sessions=(1, 2)),
            ("no frames", "s1"),
        ),
    ):
        with pytest.raises(SystemExit) as end:
            call()
        err = capsys.readouterr().err
        assert end.value.code == 2 and len(err.strip().splitlines()) == 1 and all(w in err for w in words)


def test_tdw_as_published(tmp_path, capsys):
    folder = tmp_path / "train"
    folder.mkdir()
    for k in range(12):
        Image.new("RGB", (2, 2), (20 * k, 0, 0)).save(tmp_path / f"{k}.png")
    for i in range(12_096):  # the names sort to the order that counts objects and views
        os.link(tmp_path / f"{i // 1008}.png", folder / f"view_{i:05d}.png")
    data = common.load_data("tdw", tmp_path, "train", 64)
    assert (
        data.images.shape == (12_096, 3, 2, 2)
        and torch.equal(data.labels, data.images[:, 0, 0, 0].long() // 20)
        and data.classes[5] == "calculator"
    )
    for i, view in (
        (0, (0, 10, 0.3)),
        (36, (0, 20, 0.3)),
        (252, (0, 10, 0.4)),
        (1007, (350, 70, 0.6)),
        (1008, (0, 10, 0.3)),
    ):
        assert data.factors["view"][i].tolist() == pytest.approx(view)
    (folder / "view_00000.png").unlink()
    with pytest.raises(SystemExit) as end:
        common.load_data("tdw", tmp_path, "train", 64)
    assert end.value.code == 2 and "12,095" in capsys.readouterr().err


# ---- training ------------------------------------------------------------------------------------------------------


def train(objective, views, steps=2):
    """Tiny training in float64 -> (losses, gradients of the first step), as numpy."""
    args, model, *_ = step(objective, views)
    optimizer, losses, ddp = torch.optim.SGD(model.parameters(), lr=0.01), [], common.distributed(model)
    W, rank = common.world_size(), common.rank()
    for k in range(steps):
        _, _, x, r, session = step(objective, views, seed=k)  # this rank's share, as the loader cuts it
        assert len(x["1"]) == args.batch_size // W and rank < W
        out, _ = ddp(x, r, session)
        optimizer.zero_grad()
        out["loss"].backward()
        losses.append([common.all_reduce(v.detach().double()).item() / W for v in out.values()])
        if k == 0:
            gradients = [p.grad.clone().numpy() for p in model.parameters()]
        optimizer.step()
    return losses, gradients


@pytest.mark.parametrize("objective, views", [("ciper", "image"), ("ciper", "dataset"), ("essl", "image")])
def test_N1_N2_N3_2_processes_train_the_same_model(objective, views, tmp_path):
    (losses, gradients), *_ = on_ranks(1, tmp_path, train, objective, views)
    scale = max(abs(g).max() for g in gradients)
    for other_losses, other_gradients in on_ranks(2, tmp_path, train, objective, views):
        assert torch.allclose(torch.tensor(other_losses), torch.tensor(losses), rtol=1e-8, atol=0)
        for a, b in zip(gradients, other_gradients):
            assert abs(a - b).max() <= 1e-8 * max(abs(a).max(), 1e-3 * scale)


@pytest.fixture
def small(folder, core50):
    shared = [
        *"--arch resnet_pico --img-size 16 --batch-size 12 --epochs 2 --warmup-epochs 1".split(),
        *"--proj-hidden 16 --proj-dim 8 --workers 0 --device cpu --max-steps 3".split(),
    ]
    return dict(
        image=["--data", "imagefolder", "--data-dir", str(folder), "--recipe", "cifar10", *shared],
        dataset=["--data", "core50", "--data-dir", str(core50), *shared],
        time=["--data", "core50", "--data-dir", str(core50), *shared],
    )


@pytest.mark.parametrize("objective, views", COMBINATIONS)
def test_N7_every_variant_trains_and_resumes_to_the_same_bits(objective, views, small, tmp_path, capsys):
    run = [*small[views], "--objective", objective, "--views", views]
    ciper.main([*run, "--out", str(tmp_path / "whole")])
    ciper.main([*run, "--out", str(tmp_path / "halved"), "--max-steps", "1"])
    ciper.main([*run, "--out", str(tmp_path / "halved"), "--resume"])
    assert same(*(content(tmp_path / name / "checkpoint.pt") for name in ("whole", "halved")))
    assert "k-NN accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--objective", "essl", "--views", "dataset"], ("--views dataset", "essl")),
        (["--views", "time"], ("--views time", "ciper", "image, dataset")),
        (["--views", "dataset"], ("--views dataset", "imagefolder", "core50")),
        (["--views", "dataset", "--drop-aug", "crop"], ("--drop-aug crop", "--views image")),
        (["--drop-aug", "crop", "flip", "jitter", "gray"], ("--drop-aug crop flip jitter gray", "leave one")),
        (["--drop-aug", "crop", "crop"], ("--drop-aug crop crop", "each once")),
        (["--time-continue", "0.5"], ("--time-continue 0.5", "--views time")),
        (["--objective", "essl", "--warmup-epochs", "0", "--img-size", "1"], ("--img-size 1", "essl")),
        (["--sessions", "1", "3"], ("--sessions 1 3", "imagefolder")),
        (["--arch", "vit_small"], ("--arch vit_small", "resnet18")),
        (["--recipe", "imagenet"], ("--recipe imagenet", "tdw")),
        (["--temp", "0"], ("--temp 0",)),
    ],
)
def test_mistakes(argv, words, small, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        ciper.main([*small["image"], *argv, "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.strip().splitlines()) == 1 and all(w in err for w in words)
