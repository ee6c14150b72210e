"""The role of a layer, read from its name: attention's q, k, v, o (separate or fused), mlp, conv, head.

Also the layers that a model itself names as its embedding and its output layer.
"""

import re
from typing import Literal

from torch import nn

# Names in Transformers' model files. A layer's own name decides. If it is ambiguous, the names around it decide.
_PROJECTIONS = {
    "qkv": re.compile(r"c_attn|w?qkv(_proj)?|query_key_value|in_proj_weight|att_proj|w_pack|to_qkv"),
    "kv": re.compile(r"kv|key_value|kv_proj|kv_[ab]_proj(_with_mqa)?|to_kv"),
    "q": re.compile(r"w?q|query(_global|_proj|_projection)?|q_(attn|lin|proj|[ab]_proj)|linear_q|to_q|theta_q"),
    "k": re.compile(r"w?k|key(_global|_proj|_projection)?|k_(lin|proj)|linear_k|to_k|theta_k"),
    "v": re.compile(r"w?v|value(_global|_proj|_projection)?|v_(lin|proj)|linear_v|to_v|theta_v"),
    "o": re.compile(r"w?o|o_proj|out_lin|to_out|linear_out"),
}
_IN_ATTENTION = {
    "qkv": re.compile(r"in_proj|c_qkv"),
    "o": re.compile(r"out_proj|c_proj|dense|proj|projection|out|output|output_proj"),
}
_ATTENTION = re.compile(r".*(attn|attention).*|mha")
_MLP_BLOCK = re.compile(r"\w*mlp\w*|ffn?|\w*feed_?forward|intermediate|densereludense|\w*moe\w*|\w*experts?\w*")
_MLP = re.compile(r"mlp|(fc|lin|linear)_?[12]|c_fc|w[123i]|wi_[01]|(gate|up|down|gate_up)_proj|dense_(h_to_4h|4h_to_h)")
# Modules that activation checkpointing and torch.compile put around others.
_WRAPPERS = {"_checkpoint_wrapped_module", "_orig_mod"}
_HEAD = re.compile(r"lm_head|embed_out|classifier|score|qa_outputs|heads?|cls|logits_proj|out_head|decoder_pred")


def role_of(name: str, default: str, *, is_head: bool = False) -> str:
    """The role of a layer.

    Args:
        name: its dotted name in the model.
        default: the role of its family, 'linear' or 'conv'. A convolution in an mlp keeps the role 'conv'.
        is_head: whether the model names this layer as its output layer.

    Returns:
        One of 'q', 'k', 'v', 'o', 'qkv', 'kv', 'mlp', 'head', or the default.
    """
    if is_head:
        return "head"
    *around, own = [part for part in name.lower().split(".") if not part.isdigit()] or [""]
    in_mlp = any(_MLP_BLOCK.fullmatch(part) for part in around)
    in_attention = any(_ATTENTION.fullmatch(part) for part in around)
    if in_attention or not in_mlp:
        for role, pattern in _PROJECTIONS.items():
            if pattern.fullmatch(own):
                return role
    if in_attention:
        for role, pattern in _IN_ATTENTION.items():
            if pattern.fullmatch(own):
                return role
    if _HEAD.fullmatch(own):
        return "head"
    # BERT's second feed-forward matrix is named `output.dense`.
    if in_mlp or _MLP.fullmatch(own) or around[-1:] == ["output"]:
        return default if default == "conv" else "mlp"
    return default


def end_layer(model: nn.Module, end: Literal["input", "output"]) -> nn.Module | None:
    """The layer that a model of Transformers names as its embedding or its output layer. None: it names none."""
    get = getattr(model, f"get_{end}_embeddings", None)
    try:
        return get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # so Transformers says that there is none
        return None


def plain_name(name: str) -> str:
    """A dotted name without the names of wrapper modules, so that it is the name in the model's class."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by their plain names."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def names_of_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """The plain names of a model's parameters."""
    return {parameter: name for name, parameter in parameters_by_name(model).items()}
