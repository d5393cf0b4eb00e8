"""Which tensor of transformers' `CLIPTextModel` is which parameter of `models.clip`.

Its names begin with `text_model.` in the folders of FLUX and all that transformers 4 wrote, and
without it in a model made by transformers 5; transformers 5 reads both.
"""

from collections.abc import Collection

from jax_distill.interop.keys.table import LINEAR_RULES, NORM_RULES, KeyTable, Rule, under

PREFIX = "text_model."

_BLOCK = (
    *under("layer_norm1", "attention_norm", NORM_RULES),
    *under("self_attn.q_proj", "query", LINEAR_RULES),
    *under("self_attn.k_proj", "key", LINEAR_RULES),
    *under("self_attn.v_proj", "value", LINEAR_RULES),
    *under("self_attn.out_proj", "attention_out", LINEAR_RULES),
    *under("layer_norm2", "mlp_norm", NORM_RULES),
    *under("mlp.fc1", "mlp_in", LINEAR_RULES),
    *under("mlp.fc2", "mlp_out", LINEAR_RULES),
)

_RULES = (
    Rule("embeddings.token_embedding.weight", "token_embedding"),
    Rule("embeddings.position_embedding.weight", "position_embedding"),
    *under("encoder.layers.{layer}", "blocks", _BLOCK),
    *under("final_layer_norm", "norm_out", NORM_RULES),
)

# 0, 1, 2, ..: a buffer that old versions of transformers saved too.
_POSITION_IDS = "embeddings.position_ids"


def clip_keys(names: Collection[str] = (PREFIX,)) -> KeyTable:
    """The key table of a folder.

    Args:
      names: of all its tensors; by default the table is that of FLUX's folders.

    Returns:
      A table of names with the prefix if any of those has it, else of names without it.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    rules = (rule._replace(theirs=prefix + rule.theirs) for rule in _RULES)
    return KeyTable(rules, ignored=(prefix + _POSITION_IDS,))


CLIP_KEYS = clip_keys()
