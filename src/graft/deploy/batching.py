"""Images that several requests wait for, run by the model together."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from graft.deploy.spec import Model

Job = tuple[NDArray[np.uint8], Future[NDArray[np.float32]]]  # an image, and where its outputs go

log = logging.getLogger(__name__)


class ModelError(Exception):
    """The model failed on an image; why is in the log, which clients do not see."""


class Batcher:
    """A thread that runs the model on whatever waits, up to `batch_size` images of one shape.

    It never waits for more: one image alone is a batch, and while a batch runs the next gathers.
    """

    def __init__(self, model: Model, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="graft-model", daemon=True)
        self._thread.start()

    def submit(self, image: NDArray[np.uint8]) -> Future[NDArray[np.float32]]:
        """The outputs for a (3, H, W) image; its future may be cancelled while it waits."""
        future: Future[NDArray[np.float32]] = Future()
        with self._changed:
            if self._closed:
                future.cancel()
            else:
                self._waiting.append((image, future))
                self._changed.notify()
        return future

    def __len__(self) -> int:
        """How many images wait."""
        return len(self._waiting)

    def close(self) -> None:
        """Let the batch that runs finish, and cancel what waits."""
        with self._changed:
            self._closed = True
            waiting = [future for _, future in self._waiting]
            self._waiting.clear()
            self._changed.notify()
        for future in waiting:
            future.cancel()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                batch = self._take()
            if batch:
                self._predict(batch)

    def _take(self) -> list[Job]:
        """The first that waits and others of its shape; the rest keep their order."""
        shape = self._waiting[0][0].shape
        batch: list[Job] = []
        others: list[Job] = []
        while self._waiting and len(batch) < self.batch_size:
            image, future = self._waiting.popleft()
            if image.shape != shape:
                others.append((image, future))
            elif future.set_running_or_notify_cancel():
                batch.append((image, future))
        self._waiting.extendleft(reversed(others))
        return batch

    def _predict(self, batch: list[Job]) -> None:
        images, futures = zip(*batch, strict=True)
        try:
            outputs = self.model.predict_rows(np.stack(images))
            if len(outputs) != len(images):
                raise ValueError(f"{len(outputs)} rows of outputs for {len(images)} images")
        except Exception as error:  # of any kind: other requests are still to be answered
            if len(batch) > 1:  # memory for one there may be, or one alone is at fault
                for job in batch:
                    self._predict([job])
                return
            log.exception("the model failed on an image")
            failure = ModelError("the model failed on this image: the server's log says why")
            failure.__cause__ = error
            futures[0].set_exception(failure)
        else:
            for future, row in zip(futures, outputs, strict=True):
                future.set_result(row)
