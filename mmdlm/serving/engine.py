"""The engine: rows of many requests share every forward; a new one joins at the next step, a finished one leaves.

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
from mmdlm.sampling.predictors import guide
from mmdlm.serving.forward import shared_forward
from mmdlm.serving.jobs import Job, Question
from mmdlm.serving.lanes import Lanes, share_out

logger = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full or the engine is stopping; `retry_after` seconds from now there may be room."""

    def __init__(self, words: str, retry_after: int) -> None:
        super().__init__(words)
        self.retry_after = retry_after


class Late(Exception):
    """The deadline passed before the row was finished."""


class Pass(NamedTuple):
    """What one step was, all its lanes together: for whoever watches (`Engine(watch=...)`)."""

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

    `budget`: tokens of a step, padding and the second row of guided jobs included; it bounds the memory.
    `queue`: jobs that may wait. `watch` is called with a `Pass` after every step. `lanes`: see `mmdlm.serving.lanes`.
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
        self._active: list[Ticket] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = self._stopped = False
        self._busy, self._seconds_per_job = 0.0, 1.0  # since a job was finished; a running mean, for Retry-After
        self._thread = threading.Thread(target=self._run, name="mmdlm-engine", daemon=True)
        self._thread.start()

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
        self._thread.join(seconds)
        finished = not self._thread.is_alive()
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
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

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._active or self._closed):
                    self._changed.wait()
                if self._stopped or (self._closed and not (self._waiting or self._active)):
                    break
                self._clear()
                self._admit()
            try:
                if self._active:
                    self._step()
            except Exception as error:  # a bug here must not leave everybody waiting for a thread that is gone
                logger.exception("a step failed")
                for ticket in self._active:
                    _fail(ticket, error)
        for ticket in self._waiting + self._active:
            _fail(ticket, Busy("The server was stopped.", 5))
        self._waiting, self._active = [], []
        self._lanes.close()

    def _clear(self) -> None:
        """Take out what is cancelled or late."""
        now = time.monotonic()
        for ticket in self._waiting + self._active:
            if ticket.deadline is not None and now > ticket.deadline:
                _fail(ticket, Late("The request took longer than its deadline allows."))
        self._waiting = [ticket for ticket in self._waiting if not ticket.future.done()]
        self._active = [ticket for ticket in self._active if not ticket.future.done()]

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

    def _step(self) -> None:
        """A forward for the active rows of each lane, and each row's answer to it."""
        started, tickets = time.perf_counter(), list(self._active)
        parts = share_out(tickets, lambda ticket: (ticket.job.rows, ticket.job.length), len(self._lanes.models))
        asked, written = (sum(counts) for counts in zip(*self._lanes.run(self._forward, parts), strict=True))
        self._active = [ticket for ticket in self._active if not ticket.future.done()]
        seconds = time.perf_counter() - started
        self._busy += seconds
        if left := len(tickets) - len(self._active):
            self._seconds_per_job += 0.2 * (self._busy / left - self._seconds_per_job)
            self._busy = 0.0
        if self._watch is not None:
            rows, length = sum(ticket.job.rows for ticket in tickets), max(ticket.job.length for ticket in tickets)
            self._watch(Pass(len(tickets), rows, length, asked, written, seconds, len(self._waiting)))

    def _forward(self, model: MaskPredictor, tickets: list[Ticket]) -> tuple[int, int]:
        """A lane's part of a step: the places that were asked and those that were written."""
        try:
            questions: list[list[Question]] = [ticket.job.questions(ticket.asked) for ticket in tickets]
            written = sum(self._answer(ticket, logits) for ticket, logits in _logits(model, tickets, questions))
            return sum(len(question.where) for one in questions for question in one), written
        except Exception as error:  # a bug here must not leave everybody waiting for a thread that is gone
            logger.exception("a step failed")
            for ticket in tickets:
                _fail(ticket, error)
            return 0, 0

    def _answer(self, ticket: Ticket, logits: list[Tensor]) -> int:
        """Send a row its logits; returns the places it wrote. Whatever goes wrong in it stays in it."""
        try:
            of_row = logits[0] if len(logits) == 1 else guide(logits[0], logits[1], ticket.job.scale)
            state = ticket.job.loop.send(of_row.unsqueeze(0))
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
    model: MaskPredictor, tickets: list[Ticket], questions: list[list[Question]]
) -> list[tuple[Ticket, list[Tensor]]]:
    """Each ticket's logits, of one forward. Where that fails each is asked alone, and only who fails then fails."""
    try:
        flat = iter(shared_forward(model, [question for one in questions for question in one]))
    except Exception as error:
        if len(tickets) == 1:
            logger.exception("a forward failed")
            _fail(tickets[0], error)
            return []
        logger.warning("a forward of %d jobs failed (%r), each is tried alone", len(tickets), error)
        return [pair for i, ticket in enumerate(tickets) for pair in _logits(model, [ticket], [questions[i]])]
    return [(ticket, [next(flat) for _ in one]) for ticket, one in zip(tickets, questions, strict=True)]


def _fail(ticket: Ticket, error: Exception) -> None:
    if not ticket.future.done() and ticket.future.set_running_or_notify_cancel():
        ticket.future.set_exception(error)
