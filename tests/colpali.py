"""A ColPali of some kilobytes in the files of vidore/colpali-v1.3: an adapter that names its base, weights drawn."""

from pathlib import Path

import torch
from colpali_engine.models import ColPali, ColPaliProcessor
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PaliGemmaConfig, PreTrainedTokenizerFast, SiglipImageProcessor

NAME, BASE = "vidore/colpali-v1.3", "vidore/colpaligemma-3b-pt-448-base"
SIDE, PATCH = 56, 14  # of a page, of a patch, in px
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
LETTERS = [*SPECIAL.values(), "<image>", "\n", *map(chr, range(32, 127))]


def processor() -> ColPaliProcessor:
    """Its tokens are letters."""
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    images = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = (SIDE // PATCH) ** 2
    texts = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<image>"], model_max_length=512, **SPECIAL
    )
    return ColPaliProcessor(images, texts)


def write(base: Path, adapter: Path) -> None:
    ours = processor()
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": PATCH, "vision_use_head": False}
    text = {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(ours.tokenizer) + 1024}
    image = ours.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = ColPali(
        PaliGemmaConfig(vision_config=small | tower, text_config=small | text, image_token_id=image, projection_dim=32)
    )
    model.save_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.peft_config["default"].base_model_name_or_path = BASE
    wrapped.save_pretrained(adapter, save_embedding_layers=False)
    ours.save_pretrained(adapter)
