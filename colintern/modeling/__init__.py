"""The model: ColIntern3_5, its processor, tiling, LoRA, attention, loading and saving."""
