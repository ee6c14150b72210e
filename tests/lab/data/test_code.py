"""The Python corpus, made of the packages that are really installed."""

import hashlib
import json
from importlib.metadata import distribution, version
from pathlib import Path

import datasets
import pytest
import torch

from hf_teleport.lab.data import code, load
from hf_teleport.lab.runs import execute
from hf_teleport.lab.settings import plan, read

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = [package for packages in code.PACKAGES.values() for package in packages]
PINNED = dict(line.strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)

# Of each training package: a few files, which are quick to tokenize.
MEGABYTES = 0.05


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(code, "TEST_MEGABYTES", MEGABYTES)
    return tmp_path / "cache" / "hf_teleport_python"


@pytest.fixture
def warnings(monkeypatch):
    told = []
    monkeypatch.setattr(code.logger, "warning", told.append)
    return told


def test_every_package_is_pinned():
    assert set(PACKAGES) <= set(PINNED)


def test_the_pinned_versions_have_the_checksum_and_others_are_told(monkeypatch, warnings):
    monkeypatch.undo()
    told = []
    monkeypatch.setattr(code.logger, "warning", told.append)
    found = code.checksum(code.code_files())
    installed = {package: version(package).partition("+")[0] for package in PACKAGES}
    as_pinned = all(PINNED[package] == installed[package] for package in PACKAGES)
    assert (found == code.CHECKSUM) == as_pinned == (not told)
    monkeypatch.setattr(code, "CHECKSUM", "0" * 64)
    code.code_files()
    assert all(part in told[-1] for part in (found[:12], f"torch {version('torch')}", "000000000000"))


def test_the_test_files_are_of_packages_that_are_never_trained_on(monkeypatch):
    monkeypatch.setattr(code, "TEST_MEGABYTES", 0.5)
    parts = code.code_files(0.5)
    owners = {role: {name.partition("/")[0] for name in files} for role, files in parts.items()}
    assert owners == {
        "train": {"torch", "torchgen", "transformers", "scipy", "sklearn"},
        "test": {"accelerate", "matplotlib", "mpl_toolkits", "numpy"},
    }


