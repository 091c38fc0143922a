"""An engine whose weights are a channel: whatever its trainer publishes last, or the version that a job pins.

Weights change only while the engine has no request, and a version counts as loaded only if the publication
is still the one that the loading began with: an answer never names weights that did not compute it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import structlog
from tutelage_client.errors import TutelageError
from tutelage_client.types import Identity, Limits, Pins, Score, ScoreRequest

from services.models.channel import Channel, PolicyVersion
from services.teacher.engine import Engine

POLL_SECONDS = 0.1
WITHDRAWN_SECONDS = 60.0  # how long a least version may be missing that was published when it was asked for

log = structlog.get_logger(__name__)


class FollowingEngine:
    """An Engine around another one, which it starts from the first publication.

    Args:
        channel: where the weights appear.
        build: an engine, not started, of the model in a directory.
        limits: until the engine has narrowed them.
    """

    def __init__(self, channel: Channel, build: Callable[[Path], Engine], limits: Limits) -> None:
        self._channel = channel
        self._build = build
        self._limits = limits
        self._engine: Engine | None = None
        self._identity: Identity | None = None  # of what was loaded last
        self._loaded: PolicyVersion | None = None  # None: what the engine holds has no name
        self._newest: PolicyVersion | None = None  # as of the last look
        self._changed = asyncio.Condition()
        self._turn = asyncio.Lock()  # to choose the weights, in order of arrival
        self._holders = 0  # jobs whose weights must stay
        self._scoring = 0  # requests that the engine has
        self._switching = False
        self._freed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    @property
    def identity(self) -> Identity:
        """What scores now; raises UNAVAILABLE before anything has been loaded."""
        if self._identity is None:
            raise self._unavailable()
        return self._identity

    @property
    def identities(self) -> tuple[Identity, ...]:
        return (self.identity,)

    @property
    def limits(self) -> Limits:
        return self._limits if self._engine is None else self._engine.limits

    async def start(self) -> None:
        """Wait for the first publication and load the newest; returns when a request would be answered."""
        engine = await self._started()
        self._engine = engine
        self._watching = asyncio.create_task(self._watch())
        held = False
        while not held:
            await self.published(Pins())
            async with self.holding(Pins()) as held:
                pass

    async def score(self, request: ScoreRequest) -> Score:
        while self._switching:
            await self._something_freed()
        if self._engine is None or self._loaded is None:
            raise self._unavailable()
        self._scoring += 1
        try:
            score = await self._engine.score(request)
        finally:
            self._scoring -= 1
            self._freed.set()
        return replace(score, identity=self._named(score.identity))

    async def offers(self, pins: Pins) -> bool:
        """Whether something has been published, as of now, that `published` would wait for."""
        await self._look()
        return self._reaches(_wanted(pins))

    async def published(self, pins: Pins) -> None:
        """Wait until there are weights that `pins` allow.

        An exact version is waited for without end: it is published again after a resumption. A least
        version was there when it was asked for; a trainer that resumed before it may never get there.

        Raises:
            TutelageError: NOT_FOUND when they have been deleted, or for a least version that stays away.
        """
        if await self.offers(pins):
            return
        exact, least = pins.weights_version, pins.min_weights_version or 0
        patience = None if exact is not None else WITHDRAWN_SECONDS
        try:
            async with asyncio.timeout(patience if least else None), self._changed:
                await self._changed.wait_for(lambda: self._reaches(_wanted(pins)))
        except TimeoutError:
            raise TutelageError(
                "NOT_FOUND",
                f"pins.min_weights_version: got {least}, which {self._channel.directory} has not had for "
                f"{WITHDRAWN_SECONDS:g} s; its trainer has resumed from an older checkpoint",
            ) from None

    @asynccontextmanager
    async def holding(self, pins: Pins) -> AsyncIterator[bool]:
        """Weights that `pins` allow, which stay while inside; False when they are gone, see `published`.

        Raises:
            TutelageError: NOT_FOUND for an exact version that has been deleted, and what loading raises.
        """
        async with self._turn:
            held = await self._choose(pins)
            self._holders += held
        try:
            yield held
        finally:
            self._holders -= held
            self._freed.set()

    async def load_weights(self, path: Path, weights_version: int, weights_id: str = "") -> None:
        """Refused: the channel says what is loaded."""
        raise TutelageError("FAILED_PRECONDITION", f"weights: this teacher follows {self._channel.directory}")

    async def ended(self) -> None:
        """Return when nothing more will be answered, or nothing newer loaded: jobs would wait for ever."""
        assert self._engine is not None
        assert self._watching is not None
        lost = asyncio.create_task(self._engine.ended())
        try:
            await asyncio.wait({lost, self._watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
        if self._watching.done() and not self._watching.cancelled():
            log.error("channel_not_watched", exc_info=self._watching.exception())

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)  # `ended` told what it failed with
        if self._engine is not None:
            await self._engine.close()

    def _named(self, identity: Identity) -> Identity:
        """The channel is the model; the engine only knows the directory that it was started from."""
        return replace(identity, model=str(self._channel.directory))

    def _reaches(self, version: int) -> bool:
        return self._newest is not None and self._newest.version >= version

    def _unavailable(self) -> TutelageError:
        message = f"teacher: no version of {self._channel.directory} is loaded"
        return TutelageError("UNAVAILABLE", message, retry_after=1.0)

    async def _something_freed(self) -> None:
        self._freed.clear()
        await self._freed.wait()

    async def _started(self) -> Engine:
        log.info("waiting_for_weights", directory=str(self._channel.directory))
        while True:
            if (first := await asyncio.to_thread(self._channel.latest)) is None:
                await asyncio.sleep(POLL_SECONDS)
                continue
            engine = self._build(first.path)
            try:
                await engine.start()
            except TutelageError:
                if self._channel.get(first.version) == first:
                    raise
                log.info("weights_replaced_while_loading", weights_version=first.version)
                await engine.close()
                continue
            return engine

    async def _look(self) -> None:
        newest = await asyncio.to_thread(self._channel.latest)
        if newest != self._newest:
            async with self._changed:
                self._newest = newest
                self._changed.notify_all()

    async def _watch(self) -> None:
        """Load what is new while no job says what it wants; jobs look for themselves."""
        tried: PolicyVersion | None = None
        said = ""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self._look()
                idle = not self._holders and not self._turn.locked()
                known = (tried, self._loaded) if self._loaded is not None else ()
                if idle and self._newest is not None and self._newest not in known:
                    tried = self._newest
                    async with self.holding(Pins()):
                        pass
            except (OSError, TutelageError) as error:
                if str(error) != said:
                    said = str(error)
                    log.error("weights_not_loaded", error=said)

    async def _choose(self, pins: Pins) -> bool:
        """Have the engine hold what `pins` allow; in turn."""
        wanted = await asyncio.to_thread(self._find, pins)
        if wanted is None:
            return False
        if self._loaded is not None and (wanted.version, wanted.stamp) == (
            self._loaded.version,
            self._loaded.stamp,
        ):
            return True
        return await self._switch(wanted)

    def _find(self, pins: Pins) -> PolicyVersion | None:
        """What to score with: the exact version, or the newest if it is new enough; None: to come."""
        newest, exact = self._channel.latest(), pins.weights_version
        if newest is None or newest.version < (pins.min_weights_version or 0):
            return None
        if exact is None:
            return newest
        found = self._channel.get(exact)
        if found is None and newest.version > exact:
            if self._loaded is not None and self._loaded.version == exact:
                return self._loaded  # deleted since
            raise TutelageError(
                "NOT_FOUND",
                f"pins.weights_version: {exact} has been deleted from {self._channel.directory}; "
                f"the newest is {newest.version}",
            )
        return found

    async def _switch(self, wanted: PolicyVersion) -> bool:
        """Load `wanted` once the engine has nothing to do; False when the publication was gone meanwhile."""
        assert self._engine is not None
        while self._holders:
            await self._something_freed()
        self._switching = True
        try:
            while self._scoring:
                await self._something_freed()
            return await self._load(self._engine, wanted)
        finally:
            self._switching = False
            self._freed.set()

    async def _load(self, engine: Engine, wanted: PolicyVersion) -> bool:
        before, self._loaded = self._loaded, None  # also for whoever comes if this is cancelled
        try:
            await engine.load_weights(wanted.path, wanted.version, wanted.stamp)
        except TutelageError:
            self._loaded = before  # the engine has kept it
            if self._channel.get(wanted.version) == wanted:
                raise
            log.info("weights_replaced_while_loading", weights_version=wanted.version)
            return False
        # Published anew meanwhile, some of the files may have been those of the other publication.
        if await asyncio.to_thread(self._channel.get, wanted.version) != wanted:
            return False
        self._loaded, self._identity = wanted, self._named(engine.identity)
        return True


def _wanted(pins: Pins) -> int:
    """The version that has to be published before there can be weights that `pins` allow."""
    return (pins.min_weights_version or 0) if pins.weights_version is None else pins.weights_version
