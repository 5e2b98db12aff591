"""Every augmentation against torchvision's tensor functional, sample by sample, on the same parameters; and its law."""

import itertools
import math
import types

import common as A

import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms._functional_tensor as FT
import torchvision.transforms.functional as TF
import torchvision.transforms.v2.functional as V2
from torchvision.transforms import InterpolationMode

TOL = 1e-4  # the contract allows 1 / 255 + 1e-4
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(op, n, generator, sizes):
    """The params of an op, or a view, on images of these sizes (n, 2)."""
    params = op.sample(n, generator)
    crop = getattr(op, "crop", op)
    if isinstance(crop, A.RandomResizedCrop):
        crop.place(params, sizes)
    return params


def images(n, h, w, seed=0):
    """Smooth and noisy uint8 images with saturated, gray and tied pixels."""
    x = torch.rand(n, 3, h, w, generator=gen(seed)) * 300 - 20
    x[::3] = torch.nn.functional.interpolate(x[::3, :, :4, :4], (h, w), mode="bicubic")
    x = x.clamp(0, 255).round().to(torch.uint8)
    x[-1, :, : h // 2] = x[-1, :1, : h // 2]
    x[-1, 1] = x[-1, 0]
    return x


def floats(n, h, w, seed=0):
    return images(n, h, w, seed).float() / 255


def assert_close(a, b, tol=TOL):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a.double() - b.double()).abs().max() <= tol


# ---- crops -----------------------------------------------------------------------------------------------------------


