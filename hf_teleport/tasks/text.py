"""Turn texts into rows of tokens: the length of a row, and blocks of running text."""

from typing import Any

from datasets import DatasetDict

# These number a row's positions from the padding token's id on, so the first ones are not used. MPNet takes 1 for that id.
_AFTER_PADDING = {"camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta"}
_AFTER_PADDING |= {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}


def row_length(name: str, asked: int | None, default: int, config: Any, tokenizer: Any) -> int:
    """The number of tokens in a row: the one asked for, or else the default, limited by model and tokenizer.

    Raises:
        ValueError: the number asked for exceeds their limit.
    """
    limit = tokenizer.model_max_length
    if positions := getattr(config, "max_position_embeddings", None):
        padding = 1 if config.model_type == "mpnet" else getattr(config, "pad_token_id", None) or 0
        limit = min(limit, positions - (padding + 1 if config.model_type in _AFTER_PADDING else 0))
    if asked is not None and not 1 <= asked <= limit:
        raise ValueError(f"{name} = {asked} is not allowed; allowed: 1 to {limit}, which model and tokenizer take.")
    return asked or min(default, limit)


def blocks(tables: DatasetDict, tokenizer: Any, column: str, length: int, special: bool = False) -> DatasetDict:
    """Join each 1,000 texts and cut them into blocks. A row is `input_ids` (length,). What does not fill a block is left out.

    Args:
        special: whether to put the tokenizer's special tokens around each text, and mark them in `special_tokens_mask`
            (length,). Otherwise each text is followed by an end token.

    Raises:
        ValueError: no 1,000 texts of a split fill a block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def cut(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if special:
            columns = tokenizer(rows[column], return_special_tokens_mask=True, return_token_type_ids=False, verbose=False)
            columns = {name: columns[name] for name in ("input_ids", "special_tokens_mask")}
        else:
            encoded = tokenizer(rows[column], add_special_tokens=False, verbose=False)["input_ids"]
            columns = {"input_ids": [[*tokens, *end] for tokens in encoded]}
        streams = {name: [token for tokens in column for token in tokens] for name, column in columns.items()}
        whole = len(streams["input_ids"]) // length * length
        return {name: [stream[i : i + length] for i in range(0, whole, length)] for name, stream in streams.items()}

    cuts = tables.map(cut, batched=True, remove_columns=tables["train"].column_names, desc="Tokens in blocks")
    for name, rows in cuts.items():
        if not len(rows):
            raise ValueError(
                f"the {name} rows have fewer than {length} tokens in each 1,000: give more or longer rows, or smaller blocks."
            )
    return cuts
