from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture

from hf_teleport.data import (
    TensorRows,
    Texts,
    language_model_rows,
    load_images,
    load_series,
    load_texts,
    sentence_rows,
    word_tokenizer,
)

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


def table(folder, split, **columns):
    Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")


TRAINING = ["the cat sat", "the <unk> sat on the mat", "a cat"]


def test_texts_from_local_parquet(tmp_path):
    table(tmp_path, "train", text=TRAINING, kind=[0, 2, 1], sentence=["x", "y", "z"])
    table(tmp_path, "valid", text=["the dog"], kind=[1], sentence=["w"])
    train, test = load_texts(str(tmp_path), "text", "kind")
    assert (train.sentences, train.labels.tolist(), train.num_labels) == (TRAINING, [0, 2, 1], 3)
    assert test.sentences == ["the dog"]
    without = load_texts(str(tmp_path))[0]
    assert (without.sentences, without.labels, without.num_labels) == (["x", "y", "z"], None, 0)


def test_the_test_split_goes_before_validation(tmp_path):
    for split in ("train", "validation", "test"):
        table(tmp_path, split, sentence=[split])
    assert [texts.sentences for texts in load_texts(str(tmp_path))] == [["train"], ["test"]]


def test_texts_say_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="Hub id"):
        load_texts("./nowhere/at/all")
    table(tmp_path, "train", sentence=["a"], label=[0])
    with pytest.raises(ValueError, match=r"splits \['train'\]"):
        load_texts(str(tmp_path))
    table(tmp_path, "test", sentence=["a"], label=[-1])
    with pytest.raises(ValueError, match=r"column 'text' is not in the data; allowed: one of \['sentence', 'label'\]"):
        load_texts(str(tmp_path), "text")
    with pytest.raises(ValueError, match="labels such as -1; allowed: whole numbers from 0"):
        load_texts(str(tmp_path), label_column="label")


