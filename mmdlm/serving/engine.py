"""The engine: rows of many requests share forwards; a new one joins at the next step, a finished one leaves.

Continuous batching as in language-model servers (Orca, OSDI 2022), where a step is one pass of masked diffusion: rows
are independent (`mmdlm.sampling.denoise`), so pictures and texts of any lengths, steps, settings and seeds stand side
by side, and each comes out as it does alone.

    engine = Engine(model, mask_id)
    ticket = engine.submit(studio.drawing("a red apple", seed=7), client="a")
    state = ticket.future.result()               # the last State of its row; ticket.future.cancel() takes it out
    engine.stop()

Who is next: the client with the fewest tokens in the batch, among equals who came first; nobody overtakes who is next
while there is no room for it. So one client with a thousand requests does not keep a second one waiting, a large
request is not passed over for ever, and a single client is served first come, first served.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.sampling.denoise import Asked, State
from mmdlm.serving.forward import Layouts, guided_forward
from mmdlm.serving.jobs import Job, Question
from mmdlm.serving.lanes import Lanes, fair_share

logger = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full or the engine is stopping; `retry_after` seconds from now there may be room."""

    def __init__(self, words: str, retry_after: int) -> None:
        super().__init__(words)
        self.retry_after = retry_after


class Late(Exception):
    """The deadline passed before the row was finished."""


class Pass(NamedTuple):
    """What one step of a lane was: for whoever watches (`Engine(watch=...)`)."""

    jobs: int
    rows: int  # guidance takes two for a job
    length: int  # of the longest row; a step is rows x length tokens at most
    asked: int  # places whose logits were wanted
    written: int  # places that were written
    seconds: float
    waiting: int


@dataclass(eq=False)
class Ticket:
    """A job in the engine. Its future holds the last State; cancelling that takes the row out before the next step."""

    job: Job
    client: str
    deadline: float | None  # of time.monotonic()
    on_state: Callable[[State], None] | None
    number: int
    asked: Asked
    future: Future[State] = field(default_factory=Future)

    @property
    def tokens(self) -> int:
        return self.job.rows * self.job.length


