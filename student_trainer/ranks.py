"""The processes of one training run: which one this is, and how they talk. Of one process nothing happens.

Rank 0 leads: it alone knows the queue, and it tells the others what to do next (`tell`, `hear`). What
travels is JSON, tensors as safetensors bytes and single numbers; nothing that is unpickled.
Under `torchrun` a process that is gone ends the others: their next word to it fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tutelage_client.errors import TutelageError, invalid

T = TypeVar("T")

BEAT_SECONDS = 1.0  # how often a leader that waits for groups lets the others hear of it
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among `world` processes.

    Every method returns at once in a world of one. In a larger one each is called by all ranks, in
    the same order, except `tell` and `hear`, which are the two ends of one message.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None  # of this rank; None in a world of one: as the run file says

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    def tell(self, do: str, **details: str | int | bool | None) -> None:
        """Leader: have the other ranks do the same. Nothing on the others, which do it because they heard."""
        if self.leads and not self.alone:
            self._broadcast(json.dumps({"do": do, **details}).encode())

    def hear(self) -> dict[str, Any]:
        """Other ranks: the next thing to do, as the leader told it."""
        told: dict[str, Any] = json.loads(self._broadcast(b""))
        return told

    def agree(self, mine: bool) -> bool:
        """The leader's answer, on every rank."""
        if self.alone:
            return mine
        answer = torch.tensor([int(mine)])
        dist.broadcast(answer, 0)
        return bool(answer.item())

    def hand_out(self, parts: Sequence[bytes]) -> None:
        """Leader: parts[r - 1] to every other rank r, which calls `receive`."""
        for rank in range(1, self.world):
            _send(parts[rank - 1], rank)

    def receive(self) -> bytes:
        """Other ranks: what the leader handed out."""
        return _receive(0)

    def collect(self, part: bytes) -> list[bytes]:
        """Every rank's part in rank order, on the leader; on the others an empty list."""
        if not self.leads:
            _send(part, 0)
            return []
        return [part, *(_receive(rank) for rank in range(1, self.world))]

    def _broadcast(self, data: bytes) -> bytes:
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0)
        body = _tensor(data) if self.leads else torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(body, 0)
        return body.numpy().tobytes()


ALONE = Ranks()


@contextmanager
def join(device: str, timeout_seconds: float) -> Iterator[Ranks]:
    """Meet the other processes that `torchrun` started; ALONE when this is the only one.

    Args:
        device: of the student, as the run file has it; every rank takes a GPU of its own.
        timeout_seconds: how long a rank waits for another before it gives the run up.

    Raises:
        TutelageError: INVALID_ARGUMENT or FAILED_PRECONDITION when the ranks cannot work with what
            they are given, UNAVAILABLE when another one is gone.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    missing = [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise invalid(
            f"WORLD_SIZE: got {world} without {', '.join(missing)}; start several processes with torchrun"
        )
    rank, chosen = int(os.environ["RANK"]), _device(device, int(os.environ["LOCAL_RANK"]))
    try:
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            store=_store_of_this_start(rank, world, timeout),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
        yield Ranks(rank, world, chosen)
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise TutelageError(
            "UNAVAILABLE",
            f"rank {rank} of {world} lost another rank ({str(error).splitlines()[0]}); the first failure in "
            "torchrun's report is the cause, and the same command continues from the newest checkpoint",
        ) from error
    dist.destroy_process_group()


def is_loss(error: BaseException) -> bool:
    """Whether `error` says that another rank is gone, or does not answer in time."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
    )


async def accompany(ranks: Ranks, work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T:
    """The result of the leader's `work`; meanwhile the other ranks hear from it, however long it waits.

    A rank that was asked to stop says so in answer, and `stop` is set.
    """
    if ranks.alone:
        return await work
    working, beating = asyncio.create_task(work), asyncio.create_task(_beat(ranks, stop))
    done, pending = await asyncio.wait({working, beating}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    if beating in done:
        beating.result()  # it ends by an error alone
    return working.result()


async def _beat(ranks: Ranks, stop: asyncio.Event) -> None:
    """Between collectives only: those never give the event loop a turn."""
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        ranks.tell("beat")
        if any(ranks.collect(b"")):
            stop.set()


def _store_of_this_start(rank: int, world: int, timeout: timedelta) -> Any:
    """A corner of torchrun's store where only the ranks of this start meet.

    torchrun keeps its store when it starts the ranks again, and what those before left there (gloo's
    addresses) would be taken for theirs. Rank 0 invents the corner's name and tells it to everybody
    who asks under a name that nobody had before.
    """
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    if rank:
        own = uuid.uuid4().hex
        store.set(f"tutelage/rank/{rank}", own)
        store.wait([f"tutelage/answer/{own}"], timeout)
        corner = store.get(f"tutelage/answer/{own}").decode()
        store.set(f"{corner}/here/{rank}", "")
        return dist.PrefixStore(corner, store)  # type: ignore[attr-defined]
    corner, deadline = f"tutelage/{uuid.uuid4().hex}", time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world))
    while missing:
        for other in missing:
            if store.check([f"tutelage/rank/{other}"]):
                asking = store.get(f"tutelage/rank/{other}").decode()
                store.set(f"tutelage/answer/{asking}", corner)
        missing = {other for other in missing if not store.check([f"{corner}/here/{other}"])}
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"ranks {sorted(missing)} did not come within {timeout}")
        time.sleep(0.05)
    return dist.PrefixStore(corner, store)  # type: ignore[attr-defined]


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise invalid(
            f'student.device: got {name!r}, allowed with several processes are "auto", "cpu" and "cuda"'
        )
    if local_rank >= torch.cuda.device_count():
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"torchrun --nproc-per-node: local rank {local_rank} has no GPU, this machine has "
            f"{torch.cuda.device_count()}",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _send(data: bytes, rank: int) -> None:
    dist.send(torch.tensor([len(data)]), rank)
    if data:
        dist.send(_tensor(data), rank)


def _receive(rank: int) -> bytes:
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, rank)
    body = torch.empty(int(size.item()), dtype=torch.uint8)
    if len(body):
        dist.recv(body, rank)
    return body.numpy().tobytes()


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
