"""Dense tasks on saved encoders: small heads, or none, on frozen feature maps; and the papers' figures.

    python eval_dense.py runs/*/checkpoint.pt  # every task on scenes rendered on the spot, one table
    python eval_dense.py A B --data davis ecssd duts dut-omron --data-dir DAVIS ECSSD DUTS OMRON  # CLeVER, Table 5
    python eval_dense.py A B --data ade20k --data-dir ADE20K --head upernet  # RECON, Table 6
    torchrun --nproc_per_node=8 eval_dense.py A --data coco --data-dir COCO  # SER, Table 6
    python eval_dense.py A B --figures embedding --embedding tsne --classes 20  # SER, Figure 4
    python eval_dense.py C D --figures embedding fullgrad  # CIPER, Figures 2 and 3
    python eval_dense.py A B --figures attention --data ecssd --data-dir ECSSD  # CLeVER, Figure 4

Flow: checkpoints -> frozen encoders -> each task reads their maps, or trains a head on them -> one table.
Seeds share a row. As soon as a task is finished its results are appended to eval.jsonl beside the checkpoint. The map
is that of the last block through the final norm, without [CLS], before any neck; of ResNets and VMamba the last map.
UPerNet reads four blocks instead, and with detection the last four stages of ResNets and VMamba.

Tasks, all in percent
  segmentation  A head learns the class of each pixel from the map: batch norm and a 1x1 convolution (--head linear
                [DINOv2]), or UPerNet (--head upernet [mmsegmentation]). On crops of 512 x 512 px of ADE20K, AdamW takes
                40,000 steps of 16 at 1e-3, weight decay 1e-4, for UPerNet 160,000 at 6e-5, 0.01. The rate rises over
                1,500 steps, then falls linearly to 0. From the confusion matrix of the whole set: mIoU, the mean over
                classes of intersection over union, mAcc, that of the share found, aAcc, the share of all pixels.
  detection     torchvision's FasterRCNN on a neck over the map [SER: frozen encoder, 45,000 steps of 32]. AP of boxes,
                mean over IoU .50 to .95, AP50 and AP75, by pycocotools.
  video         No training: labels of the first frame move to later ones [DINO]. Each patch takes the mean label of the
                5 most similar patches, weights exp(cos / 0.1), within 12 rows and columns, of the first and the 7 last
                frames. J is the intersection over union of an object, F the F-measure of its boundary [DAVIS]; means
                over frames without the first and last, then over all objects. J&F is the mean of the two.
  saliency      No training: TokenCut cuts the graph of patches in two where keys of the last block differ [TokenCut].
                W_ij is 1 if cos > 0.2, else 1e-5; v is the second smallest solution of (D - W) v = lambda D v; the
                object is the connected part of v > mean(v), or of its complement, that holds the patch with the
                largest |v|. IoU, accuracy and max F-beta (beta^2 0.3), means over images. Encoders without attention
                use their last map. Where all patches are alike the mask is arbitrary: `cut` is the percent of images
                with something to cut.

Figures, PNG files in --out with their numbers in .npz files beside them
  embedding     Features of test images in the plane, a panel a checkpoint, coloured by class, and by azimuth where the
                set has views. `map 10-NN` in the table: percent of the 10 nearest neighbours, in the plane, of a
                point's own class.
  fullgrad      Where a linear classifier of objects looks [FullGrad], ResNets only. `fullgrad on object`: percent of
                the saliency within the mask; `object area`, what an even map would have there.
  attention     Attention of [CLS], or of the mean patch without it, mean over heads; TokenCut's eigenvector and mask.

`scenes` is the stand-in that needs no download: one to five of the rendered `blocks` on one floor, 96 px for encoders
of less than 96 px, else 384. Nothing about it compares with published figures. The true labels, rounded to 12 x 12
patches, reach an mIoU of 67 there, to 24 x 24 patches 81; background everywhere reaches 8. Repeating the first mask
reaches a J of 36.

Where the paper is silent. SER names no detector; ours is torchvision's, AdamW at 1e-4 [ViTDet], rate divided by ten
after 2/3 and 8/9 of the steps [Detectron]. RECON says "HyperNet", which its successor calls UPerNet; ours stays frozen
beneath it, has 256 channels and no auxiliary head. CLeVER follows DINO's and TokenCut's files; ours has no bilateral
solver. CIPER and SER do not say which images, settings or severity their figures use; ours are the packages' defaults
and severity 3. Further differences: the loss is the mean over labelled pixels, not over all; positions of ViTs are
resampled as in this repository; photometric distortion is ColorJitter; masks are resized to the nearest pixel centre,
where mmsegmentation takes the next lower pixel; the neck has group norms. Several processes train the same linear head;
detection and UPerNet draw other random numbers on each, so their results differ as between seeds.

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
import logging
import math
import os
import re
import tempfile
import time
from collections import OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import common
import eval_probe
import eval_robustness
from common import Count, Natural, Plural, Positive, Seed

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw

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
    figures: tuple[Literal["embedding", "fullgrad", "attention"], ...] | None = None
    """what to draw; default: nothing"""
    data: tuple[str, ...] | None = None
    """scenes (rendered on the spot), ade20k (segmentation), coco (detection), davis (video), ecssd, duts, dut-omron
    (saliency, attention); for embedding and fullgrad a set of eval_probe.py; default: scenes, and for embedding and
    fullgrad the set that the checkpoint was trained on"""
    data_dir: tuple[str, ...] = ()
    """their directories, in the order of --data; scenes, blocks and blocks-views need none"""
    head: Literal["linear", "upernet"] = "linear"
    """the head that is trained for segmentation"""
    steps: Count | None = None
    """training steps of segmentation and detection; default: the recipe's; 600 for scenes; eval.jsonl holds them"""
    batch_size: Plural | None = None
    """images a step over all processes together; default: the recipe's"""
    lr: Positive | None = None
    """peak learning rate, not scaled; default: the recipe's"""
    images: Count | None = None
    """use only the first so many test images or sequences, and four times as many training images; default: all.
    embedding: number of points, evenly spaced; default: 13,000, of tsne 1,000. fullgrad takes 512 where
    the set has masks, else the 8 that it shows"""
    embedding: Literal["pacmap", "tsne", "pca"] | None = None
    """how features are laid out in the plane: by the packages pacmap or scikit-learn, or pca, which needs none;
    default: pacmap where it is installed, else pca"""
    classes: Count | None = None
    """embedding: number of classes, drawn at random from --seed; default: all"""
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
    """loader processes for files; default: as many as this process has cores, at most 16"""
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
    matrix = matrix.cpu().double()
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
    # Two masks without a boundary agree; one alone scores 0.
    edges = [boundary(mask), boundary(truth)]
    if not (edges[0].any() and edges[1].any()):
        return float(not edges[0].any() and not edges[1].any())

    # A pixel is found where the other boundary, widened by a disk, covers it.
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


def f_beta(mask, truth):
    """1.3 p r / (0.3 p + r) of the precision p and recall r of two masks (H, W) bool [TokenCut]. A mask without pixels
    has precision 1, an object without pixels recall 1; F is 0 where p and r are."""
    hits = (mask & truth).sum().item()
    precision = hits / mask.sum().item() if mask.any() else 1.0
    recall = hits / truth.sum().item() if truth.any() else 1.0
    return 1.3 * precision * recall / (0.3 * precision + recall) if precision + recall else 0.0


