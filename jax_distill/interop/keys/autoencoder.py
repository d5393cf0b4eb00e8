"""Which tensor of diffusers' `AutoencoderKL` is which parameter of `models.autoencoder`."""

from jax_distill.interop.keys.table import CONV_RULES, LINEAR_RULES, NORM_RULES, KeyTable, under

_RESNET = (
    *under("norm1", "norm1", NORM_RULES),
    *under("conv1", "conv1", CONV_RULES),
    *under("norm2", "norm2", NORM_RULES),
    *under("conv2", "conv2", CONV_RULES),
    *under("conv_shortcut", "shortcut", CONV_RULES),
)

_SHARED = (
    *under("conv_in", "conv_in", CONV_RULES),
    *under("mid_block.resnets.0", "middle/resnet_in", _RESNET),
    *under("mid_block.attentions.0.group_norm", "middle/attention/norm", NORM_RULES),
    *under("mid_block.attentions.0.to_q", "middle/attention/query", LINEAR_RULES),
    *under("mid_block.attentions.0.to_k", "middle/attention/key", LINEAR_RULES),
    *under("mid_block.attentions.0.to_v", "middle/attention/value", LINEAR_RULES),
    *under("mid_block.attentions.0.to_out.0", "middle/attention/out", LINEAR_RULES),
    *under("mid_block.resnets.1", "middle/resnet_out", _RESNET),
    *under("conv_norm_out", "norm_out", NORM_RULES),
    *under("conv_out", "conv_out", CONV_RULES),
)

AUTOENCODER_KEYS = KeyTable(
    (
        *under("encoder", "encoder", _SHARED),
        *under("encoder.down_blocks.{i}.resnets.{j}", "encoder/levels/{i}/resnets/{j}", _RESNET),
        *under(
            "encoder.down_blocks.{i}.downsamplers.0.conv",
            "encoder/levels/{i}/resample/conv",
            CONV_RULES,
        ),
        *under("decoder", "decoder", _SHARED),
        *under("decoder.up_blocks.{i}.resnets.{j}", "decoder/levels/{i}/resnets/{j}", _RESNET),
        *under(
            "decoder.up_blocks.{i}.upsamplers.0.conv",
            "decoder/levels/{i}/resample/conv",
            CONV_RULES,
        ),
    )
)
