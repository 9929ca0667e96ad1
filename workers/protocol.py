"""Messages between a GPU worker (the host) and its runner processes: one struct per message, framed msgpack on a socket pair.

A frame is a 4-byte big-endian length followed by that many bytes. Both sides decode strictly, so that a runner that was
subverted by a hostile model file can send nothing but these.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

import msgspec

from lmweb.decoding import prepare
from workers.events import AnyEvent, ErrorInfo, Stats
from workers.schemas import EmbeddingRequest, GenerationRequest, LoadConfig

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Base of all messages."""


# --- host to runner ---------------------------------------------------------------------------------------------------


class Load(Message):
    """The first message: load this file with this engine, and the file of ``config.draft_model`` from ``draft_path``."""

    engine: str
    path: str
    config: LoadConfig
    draft_path: str = ""
    step_log: str = ""


class Submit(Message):
    """Start a generation. ``output_tokens`` continues an interrupted one: they are prefilled after the prompt, not sent again.

    ``owner`` tags the KV cache: private prefixes are shared only within one owner. ``chat_template`` takes the place of the one in
    the model's file, for this request. ``draft_path`` is the file of ``request.draft_model``; empty if that is gone.
    """

    generation_id: str
    request: GenerationRequest
    owner: str
    output_tokens: list[int] = []
    chat_template: str = ""
    draft_path: str = ""


class Embed(Message):
    """Compute embeddings; they come as ``workers.events.EmbeddingVectors``."""

    generation_id: str
    request: EmbeddingRequest
    owner: str


class Cancel(Message):
    """End a generation between two steps; its slot is free afterwards. Unknown ids are ignored."""

    generation_id: str


class Shutdown(Message):
    """Free everything and exit."""


HostMessage = Load | Submit | Embed | Cancel | Shutdown

# --- runner to host ---------------------------------------------------------------------------------------------------


class LoadProgress(Message):
    """``progress`` is a fraction between 0 and 1."""

    progress: float


class Loaded(Message):
    """The model is ready; the sizes are what the engine really uses."""

    context_length: int
    parallel: int
    vocab_size: int
    load_time_seconds: float
    weights_bytes: int
    eval_batch_size: int
    flash_attention: bool | None = None


class LoadFailed(Message):
    """The model could not be loaded; the runner exits after this."""

    error: ErrorInfo


class Output(Message):
    """What one step brought one generation. ``tokens`` are the ids sampled in it.

    ``stats`` is set exactly in the last output of a generation; ``error`` too if it failed.
    """

    generation_id: str
    events: list[AnyEvent] = []
    tokens: list[int] = []
    stats: Stats | None = None
    error: ErrorInfo | None = None


class Step(Message):
    """Everything that one engine step brought."""

    outputs: list[Output]


RunnerMessage = LoadProgress | Loaded | LoadFailed | Step


class Channel:
    """One end of the connection: sends messages, and decodes those of the other side.

    ``receives`` is the union of message types that this end accepts.
    """

    def __init__(self, sock: socket.socket, receives: object) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._encoder = msgspec.msgpack.Encoder()
        prepare(receives)
        self._decoder: msgspec.msgpack.Decoder[HostMessage | RunnerMessage] = msgspec.msgpack.Decoder(receives)

    def fileno(self) -> int:
        """Return the descriptor, for ``select``."""
        return self._sock.fileno()

    def send(self, message: HostMessage | RunnerMessage) -> None:
        """Send one message whole. Raises ``OSError`` when the other side is gone."""
        payload = self._encoder.encode(message)
        self._sock.sendall(_LENGTH.pack(len(payload)) + payload)

    def receive(self) -> list[HostMessage | RunnerMessage]:
        """Block for data and return all messages that are complete by now (perhaps none).

        Raises ``EOFError`` when the other side closed, ``ValueError`` for a frame over the limit and
        ``msgspec.ValidationError`` for one that is no known message.
        """
        data = self._sock.recv(1 << 20)
        if not data:
            raise EOFError
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(bytes(self._buffer[_LENGTH.size : end])))
            del self._buffer[:end]
        return messages

    def close(self) -> None:
        """Close this end."""
        self._sock.close()
