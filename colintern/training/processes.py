"""One training run in several processes, a GPU each: how they start, who they are, what they tell each other.

`batch_size` pairs are shared out; each process embeds its rows, all of them score every query against every page, and
each sends the gradient of its own rows back to the adapters. The sum over the processes is the gradient of one process.
torchrun's, accelerate's and Slurm's variables are understood; where none is set, `launch` says how many are started.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from colintern.core.errors import UserError
from colintern.core.memory import is_out_of_memory
from colintern.params import Params

MINUTE = 60
GRACE = 45  # seconds that a signalled process has for its checkpoint, and a hung one before it is killed
POLL = timedelta(seconds=1)
ENDED_BY_SIGTERM = (75, -signal.SIGTERM)  # exit codes
FAILED = b"failed"  # no JSON
PDEATHSIG = 1  # of prctl
SIDES = ("query", "page")
PRECISION = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`


def start(params: Params, module: str) -> None:
    """Where several processes are asked for and this is none of them: start them, wait, and exit as they did.

    Raises:
        UserError: more than there are GPUs, or `batch_size` cannot be shared out.
        SystemExit: always, where processes were started.
    """
    if _world() is not None:
        return
    there = torch.cuda.device_count()
    wanted = max(there, 1) if params.launch == "auto" else int(params.launch)
    if there and wanted > there:
        raise UserError(f"launch: {wanted} is more than the {there} GPUs that can be seen")
    share(params, wanted)
    if wanted > 1:
        raise SystemExit(_torchrun(wanted, params.threads, module))


def share(params: Params, size: int) -> int:
    """Pairs of a batch that each of `size` processes takes.

    Raises:
        UserError: they cannot be shared out evenly.
    """
    if params.batch_size % size:
        raise UserError(f"batch_size: {params.batch_size} cannot be shared out evenly to {size} processes")
    return params.batch_size // size


def _torchrun(size: int, threads: int, module: str) -> int:
    """Run `module` in so many processes of this machine; the exit code of the first rank that says why it failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=size, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=0, shutdown_timeout=GRACE,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", module)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        print(f"error: of {size} processes these failed: {codes}, by rank", file=sys.stderr)
        # The launcher ends those that are left with SIGTERM: what they exit with then is not why the run failed.
        causes = [code for code in codes.values() if code not in ENDED_BY_SIGTERM]
        return next((code for code in causes or codes.values() if code > 1), 1)
    except SignalException:
        return 75
    return 0


def _world() -> tuple[int, int, int] | None:
    """Rank, number of processes and rank on this machine, as a launcher says; None where there is none."""
    env = os.environ
    if "WORLD_SIZE" in env and "RANK" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    # In a batch script SLURM_NTASKS is set too, where srun has started nothing.
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    return None


def _slurm_address() -> None:
    """Where the first of Slurm's tasks listens, for those that were not told."""
    if "MASTER_ADDR" not in os.environ:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]],
            capture_output=True, text=True, check=True, timeout=MINUTE,
        )  # fmt: skip
        os.environ["MASTER_ADDR"] = done.stdout.split()[0]
    os.environ.setdefault("MASTER_PORT", str(15000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))


class Share(NamedTuple):
    """Of the rows of the whole batch, this process's: their numbers, the lengths of all rows, and everybody's ids."""

    numbers: dict[str, list[int]]
    lengths: dict[str, list[list[int]]]  # of each process's rows
    orders: dict[str, list[int]]  # the rows of one process after the other, as the whole batch has them
    query_ids: Tensor
    page_ids: Tensor


