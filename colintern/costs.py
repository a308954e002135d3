"""What a training step costs in memory and operations, known before it runs.

The real code runs on meta tensors, which have shapes and no data: ColIntern3_5 wrapped in LoRA, forward and backward,
and the loss, at full size. `Meter` watches every operation of it: which storages are alive, how many operations and
bytes each kernel takes. So the counts follow the code, and there is no formula of layers to keep up with it. Only the
order of a step's phases is written down here (`Costs.step`), as `ContrastiveTrainer` runs them; a test holds the two
against each other.

Not counted, because they are the device's and not the program's: the CUDA context, the allocator's fragmentation, the
libraries' workspaces.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from colintern.lora import add_lora
from colintern.loss import contrastive_loss, maxsim_matrix
from colintern.model import EMBEDDING_DIM, ColIntern3_5

ADAM_BYTES = 8  # two float32 moments a trained parameter
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


class Setting(NamedTuple):
    """What a step's cost depends on besides the model; every page is taken to be as long as the longest."""

    batch_size: int
    micro_batch_size: int
    checkpointing: bool
    tiles: int
    page_tokens: int  # the visual ones and the prompt around them
    query_tokens: int
    cached: bool = True  # page features come from the cache, and no pixels


class Step(NamedTuple):
    """`memory`: bytes by what they hold, their sum being the peak; `kernels`: how often each runs in a step."""

    memory: dict[str, int]
    kernels: dict[Kernel, float]

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def operations(self) -> float:
        return sum(kernel.operations * times for kernel, times in self.kernels.items())


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


