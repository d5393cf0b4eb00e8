"""Files that are no plain network are named for what they are, and nothing is made of them."""

import json

import numpy as np
import pytest
import random_files
import torch
from safetensors.numpy import save_file

from jax_distill.runs.porting import port

LINEAR = "single_transformer_blocks.0.proj_mlp"
CASES = {
    "nf4": (f"{LINEAR}.weight.absmax", "is quantised by bitsandbytes"),
    "nf4 state": (f"{LINEAR}.weight.quant_state.bitsandbytes__nf4", "by bitsandbytes"),
    "int8": (f"{LINEAR}.SCB", "by bitsandbytes"),
    "gptq": (f"{LINEAR}.qweight", "quantised .as GPTQ, AWQ, SVDQuant, quanto"),
    "awq": (f"{LINEAR}.qzeros", "quantised .as GPTQ, AWQ, SVDQuant, quanto"),
    "svdquant": (f"{LINEAR}.wscales", "quantised .as GPTQ, AWQ, SVDQuant, quanto"),
    "quanto": (f"{LINEAR}.weight._data", "quantised .as GPTQ, AWQ, SVDQuant, quanto"),
    "nvfp4": (f"{LINEAR}.weight_scale_2", "in blocks of small numbers"),
    "peft": (f"transformer.{LINEAR}.lora_A.weight", "is an adapter, not a network; fuse it"),
    "diffusers lora": (f"{LINEAR}.lora_B.default.weight", "is an adapter"),
    "kohya": ("lora_unet_single_blocks_0_linear1.lora_down.weight", "is an adapter"),
    "kohya alpha": ("lora_unet_single_blocks_0_linear1.alpha", "is an adapter"),
    "xlabs lora": ("double_blocks.0.processor.qkv_lora1.down.weight", "is an adapter"),
    "lycoris": ("lycoris_single_blocks_0_linear1.lokr_w1", "is an adapter"),
    "controlnet": ("controlnet_blocks.0.weight", "is a ControlNet, no transformer of FLUX"),
    "union": ("controlnet_x_embedder.weight", "is a ControlNet"),
    "ip adapter": ("image_proj.proj.0.weight", "is an IP-Adapter"),
    "ip keys": ("ip_adapter.0.to_k_ip.weight", "is an IP-Adapter"),
}
ALONE = {
    "t5": ("encoder.block.0.layer.0.SelfAttention.q.weight", "looks like a text encoder"),
    "clip": ("text_model.encoder.layers.0.layer_norm1.weight", "looks like a text encoder"),
    "vae": ("decoder.up_blocks.0.resnets.0.conv1.weight", "looks like an autoencoder"),
    "ae": ("encoder.down.0.block.0.conv1.weight", "looks like an autoencoder"),
    "other": ("model.layers.0.weight", "its tensors have other names"),
}


def _refused(path, tmp_path, message):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        port(path, tmp_path / "out")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_quantised_files_and_adapters_are_named(tmp_path, case, ending):
    name, message = CASES[case]
    arrays = {f"{LINEAR}.weight": np.zeros((4, 1), np.uint8), name: np.zeros((2, 2), np.uint8)}
    path = tmp_path / f"x.{ending}"
    if ending == "pt":
        torch.save({k: torch.from_numpy(x) for k, x in arrays.items()}, path)
    else:
        save_file(arrays, path)
    _refused(path, tmp_path, message)


@pytest.mark.parametrize("case", ALONE)
def test_other_networks_hold_no_transformer(tmp_path, case):
    name, message = ALONE[case]
    save_file({name: np.zeros((2, 2), np.float32)}, tmp_path / "x.safetensors")
    _refused(tmp_path / "x.safetensors", tmp_path, f"no transformer of FLUX .*{message}")


@pytest.mark.parametrize("ending", ["gguf", "safetensors", "bin"])
def test_gguf_is_known_by_its_first_bytes(tmp_path, ending):
    (tmp_path / f"x.{ending}").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    _refused(
        tmp_path / f"x.{ending}", tmp_path, "in GGUF's format, .* give the network in bfloat16"
    )


def test_endings_that_are_not_known_are_named(tmp_path):
    (tmp_path / "x.onnx").write_bytes(bytes(64))
    _refused(
        tmp_path / "x.onnx", tmp_path, "of an unknown kind; known endings: .safetensors, .sft, .pt"
    )


def test_a_folder_that_says_that_it_is_quantised(tmp_path):
    folder = tmp_path / "transformer"
    random_files.save_transformer(folder, random_files.state_dict())
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(values))
    _refused(folder, tmp_path, r"weights are quantised \(bitsandbytes\), which is not read here")
