"""Laws of real inputs: the file's own numbers, the same image in every layout, and clear refusals."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnx_mdp.data.calibration import CalibrationData, load_data
from onnx_mdp.data.images import PREPROCESSINGS
from onnx_mdp.errors import UsageError

FLOAT, INT = np.dtype("float32"), np.dtype("int64")
RNG = np.random.default_rng(5)
PHOTO = RNG.integers(0, 256, (90, 150, 3), np.uint8)
IMAGE = (1, 3, 8, 8)
COLOUR = (10, 130, 250)  # red, green and blue differ, so a swapped order shows


def load(
    path: Path, shape: tuple[int, ...] = (1, 3, 32, 32), how: str | None = None, samples: int = 64
) -> CalibrationData:
    """Load for a model with the one float input ``x``."""
    return load_data(path, {"x": shape}, {"x": FLOAT}, preprocess=how, samples=samples)


def pixels(path: Path, shape: tuple[int, ...], how: str) -> np.ndarray:
    """All images of a folder as one array."""
    return np.concatenate([feed["x"] for feed in load(path, shape, how).feeds])


def save(path: Path, image: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).convert(mode).save(path)
    return path.parent


def save_flat(folder: Path, count: int) -> Path:
    """``count`` grey images whose level is their index."""
    for level in range(count):
        save(folder / f"{level:03}.png", np.full((8, 8, 3), level, np.uint8))
    return folder


def save_npz(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [">f4", "<f4", "f8", "u1"])
def test_an_archive_gives_back_its_numbers(
    tmp_path: Path, writer: Callable[..., None], order: str, dtype: str
) -> None:
    held = np.asarray(RNG.integers(0, 200, (10, 3, 5, 4)).astype(dtype), order=order)
    writer(tmp_path / "data.npz", x=held)
    data = load(tmp_path / "data.npz", (5, 3, 5, 4))
    assert [feed["x"].shape for feed in data.feeds] == [(5, 3, 5, 4)] * 2
    assert all(feed["x"].dtype == FLOAT and feed["x"].flags.c_contiguous for feed in data.feeds)
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in data.feeds]), held)
    assert data.source == f"10 of 10 samples in {tmp_path / 'data.npz'}"


@pytest.mark.parametrize(
    ("held", "batch", "samples"), [(10, 1, 64), (10, 3, 64), (10, 2, 5), (100, 4, 32), (7, 7, 7)]
)
def test_the_choice_is_whole_batches_evenly_spread(
    tmp_path: Path, held: int, batch: int, samples: int
) -> None:
    path = save_npz(tmp_path, x=np.arange(held, dtype=FLOAT)[:, None])
    feeds = load(path, (batch, 1), samples=samples).feeds
    rows = np.concatenate([feed["x"][:, 0] for feed in feeds])
    assert len(rows) == min(held, samples) // batch * batch
    assert all(len(feed["x"]) == batch for feed in feeds)
    gaps = np.diff(rows)
    assert gaps.min() >= 1
    assert np.ptp(gaps) <= 1
    assert abs(rows[0] - (held - 1 - rows[-1])) <= 1  # as much is left out at the start as at the end


def test_inputs_of_one_feed_come_from_the_same_samples(tmp_path: Path) -> None:
    ids = np.arange(9)
    path = save_npz(
        tmp_path, ids=ids[:, None], image=np.broadcast_to(ids[:, None, None], (9, 2, 2)).astype(float)
    )
    shapes, dtypes = {"image": (2, 2, 2), "ids": (2, 1)}, {"image": FLOAT, "ids": INT}
    data = load_data(path, shapes, dtypes, preprocess=None, samples=5)
    assert len(data.feeds) == 2
    for feed in data.feeds:
        assert {name: (array.shape, array.dtype) for name, array in feed.items()} == {
            name: (shapes[name], dtypes[name]) for name in shapes
        }
        np.testing.assert_array_equal(feed["image"][:, 0, 0], feed["ids"][:, 0])


def test_the_only_array_may_have_any_name(tmp_path: Path) -> None:
    assert load(save_npz(tmp_path, arr_0=np.ones((1, 4))), (1, 4)).feeds[0]["x"].sum() == 4


def expected(how: str) -> tuple[float, float, float]:
    """What COLOUR becomes, from the published definitions."""
    r, g, b = COLOUR
    imagenet = ((r / 255 - 0.485) / 0.229, (g / 255 - 0.456) / 0.224, (b / 255 - 0.406) / 0.225)
    cifar = ((r / 255 - 0.4914) / 0.2023, (g / 255 - 0.4822) / 0.1994, (b / 255 - 0.4465) / 0.2010)
    return {
        "imagenet": imagenet,
        "imagenet-bicubic": imagenet,
        "imagenet-nocrop": imagenet,
        "half": (r / 127.5 - 1, g / 127.5 - 1, b / 127.5 - 1),
        "unit": (r / 255, g / 255, b / 255),
        "raw": (r, g, b),
        "bgr": (b, g, r),
        "caffe": (b - 104, g - 117, r - 123),
        "cifar": cifar,
        "mean=0.5,0.25,0;std=0.5,1,2": ((r / 255 - 0.5) / 0.5, g / 255 - 0.25, b / 510),
        "mean=0;std=1;order=bgr;crop=0.5": (b / 255, g / 255, r / 255),
    }[how]


@pytest.mark.parametrize(
    "how", [*PREPROCESSINGS, "mean=0.5,0.25,0;std=0.5,1,2", "mean=0;std=1;order=bgr;crop=0.5"]
)
def test_a_flat_image_becomes_its_analytic_value(tmp_path: Path, how: str) -> None:
    save(tmp_path / "a.png", np.full((50, 70, 3), COLOUR, np.uint8))
    value = pixels(tmp_path, (1, 3, 32, 24), how)
    wanted = np.broadcast_to(np.array(expected(how), FLOAT)[:, None, None], (3, 32, 24))
    np.testing.assert_allclose(value[0], wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("how", PREPROCESSINGS)
def test_the_layout_changes_the_order_and_no_number(tmp_path: Path, how: str) -> None:
    save(tmp_path / "a.png", PHOTO)
    save(tmp_path / "b.png", PHOTO[::-1, :60])
    first, last = pixels(tmp_path, (2, 3, 28, 36), how), pixels(tmp_path, (2, 28, 36, 3), how)
    assert first.flags.c_contiguous
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("size", [(90, 150), (150, 90), (20, 33), (64, 64)])
@pytest.mark.parametrize("side", [32, 56])
def test_a_crop_equals_resize_then_centre_crop(tmp_path: Path, size: tuple[int, int], side: int) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8))
    image.save(tmp_path / "a.png")
    short = round(side * 256 / 224)
    wide, tall = (short * edge // min(image.size) for edge in image.size)
    left, top = round((wide - side) / 2), round((tall - side) / 2)
    resized = image.resize((wide, tall), Image.Resampling.BILINEAR)
    wanted = np.asarray(resized.crop((left, top, left + side, top + side)), FLOAT)
    got = pixels(tmp_path, (1, side, side, 3), "mean=0;std=1;crop=0.875")[0] * 255
    assert np.abs(got - wanted).max() <= 1.01  # Pillow rounds to 8 bits between and after its two passes


def test_a_full_crop_of_a_fitting_image_and_a_plain_resize_change_nothing(tmp_path: Path) -> None:
    save(tmp_path / "a.png", PHOTO)
    for how in ("raw", "bgr", "mean=0;std=0.00392156862745098;crop=1"):
        got = pixels(tmp_path, (1, 90, 150, 3), how)[0]
        np.testing.assert_allclose(got, PHOTO[..., ::-1] if how == "bgr" else PHOTO, rtol=1e-6)


def test_only_the_plain_resize_keeps_the_edges(tmp_path: Path) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:2] = 255
    save(tmp_path / "a.png", image)
    assert pixels(tmp_path, (1, 3, 64, 64), "unit").max() == 1
    assert pixels(tmp_path, (1, 3, 64, 64), "half").max() == -1


def test_bicubic_is_another_resize(tmp_path: Path) -> None:
    save(tmp_path / "a.png", PHOTO)
    one, other = (pixels(tmp_path, IMAGE, how) for how in ("imagenet", "imagenet-bicubic"))
    assert np.abs(one - other).max() > 0.01


def test_a_grey_model_takes_the_luma_of_colours_and_a_colour_model_the_grey_three_times(
    tmp_path: Path,
) -> None:
    colour = save(tmp_path / "colour" / "a.png", np.full((8, 8, 3), COLOUR, np.uint8))
    luma = 0.299 * COLOUR[0] + 0.587 * COLOUR[1] + 0.114 * COLOUR[2]
    assert np.abs(pixels(colour, (1, 1, 8, 8), "raw") - luma).max() <= 1
    np.testing.assert_array_equal(
        pixels(colour, (1, 8, 8, 1), "raw")[..., 0], pixels(colour, (1, 1, 8, 8), "raw")[:, 0]
    )
    grey = save(tmp_path / "grey" / "a.png", np.full((8, 8, 3), 77, np.uint8), "L")
    assert (pixels(grey, (1, 3, 8, 8), "raw") == 77).all()


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1"])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_every_eight_bit_kind_of_file_is_read(tmp_path: Path, mode: str, suffix: str) -> None:
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    # Pillow warns of transparency in bytes, and warnings are errors here.
    image.save(tmp_path / f"a.{suffix}", **({"transparency": b"\x80\xff"} if mode == "P" else {}))
    assert (pixels(tmp_path, IMAGE, "unit") == 1).all()


def test_images_are_sorted_by_path_found_at_any_depth_and_evenly_chosen(tmp_path: Path) -> None:
    save_flat(tmp_path / "b", 4)
    save(tmp_path / "a" / "deep" / "z.JPEG", np.full((8, 8, 3), 200, np.uint8))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._z.jpg").write_bytes(b"resource fork")
    levels = pixels(tmp_path, (1, 3, 8, 8), "raw")[:, 0, 0, 0]
    assert levels.tolist() == [200, 0, 1, 2, 3]
    data = load(save_flat(tmp_path / "b", 40), (2, 3, 8, 8), "raw", samples=9)
    assert [feed["x"][i, 0, 0, 0] for feed in data.feeds for i in (0, 1)] == [2, 7, 12, 17, 22, 27, 32, 37]
    assert data.source == f"8 of 40 images in {tmp_path / 'b'}, raw"


def test_half_precision_inputs_get_half_precision(tmp_path: Path) -> None:
    data = load_data(save_flat(tmp_path, 1), {"x": IMAGE}, {"x": np.dtype("float16")}, preprocess="half")
    assert data.feeds[0]["x"].dtype == np.float16


def test_a_thin_image_needs_no_huge_intermediate(tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 1), COLOUR).save(tmp_path / "a.png")  # resized whole, it would take 12 GB
    value = pixels(tmp_path, (1, 3, 224, 224), "caffe")
    np.testing.assert_allclose(value[0, :, 0, 0], expected("caffe"))


Maker = Callable[[Path], Path]


@dataclass(frozen=True)
class Refusal:
    """Data, what it is loaded for, and a part of the message."""

    make: Maker
    message: str
    shape: tuple[int, ...] = (1, 4)
    samples: int = 64


def arrays(**held: np.ndarray) -> Maker:
    return lambda folder: save_npz(folder, **held)


def file(name: str, data: bytes) -> Maker:
    """The folder of one file with these bytes, or the file if it is an archive."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name if name.endswith("npz") else folder

    return make


