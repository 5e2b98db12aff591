"""Dense tasks: check values of the metrics, planted signals, the layouts of the published sets, user mistakes."""

import json
import math
import shutil
import types

import clever
import common
import eval_dense as ed
import eval_probe
import recon_xattn  # noqa: F401

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from test_cli import expect_mistake
from test_distributed import on_ranks

g = common.rng("dense")


# ---- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "matrix, iou, scores",
    [
        ([[3, 1], [2, 4]], [0.5, 0.571429], (0.535714, 0.708333, 0.7)),
        ([[3, 1, 0], [2, 4, 0], [0, 0, 0]], [0.5, 0.571429, math.nan], (0.535714, 0.708333, 0.7)),
        ([[3, 0, 1], [2, 4, 0], [0, 0, 0]], [0.5, 0.666667, 0.0], (0.388889, 0.708333, 0.7)),
    ],
)
def test_segmentation_scores(matrix, iou, scores):
    means, of_classes = ed.segmentation_scores(torch.tensor(matrix))
    assert np.allclose(of_classes, iou, atol=1e-6, equal_nan=True)
    assert np.allclose(list(means.values()), scores, atol=1e-6)


def test_confusion_matrix():
    truth, predicted = torch.tensor([[0, 0, 255], [1, 1, 2]]), torch.tensor([[0, 1, 1], [1, 1, 0]])
    matrix = ed.confusion_matrix(truth, predicted, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert np.allclose(list(ed.segmentation_scores(matrix)[0].values()), (0.333333, 0.5, 0.6), atol=1e-6)
    truth = torch.randint(5, (40, 40), generator=g)
    assert set(ed.segmentation_scores(ed.confusion_matrix(truth, truth, 5))[0].values()) == {1.0}


def square(size, top, left, side):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_boundaries():
    assert ed.boundary(square(40, 12, 12, 10)).sum() == 40 and ed.boundary(square(40, 12, 12, 4)).sum() == 16
    assert ed.boundary(square(40, 12, 30, 10)).sum() == 31 and ed.boundary(square(40, 0, 0, 40)).sum() == 0
    assert ed.boundary(square(4, 0, 0, 4) & (torch.arange(4) < 2)).nonzero().tolist() == [[i, 1] for i in range(4)]


def test_boundaries_by_a_loop():
    mask = torch.rand(9, 7, generator=g) > 0.5
    for i in range(9):
        for j in range(7):
            a, b = min(i + 1, 8), min(j + 1, 6)
            others = [mask[i, b], mask[a, j], mask[a, b]]
            assert ed.boundary(mask)[i, j] == any(o != mask[i, j] for o in others)


@pytest.mark.parametrize(
    "size, side, shift, J, f",
    [
        *[(40, 10, d, J, f) for d, J, f in [(1, 0.818182, 1), (2, 0.666667, 0.55), (3, 0.538462, 0.5)]],
        *[(96, 24, d, J, f) for d, J, f in [(1, 0.92, 1), (2, 0.846154, 1), (4, 0.714286, 0.520833)]],
        (40, 10, 5, 0.333333, 0.4),
        (40, 10, 0, 1, 1),
    ],
)
def test_j_and_f_of_a_shifted_square(size, side, shift, J, f):
    a, b = square(size, 8, 8, side), square(size, 8, 8 + shift, side)
    assert abs(ed.jaccard(a, b) - J) < 1e-6 and abs(ed.boundary_f(a, b) - f) < 1e-6
    assert abs(ed.boundary_f(b, a) - f) < 1e-6


def test_j_and_f_of_empty_masks():
    none, some, full = square(40, 0, 0, 0), square(40, 3, 3, 5), square(40, 0, 0, 40)
    assert ed.jaccard(none, none) == ed.boundary_f(none, none) == 1
    assert ed.jaccard(none, some) == ed.boundary_f(none, some) == ed.boundary_f(some, none) == 0
    assert ed.boundary_f(full, none) == 1 and ed.jaccard(full, none) == 0


def test_over_time():
    found = ed.over_time([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    assert np.allclose([found["mean"], found["recall"], found["decay"]], [0.55, 0.5, 0.5])


def test_f_beta():
    left, top, none = (
        torch.tensor([[1, 0], [1, 0]]).bool(),
        torch.tensor([[1, 1], [0, 0]]).bool(),
        torch.zeros(2, 2) > 0,
    )
    one, all_of_it = left & top, torch.ones(2, 2) > 0
    cases = [(left, top, 0.5), (one, top, 0.8125), (top, one, 0.565217), (top, ~top, 0), (left, left, 1)]
    cases += [(none, top, 0), (top, none, 0), (none, none, 1), (all_of_it, top, 0.565217)]
    assert np.allclose([ed.f_beta(mask, truth) for mask, truth, _ in cases], [f for *_, f in cases], atol=1e-6)


def test_f_beta_is_that_of_every_threshold():
    """TokenCut's code takes the maximum over 255 thresholds; they cut a mask of 0 and 1 at the same pixels."""
    mask, truth = torch.rand(2, 5, 6, generator=g) > 0.5
    for k in range(0, 255, 50):
        cut = mask.float() > k / 255
        p, r = (cut & truth).sum() / cut.sum(), (cut & truth).sum() / truth.sum()
        assert abs(ed.f_beta(mask, truth) - 1.3 * p * r / (0.3 * p + r)) < 1e-6


def of_coco(*rows):
    """(image, class, x1, y1, x2, y2[, iscrowd or score]) -> dicts of COCO."""
    out = []
    for i, (image, c, x1, y1, x2, y2, *more) in enumerate(rows):
        w, h = x2 - x1, y2 - y1
        out.append(dict(id=i + 1, image_id=image, category_id=c, bbox=[x1, y1, w, h], area=w * h, iscrowd=0, score=0.9))
        if more:
            out[-1]["iscrowd" if more[0] == 1 else "score"] = more[0]
    return out


def ap(truths, found):
    images = [dict(id=i) for i in sorted({t["image_id"] for t in truths})]
    categories = [dict(id=c) for c in sorted({t["category_id"] for t in truths})]
    return ed.average_precision(dict(info={}, images=images, annotations=truths, categories=categories), found)


box, other = (0, 1, 0, 0, 10, 10), (0, 1, 20, 20, 30, 30)
AP_CASES = {
    "IoU .82": ([box], [(0, 1, 0, 0, 10, 8.2)], (0.7, 1, 1)),
    "lower false": ([box], [(0, 1, 0, 0, 10, 8.2), (*other, 0.5)], (0.7, 1, 1)),
    "higher false": ([box], [(0, 1, 0, 0, 10, 8.2), (*other, 0.95)], (0.35, 0.5, 0.5)),
    "one of two": ([box, other], [box], (0.504950,) * 3),
    "twice": ([box, other], [box, (*box, 0.5)], (0.504950,) * 3),
    "false between": ([box, other], [box, (0, 1, 50, 50, 60, 60, 0.8), (*other, 0.7)], (0.834983,) * 3),
    "one class of two": ([box, (0, 2, 20, 20, 30, 30)], [box], (0.5,) * 3),
    "crowd": (
        [box, (0, 1, 40, 40, 80, 80, 1)],
        [(*box, 0.7), (0, 1, 45, 45, 55, 55, 0.9), (0, 1, 60, 60, 70, 70, 0.8)],
        (1, 1, 1),
    ),
    "truth": ([box, other, (1, 2, 3, 3, 9, 9)], [box, other, (1, 2, 3, 3, 9, 9)], (1, 1, 1)),
    "nothing": ([box], [], (0, 0, 0)),
}


@pytest.mark.parametrize("name", AP_CASES)
def test_average_precision(name):
    pytest.importorskip("pycocotools")
    truths, found, expected = AP_CASES[name]
    assert np.allclose(list(ap(of_coco(*truths), of_coco(*found)).values()), expected, atol=1e-6)


# ---- scenes --------------------------------------------------------------------------------------


def test_scenes_hold_what_they_say():
    found = ed.scenes("test", 96, 12)
    images, ids, labels = found["images"], found["ids"], found["labels"]
    assert images.shape == (12, 3, 96, 96) and images.dtype == ids.dtype == torch.uint8 and labels.shape == (12, 5)
    there = (labels >= 0).sum(1)
    assert {1, 4} <= set(there.tolist()) <= {1, 2, 3, 4, 5} and all(i.max() <= n for i, n in zip(ids, there))
    again, train = ed.scenes("test", 96, 3), ed.scenes("train", 96, 3)
    assert torch.equal(again["images"], images[:3]) and not torch.equal(train["images"], images[:3])

    # The boxes are those of the visible pixels.
    boxes = ed.boxes_of_scenes(**found)
    for i, box, label in zip(boxes.of.tolist(), boxes.boxes.tolist(), boxes.labels.tolist()):
        left, top, right, bottom = map(int, box)
        inside = [ids[i] == k + 1 for k in range(5) if labels[i, k] == label]
        assert any(m.any() and m[top:bottom, left:right].sum() == m.sum() for m in inside)
    pixels = ed.pixels_of(ids, F.pad(labels + 1, (1, 0)))
    assert (pixels[ids == 0] == 0).all() and pixels[0][ids[0] == 1].unique() == labels[0, 0] + 1


def test_scenes_of_one_object_and_moving_ones():
    one = ed.single_objects("test", 96, 4)
    assert one["ids"].unique().tolist() == [0, 1] and (one["ids"].float().mean((1, 2)) > 0.03).all()
    found = ed.moving_scenes("test", 96, 2)
    assert found["images"].shape == (32, 3, 96, 96) and all(i.unique().tolist() == [0, 1, 2] for i in found["ids"])
    places = common.bounding_boxes(found["ids"][:16] == 2)[:, :2] * 96
    assert (places.diff(dim=0).abs() < 8).all() and (places[0] != places[-1]).any()


def test_scenes_of_large_encoders_are_the_same_scenes():
    small, large = ed.scenes("test", 96, 2), ed.scenes("test", 384, 2)
    there = F.avg_pool2d((large["ids"] > 0).float()[:, None], 4)[:, 0]
    assert ((there > 0.5) == (small["ids"] > 0)).float().mean() > 0.99
    assert ed.scene_size(64) == 96 and ed.scene_size(96) == 384


# ---- encoders that see what is planted -----------------------------------------------------------


class Stub(nn.Module):
    """An encoder of patches of 8 px. Its tokens are the one-hot number of the patch's most frequent red level, times
    `signal`, beside a constant. Keys are the tokens."""

    feature, dim, depth, img_size, inv, mean, std = "stub", 13, 4, 32, None, (0.0,) * 3, (1.0,) * 3

    def __init__(self, signal=1.0):
        super().__init__()
        self.signal, self.attn = signal, nn.Module()
        self.attn.qkv, self.attn.num_heads = nn.Identity(), 1
        self.attn.q_norm = self.attn.k_norm = nn.Identity()
        self.blocks, self.statistics = [self], nn.BatchNorm1d(3)

    def tokens(self, x, after):
        level = (x[:, :1] * 255).round()  # (B, 1, H, W)
        votes = F.avg_pool2d((level == torch.arange(12).view(1, 12, 1, 1)).float(), 8).argmax(1)
        votes = F.one_hot(votes, 12).float()  # (B, h, w, 12)
        z = F.pad(votes * self.signal, (0, 1), value=0.1)
        return [z] * len(after) if isinstance(after, tuple) else z

    def forward(self, x):
        z = self.tokens(x, 4).flatten(1, 2)
        self.attn.qkv(torch.cat([z, z, z], 2))
        return z.mean(1)


def stub(signal=1.0):
    return ed.Encoder(Stub(signal), "stub", torch.device("cpu"))


def painted(ids):
    """Images whose red level is the number of each pixel."""
    return F.pad(ids[:, None], (0, 0, 0, 0, 0, 2))


def to_grid_and_back(labels, n, cells):
    """What a perfect map of cells x cells patches knows of labels (N, H, W): their majority in each patch."""
    votes = F.one_hot(labels.long(), n).permute(0, 3, 1, 2).float()
    grid = F.adaptive_avg_pool2d(votes, cells).argmax(1)  # (N, cells, cells)
    return F.interpolate(grid[:, None].float(), labels.shape[1:], mode="nearest")[:, 0].long()


def arguments(*flags):
    return common.parse(ed.Args, lambda first: {}, ["--device", "cpu", "--workers", "0", *flags])


@pytest.fixture(scope="module")
def planted():
    """Segmentation of scenes whose pixels show their class."""
    sets = {}
    for split, n in (("train", 24), ("test", 8)):
        found = ed.scenes(split, 96, n)
        pixels = ed.pixels_of(found["ids"], F.pad(found["labels"] + 1, (1, 0)))
        sets[split] = ed.Pairs(painted(pixels), pixels)
    return sets


def miou_of_grid(pairs, cells=12):
    truth = pairs.masks.long()
    return 100 * ed.segmentation_scores(ed.confusion_matrix(truth, to_grid_and_back(truth, 11, cells), 11))[0]["mIoU"]


def test_segmentation_sees_what_is_planted(planted):
    encoder, args = stub(), arguments("--steps", "40", "--lr", "0.1", "--batch-size", "4")
    scores, details = ed.segmentation(encoder, planted, "scenes", args, None)
    assert scores["mIoU"] > miou_of_grid(planted["test"]) - 4 and details["head"] == "linear"
    blind, _ = ed.segmentation(stub(0.0), planted, "scenes", args, None)
    background = (planted["test"].masks == 0).float().mean().item()
    present = len(planted["test"].masks.unique())
    assert abs(blind["aAcc"] - 100 * background) < 1e-4 and abs(blind["mIoU"] - 100 * background / present) < 1e-4


def test_upernet_sees_what_is_planted(planted):
    args = arguments("--head", "upernet", "--steps", "60", "--batch-size", "2", "--lr", "0.003")
    scores, _ = ed.segmentation(stub(), planted, "scenes", args, None)
    assert scores["mIoU"] > miou_of_grid(planted["test"]) - 12, scores


def test_video_sees_what_is_planted():
    ids = ed.moving_scenes("test", 96, 1)["ids"][None]  # (1, 16, 96, 96)
    sequences = [ed.Sequence(str(i), ed.Pairs(painted(v), v)) for i, v in enumerate(ids)]
    scores, details = ed.video(stub(), sequences, "scenes", arguments(), None)
    limit = [
        ed.jaccard(to_grid_and_back(v[t : t + 1], 3, 24)[0] == k, v[t] == k)
        for v in ids
        for t in range(1, 15)
        for k in (1, 2)
    ]
    assert scores["J"] > 100 * np.mean(limit) - 4 and len(details["objects"]) == 2
    blind, _ = ed.video(stub(0.0), sequences, "scenes", arguments(), None)
    assert blind["J"] < 20


def test_saliency_sees_what_is_planted(capsys):
    ids = ed.single_objects("test", 96, 6)["ids"]
    scores, details = ed.saliency(stub(), ed.Pairs(painted(ids), ids), "scenes", arguments(), None)
    limit = np.mean([ed.jaccard(to_grid_and_back(m[None], 2, 24)[0] > 0, m > 0) for m in ids])
    assert scores["saliency IoU"] > 100 * limit - 6 and details["feature"] == "keys of the last block"
    blind, _ = ed.saliency(stub(0.0), ed.Pairs(painted(ids), ids), "scenes", arguments(), None)
    assert all(math.isfinite(v) for v in blind.values()) and blind["saliency IoU"] < 50
    assert scores["saliency cut"] == 100 and blind["saliency cut"] == 0
    assert "in 100 % of the images all patches are alike" in capsys.readouterr().err


def test_detection_sees_what_is_planted():
    pytest.importorskip("pycocotools")
    sets = {}
    for split, n in (("train", 16), ("test", 6)):
        found = ed.scenes(split, 96, n)
        pixels = ed.pixels_of(found["ids"], F.pad(found["labels"] + 1, (1, 0)))
        sets[split] = ed.boxes_of_scenes(painted(pixels), found["ids"], found["labels"])
    args = arguments("--steps", "40", "--batch-size", "2")
    scores, details = ed.detection(stub(), sets, "scenes", args, None)
    blind, _ = ed.detection(stub(0.0), sets, "scenes", args, None)
    assert scores["AP50"] > 25 and blind["AP50"] < 5 and details["metric"] == "pycocotools"


# ---- video ---------------------------------------------------------------------------------------


def test_propagation():
    target = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    context = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]])
    weights = [[0.880797, 0.119203, 0], [0, 0.832018, 0.167982], [0, 0.017986, 0.982014]]
    for radius in (3, 1):
        found = ed.similar_patches(target, context, ed.near(1, 3, radius, "cpu"), k=2)
        assert np.allclose(found, weights, atol=1e-6)
    assert np.allclose(found @ torch.tensor([1.0, 0, 0]), [0.880797, 0, 0], atol=1e-6)


