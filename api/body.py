"""Bodies of requests and answers, the same for every dialect."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec
from django.http import HttpRequest, HttpResponse

from lmweb.decoding import decode_json
from lmweb.errors import InvalidRequest

T = TypeVar("T")

#: The methods of routes that only read; the server leaves out the body of an answer to HEAD.
READ: Final = ["GET", "HEAD"]

_encoder = msgspec.json.Encoder()
_FAULT = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<where>.*)`)?$", re.DOTALL)
_FIELD = re.compile(r"^Object (?P<fault>missing required|contains unknown) field `(?P<field>[^`]*)`")


def decode(request: HttpRequest, kind: type[T]) -> T:
    """Return the JSON body as a struct. Raises ``InvalidRequest`` that names the field at fault."""
    return parse(json_body(request), lambda body: decode_json(body, kind), _in_words)


def parse(body: bytes, decoder: Callable[[bytes], T], in_words: Callable[[msgspec.ValidationError], InvalidRequest]) -> T:
    """Return what ``decoder`` makes of a body. Raises ``InvalidRequest``, in a dialect's own words where a field is at fault."""
    try:
        return decoder(body)
    except msgspec.ValidationError as error:
        raise in_words(error) from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError as error:  # malformed JSON, or bytes that are no UTF-8
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None


def _in_words(error: msgspec.ValidationError) -> InvalidRequest:
    message = str(error)
    fault = _FAULT.match(message)
    what, where = (fault["what"], fault["where"] or "") if fault else (message, "")
    field = _FIELD.match(what)
    if field is None:
        return InvalidRequest(f"'{where}': {what}." if where else f"{what}.", param=where or None)
    name = f"{where}.{field['field']}".lstrip(".")[:200]
    known = "is missing" if field["fault"].startswith("missing") else "is not a field of this request"
    return InvalidRequest(f"'{name}' {known}.", param=name)


def json_body(request: HttpRequest) -> bytes:
    """Return the body. Raises ``InvalidRequest`` if it is declared as something else than JSON."""
    kind = (request.content_type or "").lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise InvalidRequest(f"The body must be application/json, not {kind[:80]}.")
    return request.body


def json_response(body: msgspec.Struct, *, status: int = 200) -> HttpResponse:
    """Return a struct as JSON."""
    content = _encoder.encode(body)
    headers = {"Content-Length": str(len(content)), "X-Content-Type-Options": "nosniff"}
    return HttpResponse(content, status=status, content_type="application/json", headers=headers)
