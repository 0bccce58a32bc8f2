"""Gaussian noise that moves with an optical flow and stays Gaussian.

Every cell of the latent holds one particle: a value, drawn once, and a place between the cells. Particles are carried
by the flow from latent frame to latent frame. Each then takes the cell it is in; of several in one cell the nearest to
its middle stays, and the others move to a free cell beside it, or end. Cells that nobody took get fresh noise. A value
is never changed, never used twice in a frame, and where it goes depends on the motion alone, so every frame is exactly
Gaussian and white whatever the flow does. Places are kept to a fraction of a cell, so slow motion adds up.

The geometry knows no values: one map a latent frame, "the cell that this cell's value was in", serves every step index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .flow import OpticalFlow, grid
from .flow_timeline import FlowTimeline
from .noise import CONTEXT_STEP, NoiseSource

FRESH = -1
"""In a map: this cell's value is new."""
MAPS_KEPT = 64
"""Latent frames whose maps are kept; one asked for before them is made again from the start."""
# Names in a snapshot; the first two go on with a step index.
_VALUES, _CHUNK, _PLACES, _NEXT = "values/", "chunk/", "places", "next"
# Free cells that a particle without one may take, as offsets; the nearest to its place comes first.
_NEIGHBOURS = tuple((dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if (dx, dy) != (0, 0))


class ParticleGrid:
    """One particle a cell, carried by a flow.

    Args:
        height, width: cells.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self._centres = grid(height, width).reshape(-1, 2)
        self.places = self._centres.clone()
        """[H * W, 2] place of the particle that each cell holds, (x, y) in cells."""

    def move(self, motion: Tensor, valid: Tensor) -> Tensor:
        """Carries the particles one latent frame on.

        Args:
            motion: [H * W, 2] cells, of each cell's particle, at its place.
            valid: [H * W] bool; a particle whose motion is not known ends.

        Returns:
            [H * W] int64: the cell that each cell's particle was in before, or FRESH.
        """
        cells = self.height * self.width
        places = self.places + motion
        column, row = places.round().long().unbind(-1)
        there = valid & (column >= 0) & (column < self.width) & (row >= 0) & (row < self.height)
        source = torch.full((cells,), FRESH, dtype=torch.int64)
        waiting = there.nonzero()[:, 0]
        waiting = self._settle(waiting, (row * self.width + column)[waiting], places, source)
        if len(waiting):
            # Candidates of each, by distance from where the particle is.
            offsets = torch.tensor(_NEIGHBOURS)
            cell = torch.stack([column[waiting], row[waiting]], dim=-1)[:, None] + offsets
            distance = (cell - places[waiting][:, None]).square().sum(-1)
            order = distance.argsort(dim=1, stable=True)
            cell = cell.gather(1, order[..., None].expand(-1, -1, 2))
            fits = (cell >= 0).all(-1) & (cell[..., 0] < self.width) & (cell[..., 1] < self.height)
            index = cell[..., 1] * self.width + cell[..., 0]
            left = torch.ones(len(waiting), dtype=torch.bool)
            for choice in range(len(_NEIGHBOURS)):
                wants = left & fits[:, choice]
                wants[wants.clone()] = source[index[wants, choice]] == FRESH
                asking = wants.nonzero()[:, 0]
                if len(asking):
                    refused = self._settle(waiting[asking], index[asking, choice], places, source)
                    left[asking] = torch.isin(waiting[asking], refused)
                if not left.any():
                    break
        kept = source != FRESH
        self.places = self._centres.clone()
        # One that had to give way stands at the near edge of its new cell.
        self.places[kept] = self._centres[kept] + (places[source[kept]] - self._centres[kept]).clamp(-0.5, 0.5)
        return source

    def _settle(self, particles: Tensor, cells: Tensor, places: Tensor, source: Tensor) -> Tensor:
        """Puts each particle into its cell, of several the nearest to the middle. Returns those without one."""
        distance = (places[particles] - self._centres[cells]).square().sum(-1)
        order = distance.argsort(stable=True)
        order = order[cells[order].argsort(stable=True)]
        sorted_cells = cells[order]
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = sorted_cells[1:] != sorted_cells[:-1]
        source[sorted_cells[first]] = particles[order[first]]
        return particles[order[~first]]


@dataclass(slots=True)
class _State:
    """Values of one step index: after chunk `chunk`, in its last latent frame, [B, C, H * W]."""

    chunk: int
    values: Tensor


class FlowNoise:
    """A NoiseSource whose noise moves with an optical flow; without motion to follow it is the inner source's.

    The inner source gives every fresh value. Each step index is its own noise, carried from chunk to chunk; a chunk
    that is asked for out of order is reached by making the ones before it.

    Args:
        inner: the sampler's noise.
        optical_flow: at the latent's size and in latent frames (`OpticalFlow.fit(...).composed()`): step j moves latent
            frame j to latent frame j + 1.
        counts: latent frames of each chunk.
        start_frame: latent frames before the first chunk (given context).
        first_chunk, last_chunk: chunks whose noise is moved, from 0; the others' is fresh.
        degrade: share of other noise that is mixed in, in [0, 1]; (1-d)*warped + d*other, scaled back to variance 1.
        other: where that noise comes from; needed if degrade is above 0.

    Raises:
        ValueError: degrade out of range.
    """

    def __init__(
        self,
        inner: NoiseSource,
        optical_flow: OpticalFlow | FlowTimeline,
        counts: Sequence[int],
        *,
        start_frame: int = 0,
        first_chunk: int = 0,
        last_chunk: int | None = None,
        degrade: float = 0.0,
        other: NoiseSource | None = None,
    ) -> None:
        if not 0 <= degrade <= 1:
            raise ValueError(f"degrade is {degrade}; it must be in [0, 1].")
        if degrade > 0 and other is None:
            raise ValueError("degrade is above 0 and no other noise is given to mix in.")
        self.inner, self.other, self.degrade = inner, other, degrade
        self.optical_flow, self.counts = optical_flow, list(counts)
        self._starts = list(accumulate(counts, initial=start_frame))  # latent frames before each chunk
        self.first_chunk = first_chunk
        self.last_chunk = len(self.counts) - 1 if last_chunk is None else last_chunk
        self._grid: ParticleGrid
        self._maps: dict[int, Tensor] = {}
        self._next = 0
        self._restart()
        self._states: dict[int, _State] = {}

    def __call__(self, chunk: int, step: int, frames: int) -> Tensor:
        """Noise [B, C, frames, H, W]; see NoiseSource."""
        moved = self.first_chunk <= chunk <= self.last_chunk
        if step == CONTEXT_STEP or not moved:
            return self.inner(chunk, step, frames)
        state = self._states.get(step)
        if state is None or state.chunk >= chunk:
            state = None
        begin = self.first_chunk if state is None else state.chunk + 1
        noise = None
        for index in range(begin, chunk + 1):
            count = frames if index == chunk else self.counts[index]
            noise = self.inner(index, step, count).clone()
            first = self._starts[index]
            values = None if state is None else state.values
            for offset in range(count):
                fresh = noise[:, :, offset].flatten(2)
                if values is not None:
                    source = self.map(first + offset).to(fresh.device)
                    fresh = torch.where(source == FRESH, fresh, values[..., source.clamp(min=0)])
                    noise[:, :, offset] = fresh.unflatten(2, noise.shape[-2:])
                values = fresh
            assert values is not None
            state = _State(index, values)
        assert state is not None and noise is not None
        self._states[step] = state
        if self.degrade > 0:
            assert self.other is not None
            keep, mix = 1 - self.degrade, self.degrade
            noise = (keep * noise + mix * self.other(chunk, step, frames).to(noise)) / (keep**2 + mix**2) ** 0.5
        return noise

    def map(self, latent_frame: int) -> Tensor:
        """[H * W] where each cell's value was one latent frame earlier, or FRESH; the same for every step index."""
        if latent_frame < self._next and latent_frame not in self._maps:
            self._restart()
        while self._next <= latent_frame:
            self._maps[self._next] = self._next_map(self._next)
            self._maps.pop(self._next - MAPS_KEPT, None)
            self._next += 1
        return self._maps[latent_frame]

    def snapshot(self) -> dict[str, Tensor]:
        """What another FlowNoise of the same arguments needs to go on from here; it is not to be changed."""
        tensors = {f"{_VALUES}{step}": state.values for step, state in self._states.items()}
        tensors |= {f"{_CHUNK}{step}": torch.tensor(state.chunk) for step, state in self._states.items()}
        return tensors | {_PLACES: self._grid.places, _NEXT: torch.tensor(self._next)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on after a `snapshot`. Without one (of an empty mapping) the chunks before are made again when asked."""
        if _NEXT not in tensors:
            return
        self._maps.clear()
        self._grid.places, self._next = tensors[_PLACES], int(tensors[_NEXT])
        steps = [int(name.removeprefix(_VALUES)) for name in tensors if name.startswith(_VALUES)]
        self._states = {step: _State(int(tensors[f"{_CHUNK}{step}"]), tensors[f"{_VALUES}{step}"]) for step in steps}

    def _restart(self) -> None:
        self._grid = ParticleGrid(self.optical_flow.height, self.optical_flow.width)
        self._maps.clear()
        self._next = self._starts[min(self.first_chunk, len(self.counts))] + 1

    def _next_map(self, latent_frame: int) -> Tensor:
        step = latent_frame - 1
        if step >= self.optical_flow.steps:
            return torch.full((self.optical_flow.height * self.optical_flow.width,), FRESH, dtype=torch.int64)
        motion, valid = self.optical_flow.at(step, self._grid.places)
        # A particle may stand up to half a cell outside of the outermost centres; the field reaches that far.
        return self._grid.move(motion, valid)