def test_patches_far_away_have_no_say():
    f = F.normalize(torch.rand(2, 20, 3, generator=g), dim=2)
    weights = ed.similar_patches(f[0], f, ed.near(1, 20, 12, "cpu"))
    assert torch.allclose(weights.sum(1), torch.ones(20)) and (weights > 0).sum(1).max() == 5
    assert (weights[0, 13:20] == 0).all() and (weights[0, 33:] == 0).all()
    apart = ed.near(3, 20, 1, "cpu")
    assert apart[0].nonzero()[:, 0].tolist() == [0, 1, 20, 21]


def test_propagation_by_a_loop():
    f, labels, h, w = F.normalize(torch.rand(3, 12, 4, generator=g).double(), dim=2), torch.rand(24, 2), 3, 4
    found = ed.similar_patches(f[2], f[:2], ed.near(h, w, 2, "cpu")) @ labels.double()
    for i in range(12):
        weights = []
        for j in range(24):
            k = j % 12
            apart = max(abs(i // w - k // w), abs(i % w - k % w))
            weights.append(math.exp(float(f[2, i] @ f[j // 12, k]) / 0.1) * (apart <= 2))
        fifth = sorted(weights)[-5]
        kept = [v if v >= fifth else 0.0 for v in weights]
        expected = sum(v * labels[j].double() for j, v in enumerate(kept)) / sum(kept)
        assert torch.allclose(found[i], expected)


def test_stretched():
    soft = torch.tensor([[[0.2, 0.4, 0.6]], [[0.0, 0.0, 0.0]], [[0.3, 0.3, 0.3]]])
    assert np.allclose(ed.stretched(soft)[:, 0], [[0, 0.5, 1], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    "size, patch, shown",
    [
        ((480, 854), 16, (480, 832)),
        ((480, 910), 8, (480, 896)),
        ((480, 640), 16, (480, 640)),
        ((854, 480), 16, (832, 480)),
        ((480, 480), 16, (480, 448)),
        ((480, 860), 14, (476, 854)),
    ],
)
def test_size_at_which_davis_is_shown(size, patch, shown):
    assert ed.shown_size(*size, patch) == shown


def test_a_video_that_stands_still_keeps_its_labels():
    ids = ed.moving_scenes("test", 96, 1)["ids"][:1].repeat(4, 1, 1)
    sequence = ed.Sequence("still", ed.Pairs(painted(ids), ids))
    grid = to_grid_and_back(ids[:1], 3, 24)[0]
    for predicted, _ in ed.follow(stub(), sequence.frames, davis=False):
        assert (predicted == grid).float().mean() > 0.97


def test_weights_are_computed_in_blocks(monkeypatch):
    """With patches of 4 px all weights of a frame of DAVIS would take 20 GB."""
    ids = ed.moving_scenes("test", 96, 1)["ids"][:4]
    frames, sizes, whole = ed.Pairs(painted(ids), ids), [], ed.similar_patches

    def recorded(target, context, mask):
        sizes.append(len(target) * context.shape[0] * context.shape[1])
        return whole(target, context, mask)

    monkeypatch.setattr(ed, "similar_patches", recorded)
    found = [predicted for predicted, _ in ed.follow(stub(), frames, davis=False)]
    assert sizes == [n * 576**2 for n in (1, 2, 3)]
    monkeypatch.setattr(ed, "BLOCK", 100_000, raising=False)
    again = [predicted for predicted, _ in ed.follow(stub(), frames, davis=False)]
    assert max(sizes[3:]) <= 100_000 and all(map(torch.equal, found, again))


def test_near_patches_by_a_loop():
    for i, row in enumerate(ed.near(4, 5, 2, "cpu").tolist()):
        apart = [max(abs(i // 5 - j // 5), abs(i % 5 - j % 5)) for j in range(20)]
        assert row == [d <= 2 for d in apart]


def test_palette():
    colours = torch.tensor(ed.palette()).view(256, 3).tolist()
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0)}
    expected |= {15: (192, 128, 128), 255: (224, 224, 192)}
    assert all(tuple(colours[i]) == c for i, c in expected.items())


# ---- saliency ------------------------------------------------------------------------------------


def test_token_cut_of_two_features():
    f = torch.eye(2)[[0, 0, 1, 1, 1, 1, 1, 1]]
    mask, v, cut = ed.token_cut(f, (2, 4))
    assert cut
    assert mask.flatten().nonzero()[:, 0].tolist() == [0, 1]
    assert abs(v.flatten()[0] / v.flatten()[-1] + 8.99976) < 1e-4

    # The same by the generalised problem: (D - W) v = lambda D v.
    W = torch.where(f @ f.T > 0.2, 1.0, 1e-5).double()
    D, v = W.sum(1).diag(), v.flatten()
    value = (v @ (D - W) @ v) / (v @ D @ v)
    assert abs(value / 3.33324222e-5 - 1) < 1e-6 and torch.allclose((D - W) @ v, value * (D @ v), atol=1e-12)


def test_token_cut_finds_an_object_in_noise():
    grid = square(6, 1, 2, 3)
    f = torch.eye(2)[grid.long().flatten()] + 0.05 * torch.randn(36, 2, generator=g)
    assert torch.equal(ed.token_cut(f, (6, 6))[0], grid)
    mask, v, cut = ed.token_cut(torch.ones(36, 2), (6, 6))
    assert not cut and v.isfinite().all() and mask.any()


def test_token_cut_keeps_one_component():
    grid = torch.zeros(5, 5, dtype=torch.bool)
    grid[0, 0] = grid[1, 1] = grid[1, 2] = True  # two components: they touch at a corner
    mask, *_ = ed.token_cut(torch.eye(2)[grid.long().flatten()], (5, 5))
    assert mask.nonzero().tolist() in ([[0, 0]], [[1, 1], [1, 2]])


def test_alike_is_a_cosine_above_a_fifth():
    f = torch.tensor([[1.0, 0.0], [0.3, 0.9539392]])[[0, 0, 1, 1, 1, 1]]
    _, v, cut = ed.token_cut(f, (2, 3))
    assert not cut
    W = torch.ones(6, 6).double()
    assert torch.allclose(W @ v.flatten(), torch.zeros(6).double(), atol=1e-9)  # one cluster: lambda is 1


def test_sides_are_multiples_of_the_stride():
    encoder = stub()
    encoder.stride = 16
    assert encoder.fit(296, 312, 264) == (288, 320, 256)


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.usefixtures("pico")
def test_attention_is_that_of_the_last_block(late):
    common.seed_everything("attention")
    how = dict(arch="vit_pico", img_size=16, patch_size=4, cls_layer=late)
    backbone = common.make_backbone(mean=(0.5,) * 3, std=(0.5,) * 3, **how).eval()
    encoder, x = ed.Encoder(backbone, "vit", torch.device("cpu")), torch.randn(2, 3, 16, 24, generator=g)
    q, k = encoder.attend(x)
    assert encoder.stride == 4 and q.shape == k.shape == (2, 4, 25, 32)

    # The block's output follows from its queries and keys.
    block, z = backbone.blocks[-1], backbone.run_blocks(x, (5,))[1][5].detach()
    v = block.attn.qkv(block.norm1(z)).unflatten(2, (3, 4, 32)).permute(2, 0, 3, 1, 4)[2]
    mixed = ((q @ k.mT / 32**0.5).softmax(3) @ v).transpose(1, 2).flatten(2)
    z = z + block.attn.proj(mixed)
    z = z + block.mlp(block.norm2(z))
    assert torch.allclose(backbone.norm(z)[:, 1:].mT.unflatten(2, (4, 6)), encoder.last(x), atol=1e-5)


def test_pictures_are_cut_at_their_own_size():
    image = torch.randint(255, (3, 50, 37), dtype=torch.uint8, generator=g)
    features, shape, attention = ed.cut_features(stub(), image)
    assert shape == (6, 5) and features.shape == (30, 13) and attention.shape == (6, 5)
    assert abs(attention.sum() - 1) < 1e-5


# ---- segmentation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, starts", [(512, [0]), (683, [0, 171]), (700, [0, 188]), (853, [0, 341]), (1024, [0, 341, 512])]
)
def test_windows(n, starts):
    assert [(begin, begin + 512) for begin in starts] == ed.windows(n, 512, 341)


def test_windows_of_an_image_that_is_too_small():
    assert ed.windows(300, 512, 341) == [(0, 300)]


def test_sliding_gives_back_what_the_head_gives():
    x = torch.rand(1, 3, 37, 61, generator=g)
    assert torch.allclose(ed.sliding_logits(lambda part: part, x, 24, 8), x[0], atol=1e-6)


def test_rates():
    rates = [1e-3 * ed.polynomial(t, 40_000) for t in (0, 750, 1500, 20_000, 39_999)]
    assert np.allclose(rates, [1.0e-9, 4.90625e-4, 9.625e-4, 5.0e-4, 2.5e-8], rtol=1e-5)
    rates = [ed.stepwise(t, 45_000) for t in (0, 125, 250, 29_999, 30_000, 40_000)]
    assert np.allclose(rates, [0.001, 0.5005, 1, 1, 0.1, 0.01])


def test_recipes():
    """Those of DINOv2's and mmsegmentation's files, and what flags replace."""
    setting = lambda *flags: list(ed.recipe("segmentation", "ade20k", arguments(*flags)).values())
    assert setting() == [40_000, 16, 1e-3, 1e-4] and setting("--head", "upernet") == [160_000, 16, 6e-5, 0.01]
    flags = ["--head", "upernet", "--steps", "80000", "--batch-size", "8", "--lr", "1e-4"]
    assert setting(*flags) == [80_000, 8, 1e-4, 0.01]
    assert list(ed.recipe("detection", "coco", arguments()).values()) == [45_000, 32, 1e-4, 0.1]
    for words in ("512 x 512", "40,000 steps of 16", "160,000 at 6e-5", "1,500 steps"):
        assert words in " ".join(ed.__doc__.split())


def test_linear_head():
    encoder = stub()
    encoder.dim = 384
    assert sum(p.numel() for p in ed.LinearHead(encoder, 150).parameters()) == 58_518


def test_views_of_ade20k():
    image = torch.randint(255, (3, 60, 90), dtype=torch.uint8, generator=g)
    mask = torch.arange(90).expand(60, -1).div(30, rounding_mode="floor").to(torch.uint8)
    small = ed.scaled(image, mask, 80, 30)
    assert small[0].shape == (3, 30, 45) and small[1].shape == (30, 45) and small[1].unique().tolist() == [0, 1, 2]
    for i in range(6):
        x, y = ed.ade_view(1000, (0.5, 0.4, 0.3), image, mask, common.rng("ade", i))
        assert x.shape == (3, 1000, 1000) and y.shape == (1000, 1000) and x.dtype == y.dtype == torch.uint8
        outside = y == ed.IGNORE
        assert (x[:, outside] == torch.tensor([128, 102, 76])[:, None]).all() and set(y.unique().tolist()) > {0, 255}
    again = ed.ade_view(1000, (0.5, 0.4, 0.3), image, mask, common.rng("ade", 5))
    assert torch.equal(again[0], x) and torch.equal(again[1], y)


def test_a_batch_without_labels_costs_nothing():
    sets = dict.fromkeys(
        ("train", "test"), ed.Pairs(torch.zeros(4, 3, 96, 96).byte(), torch.full((4, 96, 96), 255).byte())
    )
    args = arguments("--steps", "2", "--batch-size", "2")
    scores, _ = ed.segmentation(stub(), sets, "scenes", args, None)
    assert math.isnan(scores["mIoU"])


def test_a_loss_that_is_not_finite_ends_the_task(planted, capsys):
    with pytest.raises(SystemExit) as end:
        ed.segmentation(stub(math.inf), planted, "scenes", arguments("--steps", "3", "--batch-size", "2"), None)
    assert end.value.code == 1 and "step 0" in capsys.readouterr().err


def tiny_vit(seed=0, patch=4, side=16):
    common.seed_everything("tiny", seed)
    how = dict(arch="vit_pico", img_size=side, patch_size=patch)
    return common.make_backbone(mean=(0.4,) * 3, std=(0.2,) * 3, **how).eval().requires_grad_(False)


def frozen(task, data, *flags):
    """A task on one rank: its result, and whether the encoder is as before."""
    encoder = ed.Encoder(tiny_vit(0, 16, 32), "vit", torch.device("cpu"))
    before = {k: v.clone() for k, v in encoder.backbone.state_dict().items()}
    scores, details = ed.TASKS[task](encoder, data, "scenes", arguments(*flags), None)
    after = encoder.backbone.state_dict()
    same = all(torch.equal(after[k], v) for k, v in before.items()) and not encoder.backbone.training
    return dict(scores), same, str(details)


@pytest.mark.parametrize(
    "task, flags",
    [
        ("segmentation", ["--steps", "10", "--batch-size", "4"]),
        ("segmentation", ["--steps", "2", "--batch-size", "4", "--head", "upernet"]),
        ("video", []),
        ("saliency", []),
        ("detection", ["--steps", "2", "--batch-size", "2"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v[4:]),
)
def test_any_number_of_processes_and_a_frozen_encoder(task, flags, tmp_path):
    if task == "detection":
        pytest.importorskip("pycocotools")
    data = ed.load(task, "scenes", None, 96, 2 if task == "video" else 4)
    (alone, same, details), *_ = on_ranks(1, tmp_path, frozen, task, data, *flags)
    both = on_ranks(2, tmp_path, frozen, task, data, *flags)
    assert same and all(unchanged for _, unchanged, _ in both) and both[0][0] == both[1][0]
    if task in ("video", "saliency"):
        assert alone == both[0][0] and details == both[0][2]
    elif task == "segmentation" and "upernet" not in flags:  # dropout is drawn by each rank
        assert np.allclose(list(alone.values()), list(both[0][0].values()), atol=1e-4)


def test_shares_of_a_step_make_up_the_batch(monkeypatch):
    pairs = ed.Pairs(torch.arange(10).view(10, 1, 1, 1).expand(10, 3, 2, 2).byte(), torch.zeros(10, 2, 2).byte())
    keep = lambda image, mask, generator: (int(image[0, 0, 0]), float(torch.rand((), generator=generator)))
    alone = ed.Steps(pairs, keep, 0, 4)
    order = [row for step in range(5) for row, _ in alone[step]]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(common, "rank", lambda: 1)
    assert ed.Steps(pairs, keep, 0, 4)[3] == alone[3][2:]


# ---- figures -------------------------------------------------------------------------------------


def test_full_gradients_of_a_net_by_hand():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    for layer, w, b in zip(net[::2], ([[1.0, -1], [2, 1]], [[1.0, 3]]), ([0.5, -1.0], [0.25])):
        layer.weight.data, layer.bias.data = torch.tensor(w), torch.tensor(b)
    logits, parts = ed.full_gradients(net, torch.tensor([[1.0, 2.0]]))
    assert logits.item() == 9.25 and [(v * d).sum().item() for v, d in parts] == [12.0, -3.0, 0.25]


def test_bias_of_a_batch_norm():
    norm = nn.BatchNorm2d(1, eps=1.0)
    for name, value in dict(weight=2.0, bias=1.0, running_mean=3.0, running_var=3.0).items():
        getattr(norm, name).data.fill_(value)
    assert ed.bias_of(norm).item() == -2


def test_psi():
    assert torch.allclose(ed.psi(torch.tensor([[[-2.0, 0], [1, 4]]])), torch.tensor([[0.5, 0, 0.25, 1]]), atol=1e-6)
    assert (ed.psi(torch.full((1, 2, 2), 3.0)) == 0).all()


def tiny_resnet(coords=False):
    common.seed_everything("resnet")
    how = dict(arch="resnet_pico", img_size=16, stem="cifar", coords=coords)
    backbone = common.make_backbone(mean=(0.4,) * 3, std=(0.2,) * 3, **how)
    backbone.train()(torch.randn(64, 3, 16, 16, generator=g))  # statistics of batch norms
    return backbone.eval().requires_grad_(False)


@pytest.mark.parametrize("coords", [False, True])
def test_full_gradients_are_complete(coords):
    model = nn.Sequential(tiny_resnet(coords), nn.Linear(128, 5)).double().eval().requires_grad_(False)
    x = torch.randn(3, 3, 16, 16, generator=g).double()
    logits, parts = ed.full_gradients(model, x)
    (image, gradient), *layers = parts
    assert image.shape[1] == 3 + 2 * coords and torch.allclose(logits, model(x).max(1).values)
    total = (image * gradient).flatten(1).sum(1)
    for bias, gradient in layers:
        total = total + (bias.view(1, -1, *[1] * (gradient.dim() - 2)) * gradient).flatten(1).sum(1)
    assert ((total - logits).abs() / logits.abs()).max() < 1e-9
    saliency = ed.fullgrad_map(model, x)
    assert saliency.shape == (3, 16, 16) and (saliency >= 0).all()
    assert torch.allclose(saliency[:1], ed.fullgrad_map(model, x[:1]), atol=1e-6)


def test_fullgrad_sees_where_a_classifier_looks():
    """A net that looks at the left half alone, and one that looks everywhere alike."""
    left = (torch.arange(8) < 4).float().expand(4, 8, 8).clone()
    shares = []
    for weight in (left, torch.ones(4, 8, 8)):
        net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(256, 1, bias=False))
        net[0].weight.data.abs_()
        net[3].weight.data = weight.flatten()[None]
        saliency = ed.fullgrad_map(net.requires_grad_(False), torch.rand(4, 3, 8, 8, generator=g))
        shares.append((saliency * left[0]).sum() / saliency.sum())
    assert shares[0] > 0.999 and abs(shares[1] - 0.5) < 0.1


def test_pca_finds_the_axes():
    x = torch.tensor([[2.0, 0, 0], [-2, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert np.allclose(ed.laid_out(x, "pca", 0).var(0, correction=0), [2, 0.5])


def test_neighbours_in_the_map():
    labels = torch.arange(60) % 3
    apart = torch.eye(3)[labels][:, :2] * 100 + torch.randn(60, 2, generator=g)
    assert ed.map_neighbours(apart.double(), labels) == 100
    noise = ed.map_neighbours(torch.randn(600, 2, generator=g).double(), torch.arange(600) % 3)
    assert abs(noise - 100 / 3) < 6


@pytest.mark.parametrize("how, package", [("tsne", "sklearn"), ("pacmap", "pacmap")])
def test_embeddings_keep_clusters_apart(how, package):
    pytest.importorskip(package)
    labels = torch.arange(80) % 2
    x = torch.randn(80, 5, generator=g) + 20 * labels[:, None]
    points = ed.laid_out(x, how, 0)
    assert points.shape == (80, 2) and ed.map_neighbours(points, labels) == 100


def test_heat():
    assert ed.heat(torch.tensor([[0.0, 0.5, 1.0]]))[:, 0].T.tolist() == [[0, 0, 127], [127, 255, 127], [127, 0, 0]]


# ---- the published layouts, and what is refused ----------------------------------------------------


def save(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    (image.convert(mode) if mode else image).save(path)


def picture(h, w):
    return torch.randint(255, (h, w, 3), generator=g)


def checkpoint(path, backbone, data="imagefolder", data_dir=None, seed=0):
    """A checkpoint.pt of an encoder as the method scripts write it."""
    path.mkdir(parents=True)
    args = dict(data=data, data_dir=data_dir and str(data_dir), recipe="cifar10", seed=seed)
    args |= dict(arch=backbone.description["arch"])
    state = dict(format=1, method="ser", args=args, step=0, train_state={})
    state |= dict(backbone=backbone.description, backbone_state=backbone.state_dict())
    common.save_checkpoint(path / "checkpoint.pt", state)
    return str(path / "checkpoint.pt")


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """Two seeds of a ViT, a ResNet, and a ViT of large images."""
    root = tmp_path_factory.mktemp("runs")
    out = {
        f"vit-s{seed}": checkpoint(root / f"vit-s{seed}", tiny_vit(seed, 16, 32), data_dir=folder, seed=seed)
        for seed in (0, 1)
    }
    out["resnet"] = checkpoint(root / "resnet", tiny_resnet(), data_dir=folder)
    out["large"] = checkpoint(root / "large", tiny_vit(patch=16, side=96), data_dir=folder)
    return out


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """ADE20K, COCO, DAVIS, ECSSD, DUTS and DUT-OMRON of a few small images."""
    root = tmp_path_factory.mktemp("trees")
    for split, short, n in (("training", "train", 4), ("validation", "val", 2)):
        for i in range(n):
            base = root / "ade20k/ADEChallengeData2016"
            save(base / f"images/{split}/ADE_{short}_{i:08d}.jpg", picture(40, 52))
            save(base / f"annotations/{split}/ADE_{short}_{i:08d}.png", torch.arange(52).expand(40, -1) // 20 * 75)
    for split, n in (("train", 3), ("val", 2)):
        images = [dict(id=10 + i, file_name=f"{i}.jpg", height=40, width=60) for i in range(n)]
        each = dict(area=100.0, iscrowd=0)
        boxes = [
            dict(id=i, image_id=10 + i, category_id=3 + 4 * (i % 2), bbox=[5, 5, 20, 20], **each) for i in range(2)
        ]
        text = json.dumps(dict(images=images, annotations=boxes, categories=[dict(id=7), dict(id=3)]))
        for i in range(n):
            save(root / f"coco/{split}2017/{i}.jpg", picture(40, 60))
        (root / "coco/annotations").mkdir(exist_ok=True)
        (root / f"coco/annotations/instances_{split}2017.json").write_text(text)
    (root / "davis/ImageSets/2017").mkdir(parents=True)
    (root / "davis/ImageSets/2017/val.txt").write_text("bear\ncamel\n")
    for name in ("bear", "camel"):
        for t in range(3):
            save(root / f"davis/JPEGImages/480p/{name}/{t:05d}.jpg", picture(48, 80))
            save(root / f"davis/Annotations/480p/{name}/{t:05d}.png", torch.arange(80).expand(48, -1) // 30, "P")
    for name, images, masks in (
        ("ecssd", "images", "ground_truth_mask"),
        ("duts", "DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask"),
        ("dut-omron", "img", "gt"),
    ):
        for i in range(2):
            save(root / name / images / f"{i}.jpg", picture(40, 50))
            save(root / name / masks / f"{i}.png", 255 * (torch.arange(50).expand(40, -1) > 20))
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ed, "CROP", 32)
    monkeypatch.setattr(ed, "LONG", 96)
    monkeypatch.setattr(ed, "SHORT", (64,))


QUICK = ["--device", "cpu", "--workers", "0"]


def test_every_task_on_scenes(runs, capsys, monkeypatch):
    monkeypatch.setattr(ed, "installed", lambda use: False)
    flags = [*QUICK, "--images", "1", "--steps", "1", "--batch-size", "2"]
    rows = ed.main([runs["vit-s0"], runs["vit-s1"], runs["resnet"], *flags])
    captured = capsys.readouterr()
    assert "detection is left out: it needs the package pycocotools" in captured.err
    metrics = ["mIoU", "mAcc", "aAcc", "J&F", "J", "F", "saliency IoU", "saliency acc", "saliency maxF"]
    assert [name for name, _ in rows] == ["vit", "vit", "resnet"] and all(list(row)[:9] == metrics for _, row in rows)
    assert captured.out.count("±") >= 9
    records = [json.loads(line) for line in open(runs["resnet"].replace("checkpoint.pt", "eval.jsonl"))]
    assert [r["protocol"]["task"] for r in records] == ["segmentation", "video", "saliency"]
    assert records[0]["protocol"]["steps"] == 1 and records[2]["protocol"]["feature"] == "last map"
    assert len(records[0]["protocol"]["iou"]) == 11 and records[1]["protocol"]["objects"][0]["J"]["recall"] >= 0


def test_published_layouts(runs, trees, tmp_path, capsys):
    flags = [*QUICK, "--steps", "1", "--batch-size", "2", "--save", str(tmp_path / "save"), "--format", "json"]
    sets = ["ade20k", "davis", "ecssd", "duts", "dut-omron"]
    places = [str(trees / name) for name in sets]
    ((_, row),) = ed.main([runs["vit-s0"], *flags, "--data", *sets, "--data-dir", *places])
    assert list(row)[:6] == ["ade20k mIoU", "ade20k mAcc", "ade20k aAcc", "davis J&F", "davis J", "davis F"]
    metrics = [f"{name} {metric}" for name in sets[2:] for metric in ("IoU", "acc", "maxF")]
    assert [metric for metric in row if "cut" not in metric][6:] == metrics
    (saved,) = (tmp_path / "save").iterdir()
    labels = np.array(Image.open(saved / "segmentation-ade20k/ADE_val_00000000.png"))
    assert labels.shape == (40, 52) and labels.min() >= 1
    first = Image.open(saved / "video-davis/bear/00000.png")
    assert first.mode == "P" and (np.array(first)[0] == np.arange(80) // 30).all()
    assert np.array(Image.open(saved / "saliency-duts/1.png")).shape == (40, 50)


def test_coco_is_read(trees):
    boxes = ed.coco_split(trees / "coco", "val")
    assert boxes.labels.tolist() == [0, 1] and boxes.categories == [3, 7] and boxes.ids == [10, 11]
    image, found, labels = boxes[1]
    assert image.shape == (3, 40, 60) and found.tolist() == [[5, 5, 25, 25]] and labels.tolist() == [1]
    assert len(ed.coco_split(trees / "coco", "train")) == 3
    assert len(ed.trainable(ed.coco_split(trees / "coco", "train"))) == 2  # the third has no box
    assert boxes.truths()["annotations"][1]["bbox"] == [5, 5, 20, 20]


def test_boxes_are_mirrored_with_their_images():
    image = torch.zeros(3, 4, 10, dtype=torch.uint8)
    image[:, 1:3, 2:5] = 1
    seen = set()
    for i in range(8):
        x, ((left, top, right, bottom),), _ = ed.flip_boxes(image, torch.tensor([[2.0, 1, 5, 3]]), None, common.rng(i))
        assert x[:, int(top) : int(bottom), int(left) : int(right)].all() and x.sum() == 18
        seen.add(left.item())
    assert seen == {2, 5}


def test_detection_on_coco(runs, trees, tmp_path):
    pytest.importorskip("pycocotools")
    flags = [*QUICK, "--steps", "1", "--batch-size", "2", "--save", str(tmp_path / "save")]
    ((_, row),) = ed.main([runs["vit-s0"], *flags, "--data", "coco", "--data-dir", str(trees / "coco")])
    assert list(row) == ["coco AP", "coco AP50", "coco AP75"]
    assert json.loads(next((tmp_path / "save").glob("*/detection-coco/detections.json")).read_text()) is not None


def test_figures(runs, trees, tmp_path, capsys):
    flags = [*QUICK, "--out", str(tmp_path), "--images", "12", "--embedding", "pca"]
    rows = ed.main([runs["vit-s0"], runs["resnet"], *flags, "--figures", "embedding", "fullgrad"])
    assert "map 10-NN" in rows[0][1]
    assert "left out of fullgrad, which needs a ResNet" in capsys.readouterr().err
    assert Image.open(tmp_path / "embedding.png").size == (800, 400)
    assert np.load(tmp_path / "embedding.npz")["1 points"].shape == (12, 2)
    assert np.load(tmp_path / "fullgrad.npz")["0 saliency"].shape == (8, 16, 16)
    where = ["--data", "ecssd", "--data-dir", str(trees / "ecssd")]
    ed.main([runs["vit-s0"], *QUICK, "--out", str(tmp_path), "--figures", "attention", *where])
    assert np.load(tmp_path / "attention-ecssd.npz")["0 0 mask"].shape == (2, 3)
    flags += ["--classes", "1", "--corruption", "defocus_blur"]
    ed.main([runs["vit-s0"], runs["resnet"], *flags, "--figures", "embedding", "fullgrad"])
    assert not list(tmp_path.glob("fullgrad-*"))  # the corruption is of the embedding alone
    assert set(np.load(tmp_path / "embedding-defocus_blur.npz")["0 labels"]) in ({0}, {1})


def test_fullgrad_on_the_object(tmp_path):
    """On images with masks the share of saliency on the object is measured."""
    data = common.ImageSet(
        images=torch.randint(255, (40, 3, 16, 16), dtype=torch.uint8, generator=g),
        labels=torch.arange(40) % 2,
        classes=("a", "b"),
        masks=torch.arange(16).expand(40, 16, 16) < 4,
    )
    case = eval_probe.Case(
        tiny_resnet(), dict(data="x", data_dir=None), data, data, eval_probe.Args(workers=0), torch.device("cpu")
    )
    (found,) = ed.fullgrad([("net", case)], None, arguments("--figures", "fullgrad", "--out", str(tmp_path)))
    assert found["object area"] == 25 and 0 < found["fullgrad on object"] < 100


MISTAKES = {
    "1 none": ([], "no checkpoint given"),
    "1 twice": (["{vit-s0}", "{vit-s0}"], "given twice"),
    "1 not there": (["{trees}/nothing.pt"], "no such checkpoint file"),
    "2 unknown set": (["{vit-s0}", "--data", "voc"], "--data voc", "unknown", "ade20k"),
    "3 unused set": (
        ["{vit-s0}", "--tasks", "video", "--data", "davis", "ecssd", "--data-dir", "{trees}/davis", "{trees}/ecssd"],
        "--data ecssd: none of --tasks",
    ),
    "3 no set for a task": (
        ["{vit-s0}", "--tasks", "video", "--data", "ecssd", "--data-dir", "{trees}/ecssd"],
        "--tasks video",
        "davis",
    ),
    "3 a set of no task": (["{vit-s0}", "--data", "cifar10", "--data-dir", "{trees}"], "--data cifar10", "figures"),
    "4 lengths": (
        ["{vit-s0}", "--data", "davis", "ecssd", "--data-dir", "{trees}/davis"],
        "--data-dir",
        "1 given, 2 needed (davis, ecssd)",
    ),
    "4 no directory": (["{vit-s0}", "--data", "davis"], "--data-dir", "0 given, 1 needed"),
    "5 missing": (["{vit-s0}", "--data", "davis", "--data-dir", "{trees}/nowhere"], "no such directory", "ImageSets"),
    "5 other layout": (["{vit-s0}", "--data", "ade20k", "--data-dir", "{trees}/ecssd"], "ade20k", "annotations/"),
    "14 steps": (["{vit-s0}", "--steps", "0"], "--steps 0"),
    "14 rate": (["{vit-s0}", "--lr", "0"], "--lr 0"),
    "14 images": (["{vit-s0}", "--images", "0"], "--images 0"),
    "15 sizes": (["{vit-s0}", "{large}"], "scenes have one size", "separate calls"),
    "16 no ResNet": (["{vit-s0}", "--figures", "fullgrad"], "--figures fullgrad", "needs a ResNet, unlike", "vit-s0"),
    "17 no ViT": (["{resnet}", "--figures", "attention"], "--figures attention", "needs a ViT, unlike", "resnet"),
    "18 few points": (
        ["{vit-s0}", "--figures", "embedding", "--embedding", "pca", "--images", "1"],
        "needs at least 2 points, but --images allows 1",
    ),
    "19 classes": (
        ["{vit-s0}", "--figures", "embedding", "--embedding", "pca", "--classes", "3"],
        "--classes 3",
        "has 2",
    ),
    "20 unknown corruption": (
        ["{vit-s0}", "--figures", "embedding", "--corruption", "rain"],
        "--corruption rain",
        "fog",
    ),
    "20 corruption of nothing": (["{vit-s0}", "--corruption", "fog"], "--corruption", "embedding"),
    "21 head of nothing": (["{vit-s0}", "--tasks", "video", "--head", "upernet"], "--head", "segmentation"),
    "21 save of nothing": (
        ["{vit-s0}", "--figures", "attention", "--save", "{trees}/x"],
        "--save",
        "detection, saliency",
    ),
    "22 out": (
        ["{vit-s0}", "--figures", "attention", "--out", "{trees}/davis/ImageSets/2017/val.txt"],
        "--out",
        "cannot be written",
    ),
    "26 sets of figures": (
        ["{vit-s0}", "--figures", "embedding", "--embedding", "pca", "--data", "cifar10", "--data-dir", "{trees}"],
        "CIFAR10",
    ),
    "4 images of fullgrad": (["{resnet}", "--figures", "fullgrad", "--images", "5"], "--images", "attention"),
    "5 tasks without a value": (["{vit-s0}", "--tasks"], "--tasks", "detection, saliency, segmentation, video"),
    "5 figures without a value": (["{vit-s0}", "--figures"], "--figures", "attention, embedding, fullgrad"),
    "5 data without a value": (["{vit-s0}", "--data"], "--data", "ade20k", "scenes"),
    "5 a task twice": (["{vit-s0}", "--tasks", "video", "video"], "--tasks", "each once"),
    "8 timm without a set": (
        ["timm:resnet18@{vit-s0}", "--tasks", "saliency", "--figures", "embedding"],
        "--data: timm:resnet18@",
        "name a data set",
    ),
    "checkpoints last": (["--data", "scenes", "{vit-s0}"], "checkpoints come first"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, runs, trees, capsys):
    flags, *words = MISTAKES[name]
    flags = [flag.format(trees=trees, **runs) for flag in flags]
    expect_mistake(capsys, ed.main, [*flags, *(QUICK if name != "checkpoints last" else [])], *words)


EMBED = ["--tasks", "saliency", "--figures", "embedding", "--embedding"]
EARLY = {
    "8 classes": ([*EMBED, "pca", "--classes", "3"], "--classes 3", "has 2"),
    "8 no classes": ([*EMBED, "pca", "--classes", "3", "--data", "{flat}"], "--classes 3", "has no classes"),
    "8 perplexity": ([*EMBED, "tsne", "--images", "9"], "--embedding tsne", "31 points", "--images allows 9"),
    "8 fullgrad": (["--tasks", "saliency", "--figures", "fullgrad", "--data", "{flat}"], "no classes"),
    "8 batch": (["--tasks", "saliency", "segmentation", "--batch-size", "4"], "--batch-size 4", "processes, 3"),
}


@pytest.mark.parametrize("name", EARLY)
def test_what_can_be_known_is_refused_first(name, runs, tmp_path, capsys, monkeypatch):
    flags, *words = EARLY[name]
    monkeypatch.setattr(ed, "installed", lambda use: True)
    monkeypatch.setattr(ed, "measure", None)  # no checkpoint is evaluated
    if name == "8 batch":
        monkeypatch.setattr(common, "world_size", lambda: 3)

    # A folder without class folders has no labels.
    if "{flat}" in flags:
        for split in ("train", "val"):
            for i in range(4):
                save(tmp_path / split / f"{i}.png", picture(16, 16))
        flags = [*flags[:-1], "scenes", "imagefolder", "--data-dir", str(tmp_path)]
    expect_mistake(capsys, ed.main, [runs["resnet"], *flags, *QUICK], *words)


def test_runs_of_similar_names_have_predictions_of_their_own(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["a/b/checkpoint.pt", "a-b/checkpoint.pt", "../checkpoint.pt"]
    for path in paths:
        (tmp_path / "x" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(runs["vit-s0"], tmp_path / "x" / path)
    monkeypatch.chdir(tmp_path / "x")
    ed.main([*paths, *QUICK, "--tasks", "saliency", "--images", "1", "--save", "out"])
    names = {folder.name for folder in (tmp_path / "x/out").iterdir()}
    assert names == {"a%2Fb", "a-b", "%2E."}


def test_tasks_and_columns_name_their_set(runs, trees, capsys, monkeypatch):
    sets = ["--data", "scenes", "ecssd", "duts", "--data-dir", str(trees / "ecssd"), str(trees / "duts")]
    flags = [*QUICK, "--tasks", "saliency", "--images", "1", *sets]
    ((_, row),) = ed.main([runs["vit-s0"], *flags])
    assert list(row)[0] == "scenes saliency IoU" and {metric.split()[0] for metric in row} == {
        "scenes",
        "ecssd",
        "duts",
    }

    # So do the lines of tasks that fail.
    monkeypatch.setattr(ed, "cut_object", None)
    with pytest.raises(SystemExit):
        ed.main([runs["vit-s0"], *flags])
    err = capsys.readouterr().err
    assert all(f"saliency on {name}: TypeError" in err for name in ("scenes", "ecssd", "duts"))


@pytest.mark.parametrize(
    "flags, package",
    [
        (["--tasks", "detection"], "pycocotools"),
        (["--figures", "embedding", "--embedding", "pacmap"], "pacmap"),
        (["--figures", "embedding", "--embedding", "tsne"], "scikit-learn"),
    ],
)
def test_a_package_that_is_missing_is_named_first(flags, package, runs, capsys, monkeypatch):
    monkeypatch.setattr(ed.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(eval_probe, "load", None)  # nothing is read before
    expect_mistake(capsys, ed.main, [runs["vit-s0"], *flags, *QUICK], f"pip install {package}")


def test_pca_stands_in_for_pacmap(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ed.importlib.util, "find_spec", lambda name: None)
    ed.main([runs["vit-s0"], *QUICK, "--figures", "embedding", "--out", str(tmp_path)])
    assert "--embedding pca: the package pacmap is not installed" in capsys.readouterr().err


def spoil(trees, root, name, act):
    """A copy of a tree with a fault in it."""
    shutil.copytree(trees / name, root / name)
    act(root / name)
    return str(root / name)


def change_coco(**changes):
    def act(root):
        path = root / "annotations/instances_val2017.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return act


one_box = dict(id=9, image_id=10, category_id=3, bbox=[5, 5, 20, 20], area=1, iscrowd=0)
ADE = "ADEChallengeData2016"
FAULTS = {
    "6 no mask": ("ecssd", lambda r: (r / "ground_truth_mask/1.png").unlink(), "1 is in", "only"),
    "6 no image": ("duts", lambda r: (r / "DUTS-TE/DUTS-TE-Image/0.jpg").unlink(), "0 is in", "only"),
    "6 two of a stem": (
        "ecssd",
        lambda r: save(r / "ground_truth_mask/1.bmp", torch.zeros(40, 50)),
        "two files of one stem",
    ),
    "6 empty": ("dut-omron", lambda r: [f.unlink() for f in r.glob("*/*")], "holds no images"),
    "7 sizes": ("ecssd", lambda r: save(r / "ground_truth_mask/1.png", torch.zeros(40, 51)), "1.jpg", "one size"),
    "7 sizes in training": (
        "ade20k",
        lambda r: save(r / ADE / "annotations/training/ADE_train_00000003.png", torch.zeros(40, 51)),
        "ADE_train_00000003.jpg",
        "one size",
    ),
    "7 sizes of a frame": (
        "davis",
        lambda r: save(r / "Annotations/480p/camel/00002.png", torch.zeros(48, 81), "P"),
        "camel/00002.jpg",
        "one size",
    ),
    "8 colours": (
        "ade20k",
        lambda r: save(r / ADE / "annotations/validation/ADE_val_00000001.png", picture(40, 52)),
        "ADE_val_00000001",
        "mode RGB",
    ),
    "8 label": (
        "ade20k",
        lambda r: save(r / ADE / "annotations/training/ADE_train_00000001.png", torch.full((40, 52), 151)),
        "ADE_train_00000001",
        "151",
    ),
    "9 not json": (
        "coco",
        lambda r: (r / "annotations/instances_val2017.json").write_text("{{"),
        "instances_val2017.json",
    ),
    "9 keys": ("coco", change_coco(images=[dict(id=3)]), "not the annotations of COCO", "height"),
    "9 unknown image": ("coco", change_coco(annotations=[one_box | dict(image_id=77)]), "annotation 9"),
    "9 outside": ("coco", change_coco(annotations=[one_box | dict(bbox=[50, 5, 20, 20])]), "annotation 9", "beyond"),
    "9 other categories": (
        "coco",
        change_coco(categories=[dict(id=3), dict(id=8)], annotations=[one_box]),
        "different categories",
    ),
    "9 no box": ("coco", change_coco(annotations=[]), "holds no box"),
    "9 no image": ("coco", lambda r: (r / "val2017/1.jpg").unlink(), "val2017/1.jpg", "missing"),
    "10 no list": ("davis", lambda r: (r / "ImageSets/2017/val.txt").unlink(), "val.txt"),
    "10 empty list": ("davis", lambda r: (r / "ImageSets/2017/val.txt").write_text(""), "names no sequence"),
    "10 no frames": ("davis", lambda r: shutil.rmtree(r / "JPEGImages/480p/camel"), "camel"),
    "10 numbers": (
        "davis",
        lambda r: (r / "Annotations/480p/camel/00001.png").unlink(),
        "camel",
        "3 frames and 2 masks",
    ),
    "10 no object": (
        "davis",
        lambda r: save(r / "Annotations/480p/camel/00000.png", torch.zeros(48, 80), "P"),
        "shows no object",
    ),
    "11 palette": (
        "duts",
        lambda r: save(r / "DUTS-TE/DUTS-TE-Mask/1.png", torch.zeros(40, 50), "P"),
        "1.png",
        "mode P",
    ),
    "12 small": (
        "ecssd",
        lambda r: [
            save(r / f, v)
            for f, v in (("images/1.jpg", picture(40, 7)), ("ground_truth_mask/1.png", torch.zeros(40, 7)))
        ],
        "half a patch",
    ),
    "13 unreadable": ("ecssd", lambda r: (r / "images/1.jpg").write_bytes(b"no"), "1.jpg", "cannot be read"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_published_sets(name, runs, trees, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ed, "installed", lambda use: True)
    kind, act, *words = FAULTS[name]
    where = spoil(trees, tmp_path, kind, act)
    capsys.readouterr()
    flags = ["--steps", "3"] if kind == "ade20k" else []
    if name != "8 label":  # only pixels show it; all else is refused before a checkpoint is evaluated
        monkeypatch.setattr(ed, "measure", None)
    with pytest.raises(SystemExit) as end:
        ed.main([runs["vit-s0"], *QUICK, "--data", kind, "--data-dir", where, *flags])
    err = capsys.readouterr().err
    last = [line for line in err.replace("\r", "\n").splitlines() if "error: " in line]
    assert end.value.code == 2 and len(last) == 1 and "Traceback" not in err, err
    assert all(word in last[0] for word in words), last


def test_models_of_timm(tmp_path, monkeypatch):
    """A ViT of timm takes images of other sizes, and has the features of ours."""
    backbone, x = tiny_vit(), torch.randn(1, 3, 16, 16, generator=g)
    create, made = eval_probe.timm.create_model, []

    def small(name, pretrained=False, **how):
        made.append(how)
        return create(
            name, pretrained=False, **how | dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=2)
        )

    monkeypatch.setattr(eval_probe.timm, "create_model", small)
    model, _ = eval_probe.load("timm:vit_small_patch16_224")
    model.model.load_state_dict(backbone.state_dict())
    model.img_size, model.mean, model.std = 16, backbone.mean, backbone.std
    ours, theirs = (ed.Encoder(b, "x", torch.device("cpu")) for b in (backbone, model))
    assert made[0]["dynamic_img_size"] and ours.stride == theirs.stride == 4
    assert torch.allclose(ours.last(x), theirs.last(x), atol=1e-5)
    assert torch.allclose(ours.attend(x)[0], theirs.attend(x)[0], atol=1e-5)
    assert theirs.last(torch.randn(1, 3, 24, 16)).shape == (1, 32, 6, 4)


def small_timm(monkeypatch, **sizes):
    """timm's models without a download, in a small size."""
    create = eval_probe.timm.create_model
    monkeypatch.setattr(
        eval_probe.timm, "create_model", lambda name, pretrained=False, **how: create(name, **how | sizes)
    )


@pytest.mark.parametrize("part", ["--tasks", "--figures"])
def test_attention_that_queries_and_keys_do_not_determine_is_refused(part, trees, tmp_path, capsys, monkeypatch):
    small_timm(monkeypatch, embed_dim=48, depth=2, num_heads=4)
    monkeypatch.setattr(ed, "measure", None)  # no checkpoint is evaluated
    flags = [part, "saliency" if part == "--tasks" else "attention", "--data", "ecssd", "--data-dir"]
    path = "timm:eva02_tiny_patch14_224"
    expect_mistake(capsys, ed.main, [path, *flags, str(trees / "ecssd"), *QUICK], "plain ViT, such as", path)


def test_default_tasks_leave_out_what_an_encoder_has_not(capsys, monkeypatch):
    small_timm(monkeypatch, embed_dim=48, depth=2, num_heads=4)
    measured = []
    monkeypatch.setattr(ed, "load", lambda *a: ed.Pairs(torch.zeros(1, 3, 8, 8), None))
    monkeypatch.setattr(ed, "measure", lambda subject, task, *a: measured.append(task))
    ed.main(["timm:eva02_tiny_patch14_224", *QUICK])
    assert {"segmentation", "video"} <= set(measured) and "saliency" not in measured
    assert "left out of saliency, which needs" in capsys.readouterr().err


@pytest.mark.parametrize("name, complete", [("resnet18", True), ("seresnet18", False), ("skresnet18", False)])
def test_fullgrad_refuses_networks_with_gates(name, complete):
    """Batch norms at the end of residual branches start at 0, where gates have no effect."""
    common.seed_everything("gates")
    model = eval_probe.timm.create_model(name, num_classes=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.normal_(1, 0.3)
    model.pretrained_cfg |= dict(input_size=(3, 64, 64))
    encoder = ed.Encoder(eval_probe.Timm(model).eval().requires_grad_(False), "x", torch.device("cpu"))
    found = encoder.obstacle("fullgrad")
    assert found is None if complete else "squeeze-and-excite" in found


def test_fullgrad_names_the_model_with_gates(folder, tmp_path, capsys, monkeypatch):
    model = eval_probe.timm.create_model("seresnet18", num_classes=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    torch.save(model.state_dict(), tmp_path / "se.pt")
    monkeypatch.setattr(ed, "measure", None)  # no checkpoint is evaluated
    path = f"timm:seresnet18@{tmp_path / 'se.pt'}"
    flags = [
        "--tasks",
        "saliency",
        "--figures",
        "fullgrad",
        "--data",
        "scenes",
        "imagefolder",
        "--data-dir",
        str(folder),
    ]
    expect_mistake(capsys, ed.main, [path, *flags, *QUICK], "--figures fullgrad", "squeeze-and-excite", path)


@pytest.mark.parametrize(
    "how, stride, dim, layers",
    [
        (dict(arch="vit_pico", patch_size=8, neck=16), 8, 32, (1, 2, 3, 4)),
        (dict(arch="vmamba_tiny"), 32, 64, (1, 2, 3, 4)),
        (dict(arch="resnet_pico", stem="cifar", coords=True), 8, 128, (1, 2, 3, 4)),
        (dict(arch="resnet_pico"), 32, 128, (1, 2, 3, 4)),
    ],
    ids=lambda v: v.get("arch") if isinstance(v, dict) else "",
)
def test_encoders_of_all_methods(how, stride, dim, layers, monkeypatch):
    monkeypatch.setitem(clever.VMAMBAS, "vmamba_tiny", (8, (1, 1, 1, 1)))
    backbone = common.make_backbone(mean=(0.5,) * 3, std=(0.5,) * 3, img_size=32, **how).eval()
    encoder = ed.Encoder(backbone, "x", torch.device("cpu"))
    assert (encoder.stride, encoder.dim, encoder.layers) == (stride, dim, layers)
    x = torch.randn(1, 3, 96, 64, generator=g)
    assert encoder.last(x).shape == (1, dim, 96 // stride, 64 // stride)
    assert [m.shape[1] for m in encoder.maps(x, layers)] == encoder.widths
    assert [tuple(m.shape[2:]) for m in ed.Neck(encoder, 8)(x).values()] == [(24, 16), (12, 8), (6, 4), (3, 2), (2, 1)]
    assert ed.UPerHead(encoder, 5, 8).eval()(x).shape == (1, 5, 24, 16)
    seen = ed.cut_features(encoder, torch.zeros(3, 64, 96, dtype=torch.uint8))
    assert seen[1] == (64 // stride, 96 // stride) and (seen[2] is None) == (how["arch"] != "vit_pico")


def test_help_teaches_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        ed.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(
        f"--{f.replace('_', '-')}" in text for f in vars(ed.Args()) if f != "checkpoints"
    )
    assert "is silent" not in text and text.index("python ") < text.index("options")
    numbers = {f.name for f in common.dataclasses.fields(ed.Args) if any(t in str(f.type) for t in ("int", "float"))}
    assert numbers == set(common.ranges(ed.Args))


@pytest.mark.parametrize("world, code", [(1, 2), (2, 1)])
def test_a_file_that_one_rank_refuses_ends_all_of_them(world, code, monkeypatch, capsys):
    """Code 2 is a mistake that all ranks see. With it the others would go on, and merge the rows of two sets."""
    monkeypatch.setattr(common, "world_size", lambda: world)

    class Broken(torch.utils.data.Dataset):
        images = torch.zeros(1)

        def __getitem__(self, i):
            raise OSError("1.png: cannot be read as an image")

    with pytest.raises(SystemExit) as end:
        list(ed.reading(Broken(), [0], 0, "images"))
    assert end.value.code == code and "1.png: cannot be read" in capsys.readouterr().err


def test_seeds_of_one_configuration_have_labels_of_their_own():
    names = ["ser", "none", "ser"]
    assert ed.labels_of([types.SimpleNamespace(name=n) for n in names]) == ["ser #1", "none", "ser #2"]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(bbox=[0, 0, 5]), "not the annotations of COCO"),
        (dict(bbox=None), "not the annotations of COCO"),
        (dict(bbox=["a", 0, 5, 5]), "not the annotations of COCO"),
        (dict(bbox=[2, 2, -1, 5]), "reaches beyond its image"),
    ],
)
def test_boxes_that_are_none_are_one_line(change, words, tmp_path, capsys):
    box = dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 5, 5], area=25, iscrowd=0) | change
    image = dict(id=1, height=10, width=10, file_name="1.jpg")
    file = tmp_path / "instances.json"
    for images, text in (([image], words), ([image, image], "two images have the same id")):
        file.write_text(json.dumps(dict(images=images, categories=[dict(id=1)], annotations=[box])))
        with pytest.raises(SystemExit) as end:
            ed.parse_coco(file)
        assert end.value.code == 2 and text in capsys.readouterr().err
