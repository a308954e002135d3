"""Several processes: the gradient of one, T12, and two machines."""

import contextlib
import dataclasses
import io
import os
import socket
from pathlib import Path

import pytest
from conftest import BASE, ROOT
from processes import FORKS

from colintern.params import load_recipe

pytestmark = pytest.mark.integration
QUERIES = ["from Oslo", "sent to Rome by Halde", "Halde", "the milk", "to Oslo", "a long one, of freight in March"]
SHOWN, NEGATIVES = (0, 1, 2, 3, 1, 0), ((3, 2), (), (1,), (0, 1), (), (2,))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_of(size: int, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}


def gradient(folder: Path, images: list, size: int, rank: int, port: int, changes: dict) -> None:
    """One step over six ragged pages with negatives, in `size` processes; loss, gradient and masked pairs to a file."""
    if size > 1:
        rank_of(size, rank, port)
    import torch
    from test_model import TARGETS, load

    from colintern.core.terminal import configure_logging
    from colintern.encoding.page_features import Page, PageFeatures
    from colintern.modeling.lora import add_lora
    from colintern.modeling.processor import ColIntern3_5Processor
    from colintern.training import loss as losses
    from colintern.training.distributed import init_distributed
    from colintern.training.pairs import TrainingDataset, TrainingPair
    from colintern.training.run import assemble_trainer, build_training_arguments
    from colintern.training.trainer import RetrievalEvaluator

    fail = changes.pop("fail", None)
    torch.set_num_threads(1)
    params = dataclasses.replace(
        load_recipe(ROOT / "recipes" / "demo.yaml"),
        **{"batch_size": 6, "micro_batch_size": 2, "lora_dropout": 0.1} | changes,
    )
    configure_logging()
    with contextlib.redirect_stdout(io.StringIO()) as said, init_distributed(1) as own:
        processor = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=96, max_query_tokens=64)
        torch.manual_seed(0)
        model = add_lora(load(BASE), TARGETS, rank=4, alpha=4, dropout=params.lora_dropout)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.02)
        features = PageFeatures(model, processor, folder / "none", 0.0, "exact")
        pages = [Page.from_image(image) for image in images]
        rows = [
            TrainingPair(q, pages[n], tuple(pages[w] for w in wrong))
            for q, n, wrong in zip(QUERIES, SHOWN, NEGATIVES, strict=True)
        ]
        args = build_training_arguments(params, folder / f"run-{size}", quiet=True, world_size=own.world_size)
        trainer = assemble_trainer(params, model, processor, args, RetrievalEvaluator(rows, features, 1), context=own)
        share = len(rows) // own.world_size
        mine = TrainingDataset(rows[own.rank * share : (own.rank + 1) * share], features)
        if fail and own.rank == 1:
            # After the other process has the embeddings, or in the loss.
            place, name, at = (type(model), "forward", 9) if fail == "forward" else (losses, "maxsim_matrix", 1)
            real, calls = getattr(place, name), []

            def call(*args, **kwargs):
                calls.append(1)
                if len(calls) == at:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return real(*args, **kwargs)

            setattr(place, name, call)
        loss = trainer.training_step(model, trainer.data_collator(list(mine)))
        found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        torch.save(
            (loss, trainer.metric_accumulator.num_false_negatives, trainer.micro_batch_size, found, said.getvalue()),
            folder / f"{size}-{rank}.pt",
        )


def stepped(folder: Path, pages: list, size: int, **changes) -> list:
    """What each process of such a step has."""
    import torch

    port = free_port()
    started = [FORKS.Process(target=gradient, args=(folder, pages, size, rank, port, changes)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]


def distance(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    norm = lambda grads: sum((g**2).sum() for g in grads) ** 0.5  # noqa: E731
    return float(norm(one[name] - other[name] for name in one) / norm(one.values()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, pages) -> list:
    """What one process has of the step."""
    [found] = stepped(tmp_path_factory.mktemp("alone"), pages, 1)
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"micro_batch_size": 6}, {"gradient_checkpointing": True}, {"fail": "forward"}, {"fail": "loss"}],
)
def test_the_gradient_of_several_processes_is_that_of_one(tmp_path, pages, alone, changes):
    """With dropout, ragged pages and negatives; also where one process runs out of memory when the other does not."""
    loss, masked, _, whole, _ = alone
    for size in (2, 3) if not changes else (2,):
        found = stepped(tmp_path, pages, size, **changes)
        assert [bool(said) for *_, said in found] == ["fail" in changes, *[False] * (size - 1)], "rank 0 alone prints"
        for own_loss, own_masked, micro, own, _ in found:
            assert distance(whole, own) < 1e-6
            assert own_masked == masked > 0 and float(abs(own_loss - loss)) < 1e-5
            assert micro == (1 if "fail" in changes else changes.get("micro_batch_size", 2))
            assert distance(found[0][3], own) == 0, "the processes go on alike"


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory",
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the CUDA documentation",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_lack_of_memory_is_known_by_any_name(words):
    """As torch's AcceleratorError, which is no OutOfMemoryError, and as Triton's RuntimeError."""
    import torch

    from colintern.training.distributed import SINGLE_PROCESS

    def fail(kind, words):
        raise kind(words)

    for kind in (torch.AcceleratorError, RuntimeError):
        assert not issubclass(kind, torch.OutOfMemoryError)
        with pytest.raises(torch.OutOfMemoryError):
            SINGLE_PROCESS.run_or_all_oom(lambda kind=kind: fail(kind, words))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        SINGLE_PROCESS.run_or_all_oom(
            lambda: fail(torch.AcceleratorError, "CUDA error: an illegal memory access was encountered")
        )


def test_a_number_format_of_the_launcher_is_refused(monkeypatch):
    from colintern.core.errors import UserError
    from colintern.training.distributed import init_distributed

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match=r"ACCELERATE_MIXED_PRECISION: 'fp16' .* dtype decides"), init_distributed(1):
        pass
