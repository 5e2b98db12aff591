"""Corruptions against the original's outputs and closed forms; metrics; suites on tiny sets."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import clever
import common
import eval_probe
import eval_robustness as er

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from test_cli import expect_mistake
from test_distributed import on_ranks
from test_eval_probe import Copies

g = common.rng("robustness")
photo = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=g)
photo = (
    torch.nn.functional.interpolate(photo.float(), (32, 32), mode="bicubic").clamp(0, 255).to(torch.uint8)
)  # smooth enough


@pytest.fixture(autouse=True)
def begin_anew():
    """Every test draws the same numbers, whichever tests ran before it."""
    g.manual_seed(common.number_of("test"))


def flat(*rgb, size=32, n=1):
    return torch.tensor(rgb, dtype=torch.uint8).view(1, -1, 1, 1).expand(n, 3, size, size).contiguous()


def one(x, name, severity):
    """The only value of a constant image after a corruption, or its three."""
    y = er.corrupt(x, name, severity, torch.arange(len(x)))
    assert (y == y[:, :, :1, :1]).all()
    return y[0, :, 0, 0].tolist()


# ---- corruptions: the original's ---------------------------------------------------------------

FIXTURE = np.load(
    Path(__file__).parent / "corruptions_32px.npz"
)  # one 32-px image, what the original code made of it, and its draws
RECORDED = sorted({tuple(k.split("/")[:2]) for k in FIXTURE.files if k != "image"})


class Recorded:
    """Draws as the original drew them, in its order."""

    def __init__(self, **values):
        self.values = {k: [torch.as_tensor(np.asarray(v)) for v in vs] for k, vs in values.items()}

    def normal(self, *shape):
        return self.values["normal"].pop(0).float().view(1, *shape)

    def uniform(self, low, high, *shape):
        return self.values["uniform"].pop(0).float().view(1, *shape)

    def integers(self, low, high, *shape):
        return self.values["integers"].pop(0).long().view(1, *shape)


@pytest.mark.parametrize("name, severity", RECORDED)
def test_corruptions_are_the_original_s(name, severity):
    record = lambda field: FIXTURE[f"{name}/{severity}/{field}"]
    function, _, constants = er.CORRUPTIONS[name]
    c = constants[int(severity) - 1]
    c = c if isinstance(c, tuple) else (c,)
    draws, out = None, f"{name}/{severity}"
    if out not in FIXTURE.files:
        out += "/out"
        if name in ("snow", "spatter"):
            c = (0, 1, *c[2:])  # the noise as it was, not in units of its deviation
        if name == "fog":
            u, used, m, amplitude = record("uniform_flat").copy(), 0, 1, 100.0
            while m < 32:
                u[used : used + 3 * m * m] /= amplitude
                used, m, amplitude = used + 3 * m * m, 2 * m, amplitude / c[1]
        draws = dict(
            glass_blur=lambda: Recorded(integers=record("offsets_dx_dy").reshape(c[2], -1, 2)),
            motion_blur=lambda: Recorded(uniform=[record("angle")]),
            snow=lambda: Recorded(normal=[record("noise")], uniform=[record("angle")]),
            fog=lambda: Recorded(uniform=[u]),
            spatter=lambda: Recorded(normal=[record("noise")]),
            elastic_transform=lambda: Recorded(
                uniform=[record("pts_offset"), np.stack([record("u_dx"), record("u_dy")])]
            ),
        )[name]()
    x = torch.from_numpy(FIXTURE["image"]).permute(2, 0, 1)[None]
    y = function(x, None, *c) if function in er.CODECS else er.levels(function(x.float(), draws, *c))
    error = (y[0].permute(1, 2, 0).float() - torch.from_numpy(FIXTURE[out]).float()).abs()
    assert error.max() <= 1 and error.mean() <= 0.1  # of a level


def test_glass_is_the_loop():
    """Every pixel from the last to the first copies what its neighbour shows at that moment."""
    S, delta, iterations = 16, 2, 2
    x = torch.randint(0, 256, (2, 3, S, S), generator=g).float()
    expected, draws = x.clone(), er.Draws(torch.tensor([3, 4]), x.device)
    for _ in range(iterations):
        offsets = draws.integers(-delta, delta, (S - 2 * delta) ** 2, 2)
        for b in range(2):
            visit = iter(offsets[b].tolist())
            for h in range(S - delta, delta, -1):
                for w in range(S - delta, delta, -1):
                    dx, dy = next(visit)
                    expected[b, :, h, w] = expected[b, :, h + dy, w + dx]
    assert torch.allclose(
        er.glass_blur(x, er.Draws(torch.tensor([3, 4]), x.device), 0.05, delta, iterations), expected, atol=2e-3
    )  # sigma 0.05 blurs nothing


@pytest.mark.parametrize("size, values", [(224, (125, 151, 176, 202, 227)), (32, (112, 125, 138, 151, 176))])
def test_brightness(size, values):
    assert [one(flat(100, 100, 100, size=size), "brightness", s)[0] for s in range(1, 6)] == list(values)
    black = (25, 51, 76, 102, 127) if size == 224 else (12, 25, 38, 51, 76)
    assert [one(flat(0, 0, 0, size=size), "brightness", s) for s in range(1, 6)] == [[v] * 3 for v in black]


def test_brightness_keeps_the_hue():
    assert [one(flat(200, 100, 50, size=224), "brightness", s) for s in (1, 2, 3)] == [
        [225, 112, 56],
        [251, 125, 62],
        [255, 127, 63],
    ]
    assert one(flat(250, 240, 230, size=224), "brightness", 4) == [255, 244, 234]


def test_saturate():
    for size in (224, 32):
        assert [one(flat(128, 128, 128, size=size), "saturate", s) for s in (1, 3, 4, 5)] == [[128, 128, 128]] * 2 + [
            [128, 115, 115],
            [128, 102, 102],
        ]
        assert [one(flat(255, 255, 255, size=size), "saturate", s) for s in (4, 5)] == [
            [255, 229, 229],
            [255, 204, 204],
        ]
    orange = torch.tensor([one(flat(200, 100, 50, size=224), "saturate", s) for s in range(1, 6)])
    assert (orange - torch.tensor([[200, 170, 155], [200, 189, 185]] + [[200, 66, 0]] * 3)).abs().max() <= 1
    assert one(flat(0, 0, 0), "saturate", 5) == [0, 0, 0]


def test_contrast_on_halves():
    for size, values in (
        (224, ((76, 178), (89, 165), (102, 153), (114, 140), (121, 133))),
        (32, ((31, 223), (63, 191), (76, 178), (89, 165), (108, 146))),
    ):
        x = flat(0, 0, 0, size=size)
        x[..., size // 2 :] = 255
        for severity, (low, high) in enumerate(values, 1):
            y = er.corrupt(x, "contrast", severity, torch.tensor([0]))
            assert y[..., 0].unique().tolist() == [low] and y[..., -1].unique().tolist() == [high]


def test_constant_images():
    for size in (224, 32):
        for severity in (1, 3, 5):
            for name in ("gaussian_blur", "glass_blur", "motion_blur", "pixelate", "contrast"):
                assert one(flat(77, 77, 77, size=size), name, severity) == [77] * 3, name
            for name in ("zoom_blur", "elastic_transform"):
                y = er.corrupt(flat(77, 77, 77, size=size), name, severity, torch.tensor([1]))
                assert y.min() >= 76 and y.max() <= 77, name
    largest = er.corrupt(flat(200, 200, 200, size=224), "defocus_blur", 5, torch.tensor([1]))
    assert largest.unique().tolist() == [202]  # its kernel sums to 1.0108
    assert er.disk(8, 0.5, "cpu").sum().item() == pytest.approx(1.012975, abs=1e-5) and er.disk(
        10, 0.5, "cpu"
    ).sum().item() == pytest.approx(1.010786, abs=1e-5)
    assert [one(flat(77, 77, 77, size=224), "jpeg_compression", s)[0] for s in (1, 3, 5)] == [76, 75, 71]


def test_weather_on_constant_images():
    assert er.corrupt(flat(0, 0, 0), "fog", 3, torch.tensor([5])).max() == 0
    low = [er.corrupt(flat(128, 128, 128), "fog", s, torch.tensor([5])) for s in range(1, 6)]
    assert [y.min().item() for y in low] == [91, 64, 51, 42, 32] and all(y.max() == 128 for y in low)
    assert er.corrupt(flat(255, 255, 255), "snow", 3, torch.tensor([5])).min() == 255
    frost = er.corrupt(flat(0, 0, 0, size=96, n=32), "frost", 5, torch.arange(32)).float()
    assert 0.75 * 112 - 25 < frost.mean() < 0.75 * 205 and frost.std((2, 3)).min() > 3  # ice on black
    ice = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=g)
    y = er.corrupt(flat(0, 0, 0), "frost", 3, torch.tensor([2]), (ice,))  # 0.4 of a crop of the photograph
    assert any(
        torch.equal(y[0], (0.4 * ice[:, i : i + 32, j : j + 32].float()).to(torch.uint8))
        for i in range(9)
        for j in range(19)
    )


def test_noise_has_the_law_of_the_original():
    x = flat(128, 128, 128, size=96, n=16)
    level = lambda name, s: er.corrupt(x, name, s, torch.arange(16)).float()
    assert level("gaussian_noise", 1).std() == pytest.approx(20.4, rel=0.02) and level(
        "gaussian_noise", 1
    ).mean() == pytest.approx(127.5, abs=0.2)
    assert level("shot_noise", 1).std() == pytest.approx(255 * math.sqrt(128 / 255 / 60), rel=0.02)
    assert level("speckle_noise", 1).std() == pytest.approx(128 * 0.15, rel=0.02)
    impulse = level("impulse_noise", 3)
    assert (impulse != 128).float().mean() == pytest.approx(0.09, abs=0.004) and (impulse == 255).sum() / (
        impulse == 0
    ).sum() == pytest.approx(1, abs=0.1)
    small = er.corrupt(flat(128, 128, 128, n=64), "gaussian_noise", 5, torch.arange(64)).float()
    assert small.std() == pytest.approx(25.5, rel=0.02)


@pytest.mark.parametrize("name", er.CORRUPTIONS)
def test_an_image_s_corruption_depends_on_its_seed_alone(name, monkeypatch):
    drawn = []
    fill, poisson = er.Draws.fill, er.Draws.poisson
    monkeypatch.setattr(er.Draws, "fill", lambda *a: drawn.append(1) or fill(*a))
    monkeypatch.setattr(er.Draws, "poisson", lambda *a: drawn.append(1) or poisson(*a))
    seeds = torch.arange(6) + 10
    together = er.corrupt(photo, name, 3, seeds)
    apart = torch.cat([er.corrupt(photo[i : i + 2], name, 3, seeds[i : i + 2]) for i in (0, 2, 4)])
    assert together.dtype == torch.uint8 and torch.equal(together, apart)
    other = er.corrupt(photo, name, 3, seeds + 100)
    assert torch.equal(together, other) != bool(drawn)


def test_distances_to_an_edge_end_at_the_cap():
    edges = torch.zeros(1, 1, 30, 30, dtype=torch.bool)
    edges[..., 0, 0] = True
    d = er.distance(edges)[0, 0]
    assert d[0].tolist() == [min(k, 20) for k in range(30)]
    assert d.diagonal().tolist() == pytest.approx([min(1.4 * k, 20) for k in range(30)])


# ---- perturbations -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", er.PERTURBATIONS)
def test_sequences(name):
    frames = er.perturb(photo[:3], name, torch.tensor([1, 2, 3]), 32)
    n = dict(motion_blur=21, translate=16).get(name, 31)
    assert frames.shape == (3, n, 3, 32, 32) and frames.dtype == torch.uint8
    assert torch.equal(frames[1:2], er.perturb(photo[1:2], name, torch.tensor([2]), 32))
    clean = dict(translate=7, rotate=15, scale=15, shear=15, brightness=15, zoom_blur=0).get(
        name, 0 if name.endswith("noise") else None
    )
    if clean is not None:
        assert (frames[:, clean].int() - photo[:3].int()).abs().max() <= 1
    assert (frames[:, -1] != frames[:, 0]).flatten(1).any(1).all()


def test_geometry_is_torchvision_s_on_the_whole_image():
    whole = (
        torch.nn.functional.interpolate(
            torch.randint(0, 256, (1, 3, 16, 20), generator=g).float(), (256, 320), mode="bicubic"
        )
        .clamp(0, 255)
        .to(torch.uint8)
    )
    image = Image.fromarray(whole[0].permute(1, 2, 0).numpy())
    for name, i, change in (
        ("rotate", 4, dict(angle=-11)),
        ("shear", 22, dict(shear=[7.0, 0.0])),
        ("scale", 6, dict(scale=0.55)),
        ("translate", 3, dict(translate=[-17, 0])),
    ):
        how = dict(angle=0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0]) | change
        expected = TF.affine(
            image,
            **how,
            interpolation=TF.InterpolationMode.NEAREST if name == "translate" else TF.InterpolationMode.BILINEAR,
        )
        expected = torch.from_numpy(np.array(TF.center_crop(expected, 224))).permute(2, 0, 1)
        got = er.perturb(whole, name, torch.tensor([0]), 224)[0, i]
        error = (got.int() - expected.int()).abs()
        assert error.float().mean() < 0.01 and (error > 1).float().mean() < 1e-4  # the border too
    middle = er.tilt(15, 341, 256, 1)
    f = math.hypot(341, 256)
    assert torch.allclose(middle, torch.tensor([[f, 0, 170.5], [0, f, 128], [0, 0, f + 1]], dtype=torch.float64))


# ---- metrics -----------------------------------------------------------------------------------


def test_mean_corruption_error():
    assert er.mean_corruption_error(er.ALEXNET) == pytest.approx(100) and er.mean_corruption_error(
        er.ALEXNET, er.ALEXNET_CLEAN
    ) == pytest.approx(100)
    assert er.mean_corruption_error({name: (0.5,) * 5 for name in er.BENCHMARK}) == pytest.approx(64.6726, abs=1e-3)
    assert er.mean_corruption_error({name: (0.3,) * 5 for name in er.BENCHMARK}, 0.3) == 0
    assert sum(map(sum, er.ALEXNET.values())) / 75 == pytest.approx(0.7889931, abs=1e-6)


def test_flips_and_distances():
    one_hot = lambda *classes: torch.eye(10)[torch.tensor(classes)][None]
    counts = lambda scores, noise: dict(zip(("pairs", "flips", "distance"), er.count_changes(scores, noise).tolist()))
    alternating = one_hot(*[i % 2 for i in range(31)])
    assert counts(alternating, False)["flips"] == 30 == counts(alternating, False)["pairs"]
    assert counts(alternating, True)["flips"] == 15
    assert counts(one_hot(*[int(i >= 15) for i in range(31)]), False)["flips"] == 1
    assert counts(one_hot(*[3] * 31), True)["flips"] == 0
    assert er.mean_flip_rate(er.ALEXNET_FLIPS) == pytest.approx(100) and er.mean_flip_rate(
        dict.fromkeys(er.TEST_PERTURBATIONS, 0.05)
    ) == pytest.approx(49.564, abs=1e-3)

    def distance(**moves):  # class at rank i of the first frame -> its rank in the second
        order = list(range(10))
        for i, j in ((int(k[1:]), v) for k, v in moves.items()):
            order[j - 1] = i - 1
        second = torch.zeros(10)
        second[torch.tensor(order)] = torch.arange(10, 0, -1.0)
        return counts(torch.stack([torch.arange(10, 0, -1.0), second])[None], False)["distance"]

    assert [
        distance(),
        distance(r1=2, r2=1),
        distance(r5=6, r6=5),
        distance(r6=7, r7=6),
        distance(r1=5, r5=1),
        distance(r1=6, r6=1),
    ] == [0, 2, 1, 0, 8, 5]
    assert distance(r1=2, r2=3, r3=4, r4=5, r5=6, r6=1) == 5
    assert distance(**{f"r{i}": (i + 4) % 10 + 1 for i in range(1, 11)}) == 15


def test_counts_ask_nothing_of_a_device(monkeypatch):
    device = torch.device("meta")
    scores, labels = torch.empty(6, 5, 10, device=device), torch.empty(6, dtype=torch.int64, device=device)
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: pytest.fail("a number is copied to the device"))
    with Copies() as copies:
        er.count_right("clean", scores[:, 0], labels)
        er.count_changes(scores, True)
    assert copies.count == 0


def test_sequences_and_corruptions_come_in_larger_batches_on_a_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    how = dict(small=32, large=8, gpu=64)
    assert [er.batch_of(size, device, **how) for size in (32, 224) for device in (cpu, gpu)] == [32, 64, 8, 64]


def test_matrices_of_corruptions_are_multiplied_in_float32(checkpoints, monkeypatch):
    """NVIDIA's containers switch TF32 on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        seen = []
        monkeypatch.setattr(er, "evaluate", lambda *a: seen.append(torch.get_float32_matmul_precision()))
        er.main([checkpoints[0], *QUICK])
        assert seen == ["highest"]
    finally:
        torch.set_float32_matmul_precision(before)


