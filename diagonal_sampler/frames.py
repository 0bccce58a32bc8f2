"""Latent frames and pixel frames: the first latent frame holds one pixel frame, each later one four (Wan's VAE)."""

TIME_FACTOR = 4


def latent_frames(pixel_frames: int) -> int:
    """Latent frames of a clip of `pixel_frames` frames: (T - 1) // 4 + 1."""
    return (pixel_frames - 1) // TIME_FACTOR + 1


def nearest_sizes(size: int, step: int) -> tuple[int, int]:
    """The two multiples of `step` nearest to a size that is none, of which neither is 0."""
    down = max(step, size - size % step)
    return down, down + step


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of a clip of `latent_frames`: 4 * (T - 1) + 1, none of none."""
    return max(0, TIME_FACTOR * (latent_frames - 1) + 1)