def test_files_are_taken_in_the_order_of_their_hash_until_the_limit():
    files = {name: text for name, text in code.code_files(MEGABYTES)["train"].items() if name.startswith("torch/")}
    listed = [str(path) for path in distribution("torch").files if path.suffix == ".py" and path.name not in code._OF_A_BUILD]
    order = sorted(listed, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert list(files) == order[: len(files)]
    site = Path(torch.__file__).parents[1]
    assert files == {name: (site / name).read_bytes().decode() for name in files}
    sizes = [(site / name).stat().st_size for name in order[: len(files) + 1]]
    assert sum(sizes[:-1]) <= MEGABYTES * 1e6 < sum(sizes)


def test_the_checksum_is_of_names_contents_and_roles():
    parts = {"train": {"a.py": "x", "b.py": "y"}, "test": {"c.py": "z"}}
    others = [
        {"train": {"a.py": "x", "b.py": "z"}, "test": {"c.py": "z"}},
        {"train": {"a.py": "x", "d.py": "y"}, "test": {"c.py": "z"}},
        {"train": {"a.py": "x"}, "test": {"b.py": "y", "c.py": "z"}},
    ]
    assert len({code.checksum(each) for each in (parts, *others)}) == 4
    assert code.checksum(parts) == code.checksum({role: dict(files) for role, files in parts.items()})


def test_the_tokens_are_the_files(cache):
    tokenizer, streams = code.code_tokens(MEGABYTES, 600)
    assert len(tokenizer) == 600
    for role, files in code.code_files(MEGABYTES).items():
        assert tokenizer.decode(streams[role]) == "".join(text + tokenizer.eos_token for text in files.values())
    # Text that no file has: there is a token for every byte.
    for text in ("\tnaïve  = 'Ω' \r\n", "日本語 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_second_call_reads_the_cache(cache, monkeypatch):
    tokenizer, streams = code.code_tokens(MEGABYTES, 600)
    (folder,) = cache.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(code, "byte_pair_tokenizer", None)
        again, kept = code.code_tokens(MEGABYTES, 600)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.pad_token, again.eos_token, again.mask_token) == ("<pad>", "<eos>", "<mask>")
    assert all(torch.equal(kept[role], streams[role]) for role in streams)
    code.code_tokens(MEGABYTES, 300)
    assert len(list(cache.iterdir())) == 2, "another vocabulary has a folder of its own"
    assert folder.is_dir()


def test_an_interrupt_leaves_nothing_in_the_cache(cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(code, "token_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        code.code_tokens(MEGABYTES, 300)
    assert list(cache.iterdir()) == []


def test_a_larger_corpus_has_the_same_vocabulary(monkeypatch, warnings):
    monkeypatch.setattr(code, "PACKAGE_MEGABYTES", MEGABYTES)
    tokenizer, streams = code.code_tokens(None, 600)
    other, more = code.code_tokens(3 * MEGABYTES, 600)
    assert other.get_vocab() == tokenizer.get_vocab()
    assert len(more["train"]) > 2 * len(streams["train"])
    assert torch.equal(more["test"], streams["test"])


def test_what_cannot_be_is_said(monkeypatch):
    with pytest.raises(ValueError, match="vocabulary_size = 258 is not allowed; allowed: 259 or more"):
        code.code_tokens(MEGABYTES, 258)
    for limit in (0, -1, "3"):
        with pytest.raises(ValueError, match=f"package_megabytes = {limit!r} is not allowed; allowed: a positive number"):
            code.code_files(limit)
    monkeypatch.setattr(code, "PACKAGES", {"train": ("no-such-package",), "test": ("numpy",)})
    with pytest.raises(ModuleNotFoundError, match=r"source of no-such-package.*hf_teleport\[experiments\]"):
        code.code_files()


def test_the_corpus_by_its_name(tmp_path):
    data = load("python", length=64, vocabulary_size=400, package_megabytes=MEGABYTES)
    assert (data.kind, data.measure, len(data.tokenizer)) == ("text", "perplexity", 400)
    row = data.train[0]
    assert row["input_ids"].shape == (64,)
    assert torch.equal(row["input_ids"], row["labels"])
    first = next(iter(code.code_files(MEGABYTES)["test"].values()))
    assert first.startswith(data.tokenizer.decode(data.test[0]["input_ids"]))
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = load("python", length=64, tokenizer=tmp_path / "tokenizer", package_megabytes=MEGABYTES)
    assert torch.equal(again.train.columns["input_ids"], data.train.columns["input_ids"])
    masked = load("python", length=64, vocabulary_size=400, package_megabytes=MEGABYTES, mask_probability=0.15)
    assert masked.measure == "masked_perplexity"
    assert "labels" not in masked.train[0]


def test_options_that_do_not_suit_the_corpus(tmp_path):
    with pytest.raises(ValueError, match="label_column = 'label' is not allowed; allowed: None, as source code has no classes"):
        load("python", label_column="label")
    with pytest.raises(ValueError, match="vocabulary_size = 400 is not allowed; allowed: None"):
        load("python", vocabulary_size=400, tokenizer=tmp_path)
    with pytest.raises(ValueError, match="package_megabytes = 1 is not allowed; allowed: None, except for 'python'"):
        load("ptb", package_megabytes=1)


def test_the_studys_llama_learns_python(tmp_path):
    """20 steps with a change of basis before step 10; narrower than in the file, and on a smaller corpus."""
    short = {"output_dir": tmp_path / "runs", "package_megabytes": 0.2, "vocabulary_size": 1000, "seeds": 0, "max_steps": 20}
    short |= {"warmup_steps": 5, "eval_steps": 20, "train_loss_rows": 8, "test_rows": 8, "disable_tqdm": "true"}
    short |= {"sizes.hidden_size": 32, "sizes.intermediate_size": 64, "sizes.num_hidden_layers": 2}
    words = [word for key, value in short.items() for word in (f"--{key}", str(value))]
    experiment = plan(read(ROOT / "configs/study/following_python.yaml", words))
    assert execute(experiment) == 2
    for run in experiment.runs:
        log = json.loads((run.folder / "history.json").read_text())
        for name in ("eval_train_loss", "eval_test_loss"):
            first, last = (row[name] for row in log if name in row)
            assert last < first - 0.8
        events = [row["step"] for row in log if "teleport/steps" in row]
        assert events == ([10] if run.arm == "following" else [])
