"""Which tensor of transformers' `T5EncoderModel` is which parameter of `models.t5`.

transformers ties the embedding table under two names; a saved folder holds either or both.
"""

from collections.abc import Collection

from jax_distill.interop.keys.table import LINEAR_RULES, NORM_RULES, KeyTable, Rule, under

EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight")

_BLOCK = (
    *under("layer.0.layer_norm", "attention_norm", NORM_RULES),
    *under("layer.0.SelfAttention.q", "query", LINEAR_RULES),
    *under("layer.0.SelfAttention.k", "key", LINEAR_RULES),
    *under("layer.0.SelfAttention.v", "value", LINEAR_RULES),
    *under("layer.0.SelfAttention.o", "attention_out", LINEAR_RULES),
    *under("layer.1.layer_norm", "mlp_norm", NORM_RULES),
    *under("layer.1.DenseReluDense.wi_0", "mlp_gate", LINEAR_RULES),
    *under("layer.1.DenseReluDense.wi_1", "mlp_in", LINEAR_RULES),
    *under("layer.1.DenseReluDense.wo", "mlp_out", LINEAR_RULES),
)

_RULES = (
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias"),
    *under("encoder.block.{layer}", "blocks", _BLOCK),
    *under("encoder.final_layer_norm", "norm_out", NORM_RULES),
)


def t5_keys(names: Collection[str] = EMBEDDING_NAMES[:1]) -> KeyTable:
    """The key table of a folder.

    Args:
      names: of all its tensors; by default the table is that of the folders that transformers
        writes, with the embedding as `shared.weight` alone.

    Returns:
      A table that has the embedding under those of its two names that are there.
    """
    embeddings = [name for name in EMBEDDING_NAMES if name in names] or EMBEDDING_NAMES[:1]
    return KeyTable((*(Rule(name, "token_embedding") for name in embeddings), *_RULES))


T5_KEYS = t5_keys()
