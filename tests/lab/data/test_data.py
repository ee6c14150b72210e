from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture

from hf_teleport.lab.data import (
    SeriesWindows,
    TensorRows,
    Texts,
    language_model_rows,
    load_images,
    load_sequences,
    load_series,
    load_texts,
    sentence_rows,
    treebank_words,
    word_tokenizer,
)
from hf_teleport.lab.data import images as images_module

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def test_digits_are_real_and_scaled():
    train, test = load_images("digits")
    assert (len(train), len(test), train.num_labels) == (1437, 360, 10)
    assert train.images.shape[1:] == (1, 8, 8)
    assert abs(float(train.images.mean())) < 1e-4
    assert abs(float(train.images.std()) - 1) < 1e-3
    item = train[3]
    assert set(item) == {"pixel_values", "labels"}


def write(folder, pictures, split, name="label", kind=None):
    features = Features({"picture": Image(), name: kind or ClassLabel(names=["a", "b"])})
    rows = {"picture": pictures, name: [i % 2 for i in range(len(pictures))]}
    Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def noise(mode, size, seed):
    shape = (size, size) if mode == "L" else (size, size, 3)
    return Picture.fromarray(np.random.default_rng(seed).integers(256, size=shape, dtype="uint8"))


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


def test_pixels_are_those_of_the_pictures(tmp_path):
    pictures = [noise("RGB", 5, seed) for seed in range(6)]
    write(tmp_path, pictures, "train")
    write(tmp_path, pictures[:2], "test")
    train, test = load_images(str(tmp_path))
    pixels = torch.tensor(np.stack(pictures).astype("float64") / 255).permute(0, 3, 1, 2)
    scaled = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(train.images.double(), scaled, atol=1e-6, rtol=0)
    assert torch.equal(test.images, train.images[:2])


def test_grey_pictures_in_a_colour_set_become_colour_wherever_they_are(tmp_path, monkeypatch):
    # Two at a time: some lots, and the whole test set, are grey.
    monkeypatch.setattr(images_module, "_DECODED_AT_ONCE", 2)
    grey, colour = [noise("L", 4, seed) for seed in range(3)], [noise("RGB", 4, seed) for seed in range(3)]
    write(tmp_path, [*grey[:2], *colour, grey[2]], "train")
    write(tmp_path, grey, "test")
    train, test = load_images(str(tmp_path))
    assert (train.images.shape, test.images.shape) == ((6, 3, 4, 4), (3, 3, 4, 4))
    assert torch.equal(train.images[[0, 1, 5]], test.images)


def test_a_constant_channel_is_zero(tmp_path):
    for split in ("train", "test"):
        write(tmp_path, [Picture.new("RGB", (4, 4), (9, i, 2 * i)) for i in range(3)], split)
    images = load_images(str(tmp_path))[0].images
    assert torch.equal(images[:, 0], torch.zeros(3, 4, 4))
    assert abs(float(images[:, 1].std()) - 1) < 1e-6


def test_images_say_what_does_not_fit(tmp_path):
    write(tmp_path, [noise("L", 4, 0), noise("L", 5, 0)], "train")
    write(tmp_path, [noise("L", 4, 0)], "test")
    with pytest.raises(ValueError, match=r"column 'picture' has images of sizes \[\(4, 4\), \(5, 5\)\]: give image_size"):
        load_images(str(tmp_path))
    with pytest.raises(ValueError, match=r"column 'image' is not in the data; allowed: one of \['picture', 'label'\]"):
        load_images(str(tmp_path), 4, image_column="image")
    with pytest.raises(ValueError, match="column 'kind' is not in the data"):
        load_images(str(tmp_path), 4, label_column="kind")
    for kind in (Value("float32"), Value("string")):
        write(tmp_path, [noise("L", 4, 0)], "train", kind=kind)
        with pytest.raises(ValueError, match=r"column 'label' has labels such as 0.*; allowed: whole numbers from 0"):
            load_images(str(tmp_path), 4, label_column="label")


