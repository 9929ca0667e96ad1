"""The websocket through the whole ASGI application: origin, session, verbs, streams."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import TYPE_CHECKING, Any, Self

import pytest
from channels.testing import WebsocketCommunicator
from django.conf import settings
from django.test import Client

from chat import consumers, services
from chat.models import Chat
from lmweb.access import Principal
from lmweb.db import run_db
from models_app.generations import watch
from models_app.models import Generation
from tests.chat import worker
from workers.events import ChatEnd, Error, decode_events

if TYPE_CHECKING:
    from lmweb.models import User
    from models_app.models import InstalledModel

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("closed_connections"),
]

HOST = b"lm.test"


class Tab:
    """One browser tab of a person."""

    def __init__(self, user: User | None, *, origin: bytes | None = b"http://lm.test") -> None:
        self.user = user
        self.client = Client()
        self.origin = origin

    async def __aenter__(self) -> Self:
        from lmweb.asgi import application

        headers = [(b"host", HOST)] + ([(b"origin", self.origin)] if self.origin else [])
        if self.user:
            await run_db(self.client.force_login, self.user)
            cookie = self.client.cookies[settings.SESSION_COOKIE_NAME].value
            headers.append((b"cookie", f"{settings.SESSION_COOKIE_NAME}={cookie}".encode()))
        self.socket = WebsocketCommunicator(application, "/ws/chat", headers=headers)
        self.connected, _ = await self.socket.connect(timeout=5)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.socket.disconnect()

    async def say(self, type_: str, **fields: Any) -> None:
        await self.socket.send_to(text_data=json.dumps({"type": type_} | fields, default=str))

    async def hear(self, *types: str) -> dict[str, Any]:
        """Return the next frame of one of these types; others are passed over, errors never."""
        while True:
            frame: dict[str, Any] = json.loads(await self.socket.receive_from(timeout=5))
            if frame["type"] in types:
                return frame
            assert frame["type"] != "error", frame

    async def closed(self) -> int:
        """Wait until the server closes the socket and return the code."""
        while True:
            event = await self.socket.receive_output(timeout=5)
            if event["type"] == "websocket.close":
                code: int = event["code"]
                return code

    async def send_message(self, content: str = "Hello", **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send a message and return it and its answer as the server confirms them."""
        await self.say("message.send", **({"message_id": uuid.uuid4(), "model": "acme/tiny", "content": content} | fields))
        return (await self.hear("message.added"))["message"], (await self.hear("message.added"))["message"]


async def generation_of(answer: dict[str, Any]) -> Generation:
    """Return the row behind an answer."""
    return await Generation.objects.aget(pk=answer["generation"]["id"])


def text_of(frame: dict[str, Any]) -> str:
    """Return the text that a frame of events brings."""
    return "".join(event.get("content", "") for event in frame["events"])


async def test_foreign_pages_and_signed_out_people_are_refused(owner: User) -> None:
    for origin in (None, b"http://evil.test", b"null", b"http://lm.test:81"):
        async with Tab(owner, origin=origin) as tab:
            assert not tab.connected
    async with Tab(None) as tab:
        assert await tab.closed() == consumers.SIGNED_OUT


async def test_a_message_its_stream_and_its_end(owner: User, model: InstalledModel) -> None:
    async with Tab(owner) as tab:
        question, answer = await tab.send_message("Hello")
        assert (question["role"], question["text"], answer["parent_id"]) == ("user", "Hello", question["id"])
        assert answer["generation"]["status"] == "queued"
        generation = await generation_of(answer)
        await run_db(worker.say, generation, 1, "Hi ")
        first = await tab.hear("generation.events")
        assert (first["generation_id"], first["seq"], text_of(first)) == (str(generation.pk), 1, "Hi ")
        await run_db(worker.say, generation, 2, "there")
        await run_db(worker.end, generation, 3, "Hi there")
        frames = [await tab.hear("generation.events") for _ in range(2)]
        assert frames[-1]["events"][-1]["type"] == "chat.end"
        assert (await Chat.objects.aget()).title == "Hello"


