"""Shared by all tests: one thread (bits depend on it), the repository on the path, a tiny folder of images."""

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(1)

# In the tests the smallest ViT is smaller still, but for those that ask for `pico`.
PICO = common.VITS["vit_pico"]
common.VITS["vit_pico"] = dict(embed_dim=32, depth=4, num_heads=2)

# A suite in the background, or under nohup, would ignore these.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """train/ and test/ with two classes (bright left half, bright right half), 24 + 12 images of 16 x 16."""
    root = tmp_path_factory.mktemp("folder")
    g = torch.Generator().manual_seed(0)
    for split, n in (("train", 12), ("test", 6)):
        for c, name in enumerate(("left", "right")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                x = torch.randint(0, 120, (16, 16, 3), generator=g, dtype=torch.uint8)
                x[:, 8 * c : 8 * c + 8] += 120
                Image.fromarray(x.numpy()).save(root / split / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny(folder):
    """Arguments of a run of two steps an epoch that takes a second."""
    return [
        *"--data imagefolder --data-dir".split(),
        str(folder),
        *"--recipe cifar10 --arch vit_pico --img-size 16 --patch-size 4 --batch-size 12".split(),
        *"--epochs 3 --warmup-epochs 1 --proj-hidden 16 --proj-dim 8 --equi-dim 16".split(),
        *"--workers 0 --device cpu".split(),
    ]


@pytest.fixture
def pico(monkeypatch):
    """vit_pico as users have it, in this process and its forks."""
    monkeypatch.setitem(common.VITS, "vit_pico", PICO)


@pytest.fixture(scope="session")
def core50(tmp_path_factory):
    """Three sessions of ten objects (two categories) as CORe50 lays them out: three frames each, of 16 x 16, numbers
    with gaps."""
    root = tmp_path_factory.mktemp("core50")
    g = torch.Generator().manual_seed(0)
    for s in (1, 2, 3):
        for o in range(1, 11):
            (root / f"s{s}" / f"o{o}").mkdir(parents=True)
            for frame in (0, 5, 21):
                x = torch.randint(0, 120, (16, 16, 3), generator=g, dtype=torch.uint8) + 12 * o
                Image.fromarray(x.numpy()).save(root / f"s{s}" / f"o{o}" / f"C_{s:02d}_{o:02d}_{frame:03d}.png")
    return root


@pytest.fixture
def bench3die(tmp_path, monkeypatch):
    """2 synsets x 2 objects x 50 views, as published."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, g = tmp_path / "3DIEBench", np.random.default_rng(0)
    objects = [f"{s}/{o}" for s in ("02691156", "04379243") for o in ("a1", "b2")]
    for name in objects:
        (root / name).mkdir(parents=True)
        for v in range(50):
            Image.fromarray(g.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name / f"image_{v}.jpg")
            np.save(root / name / f"latent_{v}.npy", g.random(7))
    for part in ("train", "val"):
        np.save(root / f"{part}_images.npy", np.array([f"/{name}/" for name in objects]))
        np.save(root / f"{part}_labels.npy", np.array([0, 0, 1, 1]))
    return root