def average_precision(truths, detections):
    """Boxes -> dict(AP, AP50, AP75), mean over classes, by pycocotools: all areas, 100 detections an image.

    truths: COCO's dict of images, annotations and categories. detections: COCO's list of dicts of image_id,
    category_id, bbox (x, y, width, height) and score. At least one class has a box."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # Without a detection pycocotools fails.
    if not detections:
        return dict(AP=0.0, AP50=0.0, AP75=0.0)

    # pycocotools prints tables of its progress, which are suppressed.
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truths
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()

    # The array holds precision at each IoU, recall and class; -1 marks classes without boxes.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (10, 101, classes)
    mean = lambda p: float(p[p > -1].mean())
    return dict(AP=mean(precision), AP50=mean(precision[0]), AP75=mean(precision[5]))


# ----------------------------------------------------------------------------------------------------------------------
# Data: scenes, rendered on the spot
# ----------------------------------------------------------------------------------------------------------------------

N_SCENES = dict(train=1000, test=250)
N_SEQUENCES, N_FRAMES = 20, 16


def draw_scenes(size, side, floor_hue, light_hue, boxes, colors, rotation, corner, present):
    """Draw n images of `size` px with up to K objects of `side` px each, later ones over earlier ones.

    floor_hue, light_hue: (n,). boxes: (n, K, 5, 6), colors: (n, K, 5, 3), rotation: (n, K, 4), as of `render_blocks`.
    corner: (n, K, 2) int64, top and left, at most size / 24 px outside. present: (n, K) bool, which objects there are.
    Returns images uint8 (n, 3, size, size) and ids uint8 (n, size, size): 0 background, k object k - 1.
    """
    # Render the floor at a quarter of the size, enough for a smooth surface, and add a margin.
    n, margin = len(present), size // 24
    empty = torch.zeros(n, 1, 6)
    upright = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).expand(n, 4)
    images, _ = common.render_blocks(empty, torch.zeros(n, 1, 3), upright, floor_hue, light_hue, size // 4)
    images = F.interpolate(images, (size, size), mode="bilinear")
    images = F.pad(images, (margin,) * 4)  # (n, 3, size + 2 margin, size + 2 margin)
    ids = torch.zeros(n, *images.shape[2:], dtype=torch.uint8)

    # Render each object on the floor and in the light of its scene, so that its edges blend in.
    scene, k = present.nonzero().unbind(1)  # (m,) each, scene by scene
    hues = floor_hue[scene], light_hue[scene]
    parts, masks = common.render_blocks(boxes[scene, k], colors[scene, k], rotation[scene, k], *hues, side)

    # Later objects overwrite earlier ones, in the images as in the ids.
    places = (corner[scene, k] + margin).tolist()
    for i, number, (top, left), part, mask in zip(scene.tolist(), k.tolist(), places, parts, masks):
        rows, columns = slice(top, top + side), slice(left, left + side)
        images[i, :, rows, columns] = torch.where(mask, part, images[i, :, rows, columns])
        ids[i, rows, columns][mask] = number + 1
    inner = slice(margin, margin + size)
    return images[:, :, inner, inner].contiguous(), ids[:, inner, inner].contiguous()


def some_objects(n, k, generator):
    """n x k objects in random poses: labels (n, k), boxes (n, k, 5, 6), colors (n, k, 5, 3), rotation (n, k, 4)."""
    labels = torch.randint(len(common.BLOCK_CLASSES), (n, k), generator=generator)
    boxes, colors = common.random_objects(labels.flatten(), generator)
    angles = (torch.rand(n * k, 3, generator=generator) - 0.5) * math.pi
    rotation = common.quaternion_from_angles(angles)  # (n k, 4)
    return labels, *(v.unflatten(0, (n, k)) for v in (boxes, colors, rotation))


def scenes(split, size, n):
    """The first n scenes of `split`: one to five objects in different cells of a 3 x 3 grid, each moved a little.
    Returns a dict of images, ids, as of `draw_scenes`, and labels (n, 5) int64 of the objects, -1 where there is
    none."""
    # All scenes of a split are drawn, so that the first n do not depend on n.
    generator, total = common.rng("scenes", split), N_SCENES[split]
    floor_hue, light_hue = torch.rand(2, total, generator=generator)  # (total,) each
    present = torch.arange(5) < torch.randint(1, 6, (total, 1), generator=generator)  # (total, 5)

    # Each object has a cell of its own, 32/96 of the side wide, and is moved by up to 4/96.
    cell = torch.rand(total, 9, generator=generator).argsort(1)[:, :5]  # (total, 5)
    shift = torch.randint(-4, 5, (total, 5, 2), generator=generator)  # in 96ths of the side
    labels, *objects = some_objects(total, 5, generator)
    corner = (torch.stack([cell // 3, cell % 3], 2) * 32 + shift) * (size // 96)  # (total, 5, 2)
    parts = [v[:n] for v in (floor_hue, light_hue, *objects, corner, present)]
    images, ids = draw_scenes(size, size // 3, *parts)
    return dict(images=images, ids=ids, labels=labels.where(present, -1)[:n])


def single_objects(split, size, n):
    """The first n test scenes of one object, two thirds as wide as the scene: a dict of images and ids."""
    # All scenes of a split are drawn, so that the first n do not depend on n.
    generator, total = common.rng("single objects", split), N_SCENES[split]
    floor_hue, light_hue = torch.rand(2, total, generator=generator)  # (total,) each
    corner = torch.randint(33, (total, 1, 2), generator=generator) * (size // 96)
    _, *objects = some_objects(total, 1, generator)
    present = torch.ones(total, 1, dtype=torch.bool)
    parts = [v[:n] for v in (floor_hue, light_hue, *objects, corner, present)]
    images, ids = draw_scenes(size, 2 * size // 3, *parts)
    return dict(images=images, ids=ids)


def moving_scenes(split, size, n):
    """The first n sequences of 16 frames: two objects, the second one in front, move on straight lines by at most 3/96
    of the side a frame, until a border stops them, and turn by 4 degrees about the vertical axis. A dict of images
    (16 n, 3, size, size) and ids (16 n, size, size), frame after frame."""
    generator, T, side = common.rng("moving scenes", split), N_FRAMES, size // 3
    floor_hue, light_hue = torch.rand(2, N_SEQUENCES, generator=generator)  # (20,) each
    cell = torch.rand(N_SEQUENCES, 9, generator=generator).argsort(1)[:, :2]  # (20, 2)
    start = torch.stack([cell // 3, cell % 3], 2) * 32  # (20, 2, 2) in 96ths of the side
    velocity = 6 * torch.rand(N_SEQUENCES, 2, 2, generator=generator) - 3
    _, boxes, colors, rotation = some_objects(N_SEQUENCES, 2, generator)

    # Each object moves on a straight line until a border stops it.
    t = torch.arange(T)[:, None, None]  # (T, 1, 1)
    corner = (start[:, None] + t * velocity[:, None]).clamp(0, 64) * (size // 96)  # (20, T, 2, 2)

    # Multiply each pose by a growing turn about the vertical axis; a quaternion holds half the angle.
    half = torch.arange(T).deg2rad() * 2  # (T,), of an angle that grows by 4 degrees
    turn = torch.stack([torch.zeros(T), half.sin(), torch.zeros(T), half.cos()], 1)  # (T, 4)
    turns = turn.expand(N_SEQUENCES, T, 4)[:, :, None].expand(-1, -1, 2, -1)  # (20, T, 2, 4)
    poses = rotation[:, None].expand(-1, T, -1, -1)  # (20, T, 2, 4)
    rotation = common.multiply(turns.reshape(-1, 4), poses.reshape(-1, 4)).view(N_SEQUENCES, T, 2, 4)

    # Render every frame of the first n sequences as a scene.
    each = [v[:n, None].expand(-1, T, *v.shape[1:]) for v in (floor_hue, light_hue, boxes, colors)]
    each += [rotation[:n], corner[:n].round().long(), torch.ones(n, T, 2, dtype=torch.bool)]
    images, ids = draw_scenes(size, side, *(v.flatten(0, 1) for v in each))
    return dict(images=images, ids=ids)


@functools.lru_cache(maxsize=8)
def rendered(make, split, size, n, whole):
    """make(split, size, n), where n is at most `whole`. All of a set of small scenes is kept in the cache directory."""
    # Large scenes would take a gigabyte of the cache, and parts of a set are not kept.
    if n < whole or size > 96:
        return make(split, size, n)
    sources = [inspect.getsource(function) for function in (draw_scenes, some_objects, make)]
    code = common.number_of(*sources, N_SCENES, N_SEQUENCES, N_FRAMES, common.code_of(common.blocks))
    return common.cached(f"{make.__name__}-{split}-{size}-{code:x}", lambda: make(split, size, n))


def scene_size(img_size):
    """Side of the scenes for encoders of an image size."""
    return 96 if img_size < 96 else 384


# ----------------------------------------------------------------------------------------------------------------------
# Data: the published layouts
# ----------------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "ade20k": "images/ and annotations/, each with training/ and validation/, of ADE_*.jpg and ADE_*.png",
    "coco": "train2017/, val2017/ and annotations/instances_{train,val}2017.json",
    "davis": "JPEGImages/480p/<sequence>/, Annotations/480p/<sequence>/ and ImageSets/2017/val.txt",
}
SALIENCY = {  # folders of images and of masks
    "ecssd": ("images", "ground_truth_mask"),
    "duts": ("DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask"),
    "dut-omron": ("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
}
LAYOUTS |= {name: f"{images}/ and {masks}/, or img/ and gt/" for name, (images, masks) in SALIENCY.items()}


def place_of(name, root, *choices):
    """The first of some relative paths that is there, as a Path; one line and exit 2 where none is."""
    for choice in choices:
        if (Path(root) / choice).exists():
            return Path(root) / choice
    common.die(f"--data-dir {root}: has no {choices[0]}; {name} is read from {LAYOUTS[name]}")


@contextlib.contextmanager
def opened(path):
    """An image file as Pillow opens it; OSError with one line where it cannot be read."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as e:
        # Pillow raises errors of any type for a damaged file.
        raise OSError(f"{common.printable(path)}: {common.UNREADABLE} ({common.printable(e)})") from None


def header(path):
    """The size (width, height) of an image file, and Pillow's name of its mode."""
    with opened(path) as image:
        return image.size, image.mode


def open_rgb(path):
    """File -> uint8 (3, H, W), as it is stored: masks and boxes know of no orientation tags."""
    with opened(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


# Kinds of masks, and Pillow's modes of their files: "index" (palette or grey; IGNORE is 0), "label" (ADE20K: 1 to 150
# become 0 to 149, 0 becomes IGNORE), "binary" (grey or RGB: anything but 0 is 1).
MODES = dict(index=("P", "L"), label=("L",), binary=("L", "RGB", "1"))


def open_mask(path, kind):
    """File of one of the MODES of a kind -> uint8 (H, W)."""
    with opened(path) as image:
        values = np.array(image.convert("L") if kind == "binary" else image)
    if kind == "label" and values.max() > 150:
        raise OSError(f"{common.printable(path)}: holds {values.max()}; labels of ADE20K are 0 to 150")

    # Labels start at 0; the 0 of unlabelled pixels wraps to IGNORE. Objects of videos are numbered from 1.
    if kind == "label":
        values = values - np.uint8(1)
    if kind == "index":
        values = np.where(values == IGNORE, np.uint8(0), values)
    return torch.from_numpy((values > 0).astype(np.uint8) if kind == "binary" else values)


class Pairs(torch.utils.data.Dataset):
    """Images and their masks: i -> uint8 (3, H, W), uint8 (H, W). They are tensors (N, ...), or lists of files with
    masks of a `kind`."""

    def __init__(self, images, masks, kind=None):
        self.images, self.masks, self.kind = images, masks, kind

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        if self.kind is None:
            return self.images[i], self.masks[i]
        return open_rgb(self.images[i]), open_mask(self.masks[i], self.kind)

    def checked(self, stride=1):
        """Itself. Refuses files whose headers say that they do not fit: images smaller than half a token of `stride`
        px, masks of another size or mode. Rank 0 reads the headers."""

        def check(i):
            image, mask = (common.printable(files[i]) for files in (self.images, self.masks))
            (size, _), (mask_size, mode) = header(self.images[i]), header(self.masks[i])
            if mode not in MODES[self.kind]:
                raise OSError(f"{mask}: is of mode {mode}; a mask of mode {' or '.join(MODES[self.kind])} is expected")
            if size != mask_size:
                sizes = "{} x {} and its mask {} x {}".format(*size, *mask_size)
                raise OSError(f"{image}: is {sizes} px (width x height); they must be of one size")
            if round(min(size) / stride) < 1:
                raise OSError(f"{image}: its side of {min(size)} px is less than half a patch of {stride} px")

        def check_all():
            try:
                with ThreadPoolExecutor(16) as pool:
                    list(pool.map(check, range(len(self))))
            except OSError as e:
                common.die(str(e))

        common.by_rank_0(check_all)
        return self

    def name(self, i):
        """What the files of its prediction are called."""
        return f"{i:05d}" if self.kind is None else Path(self.images[i]).stem


def paired_files(root, images, masks, kind):
    """Pairs of two folders (Path), by stem."""
    found = []
    for folder in (images, masks):
        files = sorted(common.visible(folder)[1])
        found.append({Path(file).stem: str(folder / file) for file in files})
        if len(found[-1]) < len(files):
            common.die(f"--data-dir {folder}: holds two files of one stem; images and masks are matched by it")

    # Refuse images without a mask, masks without an image, and empty folders.
    if odd := sorted(set(found[0]) ^ set(found[1])):
        where = images if odd[0] in found[0] else masks
        common.die(f"--data-dir {root}: {common.printable(odd[0])} is in {where} only; images need masks")
    if not found[0]:
        common.die(f"--data-dir {images}: holds no images ({', '.join(sorted(common.SUFFIXES))})")

    # Sorted stems give the same order on every machine.
    stems = sorted(found[0])
    return Pairs([found[0][s] for s in stems], [found[1][s] for s in stems], kind)


# A video: its name, and Pairs of its frames and of the number of the object at each pixel, 0 where none is.
Sequence = namedtuple("Sequence", "name frames")


def davis_sequences(root, most):
    """The first validation sequences of DAVIS-2017, None for all (list of Sequence)."""
    listed = place_of("davis", root, "ImageSets/2017/val.txt")
    names = listed.read_text(errors="replace").split()
    if not names:
        common.die(f"{listed}: names no sequence; davis is read from {LAYOUTS['davis']}")
    out = []
    for name in names[:most]:
        folders = [place_of("davis", root, f"{kind}/480p/{name}") for kind in ("JPEGImages", "Annotations")]
        frames, masks = (sorted(common.visible(folder)[1]) for folder in folders)

        # Measures leave out the first and the last frame, so that a sequence needs three.
        if len(frames) != len(masks) or len(frames) < 3:
            found = f"{len(frames)} frames and {len(masks)} masks"
            common.die(f"--data-dir {root}: {name} has {found}; it needs 3 frames or more, and a mask for each")
        if odd := [f for f, m in zip(frames, masks) if Path(f).stem != Path(m).stem]:
            common.die(f"--data-dir {root}: {name} has no mask for its frame {odd[0]}")

        # The first mask defines the objects to follow, so that it must show one.
        files = [[str(folder / f) for f in some] for folder, some in zip(folders, (frames, masks))]
        out.append(Sequence(name, Pairs(*files, "index").checked()))
        try:
            empty = not out[-1].frames[0][1].any()
        except OSError as e:
            common.die(str(e))
        if empty:
            common.die(f"{files[1][0]}: shows no object; the first mask of a sequence must show all of them")
    return out


@dataclasses.dataclass
class Boxes(torch.utils.data.Dataset):
    """Images with boxes: i -> uint8 (3, H, W), boxes (m, 4) float, left, top, right, bottom in pixels, and their
    labels (m,) int64 from 0."""

    images: torch.Tensor | list  # uint8 (N, 3, H, W), or files
    ids: list  # of the images
    sizes: list  # (height, width) of each
    of: torch.Tensor  # (M,) int64, sorted: the image, 0 to N - 1, of each box
    boxes: torch.Tensor  # (M, 4) float
    labels: torch.Tensor  # (M,) int64
    crowd: torch.Tensor  # (M,) bool: a box around many
    area: torch.Tensor  # (M,) float, of the object
    categories: list  # number of each class in files

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i] if isinstance(self.images, torch.Tensor) else open_rgb(self.images[i])
        begin, end = torch.searchsorted(self.of, torch.tensor([i, i + 1])).tolist()
        return image, self.boxes[begin:end], self.labels[begin:end]

    def subset(self, images, boxes):
        """Some of its images, rows (n,) int64 in order, with those boxes (M,) bool that are on them."""
        boxes = boxes & torch.isin(self.of, images)
        parts = {name: getattr(self, name)[boxes] for name in ("boxes", "labels", "crowd", "area")}
        rows, of = images.tolist(), torch.searchsorted(images, self.of[boxes])
        pick = lambda values: values[images] if isinstance(values, torch.Tensor) else [values[i] for i in rows]
        parts |= dict(images=pick(self.images), ids=pick(self.ids), sizes=pick(self.sizes), of=of)
        return dataclasses.replace(self, **parts)

    def truths(self):
        """All of it as COCO's dict."""
        # COCO's boxes have a corner, a width and a height.
        corner, far = self.boxes.tolist(), (self.boxes[:, 2:] - self.boxes[:, :2]).tolist()
        annotations = []
        for i, (image, label) in enumerate(zip(self.of.tolist(), self.labels.tolist())):
            a = dict(id=i + 1, image_id=self.ids[image], category_id=self.categories[label], area=self.area[i].item())
            annotations.append(a | dict(bbox=[*corner[i][:2], *far[i]], iscrowd=int(self.crowd[i])))
        images = [dict(id=i, height=h, width=w) for i, (h, w) in zip(self.ids, self.sizes)]
        categories = [dict(id=c) for c in self.categories]
        return dict(info={}, images=images, annotations=annotations, categories=categories)


