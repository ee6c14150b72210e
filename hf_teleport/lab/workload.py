"""The data and the model of an experiment."""

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from hf_teleport.lab.data import Pipeline, load
from hf_teleport.lab.data.catalogue import KINDS, find
from hf_teleport.lab.data.pipelines import OPTIONS
from hf_teleport.lab.keys import require_known
from hf_teleport.lab.networks import NETWORKS, Network
from hf_teleport.reporting.extras import require_extra

# Sizes of a saved model: the first must be at least what the data need, the second exactly that.
_ROOM = ("vocab_size", "max_position_embeddings", "length")
_EXACT = ("image_size", "num_channels", "input_size", "channels", "context", "horizon")

# Share of the words that are masked by default, as for BERT.
_MASKED_SHARE = 0.15


@dataclass(frozen=True)
class Workload:
    """A data set, a network for it, and the sizes of both.

    Args:
        dataset: a name of the catalogue, a Hub id, or a local folder, as for `data.load`.
        model: the network's name. The paper has 'mlp', 'cnn', 'residual_cnn', 'transformer_classifier', 'transformer_regressor'
            and 'transformer_lm'. Transformers has 'llama', 'qwen3', 'gemma', 'gpt2', 'bert' and 'llama_classifier' (classifiers),
            'bert_mlm' (a masked language model) and 'vit'. 'forecaster' is a small transformer that forecasts the next `horizon`
            steps of series.
        folder: a local copy of the data set.
        kind: the kind of data. Default: the catalogue's.
        options: options of `data.load`, see `OPTIONS`.
        sizes: settings of the network's config. The defaults are the paper's, or for models of Transformers its own (large)
            ones. Image size, classes, length, channels, vocabulary and special tokens come from the data. A BERT far narrower
            than 768 does not learn with an `initializer_range` of 0.02: give 0.02 * (768 / hidden_size) ** 0.5.
        pretrained: a folder with a saved model, such as `model` in the folder of a run with `save_model`. Training starts from
            its weights and sizes, and uses its tokenizer. A classifier for another number of classes gets a new head.
        adapter: settings of `peft.LoraConfig`. Such adapters are trained, and the model is frozen. A classifier of texts also
            trains its head.
        train_rows: train on this many rows, evenly spread over the training set. Default: all.
        test_rows: test on this many rows, evenly spread. Default: all.
        train_loss_rows: measure the training loss on this many of the training rows, evenly spread.

    Raises:
        ValueError: the model is unknown, does not take such data, or differs from the saved model. An option or size is unknown.
            PEFT does not take the settings of `adapter`.
        FileNotFoundError: `pretrained` has no saved model.
        ModuleNotFoundError: PEFT is not installed, and `adapter` is given.
    """

    dataset: str
    model: str
    folder: str | None = None
    kind: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    adapter: dict[str, Any] | None = None
    train_rows: int | None = None
    test_rows: int | None = None
    train_loss_rows: int = 10_000

    def __post_init__(self) -> None:
        if self.model not in NETWORKS:
            raise ValueError(f"model = {self.model!r} is not allowed; allowed: one of {list(NETWORKS)}.")
        if self.kind not in (None, *KINDS):
            raise ValueError(f"kind = {self.kind!r} is not allowed; allowed: one of {list(KINDS)}.")
        network, kind = self.network, self.kind or find(self.dataset).kind
        if kind != network.kind:
            suited = [name for name, other in NETWORKS.items() if other.kind == kind]
            raise ValueError(
                f"model = {self.model!r} takes data of kind {network.kind!r}, but dataset = {self.dataset!r} is of kind "
                f"{kind!r}; allowed: {suited or f'a kind, one of {list(KINDS)}'}."
            )
        for name in self.options:
            require_known(name, OPTIONS[kind], f"data of kind {kind!r}")
        if not isinstance(self.sizes, dict):
            raise ValueError(f"sizes = {self.sizes!r} is not allowed; allowed: a mapping from the network's settings to values.")
        for name in self.sizes:
            require_known(name, network.sizes(), f"sizes of model {self.model!r}")
        network.config(**self.sizes)
        if kind == "text":
            self._check_classes()
        share = self.options.get("mask_probability", _MASKED_SHARE)
        if "mask_probability" in self.options and not network.is_masked:
            raise ValueError(f"mask_probability = {share!r} is not allowed with model = {self.model!r}; allowed: bert_mlm.")
        if not isinstance(share, (int, float)) or not 0 < share < 1:
            raise ValueError(f"mask_probability = {share!r} is not allowed; allowed: a number between 0 and 1.")
        if self.pretrained is not None:
            self._check_pretrained()
        if self.adapter is not None:
            self._adapter_config()
        for name in ("train_rows", "test_rows", "train_loss_rows"):
            rows = getattr(self, name)
            if rows is not None and (not isinstance(rows, int) or rows < 1):
                raise ValueError(f"{name} = {rows!r} is not allowed; allowed: a whole number from 1.")

    def _check_classes(self) -> None:
        column = self.options.get("label_column") or find(self.dataset).label_column
        if self.network.classifies and not column:
            raise ValueError(f"model = {self.model!r} classifies texts, but label_column = None; allowed: the column of classes.")
        if column and not self.network.classifies:
            raise ValueError(
                f"model = {self.model!r} reads running text, but label_column = {column!r}; allowed: None. For the text of "
                f"dataset = {self.dataset!r} without its classes give its folder or Hub id as dataset, and kind: text."
            )

    def _check_pretrained(self) -> None:
        folder = Path(str(self.pretrained))
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"pretrained = {self.pretrained!r} has no saved model: a run with save_model: true saves one in its folder "
                "'model'."
            )
        found = AutoConfig.from_pretrained(folder).model_type
        if found != self.network.model_type:
            raise ValueError(
                f"model = {self.model!r} is not allowed; allowed: a {found!r}, as in pretrained = {self.pretrained!r}."
            )
        if self.network.kind == "text" and "tokenizer" not in self.options and not (folder / "tokenizer_config.json").is_file():
            raise ValueError(
                f"pretrained = {self.pretrained!r} has no tokenizer, and its embeddings are useless without it: save the "
                "tokenizer of pretraining there, or name it as tokenizer."
            )

    def _adapter_config(self) -> Any:
        """PEFT's."""
        if not isinstance(self.adapter, dict):
            raise ValueError(
                f"adapter = {self.adapter!r} is not allowed; allowed: a mapping of settings of peft.LoraConfig, such as "
                "{r: 4, target_modules: all-linear}."
            )
        peft = require_extra("peft")
        for name in self.adapter:
            require_known(name, inspect.signature(peft.LoraConfig).parameters, "adapter, settings of peft.LoraConfig")
        task = "SEQ_CLS" if self.network.auto is AutoModelForSequenceClassification else None
        return peft.LoraConfig(**{"task_type": task, **self.adapter})

    @property
    def network(self) -> Network:
        """The network that `model` names."""
        return NETWORKS[self.model]

    @cached_property
    def data(self) -> Pipeline:
        """The result of `load`, loaded once."""
        return self.load()

    def load(self) -> Pipeline:
        """Load all rows of the data.

        Raises:
            FileNotFoundError, ValueError: as `data.load`.
        """
        own: dict[str, Any] = {"tokenizer": self.pretrained} if self.pretrained and self.network.kind == "text" else {}
        if self.network.is_masked:
            own["mask_probability"] = _MASKED_SHARE
        return load(self.dataset, self.folder, self.kind, **{**own, **self.options})

    def make_model(self, data: Pipeline) -> Any:
        """Make a new model with random weights from torch's generator, or load the saved one with a head that fits the data.

        Returns:
            With `adapter` a model of PEFT, else one of Transformers.

        Raises:
            ValueError: the saved model does not suit the data or the sizes, or has no such layers as `adapter` names.
        """
        model = self._make_base(data)
        return model if self.adapter is None else require_extra("peft").get_peft_model(model, self._adapter_config())

    def _make_base(self, data: Pipeline) -> PreTrainedModel:
        decided = self.network.from_data(data)
        if self.pretrained is None:
            return self.network.auto.from_config(self.network.config(**{**decided, **self.sizes}))
        config = AutoConfig.from_pretrained(self.pretrained)
        for name in decided:
            has, needed = getattr(config, name), decided[name]
            if (name in _ROOM and has < needed) or (name in _EXACT and has != needed):
                raise ValueError(f"{name} = {needed} of the data is not allowed; allowed: {has}, as in {self.pretrained!r}.")
        before = config.num_labels
        for name, value in self.sizes.items():
            setattr(config, name, value)
        if self.network.classifies:
            config.num_labels = decided["num_labels"]
        model, loaded = self.network.auto.from_pretrained(
            self.pretrained, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
        for name, saved, fresh in sorted(loaded["mismatched_keys"]):
            if (saved[0], *fresh) != (before, config.num_labels, *saved[1:]):
                raise ValueError(
                    f"{name} has the shape {list(fresh)} by sizes = {self.sizes}, which is not allowed; allowed: "
                    f"{list(saved)}, as in {self.pretrained!r}. Leave out such sizes."
                )
        return model


def evenly(rows: Any, count: int | None) -> Dataset:
    """This many rows, evenly spread over the set. All rows if the set is smaller or there is no count."""
    if count is None or count >= len(rows):
        return rows
    return Subset(rows, [i * len(rows) // count for i in range(count)])
