"""The only writers of chats and messages, on a real database."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connection
from django.utils import timezone

from chat import history, services
from chat.models import Chat, Message
from chat.prompting import build_request
from lmweb.access import Principal
from lmweb.celery import app
from lmweb.errors import Conflict, InvalidRequest, ModelNotFound, NotFound, PermissionDenied, TooManyRequests
from models_app.models import Generation
from tests.chat import worker

if TYPE_CHECKING:
    from lmweb.models import User
    from models_app.models import InstalledModel

pytestmark = pytest.mark.django_db(transaction=True)


def send(principal: Principal, content: str = "Hello", **more: Any) -> services.Sent:
    """Send a message to the tiny model."""
    values = {"message_id": uuid.uuid4(), "chat_id": None, "parent_id": None, "model": "acme/tiny"} | more
    return services.send_message(principal=principal, content=content, **values)


def finish(answer: Message, text: str, status: str = "completed") -> None:
    """End the answer's generation with a text."""
    assert answer.generation is not None
    worker.save(answer.generation, 9, text, status)


def turns(sent: services.Sent) -> list[tuple[str, str]]:
    """Return the messages of the request that the model got."""
    assert sent.answer.generation is not None
    return [(turn["role"], turn["content"]) for turn in sent.answer.generation.request["messages"]]


def test_first_message_makes_a_chat_titled_after_its_first_line(me: Principal, model: InstalledModel) -> None:
    sent = send(me, f"  Explain   {'very ' * 20}well\nand in detail")
    assert sent.chat.title == "Explain very very very very very very very very very very v…"
    assert len(sent.chat.title) == 60
    assert sent.chat.model_key == model.key
    assert sent.question.text.startswith("  Explain   very")
    assert turns(sent) == [("user", sent.question.text)]


def test_sending_again_changes_nothing(me: Principal, model: InstalledModel) -> None:
    message_id = uuid.uuid4()
    first, second = send(me, message_id=message_id), send(me, message_id=message_id)
    assert (first.chat, first.question, first.answer) == (second.chat, second.question, second.answer)
    assert (Chat.objects.count(), Message.objects.count(), Generation.objects.count()) == (1, 2, 1)


def test_a_message_beyond_the_limit_is_refused_and_leaves_nothing(me: Principal, model: InstalledModel) -> None:
    me.user.running_limit = me.user.waiting_limit = 1
    me.user.save()
    assert send(me)
    assert send(me)
    with pytest.raises(TooManyRequests, match="2 requests"):
        send(me)
    assert (Chat.objects.count(), Generation.objects.count()) == (2, 2)
    me.user.waiting_limit = 0
    assert send(me)


def test_the_same_message_twice_at_the_same_moment_is_stored_once(me: Principal, model: InstalledModel) -> None:
    message_id, results = uuid.uuid4(), []

    def run() -> None:
        try:
            results.append(send(me, message_id=message_id).answer.pk)
        finally:
            connection.close()

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert len(set(results)) == 1
    assert (Chat.objects.count(), Generation.objects.count()) == (1, 1)


def test_a_conversation_becomes_a_prompt(me: Principal, model: InstalledModel) -> None:
    settings = services.ChatSettings(
        system_prompt="Be brief.", context_overflow="rollingWindow", sampling={"temperature": 0, "stop": ["END"]}
    )
    first = send(me, "One", settings=settings)
    finish(first.answer, "Answer one")
    second = send(me, "Two", chat_id=first.chat.pk, parent_id=first.answer.pk)
    assert turns(second) == [("system", "Be brief."), ("user", "One"), ("assistant", "Answer one"), ("user", "Two")]
    assert second.answer.generation is not None
    assert second.answer.generation.request["sampling"] == {"temperature": 0.0, "stop": ["END"]}
    assert second.answer.generation.request["context_overflow"] == "rollingWindow"
    assert services.settings_of(second.chat) == settings


def test_an_answer_that_failed_without_a_word_keeps_the_roles_alternating(me: Principal, model: InstalledModel) -> None:
    first = send(me, "One")
    finish(first.answer, "", "failed")
    second = send(me, "Two", chat_id=first.chat.pk, parent_id=first.answer.pk)
    assert turns(second) == [("user", "One\n\nTwo")]


def test_no_second_message_while_an_answer_is_being_written(me: Principal, model: InstalledModel) -> None:
    first = send(me)
    with pytest.raises(Conflict):
        send(me, chat_id=first.chat.pk, parent_id=first.answer.pk)
    assert Message.objects.count() == 2


def test_regenerating_keeps_the_old_answer_as_a_version(me: Principal, model: InstalledModel) -> None:
    sent = send(me, "One")
    finish(sent.answer, "First try")
    answer_id = uuid.uuid4()
    new = services.regenerate(principal=me, message_id=sent.answer.pk, answer_id=answer_id)
    again = services.regenerate(principal=me, message_id=sent.answer.pk, answer_id=answer_id)
    assert new == again
    assert new.parent == sent.question
    messages, _ = history.Branch(sent.chat).page()
    assert [message["id"] for message in messages] == [str(sent.question.pk), str(new.pk)]
    assert messages[1]["versions"] == [str(sent.answer.pk), str(new.pk)]
    old, _ = history.Branch(sent.chat, sent.answer.pk).page()
    assert old[1]["text"] == "First try"
    assert [turn.content for turn in build_request(sent.chat, model=model.key, last=sent.question.pk).messages] == ["One"]


