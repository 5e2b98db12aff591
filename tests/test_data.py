"""Image folders as people have them, and images of every kind."""

import os
import pickle
import random
import shutil
import socket
import struct
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import common
import eval_probe
import ser

import numpy as np
import pytest
import torch
from PIL import Image
from test_distributed import on_ranks


def touch(path, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)


def refusal(capsys, call, *args, **kwargs):
    """The one line with which a call ends the program as a user's mistake."""
    with pytest.raises(SystemExit) as end:
        call(*args, **kwargs)
    err = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert (
        end.value.code == 2 and len([line for line in err if "error:" in line]) == 1 and "Traceback" not in "".join(err)
    ), err
    return next(line for line in err if "error:" in line)


def unlistable(monkeypatch, where):
    """os.scandir refuses one folder, as for a user who is not root."""
    scandir = os.scandir

    def refuse(folder="."):
        if os.path.realpath(folder) == os.path.realpath(where):
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)


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
    """What a list of names does, in a name's own length and 9 bytes, which workers share."""
    names = [f"class {i % 7}/å{i:05d}.png" for i in range(5000)] + ["not utf-8 \udcff.png", "new\nline.png"]
    paths = common.Paths("root", names)
    whole = ["root/" + name for name in names]
    assert (
        list(paths) == whole
        and [paths[i] for i in (0, 17, -1)] == [whole[0], whole[17], whole[-1]]
        and paths.index(whole[4000]) == 4000
    )
    assert sum(t.numel() * t.element_size() for t in (paths.text, paths.ends)) == sum(
        len(os.fsencode(name)) + 9 for name in names
    )
    shared = ForkingPickler.dumps(paths)  # what a spawned worker is given: handles of shared memory
    assert len(shared) < 1500 and list(pickle.loads(shared)) == whole == list(paths)
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
    assert list(data.paths) == [f"{tmp_path}/{name}" for name in names] and data.classes == tuple(
        sorted({name.split("/")[0] for name in names})
    )
    assert [data.classes[y] for y in data.labels] == [name.split("/")[0] for name in names]


def test_D10_directory_order_does_not_matter(tmp_path, monkeypatch):
    """Not even to which of two links to one folder is followed: both are."""
    for name in ("train/b/1.png", "train/a/0.png", "train/a/x/2.png", "shared/3.png"):
        touch(tmp_path / name)
    (tmp_path / "val").mkdir()
    for c in "ab":
        (tmp_path / "train" / c / "link").symlink_to(tmp_path / "shared")
    want, scandir = common.imagefolder(tmp_path, "train"), os.scandir
    assert [p.removeprefix(f"{tmp_path}/train/") for p in want.paths] == [
        "a/0.png",
        "a/link/3.png",
        "a/x/2.png",
        "b/1.png",
        "b/link/3.png",
    ]

    class Backwards(list):
        __enter__, __exit__ = lambda self: self, lambda *_: None

    monkeypatch.setattr(os, "scandir", lambda folder: Backwards(reversed(list(scandir(folder)))))
    data = common.imagefolder(tmp_path, "train")
    assert (
        list(data.paths) == list(want.paths)
        and torch.equal(data.labels, want.labels)
        and data.classes == want.classes == ("a", "b")
    )


