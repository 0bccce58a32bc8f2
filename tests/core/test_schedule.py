"""The schedule against METHOD's numbers, its counts, and what it says of bad input."""

import random
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from diagonal_sampler.schedule import (
    CONTEXT_MODES,
    DEFAULT_PRESET,
    DEMO_PRESET,
    MAX_LISTED_STEPS,
    MAX_STEPS,
    PRESETS,
    UNINFORMATIVE_SIGMA,
    DiagonalSchedule,
    parse_sigmas,
    parse_steps,
    same_levels,
    same_steps,
    select_times,
    shift_sigma,
)

FOUR = (1000.0, 933.063, 732.616, 357.143)
THREE = (1000.0, 933.063, 357.143)
TWO = (1000.0, 357.143)
SELF_FORCING = (1000.0, 937.5, 833.3333, 625.0)
WARPED = (1000.0, 937.5, 833.3333, 357.143)
KREA = (1000.0, 937.0, 833.0, 625.0)

PUBLISHED = {
    "diagonal 4-3-2": ((FOUR, THREE, TWO, TWO, TWO, TWO, TWO), "noisy", None, 17),
    "diagonal 4-2": ((FOUR, TWO, TWO, TWO, TWO, TWO, TWO), "noisy", None, 16),
    "diagonal 4-3-2 warped": ((WARPED, (*WARPED[:2], WARPED[3]), *(TWO,) * 5), "noisy", None, 17),
    "self forcing": ((SELF_FORCING,) * 7, "clean", None, 35),
    "causvid": (((1000.0, 756.757, 521.739),) * 7, "clean", None, 28),
    "causvid 14b": (
        ((1000.0, 934.307, 862.745, 756.757, 603.774, 410.256, 250.0, 140.351, 74.766),) * 7,
        "clean",
        None,
        70,
    ),
    "longlive": ((SELF_FORCING,) * 7, "clean", None, 35),
    "causal forcing": ((SELF_FORCING,) * 7, "clean", None, 35),
    "causal forcing framewise": ((SELF_FORCING,) * 7, "clean", 1, 35),
    "causal forcing++": ((SELF_FORCING, *((1000.0, 833.3333),) * 6), "clean", 1, 23),
    "krea": ((KREA,) * 7, "clean", None, 35),
}


def flat(rows) -> list[float]:
    return [value for row in rows for value in row]


def test_every_preset_is_checked():
    assert set(PUBLISHED) | {"undistilled", DEMO_PRESET} == set(PRESETS)
    assert DEFAULT_PRESET == "diagonal 4-3-2"
    # Of presets with the same steps a file that states no levels is taken for the first one's.
    assert next(iter(PRESETS)) == DEFAULT_PRESET