# ---- suites ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
    """Untrained tiny encoders: one that splits its representation and one that does not."""
    root = tmp_path_factory.mktemp("robust")
    shared = [
        a
        for flag, value in zip(tiny[::2], tiny[1::2])
        if flag not in ("--proj-dim", "--equi-dim", "--equi-params")
        for a in (flag, value)
    ]
    for equi in ("clever", "none"):
        clever.main(
            [
                *shared,
                "--equi",
                equi,
                *"--head-dim 16 --head-dim-equi 16 --local-size 8 --epochs 0 --warmup-epochs 0 --out".split(),
                str(root / equi),
            ]
        )
    paths = [root / equi / "checkpoint.pt" for equi in ("clever", "none")]
    state = common.load_checkpoint(paths[1])
    state["args"]["sessions"] = (1, 2)  # ciper.py records them whatever the data
    common.save_checkpoint(paths[1], state)
    return [str(path) for path in paths]


QUICK = ["--linear-epochs", "4", "--workers", "0", "--device", "cpu"]


def test_every_suite_prints_its_table_and_keeps_the_counts(checkpoints, tmp_path, capsys):
    tables = er.main(
        [
            *checkpoints,
            *"--suite corruptions perturbations augmentations --part all inv equi --images-per-class 2".split(),
            *"--passes 2 --save-images".split(),
            str(tmp_path / "look"),
            *QUICK,
        ]
    )
    printed = capsys.readouterr().out
    assert [name for name, _ in tables["corruptions"]] == ["clever", "clever (inv)", "clever (equi)", "none"]
    assert set(er.CORRUPTIONS) - {"frost"} | {"frost*", "clean", "mean*", "without frost"} == set(
        tables["corruptions"][0][1]
    )  # 2 classes: no top-5; 32 px: no mCE
    assert set(er.PERTURBATIONS) | {"top-1", "flips"} == set(tables["perturbations"][0][1])
    assert ["Orig", "CJ", "CJ+Flip", "CJ+Ro", "CJ+Ro+ET"] == list(tables["augmentations"][0][1])
    assert all(name in printed for name in ("mean*", "flips", "CJ+Ro+ET", "clever (equi)"))
    for suite in ("corruptions", "perturbations"):
        assert Image.open(tmp_path / "look" / f"{suite}.png").size[0] > 500
    record = json.loads(Path(checkpoints[0]).with_name("eval.jsonl").read_text().splitlines()[-3])
    details, values = record["protocol"]["details"][""], record["results"]["all"]
    fog = [details["right"][f"fog {s}"][0] for s in range(1, 6)]
    assert record["protocol"]["suite"] == "corruptions" and details["images"] == 4
    assert values["fog"] == pytest.approx(100 * sum(fog) / 20)


