"""Measured motion against motion that is known."""

import builtins
import gc
import math
from functools import partial
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.utils
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diagonal_sampler.flow import NothingValid, camera_flow, grid, inside, sample

HEIGHT, WIDTH = 192, 256


@pytest.fixture(scope="module")
def estimation(pack_module):
    return pack_module("model_patches.flow_estimation")


def texture(seed=0, size=512):
    """[3, size, size]: smooth noise at several scales, as photographs have."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(1, 3, size, size)
    for octave in (8, 16, 32, 64, 128):
        coarse = torch.randn(1, 3, octave, octave, generator=generator)
        out += torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic") / octave**0.7
    return ((out - out.min()) / (out.max() - out.min()))[0]


def pair(flow, seed=0):
    """Two frames [2, H, W, 3] of which the second is the first moved by a camera's flow: exact, from one picture."""
    picture = texture(seed)
    points = grid(HEIGHT, WIDTH) + 128
    # The motion is affine, so its inverse is too: fit it at three corners.
    moved = grid(HEIGHT, WIDTH) + flow.flow[0]
    corners = [(0, 0), (0, WIDTH - 1), (HEIGHT - 1, 0)]
    end = torch.stack([torch.cat([moved[c], torch.ones(1)]) for c in corners])
    start = torch.stack([grid(HEIGHT, WIDTH)[c] for c in corners])
    inverse = torch.linalg.solve(end, start)
    home = torch.cat([grid(HEIGHT, WIDTH), torch.ones(HEIGHT, WIDTH, 1)], dim=-1) @ inverse
    return torch.stack([sample(picture, points), sample(picture, home + 128)]).movedim(1, -1)


MOTIONS = [{"pan": (speed * x, speed * y)} for speed in (1, 4, 10, 16) for x, y in ((1, 0), (0, -1), (-0.6, 0.8))]
MOTIONS += [{"zoom": 3}, {"zoom": -3}, {"rotation": 3}, {"zoom": 2, "rotation": -2, "pan": (5, 3)}]


def test_frames_too_small_for_dis_are_refused(estimation):
    pytest.importorskip("cv2")
    with pytest.raises(ValueError, match="frames of 6x5 pixels; give frames of 16x16"):
        estimation.estimate_flow(torch.rand(2, 5, 6, 3))


@pytest.mark.parametrize("motion", MOTIONS, ids=str)
def test_dis_finds_known_motion(estimation, motion):
    pytest.importorskip("cv2")
    truth = camera_flow(1, HEIGHT, WIDTH, **motion)
    found = estimation.estimate_flow(pair(truth))
    assert found.flow.shape == truth.flow.shape
    error = (found.flow - truth.flow)[0].norm(dim=-1)
    print(f"\n{motion}: mean {error[found.valid[0]].mean():.3f}, median {error.median():.3f} px, "
          f"{found.valid.float().mean():.0%} valid")  # fmt: skip
    stays = inside(grid(HEIGHT, WIDTH) + truth.flow[0], HEIGHT, WIDTH)
    assert error[stays].mean() <= 0.35, "dense: everything that is still in the picture"
    assert error[found.valid[0]].mean() <= 0.35
    assert error.median() <= 0.1
    assert found.valid.float().mean() > 0.75


def test_a_cut_says_nothing(estimation):
    """Two shots of a picture that moves, and another's behind the cut between them."""
    pytest.importorskip("cv2")
    first, second = (pair(camera_flow(1, HEIGHT, WIDTH, pan=(4.0, 0.0)), seed) for seed in (1, 2))
    found = estimation.estimate_flow(torch.cat([first, second]))
    assert found.valid.float().mean((1, 2))[[0, 2]].min() > 0.75
    assert not found.valid[1].any(), "what agrees by chance is not trusted either"
    with pytest.raises(
        NothingValid, match="No motion of the video could be trusted: between none of its 2 frames.*25%"
    ):
        estimation.estimate_flow(torch.stack([first[0], second[1]]))


@pytest.mark.parametrize("speed", [40.0, 100.0])
def test_a_fast_pan_is_no_cut(estimation, speed):
    pytest.importorskip("cv2")
    picture = texture(4, 1024)[:, 100:340]
    video = torch.stack([picture[:, :, x : x + 416] for x in (100, 100 + int(speed))]).movedim(1, -1)
    found = estimation.estimate_flow(video)
    assert found.valid.float().mean() > 0.6
    assert found.flow[found.valid][:, 0].median() == pytest.approx(-speed, abs=0.5)