def table_rows(page: str, title: str) -> list[tuple[str | None, list[str]]]:
    """The rows of a page's table of checkpoints: the preset, None for none, and the numbers for window and sink."""
    text = (Path(__file__).resolve().parents[2] / page).read_text(encoding="utf-8")
    lines = text[text.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    rows = []
    for line in lines:
        preset, window = [cell.strip() for cell in line.split("|")][2:4]
        named = [name for name in PRESETS if preset.startswith(name)]
        rows.append((max(named, key=len, default=None), re.findall(r"-?\d+", window)))
    return rows


def test_the_tables_of_checkpoints_name_every_preset_and_agree():
    english, chinese = (
        table_rows(f"web/docs/DiagonalSchedule{page}", title)
        for page, title in ((".md", "checkpoint"), ("/zh.md", "\u6743\u91cd"))
    )
    readme = table_rows("README.md", "checkpoint")
    assert english == chinese
    assert {name for name, _ in english} == {*PRESETS, None}
    assert {name for name, _ in readme} == {*PRESETS, None} - {"diagonal 4-2"}
    own = [[window[:2] for name, window in rows if name == "undistilled"] for rows in (english, readme)]
    assert own == [[["12", "3"], ["-1", "0"]]] * 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_timesteps(name):
    rows, context_mode, frames_per_chunk, nfe = PUBLISHED[name]
    schedule = DiagonalSchedule.preset(name)
    assert [schedule.steps(chunk) for chunk in range(7)] == [len(row) for row in rows]
    timesteps = flat([1000 * sigma for sigma in schedule.chunk_sigmas(chunk)] for chunk in range(7))
    assert timesteps == pytest.approx(flat(rows), abs=1e-3)
    assert schedule.context_mode == context_mode
    assert schedule.frames_per_chunk == frames_per_chunk
    assert schedule.nfe(7) == nfe


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_number_of_steps_keeps_first_and_last_and_descends(name):
    rows = PUBLISHED[name][0]
    published, by_length = rows[0], {len(row): row for row in rows}
    for steps in range(1, 61):
        row = DiagonalSchedule.preset(name, steps=(steps,)).sigmas[0]
        assert len(row) == steps
        assert 1000 * row[0] == pytest.approx(published[0], abs=1e-3)
        if steps > 1:
            assert 1000 * row[-1] == pytest.approx(by_length.get(steps, published)[-1], abs=1e-3)
        assert all(a > b for a, b in zip(row, row[1:], strict=False))


@pytest.mark.parametrize("steps", [99, 100, 101, 500, MAX_STEPS])
def test_large_step_counts_still_descend(steps):
    for name in PRESETS:
        assert DiagonalSchedule.preset(name, steps=(steps,)).steps(0) == steps


def test_more_steps_than_the_list_pass_through_its_entries():
    times = PRESETS["diagonal 4-3-2"].times
    assert select_times(times, 7)[::2] == times
    assert select_times(times, 4) == times


def test_the_demos_preset_has_its_students_levels():
    schedule = DiagonalSchedule.preset(DEMO_PRESET)
    levels = [1, 0.75, 0.5, 0.357142857], [1, 0.75, 0.357142857], [1, 0.357142857]
    assert [list(row) for row in schedule.sigmas] == [pytest.approx(row) for row in levels]
    assert schedule.context_mode == "noisy" and schedule.nfe(7) == 17


def test_shift_of_known_values():
    assert shift_sigma(0.0, 5.0) == 0.0
    assert shift_sigma(1.0, 5.0) == 1.0
    assert shift_sigma(0.5, 5.0) == pytest.approx(5 / 6)
    assert shift_sigma(0.1, 5.0) == pytest.approx(0.357142857)
    assert shift_sigma(0.3, 1.0) == pytest.approx(0.3)


def test_a_presets_shift_can_be_changed():
    row = DiagonalSchedule.preset("self forcing", shift=3.0).sigmas[0]
    assert row == pytest.approx((1.0, 0.9, 0.75, 0.5))
    assert DiagonalSchedule.preset("self forcing", shift=3.0).shift == 3.0


def test_uniform_is_evenly_spaced_before_the_shift():
    assert DiagonalSchedule.uniform(4, shift=1.0).sigmas == ((1.0, 0.75, 0.5, 0.25),)
    assert DiagonalSchedule.uniform(4).sigmas[0] == pytest.approx((1.0, 0.9375, 5 / 6, 0.625))
    assert DiagonalSchedule.uniform(50).nfe(7) == 7 * 51


def test_last_row_repeats():
    schedule = DiagonalSchedule(sigmas=((1.0, 0.5, 0.25), (1.0,)))
    assert [schedule.steps(chunk) for chunk in range(5)] == [3, 1, 1, 1, 1]
    assert schedule.chunk_sigmas(100) == (1.0,)


@pytest.mark.parametrize(
    ("context_mode", "extra", "cache_pass", "given"),
    [("noisy", 0, None, 0.25), ("clean", 1, 0.0, 0.0), ("renoise", 1, 0.0625, 0.0625)],
)
def test_context_modes_count_their_extra_forward(context_mode, extra, cache_pass, given):
    schedule = DiagonalSchedule(sigmas=((1.0, 0.25), (1.0, 0.5)), context_mode=context_mode, context_sigma=0.0625)
    assert schedule.cache_pass_sigma == cache_pass
    assert schedule.given_context_sigma == given
    assert schedule.given_forwards == (2 if context_mode == "noisy" else 1)
    for chunks in range(6):
        assert schedule.nfe(chunks) == (2 + extra) * chunks


def test_nfe_adds_up_over_random_tables():
    rng = random.Random(0)
    for _ in range(100):
        steps = tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 5)))
        mode = rng.choice(CONTEXT_MODES)
        chunks = rng.randint(0, 12)
        counts = (list(steps) + [steps[-1]] * chunks)[:chunks]
        schedule = DiagonalSchedule.from_steps(steps, context_mode=mode)
        assert schedule.nfe(chunks) == sum(counts) + (chunks if mode != "noisy" else 0)


