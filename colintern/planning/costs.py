"""Predict memory and operations of a training step before it runs.

The language model, wrapped in LoRA, runs on the meta device, where tensors have shapes and no data: `FlopCounterMode`
counts its operations, `saved_tensors_hooks` the bytes that its graph keeps. `CostModel.predict_step` adds up the passes
of a step as `ContrastiveTrainer` runs them. Not counted: the CUDA context, fragmentation, workspaces of libraries.
"""

from copy import deepcopy
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, InternVLConfig

from colintern.modeling.configuration_colintern import EMBEDDING_DIM
from colintern.modeling.dropout import DropoutMaskBank
from colintern.modeling.lora import FLOAT32, add_lora
from colintern.modeling.retriever import build_meta_model
from colintern.modeling.runtime import num_checkpointed_layers
from colintern.params import Params

ATTENTION = "colintern_meta"  # name of `_MetaAttention` in transformers
COUNTED_TOKENS = 64  # run on the meta device; but for attention, the cost is proportional to their number
ATTENTION_BACKWARD = 2.5  # operations of the backward pass of fused attention, in forward passes
# Fitted to a count of every allocation and kernel of a step, for the demo base, InternVL3.5-1B and -4B.
WORKING_WIDTH = 3.25  # temporary bytes a token while a layer is backpropagated, in widths of its MLP
LOSS_COPIES = 5  # of all embeddings: cached, padded, the gradients of both, and the similarities of a page
# Bytes moved beside matrix products, per byte that a layer keeps: in both passes, to cache the gradient, to recompute.
STEP_TRAFFIC, CACHING_TRAFFIC, RECOMPUTATION_TRAFFIC = 19.9, 7.6, 7.1
TOWER_TRAFFIC = 22.5  # the same, of a token in each layer of the tower, per byte of its hidden state
LAYER_KERNELS, PAGE_KERNELS = 150, 9  # launched for a layer in each direction, and for a page in the loss


