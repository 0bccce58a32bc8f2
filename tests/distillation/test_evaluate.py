"""The evidence: intervals, distances and drifts have the sizes they must have; answers follow from numbers alone."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diagonal_sampler.captions import CaptionEncoder, CaptionEncoderConfig, parse_caption, save_caption_encoder
from diagonal_sampler.demo_autoencoder import DemoAutoencoder, DemoAutoencoderConfig, save_demo_autoencoder
from diagonal_sampler.dit import WanConfig, WanDiT
from diagonal_sampler.schedule import DiagonalSchedule
from diagonal_sampler.settings import CausalSettings
from distillation import demo_files, evaluate, recipes, sprites
from distillation.evidence import arithmetic, claims, measures, report, statistics
from distillation.evidence.measures import Evaluation, Measured, Options, Timing
from distillation.evidence.rows import (
    CAUSAL,
    CONTEXT_SIGMAS,
    CONTROLS,
    FOLLOW,
    FULL,
    FULL_AGAIN,
    GIVEN,
    GIVEN_STEPS,
    INITIAL,
    INITIAL_AGAIN,
    LEVELS,
    LONG_SELF_FORCING,
    LOW_GUIDANCE_340,
    MOTION_WEIGHTS,
    NAMES,
    NO_FORCING,
    NO_MOTION,
    NO_MOTION_AGAIN,
    ROWS,
    SELF_FORCING,
    SHIPPED,
    STEPS_4_2,
    SUBJECTS,
    TEACHER,
    TRAIN,
    UNIFORM_2,
    UNIFORM_4,
    Row,
    check_header,
    initial_command,
    recipe_of,
    row_named,
    training_command,
)
from distillation.evidence.statistics import ClipFeatures, bootstrap
from distillation.recipes import parse_field
from distillation.rollout import BatchNoise, stream
from distillation.train_follow import FollowRecipe
from distillation.train_levels import LevelsRecipe

CPU = torch.device("cpu")
SMALL = Options(captions=3, seeds=(0,), length=33, long=0)
RED = "a red circle moves right"


def true_clips(captions: list[str], seed: int, length: int = 33) -> list[Tensor]:
    return list(measures.true_clips(seed)(captions, 0, length))


# --- intervals


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = {"mean": 0, "median": 0}
    for _ in range(150):
        # Clips of a caption are alike: an interval over clips instead of captions would be too narrow.
        of_caption = rng.normal(size=(40, 1))
        values = (of_caption + 0.3 * rng.normal(size=(40, 6))).tolist()
        for statistic in covered:
            low, high = bootstrap(values, statistic).interval()
            covered[statistic] += low <= 0 <= high
    assert all(0.86 * 150 <= count <= 149 for count in covered.values()), covered


def test_replicates_are_the_statistic_of_the_drawn_captions() -> None:
    values = [[1.0, 4.0], [], [2.0], [9.0, 9.0, 7.0]]
    mean, median = bootstrap(values), bootstrap(values, "median")
    assert mean.estimate == pytest.approx(32 / 6) and median.estimate == 4
    replicates = zip(statistics.caption_counts(4), mean.replicates, median.replicates, strict=True)
    for counts, of_mean, of_median in list(replicates)[:50]:
        drawn = sorted(x for own, count in zip(values, counts, strict=True) for x in own * count)
        if not drawn:
            assert np.isnan(of_mean) and np.isnan(of_median)
            continue
        assert of_mean == pytest.approx(np.mean(drawn)) and of_median == drawn[(len(drawn) - 1) // 2]
    assert bootstrap([[], []]) is None


def test_differences_are_paired_by_caption() -> None:
    hard = [[float(x)] for x in np.random.default_rng(1).normal(size=30)]
    better = [[own[0] + 0.01] for own in hard]
    low, high = (bootstrap(better) - bootstrap(hard)).interval()
    assert low == pytest.approx(0.01) and high == pytest.approx(0.01)
    low, high = bootstrap(hard).interval()
    assert high - low > 0.3


# --- Frechet distance


def test_frechet_distance_of_known_gaussians() -> None:
    rng = np.random.default_rng(2)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    a, b = rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 5)
    mean = rng.normal(size=5)
    closed = np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = statistics.frechet(np.zeros(5), turn @ np.diag(a) @ turn.T, mean, turn @ np.diag(b) @ turn.T)
    assert found == pytest.approx(closed)
    # Covariances that do not commute: tr sqrt(AB) is the sum of the roots of AB's eigenvalues.
    full_a, full_b = (m @ m.T for m in rng.normal(size=(2, 5, 5)))
    cross = np.sqrt(np.linalg.eigvals(full_a @ full_b).real).sum()
    closed = np.trace(full_a) + np.trace(full_b) - 2 * cross
    assert statistics.frechet(mean, full_a, mean, full_b) == pytest.approx(closed)
    flat = np.diag([1.0, 0, 0, 0, 0])  # of low rank, as with fewer clips than features
    assert statistics.frechet(mean, flat, mean, flat) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_grows_as_clips_lose_motion_or_colour(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "FRECHET_REPLICATES", 10)
    captions = sprites.held_out_captions(24)
    network = ClipFeatures()

    def features(clips: list[Tensor]) -> np.ndarray:
        return np.stack([network(clip) for clip in clips])[:, None]

    real, clips = features(true_clips(captions, 5)), true_clips(captions, 6)

    def distance(made: list[Tensor]) -> float:
        return statistics.frechet_spread(features(made), real).estimate

    floor, half, still = (
        distance([clip[(torch.arange(33) * speed).long()] for clip in clips]) for speed in (1, 0.5, 0)
    )
    assert 0 < 2 * floor < half and 2 * half < still
    assert distance([clip.mean(1, keepdim=True).expand_as(clip) for clip in clips]) > 2 * floor
    spread = statistics.frechet_spread(real, real)
    assert spread.estimate == pytest.approx(0, abs=1e-5) and np.allclose(spread.interval(), 0, atol=1e-5)
    assert np.array_equal(ClipFeatures()(clips[0]), network(clips[0]))
    with pytest.raises(ValueError, match="one size"):
        statistics.frechet_spread(real[:10], real)


# --- commanded motion


def test_end_point_error_is_nothing_on_true_clips_and_the_speed_on_still_ones() -> None:
    captions = sprites.held_out_captions(24)
    moving, still = [], []
    for caption, clip in zip(captions, true_clips(captions, 3), strict=True):
        specs = parse_caption(caption)
        moving += measures.endpoint_errors(clip, specs)
        frozen = measures.endpoint_errors(clip[:1].expand_as(clip), specs)
        for spec, error in zip(specs, frozen, strict=True):
            if error is not None:
                still.append(error / sprites.PIXELS_PER_FRAME[spec.speed])
    known = [error for error in moving if error is not None]
    assert len(known) >= 0.9 * len(moving) and len(still) >= 0.9 * len(moving)
    assert np.mean(known) < 0.05 and max(known) < 0.3
    assert np.allclose(still, 1, atol=1e-3)
    assert measures.endpoint_errors(torch.full((33, 3, 64, 64), 40.0), parse_caption(RED)) == [None]


def test_velocity_is_measured_before_a_bounce() -> None:
    spec = parse_caption(RED)[0]
    frames = torch.arange(16).float()
    start, velocity, radius = torch.tensor([42.0, 30.0]), torch.tensor([1.5, 0.0]), torch.tensor(7.5)
    path = sprites.bounce(start, velocity, radius, frames)
    assert path[-1, 0] < path[10, 0]  # it did bounce
    torch.testing.assert_close(measures.first_velocity(path, torch.full((16,), 150.0)), velocity, rtol=0, atol=0.06)
    assert measures.commanded_velocity(spec).tolist() == [1.5, 0]
    assert measures.first_velocity(path[:3], torch.full((3,), 150.0)) is None


# --- drift


def rollout() -> Tensor:
    scene = sprites.make_scenes([parse_caption(RED)], 4)
    return sprites.render(scene, torch.arange(320))[0].float()


def test_a_true_rollout_does_not_drift() -> None:
    drift = measures.drift_of(rollout(), RED)
    assert drift.correct == (1.0,) * 10
    assert drift.saturation[-1] == pytest.approx(drift.saturation[0], abs=0.01)
    assert drift.sharpness[-1] == pytest.approx(drift.sharpness[0], rel=0.05)


def test_fading_oversaturation_and_blur_move_their_own_measure() -> None:
    clip = rollout()[:33]
    saturation, sharpness = measures.saturation_and_sharpness(clip)
    brightest = clip.amax(1, keepdim=True)
    assert measures.saturation_and_sharpness(torch.lerp(clip, brightest, 0.5))[0] < saturation - 0.2
    vivid = (clip - 36 * (clip < brightest)).clamp(min=0)
    assert measures.saturation_and_sharpness(vivid)[0] > saturation + 0.02
    soft = F.avg_pool2d(F.pad(clip, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    found = measures.saturation_and_sharpness(soft)
    assert found[1] < 0.8 * sharpness and found[0] == pytest.approx(saturation, abs=0.1)
    assert measures.saturation_and_sharpness(torch.full((4, 3, 64, 64), 28.0)) == (None, None)


def test_a_rollout_that_fades_into_another_colour_drifts() -> None:
    clip = rollout()
    amount = torch.linspace(0, 0.6, len(clip))[:, None, None, None]
    clip = torch.lerp(clip, clip.amax(1, keepdim=True), amount)
    clip[160:] = clip[160:].flip(1)  # red becomes blue
    drift = measures.drift_of(clip, RED)
    assert drift.saturation[-1] < drift.saturation[0] - 0.2 and list(drift.saturation) == sorted(drift.saturation)[::-1]
    assert drift.correct[0] == 1 and drift.correct[-1] == 0
    with pytest.raises(ValueError, match="320"):
        measures.drift_of(clip[:100], RED)


# --- rows


def test_every_trained_row_is_what_its_flags_train() -> None:
    names = {field: field.replace("_", "-") for field in recipes.Recipe.__dataclass_fields__}
    fields = {flag: field for field, flag in names.items()}
    fields_of_levels = {f"--{field.replace('_', '-')}": field for field in LevelsRecipe.__dataclass_fields__}
    commands = (Path(evaluate.__file__).parents[1] / "demo" / "README.md").read_text(encoding="utf-8")
    for row in ROWS:
        if row.training is None:
            with pytest.raises(ValueError, match=row.name):
                training_command(row, Path("runs"), teacher=Path("t"), demo=Path("d"))
            continue
        command = shlex.split(training_command(row, Path("runs/e"), teacher=Path("t"), demo=Path("d"), updates=7))
        train, export = command[: command.index("&&")], command[command.index("&&") + 1 :]
        flags = dict(zip(train[3::2], train[4::2], strict=True))
        if row.trainer == FOLLOW:
            train = train[train.index("python") :]
            assert train[2] == export[2] == "distillation.train_follow"
            flags = dict(zip(train[3::2], train[4::2], strict=True))
            assert flags.pop("--start") == "d" and flags.pop("--learned") == f"runs/e/{row.start}"
            assert flags.pop("--out") == export[export.index("--out") + 1]
            folder = export[export.index("--export") + 1]
            assert [word.strip() for word in export[-4:]] == [
                "&&",
                "mv",
                f"{folder}/{demo_files.STUDENT_FILE}",
                f"runs/e/{row.checkpoint}",
            ]
            FollowRecipe(**{flag[2:].replace("-", "_"): json.loads(value) for flag, value in flags.items()})
            continue
        if row.trainer == LEVELS:
            assert train[2] == export[2] == "distillation.train_levels"
            assert flags.pop("--start") == "d" and flags.pop("--student") == f"runs/e/{row.start}"
            assert row.start in [other.checkpoint for other in ROWS]
            assert flags.pop("--mean-with", "") == (f"runs/e/{row.mean_with}" if row.mean_with else "")
            assert row.mean_with in ["", *(other.checkpoint for other in ROWS)]
            assert export[-2:] == ["--export", f"runs/e/{row.checkpoint}"]
            assert flags.pop("--out") == export[export.index("--out") + 1]
            words = {"--sigmas", "--ends", "--copies", "--between"}
            values = {flag: value if flag in words else json.loads(value) for flag, value in flags.items()}
            recipe = LevelsRecipe(**{fields_of_levels[flag]: value for flag, value in values.items()})
            assert (recipe.levels, row.settings) == (row.schedule.sigmas, CausalSettings())
            continue
        own = shlex.split(row.budget)
        assert flags.pop("--recipe") == "demo" and flags["--updates"] == (own[1] if own else "7")
        run = flags.pop("--out")
        assert flags["--student"] == f"runs/e/{row.start}"
        known = row.start in (INITIAL, INITIAL_AGAIN, *(other.checkpoint for other in ROWS if other is not row))
        assert known or f"--to {row.start}\n" in commands
        changes = {fields[flag[2:]]: parse_field(fields[flag[2:]], value) for flag, value in flags.items()}
        recipe = recipes.demo(**changes)
        assert (recipe.schedule, recipe.settings) == (row.schedule, row.settings)
        weights = MOTION_WEIGHTS | {NO_MOTION_AGAIN: 0, "motion-10": 10, LOW_GUIDANCE_340: 3, GIVEN: 3}
        weights |= {SELF_FORCING: 0, LONG_SELF_FORCING: 0}
        assert recipe.motion_weight == weights.get(row.name, 1)
        assert export[-4:] == ["--run", run, "--to", f"runs/e/{row.checkpoint}"]
    trainings = [(row.training, row.budget, row.start) for row in ROWS if row.training is not None]
    assert len(set(trainings)) == len(trainings)  # nothing is trained twice


def test_forwards_are_those_of_the_paper() -> None:
    assert {name: row_named(name).nfe(81) for name in (TEACHER, FULL, SELF_FORCING, CAUSAL)} == {
        TEACHER: 100, FULL: 17, SELF_FORCING: 35, CAUSAL: 182,
    }  # fmt: skip
    assert [round(sigma, 2) for sigma in CONTEXT_SIGMAS.values()] == [0, 0.2, 0.36, 0.6, 0.8]
    grouped = {name for group in report.GROUPS for name in group.rows}
    assert grouped <= set(NAMES) and len(set(NAMES)) == len(NAMES)
    assert all(not row.reference or row.reference in NAMES for row in ROWS)


def test_arithmetic_is_what_torch_counts_and_what_the_method_states() -> None:
    config = WanConfig(dim=256, ffn_dim=512, num_layers=2, text_dim=16)
    size = arithmetic.Size(config=config, frames=9, tokens=8 * 8, text_tokens=8)
    row = replace(row_named(FULL), settings=CausalSettings(window=6, sink=3))
    dit, shape = WanDiT(config).eval(), (16, 16, 16)
    # The counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        noise, context = BatchNoise([0], shape, CPU), torch.zeros(1, 8, 16)
        list(stream(dit, context, noise, row.schedule, row.settings, 9, precision=torch.float32))
    assert arithmetic.clip_flops(row, size) == pytest.approx(counter.get_total_flops(), rel=0.03)
    # METHOD.md: 17 forwards and the decode at 790 TFLOP/s take 0.52 s.
    wan = arithmetic.clip_flops(row_named(FULL), arithmetic.WAN_1_3B_480P)
    assert 0.9 * 0.52 < wan / 790e12 < 0.52


# --- claims


CAPTIONS = 20


def made_up(name: str, **share: float) -> Measured:
    """Scores without sampling: `share` of captions right, amplitude and drifts as given, seconds a clip."""
    values = {
        measure: [[float(share.get(measure, 0.8) > index / CAPTIONS)] for index in range(CAPTIONS)]
        for measure in ("colour", "shape", "direction", "everything", "tracked")
    }
    for measure in ("amplitude", "endpoint"):
        values[measure] = [[share.get(measure, 1.0) + 0.001 * index] for index in range(CAPTIONS)]
    drift = {
        "saturation": [[0.8] * 9 + [0.8 + share.get("saturation", 0.0)]] * 4,
        "sharpness": [[30.0] * 10] * 4,
        "correct": [[1.0] * 9 + [1.0 + share.get("correct", 0.0)]] * 4,
    }
    seconds = share.get("seconds", 1.0)
    subject = next(subject for subject in SUBJECTS if subject.name == name)
    return Measured(
        name=name,
        key="",
        sampling=subject.sampling(),
        recipe="made up",
        options=Options(captions=CAPTIONS, seeds=(0,), long_captions=4),
        values=values,
        frechet=[share.get("frechet", 3.0)] + [share.get("frechet", 3.0) + 0.01 * i for i in range(-5, 6)],
        drift={} if name == TEACHER else drift,
        timing=Timing((seconds, 1.01 * seconds, 1.1 * seconds), (0.1, 0.1, 0.1), 2, "CPU", 0.5),
    )


def results(**changed: dict[str, float]) -> dict[str, Measured]:
    by_name = {name.replace("_", "-"): shares for name, shares in changed.items()}
    found = {row.name: made_up(row.name, **by_name.pop(row.name, {})) for row in ROWS}
    by_name = {name.replace("context-0-", "context-0."): shares for name, shares in by_name.items()}
    return found | {name: made_up(name, **shares) for name, shares in by_name.items()}


def answers(rows: dict[str, Measured]) -> dict[int, str]:
    return {claim.number: claim.answer for claim in claims.answer_claims(rows, 81)}


@pytest.mark.parametrize(
    ("number", "changed", "answer"),
    [
        (1, {}, "yes"),
        (1, {"diagonal_4_3_2": {"shape": 0.3}}, "no"),
        (1, {"diagonal_4_3_2": {"shape": 0.75}}, "unclear"),
        (1, {"diagonal_4_3_2": {"everything": 0}, "self_forcing": {"everything": 0}}, "unclear"),
        (2, {"without_diagonal_forcing": {"everything": 0.2, "saturation": 0.1}}, "yes"),
        (2, {"without_diagonal_forcing": {"everything": 0.2, "correct": -0.5}}, "yes"),
        (2, {"without_diagonal_forcing": {"everything": 0.2, "correct": 0.1, "saturation": -0.1}}, "no"),
        (2, {"without_motion": {"everything": 0.2}}, "no"),
        (2, {"without_diagonal_forcing": {"everything": 0.2}}, "unclear"),
        # A row that keeps it gains as much: what is seen is the chance of a training.
        (2, {"without_diagonal_forcing": {"everything": 0.2, "saturation": 0.1},
             "uniform_2": {"saturation": 0.1}}, "unclear"),
        (2, {"without_diagonal_forcing": {"everything": 0.2, "saturation": 0.1},
             "uniform_2": {"saturation": 0.2}, "uniform_4": {"correct": -0.2}}, "no"),
        (3, {"without_motion": {"amplitude": 0.7}}, "yes"),
        (3, {"without_motion": {"amplitude": 1.3}}, "no"),
        (3, {}, "unclear"),
        (4, {"uniform_2": {"everything": 0.3}}, "yes"),
        (4, {"uniform_2": {"everything": 1}, "steps_4_2": {"everything": 0.3}}, "no"),
        (4, {}, "unclear"),
        (5, {"without_diagonal_forcing": {"everything": 0.4}, "context_0_8": {"everything": 0.1}}, "yes"),
        (5, {"context_0_6": {"everything": 1}, "context_0_36": {"everything": 0.2}}, "no"),
        (5, {"context_0_8": {"everything": 0.1}}, "unclear"),
        (6, {"teacher": {"seconds": 400}}, "yes"),
        (6, {"teacher": {"seconds": 40}}, "no"),
        (6, {"teacher": {"seconds": 277}}, "unclear"),
    ],
)  # fmt: skip
def test_answers_follow_from_the_numbers(number: int, changed: dict[str, dict[str, float]], answer: str) -> None:
    assert answers(results(**changed))[number] == answer


def test_a_claim_without_its_rows_is_not_tested() -> None:
    assert set(answers({}).values()) == {"not tested"}
    needs = {1: (FULL, SELF_FORCING), 2: (NO_FORCING, UNIFORM_4), 3: (NO_MOTION,), 4: (STEPS_4_2, UNIFORM_2)}
    for number, names in needs.items():
        for name in names:
            rows = results()
            del rows[name]
            assert answers(rows)[number] == "not tested"
            assert name in claims.answer_claims(rows, 81)[number - 1].findings[0]
    swept = results(without_diagonal_forcing={"everything": 0.4}, context_0_8={"everything": 0.1})
    del swept["context-0.2"]
    answered = claims.answer_claims(swept, 81)[4]
    assert answered.answer == "yes" and "sigma 0.2 (context-0.2): not scored" in answered.findings
    del swept["context-0.8"]
    assert answers(swept)[5] == "not tested"
    untimed = results()
    untimed[FULL] = replace(untimed[FULL], timing=None)
    assert answers(untimed)[6] == "not tested"
    elsewhere = results(teacher={"seconds": 400})
    elsewhere[TEACHER] = replace(elsewhere[TEACHER], timing=replace(elsewhere[TEACHER].timing, threads=1))
    assert answers(elsewhere)[6] == "unclear"
    other = results(teacher={"seconds": 400})
    assert any("not on record" in finding for finding in claims.answer_claims(other, 81)[5].findings)
    for name, processor in ((TEACHER, "one"), (FULL, "two")):
        other[name] = replace(other[name], timing=replace(other[name].timing, processor=processor))
    assert answers(other)[6] == "unclear"
    other[FULL] = replace(other[FULL], timing=replace(other[FULL].timing, processor="one"))
    (found,) = [claim for claim in claims.answer_claims(other, 81) if claim.number == 6]
    assert found.answer == "yes" and "CPU (one)" in found.findings[0]
    assert "[" not in found.findings[0] and not any("on record" in finding for finding in found.findings)


def test_a_claim_that_fails_says_what_was_tried() -> None:
    rows = results(diagonal_4_3_2={"shape": 0.3}, fake_updates_5={"shape": 0.3})
    claim = claims.answer_claims(rows, 81)[0]
    assert claim.answer == "no" and [remedy.answer for remedy in claim.remedies] == ["yes", "no"]
    assert "17 against 35" in claim.remedies[0].findings[-1]
    teacher = claims.answer_claims(results(teacher={"seconds": 40}), 81)[5]
    assert any("paper's size: 28,298.00 against 402.719 TFLOP a clip (70.3x)" in x for x in teacher.findings)
    del rows[LONG_SELF_FORCING]
    remedy = claims.answer_claims(rows, 81)[0].remedies[0]
    assert remedy.answer == "not tested" and LONG_SELF_FORCING in remedy.findings[0]
    assert claims.answer_claims(results(), 81)[0].remedies == ()


def test_a_rival_context_is_compared_with_what_was_trained_as_it_was() -> None:
    """Rows of another budget say nothing beside the two of this one; and two alone never make a yes."""
    better = {"context_0_6": {"everything": 1}, "context_0_36": {"everything": 0.2}}
    better |= {"context_0.6_380": {"everything": 1}, "context_0.36_380": {"everything": 0.2}}
    claim = claims.answer_claims(results(**better), 81)[4]
    assert claim.answer == "no" and [remedy.answer for remedy in claim.remedies] == ["no", "unclear"]
    for remedy in claim.remedies:
        assert [line.split(":")[0] for line in remedy.findings[1:]] == [
            "above sigma 0.6 (context-0.6)", "the other sigmas were not trained so"
        ]  # fmt: skip


def test_what_the_same_commands_gave_once_more_is_said() -> None:
    (line,) = report._trained_again(results(diagonal_4_3_2_again={"shape": 0.5}))
    assert "once more" in line and FULL in line
    assert report._trained_again({name: row for name, row in results().items() if name != FULL_AGAIN}) == []


def test_the_shipped_student_is_held_to_its_goals() -> None:
    goals = claims.shipped_goals(results())
    assert len(goals) == 7 + 1 + 3 and all(goal.reached for goal in goals)
    assert {goal.surely for goal in goals} == {"yes"}
    near = {goal.text.split(":")[0]: goal for goal in claims.shipped_goals(results(shipped={"shape": 0.75}, causal={}))}
    assert not near["shape"].reached and near["shape"].surely == "unclear", "some captions, and the draw of captions"
    worse = results(shipped={"shape": 0.75, "endpoint": 1.2, "amplitude": 0.8, "saturation": 0.06})
    missed = [goal.text.split(":")[0] for goal in claims.shipped_goals(worse) if not goal.reached]
    assert [text.split(",")[0] for text in missed] == ["shape", "end-point error", "motion within 10% of the commanded",
                                                       "saturation"]  # fmt: skip
    assert [goal.surely for goal in claims.shipped_goals(worse) if not goal.reached] == ["unclear", "no", "no", "no"]
    assert claims.shipped_goals({SHIPPED: made_up(SHIPPED)}) == []
    found = results(causal={"everything": -1.0})
    nothing = [[] for _ in range(CAPTIONS)]
    lacking = replace(found[SHIPPED], values={**found[SHIPPED].values, "endpoint": nothing, "amplitude": nothing})
    odd = [goal for goal in claims.shipped_goals({**found, SHIPPED: lacking}) if not goal.reached]
    said = ["everything (clips)", "end-point error", "motion"]
    assert len(odd) == 3 and all(text in goal.text for text, goal in zip(said, odd, strict=True))
    assert odd[0].found.endswith("there is no share of 0")
    assert "row shipped has no" in odd[1].found and "row shipped has no" in odd[2].found


# --- tables


def save_rows(out: Path, rows: dict[str, Measured]) -> None:
    for name, measured in rows.items():
        measured.save(measures.scores_path(out, name))


def test_tables_are_rebuilt_from_kept_rows_alone(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(report, "draw_plots", lambda *_: None)  # slow, and tested below
    rows = results()
    del rows["uniform-4"]
    save_rows(tmp_path / "out", rows)
    assert Measured.load(measures.scores_path(tmp_path / "out", FULL)) == rows[FULL]
    command = ["--tables-only", "--out", str(tmp_path / "out"), "--runs", str(tmp_path), "--demo", str(tmp_path)]
    assert evaluate.main(command) == 0
    readme = (tmp_path / "out/README.md").read_text()
    numbers = json.loads((tmp_path / "out/results.json").read_text())
    assert f"{len(rows)} of {len(NAMES)} rows" in capsys.readouterr().out
    (line,) = [line for line in readme.splitlines() if line.startswith("| uniform-4 |")]
    assert "not trained" in line and numbers["absent"]["uniform-4"] == "not trained"
    (line,) = [line for line in readme.splitlines() if line.startswith(f"| {FULL} |") and "277.3x" in line]
    assert "80.0%" in line and "| 17 |" in line
    # A table's lines all have as many cells as its head.
    for table in readme.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert numbers["rows"][FULL]["measures"]["colour"]["estimate"] == pytest.approx(0.8)
    assert [claim["answer"] for claim in numbers["claims"]][3] == "not tested"
    assert "Why, as we read it" not in readme
    for claim in numbers["claims"]:
        assert claim["rule"] in readme and claim["text"] in readme
    goals, decoded = readme.split("## The shipped student")[1].split("##")[0], "true-clips-decoded"
    assert report.GOALS_RULE in goals and "with its whole interval" in goals and "decoded have" not in goals
    made = {**rows, decoded: replace(rows[FULL], name=decoded, frechet=[4.0] * 12)}
    page = report.make_readme(made, dict.fromkeys(NAMES, "not scored"), rows[FULL].options, [], ())
    assert "have 4.00, by this rule 75%, not reached" in page
    (tmp_path / "out/README.md").unlink()
    assert evaluate.main(command) == 0
    assert (tmp_path / "out/README.md").read_text() == readme
    assert not list((tmp_path / "out").rglob("*.partial"))
    # A reader's reason is quoted while it explains the answer that was found.
    answer = numbers["claims"][0]["answer"]
    (tmp_path / "out/why.md").write_text(f"# Why\n\n* 1, {answer}: it is so.\n* 2, perhaps: it is not.\n")
    assert evaluate.main(command) == 0
    quoted = (tmp_path / "out/README.md").read_text()
    assert quoted.replace("* Why, as we read it: it is so.\n", "") == readme != quoted


def test_plots_are_drawn_or_said_to_be_skipped(tmp_path, monkeypatch) -> None:
    build = dict(runs=tmp_path, demo=tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        report.build(tmp_path, results(), made_up(FULL).options, **build)
    assert "skipped" in (tmp_path / "README.md").read_text() and not list(tmp_path.glob("*.png"))
    pytest.importorskip("matplotlib")
    report.build(tmp_path, results(), made_up(FULL).options, **build)
    readme = (tmp_path / "README.md").read_text()
    for name in ("drift", "correctness_nfe", "context_sigma", "motion_weight"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"({name}.png)" in readme


def test_rows_that_do_not_belong_together_are_left_out_or_refused(tmp_path) -> None:
    rows = results()
    rows[FULL] = replace(rows[FULL], options=replace(rows[FULL].options, seeds=(7,)))
    rows[CAUSAL] = replace(rows[CAUSAL], sampling="another schedule")
    save_rows(tmp_path, rows)
    kept = report.load_scores(tmp_path, rows[TEACHER].options)
    assert set(kept) == {row.name for row in ROWS} - {FULL, CAUSAL}
    with pytest.raises(ValueError, match="2 sets of options"):
        report.load_scores(tmp_path, None)
    with pytest.raises(ValueError, match="there is none"):
        report.load_scores(tmp_path / "empty", None)
    path = measures.scores_path(tmp_path, FULL)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="delete it"):
        Measured.load(path)
    path.write_text(json.dumps({"version": -1}))
    assert Measured.load(path) is None


# --- sampling


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny demo folder; its weights are random."""
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    save_caption_encoder(
        CaptionEncoder(CaptionEncoderConfig(text_dim=16, num_heads=2)), folder / demo_files.TEXT_ENCODER_FILE, {}
    )
    autoencoder = DemoAutoencoder(DemoAutoencoderConfig(inner_dim=8, outer_dim=8, blocks=1))
    autoencoder.fit_encoder(torch.randn(8, 12, 64, 64))
    save_demo_autoencoder(autoencoder, folder / demo_files.AUTOENCODER_FILE, {})
    dit = WanDiT(WanConfig(dim=128, ffn_dim=64, num_layers=1, text_dim=16))
    save_file(dit.state_dict(), folder / demo_files.TEACHER_FILE)
    return folder