def test_video_to_video_starts_at_its_sigma():
    schedule = DiagonalSchedule.preset("diagonal 4-3-2").start_at(0.8)
    assert schedule.sigmas[0] == pytest.approx((0.8, 0.732616, 0.357143), abs=1e-6)
    assert schedule.sigmas[1] == pytest.approx((0.8, 0.357143), abs=1e-6)
    assert schedule.start_at(0.1).sigmas == ((0.1,), (0.1,), (0.1,))
    whole = DiagonalSchedule.preset("self forcing")
    assert whole.start_at(1.0) == whole


def test_a_chunk_that_begins_below_the_start_is_not_raised_to_it():
    low = DiagonalSchedule(sigmas=((1.0, 0.9, 0.4), (0.8, 0.4), (0.3,)))
    assert low.start_at(0.95).sigmas == ((0.95, 0.9, 0.4), (0.8, 0.4), (0.3,))
    assert low.start_at(0.5).sigmas == ((0.5, 0.4), (0.5, 0.4), (0.3,))


def test_description_says_what_it_costs_and_saves():
    text = DiagonalSchedule.preset("diagonal 4-3-2").describe()
    for part in ("4,3,2,2,...", "17 forwards", "7 chunks", "35", "2.06x", "noisy"):
        assert part in text, text
    for frames, steps in ((7, "4,3,2"), (6, "4,3,2,2")):  # of 3 and 4 chunks
        short = replace(DiagonalSchedule.preset("diagonal 4-3-2"), frames_per_chunk=frames)
        assert short.describe().startswith(f"{steps} steps")
    assert "1.00x" in DiagonalSchedule.preset("self forcing").describe()
    # Five seconds of Wan, whatever a chunk holds.
    for frames, chunks in ((None, 7), (3, 7), (1, 21), (4, 6), (64, 1)):
        cost = replace(DiagonalSchedule.preset("self forcing"), frames_per_chunk=frames).cost()
        assert (cost.chunks, cost.forwards) == (chunks, 5 * chunks)


def test_what_is_saved_is_counted_against_the_most_steps_of_a_chunk():
    cost = DiagonalSchedule.from_steps((2, 4)).cost()
    assert (cost.uniform_steps, cost.uniform_forwards) == (4, 5 * 7)


def test_a_context_of_almost_pure_noise_is_warned_of():
    one = DiagonalSchedule.from_steps((1,))
    (warning,) = one.warnings()
    assert "ends at sigma 1.000 with noisy context" in warning and "more steps" in warning
    assert DiagonalSchedule.from_steps((4, 1)).warnings() and DiagonalSchedule.from_steps((1, 4)).warnings()
    # At the limit a noisy context still tells enough, by the rule for given frames as by the warning.
    limit = DiagonalSchedule(sigmas=((1.0, UNINFORMATIVE_SIGMA),))
    assert limit.finds_given_inputs and not limit.warnings()
    assert not replace(one, context_mode="clean").warnings()
    assert not replace(one, context_mode="renoise").warnings()
    (warning,) = replace(one, context_mode="renoise", context_sigma=0.95).warnings()
    assert "context is at sigma 0.950" in warning and "Lower context_sigma" in warning
    assert not any(DiagonalSchedule.preset(name).warnings() for name in PRESETS)


