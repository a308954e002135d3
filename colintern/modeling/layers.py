"""How the language model's layers run in training: which of them the backward pass computes again, and compiled.

Activations that fit the memory are kept, only the rest is computed again.
"""

from typing import Any

from colintern.core.errors import UserError

VARIANTS = 64  # of a compiled layer: with and without a graph, computed again or not, first or not, sizes, evaluation


def recomputed(layers: int, wanted: bool | int) -> int:
    """How many of so many layers `gradient_checkpointing` means: all of them if true, none if false.

    Raises:
        UserError: more than there are.
    """
    if isinstance(wanted, bool):
        return layers if wanted else 0
    if wanted > layers:
        raise UserError(
            f"gradient_checkpointing: {wanted} is more than the {layers} layers of the language model; true is all"
        )
    return wanted


def checkpoint_layers(model: Any, wanted: bool | int) -> None:
    """Have the backward pass compute the first layers of the language model again; see `recomputed`.

    The first ones, because the backward pass comes to them last: by then it has freed what the other layers kept. The
    gradient has the same bits, whatever is recomputed.

    Args:
        model: wrapped in PEFT.
        wanted: as in params.yaml.

    Raises:
        UserError: more layers than there are.
    """
    base = model.base_model.model
    layers = base.language_model.layers
    first = recomputed(len(layers), wanted)
    base.activation_checkpointing_disable()
    if first:
        base.activation_checkpointing_enable()
        base.disable_input_require_grads()  # for reentrant checkpointing, which this is not: a gradient nobody asks for
    for layer in layers[first:]:
        layer.gradient_checkpointing = False


def compile_layers(model: Any) -> None:
    """Compile the language model's layers, which are alike, so once for all of them; `model` is wrapped in PEFT.

    torch runs what goes beyond eight variants of a layer without compiling it, and parts of a batch with some layers
    computed again have more.
    """
    for layer in model.base_model.model.language_model.layers:
        layer.compile(recompile_limit=VARIANTS)