def small_run(paths):
    return er.main(
        [
            *paths,
            *"--suite corruptions perturbations augmentations --types gaussian_noise snow".split(),
            *"--images-per-class 4".split(),
            *QUICK,
        ]
    )


def test_2_processes_count_what_one_counts(checkpoints, tmp_path):
    (alone,) = on_ranks(1, tmp_path, small_run, checkpoints[:1])
    for other in on_ranks(2, tmp_path, small_run, checkpoints[:1]):
        assert other == alone


class Oracle(torch.nn.Module):
    """An encoder that sees the mean colours: bright left halves from bright right ones are easy to tell, on clean
    images."""

    img_size, dim, inv, depth, mean, std = 16, 12, None, 1, (0.5,) * 3, (0.5,) * 3

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)

    last_blocks = forward


def subject(folder, **changes):
    args = eval_probe.Args(tasks=("linear",), linear_epochs=20, linear_lrs=(1.0,), workers=0)
    sets = [common.load_data("imagefolder", str(folder), split, 16) for split in ("train", "test")]
    return er.Subject(
        "oracle",
        "oracle.pt",
        eval_probe.Case(Oracle(), dict(data="imagefolder", data_dir=str(folder)), *sets, args, torch.device("cpu")),
    )


def outcome(make, who, args):
    """A suite on one subject -> results in percent, and counts."""
    suite = make([who], who.case.test, args)
    er.measure(suite, sums := er.zeros(suite, [who]), args)
    return suite.row(sums[who.path][""])


