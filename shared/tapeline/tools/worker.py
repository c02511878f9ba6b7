"""The worker: offers its tools, takes their calls from every shard, and makes an attempt at each.

Nothing that matters lives in this process.
"""

import asyncio
import contextlib
import importlib.util
import logging
import secrets
import signal
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, Final, NoReturn

from opentelemetry.context import attach

from tapeline import events, limits, settings, subjects, telemetry
from tapeline.connection import Refused, Unavailable, reason
from tapeline.delivery import Deliveries, Delivery
from tapeline.events import ToolCall
from tapeline.registry import Offer, Registry
from tapeline.settings import Broken, ConfigError, Settings
from tapeline.tape import Tape

from . import consumer, servers
from .attempt import Attempt
from .definition import AnyTool
from .desk import Desk
from .place import Loop, Work
from .process import preload

log = logging.getLogger(__name__)

MCP: Final = "TAPELINE_MCP"


def serve(tools: Iterable[AnyTool], pool: str = "", mcp: str = "") -> None:
    """Runs a worker for these tools until SIGTERM or SIGINT: the whole life of a process.

    Settings: `TAPELINE_NATS_URL`, required; `TAPELINE_POOL`, which goes before `pool`; and `TAPELINE_MCP`, a file that
    names MCP servers whose tools are served too, unless `mcp` is one.
    """

    async def main(environment: Settings) -> None:
        telemetry.setup("tools")
        try:
            named = _servers(mcp or environment.text(MCP), environment)
            await _serve(list(tools), named, environment.text("TAPELINE_POOL", pool), environment.nats_url)
        finally:
            telemetry.shutdown()

    settings.run("tools", main)


def _servers(path: str, environment: Settings) -> dict[str, servers.ServerConfig]:
    """The MCP servers in that file, if there is one. Raises `ConfigError`."""
    named = servers.load(path, environment.environ) if path else {}
    if named and importlib.util.find_spec("mcp") is None:
        raise ConfigError(f"{path} names MCP servers, which needs: pip install 'tapeline[mcp]'")
    return named


