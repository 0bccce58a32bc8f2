"""The training losses against float64 references in numpy, and who gets a gradient from them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from diagonal_sampler.schedule import shift_sigma
from distillation.losses import (
    EPSILON,
    MotionHead,
    dmd_gradient,
    dmd_loss,
    draw_score_sigmas,
    fake_score_loss,
    guided,
    motion_head_losses,
    motion_loss,
    motion_weights,
    ode_regression_loss,
    pull,
    temporal_difference,
    update_ema_head,
)
from distillation.recipes import Recipe

SHAPE = (2, 3, 4, 2, 3)  # [B, C, T, H, W]
NEAR_FLOAT32 = {"rtol": 2e-5, "atol": 1e-6}
# One value of a gradient is about 1 / numel; the absolute part must stay far below it.
NEAR_GRADIENT = {"rtol": 2e-5, "atol": 1e-8}
THREE_CLIPS = [dmd_loss, motion_loss]


def clips(count: int, *, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> list[Tensor]:
    """Random latents of different scales a sample, each a leaf that would take a gradient."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 2.0, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return [(scale * torch.randn(shape, generator=generator)).requires_grad_() for _ in range(count)]


def heads() -> tuple[MotionHead, MotionHead]:
    torch.manual_seed(3)
    return tuple(MotionHead(channels=SHAPE[1], width=4, features=5) for _ in range(2))


