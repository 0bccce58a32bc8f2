"""The training losses: distribution matching on frames and on motion, flow matching of the fake score, regression.

Everything is a pure function of its tensors and computes in float32, whatever dtype comes in. Latents are
[B, C, T, H, W] with T latent frames. A distribution matching term compares two score models at the generator's
output x: `real` is x0 as the teacher sees it, `fake` x0 as the fake score sees it, both denoised from one noised
copy of x. The equations are those of METHOD.md (Diagonal Distillation, arXiv 2603.09488; DMD, arXiv 2311.18828).

Losses are bare means without their weights: the trainer owns lambda and gamma.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diagonal_sampler.schedule import shift_sigma

EPSILON = 1e-6
"""Smallest divisor: a mean difference of unit-sized latents below this is float32 rounding, and its inverse noise."""

MOTION_ERROR_PART = 0.7
"""Part of a motion weight that follows the error (as released)."""
MOTION_FRAME_PART = 0.3
"""Part of a motion weight that grows with the frame number (as released)."""
MOTION_FRAME_GROWTH = 1.2
"""Growth of that part from one difference to the next (as released)."""

LOWEST_SCORE_SIGMA = 0.02
"""Lowest noise level at which the scores are compared (as released: timestep 20 of 1000)."""
HIGHEST_SCORE_SIGMA = 0.98
"""Highest noise level at which the scores are compared (as released: timestep 980 of 1000)."""


# ---------------------------------------------------------------------------------------------------------------
# Checks


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _require_same_shape(name: str, reference: Tensor, **others: Tensor) -> None:
    for other, tensor in others.items():
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{other} is {_shape(tensor)}; it must have the shape of {name}, {_shape(reference)}. Pass tensors of "
                "the same clips."
            )


def _require_latent(name: str, x: Tensor) -> None:
    if x.ndim != 5 or x.numel() == 0:
        raise ValueError(
            f"{name} is {_shape(x)}; it must be a latent [B, C, T, H, W] with no empty axis. Add the missing axes, "
            "such as [None] for one clip."
        )


def _require_motion(name: str, x: Tensor) -> None:
    _require_latent(name, x)
    if x.shape[2] < 2:
        raise ValueError(
            f"{name} is {_shape(x)}, T = {x.shape[2]} latent frame; motion needs T of at least 2. Pass the whole clip "
            "instead of single frames, or leave the motion terms out."
        )


# ---------------------------------------------------------------------------------------------------------------
# Distribution matching


def _matching_direction(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """(fake - real) / mean|x - real| in float32, the mean per sample over all axes but the first."""
    x, real, fake = x.float(), real.float(), fake.float()
    error = (x - real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    # clamp_min keeps a NaN of a broken model visible, which nan_to_num would turn into a silent zero.
    return (fake - real) / error.clamp_min(EPSILON)


@torch.no_grad()
def dmd_gradient(denoised: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The distribution matching direction g = (fake - real) / mean|denoised - real|, a constant for autograd.

    The mean is per sample over C, T, H and W and is kept above EPSILON, so equal inputs give no NaN; a NaN that comes
    in goes out. METHOD.md section 3, g; DMD eqs. 7 and 8, without their factor alpha_t, as released.

    Args:
        denoised: [B, C, T, H, W] the generator's x0.
        real: the same shape, x0 of the real score (the teacher, guided).
        fake: the same shape, x0 of the fake score.

    Returns:
        float32 [B, C, T, H, W] without a gradient; x - g is where the generator should go.

    Raises:
        ValueError: not a latent, or shapes differ.
    """
    _require_latent("denoised", denoised)
    _require_same_shape("denoised", denoised, real=real, fake=fake)
    return _matching_direction(denoised, real, fake)


def pull(x: Tensor, gradient: Tensor, weight: Tensor | None = None) -> Tensor:
    """The loss 0.5 * mean(weight * (x - stop(x - gradient))^2), whose gradient in x is weight * gradient / x.numel().

    Its value is 0.5 * mean(weight * gradient^2); only its gradient has a meaning. METHOD.md section 3, spatial loss.

    Args:
        x: any shape; the only argument that gets a gradient.
        gradient: the shape of x.
        weight: broadcast to the shape of x, or None for 1. The mean divides by x.numel(), not by the weights' sum.

    Returns:
        float32 scalar.

    Raises:
        ValueError: x is empty, gradient's shape differs, or weight does not broadcast to x.
    """
    if x.numel() == 0:
        raise ValueError(f"x is {_shape(x)}; it must hold at least one value. Leave this term out of an empty batch.")
    _require_same_shape("x", x, gradient=gradient)
    x, gradient = x.float(), gradient.detach().float()
    # Summed in this order x - stop(x) is exactly 0: x - (x - g) would round g to the precision of x.
    square = (x - x.detach() + gradient).square()
    if weight is not None:
        _require_broadcast(weight, x)
        square = weight.detach().float() * square
    return 0.5 * square.mean()


