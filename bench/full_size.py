"""Takes a full-size InternVL3.5-1B of random weights through the project's own code, on the CPU.

    CUDA_VISIBLE_DEVICES= .venv/bin/python -m bench.full_size    # in the repository root; --help: sizes, threads

In: tests/internvl3_5-1b.json (the hub's config), recipes/internvl3_5-1b.yaml, the tokenizer of demo/base (151,936 is
only the size of the embedding), demo pages drawn and enlarged here. Out: text only; the checkpoint, 2.1 GB in the hub's
key layout and bf16, is made in a temporary folder (TMPDIR) and deleted. Checked, exit 1 at the first that fails: every
weight that was loaded is the file's; the LoRA targets on meta and on the loaded model; two training steps (embeddings
cached, LM checkpointed as the recipe says) send a gradient into every LoRA layer and none into the frozen parts; the
NDCG of a page set is finite; memory. Last line: `RESULT peak_gib=... lora_modules=197 ...`.
"""

import argparse
import json
import math
import re
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration, TrainerCallback, set_seed
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

from colintern.encoding.page_features import Page, PageFeatures
from colintern.modeling.attention import choose_attn_implementation
from colintern.modeling.lora import LoraReport, add_lora, find_lora_errors, format_lora_report, report_lora
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5, build_meta_model
from colintern.params import Params, load_recipe
from colintern.training.pairs import TrainingDataset, TrainingPair
from colintern.training.run import assemble_trainer, build_training_arguments
from colintern.training.trainer import ContrastiveTrainer, RetrievalEvaluator
from demo.corpus import generate_corpus

CONFIG, RECIPE, TOKENIZER = Path("tests/internvl3_5-1b.json"), Path("recipes/internvl3_5-1b.yaml"), "demo/base"
STEPS, DEV_PAGES, MOST_GIB = 2, 4, 24
EXPECTED = {
    "lora_modules": 197,
    "trainable_parameters": 20_221_952,
    "frozen_vision_modules": 144,
    "frozen_projector_modules": 2,
    "adapted_vision_modules": 0,
}


def check(holds: bool, text: str) -> None:
    print(f"{'ok ' if holds else 'NO '} {text}", flush=True)
    if not holds:
        raise SystemExit(1)


def write_checkpoint(folder: Path) -> None:
    """config.json, processor and model.safetensors as on the hub, the weights random."""
    tokenizer = ColIntern3_5Processor.from_pretrained(TOKENIZER).tokenizer
    size = {"height": 448, "width": 448}
    processor = ColIntern3_5Processor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True), tokenizer, InternVLVideoProcessor(size=size)
    )
    processor.save_pretrained(folder)
    config = json.loads(CONFIG.read_text()) | {"image_token_id": processor.image_token_id}
    (folder / "config.json").write_text(json.dumps(config))
    made = InternVLConfig.from_pretrained(folder)  # a folder # nosec B615
    model = InternVLForConditionalGeneration._from_config(made, dtype=torch.bfloat16)
    # Noise on all, norms and biases too: a weight that is not loaded then shows, whatever a fresh model puts there.
    state = {hub_key(key): value + 0.01 * torch.randn_like(value) for key, value in model.state_dict().items()}
    state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def hub_key(key: str) -> str:
    """transformers 5's name of a weight of the generating model -> the hub's."""
    if key.startswith("lm_head."):
        return f"language_model.{key}"
    return key.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


def check_weights(model: ColIntern3_5, folder: Path) -> None:
    """All of the file but lm_head is in the model as it stands, and the model has nothing else but its head."""
    filed = load_file(folder / "model.safetensors")
    del filed["language_model.lm_head.weight"]
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("custom_text_proj.")}
    check(len(filed) == len(own), f"{len(filed)} weights in the file but lm_head, {len(own)} in the model but its head")
    same = [key for key, value in filed.items() if torch.equal(value, own[key.replace(".model.", ".", 1)])]
    language = sum(key.startswith("language_model.") for key in same)
    check(len(same) == len(filed), f"{len(same)} equal the file's to the bit, {language} of them the language model's")


def pages(split: str, number: int, scale: int) -> list[TrainingPair]:
    """Demo pages, one query each, `scale` times as large (as drawn, 224 x 336 px, one tile holds them)."""
    rows = []
    for page in generate_corpus(split, number, 1, seed=0):
        image = page.image.resize((page.image.width * scale, page.image.height * scale))
        rows.append(TrainingPair(page.queries[0], Page.from_image(image)))
    return rows


