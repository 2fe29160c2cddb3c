"""Calls that may never return."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class HungError(Exception):
    """The call did not return in time, or one before it still has not."""


class Watchdog:
    """Runs calls one at a time in a thread of its own, and stops waiting for one that takes too long.

    A thread inside a driver cannot be ended, so there is never more than this one: until the call returns, further
    ones are refused at once.
    """

    def __init__(self, name: str, limit: float) -> None:
        self._name, self._limit = name, limit
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stuck: Future[Any] | None = None

    def call(self, function: Callable[[], T]) -> T:
        """The function's result or exception; HungError after ``limit`` seconds."""
        if self._stuck is not None and not self._stuck.done():
            raise HungError(f"{self._name}: an earlier call has not returned yet")
        self._stuck = None
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._calls.put((function, future))
        try:
            return future.result(self._limit)
        except FutureTimeoutError:  # the builtin one from Python 3.11 on
            if future.done():  # the function's own
                raise
            self._stuck = future
            raise HungError(f"{self._name}: no answer for {self._limit:g} s") from None

    def _work(self) -> None:
        while True:
            function, future = self._calls.get()
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - handed to the caller
                future.set_exception(error)
