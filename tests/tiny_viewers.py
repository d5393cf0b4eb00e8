"""Tiny random networks that look at pictures, in folders as they are on the hub."""

import json
from pathlib import Path

import numpy as np
import onnx
import random_text
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, YolosConfig, YolosForObjectDetection

CLASSES = ("kettle", "owl", "ladder", "drum", "mouse")
SIZE = 32


def describe(folder: Path, kind: str, size: dict, **config) -> Path:
    """The files beside a network."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {"id2label": {str(place): name for place, name in enumerate(CLASSES)}}
    written = json.loads(text) if (text := _text(folder / "config.json")) else {}
    (folder / "config.json").write_text(json.dumps({**written, **labels, **config}))
    settings = {"image_processor_type": kind, "size": size, "do_pad": False}
    settings |= {"crop_size": size} if kind.startswith("CLIP") else {}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def yolos(folder: Path) -> Path:
    """A detector of transformers, with weights so large that it is sure of something."""
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[SIZE, SIZE],
        patch_size=8,
        num_detection_tokens=6,
        num_labels=len(CLASSES),
    )
    torch.manual_seed(0)
    model = YolosForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return describe(folder, "YolosImageProcessor", {"height": SIZE, "width": SIZE})


def clip(folder: Path) -> Path:
    """A CLIP of transformers."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    _tokenizer(folder)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 100, **ids},
        vision_config={**small, "image_size": SIZE, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).eval().save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    return describe(folder, "CLIPImageProcessor", size)


def _tokenizer(folder: Path) -> None:
    random_text.write_tokenizers(folder / "tokenizers")
    for path in (folder / "tokenizers/tokenizer").iterdir():
        path.rename(folder / path.name)


def save(path: Path, nodes: list, inputs: list, outputs: list, **constants: np.ndarray) -> None:
    """A network in ONNX; inputs and outputs are (name, type, shape)."""
    graph = helper.make_graph(
        nodes,
        "it",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)


PIXELS = ("pixel_values", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])


def onnx_detector(folder: Path) -> Path:
    """Finds a drum in the upper left quarter, as surely as the picture is bright, and a mouse."""
    folder.mkdir()
    size = {"height": SIZE, "width": SIZE}
    describe(folder, "YolosImageProcessor", size)
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values"], ["mean"], axes=[0, 1, 2, 3], keepdims=0),
        helper.make_node("Reshape", ["mean", "one"], ["bright"]),
        helper.make_node("Concat", ["bright", "sure"], ["scores"], axis=0),
        helper.make_node("Identity", ["all_boxes"], ["boxes"]),
        helper.make_node("Identity", ["all_labels"], ["labels"]),
    ]
    outputs = [("scores", TensorProto.FLOAT, [2]), ("boxes", TensorProto.FLOAT, [2, 4])]
    outputs.append(("labels", TensorProto.INT64, [2]))
    half = SIZE / 2
    boxes = np.array([[0, 0, half, half], [half, half, SIZE + 9, SIZE]], np.float32)
    constants = {"one": np.array([1]), "sure": np.array([0.5], np.float32), "all_boxes": boxes}
    save(folder / "model.onnx", nodes, [PIXELS], outputs, **constants, all_labels=np.array([3, 4]))
    return folder


def onnx_clip(folder: Path) -> Path:
    """A CLIP whose embeddings are linear in pixels, and in which tokens there are."""
    (folder / "onnx").mkdir(parents=True)
    _tokenizer(folder)
    describe(folder, "CLIPImageProcessor", {"height": SIZE, "width": SIZE}, model_type="clip")
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3 * SIZE * SIZE, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["pixel_values"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["image_embeds"]),
    ]
    out = ("image_embeds", TensorProto.FLOAT, ["n", 8])
    save(folder / "onnx/vision_model.onnx", nodes, [PIXELS], [out], weights=weights)
    table = rng.standard_normal((100, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["each"]),
        helper.make_node("ReduceMean", ["each"], ["text_embeds"], axes=[1], keepdims=0),
    ]
    ids = ("input_ids", TensorProto.INT64, ["n", "l"])
    out = ("text_embeds", TensorProto.FLOAT, ["n", 8])
    save(folder / "onnx/text_model.onnx", nodes, [ids], [out], table=table)
    return folder
