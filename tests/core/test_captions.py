"""The caption language and its encoder."""

from __future__ import annotations

import pytest
import torch

from diagonal_sampler.captions import (
    ROLES,
    CaptionEncoder,
    CaptionEncoderConfig,
    SpriteSpec,
    caption_of,
    known_words,
    load_caption_encoder,
    parse_caption,
    save_caption_encoder,
    tokenize_captions,
)


def encoder() -> CaptionEncoder:
    torch.manual_seed(0)
    return CaptionEncoder(CaptionEncoderConfig(text_dim=16, num_heads=2)).eval()


def test_every_sprite_survives_caption_and_parser() -> None:
    specs = [SpriteSpec(s, c, d, v) for s in ROLES["shape"] for c in ROLES["colour"] for d in ROLES["direction"]
             for v in ROLES["speed"]]  # fmt: skip
    for first, second in zip(specs, reversed(specs), strict=True):
        assert parse_caption(caption_of([first])) == (first,)
        assert parse_caption(caption_of([first, second])) == (first, second)


@pytest.mark.parametrize(
    "caption",
    ["A Red circle moves RIGHT.", "red circle right", "moving right, the red circle", "a red circle moves right"],
)
def test_case_punctuation_and_order_do_not_matter(caption: str) -> None:
    assert parse_caption(caption) == (SpriteSpec("circle", "red", "right"),)


def test_a_word_that_cannot_be_printed_is_named_in_a_message_that_can() -> None:
    with pytest.raises(ValueError, match=r"does not know: x, \\ud800") as found:
        parse_caption("\ud800 x")
    assert str(found.value).encode()


def test_an_unknown_word_is_named_and_the_known_ones_are_listed() -> None:
    with pytest.raises(ValueError) as error:
        parse_caption("a purple elephant moves left")
    message = str(error.value)
    assert "purple" in message and "elephant" in message
    missing = [word for word in known_words() if word not in message]
    assert not missing


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a red circle", "no direction"),
        ("a circle moves left", "no colour"),
        ("a red thing and".replace("thing", "circle moves left"), "no shape"),
        ("a red blue circle moves left", "two colours"),
        (" and ".join(["a red circle moves left"] * 3), "3 clauses"),
    ],
)
def test_a_caption_that_says_too_little_or_too_much_is_refused(caption: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_caption(caption)


def test_empty_captions_are_unconditional_and_share_one_embedding() -> None:
    assert parse_caption("") == parse_caption(" , ") == ()
    assert not tokenize_captions(["", " "]).any()
    made = encoder().encode(["", " ", "a red circle moves left"])
    assert torch.allclose(made[0], made[1], atol=1e-6)  # rows of a batch may round differently
    assert not torch.allclose(made[0], made[2])


def test_the_output_has_a_fixed_length_and_no_row_sees_another() -> None:
    model = encoder()
    captions = ["a red circle moves left", "a blue cross moves up and a green square moves down fast", ""]
    together = model.encode(captions)
    assert together.shape == (3, model.num_tokens, 16)
    for row, caption in enumerate(captions):
        torch.testing.assert_close(together[row], model.encode([caption])[0])


def test_binding_reaches_the_output() -> None:
    """Swapping the colours of two sprites keeps the bag of words and must change the context."""
    made = encoder().encode(
        ["a red circle moves left and a blue square moves up", "a blue circle moves left and a red square moves up"]
    )
    assert (made[0] - made[1]).abs().max() > 0.1


def test_a_saved_encoder_loads_equal(tmp_path) -> None:
    model, path = encoder(), tmp_path / "text.safetensors"
    save_caption_encoder(model, path, {"data": "none"})
    captions = ["a cyan triangle moves down slowly"]
    torch.testing.assert_close(load_caption_encoder(path).encode(captions), model.encode(captions))
    assert [file.name for file in tmp_path.iterdir()] == ["text.safetensors"]


def test_another_file_is_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no 'caption_encoder' entry .* not a caption encoder; give the demo_text"):
        load_caption_encoder(tmp_path / "x.safetensors")
