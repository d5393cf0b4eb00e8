"""Key tables translate names and layouts both ways without loss, and refuse what does not fit."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jax_distill.interop.keys.table import (
    CONV_RULES,
    LINEAR_RULES,
    NORM_RULES,
    KeyTable,
    Rule,
    under,
)

TABLE = KeyTable(
    (
        *under("stem", "stem", CONV_RULES),
        *under("heads.{i}.proj", "heads/{i}/out", LINEAR_RULES),
        *under("blocks.{layer}.parts.{i}.linear", "blocks/parts/{i}/linear", LINEAR_RULES),
        *under("blocks.{layer}.norm", "blocks/norm", NORM_RULES),
    )
)
LAYERS = 11  # more than ten: the order is that of numbers, not of digits


def _state_dict(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"stem.weight": (4, 3, 2, 5), "stem.bias": (4,)}
    for i in range(2):
        shapes |= {f"heads.{i}.proj.weight": (6, 4), f"heads.{i}.proj.bias": (6,)}
    for layer in range(LAYERS):
        shapes |= {f"blocks.{layer}.norm.weight": (4,), f"blocks.{layer}.norm.bias": (4,)}
        for i in range(2):
            name = f"blocks.{layer}.parts.{i}.linear"
            shapes |= {f"{name}.weight": (7, 4), f"{name}.bias": (7,)}
    return {k: rng.standard_normal(shape).astype(dtype) for k, shape in shapes.items()}


def _like():
    def linear(*lead, features):
        shape = jax.ShapeDtypeStruct((*lead, 4, features), np.float32)
        return {"kernel": shape, "bias": jax.ShapeDtypeStruct((*lead, features), np.float32)}

    vector = jax.ShapeDtypeStruct((LAYERS, 4), np.float32)
    return {
        "stem": {
            "kernel": jax.ShapeDtypeStruct((2, 5, 3, 4), np.float32),
            "bias": jax.ShapeDtypeStruct((4,), np.float32),
        },
        "heads": {i: {"out": linear(features=6)} for i in range(2)},
        "blocks": {
            "parts": {i: {"linear": linear(LAYERS, features=7)} for i in range(2)},
            "norm": {"scale": vector, "bias": vector},
        },
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_is_exact(dtype):
    theirs = _state_dict(dtype)
    ours = TABLE.to_jax(theirs, _like())
    back = TABLE.from_jax(ours)
    assert back.keys() == theirs.keys()
    for name, array in theirs.items():
        assert back[name].dtype == dtype and back[name].flags.c_contiguous
        np.testing.assert_array_equal(back[name], array)
    again = TABLE.to_jax(back, _like())
    assert jax.tree.structure(again) == jax.tree.structure(_like())
    jax.tree.map(np.testing.assert_array_equal, again, ours)


def test_layouts_and_stacking():
    theirs = _state_dict()
    ours = TABLE.to_jax(theirs, _like())
    x = np.random.default_rng(1).standard_normal(4).astype("f4")
    for layer in range(LAYERS):
        np.testing.assert_allclose(
            x @ ours["blocks"]["parts"][1]["linear"]["kernel"][layer],
            theirs[f"blocks.{layer}.parts.1.linear.weight"] @ x,
            rtol=1e-5,
            atol=1e-6,
        )
    o, i, h, w = 3, 2, 1, 4
    assert ours["stem"]["kernel"][h, w, i, o] == theirs["stem.weight"][o, i, h, w]


def test_indices_may_be_digits():
    ours = TABLE.to_jax(_state_dict(), _like())
    digits = ours | {"heads": {str(i): head for i, head in ours["heads"].items()}}
    assert TABLE.from_jax(digits).keys() == TABLE.from_jax(ours).keys()


def test_a_missing_tensor_is_named():
    theirs = _state_dict()
    del theirs["blocks.10.norm.bias"]
    with pytest.raises(ValueError, match=r"tensor 'blocks\.10\.norm\.bias' is missing\."):
        TABLE.to_jax(theirs, _like())


def test_an_unexpected_tensor_is_named():
    theirs = _state_dict() | {"blocks.11.norm.bias": np.zeros(4)}
    with pytest.raises(ValueError, match=r"tensor 'blocks\.11\.norm\.bias' is not expected\."):
        TABLE.to_jax(theirs, _like())


def test_a_tensor_of_another_shape_is_named():
    theirs = _state_dict()
    theirs["heads.1.proj.weight"] = theirs["heads.1.proj.weight"].T
    with pytest.raises(ValueError, match=r"'heads\.1\.proj\.weight' has shape \(4, 6\) where \(6"):
        TABLE.to_jax(theirs, _like())


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="parameter 'heads/0/extra' has no rule"):
        TABLE.from_jax({"heads": {0: {"extra": np.zeros(2)}}})


def test_a_rule_that_cannot_be_read_both_ways_is_refused():
    for rule in (Rule("a.weight", "a/{i}/scale"), Rule("a.{i}.b.{j}", "a")):
        with pytest.raises(ValueError, match="placeholders"):
            KeyTable((rule,))
