"""Prompts over time: the grammar, the chunk of a time, and the blend."""

import pytest
import torch
from tiny_wan import caption

from diagonal_sampler.prompt_schedule import (
    ChunkPrompt,
    PromptTime,
    context_at,
    cut_chunks,
    parse_prompts,
    recached_chunks,
    require_order,
    schedule_row,
    seen_from,
)


def test_rows_are_times_and_prompts():
    rows = parse_prompts("0: a cat: sleeps\n\n# later\n 5s : b\n1.5m:c\nCHUNK 12: d\n.5 min: e\n2h: f")
    assert [(row.row, str(row.at), row.text) for row in rows] == [
        (1, "0s", "a cat: sleeps"),
        (4, "5s", "b"),
        (5, "90s", "c"),
        (6, "chunk 12", "d"),
        (7, "30s", "e"),
        (8, "7200s", "f"),
    ]


def test_units_may_be_written_out():
    rows = parse_prompts(
        "0 seconds: a\n1 second: b\n2secs: c\n1 minute: d\n2 Minutes: e\n3mins: f\n1 hour: g\n2 hours: h"
    )
    assert [row.at.value for row in rows] == [0, 1, 2, 60, 120, 180, 3600, 7200]


def test_a_colon_behind_a_time_may_be_full_width():
    """What a Chinese keyboard gives. In a prompt it is a letter like others."""
    rows = parse_prompts("0\uff1aa: b\n5s\uff1a c\uff1ad\n1\uff1a30\uff1ae\n2:00\uff1a f\nchunk 99\uff1ag")
    assert [(str(row.at), row.text) for row in rows] == [
        ("0s", "a: b"), ("5s", "c\uff1ad"), ("90s", "e"), ("120s", "f"), ("chunk 99", "g"),
    ]  # fmt: skip
    for text, expected in (
        ("0\uff1aa", "a"),
        ("a film\uff1aa cat: 3", "a film\uff1aa cat: 3"),
        ("16\uff1a9 photo", "16\uff1a9 photo"),
    ):
        assert [(str(row.at), row.text) for row in parse_prompts(text)] == [("0s", expected)]
    assert parse_prompts("0: a\uff1ab\n5: c")[0].text == "a\uff1ab"
    with pytest.raises(ValueError, match="Row 2 begins with '5 days', whose unit 'days' is unknown"):
        parse_prompts("0: a\n5 days\uff1ab")


def test_a_byte_order_mark_is_no_letter():
    assert [(str(row.at), row.text) for row in parse_prompts("\ufeff0: a\n\ufeff# b\n \ufeff 5: c")] == [
        ("0s", "a"),
        ("5s", "c"),
    ]


@pytest.mark.parametrize(
    ("row", "either", "other"),
    [("5:16:9 video", "'5:16: 9...'", "'5: 16:9...'"), ("1:02:03:4 cats", "'1:02:03: 4...'", "'1: 02:03:4...'")],
)
def test_a_number_straight_behind_a_clock_is_not_guessed_at(row, either, other):
    for text in (f"0: a\n{row}", row):
        with pytest.raises(
            ValueError, match=f"whose time may end at either colon. Write {either} or {other}, with a blank"
        ):
            parse_prompts(text)
    rows = parse_prompts("0:05: b\n5: 16:9 c\n0:16: 9 d\n1:02:03: e\n1:02:04:f")
    assert [(row.at.value, row.text) for row in rows] == [
        (5, "b"), (5, "16:9 c"), (16, "9 d"), (3723, "e"), (3724, "f"),
    ]  # fmt: skip


def test_a_single_prompt_needs_no_time():
    (row,) = parse_prompts("# of a batch\n a red circle moves right ")
    assert (row.row, str(row.at), row.text) == (2, "0s", "a red circle moves right")


@pytest.mark.parametrize(
    "text", ["a portrait: an old man", "(dog:1.2) runs", "16:9 photo of a cat", "10 cats: a film", "http://a.b/c"]
)
def test_a_single_prompt_may_have_colons(text):
    (row,) = parse_prompts(text)
    assert (str(row.at), row.text) == ("0s", text)


