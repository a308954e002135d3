"""Counts what code costs by running it on meta tensors, which have shapes and no data.

`Meter` watches every operation: which storages are alive, how many operations and bytes each kernel takes. So the
counts follow the code, and there is no formula of layers to keep up with it.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten
# Where the operators that can leave out the masked half of causal attention take `is_causal`.
CAUSAL_AT = {ATEN._scaled_dot_product_flash_attention: 4, ATEN._scaled_dot_product_flash_attention_backward: 11}
NOT_A_KERNEL = {ATEN._unsafe_view, ATEN.detach, ATEN.empty, ATEN.empty_like, ATEN.empty_strided}


class Kernel(NamedTuple):
    """One kind of kernel: the format it computes in, operations and bytes moved each time it runs."""

    dtype: torch.dtype
    operations: int
    bytes: int


class Phase(NamedTuple):
    """A part of a step: the most bytes alive in it beyond what was alive before, and what it runs."""

    peak: int
    kernels: Counter[Kernel]


def measure(run: Callable[[], None], known: Sequence[Tensor]) -> Phase:
    """What `run` costs.

    Args:
        run: works on meta tensors; real ones may be among its inputs, where the code branches on their values.
        known: tensors that were there before and are not counted.
    """
    meter = Meter(known)
    with _fused(), meter:
        run()
    return Phase(meter.peak, meter.kernels)


class Meter(TorchDispatchMode):
    """Counts what passes through it on meta tensors; ids and masks are real, so that code can branch on them."""

    def __init__(self, known: Sequence[Tensor]):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0
        self.kernels: Counter[Kernel] = Counter()
        self.known = [tensor.untyped_storage() for tensor in known]  # not this phase's
        self.outside = {id(storage) for storage in self.known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        operator = func._overloadpacket
        if any(t.is_meta for t in inputs):
            args, kwargs = tree_map_only(Tensor, _shape_only, (args, kwargs))
            if "device" in kwargs:
                kwargs["device"] = torch.device("meta")
        elif operator is ATEN.arange:
            kwargs["device"] = torch.device("cpu")  # positions: the attention mask is chosen by their values
        out = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_meta]
        for tensor in outputs:
            self._enter(tensor.untyped_storage())
        if outputs and not func.is_view and operator not in NOT_A_KERNEL:
            self._count(operator, inputs, outputs, args, kwargs, out)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self.sizes or key in self.outside:
            return
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def _count(self, operator: Any, inputs: list[Tensor], outputs: list[Tensor], args: Any, kwargs: Any, out: Any):
        formula = flop_registry.get(operator)
        operations = formula(*args, **kwargs, out_val=out) if formula else 0
        if operator in CAUSAL_AT and any(args[CAUSAL_AT[operator] :][:1]):  # left out of args where it is False
            operations //= 2
        touched = inputs if operator is not ATEN.embedding else inputs[1:]  # reads the rows asked for, not the table
        moved = sum(t.numel() * t.element_size() for t in (*touched, *outputs))
        self.kernels[Kernel(inputs[0].dtype if inputs else outputs[0].dtype, operations, moved)] += 1


def _shape_only(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


@contextmanager
def _fused() -> Iterator[None]:
    """Attention as CPU and CUDA run it: meta tensors would take the unfused code. And `torch.autocast`
    as far as a bfloat16 model beside float32 adapters needs it, since the real one leaves meta tensors alone: an
    adapter is computed in a copy of its weight, which autocast keeps until it is left and the graph until it is used.
    """

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert attn_mask is None, "right padding needs no mask"
        return ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]

    regions: list[list[Tensor]] = []
    exact = functional.linear

    def linear(input, weight, bias=None):
        if (input.dtype, weight.dtype) == (torch.bfloat16, torch.float32):
            weight = weight.to(input.dtype)
            # In the backward pass, where checkpointing computes a layer again, the graph alone keeps the copy.
            for region in regions[-1:]:
                region.append(weight)
        return exact(input, weight, bias)

    @contextmanager
    def autocast(device_type, dtype):
        regions.append([])
        try:
            yield
        finally:
            regions.pop()

    with ExitStack() as stack:
        stack.enter_context(patch.object(functional, "linear", linear))
        stack.enter_context(patch.object(torch, "autocast", autocast))
        stack.enter_context(patch.object(functional, "scaled_dot_product_attention", attention))
        yield
