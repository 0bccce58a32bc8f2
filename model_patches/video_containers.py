"""The two file formats of an encoded video: how ffmpeg's stream is cut into frames, moved in time, and ended.

An MP4 grows as fragments, one a frame, and plays at any moment; but editors and some players want one index of the
whole file. When the video is done the index is appended, and 16 bytes near the start are changed from a free box into
the head of an mdat that holds all fragments: from then on it is a plain MP4, its frames where they were.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

KEYFRAME_SECONDS = 2
"""Longest time between key frames: a player can begin, or jump, there."""
MAX_CRF = 51
VP9_MAX_CRF = 63
MIN_TICKS_PER_SECOND = 10_000
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_IN_RUST = (112,) if os.name == "nt" else _FULL
"""The numbers of a full disk in a SafetensorError, which has them in its text alone; on Windows they are its own."""


class VideoWriteError(RuntimeError):
    """The video cannot be written; the message says why and what helps. What was written before is kept."""


class VideoHeldError(VideoWriteError):
    """A video of an earlier run may not be changed now: a program has it open, or it is read-only."""

    def __init__(self, name: str, error: OSError) -> None:
        """name: of the file that may not be changed."""
        super().__init__(
            f"{name} cannot be changed ({error.strerror or error}), so that the video cannot be gone on with. Close "
            "the program that has it open, or allow that it is written if it is read-only; then queue the same graph "
            "again. Or set restart, to begin a new video."
        )


def way_out(error: Exception, name: str) -> str:
    """What helps where a file could not be written, as a part of a sentence."""
    if isinstance(error, PermissionError):
        return f"close the program that has {name} open, or allow that it is written if it is read-only"
    said = re.search(r"\(os error (\d+)\)", str(error))
    full = error.errno in _FULL if isinstance(error, OSError) else said is not None and int(said[1]) in _FULL_IN_RUST
    if full:
        return "free some space"
    return "mend that, or begin anew on another disk (filename_prefix, or ComfyUI's --output-directory)"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSpec:
    """What a writer needs to know.

    Attributes:
        width, height: pixels, even.
        rate: frames a second.
        crf: quality from 1 (best) to 51, in H.264's measure; PNG has none.
        metadata: what a reader finds by name, as text or as anything JSON can hold.
    """

    width: int
    height: int
    rate: Fraction
    crf: float
    metadata: Mapping[str, Any]

    def texts(self) -> dict[str, str]:
        """The metadata as texts, in ComfyUI's way: what is no text becomes JSON. All of it can be encoded as UTF-8."""
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.metadata.items()}
        return {_utf8(key).decode(): _utf8(text).decode() for key, text in texts.items()}


@dataclass(frozen=True, slots=True)
class Patch:
    """Bytes of a header that change: where, and what is written there at once."""

    at: int
    data: bytes


class Container(ABC):
    """One file format: how ffmpeg is asked for it, and how its stream is cut and moved in time."""

    def __init__(self, spec: VideoSpec) -> None:
        self.spec = spec

    @abstractmethod
    def arguments(self) -> list[str]:
        """ffmpeg's options for codec and format."""

    @abstractmethod
    def cut(self, stream: Iterator[bytes], first_frame: int) -> Iterator[tuple[bool, bytes]]:
        """Cut a muxer's stream, which begins at time 0, into (is it the header, bytes); one frame each otherwise.

        Args:
            first_frame: the frame of the clip that this stream begins with; the frames are moved there.

        Raises:
            VideoWriteError: a stream of another build than expected.
        """

    @abstractmethod
    def prepared(self, header: bytes, texts: Mapping[str, str]) -> bytes:
        """The muxer's header with texts by name, where ComfyUI's own files have them, and room for what the end brings.

        ffmpeg cannot write the texts: a command line is too short for a workflow, and its MP4 muxer writes broken boxes
        when a header that does not fit its buffer goes to a pipe.
        """

    @abstractmethod
    def growing(self, header: bytes) -> Patch:
        """What a prepared header has in its room while the video grows. Raises VideoWriteError: there is no room."""

    @abstractmethod
    def finished(self, header: bytes, frames: int, file: int, size: int) -> tuple[bytes, Patch]:
        """What ends a video: bytes to append first, which mean nothing yet, and then what the header has in its room.

        Args:
            header: prepared.
            frames: of the whole video.
            file: descriptor of the video, open for reading; its position is moved.
            size: bytes of the video so far.

        Raises:
            VideoWriteError: a file that is not what was written.
        """

    def codec_parameters(self, header: bytes) -> bytes:
        """What all streams of one file must agree on."""
        return b""