def boxes_of_scenes(images, ids, labels):
    """A dict of `scenes` -> Boxes around the visible pixels of each object."""
    size, parts = images.shape[-1], []
    names = list(range(1, len(common.BLOCK_CLASSES) + 1))

    # Batches of 64 scenes bound the memory of the masks.
    for begin in range(0, len(ids), 64):
        masks = ids[begin : begin + 64, None] == torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1)  # (64, 5, H, W)
        i, k = masks.any(3).any(2).nonzero().unbind(1)  # (m,) each
        top, left, height, width = (common.bounding_boxes(masks[i, k]) * size).unbind(1)  # (m,) each
        boxes = torch.stack([left, top, left + width, top + height], 1)  # (m, 4)
        parts.append((begin + i, boxes, labels[begin + i, k], masks[i, k].sum((1, 2)).float()))

    # Join the batches; categories are numbered from 1, and no box is a crowd.
    of, boxes, classes, area = (torch.cat(v) for v in zip(*parts))
    n, crowd = len(images), torch.zeros(len(of), dtype=torch.bool)
    return Boxes(images, list(range(n)), [(size, size)] * n, of, boxes, classes, crowd, area, names)


def parse_coco(file):
    """instances_*.json -> a dict of tensors and plain values; one line and exit 2 where it is not one."""
    # Read the fields that detection uses.
    try:
        held = json.loads(file.read_text())
        images = {image["id"]: i for i, image in enumerate(held["images"])}
        sizes = [(image["height"], image["width"]) for image in held["images"]]
        names = [image["file_name"] for image in held["images"]]
        categories = sorted(category["id"] for category in held["categories"])
        keys = "id", "image_id", "category_id", "bbox", "area", "iscrowd"
        rows = [[a[key] for key in keys] for a in held["annotations"]]
        if len(images) < len(sizes):
            common.die(f"{file}: two images have the same id")

        # Refuse boxes without an image or a category, and boxes that reach beyond their image.
        for number, image, category, (x, y, w, h), *_ in rows:
            if image not in images or category not in categories:
                common.die(f"{file}: annotation {number} is of an image or a category that is not in the file")
            height, width = sizes[images[image]]
            if min(x, y) < -1 or min(w, h) < 0 or x + w > width + 1 or y + h > height + 1:
                common.die(f"{file}: annotation {number} reaches beyond its image by more than a pixel")
    except (ValueError, KeyError, TypeError) as e:
        common.die(f"{file}: not the annotations of COCO ({type(e).__name__} {e}); copy it again")
    if not rows:
        common.die(f"{file}: holds no box")

    # Sort the boxes by image, in which order they are looked up.
    _, image, category, box, area, crowd = zip(*rows)
    index = {c: i for i, c in enumerate(categories)}
    of, order = torch.tensor([images[i] for i in image]).sort(stable=True)
    box = torch.tensor(box, dtype=torch.float32)[order]
    labels = torch.tensor([index[c] for c in category])[order]
    found = dict(of=of, labels=labels, boxes=torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], 1))
    found |= dict(area=torch.tensor(area, dtype=torch.float32)[order], crowd=torch.tensor(crowd).bool()[order])
    return found | dict(names=names, ids=list(images), sizes=sizes, categories=categories)