def test_a_fingerprint_knows_the_images_and_not_where_they_lie(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        touch(tmp_path / "here" / name)
        touch(tmp_path / "there" / name)
    of = lambda where: common.imagefolder(tmp_path / where, "train").fingerprint()
    assert of("here") == of("there") and of("here")["images"] == 3 and of("here")["classes"] == ["a", "b"]
    (tmp_path / "there" / "a" / "2.png").rename(tmp_path / "there" / "a" / "4.png")
    assert of("here")["hash"] != of("there")["hash"]
    pixels = common.ImageSet(
        images=torch.zeros(4, 3, 2, 2, dtype=torch.uint8), labels=torch.tensor([0, 1, 0, 1]), classes=("a", "b")
    )
    other = common.ImageSet(
        images=torch.ones(4, 3, 2, 2, dtype=torch.uint8), labels=torch.tensor([0, 1, 1, 0]), classes=("a", "b")
    )
    assert (
        pixels.fingerprint()["hash"] != other.fingerprint()["hash"]
        and pixels.fingerprint() == pixels.subset(torch.arange(4)).fingerprint()
    )


@pytest.mark.parametrize(
    "name", ["imagefolder", "imagenet", "cifar10", "3diebench", "core50", "tdw", "dtd", "sun397", "cub200"]
)
@pytest.mark.parametrize("what", ["missing", "a file", "empty", "unreadable", "too long"])
def test_D1_roots_that_hold_nothing_are_named(tmp_path, monkeypatch, capsys, name, what):
    root = tmp_path / ("x" * 300 if what == "too long" else "root")
    if what == "a file":
        root.touch()
    elif what in ("empty", "unreadable"):
        root.mkdir()
    if what == "unreadable":
        unlistable(monkeypatch, root)
    assert f"{root}" in refusal(capsys, common.load_data, name, str(root), "train", 16)


@pytest.mark.parametrize("split", ["train", "val", ""])
@pytest.mark.parametrize("what", ["R2 unreadable", "R2 unreadable inside", "D2 empty", "D2 other files"])
def test_R2_D2_class_folders_without_images_are_named(tmp_path, monkeypatch, capsys, split, what):
    for c in "ab":
        for part in {"train", "val", split} if split else {""}:
            touch(tmp_path / part / c / "1.png")
    bad = tmp_path / split / "c"
    bad.mkdir()
    if what == "R2 unreadable":
        touch(bad / "2.png")
        unlistable(monkeypatch, bad)
    elif what == "R2 unreadable inside":
        touch(bad / "deep" / "2.png")
        touch(bad / "3.png")
        bad = bad / "deep"
        unlistable(monkeypatch, bad)
    elif what == "D2 other files":
        (bad / "2.gif").touch()
        (bad / "notes").mkdir()
    assert f"{bad}" in refusal(
        capsys, common.load_data, "imagefolder", str(tmp_path), "test" if split == "val" else "train", 16
    )


@pytest.mark.parametrize("what", ["empty", "unreadable"])
def test_R2_objects_of_core50_without_frames_are_named(core50, tmp_path, monkeypatch, capsys, what):
    shutil.copytree(core50, tmp_path / "core50")
    bad = tmp_path / "core50" / "s1" / "o7"
    if what == "empty":
        [p.unlink() for p in bad.iterdir()]
    else:
        unlistable(monkeypatch, bad)
    assert f"{bad}" in refusal(capsys, common.load_data, "core50", tmp_path / "core50", "train", 16, sessions=(1, 3))


def test_R4_the_pictures_of_runs_are_no_data(folder, tmp_path, monkeypatch):
    """--data-dir . in a flat tree, where runs/ and other directories of runs come to lie."""
    shutil.copytree(folder / "train", tmp_path, dirs_exist_ok=True)
    want = list(common.imagefolder(tmp_path, "train").paths)
    for run, end in (("runs/ser-s0", "checkpoint.pt"), ("out", "log.jsonl"), ("deep/down/out", "log.jsonl")):
        touch(tmp_path / run / "views.png")
        for name in ("args.json", end):
            (tmp_path / run / name).touch()
    data = common.imagefolder(tmp_path, "train")
    assert list(data.paths) == want and data.classes == ("left", "right")
    for name in ("args.json", "log.jsonl", "views.png"):
        (tmp_path / name).touch()  # --out . besides
    assert list(common.imagefolder(tmp_path, "train").paths) == want
    for name in ("runs/1.png", "out/deep/2.png"):  # a class may be called so
        touch(tmp_path / name)
    assert common.imagefolder(tmp_path, "train").classes == ("left", "out", "right", "runs")


@pytest.mark.parametrize(
    "names, classes, words",
    [
        ("bus/1 car/1 train/1", "bus car train", "no test split"),  # CIFAR-100 has such a class
        ("bus/1 car/1 Train/1", "Train bus car", ""),
        ("bus/1 test/1", "bus test", ""),
        ("bus/1 bus/deep/1 train/1", "bus train", ""),
        ("train/a/1 train/b/1 extra/1", "a b", "holds extra/, train/"),
        ("train/a/1 train/b/1 1", "a b", "no test split"),
        ("train/a/1 train/b/1 val/a/1 val/b/1 extra/a/1", "a b", ""),
        ("train/1 val/1", "", "no labels"),
        ("train/1 test/1 bus/1", "", "no labels: 1 of 1"),
        ("train/a/1 train/b/1", "a b", "no test split"),
        ("train/1", "", "no labels"),
        ("test/1", "", "no labels"),
        ("1 2", "", "no labels: 2 of 2"),
        (
            "train/a/1 train/b/1 train/b/2 train/3 val/a/1 val/b/1",
            "",
            "no labels: 1 of 4 images lie in no class folder, such as ROOT/train/3.png; move them into ROOT/train",
        ),
        ("train/a/1 val/a/1", "", "no labels: ROOT/train holds images in one class folder, a/; two are needed"),
    ],
)
def test_F7_F8_a_folder_called_train(tmp_path, names, classes, words):
    for name in names.split():
        touch(tmp_path / f"{name}.png")
    data = common.imagefolder(tmp_path, "train")
    assert data.classes == tuple(classes.split()) and words.replace("ROOT", str(tmp_path)) in data.note
    assert data.labels is None or data.labels.unique().tolist() == list(range(len(data.classes)))


@pytest.mark.parametrize(
    "names, words",
    [
        ("train/a/1 bus/b/1", "train/ may be a split or a class, beside bus/"),
        ("train/1 bus/b/1", "may be a split or a class"),
        ("trian/a/1 val/a/1", "val/ may be a split or a class, beside trian/"),
        ("val/a/1 test/a/1", "has no train/"),
        ("val/a/1", "has no train/"),
        ("train/a/1 Train/a/1", "name the same split"),
        ("train/a/1 val/a/1 valid/a/1", "name the same split"),
    ],
)
def test_F7_F8_trees_that_may_be_read_in_two_ways_are_refused(tmp_path, capsys, names, words):
    for name in names.split():
        touch(tmp_path / f"{name}.png")
    assert words in refusal(capsys, common.imagefolder, tmp_path, "train")


@pytest.mark.parametrize(
    "train, test",
    [
        ("train", "val"),
        ("Train", "Val"),
        ("TRAIN", "validation"),
        ("training", "valid"),
        ("train", "Validation"),
        ("Training", "Testing"),
        ("train", "TEST"),
    ],
)
def test_F8_splits_are_found_whatever_their_letters(tmp_path, train, test):
    for c in "ab":
        touch(tmp_path / train / c / "1.png")
        touch(tmp_path / test / c / "2.png")
    sets = [common.load_data("imagefolder", str(tmp_path), split, 16) for split in ("train", "test")]
    assert [list(d.paths) for d in sets] == [
        [f"{tmp_path}/{part}/{c}/{i}.png" for c in "ab"] for i, part in ((1, train), (2, test))
    ]
    assert [d.note for d in sets] == ["", ""] and sets[0].classes == sets[1].classes == ("a", "b")


def test_D3_one_class_trains_and_is_not_probed(tiny, folder, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copytree(folder / split / "left", tmp_path / "data" / split / "left")
    ser.main([*tiny, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--max-steps", "1"])
    capsys.readouterr()
    assert "class" in refusal(
        capsys, eval_probe.main, [str(tmp_path / "run" / "checkpoint.pt"), "--tasks", "linear", "--device", "cpu"]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_D4_a_file_that_is_no_image_is_named_once(tmp_path, capsys, workers):
    for name in ("1.png", "2.png"):
        touch(tmp_path / name)
    (tmp_path / "new\nline.png").write_text("text")
    data = common.imagefolder(tmp_path, "train")
    with pytest.raises(SystemExit) as end:
        list(common.Reader(data, workers).batches(common.CenterCrop(4), torch.arange(3)))
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if "rror" in line]
    assert (
        end.value.code == 1
        and len(errors) == 1
        and f"{tmp_path}/new\\nline.png: cannot be read as an image" in errors[0]
    ), errors


@pytest.mark.filterwarnings("ignore")
def test_D4_damaged_bytes_give_an_image_or_the_one_error(tmp_path):
    """Flips, cuts and nothing at all, in six formats."""
    draw, pixels = (
        np.random.default_rng(0),
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 20, 3), dtype=np.uint8)),
    )
    failed = 0
    for suffix in ("jpg", "png", "bmp", "webp", "tif", "ppm"):
        path = tmp_path / f"x.{suffix}"
        pixels.save(path)
        whole = path.read_bytes()
        for i in range(40):
            content = bytearray(whole[: draw.integers(len(whole))] if i % 3 == 0 else whole)
            for at in draw.integers(0, min(len(content), 200), 3 * (i % 3)) if content else ():
                content[at] ^= 1 << draw.integers(8)
            path.write_bytes(content if i else b"")
            try:
                x = common.open_image(path)
                assert x.dtype == torch.uint8 and x.ndim == 3 and x.shape[0] == 3
            except OSError as e:
                failed += 1
                assert str(e).startswith(f"{path}: cannot be read") and len(str(e).splitlines()) == 1
    assert failed > 60


@pytest.mark.filterwarnings("ignore")
def test_D8_a_huge_image_is_named(tmp_path):
    (tmp_path / "huge.bmp").write_bytes(
        struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    with pytest.raises(OSError, match="huge.bmp: cannot be read as an image .*decompression bomb"):
        common.open_image(tmp_path / "huge.bmp")


def test_D9_what_vanishes_is_named_and_nothing_is_written(folder, tmp_path, capsys, tiny):
    """Links that lead nowhere, links to themselves, a file removed after the listing; the tree stays as it was."""
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    snapshot = lambda: sorted((str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in [root, *root.rglob("*")])
    before = snapshot()
    ser.main([*tiny, "--data-dir", str(root), "--out", str(tmp_path / "run"), "--max-steps", "1"])
    assert snapshot() == before
    names = root / "train" / "left"
    (names / "nowhere.png").symlink_to(names / "gone.png")
    (names / "itself.png").symlink_to(names / "itself.png")
    data = common.imagefolder(root, "train")
    (names / "03.png").unlink()
    assert len(data) == 26
    for name in ("nowhere.png", "itself.png", "03.png"):
        with pytest.raises(OSError, match=f"{name}: cannot be read"):
            data[torch.tensor([data.paths.index(str(names / name))])]


def test_D12_nothing_is_downloaded(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("cifar10", "cifar100", "food101", "dtd", "pets", "aircraft", "sun397"):
        assert "download=True" in refusal(capsys, common.load_data, name, str(tmp_path), "train", 16)


def test_F17_a_damaged_file_whose_name_is_not_utf_8(folder, tmp_path, tiny, capsys):
    shutil.copytree(folder, tmp_path / "data")
    damaged = os.fsencode(tmp_path / "data" / "train" / "left") + b"/caf\xe9 \n.png"
    Path(os.fsdecode(damaged)).write_bytes(b"no image")
    ser.main(
        [
            *tiny,
            "--data-dir",
            str(tmp_path / "data"),
            "--out",
            str(tmp_path / "run"),
            *"--max-steps 1 --skip-corrupt".split(),
        ]
    )
    assert (tmp_path / "run" / "skipped.txt").read_bytes() == damaged + b"\n"
    assert common.printable("caf\udce9 \n\t日本 é") == "caf\\udce9 \\n\\t日本 é"
    touch(tmp_path / "data" / "train" / "\udce9.png")
    assert common.imagefolder(tmp_path / "data", "train").note.encode("utf-8")  # can be printed


def test_F17_lists_of_published_sets_may_name_any_file(tmp_path):
    root, names = tmp_path / "CUB_200_2011", ["001.Black/caf\udce9.png", "002.Laysan/é.png"]
    for name in names:
        touch(root / "images" / name)
    for file, lines in dict(
        images=names, image_class_labels="12", train_test_split="11", classes=("001.Black", "002.Laysan")
    ).items():
        (root / f"{file}.txt").write_bytes(b"".join(os.fsencode(f"{i} {line}\n") for i, line in enumerate(lines, 1)))
    data = common.load_data("cub200", tmp_path, "train", 16)
    assert [common.open_image(p).shape for p in data.paths] == [(3, 4, 6)] * 2


def test_F19_a_long_strip_is_not_enlarged_whole(monkeypatch):
    shapes, resize = [], common.resize
    monkeypatch.setattr(common, "resize", lambda x, shape, mode: shapes.append(shape) or resize(x, shape, mode))
    for x in (torch.zeros(3, 30_000, 1, dtype=torch.uint8), torch.zeros(3, 2, 60_001, dtype=torch.uint8)):
        assert common.CenterCrop(224)([x]).shape == (1, 3, 224, 224)
    assert max(h * w for h, w in shapes) <= 65 * 256**2
    strip = torch.randint(0, 256, (3, 301, 2), dtype=torch.uint8, generator=common.rng(0))
    whole = resize(strip[None], (16 * 301 // 2, 16), "bilinear")[0]
    top = round((whole.shape[1] - 16) / 2)
    assert (
        common.CenterCrop(16)([strip])[0].int() - whole[:, top : top + 16].int()
    ).abs().max() <= 8  # as the middle of the whole
    shapes.clear()
    common.CenterCrop(16)([torch.zeros(3, 128, 2, dtype=torch.uint8)])
    assert shapes == [(16 * 64, 16)]  # others as ever


@pytest.mark.parametrize(
    "mode, value, expected",
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("P", None, None),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), (0, 0, 0)),
        ("LA", (80, 255), (80, 80, 80)),
    ],
)
def test_D5_modes(tmp_path, mode, value, expected):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = Image.new("RGB", (5, 3), (40, 90, 160)).convert("P") if mode == "P" else Image.new(mode, (5, 3), value)
    image.save(path)
    x = common.open_image(path)
    assert x.shape == (3, 3, 5) and x.dtype == torch.uint8
    want = torch.tensor(expected or Image.open(path).convert("RGB").getpixel((0, 0)))
    assert (x[:, 1, 2].int() - want).abs().max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_D6_16_bit_greys_are_rescaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 300).astype(np.uint16)[None].repeat(2, 0)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    x = common.open_image(tmp_path / f"ramp.{suffix}")[0, 0].int()
    assert (x.diff() >= 0).all() and len(x.unique()) > 200 and x[0] == 0 and x[-1] == 255


def test_D7_orientation_is_applied(tmp_path):
    image, exif = Image.new("RGB", (8, 4), (0, 0, 0)), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    assert common.open_image(tmp_path / "x.jpg").shape == (3, 8, 4)


def tiff(samples, bits, kind):
    """The bytes of an 8 x 1 grey TIFF: packed samples of some bits, of a kind (1 unsigned, 2 signed, 3 float)."""
    tags = [
        (256, 4, 8),
        (257, 4, 1),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, 1),
        (279, 4, len(samples)),
        (339, 3, kind),
    ]
    entries = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in tags)
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(samples)) + samples + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("floats.tif", tiff(np.linspace(0, 1, 8, dtype=np.float32).tobytes(), 32, 3)),
        ("floats.pgm", b"Pf\n8 1\n-1.0\n" + np.linspace(0, 1, 8, dtype=np.float32).tobytes()),
        ("32 bits.tif", tiff(np.arange(8, dtype=np.int32).tobytes(), 32, 2)),
        ("32 bits, unsigned.tif", tiff((np.arange(8, dtype=np.uint32) * 10**8).tobytes(), 32, 1)),
        ("16 bits, signed.tif", tiff(np.arange(-4, 4, dtype=np.int16).tobytes(), 16, 2)),
        ("12 bits.tif", tiff(bytes(range(12)), 12, 1)),
        ("8 bits, signed.tif", tiff(np.arange(-4, 4, dtype=np.int8).tobytes(), 8, 2)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_F5_greys_without_a_known_white_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        OSError, match=f"{name}: cannot be read as an image .*(16-bit greys of 0 to 65535|cannot identify)"
    ):
        common.open_image(tmp_path / name)


