"""Probes: closed forms, planted signals, chance for noise, the table, and that evaluation touches nothing."""

import csv
import json
import math
import shutil
from types import SimpleNamespace

import clever
import common
import eval_probe
import recon_xattn
import ser

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_distributed import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

g = torch.Generator()


@pytest.fixture(autouse=True)
def begin_anew():
    """Every test draws the same numbers, whichever tests ran before it."""
    g.manual_seed(common.number_of("eval"))


def clusters(n, classes=4, d=8, noise=0.1):
    """Features around one random centre per class."""
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=common.rng("centres"))
    return centres[labels] + noise * torch.randn(n, d, generator=g), labels


# ---- what is done to images --------------------------------------------------------------------


class Maps(torch.nn.Module):
    """An encoder without weights: `see(x)` (n, h, w, C) is its only map, the mean colours of 8 x 8 cells its
    representation."""

    feature, img_size, dim, depth, inv = "mean colours", 16, 192, 1, None
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, see):
        super().__init__()
        self.see = see

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 8).flatten(1)

    last_blocks = forward

    def tokens(self, x, after):
        return [self.see(x)] * len(after) if isinstance(after, tuple) else self.see(x)


def case_of(encoder, n=400, **changes):
    """Images that are bright at the top left, with classes by chance."""
    light = (
        torch.linspace(255, 0, 16)[:, None] * torch.linspace(1, 0.3, 16) * torch.rand(n + n // 2, 3, 1, 1, generator=g)
    )
    images = (light + 40 * torch.rand(len(light), 3, 16, 16, generator=g)).clamp(0, 255).to(torch.uint8)
    sets = [
        common.ImageSet(images=v, labels=torch.arange(len(v)) % 2, classes=("a", "b"))
        for v in images.split([n, n // 2])
    ]
    return eval_probe.Case(
        encoder,
        {},
        *sets,
        eval_probe.Args(**dict(workers=0, r2_epochs=25, linear_epochs=10) | changes),
        torch.device("cpu"),
    )


def cells(x):
    return F.adaptive_avg_pool2d(x, 4).permute(0, 2, 3, 1)


def moments(x):
    """Tokens whose mean, although normalised, tells on which side the light is."""
    side = torch.linspace(-1, 1, 16)
    light = x.mean(1)
    return torch.stack([light * side, light * side[:, None], torch.ones_like(light), -torch.ones_like(light)], 3)


def test_layers_tell_what_their_tokens_hold():
    values, protocol = eval_probe.layers(case_of(Maps(moments), layers=(1,)))
    assert values["rotation @1"] > 90 and values["flip @1"] > 90 and protocol["layers"] == (1,)
    noise, _ = eval_probe.layers(case_of(Maps(lambda x: torch.randn(len(x), 2, 2, 8, generator=g)), n=200))
    assert abs(noise["rotation @1"] - 25) < 15 and abs(noise["flip @1"] - 50) < 18


def shy(x):
    """Features as of trained encoders: where the light is stands in a small share of the variance, under a common
    offset and beside dimensions of large variance: (n, 3, 16, 16) -> (n, 16)."""
    light, grid = x.mean(1) * 0.5 + 0.5, torch.linspace(-1, 1, 16)  # (n, 16, 16), the pixels again from 0 to 1
    where = (
        torch.stack([(light * grid).sum((1, 2)), (light * grid[:, None]).sum((1, 2))], 1) / light.sum((1, 2))[:, None]
    )  # (n, 2)
    a = x.flatten(1) @ torch.randn(768, 2, generator=common.rng("loud"))  # (n, 2), angles as different as images
    loud = torch.cat([a.cos(), -a.cos(), a.sin(), -a.sin()], 1)  # (n, 8)
    return torch.cat([3 + 0.005 * where, loud, torch.tensor([3.0, -3.0, -3.0] * 2).expand(len(x), -1)], 1)


class Shy(Maps):
    """Its representation, and every token of its map, is `shy`."""

    def __init__(self):
        super().__init__(lambda x: shy(x)[:, None, None].expand(-1, 2, 2, -1))
        self.dim = 16

    def forward(self, x):
        return shy(x)

    last_blocks = forward


def test_mlp_probes_see_a_signal_of_small_variance(monkeypatch):
    """Within 60 of the default's 2,000 steps; without standardising they do not see the rotation."""
    case = case_of(Shy(), n=600, r2_epochs=20, r2_targets=("rotation", "flip"), layers=(1,))
    values, protocol = eval_probe.r2(case)
    std, mean = torch.std_mean(case.y[0], 0)
    assert std[:2].max() < 2e-4 and std[2:10].min() > 0.5 and mean[:2].min() > 2.9  # as planted
    assert values["r2 flip"] > 0.9 and values["r2 rotation"] > 0.9, values
    assert protocol["both"]["flip"]["train"] > 0.9 and protocol["features"].startswith("standardised")
    turns, protocol = eval_probe.layers(case)
    assert turns["rotation @1"] > 95 and turns["flip @1"] > 95 and protocol["train"]["rotation @1"] > 95, turns
    monkeypatch.setattr(eval_probe.Standardise, "forward", lambda self, x: x[..., self.columns].flatten(1))
    case.args.r2_targets = ("rotation",)
    assert eval_probe.r2(case)[0]["r2 rotation"] < 0.3


def test_dimensions_that_do_not_vary_are_left_out():
    x = torch.cat([torch.full((100, 1), 0.1), torch.zeros(100, 1), torch.randn(100, 2, generator=g) * 1e-4 + 5], 1)
    first = eval_probe.Standardise(x, slice(None))
    assert torch.equal(first(x + torch.tensor([1.0, 1.0, 0.0, 0.0]))[:, :2], torch.zeros(100, 2))
    assert torch.allclose(first(x)[:, 2:].std(0, correction=0), torch.ones(2), atol=1e-3)
    assert first(x)[:, 2:].mean(0).abs().max() < 1e-2
    pairs = torch.stack(
        [x, x + torch.tensor([0.0, 0.0, 1.0, 1.0])], 1
    )  # both views together: what differs between them stays
    assert (eval_probe.Standardise(pairs, slice(2, 4))(pairs).view(100, 2, 2).diff(dim=1) > 1.9).all()


@pytest.mark.parametrize("epochs, line", [(599, True), (600, False)])
def test_a_line_warns_of_too_few_steps(epochs, line, capsys):
    eval_probe.warn_of_few_steps("--r2-epochs", epochs, 256)
    assert ("--r2-epochs 599: 599 steps" in capsys.readouterr().err) == line


def test_equivariance_of_maps_that_turn_with_the_image():
    values, _ = eval_probe.equivariance(case_of(Maps(cells)))
    assert values["equi rotation"] > 0.999 and values["equi flip"] > 0.999 and values["equi rotation centred"] > 0.99
    assert values["equi rotation shuffled"] < 0.999
    whole = Maps(lambda x: F.avg_pool2d(x, 4).permute(0, 2, 3, 1))
    whole.patch_size, whole.grid = 4, 4
    smooth = case_of(whole)
    smooth.test.images[:] = F.interpolate(
        torch.rand(len(smooth.test), 3, 2, 2, generator=g) * 255, (16, 16), mode="bilinear"
    ).to(torch.uint8)
    values, _ = eval_probe.equivariance(smooth)
    assert values["equi scale centred"] > 0.95 > values["equi scale shuffled"] + 0.1
    constant, _ = eval_probe.equivariance(case_of(Maps(lambda x: torch.ones(len(x), 4, 4, 8))))
    assert constant["equi rotation"] == constant["equi rotation shuffled"] == pytest.approx(1)
    assert constant["equi rotation centred"] == 0  # what the control is for
    noise, _ = eval_probe.equivariance(case_of(Maps(lambda x: torch.randn(len(x), 4, 4, 64, generator=g))))
    assert abs(noise["equi rotation"]) < 0.02 and abs(noise["equi flip centred"]) < 0.02
    fixed = torch.randn(4, 4, 64, generator=g)
    still, _ = eval_probe.equivariance(case_of(Maps(lambda x: fixed.expand(len(x), -1, -1, -1))))
    assert abs(still["equi rotation"]) < 0.15  # a map that does not move with the image


def test_scaled_maps_have_another_grid_and_other_images_another_class():
    """A third of the draws would leave 4 x 4 cells as they are and score 1."""
    sides = []
    encoder = Maps(lambda x: sides.append(tuple(x.shape[2:])) or F.avg_pool2d(x, 4).permute(0, 2, 3, 1))
    encoder.patch_size, encoder.grid = 4, 4
    case = case_of(encoder, n=20)
    for case.args.seed in range(12):
        sides.clear()
        assert "equi scale" in eval_probe.equivariance(case)[0]
        assert sides[-1] != (16, 16)
    encoder.grid = 1  # has no other grid
    assert "equi scale" not in eval_probe.equivariance(case)[0]

    # Rendered sets show ten classes by turns: each image has the colour of its class, which only others lack.
    colours = torch.randint(256, (10, 3, 1, 1), generator=common.rng("colours"), dtype=torch.uint8)
    case = case_of(Maps(cells), n=200)
    case.test = common.ImageSet(images=colours.repeat(10, 1, 16, 16), labels=torch.arange(100) % 10)
    values, _ = eval_probe.equivariance(case)
    assert values["equi rotation"] == pytest.approx(1) and values["equi rotation shuffled"] < 0.9


def test_quarter_turns_are_seen_and_not_in_noise():
    values, _ = eval_probe.rotation(case_of(Maps(cells)))
    assert values["4-fold"] > 95 and {"linear ±90°", "linear ±180°"} <= set(values)
    noise = Maps(cells)
    noise.last_blocks = lambda x: torch.randn(len(x), 8, generator=g)
    assert abs(eval_probe.rotation(case_of(noise))[0]["4-fold"] - 25) < 8


def test_fine_tuning_learns_and_leaves_the_encoder_alone():
    labels = torch.arange(60) % 2  # dark and bright images
    images = (torch.rand(60, 3, 16, 16, generator=g) * 120 + 120 * labels[:, None, None, None]).to(torch.uint8)
    train, test = (
        common.ImageSet(images=images[rows], labels=labels[rows], classes=("dark", "bright"))
        for rows in (slice(40), slice(40, 60))
    )
    for arch, kwargs in (("vit_pico", dict(patch_size=4, cls_layer=0)), ("resnet_pico", dict(stem="cifar"))):
        torch.manual_seed(0)
        encoder = common.make_backbone(arch, *common.CIFAR10, 16, **kwargs).eval()
        before = {k: v.clone() for k, v in encoder.state_dict().items()}
        args = eval_probe.Args(
            workers=0, finetune_epochs=20, finetune_lr=1.0, linear_epochs=2, tasks=("finetune", "rotation")
        )
        case = eval_probe.Case(encoder, {}, train, test, args, torch.device("cpu"))
        values = eval_probe.finetune(case)[0]
        args.finetune_epochs = 1  # of the encoder that tells quarter turns
        values |= eval_probe.rotation(case)[0] | eval_probe.linear(case)[0]
        assert {"finetune", "finetune ±90°", "4-fold finetune", "4-fold", "linear"} <= set(values)
        assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items()) and not encoder.training
        assert values["finetune"] > 90


# ---- latents ----------------------------------------------------------------------------------


def posed(m, sessions):
    """(a set without images of m objects of 4 classes in some sessions, features that hold class, session and view
    linearly)."""
    of = torch.cartesian_prod(torch.arange(m), torch.tensor(sessions), torch.arange(24))
    view = torch.stack([of[:, 2] % 6 * 60.0, of[:, 2] // 6 * 10.0, torch.rand(len(of), generator=g)], 1)
    data = common.ImageSet(
        paths=common.Paths("", [""] * len(of)),
        labels=of[:, 0] % 4,
        classes=tuple("abcd"),
        groups=of[:, 0],
        factors=dict(session=of[:, 1], view=view),
    )
    return data, torch.cat(
        [F.one_hot(data.labels, 4), F.one_hot(of[:, 1], 11), view / torch.tensor([100.0, 10.0, 1.0])], 1
    ).float()


def test_latents_are_read_where_they_are_held_and_not_in_noise():
    (train, x), (test, x_test) = posed(16, (0, 1)), posed(8, (2, 5, 9))
    values, details = eval_probe.readouts_of_latents(train, test, x, x_test, eval_probe.Args())
    assert all(values[f"{k}{s}"] > 99 for k in ("object", "session") for s in ("", " lstsq"))
    assert values["view err"] < 2 and values["view err lstsq"] < 1e-6
    assert details["rmse"]["azimuth"] < 20
    assert details["train"].keys() == values.keys() and details["train"]["view err"] < 2
    blind, details = eval_probe.readouts_of_latents(
        train, test, torch.randn(x.shape, generator=g), torch.randn(x_test.shape, generator=g), eval_probe.Args()
    )
    assert abs(blind["object"] - 25) < 10 and abs(blind["session"] - 33) < 15 and 95 < blind["view err"] < 120
    assert details["train"]["object lstsq"] > blind["object lstsq"] + 3 and details["train"]["view err lstsq"] < 100
    del train.factors["session"], test.factors["session"]  # as in tdw: views are learnt on train images
    values, _ = eval_probe.readouts_of_latents(train, test, x, x_test, eval_probe.Args())
    assert "session" not in values and values["view err lstsq"] < 1e-6


def test_a_constant_errs_by_100_in_views():
    (train, x), (test, _) = posed(8, (0,)), posed(8, (0,))
    del train.factors["session"], test.factors["session"]
    test.factors["view"] = train.factors["view"]
    values, details = eval_probe.readouts_of_latents(
        train, test, torch.randn(x.shape, generator=g) * 1e-9, torch.zeros_like(x), eval_probe.Args()
    )
    assert values["view err lstsq"] == pytest.approx(100, abs=5)


def test_the_linear_schedule_is_the_paper_s(monkeypatch):
    """Rate 1, times 0.3 every 10 epochs: 1.968e-5 in the last ten; a line is fitted exactly."""
    rates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1]
    )
    x = torch.randn(1024, 3, generator=g) / 3**0.5
    W = torch.randn(3, 3, generator=g)
    out = eval_probe.linear_schedule(x, x @ W + 4, common.rng(0))(x)
    assert rates[:40] == [1] * 40 and rates[79] == pytest.approx(0.3)
    assert rates[-1] == pytest.approx(1.968e-5, rel=1e-3) and len(rates) == 400
    assert torch.allclose(out, x @ W + 4, atol=1e-2)


# ---- linear ---------------------------------------------------------------------------------------


def test_linear_probe_separates_clusters_and_is_at_chance_on_noise():
    x, y = clusters(400)
    x_test, y_test = clusters(200)
    scores, _, on_train = eval_probe.linear_probe(x, y, x_test, 4, (0.1, 1.0), 10, common.rng(0))
    assert (scores.argmax(1) == y_test).float().mean() == 1 and on_train == 100
    noise = torch.randn(600, 8, generator=g)
    scores, *_ = eval_probe.linear_probe(noise[:400], y, noise[400:], 4, (0.1, 1.0), 10, common.rng(0))
    accuracy = (scores.argmax(1) == y_test).float().mean().item()
    assert abs(accuracy - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 200)


def test_training_accuracy_counts_the_images_that_a_probe_learned_from():
    """Of rows 0 to 3 the head reads the largest feature: three are right; the others are wrong and do not count."""
    head = SimpleNamespace(rows=torch.arange(4), scores=lambda x: x)
    x, labels = torch.eye(3)[[0, 1, 2, 0, 1, 1]], torch.tensor([0, 1, 2, 1, 0, 0])
    assert eval_probe.training_accuracy(head, x, labels) == 75


def test_linear_probe_of_several_rates_is_torch_s_sgd_at_the_chosen_one():
    x, y = clusters(120, noise=0.7)
    scores, lr, _ = eval_probe.linear_probe(x, y, x, 4, (1e-9, 0.5), 3, common.rng(5), batch_size=32)
    assert lr == 0.5
    r = common.rng(5)
    rows = torch.randperm(120, generator=r)[12:]
    model = torch.nn.Linear(8, 4)
    with torch.no_grad():
        model.weight.copy_(0.01 * torch.randn(8, 4, generator=r).T)
        model.bias.zero_()
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.5 * 32 / 256, momentum=0.9), 3 * 4
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
    for _ in range(3):
        for batch in rows[torch.randperm(108, generator=r)].split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    assert torch.allclose(model(x), scores, atol=1e-4)


def test_ridge_probe_ends_where_its_gradient_is_0():
    """d/dW of sum CE + w |W|^2, in a loop over images; separable clusters are told apart, noise is not."""
    x, labels = clusters(120, noise=0.5)
    probe = eval_probe.RidgeProbe(8, 4, torch.arange(100), torch.arange(100, 120), torch.device("cpu"))
    ridge = probe.train(x, labels)
    assert 1e-6 < ridge < 1e5 and (probe.scores(x).argmax(1) == labels).double().mean() > 0.9
    gradient = 2 * ridge * probe.weights
    for f, y in zip(F.pad(x.double(), (0, 1), value=1.0), labels):
        p = (f @ probe.weights).exp()
        p = p / p.sum()
        p[y] -= 1
        gradient = gradient + f[:, None] * p
    assert gradient.abs().max() < 1e-3 * max(1.0, probe.weights.abs().max().item())
    noise = torch.randn(300, 8, generator=g)
    probe = eval_probe.RidgeProbe(8, 4, torch.arange(180), torch.arange(180, 200), torch.device("cpu"))
    probe.train(noise[:200], torch.arange(200) % 4)
    assert abs((probe.scores(noise[200:]).argmax(1) == torch.arange(100) % 4).double().mean() - 0.25) < 0.15


def test_few_labels_stay_few(monkeypatch):
    """The images that choose the ridge weight train the linear probe at last, but not the few-label probes."""
    case = case_of(Maps(cells), n=200, linear="lbfgs", tasks=("linear", "fewshot"), part=("all",))
    seen = []
    monkeypatch.setattr(eval_probe.RidgeProbe, "fit", lambda self, x, y, rows, w: seen.append(len(rows)))
    values, protocol = eval_probe.fewshot(case)
    assert set(seen) == {180, 200} | set(protocol["images"].values()) == {180, 200, 2, 20}
    assert {"fewshot 1%", "fewshot 10%"} <= set(values) and protocol["held_out"] == 0.1


def test_augmented_probes_see_other_views_each_epoch_and_all_learn_from_one_pass(monkeypatch):
    case = case_of(Maps(cells), n=40, augment=True, tasks=("linear", "fewshot"), part=("all",))
    passes, features = [], common.features
    monkeypatch.setattr(common, "features", lambda *a, **k: (passes.append(k.get("name")), features(*a, **k))[1])
    values = eval_probe.linear(case)[0] | eval_probe.fewshot(case)[0]
    assert {"linear", "fewshot 1%", "fewshot 10%"} == set(values)
    assert passes.count("augmented") == 10  # epochs, for all three probes
    assert len(passes) == 12  # train and test images once
    a, b = case.augmented(0), case.augmented(1)
    assert torch.equal(a, case.augmented(0)) and not torch.equal(a, b)


@pytest.mark.parametrize(
    "protocol, expected",
    [
        ("ser", dict(augment=True, linear_epochs=50, linear="sgd", fewshot="linear")),
        ("ciper", dict(linear="steps", augment=False)),
        ("recon", dict(linear="lbfgs", r2_epochs=300)),
        (
            "clever",
            dict(
                augment=True,
                linear_epochs=100,
                linear_lrs=(0.001,),
                fewshot="finetune",
                finetune_epochs=200,
                finetune_lr=0.001,
            ),
        ),
    ],
)
def test_protocols_set_flags_that_help_shows(protocol, expected, capsys):
    with pytest.raises(SystemExit):
        eval_probe.main(["--protocol", protocol, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    values = vars(eval_probe.Args(**eval_probe.PROTOCOLS[protocol]))
    assert {k: values[k] for k in expected} == expected and f"(default: {protocol})" in text


def test_the_clever_protocol_depends_on_the_base(tmp_path, folder, monkeypatch):
    """DDCL's code has another rate than CLeVER's; flags given by hand win for both."""
    shared = [
        *"--data imagefolder --data-dir".split(),
        str(folder),
        *"--recipe cifar10 --arch resnet_pico --img-size 16 --epochs 0 --warmup-epochs 0".split(),
        *"--batch-size 12 --workers 0 --device cpu --head-dim 8 --head-dim-equi 8".split(),
    ]
    paths = [str(tmp_path / base / "checkpoint.pt") for base in ("dino", "simsiam")]
    clever.main([*shared, "--base", "dino", "--local-size", "8", "--out", str(tmp_path / "dino")])
    clever.main([*shared, "--base", "simsiam", "--out", str(tmp_path / "simsiam")])
    seen = []
    monkeypatch.setattr(
        eval_probe,
        "open_case",
        lambda path, encoder, state, args, device: (seen.append((args.linear_lrs, args.linear_epochs)), exit(2))[1],
    )
    for flags in ([], ["--linear-epochs", "7"]):
        for path in paths:
            with pytest.raises(SystemExit):
                eval_probe.main([path, "--protocol", "clever", "--device", "cpu", *flags])
    assert seen == [((0.001,), 100), ((30.0,), 200), ((0.001,), 7), ((30.0,), 7)]


def test_transfer_sets_in_three_folders_are_tested_on_test(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "dtd")
    shutil.copytree(folder / "train", tmp_path / "dtd" / "val")
    count = lambda name: len(common.load_data(name, str(tmp_path / "dtd"), "test", 16))
    assert count("dtd") == count("pets") == 12 and count("imagefolder") == 24  # ImageNet's test/ has no labels


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnetv2_50", "vit_tiny_patch16_224"])
def test_models_of_timm_have_the_width_of_their_representation(name):
    with torch.device("meta"):
        encoder = eval_probe.Timm(eval_probe.timm.create_model(name, num_classes=0)).eval()
        x = torch.zeros(1, 3, encoder.img_size, encoder.img_size)
        assert encoder(x).shape == (1, encoder.dim)
        encoder.norm(encoder.tokens(x, encoder.depth))
        assert isinstance(encoder.norm, torch.nn.Identity) == ("vit" not in name)
        assert encoder.last_blocks(x).shape[1] in (encoder.dim, 4 * encoder.dim)


def test_cached_features_are_used_and_belong_to_their_checkpoint_and_data(tiny, folder, tmp_path, monkeypatch):
    for seed in "01":
        ser.main([*tiny, "--epochs", "0", "--seed", seed, "--out", str(tmp_path / f"run-s{seed}")])
    paths = [str(tmp_path / f"run-s{s}" / "checkpoint.pt") for s in "01"]
    encoded = []
    features = common.features
    monkeypatch.setattr(common, "features", lambda *a, **k: (encoded.append(1), features(*a, **k))[1])
    run = lambda *argv: eval_probe.main(
        [*argv, "--cache-dir", str(tmp_path / "cache"), "--tasks", "knn", "--device", "cpu"]
    )
    first = run(*paths)
    assert len(encoded) == 4 and len(list((tmp_path / "cache").iterdir())) == 4
    assert run(*paths) == first and len(encoded) == 4
    shutil.copytree(folder, tmp_path / "other")
    run(paths[0], "--data-dir", str(tmp_path / "other"))
    assert len(encoded) == 6
    (tmp_path / "mine.py").write_text("an edited encoder")
    with monkeypatch.context() as edited:
        edited.setattr(eval_probe.inspect, "getsourcefile", lambda cls: str(tmp_path / "mine.py"))
        run(paths[0])
    assert len(encoded) == 8
    damaged = next((tmp_path / "cache").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert run(*paths) == first and len(encoded) <= 9  # extracted anew


def test_formats_of_the_table():
    results = [("a", {"knn": 50.0, "r2 flip": 0.5}), ("a", {"knn": 52.0, "r2 flip": 0.7}), ("b|", {"knn": 10.0})]
    assert eval_probe.table(results, "markdown").splitlines() == [
        "|  | n | knn | r2 flip |",
        "| --- | --- | --- | --- |",
        "| a | 2 | 51.00 ± 1.41 | 0.600 ± 0.141 |",
        "| b| | 1 | 10.00 | - |",
    ]
    rows = list(csv.reader(eval_probe.table(results, "csv").splitlines()))
    assert rows[0] == ["", "n", "knn", "knn std", "r2 flip", "r2 flip std"]
    assert rows[2] == ["b|", "1", "10.0", "", "", ""] and float(rows[1][3]) == pytest.approx(2**0.5)
    assert json.loads(eval_probe.table(results, "json"))["a"]["r2 flip"]["mean"] == pytest.approx(0.6)


def test_a_model_of_timm_in_the_same_table(tiny, folder, tmp_path, capsys):
    """Our export read by timm gives the numbers of the checkpoint it came from; what does not fit is one line."""
    import timm

    ser.main([*tiny, "--equi", "none", "--epochs", "0", "--out", str(tmp_path / "run")])
    baseline = f"timm:vit_small_patch16_224@{tmp_path / 'run' / 'backbone.safetensors'}"
    run = [
        str(tmp_path / "run" / "checkpoint.pt"),
        baseline,
        *"--data imagefolder --data-dir".split(),
        str(folder),
        *"--tasks knn linear equivariance --linear-epochs 2 --device cpu".split(),
    ]
    ours, theirs = eval_probe.main(run)
    assert theirs[0] == "timm:vit_small_patch16_224@backbone.safetensors" and theirs[1] == pytest.approx(
        {k: v for k, v in ours[1].items() if "scale" not in k}, abs=1e-3
    )
    kept = records(tmp_path / "run")
    assert [r["checkpoint"] for r in kept] == ["checkpoint.pt"] * 3 + [baseline] * 3 and kept[0]["args"][
        "linear_epochs"
    ] == 2
    whole = timm.create_model("resnet18", num_classes=5)
    torch.save(whole.state_dict(), tmp_path / "resnet.pt")  # its classifier is left aside
    encoder, _ = eval_probe.load(f"timm:resnet18@{tmp_path / 'resnet.pt'}")
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(encoder(x), whole.eval().forward_head(whole.forward_features(x), pre_logits=True), atol=1e-6)
    for path, word in (
        (f"timm:vit_tiny_patch16_224@{tmp_path / 'resnet.pt'}", "Missing key"),
        ("timm:resnt18", "no model"),
        (f"timm:resnet18@{tmp_path}/none.pt", "no such file"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            eval_probe.main([path, "--data", "imagefolder", "--data-dir", str(folder)])
        err = capsys.readouterr().err.strip()
        assert end.value.code == 2 and word in err and len(err.splitlines()) == 1
    with pytest.raises(SystemExit) as end:
        eval_probe.main([f"timm:resnet18@{tmp_path / 'resnet.pt'}"])
    assert end.value.code == 2 and "--data" in capsys.readouterr().err


def probed(checkpoint):
    return eval_probe.main(
        [
            checkpoint,
            *"--tasks knn linear fewshot r2 layers equivariance rotation --r2-targets flip".split(),
            *"--r2-epochs 1 --linear-epochs 2 --device cpu --workers 0".split(),
        ]
    )


def test_2_processes_print_what_one_prints(tiny, tmp_path):
    ser.main([*tiny, "--epochs", "0", "--out", str(tmp_path / "run")])
    (alone,), *_ = on_ranks(1, tmp_path, probed, str(tmp_path / "run" / "checkpoint.pt"))
    for (other,) in on_ranks(2, tmp_path, probed, str(tmp_path / "run" / "checkpoint.pt")):
        assert other[1] == pytest.approx(alone[1], abs=1e-4)
    assert len(records(tmp_path / "run")) == 2 * 7  # one a task, of each run


def tuned(checkpoint):
    quick = ["--device", "cpu", "--workers", "0"]
    sgd = "--augment --linear-epochs 2 --finetune-epochs 2 --finetune-lr 0.1".split()
    return eval_probe.main([checkpoint, "--tasks", "finetune", "linear", *sgd, *quick]) + eval_probe.main(
        [checkpoint, "--tasks", "linear", "fewshot", "--linear", "lbfgs", *quick]
    )


def test_2_processes_augment_fit_and_fine_tune_as_one_does(tiny, tmp_path):
    ser.main([*tiny, "--epochs", "0", "--out", str(tmp_path / "run")])
    (alone,) = on_ranks(1, tmp_path, tuned, str(tmp_path / "run" / "checkpoint.pt"))
    for other in on_ranks(2, tmp_path, tuned, str(tmp_path / "run" / "checkpoint.pt")):
        assert other == alone  # shares of 12 test images


@pytest.mark.parametrize(
    "how", [dict(linear="sgd"), dict(linear="lbfgs"), dict(linear="steps"), dict(linear="sgd", augment=True)]
)
def test_every_probe_of_classes_finds_them_and_nothing_in_noise(how):
    """Dark and bright images; then features that are noise."""
    tasks = ("knn", "linear", "fewshot") + (("mlp",) if how == dict(linear="sgd") else ())
    for sees in (True, False):
        case = case_of(Maps(cells), n=200, tasks=tasks, mlp_epochs=5, **how)
        for data in (case.train, case.test):
            data.images[:] = (
                torch.rand(data.images.shape, generator=g) * 100 + 120 * data.labels[:, None, None, None]
            ).to(torch.uint8)
        if not sees:
            case.backbone.last_blocks = case.backbone.forward = lambda x: torch.randn(len(x), 192, generator=g)
        values = {}
        for task in tasks:
            values |= eval_probe.TASKS[task](case)[0]
        assert {"knn", "linear", "fewshot 1%", "fewshot 10%"} <= set(values)
        assert all(v > 95 if sees else abs(v - 50) < 18 for v in values.values()), values


def test_class_means_stand_beside_unequal_classes():
    scores, labels = torch.eye(2)[torch.tensor([0, 0, 0, 0])], torch.tensor([0, 0, 0, 1])
    assert eval_probe.accuracies("linear", scores, labels) == {"linear": 75, "linear class mean": 50}
    assert eval_probe.accuracies("linear", scores, torch.tensor([0, 0, 1, 1])) == {"linear": 50}


def test_the_mlp_separates_what_no_line_can_and_is_at_chance_on_noise():
    x = torch.randn(800, 2, generator=g)
    labels = (x[:, 0] * x[:, 1] > 0).long()  # quadrants
    right = lambda x: (
        (
            eval_probe.mlp_probe(lambda _: (x[:600], labels[:600]), 2, 20, common.rng(0))(x[600:]).argmax(1)
            == labels[600:]
        )
        .float()
        .mean()
    )
    assert right(x) > 0.95 and abs(right(torch.randn(800, 2, generator=g)) - 0.5) < 0.12


def test_settings_are_chosen_on_whole_objects():
    data = common.ImageSet(paths=common.Paths("", [""] * 80), groups=torch.arange(80) // 8)
    held = eval_probe.hold_out(data, common.rng(0), 0.2)
    assert held.sum() == 16 and len(data.groups[held].unique()) == 2
    assert eval_probe.hold_out(common.ImageSet(paths=common.Paths("", [""] * 80)), common.rng(0)).sum() == 8


@pytest.mark.parametrize("objects_per_class", [1, 2])
def test_every_class_keeps_images_to_learn_from(objects_per_class):
    """tdw has one object of each class: there images are held out."""
    groups = torch.arange(120) // 10
    data = common.ImageSet(
        paths=common.Paths("", [""] * 120),
        groups=groups,
        labels=groups // objects_per_class,
        classes=tuple("abcdefghijkl"),
    )
    for seed in range(20):
        held = eval_probe.hold_out(data, common.rng(seed), 0.3)
        assert held.any() and set(data.labels[~held].tolist()) == set(data.labels.tolist())
        if objects_per_class == 2:
            assert not set(groups[held].tolist()) & set(groups[~held].tolist())  # whole objects
    if objects_per_class == 1:
        with pytest.raises(SystemExit):
            common.known_part(data, 0.2, 0)


def test_few_images_are_a_share_of_each_class_and_at_least_one():
    labels = torch.tensor([0] * 300 + [1] * 40 + [2] * 3)[torch.randperm(343, generator=g)]
    rows = eval_probe.stratified(labels, 0.1, common.rng(0))
    assert torch.bincount(labels[rows]).tolist() == [30, 4, 1] and len(rows.unique()) == 35
    assert torch.equal(rows, eval_probe.stratified(labels, 0.1, common.rng(0))) and not torch.equal(
        rows, eval_probe.stratified(labels, 0.1, common.rng(1))
    )


def test_the_rate_is_chosen_on_the_held_out_part():
    """A rate that learns nothing is not chosen, wherever it stands."""
    x, y = clusters(200, noise=0.5)
    for lrs in ((1e-9, 0.3), (0.3, 1e-9)):
        assert eval_probe.linear_probe(x, y, x, 4, lrs, 5, common.rng(0))[1] == 0.3


class Copies(TorchDispatchMode):
    """Counts the copies of CPU tensors to another device, and the numbers read from it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].device.type == "cpu" and torch.device(kwargs.get("device", "cpu")).type != "cpu"
        self.count += func is torch.ops.aten._local_scalar_dense.default and args[0].device.type != "cpu"
        return func(*args, **(kwargs or {}))


def test_a_device_is_asked_once_an_epoch_and_not_once_a_batch():
    device = torch.device("meta")
    x, labels = torch.empty(100, 8, device=device), torch.empty(100, dtype=torch.int64, device=device)
    rows = torch.arange(100)
    head = eval_probe.LinearProbe(8, 4, rows, rows[:1], (0.1, 1.0), 2, common.rng(0), device, batch_size=10)
    with Copies() as epoch:
        head.epoch(x, labels)
    model = torch.nn.Linear(8, 3, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Copies() as fitting:
        target = torch.empty(100, 3, device=device)
        eval_probe.fit(model, lambda epoch: (x, target), 2, optimizer, common.rng(0), batch_size=10)
    assert epoch.count <= 1 and fitting.count <= 2


# ---- R^2 ------------------------------------------------------------------------------------------


def test_r2_values():
    t, p = torch.tensor([[0.0, 10.0], [2.0, 12.0]]), torch.tensor([[1.0, 11.0], [1.0, 11.0]])
    scores = eval_probe.r2_scores(t, p)
    assert scores["flat"] == pytest.approx(0.961538, abs=1e-6) and scores["uniform"] == pytest.approx(0)
    assert eval_probe.r2_scores(t, t) == dict(flat=1, uniform=1)
    assert eval_probe.r2_scores(t, torch.full_like(t, 6.0))["flat"] == pytest.approx(0)


def quaternions(angles):
    return common.quaternion_from_angles(torch.tensor(angles, dtype=torch.float64))


@pytest.mark.parametrize(
    "first, second, relative",
    [
        ((math.pi / 2, 0, 0), (0, math.pi / 2, 0), (-0.5, 0.5, -0.5, 0.5)),
        ((0.1, 0.2, 0.3), (0.3, -0.2, 0.5), (0.097355, -0.173903, 0.137116, 0.970299)),
        ((0.3, -0.2, 0.5), (-0.1, 0.4, 0.25), (-0.176117, 0.279365, -0.152705, 0.931461)),
        ((0.1, 0.2, 0.3), (0.1, 0.2, 0.3), (0.0, 0.0, 0.0, 1.0)),
    ],
)
def test_pose_target_is_the_relative_quaternion(first, second, relative):
    factors = dict(rotation=quaternions([first, second]).float())
    target = common.pose_target("pose", factors, torch.tensor([0]), torch.tensor([1]))
    assert torch.allclose(target[0], torch.tensor(relative), atol=1e-5)


def test_quaternions_of_angles():
    q = quaternions([[math.pi / 2, 0, 0], [0.1, 0.2, 0.3], [0.3, -0.2, 0.5]])
    expected = [
        [0.707107, 0, 0, 0.707107],
        [0.034271, 0.106021, 0.143572, 0.983347],
        [0.168491, -0.058857, 0.257859, 0.949555],
    ]
    assert torch.allclose(q, torch.tensor(expected, dtype=q.dtype), atol=1e-6)


def test_a_constant_scores_0_229_on_relative_quaternions():
    """m = E[w] = 512 / pi^6; the best constant vector has flat R^2 1 - (1 - m^2) / (1 - m^2 / 4), and uniform R^2 0."""
    angles = (torch.rand(200_000, 3, generator=g, dtype=torch.float64) - 0.5) * math.pi
    factors = dict(rotation=common.quaternion_from_angles(angles).float())
    i = torch.arange(100_000)
    t = common.pose_target("pose", factors, i, i + 100_000)
    scores = eval_probe.r2_scores(t, t.mean(0).expand_as(t))
    assert scores["flat"] == pytest.approx(0.228951, abs=0.005) and scores["uniform"] == pytest.approx(0, abs=1e-6)


def test_partners_are_other_views_of_the_same_object():
    groups = torch.tensor([3, 1, 3, 0, 1, 3, 0, 3])
    for seed in range(5):
        other = eval_probe.partners(groups, common.rng(seed))
        assert torch.equal(groups[other], groups) and (other != torch.arange(8)).all() and len(set(other.tolist())) == 8


class Planted(torch.nn.Module):
    """An encoder whose features are the pixels and the sharpness, shrunk to 8 x 8: it knows what was done to an
    image."""

    dim, img_size, mean, std = 256, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def forward(self, x):
        edges = x.diff(dim=3).abs().mean(1, keepdim=True).log1p()
        return torch.cat([F.adaptive_avg_pool2d(v, 8).flatten(1) for v in (x, 5 * edges)], 1)

    def last_blocks(self, x):
        return self(x)


class Blind(Planted):
    def forward(self, x):
        return torch.randn(len(x), 256, generator=g)


def r2(pairs_of, target, encoder, train, test, columns=slice(None), **args):
    case = eval_probe.Case(encoder, {}, train, test, eval_probe.Args(amp="off", workers=0, **args), torch.device("cpu"))
    sample, test_pairs, test_targets = pairs_of(target, case)
    probe = eval_probe.mlp_probe(
        sample, test_targets.shape[1], case.args.r2_epochs, common.rng(0, "r2", target), columns
    )
    return eval_probe.r2_scores(test_targets, probe(test_pairs))["flat"]


@pytest.mark.parametrize("target", common.FAMILIES)
def test_r2_probe_finds_what_the_features_hold_and_nothing_in_noise(target):
    data = common.load_data("blocks", None, "test", 32)
    train, test = (common.ImageSet(images=data.images[rows]) for rows in (slice(0, 3000), slice(3000, 4000)))
    score = lambda encoder: r2(eval_probe.pairs_of_images, target, encoder, train, test, r2_epochs=6, r2_images=2000)
    seen = score(Planted())
    # fitted noise predicts worse than the mean; that pixels, after a few epochs, hold a good part is all we ask
    assert seen > 0.1, seen
    if target == "rotation":
        assert score(Blind()) < 0.02


@pytest.mark.parametrize("target, enough, nothing", [("pose", 0.8, 0.26), ("hues", 0.95, 0.05)])
def test_r2_of_poses_is_learnt_from_features_that_hold_them(target, enough, nothing):
    n, sets = 400, {}
    for split in ("train", "test"):
        angles, hues = (torch.rand(n, 3, generator=g) - 0.5) * math.pi, torch.rand(2, n, generator=g)
        rotation = common.quaternion_from_angles(angles)  # (n, 4)
        pixels = (255 * torch.cat([rotation / 2 + 0.5, hues.T], 1)).round().to(torch.uint8)  # (n, 6)
        images = F.pad(pixels, (0, 6)).view(n, 3, 2, 2)
        factors = dict(rotation=rotation, floor_hue=hues[0], light_hue=hues[1])
        sets[split] = common.ImageSet(images=images, groups=torch.arange(n) // 8, factors=factors)

    class Flat(Planted):
        img_size, dim = 2, 12

        def forward(self, x):
            return x.flatten(1)

    def probe(columns):
        return r2(eval_probe.pairs_of_poses, target, Flat(), sets["train"], sets["test"], columns, r2_epochs=30)

    # Of 12 features the first 6 hold it all, the others are 0.
    assert probe(slice(6)) > enough
    assert probe(slice(6, None)) < nothing  # what a constant scores, and a little


def test_targets_say_what_was_done():
    """Sizes as listed; nothing done is 0; the extremes of each range are 1 in size."""
    dims = dict(rotation=1, color=4, blur=1, translation=2, crop=4, flip=1)
    for name, K in dims.items():
        params = common.family(name, 32).sample(500, g)
        if name == "crop":
            common.family(name, 32).place(params, torch.full((500, 2), 32))
        target = common.family_target(name, params, 32)
        assert target.shape == (500, K) and 0.5 < target.abs().max() <= 1.0 + 1e-6
    one, zero = torch.ones(1), torch.zeros(1)
    identity = dict(
        angle=zero,
        shift_x=zero,
        shift_y=zero,
        brightness=one,
        contrast=one,
        saturation=one,
        hue=zero,
        sigma=zero,
        top=zero,
        left=zero,
        height=one,
        width=one,
        flip=zero.bool(),
    )
    assert all(common.family_target(name, identity, 32).abs().max() == 0 for name in dims)
    assert common.family_target("rotation", dict(angle=torch.tensor([-45.0])), 32).item() == -1
    corner = dict(top=zero, left=torch.tensor([0.5]), height=one / 2, width=one / 2)
    assert common.family_target("crop", corner, 32)[0].tolist() == [-0.25, 0.25, -0.5, -0.5]


# ---- the table --------------------------------------------------------------------------------------


def test_a_metric_that_one_data_set_lacks_is_a_dash():
    lines = eval_probe.table([("a", dict(object=1.0)), ("b", {"object": 2.0, "view err": 3.0})]).splitlines()
    assert lines[1].split() == ["a", "1", "1.00", "-"] and lines[2].split() == ["b", "1", "2.00", "3.00"]


def test_table_folds_seeds():
    text = eval_probe.table([("a", {"knn": 50.0}), ("a", {"knn": 52.0}), ("b", {"knn": 10.0})])
    a, b = text.splitlines()[1:]
    assert "51.00 ± 1.41" in a and a.split()[:2] == ["a", "2"]  # sample standard deviation: sqrt(2)
    assert b.split() == ["b", "1", "10.00"]


def test_a_seed_that_comes_twice_is_another_row():
    paths = [f"{run}-s{seed}/checkpoint.pt" for run in ("before", "after") for seed in (0, 1)]
    states = [dict(method="ser", step=9, args=dict(lr=1.0, seed=seed)) for seed in (0, 1, 0, 1)]
    assert eval_probe.row_names(paths, states) == ["before", "before", "after", "after"]
    paths = [f"{run}-s{seed}/checkpoint.pt" for run, n in (("after", 2), ("before", 4)) for seed in range(n)]
    states = [dict(method="ser", step=9, args=dict(lr=1.0, seed=seed)) for n in (2, 4) for seed in range(n)]
    assert eval_probe.row_names(paths, states) == ["after"] * 2 + ["before"] * 4
    paths = [f"{name}/checkpoint.pt" for name in ("edited-s1", "orig-s0", "orig-s1", "orig-s2", "third-s3")]
    states = [dict(method="ser", step=9, args=dict(lr=1.0, seed=seed)) for seed in (1, 0, 1, 2, 3)]
    assert eval_probe.row_names(paths, states) == ["edited", "orig", "orig", "orig", "edited"]


def records(folder):
    return [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]


def test_parts_are_slices_of_the_last_block(folder, tmp_path, capsys, monkeypatch):
    """Of four blocks of a ViT side by side the equivariant part is the last dimensions of the last, the invariant
    part all others; of a single representation its own two parts. Seen in the widths that the probes are given."""
    shared = [
        *"--data imagefolder --data-dir".split(),
        str(folder),
        *"--recipe cifar10 --arch vit_pico --img-size 16 --patch-size 4 --epochs 0".split(),
        *"--warmup-epochs 0 --batch-size 12 --workers 0 --device cpu".split(),
    ]
    clever.main(
        [*shared, "--local-size", "8", "--head-dim", "8", "--head-dim-equi", "8", "--out", str(tmp_path / "clever")]
    )
    recon_xattn.main([*shared, "--neck", "16", "--embed-dim", "8", "--out", str(tmp_path / "recon")])
    seen = []
    linear = eval_probe.LinearProbe.__init__
    standardise = eval_probe.Standardise.__init__
    monkeypatch.setattr(
        eval_probe.LinearProbe, "__init__", lambda self, dim, *a: (seen.append(dim), linear(self, dim, *a))[1]
    )
    monkeypatch.setattr(
        eval_probe.Standardise,
        "__init__",
        lambda self, x, columns: (seen.append(x[..., columns].shape[-1]), standardise(self, x, columns))[1],
    )
    paths = [str(tmp_path / name / "checkpoint.pt") for name in ("clever", "recon")]
    run = [
        *paths,
        *"--tasks knn linear mlp fewshot r2 --mlp-epochs 1 --part all inv equi".split(),
        *"--known-fraction 0.5 --linear-epochs 1 --r2-epochs 1 --r2-targets flip --device cpu".split(),
    ]
    results = dict(eval_probe.main(run))
    # Linear, twice fewshot, mlp: four blocks of 32; r2: one of 32 = 25 + 7.
    assert seen == [*[128, 128 - 7, 7] * 4, 32, 25, 7, *[16, 8, 8] * 5]
    metrics = "knn", "linear", "mlp", "fewshot 1%", "fewshot 10%", "r2 flip"
    expected = {f"{metric}{part}" for metric in metrics for part in ("", " (inv)", " (equi)")}
    assert expected <= set(results["clever"]) == set(results["recon"])
    record = records(tmp_path / "clever")[0]
    assert record["protocol"]["train_images"] == 12 and record["protocol"]["known_fraction"] == 0.5
    ser.main([*shared, "--equi", "none", "--out", str(tmp_path / "ser")])
    with pytest.raises(SystemExit) as end:
        eval_probe.main([str(tmp_path / "ser" / "checkpoint.pt"), "--part", "inv"])
    assert end.value.code == 2 and "--part inv" in capsys.readouterr().err


def test_one_call_from_checkpoints_to_table(tiny, folder, tmp_path, capsys):
    for seed in "01":
        ser.main([*tiny, "--max-steps", "1", "--seed", seed, "--out", str(tmp_path / f"run-s{seed}")])
    ser.main([*tiny, "--epochs", "0", "--out", str(tmp_path / "untrained")])
    paths = [tmp_path / name / "checkpoint.pt" for name in ("run-s0", "run-s1", "untrained")]
    before = [p.read_bytes() for p in paths]
    capsys.readouterr()
    results = eval_probe.main(
        [
            *map(str, paths),
            *"--tasks knn linear r2 --linear-epochs 2 --r2-epochs 1 --r2-targets flip --device cpu".split(),
        ]
    )
    table = capsys.readouterr().out.splitlines()
    assert [name for name, _ in results] == ["run", "run", "untrained"] and [p.read_bytes() for p in paths] == before
    assert len(table) == 3 and table[1].split()[:2] == ["run", "2"] and "±" in table[1]
    assert table[2].split()[:2] == ["untrained", "1"]
    assert all(0 <= v["knn"] <= 100 and 0 <= v["linear"] <= 100 for _, v in results)
    knn, linear, r2 = records(tmp_path / "run-s0")  # one a task
    assert knn["results"] | linear["results"] | r2["results"] == results[0][1]
    assert knn["protocol"]["knn"]["k"] == 20 and "linear" not in knn["protocol"]
    assert set(r2["protocol"]["r2"]["both"]["flip"]) == {"flat", "uniform", "train", "pairs"}
    assert 0 <= linear["protocol"]["linear"]["train"]["linear"] <= 100
    again = eval_probe.main([str(paths[0]), "--tasks", "knn", "linear", "--linear-epochs", "2", "--device", "cpu"])
    assert again[0][1] == {
        k: v for k, v in results[0][1].items() if not k.startswith("r2")
    }  # a second run: the same numbers
    assert len(records(tmp_path / "run-s0")) == 5


# ---- the figure -------------------------------------------------------------------------------------

FOUND = [
    ("run", {"knn": 50.0, "r2 flip": 0.5, "rotation @1": 60.0, "rotation @3": 80.0}),
    ("run", {"knn": 52.0, "r2 flip": 0.7, "rotation @1": 62.0, "rotation @3": 90.0}),
    ("_other_$run", {"knn": 40.0, "rotation @1": 30.0, "rotation @3": math.nan}),
]


def test_a_panel_a_metric_and_a_line_where_there_are_several_blocks():
    knn, r2_flip, turns = eval_probe.make_panels(FOUND)
    assert [p.title for p in (knn, r2_flip, turns)] == ["knn", "r2 flip", "rotation"]
    assert [p.over for p in (knn, r2_flip, turns)] == ["", "", "block"]
    assert knn.unit == turns.unit == "accuracy (%)" and r2_flip.unit == "R²"
    assert knn.rows == {"run (n = 2)": [(0, 51, pytest.approx(2**0.5))], "_other_$run": [(0, 40, None)]}
    assert list(r2_flip.rows) == ["run (n = 2)"]
    assert [at for at, *_ in turns.rows["run (n = 2)"]] == [1, 3] and len(turns.rows["_other_$run"]) == 1


def test_a_figure_is_a_file_of_plausible_size(tmp_path):
    pytest.importorskip("matplotlib")
    many = [(f"a run with a rather long name {i}", {f"metric {k}": float(i) for k in range(5)}) for i in range(12)]
    for name, results in (("few", FOUND), ("many", many), ("one", FOUND[:1])):
        eval_probe.draw(str(tmp_path / f"{name}.png"), eval_probe.make_panels(results), "Probes of planted records")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert 600 < picture.width < 4000 and 200 < picture.height < 4000
            assert len(picture.convert("RGB").getcolors(2**24)) > 50
    few = eval_probe.make_panels(FOUND)
    eval_probe.draw(str(tmp_path / "few.svg"), few, "Probes")
    assert "R²" in (tmp_path / "few.svg").read_text() or (tmp_path / "few.svg").stat().st_size > 10_000


def test_a_call_draws_its_table(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    ser.main([*tiny, "--epochs", "0", "--equi", "none", "--out", str(tmp_path / "run")])
    path = str(tmp_path / "run" / "checkpoint.pt")
    eval_probe.main([path, "--tasks", "knn", "--device", "cpu", "--plot", str(tmp_path / "knn.png")])
    assert Image.open(tmp_path / "knn.png").width > 300