class _Buffer:
    """Takes exact numbers of bytes from a stream that comes in pieces."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        self.stream = stream
        self.held = bytearray()

    def take(self, count: int) -> bytes | None:
        """The next `count` bytes, None where the stream ends before."""
        while len(self.held) < count:
            piece = next(self.stream, b"")
            if not piece:
                return None
            self.held += piece
        taken = bytes(self.held[:count])
        del self.held[:count]
        return taken


class Mp4Container(Container):
    """H.264 in MP4 (ISO/IEC 14496-12).

    While it grows: ftyp, the metadata, a free box of 16 bytes, moov, then a moof and an mdat for each frame. Finished:
    ftyp, the metadata, an mdat around all of that, moov with the place of every frame.
    """

    def __init__(self, spec: VideoSpec) -> None:
        super().__init__(spec)
        factor = math.ceil(MIN_TICKS_PER_SECOND / spec.rate.numerator)
        self.ticks_per_second = spec.rate.numerator * factor
        self.ticks_per_frame = spec.rate.denominator * factor

    def arguments(self) -> list[str]:
        keyframes = max(1, round(KEYFRAME_SECONDS * self.spec.rate))
        codec = ["-c:v", "libx264", "-preset", "fast", "-tune", "zerolatency", "-bf", "0", "-g", str(keyframes)]
        flags = "empty_moov+default_base_moof+frag_every_frame+skip_trailer"
        timescale = ["-video_track_timescale", str(self.ticks_per_second)]
        return [*codec, "-crf", f"{self.spec.crf:g}", *timescale, "-movflags", flags, "-f", "mp4"]

    def cut(self, stream: Iterator[bytes], first_frame: int) -> Iterator[tuple[bool, bytes]]:
        buffer = _Buffer(stream)
        header, fragment = b"", b""
        while (start := buffer.take(8)) is not None:
            size, kind = struct.unpack(">I4s", start)
            if size == _LONG_BOX:  # around all that follows, in a finished video
                size, kind = len(_ROOM), b"free"
            body = buffer.take(size - 8) if size >= 8 else None
            if body is None:
                return
            if kind in (b"ftyp", b"udta", b"free", b"moov"):
                header += start + body
                if kind == b"moov":
                    yield True, header
            elif kind == b"moof":
                fragment = self._moved(start + body, first_frame)
            elif kind == b"mdat" and fragment:
                yield False, fragment + start + body
                fragment = b""

    def _moved(self, moof: bytes, first_frame: int) -> bytes:
        """A fragment, numbered and timed as a part of the whole clip."""
        out = bytearray(moof)
        number = _content(moof, b"moof", b"mfhd").start + 4
        (sequence,) = struct.unpack_from(">I", out, number)
        struct.pack_into(">I", out, number, sequence + first_frame)
        time = _content(moof, b"moof", b"traf", b"tfdt").start
        if out[time] != 1:
            raise VideoWriteError("ffmpeg wrote fragments with 32-bit times; another build of ffmpeg is needed.")
        (ticks,) = struct.unpack_from(">Q", out, time + 4)
        struct.pack_into(">Q", out, time + 4, ticks + first_frame * self.ticks_per_frame)
        return bytes(out)

    def prepared(self, header: bytes, texts: Mapping[str, str]) -> bytes:
        moov = _whole(header, b"moov")
        before, index = header[: moov.start], header[moov]
        if not texts:
            return before + _ROOM + index
        # ComfyUI's web page looks for the texts in the first 2 MB, where a long video has no index; hence outside moov.
        # ffmpeg, and PyAV, would put both together: the outer ones have a handler that they pass over.
        content = index[8:]
        with contextlib.suppress(VideoWriteError):
            own = _whole(content, b"udta")  # ffmpeg's own, which has nothing to say
            content = content[: own.start] + content[own.stop :]
        return before + _texts(texts, b"null") + _ROOM + _box(b"moov", content + _texts(texts, b"mdta"))

    def growing(self, header: bytes) -> Patch:
        return Patch(self._room(header), _ROOM)

    def finished(self, header: bytes, frames: int, file: int, size: int) -> tuple[bytes, Patch]:
        index = self._index(header, *self._samples(file, len(header), size, frames))
        # The index comes as the content of a free box, whose head the mdat then ends with.
        appended = _box(b"free", index)
        room = self._room(header)
        around = size + 8 - room
        return appended, Patch(room, struct.pack(">I4sQ", _LONG_BOX, b"mdat", around))

    def _room(self, header: bytes) -> int:
        at = _content(header, b"moov").start - 8 - len(_ROOM)
        if at < 0 or header[at + 4 : at + 8] not in (b"free", b"mdat"):
            raise VideoWriteError("The video has no room for an index: an older version of this pack began it.")
        return at

    def _samples(self, file: int, start: int, end: int, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Byte offset [frames], bytes [frames] and being a key frame [frames] of what lies in the fragments."""
        offsets, sizes = np.zeros(frames, np.uint64), np.zeros(frames, np.uint32)
        keys = np.zeros(frames, bool)
        os.lseek(file, start, os.SEEK_SET)
        at, frame = start, 0
        with os.fdopen(file, "rb", closefd=False) as reader, contextlib.suppress(struct.error):  # the file is shorter
            while at < end and frame < frames:
                head = reader.read(8)
                size, kind = struct.unpack(">I4s", head)
                if kind != b"moof":
                    break
                moof = head + reader.read(size - 8)
                size, kind = struct.unpack(">I4s", reader.read(8))
                if kind != b"mdat":
                    break
                offsets[frame], sizes[frame] = at + len(moof) + 8, size - 8
                keys[frame] = not self._depends_on_others(moof)
                at += len(moof) + size
                reader.seek(at)
                frame += 1
        if at != end or frame != frames or os.fstat(file).st_size < end:
            raise VideoWriteError("The video's fragments are not those that were written; another program changed it.")
        return offsets, sizes, keys

    @staticmethod
    def _depends_on_others(moof: bytes) -> bool:
        run = _content(moof, b"moof", b"traf", b"trun").start
        (flags,) = struct.unpack_from(">I", moof, run)
        if flags & 0x4:  # first-sample-flags, behind the count and, with 0x1, the data's offset
            (sample,) = struct.unpack_from(">I", moof, run + (12 if flags & 0x1 else 8))
            return bool(sample & _NOT_A_KEY_FRAME)
        return True  # the header's default

    def _index(self, header: bytes, offsets: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> bytes:
        """A moov of a plain MP4 whose frames lie at `offsets`, each a chunk of its own."""
        count = len(offsets)
        ticks = count * self.ticks_per_frame
        (keyframes,) = np.nonzero(keys)
        tables = {
            b"stts": struct.pack(">IIII", 0, 1, count, self.ticks_per_frame),
            b"stss": struct.pack(">II", 0, len(keyframes)) + (keyframes + 1).astype(">u4").tobytes(),
            b"stsc": struct.pack(">IIIII", 0, 1, 1, 1, 1),
            b"stsz": struct.pack(">III", 0, 0, count) + sizes.astype(">u4").tobytes(),
            b"co64": struct.pack(">II", 0, count) + offsets.astype(">u8").tobytes(),
        }
        stsd = header[_whole(header, *_DESCRIPTION)]
        mvhd = bytearray(header[_whole(header, b"moov", b"mvhd")])
        (movie_rate,) = struct.unpack_from(">I", mvhd, 20)
        duration = -(-ticks * movie_rate // self.ticks_per_second)
        struct.pack_into(">I", mvhd, 24, duration)
        tkhd = bytearray(header[_whole(header, b"moov", b"trak", b"tkhd")])
        struct.pack_into(">I", tkhd, 28, duration)
        # Version 1: a day at 240 frames a second has more ticks than 32 bits hold.
        mdhd = _box(b"mdhd", struct.pack(">IQQIQHH", 1 << 24, 0, 0, self.ticks_per_second, ticks, _UNDETERMINED, 0))
        media = b"moov", b"trak", b"mdia"
        stbl = _box(b"stbl", stsd + b"".join(_box(kind, content) for kind, content in tables.items()))
        parts = [header[_whole(header, *media, b"minf", kind)] for kind in (b"vmhd", b"dinf")]
        mdia = _box(b"mdia", mdhd + header[_whole(header, *media, b"hdlr")] + _box(b"minf", b"".join(parts) + stbl))
        udta = b""
        with contextlib.suppress(VideoWriteError):  # no texts, or an older version of this pack began it
            udta = header[_whole(header, b"moov", b"udta")]
        return _box(b"moov", bytes(mvhd) + _box(b"trak", bytes(tkhd) + mdia) + udta)

    def codec_parameters(self, header: bytes) -> bytes:
        at = header.index(b"avcC", _content(header, *_DESCRIPTION).start)
        (size,) = struct.unpack_from(">I", header, at - 4)
        return header[at : at - 4 + size]


_LONG_BOX = 1
"""A box's size where the true one follows its name in eight bytes."""
_ROOM = struct.pack(">I4s", 16, b"free") + bytes(8)
"""A free box as long as the head of a long one."""
_DESCRIPTION = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
_NOT_A_KEY_FRAME = 0x10000
_UNDETERMINED = 0x55C4
"""The language 'und'."""


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


_TEXT = 1
"""QuickTime's number for a text value."""


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def _texts(texts: Mapping[str, str], handler: bytes) -> bytes:
    """Metadata by name, as QuickTime has it and as ComfyUI writes it, where the handler is mdta."""
    keys = struct.pack(">II", 0, len(texts)) + b"".join(_box(b"mdta", _utf8(key)) for key in texts)
    items = b"".join(
        _box(struct.pack(">I", number), _box(b"data", struct.pack(">II", _TEXT, 0) + _utf8(text)))
        for number, text in enumerate(texts.values(), 1)
    )
    kind = _box(b"hdlr", struct.pack(">II4s", 0, 0, handler) + bytes(13))
    meta = _box(b"meta", bytes(4) + kind + _box(b"keys", keys) + _box(b"ilst", items))
    return _box(b"udta", meta)


def _content(data: bytes, *path: bytes) -> slice:
    """Where the content of a box is, by the names from the outermost in. Raises VideoWriteError: it is not there."""
    at, end = 0, len(data)
    for wanted in path:
        while at + 8 <= end:
            size, kind = struct.unpack_from(">I4s", data, at)
            size = len(_ROOM) if size == _LONG_BOX else max(size, 8)
            if kind == wanted:
                break
            at += size
        else:
            raise VideoWriteError(f"ffmpeg wrote an MP4 without {wanted.decode()}; another build of ffmpeg is needed.")
        at, end = at + 8, at + size
    return slice(at, end)


def _whole(data: bytes, *path: bytes) -> slice:
    """As `_content`, with the box's head."""
    found = _content(data, *path)
    return slice(found.start - 8, found.stop)


_EBML_SEGMENT = 0x18538067
_EBML_SEEK_HEAD = 0x114D9B74
_EBML_INFO = 0x1549A966
_EBML_CLUSTER = 0x1F43B675
_EBML_TIME = 0xE7
_EBML_VOID = 0xEC
_DURATION_START = b"\x44\x89\x88"
"""Id and size of a duration in eight bytes."""
_NO_DURATION = bytes([_EBML_VOID, 0x89]) + bytes(9)
"""A void element as long as a duration."""


class WebmContainer(Container):
    """VP9 in WebM (Matroska, RFC 9559): a header, then a cluster for each frame; times are whole milliseconds."""

    def arguments(self) -> list[str]:
        keyframes = max(1, round(KEYFRAME_SECONDS * self.spec.rate))
        crf = round(self.spec.crf * VP9_MAX_CRF / MAX_CRF)
        speed = ["-deadline", "realtime", "-cpu-used", "5", "-row-mt", "1", "-lag-in-frames", "0", "-auto-alt-ref", "0"]
        codec = ["-c:v", "libvpx-vp9", *speed, "-b:v", "0", "-crf", str(crf), "-g", str(keyframes)]
        return [*codec, "-f", "webm", "-cluster_time_limit", "0", "-write_crc32", "0"]

    def cut(self, stream: Iterator[bytes], first_frame: int) -> Iterator[tuple[bool, bytes]]:
        buffer = _Buffer(stream)
        header: bytes | None = b""
        frame = first_frame
        while (element := _take_element(buffer)) is not None:
            kind, head, body = element
            if kind == _EBML_CLUSTER:
                if header is not None:
                    yield True, header
                    header = None
                yield False, self._moved(body, frame)
                frame += 1
            elif header is not None:
                header += head + body

    def prepared(self, header: bytes, texts: Mapping[str, str]) -> bytes:
        out = b""
        for kind, head, body in _elements(header):
            if kind == _EBML_INFO:
                out += _element(kind, body + _NO_DURATION)
            elif kind not in (_EBML_SEEK_HEAD, _EBML_VOID):  # a list of places that would not be right any more
                out += head + body
        if not texts:
            return out
        # Upper case, as ffmpeg has it and as ComfyUI's web page reads it.
        simple = b"".join(
            _element(0x67C8, _element(0x45A3, _utf8(key.upper())) + _element(0x4487, _utf8(text)))
            for key, text in texts.items()
        )
        return out + _element(0x1254C367, _element(0x7373, _element(0x63C0, b"") + simple))

    def growing(self, header: bytes) -> Patch:
        return Patch(self._room(header), _NO_DURATION)

    def finished(self, header: bytes, frames: int, file: int, size: int) -> tuple[bytes, Patch]:
        return b"", Patch(self._room(header), _DURATION_START + struct.pack(">d", 1000 * frames / self.spec.rate))

    def _room(self, header: bytes) -> int:
        at = 0
        for kind, head, body in _elements(header):
            at += len(head) + len(body)
            place = at - len(_NO_DURATION)
            if kind == _EBML_INFO and header[place:].startswith((_NO_DURATION, _DURATION_START)):
                return place
        raise VideoWriteError("The video has no room for its length: an older version of this pack began it.")

    def _moved(self, body: bytes, frame: int) -> bytes:
        """A cluster of one frame, timed as a part of the whole clip."""
        kind, start = _ebml_number(body, 0, keep_marker=True)
        length, start = _ebml_number(body, start)
        if kind != _EBML_TIME:
            raise VideoWriteError("ffmpeg wrote a cluster without its time first; another build of ffmpeg is needed.")
        time = bytes([_EBML_TIME, 0x88]) + struct.pack(">Q", round(1000 * frame / self.spec.rate))
        return _element(_EBML_CLUSTER, time + body[start + length :])


def _element(kind: int, content: bytes) -> bytes:
    """An EBML element with its size in eight bytes."""
    return kind.to_bytes(-(-kind.bit_length() // 8), "big") + struct.pack(">Q", len(content) | 1 << 56) + content


def _ebml_number(data: bytes, at: int, *, keep_marker: bool = False) -> tuple[int, int]:
    """A number of variable length at `at`, and where it ends."""
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    return (value if keep_marker else value & ~(1 << 7 * length)), at + length


def _take_element(buffer: _Buffer) -> tuple[int, bytes, bytes] | None:
    """The next element: its id, the bytes before its content, and its content (none for the open-ended segment)."""
    head = b""
    values = []
    for keep_marker in (True, False):
        first = buffer.take(1)
        if first is None:
            return None
        rest = buffer.take(8 - first[0].bit_length())
        if rest is None:
            return None
        head += first + rest
        values.append(_ebml_number(first + rest, 0, keep_marker=keep_marker)[0])
    kind, size = values
    if kind == _EBML_SEGMENT:
        return kind, head, b""
    body = buffer.take(size)
    return None if body is None else (kind, head, body)


def _elements(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """As `_take_element`, all of them."""
    buffer = _Buffer(iter([data]))
    while (element := _take_element(buffer)) is not None:
        yield element


CONTAINERS: dict[str, type[Container]] = {".mp4": Mp4Container, ".webm": WebmContainer}
