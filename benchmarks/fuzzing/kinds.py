"""All kinds of inputs, by name."""

from fuzzing import packed, pictures, records, tables, weights
from fuzzing.kind import Kind

KINDS: dict[str, Kind] = {
    **tables.KINDS,
    **records.KINDS,
    **pictures.KINDS,
    **packed.KINDS,
    **weights.KINDS,
}
