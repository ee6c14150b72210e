"""Each of the paper's nine data sets through its pipeline, on real rows.

Fashion-MNIST, CIFAR-100 and traffic are not at hand: real rows of their neighbours MNIST, CIFAR-10 and electricity stand for
them, in the columns and files of the Hub's copies.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, load_dataset
from transformers import default_data_collator

from hf_teleport.lab.data import load

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason=f"needs the data sets in {SHARED}")


def head(name, count, folder):
    """The first rows of each split of a set, as files like the originals."""
    for path in (SHARED / name).glob("*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, count), folder / path.name)
    return folder


def batch(rows, count=3):
    return default_data_collator([rows[i] for i in range(count)])


def check_images(data, shape, classes):
    first = batch(data.train)
    assert first["pixel_values"].shape == (3, *shape)
    assert first["pixel_values"].dtype == torch.float32
    assert first["labels"].dtype == torch.int64
    assert data.train.num_labels == classes
    assert (data.kind, data.measure, data.tokenizer) == ("image", "accuracy", None)
    # The scale is the training set's, for the test set too.
    assert data.train.images.mean((0, 2, 3)).abs().max() < 1e-4
    assert (data.train.images.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.isfinite(data.test.images).all()
    assert 0.5 < float(data.test.images.std()) < 1.5


def test_mnist(tmp_path):
    data = load("mnist", head("mnist", 300, tmp_path))
    check_images(data, (1, 28, 28), 10)
    assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_fashion_mnist(tmp_path):
    # MNIST's rows: the columns are those of the Hub's Fashion-MNIST, image and label.
    check_images(load("fashion_mnist", head("mnist", 300, tmp_path)), (1, 28, 28), 10)


def test_cifar10(tmp_path):
    data = load("cifar10", head("cifar10", 300, tmp_path))
    check_images(data, (3, 32, 32), 10)
    assert data.train.labels[:5].tolist() == [6, 9, 9, 4, 1]


def test_cifar100_has_fine_labels(tmp_path):
    # CIFAR-10's rows with CIFAR-100's columns; the coarse label goes first, so that the order of columns does not choose.
    for split, rows in load_dataset(str(head("cifar10", 300, tmp_path))).items():
        coarse = rows.map(lambda row: {"coarse_label": row["label"] // 5}, remove_columns=["img", "label"])
        coarse = coarse.cast_column("coarse_label", ClassLabel(names=["a", "b"]))
        for column in ("img", "label"):
            coarse = coarse.add_column(column, rows.data[column], feature=rows.features[column])
        coarse.rename_column("label", "fine_label").to_parquet(tmp_path / f"{split}.parquet")
    data = load("cifar100", tmp_path)
    check_images(data, (3, 32, 32), 10)
    assert data.train.labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert load("cifar100", tmp_path, label_column="coarse_label").train.labels[:5].tolist() == [1, 1, 1, 0, 0]


def test_tiny_imagenet_has_a_valid_split_and_grey_images():
    data = load("tiny_imagenet", SHARED / "tiny_imagenet")
    check_images(data, (3, 64, 64), 20)
    assert (len(data.train), len(data.test)) == (2000, 400)
    modes = [image.mode for image in load_dataset(str(SHARED / "tiny_imagenet"), split="validation")["image"]]
    # A grey picture is the same in all channels, which are then scaled each by its own mean and deviation.
    correlation = torch.corrcoef(data.test.images[modes.index("L")].flatten(1))
    torch.testing.assert_close(correlation, torch.ones(3, 3))
    assert torch.corrcoef(data.test.images[modes.index("RGB")].flatten(1)).min() < 0.999


def test_sequential_mnist(tmp_path):
    head("mnist", 300, tmp_path)
    data, images = load("smnist", tmp_path), load("mnist", tmp_path)
    first = batch(data.train)
    assert (first["inputs"].shape, first["labels"].tolist()) == ((3, 784, 1), [5, 0, 4])
    assert (data.kind, data.measure) == ("sequence", "accuracy")
    # Line by line.
    assert torch.equal(first["inputs"][1, 28:56, 0], images.train.images[1, 0, 1])
    short = load("smnist", tmp_path, length=196)
    torch.testing.assert_close(batch(short.test)["inputs"][2, 15, 0], images.test.images[2, 0, 2:4, 2:4].mean())
    assert len(short.test) == len(images.test) == 300


def check_windows(data, table):
    """A week in, the same week a day later out; 60, 20 and 20 % of the time."""
    window = data.train[5]
    assert window["inputs"].shape == window["labels"].shape == (168, table.shape[1])
    assert torch.equal(window["inputs"][24:], window["labels"][:-24])
    first = round(len(table) * 0.6)
    scaled = (table - table[:first].mean(0)) / table[:first].std(0, ddof=1)
    np.testing.assert_allclose(window["inputs"], scaled[5:173], atol=1e-4)
    np.testing.assert_allclose(window["labels"], scaled[29:197], atol=1e-4)
    np.testing.assert_allclose(data.test[0]["inputs"], scaled[len(table) - len(data.test.values) :][:168], atol=1e-3)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [600 - 191, 200 - 191, 200 - 191]
    assert (data.kind, data.measure) == ("series", "mean_squared_error")


def test_electricity():
    table = pq.read_table(SHARED / "electricity" / "data.parquet").to_pandas().to_numpy("float64")
    # A client without any use in the training part has no scale.
    used = [f"c{i:03d}" for i in range(20)]
    check_windows(load("electricity", SHARED / "electricity", columns=used), table[:, :20])
    whole = load("electricity", SHARED / "electricity")
    assert batch(whole.test)["labels"].shape == (3, 168, 203)
    assert torch.isfinite(whole.test.values).all()


def test_traffic(tmp_path):
    # Electricity's rows in a file like the Hub's traffic.csv: a text column date, numbered sensors, and the last one OT.
    frame = pq.read_table(SHARED / "electricity" / "data.parquet").to_pandas().iloc[:, :12]
    frame.columns = [*map(str, range(11)), "OT"]
    table = frame.to_numpy("float64")
    frame.insert(0, "date", [f"2016-07-{1 + hour // 24:02d} {hour % 24:02d}:00:00" for hour in range(len(frame))])
    frame.to_csv(tmp_path / "traffic.csv", index=False)
    check_windows(load("traffic", tmp_path), table)


def test_windows_can_be_other_ones():
    data = load("electricity", SHARED / "electricity", context=48, horizon=12, shift=None, shares=(0.7, 0.1))
    assert (data.train[0]["inputs"].shape, data.train[0]["labels"].shape) == ((48, 203), (12, 203))
    assert torch.equal(data.train[0]["labels"], data.train[12]["inputs"][36:])
    assert len(data.validation.values) == 100


def test_penn_treebank(tmp_path):
    data = load("ptb", head("ptb", 2000, tmp_path))
    first = batch(data.train)
    assert first["input_ids"].shape == (3, 256)
    assert torch.equal(first["input_ids"], first["labels"])
    words = data.tokenizer.convert_ids_to_tokens(first["input_ids"].flatten().tolist())
    text = pq.read_table(SHARED / "ptb" / "train.parquet").to_pandas()["sentence"]
    assert words[:24] == text[0].split()
    assert words[24:41] == ["<eos>", *text[1].split(), "<eos>"]
    assert text[1].startswith("pierre <unk> N years old")
    assert not {"<", ">", "unk"} & set(data.tokenizer.get_vocab())
    # Every word of the training text has a number: unknown are those that are so in the file, but for the last unfilled block.
    unknown = int((data.train.columns["input_ids"] == data.tokenizer.unk_token_id).sum())
    in_file = text[:2000].str.count("<unk>")
    assert in_file.sum() - in_file[-256:].sum() < unknown <= in_file.sum()
    assert (data.kind, data.measure) == ("text", "perplexity")
    assert len(data.validation) > 0
    assert len(load("ptb", tmp_path, vocabulary_size=500, length=64).tokenizer) == 500


def test_sst2_is_classified(tmp_path):
    data = load("sst2", head("sst2", 200, tmp_path), length=32)
    first = batch(data.train)
    assert (first["input_ids"].shape, first["attention_mask"].shape, first["labels"].shape) == ((3, 32), (3, 32), (3,))
    assert (data.measure, data.validation, len(data.test)) == ("accuracy", None, 200)


def test_the_other_series():
    for name, channels in (("etth1", 7), ("exchange_rate", 8)):
        assert batch(load(name, SHARED / name).test)["inputs"].shape == (3, 168, channels)


def test_any_other_set_by_its_columns(tmp_path):
    images, text, series = (tmp_path / kind for kind in ("images", "text", "series"))
    for folder in (images, text, series):
        folder.mkdir()
    for split, rows in load_dataset(str(head("mnist", 50, images))).items():
        rows.rename_columns({"image": "picture", "label": "digit"}).to_parquet(images / f"{split}.parquet")
    for split, rows in load_dataset(str(head("sst2", 50, text))).items():
        rows.rename_column("sentence", "review").to_parquet(text / f"{split}.parquet")
    head("exchange_rate", 200, series)
    assert load(str(images), kind="image", image_column="picture", label_column="digit").train.labels[:3].tolist() == [5, 0, 4]
    assert load(str(images), kind="sequence", length=16).train[0]["inputs"].shape == (16, 1)
    assert load(str(text), kind="text", text_column="review", label_column="label", length=8).measure == "accuracy"
    assert load(str(text), kind="text", text_column="review", length=8).measure == "perplexity"
    table = load(str(series), kind="series", columns=["c001", "c004"], context=8, shift=2)
    assert table.train[0]["labels"].shape == (8, 2)


def test_a_row_for_each_client_is_the_same_table(tmp_path):
    # As in GluonTS, with splits that each begin at the beginning and end later.
    frame = pq.read_table(SHARED / "electricity" / "data.parquet").to_pandas()
    for split, end in (("train", 900), ("test", 1000)):
        rows = [{"item_id": name, "start": "2012-01-01", "target": frame[name].tolist()[:end]} for name in frame]
        Dataset.from_list(rows).to_parquet(tmp_path / f"{split}.parquet")
    by_rows = load("electricity", tmp_path, series_column="target", split="test")
    by_columns = load("electricity", SHARED / "electricity")
    assert torch.equal(by_rows.train.values, by_columns.train.values)
    assert torch.equal(by_rows.test.values, by_columns.test.values)
