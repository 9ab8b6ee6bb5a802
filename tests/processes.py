"""Runs a function in several processes that know each other, and brings back what each returned or raised."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NamedTuple

SLOWEST_S = 120.0


class Ended(NamedTuple):
    """How a rank ended: what its function returned, or its traceback; the exit code if it was killed."""

    value: Any = None
    error: str = ""


def on_ranks(target: str, *arguments: Any, ranks: int = 2, slowest_s: float = SLOWEST_S) -> list[Any]:
    """What ``module:function(rank, *arguments)`` returns on each rank of a gloo group.

    The modules are those beside this one.

    Raises:
        AssertionError: It raised on a rank; with all tracebacks.
    """
    ended = ends_of(target, *arguments, ranks=ranks, slowest_s=slowest_s)
    failed = [f"rank {rank}: {one.error}" for rank, one in enumerate(ended) if one.error]
    assert not failed, "\n".join(failed)
    return [one.value for one in ended]


def ends_of(target: str, *arguments: Any, ranks: int = 2, slowest_s: float = SLOWEST_S) -> list[Ended]:
    """How each rank ended."""
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder, "task")
        task.write_bytes(pickle.dumps((target, arguments)))
        known = {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "error", __file__, folder, str(rank), str(ranks)],
                env=os.environ | known,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            said = [process.communicate(timeout=slowest_s)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        return [_read(Path(folder, str(rank)), text) for rank, text in enumerate(said)]


def _read(path: Path, said: str) -> Ended:
    """What a rank has written, or what it said last."""
    return Ended(*pickle.loads(path.read_bytes())) if path.exists() else Ended(error=f"it is gone: {said}")


def _main(folder: str, rank: int, ranks: int) -> None:
    """One rank."""
    import importlib

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    target, arguments = pickle.loads(Path(folder, "task").read_bytes())
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    module, _, name = target.partition(":")
    try:
        ended = Ended(getattr(importlib.import_module(module), name)(rank, *arguments))
    except BaseException:
        ended = Ended(error=traceback.format_exc())
    part = Path(folder, f"{rank}.part")
    part.write_bytes(pickle.dumps(tuple(ended)))
    part.rename(Path(folder, str(rank)))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may still run


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