def test_levels_are_the_same_to_an_entry_of_the_table_and_the_last_chunk_repeats():
    levels = ((1.0, 0.75, 0.5), (1.0, 0.5))
    assert same_levels(levels, (*levels, levels[-1], levels[-1])) and same_levels((*levels, levels[-1]), levels)
    assert same_levels(levels, ((1.0, 0.7509, 0.4991), (1.0, 0.5)))
    for other in (
        levels[:1],
        (*levels, levels[0]),
        ((1.0, 0.752, 0.5), (1.0, 0.5)),
        ((1.0, 0.748, 0.5), (1.0, 0.5)),
        ((1.0, 0.75, 0.5), (1.0, 0.5, 0.25)),
    ):
        assert not same_levels(levels, other) and not same_levels(other, levels)


def test_steps_are_the_same_however_often_the_last_is_repeated():
    assert same_steps((4,), (4, 4, 4)) and same_steps((4, 3, 2, 2), (4, 3, 2)) and same_steps((4, 2), (4, 2))
    assert not any(same_steps(*pair) for pair in (((4,), (4, 3)), ((4, 4, 3), (4, 3)), ((3,), (4,))))


def test_a_short_text_does_not_unfold_a_thousandfold():
    hours = DiagonalSchedule.preset("self forcing", steps=parse_steps("4,3," * 10_000 + "3"))
    assert len(hours.sigmas) == 20_001 and len({id(row) for row in hours.sigmas}) == 2
    chunks = MAX_LISTED_STEPS // MAX_STEPS
    most = DiagonalSchedule.preset("undistilled", steps=(MAX_STEPS,) * chunks)
    assert most.nfe(chunks + 1) == MAX_STEPS * (chunks + 1) + chunks + 1
    with pytest.raises(ValueError, match=f"list {chunks + 1} chunks with 101000 steps together.*first chunks only"):
        DiagonalSchedule.preset("undistilled", steps=parse_steps(f"{MAX_STEPS}," * (chunks + 1)))
    with pytest.raises(ValueError, match="sigmas list"):
        DiagonalSchedule(sigmas=parse_sigmas("1;" * (MAX_LISTED_STEPS + 1)))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: DiagonalSchedule(sigmas=()), "sigmas"),
        (lambda: DiagonalSchedule(sigmas=((1.0,), ())), "sigmas of chunk 2"),
        (lambda: DiagonalSchedule(sigmas=((1.0, 0.0),)), "sigmas of chunk 1"),
        (lambda: DiagonalSchedule(sigmas=((1.5, 0.5),)), "sigmas of chunk 1"),
        (lambda: DiagonalSchedule(sigmas=((1.0, -0.5),)), "sigmas of chunk 1"),
        (lambda: DiagonalSchedule(sigmas=((1.0, NAN),)), "sigmas of chunk 1"),
        (lambda: DiagonalSchedule(sigmas=((INF,),)), "sigmas of chunk 1"),
        (lambda: DiagonalSchedule(sigmas=((0.5, 1.0),)), "sigmas of chunk 1"),
        (lambda: DiagonalSchedule(sigmas=((1.0,), (0.5, 0.5))), "sigmas of chunk 2"),
        (lambda: DiagonalSchedule(sigmas=(tuple(1 - i / 2000 for i in range(1001)),)), "steps"),
        (lambda: DiagonalSchedule(sigmas=((1.0,),), context_mode="dirty"), "context_mode"),
        (lambda: DiagonalSchedule(sigmas=((1.0,),), context_sigma=1.1), "context_sigma"),
        (lambda: DiagonalSchedule(sigmas=((1.0,),), context_sigma=NAN), "context_sigma"),
        (lambda: DiagonalSchedule(sigmas=((1.0,),), shift=0.0), "shift"),
        (lambda: DiagonalSchedule(sigmas=((1.0,),), shift=INF), "shift"),
        (lambda: DiagonalSchedule(sigmas=((1.0,),), frames_per_chunk=0), "frames_per_chunk"),
        (lambda: DiagonalSchedule.from_steps((4, 0)), "steps"),
        (lambda: DiagonalSchedule.from_steps((MAX_STEPS + 1,)), "steps"),
        (lambda: DiagonalSchedule.from_steps(()), "steps"),
        (lambda: DiagonalSchedule.from_steps((4,), shift=0.0), "shift"),
        (lambda: DiagonalSchedule.from_steps((4,), shift=-3.0), "shift"),
        (lambda: DiagonalSchedule.from_steps((4,), shift=NAN), "shift"),
        (lambda: DiagonalSchedule.preset("self forcing", shift=0.0), "shift"),
        (lambda: DiagonalSchedule.preset("wan"), "preset"),
        (lambda: DiagonalSchedule.uniform(0), "steps"),
        (lambda: DiagonalSchedule.preset("krea").start_at(0.0), "sigma"),
        (lambda: DiagonalSchedule.preset("krea").start_at(1.01), "sigma"),
    ],
)
def test_bad_input_names_the_parameter(build, named):
    with pytest.raises(ValueError, match=named):
        build()


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        DiagonalSchedule.preset("krea").shift = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("4,3,2", (4, 3, 2)),
        (" 4 , 2 ", (4, 2)),
        ("1000", (1000,)),
        ("5;3", (5, 3)),
        ("4,3,", (4, 3)),
        ("4\uff0c3\u30012", (4, 3, 2)),
    ],
)
def test_steps_are_read(text, steps):
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", " ", ",", "0", "-1", "4,0", "1001", "4.5", "4x", "vier", "1e3", "9" * 5000])
def test_bad_steps_are_refused(text):
    with pytest.raises(ValueError, match="steps"):
        parse_steps(text)


