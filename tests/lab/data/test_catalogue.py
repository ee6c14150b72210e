import datasets
import pytest

from hf_teleport.lab.data import CATALOGUE, Source, load, load_images, load_series, load_texts
from hf_teleport.lab.data.rows import load_splits, split_roles

# Hub id, config and revision, as load_dataset takes them.
HUB = {
    "mnist": ("ylecun/mnist", None, None),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", None, None),
    "cifar10": ("uoft-cs/cifar10", None, None),
    "cifar100": ("uoft-cs/cifar100", None, None),
    "tiny_imagenet": ("zh-plus/tiny-imagenet", None, None),
    "smnist": ("ylecun/mnist", None, None),
    "electricity": ("thuml/Time-Series-Library", "electricity", None),
    "traffic": ("thuml/Time-Series-Library", "traffic", None),
    "exchange_rate": ("thuml/Time-Series-Library", "exchange_rate", None),
    "etth1": ("thuml/Time-Series-Library", "ETTh1", None),
    "ptb": ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet"),
    "sst2": ("stanfordnlp/sst2", None, None),
}


@pytest.fixture
def asked(monkeypatch):
    """What `load_dataset` was asked for; nothing is ever there."""
    calls = []

    def load_dataset(path, name=None, *, revision=None, **others):
        calls.append((path, name, revision))
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", HUB)
def test_a_name_asks_for_the_hubs_copy_and_says_where_else_to_look(name, asked):
    with pytest.raises(FileNotFoundError) as caught:
        load(name)
    assert asked == [HUB[name]]
    message = str(caught.value)
    told = [HUB[name][0], "no route to the Hub", "`folder`", CATALOGUE[name].home, *filter(None, HUB[name][1:])]
    assert all(part in message for part in told), message
    assert "\n" not in message


def test_the_catalogue_is_complete():
    # The one set that is not on the Hub: test_code.py.
    assert set(CATALOGUE) == {*HUB, "python"}
    assert all(entry.kind and entry.home.startswith("http") for entry in CATALOGUE.values())


@pytest.mark.parametrize("read", [load_images, load_texts, lambda source: load_series(source, 4, 2)])
def test_every_reader_takes_names_ids_and_sources(read, asked):
    for source in ("traffic", "some/set", Source("some/set", config="a", revision="b")):
        with pytest.raises(FileNotFoundError, match="could not be loaded: no route to the Hub"):
            read(source)
    assert asked == [HUB["traffic"], ("some/set", None, None), ("some/set", "a", "b")]


def test_offline_there_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"Hub's data set 'uoft-cs/cifar100' could not be loaded: .*cs\.toronto\.edu"):
        load("cifar100")


def test_a_local_copy_is_read_in_place_of_the_hubs(tmp_path, asked):
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder or file '.*nowhere'.*ylecun/mnist.*tiny_imagenet.*lecun\.com"
    ):
        load("mnist", tmp_path / "nowhere")
    assert asked == []
    with pytest.raises(FileNotFoundError, match=r"the local '.*' could not be loaded"):
        load("mnist", tmp_path)
    assert asked == [(str(tmp_path), None, None)]


def test_an_empty_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the local '.*' could not be loaded: .*doesn't contain any data files"):
        load_splits(str(tmp_path))


def test_a_name_is_the_catalogues_even_beside_a_folder(tmp_path, monkeypatch, asked):
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("mnist", "./mnist"):
        with pytest.raises(FileNotFoundError):
            load_splits(source)
    assert asked == [HUB["mnist"], ("mnist", None, None)]


def test_a_single_file_is_a_data_set(tmp_path):
    datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / "some.parquet")
    datasets.Dataset.from_dict({"x": [3]}).to_csv(tmp_path / "other.csv")
    assert load_splits(str(tmp_path / "some.parquet"))["train"]["x"][:] == [1, 2]
    assert load_splits("traffic", tmp_path / "other.csv")["train"]["x"][:] == [3]


def test_the_splits_have_roles(tmp_path):
    for name in ("train", "validation", "test"):
        datasets.Dataset.from_dict({"x": [name]}).to_parquet(tmp_path / f"{name}.parquet")

    def roles(source):
        return {role: split["x"][0] for role, split in split_roles(source, tmp_path).items()}

    assert roles("ptb") == {"train": "train", "test": "test", "validation": "validation"}
    # The Hub's test split of SST-2 has no labels.
    assert roles("sst2") == {"train": "train", "test": "validation"}
    (tmp_path / "validation.parquet").unlink()
    assert roles("ptb") == {"train": "train", "test": "test"}


def test_the_layout_of_the_hubs_converted_penn_treebank(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / "penn_treebank" / name).mkdir(parents=True)
        datasets.Dataset.from_dict({"sentence": [name]}).to_parquet(tmp_path / "penn_treebank" / name / "0000.parquet")
    assert {role: split["sentence"][0] for role, split in split_roles("ptb", tmp_path).items()} == {
        "train": "train",
        "test": "test",
        "validation": "validation",
    }


def test_an_unknown_kind_is_said():
    with pytest.raises(ValueError, match="kind = 'video' is not allowed; allowed: one of"):
        Source("some/set", "video")
    with pytest.raises(ValueError, match=r"kind = None is not allowed for 'some/set'; allowed: one of \['image'.*'ptb'"):
        load("some/set")
    with pytest.raises(ValueError, match=r"options \['lenght'\] are not allowed; allowed for kind 'text': \['text_column'"):
        load("ptb", lenght=3)