def test_history_comes_in_pages_of_fifty(me: Principal, model: InstalledModel) -> None:
    chat = Chat.objects.create(user=me.user)
    parent = None
    for number in range(120):
        parent = Message.objects.create(chat=chat, parent=parent, role="user", content=str(number))
    newest, older = history.Branch(chat).page()
    assert ([m["text"] for m in newest][::49], older) == (["70", "119"], True)
    before, older = history.Branch(chat).page(uuid.UUID(newest[0]["id"]))
    assert ([m["text"] for m in before][::49], older) == (["20", "69"], True)
    first, older = history.Branch(chat).page(uuid.UUID(before[0]["id"]))
    assert ([m["text"] for m in first][::19], older) == (["0", "19"], False)


def test_deleting_a_chat_stops_its_answer_and_forgets_all_text(me: Principal, model: InstalledModel) -> None:
    sent = send(me, "A secret")
    finish(sent.answer, "Another secret")
    running = send(me, "More", chat_id=sent.chat.pk, parent_id=sent.answer.pk)
    services.delete_chat(principal=me, chat_id=sent.chat.pk)
    assert not Message.objects.exists()
    done, stopped = Generation.objects.order_by("created_at")
    assert (done.content, done.request, done.status) == ("", {}, "completed")
    assert stopped.cancel_requested
    assert running.answer.generation is not None
    worker.save(running.answer.generation, 3, "written after the deletion", "cancelled")
    app.loader.import_default_modules()
    task = app.tasks[app.conf.beat_schedule["forget-deleted-chats"]["task"]]
    assert task.apply().successful()
    stopped.refresh_from_db()
    assert (stopped.content, stopped.request) == ("", {})
    assert services.forget_deleted() == 0


def test_forgetting_leaves_what_is_still_in_a_chat_or_came_from_elsewhere(me: Principal, model: InstalledModel) -> None:
    sent = send(me, "One")
    finish(sent.answer, "kept")
    Generation.objects.create(
        user=me.user, source="openai", model_key="x", request={"model": "x"}, content="kept", status="completed", finished_at=timezone.now()
    )
    assert services.forget_deleted() == 0
    assert Generation.objects.filter(content="kept").count() == 2


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"stop": "END"}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"x" * 5000: 1}, "x" * 100),
    ],
)
def test_settings_out_of_range_name_their_field(me: Principal, model: InstalledModel, sampling: dict[str, Any], param: str) -> None:
    chat = send(me).chat
    with pytest.raises(InvalidRequest) as caught:
        services.save_settings(principal=me, chat_id=chat.pk, settings=services.ChatSettings(sampling=sampling))
    assert caught.value.param == param
    chat.refresh_from_db()
    assert chat.sampling == {}


def test_titles(me: Principal, model: InstalledModel) -> None:
    chat = send(me).chat
    assert services.rename_chat(principal=me, chat_id=chat.pk, title="  a\n new\x00 title ").title == "a new\N{REPLACEMENT CHARACTER} title"
    for title in ("", " \n ", "x" * 201):
        with pytest.raises(InvalidRequest):
            services.rename_chat(principal=me, chat_id=chat.pk, title=title)
    with pytest.raises(InvalidRequest):
        send(me, " \n ")
    assert send(me, "a\x00b").question.content == "a\N{REPLACEMENT CHARACTER}b"


def test_others_find_nothing_and_viewers_may_not_start(me: Principal, other: Principal, stranger: User, model: InstalledModel) -> None:
    sent = send(me)
    finish(sent.answer, "mine")
    for call in (
        lambda: services.get_chat(principal=other, chat_id=sent.chat.pk),
        lambda: send(other, chat_id=sent.chat.pk, parent_id=sent.answer.pk),
        lambda: services.regenerate(principal=other, message_id=sent.answer.pk, answer_id=uuid.uuid4()),
        lambda: services.rename_chat(principal=other, chat_id=sent.chat.pk, title="x"),
        lambda: services.save_settings(principal=other, chat_id=sent.chat.pk, settings=services.ChatSettings()),
        lambda: services.delete_chat(principal=other, chat_id=sent.chat.pk),
    ):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(Conflict):  # an id that is taken says nothing about what it belongs to
        send(other, message_id=sent.question.pk)
    with pytest.raises(InvalidRequest):
        send(other, parent_id=sent.answer.pk)
    with pytest.raises(PermissionDenied):
        send(Principal(stranger))
    with pytest.raises(ModelNotFound):
        send(me, model="acme/none")
    assert Chat.objects.count() == 1
