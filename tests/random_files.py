"""Files of one random transformer, under the names that they come with."""

import dataclasses
import json

import numpy as np
import random_flux
import random_pipeline
import torch
from safetensors.torch import save_file

from jax_distill import config
from jax_distill.interop import flux_config, orbax_tree
from jax_distill.interop.keys.transformer import TRANSFORMER_KEYS
from jax_distill.interop.parts import tensors_of
from jax_distill.runs.porting import port

NETWORK = dataclasses.replace(random_pipeline.TRANSFORMER, num_layers=2, num_single_layers=3)
SCHNELL = dataclasses.replace(NETWORK, guidance_embeds=False)
BASE_LENGTH = 24


def save_base(root):
    """Ports a random pipeline with a guidance embedder and dynamic shift; returns the folder."""
    random_pipeline.save_random(root / "source", random_pipeline.Sizes(NETWORK))
    port(root / "source", root / "base", text_length=BASE_LENGTH)
    return root / "base"


def bfl_shapes(width=32, head=16, inner=None, guidance=True):
    """Names and shapes of `flux1-*.safetensors`; `inner` in the place of all inputs' widths."""
    shapes = {}

    def linear(name, outputs, inputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inner or inputs), (outputs,)

    linear("img_in", width, 16)
    linear("txt_in", width, 24)
    embedders = {"time_in": 256, "guidance_in": 256, "vector_in": 16}
    for name in embedders if guidance else embedders.keys() - {"guidance_in"}:
        linear(f"{name}.in_layer", width, embedders[name])
        linear(f"{name}.out_layer", width, width)
    for block in (f"double_blocks.{i}.{stream}" for i in range(2) for stream in ("img", "txt")):
        linear(f"{block}_mod.lin", 6 * width, width)
        linear(f"{block}_attn.qkv", 3 * width, width)
        linear(f"{block}_attn.proj", width, width)
        linear(f"{block}_mlp.0", 4 * width, width)
        linear(f"{block}_mlp.2", width, 4 * width)
        shapes[f"{block}_attn.norm.query_norm.scale"] = (head,)
        shapes[f"{block}_attn.norm.key_norm.scale"] = (head,)
    for block in (f"single_blocks.{i}" for i in range(3)):
        linear(f"{block}.modulation.lin", 3 * width, width)
        linear(f"{block}.linear1", 7 * width, width)
        linear(f"{block}.linear2", width, 5 * width)
        shapes[f"{block}.norm.query_norm.scale"] = shapes[f"{block}.norm.key_norm.scale"] = (head,)
    linear("final_layer.linear", 16, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return shapes


def random_arrays(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shapes[name], np.float32) for name in sorted(shapes)}


def state_dict(network=NETWORK, interval=False, dtype=torch.float32):
    """A transformer's tensors under diffusers' names, with the second time embedder if asked."""
    state = random_flux.reference(network).state_dict()
    if interval:
        torch.manual_seed(1)
        width = network.hidden_size
        for number, inputs in ((1, 256), (2, width)):
            state[f"timestep_embedder2.linear_{number}.weight"] = torch.randn(width, inputs) / 16
            state[f"timestep_embedder2.linear_{number}.bias"] = torch.randn(width)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def save_transformer(folder, state, network=NETWORK, **keys):
    """A transformer's folder as diffusers saves it, with more keys in its config."""
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    values = flux_config.to_diffusers(network) | keys
    (folder / "config.json").write_text(json.dumps(values))


def arrays(state):
    return {name: tensor.numpy() for name, tensor in state.items()}


def loss_head(width=NETWORK.hidden_size):
    """What T2I-Distill's sCM students have for training alone."""
    return {"logvar_linear.weight": torch.randn(1, width), "logvar_linear.bias": torch.zeros(1)}


def network_of(folder):
    """The tensors of a ported folder's network under diffusers' names."""
    tensors = tensors_of(orbax_tree.open_tree(folder / "network"), TRANSFORMER_KEYS)
    return {name: tensor.read() for name, tensor in tensors.items()}


def assert_same_tensors(folder, expected):
    found = network_of(folder)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)


def factors(folder):
    """Time scale and guidance factor of a ported folder."""
    model = config.load(folder).model
    return model.time_scale, model.guidance_factor


# Damages to one of a file's tensors, arrays by name.


def pop(tensors, name):
    del tensors[name]


def widen(tensors, name):
    tensors[name] = np.zeros((2, *tensors[name].shape), tensors[name].dtype)


def infinite(tensors, name):
    tensors[name] = np.full_like(tensors[name], np.inf)