def test_a_probe_that_knows_keeps_knowing_until_the_signal_is_gone(folder):
    who = subject(folder)
    args = er.Args(types=("brightness", "contrast", "gaussian_noise"), workers=0)
    values, _ = outcome(er.corruptions, who, args)
    assert values["clean"] == 100 and values["brightness"] > 90 and values["gaussian_noise"] > 90
    values, _ = outcome(er.augmentations, who, args)
    assert values["Orig"] == 100 and values["CJ"] > 90 and values["CJ+Flip"] < 10  # left is right
    values, details = outcome(er.perturbations, who, dataclasses.replace(args, types=("rotate", "gaussian_noise")))
    assert values["rotate"] > 90 and details["flip_probability"]["rotate"] < 0.05


def test_shifted_folders_are_labelled_by_name(folder, tmp_path, capsys):
    who, args = subject(folder), er.Args(workers=0)
    shutil.copytree(folder / "test" / "left", tmp_path / "rendition" / "left")
    shutil.copytree(folder / "test" / "left", tmp_path / "numbers" / "0")
    shutil.copytree(folder / "test" / "left", tmp_path / "numbers" / "1")  # half of them wrong
    out, _ = outcome(er.shifts, who, dataclasses.replace(args, suite_dir=(str(tmp_path / "numbers"),)))
    assert out["clean"] == 100 and out["numbers"] == 50
    for kind in ("left", "other"):  # one class only: two folders are needed to tell classes, so another joins
        (tmp_path / "rendition" / kind).mkdir(exist_ok=True)
    shutil.copytree(folder / "test" / "left", tmp_path / "rendition" / "other", dirs_exist_ok=True)
    with pytest.raises(SystemExit):
        er.labelled(tmp_path / "rendition", ("left", "right"))
    assert "other is no class" in capsys.readouterr().err
    for i in (2, 11):
        (tmp_path / "v2" / f"{i}").mkdir(parents=True)
        shutil.copy(folder / "test" / "left" / "00.png", tmp_path / "v2" / f"{i}")
    assert er.labelled(tmp_path / "v2", tuple(f"n{i:02d}" for i in range(12))).labels.tolist() == [
        11,
        2,
    ]  # by number, not by order


