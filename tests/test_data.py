from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture

from hf_teleport.data import load_images

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def test_digits_are_real_and_scaled():
    train, test = load_images("digits")
    assert (len(train), len(test), train.num_labels) == (1437, 360, 10)
    assert train.images.shape[1:] == (1, 8, 8)
    assert abs(float(train.images.mean())) < 1e-4
    assert abs(float(train.images.std()) - 1) < 1e-3
    item = train[3]
    assert set(item) == {"pixel_values", "labels"}


def write(folder, pictures, split, name="label"):
    features = Features({"picture": Image(), name: ClassLabel(names=["a", "b"])})
    rows = {"picture": pictures, name: [i % 2 for i in range(len(pictures))]}
    Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def test_local_folder_finds_its_columns_and_resizes(tmp_path):
    write(tmp_path, [Picture.new("RGB", (6, 6), (i, 0, 9)) for i in range(4)], "train")
    write(tmp_path, [Picture.new("RGB", (6, 6), (i, 3, 9)) for i in range(2)], "test")
    train, test = load_images(str(tmp_path), image_size=4)
    assert train.images.shape == (4, 3, 4, 4)
    assert test.labels.tolist() == [0, 1]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder.*Hub id"):
        load_images("./nowhere/at/all")
    write(tmp_path, [Picture.new("L", (4, 4))], "train")
    with pytest.raises(ValueError, match=r"splits \['train'\]"):
        load_images(str(tmp_path))
    Dataset.from_dict({"n": [1]}, features=Features({"n": Value("int64")})).to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict({"n": [1]}, features=Features({"n": Value("int64")})).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="an image and a class label column are needed"):
        load_images(str(tmp_path))


@pytest.mark.skipif(not (SHARED / "mnist").exists(), reason=f"needs the MNIST files in {SHARED}")
def test_mnist_from_local_parquet():
    train, test = load_images(str(SHARED / "mnist"))
    assert train.images.shape == (60000, 1, 28, 28)
    assert len(test) == 10000
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert torch.isfinite(train.images).all()
