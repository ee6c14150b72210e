"""Data and models that cannot be: one line that names the argument, the file and the row, exit code 2, no traceback."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from hf_teleport.cli import main

TEXTS = "some words of text here\n" * 20
LABELLED = "text,label\n" + "a b c d,1\ne f g h,0\n" * 10
SIZES = "hidden_size=16,intermediate_size=24,num_hidden_layers=1,num_attention_heads=2"
VOCABULARY = ["--train_tokenizer_vocab_size", "9", "--max_steps", "1", "--teleport_epochs", "0", "--report_to", "none"]
NEW = {
    "clm": ["--config_name", "llama", "--config_overrides", SIZES, "--block_size", "4", *VOCABULARY],
    "glue": ["--config_name", "bert", "--config_overrides", SIZES, *VOCABULARY],
    "seq2seq": ["--config_name", "t5", *VOCABULARY],
    "image_classification": ["--config_name", "vit", "--config_overrides", f"{SIZES},image_size=32", *VOCABULARY[2:]],
    "audio_classification": ["--config_name", "wav2vec2"],
    "time_series": ["--config_name", "patchtst", "--context_length", "4", "--prediction_length", "2"],
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a task in an empty folder, and returns what it says when it refuses."""
    monkeypatch.chdir(tmp_path)

    def run(task, *words, new=True):
        assert main(["train", task, *(NEW[task] if new else []), "--output_dir", "run", *words]) == 2
        return " ".join(capsys.readouterr().err.split())

    return run


def write(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.txt", TEXTS.encode() + "café\n".encode("latin-1"), "is not UTF-8: line 21 has the byte 0xe9. Save it as UTF-8"),
        ("a.txt", TEXTS.encode("utf-16"), "is not UTF-8: it looks like UTF-16"),
        ("a.txt", TEXTS.encode("utf-16-le"), "is not UTF-8: it looks like UTF-16"),
        (
            "a.csv",
            LABELLED.encode("utf-32-be"),
            "is not UTF-8: it looks like UTF-32BE. Save it as UTF-8, for instance: iconv -f UTF",
        ),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "is no text: byte 9 is zero. Give a file of text"),
        ("a.csv", "a,b\n1,2\n", "column 'text' is not in the data; allowed: one of ['a', 'b']"),
        ("a.csv", LABELLED.encode() + "café,1\n".encode("latin-1"), "line 22 has the byte 0xe9"),
        ("a.csv", "text,label\na,1\nb,2,3,4\n", "Expected 2 fields in line 3, saw 4"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.txt", "", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "is broken in line 2"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "is broken in line 1, correct it there: the key 'text' stands there twice"),
        ("a.jsonl", "[1, 2]\n[3, 4]\n", "has [1, 2] in line 1; allowed: an object a line"),
        ("a.json", "3\n", "has 3 in line 1"),
        (
            "a.jsonl",
            '{"text": ' + "[" * 3000 + "]" * 3000 + "}\n",
            "is broken in line 1, correct it there: maximum recursion depth",
        ),
        ("a.json", json.dumps([{"text": "a"}] * 3 + [4]), "row 4"),
        ("a.jsonl", '{"text": "a b c"}\n{"text": null}\n' * 5, "row 2 has None in column 'text'; allowed: a text in every row"),
        ("a.jsonl", '{"text": "a b c"}\n{"text": 3}\n' * 5, "row 2 has 3 in column 'text'"),
        ("a.csv", "text,label\nabc,1\nNA,0\n", "row 2 has None in column 'text'"),
        ("a.txt", "one line\n", "validation_split_percentage = 5 does not split its 1 rows"),
        ("a.parquet", "hello world, no parquet", "is no Parquet file"),
        ("a.parquet", b"PAR1" + b"x" * 100, "is cut short or broken"),
    ],
)
def test_files(file, content, said, refused):
    write(file, content)
    told = refused("clm", "--train_file", file)
    assert told.startswith(f"hf-teleport: train_file = '{file}'")  # and no line of another library's before it
    assert said in told


