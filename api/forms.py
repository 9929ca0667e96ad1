"""The form of the Developer page."""

from __future__ import annotations

from datetime import timedelta

from django import forms
from django.http import QueryDict

from lmweb.access import SCOPE_ACTIONS, Principal
from lmweb.models import Scope, default_scopes

LIFETIMES = {"7": "7 days", "30": "30 days", "90": "90 days", "365": "1 year", "": "It does not expire"}


class TokenForm(forms.Form):
    """What a new token is called, may do, and how long it lives. Offers only what its owner may do."""

    name = forms.CharField(
        label="Name",
        max_length=100,
        help_text="What it is for, such as the program that uses it.",
        widget=forms.TextInput(attrs={"autocomplete": "off", "autofocus": True}),
        error_messages={"required": "Give it a name, so that you know later where it is used."},
    )
    scopes = forms.MultipleChoiceField(
        label="It may",
        widget=forms.CheckboxSelectMultiple,
        initial=default_scopes,
        error_messages={"required": "Choose at least one: a token that may do nothing is of no use."},
    )
    days = forms.ChoiceField(label="It expires after", choices=list(LIFETIMES.items()), initial="90", required=False)

    def __init__(self, principal: Principal, data: QueryDict | None = None) -> None:
        super().__init__(data, auto_id="token-%s")
        scopes = self.fields["scopes"]
        assert isinstance(scopes, forms.MultipleChoiceField)
        scopes.choices = [(s.value, s.label) for s in Scope if any(principal.may(action) for action in SCOPE_ACTIONS[s])]

    def lifetime(self) -> timedelta | None:
        """Return how long the valid form's token lives; None: for ever."""
        days = self.cleaned_data["days"]
        return timedelta(days=int(days)) if days else None