def _require_broadcast(weight: Tensor, x: Tensor) -> None:
    fits = weight.ndim <= x.ndim and all(
        size in (1, full) for size, full in zip(reversed(weight.shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"weight is {_shape(weight)}; it must broadcast to x, {_shape(x)}. Give it an axis of size 1 for each "
            "axis that it does not tell apart."
        )


def dmd_loss(denoised: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The spatial distribution matching loss: `pull` of the generator's x0 along `dmd_gradient`.

    Args:
        denoised: [B, C, T, H, W] the generator's x0; the only argument that gets a gradient.
        real: the same shape, x0 of the real score.
        fake: the same shape, x0 of the fake score.

    Returns:
        float32 scalar.

    Raises:
        ValueError: not a latent, or shapes differ.
    """
    return pull(denoised, dmd_gradient(denoised, real, fake))


# ---------------------------------------------------------------------------------------------------------------
# Motion


def temporal_difference(x: Tensor) -> Tensor:
    """D x = x[t+1] - x[t], float32 [B, C, T-1, H, W], of a latent [B, C, T, H, W].

    Raises:
        ValueError: not a latent, or T below 2.
    """
    _require_motion("x", x)
    x = x.float()
    return x[:, :, 1:] - x[:, :, :-1]


@torch.no_grad()
def motion_weights(difference_error: Tensor) -> Tensor:
    """Weights of the latent-frame differences: w = 0.7 * (1 + share) + 0.3 * 1.2^t / mean(1.2^t).

    "Cumulative error share" is read as: the sum of the errors of differences 0 to t, t itself included, over the sum
    of all errors of the same sample. It therefore rises from the first error's part to exactly 1, and a difference
    weighs more the more error has piled up before it. Without any error the share is 0. METHOD.md section 3.

    The numbers are the authors', the error is not: in both versions of their code (commits 81c5a80 and 24ef1c9) it is
    the mean of (g_m - x[t+1])^2 over C, H and W, of the normalised direction and the latent frame itself. What is
    shipped was trained with the error here.

    Args:
        difference_error: [B, T-1] mean over C, H and W of |D fake - D real|, at least 0.

    Returns:
        float32 [B, T-1] without a gradient; the second part has mean 0.3, the first is between 0.7 and 1.4.

    Raises:
        ValueError: not [B, T-1], or empty.
    """
    if difference_error.ndim != 2 or difference_error.numel() == 0:
        raise ValueError(
            f"difference_error is {_shape(difference_error)}; it must be [B, T-1] with no empty axis. Average it over "
            "C, H and W first."
        )
    error = difference_error.float()
    share = error.cumsum(dim=1) / error.sum(dim=1, keepdim=True).clamp_min(EPSILON)
    count = error.shape[1]
    # The ratio does not depend on where the count starts; ending it at 0 keeps the power of a long clip finite.
    growth = MOTION_FRAME_GROWTH ** torch.arange(1 - count, 1, device=error.device, dtype=torch.float32)
    return MOTION_ERROR_PART * (1 + share) + MOTION_FRAME_PART * growth / growth.mean()


def motion_loss(denoised: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Flow distribution matching on latent differences: 0.5 * mean(w * (D x - stop(D x - g_m))^2).

    g_m = (D fake - D real) / mean|D x - D real|, the mean per sample; w from `motion_weights`. This differs from the
    authors' code of commit 81c5a80 on purpose: its mean(w * g_m^2) is made of stopped tensors, a constant in x, so no
    gradient of it reaches the generator. As of commit 24ef1c9 theirs is mean(w * (D x - stop(D x - g_m))^2), which has
    one. The value here is half of either, and the gradient in D x is w * g_m / numel(D x). METHOD.md section 3.

    Args:
        denoised: [B, C, T, H, W] the generator's x0, T at least 2; the only argument that gets a gradient.
        real: the same shape, x0 of the real score.
        fake: the same shape, x0 of the fake score.

    Returns:
        float32 scalar.

    Raises:
        ValueError: not a latent, shapes differ, or T below 2.
    """
    _require_motion("denoised", denoised)
    _require_same_shape("denoised", denoised, real=real, fake=fake)
    difference = temporal_difference(denoised)
    with torch.no_grad():
        real_difference, fake_difference = temporal_difference(real), temporal_difference(fake)
        gradient = _matching_direction(difference, real_difference, fake_difference)
        weight = motion_weights((fake_difference - real_difference).abs().mean(dim=(1, 3, 4)))
    return pull(difference, gradient, weight[:, None, :, None, None])


class MotionHead(nn.Module):
    """The motion feature F(x) = MLP(conv(x[t+1] - x[t])), METHOD.md section 3 (the paper's implicit optical flow).

    The convolution is 3x3 over H and W within one difference, and the MLP acts at each position; so a feature sees
    two neighbouring latent frames and a 3x3 neighbourhood. Parameters stay float32, and autocast is off inside.

    Args:
        channels: latent channels C.
        width: channels between the convolution and the last layer.
        features: channels of F.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, *, channels: int = 16, width: int = 64, features: int = 32) -> None:
        for name, value in (("channels", channels), ("width", width), ("features", features)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1. Wan's latents have 16 channels.")
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, width, kernel_size=3, padding=1)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, features))

    def forward(self, x: Tensor) -> Tensor:
        """Features of the motion between neighbouring latent frames.

        Args:
            x: [B, C, T, H, W] latent, T at least 2.

        Returns:
            float32 [B, T-1, H, W, features].

        Raises:
            ValueError: not a latent, T below 2, another number of channels, or parameters that are not float32.
        """
        difference = temporal_difference(x)
        if x.shape[1] != self.channels:
            raise ValueError(
                f"x has {x.shape[1]} channels; this head reads {self.channels}. Make it with channels={x.shape[1]}."
            )
        if self.conv.weight.dtype != torch.float32:
            raise ValueError(
                f"The head's parameters are {self.conv.weight.dtype}; they must be float32. Call head.float()."
            )
        with torch.autocast(x.device.type, enabled=False):
            frames = self.conv(difference.movedim(2, 1).flatten(0, 1))  # [B*(T-1), width, H, W]
            return self.mlp(frames.movedim(1, -1)).unflatten(0, (x.shape[0], x.shape[2] - 1))


class MotionHeadLosses(NamedTuple):
    """The two terms of a motion head, float32 scalars: L_dmd_flow and L_reg_flow of METHOD.md section 3."""

    dmd: Tensor
    regression: Tensor


def motion_head_losses(
    denoised: Tensor, real: Tensor, fake: Tensor, head: MotionHead, teacher_head: MotionHead
) -> MotionHeadLosses:
    """Distribution matching and regression on the motion features F of a head, against its EMA copy F_t.

    dmd: `pull` of F(x) along g_F = (F_t(fake) - F_t(real)) / mean|F(x) - F_t(real)|, the mean per sample.
    regression: mean((F(x) - stop(F_t(real)))^2), towards the teacher's prediction. METHOD.md section 3.

    `teacher_head` gets no gradient and follows by `update_ema_head`. This prevents the short way to a zero loss, the
    collapse: a head on both sides of a difference would learn to answer the same for every clip. A slow target only
    slows a drift towards it; freezing both heads excludes it.

    Args:
        denoised: [B, C, T, H, W] the generator's x0, T at least 2; gets a gradient, as do the parameters of `head`.
        real: the same shape, x0 of the real score.
        fake: the same shape, x0 of the fake score.
        head: F, trained with the generator, or frozen by requires_grad_(False).
        teacher_head: F_t, the EMA copy of `head`.

    Raises:
        ValueError: not a latent, shapes differ, T below 2, or a head that does not fit the latents or the other head.
    """
    _require_motion("denoised", denoised)
    _require_same_shape("denoised", denoised, real=real, fake=fake)
    with torch.no_grad():
        real_features, fake_features = teacher_head(real), teacher_head(fake)
    features = head(denoised)
    if features.shape != real_features.shape:
        raise ValueError(
            f"head gives {features.shape[-1]} features and teacher_head {real_features.shape[-1]}; they must agree. "
            "Make teacher_head a copy.deepcopy of head."
        )
    gradient = _matching_direction(features.detach(), real_features, fake_features)
    return MotionHeadLosses(
        dmd=pull(features, gradient),
        regression=(features - real_features).square().mean(),
    )


@torch.no_grad()
def update_ema_head(teacher_head: MotionHead, head: MotionHead, decay: float) -> None:
    """Moves `teacher_head` in place towards `head`: parameter = decay * parameter + (1 - decay) * head's parameter.

    Args:
        teacher_head: F_t, changed in place.
        head: F, left as it is.
        decay: in [0, 1]; 0 copies, 1 freezes.

    Raises:
        ValueError: decay out of range, one module given twice, or parameters that differ in shape.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; it must be in [0, 1]. The release's generator uses 0.99.")
    if teacher_head is head:
        raise ValueError("teacher_head is head itself; it must be another module. Make it a copy.deepcopy of head.")
    current = dict(head.named_parameters())
    # Checked before the first write, so that a refused call changes nothing.
    for name, parameter in teacher_head.named_parameters():
        if parameter.shape != current[name].shape:
            raise ValueError(
                f"teacher_head's {name} is {_shape(parameter)} and head's is {_shape(current[name])}; they must agree. "
                "Make teacher_head a copy.deepcopy of head."
            )
    for name, parameter in teacher_head.named_parameters():
        parameter.lerp_(current[name].to(parameter), 1 - decay)


# ---------------------------------------------------------------------------------------------------------------
# Regression and the fake score


def fake_score_loss(predicted_flow: Tensor, noise: Tensor, generated: Tensor) -> Tensor:
    """Flow matching of the fake score on a generated clip: mean((predicted_flow - (noise - generated))^2).

    Args:
        predicted_flow: [B, C, T, H, W] the fake score's flow at x = (1 - sigma) * generated + sigma * noise; the only
            argument that gets a gradient.
        noise: the same shape, the standard normal noise in that x.
        generated: the same shape, the generator's x0; detached here, since this loss trains the fake score alone.

    Returns:
        float32 scalar.

    Raises:
        ValueError: not a latent, or shapes differ.
    """
    _require_latent("predicted_flow", predicted_flow)
    _require_same_shape("predicted_flow", predicted_flow, noise=noise, generated=generated)
    flow = noise.detach().float() - generated.detach().float()
    return (predicted_flow.float() - flow).square().mean()


def ode_regression_loss(denoised: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared x0 error of the causal student against the end of the teacher's ODE trajectory.

    The student's inputs are the trajectory's states at the noise levels of its schedule; METHOD.md section 4a.

    Args:
        denoised: [B, C, T, H, W] the student's x0; the only argument that gets a gradient.
        target: the same shape, the end of the trajectory (sigma 0).
        weight: [B, T], 1 counts a latent frame and 0 does not, normalised by its sum over the batch; None counts all.
            Where nothing counts the loss is 0.

    Returns:
        float32 scalar.

    Raises:
        ValueError: not a latent, shapes differ, or weight is not [B, T].
    """
    _require_latent("denoised", denoised)
    _require_same_shape("denoised", denoised, target=target)
    square = (denoised.float() - target.detach().float()).square()
    if weight is None:
        return square.mean()
    if weight.shape != (denoised.shape[0], denoised.shape[2]):
        raise ValueError(
            f"weight is {_shape(weight)}; it must be [B, T], [{denoised.shape[0]}, {denoised.shape[2]}], for denoised "
            f"{_shape(denoised)}. Give one number for each latent frame."
        )
    weight = weight.detach().float()
    return (weight * square.mean(dim=(1, 3, 4))).sum() / weight.sum().clamp_min(EPSILON)


# ---------------------------------------------------------------------------------------------------------------
# What the scores are asked


def guided(conditional: Tensor, unconditional: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance in ComfyUI's convention: unconditional + cfg * (conditional - unconditional).

    cfg 1 is the conditional prediction. The release writes conditional + guidance * (conditional - unconditional),
    so its guidance 3.0 is cfg 4.0 here (METHOD.md section 4c).

    Args:
        conditional: any shape, a prediction (x0 or flow) with the prompt.
        unconditional: the same shape, the prediction with the negative prompt.
        cfg: a finite number.

    Returns:
        float32, the same shape.

    Raises:
        ValueError: shapes differ, or cfg is not finite.
    """
    _require_same_shape("conditional", conditional, unconditional=unconditional)
    if not math.isfinite(cfg):
        raise ValueError(f"cfg is {cfg}; it must be a finite number (released: 4, which it calls guidance 3).")
    unconditional = unconditional.float()
    return unconditional + cfg * (conditional.float() - unconditional)


def draw_score_sigmas(
    u: Tensor, *, shift: float, low: float = LOWEST_SCORE_SIGMA, high: float = HIGHEST_SCORE_SIGMA
) -> Tensor:
    """Noise levels at which the scores are compared: shift * u / (1 + (shift - 1) * u), clamped to [low, high].

    The caller draws u, uniform, so this has no random state. Released: shift 5, then timesteps clamped to 20 to 980
    of 1000 (METHOD.md, Setting and section 4).

    Args:
        u: any shape, in [0, 1].
        shift: above 0; 1 leaves u as it is.
        low: smallest sigma returned, in [0, high].
        high: largest sigma returned, in [low, 1].

    Returns:
        float32, the shape of u.

    Raises:
        ValueError: u, shift, low or high out of range.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift is {shift}; it must be a positive number (Wan: 5).")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low is {low}, high is {high}; 0 <= low <= high <= 1 must hold, such as 0.02 and 0.98.")
    u = u.float()
    if not bool(((u >= 0) & (u <= 1)).all()):  # also refuses NaN
        raise ValueError(
            f"u spans {float(u.min())} to {float(u.max())}; every value must be in [0, 1]. Draw it with torch.rand."
        )
    return shift_sigma(u, shift).clamp(low, high)
