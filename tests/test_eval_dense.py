"""Dense tasks: check values of the metrics, planted signals, the layouts of the published sets, user mistakes."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from test_cli import expect_mistake
from test_distributed import on_ranks

import common
import eval_dense as ed
import eval_probe

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
    p, r = torch.tensor([[0.5, 1, 0.5, 0.8, 0], [0.5, 0.5, 1, 0.6, 0]], dtype=torch.float64)
    assert np.allclose(ed.f_beta(p, r), [0.5, 0.8125, 0.565217, 0.742857, 0], atol=1e-6)
    curve = ed.f_curve(torch.tensor([0.9, 0.6, 0.4, 0.1]), torch.tensor([1, 0, 1, 0]).bool())
    assert curve.max() == 0.8125 and curve.argmax() == 153


def test_f_curve_by_a_loop():
    saliency, truth = torch.rand(5, 6, generator=g), torch.rand(5, 6, generator=g) > 0.5
    for k, f in enumerate(ed.f_curve(saliency, truth).tolist()):
        mask = saliency > k / 255
        p = (mask & truth).sum().item() / mask.sum().item() if mask.any() else 1.0
        r = (mask & truth).sum().item() / truth.sum().item()
        assert abs(f - (1.3 * p * r / (0.3 * p + r) if p + r else 0)) < 1e-12
    curve = ed.f_curve(truth.float(), truth)
    assert (curve == 1).all()


def boxes(*rows):
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
    return ed.average_precision(dict(images=images, annotations=truths, categories=categories), found)


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
    assert np.allclose(list(ap(boxes(*truths), boxes(*found)).values()), expected, atol=1e-6)
