"""The template that an admin puts in place of the file's: who may, what is refused, what the preview shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lmweb.errors import PermissionDenied, TemplateError

if TYPE_CHECKING:
    from lmweb.models import User
    from models_app.models import InstalledModel

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def model(db: None) -> InstalledModel:
    from models_app.models import InstalledModel

    return InstalledModel.objects.create(key="a/b", path="a/b/c.gguf", size_bytes=1, max_context_length=64, chat_template="own " + TEMPLATE)


def test_saving_checks_and_shows_what_a_conversation_becomes(model: InstalledModel, admin: User) -> None:
    from lmweb.access import Principal
    from models_app.services import preview_chat_template, set_chat_template

    principal = Principal(admin)
    found = set_chat_template(principal=principal, model=model, text=TEMPLATE.replace("}}{% endfor", "}}\r\n{% endfor"))
    assert found is not None
    assert found.prompt.startswith("{bos}<system>You are a helpful assistant.\n<user>Hello!")
    assert (found.takes_system, found.knows_tools) == (True, False)
    assert "[TOOL_RESULT]" in found.tools_prompt
    model.refresh_from_db()
    assert "\r" not in model.chat_template_override
    assert preview_chat_template(principal=principal, model=model) == found

    assert set_chat_template(principal=principal, model=model, text=" \n") is None
    model.refresh_from_db()
    assert model.chat_template_override == ""
    assert preview_chat_template(principal=principal, model=model).prompt.startswith("own {bos}")
    set_chat_template(principal=principal, model=model, text=model.chat_template)
    assert model.chat_template_override == ""


@pytest.mark.parametrize(
    "text",
    [
        "{{ unclosed",
        "{{ raise_exception('never') }}",
        "says nothing",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "a\x00b",
        "x" * 600_000,
        "{% set x = namespace(a=[messages]) %}{% for i in range(99999) %}{% set x.a = [x.a, x.a] + x.a %}{% endfor %}",
    ],
)
def test_what_cannot_work_is_not_saved(model: InstalledModel, admin: User, text: str) -> None:
    from lmweb.access import Principal
    from models_app.services import set_chat_template

    with pytest.raises(TemplateError) as caught:
        set_chat_template(principal=Principal(admin), model=model, text=text)
    assert caught.value.message
    model.refresh_from_db()
    assert model.chat_template_override == ""


def test_only_admins_change_what_everybody_uses(model: InstalledModel, owner: User) -> None:
    from lmweb.access import Principal
    from models_app.services import preview_chat_template, set_chat_template

    with pytest.raises(PermissionDenied):
        set_chat_template(principal=Principal(owner), model=model, text=TEMPLATE)
    with pytest.raises(PermissionDenied):
        preview_chat_template(principal=Principal(owner), model=model, text=TEMPLATE)
    assert preview_chat_template(principal=Principal(owner), model=model).prompt