def test_words_have_a_number_each_and_special_words_only_one():
    tokenizer = word_tokenizer(TRAINING, 100)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    words = {"the", "cat", "sat", "on", "mat", "a"}
    assert set(tokenizer.get_vocab()) == words | {"<pad>", "<unk>", "<eos>"}
    ids = tokenizer("the dog sat on <unk>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "<unk>", "sat", "on", "<unk>"]


def test_the_rarest_words_give_way_to_the_vocabulary_size():
    tokenizer = word_tokenizer(TRAINING, 5)
    assert len(tokenizer) == 5
    assert "the" in tokenizer.get_vocab()
    with pytest.raises(ValueError, match="vocabulary_size = 5 is not allowed; allowed: more than the 5 special tokens"):
        word_tokenizer(TRAINING, 5, masked=True)


def test_language_model_blocks_are_the_text_in_a_row():
    tokenizer = word_tokenizer(TRAINING, 100)
    rows = language_model_rows(TRAINING, tokenizer, 5)
    # 3 + 6 + 2 words and three ends are 14 tokens: two blocks, four tokens are left out.
    assert len(rows) == 2
    assert rows.columns["input_ids"].shape == (2, 5)
    words = tokenizer.convert_ids_to_tokens(rows.columns["input_ids"].flatten().tolist())
    assert words == ["the", "cat", "sat", "<eos>", "the", "<unk>", "sat", "on", "the", "mat"]
    assert torch.equal(rows[1]["input_ids"], rows[1]["labels"])
    with pytest.raises(ValueError, match="length = 15 is not allowed; allowed: at most the 14 tokens"):
        language_model_rows(TRAINING, tokenizer, 15)


def test_sentences_are_padded_and_cut():
    tokenizer = word_tokenizer(TRAINING, 100, masked=True)
    rows = sentence_rows(Texts(TRAINING, torch.tensor([0, 1, 0])), tokenizer, 4)
    words = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in rows.columns["input_ids"]]
    assert words == [["<cls>", "the", "cat", "sat"], ["<cls>", "the", "<unk>", "sat"], ["<cls>", "a", "cat", "<pad>"]]
    assert rows.columns["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert {name: value.dtype for name, value in rows[1].items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    assert set(sentence_rows(Texts(TRAINING), tokenizer, 4)[0]) == {"input_ids", "attention_mask"}


def test_a_tokenizer_comes_back_from_its_folder(tmp_path):
    tokenizer = word_tokenizer(TRAINING, 100, masked=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded("a dog sat")["input_ids"] == tokenizer("a dog sat")["input_ids"]
    assert (loaded.pad_token_id, loaded.mask_token_id) == (tokenizer.pad_token_id, tokenizer.mask_token_id)


def test_columns_of_rows_have_one_length():
    rows = TensorRows(a=torch.arange(3), b=torch.zeros(3, 2))
    assert len(rows) == 3
    assert rows[2]["a"] == 2
    with pytest.raises(ValueError, match=r"columns = \{'a': 3, 'b': 2\} is not allowed"):
        TensorRows(a=torch.arange(3), b=torch.zeros(2))
    with pytest.raises(ValueError, match=r"columns = \{\}"):
        TensorRows()


def test_windows_are_split_by_time_and_scaled_by_the_training_part(tmp_path):
    time = torch.arange(100.0)
    table(tmp_path, "data", date=[str(i) for i in range(100)], up=time.tolist(), flat=[7.0] * 70 + [9.0] * 30)
    train, validation, test = load_series(str(tmp_path), context=4, horizon=2)
    assert [len(part.values) for part in (train, validation, test)] == [70, 10, 20]
    assert [len(part) for part in (train, validation, test)] == [65, 5, 15]
    # The scale is that of the first 70 rows, whatever comes later.
    first = time[:70]
    up = torch.cat([part.values[:, 0] for part in (train, validation, test)])
    torch.testing.assert_close(up, (time - first.mean()) / first.std())
    assert train.values[:, 1].tolist() == [0.0] * 70
    assert test.values[:, 1].tolist() == [2.0] * 20
    last = test[len(test) - 1]
    assert (last["inputs"].shape, last["labels"].shape) == ((4, 2), (2, 2))
    assert torch.equal(torch.cat([last["inputs"], last["labels"]]), test.values[-6:])
    with pytest.raises(IndexError):
        test[len(test)]


def test_what_later_times_hold_does_not_reach_the_training_part(tmp_path):
    parts = []
    for end in (0.0, 1e6):
        folder = tmp_path / str(end)
        folder.mkdir()
        table(folder, "train", x=[float(i) for i in range(70)] + [end] * 30)
        parts.append(load_series(str(folder), 3, 1)[0].values)
    assert torch.equal(*parts)


def test_series_say_what_does_not_fit(tmp_path):
    table(tmp_path, "data", date=["a"] * 20, x=[float(i) for i in range(20)])
    with pytest.raises(ValueError, match=r"context \+ horizon = 2 \+ 1 is not allowed; allowed: at most 2"):
        load_series(str(tmp_path), 2, 1)
    with pytest.raises(ValueError, match=r"columns = \['date'\] are not allowed; allowed: the numeric columns \['x'\]"):
        load_series(str(tmp_path), 1, 1, ["date"])
    table(tmp_path, "data", date=["a"] * 20)
    with pytest.raises(ValueError, match="has no numeric column"):
        load_series(str(tmp_path), 1, 1)
    table(tmp_path, "data", x=[float("nan")] * 20)
    with pytest.raises(ValueError, match="missing or infinite values"):
        load_series(str(tmp_path), 1, 1)
    table(tmp_path, "test", x=[1.0] * 20)
    (tmp_path / "data.parquet").rename(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"splits \['train', 'test'\]; allowed: one unsplit table"):
        load_series(str(tmp_path), 1, 1)


@pytest.mark.skipif(not (SHARED / "ptb").exists(), reason=f"needs the Penn Treebank files in {SHARED}")
def test_penn_treebank_from_local_parquet():
    train, test = load_texts(str(SHARED / "ptb"))
    assert (len(train.sentences), len(test.sentences)) == (42068, 3761)
    tokenizer = word_tokenizer(train.sentences, 20000)
    # 9,999 kinds of words with <unk>, and the end mark and the padding.
    assert len(tokenizer) == 10001
    assert len(language_model_rows(test.sentences, tokenizer, 128)) == 82430 // 128


@pytest.mark.skipif(not (SHARED / "etth1").exists(), reason=f"needs the ETTh1 file in {SHARED}")
def test_etth1_from_local_parquet():
    train, validation, test = load_series(str(SHARED / "etth1"), 96, 24)
    assert [len(part.values) for part in (train, validation, test)] == [12194, 1742, 3484]
    assert train[0]["inputs"].shape == (96, 7)