def test_only_the_classes_of_the_set_compete_when_masked(tmp_path):
    """Grey levels 0, 100, 200 are three classes; of a set with only the outer two, an image nearer to the middle is
    wrong unless masked."""
    for split, levels in (
        ("train", {"a": 0, "b": 100, "c": 200}),
        ("test", {"a": 0, "b": 100, "c": 200}),
        ("shifted", {"a": 85, "c": 115}),
    ):
        for name, level in levels.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(20 if split == "train" else 2):
                Image.new("RGB", (16, 16), (level + i % 3,) * 3).save(tmp_path / split / name / f"{i}.png")
    who = subject(tmp_path)
    nearest = lambda x: -((127.5 * (x.mean(1, keepdim=True) + 1) - torch.tensor([0.0, 100, 200])) ** 2)
    who.case.__dict__["heads"] = dict(linear=SimpleNamespace(scores=nearest))
    values, details = outcome(er.shifts, who, er.Args(suite_dir=(str(tmp_path / "shifted"),), workers=0))
    assert values["clean"] == 100 and values["shifted"] == 0 and values["shifted (2 classes)"] == 100
    assert details["shifted"]["images"] == 4


def test_more_processes_than_images(checkpoints, tmp_path):
    run = lambda: er.main(
        [
            checkpoints[0],
            *"--suite corruptions --types shot_noise jpeg_compression --images-per-class 1".split(),
            *QUICK,
        ]
    )
    run.__name__ = "few"
    assert len({str(tables) for tables in on_ranks(3, tmp_path, run)}) == 1


