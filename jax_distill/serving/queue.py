"""The queue of pictures that are asked for: who waits, what is drawn together, how it ends."""

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jax_distill.serving.drawing import Drawn, Refused
from jax_distill.serving.parameters import Wanted


class Unavailable(Exception):
    """The queue takes nothing now; the message says why.

    Attributes:
      seconds: after which to ask again.
    """

    def __init__(self, reason: str, seconds: int):
        super().__init__(reason)
        self.seconds = seconds


class Gone(Exception):
    """The client has gone."""


class Job:
    """A picture that waits or is drawn; `drawn` is awaited for it."""

    def __init__(self, wanted: Wanted, future: asyncio.Future):
        self.wanted, self._future = wanted, future

    @property
    def done(self) -> bool:
        return self._future.done()

    async def drawn(self) -> Drawn:
        """The picture.

        Raises:
          Unavailable: the server stops.
          Gone: it was cancelled.
          Exception: what kept it from being drawn.
        """
        return await self._future

    def end(self, result: Drawn | Exception) -> None:
        """Ends it once; what comes after that is dropped."""
        if self._future.done():
            return
        if isinstance(result, Exception):
            self._future.set_exception(result)
            self._future.exception()  # nobody may be left to ask
        else:
            self._future.set_result(result)


class Queue:
    """Draws in the order of asking, pictures of one program together; used by one event loop.

    A picture whose program is not compiled waits until it is, and others are drawn meanwhile.

    Args:
      draw: pictures of one program to one result for each; called in threads.
      ready: whether a picture's program is compiled; by default each is.
      compile: makes it so, whatever happens; called in a thread of its own.
      lanes: batches that are drawn at a time.
      batch_size: the most pictures of one.
      limit: the most that wait.
    """

    def __init__(
        self,
        draw: Callable[[Sequence[Wanted]], list[Drawn | Exception]],
        *,
        ready: Callable[[Wanted], bool] = lambda wanted: True,
        compile: Callable[[Wanted], None] = lambda wanted: None,
        lanes: int = 1,
        batch_size: int = 1,
        limit: int = 100,
    ):
        self._draw, self._ready, self._compile = draw, ready, compile
        self._lanes, self._batch_size, self._limit = lanes, batch_size, limit
        self._threads = ThreadPoolExecutor(lanes + 1, "drawing")  # one of them compiles
        self._waiting: list[Job] = []
        self._closed = False
        self._moved = asyncio.Event()

    def add(self, pictures: Sequence[Wanted]) -> list[Job]:
        """Lets pictures wait, all of them or none.

        Raises:
          Refused: they are more than ever fit.
          Unavailable: so many do not fit now, or the server stops.
        """
        if self._closed:
            raise Unavailable("the server is stopping; ask again when it has been started", 10)
        if len(pictures) > self._limit:
            raise Refused(
                f"{len(pictures)} pictures are more than the queue's {self._limit} places; ask for"
                " fewer at a time"
            )
        if len(self._waiting) + len(pictures) > self._limit:
            taken = f"{len(self._waiting)} of {self._limit} places in the queue are taken"
            raise Unavailable(f"{taken}; ask again later", 2)
        loop = asyncio.get_running_loop()
        jobs = [Job(wanted, loop.create_future()) for wanted in pictures]
        self._waiting += jobs
        self._wake()
        return jobs

    def position(self, job: Job) -> int:
        """How many are drawn before it, and itself; 0 when it waits no more."""
        return self._waiting.index(job) + 1 if job in self._waiting else 0

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Takes pictures out; those under way are drawn to their end, for nobody."""
        self._waiting = [job for job in self._waiting if job not in jobs]
        for job in jobs:
            job.end(Gone())
        self._wake()

    async def moved(self) -> None:
        """Returns when the queue has changed."""
        await self._moved.wait()

    async def run(self) -> None:
        """Draws until the queue is closed and what was under way is drawn."""
        await asyncio.gather(self._compiling(), *(self._lane() for _ in range(self._lanes)))
        self._threads.shutdown()

    def close(self) -> None:
        """Takes nothing more, and answers those who wait."""
        self._closed = True
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            job.end(Unavailable("the server is stopping; ask again when it has been started", 10))
        self._wake()

    async def _compiling(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closed:
            waits = (job.wanted for job in self._waiting if not self._ready(job.wanted))
            if (wanted := next(waits, None)) is None:
                await self.moved()
                continue
            await loop.run_in_executor(self._threads, self._compile, wanted)
            self._wake()

    async def _lane(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not (batch := self._next()):
                if self._closed:
                    return
                await self.moved()
            wanted = [job.wanted for job in batch]
            try:
                results = await loop.run_in_executor(self._threads, self._draw, wanted)
            except Exception as error:
                results = [error] * len(batch)
            for job, result in zip(batch, results):
                job.end(result)
            self._wake()

    def _next(self) -> list[Job]:
        """Takes out the first that can be drawn, and its share of those of the same program."""
        first = next((job.wanted for job in self._waiting if self._ready(job.wanted)), None)
        if first is None:
            return []
        same = [job for job in self._waiting if job.wanted.program == first.program]
        batch = same[: min(self._batch_size, math.ceil(len(same) / self._lanes))]
        self._waiting = [job for job in self._waiting if job not in batch]
        self._wake()
        return batch

    def _wake(self) -> None:
        """Wakes all who wait in `moved`."""
        self._moved.set()
        self._moved = asyncio.Event()