def coco_split(root, split):
    """train or val of COCO 2017 (Boxes). Rank 0 reads the annotations, which stay in the cache directory."""
    folder = place_of("coco", root, f"{split}2017")
    file = place_of("coco", root, f"annotations/instances_{split}2017.json")

    # The parsed annotations are cached until the file's size or date changes, or the code that parses it.
    code, stat = inspect.getsource(parse_coco), file.stat()
    stamp = common.number_of(code, str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    make = lambda: common.by_rank_0(lambda: parse_coco(file))
    found = dict(common.cached(f"coco-{split}-{stamp:x}", make))

    # A partial copy is noticed before anything is trained.
    images = [str(folder / name) for name in found.pop("names")]
    if missing := next((path for path in images if not os.path.isfile(path)), None):
        common.die(f"{missing}: missing, but {file} names it; coco is read from {LAYOUTS['coco']}")
    return Boxes(images, **found)


def load(task, name, root, side, most, stride=1):
    """The images of a task: {"train": ..., "test": ...} of Pairs (segmentation) or Boxes (detection); Pairs
    (saliency); a list of Sequence (video). `side` is that of scenes. `most` test images, or None for all. No image is
    smaller than half of `stride` px, where that would leave it without a patch."""
    # Training sets are cut to four times as many images as test sets.
    share = {"train": 4 * most if most else 10**9, "test": most or 10**9}
    head = lambda pairs, n: Pairs(pairs.images[:n], pairs.masks[:n], pairs.kind)
    some = lambda make, split, whole: rendered(make, split, side, min(share[split], whole), whole)

    # Every task has scenes; those of videos are split into sequences of 16 frames.
    if name == "scenes" and task == "video":
        found, n = some(moving_scenes, "test", N_SEQUENCES), N_FRAMES
        parts = zip(found["images"].split(n), found["ids"].split(n))
        return [Sequence(f"{i:02d}", Pairs(images, ids)) for i, (images, ids) in enumerate(parts)]

    # TokenCut finds one object, so that each scene has a single one.
    if name == "scenes" and task in ("saliency", "attention"):
        found = some(single_objects, "test", N_SCENES["test"])
        return Pairs(found["images"], found["ids"])

    # Detection and segmentation use the same scenes; objects are numbered by ids, classes by labels.
    if name == "scenes":
        found = {split: some(scenes, split, n) for split, n in N_SCENES.items()}
        if task == "detection":
            return {split: boxes_of_scenes(**parts) for split, parts in found.items()}
        pixels = lambda parts: pixels_of(parts["ids"], F.pad(parts["labels"] + 1, (1, 0)))
        return {split: Pairs(parts["images"], pixels(parts)) for split, parts in found.items()}

    # Published sets are read from their folders.
    if name == "davis":
        return davis_sequences(root, most)
    if name in SALIENCY:
        folders = [place_of(name, root, *choices) for choices in zip(SALIENCY[name], ("img", "gt"))]
        return head(paired_files(root, *folders, "binary"), share["test"]).checked(stride)

    # ADE20K's folders may be in the folder of the official archive.
    if name == "ade20k":
        base = place_of(name, root, "ADEChallengeData2016/images", "images").parent
        folders = dict(train="training", test="validation")
        sub = lambda kind, split: place_of(name, base, f"{kind}/{folders[split]}")
        pairs = lambda split: paired_files(root, sub("images", split), sub("annotations", split), "label")
        return {split: head(pairs(split), share[split]).checked() for split in folders}
    first = lambda boxed, n: boxed.subset(torch.arange(len(boxed))[:n], boxed.of >= 0)
    train, test = (first(coco_split(root, split), share[kind]) for kind, split in (("train", "train"), ("test", "val")))

    # A label must mean the same class in both.
    if train.categories != test.categories:
        common.die(f"--data-dir {root}: the annotations of train2017 and val2017 have different categories")

    # Without a box there is nothing to learn, and AP is undefined.
    for kind, boxed in (("training", trainable(train)), ("test", test)):
        if boxed.crowd.all():
            advice = "; raise --images" if most else ""
            common.die(f"--data-dir {root}: none of the {kind} images that are read has a box{advice}")
    return dict(train=train, test=test)


def listed(data):
    """What `load` gives -> what all ranks must hold alike: file names, or the shape of images in memory."""
    if isinstance(data, dict):
        return [listed(part) for part in data.values()]
    if isinstance(data, list):
        return [(sequence.name, listed(sequence.frames)) for sequence in data]
    in_memory = isinstance(data.images, torch.Tensor)
    return tuple(data.images.shape) if in_memory else [Path(path).name for path in data.images]


def pixels_of(ids, values):
    """ids uint8 (n, H, W), values (n, K) int64 -> uint8 (n, H, W), the value of the number at each pixel."""
    return values.to(torch.uint8).gather(1, ids.flatten(1).long()).view_as(ids)


def refuse(error):
    """End with one line for a file or an image that does not fit. Only one rank may have seen it, and with a mistake
    of the user's, code 2, the others would go on without it; so several processes end as a failure, code 1."""
    # The error of a loader process is a traceback whose last line is the message.
    line = str(error).splitlines()[-1].removeprefix("OSError: ")
    common.die(line, 2 if common.world_size() == 1 else 1, alone=True)


def reading(data, rows, workers, name):
    """Yield the items of some rows (list) in their order, behind a progress bar: from loader processes where they are
    files. A file that does not fit ends the program with one line."""
    # Rendered images are in memory and need no loader processes, which send images through shared memory.
    try:
        if isinstance(data.images, torch.Tensor) or not rows:
            workers = 0
        elif workers != 0:
            size = 1.5 * sum(t.nbytes for t in common.tensors(data[rows[0]]))
            workers = common.default_workers(workers, size)
            common.check_shared_memory(workers, size)
        how = dict(num_workers=workers, worker_init_fn=common.detach_worker, timeout=600 if workers else 0)
        loader = torch.utils.data.DataLoader(data, batch_size=None, sampler=rows, **how)
        yield from common.progress(loader, total=len(rows), desc=name)
    except OSError as e:
        refuse(e)


# ----------------------------------------------------------------------------------------------------------------------
# Dense features
# ----------------------------------------------------------------------------------------------------------------------


class Encoder:
    """A frozen encoder as the tasks see it. It is no nn.Module: a head that holds it neither trains nor moves it.

    `stride` is the side of a token in pixels, `dim` the width of the last map, `layers` four blocks, evenly spaced, or
    the last four stages, and `widths` their widths."""

    def __init__(self, backbone, path, device, amp="off"):
        self.backbone = backbone.to(device).eval()
        self.path, self.device, self.amp = path, device, amp
        self.norm = getattr(backbone, "norm", nn.Identity())
        depth = backbone.depth

        # The maps of a blank image show the stride and the widths of the layers.
        side = backbone.img_size * math.ceil(64 / backbone.img_size)
        blank = torch.zeros(1, 3, side, side, device=device)

        # The last maps of a pyramid differ in shape; take its last four stages, and of a ViT four evenly spaced blocks.
        with torch.no_grad():
            before, last = (backbone.tokens(blank, layer) for layer in (max(1, depth - 1), depth))
            pyramid = before.shape != last.shape
            self.layers = tuple(max(1, depth - 3 + i if pyramid else (i + 1) * depth // 4) for i in range(4))
            self.widths = [m.shape[-1] for m in backbone.tokens(blank, self.layers)]
        self.stride, self.dim = side // last.shape[1], last.shape[-1]

        # Find the attention of the last block, where there is one.
        blocks = getattr(getattr(backbone, "model", backbone), "blocks", None)
        self.attention = getattr(blocks[-1], "attn", None) if blocks is not None else None
        if not hasattr(self.attention, "qkv"):
            self.attention = None

        # Refuse an encoder that takes images of one size: one more column of patches needs other positions.
        try:
            with torch.no_grad():
                backbone.tokens(F.pad(blank, (0, self.stride)), depth)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # timm's models raise errors of any type
            why = " ".join(str(e).split())[:120]
            common.die(f"{path}: takes images of {backbone.img_size} px only ({why}); dense tasks need other sizes")

    def obstacle(self, part):
        """What a task or figure needs and this encoder is not; None where it can be used."""
        # Rotary positions and the like change an attention beyond its queries and keys.
        plain = type(None), timm.models.vision_transformer.Attention
        if part == "attention" and self.attention is None:
            return "needs a ViT"
        if part in ("saliency", "attention") and not isinstance(self.attention, plain):
            return "needs the attention of a plain ViT, such as timm:vit_small_patch16_224.dino"

        # The highest feature of a network without activations other than ReLU is the sum of FullGrad's terms.
        if part == "fullgrad":
            if not isinstance(getattr(self.backbone, "model", self.backbone), (common.ResNet, timm.models.ResNet)):
                return "needs a ResNet"
            x = torch.randn(1, 3, *[self.backbone.img_size] * 2, generator=common.rng("complete"))
            total, terms = full_gradients(self.backbone, x.to(self.device))
            products = torch.stack([(value * gradient).sum() for value, gradient in terms])
            if (products.sum() - total).abs() > 1e-3 * products.abs().sum():
                return "needs a ResNet without activations other than ReLU and without gates (squeeze-and-excite)"
        return None

    def fit(self, *sides):
        """The nearest multiples of the stride, half to even."""
        return tuple(round(side / self.stride) * self.stride for side in sides)

    def normalise(self, images, size=None, std=None):
        """uint8 (B, 3, H, W) -> normalised float on the device, resized to `size` before, bilinearly and without
        antialiasing, rounded to levels."""
        x = images.to(self.device).float()
        if size is not None and tuple(size) != tuple(x.shape[2:]):
            x = F.interpolate(x, size, mode="bilinear", align_corners=False).round()
        return common.Normalize(self.backbone.mean, std or self.backbone.std)(x / 255)

    @torch.no_grad()
    def maps(self, x, layers):
        """Normalised x (B, 3, H, W), sides multiples of the stride -> float32 maps (B, C, h, w) after some layers.
        Those as wide as the last one go through the final norm."""
        with common.autocast(self.device, self.amp):
            maps = self.backbone.tokens(x, tuple(layers))
            maps = [self.norm(m) if m.shape[-1] == self.dim else m for m in maps]
        return [m.float().permute(0, 3, 1, 2) for m in maps]

    def last(self, x):
        """The last map (B, dim, h, w)."""
        return self.maps(x, (self.backbone.depth,))[0]

    @torch.no_grad()
    def attend(self, x):
        """x (B, 3, H, W) -> queries and keys (B, heads, N, D / heads) of the last block, float32. Patches come last;
        before them stands [CLS] where there is one. timm fuses attention: only q and k are there to be seen."""
        # A hook records the projection to queries, keys and values.
        kept = []
        handle = self.attention.qkv.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            with common.autocast(self.device, self.amp):
                self.backbone(x)
        finally:
            handle.remove()
        q, k, _ = kept[0].float().unflatten(2, (3, self.attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attention.q_norm(q), self.attention.k_norm(k)


def in_turn(n):
    """The rows of this rank among n: every W-th."""
    return list(range(n))[common.rank() :: common.world_size()]


def gathered(found, n):
    """{row: value} of each rank -> the values of all ranks, of rows 0 to n - 1 in turn, on every rank."""
    every = {row: value for part in common.from_all_ranks(found) for row, value in part.items()}
    return [every[row] for row in range(n)]


def write_png(path, values, colours=None):
    """uint8 (H, W) -> a file, with a palette where one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.cpu().numpy())
    if colours is not None:
        image.putpalette(colours)
    image.save(path)


# ----------------------------------------------------------------------------------------------------------------------
# Video: labels that move with the features
# ----------------------------------------------------------------------------------------------------------------------

N_CONTEXT, RADIUS, TOP_K, TEMPERATURE = 7, 12, 5, 0.1  # [DINO]
BLOCK = 2**26  # weights that are computed at once


def shown_size(height, width, patch):
    """The size at which DAVIS is shown [DINO]: the short side 480 px, the long one a multiple of 64, a square as a
    landscape; multiples of the patch where that does not divide 64."""
    unit = 64 if 64 % patch == 0 else patch
    short, long = 480 // patch * patch, 480 * max(height, width) // (unit * min(height, width)) * unit
    return (long, short) if height > width else (short, long)


def near(h, w, radius, device):
    """(h w, h w) bool: patches at most `radius` rows and columns apart."""
    band = lambda n: (torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)).abs() <= radius
    return torch.kron(band(h), band(w))


def similar_patches(target, context, mask, k=TOP_K):
    """Weights (m, n hw) of the context's patches for m patches of the target; rows sum to 1.

    target (m, D), context (n, hw, D), both normalised; mask (m, hw) bool. Over all frames together the k largest
    exp(cos / 0.1) stay, and those that equal the k-th."""
    affinity = (target @ context.flatten(0, 1).T / TEMPERATURE).exp()  # (m, n hw)
    affinity = affinity * mask.repeat(1, len(context))
    kth = affinity.topk(min(k, affinity.shape[1]), 1).values[:, -1:]  # (m, 1)
    affinity = torch.where(affinity >= kth, affinity, 0.0)
    return affinity / affinity.sum(1, keepdim=True)


def stretched(soft):
    """Each channel of (C, H, W) scaled to [0, 1]; one that is the same everywhere becomes 0."""
    low, high = soft.amin((1, 2), keepdim=True), soft.amax((1, 2), keepdim=True)
    return torch.where(high > low, (soft - low) / (high - low).clamp(min=1e-12), 0.0)


def follow(encoder, frames, davis):
    """Yield the predicted and the true number of the object at each pixel, uint8 (H, W) each, for all frames of a
    sequence (Pairs); of the first frame the truth is given.

    Memory: a frame of 480 x 896 px has n = 26,880 patches of 4 px. Weights of 8 frames would take 8 n^2 x 4 bytes, 23
    GB; blocks of 2^26 weights, of which four exist at once, take 1.1 GB, the mask of near patches n^2 bytes, 0.7 GB."""
    # DAVIS has its published size; scenes are enlarged to 24 patches a side, at most twofold.
    image, first = frames[0]
    H, W = first.shape
    yield first, first
    size = shown_size(H, W, encoder.stride) if davis else shown_side(encoder, image)
    h, w = (side // encoder.stride for side in size)

    # DINO's file divides red by 0.228 where ImageNet's deviation is 0.229; encoders with ImageNet's do the same.
    sic = davis and tuple(encoder.backbone.std) == common.IMAGENET[1]
    std = (0.228, *common.IMAGENET[1][1:]) if sic else None

    # Features have unit length, so that their products are cosines.
    def features(image):  # uint8 (3, H, W) -> (h w, D)
        found = encoder.last(encoder.normalise(image[None], size, std))
        return F.normalize(found[0].flatten(1).T, dim=1)

    # Sample the labels of the first frame on the grid of patches, at which soft labels stay.
    n = int(first.max()) + 1
    grid = F.interpolate(first[None, None].float(), (h, w), mode="nearest-exact")[0, 0].long()
    labels = F.one_hot(grid.flatten(), n).float().to(encoder.device)  # (h w, n)

    # Labels move by at most 12 rows and columns.
    mask = near(h, w, RADIUS, encoder.device)  # (h w, h w)
    context = [(features(image), labels)]
    for t in range(1, len(frames)):
        # A patch gets the mean label of similar patches in the first frame and the 7 last ones.
        image, truth = frames[t]
        target = features(image)
        before, labels = torch.stack([f for f, _ in context]), torch.cat([v for _, v in context])
        rows = max(1, BLOCK // len(labels))
        blocks = zip(target.split(rows), mask.split(rows))
        soft = torch.cat([similar_patches(some, before, close) @ labels for some, close in blocks])  # (h w, n)
        context = context[:1] + [*context[1:], (target, soft)][-N_CONTEXT:]

        # Each channel is scaled to [0, 1], so that an object reaches 1 even after it has left [DINO].
        soft = F.interpolate(soft.T.unflatten(1, (h, w))[None], size, mode="bilinear", align_corners=False)[0]
        predicted = stretched(soft).argmax(0).float()
        predicted = F.interpolate(predicted[None, None], (H, W), mode="nearest-exact")[0, 0]
        yield predicted.to(torch.uint8).cpu(), truth


def video(encoder, sequences, name, args, save):
    """DAVIS' measures of all sequences -> ({metric: percent}, details)."""
    found = {}
    for i in common.progress(in_turn(len(sequences)), desc=f"{name} video", unit="sequence"):
        (sequence, frames), scores = sequences[i], {}
        try:
            for t, (predicted, truth) in enumerate(follow(encoder, frames, name == "davis")):
                if save:
                    write_png(save / sequence / f"{t:05d}.png", predicted, palette())

                # The first mask names the objects; the first and the last frame count in no measure [DAVIS].
                scores = scores or {k: [] for k in range(1, int(truth.max()) + 1)}
                for k in scores if 0 < t < len(frames) - 1 else ():
                    mask, of_object = predicted == k, truth == k
                    scores[k].append((jaccard(mask, of_object), boundary_f(mask, of_object)))
        except OSError as e:
            refuse(e)
        measures = {k: [over_time(values) for values in zip(*pairs)] for k, pairs in scores.items()}
        found[i] = [dict(sequence=sequence, object=k, J=J, F=f) for k, (J, f) in measures.items()]

    # The mean is over objects, not over sequences.
    objects = [o for some in gathered(found, len(sequences)) for o in some]
    J, f = (100 * sum(o[m]["mean"] for o in objects) / len(objects) for m in "JF")
    details = dict(sequences=len(sequences), objects=objects, context=N_CONTEXT, radius=RADIUS, top_k=TOP_K)
    return {"J&F": (J + f) / 2, "J": J, "F": f}, details


def palette():
    """Colours of the numbers 0 to 255 in PASCAL VOC and DAVIS: their bits, dealt to red, green and blue in turn."""
    bits = (np.arange(256)[:, None] >> np.arange(9) & 1).reshape(256, 3, 3)  # (number, bit of the colour, colour)
    return (bits << (7 - np.arange(3))[:, None]).sum(1).flatten().tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Saliency: TokenCut
# ----------------------------------------------------------------------------------------------------------------------

ALIKE, EDGE = 0.2, 1e-5  # cosine above which patches are alike; weight of those that are not [TokenCut]


def dilated(mask):
    """A mask (h, w) bool and its upper, lower, left and right neighbours."""
    cross = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])[None, None]
    return F.conv2d(mask.float()[None, None], cross, padding=1)[0, 0] > 0


def token_cut(features, shape):
    """features (h w, D) of a grid of `shape` (h, w) -> the object's patches (h, w) bool, the eigenvector (h, w), and
    whether there is something to cut: where all patches are alike, both are arbitrary. In float64 on the CPU, as the
    eigenvalue is of the size of 1e-5."""
    # Patches are alike where the cosine of their features exceeds 0.2; weak edges join all others.
    f = F.normalize(features.cpu().double(), dim=1)
    W = (f @ f.T > ALIKE).double().clamp(min=EDGE)  # (N, N)
    root = W.sum(1).rsqrt()  # (N,), D^-1/2

    # (D - W) v = lambda D v has the solutions v = D^-1/2 u, where u is an eigenvector of I - D^-1/2 W D^-1/2.
    laplacian = torch.eye(len(W), dtype=torch.float64) - root[:, None] * W * root
    v = root * torch.linalg.eigh(laplacian).eigenvectors[:, min(1, len(W) - 1)]  # (N,)

    # The object is on the side of the patch with the largest |v| [TokenCut].
    foreground = (v > v.mean()).view(shape)
    seed = int(v.abs().argmax())
    foreground = foreground if foreground.flatten()[seed] else ~foreground

    # Keep the part of the foreground that is connected to the seed.
    mask = torch.zeros(shape, dtype=torch.bool)
    grown = torch.arange(len(v)).view(shape) == seed
    while (grown != mask).any():
        mask, grown = grown, dilated(grown) & (foreground | grown)
    return mask, v.view(shape), bool((W < 1).any())


def cut_features(encoder, image, shown=None):
    """An image uint8 (3, H, W), resized to `shown` (h, w) or to the nearest multiples of the stride -> what TokenCut
    cuts, (N, D), its grid (h, w), and the attention of [CLS] (h, w), None without attention.

    The features are the keys of all heads, or of an encoder without attention the last map. Without [CLS] the
    attention is the mean over patches."""
    # Resize by Lanczos' filter, as TokenCut's code does.
    height, width = shown or encoder.fit(*image.shape[1:])
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((width, height), Image.LANCZOS)
    x = encoder.normalise(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
    h, w = height // encoder.stride, width // encoder.stride
    if encoder.attention is None:
        return encoder.last(x)[0].flatten(1).T, (h, w), None

    # [CLS] and registers come before the patches, and are cut off.
    q, k = (v[0] for v in encoder.attend(x))  # (heads, N, d) each
    before = k.shape[1] - h * w

    # Attention is a mean over heads, of [CLS] or, without it, of all patches.
    query = q[:, :1] if before else q
    seen = (query @ k.mT / k.shape[2] ** 0.5).softmax(2)[..., before:].mean((0, 1))  # (h w,)
    return k.transpose(0, 1).flatten(1)[before:], (h, w), seen.view(h, w).cpu()


def shown_side(encoder, image):
    """The size at which scenes are shown: 24 patches, but at most twice their own."""
    side = min(24 * encoder.stride, 2 * image.shape[1])
    return encoder.fit(side, side)


def cut_object(encoder, image, name):
    """An image uint8 (3, H, W) of a set -> the pixels of its object (H, W) bool, the attention, the eigenvector and the
    object on the grid, (h, w) each, and whether there is something to cut."""
    features, shape, seen = cut_features(encoder, image, shown_side(encoder, image) if name == "scenes" else None)
    mask, v, found = token_cut(features, shape)
    pixels = F.interpolate(mask[None, None].float(), image.shape[1:], mode="nearest")[0, 0] > 0
    return pixels, seen, v, mask, found


def saliency(encoder, pairs, name, args, save):
    """Masks of TokenCut against the truth -> ({metric: percent}, details)."""
    found, rows = {}, in_turn(len(pairs))
    for i, (image, truth) in zip(rows, reading(pairs, rows, args.workers, f"{name} saliency")):
        mask, *_, cut = cut_object(encoder, image, name)
        if save:
            write_png(save / f"{pairs.name(i)}.png", 255 * mask.to(torch.uint8))

        # Compare the mask with the truth at the size of the image.
        truth = truth > 0
        accuracy = (mask == truth).double().mean().item()
        found[i] = dict(IoU=jaccard(mask, truth), acc=accuracy, maxF=f_beta(mask, truth), cut=cut)

    # A mask without grey levels has the same F-beta at all thresholds, and its mean is max F-beta [TokenCut].
    every = gathered(found, len(pairs))
    results = {metric: 100 * sum(scores[metric] for scores in every) / len(every) for metric in every[0]}
    if results["cut"] < 100:
        share = f"in {100 - results['cut']:.3g} % of the images all patches are alike (cosine above {ALIKE})"
        eval_probe.say(f"{encoder.path}: saliency on {name}: {share}; their masks are arbitrary")

    # The row of scenes has other tasks as well, so that these metrics name their task.
    if name == "scenes":
        results = {f"saliency {metric}": value for metric, value in results.items()}
    feature = "last map" if encoder.attention is None else "keys of the last block"
    return results, dict(images=len(pairs), feature=feature)


# ----------------------------------------------------------------------------------------------------------------------
# What is trained: batches, a neck, the loop
# ----------------------------------------------------------------------------------------------------------------------


RECIPES = {  # (head or task, data): steps, images a step, rate, weight decay of AdamW
    ("linear", "scenes"): (600, 16, 1e-2, 1e-4),
    ("linear", "ade20k"): (40_000, 16, 1e-3, 1e-4),  # [DINOv2]
    ("upernet", "scenes"): (600, 16, 1e-3, 0.01),
    ("upernet", "ade20k"): (160_000, 16, 6e-5, 0.01),  # [mmsegmentation]
    ("detection", "scenes"): (600, 8, 1e-3, 0.1),
    ("detection", "coco"): (45_000, 32, 1e-4, 0.1),  # [SER: the first two; ViTDet: the others]
}


def recipe(task, name, args):
    """The settings of training for a task on a set, which flags replace: dict(steps, batch_size, lr, weight_decay)."""
    steps, batch_size, lr, weight_decay = RECIPES[args.head if task == "segmentation" else task, name]
    batch_size = args.batch_size or batch_size
    if batch_size % common.world_size():
        common.die(f"--batch-size {batch_size}: must be a multiple of the number of processes, {common.world_size()}")
    return dict(steps=args.steps or steps, batch_size=batch_size, lr=args.lr or lr, weight_decay=weight_decay)


class Steps(torch.utils.data.Dataset):
    """step -> this rank's share of the batch, a list of view(*item, generator). Order and draws belong to the global
    batch: they depend on the seed and the place in the training alone."""

    def __init__(self, data, view, seed, batch_size):
        self.data, self.view, self.seed, self.batch_size = data, view, seed, batch_size
        # A loader process does not know its rank. `reading` starts loader processes only where images are files.
        self.rank, self.share, self.images = common.rank(), batch_size // common.world_size(), data.images

    def __getitem__(self, step):
        begin = step * self.batch_size + self.rank * self.share
        return [self.item(place) for place in range(begin, begin + self.share)]

    def item(self, place):
        epoch, i = divmod(place, len(self.data))
        row = int(common.order_of_epoch(len(self.data), self.seed, epoch)[i])
        return self.view(*self.data[row], common.rng(self.seed, "view", place))


def train(name, model, steps, n, args, optimizer, rate, loss_of):
    """Train `model` for n steps; rate(t) multiplies each group's own rate. loss_of(model, batch) is the loss of a
    global batch, as far as the mean over ranks goes."""
    parallel = common.distributed(model.train())
    peaks = [group["lr"] for group in optimizer.param_groups]

    # Dropout and samples depend on the step and the rank, not on earlier steps.
    for t, batch in enumerate(reading(steps, range(n), args.workers, name)):
        common.seed_everything(args.seed, name, t, common.rank())
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * rate(t)

        # All ranks stop together, as one that stops alone leaves the others waiting.
        loss = loss_of(parallel, batch)
        if common.any_rank(int(not loss.isfinite())):
            common.die(f"{name}: the loss is not finite at step {t}; lower --lr ({peaks[0]:g})", 1)

        # The backward pass averages gradients over ranks.
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


class Neck(nn.Module):
    """Normalised images (B, 3, H, W) -> dict of maps (B, width, H / s, W / s), "0" to "3" of s = 4, 8, 16, 32 [ViTDet,
    with bilinear resizing, which knows any patch size], and "pool" of s = 64, as FasterRCNN wants them. `several`: they
    come from four blocks of a ViT, not from its last one; pyramids give the four stages in any case."""

    def __init__(self, encoder, width, several=False):
        super().__init__()
        self.encoder, self.out_channels = encoder, width

        # A pyramid gives its four stages, a ViT four blocks or its last block four times.
        last = encoder.backbone.depth
        pyramid = len(set(encoder.widths)) > 1
        self.layers = encoder.layers if several or pyramid else (last,) * 4
        widths = encoder.widths if several or pyramid else [encoder.dim] * 4

        # Each level is a 1x1 and a 3x3 convolution with group norms of eight channels a group.
        self.levels = nn.ModuleList()
        groups = width // 8
        for d in widths:
            first, second = nn.Conv2d(d, width, 1, bias=False), nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.levels.append(nn.Sequential(first, nn.GroupNorm(groups, width), second, nn.GroupNorm(groups, width)))

    def forward(self, x):
        # Compute each distinct map once.
        layers = sorted(set(self.layers))
        maps = dict(zip(layers, self.encoder.maps(x, layers)))
        out = []
        for i, (layer, level) in enumerate(zip(self.layers, self.levels)):
            # The 1x1 convolution and the resizing commute, and the first makes the map smaller.
            size = tuple(max(1, side // (4 * 2**i)) for side in x.shape[2:])
            narrow = level[0](maps[layer])
            out.append(level[1:](F.interpolate(narrow, size, mode="bilinear", align_corners=False)))
        return OrderedDict(zip(("0", "1", "2", "3", "pool"), [*out, F.max_pool2d(out[-1], 1, 2)]))


# ----------------------------------------------------------------------------------------------------------------------
# Semantic segmentation
# ----------------------------------------------------------------------------------------------------------------------

CROP, LONG = 512, 2048  # pixels: side of crops and windows of ADE20K, and the most that a side is scaled to


class LinearHead(nn.Module):
    """Normalised images -> logits (B, classes, h, w): batch norm over the last map and a 1x1 convolution [DINOv2]."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.norm, self.classify = nn.BatchNorm2d(encoder.dim), nn.Conv2d(encoder.dim, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, x):
        return self.classify(self.norm(self.encoder.last(x)))


def block(before, after, kernel):
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


class UPerHead(nn.Module):
    """Normalised images -> logits (B, classes, H / 4, W / 4): UPerNet on four maps of the encoder."""

    def __init__(self, encoder, classes, width):
        super().__init__()
        self.neck = Neck(encoder, width, several=True)
        self.grids = (1, 2, 3, 6)

        # Pyramid pooling adds means over four grids to the coarsest map.
        self.pools = nn.ModuleList(block(width, width, 1) for _ in self.grids)
        self.pooled = block(width * 5, width, 3)

        # A feature pyramid adds coarse maps to finer ones; one convolution fuses all four.
        self.laterals = nn.ModuleList(block(width, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(block(width, width, 3) for _ in range(3))
        self.fuse, self.drop = block(width * 4, width, 3), nn.Dropout2d(0.1)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        """Normalised images x (B, 3, H, W) -> scores (B, classes, h, w) at the size of the neck's finest map."""
        # Pyramid pooling gives the coarsest map the context of the whole image.
        resized = lambda y, like: F.interpolate(y, like.shape[2:], mode="bilinear", align_corners=False)
        *fine, coarse, _ = self.neck(x).values()
        pools = [pool(F.adaptive_avg_pool2d(coarse, n)) for n, pool in zip(self.grids, self.pools)]
        coarse = self.pooled(torch.cat([coarse, *(resized(p, coarse) for p in pools)], 1))

        # From coarse to fine, add to each map the coarser one above it.
        maps = [coarse]
        for y, lateral in zip(fine[::-1], self.laterals):
            maps.insert(0, lateral(y) + resized(maps[0], y))

        # Fuse all maps at the size of the finest one, and classify.
        maps = [smooth(y) for smooth, y in zip(self.smooth, maps)] + [coarse]
        return self.classify(self.drop(self.fuse(torch.cat([resized(y, maps[0]) for y in maps], 1))))


def polynomial(t, steps):
    """What the rate is multiplied with at step t: linear to 0, after a linear warm-up over 1,500 steps or a tenth."""
    warmup = min(1500, steps / 10)
    return (1 - t / steps) * (1 - (1 - t / warmup) * (1 - 1e-6) if t < warmup else 1)


def flip_view(image, mask, generator):
    """The view of scenes: mirrored or not."""
    if torch.rand((), generator=generator) < 0.5:
        image, mask = image.flip(2), mask.flip(1)
    return image, mask


def scaled(image, mask, long, short):
    """An image uint8 (3, H, W), and its mask, scaled to fit into a box."""
    H, W = image.shape[1:]
    factor = min(long / max(H, W), short / min(H, W))
    size = int(H * factor + 0.5), int(W * factor + 0.5)
    image = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False).round().to(torch.uint8)
    return image[0], mask if mask is None else F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]


def ade_view(side, mean, image, mask, generator):
    """The training view of ADE20K [mmsegmentation]: a random scale, a crop of `side` px in which no class covers more
    than three quarters, a flip, other colours. What is missing is the mean colour, of label IGNORE."""
    # Scale the image by a random factor of its size in tests.
    draw = lambda low, high: low + (high - low) * torch.rand((), generator=generator).item()
    scale = draw(0.5, 2)
    image, mask = scaled(image, mask, int(LONG * scale), int(CROP * scale))

    # Draw up to eleven crops, until no class covers three quarters of one.
    H, W = mask.shape
    for _ in range(11):
        top, left = int(draw(0, max(H - side, 0) + 1)), int(draw(0, max(W - side, 0) + 1))
        part = mask[top : top + side, left : left + side]
        counts = part[part != IGNORE].long().bincount()
        if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
            break
    image, part = flip_view(image[:, top : top + side, left : left + side], part, generator)

    # Jitter the colours before borders are filled, so that borders keep the mean colour.
    jitter = common.ColorJitter(0.25, 0.5, 0.5, 0.1, p=0.5)
    x = 255 * jitter(image[None].float() / 255, jitter.sample(1, generator))[0]
    full = (255 * torch.tensor(mean)).view(3, 1, 1).expand(3, side, side).clone()
    full[:, : x.shape[1], : x.shape[2]] = x
    below = (0, side - part.shape[1], 0, side - part.shape[0])
    return full.round().to(torch.uint8), F.pad(part, below, value=IGNORE)


def windows(n, side, step):
    """Where windows of `side` px, every `step` px, begin and end along a side of n px: [(begin, end)]."""
    count = max(n - side + step - 1, 0) // step + 1
    ends = [min(step * k + side, n) for k in range(count)]
    return [(max(0, end - side), end) for end in ends]


@torch.no_grad()
def sliding_logits(head, x, side, stride):
    """Normalised x (1, 3, H, W) -> logits (classes, H, W), means over the windows of `side` px that cover a pixel.
    Windows are padded with 0 to multiples of the stride."""
    H, W = x.shape[2:]
    total, times = 0, x.new_zeros(H, W)

    # Windows overlap by a third; each pixel counts the windows that cover it.
    for top, bottom in windows(H, side, side * 2 // 3):
        for left, right in windows(W, side, side * 2 // 3):
            part = x[:, :, top:bottom, left:right]
            h, w = part.shape[2:]

            # Pad the window to whole patches, and cut its logits back to its size.
            padded = F.pad(part, (0, -w % stride, 0, -h % stride))
            logits = F.interpolate(head(padded), padded.shape[2:], mode="bilinear", align_corners=False)
            total = total + F.pad(logits[0, :, :h, :w], (left, W - right, top, H - bottom))
            times[top:bottom, left:right] += 1
    return total / times


def segmentation(encoder, pairs, name, args, save):
    """Train a head, segment the test images -> ({metric: percent}, details)."""
    settings = recipe("segmentation", name, args)
    steps, batch_size, lr, weight_decay = settings.values()

    # The seed determines the weights of the head; its batch norm spans all ranks.
    classes = 150 if name == "ade20k" else 1 + len(common.BLOCK_CLASSES)
    common.seed_everything(args.seed, "segmentation")
    head = LinearHead(encoder, classes)
    if args.head == "upernet":
        head = UPerHead(encoder, classes, 256 if name == "ade20k" else 64)
    head = common.batchnorm_over_ranks(head.to(encoder.device), encoder.device)

    # Scenes are used whole; ADE20K is trained on crops and tested on windows of the same size.
    first = pairs["train"][0][0]
    side = encoder.fit(first.shape[1])[0] if name == "scenes" else CROP // encoder.stride * encoder.stride
    view = partial(ade_view, side, encoder.backbone.mean) if name == "ade20k" else flip_view
    data = Steps(pairs["train"], view, args.seed, batch_size)

    # The loss is the mean over the labelled pixels of all ranks.
    def loss_of(model, batch):
        images, masks = (torch.stack(v) for v in zip(*batch))
        masks = masks.long().to(encoder.device)
        logits = model(encoder.normalise(images, (side, side)))
        logits = F.interpolate(logits, masks.shape[1:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="sum")
        labelled = common.all_reduce((masks != IGNORE).sum())
        return total * common.world_size() / labelled.clamp(min=1)

    # Train the head alone; the encoder is no module of it.
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    train(f"{name} segmentation", head, data, steps, args, optimizer, partial(polynomial, steps=steps), loss_of)

    # Add up the confusion matrix of each rank's test images.
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=encoder.device)
    rows = in_turn(len(pairs["test"]))
    for i, (image, mask) in zip(rows, reading(pairs["test"], rows, args.workers, f"{name} test images")):
        image = scaled(image, None, LONG, CROP)[0] if name == "ade20k" else image
        size = image.shape[1:] if name == "ade20k" else (side, side)

        # Classify pixels at the size of the mask.
        logits = sliding_logits(head, encoder.normalise(image[None], size), side, encoder.stride)
        logits = F.interpolate(logits[None], mask.shape, mode="bilinear", align_corners=False)[0]
        predicted = logits.argmax(0)
        matrix += confusion_matrix(mask.long().to(encoder.device), predicted, classes)

        # Files of ADE20K number their classes from 1.
        if save:
            write_png(save / f"{pairs['test'].name(i)}.png", (predicted + (name == "ade20k")).to(torch.uint8))
    scores, iou = segmentation_scores(common.all_reduce(matrix))
    details = settings | dict(head=args.head, side=side, iou=iou.tolist())
    if args.head == "upernet":
        details |= dict(feature=f"maps {head.neck.layers}")
    details |= dict(train=len(pairs["train"]), test=len(pairs["test"]))
    return {metric: 100 * value for metric, value in scores.items()}, details


# ----------------------------------------------------------------------------------------------------------------------
# Detection
# ----------------------------------------------------------------------------------------------------------------------

SHORT = tuple(range(640, 801, 32))  # pixels: short side of COCO's images in training; the last one in tests


def detector(encoder, classes, side):
    """torchvision's FasterRCNN on a frozen encoder. `side` is that of scenes, for which all sizes shrink; None is
    COCO's recipe, torchvision's defaults."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    # Each level has anchors of one size and three shapes.
    scale = side / 384 if side else 1
    anchors = AnchorGenerator(tuple((int(32 * scale * 2**i),) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
    how = dict(image_mean=encoder.backbone.mean, image_std=encoder.backbone.std, rpn_anchor_generator=anchors)
    how |= dict(size_divisible=math.lcm(32, encoder.stride))

    # On COCO all other settings are torchvision's defaults.
    if side is None:
        return FasterRCNN(Neck(encoder, 256), classes + 1, min_size=SHORT, max_size=1333, **how)

    # Small heads, few proposals and few samples make a step on scenes fast.
    how |= dict(min_size=side, max_size=side, rpn_batch_size_per_image=64, box_batch_size_per_image=64)
    for mode in ("train", "test"):
        how |= {f"rpn_pre_nms_top_n_{mode}": 300, f"rpn_post_nms_top_n_{mode}": 100}

    # Regions are pooled from a level by their size, which is relative to that of a scene.
    how |= dict(box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=round(224 * scale)))
    how |= dict(box_head=TwoMLPHead(64 * 49, 256), box_predictor=FastRCNNPredictor(256, classes + 1))
    return FasterRCNN(Neck(encoder, 64), **how)


def trainable(boxes):
    """The images that keep a box, with ordinary boxes of more than a pixel (Boxes)."""
    kept = ~boxes.crowd & ((boxes.boxes[:, 2:] - boxes.boxes[:, :2]) > 1).all(1)
    return boxes.subset(boxes.of[kept].unique(), kept)


def flip_boxes(image, boxes, labels, generator):
    """The training view: mirrored or not."""
    if torch.rand((), generator=generator) < 0.5:
        left, top, right, bottom = boxes.unbind(1)
        width = image.shape[2]
        image, boxes = image.flip(2), torch.stack([width - right, top, width - left, bottom], 1)
    return image, boxes, labels


def stepwise(t, steps):
    """What the rate is multiplied with at step t: a tenth after 2/3 and 8/9 of the steps, and a linear warm-up from
    0.001 over 250 steps or a tenth."""
    warmup = min(250, steps / 10)
    decay = 0.1 ** ((t >= steps * 2 / 3) + (t >= steps * 8 / 9))
    return decay * (0.001 + 0.999 * t / warmup if t < warmup else 1)


def detection(encoder, sets, name, args, save):
    """Train a detector, find the boxes of the test images -> ({metric: percent}, details)."""
    # Images without a usable box are left out of training.
    settings = recipe("detection", name, args)
    steps, batch_size, lr, weight_decay = settings.values()
    chosen, test, device = trainable(sets["train"]), sets["test"], encoder.device

    # The seed determines the weights of the detector.
    common.seed_everything(args.seed, "detection")
    model = detector(encoder, len(test.categories), test.sizes[0][0] if name == "scenes" else None).to(device)

    # Class 0 of torchvision's detectors is the background.
    def loss_of(model, batch):
        images = [image.to(device) / 255 for image, _, _ in batch]
        targets = [dict(boxes=boxes.to(device), labels=labels.to(device) + 1) for _, boxes, labels in batch]
        return sum(model(images, targets).values())

    # Weight decay is for matrices and kernels, not for biases and norms.
    groups = [[p for p in model.parameters() if (p.dim() > 1) == decays] for decays in (True, False)]
    groups = [dict(params=some, weight_decay=w) for some, w in zip(groups, (weight_decay, 0.0))]
    data = Steps(chosen, flip_boxes, args.seed, batch_size)
    rate = partial(stepwise, steps=steps)
    train(f"{name} detection", model, data, steps, args, torch.optim.AdamW(groups, lr=lr), rate, loss_of)

    # Each rank finds the boxes of its test images, in COCO's format.
    found, rows = {}, in_turn(len(test))
    for i, (image, _, _) in zip(rows, reading(test, rows, args.workers, f"{name} test images")):
        with torch.no_grad():
            (out,) = model([image.to(device) / 255])

        # COCO's boxes have a corner, a width and a height, and its categories their own numbers.
        boxes = torch.cat([out["boxes"][:, :2], out["boxes"][:, 2:] - out["boxes"][:, :2]], 1).tolist()
        each = zip(boxes, out["labels"].tolist(), out["scores"].tolist())
        ids = dict(image_id=test.ids[i])
        found[i] = [ids | dict(category_id=test.categories[c - 1], bbox=b, score=s) for b, c, s in each]

    # Rank 0 saves and evaluates the detections of all ranks.
    detections = [d for some in gathered(found, len(test)) for d in some]
    if save and common.rank() == 0:
        save.mkdir(parents=True, exist_ok=True)
        common.write(save / "detections.json", json.dumps(detections).encode())
    scores = common.by_rank_0(lambda: average_precision(test.truths(), detections))
    details = settings | dict(detections=len(detections), train=len(chosen), test=len(test), metric="pycocotools")
    details |= dict(feature=f"maps {model.backbone.layers}")
    return {metric: 100 * value for metric, value in scores.items()}, details


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------

N_SHOWN = 8  # images of a figure, evenly spaced


def heat(values):
    """(h, w), min to max, -> uint8 (3, h, w), from blue over green to red."""
    low, high = values.min(), values.max()
    v = (values - low) / (high - low).clamp(min=1e-12)
    rgb = torch.stack([1.5 - (4 * v - c).abs() for c in (3, 2, 1)])
    return (255 * rgb.clamp(0, 1)).to(torch.uint8)


def over(image, layer, where=1.0):
    """A layer uint8 (3, h, w), laid half transparently over an image uint8 (3, H, W), on a white square; `where`
    (H, W) bool: there alone."""
    H, W = image.shape[1:]
    layer = F.interpolate(layer[None].float(), (H, W), mode="nearest")[0]
    mixed = torch.where(torch.as_tensor(where) > 0, (image.float() + layer) / 2, image.float()).to(torch.uint8)
    side = max(H, W)
    return F.pad(mixed, (0, side - W, 0, side - H), value=255)


def keep(args, figure, name, numbers):
    """Write the numbers of a figure, of the set `name`, beside its picture; returns the path of the picture."""
    corruption = args.corruption if figure == "embedding" else None
    path = Path(args.out) / "-".join(part for part in (figure, name, corruption) if part)
    np.savez_compressed(f"{path}.npz", **{k: np.asarray(v) for k, v in numbers.items()})
    eval_probe.say(f"{path}.png, {path}.npz")
    return f"{path}.png"


def laid_out(x, how, seed):
    """Features (n, D) -> points (n, 2) float64 on the CPU, by "pca", or the packages "pacmap" and "tsne", with their
    own defaults."""
    x = x.double().cpu()
    if how == "pca":
        x = x - x.mean(0)
        return x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T

    # t-SNE and PaCMAP are imported where they are used, as they are optional.
    if how == "tsne":
        from sklearn.manifold import TSNE

        return torch.from_numpy(TSNE(init="pca", random_state=seed).fit_transform(x.numpy())).double()
    from pacmap import PaCMAP

    # PaCMAP warns that a seed makes it deterministic, which is intended.
    logging.getLogger("pacmap").setLevel(logging.ERROR)
    points = PaCMAP(n_components=2, random_state=seed).fit_transform(x.float().numpy(), init="pca")
    return torch.from_numpy(points).double()


def map_neighbours(points, labels, k=10):
    """Percent of the k nearest neighbours of points (n, 2) that have the same label (n,)."""
    k = min(k, len(points) - 1)
    same = []

    # Blocks of 1,024 rows bound the memory; no point is its own neighbour.
    for begin in range(0, len(points), 1024):
        distance = torch.cdist(points[begin : begin + 1024], points)
        rows = torch.arange(len(distance))
        distance[rows, begin + rows] = math.inf
        same.append(labels[distance.topk(k, largest=False).indices] == labels[begin + rows, None])
    return 100 * torch.cat(same).double().mean().item()


def scatter(points, hues, title, side=400):
    """points (n, 2) with hues (n,) in [0, 1) -> a picture. It is drawn at twice the size, which smooths the dots."""
    # The longer side of the points covers 92 % of the picture.
    low, high = points.amin(0), points.amax(0)
    places = ((points - (low + high) / 2) / (high - low).max().clamp(min=1e-12) * 0.92 + 0.5) * 2 * side
    colours = (255 * common.hsv_to_rgb(hues.float(), 0.75, 0.85)).long().tolist()

    # Dots shrink with their number; their random order puts no class on top of others.
    radius = max(2, min(8, 200 / len(points) ** 0.5))
    canvas = Image.new("RGB", (2 * side, 2 * side), "white")
    draw = ImageDraw.Draw(canvas)
    places = places.tolist()
    for i in torch.randperm(len(places), generator=common.rng("scatter")).tolist():
        x, y = places[i]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colours[i]))
    canvas = canvas.resize((side, side), Image.LANCZOS)
    ImageDraw.Draw(canvas).text((6, 4), title, fill="black")
    return canvas


@dataclasses.dataclass
class Corrupted:
    """The evaluation view under a corruption, severity 3; what happens to an image depends on its seed alone."""

    name: str
    size: int

    def __call__(self, images, params):
        images = common.CenterCrop(self.size, interpolation="bicubic")(images)
        return eval_robustness.corrupt(images, self.name, 3, params["seed"])


def shown_rows(case, args):
    """Rows (n,) of the test images that `embedding` shows: evenly spaced ones, of some classes. Refuses a number of
    classes or points that does not work."""
    # The classes are chosen at random.
    data, how = case.test, args.embedding
    rows = torch.arange(len(data))
    if args.classes and args.classes > len(data.classes):
        common.die(f"--classes {args.classes}: {case.state['data']} has {len(data.classes) or 'no'} classes")
    if args.classes:
        chosen = torch.randperm(len(data.classes), generator=common.rng(args.seed, "classes"))[: args.classes]
        rows = torch.isin(data.labels, chosen).nonzero()[:, 0]
    n = min(len(rows), args.images or (1000 if how == "tsne" else 13_000))

    # Every method needs a number of points (t-SNE more than its perplexity, 30), and t-SNE is slow on many.
    if how == "tsne" and n > 5000:
        common.die(f"--embedding tsne: {n:,} points take too long; set --images to at most 5,000")
    if n < (least := dict(pca=2, pacmap=7, tsne=31)[how]):
        why = f"only {len(rows)} test images are there" if n == len(rows) else f"--images allows {n}"
        common.die(f"--embedding {how}: needs at least {least} points, but {why}")
    return rows[common.evenly(len(rows), n)]


def embedding(cases, name, args):
    """Features of test images in the plane, a panel a checkpoint: [(label, Case)] -> [{metric: percent}]."""
    how = args.embedding
    panels, results, numbers = [], [], {}
    for i, (label, case) in enumerate(cases):
        # All ranks compute features; rank 0 lays them out.
        data, transform, rows = case.test, None, shown_rows(case, args)
        if args.corruption:
            transform = Corrupted(args.corruption, case.backbone.img_size)
        seeds = dict(seed=eval_robustness.seeds_of(data, args.seed, args.corruption, 3))
        x = case.features(data, view=transform, params=seeds if transform else None, rows=rows)
        if common.rank():
            continue

        # A set without labels has one colour and no score.
        points = laid_out(x, how, args.seed)
        labels = torch.zeros(len(rows), dtype=torch.int64) if data.labels is None else data.labels[rows]
        results.append({} if data.labels is None else {"map 10-NN": map_neighbours(points, labels)})
        present, hue = labels.unique(return_inverse=True)  # even hues for the classes that are shown
        panels.append([scatter(points, hue / len(present), f"{label}: class ({how})")])
        numbers |= {f"{i} points": points, f"{i} labels": labels, f"{i} name": label}

        # A second panel shows the azimuth where the set has views.
        if "view" in data.factors:
            azimuth = data.factors["view"][rows, 0]
            panels[-1].append(scatter(points, azimuth / 360 % 1, f"{label}: azimuth ({how})"))
            numbers |= {f"{i} view": data.factors["view"][rows]}

    # Each checkpoint has a column of the sheet, each colouring a row.
    if common.rank():
        return None
    side = panels[0][0].width
    sheet = Image.new("RGB", (side * len(panels), side * max(map(len, panels))), "white")
    for column, panel in enumerate(panels):
        for row, picture in enumerate(panel):
            sheet.paste(picture, (column * side, row * side))
    sheet.save(keep(args, "embedding", name, numbers))
    return results


def bias_of(module):
    """What a layer adds to each channel: its bias; of a batch norm that evaluates beta - mu gamma / sqrt(var + eps)."""
    if isinstance(module, nn.BatchNorm2d):
        return module.bias - module.running_mean * module.weight / (module.running_var + module.eps).sqrt()
    return module.bias


def full_gradients(model, x):
    """A ReLU network in eval mode, x (B, 3, H, W) -> its highest logits f (B,), and (value, gradient) of its input, as
    the first convolution sees it, and of the bias of each layer that has one, (1, C, 1, ...) and (B, C, ...). Then f is
    the sum of all value * gradient [FullGrad, equation 3]."""
    # Layers with a bias, and the input of the first one, contribute to the logits.
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))]
    seen, handles = [], []

    # The input becomes a leaf of the graph, so that it has a gradient.
    def enter(module, inputs):
        seen.append((inputs[0].detach().clone().requires_grad_(), None))
        return seen[0][0]

    # A layer returns a copy of its output, as a ReLU in place would overwrite the recorded one.
    def leave(module, inputs, output):
        seen.append((output, bias_of(module)))
        return output.clone()

    try:
        handles.append(layers[0].register_forward_pre_hook(enter))
        handles += [m.register_forward_hook(leave) for m in layers if bias_of(m) is not None]
        logits = model(x).max(1).values
    finally:
        for handle in handles:
            handle.remove()

    # One backward pass serves all images, which do not interact in eval mode.
    gradients = torch.autograd.grad(logits.sum(), [value for value, _ in seen])
    shaped = lambda bias, like: bias.detach().view(1, -1, *[1] * (like.dim() - 2))
    values = [value.detach() if bias is None else shaped(bias, value) for value, bias in seen]
    return logits.detach(), list(zip(values, gradients))


def psi(v):
    """(B, ...) -> its absolute value, from 0 to 1 within each of the B [FullGrad]."""
    v = v.abs().flatten(1)
    v = v - v.amin(1, keepdim=True)
    return v / (v.amax(1, keepdim=True) + 1e-6)


def fullgrad_map(model, x):
    """x (B, 3, H, W) -> saliency (B, H, W), at least 0."""
    # The input counts by its colours; coordinate channels are no part of the picture.
    _, ((image, gradient), *layers) = full_gradients(model, x)
    colours = (image * gradient)[:, :3]
    total = psi(colours).view_as(colours).sum(1)

    # Add the bias of each layer times its gradient, summed over channels before it grows; linear layers have no map.
    for bias, gradient in layers:
        if gradient.dim() == 4:
            part = psi(bias * gradient).view_as(gradient).sum(1, keepdim=True)
            total += F.interpolate(part, x.shape[2:], mode="bilinear", align_corners=True)[:, 0]
    return total


def fullgrad(cases, name, args):
    """Where a linear classifier of objects looks: [(label, Case)] -> [{metric: percent}]."""
    rows, results, numbers = {}, [], {}
    for i, (label, case) in enumerate(cases):
        data, device = case.test, case.device
        normalise = common.Normalize(case.backbone.mean, case.backbone.std)
        x_train = case.features(case.train)
        if common.rank():
            continue

        # The classifier is that of eval_probe.py --tasks latents.
        labels = case.train.labels.to(device)
        generator = common.rng(args.seed, "object")
        readout = eval_probe.linear_schedule(x_train.to(device), labels, generator)
        model = nn.Sequential(case.backbone, readout).eval()
        maps, shown = [], []

        # Masks allow a score, which is measured on 512 images.
        chosen = common.evenly(len(data), N_SHOWN if data.masks is None else 512)
        for part in chosen.split(64):
            images = common.CenterCrop(case.backbone.img_size, interpolation="bicubic")(data[part])
            maps.append(fullgrad_map(model, normalise(images.to(device).float() / 255)).cpu())
            shown.append(images.cpu())
        maps, shown = torch.cat(maps), torch.cat(shown)  # (n, H, W), (n, 3, H, W)

        # Compare the share of saliency within the mask with the area of the mask.
        results.append({})
        if data.masks is not None:
            masks = data.masks[chosen].float()
            share = (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-12)
            found = {"fullgrad on object": share.mean(), "object area": masks.mean()}
            results[-1] = {metric: 100 * value.item() for metric, value in found.items()}

        # Draw some of the images, evenly spaced.
        some = common.evenly(len(chosen), N_SHOWN)
        rows.setdefault(f"images of {label}", list(shown[some]))
        rows[f"FullGrad of {label}"] = [over(shown[j], heat(maps[j])) for j in some.tolist()]
        numbers |= {f"{i} name": label, f"{i} saliency": maps[some], f"{i} images": shown[some]}
    if common.rank():
        return None
    eval_robustness.contact_sheet(keep(args, "fullgrad", name, numbers), rows)
    return results


def attention(subjects, pairs, name, args):
    """For some images: attention, eigenvector and mask of each ViT, and the truth. subjects: [(label, Encoder)]."""
    # All encoders are compared on the same images, evenly spaced.
    items = [pairs[i] for i in common.evenly(len(pairs), N_SHOWN).tolist()]
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    rows, numbers = {"image": [over(image, image) for image, _ in items]}, {}
    for i, (label, encoder) in enumerate(subjects):
        parts = {"attention": [], "eigenvector": [], "mask": []}
        for j, (image, _) in enumerate(items):
            # The sign of an eigenvector is arbitrary, and is chosen so that the object is red.
            pixels, seen, v, mask, _ = cut_object(encoder, image, name)
            v = v if mask[v == v.max()].any() else -v
            parts["attention"].append(over(image, heat(seen)))
            parts["eigenvector"].append(over(image, heat(v)))
            parts["mask"].append(over(image, red.expand_as(image), pixels))
            numbers |= {f"{i} {j} attention": seen, f"{i} {j} eigenvector": v, f"{i} {j} mask": mask}

        # Each encoder has three rows; the last row of the figure shows the true masks.
        rows |= {f"{kind} of {label}": tiles for kind, tiles in parts.items()}
        numbers[f"{i} name"] = label
    rows["truth"] = [over(image, red.expand_as(image), truth) for image, truth in items]
    eval_robustness.contact_sheet(keep(args, "attention", name, numbers), rows)


# ----------------------------------------------------------------------------------------------------------------------
# From the command line to the table
# ----------------------------------------------------------------------------------------------------------------------

TRAINED = {"segmentation", "detection"}
TASKS = dict(segmentation=segmentation, detection=detection, video=video, saliency=saliency)
USES = dict(
    segmentation=("scenes", "ade20k"),
    detection=("scenes", "coco"),
    video=("scenes", "davis"),
    saliency=("scenes", *SALIENCY),
    attention=("scenes", *SALIENCY),
    embedding=tuple(common.DATA),
    fullgrad=tuple(common.DATA),
)
PROBED = ("embedding", "fullgrad")  # figures of a set of eval_probe.py, by default the checkpoint's own
PACKAGES = dict(detection="pycocotools", pacmap="pacmap", tsne="scikit-learn")


def installed(use):
    """Whether the package of a task or embedding is there."""
    return importlib.util.find_spec(PACKAGES[use].replace("scikit-learn", "sklearn")) is not None


def directories(args):
    """{name of a set: its directory, None where it needs none}, of --data. Refuses flags without a value."""
    known = dict.fromkeys(name for names in USES.values() for name in names)
    for flag, right in dict(tasks=TASKS, figures=set(USES) - set(TASKS), data=known).items():
        values = getattr(args, flag)
        if values is not None and len(set(values)) != (len(values) or 1):
            common.die(f"--{flag}: name one or more, each once, of {', '.join(sorted(right))}")
        if odd := set(values or ()) - set(right):
            common.die(f"--{flag} {odd.pop()}: unknown; there are {', '.join(sorted(right))}")
    args.figures, args.data = args.figures or (), args.data or ()

    # Rendered sets need no directory; every other set needs one.
    needing = [name for name in args.data if name != "scenes" and not name.startswith("blocks")]
    if len(needing) != len(args.data_dir):
        needed = f"{len(needing)} needed ({', '.join(needing) or 'no set of --data is read from files'})"
        common.die(f"--data-dir: {len(args.data_dir)} given, {needed}; name one for each set, in the order of --data")

    # Paths are made absolute, so that records do not depend on the working directory.
    places = {name: os.path.abspath(os.path.expanduser(root)) for name, root in zip(needing, args.data_dir)}
    for name, root in places.items():
        if not os.path.isdir(root):
            layout = LAYOUTS.get(name, "the directory that eval_probe.py --data-dir takes")
            common.die(f"--data-dir {root}: no such directory; {name} is read from {layout}")
    return dict.fromkeys(args.data) | places


def plan(args):
    """What is to be done, [(task or figure, set or None, directory)], and lines that say what is not. Refuses what
    cannot work."""
    places, notes = directories(args), []

    # Without --tasks, take every task that the sets allow, or none where only figures are asked for.
    named = args.data or ("scenes",)
    tasks = args.tasks
    if tasks is None:
        tasks = [] if args.figures else [task for task in TASKS if set(USES[task]) & set(named)]
        if "detection" in tasks and "coco" not in named and not installed("detection"):
            tasks.remove("detection")
            notes.append("detection is left out: it needs the package pycocotools (pip install pycocotools)")
    if not tasks and not args.figures:
        common.die(f"--data {' '.join(args.data)}: no task can use it; name --figures that can, or another set")

    # Pair each task and figure with every set that it can use; no set may be left over.
    jobs = []
    for part in (*tasks, *args.figures):
        sets = [name for name in (args.data if part in PROBED else named) if name in USES[part]]
        if not sets and part not in PROBED:
            flag = "tasks" if part in TASKS else "figures"
            common.die(f"--{flag} {part}: cannot use the sets of --data; name one of {', '.join(USES[part])}")
        jobs += [(part, name, places.get(name)) for name in sets or [None]]
    if idle := [name for name in args.data if name not in {name for _, name, _ in jobs}]:
        common.die(f"--data {idle[0]}: none of --tasks and --figures uses it; leave it out")
    return jobs, notes


def check(args, jobs, notes):
    """Refuse flags that nothing uses or that cannot work, before checkpoints are read; choose the embedding."""
    asked = {part for part, *_ in jobs}

    # Refuse flags whose task or figure is not asked for.
    for flag, value, users in (
        ("head", args.head != "linear", {"segmentation"}),
        ("steps", args.steps, TRAINED),
        ("batch-size", args.batch_size, TRAINED),
        ("lr", args.lr, TRAINED),
        ("embedding", args.embedding, {"embedding"}),
        ("classes", args.classes, {"embedding"}),
        ("corruption", args.corruption, {"embedding"}),
        ("images", args.images, {*TASKS, "embedding", "attention"}),
        ("save", args.save, set(TASKS)),
        ("out", args.out != Args.out, set(USES) - set(TASKS)),
    ):
        if value and not users & asked:
            common.die(f"--{flag}: is for {', '.join(sorted(users))} only; leave it out")

    # Refuse unknown corruptions and missing packages.
    if args.corruption and args.corruption not in eval_robustness.CORRUPTIONS:
        common.die(f"--corruption {args.corruption}: unknown; there are {', '.join(eval_robustness.CORRUPTIONS)}")
    for flag, use in (*(("tasks", part) for part in sorted(asked)), ("embedding", args.embedding)):
        if use in PACKAGES and not installed(use):
            common.die(f"--{flag} {use}: needs the package {PACKAGES[use]} (pip install {PACKAGES[use]})")

    # PaCMAP is the default where it is installed.
    if "embedding" in asked and args.embedding is None:
        args.embedding = "pacmap" if installed("pacmap") else "pca"
        if args.embedding == "pca":
            notes.append("--embedding pca: the package pacmap is not installed (pip install pacmap)")

    # Try to write into the output directories before hours of training.
    for flag, folder in (("out", args.out if args.figures else None), ("save", args.save)):
        try:
            if folder:
                Path(folder).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as e:
            common.die(f"--{flag} {folder}: cannot be written ({e.strerror}); choose another directory")


@dataclasses.dataclass(eq=False)
class Subject:
    """A checkpoint of the call."""

    path: str
    name: str  # of its row; seeds of one configuration share it
    encoder: Encoder
    state: dict
    row: dict = dataclasses.field(default_factory=dict)


def open_subjects(args, device, evaluation):
    """All checkpoints that can be read; one that cannot be read costs its own row only."""

    def opened(path, backbone, state):
        complaint = lambda a, r, b: f"{path}: rank {r} holds another file than rank 0; copy it to all machines"
        common.same_on_all_ranks(state["sha256"], complaint)
        return path, Encoder(backbone, path, device, args.amp), state

    # All ranks can read a checkpoint before they compare what they have read, or some would wait for ever.
    found = []
    for path in args.checkpoints:
        read = evaluation.attempt(path, partial(eval_probe.load, path), together=True)
        found.append(read and evaluation.attempt(path, partial(opened, path, *read), together=True))
    paths, encoders, states = zip(*filter(None, found)) if any(found) else ((), (), ())
    return list(map(Subject, paths, eval_probe.row_names(paths, states), encoders, states))


def measure(subject, task, name, root, data, args):
    """One task on one set: adds to the subject's row, and leaves a record."""
    begin = time.monotonic()
    encoder = subject.encoder

    # Predictions have a directory named after the checkpoint; characters that a file system may lack are %XX.
    folder = None
    if args.save:
        run = subject.path.removesuffix("/checkpoint.pt")
        run = re.sub(r"^\.|[^\w.-]", lambda found: f"%{ord(found[0]):02X}", run)
        folder = Path(args.save) / run / f"{task}-{name}"

    # Metrics name their set, except where scenes are the only one.
    results, details = TASKS[task](encoder, data, name, args, folder)
    if name != "scenes" or len(args.data) > 1:
        results = {f"{name} {metric}": value for metric, value in results.items()}
    subject.row |= results
    seconds = time.monotonic() - begin
    protocol = dict(task=task, data=name, data_dir=root, amp=args.amp, device=encoder.device.type, seconds=seconds)
    protocol |= dict(feature="last map", norm=type(encoder.norm).__name__, stride=encoder.stride, dim=encoder.dim)
    eval_probe.append_record(subject.path, subject.state, args, results, protocol | details)
    eval_probe.say(f"{subject.path}: {task} on {name}, {seconds:.1f} s")


def labels_of(subjects):
    """A label for each subject of a figure: its name, numbered where seeds of one configuration share it."""
    names = [s.name for s in subjects]
    numbered = lambda i: f"{names[i]} #{1 + names[:i].count(names[i])}" if names.count(names[i]) > 1 else names[i]
    return [numbered(i) for i in range(len(names))]


def open_cases(figure, name, root, subjects, args, device):
    """Subjects with the train and test images of a set (Case each). Refuses what the figure cannot show."""
    flags = dict(seed=args.seed, workers=args.workers, device=args.device, amp=args.amp)
    how = eval_probe.Args(args.checkpoints, ("equivariance",), data=name, data_dir=root, **flags)

    cases = [eval_probe.open_case(s.path, s.encoder.backbone, dict(s.state), how, device) for s in subjects]
    for case in cases:
        if figure == "embedding":
            shown_rows(case, args)
        elif case.train.labels is None:
            common.die(f"--figures fullgrad: {case.state['data_dir']} has no classes (one folder per class)")
    return cases


def make_figure(figure, name, data, subjects, args):
    """One figure of some subjects, of Pairs (attention) or of their Cases; what it measures goes to their rows and
    records."""
    labels = labels_of(subjects)
    # Attention maps have no score, and rank 0 draws them alone.
    if figure == "attention":
        common.by_rank_0(lambda: attention(list(zip(labels, [s.encoder for s in subjects])), data, name, args))
        return

    # The other figures use the sets and features of eval_probe.py.
    make = embedding if figure == "embedding" else fullgrad
    found = make(list(zip(labels, data)), name, args)
    for subject, case, results in zip(subjects, data, common.by_rank_0(lambda: found)):
        results = {f"{name} {metric}" if name else metric: value for metric, value in results.items()}
        protocol = dict(figure=figure, data=case.state["data"], data_dir=case.state["data_dir"], amp=args.amp)
        subject.row |= results
        eval_probe.append_record(subject.path, subject.state, args, results, protocol)


def main(argv=None):
    """Every task and figure on every checkpoint; results are appended to the eval.jsonl beside each, and one table is
    printed. Returns its rows."""
    with eval_probe.Evaluation(lower="--batch-size") as evaluation:
        # Refuse impossible calls before checkpoints are read.
        eval_probe.checkpoints_first(argv, Args)
        args = common.parse(Args, lambda first: {}, argv, description=__doc__)
        common.check_ranges(args)
        jobs, notes = plan(args)
        check(args, jobs, notes)
        names = [name for _, name, _ in jobs]
        eval_probe.check(eval_probe.Args(args.checkpoints, data=None if None in names else names[0]))

        # The number of processes must divide each batch.
        device = evaluation.start(args.device)
        for part, name, _ in jobs:
            if part in TRAINED:
                recipe(part, name, args)

        # The table is printed at the end in any case, even after an error.
        subjects = open_subjects(args, device, evaluation)
        rows = lambda: [(s.name, s.row) for s in subjects]
        evaluation.at_end = lambda: evaluation.table(rows(), args.format)

        # All scenes of a call have one size.
        small = {scene_size(s.encoder.backbone.img_size) for s in subjects}
        if len(small) > 1 and "scenes" in names:
            common.die("scenes have one size: give encoders of images below 96 px and of larger ones in separate calls")
        side, sets, able = next(iter(small), 96), {}, {}

        # A task that is named needs all encoders, a figure one; the others are left out, with a line for each.
        for part in dict.fromkeys(part for part, *_ in jobs):
            reasons = [common.by_rank_0(partial(s.encoder.obstacle, part)) for s in subjects]
            able[part] = [s for s, why in zip(subjects, reasons) if not why]
            for path, why in [(s.path, why) for s, why in zip(subjects, reasons) if why]:
                if part in TASKS and args.tasks or part not in TASKS and not able[part]:
                    common.die(f"--{'tasks' if part in TASKS else 'figures'} {part}: {why}, unlike {path}")
                notes.append(f"{path}: left out of {part}, which {why}")

        # Read all sets before anything is trained.
        stride = max([s.encoder.stride for s in subjects], default=1)
        for part, name, root in jobs if subjects else ():
            if part not in PROBED:
                sets[part, name] = load(part, name, root, side, args.images, stride)
                problem = f"--data {name}: machines hold other files of it; copy the set anew"
                common.same_on_all_ranks(common.number_of(listed(sets[part, name])), problem)
            else:
                sets[part, name] = open_cases(part, name, root, able[part], args, device)

        # A task that fails does not stop the others.
        for line in notes:
            eval_probe.say(line)
        tasks, figures = ([job for job in jobs if (job[0] in TASKS) == measured] for measured in (True, False))
        for subject in subjects:
            for task, name, root in [job for job in tasks if subject in able[job[0]]]:
                part = partial(measure, subject, task, name, root, sets[task, name], args)
                evaluation.attempt(f"{subject.path}: {task} on {name}", part)
        for figure, name, _ in figures if subjects else ():
            part = partial(make_figure, figure, name, sets.pop((figure, name)), able[figure], args)
            evaluation.attempt(f"{figure} on {name}" if name else figure, part)
    return rows()


if __name__ == "__main__":
    common.command(main)
