"""The tasks of `hf-teleport train`: well-known Transformers examples with teleportation. Each is a module with `main(argv)`.

hf-teleport train clm configs/examples/ptb_clm.yaml --learning_rate 1e-3
accelerate launch -m hf_teleport.cli train clm configs/examples/ptb_clm.yaml
"""

from importlib import import_module
from typing import Any

TASKS = {
    "clm": "causal language modelling: GPT-2, Llama, ...",
    "mlm": "masked language modelling: BERT, RoBERTa, ...",
    "glue": "text classification or regression: a GLUE task, or any texts with labels",
    "seq2seq": "summarisation, translation, any text to text: T5, BART, ...",
    "image_classification": "images with labels: ViT, ResNet, ...",
    "audio_classification": "sounds with labels: Wav2Vec2, AST, ...",
    "time_series": "forecasts of a table of numbers: PatchTST, PatchTSMixer",
}


def train(task: str, argv: list[str]) -> dict[str, float]:
    """Run a task with the arguments of a command line. Returns its metrics.

    Raises:
        ValueError: there is no such task, or an argument is not allowed.
        FileNotFoundError: a file does not exist.
    """
    if task not in TASKS:
        raise ValueError(f"task = {task!r} is not allowed; allowed: one of {list(TASKS)}.")
    module: Any = import_module(f"{__name__}.{task}")
    return module.main(argv)
