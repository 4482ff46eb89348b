import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from trustjax.data import DataError, ImageDataset, digits, hugging_face, split

needs_data = pytest.mark.skipif(
    "TRUSTJAX_DATA" not in os.environ,
    reason="set TRUSTJAX_DATA to a folder with cifar10/ and mnist/ in parquet layout",
)


def encode(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def random_images(n: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 5, channels), np.uint8)


def write(
    folder: Path,
    images: list[bytes | None],
    labels: Any,
    *,
    name: str = "train-00000-of-00001",
    columns: tuple[str, str] = ("img", "label"),
    features: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """One parquet file as the datasets library writes it, with its feature metadata if given."""
    structs = [None if image is None else {"bytes": image, "path": None} for image in images]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({columns[0]: pa.array(structs, struct), columns[1]: labels, **(extra or {})})
    if features is not None:
        metadata = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": metadata})
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.parquet"
    parquet.write_table(table, file)
    return file


def class_label(*names: str) -> dict[str, Any]:
    return {"_type": "ClassLabel", "names": list(names)}


def test_digits() -> None:
    dataset = digits()
    assert dataset.images.shape == (1797, 8, 8, 1)
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int32
    assert dataset.num_classes == 10
    # The grey levels 0..16 land on round(255 k / 16).
    expected = [round(255 * level / 16) for level in range(17)]
    np.testing.assert_array_equal(np.unique(dataset.images), expected)


def test_shards_in_order_at_any_depth(tmp_path: Path) -> None:
    pixels = random_images(5)
    deep = tmp_path / "a" / "b"
    write(deep, [encode(p) for p in pixels[3:]], [0, 2], name="train-00001-of-00002")
    write(deep, [encode(p) for p in pixels[:3]], [1, 1, 0], name="train-00000-of-00002")
    write(deep, [encode(pixels[0])], [7], name="test-00000-of-00001")
    dataset = hugging_face(tmp_path)
    np.testing.assert_array_equal(dataset.images, pixels)
    np.testing.assert_array_equal(dataset.labels, [1, 1, 0, 0, 2])
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int32
    assert dataset.num_classes == 3
    assert dataset.name == f"{tmp_path.name}/train"
    assert hugging_face(str(tmp_path), split="test").labels.tolist() == [7]


def test_many_rows_keep_their_order(tmp_path: Path) -> None:
    """More rows than one decoding task takes."""
    pixels = random_images(1500, channels=1)
    write(tmp_path, [encode(p[..., 0]) for p in pixels], np.arange(1500) % 4)
    np.testing.assert_array_equal(hugging_face(tmp_path).images, pixels)


def test_columns_by_metadata(tmp_path: Path) -> None:
    """The metadata wins over the usual names, and unused classes count."""
    write(
        tmp_path,
        [encode(random_images(1)[0])],
        [1],
        columns=("photo", "kind"),
        features={"photo": {"_type": "Image"}, "kind": class_label("a", "b", "c")},
        extra={"label": [0.5], "image": ["name"]},
    )
    dataset = hugging_face(tmp_path)
    assert dataset.num_classes == 3
    assert dataset.labels.tolist() == [1]


def test_named_columns_and_plain_binary(tmp_path: Path) -> None:
    pixels = random_images(2, channels=1)
    table = pa.table({"x": pa.array([encode(p[..., 0]) for p in pixels]), "y": [3, 0]})
    parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    dataset = hugging_face(tmp_path, split="test", image_column="x", label_column="y")
    np.testing.assert_array_equal(dataset.images, pixels)
    assert dataset.num_classes == 4


def test_two_class_labels_are_ambiguous(tmp_path: Path) -> None:
    features = {"img": {"_type": "Image"}, "fine_label": class_label("a"), "coarse": class_label()}
    write(
        tmp_path,
        [encode(random_images(1)[0])],
        [0],
        columns=("img", "fine_label"),
        features=features,
        extra={"coarse": [0]},
    )
    message = r"label_column=None: several columns fit; name one of: img, fine_label, coarse"
    with pytest.raises(DataError, match=message):
        hugging_face(tmp_path)
    assert hugging_face(tmp_path, label_column="fine_label").num_classes == 1


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        (("img", "target"), {}, r"label_column=None: no such column; name one of: img, target"),
        (("pixels", "label"), {}, r"image_column=None: no such column; name one of: pixels, label"),
        (("img", "label"), {"label_column": "y"}, r"label_column='y': no such column"),
        (("img", "label"), {"image_column": "label"}, r"'label': int64 is not an encoded image"),
        (("label", "img"), {"label_column": "label"}, r"'label': struct.* is not an integer type"),
    ],
)
def test_wrong_columns(
    tmp_path: Path, columns: tuple[str, str], arguments: dict[str, str], message: str
) -> None:
    file = write(tmp_path, [encode(random_images(1)[0])], [0], columns=columns)
    with pytest.raises(DataError, match=message) as error:
        hugging_face(tmp_path, **arguments)
    assert str(file) in str(error.value)