def test_steps_round_trip_and_garbage_never_crashes():
    rng = random.Random(1)
    for _ in range(300):
        steps = tuple(rng.randint(1, MAX_STEPS) for _ in range(rng.randint(1, 8)))
        pad = " " * rng.randint(0, 2)
        assert parse_steps(f"{pad},{pad}".join(map(str, steps))) == steps
    for _ in range(2000):
        text = "".join(rng.choice("0123456789,;. -+e_xn\n\u0663\u00b2") for _ in range(rng.randint(0, 12)))
        try:
            steps = parse_steps(text)
        except ValueError as error:
            assert "steps" in str(error)
        else:
            assert steps and all(1 <= count <= MAX_STEPS for count in steps)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("1, 0.93, 0.36; 1, 0.36", ((1.0, 0.93, 0.36), (1.0, 0.36))),
        ("1,.5\n1,.25\n", ((1.0, 0.5), (1.0, 0.25))),
        ("1,0.5;\n1", ((1.0, 0.5), (1.0,))),
        ("1\uff0c0.5\uff1b1", ((1.0, 0.5), (1.0,))),
    ],
)
def test_sigmas_are_read(text, rows):
    assert parse_sigmas(text) == rows
    assert DiagonalSchedule(sigmas=parse_sigmas(text)).sigmas == rows


@pytest.mark.parametrize("text", ["", ";", ",", "1,x", "nan", "1,inf", "1;,", "0.5,1", "1,0", "2", "1,,-1", "1 0.5"])
def test_bad_sigmas_are_refused(text):
    with pytest.raises(ValueError, match="sigmas"):
        DiagonalSchedule(sigmas=parse_sigmas(text))


def test_sigmas_round_trip_and_garbage_never_crashes():
    rng = random.Random(2)
    for _ in range(200):
        rows = tuple(
            tuple(sorted({round(rng.uniform(0.001, 1), 4) for _ in range(rng.randint(1, 6))}, reverse=True))
            for _ in range(rng.randint(1, 5))
        )
        text = rng.choice([";", "\n", " ; "]).join(", ".join(map(repr, row)) for row in rows)
        assert parse_sigmas(text) == rows
    for _ in range(2000):
        text = "".join(rng.choice("0123456789.,;\n -+einfa_") for _ in range(rng.randint(0, 14)))
        try:
            DiagonalSchedule(sigmas=parse_sigmas(text))
        except ValueError as error:
            assert "sigmas" in str(error)


@pytest.mark.parametrize("steps", [1, 2, 12, 50])
def test_undistilled_spreads_any_number_of_steps_evenly(steps):
    schedule = DiagonalSchedule.preset("undistilled", steps=(steps,), shift=1.0)
    assert schedule.sigmas == (tuple((steps - i) / steps for i in range(steps)),)
    assert schedule == DiagonalSchedule.uniform(steps, shift=1.0)
    assert schedule.context_mode == "clean"
