"""The Python corpus: source files of installed packages as text for a language model. Every environment of experiments has them.

The corpus has the `.py` files in each package's list of installed files, ordered by the SHA-256 of their names, up to a limit in
MB. The test files come from other packages than the training files. A byte-level BPE is learned from the training files at the
default limit, so that a larger corpus has the same vocabulary. The cache of `datasets` keeps the tokens.
"""

import hashlib
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import datasets
import numpy as np
import tokenizers
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_teleport.lab.data.text import byte_pair_tokenizer, token_stream

logger = logging.get_logger(__name__)

PACKAGES = {"train": ("torch", "transformers", "scipy", "scikit-learn"), "test": ("accelerate", "matplotlib", "numpy")}

# Default limit of each training package, and limit of each test package.
PACKAGE_MEGABYTES, TEST_MEGABYTES = 3.0, 0.5
VOCABULARY_SIZE = 5000

# Checksum of the corpus at the default limit, with the versions in constraints.txt.
CHECKSUM = "b1f9c458d5223ee685fe14bb1e76c4fc3332a297d98c4f420b8a514a033be155"

# Files that differ between builds of one version.
_OF_A_BUILD = ("version.py", "_version.py", "__config__.py")

Files = dict[str, str]


def code_files(package_megabytes: float | None = None) -> dict[str, Files]:
    """The files of the corpus by role, 'train' and 'test': their names and texts.

    Other versions of the packages than in constraints.txt give another corpus. A warning says so.

    Args:
        package_megabytes: the limit for each training package, in millions of bytes. Default: 3.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: the limit is not positive.
    """
    limit = PACKAGE_MEGABYTES if package_megabytes is None else package_megabytes
    if not isinstance(limit, (int, float)) or not limit > 0:
        raise ValueError(f"package_megabytes = {limit!r} is not allowed; allowed: a positive number.")
    limits = {"train": limit, "test": TEST_MEGABYTES}
    parts: dict[str, Files] = {role: {} for role in PACKAGES}
    for role, packages in PACKAGES.items():
        for package in packages:
            parts[role] |= _of_package(package, limits[role])
    found = checksum(parts)
    if limit == PACKAGE_MEGABYTES and found != CHECKSUM:
        versions = ", ".join(f"{package} {version(package)}" for packages in PACKAGES.values() for package in packages)
        logger.warning(
            f"The Python corpus has the checksum {found[:12]} with {versions}; with the versions in constraints.txt it is "
            f"{CHECKSUM[:12]}. Compare losses only with runs of the same checksum, or install those versions."
        )
    return parts


def checksum(parts: dict[str, Files]) -> str:
    """SHA-256 of the list of files and of their contents."""
    lines = (f"{role} {name} {_digest(text)}\n" for role, files in parts.items() for name, text in files.items())
    return _digest("".join(lines))


def code_tokens(
    package_megabytes: float | None = None, vocabulary_size: int | None = None
) -> tuple[PreTrainedTokenizerFast, dict[str, Tensor]]:
    """The corpus as tokens (N,) by role, with its tokenizer. The first call takes about 20 seconds, later calls read the cache.

    Args:
        package_megabytes: as `code_files`.
        vocabulary_size: the largest number of tokens. Default: 5,000.

    Raises:
        ModuleNotFoundError: as `code_files`.
        ValueError: as `code_files` and `byte_pair_tokenizer`.
    """
    size = VOCABULARY_SIZE if vocabulary_size is None else vocabulary_size
    parts = code_files(package_megabytes)
    key = _digest(f"{checksum(parts)} {size} {tokenizers.__version__}")[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE, "hf_teleport_python", key)
    if not folder.is_dir():
        is_larger = package_megabytes is not None and package_megabytes > PACKAGE_MEGABYTES
        shown = code_files() if is_larger else parts
        _write(folder, parts, byte_pair_tokenizer(list(shown["train"].values()), size))
    streams = {role: torch.from_numpy(np.load(folder / f"{role}.npy").astype("int64")) for role in parts}
    return AutoTokenizer.from_pretrained(folder), streams


def _write(folder: Path, parts: dict[str, Files], tokenizer: PreTrainedTokenizerFast) -> None:
    """Write tokenizer and tokens to a new folder and rename it, so that an interrupt leaves either all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        tokenizer.save_pretrained(new)
        for role, files in parts.items():
            np.save(new / f"{role}.npy", token_stream(list(files.values()), tokenizer).numpy().astype("int32"))
        new.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _of_package(package: str, megabytes: float) -> Files:
    try:
        listed = distribution(package).files or []
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"the Python corpus needs the source of {package}, which is not installed: pip install 'hf_teleport[experiments]'"
        ) from error
    paths = {str(path): path for path in listed if path.suffix == ".py" and ".." not in path.parts}
    found: Files = {}
    size = 0
    for name in sorted(paths, key=_digest):
        file = Path(str(paths[name].locate()))
        if file.name in _OF_A_BUILD or not file.is_file():
            continue
        content = file.read_bytes()
        size += len(content)
        if size > 1e6 * megabytes:
            break
        found[name] = content.decode(errors="replace")
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