good = encode(random_images(1)[0])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([good, b"no image", good], [0, 1, 0], r"row 1, column 'img': cannot decode"),
        ([good, good, good[: len(good) // 2]], [0, 1, 0], r"row 2, column 'img': cannot decode"),
        ([good, good, b""], [0, 1, 0], r"row 2, column 'img': cannot decode"),
        ([good, None], [0, 1], r"row 1, column 'img': null"),
        ([good, good], [0, None], r"row 1, column 'label': null"),
        ([good, good, good], [0, 1, -1], r"row 2, column 'label': label -1 is not in 0\.\.2147483"),
        ([good, good], [0.0, 1.0], r"column 'label': double is not an integer"),
        (
            [good, encode(random_images(1)[0][:3])],
            [0, 1],
            r"row 1, column 'img': image of shape \(3, 5, 3\), but row 0 is \(4, 5, 3\)",
        ),
        (
            [good, encode(random_images(1)[0], "L")],
            [0, 1],
            r"row 1, column 'img': image of shape \(4, 5, 1\), but row 0 is \(4, 5, 3\)",
        ),
        ([encode(random_images(1)[0], "RGBA")], [0], r"row 0, column 'img': image mode RGBA"),
    ],
)
def test_faults_name_file_row_and_column(
    tmp_path: Path, images: list[bytes | None], labels: list[Any], message: str
) -> None:
    file = write(tmp_path, images, labels)
    with pytest.raises(DataError, match=message) as error:
        hugging_face(tmp_path)
    assert str(file) in str(error.value)


def test_row_of_a_late_fault(tmp_path: Path) -> None:
    """Rows are counted within the file, through all decoding tasks."""
    images = [good] * 1500
    images[1234] = b""
    write(tmp_path, images, [0] * 1500)
    with pytest.raises(DataError, match="row 1234, column 'img'"):
        hugging_face(tmp_path)


def test_label_beyond_the_class_names(tmp_path: Path) -> None:
    write(tmp_path, [good, good], [0, 2], features={"label": class_label("a", "b")})
    with pytest.raises(DataError, match=r"row 1, column 'label': label 2 is not in 0\.\.1"):
        hugging_face(tmp_path)


@pytest.mark.parametrize("mode", ["1", "P"])
def test_lossless_modes(tmp_path: Path, mode: str) -> None:
    black_and_white = np.where(random_images(1)[0] > 127, 255, 0).astype(np.uint8)
    grey = black_and_white[..., 0]
    write(tmp_path, [encode(grey, mode)], [0])
    dataset = hugging_face(tmp_path)
    np.testing.assert_array_equal(dataset.images[0, ..., 0], grey)
    assert dataset.images.shape[-1] == {"1": 1, "P": 3}[mode]


def test_truncated_file(tmp_path: Path) -> None:
    file = write(tmp_path, [good] * 3, [0, 1, 2])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{file}: not a whole parquet file"):
        hugging_face(tmp_path)


def test_damaged_pages(tmp_path: Path) -> None:
    """The footer is whole, but not the data before it."""
    file = write(tmp_path, [good] * 300, np.arange(300) % 3)
    content = bytearray(file.read_bytes())
    content[4:300] = b"\xff" * 296
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file}"):
        hugging_face(tmp_path)


@pytest.mark.parametrize("metadata", ["{", "[]", '{"info": {"features": ["img"]}}'])
def test_malformed_metadata(tmp_path: Path, metadata: str) -> None:
    table = pa.table({"img": [good], "label": [0]})
    table = table.replace_schema_metadata({"huggingface": metadata})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="metadata is malformed"):
        hugging_face(tmp_path)


@pytest.mark.parametrize("names", [5, "ab", {"0": "a"}, [0, 1], [None]])
def test_class_names_must_be_a_list_of_names(tmp_path: Path, names: Any) -> None:
    write(tmp_path, [good], [0], features={"label": {"_type": "ClassLabel", "names": names}})
    with pytest.raises(DataError, match="metadata must list the names of 'label'"):
        hugging_face(tmp_path)


def test_deep_metadata(tmp_path: Path) -> None:
    table = pa.table({"img": [good], "label": [0]})
    table = table.replace_schema_metadata({"huggingface": "[" * 100_000})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="metadata is malformed"):
        hugging_face(tmp_path)