def lying_header(folder: Path) -> Path:
    """An archive that claims a billion samples in 100 bytes."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 4), }\n"
    with zipfile.ZipFile(folder / "data.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return folder / "data.npz"


def lying_directory(folder: Path) -> Path:
    """An archive whose directory claims 4.3 GB for its array."""
    path = save_npz(folder, x=np.ones((8, 4)))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(data)
    return path


def truncated(folder: Path) -> Path:
    save(folder / "a.png", PHOTO)
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    return folder


def sixteen_bit(folder: Path) -> Path:
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(folder / "a.png")
    return folder


def renamed_tiff(folder: Path) -> Path:
    Image.fromarray(PHOTO).save(folder / "a.jpg", "TIFF")
    return folder


def bomb(folder: Path) -> Path:
    Image.new("1", (10_000, 9_500)).save(folder / "a.png")
    return folder


EIGHT = arrays(x=np.ones((8, 4)))
FLAT = partial(save_flat, count=1)

ARCHIVES = {
    "no such path": Refusal(lambda folder: folder / "none", "does not exist; --data takes"),
    "no archive": Refusal(file("a.npz", b"PK but no zip"), "no readable .npz archive"),
    "pickle": Refusal(arrays(x=np.array([[{}] * 4])), "'x' .* has dtype object, which is no number"),
    "text": Refusal(arrays(x=np.array([["a"] * 4])), "has dtype <U1, which is no number"),
    "shape": Refusal(arrays(x=np.ones((3, 5))), r"shape \(3, 5\), but the model takes \('n', 4\)"),
    "scalar": Refusal(arrays(x=np.array(1.0)), r"has shape \(\), but"),
    "names": Refusal(arrays(a=np.ones(4), b=np.ones(4)), "holds a, b, but the model takes x;"),
    "no array": Refusal(arrays(), "holds nothing, but the model takes x"),
    "nan": Refusal(arrays(x=np.full((1, 4), np.nan)), "float64 values that are no finite float32"),
    "overflow": Refusal(arrays(x=np.full((1, 4), 1e60)), "float64 values that are no finite float32"),
    "no batch": Refusal(EIGHT, "--samples 64 of the 8 in .* do not fill a batch of 9", (9, 4)),
    "few asked": Refusal(EIGHT, "--samples 3 of the 8 in .* do not fill a batch of 4", (4, 4), 3),
    "none asked": Refusal(EIGHT, "--samples 0 of the 8", samples=0),
    "minus asked": Refusal(EIGHT, "--samples -3 of the 8", samples=-3),
    "too many": Refusal(lying_header, r"take 16.0 GB \(at most 4\)", samples=10**9),
    "too large": Refusal(lying_directory, "is above 4 GB"),
    "lying header": Refusal(lying_header, "no readable .npz archive", samples=8),
    "no batch dimension": Refusal(EIGHT, "inputs with a common batch size", ()),
}


FOLDERS = {
    "empty": Refusal(lambda folder: folder, "holds no image; put .bmp", IMAGE),
    "table": Refusal(FLAT, r"not x float32\[1, 4\]; give an .npz", (1, 4)),
    "two channels": Refusal(FLAT, "one 4-D float input of 1 or 3 channels", (1, 2, 8, 8)),
    "which axis": Refusal(FLAT, "one 4-D float input of 1 or 3 channels", (1, 3, 8, 3)),
    "three for one": Refusal(FLAT, "imagenet is for 3 channels, but 'x' has 1", (1, 1, 8, 8)),
    "no image batch": Refusal(FLAT, "--samples 64 of the 1 in .* do not fill a batch of 2", (2, 3, 8, 8)),
    "text as image": Refusal(file("a.png", b"hello"), "a.png is no usable image", IMAGE),
    "another format": Refusal(renamed_tiff, "a.jpg is no usable image", IMAGE),
    "truncated": Refusal(truncated, "a.png is no usable image .*truncated", IMAGE),
    "16-bit": Refusal(sixteen_bit, "a.png .*its mode I;16 is not 8-bit", IMAGE),
    "bomb": Refusal(bomb, "a.png is no usable image .*decompression bomb", IMAGE),
}


@pytest.mark.parametrize("case", [*ARCHIVES, *FOLDERS])
def test_unfit_data_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    refusal = {**ARCHIVES, **FOLDERS}[case]
    path = refusal.make(tmp_path)
    with pytest.raises(UsageError, match=refusal.message) as caught:
        load(path, refusal.shape, "imagenet" if case in FOLDERS else None, refusal.samples)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", [None, "Imagenet", ""])
def test_without_a_known_preprocessing_the_message_lists_all(tmp_path: Path, how: str | None) -> None:
    with pytest.raises(UsageError, match=r"needs --preprocess|no preprocessing is called") as caught:
        load(FLAT(tmp_path), IMAGE, how)
    for name, choice in PREPROCESSINGS.items():
        assert f"  {name} ".ljust(19) in str(caught.value)
        assert choice.meaning in str(caught.value)


MALFORMED = [
    "mean=0.5",
    "mean=0.5,0.5;std=0.5,0.5",
    "mean=0.5;std=0.5,0.5,0.5",
    "mean=0.5;std=0",
    "mean=nan;std=1",
    "mean=0,0,0;std=1,nan,1",
    "mean=0;std=inf",
    "mean=a;std=1",
    "mean=0;std=1;crop=0",
    "mean=0;std=1;crop=1.01",
    "mean=0;std=1;crop=",
    "mean=0;std=1;order=gbr",
    "mean=0;std=1;size=3",
    "mean=0;std=1;",
    "mean=0;std=1;std=1",
]


@pytest.mark.parametrize("how", MALFORMED)
def test_a_malformed_recipe_is_refused(tmp_path: Path, how: str) -> None:
    with pytest.raises(UsageError, match="is wrong; write it as 'mean="):
        load(FLAT(tmp_path), IMAGE, how)


def test_integers_must_stay_the_same_numbers(tmp_path: Path) -> None:
    def ids(held: np.ndarray) -> np.ndarray:
        path = save_npz(tmp_path, ids=held)
        data = load_data(path, {"ids": (1, 2)}, {"ids": np.dtype("int8")}, preprocess=None)
        return data.feeds[0]["ids"]

    np.testing.assert_array_equal(ids(np.array([[-5, 127]])), np.array([[-5, 127]], np.int8))
    for wrong in ([[0, 128]], [[0.5, 1]], [[np.nan, 1]]):
        with pytest.raises(UsageError, match="no finite int8"):
            ids(np.array(wrong))


def test_archives_must_be_complete_and_take_no_recipe(tmp_path: Path) -> None:
    shapes, dtypes = {"a": (1, 2), "b": (1, 2)}, {"a": FLOAT, "b": FLOAT}
    with pytest.raises(UsageError, match=r"first dimensions in .* differ"):
        load_data(save_npz(tmp_path, a=np.ones((3, 2)), b=np.ones((4, 2))), shapes, dtypes, preprocess=None)
    with pytest.raises(UsageError, match="holds a, but the model takes a, b"):
        load_data(save_npz(tmp_path, a=np.ones((3, 2))), shapes, dtypes, preprocess=None)
    with pytest.raises(UsageError, match="--preprocess is for images, in a folder or as uint8"):
        load(EIGHT(tmp_path), IMAGE, "half")


def test_images_of_an_archive_are_those_of_a_folder(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (6, 20, 30, 3), np.uint8)
    for number, image in enumerate(images):
        save(tmp_path / "files" / f"{number}.png", image)
    archive = save_npz(tmp_path, pixels=images, labels=np.arange(6))
    for how in ("imagenet", "bgr"):
        ours = np.concatenate([feed["x"] for feed in load(archive, IMAGE, how).feeds])
        assert np.array_equal(ours, pixels(tmp_path / "files", IMAGE, how))


def test_labels_follow_the_chosen_rows(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    path = save_npz(tmp_path, x=rows, labels=np.arange(6) * 10, other=np.arange(6) * 7)
    shapes, dtypes = {"x": (2, 2)}, {"x": FLOAT}
    with pytest.raises(UsageError, match="other"):
        load_data(path, shapes, dtypes, preprocess=None)
    for name, factor in ((None, 10), ("labels", 10)):
        path = save_npz(tmp_path, x=rows, labels=np.arange(6) * 10)
        data = load_data(path, shapes, dtypes, preprocess=None, samples=4, labels=name)
        assert data.labels is not None
        for feed, labels in zip(data.feeds, data.labels, strict=True):
            assert (feed["x"][:, 0] * factor == labels * 2).all()
    path = save_npz(tmp_path, x=rows, truth=np.arange(6))
    assert load_data(path, shapes, dtypes, preprocess=None, labels="truth").labels is not None
    path = save_npz(tmp_path, x=rows, labels=rows)
    assert load_data(path, shapes, dtypes, preprocess=None).labels is None
    for name, why in (("labels", "class numbers are integers"), ("gone", "holds labels, x")):
        with pytest.raises(UsageError, match=why):
            load_data(path, shapes, dtypes, preprocess=None, labels=name)


def test_the_labels_of_images_are_their_folders(tmp_path: Path) -> None:
    for name in ("cat/a", "cat/b", "dog/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{name}.png")
    data = load_data(tmp_path, {"x": (1, 3, 4, 4)}, {"x": FLOAT}, preprocess="unit", labels="folder")
    assert [int(labels[0]) for labels in data.labels or ()] == [0, 0, 1]
