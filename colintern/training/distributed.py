"""Data-parallel training: launching, rank discovery and the collectives of a training step.

Each rank embeds its share of the batch and scores all queries against all pages; only its own rows get a gradient. The
sum over the ranks is the gradient that one process computes from the whole batch. Ranks are those of torchrun,
accelerate or Slurm; without such a launcher, `launch` in params.yaml says how many processes are started here.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from typing import Literal, NamedTuple, TypedDict, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from colintern.core.errors import UserError
from colintern.core.memory import is_out_of_memory
from colintern.encoding.multi_process import count_workers, kill_with_parent

logger = logging.getLogger(__name__)
T = TypeVar("T")
SHUTDOWN_TIMEOUT = 45  # seconds that a signalled process has for its checkpoint, and a hung one before it is killed
POLL_INTERVAL, COLLECTIVE_TIMEOUT = timedelta(seconds=1), timedelta(minutes=10)
EXIT_INTERRUPTED = 75
SIGTERM_EXIT_CODES = (EXIT_INTERRUPTED, -signal.SIGTERM)
FAILURE = "failed"  # in place of JSON
Side = Literal["query", "page"]
SIDES: tuple[Side, Side] = ("query", "page")
PRECISION_VARIABLE = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`


class Batch(TypedDict, total=False):
    """A batch of `Collator`, see there."""

    query: dict[str, Tensor]
    page: dict[str, Tensor]
    features: Tensor
    tiles: Tensor
    known: Tensor
    counts: Tensor
    query_ids: Tensor
    page_ids: Tensor


class BatchShards(NamedTuple):
    """How the whole batch is divided among the ranks; the dicts are by side."""

    row_indices: dict[str, list[int]]  # in the whole batch, of this rank's rows
    lengths: dict[str, list[list[int]]]  # tokens of each row, by rank
    gather_order: dict[str, list[int]]  # of the batch's rows, among those of all ranks one after the other
    query_ids: Tensor  # (B,) of the whole batch
    page_ids: Tensor  # (P,)


class DistributedContext:
    """This process's rank in the run, and the collectives; with a world size of 1 nothing is sent."""

    def __init__(self, rank: int = 0, world_size: int = 1, store: dist.Store | None = None):
        self.rank, self.world_size, self.store, self.num_broadcasts = rank, world_size, store, 0

    @property
    def is_main_process(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0

    def run_on_rank0_and_broadcast(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result, sent as JSON, on every rank; wait while rank 0 lives."""
        if self.store is None:
            return function()
        self.num_broadcasts += 1
        key = f"broadcast-{self.num_broadcasts}"
        if self.is_main_process:
            try:
                result = function()
            except BaseException:
                self.store.set(key, FAILURE)
                raise
            self.store.set(key, json.dumps(result))
            return result
        while True:
            try:
                self.store.wait([key], POLL_INTERVAL)  # short: Python handles a signal only between two waits
            except dist.DistStoreError:
                continue  # rank 0 is still working; hashing a large data set takes many minutes
            if (value := self.store.get(key).decode()) == FAILURE:
                raise SystemExit(1)
            return json.loads(value)

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.world_size > 1:
            dist.barrier()

    def all_reduce_any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def run_or_all_oom(self, function: Callable[[], T]) -> T:
        """Call `function`, which must not communicate; raise torch.OutOfMemoryError on all ranks if one runs out.

        A rank that retried alone would deadlock in the next collective.
        """
        is_failed = False
        try:
            result = function()
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            is_failed = True
        if self.all_reduce_any(is_failed):
            raise torch.OutOfMemoryError("out of memory")
        return result

    def gather_batch_layout(self, batch: Batch) -> BatchShards:
        """Gather which rows each rank has; in the whole batch the pages of all rows precede all hard negatives."""
        shard: dict[str, list[int]] = {side: batch[side]["attention_mask"].sum(1).tolist() for side in SIDES}
        shard |= {"query_ids": batch["query_ids"].tolist(), "page_ids": batch["page_ids"].tolist()}
        shards = [shard]
        if self.world_size > 1:
            shards = [{}] * self.world_size
            dist.all_gather_object(shards, shard)
        sizes = [(rank, len(shard["query"]), len(shard["page"])) for rank, shard in enumerate(shards)]
        pairs = [(rank, row) for rank, size, _ in sizes for row in range(size)]
        negatives = [(rank, row) for rank, size, num_pages in sizes for row in range(size, num_pages)]
        row_indices, gather_order, ids = {}, {}, []
        for side, rows in (("query", pairs), ("page", pairs + negatives)):
            offsets = [0, *accumulate(len(shard[side]) for shard in shards)]
            gather_order[side] = [offsets[rank] + row for rank, row in rows]
            row_indices[side] = [index for index, (rank, _) in enumerate(rows) if rank == self.rank]
            side_ids = [number for shard in shards for number in shard[f"{side}_ids"]]
            ids.append(torch.tensor(side_ids, device=batch["query_ids"].device)[gather_order[side]])
        lengths: dict[str, list[list[int]]] = {side: [shard[side] for shard in shards] for side in SIDES}
        return BatchShards(row_indices, lengths, gather_order, *ids)

    def allocate_gather_buffers(self, shards: BatchShards, side: str, embeddings: Tensor) -> list[Tensor]:
        """Return this rank's embeddings padded to the largest shard, then one buffer a rank if there are several."""
        if self.world_size == 1:
            return [embeddings]
        lengths = shards.lengths[side]
        longest = max(map(max, lengths))
        missing_rows = max(map(len, lengths)) - len(embeddings)
        padded = pad(embeddings, (0, 0, 0, longest - embeddings.shape[1], 0, missing_rows))
        return [padded, *(torch.empty_like(padded) for _ in lengths)]

    def all_gather_into(self, buffers_by_side: Sequence[list[Tensor]]) -> None:
        """Fill the buffers of `allocate_gather_buffers` with the embeddings of all ranks."""
        for local, *received in buffers_by_side if self.world_size > 1 else ():
            dist.all_gather(received, local.detach())

    def all_gather_with_local_grad(
        self, shards: BatchShards, side: Side, buffers: list[Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the whole batch and their mask; only this rank's rows get a gradient."""
        local, *received = buffers
        if self.world_size == 1:
            return local, mask
        received[self.rank] = local
        lengths, longest, device = shards.lengths[side], local.shape[1], local.device
        order = torch.tensor(shards.gather_order[side], device=device)
        rows = torch.cat([part[: len(shard)] for part, shard in zip(received, lengths, strict=True)])[order]
        counts = torch.tensor([count for shard in lengths for count in shard], device=device)[order]
        return rows, (torch.arange(longest, device=device) < counts[:, None]).to(mask.dtype)

    def all_reduce_gradients(self, model: torch.nn.Module) -> None:
        """Replace each gradient of `model` by its sum over the ranks."""
        if self.world_size == 1:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = self.run_or_all_oom(lambda: torch.cat([gradient.flatten() for gradient in gradients]))
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


SINGLE_PROCESS = DistributedContext()


def per_rank_batch_size(batch_size: int, world_size: int) -> int:
    """Return the training pairs of a batch on each rank; raise UserError if they cannot be divided evenly."""
    if batch_size % world_size:
        raise UserError(f"batch_size: {batch_size} cannot be divided evenly among {world_size} processes")
    return batch_size // world_size


def maybe_launch_workers(launch: str | int, batch_size: int, threads: int, module: str) -> None:
    """Run `module` in as many processes as `launch` says, and exit with their exit code.

    Return at once if one process is enough or a launcher has started this one. Raise UserError if there are fewer GPUs,
    or if `batch_size` cannot be divided evenly.
    """
    if get_dist_info() is not None:
        return
    world_size = count_workers(launch)
    per_rank_batch_size(batch_size, world_size)
    if world_size > 1:
        raise SystemExit(_launch_workers(world_size, threads, module))


def _launch_workers(world_size: int, threads: int, module: str) -> int:
    """Run `module` under torchrun's launcher; return the exit code of the first rank that reports its failure."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=world_size, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=0, shutdown_timeout=SHUTDOWN_TIMEOUT,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", module)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        logger.error(f"{len(codes)} of {world_size} processes failed; exit codes by rank: {codes}")
        # The launcher ends the remaining ranks with SIGTERM; their exit codes do not tell why the run failed.
        causes = [code for code in codes.values() if code not in SIGTERM_EXIT_CODES]
        return next((code for code in causes or codes.values() if code > 1), 1)
    except SignalException:
        return EXIT_INTERRUPTED
    return 0


def get_dist_info() -> tuple[int, int, int] | None:
    """Return rank, world size and local rank as a launcher has set them, None without a launcher."""
    env = os.environ
    if "WORLD_SIZE" in env and "RANK" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    # A batch script has SLURM_NTASKS too, where srun has started nothing.
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    return None


def _set_slurm_variables(rank: int, world_size: int, local_rank: int) -> None:
    """Set torch's variables for a task of Slurm; rank 0 listens on the first host of the step."""
    if "MASTER_ADDR" not in os.environ:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        os.environ["MASTER_ADDR"] = done.stdout.split()[0]
    os.environ.setdefault("MASTER_PORT", str(15000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank)}


@contextmanager
def init_distributed(threads: int) -> Iterator[DistributedContext]:
    """Join the process group of the launcher, if there is one; ranks other than 0 print nothing but errors."""
    if (precision := os.environ.get(PRECISION_VARIABLE, "no")) != "no":  # accelerate would scale or cast gradients
        raise UserError(
            f"{PRECISION_VARIABLE}: {precision!r} is not valid: dtype decides; accelerate launch --mixed_precision no"
        )
    dist_info = get_dist_info()
    if dist_info is None or dist_info[1] == 1:
        yield SINGLE_PROCESS
        return
    if "RANK" not in os.environ:
        _set_slurm_variables(*dist_info)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a killed launcher must not leave ranks behind
        kill_with_parent()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else accelerate sets the number of threads
    if torch.cuda.is_available():
        # Slurm may show each task one GPU, which has index 0.
        torch.cuda.set_device(dist_info[2] % torch.cuda.device_count())
    store, rank, world_size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore("group", store), rank=rank, world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )  # fmt: skip
    if rank:
        logging.getLogger("colintern").setLevel(logging.ERROR)
    try:
        yield DistributedContext(rank, world_size, dist.PrefixStore("broadcast", store))
        dist.barrier()  # rank 0 may host the store, which others still read
    finally:
        dist.destroy_process_group()