def short_row(name: str = TEACHER, **changes: object) -> Row:
    """A row of the table with one step."""
    schedule = DiagonalSchedule.from_steps((2, 1), fresh_noise=False)
    return replace(row_named(name), schedule=schedule, **changes)


def test_a_scored_row_is_kept_until_its_weights_or_options_change(demo, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(statistics, "FRECHET_REPLICATES", 10)
    options = replace(SMALL, captions=2, long=10, long_captions=2)
    evaluation = Evaluation(options, tmp_path, demo, tmp_path / "out", CPU)
    row = short_row(CAUSAL, cfg=2.0)
    first = evaluation.score(row)
    assert len(first.values["everything"]) == 2 and len(first.frechet) == 1 + statistics.FRECHET_REPLICATES
    assert {name: len(tenths[0]) for name, tenths in first.drift.items()} == dict.fromkeys(measures.DRIFTING, 10)
    assert first.timing.processor == measures.processor_name()
    assert len(first.timing.clip) == 3 and min(first.timing.clip) >= min(first.timing.first_chunk) > 0
    assert 0 <= claims.spread(first, "everything").estimate <= 1

    timed = Evaluation(options, tmp_path, demo, tmp_path / "out", CPU, retime=True).score(row)
    assert timed.timing != first.timing and replace(timed, timing=first.timing) == first
    first = timed
    elsewhere = replace(options, seeds=(1,))
    assert Evaluation(elsewhere, tmp_path, demo, tmp_path / "out", CPU, retime=True).score(row) is None

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(measures, "stream", refuse)
    again = Evaluation(options, tmp_path, demo, tmp_path / "out", CPU)
    assert again.score(row) == first
    with pytest.raises(AssertionError, match="sampled again"):
        Evaluation(elsewhere, tmp_path, demo, tmp_path / "out", CPU).score(row)
    with pytest.raises(AssertionError, match="sampled again"):
        again.score(replace(row, cfg=1.0))
    weights = {name: value + 0.01 for name, value in demo_files.load_dit(demo / row.checkpoint).state_dict().items()}
    save_file(weights, tmp_path / row.checkpoint)  # the folder of runs comes before the demo's
    with pytest.raises(AssertionError, match="sampled again"):
        again.score(row)
    assert again.score(row_named(FULL)) is None  # not trained


def test_a_clip_depends_on_its_seed_and_caption_and_a_bidirectional_row_is_one_chunk(demo, monkeypatch) -> None:
    parts = measures.load_parts(demo, CPU)
    dit = demo_files.load_dit(demo / demo_files.TEACHER_FILE)
    dit.head.head.weight.normal_(std=0.1)
    captions = sprites.held_out_captions(3)
    row = short_row()
    shapes = []
    hook = dit.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape[2]))
    together = list(measures.sampled_clips(dit, parts, row)(captions, 1, 33))
    assert shapes == [9] * row.nfe(33) and len(shapes) == 4  # two steps, each with and without the caption
    hook.remove()
    assert all(clip.shape == (33, 3, 64, 64) for clip in together)
    monkeypatch.setattr(measures, "BATCH", 2)
    apart = list(measures.sampled_clips(dit, parts, row)(captions, 1, 33))
    for whole, part in zip(together, apart, strict=True):
        torch.testing.assert_close(whole, part, rtol=0, atol=2.0)  # of 255; bf16 products
    other = next(iter(measures.sampled_clips(dit, parts, row)(captions, 2, 33)))
    assert (other - together[0]).abs().max() > 5