class Processes:
    """The processes of this run, this one among them; alone it talks to nobody."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None):
        self.rank, self.size, self.store, self.told = rank, size, store, 0

    @property
    def main(self) -> bool:
        return self.rank == 0

    def first(self, do: Callable[[], Any]) -> Any:
        """What `do` returns in the first process, in all of them; the others wait, as long as the first one lives.

        Raises:
            torch.distributed.DistNetworkError: the first process is gone.
            SystemExit: `do` failed in it; it says why.
        """
        if self.size == 1:
            return do()
        self.told += 1
        key = f"told-{self.told}"
        if self.main:
            try:
                value = do()
            except BaseException:
                self.store.set(key, FAILED)
                raise
            self.store.set(key, json.dumps(value))
            return value
        while True:
            try:
                self.store.wait([key], POLL)  # no longer: a signal is only seen between two
            except dist.DistStoreError:
                continue  # it still works: a large data set is hashed for many minutes
            if (value := self.store.get(key)) == FAILED:
                raise SystemExit(1)
            return json.loads(value)

    def barrier(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether it holds in one of them."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def together(self, do: Callable[[], Any]) -> Any:
        """`do`, without talk to other processes.

        Raises:
            torch.OutOfMemoryError: one of them is out of memory, so that all of them try again.
        """
        done, failed = None, False
        try:
            done = do()
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        if self.any(failed):
            raise torch.OutOfMemoryError("out of memory")
        return done

    def shares(self, batch: dict[str, Any]) -> Share:
        """Number the rows of this process's batch as one process would have them: the pages of all rows come first,
        then the negatives of all rows."""
        own: dict[str, Any] = {side: batch[side]["attention_mask"].sum(1).tolist() for side in SIDES}
        own |= {name: batch[name].tolist() for name in ("query_ids", "page_ids")}
        found: list[Any] = [own]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, own)
        rows = [(rank, row) for rank, one in enumerate(found) for row in range(len(one["query"]))]
        more = [(rank, row) for rank, one in enumerate(found) for row in range(len(one["query"]), len(one["page"]))]
        numbers, orders = {}, {}
        for side, whole in (("query", rows), ("page", rows + more)):
            starts = [sum(len(one[side]) for one in found[:rank]) for rank in range(self.size)]
            orders[side] = [starts[rank] + row for rank, row in whole]
            numbers[side] = [place for place, (rank, _) in enumerate(whole) if rank == self.rank]
        device = batch["query_ids"].device
        query_ids, page_ids = (
            torch.tensor([number for one in found for number in one[f"{side}_ids"]], device=device)[orders[side]]
            for side in SIDES
        )
        return Share(numbers, {side: [one[side] for one in found] for side in SIDES}, orders, query_ids, page_ids)

    def room(self, share: Share, side: str, own: Tensor) -> list[Tensor]:
        """This process's embeddings of one side, (rows, length, dimension), as long as all processes', and room for
        everybody's."""
        if self.size == 1:
            return [own]
        lengths = share.lengths[side]
        longest = max(map(max, lengths))
        padded = pad(own, (0, 0, 0, longest - own.shape[1], 0, max(map(len, lengths)) - len(own)))
        return [padded, *(torch.empty_like(padded) for _ in lengths)]

    def exchange(self, rooms: Sequence[list[Tensor]]) -> None:
        """Fill each side's room, in all processes at once."""
        for own, *others in rooms if self.size > 1 else ():
            dist.all_gather(others, own.detach())

    def gathered(self, share: Share, side: str, room: list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings of all rows of the batch and their mask; the gradient goes to this process's rows alone."""
        own, *received = room
        if self.size == 1:
            return own, mask
        received[self.rank] = own
        lengths, longest, device = share.lengths[side], own.shape[1], own.device
        order = torch.tensor(share.orders[side], device=device)
        rows = torch.cat([part[: len(one)] for part, one in zip(received, lengths, strict=True)])[order]
        counts = torch.tensor([count for one in lengths for count in one], device=device)[order]
        return rows, (torch.arange(longest, device=device) < counts[:, None]).to(mask.dtype)

    def sum_gradients(self, model: torch.nn.Module) -> None:
        """The gradient of the whole batch in every process: the sum of what each has from its rows."""
        if self.size == 1:
            return
        found = [p.grad for p in model.parameters() if p.grad is not None]
        flat = self.together(lambda: torch.cat([grad.flatten() for grad in found]))
        dist.all_reduce(flat)
        for grad, total in zip(found, flat.split([grad.numel() for grad in found]), strict=True):
            grad.copy_(total.view_as(grad))


ALONE = Processes()


@contextmanager
def joined(threads: int) -> Iterator[Processes]:
    """This run's processes, where a launcher has started several. All but the first print nothing but errors.

    Raises:
        UserError: the launcher asks for another number format.
    """
    if (asked := os.environ.get(PRECISION, "no")) != "no":  # accelerate would scale gradients, or cast, behind params
        raise UserError(
            f"{PRECISION}: {asked!r} has no place here, dtype decides; accelerate launch --mixed_precision no"
        )
    world = _world()
    if world is None or world[1] == 1:
        yield ALONE
        return
    rank, size, local = world
    if "RANK" not in os.environ:
        _slurm_address()
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local)}
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":  # a launcher that is killed leaves no orphans
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else accelerate sets the number of threads
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())  # Slurm may show each task one GPU, which is number 0
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=timedelta(seconds=10 * MINUTE),
    )  # fmt: skip
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield Processes(rank, size, dist.PrefixStore("told", store))
        dist.barrier()  # the first process may keep the store, which others still read
    finally:
        dist.destroy_process_group()
