"""One file a subcommand of `hf-teleport`: its parser (`add_to`) and its work (`run`).

A parser imports neither torch nor Transformers, which take seconds, so `run` imports what it needs. `parser.py` and
`yaml_file.py` have what several of them share.
"""
