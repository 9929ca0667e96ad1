"""Everything that changes a chat. One transaction each; notices go out after commit. Nothing else writes chats or messages."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import msgspec
from django.db import IntegrityError, transaction
from django.db.models import Exists, OuterRef
from django.utils import timezone

from chat.models import Chat, Message
from chat.prompting import build_request, sampling_of
from lmweb.access import Action, Principal, require
from lmweb.errors import Conflict, InvalidRequest, NotFound
from lmweb.notices import notify_after_commit, user_group
from models_app.generations import cancel_generation, resolve_model, start_generation
from models_app.models import Generation, GenerationQuerySet
from workers.schemas import OverflowPolicy

SOURCE = "chat"
TITLE_LENGTH = 60
MAX_TITLE_LENGTH = 200
MAX_TEXT_LENGTH = 1_000_000
STOP_SECONDS = 2.0
FORGET_WITHIN = timedelta(days=1)


#: Flat on purpose: nothing that a browser sends can nest.
SettingValue = bool | int | float | str | list[str] | None


class ChatSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the side panel holds: the system prompt, what happens when the context is full, and overrides of ``SamplingParams``."""

    system_prompt: str = ""
    context_overflow: OverflowPolicy = "truncateMiddle"
    sampling: dict[str, SettingValue] = {}


@dataclass(frozen=True)
class Sent:
    """A message and the answer that was started for it."""

    chat: Chat
    question: Message
    answer: Message


def chat_group(chat_id: uuid.UUID | str) -> str:
    """Return the channel-layer group of the tabs that show this chat."""
    return f"chat_{chat_id}"


def get_chat(*, principal: Principal, chat_id: uuid.UUID) -> Chat:
    """Return a chat of this person. Raises ``NotFound``."""
    chat = Chat.objects.visible_to(principal).filter(pk=chat_id).first()
    if chat is None:
        raise NotFound("There is no such chat. It may have been deleted.")
    return chat


def send_message(
    *,
    principal: Principal,
    message_id: uuid.UUID,
    chat_id: uuid.UUID | None,
    parent_id: uuid.UUID | None,
    model: str,
    content: str,
    settings: ChatSettings | None = None,
) -> Sent:
    """Store a message, start its answer, and create the chat if there is none yet.

    Sending the same ``message_id`` again changes nothing and returns what the first time made. ``settings`` count for a new chat.
    Raises ``InvalidRequest``, ``NotFound``, ``ModelNotFound``, ``PermissionDenied``, and ``Conflict`` while the message before is
    still being answered.
    """
    require(principal, Action.GENERATE)
    text = _clean(content, "content")
    if not text.strip():
        raise InvalidRequest("The message is empty.", param="content")
    try:
        with transaction.atomic():
            if done := _already_sent(principal, message_id):
                return done
            model_key = resolve_model(principal, model).key
            chat = _chat_for_writing(principal, chat_id, text, settings)
            parent = _parent(chat, parent_id)
            question = Message.objects.create(id=message_id, chat=chat, parent=parent, role=Message.Role.USER, content=text)
            answer = _start_answer(principal, chat, question, model_key)
    except IntegrityError:  # the same message arrived twice at the same moment
        if done := _already_sent(principal, message_id):
            return done
        raise
    return Sent(chat, question, answer)


def regenerate(*, principal: Principal, message_id: uuid.UUID, answer_id: uuid.UUID, model: str = "") -> Message:
    """Start another answer beside the answer ``message_id``, with the id ``answer_id``; harmless when repeated.

    ``model`` empty takes the chat's. Raises ``NotFound``, ``Conflict`` while the answer is still being written.
    """
    require(principal, Action.GENERATE)
    with transaction.atomic():
        old = _message(principal, message_id)
        chat = Chat.objects.select_for_update().get(pk=old.chat_id)
        if known := Message.objects.select_related("generation").filter(pk=answer_id).first():
            if known.chat_id != chat.pk:
                raise Conflict("This message id is taken.", param="answer_id")
            return known
        if old.role != Message.Role.ASSISTANT or old.parent is None:
            raise InvalidRequest("Only answers can be written again.", param="message_id")
        _refuse_while_running(old)
        model_key = resolve_model(principal, model or chat.model_key).key
        return _start_answer(principal, chat, old.parent, model_key, answer_id)


def rename_chat(*, principal: Principal, chat_id: uuid.UUID, title: str) -> Chat:
    """Give a chat another title. Raises ``NotFound`` or ``InvalidRequest``."""
    chat = get_chat(principal=principal, chat_id=chat_id)
    chat.title = " ".join(_clean(title, "title").split())
    if not 0 < len(chat.title) <= MAX_TITLE_LENGTH:
        raise InvalidRequest(f"A title has 1 to {MAX_TITLE_LENGTH} characters.", param="title")
    with transaction.atomic():
        chat.save(update_fields=["title"])
        _notify_updated(chat)
    return chat


def settings_of(chat: Chat | None) -> ChatSettings:
    """Return what the side panel shows for a chat, or for one that does not exist yet."""
    if chat is None:
        return ChatSettings()
    policy = cast("OverflowPolicy", chat.context_overflow)
    return ChatSettings(system_prompt=chat.system_prompt, context_overflow=policy, sampling=chat.sampling)


def save_settings(*, principal: Principal, chat_id: uuid.UUID, settings: ChatSettings) -> Chat:
    """Keep the side panel's values for the answers to come. Raises ``NotFound``, or ``InvalidRequest`` naming the field."""
    chat = get_chat(principal=principal, chat_id=chat_id)
    _apply_settings(chat, settings)
    chat.save(update_fields=["system_prompt", "context_overflow", "sampling"])
    return chat


