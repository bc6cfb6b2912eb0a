"""Laws of training data: the samples' own numbers, once an epoch, in an order that the seed alone decides."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnx_mdp.errors import UsageError
from onnx_mdp.training.batches import Batch, Share
from onnx_mdp.training.data import DataOptions, TrainingData, open_data

ALONE = Share()
FLOAT, INT = np.dtype("float32"), np.dtype("int64")
RNG = np.random.default_rng(3)
TABLE = {"x": (1, 4)}
PICTURE = {"x": (1, 3, 16, 16)}

LOADER = """
import numpy as np

def batches(request):
    start = 0 if request.split == "train" else 100
    rows = [np.full((request.batch, 4), start + request.epoch * 10 + i, np.float32) for i in range(3)]
    return [({"x": row}, row[:, 0].astype(int)) for row in rows]

def stream(request):
    return iter(batches(request))

def wrong(request):
    yield {"y": np.zeros((2, 4))}

def broken(request):
    yield 1 / 0
"""


def opened(
    data: str, shapes: dict[str, tuple[int, ...]] = TABLE, share: Share = ALONE, **more: Any
) -> TrainingData:
    return open_data(DataOptions(data, **more), shapes, dict.fromkeys(shapes, FLOAT), share)


def numbered(folder: Path, count: int, writer: Callable[..., None] = np.savez, **more: Any) -> str:
    """Rows that hold their number, which is their label too."""
    rows = np.repeat(np.arange(count, dtype=np.float32)[:, None], 4, axis=1)
    writer(folder / "data.npz", x=rows, labels=np.arange(count), **more)
    return str(folder / "data.npz")


def pictures(folder: Path, classes: int = 2, each: int = 6) -> Path:
    for number in range(classes * each):
        (folder / f"class{number % classes}").mkdir(parents=True, exist_ok=True)
        level = np.full((20, 30, 3), 10 * number, np.uint8)
        Image.fromarray(level).save(folder / f"class{number % classes}" / f"{number:02}.png")
    return folder


def rows(batches: list[Batch]) -> list[float]:
    return [float(row) for batch in batches for row in batch.inputs["x"].reshape(batch.rows, -1)[:, 0]]


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(np.array_equal(a.inputs["x"], b.inputs["x"]) for a, b in pairs)


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_an_epoch_is_every_sample_once_and_none_of_validation(
    tmp_path: Path, writer: Callable[..., None]
) -> None:
    data = opened(numbered(tmp_path, 40, writer), batch=6)
    learned = [rows(list(data.training(epoch))) for epoch in range(2)]
    checked = rows(list(data.validation()))
    assert len(checked) == 4
    assert data.steps == 6
    for epoch in learned:
        assert len(set(epoch)) == 36
        assert not set(epoch) & set(checked)
    assert learned[0] != learned[1]
    assert learned[0] == rows(list(opened(numbered(tmp_path, 40, writer), batch=6).training(0)))
    assert learned[0] != rows(list(opened(numbered(tmp_path, 40, writer), batch=6, seed=1).training(0)))


def test_labels_stay_with_their_samples(tmp_path: Path) -> None:
    for batch in opened(numbered(tmp_path, 40), batch=8).training(0):
        assert batch.targets is not None
        assert batch.targets.tolist() == batch.inputs["x"][:, 0].tolist()


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_an_epoch_goes_on_where_it_was_left(tmp_path: Path, augment: str) -> None:
    np.savez(tmp_path / "d.npz", x=RNG.integers(0, 255, (30, 16, 16, 3), np.uint8))
    data = opened(str(tmp_path / "d.npz"), PICTURE, batch=4, preprocess="unit", augment=augment)
    whole = list(data.training(1))
    assert len(whole) > 3
    assert same(whole[3:], list(data.training(1, 3)))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_each_batch_between_them(tmp_path: Path, size: int) -> None:
    path = numbered(tmp_path, 40)
    whole = list(opened(path, batch=12).training(0))
    parts = [list(opened(path, share=Share(rank, size), batch=12).training(0)) for rank in range(size)]
    for number, batch in enumerate(whole):
        shared = np.concatenate([part[number].inputs["x"] for part in parts])
        assert np.array_equal(shared, batch.inputs["x"])
    checked = [rows(list(opened(path, share=Share(r, size), batch=6).validation())) for r in range(size)]
    assert sorted(itertools.chain(*checked)) == sorted(rows(list(opened(path, batch=6).validation())))


def test_a_fixed_batch_keeps_its_rows_together(tmp_path: Path) -> None:
    """Six cameras are one sample of a model that takes six at a time."""
    data = opened(numbered(tmp_path, 60), {"x": (6, 4)}, batch=12)
    for batch in data.training(0):
        groups = batch.inputs["x"][:, 0].reshape(-1, 6)
        assert (groups == groups[:, :1] + np.arange(6)).all()
        assert (groups[:, 0] % 6 == 0).all()


def test_stored_arrays_are_mapped_and_not_read(tmp_path: Path) -> None:
    from onnx_mdp.training.sources import open_source

    np.savez(tmp_path / "d.npz", x=np.zeros((5, 4), np.float32))
    source, _ = open_source(tmp_path / "d.npz", TABLE, {"x": FLOAT})
    assert isinstance(source.arrays["x"], np.memmap)  # type: ignore[attr-defined]


def test_pixels_in_an_archive_and_in_files_are_the_same(tmp_path: Path) -> None:
    images = RNG.integers(0, 255, (8, 20, 20, 3), np.uint8)
    (tmp_path / "files").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "files" / f"{number}.png")
    np.savez(tmp_path / "d.npz", pixels=images)
    options: dict[str, Any] = {
        "batch": 2,
        "preprocess": "imagenet",
        "augment": "crop",
        "validation_share": 0.25,
    }
    archive = opened(str(tmp_path / "d.npz"), PICTURE, **options)
    files = opened(str(tmp_path / "files"), PICTURE, **options)
    assert same(list(archive.training(0)), list(files.training(0)))
    assert same(list(archive.validation()), list(files.validation()))


def test_a_flip_mirrors_about_half_of_the_images_and_nothing_else(tmp_path: Path) -> None:
    images = RNG.standard_normal((80, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=images, labels=np.arange(80))
    flipped = 0
    for batch in opened(str(tmp_path / "d.npz"), PICTURE, batch=8, augment="flip").training(0):
        assert batch.targets is not None
        for got, number in zip(batch.inputs["x"], batch.targets, strict=True):
            as_it_was = np.array_equal(got, images[number])
            flipped += not as_it_was
            assert as_it_was or np.array_equal(got, images[number][:, :, ::-1])
    assert 20 < flipped < 52


def test_a_crop_shifts_small_images_and_boxes_large_ones(tmp_path: Path) -> None:
    images = np.ones((40, 3, 16, 16), np.float32)
    np.savez(tmp_path / "d.npz", x=images)
    lost = set()
    for batch in opened(str(tmp_path / "d.npz"), PICTURE, batch=4, augment="crop").training(0):
        lost |= {int(256 - image[0].sum()) for image in batch.inputs["x"]}
    assert len(lost) > 3
    assert max(lost) <= 16 * 16 - 14 * 14
    large = {"x": (1, 3, 80, 80)}
    folder = pictures(tmp_path / "files")
    data = opened(str(folder), large, batch=2, preprocess="unit", augment="crop")
    whole = [image for batch in data.training(0) for image in batch.inputs["x"]]
    assert all(np.ptp(image) == 0 for image in whole)  # a flat image stays flat, whichever box is taken


@pytest.mark.parametrize("how", ["folder", "csv", "json"])
def test_labels_of_images(tmp_path: Path, how: str) -> None:
    folder = pictures(tmp_path / "images")
    classes = {f.relative_to(folder).as_posix(): int(f.stem) % 2 for f in folder.rglob("*.png")}
    labels = str(tmp_path / f"labels.{how}")
    if how == "csv":
        lines = ["file,class", *(f"{name},{number}" for name, number in classes.items())]
        Path(labels).write_text("\n".join(lines))
    elif how == "json":
        Path(labels).write_text(json.dumps(classes))
    else:
        labels = "folder"
    data = opened(str(folder), PICTURE, batch=2, preprocess="raw", labels=labels)
    assert data.classes == (2 if how == "folder" else None)
    for batch in (*data.training(0), *data.validation()):
        assert batch.targets is not None
        assert (batch.inputs["x"][:, 0, 0, 0] / 10 % 2 == batch.targets).all()


def test_a_loader_gives_its_batches_in_parts(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(LOADER)
    mine = f"{tmp_path / 'mine.py'}:batches"
    data = opened(mine, batch=4)
    assert data.steps == 3
    assert rows(list(data.training(1))) == [10.0] * 4 + [11.0] * 4 + [12.0] * 4
    assert rows(list(data.training(1, 2))) == [12.0] * 4
    assert data.probe().inputs["x"][0, 0] == 100
    half = opened(mine, share=Share(1, 2), batch=4)
    assert [batch.rows for batch in half.training(0)] == [2, 2, 2]
    assert opened(f"{tmp_path / 'mine.py'}:stream", batch=4).steps is None


REFUSED: dict[str, tuple[Callable[[Path], str], dict[str, Any], str]] = {
    "nothing": (lambda _: "none.npz", {}, "does not exist; training data is"),
    "no archive": (lambda p: written(p, b"PK no"), {}, "no readable .npz archive"),
    "shape": (lambda p: saved(p, x=np.ones((9, 5))), {}, r"shape \(9, 5\), but the model takes \('n', 4\)"),
    "names": (lambda p: saved(p, a=np.ones((9, 4)), b=np.ones((9, 4))), {}, "holds the inputs a, b"),
    "text": (lambda p: saved(p, x=np.array(["a"] * 9)), {}, "save numbers, a row a sample"),
    "uneven": (lambda p: saved(p, x=np.ones((9, 4)), labels=np.ones(8)), {}, "the same number of samples"),
    "few": (lambda p: saved(p, x=np.ones((1, 4))), {}, "holds 1 samples, too few"),
    "share": (lambda p: saved(p, x=np.ones((9, 4))), {"validation_share": 1.5}, "--val-share is a share"),
    "no such labels": (lambda p: saved(p, x=np.ones((9, 4))), {"labels": "y"}, "name one that is no input"),
    "augment": (lambda p: saved(p, x=np.ones((9, 4))), {"augment": "flip"}, "one image input"),
    "unknown augment": (lambda p: saved(p, x=np.ones((9, 4))), {"augment": "turn"}, "choose one of none"),
    "no function": (lambda p: mine(p, "none"), {}, "has no function none"),
    "no module": (lambda p: "no_such_module:f", {}, "importing no_such_module failed"),
    "wrong names": (lambda p: mine(p, "wrong"), {}, "gives the inputs y, but the model takes x"),
    "broken": (lambda p: mine(p, "broken"), {}, "failed: ZeroDivisionError"),
    "loader and file": (lambda p: mine(p, "batches"), {"validation": "a.npz"}, "--val is none"),
    "loader and labels": (lambda p: mine(p, "batches"), {"labels": "folder"}, "--labels is for files"),
}


def saved(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "d.npz", **arrays)
    return str(folder / "d.npz")


def written(folder: Path, data: bytes) -> str:
    (folder / "d.npz").write_bytes(data)
    return str(folder / "d.npz")


def mine(folder: Path, name: str) -> str:
    (folder / "mine.py").write_text(LOADER)
    return f"{folder / 'mine.py'}:{name}"


@pytest.mark.parametrize("case", REFUSED)
def test_unfit_data_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    make, options, message = REFUSED[case]
    with pytest.raises(UsageError, match=message) as caught:
        next(opened(make(tmp_path), batch=2, **options).training(0))
    assert "\n" not in str(caught.value)


def test_images_outside_of_class_folders_and_unknown_files_are_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "images")
    (tmp_path / "labels.csv").write_text("nothing.png,1")
    options: dict[str, Any] = {"batch": 2, "preprocess": "raw"}
    with pytest.raises(UsageError, match="no class; add it"):
        opened(str(folder), PICTURE, labels=str(tmp_path / "labels.csv"), **options)
    Image.new("RGB", (8, 8)).save(folder / "loose.png")
    with pytest.raises(UsageError, match="lies in no class folder"):
        opened(str(folder), PICTURE, labels="folder", **options)


def test_a_batch_must_be_shared_evenly(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose a multiple of 3"):
        opened(numbered(tmp_path, 40), share=Share(0, 3), batch=8)


def test_integers_become_the_models_type(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.arange(80, dtype=np.uint8).reshape(20, 4))
    data = open_data(DataOptions(str(tmp_path / "d.npz"), batch=2), {"x": (1, 4)}, {"x": INT}, Share())
    assert next(data.training(0)).inputs["x"].dtype == INT
