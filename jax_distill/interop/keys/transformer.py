"""Which tensor of diffusers' `FluxTransformer2DModel` is which parameter of `models.mmdit`.

The guidance embedder and the interval embedder are there if the parameters have them. The latter is
T2I-Distill's addition (arXiv:2512.13006), under the name that its MeanFlow checkpoints use.
"""

from jax_distill.interop.keys.table import LINEAR_RULES, NORM_RULES, KeyTable, under

_EMBEDDER = (
    *under("linear_1", "linear_1", LINEAR_RULES),
    *under("linear_2", "linear_2", LINEAR_RULES),
)

_IMAGE_STREAM = (
    *under("norm1.linear", "modulation", LINEAR_RULES),
    *under("attn.to_q", "heads/query", LINEAR_RULES),
    *under("attn.to_k", "heads/key", LINEAR_RULES),
    *under("attn.to_v", "heads/value", LINEAR_RULES),
    *under("attn.norm_q", "heads/query_norm", NORM_RULES),
    *under("attn.norm_k", "heads/key_norm", NORM_RULES),
    *under("attn.to_out.0", "attention_out", LINEAR_RULES),
    *under("ff.net.0.proj", "mlp_in", LINEAR_RULES),
    *under("ff.net.2", "mlp_out", LINEAR_RULES),
)

_TEXT_STREAM = (
    *under("norm1_context.linear", "modulation", LINEAR_RULES),
    *under("attn.add_q_proj", "heads/query", LINEAR_RULES),
    *under("attn.add_k_proj", "heads/key", LINEAR_RULES),
    *under("attn.add_v_proj", "heads/value", LINEAR_RULES),
    *under("attn.norm_added_q", "heads/query_norm", NORM_RULES),
    *under("attn.norm_added_k", "heads/key_norm", NORM_RULES),
    *under("attn.to_add_out", "attention_out", LINEAR_RULES),
    *under("ff_context.net.0.proj", "mlp_in", LINEAR_RULES),
    *under("ff_context.net.2", "mlp_out", LINEAR_RULES),
)

_SINGLE_BLOCK = (
    *under("norm.linear", "modulation", LINEAR_RULES),
    *under("attn.to_q", "heads/query", LINEAR_RULES),
    *under("attn.to_k", "heads/key", LINEAR_RULES),
    *under("attn.to_v", "heads/value", LINEAR_RULES),
    *under("attn.norm_q", "heads/query_norm", NORM_RULES),
    *under("attn.norm_k", "heads/key_norm", NORM_RULES),
    *under("proj_mlp", "mlp_in", LINEAR_RULES),
    *under("proj_out", "out", LINEAR_RULES),
)

TRANSFORMER_KEYS = KeyTable(
    (
        *under("x_embedder", "image_in", LINEAR_RULES),
        *under("context_embedder", "text_in", LINEAR_RULES),
        *under("time_text_embed.timestep_embedder", "time_embedder", _EMBEDDER),
        *under("time_text_embed.guidance_embedder", "guidance_embedder", _EMBEDDER),
        *under("time_text_embed.text_embedder", "pooled_embedder", _EMBEDDER),
        *under("timestep_embedder2", "interval_embedder", _EMBEDDER),
        *under("transformer_blocks.{layer}", "double_blocks/image", _IMAGE_STREAM),
        *under("transformer_blocks.{layer}", "double_blocks/text", _TEXT_STREAM),
        *under("single_transformer_blocks.{layer}", "single_blocks", _SINGLE_BLOCK),
        *under("norm_out.linear", "out_modulation", LINEAR_RULES),
        *under("proj_out", "image_out", LINEAR_RULES),
    )
)