def test_dictionary_encoded_columns(tmp_path: Path) -> None:
    """Few distinct values, stored once: the same images and labels as without it."""
    pixels = random_images(2)
    images = pa.array([encode(p) for p in pixels] * 2).dictionary_encode()
    table = pa.table({"img": images, "label": pa.array([7, 3, 7, 3]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    dataset = hugging_face(tmp_path)
    np.testing.assert_array_equal(dataset.images, pixels[[0, 1, 0, 1]])
    assert dataset.labels.tolist() == [7, 3, 7, 3]


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([good])] * 2 + [pa.array([0])], ["img", "img", "label"])
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="image_column=None: several columns fit"):
        hugging_face(tmp_path)


@pytest.mark.parametrize("kind", [pa.uint64(), pa.int8()])
def test_labels_of_other_widths(tmp_path: Path, kind: Any) -> None:
    write(tmp_path, [good, good], pa.array([5, 0], kind))
    assert hugging_face(tmp_path).labels.tolist() == [5, 0]


def test_label_above_int32(tmp_path: Path) -> None:
    write(tmp_path, [good], pa.array([2**63], pa.uint64()))
    with pytest.raises(DataError, match=r"row 0, column 'label': label 9223372036854775808 is not"):
        hugging_face(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"PAR1", b"PAR1PAR1"])
def test_files_that_are_no_parquet(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "train-00000-of-00001.parquet"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file}: not a whole parquet file"):
        hugging_face(tmp_path)


