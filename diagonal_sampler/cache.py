"""The KV cache of chunk-by-chunk generation: fixed slots in one preallocated buffer a layer.

Attention does not care about the order of keys that are already rotated, so nothing is ever rolled, cloned or
concatenated: the current chunk overwrites its own slot at every step, the slot of the oldest chunk becomes the slot
of the next one, and attention reads one contiguous prefix. All bookkeeping is in Python ints. In 8 bits that prefix is
written out, one layer at a time, in the number format of the attention.

Shape suffixes: B batch, L tokens, N heads, D channels a head.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kv_buffers import Buffer, buffer_of, bytes_a_token, new_buffer
from .settings import INT8, CausalSettings
from .wan_layout import HEAD_DIM
from .weight_files import printable

_SNAPSHOT_NAME = re.compile(r"([0-9]+)/([0-9]+)/(keys|values)(.*)", re.DOTALL)
"""condition/layer/what it is and the ending of its buffer's tensor."""
MOVED_FRAMES = 9
"""Latent frames whose keys are moved in time at once: what that takes besides does not grow with the window."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of latent frames: `source` counts inside the chunk, `slot` inside the buffer."""

    source: int
    slot: int
    frames: int


class KVCache:
    """Which latent frames are kept, where, and the keys and values of every condition.

    One cache serves one clip. `begin` opens a chunk, the model's forwards call `condition(key).update(...)` as often
    as they like, `commit` turns the chunk into history. Conditions (positive, negative, ...) share the bookkeeping
    and own their buffers, which are allocated at their first use.

    Args:
        settings: window, sink and positions.
        total_frames: latent frames of the whole clip, context included.
        time_scale: RoPE positions per latent frame, 1 for Wan.
    """

    def __init__(self, settings: CausalSettings, total_frames: int, *, time_scale: float = 1.0) -> None:
        if total_frames < 1:
            raise ValueError(f"total_frames is {total_frames}; a clip has at least 1 latent frame.")
        self.settings = settings
        self.capacity = settings.capacity(total_frames)
        self.total_frames = total_frames
        self.time_scale = time_scale
        self.committed = 0  # latent frames before the current chunk
        self.frames = 0
        self.dropped = 0  # latent frames between sink and history that skip_to left out, and those before a cut
        self.origin = 0  # latent frames before the last cut: positions and sink begin behind them
        self._begun = 0  # of a restored snapshot
        self._window_positions = settings.window_positions(total_frames)
        self._conditions: dict[Hashable, ConditionKV] = {}
        self._restored: list[ConditionKV] = []

    @property
    def _written(self) -> int:
        """Latent frames committed without those that were left out: slots count these."""
        return self.committed - self.dropped

    @property
    def filled(self) -> int:
        """Latent frames that attention reads: sink, history and current chunk."""
        return min(self._written + self.frames, self.capacity)

    @property
    def evicted(self) -> int:
        """Latent frames that have left the cache, the current chunk counted in."""
        return self.committed + self.frames - self.filled

    @property
    def position(self) -> float:
        """RoPE position of the current chunk's first latent frame."""
        return (self.committed - self.origin - self.moved) * self.time_scale

    @property
    def moved(self) -> int:
        """Latent frames by which the history's keys are moved down in time, for the current chunk too."""
        return self.evicted - self.origin if self._window_positions else 0

    @property
    def moves(self) -> bool:
        """Whether the history's keys are moved at any time of this clip."""
        return self._window_positions and self.capacity < self.total_frames

    @property
    def begun(self) -> int:
        """Latent frames of the open chunk, which goes over history; 0 where there is room for it."""
        return self.frames if self._written + self.frames > self.capacity else 0

    def begin(self, frames: int) -> None:
        """Open the next chunk of `frames` latent frames. The first write evicts what has to go.

        Raises:
            ValueError: the chunk does not fit beside the sink, or goes beyond the clip.
            RuntimeError: a chunk is open already.
        """
        if self.frames:
            raise RuntimeError(
                "KVCache.begin inside a chunk, whose writes may have evicted history; commit() it first."
            )
        if frames < 1 or self.committed + frames > self.total_frames:
            raise ValueError(
                f"A chunk of {frames} latent frames after {self.committed} does not fit a clip of {self.total_frames}."
            )
        if self._written + frames > self.capacity and frames > self.capacity - self.settings.sink:
            raise ValueError(
                f"A chunk of {frames} latent frames does not fit a window of {self.capacity} beside a sink of "
                f"{self.settings.sink}; use a window of at least {self.settings.sink + frames}."
            )
        if frames < self._begun:
            raise ValueError(
                f"The snapshot was taken in a chunk of {self._begun} latent frames, which lie over history that "
                f"one of {frames} would see."
            )
        self.frames, self._begun = frames, 0

    def reopen(self, frames: int) -> None:
        """Open the last chunk again, of `frames` latent frames, to be made anew: for a snapshot of before it."""
        if self.frames:
            raise RuntimeError("KVCache.reopen inside a chunk.")
        self.committed, self.frames = self.committed - frames, frames

    def commit(self) -> None:
        """Turn the current chunk, as its last forward wrote it, into sink or history."""
        if self.frames == 0:
            raise RuntimeError("KVCache.commit outside a chunk; call begin() first.")
        self.committed += self.frames
        self.frames = 0

    def kept_before(self, committed: int, frames: int, origin: int = 0) -> tuple[range, range]:
        """Sink and history, by latent frame, that a chunk of `frames` sees after `committed` latent frames.

        origin: latent frames before the last cut.
        """
        kept = min(committed - origin, self.capacity - frames)
        sink = min(self.settings.sink, kept)
        return range(origin, origin + sink), range(committed - (kept - sink), committed)

    def rewind(self, frames: int) -> tuple[range, range]:
        """Forget all keys and values, so that those which the next chunk sees can be written again.

        For each of the two runs call `skip_to` with its first frame, then begin, write and commit its frames in
        pieces of any size. The cache is then one that never held anything else.

        Args:
            frames: latent frames of the next chunk.

        Returns:
            `kept_before` the next chunk: sink and history.

        Raises:
            RuntimeError: inside a chunk.
        """
        if self.frames:
            raise RuntimeError("KVCache.rewind inside a chunk; commit() it first.")
        kept = self.kept_before(self.committed, frames, self.origin)
        self._begin_at(self.origin)
        return kept

    def cut(self) -> None:
        """Forget all keys and values, sink included: the next chunk is as the first one of another clip.

        Positions begin anew with it, also where they count from the start of the clip.

        Raises:
            RuntimeError: inside a chunk.
        """
        if self.frames:
            raise RuntimeError("KVCache.cut inside a chunk; commit() it first.")
        self.origin = self.committed
        self._begin_at(self.origin)

    def _begin_at(self, origin: int) -> None:
        """Stand behind `origin` latent frames, the last cut's, with nothing written."""
        self.committed = self.dropped = origin
        self._begun = 0
        self._mark_written()

    def skip_to(self, frame: int) -> None:
        """Go on at a later latent frame, as if those between had been evicted. The sink must be full.

        Raises:
            ValueError: a frame before the current one, or a sink that would stay incomplete.
            RuntimeError: inside a chunk.
        """
        if self.frames:
            raise RuntimeError("KVCache.skip_to inside a chunk; commit() it first.")
        if frame == self.committed:
            return
        if frame < self.committed or self._written < self.settings.sink:
            raise ValueError(
                f"skip_to latent frame {frame} after {self.committed} with {self._written} written; it must lie ahead, "
                f"and the sink's {self.settings.sink} frames must be written first."
            )
        self.dropped += frame - self.committed
        self.committed = frame
        self._mark_written()

    def _mark_written(self) -> None:
        """Every layer's keys are those of the frames committed now, where they are now."""
        for condition in (*self._conditions.values(), *self._restored):
            for layer in condition._layers.values():
                layer.shift, layer.written_until = self.moved, self.committed

    def segments(self) -> list[Segment]:
        """Slots of the current chunk: the sink's own, then a ring over the rest of the buffer."""
        sink = self.settings.sink
        ring = self.capacity - sink
        out: list[Segment] = []
        source = 0
        while source < self.frames:
            frame = self._written + source
            if frame < sink:
                slot, room = frame, sink - frame
            else:
                offset = (frame - sink) % ring
                slot, room = sink + offset, ring - offset
            run = min(room, self.frames - source)
            out.append(Segment(source, slot, run))
            source += run
        return out

    def condition(self, key: Hashable) -> ConditionKV:
        """Buffers of one condition, made at the first call."""
        found = self._conditions.get(key)
        if found is None:
            found = self._conditions[key] = self._restored.pop(0) if self._restored else ConditionKV(self)
        return found

    def snapshot(self) -> dict[str, Tensor]:
        """Keys and values after a committed chunk, by "condition/layer/keys" and ".../values"; copies on the CPU.

        In 8 bits their scales are beside them, in "..._scale".

        With `committed`, `dropped`, `moved` and `begun` this is all that a later run needs to go on: see
        `restore`. In an open chunk it is what that chunk sees of those before it, also where a forward was broken off:
        layers that it had not reached are brought to where the others are. The chunk is then to be made from its
        beginning, or a longer one in its place.
        """
        out: dict[str, Tensor] = {}
        filled = min(self._written, self.capacity)
        if not filled:  # a window of one chunk: what is rewritten for it is nothing
            return out
        segments = self.segments()
        for number, condition in enumerate(self._conditions.values()):
            for index, layer in condition._layers.items():
                each = layer.keys.shape[1] // self.capacity
                if self.frames:
                    condition._advance(layer, each, segments)
                tokens = each * filled
                for part, buffer in (("keys", layer.keys), ("values", layer.values)):
                    for ending, tensor in buffer.tensors.items():
                        out[f"{number}/{index}/{part}{ending}"] = tensor[:, :tokens].to("cpu", copy=True)
        return out

    def restore(
        self,
        committed: int,
        snapshot: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        *,
        dropped: int = 0,
        moved: int | None = None,
        begun: int = 0,
        origin: int = 0,
    ) -> None:
        """Continue where a snapshot was taken, in a cache of the same settings that is still unused.

        Conditions are matched in the order of their first use, which is the same in every run of one graph. Of another
        length the cache may count positions in another way: the history is moved from where it was then.

        Args:
            committed: latent frames that were committed then.
            dropped, moved, begun, origin: the cache's of these names then. moved is None where a snapshot does not say:
                it is then as this cache would count.

        Raises:
            ValueError: a snapshot that does not fit this cache.
            RuntimeError: the cache is in use.
        """
        if self.committed or self.frames or self._conditions:
            raise RuntimeError("KVCache.restore into a cache that is in use; make a new one.")
        if not 0 < committed < self.total_frames:
            raise ValueError(f"The snapshot ends at latent frame {committed}; the clip has {self.total_frames}.")
        if not 0 <= dropped <= committed:
            raise ValueError(f"dropped is {dropped}; it must be in [0, {committed}], the latent frames committed.")
        if not 0 <= origin <= dropped:
            raise ValueError(f"origin is {origin}; it must be in [0, {dropped}], the latent frames dropped.")
        self.committed, self.dropped, self._begun, self.origin = committed, dropped, begun, origin
        filled = self.filled
        if moved is None:
            self.frames = begun
            moved, self.frames = self.moved, 0
        layers: dict[tuple[int, int], dict[str, dict[str, Tensor]]] = {}
        for name, tensor in snapshot.items() if filled else ():
            found = _SNAPSHOT_NAME.fullmatch(name)
            if found is None:
                raise ValueError(
                    f"The snapshot's {printable(name)!r} is no layer's keys or values: it belongs to other settings; "
                    "restart."
                )
            number, index, kind, ending = found.groups()
            of_layer = layers.setdefault((int(number), int(index)), {"keys": {}, "values": {}})
            of_layer[kind][ending] = tensor
        restored: dict[int, ConditionKV] = {}
        for (number, index), parts in layers.items():
            buffers = [self._restored_buffer(f"{number}/{index}/{kind}", parts[kind], device) for kind in parts]
            condition = restored.setdefault(number, ConditionKV(self))
            condition._layers[index] = _Layer(*buffers, moved, self.committed)
        self._restored = [restored[number] for number in sorted(restored)]

    def _restored_buffer(self, name: str, tensors: Mapping[str, Tensor], device: torch.device | str) -> Buffer:
        """A buffer of this cache's capacity that begins with a snapshot's tokens."""
        for tensor in tensors.values():
            if tensor.shape[1] % self.filled:
                raise ValueError(
                    f"The snapshot's {name} has {tensor.shape[1]} tokens, no multiple of the {self.filled} latent "
                    "frames in this window: it belongs to other settings or to another length; restart."
                )
        tokens = max((tensor.shape[1] for tensor in tensors.values()), default=0) // self.filled
        return buffer_of(self.settings.kv_cache_dtype, tensors, self.capacity * tokens, torch.device(device))

    def forget(self, committed: int) -> None:
        """Drop every buffer and stand behind `committed` latent frames: for a snapshot whose window is written anew."""
        self.free()
        self.committed, self.frames, self.dropped, self._begun = committed, 0, self.origin, 0

    def free(self) -> None:
        """Drop every buffer, also of conditions that someone still holds. The cache must not be used afterwards."""
        for condition in self._conditions.values():
            condition.free()
        self._conditions.clear()
        self._restored.clear()

    @property
    def nbytes(self) -> int:
        """Bytes allocated so far."""
        return sum(condition.nbytes for condition in (*self._conditions.values(), *self._restored))

    @staticmethod
    def bytes_needed(
        settings: CausalSettings,
        total_frames: int,
        *,
        layers: int,
        tokens_per_frame: int,
        width: int,
        element_bytes: int,
        batch: int = 1,
        conditions: int = 1,
        head_dim: int = HEAD_DIM,
    ) -> int:
        """Bytes that a clip's cache will take, before anything is allocated; in 8 bits with one layer written out.

        Args:
            layers: transformer blocks.
            tokens_per_frame: tokens of one latent frame.
            width: channels of a key, heads * head_dim.
            element_bytes: bytes a channel, as it is computed (2 for bf16).
            conditions: 1 without guidance, 2 with.
        """
        tokens = batch * settings.capacity(total_frames) * tokens_per_frame
        kept = layers * conditions * bytes_a_token(settings.kv_cache_dtype, width, head_dim, element_bytes)
        written_out = width * element_bytes if settings.kv_cache_dtype == INT8 else 0
        return 2 * tokens * (kept + written_out)