def test_marks_at_the_beginning_of_utf_8_are_no_fault(tmp_path, monkeypatch):
    from hf_teleport.inputs.rows import read_rows

    monkeypatch.chdir(tmp_path)
    for file, content in (("a.csv", LABELLED), ("a.jsonl", '{"text": "a b c"}\n' * 9)):
        rows = read_rows("train_file", write(file, b"\xef\xbb\xbf" + content.encode()))
        assert rows.column_names[0] == "text"


def test_folders_and_columns(refused):
    Path("a.csv").mkdir()
    assert "train_file = 'a.csv': a folder is not allowed; allowed: a file that ends in .csv" in refused(
        "clm", "--train_file", "a.csv"
    )
    write("b.csv", LABELLED)
    told = refused("clm", "--train_file", "b.csv", "--text_column_name", "txet")
    assert "train_file = 'b.csv': column 'txet' is not in the data; allowed: one of ['text', 'label']" in told
    told = refused("clm", "--train_file", "b.csv", "--text_column_name", "label")
    assert "train_file = 'b.csv': row 1 has 1 in column 'label'" in told
    assert "allowed: one or two columns" in refused("glue", "--train_file", "b.csv", "--text_column_names", "a", "b", "c")
    assert "max_train_samples = 0 is not allowed" in refused("clm", "--train_file", "b.csv", "--max_train_samples", "0")
    told = refused("clm", "--train_file", "b.csv", "--validation_split_percentage", "100")
    assert "validation_split_percentage = 100 does not split" in told


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("text,label\n" + "a b,1.5\nc d,\n" * 5, "row 2 has no value in column 'label'"),
        ("text,label\n" + "a b,1.5\nc d,inf\n" * 5, "row 2 has inf in column 'label'; allowed: finite numbers"),
        ("text,label\n" + "a b,1\nc d,\ne f,0\n" * 5, "row 2 has no value in column 'label'"),
        ("text,label\n" + "a b,1\nc d,1\n" * 5, "has the one label 1"),
        ("text,label\n" + "a b,-1\nc d,1\n" * 5, "labels such as -1; allowed: whole numbers from 0"),
        ("text,label\n" + "a b,0\nc d,99999999999\n" * 5, "2 classes with numbers up to 99999999999"),
        ('{"text": "a b", "label": [1, 2]}\n' * 9, "has values such as [1, 2]; allowed: classes by name or number"),
        ('{"text": "a b", "label": {"a": 1}}\n' * 9, "has values such as {'a': 1}"),
        ("text,kind\n" + "a b,1\nc d,0\n" * 5, "column 'label' is not in the data"),
    ],
)
def test_labels(rows, said, refused):
    assert said in refused("glue", "--train_file", write("a.jsonl" if rows.startswith("{") else "a.csv", rows))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            "text\na b\nc d\n",
            "validation_file = 'v.csv' has the columns ['text']; add ['label'], which the training rows have",
        ),
        ("text,label\na b,yes\nc d,no\n", "validation_file = 'v.csv' has columns of other types than the training rows"),
        ("text,label\na b,1\nc d,7\n", "the label 7; allowed: labels of the training rows"),
        ("text,label\na b,1\nc d,\n", "validation_file = 'v.csv': row 2 has no value in column 'label'"),
        ("", "validation_file = 'v.csv' is empty"),
    ],
)
def test_rows_to_evaluate_on(rows, said, refused):
    write("v.csv", rows)
    assert said in refused("glue", "--train_file", write("t.csv", LABELLED), "--validation_file", "v.csv")


