import gc
import logging
import os

# Set before transformers is imported: no test needs the network, and each process has one core's worth of work.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

# Files of half a minute and more. A worker takes a whole file: started last, one of these would leave the others idle.
LONGEST = ["test_trainer_parity", "test_gpu", "test_ranks", "test_killed", "test_sharded", "test_examples", "test_packages"]
LONGEST += ["test_frozen", "test_fsdp_trainer", "test_packaging", "test_compare", "test_compiled_runs", "test_hub"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Trainer collects garbage when a run begins. What was imported is none, and what tests before left is collected here."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_deprecated_calls():
    """Transformers logs most of its deprecations, where no filter of warnings would see them. Scripts set how much it logs."""
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage()) if "deprecat" in record.getMessage().lower() else None
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    logger.setLevel(level)
    assert not told, told