async def _serve(tools: list[AnyTool], named: dict[str, servers.ServerConfig], pool: str, nats_url: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if not tools and not named:
        raise ConfigError("there are no tools to serve")
    tape = await Tape.open(nats_url, "tapeline-tools")
    try:
        worker = Worker(tape, tools, pool, nats_url)
        await worker.start()
        if tools:
            print(worker.ready, flush=True)
        lives: set[asyncio.Task[Any]] = {asyncio.create_task(stop.wait()), worker.upkeep}
        if named:
            lives.add(asyncio.create_task(_offer(worker, tools, named)))
        ended, others = await asyncio.wait(lives, return_when=asyncio.FIRST_COMPLETED)
        for other in others:
            other.cancel()
        await worker.stop()
        for one in ended:
            one.result()  # it ended by itself: say why
    finally:
        await tape.close()


async def _offer(worker: "Worker", tools: list[AnyTool], named: dict[str, servers.ServerConfig]) -> NoReturn:
    """Has the worker offer what these MCP servers do, as they come and go, beside its tools."""
    from .mcp import Servers

    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    running = Servers(named, lambda: loop.call_soon_threadsafe(changed.set))
    worker.beside(running.live(), "MCP servers")
    while True:
        await changed.wait()
        changed.clear()
        try:
            await worker.set_tools([*tools, *running.offered({tool.name for tool in tools})])
        except Unavailable as error:
            log.warning("%s; what is offered changes later", error)
        else:
            print(worker.ready, flush=True)


class Worker:
    """One worker process: its tools, and the calls it has. `upkeep` ends only with an error, which says why."""

    upkeep: asyncio.Task[None]

    def __init__(self, tape: Tape, tools: Iterable[AnyTool], pool: str, nats_url: str) -> None:
        self.tape = tape
        self.pool = pool
        self.tools = _by_name(tools)
        """What it offers, by name. Changed by `set_tools`."""
        if pool and not subjects.is_tool(pool):
            raise ConfigError(f"the pool's name {pool!r} must be letters, digits, _ and -, 64 at most")
        self.id = f"{pool or 'tools'}-{secrets.token_hex(4)}"
        self.registry = Registry(tape, self.id)
        self._desks: dict[str, Desk] = {}
        self._rivals: dict[str, Offer] = {}  # by tool: for these it stands by
        self._started = False
        self._held: dict[str, Delivery] = {}  # by call: those that wait for a slot, and those that run
        self._calls: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        self._cut = asyncio.Event()
        self._loop = Loop()
        self._beside: list[Work] = []
        self._deliveries = Deliveries(nats_url, "tapeline-tools-delivery", self._take)

    @property
    def ready(self) -> str:
        """Which calls it takes, and which it does not, in a line."""
        ready, waiting = sorted(self.tools.keys() - self._rivals.keys()), sorted(self._rivals)
        return f"tools ready: {', '.join(ready) or 'none'}" + (
            f"; standing by: {', '.join(waiting)}" if waiting else ""
        )

    async def start(self) -> None:
        """Offers its tools and takes their calls.

        Raises `Refused`, `Unavailable`, and `ConfigError` where another pool has one of them with another schema.
        """
        if modules := {tool.function.__module__ for tool in self.tools.values() if tool.process}:
            preload(modules)
        await self._deliveries.start()
        try:
            await self.tape.patiently("JetStream", self._join)
        except ConfigError:
            await self.registry.withdraw()
            raise
        self._started = True
        self.upkeep = asyncio.create_task(self._keep_up())

    async def set_tools(self, tools: Iterable[AnyTool]) -> None:
        """Makes these what it offers, after `start`. Of those that are gone it takes no more calls; those under way
        end as usual. Calling it again changes nothing.

        One whose calls this worker may not take is not offered, and the log says why; it is tried again and again.

        Raises `ConfigError` where two have the same name. While NATS is away it raises `Unavailable`
        and goes on trying by itself.
        """
        self.tools = _by_name(tools)
        await self._settle()

    def beside(self, coroutine: Coroutine[Any, Any, Any], name: str) -> None:
        """Runs what tools need, on the loop where async ones run. It is cancelled once all calls have ended."""
        self._beside.append(self._loop.start(coroutine, name))

    async def stop(self) -> None:
        """Takes no more calls, lets those that run end for `DRAIN_S`, and cuts the rest: an idempotent tool's go
        to another worker, any other's end as `unknown`.
        """
        self.upkeep.cancel()
        async with self._changing:
            self.tools = {}
            for desk in list(self._desks.values()):
                await self._close(desk)
        await asyncio.gather(self._withdraw(), self._calls_end(limits.DRAIN_S))
        self._cut.set()
        await self._calls_end(limits.APPEND_TIMEOUT_S)
        await asyncio.gather(self._deliveries.close(), self._end_beside())
        await self._loop.close()

    async def _withdraw(self) -> None:
        try:
            async with asyncio.timeout(limits.DRAIN_S):
                await self.registry.withdraw()
        except (Unavailable, TimeoutError) as error:
            log.warning("could not withdraw the tools, they expire by themselves: %s", reason(error))

    async def _end_beside(self) -> None:
        for work in self._beside:
            work.cancel()
        if self._beside:
            await asyncio.wait({work.future for work in self._beside}, timeout=limits.MCP_CLOSE_S)

    async def _calls_end(self, within_s: float) -> None:
        if self._calls:
            await asyncio.wait(self._calls, timeout=within_s)

    # What keeps the worker in business

    async def _keep_up(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_offers())
                group.create_task(self._loop.watch())
                group.create_task(self._watch_desks())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _watch_desks(self) -> None:
        """Ends only with `Broken`."""
        while True:
            await asyncio.sleep(limits.TOOL_LOOP_LATE_S)
            for desk in self._desks.values():
                if desk.stuck_s >= limits.TOOL_STUCK_S:
                    slots = f"{desk.tool.max_concurrency} at a time"
                    raise Broken(
                        f"tool {desk.tool.name}: calls of it do not end though their time is over, and have been all "
                        f"that it may have, {slots}, for {desk.stuck_s:.0f} s"
                    )

    async def _keep_offers(self) -> None:
        while True:
            await self._pause()
            await self._deliveries.check()
            try:
                await self._settle()
                for refused in (await self._ensure_consumers(self._desks)).values():
                    raise refused
            except Unavailable as error:
                log.warning("%s; trying again in %g s", error, limits.REGISTRY_REFRESH_S)

    async def _pause(self) -> None:
        """Until it is time to refresh the offers, or something has changed for a tool that stands by."""
        clock = asyncio.get_running_loop().time
        refresh_at = clock() + limits.REGISTRY_REFRESH_S
        while clock() < refresh_at:
            await asyncio.sleep(limits.STAND_BY_LOOK_S)
            if self._rivals:
                with contextlib.suppress(Unavailable):  # and nothing can be done about it before it is back
                    if self._found_rivals(await self.registry.counting(*self._rivals)).keys() != self._rivals.keys():
                        return

    async def _join(self) -> None:
        """As `_settle`, unless another pool serves a tool of ours otherwise, be it that of an older worker or not."""
        self._refuse(offer for offer in await self.registry.offers() if not offer.stands_by)
        await self._settle()

    async def _settle(self) -> None:
        """Brings about what `tools` says: closes the desks of those that are gone, offers the others, opens theirs."""
        async with self._changing:
            tools = dict(self.tools)
            new = True
            while new:  # and as often as somebody else may have come first
                self._tell(self._found_rivals(await self.registry.counting(*tools)))
                for desk in list(self._desks.values()):
                    if tools.get(desk.tool.name) is not desk.tool or desk.tool.name in self._rivals:
                        await self._close(desk)
                # Of those that are served already, whose offers must not expire meanwhile, they are looked for later.
                joining = tools.keys() - self._desks.keys() - self._rivals.keys()
                for name, refused in (await self._ensure_consumers(joining)).items():
                    if not self._started:
                        raise refused
                    log.error("tool %s is not offered: %s", name, refused)
                    del tools[name]
                new = await self.registry.announce([tool.spec(self.pool) for tool in tools.values()], self._rivals)
            for tool in tools.values():
                if tool.name not in self._rivals:
                    await self._open(tool)

    def _found_rivals(self, counting: Mapping[str, Offer]) -> dict[str, Offer]:
        """Of our tools, those of which an offer counts that does not agree with ours."""
        return {name: counting[name] for name in self.tools if name in counting and self._is_rival(counting[name])}

    def _is_rival(self, offer: Offer) -> bool:
        ours = self.tools.get(offer.tool.name)
        return ours is not None and offer.worker != self.id and not offer.tool.agrees(ours.spec())

    def _what(self, rival: Offer) -> str:
        same = rival.tool.parameters == self.tools[rival.tool.name].arguments.schema
        return "another needs_approval" if same else "another schema"

    def _refuse(self, offers: Iterable[Offer]) -> None:
        """Raises `ConfigError` where another pool serves a tool of ours otherwise."""
        for offer in offers:
            theirs = offer.tool.pool
            if self._is_rival(offer) and self.pool and theirs and theirs != self.pool:
                what = f"pool {theirs} serves it with {self._what(offer)} (worker {offer.worker})"
                way = f"give it another name, or end the workers of {theirs} first"
                raise ConfigError(f"tool {offer.tool.name}: {what}, so pool {self.pool} cannot; {way}")

    def _tell(self, rivals: dict[str, Offer]) -> None:
        """Raises `ConfigError` for another pool's, as long as this worker has not started."""
        if not self._started:
            self._refuse(rivals.values())
        for name, rival in rivals.items():
            if name not in self._rivals:
                log.warning(
                    "tool %s: worker %s serves it with %s; standing by until no such worker is left",
                    name,
                    rival.worker,
                    self._what(rival),
                )
        for name in self._rivals.keys() - rivals.keys():
            log.warning("tool %s: no other schema is served any more; taking its calls", name)
        self._rivals = rivals

    async def _ensure_consumers(self, tools: Iterable[str]) -> dict[str, Refused]:
        """Makes those that are absent; for which tools that is refused. A deleted consumer looks like one without
        messages. Raises `Unavailable`.
        """
        gone = 0
        refused: dict[str, Refused] = {}
        turns = asyncio.Semaphore(limits.CONSUMERS_ASKED_MAX)

        async def ensure(tool: str, shard: int) -> None:
            nonlocal gone
            async with turns:
                try:
                    made = await consumer.ensure(self.tape, tool, shard)
                except Refused as error:
                    refused[tool] = error
                else:
                    gone += made and tool in self._desks

        shards = range(self.tape.deployment.shards)
        await asyncio.gather(*(ensure(tool, shard) for tool in tools for shard in shards))
        if gone:
            log.warning("%d consumers were gone, and are there again", gone)
        return refused

    async def _open(self, tool: AnyTool) -> None:
        self._desks.setdefault(tool.name, Desk(tool, self._loop))
        for shard in range(self.tape.deployment.shards):
            subject = subjects.chain(shard, "*", subjects.call(tool.name))
            await self._deliveries.bind(subjects.stream(shard), subjects.tool_consumer(tool.name), subject)

    async def _close(self, desk: Desk) -> None:
        del self._desks[desk.tool.name]
        for shard in range(self.tape.deployment.shards):
            self._deliveries.unbind(subjects.stream(shard), subjects.tool_consumer(desk.tool.name))
        desk.close()

    # Deliveries

    async def _take(self, delivery: Delivery) -> None:
        """One delivery. Returns when there is a slot for one more: until then, it may be an idle worker's."""
        conversation, kind = subjects.split(delivery.subject)
        try:
            call = _call(delivery.data, kind)
            if delivery.number > limits.TOOL_DELIVERIES_MAX:
                raise _Poison(f"delivered {delivery.number - 1} times in vain")
        except _Poison as poison:
            await self._bury(delivery, str(poison))
            return
        if mine := self._held.get(call.call):
            mine.renew(delivery)  # our word that we are at work did not get through
            return
        if (desk := self._desks.get(call.tool)) is None:
            await delivery.give_back()  # fetched as the desk closed
            return
        self._held[call.call] = delivery
        try:
            async with asyncio.timeout(limits.TOOL_HOLD_S):
                await desk.slots.acquire()
        except TimeoutError:  # another shard had one for the last slot
            await delivery.give_back()
            del self._held[call.call]
        except BaseException:  # cancelled, as a rule
            delivery.leave()
            raise
        else:
            task = asyncio.create_task(self._handle(desk, conversation, call, delivery))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
        async with desk.slots:
            pass

    async def _bury(self, delivery: Delivery, why: str) -> None:
        try:
            await delivery.bury(self.tape, "tools", why)
        except Unavailable as error:
            log.warning("no dead letter yet, it will be delivered again: %s", error)
            delivery.leave()
        else:
            await delivery.drop()

    async def _handle(self, desk: Desk, conversation: str, call: ToolCall, delivery: Delivery) -> None:
        attach(telemetry.context(delivery.headers))  # for this task only, so it need not be detached
        try:
            if desk.closed:
                await delivery.give_back()
            else:
                await Attempt(self.tape, self.id, desk, conversation, call, delivery, self._cut).make()
        except Unavailable as error:
            log.warning("call %s: %s; it will be delivered again", call.call, error)
        except Exception:
            log.exception("call %s could not be handled; it will be delivered again", call.call)
        finally:
            delivery.leave()
            del self._held[call.call]
            desk.give_back(call.call)


def _by_name(tools: Iterable[AnyTool]) -> dict[str, AnyTool]:
    named: dict[str, AnyTool] = {}
    for tool in tools:
        if named.setdefault(tool.name, tool) is not tool:
            raise ConfigError(f"two tools have the same name, {tool.name}")
    return named


class _Poison(Exception):
    """A delivery that can never be handled. The message says why."""


def _call(data: bytes, kind: str) -> ToolCall:
    """The call in a delivery. Raises `_Poison`."""
    try:
        event = events.decode(data)
    except events.Undecodable as error:
        raise _Poison(f"no event: {error}") from error
    if not isinstance(event, ToolCall):
        raise _Poison(f"an event of type {event.type if isinstance(event, events.Unknown) else type(event).__name__}")
    if subjects.call(event.tool) != kind:
        raise _Poison(f"a call of {event.tool!r}, which is another tool")
    return event