def test_more_images_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file of many large even images."""

    def empty(shape: tuple[int, ...], *_: Any) -> np.ndarray:
        raise MemoryError

    file = write(tmp_path, [good, good], [0, 1])
    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(DataError, match=rf"{file}, .*no memory for 2 images of shape \(4, 5, 3\)"):
        hugging_face(tmp_path)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, [encode(random_images(1)[0][:1]), good], [0, 1])
    for limit in (19, 9):  # Pillow warns above the limit and raises above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=rf"{file}, row 1, column 'img': .* pixels") as error:
            hugging_face(tmp_path)
        assert "\n" not in str(error.value)


def test_several_frames_and_orientation(tmp_path: Path) -> None:
    """What decode_image does is done to every row."""
    pixels = random_images(2)
    image, other = map(Image.fromarray, pixels)
    exif = Image.Exif()
    exif[0x0112] = 3
    upside_down, animated = io.BytesIO(), io.BytesIO()
    image.save(upside_down, "PNG", exif=exif)
    image.save(animated, "PNG", save_all=True, append_images=[other])
    file = write(tmp_path, [upside_down.getvalue(), encode(pixels[1])], [0, 1])
    np.testing.assert_array_equal(hugging_face(tmp_path).images[0], pixels[0, ::-1, ::-1])
    write(tmp_path, [good, animated.getvalue()], [0, 1])
    with pytest.raises(DataError, match=f"{file}, row 1, column 'img': image of several frames"):
        hugging_face(tmp_path)


def test_missing_split_lists_those_found(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write(tmp_path, [good], [0], name=f"{name}-00000-of-00001")
    with pytest.raises(DataError, match=r"no split 'test'; splits found: train, validation"):
        hugging_face(tmp_path, split="test")


def test_missing_shard(tmp_path: Path) -> None:
    for index in (0, 2):
        write(tmp_path, [good], [0], name=f"train-{index:05}-of-00003")
    with pytest.raises(DataError, match=r"files 0 to 2, each once; found \[0, 2\]"):
        hugging_face(tmp_path)


def test_split_in_two_folders(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder, [good], [0])
    with pytest.raises(DataError, match=f"several folders.*{tmp_path / 'one'}"):
        hugging_face(tmp_path)
    assert len(hugging_face(tmp_path / "two").labels) == 1


def test_shards_must_agree(tmp_path: Path) -> None:
    write(tmp_path, [good], [0], name="train-00000-of-00002")
    second = write(tmp_path, [encode(random_images(1)[0][:3])], [0], name="train-00001-of-00002")
    with pytest.raises(DataError, match=f"{second}, row 0, column 'img'.* but those in"):
        hugging_face(tmp_path)
    write(tmp_path, [good], [0], name="train-00001-of-00002", columns=("image", "label"))
    with pytest.raises(DataError, match=f"{second}: columns .*'image'.* differ"):
        hugging_face(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    write(tmp_path, [], pa.array([], pa.int64()))
    with pytest.raises(DataError, match="no rows"):
        hugging_face(tmp_path)


def test_neither_folder_nor_hub_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="path must be a folder or a hub id owner/name"):
        hugging_face(tmp_path / "missing")


@pytest.mark.parametrize(
    "path", [3, None, 1.5, ["a"], "", "a\0b", "~no-such-user-here/x", "x" * 5000, "a/b/c", "\ud800"]
)
def test_paths_that_cannot_be(path: Any) -> None:
    with pytest.raises(DataError, match=r"path must be a folder or a hub id owner/name") as error:
        hugging_face(path)
    assert "\n" not in str(error.value)


def test_path_of_a_file(tmp_path: Path) -> None:
    file = write(tmp_path, [good], [0])
    with pytest.raises(DataError, match=f"path must be a folder, but '{file}' is a file"):
        hugging_face(file)


def test_hub_id_is_downloaded_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    write(tmp_path, [good], [4])
    asked = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    dataset = hugging_face("some-owner/some.name")
    assert asked == [
        ("some-owner/some.name", {"repo_type": "dataset", "allow_patterns": "*.parquet"})
    ]
    assert dataset.labels.tolist() == [4]
    assert dataset.name == "some.name/train"


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"no folder 'no-owner/no-data' here.*offline\?"):
        hugging_face("no-owner/no-data")


@pytest.mark.parametrize("package", ["pyarrow", "PIL"])
def test_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    write(tmp_path, [good], [0])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "trustjax\[experiments\]"'):
        hugging_face(tmp_path)


@needs_data
def test_mnist() -> None:
    dataset = hugging_face(Path(os.environ["TRUSTJAX_DATA"]) / "mnist", split="test")
    assert dataset.images.shape == (10_000, 28, 28, 1)
    assert dataset.num_classes == 10
    # Published counts of the ten digits in MNIST's test set.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(dataset.labels).tolist() == counts


@needs_data
def test_cifar10() -> None:
    dataset = hugging_face(Path(os.environ["TRUSTJAX_DATA"]) / "cifar10", split="test")
    assert dataset.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(dataset.labels).tolist() == [1000] * 10
    # Published channel means of CIFAR-10.
    means = dataset.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=0.01)


def labelled(labels: list[int]) -> ImageDataset:
    array = np.asarray(labels, np.int32)
    return ImageDataset(np.zeros((len(array), 1, 1, 1), np.uint8), array, max(labels) + 1, "test")


@settings(deadline=None, max_examples=50)
@given(
    labels=st.lists(st.integers(0, 4), min_size=20, max_size=80),
    first=st.floats(0.1, 0.6),
    seed=st.integers(0, 2**32),
)
def test_split_is_stratified_disjoint_and_complete(
    labels: list[int], first: float, seed: int
) -> None:
    dataset = labelled(labels)
    fractions = {"a": first, "b": 1 - first}
    parts = split(dataset, fractions, seed=seed)
    assert sorted([*parts["a"], *parts["b"]]) == list(range(len(labels)))
    for name, fraction in fractions.items():
        rows = parts[name]
        assert len(rows) == pytest.approx(fraction * len(labels), abs=0.5 + 1e-6)
        assert np.all(np.diff(rows) > 0)
        for label in set(labels):
            of_class = np.sum(dataset.labels[rows] == label)
            assert abs(of_class - fraction * labels.count(label)) < 3
    again = split(dataset, fractions, seed=seed)
    assert all(np.array_equal(parts[name], again[name]) for name in fractions)


def test_split_of_balanced_classes_is_exact() -> None:
    parts = split(labelled([0, 1] * 50), {"train": 0.7, "test": 0.2}, seed=0)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 70, "test": 20}
    assert np.sum(parts["train"] % 2) == 35
    other = split(labelled([0, 1] * 50), {"train": 0.7, "test": 0.2}, seed=1)
    assert not np.array_equal(parts["train"], other["train"])


def test_split_with_many_tiny_classes() -> None:
    """A hundred classes of one example do not change the share of the large one."""
    parts = split(labelled([0] * 100 + list(range(1, 101))), {"a": 0.3}, seed=0)
    assert len(parts["a"]) == 60
    assert abs(np.sum(parts["a"] < 100) - 30) < 8


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({}, "above 0"),
        ({"a": 0.5, "b": 0.0}, "above 0"),
        ({"a": float("nan")}, "above 0"),
        ({"a": 0.7, "b": 0.4}, "at most 1"),
        ({"a": 0.9, "b": 0.01}, r"fractions\['b'\] = 0.01 of 10 rows leaves no row"),
    ],
)
def test_wrong_fractions(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(labelled([0, 1] * 5), fractions, seed=0)