def delete_chat(*, principal: Principal, chat_id: uuid.UUID) -> None:
    """Delete a chat with everything that was said in it. Raises ``NotFound``.

    What is still being written is stopped first. The rows of the generations stay, without their text: they are the usage record.
    Waits a moment for the end of what was stopped, because its worker writes the text so far once more.
    """
    with transaction.atomic():
        chat = get_chat(principal=principal, chat_id=chat_id)
        answers = list(chat.messages.exclude(generation=None).values_list("generation_id", flat=True))
        generations = Generation.objects.filter(pk__in=answers)
        running = list(generations.unfinished().values_list("pk", flat=True))
        for generation_id in running:
            cancel_generation(principal=principal, generation_id=generation_id)
        chat.delete()
        notify_after_commit(chat_group(chat_id), {"type": "chat.deleted", "chat_id": str(chat_id)})
        notify_after_commit(user_group(chat.user_id), {"type": "chat.updated", "chat_id": str(chat_id)})
    deadline = time.monotonic() + STOP_SECONDS
    while running and time.monotonic() < deadline and generations.unfinished().exists():
        time.sleep(0.05)
    _forget(generations)


def forget_deleted() -> int:
    """Blank the text of finished generations whose chat is gone, and return how many. Runs every minute (``chat.tasks``).

    Finds answers that ended after their chat's deletion had stopped waiting for them; only what ended recently is looked at.
    """
    recent = Generation.objects.filter(finished_at__gt=timezone.now() - FORGET_WITHIN, source=SOURCE)
    return _forget(recent.filter(~Exists(Message.objects.filter(generation=OuterRef("pk")))))


def _forget(generations: GenerationQuerySet) -> int:
    finished = generations.filter(status__in=Generation.TERMINAL).exclude(request={})
    return finished.update(content="", reasoning="", tool_calls=[], output_tokens=[], request={})


def _already_sent(principal: Principal, message_id: uuid.UUID) -> Sent | None:
    question = Message.objects.select_related("chat").filter(pk=message_id).first()
    if question is None:
        return None
    if question.chat.user_id != principal.user.pk or question.role != Message.Role.USER:
        raise Conflict("This message id is taken.", param="message_id")
    answer = question.children.select_related("generation").order_by("created_at").first()
    if answer is None:
        raise Conflict("This message has no answer.", param="message_id")
    return Sent(question.chat, question, answer)


def _chat_for_writing(principal: Principal, chat_id: uuid.UUID | None, text: str, settings: ChatSettings | None) -> Chat:
    """Return the locked chat, or a new one titled after the first message."""
    if chat_id is None:
        chat = Chat(user=principal.user, title=title_of(text))
        _apply_settings(chat, settings or ChatSettings())
        chat.save()
        return chat
    found = Chat.objects.visible_to(principal).select_for_update().filter(pk=chat_id).first()
    if found is None:
        raise NotFound("This chat does not exist any more. Your text is still here; start a new chat with it.")
    return found


def _parent(chat: Chat, parent_id: uuid.UUID | None) -> Message | None:
    if parent_id is None:
        return None
    parent = chat.messages.select_related("generation").filter(pk=parent_id).first()
    if parent is None or parent.role != Message.Role.ASSISTANT:
        raise InvalidRequest("The message to follow is not an answer of this chat.", param="parent_id")
    _refuse_while_running(parent)
    return parent


def _refuse_while_running(answer: Message) -> None:
    if answer.generation and not answer.generation.is_finished:
        raise Conflict("The answer before is still being written. Stop it or wait for its end.")


def _message(principal: Principal, message_id: uuid.UUID) -> Message:
    visible = Message.objects.filter(chat__in=Chat.objects.visible_to(principal)).select_related("parent", "generation")
    message = visible.filter(pk=message_id).first()
    if message is None:
        raise NotFound("There is no such message. Its chat may have been deleted.")
    return message


def _start_answer(principal: Principal, chat: Chat, question: Message, model_key: str, answer_id: uuid.UUID | None = None) -> Message:
    """Start a generation for a question and store the answer's message; the chat moves to the top of the list."""
    generation = start_generation(principal=principal, request=build_request(chat, model=model_key, last=question.pk), source=SOURCE)
    answer = Message.objects.create(
        id=answer_id or uuid.uuid4(), chat=chat, parent=question, role=Message.Role.ASSISTANT, generation=generation
    )
    chat.model_key = model_key
    chat.updated_at = timezone.now()
    chat.save(update_fields=["model_key", "updated_at"])
    notify_after_commit(
        chat_group(chat.pk), {"type": "messages.added", "chat_id": str(chat.pk), "message_ids": [str(question.pk), str(answer.pk)]}
    )
    _notify_updated(chat)
    return answer


def _notify_updated(chat: Chat) -> None:
    notify_after_commit(user_group(chat.user_id), {"type": "chat.updated", "chat_id": str(chat.pk), "title": chat.title})


def _apply_settings(chat: Chat, settings: ChatSettings) -> None:
    sampling_of(settings.sampling)
    chat.system_prompt = _clean(settings.system_prompt, "system_prompt")
    chat.context_overflow = settings.context_overflow
    chat.sampling = settings.sampling


def _clean(text: str, param: str) -> str:
    """Return the text as PostgreSQL can keep it. Raises ``InvalidRequest`` when it is far too long."""
    if len(text) > MAX_TEXT_LENGTH:
        raise InvalidRequest(f"The text has {len(text):,} characters; at most {MAX_TEXT_LENGTH:,} are kept.", param=param)
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}")


def title_of(text: str) -> str:
    """Return the first line of a message, shortened, as the title of its chat."""
    line = " ".join(text.strip().splitlines()[0].split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"
