"""The warps of interpreted programs, one at a time, in an order that a seed decides.

What is asynchronous on a GPU may end at once, or as late as anything waits for it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attn_dispatch.emulation.errors import EmulationError
from attn_dispatch.emulation.gluon.ordering import Clock

__all__ = ["Scheduler", "Task"]


#: How likely it is that a task which is not paused runs before those that are.
_PATIENCE = 0.8


class _Stopped(BaseException):
    """Raised in a task when another one has failed."""


@dataclass(eq=False)
class Task:
    """A group of warps of a program that runs on its own.

    Attributes:
        name: for messages.
        program: its program, see `language.Program`.
        is_ready: what it waits for; `why` says what that is.
        is_paused: others run first, mostly.
        products: matrix products that are under way, oldest first.
        clock: what it has stored and seen in global memory; has its number, from 1 on.
        polled: the address and the result of its last atomic operation.
    """

    name: str
    program: Any
    run: Callable[[], None]
    is_ready: Callable[[], bool] = lambda: True
    why: str = ""
    is_paused: bool = False
    products: list[Any] = field(default_factory=list)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    has_ended: bool = False
    clock: Clock = field(default_factory=lambda: Clock(0))
    polled: tuple[int, int] = (0, 0)


class Scheduler:
    """Runs tasks until all have ended.

    Args:
        seed: of the order of tasks, and of when copies end.
        lateness: how likely a copy is to end only when no task can go on, at each switch.
    """

    def __init__(self, seed: int = 0, lateness: float = 0.5) -> None:
        self._random = random.Random(seed)
        self._lateness = lateness
        self._tasks: list[Task] = []
        self._copies: list[Callable[[], None]] = []
        self._back = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._local = threading.local()

    @property
    def task(self) -> Task:
        """The task that runs."""
        found: Task = self._local.task
        return found

    def start(self, task: Task) -> None:
        """Add a task."""
        self._tasks.append(task)
        task.clock.number = len(self._tasks)
        task.program.memory.names[len(self._tasks)] = task.name
        threading.Thread(target=self._run, args=(task,), daemon=True).start()

    def _run(self, task: Task) -> None:
        self._local.task = task
        task.turn.acquire()
        try:
            if self._error is None:
                with np.errstate(all="ignore"):  # as on a GPU
                    task.run()
            if task.products:
                raise EmulationError(f"{task.name} ended while its products were under way.")
        except _Stopped:
            pass
        except BaseException as error:
            self._error = self._error or error
        task.has_ended = True
        self._back.release()

    def wait(self, is_ready: Callable[[], bool], why: str) -> None:
        """Let others run until something is so."""
        task = self.task
        task.is_ready, task.why = is_ready, why
        self._back.release()
        task.turn.acquire()
        if self._error is not None:
            raise _Stopped
        task.is_ready, task.why = (lambda: True), ""

    def pause(self) -> None:
        """Take long over what comes next: others may run until they have to wait."""
        self.task.is_paused = True
        self.wait(lambda: True, "its turn")
        self.task.is_paused = False

    def copy(self, land: Callable[[], None]) -> None:
        """Begin a copy, which ends at some time: at once, or later."""
        if self._random.random() < self._lateness:
            self._copies.append(land)
        else:
            land()

    def _land_some(self, *, any_number: bool) -> None:
        """End copies, in any order."""
        self._random.shuffle(self._copies)
        number = self._random.randint(0 if any_number else 1, len(self._copies))
        for _ in range(number):
            self._copies.pop()()

    def run(self) -> None:
        """Run all tasks to their end.

        Raises:
            EmulationError: they wait for each other.
        """
        while alive := [each for each in self._tasks if not each.has_ended]:
            if self._error is not None:
                for each in alive:
                    each.turn.release()
                    self._back.acquire()
                continue
            try:
                task = self._next(alive)
            except BaseException as error:
                self._error = error
                continue
            task.turn.release()
            self._back.acquire()
        try:
            while self._copies and self._error is None:
                self._land_some(any_number=False)
        except BaseException as error:
            self._error = error
        if self._error is not None:
            raise self._error

    def _next(self, alive: list[Task]) -> Task:
        if self._copies and self._random.random() > self._lateness:
            self._land_some(any_number=True)
        while not (ready := [each for each in alive if each.is_ready()]):
            if not self._copies:
                waits = "; ".join(f"{each.name} waits for {each.why}" for each in alive)
                raise EmulationError(f"Nothing can go on: {waits}.")
            self._land_some(any_number=False)
        first = [each for each in ready if not each.is_paused]
        return self._random.choice(first if first and self._random.random() < _PATIENCE else ready)
