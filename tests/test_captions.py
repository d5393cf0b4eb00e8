"""Laws of captions: they mean what the request says, and the encoder tells meanings apart."""

import numpy as np
import pytest

from jax_distill.worlds.shapes import captions
from jax_distill.worlds.shapes.captions import CONCEPTS, CaptionEncoder, write_caption
from jax_distill.worlds.shapes.renderer import COLORS, SHAPES, held_out_prompts, sample

ENCODER = CaptionEncoder()
RELATIONS = ("left", "right", "above", "below")


def read(caption):
    """Reads a caption back by English grammar, from the encoder's tokens alone.

    Returns:
        (subject, relation, landmark) if it states a relation, else (sorted nouns, number); a noun
        is a (shape, colour or None).
    """
    tokens = ENCODER.concepts(caption)
    nouns, color, number, relation, nouns_before = [], None, None, None, None
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token in COLORS and following in SHAPES:
            color = token
        elif token in COLORS:  # "a circle that is red"
            nouns[-1] = (nouns[-1][0], token)
        elif token in SHAPES:
            nouns.append((token, color))
            color = None
        elif token in RELATIONS:
            relation, nouns_before = token, len(nouns)
        elif token in ("two", "three", "four"):
            number = token
    if relation is None:
        return sorted(nouns, key=str), number
    if nouns_before == 1:  # "A above B"
        return nouns[0], relation, nouns[1]
    # "above B is A", or "B with A above it"
    assert nouns_before == 0 or tokens[-1] == "it"
    return nouns[1], relation, nouns[0]


RED_CIRCLE, BLUE_SQUARE = ("circle", "red"), ("square", "blue")


@pytest.mark.parametrize(
    ("caption", "subject", "relation", "landmark"),
    [
        ("a red circle to the left of a blue square", RED_CIRCLE, "left", BLUE_SQUARE),
        ("to the left of a blue square is a red circle", RED_CIRCLE, "left", BLUE_SQUARE),
        ("a blue square with a red circle on the left of it", RED_CIRCLE, "left", BLUE_SQUARE),
        ("A navy box has a scarlet disc right of it.", RED_CIRCLE, "right", BLUE_SQUARE),
        ("below a blue square is a red circle", RED_CIRCLE, "below", BLUE_SQUARE),
        ("a blue square with a red circle above it", RED_CIRCLE, "above", BLUE_SQUARE),
        ("a red circle sits on top of a blue square", RED_CIRCLE, "above", BLUE_SQUARE),
        ("a picture where under a red ball there is an azure block", BLUE_SQUARE, "below",
         RED_CIRCLE),
        ("there is a cross over a triangle", ("cross", None), "above", ("triangle", None)),
        ("a plus sign has a pyramid underneath it", ("triangle", None), "below", ("cross", None)),
        ("on the right side of a wedge sits a round shape", ("circle", None), "right",
         ("triangle", None)),
    ],
)  # fmt: skip
def test_handwritten_relations_read_right(caption, subject, relation, landmark):
    assert read(caption) == (subject, relation, landmark)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("Draw two crimson plus signs!", ["two", "red", "cross"]),
        ("a photo of 3 round shapes", ["three", "circle"]),
        ("an ebony box next to a golden triangular shape",
         ["black", "square", "and", "yellow", "triangle"]),
        ("a circle that is green", ["circle", "green"]),
        ("the square on the left and the plus on the right",
         ["square", "left", "and", "cross", "right"]),
        ("a fuzzy circle", ["fuzzy", "circle"]),
        ("", []),
    ],
)  # fmt: skip
def test_handwritten_captions_keep_their_concepts(caption, tokens):
    assert ENCODER.concepts(caption) == tokens


def test_grammar_writes_what_is_requested():
    rng = np.random.default_rng(0)
    word_orders = set()
    for index in range(1500):
        request = sample(3, index, "test").request
        caption = write_caption(request, rng)
        pairs = [(shape, color) for shape, color, _ in request.objects]
        if request.relation is not None:
            assert read(caption) == (pairs[0], request.relation, pairs[1]), caption
            tokens = ENCODER.concepts(caption)
            word_orders.add((tokens[0] in RELATIONS, "it" in tokens, request.relation))
        else:
            count = request.objects[0][2]
            number = {1: None, 2: "two", 3: "three", 4: "four"}[count]
            assert read(caption) == (sorted(pairs, key=str), number), caption
    assert len(word_orders) == 3 * 4


