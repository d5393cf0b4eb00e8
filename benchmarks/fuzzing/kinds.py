"""All kinds of inputs, by name."""

from fuzzing import pictures, records, tables, weights
from fuzzing.kind import Kind

KINDS: dict[str, Kind] = {
    **tables.KINDS,
    **records.KINDS,
    **pictures.KINDS,
    **weights.KINDS,
}