def test_the_controls_need_no_weights_and_true_clips_are_all_right(demo, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(statistics, "FRECHET_REPLICATES", 10)
    evaluation = Evaluation(SMALL, tmp_path, demo, tmp_path, CPU)
    truth, decoded = (evaluation.score(control) for control in CONTROLS)
    for measure in ("colour", "shape", "direction", "everything"):
        assert claims.spread(truth, measure).estimate == 1
    assert claims.spread(truth, "amplitude").estimate == pytest.approx(1, abs=0.05)
    assert truth.frechet[0] < decoded.frechet[0]  # its decoder is untrained
    assert truth.timing is None and claims.spread(truth, "saturation_drift") is None


# --- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": 1}, "captions is 1"),
        ({"seeds": ()}, "seeds is"),
        ({"seeds": (1, 1)}, "none twice"),
        ({"length": 40}, "use 37"),
        ({"length": 29}, "use 33"),
        ({"long": 3, "length": 81}, "at least 4"),
        ({"long": -1}, "long is -1"),
        ({"long": 10, "long_captions": 500}, "long_captions is 500"),
    ],
)
def test_options_out_of_range_name_the_fix(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**changes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "teacher,nonsense"], "rows is 'teacher,nonsense'"),
        (["--rows", ","], "choose from"),
        (["--seeds", "0,one"], "seeds is '0,one'"),
        (["--threads", "0"], "threads is 0"),
        (["--tables-only"], "there is none"),
        (["--demo", "nowhere", "--rows", "true-clips"], "demo is 'nowhere'"),
    ],
)
def test_bad_flags_stop_with_a_message(flags: list[str], message: str, tmp_path, capsys) -> None:
    assert evaluate.main(["--out", str(tmp_path), *flags]) == 1
    assert message in capsys.readouterr().err