def test_F5_the_tiffs_of_the_test_above_are_read_where_they_are_greys(tmp_path):
    for bits, kind in ((8, np.uint8), (16, np.uint16)):
        levels = np.linspace(0, 2**bits - 1, 8).astype(kind)
        (tmp_path / "x.tif").write_bytes(tiff(levels.tobytes(), bits, 1))
        assert (common.open_image(tmp_path / "x.tif")[1, 0].int() - torch.linspace(0, 255, 8)).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 1)])
def test_D8_extreme_shapes_give_views(tmp_path, size):
    touch(tmp_path / "x.png", size)
    crop = common.RandomResizedCrop(16)
    x = common.open_image(tmp_path / "x.png")
    params = crop.sample(1, common.rng(0))
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
        content = (
            dict(label_names=list("abcdefghij")) if name == "batches.meta" else dict(data=pixels, labels=[3, 1, 4, 1])
        )
        (root / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((root / name).read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "meta", dict(filename="batches.meta", key="label_names", md5=sums["batches.meta"])
    )
    for split in ("train", "test"):
        data = common.load_data("cifar10", str(tmp_path), split, 32)
        assert (
            torch.equal(data.images.flatten(1), torch.from_numpy(pixels))
            and data.labels.tolist() == [3, 1, 4, 1]
            and len(data.classes) == 10
        )
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
        (tmp_path / "dtd" / "dtd" / "labels" / f"{split}1.txt").write_text(
            f"banded/banded_{i}.jpg\ndotted/dotted_{i}.jpg\n"
        )
    train, test = (common.load_data("dtd", tmp_path, split, 16) for split in ("train", "test"))
    assert (
        len(train) == 4
        and len(test) == 2
        and train.labels.tolist() == [0, 1, 0, 1]
        and train.classes == test.classes == ("banded", "dotted")
    )
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


# ---- caches ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch, tmp_path):
    """`blocks` of ten objects, and a cache of their own."""
    monkeypatch.setattr(common, "N_OBJECTS", {"train": 10, "test": 10})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: common.load_data("blocks", None, "train", 8)


def test_F18_without_a_home_nothing_is_kept(few, monkeypatch, tmp_path):
    def nobody(*args):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    want = few()
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 1  # XDG_CACHE_HOME alone is asked
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user who is not in the list of users
    assert torch.equal(few().images, want.images) and not (tmp_path / "~").exists()


@pytest.mark.parametrize("change", ["zeros", "labels", "shape", "type", "name", "nan", "older", "bytes"])
def test_R3_what_a_cache_holds_is_what_was_rendered(few, tmp_path, change):
    want = few()
    (path,) = (tmp_path / "cache").rglob("*.pt")
    kept = common.read_tensors(path)
    if change == "zeros":
        kept["images"].zero_()
    elif change == "labels":
        kept["labels"] = kept["labels"].flip(0)
    elif change == "shape":
        kept["images"] = kept["images"][:, :, :4]
    elif change == "type":
        kept["images"] = kept["images"].float()
    elif change == "name":
        del kept["masks"]
    elif change == "nan":
        kept["boxes"][3] = float("nan")
    elif change == "older":
        del kept["digest"]
    common.save_checkpoint(path, kept)
    if change == "bytes":
        path.write_bytes(path.read_bytes()[:-100])
    got = few()
    assert all(torch.equal(getattr(got, k), getattr(want, k)) for k in ("images", "labels", "masks", "boxes"))
    assert common.read_tensors(path)["digest"] == common.digest_of(
        {k: v for k, v in common.read_tensors(path).items() if k != "digest"}
    )  # mended


@pytest.mark.parametrize("change", ["constant", "function", "deep function", "nothing"])
def test_R3_other_code_has_another_cache(few, tmp_path, monkeypatch, change):
    few()
    if change == "constant":
        monkeypatch.setattr(common, "AMBIENT", 0.1)
    elif change == "function":
        monkeypatch.setattr(common, "bounding_boxes", lambda masks: torch.zeros(len(masks), 4))
    elif change == "deep function":
        monkeypatch.setattr(
            common,
            "hsv_to_rgb",
            lambda h, s, v: torch.zeros(*torch.broadcast_tensors(*map(torch.as_tensor, (h, s, v)))[0].shape, 3),
        )
    got = few()
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 1 + (change != "nothing")
    assert (got.boxes == 0).all() == (change == "function")


def test_R3_corrected_latents_are_read_anew(bench3die, monkeypatch):
    first, reads, latents_of = common.load_data("3diebench", bench3die, "train", 16, workers=0), [], common.latents_of
    monkeypatch.setattr(common, "code_of", lambda function: "the same")
    load = lambda: common.load_data("3diebench", bench3die, "train", 16, workers=0)
    load()
    monkeypatch.setattr(common, "latents_of", lambda folder: reads.append(folder) or latents_of(folder))
    assert torch.equal(load().factors["rotation"], first.factors["rotation"]) and not reads
    path = bench3die / "04379243" / "a1" / "latent_9.npy"
    stat = path.stat()
    np.save(path, np.full(7, 0.5))  # as long as before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load().factors["floor_hue"][109] == 0.5 and len(reads) == 4


def kept_by_each(where, root):
    rank = common.rank()
    os.environ["XDG_CACHE_HOME"] = str(
        where / f"machine {rank}"
    )  # rank 0 writes, so that only its machine has the file
    make = lambda: dict(x=common.gather(torch.tensor([rank + 1.0])))
    values = [common.cached("sum", make)["x"].tolist() for _ in range(2)]
    sets = [common.load_data("3diebench", root, "train", 16, workers=0) for _ in range(2)]
    return (
        values,
        [d.factors["light_hue"].sum().item() for d in sets],
        len(list((where / f"machine {rank}").rglob("*.pt"))),
    )


def test_F2_machines_with_caches_of_their_own(bench3die, tmp_path):
    one = common.load_data("3diebench", bench3die, "train", 16, workers=0).factors["light_hue"].sum().item()
    results = on_ranks(2, tmp_path, kept_by_each, tmp_path, bench3die)
    assert [r[:2] for r in results] == [([[1.0, 2.0]] * 2, [one] * 2)] * 2 and [r[2] for r in results] == [2, 0]


def split_of_one_machine(where):
    try:
        return (
            common.load_data(
                "imagefolder", str(where / f"machine {common.rank()}"), "test", 16, skip_corrupt=True, workers=0
            )
            is None
        )
    except SystemExit as e:
        return e.code


def test_F2_a_split_that_only_one_machine_has_is_refused_on_all(tmp_path, monkeypatch):
    for name in ("machine 0/train/1.png", "machine 0/val/1.png", "machine 1/train/1.png"):
        touch(tmp_path / name)
    assert on_ranks(2, tmp_path, split_of_one_machine, tmp_path) == [2, 2]


# ---- 3DIEBench -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what, words",
    [
        ("more labels", "names 4 objects, train_labels.npy has 5"),
        ("label -1", "says -1 at index 2 (04379243/a1); 3DIEBench has the classes 0 to 54"),
        ("label 55", "says 55 at index 2"),
        ("labels that are no numbers", "train_labels.npy: holds float64"),
        ("labels in a table", "of shape (4, 1)"),
        ("objects of Python", "train_images.npy: cannot be read"),
        ("a list that claims too much", "train_labels.npy: cannot be read"),
        ("no objects", "train_images.npy: holds"),
        ("no view", "image_7.jpg: missing"),
        ("no latent", "latent_7.npy: missing"),
        ("no object", "04379243/a1: cannot be listed"),
    ],
)
def test_D13_an_inconsistent_3diebench_is_named(bench3die, capsys, what, words):
    labels, folder = np.array([0, 0, 1, 1]), bench3die / "04379243" / "a1"
    if what == "more labels":
        labels = np.array([0, 0, 1, 1, 1])
    elif what.startswith("label "):
        labels[2] = int(what.split()[1])
    elif what == "labels that are no numbers":
        labels = labels * np.nan
    elif what == "labels in a table":
        labels = labels[:, None]
    np.save(bench3die / "train_labels.npy", labels)
    if what == "objects of Python":
        np.save(bench3die / "train_images.npy", np.array(["a", None, 3], dtype=object), allow_pickle=True)
    elif what == "a list that claims too much":
        content = (bench3die / "train_labels.npy").read_bytes()
        (bench3die / "train_labels.npy").write_bytes(content.replace(b"(4,), }         ", b"(4000000000,), }", 1))
    elif what == "no objects":
        np.save(bench3die / "train_images.npy", np.array([], dtype="U1"))
    elif what == "no object":
        shutil.rmtree(folder)
    elif what.startswith("no "):
        (folder / dict(view="image_7.jpg", latent="latent_7.npy")[what.split()[1]]).unlink()
    assert words in refusal(capsys, common.load_data, "3diebench", bench3die, "train", 16, workers=0)