def test_pairs_of_texts(refused):
    rows = [{"text": "a", "s": "b", "translation": {"de": "a", "en": "b"}}] * 9 + [{"text": "a", "s": None, "translation": None}]
    write("a.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    assert "row 10 has None in column 's'" in refused("seq2seq", "--train_file", "a.jsonl", "--summary_column", "s")
    told = refused("seq2seq", "--train_file", "a.jsonl", "--source_lang", "de", "--target_lang", "en")
    assert "row 10 has None in column 'translation'; allowed: texts by language" in told


def test_images_sounds_and_series(refused):
    Path("empty").mkdir()
    write("a.csv", "image,audio,label\n" + "1,1,0\n2,2,1\n" * 9)
    for task, column in (("image_classification", "image"), ("audio_classification", "audio")):
        told = refused(task, "--train_file", "a.csv")
        assert f"train_file = 'a.csv': column '{column}' has values of the type Value('int64'); allowed: encoded bytes" in told
        assert "train_dir = 'empty': 'empty' has no" in refused(task, "--train_dir", "empty")
        assert "train_dir = 'a.csv' is a file; allowed: a folder" in refused(task, "--train_dir", "a.csv")
    Dataset.from_dict({"image": [{"bytes": b"none", "path": None}] * 9, "label": [0, 1, 0] * 3}).to_parquet("i.parquet")
    assert "the image in the data could not be read, remove it" in refused("image_classification", "--train_file", "i.parquet")
    for rows, said in (
        ("a,b\n" + "x,y\n" * 9, "train_file = 's.csv': "),
        ("a,b\n" + "1,2\n,3\n" * 99, "has missing or infinite values"),
        ("a,b\n1,2\n3,4\n", "train_file = 's.csv': context + horizon = 4 + 2 is not allowed"),
        ("a,b\n1,é\n".encode("latin-1"), "train_file = 's.csv' is not UTF-8: line 2"),
    ):
        assert said in refused("time_series", "--train_file", write("s.csv", rows))
    told = refused("time_series", "--train_file", write("s.csv", "a\n" + "1\n" * 99), "--max_train_samples", "0")
    assert "max_train_samples = 0 is not allowed; allowed: 1 or more" in told


def test_models(refused):
    write("a.txt", TEXTS)
    Path("empty").mkdir()
    Path("broken").mkdir()
    write("broken/config.json", '{"model_type": ')
    data = ["--train_file", "a.txt", "--block_size", "4"]
    tokenizer = [*data, "--train_tokenizer_vocab_size", "9"]
    for words, said in (
        (["--model_name_or_path", "empty"], "model_name_or_path = 'empty' has no config.json"),
        (["--model_name_or_path", "broken"], "model_name_or_path = 'broken' could not be loaded"),
        (["--model_name_or_path", "./none"], "model_name_or_path = './none': there is no such folder"),
        (["--model_name_or_path", "a.txt"], "model_name_or_path = 'a.txt' is a file"),
        (["--config_name", "vit"], "'vit' is not allowed; allowed: a model type that AutoModelForCausalLM can make"),
        (["--config_name", "llama", "--config_overrides", "hidden_size=wide"], "expected int, got str"),
        (["--config_name", "llama", "--config_overrides", "num_attention_heads=0"], "is not allowed for 'llama'"),
    ):
        assert said in refused("clm", *tokenizer, *words, new=False)
    told = refused("clm", *data, "--tokenizer_name", "empty", "--config_name", "llama", new=False)
    assert "tokenizer_name = 'empty' has no config.json or other JSON file" in told


def test_a_checkpoint_of_another_model(refused, capsys):
    write("a.txt", TEXTS)
    words = ["train", "clm", *NEW["clm"], "--train_file", "a.txt", "--output_dir", "run", "--use_cpu", "true"]
    assert main(words) == 0
    told = refused("clm", "--train_file", "a.txt", "--config_overrides", SIZES.replace("hidden_size=16", "hidden_size=32"))
    assert "checkpoint-1 belongs to another model or optimizer. To begin anew, pass --resume_from_checkpoint false" in told


def test_a_folder_of_data_that_is_broken(refused):
    Path("data").mkdir()
    write("data/train.jsonl", '{"a": \n')
    assert "dataset_name = 'data' could not be loaded: JSON parse error" in refused("clm", "--dataset_name", "data")