class StepSettings(NamedTuple):
    """Settings that decide the cost of a step; every page counts as long as the longest."""

    batch_size: int
    micro_batch_size: int
    checkpointing: bool | int  # as `gradient_checkpointing` of params.yaml
    tiles: int
    page_tokens: int  # the visual tokens of a page and the prompt around them
    query_tokens: int
    negatives: int = 0  # of each pair

    @property
    def num_pages(self) -> int:
        """Return the pages of a batch."""
        return self.batch_size * (1 + self.negatives)

    @property
    def num_chunks(self) -> int:
        """Return the mini-batches of pages; the gradient is cached where there are several."""
        return -(-self.num_pages // self.micro_batch_size)


class StepCost(NamedTuple):
    """Predicted cost of a step."""

    memory: dict[str, int]  # bytes by what they hold; they add up to the peak
    operations: float  # of matrix products
    traffic_bytes: float  # moved by all other kernels
    kernels: float  # launched

    @property
    def peak_bytes(self) -> int:
        """Return the peak memory."""
        return sum(self.memory.values())


class CostModel:
    """Predicts the costs of training an architecture with params: of their dtype, LoRA and batches."""

    def __init__(self, config: InternVLConfig, params: Params):
        self.config, self.text, self.params = config, config.get_text_config(), params
        self.dtype: torch.dtype = getattr(torch, params.dtype)
        self.num_layers = self.text.num_hidden_layers
        self.base: Any = build_meta_model(deepcopy(config), None).to(self.dtype)  # type: ignore[arg-type]
        self.num_parameters = sum(p.numel() for p in self.base.parameters())
        base_bytes = sum(tensor.nbytes for tensor in (*self.base.parameters(), *self.base.buffers()))
        with torch.device("meta"):
            lora = params.lora_targets, params.lora_rank, params.lora_alpha, params.lora_dropout
            wrapped = add_lora(self.base, *lora)
        self.num_trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        self.masks = DropoutMaskBank(wrapped, 0, self.dtype)
        self.masks.draw_masks(0, torch.device("meta"))
        adapters = FLOAT32 * self.num_trained
        self.static_memory = {
            "base weights": base_bytes,
            "adapters": adapters,
            "gradients": adapters,
            "optimizer": 2 * adapters,  # the two moments of AdamW
            "dropout": sum(masks.nbytes for masks in self.masks.masks.values()),
        }
        wrapped.to(self.dtype).train()  # autocast, which computes the float32 adapters in bfloat16, skips meta tensors
        self.base.set_attn_implementation("sdpa")
        self.base.language_model.set_attn_implementation(ATTENTION)
        layers = self.base.decoder_layers
        # Where all layers have the same adapters, the cost of any number of them follows from two.
        adapter_sizes = {sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers}
        depth = 2 if len(adapter_sizes) == 1 else self.num_layers
        first, deep = (self._count_token(layers[:num_layers]) for num_layers in (1, depth))
        of_layer = [(more - few) / (depth - 1) for few, more in zip(first, deep, strict=True)]
        totals = (few + (self.num_layers - 1) * more for few, more in zip(first, of_layer, strict=True))
        self.forward_operations, self.backward_operations, self.kept_bytes = totals  # of a token
        self.layer_operations, _, self.layer_bytes = of_layer  # forward, and kept for the gradient

    def feature_bytes(self, tiles: int) -> int:
        """Return the size of a page's features in the feature cache."""
        return tiles * self.config.image_seq_length * self.text.hidden_size * self.dtype.itemsize

    @cached_property
    def tile_cost(self) -> tuple[float, float]:
        """Return the operations of tower and projector on one tile, and the bytes that their other kernels move."""
        vision: Any = self.config.vision_config
        pixels = torch.empty(1, vision.num_channels, *vision.image_size, dtype=self.dtype, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.base.get_page_features(pixels)
        tokens = vision.image_size[0] * vision.image_size[1] / (vision.patch_size[0] * vision.patch_size[1])
        width = vision.num_hidden_layers * vision.hidden_size * self.dtype.itemsize
        return counter.get_total_flops(), TOWER_TRAFFIC * tokens * width

    def predict_step(self, settings: StepSettings) -> StepCost:
        """Predict peak memory, operations and memory traffic of a training step."""
        queries, pages = settings.batch_size * settings.query_tokens, settings.num_pages * settings.page_tokens
        num_recomputed = num_checkpointed_layers(self.num_layers, settings.checkpointing)
        is_cached, recomputed_share = settings.num_chunks > 1, num_recomputed / self.num_layers
        operations = (1 + is_cached) * self.forward_operations + self.backward_operations
        operations = (queries + pages) * (operations + num_recomputed * self.layer_operations)
        # Causal attention: two products, half of each is masked.
        squares = queries * settings.query_tokens + pages * settings.page_tokens
        attention = 2 * squares * self.text.num_attention_heads * self.text.head_dim * self.num_layers
        forwards = 1 + is_cached + recomputed_share
        operations += (forwards + ATTENTION_BACKWARD) * attention + 2 * queries * pages * EMBEDDING_DIM  # of the loss
        traffic = STEP_TRAFFIC + CACHING_TRAFFIC * is_cached + RECOMPUTATION_TRAFFIC * recomputed_share
        chunks = settings.num_chunks + -(-settings.batch_size // settings.micro_batch_size)
        memory = self.static_memory | {
            "pages": 2 * settings.num_pages * self.feature_bytes(settings.tiles),  # the batch's, and one tensor of them
            "activations and loss": self._activation_bytes(settings, queries, pages, num_recomputed),
        }
        return StepCost(
            memory,
            operations,
            (queries + pages) * self.layer_bytes * self.num_layers * traffic,
            LAYER_KERNELS * chunks * self.num_layers * (forwards + 1) + PAGE_KERNELS * settings.num_pages,
        )

    def _activation_bytes(self, settings: StepSettings, queries: int, pages: int, num_recomputed: int) -> int:
        """Predict the most that a step allocates, in the loss or while a layer is backpropagated; arguments: tokens."""
        inputs = num_recomputed * self.text.hidden_size * self.dtype.itemsize  # kept by recomputed layers
        kept = self.kept_bytes - num_recomputed * self.layer_bytes + inputs
        # The kept layers are freed by the time that one is recomputed.
        backward = inputs + max(self.num_layers - num_recomputed, min(num_recomputed, 1)) * self.layer_bytes
        backward += WORKING_WIDTH * self.text.intermediate_size * self.dtype.itemsize
        embeddings = (queries + pages) * EMBEDDING_DIM * FLOAT32
        copies = 0 if self.dtype == torch.float32 else self.num_trained * self.dtype.itemsize  # autocast's, of adapters
        if settings.num_chunks == 1:
            loss = (queries + pages) * kept + (LOSS_COPIES - 2) * embeddings
            return int(copies + max(loss, pages * kept + queries * backward, pages * backward))
        tokens = settings.micro_batch_size * max(settings.page_tokens, settings.query_tokens)
        return int(max(LOSS_COPIES * embeddings, copies + 2 * embeddings + tokens * max(kept, backward)))

    def _count_token(self, layers: nn.ModuleList) -> tuple[float, ...]:
        """Run layers and head on the meta device; operations forward and backward and bytes kept, for one token."""
        self.base.language_model.layers = layers
        kept: dict[int, torch.UntypedStorage] = {}

        def keep_storage(tensor: Tensor) -> Tensor:
            kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
            return tensor

        inputs = torch.empty(1, COUNTED_TOKENS, self.text.hidden_size, dtype=self.dtype, device="meta")
        row = torch.zeros(1, dtype=torch.int64, device="meta")
        # As `ColIntern3_5.forward`, whose checks of ids and masks need values.
        with self.masks.assign_rows("page", row, COUNTED_TOKENS):
            with FlopCounterMode(display=False) as forward, saved_tensors_hooks(keep_storage, lambda tensor: tensor):
                hidden = self.base.language_model(inputs_embeds=inputs, attention_mask={"full_attention": None})[0]
                embeddings = normalize(self.base.custom_text_proj(hidden).float(), dim=-1)
                embeddings = embeddings.masked_fill(torch.zeros_like(embeddings[..., :1], dtype=torch.bool), 0.0)
            with FlopCounterMode(display=False) as backward:
                embeddings.sum().backward()
        for tensor in (*self.base.parameters(), *self.base.buffers(), *self.masks.masks.values(), inputs):
            kept.pop(id(tensor.untyped_storage()), None)
        kept_bytes = sum(storage.nbytes() for storage in kept.values())
        return tuple(n / COUNTED_TOKENS for n in (forward.get_total_flops(), backward.get_total_flops(), kept_bytes))


class _MetaAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps; on meta tensors torch would run the unfused code, with its L x L weights."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _compute_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, None]:
    return _MetaAttention.apply(query, key, value).transpose(1, 2), None  # type: ignore[no-untyped-call]


AttentionInterface.register(ATTENTION, _compute_attention)


def count_parameters(config: InternVLConfig) -> int:
    """Count the parameters of the base with its head."""
    return sum(p.numel() for p in build_meta_model(config, None).parameters())