def f64(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def near(actual: Tensor, expected: np.ndarray | float, tolerance: dict[str, float] = NEAR_FLOAT32) -> None:
    assert actual.dtype == torch.float32
    assert tuple(actual.shape) == np.shape(expected)
    np.testing.assert_allclose(actual.detach().numpy(), expected, **tolerance)


def only_gradient(loss: Tensor, x: Tensor, *others: Tensor) -> np.ndarray:
    """The gradient that `loss` leaves in x, after checking that nothing else got one."""
    loss.backward()
    for other in others:
        assert other.grad is None or not bool(other.grad.any())
    assert x.grad is not None and bool(x.grad.any())
    return x.grad.numpy()


# ---------------------------------------------------------------------------------------------------------------
# References: float64, sample by sample and frame by frame


def direction(x: np.ndarray, real: np.ndarray, fake: np.ndarray) -> np.ndarray:
    rows = []
    for one, r, f in zip(x, real, fake, strict=True):
        rows.append((f - r) * one.size / np.linalg.norm((one - r).ravel(), ord=1))
    return np.stack(rows)


def differences(x: np.ndarray) -> np.ndarray:
    return np.diff(x, axis=2)


def weights(error: np.ndarray) -> np.ndarray:
    out = np.zeros_like(error)
    for b, row in enumerate(error):
        mean_growth = sum(1.2**t for t in range(len(row))) / len(row)
        for t in range(len(row)):
            out[b, t] = 0.7 * (1 + sum(row[: t + 1]) / sum(row)) + 0.3 * 1.2**t / mean_growth
    return out


def motion_terms(x: np.ndarray, real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """g_m [B, C, T-1, H, W] and w [B, T-1]."""
    gap = differences(fake) - differences(real)
    error = np.einsum("bcthw->bt", np.abs(gap)) / (gap.size / gap.shape[0] / gap.shape[2])
    return direction(differences(x), differences(real), differences(fake)), weights(error)


def weighted_square(w: np.ndarray, value: np.ndarray) -> float:
    """0.5 * mean(w * value^2), w [B, T]."""
    return 0.5 * float(np.einsum("bt,bcthw,bcthw->", w, value, value)) / value.size


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def features(head: MotionHead, x: np.ndarray) -> np.ndarray:
    """F(x) by loops over output positions."""
    p = {name: f64(value) for name, value in head.named_parameters()}
    d = differences(x)
    b, _, t, h, w = d.shape
    padded = np.pad(d, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((b, t, h, w, p["mlp.3.bias"].size))
    for i in range(h):
        for j in range(w):
            window = padded[:, :, :, i : i + 3, j : j + 3]
            hidden = np.einsum("bctyx,ocyx->bto", window, p["conv.weight"]) + p["conv.bias"]
            hidden = np.einsum("bti,oi->bto", silu(hidden), p["mlp.1.weight"]) + p["mlp.1.bias"]
            out[:, :, i, j] = np.einsum("bti,oi->bto", silu(hidden), p["mlp.3.weight"]) + p["mlp.3.bias"]
    return out


def slope(function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Gradient by central differences."""
    out = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        out[index] = (function(up) - function(down)) / (2 * step)
    return out


# ---------------------------------------------------------------------------------------------------------------
# Distribution matching


def test_the_dmd_gradient_is_normalised_sample_by_sample() -> None:
    x, real, fake = clips(3)
    g = dmd_gradient(x, real, fake)
    near(g, direction(f64(x), f64(real), f64(fake)))
    assert not g.requires_grad
    with torch.no_grad():
        alone = torch.cat([dmd_gradient(x[b : b + 1], real[b : b + 1], fake[b : b + 1]) for b in range(SHAPE[0])])
        scaled = dmd_gradient(3 * x, 3 * real, 3 * fake)
    torch.testing.assert_close(g, alone)
    torch.testing.assert_close(g, scaled)


def test_no_error_gives_no_nan_and_a_nan_stays_visible() -> None:
    x, fake = (clip.detach() for clip in clips(2))
    assert torch.equal(dmd_gradient(x, x, x), torch.zeros(SHAPE))
    near(dmd_gradient(x, x, fake), (f64(fake) - f64(x)) / EPSILON)
    for loss in THREE_CLIPS:
        assert loss(x, x, x) == 0
        assert bool(loss(x, x, fake).isfinite())
    assert bool(motion_weights(torch.zeros(1, 3)).isfinite().all())
    broken = fake.clone()
    broken[0, 0, 0, 0, 0] = torch.nan
    for loss in THREE_CLIPS:
        assert bool(loss(x, fake, broken).isnan())


@pytest.mark.parametrize("weighted", [False, True])
def test_pull_moves_x_along_the_gradient_and_nothing_else(weighted: bool) -> None:
    x, g = clips(2)
    w = clips(1, shape=(SHAPE[0], 1, SHAPE[2], 1, 1), seed=1)[0]
    loss = pull(x, g, w) if weighted else pull(x, g)
    w64 = f64(w)[:, 0, :, 0, 0] if weighted else np.ones((SHAPE[0], SHAPE[2]))
    near(loss, weighted_square(w64, f64(g)))
    got = only_gradient(loss, x, g, w)
    expected = np.einsum("bt,bcthw->bcthw", w64, f64(g)) / x.numel()
    np.testing.assert_allclose(got, expected, **NEAR_GRADIENT)
    target = f64(x) - f64(g)
    by_hand = slope(lambda moved: weighted_square(w64, moved - target), f64(x))
    np.testing.assert_allclose(got, by_hand, rtol=1e-4, atol=1e-8)


def test_pull_keeps_a_gradient_far_smaller_than_x() -> None:
    x = torch.full((4,), 1000.0, requires_grad=True)
    g = torch.tensor([1e-6, -2e-6, 3e-6, 0.0])
    pull(x, g).backward()
    np.testing.assert_allclose(x.grad.numpy(), f64(g) / 4, rtol=1e-6, atol=0)


def test_dmd_loss_and_its_gradient() -> None:
    x, real, fake = clips(3)
    g = direction(f64(x), f64(real), f64(fake))
    loss = dmd_loss(x, real, fake)
    near(loss, 0.5 * float(np.vdot(g, g)) / g.size)
    np.testing.assert_allclose(only_gradient(loss, x, real, fake), g / g.size, **NEAR_GRADIENT)


def test_a_step_against_the_dmd_gradient_takes_away_what_the_fake_score_adds() -> None:
    x, real, fake = clips(3)
    dmd_loss(x, real, fake).backward()
    assert float((x.grad * (fake - real).detach()).sum()) > 0


# ---------------------------------------------------------------------------------------------------------------
# Motion


def test_temporal_difference() -> None:
    x = torch.arange(4.0).square().view(1, 1, 4, 1, 1).bfloat16()
    got = temporal_difference(x)
    assert got.dtype == torch.float32 and got.flatten().tolist() == [1, 3, 5]


def test_motion_weights_follow_their_formula() -> None:
    error = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    got = motion_weights(error)
    near(got, weights(f64(error)))
    assert not got.requires_grad
    # One difference: its share is 1 and its growth is the mean. Equal errors: the share is (t + 1) / count.
    near(motion_weights(torch.tensor([[0.3]])), np.array([[1.7]]))
    near(motion_weights(torch.ones(1, 2)), np.array([[0.7 * 1.5 + 0.6 / 2.2, 0.7 * 2 + 0.72 / 2.2]]))
    torch.testing.assert_close(motion_weights(error), motion_weights(10 * error))


def test_motion_weights_of_a_long_clip_stay_finite() -> None:
    got = motion_weights(torch.ones(1, 1000))
    assert bool(got.isfinite().all())
    # 1 / mean(1.2^t) of the last difference: count / (sum of 1.2^-k) = 1000 * (1 - 1 / 1.2).
    assert got[0, -1].item() == pytest.approx(0.7 * 2 + 0.3 * 1000 * (1 - 1 / 1.2), rel=1e-5)


def test_motion_loss_and_its_gradient() -> None:
    x, real, fake = clips(3)
    g, w = motion_terms(f64(x), f64(real), f64(fake))
    loss = motion_loss(x, real, fake)
    near(loss, weighted_square(w, g))
    got = only_gradient(loss, x, real, fake)

    expected = np.zeros(SHAPE)
    for t in range(SHAPE[2] - 1):  # difference t is x[t+1] - x[t]
        flow = w[:, t, None, None, None] * g[:, :, t] / g.size
        expected[:, :, t + 1] += flow
        expected[:, :, t] -= flow
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)

    target = differences(f64(x)) - g
    by_hand = slope(lambda moved: weighted_square(w, differences(moved) - target), f64(x))
    np.testing.assert_allclose(got, by_hand, rtol=1e-4, atol=1e-7)


def test_motion_loss_sees_motion_and_not_a_constant_offset() -> None:
    x, real, fake = (clip.detach() for clip in clips(3))
    offset = torch.randn(SHAPE[0], SHAPE[1], 1, *SHAPE[3:], generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(motion_loss(x, real, fake + offset), motion_loss(x, real, fake))
    assert motion_loss(x, real, real + offset).item() < 1e-10
    assert dmd_loss(x, real, real + offset).item() > 1e-2


def test_the_motion_form_of_81c5a80_gives_the_generator_no_gradient() -> None:
    """Why `motion_loss` differs: mean(w * g_m^2) changes with x, yet autograd sees a constant."""

    def earlier(x: Tensor) -> Tensor:
        d, d_real, d_fake = (temporal_difference(clip) for clip in (x, real, fake))
        w = motion_weights((d_fake - d_real).abs().mean(dim=(1, 3, 4)))
        return (w[:, None, :, None, None] * dmd_gradient(d, d_real, d_fake).square()).mean()

    x, real, fake = clips(3)
    loss = earlier(x)
    assert not loss.requires_grad
    assert not torch.isclose(loss, earlier(2 * x), rtol=1e-2)
    torch.testing.assert_close(loss, 2 * motion_loss(x, real, fake))

    spatial = torch.autograd.grad(dmd_loss(x, real, fake), x)[0]
    with_earlier = torch.autograd.grad(dmd_loss(x, real, fake) + 0.2 * earlier(x), x)[0]
    with_ours = torch.autograd.grad(dmd_loss(x, real, fake) + 0.2 * motion_loss(x, real, fake), x)[0]
    assert torch.equal(with_earlier, spatial)
    assert float((with_ours - spatial).norm()) > 0.01 * float(spatial.norm())


def test_a_motion_weight_of_10_has_the_ratio_of_24ef1c9() -> None:
    """Its loss is 4 times the spatial one and 4 times mean(w * (D x - stop(D x - g_m))^2), without our half."""
    x, real, fake = clips(3)
    d, d_real, d_fake = (temporal_difference(clip) for clip in (x, real, fake))
    w = motion_weights((d_fake - d_real).abs().mean(dim=(1, 3, 4)))[:, None, :, None, None]
    motion = (w * (d - (d - dmd_gradient(d, d_real, d_fake)).detach()).square()).mean()
    theirs = torch.autograd.grad(4 * dmd_loss(x, real, fake) + 4 * motion, x)[0]
    recipe = Recipe(name="", motion_weight=10.0)
    weight = recipe.motion_weight * recipe.motion_scale
    ours = recipe.dmd_weight * dmd_loss(x, real, fake) + weight * motion_loss(x, real, fake)
    torch.testing.assert_close(4 * torch.autograd.grad(ours, x)[0], theirs, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------
# The motion head


def test_head_is_an_mlp_on_a_convolution_of_differences() -> None:
    head, _ = heads()
    x, static = clips(2)
    near(head(x), features(head, f64(x)))
    assert MotionHead()(torch.zeros(1, 16, 2, 1, 1)).shape == (1, 1, 1, 1, 32)
    still = static.detach()[:, :, :1].expand(SHAPE)
    torch.testing.assert_close(head(still), head(torch.zeros(SHAPE)))


def test_head_losses_and_their_gradient_in_the_clip() -> None:
    x, real, fake = clips(3)
    head, teacher = heads()
    fx = features(head, f64(x))
    f_real, f_fake = (features(teacher, f64(clip)) for clip in (real, fake))
    g = direction(fx, f_real, f_fake)
    pulled = fx - g

    def expected_dmd(value: np.ndarray) -> float:
        return 0.5 * float(np.mean((features(head, value) - pulled) ** 2))

    def expected_regression(value: np.ndarray) -> float:
        return float(np.mean((features(head, value) - f_real) ** 2))

    losses = motion_head_losses(x, real, fake, head, teacher)
    near(losses.dmd, 0.5 * float(np.vdot(g, g)) / g.size)
    near(losses.regression, expected_regression(f64(x)))
    for loss, expected in ((losses.dmd, expected_dmd), (losses.regression, expected_regression)):
        x.grad = None
        head.zero_grad()
        # Both terms share one graph.
        loss.backward(retain_graph=True)
        np.testing.assert_allclose(x.grad.numpy(), slope(expected, f64(x)), rtol=2e-4, atol=1e-7)
        assert bool(x.grad.any())
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()), name
        assert all(clip.grad is None for clip in (real, fake))
        assert all(parameter.grad is None for parameter in teacher.parameters())
        # F is linear in its last bias, so the gradient there is the plain sum over positions.
        in_features = g / g.size if loss is losses.dmd else 2 * (fx - f_real) / fx.size
        got = head.mlp[3].bias.grad.numpy()
        np.testing.assert_allclose(got, in_features.sum(axis=(0, 1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_a_frozen_head_still_passes_the_gradient_to_the_clip() -> None:
    x, real, fake = clips(3)
    head, teacher = heads()
    head.requires_grad_(False)
    sum(motion_head_losses(x, real, fake, head, teacher)).backward()
    assert bool(x.grad.any()) and all(parameter.grad is None for parameter in head.parameters())


def test_the_ema_head_follows_in_place() -> None:
    head, teacher = heads()
    before = {name: f64(value).copy() for name, value in teacher.named_parameters()}
    current = {name: f64(value).copy() for name, value in head.named_parameters()}
    places = [value.data_ptr() for value in teacher.parameters()]
    for _ in range(2):
        update_ema_head(teacher, head, 0.9)
    for name, value in teacher.named_parameters():
        near(value, before[name] * 0.81 + current[name] * 0.19)
        assert value.requires_grad and value.grad is None
    assert places == [value.data_ptr() for value in teacher.parameters()]
    assert all(np.array_equal(f64(value), current[name]) for name, value in head.named_parameters())

    frozen = copy.deepcopy(teacher)
    update_ema_head(teacher, head, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), frozen.parameters(), strict=True))
    update_ema_head(teacher, head, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), head.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Regression and the fake score


def test_fake_score_loss_trains_the_fake_score_alone() -> None:
    flow, noise, generated = clips(3)
    residual = f64(flow) + f64(generated) - f64(noise)
    loss = fake_score_loss(flow, noise, generated)
    near(loss, float(np.vdot(residual, residual)) / residual.size)
    got = only_gradient(loss, flow, noise, generated)
    np.testing.assert_allclose(got, 2 * residual / residual.size, **NEAR_GRADIENT)


def test_the_right_flow_has_no_fake_score_loss() -> None:
    noise, generated = (clip.detach() for clip in clips(2))
    sigma = 0.7
    x = (1 - sigma) * generated + sigma * noise
    flow = (x - generated) / sigma  # METHOD.md: denoised x0 = x - sigma * flow
    assert fake_score_loss(flow, noise, generated).item() < 1e-10
    assert fake_score_loss(-flow, noise, generated).item() > 1


@pytest.mark.parametrize("weighted", [False, True])
def test_ode_regression_loss_and_its_gradient(weighted: bool) -> None:
    x, target = clips(2)
    w = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 1.0, 1.0]], requires_grad=True)
    w64 = f64(w) if weighted else np.ones((SHAPE[0], SHAPE[2]))
    of_a_frame = SHAPE[1] * SHAPE[3] * SHAPE[4]

    def expected(value: np.ndarray) -> float:
        total = 0.0
        for b in range(SHAPE[0]):
            for t in range(SHAPE[2]):
                total += w64[b, t] * float(((value[b, :, t] - f64(target)[b, :, t]) ** 2).sum()) / of_a_frame
        return total / float(w64.sum())

    loss = ode_regression_loss(x, target, w) if weighted else ode_regression_loss(x, target)
    near(loss, expected(f64(x)))
    got = only_gradient(loss, x, target, w)
    # A square's central difference is exact for any step.
    np.testing.assert_allclose(got, slope(expected, f64(x), step=0.5), **NEAR_GRADIENT)


def test_ode_regression_of_nothing_is_zero() -> None:
    x, target = clips(2)
    loss = ode_regression_loss(x, target, torch.zeros(SHAPE[0], SHAPE[2]))
    loss.backward()
    assert loss == 0 and not bool(x.grad.any())


# ---------------------------------------------------------------------------------------------------------------
# What the scores are asked


def test_guidance_3_of_the_release_is_cfg_4() -> None:
    conditional, unconditional = clips(2)
    c, u = f64(conditional), f64(unconditional)
    near(guided(conditional, unconditional, 4.0), c + 3.0 * (c - u))
    near(guided(conditional, unconditional, 1.0), c)
    near(guided(conditional, unconditional, 0.0), u)


def test_score_sigmas_are_shifted_and_clamped() -> None:
    u = torch.rand(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u[0, :4] = torch.tensor([0.0, 0.003, 0.997, 1.0])
    # 1 / sigma is linear in 1 / u under a shift: 1/sigma - 1 = (1/u - 1) / shift.
    with np.errstate(divide="ignore"):
        sigma = 1 / (1 + (1 / f64(u) - 1) / 5)
    near(draw_score_sigmas(u, shift=5.0), np.minimum(0.98, np.maximum(0.02, sigma)))
    # float32 of u near 1e-3 is the least exact here.
    near(draw_score_sigmas(u, shift=5.0, low=0.0, high=1.0), sigma)
    near(draw_score_sigmas(u, shift=1.0, low=0.0, high=1.0), f64(u))
    same = draw_score_sigmas(torch.tensor(0.354), shift=5.0)
    assert same.item() == pytest.approx(shift_sigma(0.354, 5.0), rel=1e-6)
    assert same.shape == ()
    assert draw_score_sigmas(torch.tensor([0, 1]), shift=5.0).tolist() == pytest.approx([0.02, 0.98])


# ---------------------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_computed_in_float32(dtype: torch.dtype) -> None:
    """The result is that of the same numbers in float32: nothing is rounded on the way."""
    x, real, fake = (clip.detach().to(dtype) for clip in clips(3))
    w = torch.rand(SHAPE[0], SHAPE[2], generator=torch.Generator().manual_seed(0)).to(dtype)
    frame_weight = w[:, None, :, None, None]
    head, teacher = heads()
    functions: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (dmd_gradient, (x, real, fake)),
        (dmd_loss, (x, real, fake)),
        (pull, (x, real, frame_weight)),
        (temporal_difference, (x,)),
        (motion_weights, (w,)),
        (motion_loss, (x, real, fake)),
        (head, (x,)),
        (lambda *c: torch.stack(motion_head_losses(*c, head, teacher)), (x, real, fake)),
        (fake_score_loss, (x, real, fake)),
        (ode_regression_loss, (x, real)),
        (ode_regression_loss, (x, real, w)),
        (lambda a, b: guided(a, b, 4.0), (x, real)),
        (lambda u: draw_score_sigmas(u, shift=5.0), (w,)),
    ]
    for function, arguments in functions:
        got = function(*arguments)
        assert got.dtype == torch.float32
        assert torch.equal(got, function(*(argument.float() for argument in arguments)))


def test_a_bfloat16_student_gets_the_rounded_gradient() -> None:
    x, real, fake = (clip.detach().bfloat16().requires_grad_() for clip in clips(3))
    got = dmd_gradient(x, real, fake) / x.numel()
    dmd_loss(x, real, fake).backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, got.bfloat16(), rtol=2**-7, atol=0)


def test_autocast_does_not_lower_the_heads_precision() -> None:
    head, _ = heads()
    x = clips(1)[0]
    expected = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x), expected)


# ---------------------------------------------------------------------------------------------------------------
# Errors


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


HEAD = MotionHead(channels=2, width=2, features=2)
OTHER_HEAD = MotionHead(channels=2, width=2, features=3)
A, B = (1, 2, 3, 2, 2), (1, 2, 4, 2, 2)
ONE_FRAME = (1, 2, 1, 2, 2)
OTHER_B = r"is \[1, 2, 4, 2, 2\]; it must have the shape of {}, \[1, 2, 3, 2, 2\]. Pass tensors of the same clips"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: dmd_gradient(zeros(*A), zeros(*A), zeros(*B)), "fake " + OTHER_B.format("denoised")),
        (lambda: dmd_loss(zeros(*A), zeros(*B), zeros(*A)), "real " + OTHER_B.format("denoised")),
        (lambda: dmd_loss(*[zeros(2, 3, 2, 2)] * 3), r"denoised is \[2, 3, 2, 2\].*\[B, C, T, H, W\].*Add the missing"),
        (lambda: dmd_loss(*[zeros(0, 2, 3, 2, 2)] * 3), "denoised is .*no empty axis"),
        (lambda: pull(zeros(*A), zeros(*B)), "gradient " + OTHER_B.format("x")),
        (lambda: pull(zeros(0), zeros(0)), r"x is \[0\]; it must hold at least one value"),
        (lambda: pull(zeros(*A), zeros(*A), zeros(1, 3)), r"weight is \[1, 3\]; it must broadcast to x.*Give it"),
        (lambda: pull(zeros(2), zeros(2), zeros(3, 2)), r"weight is \[3, 2\]; it must broadcast"),
        (lambda: temporal_difference(zeros(*ONE_FRAME)), "x is .*T = 1 latent frame; motion needs T of at least 2"),
        (lambda: temporal_difference(zeros(2, 3)), r"x is \[2, 3\]; it must be a latent"),
        (lambda: motion_weights(zeros(*A)), r"difference_error is .*must be \[B, T-1\].*Average it"),
        (lambda: motion_weights(zeros(2, 0)), r"difference_error is \[2, 0\]; it must be \[B, T-1\]"),
        (lambda: motion_loss(*[zeros(*ONE_FRAME)] * 3), "denoised is .*T = 1 .*Pass the whole clip"),
        (lambda: motion_loss(zeros(*A), zeros(*A), zeros(*B)), "fake " + OTHER_B.format("denoised")),
        (lambda: MotionHead(width=0), "width is 0; it must be at least 1"),
        (lambda: HEAD(zeros(1, 3, 2, 2, 2)), "x has 3 channels; this head reads 2. Make it with channels=3"),
        (lambda: HEAD(zeros(*ONE_FRAME)), "x is .*T = 1 latent frame"),
        (lambda: copy.deepcopy(HEAD).bfloat16()(zeros(*A)), r"torch.bfloat16; they must be float32. Call head.float"),
        (lambda: motion_head_losses(*[zeros(*ONE_FRAME)] * 3, HEAD, HEAD), "denoised is .*T = 1 latent frame"),
        (lambda: motion_head_losses(*[zeros(*A)] * 3, HEAD, OTHER_HEAD), "head gives 2 features and teacher_head 3"),
        (
            lambda: update_ema_head(OTHER_HEAD, HEAD, 0.9),
            r"teacher_head's mlp.3.weight is \[3, 2\] and head's is \[2, 2\]",
        ),
        (lambda: update_ema_head(copy.deepcopy(HEAD), HEAD, 1.1), r"decay is 1.1; it must be in \[0, 1\]"),
        (lambda: update_ema_head(HEAD, HEAD, 0.9), "teacher_head is head itself.*copy.deepcopy"),
        (lambda: fake_score_loss(zeros(*A), zeros(*B), zeros(*A)), "noise " + OTHER_B.format("predicted_flow")),
        (lambda: fake_score_loss(zeros(*A), zeros(*A), zeros(*B)), "generated " + OTHER_B.format("predicted_flow")),
        (lambda: ode_regression_loss(zeros(*A), zeros(*B)), "target " + OTHER_B.format("denoised")),
        (
            lambda: ode_regression_loss(zeros(*A), zeros(*A), zeros(3, 1)),
            r"weight is \[3, 1\]; it must be \[B, T\], \[1, 3\].*Give one number",
        ),
        (lambda: guided(zeros(*A), zeros(*B), 4.0), "unconditional " + OTHER_B.format("conditional")),
        (lambda: guided(zeros(*A), zeros(*A), float("nan")), "cfg is nan; it must be a finite number"),
        (lambda: draw_score_sigmas(zeros(1), shift=0.0), "shift is 0.0; it must be a positive number"),
        (
            lambda: draw_score_sigmas(zeros(1), shift=5.0, low=0.9, high=0.1),
            "low is 0.9, high is 0.1; 0 <= low <= high",
        ),
        (lambda: draw_score_sigmas(torch.tensor([-0.1, 2.0]), shift=5.0), r"u spans -0.1.* to 2.0; .*torch.rand"),
        (lambda: draw_score_sigmas(torch.tensor([torch.nan]), shift=5.0), "u spans nan"),
    ],
)
def test_errors_name_the_value_the_rule_and_the_fix(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_a_refused_ema_update_changes_nothing() -> None:
    before = copy.deepcopy(OTHER_HEAD.state_dict())
    with pytest.raises(ValueError):
        update_ema_head(OTHER_HEAD, HEAD, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in OTHER_HEAD.state_dict().items())
