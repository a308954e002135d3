"""The training guide's recommendations by the size of the base, each in this one place.

Where the guide contradicts itself, both values are here, and which one is recommended. The bounds include both: the
doctor checks settings against them, and suggested fixes of the health rules stay within them.
"""

from typing import NamedTuple

MIN_GUIDE_PARAMETERS = 200_000_000  # colSmol-256M is the smallest retriever of this kind with published scores
MIN_BATCH_SIZE, MIN_EPOCHS = 64, 5
UNSTABLE_TRAINING_LR = 2e-5  # for a 1B whose training is unstable
DEMO = "demo"  # bounds of bases with fewer than MIN_GUIDE_PARAMETERS


class RecommendedBounds(NamedTuple):
    """Recommended settings for a base: minimum epochs and batch size, lowest and highest lr."""

    name: str
    epochs: int
    batch: int
    lr: tuple[float, float]
    lr_source: str


def get_optimal_lr(parameters: int) -> float:
    """Return the lr of the guide's table: 7e-5 below 0.5 B parameters, 5e-5 up to 3 B, 3e-5 from 3 B on.

    The guide's function get_optimal_lr agrees at 1B only, and ends at 1e-5, half the smallest lr of published recipes
    of this kind (2e-5, 5e-5 and 2e-4 in colpali-engine's for 2 to 3 B).

    >>> [get_optimal_lr(int(billions * 1e9)) for billions in (0.3, 0.9, 2.4, 4.7)]
    [7e-05, 5e-05, 5e-05, 3e-05]

    Raises:
        ValueError: the model is far smaller than those that the guide covers.
    """
    if parameters < MIN_GUIDE_PARAMETERS:
        raise ValueError(f"the guide's rules are for 1B parameters and up, and do not reach {parameters / 1e6:.1f} M")
    return 7e-5 if parameters < 0.5e9 else 5e-5 if parameters < 3e9 else 3e-5


def get_alternative_lr(parameters: int) -> float:
    """Return the lr of the guide's function: 5e-5 below 1 B parameters, 3e-5 up to 3 B, 1e-5 from 3 B on."""
    return 5e-5 if parameters < 1e9 else 3e-5 if parameters < 3e9 else 1e-5


def get_lr_bounds(parameters: int) -> tuple[float, float]:
    """Return half the lower of the guide's two rates, at most its rate for unstable training, and twice the higher.

    >>> [get_lr_bounds(int(billions * 1e9)) for billions in (0.9, 2.4, 4.7)]
    [(2e-05, 0.0001), (1.5e-05, 0.0001), (5e-06, 6e-05)]
    """
    rates = get_optimal_lr(parameters), get_alternative_lr(parameters)
    return min(min(rates) / 2, UNSTABLE_TRAINING_LR), 2 * max(rates)


def get_optimal_rank(parameters: int) -> int:
    """Return the guide's LoRA rank: 16 below 0.5 B, 32 for 1B (InternVL3.5-1B has 0.9 B), 64 above 3 B."""
    return {7e-5: 16, 5e-5: 32, 3e-5: 64}[get_optimal_lr(parameters)]


def get_recommended_bounds(parameters: int) -> RecommendedBounds:
    """Return the bounds for a base by its number of parameters, with its head."""
    if parameters < MIN_GUIDE_PARAMETERS:
        return RecommendedBounds(DEMO, 1, 32, (3e-3, 1e-2), "6e-3 gives 82.7, 5e-4 58.3, 2e-2 collapses")
    rates = sorted({get_optimal_lr(parameters), get_alternative_lr(parameters)}, reverse=True)
    source = "the guide: " + " or ".join(f"{rate:g}" for rate in rates)
    return RecommendedBounds(f"{parameters / 1e9:.1f} B", MIN_EPOCHS, MIN_BATCH_SIZE, get_lr_bounds(parameters), source)
