"""Dense tasks on saved encoders: what do the frozen maps of tokens know, and what do the papers' figures look like?

    python eval_dense.py runs/*/checkpoint.pt  # every task on scenes rendered on the spot, one table
    python eval_dense.py A B --data davis ecssd duts dut-omron --data-dir DAVIS ECSSD DUTS OMRON  # CLeVER, Table 5
    python eval_dense.py A B --data ade20k --data-dir ADE20K --head upernet  # RECON, Table 6
    torchrun --nproc_per_node=8 eval_dense.py A --data coco --data-dir COCO  # SER, Table 6
    python eval_dense.py A B --figures embedding --embedding tsne --classes 20 --corruption defocus_blur  # SER, Figure 5
    python eval_dense.py C D --figures embedding fullgrad  # CIPER, Figures 2 and 3
    python eval_dense.py A B --figures attention --data ecssd --data-dir ECSSD  # CLeVER, Figure 4

Flow: checkpoints -> frozen encoders -> every task, which reads or trains on their maps -> a table, a row a checkpoint.
Seeds share a row. As soon as a task is finished its results are appended to eval.jsonl beside the checkpoint. The map
is that of the last block through the final norm, without [CLS], before any neck; of ResNets and VMamba the last map.

Tasks, all in percent
  segmentation  A head learns the class of each pixel from the map: batch norm and a 1x1 convolution (--head linear
                [DINOv2]), or UPerNet (--head upernet [mmsegmentation]). Over the whole set, C_ij counts pixels of class
                i that were taken for j. mIoU is the mean over classes of C_cc / (sum_j C_cj + sum_j C_jc - C_cc), mAcc
                that of C_cc / sum_j C_cj, aAcc the trace over the sum.
  detection     torchvision's FasterRCNN on a neck over the map [SER: frozen encoder, 45,000 steps of 32]. AP of boxes,
                mean over IoU .50 to .95, AP50 and AP75, by pycocotools.
  video         No training: labels of the first frame move to later ones [DINO]. Each patch takes the mean label of the
                5 most similar patches, weights exp(cos / 0.1), within 12 rows and columns, of the first and the 7 last
                frames. J is the intersection over union of an object, F the F-measure of its boundary [DAVIS]; means
                over frames without the first and last, then over all objects. J&F is the mean of the two.
  saliency      No training: TokenCut cuts the graph of patches in two where keys of the last block differ [TokenCut].
                W_ij is 1 if cos > 0.2, else 1e-5; v is the second smallest solution of (D - W) v = lambda D v; the
                object is v > mean(v), where |v| is largest. IoU, accuracy and max F-beta (beta^2 0.3), means over
                images. Encoders without attention use their last map.

Figures, PNG files in --out with their numbers in .npz files beside them
  embedding     Features of test images in the plane, a panel a checkpoint, coloured by class, and by azimuth where the
                set has views. `map 10-NN` in the table: percent of the 10 nearest neighbours, in the plane, of a
                point's own class.
  fullgrad      Where a linear classifier of objects looks [FullGrad], ResNets only. `fullgrad on object`: percent of
                the saliency within the mask; `object area`, what an even map would have there.
  attention     Attention of [CLS], mean over heads, TokenCut's eigenvector and mask.

`scenes` is the stand-in that needs no download: one to five of the rendered `blocks` on one floor, 96 px for encoders
of less than 96 px, else 384. Nothing about it compares with published figures. A perfect map of 12 x 12 patches
reaches an IoU of about 70 on its objects, one of 24 x 24 about 83.

Where the papers are silent: SER names no detector; ours is torchvision's, AdamW at 1e-4 [ViTDet], rate divided by ten
after 2/3 and 8/9 of the steps [Detectron]. RECON says "HyperNet", which its successor calls UPerNet; ours stays frozen
beneath it, has 256 channels and no auxiliary head. CLeVER follows DINO's and TokenCut's files; ours has no bilateral
solver. CIPER and SER state neither images, settings nor severity of their figures: ours are the libraries' defaults and
severity 3. Further differences: the loss of a pixel is divided by the labelled pixels, not all; positions of ViTs are
resampled as in this repository; photometric distortion is ColorJitter. With several processes detection trains the
same model in law only; everything else is the same.

Sources. DINO (arXiv 2104.14294), its eval_video_segmentation.py; DINOv2 (2304.07193); UPerNet (1807.10221), in
open-mmlab/mmsegmentation; ViTDet (2203.16527); the DAVIS 2017 toolkit, davisvideochallenge/davis2017-evaluation;
TokenCut (2202.11539) and its code; FullGrad (1905.00780), idiap/fullgrad-saliency; PaCMAP (2012.04456)."""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import io
import json
import math
import os
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw

