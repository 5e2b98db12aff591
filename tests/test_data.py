"""Image folders as people have them, and images of every kind."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common


def touch(path, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)


def test_layouts(tmp_path):
    for name in ("train/b/1.png", "train/a/deep/2.JPG", "train/a/0.png", "val/a/3.png", "val/b/4.png"):
        touch(tmp_path / "usual" / name)
    train, val = (common.imagefolder(tmp_path / "usual", split) for split in ("train", "test"))
    assert train.classes == val.classes == ("a", "b") and train.labels.tolist() == [0, 0, 1] and len(val) == 2
    assert [Path(p).name for p in train.paths] == ["0.png", "2.JPG", "1.png"]  # by path, the same everywhere
    for name in ("x/1.png", "y/z/2.png", "3.png"):
        touch(tmp_path / "tree" / name)
    tree = common.imagefolder(tmp_path / "tree", "train")
    assert len(tree) == 3 and tree.labels is None and common.imagefolder(tmp_path / "tree", "test") is None


def test_hidden_files_and_loops_of_links(tmp_path):
    touch(tmp_path / "train" / "a" / "1.png")
    touch(tmp_path / "train" / "b" / "2.png")
    touch(tmp_path / "train" / ".thumbnails" / "3.png")
    (tmp_path / "train" / "a" / "._1.png").write_bytes(b"not an image")
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train")
    data = common.imagefolder(tmp_path, "train")
    assert [Path(p).name for p in data.paths] == ["1.png", "2.png"] and data.classes == ("a", "b")


def test_paths_are_two_tensors():
    """What a list of names does, in a name's own length and 9 bytes; a pickle for a worker holds no more."""
    names = [f"class {i % 7}/å{i:05d}.png" for i in range(5000)] + ["not utf-8 \udcff.png", "new\nline.png"]
    paths = common.Paths("root", names)
    whole = ["root/" + name for name in names]
    assert list(paths) == whole and [paths[i] for i in (0, 17, -1)] == [whole[0], whole[17], whole[-1]] and paths.index(whole[4000]) == 4000
    assert sum(t.numel() * t.element_size() for t in (paths.text, paths.ends)) == sum(len(os.fsencode(name)) + 9 for name in names)
    assert len(pickle.dumps(paths)) < sum(len(os.fsencode(name)) + 9 for name in names) + 1000
    rows = torch.randint(0, len(names), (300,), generator=common.rng(0))
    assert list(paths.subset(rows)) == [whole[i] for i in rows] and len(paths.subset(rows[:0])) == 0
    assert not common.Paths("root", []) and len(common.Paths("root", [""] * 3)) == 3
    for wrong in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            paths[wrong]