class Watch(TrainerCallback):
    """Times the steps, and notes which LoRA weights get a gradient that is not zero."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.reached: list[set[str]] = []
        self.frozen_with_gradient = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        self.reached.append(
            {name for name, p in named if ".lora_" in name and p.grad.isfinite().all() and p.grad.any()}
        )
        self.frozen_with_gradient += sum(".lora_" not in name for name, _ in named)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        print(f"step {state.global_step}: {self.seconds[-1]:.1f} s, peak {peak_gib():.2f} GiB", flush=True)

    def check(self) -> None:
        """B is zero at first, so that step 1 can only reach the Bs; step 2 must reach both."""
        modules = EXPECTED["lora_modules"]
        for step, reached in enumerate(self.reached, 1):
            a, b = (sum(f".lora_{x}." in name for name in reached) for x in "AB")
            layers = {m[1] for name in reached if (m := re.search(r"\.layers\.(\d+)\..*\.lora_B\.", name))}
            check(
                b == modules and a == (0 if step == 1 else modules) and len(layers) == 28,
                f"step {step}: gradients in {a} lora_A and {b} lora_B of {modules}, {len(layers)} layers of 28",
            )
        check(self.frozen_with_gradient == 0, f"{self.frozen_with_gradient} frozen parameters with a gradient")


def verify(model: Any, params: Params) -> LoraReport:
    """The counts of a model wrapped as verify does it; they must be the real model's."""
    counts = report_lora(model, params.lora_targets)
    wrong = find_lora_errors(counts) + [
        f"{key} is {getattr(counts, key)}" for key, value in EXPECTED.items() if getattr(counts, key) != value
    ]
    check(not wrong, f"LoRA targets on {next(model.parameters()).device}: {wrong or 'as expected'}")
    return counts


def train(model: Any, params: Params, scratch: Path, scale: int) -> tuple[ContrastiveTrainer, Watch]:
    """Two steps and the dev set, as `colintern.training.run.build_trainer` puts a trainer together."""
    processor = ColIntern3_5Processor.from_pretrained(
        params.base, max_visual_tokens=params.max_visual_tokens, max_query_tokens=params.max_query_tokens
    )
    features = PageFeatures(
        model, processor, scratch / "features", params.feature_cache_gb, params.feature_cache_format
    )
    train_rows, dev_rows = pages("train", STEPS * params.batch_size, scale), pages("dev", DEV_PAGES, scale)
    features.precompute([pair.page for pair in (*train_rows, *dev_rows)], params.workers)
    pairs, dev = TrainingDataset(train_rows, features), RetrievalEvaluator(dev_rows, features, params.eval_batch_size)
    tokens = len(pairs[0]["pages"][0]["features"]) * processor.image_seq_length
    print(f"{len(pairs)} pairs in {STEPS} steps, {tokens} visual tokens a page; {len(dev.pages)} dev pages", flush=True)
    args, watch = build_training_arguments(params, scratch, quiet=True), Watch()
    trainer = assemble_trainer(params, model, processor, args, dev, pairs, [watch])
    trainer.train()
    return trainer, watch


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--micro", type=int, default=2, help="pairs in the model at once")
    parser.add_argument("--tokens", type=int, default=768, help="max_visual_tokens of a page")
    parser.add_argument("--scale", type=int, default=3, help="enlarges the pages of 224 x 336 px")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        set_seed(1)  # not the seed of the run: weights drawn anew must not come out as the file's
        write_checkpoint(folder)
        params = replace(load_recipe(RECIPE), base=str(folder), base_revision="", train_data="demo", epochs=1,
                         max_visual_tokens=args.tokens, batch_size=args.batch, micro_batch_size=args.micro,
                         eval_batch_size=args.micro, logging_steps=1, threads=args.threads, workers=0,
                         warmup_steps=0)  # fmt: skip
        lora = (params.lora_targets, params.lora_rank, params.lora_alpha, params.lora_dropout)
        counts = verify(add_lora(build_meta_model(params.base, None), *lora), params)
        print(format_lora_report("InternVL3.5-1B of random weights", counts), flush=True)
        set_seed(params.seed)
        kernel = choose_attn_implementation(params.attention, params.dtype)
        base = ColIntern3_5.from_pretrained(folder, dtype=getattr(torch, params.dtype), attn_implementation=kernel)
        check_weights(base, folder)
        wrapped = add_lora(base, *lora)
        check(verify(wrapped, params) == counts, "the loaded model counts as the one on meta")
        trainer, watch = train(wrapped, params, Path(name) / "scratch", args.scale)
    watch.check()
    log = trainer.state.log_history
    losses = [row["loss"] for row in log if "loss" in row]
    ndcg = [row["eval_ndcg_at_5"] for row in log if "eval_ndcg_at_5" in row][-1]
    check(len(losses) == STEPS and all(map(math.isfinite, losses)), f"losses {losses}")
    check(0 <= ndcg <= 1, f"NDCG@5 of {DEV_PAGES} pages by random weights: {ndcg:.4f}")
    check(peak_gib() < MOST_GIB, f"peak memory {peak_gib():.2f} GiB, under {MOST_GIB}")
    print(
        f"RESULT peak_gib={peak_gib():.2f} lora_modules={counts.lora_modules} "
        f"trainable_parameters={counts.trainable_parameters} step_seconds={sum(watch.seconds) / STEPS:.1f} "
        f"loss_first={losses[0]:.4f} loss_second={losses[1]:.4f}"
    )


if __name__ == "__main__":
    main()
