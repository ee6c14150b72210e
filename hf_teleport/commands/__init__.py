"""The subcommands of `hf-teleport`, one file each: its parser (`add_to`) and its work (`run`).

A parser must not import torch or Transformers, because `hf-teleport --help` would then take seconds. So `run` imports what it
needs. Several subcommands share `parser.py` and `yaml_file.py`.
"""