def pixels(p, sizes):
    return (
        (torch.stack([p[k] for k in ("top", "left", "height", "width")], 1).double() * sizes.repeat(1, 2))
        .round()
        .long()
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "h,w,size",
    [(32, 32, 32), (32, 32, 40), (47, 33, 24), (64, 80, 64), (50, 75, 96), (256, 200, 224), (33, 200, 8), (300, 7, 48)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_crop_equals_torchvision(mode, h, w, size, layout):
    x, op = images(12, h, w).contiguous(memory_format=layout), A.RandomResizedCrop(size, interpolation=mode)
    sizes = torch.tensor([[h, w]]).expand(12, 2)
    p = sampled(op, 12, gen(), sizes)
    for source in (x, list(x)):
        y = op(source, p)
        assert y.dtype == torch.uint8 and y.shape == (12, 3, size, size)
        for i, box in enumerate(pixels(p, sizes).tolist()):
            assert_close(y[i], V2.resized_crop(x[i], *box, [size, size], MODES[mode], antialias=True), 1)


@pytest.mark.parametrize("size", [24, 96])
def test_crop_equals_torchvision_v1(size):
    """Its float arithmetic does not clamp between the two passes of a cubic, so here the contrast is low."""
    x, box = images(4, 50, 61) // 3 + 80, [3, 7, 40, 50]
    for mode in MODES:
        y = A.crop_resize(x, torch.tensor([box] * 4), size, mode)
        assert_close(y, TF.resized_crop(x, *box, [size, size], MODES[mode], antialias=True), 1)


def test_crop_of_a_list():
    shapes = [(30, 41), (5000, 1), (1, 5000), (1, 1), (3, 900), (64, 64)]
    xs = [images(1, *s)[0] for s in shapes]
    for size in (16, 64):
        op = A.RandomResizedCrop(size)
        p = sampled(op, len(xs), gen(), torch.tensor(shapes))
        y = op(xs, p)
        for i, box in enumerate(pixels(p, torch.tensor(shapes)).tolist()):
            assert_close(y[i], V2.resized_crop(xs[i], *box, [size, size], antialias=True), 1)


@pytest.mark.parametrize("h,w", [(5000, 1), (1, 5000), (1, 1), (4, 4), (9, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_extreme_sources(h, w, mode):
    x, sizes = images(3, h, w), torch.tensor([[h, w]] * 3)
    for size in (8, 48):
        op, whole = A.RandomResizedCrop(size, interpolation=mode), torch.tensor([[0, 0, h, w]] * 3)
        y, p = A.crop_resize(x, whole, size, mode), sampled(op, 3, gen(), sizes)
        z = op(x, p)
        for i, box in enumerate(pixels(p, sizes).tolist()):
            assert_close(y[i], V2.resize(x[i], [size, size], MODES[mode], antialias=True), 1)
            assert_close(z[i], V2.resized_crop(x[i], *box, [size, size], MODES[mode], antialias=True), 1)


def torchvision_box(monkeypatch, area, aspect, corner, h, w, scale, ratio):
    """torchvision's own get_params, fed with our candidates instead of its random numbers."""
    stream = iter([v for pair in zip(area.tolist(), aspect.tolist()) for v in pair])
    corners = iter(corner.tolist())
    fake = types.SimpleNamespace(
        empty=lambda n: types.SimpleNamespace(uniform_=lambda a, b: torch.tensor([next(stream)], dtype=torch.float64)),
        log=torch.log,
        tensor=torch.tensor,
        exp=lambda v: v,
        randint=lambda low, high, size: torch.tensor([math.floor(next(corners) * high)]),
    )
    with monkeypatch.context() as m:
        m.setattr(T.transforms, "torch", fake)
        return T.RandomResizedCrop.get_params(torch.empty(3, h, w), scale, ratio)


@pytest.mark.parametrize(
    "scale,ratio", [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.5, 0.8)), ((1.1, 1.4), (0.9, 1.2))]
)
def test_crop_law_candidate_by_candidate(monkeypatch, scale, ratio):
    op = A.RandomResizedCrop(32, scale, ratio)
    sizes = torch.cat(
        [
            torch.randint(1, 60, (150, 2), generator=gen(1)),
            torch.randint(1, 6, (80, 2), generator=gen(2)),
            torch.tensor([[5000, 1], [1, 5000], [10, 400], [400, 10], [32, 32], [3, 4], [4, 3]]),
        ]
    )
    n = len(sizes)
    draws, params = op.sample(n, gen()), sampled(op, n, gen(), sizes)
    boxes = pixels(params, sizes).tolist()
    fallbacks = 0
    for i in range(n):
        d = {k: v[i] for k, v in draws.items()}
        h, w = sizes[i].tolist()
        assert tuple(boxes[i]) == torchvision_box(monkeypatch, d["area"], d["aspect"], d["corner"], h, w, scale, ratio)
        area, r = d["area"].double() * h * w, d["aspect"].double()
        ch, cw = (area / r).sqrt().round(), (area * r).sqrt().round()
        fallbacks += not ((ch > 0) & (ch <= h) & (cw > 0) & (cw <= w)).any()
        one = {k: v[i : i + 1] for k, v in draws.items()}
        op.place(one, sizes[i : i + 1])  # as a loader worker does
        assert pixels(one, sizes[i : i + 1]).tolist()[0] == boxes[i]
    assert fallbacks > 5


def test_crop_statistics():
    n, op, sizes = 20000, A.RandomResizedCrop(32), torch.tensor([[224, 280]]).expand(20000, 2)
    p = sampled(op, n, gen(), sizes)
    box = pixels(p, sizes).double()
    torch.manual_seed(0)
    ref = torch.tensor(
        [T.RandomResizedCrop.get_params(torch.empty(3, 224, 280), (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    ).double()
    for f in (
        lambda b: b[:, 2] * b[:, 3] / (224 * 280),
        lambda b: (b[:, 3] / b[:, 2]).log(),
        lambda b: b[:, 0] / 224,
        lambda b: b[:, 1] / 280,
    ):
        a, b = f(box), f(ref)
        assert abs(a.mean() - b.mean()) < 5 * b.std() / 4000**0.5 and abs(a.std() / b.std() - 1) < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_center_crop(mode):
    shapes = [(70, 50), (50, 70), (64, 64), (37, 37), (40, 41), (56, 300)]
    xs = [images(1, *s)[0] for s in shapes]
    op = A.CenterCrop(49, 56, mode)
    y = op(xs, op.sample(6))
    assert y.dtype == torch.uint8
    for a, x in zip(y, xs):
        b = TF.center_crop(V2.resize(x, [56], MODES[mode], antialias=True), 49)
        assert_close(a, b, 1)
        assert_close(op(x[None], {})[0], b, 1)
    x = images(4, 32, 32)
    for resize in (32, 36):
        assert torch.equal(A.CenterCrop(32, resize)(x), x) and torch.equal(A.CenterCrop(32, resize)(list(x)), x)
    assert torch.equal(A.CenterCrop(32, 40)(images(4, 40, 40)), images(4, 40, 40)[:, :, 4:36, 4:36])  # no-op resize


# ---- float ops -------------------------------------------------------------------------------------------------------


def test_flip_gray_rot90_solarize_normalize():
    for dtype, (h, w) in itertools.product((torch.float32, torch.float64), ((15, 15), (8, 8), (1, 1), (12, 7))):
        x = floats(16, h, w).to(dtype)
        x[:, :, 0, 0] = torch.tensor(128 / 255, dtype=dtype)
        on = torch.rand(16, generator=gen()) < 0.5
        pick = lambda f, x=x, on=on: torch.stack([f(a) if o else a for a, o in zip(x, on)])
        assert_close(A.HorizontalFlip()(x.clone(), {"flip": on}), pick(TF.hflip), 0)
        assert_close(A.Grayscale()(x.clone(), {"gray": on}), pick(lambda a: TF.rgb_to_grayscale(a, 3)), 1e-6)
        assert_close(A.Solarize()(x.clone(), {"solarize": on}), pick(lambda a: TF.solarize(a, 128 / 255)), 1e-6)
        assert_close(
            A.Normalize([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])(x.clone()),
            TF.normalize(x, [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]),
            1e-6,
        )
        if h == w:
            k = torch.randint(4, (16,), generator=gen())
            assert_close(
                A.Rot90()(x.clone(), {"rot90": k}),
                torch.stack([torch.rot90(a, int(i), (1, 2)) for a, i in zip(x, k)]),
                0,
            )


def test_solarize_matches_uint8_levels():
    u = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    want = TF.solarize(u, 128)
    got = A.Compose([A.Solarize(p=1)]).augment(u, {"solarize": torch.tensor([True])})
    assert torch.equal((got * 255).round().to(torch.uint8), want)
    by_product = u.float() * (1 / 255)  # the division of a GPU
    assert torch.equal(
        (A.Solarize()(by_product, {"solarize": torch.tensor([True])}) * 255).round().to(torch.uint8), want
    )


def reference_jitter(x, p):
    fs = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    out = []
    for i, a in enumerate(x):
        v = [p[k][i].item() for k in ("brightness", "contrast", "saturation", "hue")]
        for k in p["order"][i].tolist():
            a = fs[k](a, v[k])
        out.append(a)
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("h,w", [(17, 17), (9, 14), (1, 1)])
@pytest.mark.parametrize(
    "strength",
    [(0.4, 0.4, 0.2, 0.1), (0.8, 0.8, 0.8, 0.2), (1.0, 1.0, 1.0, 0.5), (0.4, 0.0, 0.4, 0.0), (0.0, 0.0, 0.0, 0.3)],
)
def test_jitter_all_orders(dtype, h, w, strength):
    op, n = A.ColorJitter(*strength, p=0.9), 96
    p, x = op.sample(n, gen()), floats(n, h, w).to(dtype)
    p["order"] = torch.tensor(list(itertools.permutations(range(4)))).repeat(4, 1)
    assert_close(op(x.clone(), p), reference_jitter(x, p))


def test_jitter_law():
    n = 20000
    p = A.ColorJitter(0.4, (0.5, 0.7), 2.0, 0.1, p=0.8).sample(n, gen())
    on = p["hue"] != 0
    assert abs(on.float().mean() - 0.8) < 0.02
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.5, 0.7), ("saturation", 0, 3), ("hue", -0.1, 0.1)):
        v = p[name][on]
        assert low <= v.min() and v.max() <= high and abs(v.mean() - (low + high) / 2) < (high - low) * 0.02
        assert (p[name][~on] == (0 if name == "hue" else 1)).all()
    assert (p["order"][~on] == torch.arange(4)).all() and (p["order"].sort(1)[0] == torch.arange(4)).all()
    assert (
        torch.bincount((p["order"][on] * torch.tensor([64, 16, 4, 1])).sum(1)).float()[
            torch.bincount((p["order"][on] * torch.tensor([64, 16, 4, 1])).sum(1)) > 0
        ]
        / on.sum()
        - 1 / 24
    ).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "h,w,kernel",
    [(32, 32, None), (21, 40, 23), (4, 4, None), (4, 9, None), (1, 6, 5), (1, 1, None), (64, 48, 3)]
    + [(130, 140, None), (130, 140, 9)],
)
def test_blur(dtype, h, w, kernel):
    op, x = A.GaussianBlur(p=0.7, kernel=kernel), floats(12, h, w).to(dtype)
    p = op.sample(12, gen())
    y, want = op(x.clone(), p), []
    for image, s in zip(x, p["sigma"].tolist()):
        k = 2 * math.ceil(3 * s) + 1 if kernel is None else kernel
        taps = [min(k, 2 * w - 1), min(k, 2 * h - 1)]  # torchvision: width first
        want.append(TF.gaussian_blur(image, taps, [s, s]) if s > 0 else image)
    assert_close(y, torch.stack(want), 1e-5)


def test_N1_blur_of_an_image_does_not_depend_on_the_largest_sigma_beside_it():
    op, x, sigma = A.GaussianBlur(), floats(6, 16, 16), torch.tensor([0.3, 0.42, 0.6, 0.81, 1.1, 2.0])
    alone = torch.cat([op.blur(*one) for one in zip(x.split(1), sigma.split(1))])
    assert_close(op.blur(x, sigma), alone, 1e-7)


def test_grid_resize():
    op, x = A.GridResize(4, 8), floats(6, 32, 32)
    seen = set()
    for seed in range(30):
        p = op.sample(6, gen(seed))
        h, w = int(p["grid_h"][0]), int(p["grid_w"][0])
        assert (p["grid_h"] == h).all() and (p["grid_w"] == w).all() and p["grid_h"].shape == (6,)
        assert_close(op(x.clone(), p), TF.resize(x, [4 * h, 4 * w], MODES["bicubic"], antialias=True), 1e-6)
        seen.add((h, w))
    assert len(seen) > 8
    grids = torch.stack([torch.stack(list(op.sample(1, g).values())) for g in [gen()] for _ in range(3000)])[
        :, :, 0
    ].double()
    assert abs(grids.prod(1).mean() / 64 - 1) < 0.02 and abs((grids[:, 1] / grids[:, 0]).log().mean()) < 0.01


# ---- Compose ---------------------------------------------------------------------------------------------------------


def recipe(size, grid=False):
    ops = [
        A.RandomResizedCrop(size, (0.2, 1)),
        A.HorizontalFlip(),
        A.Rot90(),
        A.ColorJitter(0.4, 0.4, 0.2, 0.1),
        A.Grayscale(),
        A.GaussianBlur(),
        A.Solarize(),
        A.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    return A.Compose(ops[:-1] + [A.GridResize(4, size // 4)] + ops[-1:] if grid else ops)


@pytest.mark.parametrize("size,h,w", [(16, 20, 24), (48, 64, 50), (224, 256, 256)])
def test_N6_compose_equals_the_ops_in_order_and_again(size, h, w):
    c, n = recipe(size), 20
    x, sizes = images(n, h, w), torch.tensor([[h, w]]).expand(n, 2)
    p, before = sampled(c, n, gen(), sizes), x.clone()
    assert set(p) == {
        "top",
        "left",
        "height",
        "width",
        "flip",
        "rot90",
        "order",
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "gray",
        "sigma",
        "solarize",
    } and all(len(v) == n for v in p.values())
    y = c(x, p)
    assert torch.equal(y, c(x, p)) and torch.equal(x, before) and y.dtype == torch.float32 and y.is_contiguous()
    assert torch.equal(y, c(x.contiguous(memory_format=torch.channels_last), p))
    crops = c.crop(x, p)
    assert_close(c.augment(crops, p), y, 1e-5)
    one = torch.cat([c(x[i : i + 1], {k: v[i : i + 1] for k, v in p.items()}) for i in range(n)])
    assert_close(one, y, 1e-5)  # chunks do not matter
    z = crops.float() / 255
    kept = z.clone()
    assert_close(c.augment(z, p), y, 1e-5)
    assert torch.equal(z, kept)
    for op in c.ops:
        z = op(z, p)
    assert_close(z, y, 1e-5)
    ref = crops.float() / 255
    ref = torch.stack(
        [torch.rot90(TF.hflip(a) if f else a, int(k), (1, 2)) for a, f, k in zip(ref, p["flip"], p["rot90"])]
    )
    ref = reference_jitter(ref, p)
    ref = [TF.rgb_to_grayscale(a, 3) if g else a for a, g in zip(ref, p["gray"])]
    taps = [2 * math.ceil(3 * s) + 1 for s in p["sigma"].tolist()]
    ref = [TF.gaussian_blur(a, k, [s, s]) if s else a for a, k, s in zip(ref, taps, p["sigma"].tolist())]
    keep = (torch.stack(ref) - 128 / 255).abs() > 1e-4  # solarising is a jump of one level there
    ref = torch.stack([FT.solarize(a, 128 / 255) if s else a for a, s in zip(ref, p["solarize"])])
    assert_close(y[keep], TF.normalize(ref, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[keep])


def test_compose_float64_lists_grids_and_names():
    c, n = recipe(32, grid=True), 9
    xs = [images(1, 20 + 7 * i, 50 - 4 * i)[0] for i in range(n)]
    p = sampled(c, n, gen(), torch.tensor([x.shape[1:] for x in xs]))
    y = c(xs, p)
    assert y.shape == (n, 3, 4 * p["grid_h"][0], 4 * p["grid_w"][0]) and torch.equal(y, c(xs, p))
    x64 = c.crop(xs, p).double() / 255
    y64 = c.augment(x64, p)
    assert y64.dtype == torch.float64
    assert_close(y64.float(), y, 1e-3)


@pytest.mark.parametrize("size", [9, 32])
def test_affine_equals_torchvision(size):
    x, op = floats(16, size, size), A.Affine(degrees=180, translate=5)
    p = op.sample(16, gen())
    p["angle"][0], p["shift_x"][0], p["shift_y"][0] = 0, 0, 0
    assert torch.allclose(op(x, p)[0], x[0], atol=1e-6)
    whole = p | dict(shift_x=p["shift_x"].round(), shift_y=p["shift_y"].round())  # torchvision shifts by whole pixels
    for a, b, angle, dx, dy in zip(
        x, op(x, whole), p["angle"].tolist(), whole["shift_x"].tolist(), whole["shift_y"].tolist()
    ):
        assert_close(b, TF.affine(a, angle, [int(dx), int(dy)], 1.0, [0.0], InterpolationMode.BILINEAR), 2e-4)


def test_N11_identity_parameters_are_the_identity():
    ops = [
        A.HorizontalFlip(0),
        A.Rot90(),
        A.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0),
        A.Grayscale(0),
        A.GaussianBlur(p=0),
        A.Solarize(p=0),
    ]
    c, x = A.Compose(ops), floats(7, 19, 19)
    p = c.sample(7, gen())
    p["rot90"] = torch.zeros(7, dtype=torch.int64)
    assert (p["order"] == torch.arange(4)).all() and not p["sigma"].any() and not p["gray"].any()
    assert torch.equal(c(x, p), x)


def test_chunks_with_small_images():
    c, n = A.Compose([A.HorizontalFlip(), A.ColorJitter(0.4, 0.4, 0.2, 0.1), A.Grayscale(), A.GaussianBlur()]), 700
    x = images(n, 32, 32)
    p = c.sample(n, gen())
    y = c(x, p)
    for s in (slice(0, 255), slice(255, 258), slice(600, 700)):
        assert_close(c(x[s], {k: v[s] for k, v in p.items()}), y[s], 1e-6)
    q = c.sample(n, gen())
    assert all(torch.equal(p[k], q[k]) for k in p)  # the generator decides everything
    z = images(16, 4, 4)  # tiny images with blur
    assert c(z, c.sample(16, gen())).isfinite().all()


def test_a_device_is_never_asked():
    """The meta device has shapes but no values: whatever would wait for a result raises on it."""
    for size, grid in ((32, False), (64, True)):
        c, n, sizes = recipe(size, grid), 6, torch.tensor([[70, 50]] * 6)
        p, x = sampled(c, n, gen(), sizes), images(6, 70, 50)
        y = c(x.to("meta"), p)
        assert y.device.type == "meta" and y.shape == c(x, p).shape and y.dtype == torch.float32
        assert c.augment(torch.empty(n, 3, 64, 64, device="meta"), p).dtype == torch.float32
    assert A.CenterCrop(32, 36)(torch.empty(2, 3, 50, 40, device="meta")).shape == (2, 3, 32, 32)


def test_float_input_in_channels_last_order():
    c, x = A.Compose(recipe(32).ops[1:]), floats(8, 32, 32)
    p = c.sample(8, gen())
    assert_close(c(x.contiguous(memory_format=torch.channels_last), p).contiguous(), c(x, p), 1e-5)


def test_an_explicit_box_wins():
    """A box that stands in the parameters is cut out whatever was sampled, by the crop and by a whole view."""
    x, op = images(4, 40, 40), A.RandomResizedCrop(16)
    box = dict(
        top=torch.zeros(4), left=torch.full((4,), 0.5), height=torch.full((4,), 0.5), width=torch.full((4,), 0.25)
    )
    expected = torch.stack([V2.resized_crop(v, 0, 20, 20, 10, [16, 16], antialias=True) for v in x])
    assert_close(op(x, op.sample(4, gen()) | box), expected, 1)
    view = A.Compose([op, A.HorizontalFlip(0)])
    assert_close(view(x, view.sample(4, gen()) | box), expected.float() / 255, 1.01 / 255)


@pytest.mark.parametrize("pinned, size", [(True, 2**20), (False, 2**20), (False, 2**16)])
@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda"])
def test_only_cuda_is_sent_to_without_waiting_and_from_pinned_memory(kind, pinned, size, monkeypatch):
    calls = []

    class Values:
        device = torch.device("cpu")
        nbytes = size
        is_pinned = lambda self: pinned
        copy_ = lambda self, other: self

        def to(self, device, non_blocking=False):
            calls.append((device.type, non_blocking))

    monkeypatch.setattr(torch, "empty_like", lambda x, pin_memory: calls.append(f"pinned {pin_memory}") or x)
    A.send(Values(), torch.device(kind))
    copied = ["pinned True"] if kind == "cuda" and not pinned and size > 2**16 else []
    assert calls == [*copied, (kind, kind == "cuda")]