class Costs:
    """The costs of training one architecture.

    Args:
        base: on meta, as `lora.meta_model` makes it; it is wrapped in LoRA and converted in place.
        dtype: of the base's weights.
        targets, rank, dropout: as for `add_lora`.
        cuda: count CUDA's kernels of attention and dropout; else the CPU's.
    """

    def __init__(
        self, base: ColIntern3_5, dtype: torch.dtype, targets: Sequence[str], rank: int, dropout: float, cuda: bool
    ):
        self.config, self.cuda, self.dtype = base.config, cuda, dtype
        self.model: Any = add_lora(base.to(dtype), targets, rank, rank, dropout)  # type: ignore[arg-type]
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.adapter_bytes = sum(p.nbytes for p in trained)
        self.base_bytes = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers())) - self.adapter_bytes
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)  # from the second part on they are there

    @property
    def parameters(self) -> int:
        """Of the base with its head, adapters left out."""
        return sum(p.numel() for p in self.model.parameters()) - self.trained

    def feature_bytes(self, tiles: int) -> int:
        """What the feature cache keeps of a page of so many tiles."""
        return tiles * self.config.image_seq_length * self.config.get_text_config().hidden_size * self.dtype.itemsize

    def static(self) -> dict[str, int]:
        """Bytes that are there in every step, whatever the batch."""
        return {
            "base weights": self.base_bytes,
            "adapters": self.adapter_bytes,
            "gradients": self.adapter_bytes,
            "optimizer": ADAM_BYTES * self.trained,
        }

    def step(self, setting: Setting) -> Step:
        """The peak of a training step and what it runs, as `ContrastiveTrainer.training_step` goes."""
        size, micro = setting.batch_size, min(setting.micro_batch_size, setting.batch_size)
        sides = (0, setting.query_tokens), (setting.tiles, setting.page_tokens)  # tiles, tokens
        embeddings = size * sum(tokens for _, tokens in sides) * EMBEDDING_DIM * 4
        features = size * self.feature_bytes(setting.tiles)
        kernels: Counter[Kernel] = Counter()
        peaks = [features]  # page_features makes one tensor of the pages
        pages = 2 * features  # the batch's, and that one
        if not setting.cached:
            tower = self.features(setting.tiles)
            peaks.append(tower.peak)
            kernels += _scaled(tower.kernels, size)
            pages = features + size * self._tiles(setting.tiles).nbytes
        if micro == size:
            whole = self._whole(size, sides, setting.checkpointing)
            peaks.append(whole.peak)
            kernels += whole.kernels
        else:
            loss = self._loss(size, micro, sides)
            peaks.append(embeddings + loss.peak)
            kernels += loss.kernels
            for side in sides:
                for grad in (False, True):
                    part = self._part(micro, side, grad, setting.checkpointing)
                    peaks.append(embeddings * (1 + grad) + part.peak)
                    kernels += _scaled(part.kernels, size / micro)
        memory = self.static() | {"pages": pages, "activations and loss": max(peaks)}
        return Step(memory, dict(kernels))

    @cache  # noqa: B019
    def features(self, tiles: int) -> Phase:
        """Tower and projector on one page of so many tiles, once for all epochs where features are cached."""
        pixels = self._tiles(tiles).to(self.dtype)

        def run() -> None:
            with torch.no_grad():
                self.model.page_features(pixels)

        return self._measure(run, pixels)

    @cache  # noqa: B019
    def _part(self, rows: int, side: tuple[int, int], grad: bool, checkpointing: bool) -> Phase:
        """One part of a side through the model: without a graph, or to the gradient."""
        self._checkpoint(checkpointing)
        batch = self._batch(rows, *side)

        def run() -> None:
            with torch.set_grad_enabled(grad):
                out = self.model(**batch)
                if grad:
                    (out * torch.empty_like(out, requires_grad=False)).sum().backward()

        return self._measure(run, *batch.values())

    @cache  # noqa: B019
    def _whole(self, size: int, sides: tuple[tuple[int, int], ...], checkpointing: bool) -> Phase:
        """The whole batch in one graph."""
        self._checkpoint(checkpointing)
        query, page = (self._batch(size, *side) for side in sides)

        def run() -> None:
            _contrast(query, page, self.model(**query), self.model(**page)).backward()

        return self._measure(run, *query.values(), *page.values())

    @cache  # noqa: B019
    def _loss(self, size: int, micro: int, sides: tuple[tuple[int, int], ...]) -> Phase:
        """The loss over embeddings made in parts, and their gradient."""
        query, page = (self._batch(size, *side) for side in sides)
        leaves = [
            [part.requires_grad_() for part in torch.empty(size, tokens, EMBEDDING_DIM, device="meta").split(micro)]
            for _, tokens in sides
        ]

        def run() -> None:
            _contrast(query, page, *map(torch.cat, leaves)).backward()

        return self._measure(run, *(part for parts in leaves for part in parts))

    def _measure(self, run: Callable[[], None], *known: Tensor) -> Phase:
        gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
        meter = Meter([*self.model.parameters(), *self.model.buffers(), *gradients, *known])
        with _kernels(self.cuda), meter:
            run()
        return Phase(meter.peak, meter.kernels)

    def _checkpoint(self, on: bool) -> None:
        base = self.model.base_model.model
        if on:
            base.activation_checkpointing_enable()
        elif base.is_activation_checkpointing:
            base.activation_checkpointing_disable()

    def _batch(self, rows: int, tiles: int, tokens: int) -> dict[str, Tensor]:
        """One side of a batch, no padding: ids and mask are real, the features on meta."""
        ids = torch.full((rows, tokens), (self.config.image_token_id + 1) % self.config.get_text_config().vocab_size)
        ids[:, : tiles * self.config.image_seq_length] = self.config.image_token_id
        shape = (rows * tiles, self.config.image_seq_length, self.config.get_text_config().hidden_size)
        features = {"image_features": torch.empty(shape, dtype=self.dtype, device="meta")} if tiles else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | features

    def _tiles(self, tiles: int) -> Tensor:
        height, width = self.config.vision_config.image_size
        return torch.empty(tiles, self.config.vision_config.num_channels, height, width, device="meta")


def _contrast(query: dict[str, Tensor], page: dict[str, Tensor], queries: Tensor, pages: Tensor) -> Tensor:
    scores = maxsim_matrix(queries, query["attention_mask"], pages, page["attention_mask"])
    return contrastive_loss(scores, torch.arange(len(queries)), temperature=1.0)


def _scaled(kernels: Counter[Kernel], factor: float) -> Counter[Kernel]:
    return Counter({kernel: times * factor for kernel, times in kernels.items()})  # type: ignore[arg-type]


@contextmanager
def _kernels(cuda: bool) -> Iterator[None]:
    """Attention takes the fused kernel, which meta tensors would not choose; and CUDA's dropout keeps a mask of bytes."""

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert attn_mask is None, "right padding needs no mask"
        return ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]

    def dropout(input, p=0.5, training=True, inplace=False):
        return torch.native_dropout(input, p, training)[0] if training and p else input

    with ExitStack() as stack:
        stack.enter_context(patch.object(functional, "scaled_dot_product_attention", attention))
        if cuda:
            stack.enter_context(patch.object(functional, "dropout", dropout))
        yield
