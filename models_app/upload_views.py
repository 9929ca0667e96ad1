"""Uploads from My Models: in pieces, resumable, with answers in JSON for the page's script. Every act is a call of ``uploads``."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import msgspec
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.http import require_http_methods, require_POST

from lmweb.decoding import decode_json
from lmweb.errors import InvalidRequest, LmwebError, PayloadTooLarge
from models_app import uploads
from models_app.views import P, View, principal_of

T = TypeVar("T")


def json_errors(view: View[P]) -> View[P]:
    """Render the project's errors as JSON, for the upload script."""

    @functools.wraps(view)
    def wrapper(request: HttpRequest, /, *args: P.args, **kwargs: P.kwargs) -> HttpResponse:
        try:
            return view(request, *args, **kwargs)
        except LmwebError as error:
            facts = {"code": error.code, "message": error.message, "param": error.param, "details": error.details}
            return JsonResponse({"error": facts}, status=error.status)

    return wrapper


class NewUpload(msgspec.Struct, forbid_unknown_fields=True):
    """What the browser says about a file before it sends it."""

    file_name: str
    size: int


class FinishUpload(msgspec.Struct, forbid_unknown_fields=True):
    """Under which name a complete upload is stored."""

    user_repo: str = ""


@require_POST
@json_errors
def new_upload(request: HttpRequest) -> HttpResponse:
    """Begin an upload."""
    facts = _body(request, NewUpload)
    upload = uploads.create(principal=principal_of(request), file_name=facts.file_name, size=facts.size)
    return JsonResponse(_upload_state(upload), status=201)


@require_http_methods(["GET", "PUT", "DELETE"])
@json_errors
def upload(request: HttpRequest, upload_id: str) -> HttpResponse:
    """Say how far an upload is, add a piece at ``?offset=``, or end it."""
    principal = principal_of(request)
    if request.method == "DELETE":
        uploads.cancel(principal=principal, upload_id=upload_id)
        return HttpResponse(status=204)
    if request.method == "GET":
        return JsonResponse(_upload_state(uploads.get(principal=principal, upload_id=upload_id)))
    uploads.get(principal=principal, upload_id=upload_id)  # before the body is read: strangers need not be heard out
    if int(request.headers.get("Content-Length") or 0) > uploads.MAX_CHUNK_BYTES:
        raise PayloadTooLarge(f"A piece of an upload has at most {uploads.MAX_CHUNK_BYTES} bytes.")
    offset = request.GET.get("offset", "")
    if not (offset.isascii() and offset.isdigit() and len(offset) < 19):
        raise InvalidRequest("The offset of the piece is missing or not a number.", param="offset")
    state = uploads.append(principal=principal, upload_id=upload_id, offset=int(offset), chunk=request.body)
    return JsonResponse(_upload_state(state))


@require_POST
@json_errors
def finish_upload(request: HttpRequest, upload_id: str) -> HttpResponse:
    """Take a complete upload into the models directory."""
    facts = _body(request, FinishUpload)
    model = uploads.finish(principal=principal_of(request), upload_id=upload_id, user_repo=facts.user_repo.strip() or None)
    return JsonResponse({"key": model.key, "display_name": model.display_name, "size_bytes": model.size_bytes}, status=201)


def _body(request: HttpRequest, kind: type[T]) -> T:
    try:
        return decode_json(request.body, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request is not what was expected: {error}") from None


def _upload_state(state: uploads.Upload) -> dict[str, Any]:
    return {"id": state.id, "file_name": state.file_name, "size": state.size, "received": state.received}