import common
import eval_probe
import eval_robustness
from common import Count, Natural, Plural, Positive, Seed

IGNORE = 255  # label of pixels that count nowhere


@dataclasses.dataclass
class Args:
    """Which checkpoints, which tasks and figures, on which data."""

    checkpoints: tyro.conf.Positional[tuple[str, ...]] = ()
    """checkpoint.pt files written by the method scripts; timm:NAME takes a model of timm with its weights,
    timm:NAME@FILE with yours"""
    tasks: tuple[Literal["segmentation", "detection", "video", "saliency"], ...] | None = None
    """what to measure; default: all that the data allow, or nothing where figures are asked for (detection needs the
    package pycocotools)"""
    figures: tuple[Literal["embedding", "fullgrad", "attention"], ...] = ()
    """what to draw"""
    data: tuple[str, ...] = ()
    """scenes (rendered on the spot), ade20k (segmentation), coco (detection), davis (video), ecssd, duts, dut-omron
    (saliency, attention); for embedding and fullgrad a set of eval_probe.py; default: scenes, and for embedding and
    fullgrad the set that the checkpoint was trained on"""
    data_dir: tuple[str, ...] = ()
    """where they lie, in the order of --data; scenes and blocks need none"""
    head: Literal["linear", "upernet"] = "linear"
    """what learns to segment"""
    steps: Count | None = None
    """training steps of segmentation and detection; default: the recipe's"""
    batch_size: Plural | None = None
    """images a step over all processes together; default: the recipe's"""
    lr: Positive | None = None
    """peak learning rate, not scaled; default: the recipe's"""
    images: Count | None = None
    """use the first so many test images or sequences, and four times as many to train on; default: all. Of embedding:
    points, evenly spaced (default: 13,000, tsne 1,000). Of other figures: columns (default: 8)"""
    embedding: Literal["pacmap", "tsne", "pca"] | None = None
    """how features are laid out in the plane: by the packages pacmap or scikit-learn, or pca, which needs none;
    default: pacmap where it is installed, else pca"""
    classes: Count | None = None
    """embedding: so many classes, at random from --seed; default: all"""
    corruption: str | None = None
    """embedding: show the images under this corruption of eval_robustness.py, severity 3"""
    out: str = "figures"
    """directory of the figures"""
    save: str | None = None
    """directory for the predictions, in the formats of the official tools"""
    format: Literal["table", "markdown", "csv", "json"] = "table"
    """how the table is printed; csv and json hold all digits"""
    seed: Seed = 0
    """seed of heads, batches, and what is drawn for figures"""
    workers: Natural | None = None
    """loader processes for files; default: as many as this process has cores, at most 8"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto takes CUDA, then MPS, then the CPU"""
    amp: Literal["auto", "off"] = "auto"
    """auto is bfloat16 autocast of the encoder on CUDA and float32 elsewhere"""


# ----------------------------------------------------------------------------------------------------------------------
# Metrics: of masks and boxes, in [0, 1]
# ----------------------------------------------------------------------------------------------------------------------


def confusion_matrix(truth, predicted, classes):
    """truth, predicted (...) int64 below `classes`, where truth is not IGNORE -> (classes, classes) int64; rows are
    the truth."""
    kept = truth != IGNORE
    return torch.bincount(truth[kept] * classes + predicted[kept], minlength=classes**2).view(classes, classes)


def segmentation_scores(matrix):
    """Confusion matrix (C, C) of a whole set -> (dict(mIoU, mAcc, aAcc), IoU of each class (C,)). A class that is 0/0
    is left out of a mean, and its IoU is NaN."""
    matrix = matrix.double().cpu()
    hits, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)  # (C,) each
    iou, accuracy = hits / (truth + predicted - hits), hits / truth
    means = dict(mIoU=iou.nanmean(), mAcc=accuracy.nanmean(), aAcc=hits.sum() / matrix.sum())
    return {name: value.item() for name, value in means.items()}, iou


