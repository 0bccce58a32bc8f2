"""What Diagonal Flow Preview shows of itself: a small animation, however long the video is."""

from pathlib import Path

import pytest
import torch
from PIL import Image


@pytest.fixture
def shown(pack_module, monkeypatch, tmp_path):
    """`shown(panels)`: what the node shows of such pictures, and the file; written into an empty temporary folder."""
    import folder_paths

    module = pack_module("nodes.flow_preview")
    before = folder_paths.get_temp_directory()
    folder_paths.set_temp_directory(str(tmp_path))

    def show(panels: torch.Tensor) -> tuple[dict, Path]:
        monkeypatch.setattr(module, "flow_preview", lambda *inputs, **options: (panels, "its error"))
        made = module.DiagonalFlowPreview.execute(type("Flow", (), {"timeline": None}), False, 0.0)
        assert made.result[0] is panels and made.result[1] == "its error", "the outputs have all pictures"
        (item,) = made.ui["images"]
        assert item["type"] == "temp" and list(made.ui["animated"] if len(panels) > 1 else [True]) == [True]
        return made.ui, tmp_path / item["subfolder"] / item["filename"]

    yield show
    folder_paths.set_temp_directory(before)


def flashing(count: int, height: int = 8, width: int = 24) -> torch.Tensor:
    """[count, height, width, 3], no picture like its neighbours: WebP would make one of both."""
    return (torch.arange(count) * 37 % 256 / 255)[:, None, None, None].expand(-1, height, width, 3)


def test_few_pictures_are_all_played_at_the_rate_of_the_video(shown):
    ui, file = shown(flashing(20))
    assert ui["text"] == ("its error",)
    with Image.open(file) as played:
        assert (played.n_frames, played.size) == (20, (24, 8))
        played.seek(19)
        assert played.convert("RGB").getpixel((4, 4))[0] == pytest.approx(19 * 37 % 256, abs=6)
        assert played.info["duration"] in (62, 63)


def test_of_many_and_large_pictures_some_are_played_smaller_in_the_same_time(shown):
    ui, file = shown(flashing(301, 40, 2048))
    assert ui["text"] == ("its error\n101 of the 301 pictures are played here",)
    with Image.open(file) as played:
        assert (played.n_frames, played.size) == (101, (1024, 20))
        played.load()
        assert played.info["duration"] == pytest.approx(3 * 1000 / 16, abs=1)


def test_a_single_picture_stands_still(shown):
    ui, file = shown(flashing(1))
    assert "animated" not in ui
    with Image.open(file) as picture:
        assert picture.n_frames == 1