def test_grammar_uses_no_unknown_word_and_all_its_words():
    written = set()
    for index in range(4000):
        caption = sample(1, index).caption
        assert set(ENCODER.concepts(caption)) <= set(CONCEPTS), caption
        written.update(caption.split())
    for names in captions.COLOR_NAMES.values():
        assert written.issuperset(names)
    for names in captions.SHAPE_NAMES.values():
        assert all(written.issuperset(f"{one} {many}".split()) for one, many in names)


def test_synonyms_share_features():
    plain = ENCODER.encode(
        ["a red circle above a blue square", "draw a scarlet disc on top of an azure box."]
    )
    varied = ENCODER.encode(
        ["RED Ball over navy block", "the crimson round shape is above a blue box"]
    )
    for a, b in zip(plain, varied, strict=True):
        np.testing.assert_array_equal(a, b)


def test_meanings_differ_in_sequence_and_pooled():
    texts = [
        "a red circle left of a blue square",
        "a blue square left of a red circle",
        "a blue circle left of a red square",
        "a red circle right of a blue square",
        "a red circle and a blue square",
        "two red circles",
        "three red circles",
    ]
    for features in ENCODER.encode(texts):
        flat = features.reshape(len(texts), -1)
        distance = np.linalg.norm(flat[:, None] - flat, axis=-1)
        assert distance[~np.eye(len(texts), dtype=bool)].min() > 1


def test_prompts_of_different_requests_have_different_features():
    prompts = held_out_prompts()
    sequence, pooled = ENCODER.encode([p.caption for p in prompts])
    for features in (sequence, pooled):
        request_of = {}
        for prompt, row in zip(prompts, features, strict=True):
            # Objects of a plain conjunction have no order.
            objects = prompt.request.objects
            if prompt.request.relation is None:
                objects = tuple(sorted(objects, key=str))
            meaning = (objects, prompt.request.relation)
            assert request_of.setdefault(row.tobytes(), meaning) == meaning


def test_shapes_types_and_scale():
    texts = [sample(0, index).caption for index in range(500)]
    sequence, pooled = ENCODER.encode(texts)
    assert sequence.shape == (500, 12, ENCODER.sequence_dim) and sequence.dtype == np.float32
    assert pooled.shape == (500, ENCODER.pooled_dim) and pooled.dtype == np.float32
    assert (ENCODER.sequence_dim, ENCODER.pooled_dim) == (160, 144)
    kept = np.concatenate(
        [s[: len(ENCODER.concepts(t))] for s, t in zip(sequence, texts, strict=True)]
    )
    assert 0.5 < np.mean(kept**2) < 1.5
    assert 0.5 < np.mean(pooled**2) < 1.5


def test_null_caption_and_padding_hold_position_only():
    sequence, pooled = ENCODER.encode(["", "a red circle"])
    assert not pooled[0].any()
    concepts = 3 * captions.CONCEPT_DIM
    assert not sequence[0, :, :concepts].any()
    np.testing.assert_array_equal(sequence[0, 2:], sequence[1, 2:])
    assert len(np.unique(sequence[0], axis=0)) == 12


def test_encoding_does_not_depend_on_the_batch():
    texts = [sample(0, index).caption for index in range(5)]
    together = ENCODER.encode(texts)
    for i, text in enumerate(texts):
        for batch, single in zip(together, ENCODER.encode([text]), strict=True):
            np.testing.assert_array_equal(batch[i], single[0])


def test_unknown_word_hashes_to_fixed_signs():
    vector = captions._concept_vector("zebra")
    np.testing.assert_allclose(np.abs(vector), 1 / np.sqrt(48), rtol=1e-6)
    assert np.packbits(vector > 0).tobytes().hex() == "24a2b00cc096"


def test_too_long_caption_is_refused():
    caption = "red circle and " * 5
    with pytest.raises(ValueError, match=r"keeps 15 tokens.*limit is 12.*max_length=15"):
        ENCODER.encode([caption])
    sequence, _ = CaptionEncoder(max_length=15).encode([caption])
    assert sequence.shape == (1, 15, 160)


def test_a_single_string_is_refused():
    with pytest.raises(TypeError, match="sequence of strings"):
        ENCODER.encode("a red circle")
