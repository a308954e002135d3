"""Show results to people: the report on a model, queries explained by heatmaps, plots, an exported model's card."""