def test_encoded_bytes_and_plain_numbers_are_an_image_set_if_named(tmp_path):
    write(tmp_path, [noise("RGB", 4, seed) for seed in range(4)], "train")
    write(tmp_path, [noise("RGB", 4, 9)], "test")
    expected = load_images(str(tmp_path))
    for split in ("train", "test"):
        # Without the metadata in which `datasets` notes what a column is.
        table = pq.read_table(tmp_path / f"{split}.parquet")
        pq.write_table(table.replace_schema_metadata(None), tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="an image and a class label column are needed"):
        load_images(str(tmp_path))
    named = load_images(str(tmp_path), image_column="picture", label_column="label")
    for one, other in zip(named, expected, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_sequences_are_pixels_line_by_line():
    train, test = load_sequences("digits")
    images = load_images("digits")[0]
    assert train.columns["inputs"].shape == (1437, 64, 1)
    assert torch.equal(train[7]["inputs"].flatten(), images.images[7].flatten())
    assert torch.equal(train.columns["labels"], images.labels)
    assert len(test) == 360


def test_short_sequences_are_means_of_squares():
    images = load_images("digits")[0].images
    squares = load_sequences("digits", 16)[0].columns["inputs"]
    expected = images[:, 0].view(-1, 4, 2, 4, 2).mean((2, 4)).view(-1, 16, 1)
    torch.testing.assert_close(squares, expected)
    assert load_sequences("digits", 1)[0].columns["inputs"].shape == (1437, 1, 1)
    with pytest.raises(ValueError, match=r"length = 32 is not allowed; allowed for images of 8 x 8: one of \[64, 16, 4, 1\]"):
        load_sequences("digits", 32)


def test_sequences_have_a_number_for_each_channel(tmp_path):
    for split in ("train", "test"):
        write(tmp_path, [noise("RGB", 4, seed) for seed in range(3)], split)
    rows, images = load_sequences(str(tmp_path))[0], load_images(str(tmp_path))[0]
    assert torch.equal(rows[2]["inputs"][6], images.images[2, :, 1, 2])


@pytest.mark.skipif(not (SHARED / "mnist").exists(), reason=f"needs the MNIST files in {SHARED}")
def test_mnist_from_local_parquet(tmp_path):
    for split in ("train", "test"):
        rows = pq.read_table(SHARED / "mnist" / f"{split}.parquet")
        assert len(rows) == {"train": 60000, "test": 10000}[split]
        pq.write_table(rows.slice(0, 2500), tmp_path / f"{split}.parquet")
    train, test = load_images(str(tmp_path))
    assert train.images.shape == (2500, 1, 28, 28)
    assert len(test) == 2500
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert torch.isfinite(train.images).all()


def table(folder, split, **columns):
    Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")


TRAINING = ["the cat sat", "the <unk> sat on the mat", "a cat"]


def test_texts_from_local_parquet(tmp_path):
    table(tmp_path, "train", text=TRAINING, kind=[0, 2, 1], sentence=["x", "y", "z"])
    table(tmp_path, "valid", text=["the dog"], kind=[1], sentence=["w"])
    train, test = load_texts(str(tmp_path), "text", "kind").values()
    assert (train.sentences, train.labels.tolist()) == (TRAINING, [0, 2, 1])
    assert test.sentences == ["the dog"]
    without = load_texts(str(tmp_path))["train"]
    assert (without.sentences, without.labels) == (["x", "y", "z"], None)


def test_the_test_split_goes_before_validation(tmp_path):
    for split in ("train", "validation", "test"):
        table(tmp_path, split, sentence=[split])
    assert {role: texts.sentences for role, texts in load_texts(str(tmp_path)).items()} == {
        role: [role] for role in ("train", "test", "validation")
    }


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


def test_without_a_limit_every_word_has_a_number():
    assert set(word_tokenizer(TRAINING, None).get_vocab()) == set(word_tokenizer(TRAINING, 100).get_vocab())


def test_treebank_words_leave_unknown_words_whole():
    sentences = ["the <unk> ca n't sell <unk>", "s&p fell $N to N <unk>", "they don't, says mr. <unk> of <unk>'s u.s.", "<unk>"]
    assert [words.split() for words in treebank_words(sentences)] == [
        ["the", "<unk>", "ca", "n't", "sell", "<unk>"],
        ["s", "&", "p", "fell", "$", "N", "to", "N", "<unk>"],
        ["they", "do", "n't", ",", "says", "mr.", "<unk>", "of", "<unk>", "'s", "u.s", "."],
        ["<unk>"],
    ]
    tokenizer = word_tokenizer(treebank_words(sentences), None)
    assert tokenizer.convert_ids_to_tokens(tokenizer(treebank_words(["the <unk> fell"])[0])["input_ids"]) == [
        "the",
        "<unk>",
        "fell",
    ]
    assert tokenizer(treebank_words(sentences)[3])["input_ids"] == [tokenizer.unk_token_id]


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


def test_labels_may_begin_anywhere_after_the_inputs_do():
    values = torch.arange(20.0).unsqueeze(1)
    for context, horizon, shift in [(5, 5, 2), (4, 3, None), (6, 2, 1), (2, 3, 9)]:
        windows = SeriesWindows(values, context, horizon, shift)
        later = context if shift is None else shift
        assert len(windows) == 20 - max(context, later + horizon) + 1
        for start in (0, len(windows) - 1):
            assert windows[start]["inputs"].flatten().tolist() == list(range(start, start + context))
            assert windows[start]["labels"].flatten().tolist() == list(range(start + later, start + later + horizon))
        assert max(windows[len(windows) - 1][name].max() for name in ("inputs", "labels")) == 19
    with pytest.raises(ValueError, match=r"shift \+ horizon = 18 \+ 3 is not allowed; allowed: at most 20"):
        SeriesWindows(values, 2, 3, 18)
    with pytest.raises(ValueError, match=r"^context = 30 is not allowed; allowed: at most 20"):
        SeriesWindows(values, 30, 3, 2)
    for settings in [(0, 1), (1, 0), (1, 1, 0)]:
        with pytest.raises(ValueError, match=r"= 0 is not allowed; allowed: 1 or more time steps"):
            SeriesWindows(values, *settings)


def test_series_in_rows_are_a_transposed_table(tmp_path):
    table(tmp_path, "train", name=["up", "down"], target=[list(range(40)), list(range(40, 0, -1))])
    by_rows = load_series(str(tmp_path), 2, 1, series_column="target")
    with pytest.raises(ValueError, match=r"has no numeric column: .* `series_column`"):
        load_series(str(tmp_path), 2, 1)
    with pytest.raises(ValueError, match="column 'values' is not in the data"):
        load_series(str(tmp_path), 2, 1, series_column="values")
    with pytest.raises(ValueError, match=r"columns = \['up'\] is not allowed; allowed: None with series_column"):
        load_series(str(tmp_path), 2, 1, ["up"], series_column="target")
    table(tmp_path, "train", up=list(range(40)), down=list(range(40, 0, -1)))
    for one, other in zip(by_rows, load_series(str(tmp_path), 2, 1), strict=True):
        assert torch.equal(one.values, other.values)
    table(tmp_path, "train", target=[[1.0, 2.0], [1.0]])
    with pytest.raises(ValueError, match=r"column 'target' has series of \[1, 2\] steps; allowed: .*of one length"):
        load_series(str(tmp_path), 2, 1, series_column="target")


def test_shares_and_splits_of_series(tmp_path):
    for split, end in (("train", 30), ("test", 50)):
        table(tmp_path, split, x=[float(i) for i in range(end)])
    parts = load_series(str(tmp_path), 2, 1, split="test", shares=(0.6, 0.2))
    assert [len(part.values) for part in parts] == [30, 10, 10]
    with pytest.raises(ValueError, match=r"split = 'whole' is not allowed; allowed: one of \['train', 'test'\]"):
        load_series(str(tmp_path), 2, 1, split="whole")
    for shares in [(0.0, 0.5), (0.5, 0.5), (0.9, 0.2)]:
        with pytest.raises(ValueError, match=r"shares = .* is not allowed; allowed: two positive numbers"):
            load_series(str(tmp_path), 2, 1, split="test", shares=shares)


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
    parts = load_texts(str(SHARED / "ptb"))
    train, test = parts["train"], parts["test"]
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
