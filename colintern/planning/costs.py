"""What a training step costs in memory and operations, known before it runs.

The real code, ColIntern3_5 wrapped in LoRA with its forward and backward, and the loss, runs on meta tensors under
`meter.measure`. Only the order of a step's phases is written down here (`Costs.step`), as `ContrastiveTrainer` runs
them; a test holds the two against each other, and `python -m bench.memory` the peak against a real one.

Not counted, because they are the device's and not the program's: the CUDA context, the allocator's fragmentation, the
libraries' workspaces.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import InternVLConfig

from colintern.modeling.configuration_colintern import EMBEDDING_DIM
from colintern.modeling.dropout import DropoutMaskBank
from colintern.modeling.lora import add_lora
from colintern.modeling.modeling_colintern import build_meta_model
from colintern.modeling.runtime import checkpoint_layers, num_checkpointed_layers
from colintern.planning.meter import Kernel, Phase, measure
from colintern.training.loss import contrastive_loss, maxsim_matrix

ADAM_BYTES = 8  # two float32 moments a trained parameter
SHALLOW, DEEPEST = 2, 4  # layers that are run; a layer more costs the same each time


class Setting(NamedTuple):
    """What a step's cost depends on besides the model; every page is taken to be as long as the longest."""

    batch_size: int
    micro_batch_size: int
    checkpointing: bool | int  # as `gradient_checkpointing` of params.yaml
    tiles: int
    page_tokens: int  # the visual ones and the prompt around them
    query_tokens: int
    cached: bool = True  # page features come from the cache, and no pixels
    negatives: int = 0  # of each pair

    @property
    def pages(self) -> int:
        return self.batch_size * (1 + self.negatives)


class Side(NamedTuple):
    """Queries or pages that go through the model; `tiles` and `tokens` are one row's."""

    rows: int
    tiles: int
    tokens: int


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


