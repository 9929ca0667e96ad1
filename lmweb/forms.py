"""Forms of the account pages."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError

from lmweb.models import User


class SetupForm(forms.ModelForm):  # type: ignore[type-arg]  # no parameter at run time
    """Name and password of the first admin."""

    password = forms.CharField(
        strip=False, max_length=4096, widget=forms.PasswordInput(attrs={"autocomplete": "new-password"}), help_text="At least 8 characters."
    )

    class Meta:
        model = User
        fields = ("username",)
        help_texts = {"username": "How you sign in. Letters, digits and @ . + - _"}  # noqa: RUF012  (Django's own form)
        widgets = {  # noqa: RUF012
            "username": forms.TextInput(
                attrs={"autofocus": True, "autocomplete": "username", "autocapitalize": "none", "spellcheck": "false"}
            )
        }

    def clean(self) -> dict[str, Any]:
        """Check the password against the name that was typed beside it."""
        cleaned = super().clean() or {}
        password = cleaned.get("password")
        if password:
            try:
                validate_password(password, User(username=cleaned.get("username", "")))
            except ValidationError as error:
                self.add_error("password", error)
        return cleaned