class OnAppleGpu(torch.Tensor):
    """Images as --gpu-only leaves them there: float64 is refused until they are on the CPU."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if (kwargs or {}).get("dtype") is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return super().__torch_function__(func, types, args, kwargs)


def test_images_on_a_gpu_without_float64_are_measured_and_known_again(estimation, monkeypatch):
    made = []
    still = torch.zeros(HEIGHT, WIDTH, 2)
    monkeypatch.setattr(estimation, "_dis", lambda: made.append(1) or (lambda first, second: still))
    images = torch.rand(3, HEIGHT, WIDTH, 3).as_subclass(OnAppleGpu)
    found = estimation.estimate_flow(images, keep=True)
    assert found.valid.all() and estimation.estimate_flow(images, keep=True) is found and len(made) == 1


def test_what_is_covered_is_not_trusted(estimation):
    pytest.importorskip("cv2")
    back, front = texture(1), texture(2)
    first, second = back[:, :HEIGHT, :WIDTH].clone(), back[:, :HEIGHT, :WIDTH].clone()
    first[:, 60:140, 60:140] = front[:, 60:140, 60:140]
    second[:, 60:140, 68:148] = front[:, 60:140, 60:140]
    found = estimation.estimate_flow(torch.stack([first, second]).movedim(1, -1))
    assert found.valid[0, 70:130, 70:130].float().mean() > 0.9
    assert found.valid[0, 65:135, 140:148].float().mean() < 0.5, "the strip that the square covers"


def test_a_motion_is_trusted_where_the_way_back_leads_home(estimation):
    def trusted(x, back):
        there = torch.tensor([x, 0.0]).expand(4, 40, 2)
        return estimation._leads_home(there, torch.tensor([back, 0.0]).expand(4, 40, 2))

    assert trusted(10.0, -10.0)[:, :30].all()
    assert not trusted(10.0, -10.0)[:, 30:].any(), "what leaves the picture has no way back"
    # Half a squared pixel, and 1% of both squared lengths.
    assert trusted(0.0, 0.7).all() and not trusted(0.0, 0.72).any()
    assert trusted(10.0, -8.52)[:, :30].all() and not trusted(10.0, -8.45).any()


def test_a_video_is_measured_in_place_and_tells_how_far_it_is(estimation, monkeypatch):
    frames, height, width = 41, 16, 24
    steps, alive, peak = [], WeakValueDictionary(), 0
    monkeypatch.setattr(comfy.utils.ProgressBar, "update", lambda self, value: steps.append((self.total, value)))
    monkeypatch.setattr(
        estimation, "_dis", lambda: lambda first, second: (second - first)[..., :2] * 10 + torch.zeros(height, width, 2)
    )

    class Memory(TorchDispatchMode):
        """Adds up, after every operation, the storages of all tensors that were made so far and are in use."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal peak
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                alive[id(out)] = out
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive.values()}
            peak = max(peak, sum(size for at, size in storages.items() if at != video.data_ptr()))
            return out

    video = torch.linspace(0, 1, frames)[:, None, None, None].expand(frames, height, width, 3).contiguous()
    with Memory():
        found = estimation.estimate_flow(video)
    assert steps == [(40, 1)] * 40
    assert torch.allclose(found.flow, torch.tensor(0.25)) and found.valid[:, 2:-2, 2:-2].all()
    result = found.flow.nbytes + found.valid.nbytes
    assert result < peak < 1.5 * result, "the result, and what a pair of frames needs"


def test_a_video_is_measured_once(estimation):
    """A run whose strength was turned has the same video, from ComfyUI's cache."""
    pytest.importorskip("cv2")
    with torch.inference_mode():  # as ComfyUI runs nodes
        video = pair(camera_flow(1, HEIGHT, WIDTH, pan=(3.0, 0.0)))
        measure = partial(estimation.estimate_flow, keep=True)
        found = measure(video)
        assert measure(video) is found and measure(video.clone()) is not found
        assert estimation.estimate_flow(video) is not found, "a preview keeps nothing"
        raft = _raft_patcher()
        by_raft = measure(video, raft)
        assert not torch.equal(by_raft.flow, found.flow) and measure(video, raft) is by_raft
        del raft
        gc.collect()
        assert torch.equal(measure(video).flow, found.flow), "RAFT is gone, and was not asked for"
        video.copy_(video.flip(0).clone())  # a node that writes into its input
        assert measure(video).flow.mean(dim=(0, 1, 2))[0] == pytest.approx(-float(found.flow[..., 0].mean()), abs=0.5)
    kept = WeakValueDictionary(flow=measure(video).flow)
    assert "flow" in kept
    del video
    gc.collect()
    assert "flow" not in kept, "no longer than the video"