def test_photographs_of_frost(tmp_path, capsys):
    for name, level in (("frost1.png", 50), ("frost6.jpg", 250)):
        Image.new("RGB", (200, 180), (level,) * 3).save(tmp_path / name)
    (photograph,) = er.load_frost(str(tmp_path), 32)  # the sixth is never used
    assert photograph.shape == (3, 36, 40) and photograph.unique().tolist() == [50]
    (tmp_path / "bad.png").write_text("no picture")
    er.load_frost.cache_clear()
    with pytest.raises(SystemExit):
        er.load_frost(str(tmp_path), 32)
    assert "bad.png" in capsys.readouterr().err


def test_severities_end_at_5():
    for severity in (0, 6):
        with pytest.raises(ValueError):
            er.corrupt(photo, "fog", severity, torch.arange(6))


def test_published_sets_are_read(folder, tmp_path, capsys):
    who = subject(folder)
    for severity in range(1, 6):
        shutil.copytree(folder / "test", tmp_path / "C" / "noise" / "shot_noise" / str(severity))
    args = er.Args(types=("shot_noise",), suite_dir=(str(tmp_path / "C"),), workers=0)
    values, _ = outcome(er.corruptions, who, args)
    assert values == {"clean": 100, "shot_noise": 100}
    images = np.stack([np.array(Image.open(p).resize((32, 32), Image.NEAREST)) for p in who.case.test.paths])
    np.save(
        tmp_path / "fog.npy", np.concatenate([images] * 4 + [images[..., ::-1, :]])
    )  # the last severity is mirrored
    np.save(tmp_path / "labels.npy", np.tile(who.case.test.labels.numpy(), 5))
    values, _ = outcome(er.corruptions, who, dataclasses.replace(args, types=("fog",), suite_dir=(str(tmp_path),)))
    assert values["fog"] == 80
    with pytest.raises(SystemExit):
        er.finished(tmp_path, "snow", 1, ("left", "right"))
    assert "snow/1" in capsys.readouterr().err


