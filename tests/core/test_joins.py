"""What follows given frames begins as they ended."""

import torch

from diagonal_sampler.joins import MOST_CONTRAST, meet


def drawn(seed: int, frames: int, scale: float = 1.0, level: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, 4, frames, 6, 8, generator=generator, dtype=torch.float64) + level


def moments(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return latents.mean((-2, -1)), latents.std((-2, -1), correction=0)


def test_the_first_frame_has_the_given_levels_and_contrasts() -> None:
    last, denoised = drawn(1, 1, scale=1.2, level=0.5), drawn(2, 3, scale=0.9, level=-0.4)
    met = meet(denoised, last)
    for found, wanted in zip(moments(met[:, :, :1]), moments(last), strict=True):
        torch.testing.assert_close(found, wanted)
    # What is drawn stays: only its level and its contrast have changed.
    found, plain = (
        (each - each.mean((-2, -1), keepdim=True)) / each.std((-2, -1), keepdim=True, correction=0)
        for each in (met, denoised)
    )
    torch.testing.assert_close(found, plain)


def test_the_change_fades_out_within_the_chunk() -> None:
    last, denoised = drawn(1, 1, scale=1.2, level=0.5), drawn(2, 3, scale=0.9, level=-0.4)
    (mean, deviation), (before, contrast) = moments(meet(denoised, last)), moments(denoised)
    whole, ratio = (mean - before)[:, :, 0], (deviation / contrast)[:, :, 0]
    for frame, share in enumerate((1, 2 / 3, 1 / 3)):
        torch.testing.assert_close((mean - before)[:, :, frame], share * whole)
        torch.testing.assert_close((deviation / contrast)[:, :, frame], ratio**share)


def test_channels_that_a_still_has_no_contrast_in_keep_theirs() -> None:
    """They carry motion; means, and the contrast of all other channels, are moved as ever."""
    level, denoised = drawn(1, 1, scale=1.2, level=0.5), drawn(2, 3, scale=0.9, level=-0.4)
    level[:, 1] = 0.3 * level[:, 1] + 0.2
    (mean, deviation), (_, before), (wanted, contrast) = (
        moments(x) for x in (meet(denoised, level, still=True), denoised, level)
    )
    torch.testing.assert_close(mean[:, :, 0], wanted[:, :, 0])
    torch.testing.assert_close(deviation[:, 1], before[:, 1])
    others = [0, 2, 3]
    torch.testing.assert_close(deviation[:, others, 0], contrast[:, others, 0])


def test_what_meets_already_stays_and_flat_channels_are_finite() -> None:
    denoised = drawn(2, 3)
    torch.testing.assert_close(meet(denoised, denoised[:, :, :1]), denoised)
    flat = torch.zeros_like(denoised)
    torch.testing.assert_close(meet(flat, flat[:, :, :1] + 3)[:, :, 0], flat[:, :, 0] + 3)
    loud = meet(denoised, 100 * denoised[:, :, :1])
    torch.testing.assert_close(moments(loud)[1][:, :, 0], MOST_CONTRAST * moments(denoised)[1][:, :, 0])
    faint = meet(denoised, denoised[:, :, :1] / 100)
    torch.testing.assert_close(moments(faint)[1][:, :, 0], moments(denoised)[1][:, :, 0] / MOST_CONTRAST)


def test_channels_of_little_contrast_are_met_like_others() -> None:
    last, denoised = 1e-4 * drawn(1, 1, scale=1.2), 1e-4 * drawn(2, 3, scale=0.9)
    torch.testing.assert_close(moments(meet(denoised, last))[1][:, :, 0], moments(last)[1][:, :, 0])


def test_number_format_and_device_stay() -> None:
    last, denoised = drawn(1, 1).bfloat16(), drawn(2, 3).bfloat16()
    assert meet(denoised, last).dtype == torch.bfloat16
    assert meet(denoised.to("meta"), last.to("meta")).device.type == "meta"