async def test_sending_again_after_a_lost_connection_does_not_double(owner: User, model: InstalledModel) -> None:
    message_id = uuid.uuid4()
    async with Tab(owner) as tab:
        first = await tab.send_message(message_id=message_id)
    async with Tab(owner) as tab:
        second = await tab.send_message(message_id=message_id)
    assert [message["id"] for message in first] == [message["id"] for message in second]
    assert await Generation.objects.acount() == 1


async def test_a_second_tab_sees_messages_and_stream_live(owner: User, model: InstalledModel) -> None:
    async with Tab(owner) as one, Tab(owner) as two:
        question, answer = await one.send_message("First")
        generation = await generation_of(answer)
        await run_db(worker.say, generation, 1, "Hi")
        await two.say("chat.open", chat_id=question["chat_id"], known=[question["id"]])
        assert (await two.hear("message.added"))["message"]["id"] == answer["id"]
        assert text_of(await two.hear("generation.events")) == "Hi"
        await run_db(worker.end, generation, 2, "Hi")
        assert (await two.hear("generation.events"))["seq"] == 2
        await one.say(
            "message.send",
            message_id=uuid.uuid4(),
            model="acme/tiny",
            content="Second",
            chat_id=question["chat_id"],
            parent_id=answer["id"],
        )
        assert (await two.hear("message.added"))["message"]["text"] == "Second"
        third = (await two.hear("message.added"))["message"]
        await run_db(worker.say, await generation_of(third), 1, "Again")
        assert text_of(await two.hear("generation.events")) == "Again"


async def test_watching_resumes_after_the_seq_that_the_tab_has(owner: User, model: InstalledModel) -> None:
    async with Tab(owner) as tab:
        _, answer = await tab.send_message()
        generation = await generation_of(answer)
        for seq, piece in enumerate(("a", "b", "c"), start=1):
            await run_db(worker.say, generation, seq, piece)
    async with Tab(owner) as tab:
        await tab.say("generation.watch", generation_id=generation.pk, seq=2)
        frame = await tab.hear("generation.events")
        assert (frame["seq"], text_of(frame)) == (3, "c")


async def test_a_lost_stream_is_replaced_by_the_row(owner: User, model: InstalledModel) -> None:
    async with Tab(owner) as tab:
        _, answer = await tab.send_message()
        generation = await generation_of(answer)
        await run_db(worker.save, generation, 7, "all of it", "completed")
        frame = await tab.hear("generation.events")
        assert frame["seq"] == 8
        assert [event["type"] for event in frame["events"]] == ["generation.snapshot", "chat.end"]
        assert frame["events"][0]["content"] == "all of it"


async def test_an_answer_without_a_row_ends_in_words(owner: User, model: InstalledModel) -> None:
    """Its person was deleted, or PostgreSQL died in the half second that a request through an API does not wait for."""
    entries = [entry async for entry in watch(str(uuid.uuid4()))]
    error, end = decode_events(entries[-1].events)
    assert isinstance(error, Error)
    assert "send it again" in error.error.message
    assert isinstance(end, ChatEnd)


async def test_stop_from_another_tab(owner: User, model: InstalledModel) -> None:
    async with Tab(owner) as one, Tab(owner) as two:
        _, answer = await one.send_message()
        await two.say("generation.stop", generation_id=answer["generation"]["id"])
        await two.say("ping")
        await two.hear("pong")
    assert (await generation_of(answer)).cancel_requested


async def test_closing_the_tab_ends_its_readers_and_not_the_answer(owner: User, model: InstalledModel) -> None:
    def readers() -> int:
        return sum("_relay" in repr(task.get_coro()) for task in asyncio.all_tasks())

    async with Tab(owner) as tab:
        _, answer = await tab.send_message()
        await asyncio.sleep(0.05)
        assert readers() == 1
    await asyncio.sleep(0.05)
    assert readers() == 0
    assert not (await generation_of(answer)).cancel_requested


