"""From an adapter to numbers: the mteb encoder, the models to evaluate, the run of mteb's tasks, their results."""
