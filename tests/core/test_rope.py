"""Rotary positions: the definition, what they are good for, and that shifting equals building anew."""

import pytest
import torch
from tiny_wan import normal
from torch.overrides import TorchFunctionMode

from diagonal_sampler import rope
from diagonal_sampler.rope import axis_dims, axis_frequencies, rotate, rotate_time_, rotation_table

HEAD_DIM = 128


def test_axes_of_wans_head():
    assert axis_dims(128) == (44, 42, 42)
    assert all(sum(axis_dims(dim)) == dim for dim in range(2, 200, 2))
    assert all(part % 2 == 0 for dim in range(2, 200, 2) for part in axis_dims(dim))


def test_frequencies_start_at_one_radian_and_fall_geometrically():
    frequencies = axis_frequencies(44)
    assert frequencies.dtype == torch.float64
    assert frequencies[0] == 1
    torch.testing.assert_close(frequencies[1:] / frequencies[:-1], torch.full((21,), 10000.0 ** (-1 / 22)).double())


@pytest.mark.parametrize("start", [0.0, 7.0, 2.5, 1000.0])
def test_table_is_the_outer_product_of_positions_and_frequencies(start):
    frames, height, width = 3, 2, 5
    table = rotation_table(frames, height, width, HEAD_DIM, start=start)
    assert table.shape == (frames * height * width, HEAD_DIM // 2, 2)
    assert table.dtype == torch.float32
    token = 0
    for t in range(frames):
        for y in range(height):
            for x in range(width):
                parts = [
                    position * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
                    for position, dim in ((start + t, 44), (y, 42), (x, 42))
                ]
                angle = torch.cat(parts)
                expected = torch.stack((angle.cos(), angle.sin()), dim=-1).float()
                torch.testing.assert_close(table[token], expected, rtol=0, atol=1e-6)
                token += 1


def test_a_time_scale_spreads_frames_and_leaves_space_alone():
    wide = rotation_table(3, 2, 2, HEAD_DIM, start=4, time_scale=0.5)
    for frame in range(3):
        alone = rotation_table(1, 2, 2, HEAD_DIM, start=4 + 0.5 * frame)
        torch.testing.assert_close(wide[4 * frame : 4 * frame + 4], alone)


def test_rotate_multiplies_neighbouring_pairs_as_complex_numbers():
    x, table = normal(0, 2, 6, 3, HEAD_DIM), rotation_table(6, 1, 1, HEAD_DIM, start=4)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.view_as_complex(table)[:, None]
    torch.testing.assert_close(rotate(x, table), torch.view_as_real(turned).flatten(-2))


def test_rotate_keeps_dtype_and_computes_in_float32():
    x = normal(1, 1, 4, 1, HEAD_DIM).bfloat16()
    table = rotation_table(4, 1, 1, HEAD_DIM, start=900)
    assert rotate(x, table).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, table), rotate(x.float(), table).bfloat16(), rtol=0, atol=0)


def test_scores_depend_on_distances_only():
    q, k = normal(2, 1, 12, 1, HEAD_DIM), normal(3, 1, 12, 1, HEAD_DIM)

    def scores(start: float) -> torch.Tensor:
        table = rotation_table(3, 2, 2, HEAD_DIM, start=start)
        return rotate(q, table)[0, :, 0] @ rotate(k, table)[0, :, 0].T

    torch.testing.assert_close(scores(500), scores(0), rtol=0, atol=2e-4)
    assert (scores(0) - q[0, :, 0] @ k[0, :, 0].T).abs().max() > 1


@pytest.mark.parametrize("shift", [3, -3, 1.5, -40])
def test_moving_rotated_keys_equals_rotating_at_the_new_position(shift):
    keys = normal(4, 2, 12, 2, HEAD_DIM)
    moved = rotate(keys, rotation_table(3, 2, 2, HEAD_DIM, start=50))
    rotate_time_(moved, shift)
    expected = rotate(keys, rotation_table(3, 2, 2, HEAD_DIM, start=50 + shift))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_moving_works_in_place_on_a_slice_and_leaves_space_alone():
    buffer = normal(5, 1, 10, 2, HEAD_DIM)
    before = buffer.clone()
    rotate_time_(buffer[:, 4:8], -2)
    torch.testing.assert_close(buffer[:, :4], before[:, :4], rtol=0, atol=0)
    torch.testing.assert_close(buffer[:, 8:], before[:, 8:], rtol=0, atol=0)
    torch.testing.assert_close(buffer[..., 44:], before[..., 44:], rtol=0, atol=0)
    assert (buffer[:, 4:8, :, :44] - before[:, 4:8, :, :44]).abs().amax(dim=(0, 2, 3)).min() > 0.1


def test_no_float64_reaches_the_device(monkeypatch):
    """Apple's and some of Intel's GPUs have no float64: angles are computed on the CPU. `meta` stands in for them."""
    found = []

    class NoDouble(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64 and result.device.type == "meta":
                found.append(func)
            return result

    # Arithmetic on `meta` would load torch's compiler, which takes half a minute; the tables are what counts.
    tables = []
    monkeypatch.setattr(rope, "rotate", lambda x, table: tables.append(table) or x)
    keys = torch.empty(1, 4, 1, HEAD_DIM, device="meta")
    with NoDouble():
        tables.append(rotation_table(2, 1, 2, HEAD_DIM, start=5, device=keys.device))
        rotate_time_(keys, -3)
    assert [(table.device, table.dtype) for table in tables] == [(keys.device, torch.float32)] * 2
    assert not found


def test_moving_after_inference_mode_serves_training():
    """Nothing kept from an inference run may be an inference tensor: autograd refuses those."""
    with torch.inference_mode():
        rotate_time_(normal(6, 1, 4, 1, HEAD_DIM), -7.25)
    keys = normal(6, 1, 4, 1, HEAD_DIM).requires_grad_()
    moved = keys * 1
    rotate_time_(moved, -7.25)
    moved.square().sum().backward()
    torch.testing.assert_close(keys.grad, 2 * keys.detach(), rtol=0, atol=1e-5)