class Costs:
    """The costs of training one architecture.

    Args:
        config: of the base.
        dtype: of the base's weights.
        targets, rank, dropout: as for `add_lora`.
    """

    def __init__(self, config: InternVLConfig, dtype: torch.dtype, targets: Sequence[str], rank: int, dropout: float):
        self.config, self.text, self.dtype = config, config.get_text_config(), dtype
        self.low_precision = dtype == torch.bfloat16  # adapters are computed in it, and kept in float32
        self.lora = (targets, rank, rank, dropout)
        self.layers = self.text.num_hidden_layers
        full = self.model(self.layers)
        self.trained, self.adapter_bytes, self.base_bytes, self.parameters = _counts(full)
        # Where all layers are alike, shallow models tell what the deep one costs, in a tenth of the time.
        few, more = (_counts(self.model(SHALLOW + n))[0] if self.layers > DEEPEST else 0 for n in (0, 1))
        self.alike = few + (self.layers - SHALLOW) * (more - few) == self.trained

    def feature_bytes(self, tiles: int) -> int:
        """What the feature cache keeps of a page of so many tiles."""
        return tiles * self.config.image_seq_length * self.text.hidden_size * self.dtype.itemsize

    def static(self) -> dict[str, int]:
        """Bytes that are there in every step, whatever the batch."""
        return {
            "base weights": self.base_bytes,
            "adapters": self.adapter_bytes,
            "gradients": self.adapter_bytes,
            "optimizer": ADAM_BYTES * self.trained,
            "dropout": sum(masks.nbytes for masks in self.model(self.layers).masks.masks.values()),
        }

    def step(self, setting: Setting) -> Step:
        """The peak of a training step and what it runs, as `ContrastiveTrainer.training_step` goes."""
        pages, micro = setting.pages, min(setting.micro_batch_size, setting.pages)
        first = num_checkpointed_layers(self.layers, setting.checkpointing)
        sides = Side(setting.batch_size, 0, setting.query_tokens), Side(pages, setting.tiles, setting.page_tokens)
        embeddings = sum(side.rows * side.tokens for side in sides) * EMBEDDING_DIM * 4
        features = pages * self.feature_bytes(setting.tiles)
        kernels: Counter[Kernel] = Counter()
        peaks = [features]  # page_features makes one tensor of the pages
        shown = 2 * features  # the batch's, and that one
        if not setting.cached:
            tower = self.features(setting.tiles)
            peaks.append(tower.peak)
            kernels += _scaled(tower.kernels, pages)
            shown = features + pages * self._tiles(setting.tiles).nbytes
        if micro == pages:
            whole = self._deep(partial(self._whole, sides), first)
            peaks.append(whole.peak)
            kernels += whole.kernels
        else:
            loss = self._loss(micro, sides)
            peaks.append(embeddings + loss.peak)
            kernels += loss.kernels
            for side in sides:
                rows = min(micro, side.rows)
                for grad in (False, True):
                    part = self._deep(partial(self._part, side._replace(rows=rows), grad), first)
                    peaks.append(embeddings * (1 + grad) + part.peak)
                    kernels += _scaled(part.kernels, side.rows / rows)
        memory = self.static() | {"pages": shown, "activations and loss": max(peaks)}
        return Step(memory, dict(kernels))

    @cache  # noqa: B019
    def features(self, tiles: int) -> Phase:
        """Tower and projector on one page of so many tiles: once for all epochs, where features are cached."""
        pixels = self._tiles(tiles).to(self.dtype)

        def run(model: Any) -> None:
            with torch.no_grad():
                model.get_page_features(pixels)

        return self._phase(run, 0, self.layers, pixels)  # none of which it runs

    @cache  # noqa: B019
    def _part(self, side: Side, grad: bool, first: int, kept: int) -> Phase:
        """One part of a side through a model of `first` and `kept` layers, without a graph or back to the adapters."""
        batch = self._batch(*side)
        gradient = torch.empty(side.rows, side.tokens, EMBEDDING_DIM, device="meta")

        def run(model: Any) -> None:
            with torch.set_grad_enabled(grad):
                # Each part takes a copy of its pages' features.
                part = batch | {key: t.clone() for key, t in batch.items() if t.is_meta}
                self._embed(model, part, grad=gradient if grad else None)

        return self._phase(run, first, kept, gradient, *batch.values())

    @cache  # noqa: B019
    def _whole(self, sides: tuple[Side, ...], first: int, kept: int) -> Phase:
        """The whole batch, its graph waiting for the gradient of its embeddings."""
        query, page = (self._batch(*side) for side in sides)

        def run(model: Any) -> None:
            made = [self._embed(model, side) for side in (query, page)]
            leaves: list[Any] = [embedded.detach().requires_grad_() for embedded in made]
            _contrast(query, page, *leaves).backward()
            for side, embedded, leaf in zip((query, page), made, leaves, strict=True):
                self._embed(model, side, embedded, leaf.grad)

        return self._phase(run, first, kept, *query.values(), *page.values())

    @cache  # noqa: B019
    def _loss(self, micro: int, sides: tuple[Side, ...]) -> Phase:
        """The loss over embeddings that were made in parts, and their gradient."""
        query, page = (self._batch(*side) for side in sides)
        shapes = ((side.rows, side.tokens, EMBEDDING_DIM) for side in sides)
        parts = [[p.requires_grad_() for p in torch.empty(s, device="meta").split(micro)] for s in shapes]

        def run() -> None:
            queries, pages = (
                pad_sequence([row for p in side for row in p.unbind()], batch_first=True) for side in parts
            )
            _contrast(query, page, queries, pages).backward()

        return measure(run, [part for side in parts for part in side])

    def _embed(self, model: Any, part: dict[str, Tensor], made: Any = None, grad: Tensor | None = None) -> Tensor:
        """As `ContrastiveTrainer.embed_mini_batch` and `backward_mini_batch`, with the same dropout in both."""
        rows, length = part["input_ids"].shape
        # autocast is `measure`'s
        cast = torch.autocast(model.device.type, torch.bfloat16) if self.low_precision else nullcontext()
        with model.masks.assign_rows("page", torch.arange(rows, device="meta"), length):
            if made is None:
                with cast:
                    made = model(**part)
            if grad is not None:
                made = (made * grad).sum()
                made.backward()
        return made

    def _deep(self, phase: Callable[[int, int], Phase], first: int) -> Phase:
        """A phase of the whole model, whose `first` layers are computed again; where they are alike, from shallow
        models: a layer more costs as much each time, one that is computed again and one that is kept."""
        again, kept = first, self.layers - first
        if not self.alike:
            return phase(again, kept)
        # The first kept layer takes no memory: when one is computed again, it has been freed.
        few = (SHALLOW, 1) if again and kept else (min(again, SHALLOW), min(kept, SHALLOW))
        start = phase(*few)
        peak, kernels = start.peak, Counter(start.kernels)
        for more, times in ((few[0] + 1, few[1]), again - few[0]), ((few[0], few[1] + 1), kept - few[1]):
            if times:
                larger = phase(*more)
                peak += times * (larger.peak - start.peak)
                for kind in start.kernels.keys() | larger.kernels.keys():
                    kernels[kind] += times * (larger.kernels[kind] - start.kernels[kind])
        return Phase(peak, kernels)

    def _phase(self, run: Callable[[Any], None], first: int, kept: int, *known: Tensor) -> Phase:
        """`run` on a model of `first` layers that are computed again and `kept` that are not."""
        model = self.model(first + kept)
        checkpoint_layers(model, first)
        gradients = (p.grad for p in model.parameters() if p.grad is not None)
        there = (*model.parameters(), *model.buffers(), *model.masks.masks.values(), *gradients, *known)
        with disable_input_dtype_casting(model, active=self.low_precision):
            return measure(lambda: run(model), there)

    @cache  # noqa: B019
    def model(self, layers: int) -> Any:
        """The base cut to so many layers, wrapped in LoRA, on meta."""
        config = deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers, text.layer_types = layers, text.layer_types[:layers]
        model: Any = add_lora(build_meta_model(config, None).to(self.dtype), *self.lora)  # type: ignore[arg-type]
        model.masks = DropoutMaskBank(model, 0, self.dtype)
        model.masks.draw_masks(0, model.device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)  # from the second part of a step on they are there
        return model.train()

    def _batch(self, rows: int, tiles: int, tokens: int) -> dict[str, Tensor]:
        """One side of a batch, no padding: ids and mask are real, the features on meta."""
        ids = torch.full((rows, tokens), (self.config.image_token_id + 1) % self.text.vocab_size)
        ids[:, : tiles * self.config.image_seq_length] = self.config.image_token_id
        shape = (rows * tiles, self.config.image_seq_length, self.text.hidden_size)
        features = {"image_features": torch.empty(shape, dtype=self.dtype, device="meta")} if tiles else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | features

    def _tiles(self, tiles: int) -> Tensor:
        vision: Any = self.config.vision_config
        return torch.empty(tiles, vision.num_channels, *vision.image_size, device="meta")


def _contrast(query: dict[str, Tensor], page: dict[str, Tensor], queries: Tensor, pages: Tensor) -> Tensor:
    scores = maxsim_matrix(queries, query["attention_mask"], pages, page["attention_mask"])
    return contrastive_loss(scores, torch.zeros(scores.shape, dtype=torch.bool, device=scores.device), 1.0, False)


def _scaled(kernels: Counter[Kernel], factor: float) -> Counter[Kernel]:
    return Counter({kernel: times * factor for kernel, times in kernels.items()})  # type: ignore[arg-type]


def _counts(model: Any) -> tuple[int, int, int, int]:
    """Trained parameters, their bytes, the base's bytes, the base's parameters, its head among them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    number, size = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    everything = [*model.parameters(), *model.buffers()]
    return number, size, sum(t.nbytes for t in everything) - size, sum(p.numel() for p in model.parameters()) - number


def parameters(config: InternVLConfig) -> int:
    """Of the base with its head."""
    return sum(p.numel() for p in build_meta_model(config, None).parameters())
