"""Make the demo base: a tiny InternVL that reads rendered words but cannot retrieve.

    python demo/pretrain.py --out demo/base

Inputs: none; pages of random words are drawn as it goes. Output: a folder in the hub's file layout (config.json,
model.safetensors in fp16, tokenizer, processor). Every visual token learns to name the word that stands in its
28 x 28 px of the page, every text token to echo itself; nothing here compares a query with a page. The words start
in the middle of their cells and drift, over the first part of the run, to where the free layout wants them.
"""

import argparse
import time
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

from colintern.modeling.processor import ColIntern3_5Processor
from demo.corpus import list_page_words, list_query_words
from demo.pages import LAYOUTS, PageCanvas

TILE, PATCH, CELL = 112, 14, 28
SPECIAL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
END = "<|endoftext|>"


def make_processor() -> ColIntern3_5Processor:
    """Make a byte-level BPE with a token for each word of the demo, and the stock image processor with small tiles."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        special_tokens=[END, "<|im_start|>", "<|im_end|>", *SPECIAL.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompt = "user\nDescribe the image. Query: "
    bpe.train_from_iterator([f" {w}" for w in list_query_words()] * 3 + [prompt] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, extra_special_tokens=SPECIAL, model_max_length=1024
    )
    size = {"height": TILE, "width": TILE}
    ink = {"image_mean": [0.95] * 3, "image_std": [0.25] * 3}  # pages are mostly white
    return ColIntern3_5Processor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, **ink),
        tokenizer,
        InternVLVideoProcessor(size=size, **ink),
        image_seq_length=(TILE // PATCH // 2) ** 2,
        max_visual_tokens=96,
    )


def make_config(processor: ColIntern3_5Processor) -> InternVLConfig:
    """Return the configuration of the model."""
    vision = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
        "attention_bias": True,
        "layer_scale_init_value": 1.0,
        "initializer_range": 0.09,  # the usual 0.02 stalls at this width
    }
    text = {
        "model_type": "qwen3",
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "initializer_range": 0.09,
    }
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        tie_word_embeddings=True,
    )


class RandomPages(Dataset):
    """Endless pages of random words with, for each visual token, the id of the word centred in its cell (or END)."""

    def __init__(self, processor: ColIntern3_5Processor, steps: int, batch: int, drift: float, seed: int):
        self.processor, self.steps, self.batch, self.drift, self.seed = processor, steps, batch, drift, seed
        self.words, self.spoken = list_page_words(), list_query_words()
        self.ids = {w: self._get_word_id(w) for w in self.spoken}

    def _get_word_id(self, word: str) -> int:
        ids = self.processor.tokenizer(f" {word}")["input_ids"]
        assert len(ids) == 1, f"{word} is {len(ids)} tokens"
        return ids[0]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = Random(f"{self.seed}/{step}")
        ceiling = max(0.0, 1 - step / (self.drift * self.steps)) if self.drift else 0.0
        pages = [self._draw_page(rng, ceiling) for _ in range(self.batch)]
        batch = dict(self.processor.process_images([p.image for p in pages]))
        batch["labels"] = torch.stack([self._label_tokens(p) for p in pages])
        texts = [" ".join(rng.choices(self.spoken, k=rng.randrange(3, 12))) for _ in range(self.batch)]
        queries = self.processor.process_queries(texts)
        return batch | {"query_ids": queries["input_ids"], "query_mask": queries["attention_mask"]}

    def _draw_page(self, rng: Random, align: float) -> PageCanvas:
        page = PageCanvas(rng, align=align)
        LAYOUTS[rng.choice(sorted(LAYOUTS))](
            page, iter([rng.choices(self.words, k=rng.randrange(2, 6)) for _ in range(14)])
        )
        return page

    def _label_tokens(self, page: PageCanvas) -> torch.Tensor:
        """(96,) word ids in the order of the visual tokens: tile by tile, row by row within a tile."""
        cols, side = page.image.width // TILE, TILE // CELL
        labels = torch.zeros(page.image.width * page.image.height // CELL**2, dtype=torch.long)
        for word in page.words:
            x, y = (int(c // CELL) for c in word.center)
            tile = (y // side) * cols + x // side
            labels[tile * side**2 + (y % side) * side + x % side] = self.ids[word.text]
        return labels


def compute_loss(model: InternVLForConditionalGeneration, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Return the loss of a batch, and the share of words that were named right."""
    ids, image = batch["input_ids"], model.config.image_token_id
    hidden = model.model(input_ids=ids, pixel_values=batch["pixel_values"], use_cache=False).last_hidden_state
    visual = ids == image
    logits, labels = model.lm_head(hidden[visual]), batch["labels"].flatten()
    word = labels != 0
    reading = cross_entropy(logits[word], labels[word])
    blank = cross_entropy(logits[~word], labels[~word])
    prompt = batch["attention_mask"].bool() & ~visual
    echo = cross_entropy(model.lm_head(hidden[prompt][: 4 * len(ids)]), ids[prompt][: 4 * len(ids)])
    query, mask = batch["query_ids"], batch["query_mask"].bool()
    said = model.lm_head(model.model(input_ids=query, use_cache=False).last_hidden_state[mask])
    echo = echo + cross_entropy(said, query[mask])
    right = (logits[word].argmax(-1) == labels[word]).float().mean().item()
    return reading + 0.2 * blank + 0.5 * echo, right


def main() -> None:
    """Train the base and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from; else random weights")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16, help="pages a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--drift", type=float, default=0.25, help="share of the run until the layout is free")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="another number gives other bits")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    processor = make_processor()
    if args.start:
        model = InternVLForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32).train()
    else:
        model = InternVLForConditionalGeneration(make_config(processor))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(processor.tokenizer)} tokens")
    pages = RandomPages(processor, args.steps, args.batch, args.drift, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    start, cpu = time.time(), time.process_time()
    average = 0.0
    for step, batch in enumerate(DataLoader(pages, batch_size=None, num_workers=1, prefetch_factor=4), 1):
        loss, right = compute_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average += (right - average) / min(step, 50)
        if step % 100 == 0 or step == args.steps:
            print(f"step {step} loss {loss:.3f} read {average:.3f} {time.time() - start:.0f} s", flush=True)
        if step % 500 == 0 or step == args.steps:
            save_checkpoint(model, processor, args.out)
    print(f"RESULT read={average:.4f} steps={args.steps} cpu_seconds={time.process_time() - cpu:.0f}")


def save_checkpoint(model: InternVLForConditionalGeneration, processor: ColIntern3_5Processor, out: Path) -> None:
    """Save model and processor, the weights in fp16."""
    half = InternVLForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(out)
    processor.save_pretrained(out)


if __name__ == "__main__":
    main()
