"""Rendered images: what they show, seen by rays of their own, and what a set of them holds."""

import colorsys
import itertools
import math

import common as B

import numpy as np
import torch

torch.set_num_threads(1)


def scenes(n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    boxes, colors = B.random_objects(torch.arange(n) % len(B.BLOCK_CLASSES), rng)
    q = B.quaternion_from_angles((torch.rand(n, 3, generator=rng) - 0.5) * math.pi)
    return boxes, colors, q, *torch.rand(2, n, generator=rng)


def scalar_rotation(q):
    """Hamilton product q v q* on each basis vector: independent of rotation_matrix."""
    u, w = np.array(q[:3]), q[3]
    return np.stack([v + 2 * np.cross(u, np.cross(u, v) + w * v) for v in np.eye(3)], 1)


def scalar_ray(boxes, colors, R, floor, light, px, py):
    """One ray by loops in float64, boxes turned to the world -> hit, RGB, margin to the nearest tie."""
    d, o, best, margin = np.array([px, py, -1.0]), np.array([0, 0, B.CAMERA_DISTANCE]), None, np.inf
    for k in range(len(boxes)):
        t0, t1, normal = -np.inf, np.inf, None
        for a in range(3):
            e = R[:, a]  # the box's axis in the world
            od, oo, c, h = e @ d, e @ o, boxes[k, a], boxes[k, 3 + a] / 2
            if abs(od) < 1e-12:
                assert abs(oo - c) != h
                if abs(oo - c) > h:
                    t0 = np.inf
                continue
            ta, tb = sorted(((c - h - oo) / od, (c + h - oo) / od))
            if ta > t0:
                t0, normal = ta, -np.sign(od) * e
            t1 = min(t1, tb)
        margin = min(margin, abs(t1 - t0))
        if t0 < t1:
            if best:
                margin = min(margin, abs(best[0] - t0))
            if not best or t0 < best[0]:
                best = t0, k, normal
    lrgb = np.array(colorsys.hsv_to_rgb(light, 0.5, 1.0))
    if best is None:
        rgb = np.array(colorsys.hsv_to_rgb(floor, 0.35, 0.6)) * (B.AMBIENT + B.DIFFUSE * lrgb * B.LIGHT_DIRECTION[2])
        return False, rgb * (1 - 2 * (px**2 + py**2)), margin
    cosine = max(0, best[2] @ np.array(B.LIGHT_DIRECTION))
    return True, np.minimum(1, colors[best[1]] * (B.AMBIENT + B.DIFFUSE * lrgb * cosine)), margin


def test_pixels_against_scalar_slabs():
    n, size, checked, hits = 40, 32, 0, 0
    args = scenes(n)
    images, masks = B.render_blocks(*args, size)
    boxes, colors, q, fh, lh = (a.double().numpy() for a in args)
    pick = np.random.default_rng(0)
    for i in range(n):
        R = scalar_rotation(q[i] / np.linalg.norm(q[i]))
        for r, c in pick.integers(0, size, (40, 2)):
            subs = [
                scalar_ray(
                    boxes[i],
                    colors[i],
                    R,
                    fh[i],
                    lh[i],
                    ((2 * c + b + 0.5) / size - 1) * B.HALF_VIEW,
                    -((2 * r + a + 0.5) / size - 1) * B.HALF_VIEW,
                )
                for a in (0, 1)
                for b in (0, 1)
            ]
            if min(s[2] for s in subs) < 1e-4:
                continue  # a ray through an edge: float32 may differ
            checked += 1
            hits += sum(s[0] for s in subs)
            assert masks[i, r, c].item() == (sum(s[0] for s in subs) >= 2), (i, r, c)
            want = 255 * np.mean([s[1] for s in subs], 0)
            assert np.abs(images[i, :, r, c].numpy() - want).max() < 0.51, (i, r, c)
    print("pixels checked", checked, "of", n * 40, "rays on the object", hits)
    assert checked > 1500 and hits > 1000


def test_rotations():
    angles = (torch.rand(50, 3) - 0.5) * math.pi
    q = B.quaternion_from_angles(angles)
    R = B.rotation_matrix(q)
    assert torch.allclose(q.norm(dim=1), torch.ones(50), atol=1e-6)
    for k in range(50):
        (a, b, c), s, co = angles[k].tolist(), math.sin, math.cos
        X = np.array([[1, 0, 0], [0, co(a), -s(a)], [0, s(a), co(a)]])
        Y = np.array([[co(b), 0, s(b)], [0, 1, 0], [-s(b), 0, co(b)]])
        Z = np.array([[co(c), -s(c), 0], [s(c), co(c), 0], [0, 0, 1]])
        assert np.abs(Z @ Y @ X - R[k].numpy()).max() < 1e-5  # extrinsic x, then y, then z


def test_quarter_turn_turns_the_silhouette():
    boxes, colors, _, fh, lh = scenes(10)
    one, turn = (
        torch.tensor([[0, 0, 0, 1.0]]).repeat(10, 1),
        B.quaternion_from_angles(torch.tensor([[0, 0, math.pi / 2]])).repeat(10, 1),
    )
    m0 = B.render_blocks(boxes, colors, one, fh, lh, 48)[1]
    m1 = B.render_blocks(boxes, colors, turn, fh, lh, 48)[1]
    off = (m1 != torch.rot90(m0, 1, (1, 2))).float().mean().item()  # counter-clockwise
    other = (m1 != torch.rot90(m0, -1, (1, 2))).float().mean().item()
    print("quarter turn: differing pixels", off, "; clockwise", other)
    assert off < 2e-4 and other > 0.02


def test_colors_and_hues():
    h, s, v = torch.rand(3, 200)
    want = torch.tensor([colorsys.hsv_to_rgb(*x) for x in zip(h.tolist(), s.tolist(), v.tolist())])
    assert torch.allclose(B.hsv_to_rgb(h, s, v), want, atol=1e-5)
    paint = B.random_objects(torch.tensor([0, 7]).repeat_interleave(400), torch.Generator().manual_seed(3))[
        1
    ]  # (800, K, 3)
    spread, apart = paint[:400].std(0).norm(dim=-1), (paint[:400].mean(0) - paint[400:].mean(0)).norm(dim=-1)
    assert (spread > 0.1).all() and apart.max() > 0.2  # typical of the class, but varied


def test_chunks_and_sizes():
    args = scenes(12)
    a, b = B.render_blocks(*args, 20), B.render_blocks(*args, 20, rays_per_chunk=1)
    assert (a[0].int() - b[0].int()).abs().max() <= 1 and torch.equal(a[1], b[1])
    big = B.render_blocks(*args, 96)[1]
    small = B.render_blocks(*args, 32)[1]
    assert ((big.float().mean((1, 2)) - small.float().mean((1, 2))).abs() < 0.03).all()


def test_data_set(monkeypatch):
    tr, te = B.blocks("train", 16), B.blocks("test", 16)
    for d, m in ((tr, 1500), (te, 500)):
        N = 8 * m
        assert d["images"].shape == (N, 3, 16, 16) and d["images"].dtype == torch.uint8
        assert d["masks"].shape == (N, 16, 16) and d["masks"].dtype == torch.bool
        assert d["boxes"].shape == (N, 4) and d["factors"]["rotation"].shape == (N, 4)
        assert d["labels"].dtype == d["groups"].dtype == torch.int64
        assert (d["labels"].bincount() == N // 10).all() and (d["groups"].bincount() == 8).all()
        assert (d["labels"].view(m, 8) == d["labels"].view(m, 8)[:, :1]).all()
        for k in ("floor_hue", "light_hue"):
            assert d["factors"][k].shape == (N,) and 0 <= d["factors"][k].min() and d["factors"][k].max() < 1
        for mask, box in zip(d["masks"][:400], d["boxes"][:400]):
            r, c = torch.where(mask)
            want = torch.tensor([r.min(), c.min(), r.max() - r.min() + 1, c.max() - c.min() + 1]) / 16
            assert torch.equal(box, want)
    # disjoint objects: no test object has a train object's geometry (nor does a second seed's)
    geo = lambda s, m: B.random_objects(torch.arange(m) % 10, torch.Generator().manual_seed(s))[0].flatten(1)
    assert torch.cdist(geo(0, 1500), geo(1, 500)).min() > 1e-2
    assert torch.cdist(geo(0, 1500), geo(0, 1500)).fill_diagonal_(9).min() > 1e-2
    # the seed alone decides
    monkeypatch.setitem(B.N_OBJECTS, "test", 20)
    few, again, other = (B.blocks("test", 16, seed=seed) for seed in (0, 0, 1))
    flat = lambda d: [v for v in (d | d["factors"]).values() if isinstance(v, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(flat(few), flat(again)))
    assert not torch.equal(few["images"], other["images"])


def test_frame():
    """Objects stay in the sphere of radius 1, whole in the frame, in one piece."""
    boxes, _, q, *_ = scenes(4000, seed=9)
    signs = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]) / 2
    corners = (boxes[:, :, None, :3] + signs * boxes[:, :, None, 3:]).flatten(1, 2)
    assert abs(corners.norm(dim=2).max() - 1) < 1e-5
    w = corners @ B.rotation_matrix(q).mT
    reach = (w[..., :2].abs() / (B.CAMERA_DISTANCE - w[..., 2:])).amax((1, 2)) / B.HALF_VIEW
    print(
        "a corner outside the frame:",
        (reach > 1).float().mean().item(),
        "of objects; at most",
        reach.max().item(),
        "half-frames",
    )
    assert reach.max() <= 1
    gap = (
        (boxes[:, :, None, :3] - boxes[:, None, :, :3]).abs() - (boxes[:, :, None, 3:] + boxes[:, None, :, 3:]) / 2
    ).amax(3)
    assert (torch.linalg.matrix_power((gap < 0).float(), 5) > 0).all()  # every object is in one piece


def test_no_class_is_symmetric():
    """Volume overlap of each class with itself under the 47 other symmetries of the cube."""
    grid = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    inside = lambda p, x: ((x[:, None] - p[:, :3]).abs() < p[:, 3:] / 2).all(2).any(1)
    worst = {1: 0, -1: 0}  # rotations, reflections
    for p in torch.tensor(list(B.BLOCK_CLASSES.values())):
        lo, hi = (p[:, :3] - p[:, 3:] / 2).amin(0), (p[:, :3] + p[:, 3:] / 2).amax(0)
        p = torch.cat([p[:, :3] - (lo + hi) / 2, p[:, 3:]], 1)
        me = inside(p, grid)
        for perm in itertools.permutations(range(3)):
            for signs in itertools.product((1.0, -1.0), repeat=3):
                M = torch.eye(3)[list(perm)] * torch.tensor(signs)
                if torch.equal(M, torch.eye(3)):
                    continue
                you, det = inside(p, grid @ M.T), round(torch.det(M).item())
                worst[det] = max(worst[det], ((me & you).sum() / (me | you).sum()).item())
    print("largest overlap with a rotated copy", round(worst[1], 3), "with a mirrored copy", round(worst[-1], 3))
    assert worst[1] < 0.85 and worst[-1] < 0.95


def test_turntable():
    """Every object in its sessions from every side: upright, whole, smaller from afar, in unseen sessions on test
    images."""
    d, e = B.blocks_views("train", 12), B.blocks_views("test", 12)
    assert len(d["images"]) == 50 * 2 * 108 and len(e["images"]) == 20 * 9 * 36
    assert d["factors"]["session"].unique().tolist() == [0, 1] and e["factors"]["session"].unique().tolist() == list(
        range(2, 11)
    )
    assert (d["labels"].bincount() == 1080).all() and (e["labels"].bincount() == 648).all()
    view = d["factors"]["view"].view(100, 108, 3)
    assert (
        (view == view[0]).all()
        and len(view[0].unique(dim=0)) == 108
        and (d["groups"].view(100, 108) == d["groups"].view(100, 108)[:, :1]).all()
    )
    for s in range(2, 11):  # 36 views of each object in each session, all distances, elevations and azimuths among them
        v = e["factors"]["view"][(e["factors"]["session"] == s) & (e["groups"] == 3)]
        assert len(v) == 36 and [len(v[:, k].unique()) for k in range(3)] == [12, 3, 3]
    area = torch.stack([d["masks"][d["factors"]["view"][:, 2] == r].float().mean() for r in (4, 5, 6)])
    assert torch.allclose(area * torch.tensor([16.0, 25, 36]), area[0] * 16, rtol=0.15)
    corner = lambda s: d["images"][d["factors"]["session"] == s][:, :, 0, 0].float().mean(0)  # the floor
    assert (corner(0) - corner(1)).abs().max() > 20


def test_a_view_turns_the_object_about_its_vertical_and_tilts_it_to_the_camera():
    """A box on the object's right is at the left after half a turn; from above its top is seen."""
    half = lambda degrees: math.radians(degrees) / 2
    turn = lambda a: torch.tensor([[0, math.sin(half(a)), 0, math.cos(half(a))]])
    tilt = lambda a: torch.tensor([[math.sin(half(a)), 0, 0, math.cos(half(a))]])
    R = B.rotation_matrix(B.multiply(tilt(30), turn(90)))[0]
    assert torch.allclose(
        R @ torch.tensor([0.0, 1, 0]), torch.tensor([0, math.cos(math.pi / 6), 0.5]), atol=1e-6
    )  # up leans to the camera
    assert torch.allclose(
        R @ torch.tensor([0.0, 0, 1]), torch.tensor([1.0, 0, 0]), atol=1e-6
    )  # its front looks to the right


def test_D15_quaternions_are_unit_and_keep_the_sign_of_the_formula():
    """Of 1,000 rotations: norm 1, so never 0; along a turn the target moves by small steps and passes w < 0 without a
    jump."""
    draw = torch.Generator().manual_seed(0)
    q = B.quaternion_from_angles((torch.rand(1000, 3, generator=draw) - 0.5) * math.pi)
    pose = B.pose_target("pose", dict(rotation=q), torch.arange(500), torch.arange(500, 1000))
    assert (
        (q.norm(dim=1) - 1).abs().max() < 1e-6 and (pose.norm(dim=1) - 1).abs().max() < 1e-6 and (pose[:, 3] < 0).any()
    )
    turn = B.quaternion_from_angles(torch.linspace(0, 2 * math.pi, 1001)[:, None] * torch.tensor([[0.0, 0.0, 1.0]]))
    assert turn.diff(dim=0).norm(dim=1).max() < 0.01 and turn[-1, 3] < -0.999