async def test_strangers_find_nothing(owner: User, teammate: User, model: InstalledModel) -> None:
    async with Tab(owner) as mine, Tab(teammate) as theirs:
        question, answer = await mine.send_message()
        generation_id = answer["generation"]["id"]
        await run_db(worker.end, await generation_of(answer), 1, "mine")
        verbs: list[tuple[str, dict[str, Any], str]] = [
            ("chat.open", {"chat_id": question["chat_id"]}, "not_found"),
            ("generation.watch", {"generation_id": generation_id}, "not_found"),
            ("generation.stop", {"generation_id": generation_id}, "not_found"),
            ("message.regenerate", {"message_id": answer["id"], "answer_id": uuid.uuid4()}, "not_found"),
            (
                "message.send",
                {
                    "message_id": uuid.uuid4(),
                    "chat_id": question["chat_id"],
                    "parent_id": answer["id"],
                    "model": "acme/tiny",
                    "content": "x",
                },
                "not_found",
            ),
        ]
        for verb, fields, code in verbs:
            await theirs.say(verb, ref="r", **fields)
            error = await theirs.hear("error", "message.added", "generation.events")
            assert (error.get("code"), error.get("ref")) == (code, "r"), verb
        await services_rename(owner, question["chat_id"])
        await theirs.say("ping")
        assert (await theirs.hear("pong", "message.added"))["type"] == "pong"
        assert await theirs.socket.receive_nothing(0.1)


async def services_rename(user: User, chat_id: str) -> None:
    """Change the owner's chat, so that whoever listens wrongly would hear of it."""
    await run_db(services.rename_chat, principal=Principal(user), chat_id=uuid.UUID(chat_id), title="Renamed")


async def test_viewers_cannot_generate(stranger: User, model: InstalledModel) -> None:
    async with Tab(stranger) as tab:
        await tab.say("message.send", message_id=uuid.uuid4(), model="acme/tiny", content="x", ref="r")
        assert (await tab.hear("error"))["code"] == "permission_denied"


@pytest.mark.parametrize(
    "frame",
    [
        " ",
        "{",
        "[]",
        "null",
        '{"type": "message.delete"}',
        '{"type": "ping", "more": 1}',
        '{"type": "chat.open", "chat_id": "1 OR 1=1"}',
        '{"type": "generation.watch", "generation_id": "00000000-0000-0000-0000-000000000000", "seq": -1}',
        '{"type": "message.send", "message_id": 5}',
        '{"type": "ping", "ref": "\\ud800"}',
        "[" * 20_000,
        '{"type": "message.send", "message_id": "00000000-0000-0000-0000-000000000000", "model": "x", "content": "x", "settings":'
        ' {"sampling": {"stop": ' + "[" * 50_000 + "]" * 50_000 + "}}}",
    ],
)
async def test_bad_frames_are_answered_and_the_socket_lives_on(owner: User, frame: str) -> None:
    async with Tab(owner) as tab:
        await tab.socket.send_to(text_data=frame)
        assert (await tab.hear("error"))["code"] == "invalid_request"
        await tab.socket.send_to(bytes_data=b"\x00")
        assert (await tab.hear("error"))["code"] == "invalid_request"
        await tab.say("ping")
        assert await tab.hear("pong")


async def test_lost_access_closes_open_sockets(owner: User, model: InstalledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "PRINCIPAL_SECONDS", 0.0)
    async with Tab(owner) as tab:
        owner.is_active = False
        await run_db(owner.save)
        assert await tab.closed() in {consumers.TRY_AGAIN, consumers.SIGNED_OUT}
    async with Tab(None) as out:
        assert await out.closed() == consumers.SIGNED_OUT
    owner.is_active = True
    await run_db(owner.save)
    async with Tab(owner) as tab:  # also where the notice is lost: the next verb reads the person again
        await type(owner).objects.filter(pk=owner.pk).aupdate(is_active=False)
        await tab.say("ping")
        assert await tab.closed() == consumers.SIGNED_OUT


async def test_signing_out_closes_the_socket_of_that_session(owner: User) -> None:
    async with Tab(owner) as tab:
        await run_db(tab.client.logout)
        assert await tab.closed() in {consumers.TRY_AGAIN, consumers.SIGNED_OUT}
