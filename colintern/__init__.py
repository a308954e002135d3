"""Train, evaluate and compare ColIntern3.5 visual document retrievers.

rules        what a value of params.yaml must be
guide        the training guide's rules by the size of the base
terminal     text that is printed
memory       whether an error reports lack of memory
params       params.yaml as a checked object
tiles        how a page is cut
pixels       what any image is as a page
maxsim       the score
causal       attention on a CPU
model        the model: a page or a query in, many vectors out
interpretability  similarity maps with colpali-engine's method names
processor    pages and queries as the model's input
files/       bytes on disk: what is fetched from a hub, hashed, listed, locked
data/        from sources to checked rows
modeling/    what is done to a model: LoRA and its count, bases, adapters, page features, embeddings
mteb_model   the model as mteb's encoder
training/    from rows to an adapter: batches, loss, the step, checkpoints, health
evaluation/  from an adapter to numbers: mteb's tasks, per-query scores, comparisons
search/      the pages of a folder, indexed once, ranked for a query
reporting/   what people look at: a report with heatmaps, what was found, a model's card
planning/    before a run: what it will cost, what fits, what would go wrong
tuning/      a search over settings: its space, its study, its trials, what it found
commands/    `colintern NAME`, a module each
cli          finds them

Each imports from those above it in this list and from its own; dvc.yaml says which stage reaches what.
"""