def test_a_million_paths_take_less_than_150_mb():
    """Listed, labelled and packed, as a generator hands them over: 1.28 million names of ImageNet's length."""
    import tracemalloc

    tracemalloc.start()
    paths = common.Paths("root", (f"n{i % 997:08d}/n{i % 997:08d}_{i}.JPEG" for i in range(50_000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    held = sum(t.numel() * t.element_size() for t in (paths.text, paths.ends))
    assert 1_281_167 * held / len(paths) < 60e6 and 1_281_167 / len(paths) * peak < 150e6


def test_order_is_that_of_sorted_relative_paths(tmp_path):
    """Of names that sort otherwise with and without a slash behind them; labels count sorted class names."""
    draw, parts = random.Random(0), ["a", "b", "A", "a-b", "a.b", "a b", "é", "z\udcff", "日本", "-", "_", "~"]
    for _ in range(200):
        folder = tmp_path.joinpath(*draw.choices(parts, k=draw.randint(1, 3)))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / (draw.choice(parts) + draw.choice([".png", ".JPG"]))).touch()
    data = common.imagefolder(tmp_path, "train")
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.[pJ]*"))
    assert list(data.paths) == [f"{tmp_path}/{name}" for name in names] and data.classes == tuple(sorted({name.split("/")[0] for name in names}))
    assert [data.classes[y] for y in data.labels] == [name.split("/")[0] for name in names]


def test_D10_directory_order_does_not_matter(tmp_path, monkeypatch):
    """Not even to which of two links to one folder is followed: both are."""
    for name in ("train/b/1.png", "train/a/0.png", "train/a/x/2.png", "shared/3.png"):
        touch(tmp_path / name)
    (tmp_path / "val").mkdir()
    for c in "ab":
        (tmp_path / "train" / c / "link").symlink_to(tmp_path / "shared")
    want, scandir = common.imagefolder(tmp_path, "train"), os.scandir
    assert [p.removeprefix(f"{tmp_path}/train/") for p in want.paths] == ["a/0.png", "a/link/3.png", "a/x/2.png", "b/1.png", "b/link/3.png"]

    class Backwards(list):
        __enter__, __exit__ = lambda self: self, lambda *_: None

    monkeypatch.setattr(os, "scandir", lambda folder: Backwards(reversed(list(scandir(folder)))))
    data = common.imagefolder(tmp_path, "train")
    assert list(data.paths) == list(want.paths) and torch.equal(data.labels, want.labels) and data.classes == want.classes == ("a", "b")


def test_a_fingerprint_knows_the_images_and_not_where_they_lie(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        touch(tmp_path / "here" / name)
        touch(tmp_path / "there" / name)
    of = lambda where: common.imagefolder(tmp_path / where, "train").fingerprint()
    assert of("here") == of("there") and of("here")["images"] == 3 and of("here")["classes"] == ["a", "b"]
    (tmp_path / "there" / "a" / "2.png").rename(tmp_path / "there" / "a" / "4.png")
    assert of("here")["hash"] != of("there")["hash"]
    pixels = common.ImageSet(images=torch.zeros(4, 3, 2, 2, dtype=torch.uint8), labels=torch.tensor([0, 1, 0, 1]), classes=("a", "b"))
    other = common.ImageSet(images=torch.ones(4, 3, 2, 2, dtype=torch.uint8), labels=torch.tensor([0, 1, 1, 0]), classes=("a", "b"))
    assert pixels.fingerprint()["hash"] != other.fingerprint()["hash"] and pixels.fingerprint() == pixels.subset(torch.arange(4)).fingerprint()


@pytest.mark.parametrize("mode, value, expected", [
    ("L", 100, (100, 100, 100)), ("1", 1, (255, 255, 255)), ("P", None, None), ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ("RGBA", (200, 100, 50, 255), (200, 100, 50)), ("RGBA", (200, 100, 50, 0), (0, 0, 0)), ("LA", (80, 255), (80, 80, 80)),
])
def test_modes(tmp_path, mode, value, expected):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = Image.new("RGB", (5, 3), (40, 90, 160)).convert("P") if mode == "P" else Image.new(mode, (5, 3), value)
    image.save(path)
    x = common.open_image(path)
    assert x.shape == (3, 3, 5) and x.dtype == torch.uint8
    want = torch.tensor(expected or Image.open(path).convert("RGB").getpixel((0, 0)))
    assert (x[:, 1, 2].int() - want).abs().max() <= 1


def test_16_bit_greys_are_rescaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 300).astype(np.uint16)[None].repeat(2, 0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    x = common.open_image(tmp_path / "ramp.png")[0, 0].int()
    assert (x.diff() >= 0).all() and len(x.unique()) > 200 and x[0] == 0 and x[-1] == 255


def test_orientation_is_applied(tmp_path):
    image, exif = Image.new("RGB", (8, 4), (0, 0, 0)), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    assert common.open_image(tmp_path / "x.jpg").shape == (3, 8, 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 1)])
def test_extreme_shapes_give_views(tmp_path, size):
    touch(tmp_path / "x.png", size)
    crop = common.RandomResizedCrop(16)
    x = common.open_image(tmp_path / "x.png")
    params = crop.sample(1, common.rng(0), torch.tensor([x.shape[1:]]))
    assert crop([x], params).shape == (1, 3, 16, 16) and common.CenterCrop(16)([x]).shape == (1, 3, 16, 16)


def test_cifar_as_torchvision_keeps_it(tmp_path, capsys, monkeypatch):
    """A tiny archive in the published layout, its checksums replaced by its own."""
    import hashlib
    import pickle

    import torchvision

    root, g = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    root.mkdir()
    pixels = g.integers(0, 256, (4, 3072), dtype=np.uint8)
    sums = {}
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        content = dict(label_names=list("abcdefghij")) if name == "batches.meta" else dict(data=pixels, labels=[3, 1, 4, 1])
        (root / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((root / name).read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", dict(filename="batches.meta", key="label_names", md5=sums["batches.meta"]))
    for split in ("train", "test"):
        data = common.load_data("cifar10", str(tmp_path), split, 32)
        assert torch.equal(data.images.flatten(1), torch.from_numpy(pixels)) and data.labels.tolist() == [3, 1, 4, 1] and len(data.classes) == 10
    with pytest.raises(SystemExit) as end:
        common.load_data("cifar100", str(tmp_path), "train", 32)
    assert end.value.code == 2 and "download=True" in capsys.readouterr().err


def test_imagenet100_is_cut_out_of_imagenet(tmp_path, capsys):
    wnids = ["n" + w for w in common.IMAGENET100.split()]
    assert len(set(wnids)) == 100 and wnids == sorted(wnids)
    for w in [*wnids, "n00000001", "n99999999"]:
        touch(tmp_path / "train" / w / "1.JPEG", (1, 1))
        touch(tmp_path / "val" / w / "2.JPEG", (1, 1))
    data = common.load_data("imagenet100", str(tmp_path), "train", 224)
    assert data.classes == tuple(wnids) and data.labels.tolist() == list(range(100))
    with pytest.raises(SystemExit):
        common.load_data("imagenet", str(tmp_path), "train", 224)
    assert "1000 classes, found 102" in capsys.readouterr().err


def test_cub200_as_published(tmp_path, capsys):
    root = tmp_path / "CUB_200_2011"
    names = ["001.Black/a.png", "001.Black/b.png", "002.Laysan/c.png", "002.Laysan/d.png"]
    for name in names:
        touch(root / "images" / name)
    for file, lines in dict(images=names, image_class_labels="1122", train_test_split="1010").items():
        (root / f"{file}.txt").write_text("".join(f"{i} {line}\n" for i, line in enumerate(lines, 1)))
    (root / "classes.txt").write_text("1 001.Black\n2 002.Laysan\n")
    train, test = (common.load_data("cub200", tmp_path, split, 16) for split in ("train", "test"))
    assert [p[-5:] for p in train.paths] == ["a.png", "c.png"] and [p[-5:] for p in test.paths] == ["b.png", "d.png"]
    assert train.labels.tolist() == test.labels.tolist() == [0, 1] and train.classes == ("001.Black", "002.Laysan")
    (root / "classes.txt").unlink()
    with pytest.raises(SystemExit) as end:
        common.load_data("cub200", tmp_path, "train", 16)
    assert end.value.code == 2 and "classes.txt" in capsys.readouterr().err


def test_textures_as_torchvision_keeps_them(tmp_path, capsys):
    for c in ("banded", "dotted"):
        for i in range(3):
            touch(tmp_path / "dtd" / "dtd" / "images" / c / f"{c}_{i}.jpg")
    (tmp_path / "dtd" / "dtd" / "labels").mkdir()
    for i, split in enumerate(("train", "val", "test")):
        (tmp_path / "dtd" / "dtd" / "labels" / f"{split}1.txt").write_text(f"banded/banded_{i}.jpg\ndotted/dotted_{i}.jpg\n")
    train, test = (common.load_data("dtd", tmp_path, split, 16) for split in ("train", "test"))
    assert len(train) == 4 and len(test) == 2 and train.labels.tolist() == [0, 1, 0, 1] and train.classes == test.classes == ("banded", "dotted")
    assert train[torch.tensor([3])][0].shape[0] == 3
    with pytest.raises(SystemExit) as end:
        common.load_data("food101", tmp_path, "train", 16)
    assert end.value.code == 2 and "holds no food101" in capsys.readouterr().err


def test_scenes_need_the_authors_partition(tmp_path, capsys):
    root = tmp_path / "SUN397"
    for c in ("abbey", "zoo"):
        for k in "ab":
            touch(root / c[0] / c / f"sun_{k}.jpg")
    (root / "ClassName.txt").write_text("/a/abbey\n/z/zoo\n")
    with pytest.raises(SystemExit) as end:
        common.load_data("sun397", tmp_path, "train", 16)
    assert end.value.code == 2 and "Training_01.txt" in capsys.readouterr().err
    (tmp_path / "Training_01.txt").write_text("/z/zoo/sun_b.jpg\n/a/abbey/sun_a.jpg\n")
    data = common.load_data("sun397", tmp_path, "train", 16)
    assert data.labels.tolist() == [1, 0] and data.paths[0].endswith("zoo/sun_b.jpg")