def test_weights_of_another_training_are_refused(tmp_path) -> None:
    row = row_named(FULL)
    recipe = recipes.demo(steps="4,2")
    from distillation.export import header_of

    path = tmp_path / row.checkpoint
    save_file({"x": torch.zeros(1)}, path, metadata=header_of(recipe, 5, whole=True))
    with pytest.raises(ValueError, match="steps_per_chunk.*--commands"):
        check_header(row, path)
    assert "5 updates" in check_header(row_named(STEPS_4_2), path)
    save_file({"x": torch.zeros(1)}, path, metadata=header_of(recipes.demo(context_mode="renoise"), 5, whole=True))
    with pytest.raises(ValueError, match="context_sigma is set to 0.8, but the file was trained with 0.357"):
        check_header(row_named("context-0.8"), path)
    save_file({"x": torch.zeros(1)}, path, metadata=header_of(recipe, 5, whole=True))
    with pytest.raises(ValueError, match="a distilled model"):
        check_header(row_named(TEACHER), path)
    with pytest.raises(ValueError, match="name is 'A b'"):
        replace(row, name="A b")
    with pytest.raises(ValueError, match="attention is 'both'"):
        replace(row, attention="both")
    with pytest.raises(ValueError, match="cfg is -1"):
        replace(row, cfg=-1)
    with pytest.raises(ValueError, match="statistic is 'mode'"):
        bootstrap([[1.0]], "mode")