@dataclass(slots=True)
class _Layer:
    keys: Buffer
    values: Buffer
    # How far this layer's history has been moved in time, and through which chunk it was written.
    shift: int = 0
    written_until: int = 0


@dataclass(slots=True)
class ConditionKV:
    """Keys and values of one condition, a pair of [B, capacity*tokens, N, D] buffers a layer."""

    cache: KVCache
    _layers: dict[int, _Layer] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        buffers = [buffer for layer in self._layers.values() for buffer in (layer.keys, layer.values)]
        return sum(tensor.nbytes for buffer in buffers for tensor in buffer.tensors.values())

    def free(self) -> None:
        """Drop the buffers of every layer."""
        self._layers.clear()

    def update(
        self, index: int, keys_BLND: Tensor, values_BLND: Tensor, *, write: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Write the current chunk and return everything that it attends to.

        With grad mode off the results are views of the buffer's prefix, in 8 bits copies in which the current chunk is
        exact. With it on they are copies, in which the current chunk keeps its graph and the history is detached:
        backward may need them after the buffer has been overwritten, even where the queries alone are trained. The
        buffer receives detached values.

        Args:
            index: the layer.
            keys_BLND: rotated keys of the current chunk, [B, frames*tokens_per_frame, N, D].
            values_BLND: values, the same shape.
            write: False leaves in the buffer what the chunk's forward wrote: for a prediction beside it, as guidance
                makes them. The results are copies then, too.

        Returns:
            keys and values [B, filled*tokens_per_frame, N, D]; the order of the frames is the buffer's.
        """
        cache = self.cache
        if cache.frames == 0:
            raise RuntimeError("KVCache.update outside a chunk; call begin() first.")
        tokens, remainder = divmod(keys_BLND.shape[1], cache.frames)
        if remainder:
            raise ValueError(
                f"{keys_BLND.shape[1]} tokens are no multiple of the chunk's {cache.frames} latent frames."
            )
        layer = self._layer(index, keys_BLND, values_BLND, tokens)
        segments = cache.segments()
        self._advance(layer, tokens, segments)

        for rows, own in _rows(segments, tokens) if write else ():
            layer.keys.write(rows, keys_BLND[:, own].detach())
            layer.values.write(rows, values_BLND[:, own].detach())

        pairs = ((layer.keys, keys_BLND), (layer.values, values_BLND))
        if torch.is_grad_enabled() or not write:
            kept = self._kept_runs(segments, tokens)
            keys, values = (
                torch.cat([*(buffer.read(run, own.dtype) for run in kept), own], dim=1) for buffer, own in pairs
            )
        elif cache.settings.kv_cache_dtype == INT8:
            keys, values = (self._written_out(buffer, own, segments, tokens) for buffer, own in pairs)
        else:
            filled = slice(0, cache.filled * tokens)
            keys, values = (buffer.read(filled, own.dtype) for buffer, own in pairs)
        return keys, values

    def _written_out(self, buffer: Buffer, own_BLND: Tensor, segments: list[Segment], tokens: int) -> Tensor:
        """The buffer's prefix in the format of the current chunk, which is in it as it came."""
        batch, _, heads, head_dim = own_BLND.shape
        out = own_BLND.new_empty((batch, self.cache.filled * tokens, heads, head_dim))
        for run in self._kept_runs(segments, tokens):
            buffer.copy_to(run, out[:, run])
        for rows, own in _rows(segments, tokens):
            out[:, rows] = own_BLND[:, own]
        return out

    def _layer(self, index: int, keys_BLND: Tensor, values_BLND: Tensor, tokens: int) -> _Layer:
        layer = self._layers.get(index)
        batch, _, heads, head_dim = keys_BLND.shape
        room = self.cache.capacity * tokens
        shape = (batch, room, heads, head_dim)
        if layer is None:
            if self.cache._written:
                raise RuntimeError(
                    f"This condition has no keys for the first {self.cache.committed} latent frames: it must take part "
                    "in every chunk from the first one on."
                )
            keys, values = (
                new_buffer(self.cache.settings.kv_cache_dtype, own, room) for own in (keys_BLND, values_BLND)
            )
            layer = self._layers[index] = _Layer(keys, values, written_until=self.cache.committed)
        elif layer.keys.shape != shape:
            raise ValueError(
                f"Layer {index} was opened with keys {tuple(layer.keys.shape)} and now gets {shape}; one cache "
                "serves one size and batch."
            )
        return layer

    def _advance(self, layer: _Layer, tokens: int, segments: list[Segment]) -> None:
        """Move the surviving history down in time, once per chunk, when positions count inside the window."""
        cache = self.cache
        if layer.written_until < cache.committed:
            raise RuntimeError(
                f"Latent frames {layer.written_until} to {cache.committed} of a layer were committed unwritten."
            )
        delta = cache.moved - layer.shift
        if delta:
            layer.written_until = -1  # broken off in between, it is of no use to anybody
            first = cache.settings.sink * tokens
            for run in self._kept_runs(segments, tokens):
                moved = slice(max(run.start, first), run.stop)
                for start in range(moved.start, moved.stop, MOVED_FRAMES * tokens):
                    piece = slice(start, min(start + MOVED_FRAMES * tokens, moved.stop))
                    layer.keys.move(piece, -delta * cache.time_scale)
            layer.shift = cache.moved
        layer.written_until = cache.committed + cache.frames

    def _kept_runs(self, segments: list[Segment], tokens: int) -> list[slice]:
        """Rows of the sink and the history that the current chunk does not overwrite."""
        filled = self.cache.filled * tokens
        runs: list[slice] = []
        at = 0
        for segment in sorted(segments, key=lambda s: s.slot):
            if at < segment.slot * tokens:
                runs.append(slice(at, min(segment.slot * tokens, filled)))
            at = (segment.slot + segment.frames) * tokens
        if at < filled:
            runs.append(slice(at, filled))
        return [run for run in runs if run.start < run.stop]


def _rows(segments: list[Segment], tokens: int) -> Iterator[tuple[slice, slice]]:
    """Rows of the buffer and of the chunk, for each segment."""
    for segment in segments:
        yield (
            slice(segment.slot * tokens, (segment.slot + segment.frames) * tokens),
            slice(segment.source * tokens, (segment.source + segment.frames) * tokens),
        )
