"""Operands and results of attention's primitives."""

# Axes of operands and results: batch, queries n, keys m, heads, channels d and e.
AXES = {
    "query": "bnhd",
    "key": "bmhd",
    "value": "bmhe",
    "mask": "bm",
    "output": "bnhe",
    "lse": "bhn",
}
INPUTS = ("query", "key", "value", "mask")
TANGENTS = ("query", "key", "value")
# Primitive: its operands, its results, and its matrix products over d and over e channels.
SIGNATURES = {
    "attention": (INPUTS, ("output", "lse"), (1, 1)),
    "attention_with_tangent": (
        (*INPUTS, *TANGENTS),
        ("output", "lse", "output", "lse"),
        (3, 3),
    ),
    "attention_tangent": ((*INPUTS, "output", "lse", *TANGENTS), ("output", "lse"), (3, 2)),
    "attention_backward": (
        (*INPUTS, "output", "lse", "output", "lse"),
        ("query", "key", "value"),
        (3, 2),
    ),
    "attention_curvature": (
        (*INPUTS, "lse", *TANGENTS, *TANGENTS, "lse"),
        ("output", "lse"),
        (7, 3),
    ),
}


def operand_names(primitive: str, masked: bool) -> list[str]:
    return [name for name in SIGNATURES[primitive][0] if masked or name != "mask"]


def split_operands(operands, masked: bool):
    """(query, key, value, mask or None), the rest."""
    if masked:
        return tuple(operands[:4]), tuple(operands[4:])
    return (*operands[:3], None), tuple(operands[3:])
