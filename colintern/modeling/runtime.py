"""How the model runs: threads and memory of the process, recomputation and compilation of the layers.

Activations that fit the memory are kept, only the rest is recomputed.
"""

import ctypes

import torch
from peft import PeftModel

from colintern.core.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NEVER = -1
# Variants of a compiled layer: with and without a graph, recomputed or not, first or not, sizes, evaluation. torch runs
# those beyond its own limit of 8 uncompiled.
RECOMPILE_LIMIT = 64


def configure_cpu_runtime(threads: int) -> None:
    """Set torch's number of threads, and keep the memory of freed tensors for the next ones.

    glibc returns blocks above 32 MB to the system at once, which then clears every page of the next tensor: a tenth
    of the demo's training time. The process keeps its peak size. No effect with another C library.
    """
    torch.set_num_threads(threads)
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def num_checkpointed_layers(layers: int, gradient_checkpointing: bool | int) -> int:
    """Return how many of `layers` layers `gradient_checkpointing` means: all of them if true, none if false.

    Raises:
        UserError: more than there are.
    """
    if isinstance(gradient_checkpointing, bool):
        return layers if gradient_checkpointing else 0
    if gradient_checkpointing > layers:
        raise UserError(
            f"gradient_checkpointing: {gradient_checkpointing} is more than the {layers} layers of the language model; "
            "true is all"
        )
    return gradient_checkpointing


def checkpoint_layers(model: PeftModel, gradient_checkpointing: bool | int) -> None:
    """Make the backward pass recompute the first layers of the language model; see `num_checkpointed_layers`.

    The first ones, because the backward pass reaches them last: by then it has freed what the other layers kept. The
    gradient has the same bits, whatever is recomputed.

    Args:
        model: wrapped in PEFT.
        gradient_checkpointing: as in params.yaml.

    Raises:
        UserError: more layers than there are.
    """
    base = model.base_model.model
    first = num_checkpointed_layers(len(base.decoder_layers), gradient_checkpointing)
    base.activation_checkpointing_disable()
    if first:
        base.activation_checkpointing_enable()
        base.disable_input_require_grads()  # only reentrant checkpointing needs the gradient of the inputs
    for layer in base.decoder_layers[first:]:
        layer.gradient_checkpointing = False


def compile_layers(model: PeftModel) -> None:
    """Compile the language model's layers, which share one compilation; `model` is wrapped in PEFT."""
    for layer in model.base_model.model.decoder_layers:
        layer.compile(recompile_limit=RECOMPILE_LIMIT)
