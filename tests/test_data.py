"""Image folders as people have them, and images of every kind."""

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
    assert [p.name for p in train.paths] == ["0.png", "2.JPG", "1.png"]  # by path, the same everywhere
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
    assert [p.name for p in data.paths] == ["1.png", "2.png"] and data.classes == ("a", "b")


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