def test_stand_ins_of_blocks():
    usual, painted = (common.blocks(split, 8) for split in ("test", "hues"))
    assert torch.equal(usual["masks"], painted["masks"]) and torch.equal(usual["labels"], painted["labels"])
    assert not torch.equal(usual["images"], painted["images"]) and torch.equal(
        usual["images"][..., 0, 0], painted["images"][..., 0, 0]
    )  # the floor
    seen = common.blocks_views("seen", 8)
    assert seen["factors"]["session"].unique().tolist() == [0, 1]
    assert seen["labels"].unique().tolist() == common.blocks_views("test", 8)["labels"].unique().tolist()


def test_mistakes_of_robustness(checkpoints, folder, tmp_path, capsys):
    first = checkpoints[0]
    (tmp_path / "ice").mkdir()
    Image.new("RGB", (50, 50)).save(tmp_path / "ice" / "a.png")
    for argv, words in (
        ([], ["no checkpoint"]),
        ([first, "--suite", "weather"], ["weather"]),
        ([first, "--types", "rain"], ["--types rain", "snow"]),
        ([first, "--suite", "shifts"], ["--suite-dir"]),
        ([first, "--suite-dir", str(tmp_path / "gone")], ["gone"]),
        ([first, "--suite", "augmentations", "--suite-dir", str(folder)], ["--suite-dir"]),
        ([first, "--images-per-class", "0"], ["--images-per-class 0"]),
        ([first, "--frost-dir", str(tmp_path / "ice")], ["--frost-dir", "160 px"]),
        ([first, "--frost-dir", str(tmp_path / "none")], ["--frost-dir", "no such directory"]),
        ([first, "--suite", "perturbations", "--types", "fog"], ["--types fog"]),
        ([first, "--types", "snow", "fog", "snow"], ["--types snow fog snow", "once"]),
        ([first, "--suite-dir", str(folder), "--save-images", str(tmp_path / "see")], ["--save-images", "--suite-dir"]),
        ([first, "--suite", "augmentations", "--types", "fog"], ["--types", "perturbations"]),
        ([first, "--save-images", str(tmp_path / "ice" / "a.png")], ["--save-images"]),
        (
            [first, "--suite", "shifts", "--suite-dir", str(folder / "test"), str(folder / "train" / ".." / "test")],
            ["--suite-dir", "one name"],
        ),
        ([first, "--suite", "shifts", "--suite-dir", str(folder)], ["--suite-dir", "test is no class"]),
    ):
        expect_mistake(capsys, er.main, [*argv, *(QUICK if argv else [])], *words)


def test_corruptions_are_drawn_over_severity(checkpoints, tmp_path):
    conditions = [("clean", 0), *(("fog", s) for s in range(1, 6))]
    n = torch.tensor([[4, 4, 4], *([4, 4 - s // 2, 4] for s in range(1, 5)), [0, 0, 0]])  # 5 was not shown
    curve = er.over_severity(conditions, "*", n)
    assert math.isnan(curve.pop("fog @5")) and curve == {f"fog @{s}": 100 - 25 * (s // 2) for s in range(5)}
    bars, lines = er.panels_of(" (corruptions)", [("run", dict(clean=100.0, fog=70.0))], [("run", curve)])
    assert [bars.title, lines.title] == ["clean (corruptions)", "fog (corruptions)"]
    assert [x for x, *_ in lines.rows["run"]] == [0, 1, 2, 3, 4]
    pytest.importorskip("matplotlib")
    argv = [*checkpoints, "--suite", "corruptions", "augmentations", "--types", "fog", "--images-per-class", "1"]
    er.main([*argv, "--passes", "1", "--plot", str(tmp_path / "figure.png"), *QUICK])
    assert Image.open(tmp_path / "figure.png").width > 900