def jaccard(mask, truth):
    """Intersection over union of two masks (H, W) bool; two empty ones agree."""
    union = (mask | truth).sum().item()
    return (mask & truth).sum().item() / union if union else 1.0


def boundary(mask):
    """Pixels of a mask (H, W) bool that differ from their right, lower or lower right neighbour. Nothing is beyond the
    last row and column [DAVIS]."""
    padded = torch.cat([mask, mask[-1:]])  # (H + 1, W)
    padded = torch.cat([padded, padded[:, -1:]], 1)  # (H + 1, W + 1)
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def boundary_f(mask, truth):
    """F-measure of the boundaries of two masks (H, W) bool. A pixel is found if the other boundary is within 0.008
    times the diagonal, rounded up to pixels [DAVIS]."""
    edges = [boundary(mask), boundary(truth)]
    if not (edges[0].any() and edges[1].any()):
        return float(not edges[0].any() and not edges[1].any())

    # Widen each boundary by a disk, and count the pixels of the other one that lie within.
    radius = math.ceil(0.008 * math.hypot(*mask.shape))
    span = torch.arange(-radius, radius + 1, device=mask.device)
    disk = (span[:, None] ** 2 + span**2 <= radius**2).float()[None, None]  # (1, 1, 2r + 1, 2r + 1)
    wide = [F.conv2d(edge.float()[None, None], disk, padding=radius)[0, 0] > 0 for edge in edges]
    precision = ((edges[0] & wide[1]).sum() / edges[0].sum()).item()
    recall = ((edges[1] & wide[0]).sum() / edges[1].sum()).item()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def over_time(values):
    """A measure in each frame of an object (list of T numbers) -> its mean, recall, the share above 0.5, and decay,
    the mean of the first quarter less that of the last [DAVIS]."""
    v = torch.tensor(values, dtype=torch.float64)
    cuts = ((torch.linspace(1, len(v), 5, dtype=torch.float64) + 1e-10).round() - 1).long().tolist()
    decay = v[: cuts[1] + 1].mean() - v[cuts[3] :].mean()
    return dict(mean=v.mean().item(), recall=(v > 0.5).double().mean().item(), decay=decay.item())


def f_beta(precision, recall):
    """1.3 p r / (0.3 p + r), 0 where both are 0; tensors of one shape."""
    both = 0.3 * precision + recall
    return torch.where(both > 0, 1.3 * precision * recall / both.clamp(min=1e-12), 0.0)


def f_curve(saliency, truth):
    """F-beta of the map (H, W), in [0, 1], cut at each of the levels k / 255: (255,), k = 0 ... 254; truth (H, W) bool.
    The mean of these curves over images has its maximum at max F-beta [TokenCut]."""
    levels = torch.bucketize(saliency.flatten().float().cpu(), torch.arange(255) / 255)  # how many a pixel exceeds
    truth = truth.flatten().cpu()

    # Count the pixels above each level, all of them and those of the object.
    above = lambda chosen: levels[chosen].bincount(minlength=256).flip(0).cumsum(0).flip(0)[1:].double()
    found, hits, total = above(slice(None)), above(truth), truth.sum()  # (255,) each
    precision = torch.where(found > 0, hits / found.clamp(min=1), 1.0)
    recall = hits / total if total else torch.ones(255, dtype=torch.float64)
    return f_beta(precision, recall)


def average_precision(truths, detections):
    """Boxes -> dict(AP, AP50, AP75), mean over classes, by pycocotools: all areas, 100 detections an image.

    truths: COCO's dict of images, annotations and categories. detections: COCO's list of dicts of image_id,
    category_id, bbox (x, y, width, height) and score. Raises ValueError where no class has a box."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if all(a["iscrowd"] for a in truths["annotations"]):
        raise ValueError("no test image has a box; take more --images")
    if not detections:
        return dict(AP=0.0, AP50=0.0, AP75=0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # its tables of progress
        coco = COCO()
        coco.dataset = truths
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()

    # Precision at each IoU, recall and class, of all areas and 100 detections; -1 marks classes without boxes.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (10, 101, classes)
    mean = lambda p: float(p[p > -1].mean())
    return dict(AP=mean(precision), AP50=mean(precision[0]), AP75=mean(precision[5]))