class Engine:
    """Runs jobs in threads of its own. Every method may be called from any thread.

    `budget`: tokens of all lanes' steps, padding and the second row of guided jobs included; it bounds the memory.
    `queue`: jobs that may wait. `lanes`: see `mmdlm.serving.lanes`. `watch` is called with a `Pass` after every step,
    in each lane's own thread.
    """

    def __init__(
        self,
        model: MaskPredictor,
        mask_id: int,
        *,
        budget: int = 16384,
        queue: int = 256,
        lanes: int | None = None,
        watch: Callable[[Pass], None] | None = None,
    ) -> None:
        if budget < 1 or queue < 1:
            raise InputError(f"budget is {budget}, queue {queue}, expected 1 or more of both: raise them.")
        self.mask_id, self.budget, self.queue, self._watch = mask_id, budget, queue, watch
        self._lanes = Lanes(model, lanes)
        self._waiting: list[Ticket] = []
        self._active: list[Ticket] = []  # let in, those first that have waited longest for a step
        self._taken: set[Ticket] = set()  # those of them that a lane is at
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = self._stopped = False
        self._busy = 0  # lanes at work
        self._spent, self._seconds_per_job = 0.0, 1.0  # since a job was finished; a running mean, for Retry-After
        self._threads = [
            threading.Thread(target=self._run, args=(model,), name=f"mmdlm-engine-{number}", daemon=True)
            for number, model in enumerate(self._lanes.models)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        job: Job,
        *,
        client: str = "",
        seconds: float | None = None,
        on_state: Callable[[State], None] | None = None,
    ) -> Ticket:
        """Queue a job. `seconds`: until it is `Late`. `on_state` gets every State, in the engine's threads: be quick.

        Raises InputError where it can never fit or its settings contradict each other, `Busy` where there is no room.
        """
        return self.submit_all([job], client=client, seconds=seconds, on_states=[on_state])[0]

    def submit_all(
        self,
        jobs: Sequence[Job],
        *,
        client: str = "",
        seconds: float | None = None,
        on_states: Sequence[Callable[[State], None] | None] | None = None,
    ) -> list[Ticket]:
        """Queue the jobs of one request: all of them or none. As `submit`."""
        deadline = None if seconds is None else time.monotonic() + seconds
        tickets = []
        for job, on_state in zip(jobs, on_states or [None] * len(jobs), strict=True):
            if job.rows * job.length > self.budget:
                raise InputError(
                    f"The request takes {job.rows} x {job.length} tokens, this server's budget is {self.budget}: "
                    "shorten it, or ask for guidance_scale 1."
                )
            if job.first is None:  # not started yet, or already run
                job.start(self.mask_id)
            first, job.first = job.first, None
            assert first is not None
            ticket = Ticket(job, client, deadline, on_state, next(self._numbers), Asked(*first[:2]))
            if isinstance(first, State):  # nothing is masked
                ticket.future.set_result(first)
            tickets.append(ticket)
        unfinished = [ticket for ticket in tickets if not ticket.future.done()]
        with self._changed:
            if self._closed:
                raise Busy("The server is shutting down.", 5)
            if len(self._waiting) + len(unfinished) > self.queue:
                raise Busy(f"The queue is full ({len(self._waiting)} of {self.queue} waiting).", self._retry_after())
            self._waiting += unfinished
            self._changed.notify_all()
        return tickets

    def close(self) -> None:
        """Take nothing new; what was accepted is finished."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stop(self, seconds: float | None = None) -> bool:
        """Close, wait until all that was accepted is finished, but `seconds` at most; then give up the rest.

        Returns True where nothing had to be given up.
        """
        self.close()
        until = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        finished = not any(thread.is_alive() for thread in self._threads)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for ticket in self._waiting + self._active:
            _fail(ticket, Busy("The server was stopped.", 5))
        self._waiting, self._active = [], []
        return finished

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        return len(self._active)

    # ------------------------------------------------------------------------------------------------ the threads

    def _run(self, model: MaskPredictor) -> None:
        """A lane: step after step over its share of the rows."""
        layouts = Layouts()
        while True:
            tickets, busy = self._next()
            if not tickets:
                return
            self._lanes.share_cores(busy)
            started = time.perf_counter()
            try:
                self._step(model, tickets, layouts)
            except Exception as error:  # a bug here must not leave everybody waiting for a thread that is gone
                logger.exception("a step failed")
                for ticket in tickets:
                    _fail(ticket, error)
            self._leave(tickets, (time.perf_counter() - started) / busy)

    def _next(self) -> tuple[list[Ticket], int]:
        """The rows of a lane's next step, when there are some, and how many lanes are then at work; none at the end."""
        with self._changed:
            while not self._stopped:
                self._clear()
                self._admit()
                free = [ticket for ticket in self._active if ticket not in self._taken]
                if free:
                    tickets = fair_share(free, self._taken, lambda ticket: ticket.tokens, len(self._threads))
                    self._taken.update(tickets)
                    self._busy += 1
                    return tickets, self._busy
                if self._closed and not (self._waiting or self._active):
                    break
                self._changed.wait()
        return [], 0

    def _leave(self, tickets: list[Ticket], seconds: float) -> None:
        """A lane's step is over; `seconds` of the engine's time went into it."""
        with self._changed:
            self._taken.difference_update(tickets)
            # behind those that were left over: nobody waits for more than a step
            stay = [ticket for ticket in tickets if not ticket.future.done()]
            others = set(self._active).difference(tickets)
            self._active = [ticket for ticket in self._active if ticket in others] + stay
            self._busy -= 1
            self._spent += seconds
            if left := len(tickets) - len(stay):
                self._seconds_per_job += 0.2 * (self._spent / left - self._seconds_per_job)
                self._spent = 0.0
            self._changed.notify_all()

    def _clear(self) -> None:
        """Take out what is cancelled or late and no lane is at."""
        now = time.monotonic()
        for ticket in [*self._waiting, *(ticket for ticket in self._active if ticket not in self._taken)]:
            if ticket.deadline is not None and now > ticket.deadline:
                _fail(ticket, Late("The request took longer than its deadline allows."))
        self._waiting = [ticket for ticket in self._waiting if not ticket.future.done()]
        self._active = [ticket for ticket in self._active if ticket in self._taken or not ticket.future.done()]

    def _admit(self) -> None:
        """Let in whoever is next while the padded forward stays within the budget."""
        shares = Counter[str]()
        for ticket in self._active:
            shares[ticket.client] += ticket.tokens
        while self._waiting:
            ticket = min(self._waiting, key=lambda waiting: (shares[waiting.client], waiting.number))
            together = [*self._active, ticket]
            rows, length = sum(one.job.rows for one in together), max(one.job.length for one in together)
            if rows * length > self.budget:
                return
            self._waiting.remove(ticket)
            self._active = together
            shares[ticket.client] += ticket.tokens

    def _step(self, model: MaskPredictor, tickets: list[Ticket], layouts: Layouts) -> None:
        """A lane's step: what its rows ask, and each row's answer to it."""
        started = time.perf_counter()
        questions = [ticket.job.questions(ticket.asked) for ticket in tickets]
        answered = _logits(model, tickets, questions, layouts)
        written = sum(self._answer(ticket, logits) for ticket, logits in answered)
        if self._watch is not None:
            rows, length = sum(ticket.job.rows for ticket in tickets), max(ticket.job.length for ticket in tickets)
            asked = sum(len(question.where) for one in questions for question in one)
            seconds = time.perf_counter() - started
            self._watch(Pass(len(tickets), rows, length, asked, written, seconds, len(self._waiting)))

    def _answer(self, ticket: Ticket, logits: Tensor) -> int:
        """Send a row its logits; returns the places it wrote. Whatever goes wrong in it stays in it."""
        try:
            state = ticket.job.loop.send(logits.unsqueeze(0))
            assert isinstance(state, State)
            if ticket.on_state is not None:
                ticket.on_state(state)
            if not bool(state.done.all()):
                ticket.asked = Asked(*next(ticket.job.loop)[:2])
            elif ticket.future.set_running_or_notify_cancel():
                ticket.future.set_result(state)
            return int(state.written.sum())
        except Exception as error:
            logger.exception("a row failed")
            _fail(ticket, error)
            return 0

    def _retry_after(self) -> int:
        return max(1, round(self._seconds_per_job * len(self._waiting)))


def _logits(
    model: MaskPredictor, tickets: list[Ticket], questions: list[list[Question]], layouts: Layouts
) -> list[tuple[Ticket, Tensor]]:
    """Each ticket's logits, computed together. Where that fails each is asked alone, and only who fails then fails."""
    try:
        asked = [(one, ticket.job.scale) for ticket, one in zip(tickets, questions, strict=True)]
        return list(zip(tickets, guided_forward(model, asked, layouts), strict=True))
    except Exception as error:
        if len(tickets) == 1:
            logger.exception("a forward failed")
            _fail(tickets[0], error)
            return []
        logger.warning("a forward of %d jobs failed (%r), each is tried alone", len(tickets), error)
        return [pair for i, ticket in enumerate(tickets) for pair in _logits(model, [ticket], [questions[i]], layouts)]


def _fail(ticket: Ticket, error: Exception) -> None:
    if not ticket.future.done() and ticket.future.set_running_or_notify_cancel():
        ticket.future.set_exception(error)
