"""The model: ColIntern3_5, its processor, tiling, LoRA and its count, attention, loading and saving."""