def test_D13_slashes_around_names_do_not_matter_and_views_may_be_left_out_on_request(bench3die):
    np.save(bench3die / "val_images.npy", np.array(["02691156/a1", "/02691156/b2", "04379243/a1/", "04379243/b2"]))
    assert (
        common.load_data("3diebench", bench3die, "test", 16, workers=0).paths.digest()
        == common.load_data("3diebench", bench3die, "train", 16, workers=0).paths.digest()
    )
    (bench3die / "04379243" / "a1" / "image_7.jpg").unlink()
    data = common.load_data("3diebench", bench3die, "train", 16, skip_corrupt=True, workers=0)
    assert len(data) == 199 and data.skipped == (f"{bench3die}/04379243/a1/image_7.jpg",)


@pytest.mark.parametrize(
    "what, words",
    [
        ("cut off", "not 7 numbers"),
        ("empty", "not 7 numbers"),
        ("objects of Python", "not 7 numbers"),
        ("9 numbers", "not 7 numbers"),
        ("nan", "not 7 numbers"),
        ("inf", "not 7 numbers"),
        ("text", "not 7 numbers"),
        ("an archive", "not 7 numbers"),
        ("claims too much", "not 7 numbers"),
        ("degrees", "radians"),
        ("hue in degrees", "hues from 0 to 1"),
    ],
)
def test_D14_a_latent_that_is_none_is_named(bench3die, capsys, what, words):
    path = bench3die / "02691156" / "b2" / "latent_31.npy"
    z = dict(
        nan=np.full(7, np.nan),
        inf=np.full(7, np.inf),
        text=np.array(list("0123456")),
        degrees=np.array([45, -90, 0, 0.5, 0.5, 0.5, 0.5]),
    )
    z |= {"9 numbers": np.zeros(9), "hue in degrees": np.array([0, 0, 0, 120, 0, 0, 0.5])}
    np.save(path, z.get(what, np.zeros(7)))
    content = path.read_bytes()
    if what == "cut off":
        path.write_bytes(content[:-5])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "objects of Python":
        np.save(path, np.array([0] * 7, dtype=object), allow_pickle=True)
    elif what == "an archive":
        with open(path, "wb") as f:
            np.savez(f, z=np.zeros(7))
    elif what == "claims too much":
        path.write_bytes(content.replace(b"(7,), }         ", b"(7000000000,), }", 1))
    line = refusal(capsys, common.load_data, "3diebench", bench3die, "train", 16, workers=0)
    assert f"{path}" in line and words in line


def test_R3_a_digest_does_not_ask_how_a_tensor_lies_in_memory():
    x = torch.arange(6).view(3, 2)
    assert (
        common.digest_of(x[:, 1])
        == common.digest_of(torch.tensor([1, 3, 5]))
        != common.digest_of(torch.tensor([1, 3, 6]))
    )
    assert common.digest_of(torch.ones(1).expand(4)) == common.digest_of(torch.ones(4))


def test_R3_turntables_are_rendered_into_an_empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = common.load_data("blocks-views", None, "test", 8)
    assert len(list(tmp_path.rglob("*.pt"))) == 1 and torch.equal(
        common.load_data("blocks-views", None, "test", 8).images, first.images
    )
