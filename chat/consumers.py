"""The chat page's websocket: parse, authorise, hand over. One socket per browser tab.

Tokens do not pass through here one by one: each entry of a generation's stream is wrapped, still encoded, into one frame.
Closing the socket stops nothing but its own watching.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from functools import singledispatchmethod
from typing import Any

import msgspec
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import BaseChannelLayer
from django.db import DatabaseError, InterfaceError
from redis.exceptions import RedisError

from chat import history, services, verbs
from chat.services import chat_group
from lmweb.access import Principal
from lmweb.db import run_db
from lmweb.errors import InvalidRequest, LmwebError, NotAuthenticated, NotFound, PayloadTooLarge, ServiceUnavailable
from lmweb.models import User
from lmweb.notices import user_group
from models_app.generations import cancel_generation, watch
from models_app.models import Generation

logger = logging.getLogger(__name__)

PRINCIPAL_SECONDS = 5.0
MAX_WATCHED = 64
SIGNED_OUT = 4401  # close codes of our own; a server may send no standard one but 1000
TRY_AGAIN = 4013


class ChatConsumer(AsyncWebsocketConsumer):
    """One browser tab."""

    channel_layer: BaseChannelLayer
    channel_name: str

    async def connect(self) -> None:
        """Accept people who are signed in."""
        self.chat_id: uuid.UUID | None = None
        self.watching: dict[str, asyncio.Task[None]] = {}
        self.user_group = ""
        self._principal: Principal | None = None
        self._principal_read = 0.0
        await self.accept()
        try:
            if user_id := getattr(self.scope.get("user"), "pk", None):  # joins first: a change between the two steps must not be missed
                self.user_group = user_group(user_id)
                await self.channel_layer.group_add(self.user_group, self.channel_name)
            await self.principal()
        except NotAuthenticated:
            await self.close(SIGNED_OUT)
        except (DatabaseError, InterfaceError, RedisError, OSError):
            await self.close(TRY_AGAIN)

    async def disconnect(self, code: int) -> None:
        """Stop watching, so that no reader outlives its tab."""
        for task in self.watching.values():
            task.cancel()
        try:
            if self.user_group:
                await self.channel_layer.group_discard(self.user_group, self.channel_name)
            if self.chat_id:
                await self.channel_layer.group_discard(chat_group(self.chat_id), self.channel_name)
        except (RedisError, OSError) as error:
            logger.info("left no groups: %s", error)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Run one verb and answer its failure in the frame's own words."""
        verb: verbs.AnyVerb | None = None
        try:
            verb = self._parse(text_data)
            await self.run(verb, await self.principal())
        except NotAuthenticated:
            await self.close(SIGNED_OUT)
        except LmwebError as error:
            await self._send_error(error, verb)
        except (DatabaseError, InterfaceError, RedisError, OSError) as error:
            logger.warning("a verb failed: %s", error)
            await self._send_error(ServiceUnavailable("The server is restarting a part of itself. This is tried again."), verb)

    @staticmethod
    def _parse(text: str | None) -> verbs.AnyVerb:
        if text is None:
            raise InvalidRequest("Only text frames are understood.")
        if len(text) > verbs.MAX_FRAME_CHARACTERS:
            raise PayloadTooLarge("This message is too large to send.")
        try:
            return verbs.decode(text)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"The frame was not understood: {error}.") from None

    async def principal(self) -> Principal:
        """Return who this is, read again when older than a few seconds. Raises ``NotAuthenticated`` for who lost access."""
        if self._principal is None or time.monotonic() - self._principal_read > PRINCIPAL_SECONDS:
            self._principal = await run_db(self._read_principal)
            self._principal_read = time.monotonic()
        return self._principal

    def _read_principal(self) -> Principal:
        session_user = self.scope.get("user")
        user = User.objects.filter(pk=session_user.pk, is_active=True).first() if session_user else None
        session = self.scope.get("session")
        if user is None or session is None or not session.exists(session.session_key):
            raise NotAuthenticated("You are signed out.")
        return Principal(user)

    # --- verbs ------------------------------------------------------------------------------------------------------

    @singledispatchmethod
    async def run(self, verb: verbs.AnyVerb, principal: Principal) -> None:
        """Run one verb for this principal. Raises ``LmwebError``."""
        raise AssertionError(f"no handler for {verb}")

    @run.register
    async def _ping(self, verb: verbs.Ping, principal: Principal) -> None:
        await self.send_frame({"type": "pong"})

    @run.register
    async def _open(self, verb: verbs.ChatOpen, principal: Principal) -> None:
        await run_db(services.get_chat, principal=principal, chat_id=verb.chat_id)
        await self._follow(verb.chat_id)  # before reading, so that nothing falls between the two
        missed = await run_db(_later_messages, principal, verb.chat_id, verb.known)
        await self._send_added(verb.chat_id, missed)

    @run.register
    async def _send_message(self, verb: verbs.MessageSend, principal: Principal) -> None:
        sent = await run_db(
            services.send_message,
            principal=principal,
            message_id=verb.message_id,
            chat_id=verb.chat_id,
            parent_id=verb.parent_id,
            model=verb.model,
            content=verb.content,
            settings=verb.settings,
        )
        await self._follow(sent.chat.pk)
        await self._send_added(sent.chat.pk, [history.view(sent.question), history.view(sent.answer)], sent.chat.title)

    @run.register
    async def _regenerate(self, verb: verbs.MessageRegenerate, principal: Principal) -> None:
        answer = await run_db(
            services.regenerate, principal=principal, message_id=verb.message_id, answer_id=verb.answer_id, model=verb.model
        )
        await self._send_added(answer.chat_id, [history.view(answer)])

    @run.register
    async def _stop(self, verb: verbs.GenerationStop, principal: Principal) -> None:
        await run_db(cancel_generation, principal=principal, generation_id=verb.generation_id)

    @run.register
    async def _watch(self, verb: verbs.GenerationWatch, principal: Principal) -> None:
        visible = Generation.objects.visible_to(principal).filter(pk=verb.generation_id)
        if not await run_db(visible.exists):
            raise NotFound("There is no such generation.")
        self._start_watching(str(verb.generation_id), verb.seq, restart=True)

    # --- notices of other tabs and processes ------------------------------------------------------------------------

    async def messages_added(self, notice: dict[str, Any]) -> None:
        """Another tab added messages to the chat that this one shows."""
        if notice["chat_id"] == str(self.chat_id):
            ids = [uuid.UUID(message_id) for message_id in notice["message_ids"]]
            await self._send_added(self.chat_id, await run_db(_views, ids))

    async def chat_updated(self, notice: dict[str, Any]) -> None:
        """The list of chats changed."""
        await self.send_frame({"type": "chat.updated", "chat_id": notice["chat_id"], "title": notice.get("title")})

    async def chat_deleted(self, notice: dict[str, Any]) -> None:
        """The chat that this tab shows is gone."""
        await self.send_frame({"type": "chat.deleted", "chat_id": notice["chat_id"]})

    async def access_changed(self, notice: dict[str, Any]) -> None:
        """Role, password or sign-in changed: the tab connects again, and gets in if it still may."""
        await self.close(TRY_AGAIN)

    # --- sending ----------------------------------------------------------------------------------------------------

    async def send_frame(self, frame: dict[str, Any]) -> None:
        """Send one frame."""
        await self.send(text_data=msgspec.json.encode(frame).decode())

    async def _send_error(self, error: LmwebError, verb: verbs.AnyVerb | None) -> None:
        frame = {"type": "error", "code": error.code, "message": error.message, "param": error.param, "retryable": error.retryable}
        await self.send_frame(frame | {"ref": verb.ref if verb else ""})

    async def _send_added(self, chat_id: uuid.UUID | None, messages: list[dict[str, Any]], title: str = "") -> None:
        """Send messages, and from here on what is added to those that are being written."""
        for message in messages:
            await self.send_frame({"type": "message.added", "chat_id": str(chat_id), "title": title, "message": message})
            generation = message["generation"]
            if generation and generation["status"] not in Generation.TERMINAL:
                self._start_watching(generation["id"], generation["seq"])

    async def _follow(self, chat_id: uuid.UUID) -> None:
        """Join the chat's group and leave the one before. The caller has checked that this person may see the chat."""
        if chat_id == self.chat_id:
            return
        if self.chat_id:
            await self.channel_layer.group_discard(chat_group(self.chat_id), self.channel_name)
        await self.channel_layer.group_add(chat_group(chat_id), self.channel_name)
        self.chat_id = chat_id

    def _start_watching(self, generation_id: str, seq: int, *, restart: bool = False) -> None:
        if generation_id in self.watching:
            if not restart:
                return
            self.watching.pop(generation_id).cancel()
        if len(self.watching) >= MAX_WATCHED:
            raise InvalidRequest(f"One tab may follow {MAX_WATCHED} answers at a time.")
        task = asyncio.create_task(self._relay(generation_id, seq))
        self.watching[generation_id] = task
        task.add_done_callback(lambda ended: self._stopped_watching(generation_id, ended))

    def _stopped_watching(self, generation_id: str, task: asyncio.Task[None]) -> None:
        if self.watching.get(generation_id) is task:
            del self.watching[generation_id]
        if not task.cancelled() and (error := task.exception()):
            logger.error("watching %s failed", generation_id, exc_info=error)

    async def _relay(self, generation_id: str, seq: int) -> None:
        async for entry in watch(generation_id, seq):
            events = entry.events.decode()
            await self.send(
                text_data=f'{{"type":"generation.events","generation_id":"{generation_id}","seq":{entry.seq},"events":{events}}}'
            )


def _views(ids: list[uuid.UUID]) -> list[dict[str, Any]]:
    return [history.view(message) for message in history.fetch(ids)]


def _later_messages(principal: Principal, chat_id: uuid.UUID, known: list[uuid.UUID]) -> list[dict[str, Any]]:
    """Return the messages of a chat that are newer than the newest of the known ones."""
    chat = services.get_chat(principal=principal, chat_id=chat_id)
    newest = chat.messages.filter(pk__in=known).order_by("-created_at").first()
    if newest is None:
        return []
    later = chat.messages.filter(created_at__gt=newest.created_at)
    return _views(list(later.values_list("pk", flat=True)[: history.PAGE_SIZE]))