def test_a_time_may_be_a_clocks():
    rows = parse_prompts("0:00: a\n1:30: b: c\n2:00:05 : 30: d\n277:46:41: e\n277777:46:39: f")
    assert [(row.at.value, row.text) for row in rows] == [
        (0, "a"), (90, "b: c"), (7205, "30: d"), (1_000_001, "e"), (999_999_999, "f"),
    ]  # fmt: skip
    assert [str(row.at) for row in rows[3:]] == ["1000001s", "999999999s"]
    (row,) = parse_prompts("0:00: alone")
    assert (row.at.value, row.text) == (0, "alone")


@pytest.mark.parametrize("text", ["0: a cat", "0:a cat", "0s:3 cats", "0 : a cat"])
def test_a_single_row_may_have_its_time(text):
    (row,) = parse_prompts(text)
    assert str(row.at) == "0s" and row.text in ("a cat", "3 cats")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "text has no prompt"),
        ("# only this", "text has no prompt"),
        ("0: a\nb goes on", "Row 2 is 'b goes on'.* if this row belongs to the prompt above, put it all on one line"),
        ("a\nb", "Row 1 is 'a'.* A prompt is one row: if it goes on in the rows below, put it all on one line"),
        ("a scene: a cat\n5: b", "Row 1 is 'a scene: a cat'"),
        ("0: a\nb: c", "Row 2 is 'b: c'"),
        ("0: a\n1:30 a blue circle", "Row 2 begins with '1:30' and no colon behind it. Write '1:30: ...', or a blank"),
        ("0: a\n0:01:30 one: two", "Row 2 begins with '0:01:30' and no colon behind it"),
        ("0: a\n5 days: c", "Row 2 begins with '5 days', whose unit 'days' is unknown"),
        ("chunk 3s: c", "unit 's' is unknown"),
        ("chunk 0: c", "chunk is 0; chunks are whole numbers and count from 1"),
        ("chunk 1.5: c", "chunk is 1.5"),
        (f"0: a\n{'9' * 300}h: b", "it must be from 0 to 1e.09"),
        ("0: a\n277777:46:41: b", "Row 2 begins with '277777:46:41': The time is 1e.09; it must be from 0 to 1e.09"),
        (f"0: a\n{'9' * 400}:00: b", "Row 2 begins with '9+:00': The time is inf; it must be"),
        ("-1: c", "Row 1 is '-1: c'.*count from 1\\)\\.$"),
        ("0: a\n3:  ", "Row 2 \\(3s\\) has no prompt"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        parse_prompts(text)


def test_times_must_rise():
    times = [(f"row {row.row}", row.at) for row in parse_prompts("0: a\nchunk 2: b\n5: c\nchunk 9: d")]
    require_order(times)
    with pytest.raises(ValueError, match="row 3 \\(4s\\) comes after row 2 \\(5s\\)"):
        require_order([("row 1", PromptTime(0)), ("row 2", PromptTime(5)), ("row 3", PromptTime(4))])
    with pytest.raises(ValueError, match="must rise"):
        require_order([("row 1", PromptTime(3, "chunk")), ("row 2", PromptTime(3, "chunk"))])


@pytest.mark.parametrize("given", [0, 1, 3, 4])
@pytest.mark.parametrize("size", [1, 3])
def test_a_time_is_in_the_chunk_that_shows_it(given, size):
    fps = 16.0
    shown = {0: 0, **{frame: (frame - 1) // 4 + 1 for frame in range(1, 200)}}  # pixel frame -> latent frame
    for frame in range(200):
        chunk = PromptTime(frame / fps).chunk(fps, size, given)
        start = given + chunk * size
        assert chunk == 0 if shown[frame] < given else start <= shown[frame] < start + size
    assert PromptTime(7, "chunk").chunk(fps, size, given) == 6


def test_a_time_that_is_a_whole_frame_counts_as_that_frame():
    """0.29 s at 100 frames a second is frame 29, which the eighth latent frame begins with; as floats it is less."""
    assert 0.29 * 100 < 29
    assert PromptTime(0.29).chunk(100.0, 1) == 8 and PromptTime(0.2899).chunk(100.0, 1) == 7


def prompts(*parts):
    return [
        ChunkPrompt(chunk=chunk, text=str(at), context=caption(at), switch=switch, blend_chunks=over)
        for at, (chunk, switch, over) in enumerate(parts)
    ]


def test_a_switch_is_at_once_and_a_blend_in_equal_steps():
    found = prompts((0, "keep", 1), (2, "keep", 1), (5, "blend", 3))
    a, b, c = (caption(at) for at in range(3))
    expected = [a, a, b, b, b, 0.75 * b + 0.25 * c, 0.5 * b + 0.5 * c, 0.25 * b + 0.75 * c, c, c]
    for chunk, wanted in enumerate(expected):
        torch.testing.assert_close(context_at(found, chunk), wanted)


def test_a_blend_that_is_interrupted_goes_on_from_where_it_was():
    found = prompts((0, "keep", 1), (2, "blend", 3), (4, "blend", 1))
    a, b, c = (caption(at) for at in range(3))
    torch.testing.assert_close(context_at(found, 3), (a + b) / 2)
    torch.testing.assert_close(context_at(found, 4), ((a + b) / 2 + c) / 2)
    assert context_at(found, 5) is found[2].context


def test_a_clip_that_begins_with_a_blend_has_nothing_to_blend_from():
    found = prompts((0, "blend", 3), (4, "keep", 1))
    assert all(context_at(found, chunk) is found[0].context for chunk in range(4))
    assert [seen_from(found, chunk) for chunk in range(5)] == [0, 0, 0, 0, 1]


def test_any_number_of_blends_may_begin_within_blends():
    found = prompts((0, "keep", 1), *((chunk, "blend", 4) for chunk in range(1, 3000)))
    assert torch.isfinite(context_at(found, 2999)).all()
    assert seen_from(found, 2999) == 0


def test_only_prompts_that_a_later_chunk_shows_are_seen():
    found = prompts((0, "keep", 1), (2, "recache", 1), (5, "blend", 3), (6, "blend", 1), (9, "keep", 1), (9, "keep", 1))
    assert [seen_from(found, chunk) for chunk in range(11)] == [0, 0, 1, 1, 1, 1, 1, 3, 3, 5, 5]
    for chunk in range(11):
        for later in range(chunk, 11):
            assert torch.equal(context_at(found[seen_from(found, chunk) :], later), context_at(found, later))


def test_prompts_of_other_lengths_cannot_be_blended():
    found = prompts((0, "keep", 1), (2, "blend", 1))
    longer = ChunkPrompt(chunk=4, text="long", context=torch.zeros(1, 7, 8), switch="blend")
    with pytest.raises(ValueError, match="'long' has 7 tokens and the one before it 5.*recache or keep"):
        context_at([*found, longer], 4)


def test_only_recache_recaches_and_the_last_of_a_chunk_counts():
    found = prompts((0, "recache", 1), (2, "recache", 1), (3, "recache", 1), (3, "keep", 1))
    assert recached_chunks(found) == [2]
    assert recached_chunks(found[:3]) == [2, 3] and recached_chunks(found[:1]) == []
    assert recached_chunks(found, 0) == [0, 2], "behind given frames the first chunk has a window, too"
    assert context_at(found, 3) is found[3].context


def test_a_cut_is_at_once_and_never_in_the_first_chunk():
    found = prompts((0, "cut", 1), (2, "cut", 1), (3, "cut", 1), (3, "recache", 1), (5, "blend", 2), (6, "cut", 1))
    assert cut_chunks(found) == [2, 6] and cut_chunks(found[:1]) == []
    assert recached_chunks(found, 0) == [3], "of those of one chunk, the last counts"
    assert context_at(found, 2) is found[1].context and context_at(found, 6) is found[5].context
    assert [seen_from(found, chunk) for chunk in range(7)] == [0, 0, 1, 3, 3, 3, 5]


def test_steps_begin_anew_at_a_recache_and_a_cut_only():
    found = prompts((0, "recache", 1), (2, "recache", 1), (4, "keep", 1), (5, "blend", 2), (7, "cut", 1))
    begun = [*recached_chunks(found), *cut_chunks(found)]
    assert [schedule_row(begun, chunk) for chunk in range(9)] == [0, 1, 0, 1, 2, 3, 4, 0, 1]
    assert [schedule_row([], chunk) for chunk in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"switch": "wipe"}, "switch is 'wipe'; choose one of recache, keep, blend, cut"),
        ({"blend_chunks": 0}, "blend_chunks is 0"),
    ],
)
def test_bad_switches_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        ChunkPrompt(chunk=0, text="", context=caption(0), **change)
