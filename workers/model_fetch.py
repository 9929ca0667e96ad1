"""The files of a model on their way to this machine: a worker without the models directory fetches what it loads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from django.db import Error as DatabaseError

from lmweb.db import try_to_store
from lmweb.errors import LmwebError, ModelLoadFailed
from workers.store import ModelFile, Store


class ModelFetch:
    """One model's files, fetched in a thread of their own; other models may be loaded meanwhile.

    ``is_wanted`` tells whether anybody still waits for them. ``on_end`` is called when all are here, or with ``error`` set. ``note``
    says how far it is; so does the row ``instance_id``.
    """

    def __init__(
        self, store: Store, model: ModelFile, instance_id: int, *, is_wanted: Callable[[], bool], on_end: Callable[[], None]
    ) -> None:
        self.note = ""
        self.is_done = False
        self.error: LmwebError | None = None
        self._store = store
        self._model, self._instance_id = model, instance_id
        self._is_wanted, self._on_end = is_wanted, on_end
        threading.Thread(target=self._run, name=f"fetch-{instance_id}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._store.fetch(self._model, self._report)
        except LmwebError as error:
            self.error = error
        except DatabaseError as error:
            self.error = ModelLoadFailed(f"The files could not be fetched: {error.__class__.__name__}.")
        self.is_done = True
        self._on_end()

    def _report(self, progress: float, what: str) -> None:
        if not self._is_wanted():
            raise ModelLoadFailed(f"Nobody waits for {self._model.key} any more.")
        self.note = f"{what} {progress:.0%}"
        try_to_store(lambda: self._store.instance_loading(self._instance_id, progress))