def test_bad_videos_are_refused(estimation):
    with pytest.raises(ValueError, match="has 1 frame; motion needs at least 2"):
        estimation.estimate_flow(torch.zeros(1, 64, 64, 3))
    with pytest.raises(ValueError, match="NaN"):
        estimation.estimate_flow(torch.full((2, 64, 64, 3), math.nan))
    with pytest.raises(ValueError, match="must be an IMAGE"):
        estimation.estimate_flow(torch.zeros(2, 64, 64))


def test_without_opencv_the_error_says_how_to_install(estimation, monkeypatch):
    real = builtins.__import__

    def without_cv2(name, *args, **kwargs):
        if name == "cv2":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_cv2)
    with pytest.raises(ImportError, match="pip install opencv-python-headless.*RAFT"):
        estimation.estimate_flow(torch.zeros(2, 64, 64, 3))


class _FakeRaft(torch.nn.Module):
    """Answers as torchvision's RAFT does: a list of [1, 2, H, W], the best last; here the motion is known."""

    def forward(self, first, second):
        assert first.shape[-1] % 8 == 0 and first.shape[-2] % 8 == 0 and min(first.shape[-2:]) >= 128
        assert first.min() >= -1 and first.max() <= 1 and first.max() > 0.5
        sign = 1.0 if first.mean() < second.mean() else -1.0
        self.size = first.shape[-2:]
        flow = torch.tensor([3.0 * sign, -1.0 * sign])[None, :, None, None].expand(1, 2, *first.shape[-2:])
        return [flow * 0, flow]


def _raft_patcher():
    import comfy.model_patcher

    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(_FakeRaft(), cpu, cpu)


def test_raft_gets_the_sizes_and_range_it_needs(estimation):
    patcher = _raft_patcher()
    frames = torch.stack([torch.linspace(0, 0.9, 100).expand(60, 100), torch.linspace(0.1, 1, 100).expand(60, 100)])
    found = estimation.estimate_flow(frames[..., None].expand(-1, -1, -1, 3), patcher)
    assert tuple(patcher.model.size) == (128, 128)
    assert torch.allclose(found.flow, torch.tensor([3 * 100 / 128, -60 / 128]), atol=1e-4)
    assert found.valid[0, 5:-5, 5:-5].all()


@pytest.mark.parametrize(
    ("size", "given"),
    [((60, 100), (128, 128)), ((480, 836), (480, 832)), ((900, 1600), (896, 1600)), ((1080, 1920), (904, 1616))],
)
def test_raft_asks_for_its_memory_and_large_frames_are_measured_smaller(estimation, monkeypatch, size, given):
    """Its correlation volume grows with the square of the picture: 4 GB at 1920x1080, and three of them at once."""
    asked, real = [], comfy.model_management.load_models_gpu

    def load_models_gpu(models, memory_required=0, **options):
        asked.append(memory_required)
        return real(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
    patcher = _raft_patcher()
    (height, width), (small_height, small_width) = size, given
    shades = torch.linspace(0, 0.9, width).expand(height, width)
    video = torch.stack([shades, shades + 0.1])[..., None].expand(-1, -1, -1, 3)
    found = estimation.estimate_flow(video, patcher)
    assert tuple(patcher.model.size) == given
    cells = small_height // 8 * (small_width // 8)
    assert asked == [3 * 4 * cells**2] and 4 * cells**2 < 2.2e9
    assert torch.allclose(found.flow, torch.tensor([3 * width / small_width, -height / small_height]), atol=1e-4)


def test_comfyuis_own_raft_measures(estimation, tmp_path, monkeypatch):
    """A file of random weights through ComfyUI's loader: what it says is noise, its type and sizes are real."""
    raft = pytest.importorskip("torchvision.models.optical_flow").raft_large
    import comfy_extras.nodes_void as nodes_void

    torch.save(raft(weights=None, progress=False).state_dict(), tmp_path / "raft_large.pth")
    monkeypatch.setattr(
        nodes_void.folder_paths, "get_full_path_or_raise", lambda kind, name: str(tmp_path / name), raising=True
    )
    monkeypatch.setattr(estimation, "_leads_home", lambda there, back: torch.ones(there.shape[:2], dtype=torch.bool))
    (estimator,) = nodes_void.OpticalFlowLoader.execute("raft_large.pth").result
    found = estimation.estimate_flow(torch.rand(2, 60, 100, 3), estimator)
    assert found.flow.shape == (1, 60, 100, 2) and found.flow.abs().max() > 0