def test_weights_of_another_ablation_are_refused_where_the_header_tells_them_apart(tmp_path, caplog) -> None:
    from distillation.export import header_of

    row, path = row_named(NO_MOTION), tmp_path / "x.safetensors"

    def saved(recipe: recipes.Recipe, updates: int, said: str | None = None) -> Path:
        header = header_of(recipe, updates, whole=True)
        save_file({"x": torch.zeros(1)}, path, metadata=header | ({} if said is None else {"recipe": said}))
        return path

    assert "--motion-weight 0.0" in check_header(row, saved(recipe_of(row), 75)) and not caplog.records
    with pytest.raises(ValueError, match="trained with '--motion-weight 2.0', the row with '--motion-weight 0.0'"):
        check_header(row, saved(recipe_of(row_named("motion-2")), 75))
    long = row_named(LOW_GUIDANCE_340)
    check_header(long, saved(recipe_of(long), 120))
    with pytest.raises(ValueError, match="it had 119 updates, the row has 120"):
        check_header(long, saved(recipe_of(long), 119))
    with pytest.raises(ValueError, match="in stage distill, the row in long"):
        check_header(long, saved(recipes.demo(), 120))
    # Of before flags were listed: nothing is known, which is said.
    check_header(row, saved(recipe_of(row), 75, "distillation.train --stage distill, 75 updates of 8 clips"))
    assert "does not say" in caplog.text
    moved = row_named(SHIPPED)
    assert check_header(moved, recipes.DEMO / demo_files.STUDENT_FILE)
    with pytest.raises(ValueError, match="the last training had 480 updates, the row has 479"):
        check_header(
            replace(moved, training=moved.training.replace("480", "479")), recipes.DEMO / demo_files.STUDENT_FILE
        )
    with pytest.raises(ValueError, match="does not make"):
        recipe_of(moved)


