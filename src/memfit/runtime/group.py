"""The processes that ``memfit train`` runs on, started by torchrun or, with ``--nproc``, as torchrun does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from memfit.core.batching import balanced_parts
from memfit.errors import MemfitError
from memfit.runtime.batch import map_tensors, rows_of, split
from memfit.runtime.ranks import Ranks
from memfit.runtime.rescue import is_out_of_memory

_LOST_RANK = 6  # the exit code of the command line
_KNOWN_CODES = (2, 3, 4, 5, _LOST_RANK, 130)
_SIGNS_OF_OTHERS = ("gloo", "NCCL", "ProcessGroup", "Connection reset", "Connection closed", "Broken pipe")


class LostRank(RuntimeError):
    """Another process of the run has gone, so that this one cannot go on."""


@contextmanager
def process_group(device: str | None) -> Iterator[Ranks]:
    """The processes that torchrun started: gloo on CPUs, NCCL on CUDA. Without it, this process alone.

    Args:
        device: What the user said; each process takes the CUDA device of its number on this machine.

    Raises:
        LostRank: In the body, whatever the loss of another process looks like.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Ranks()
        return
    on_cuda = device is not None and torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    from torch.distributed.distributed_c10d import PrefixStore  # only where torch is built with it
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps one store for all restarts, with the addresses of processes that are gone: of torch 2.13,
    # torch.distributed.rendezvous says that each has a store of its own, elastic.rendezvous shares it.
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield Ranks.of(None, torch.device("cuda" if on_cuda else "cpu"))
    except RuntimeError as error:
        if not _is_of_others(error):
            raise
        first_line = str(error).splitlines()[0]
        raise LostRank(
            f"rank {dist.get_rank()}: another process of the run has gone ({first_line}). The last "
            "checkpoint stays: go on with --resume."
        ) from error
    else:
        dist.barrier()
        dist.destroy_process_group()


def own_rows(batch: Any, ranks: Ranks) -> Any:
    """The rows of a batch that are this rank's: equal shares, in order; copies, so that the others can go.

    Raises:
        ValueError: There are fewer rows than ranks.
    """
    if ranks.size == 1:
        return batch
    rows = rows_of(batch)
    if rows < ranks.size:
        raise ValueError(f"a batch of {rows} rows cannot be shared by {ranks.size} processes: give fewer")
    part = split(batch, balanced_parts(rows, ranks.size))[ranks.rank]
    return map_tensors(part, torch.clone)


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs ``python -m memfit`` with these arguments in several processes; the exit code.

    They are started and watched by PyTorch's own launcher: where one ends, it stops the others.

    Returns:
        0, the code with which the command line ended, or 6 where a process was lost; that is said on stderr.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        run_id="memfit",
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    try:
        elastic_launch(config, sys.executable)("-m", "memfit", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in _KNOWN_CODES:
            return int(failure.exitcode)
        how = f"with code {failure.exitcode}" if failure.exitcode > 0 else f"by {failure.signal_name()}"
        print(
            f"memfit: rank {rank} of {processes} was ended {how}, and the others were stopped. The last "
            "checkpoint stays: go on with --resume.",
            file=sys.stderr,
        )
        return _LOST_RANK
    return 0


def _is_of_others(error: RuntimeError) -> bool:
    """Whether an error says that a message to other processes did not come through."""
    if isinstance(error, MemfitError) or is_out_of_memory(error):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS_OF_OTHERS)