def test_commands_are_printed_for_every_trained_row(tmp_path, capsys) -> None:
    assert evaluate.main(["--commands", "--runs", str(tmp_path), "--demo", str(tmp_path), "--updates", "30"]) == 0
    printed = capsys.readouterr().out
    trained = sum(row.training is not None and row.trainer == TRAIN for row in ROWS)
    moved = sum(row.trainer == LEVELS for row in ROWS)
    assert printed.count("distillation.train_levels ") == 2 * moved > 0
    assert printed.count("distillation.train_follow ") == 2
    assert printed.count(" --export ") == moved + 1
    trained += len(GIVEN_STEPS)
    assert printed.count("distillation.train ") == printed.count("distillation.export ") == trained + 2
    assert printed.count("--updates 30") == trained - sum(bool(row.budget) for row in (*GIVEN_STEPS, *ROWS))
    made = set()
    for line in printed.replace(" && \\\n", "\n").splitlines():
        words = shlex.split(line, comments=True)
        if "--student" in words:
            assert words[words.index("--student") + 1] in made, f"nothing before makes what this starts from: {line}"
        made |= {words[words.index(flag) + 1] for flag in ("--to", "--export") if flag in words}
    assert printed.count("--updates 380 --cooldown 80") == 4
    initial = shlex.split(initial_command(tmp_path, teacher=Path("t")))
    flags = initial[3 : initial.index("&&")]
    changes = {name[2:].replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    del changes["recipe"], changes["out"]
    recipe = recipes.demo(**{name: parse_field(name, value) for name, value in changes.items()})
    assert recipe.stage == "ode" and recipe.frames == recipes.demo().frames
    assert initial[-3] == str(tmp_path / INITIAL)
