"""The training guide's rules that follow from the size of the base, each in this one place.

Where the guide says two things both are here, and which one is recommended. The bounds include both; the doctor checks
settings against them, and the remedies of training health stay within them.
"""

from typing import NamedTuple

SMALLEST = 200_000_000  # parameters; colSmol-256M is the smallest retriever of this kind whose scores are published
BATCH, EPOCHS = 64, 5
UNSTABLE = 2e-5  # its learning rate for a 1B whose training is unstable


def optimal_lr(parameters: int) -> float:
    """The guide's table: 7e-5 below 0.5 B parameters, 5e-5 up to 3 B, 3e-5 from 3 B on.

    Its function get_optimal_lr agrees at 1B only, and ends at 1e-5, half the smallest rate that published
    recipes of this kind take (2e-5, 5e-5 and 2e-4 in colpali-engine's for 2 to 3 B).

    >>> [optimal_lr(int(billions * 1e9)) for billions in (0.3, 0.9, 2.4, 4.7)]
    [7e-05, 5e-05, 5e-05, 3e-05]

    Raises:
        ValueError: a model far smaller than the guide has rules for.
    """
    if parameters < SMALLEST:
        raise ValueError(f"the guide's rules are for 1B parameters and up, and do not reach {parameters / 1e6:.1f} M")
    return 7e-5 if parameters < 0.5e9 else 5e-5 if parameters < 3e9 else 3e-5


def other_lr(parameters: int) -> float:
    """The guide's function get_optimal_lr: 5e-5 below 1 B parameters, 3e-5 up to 3 B, 1e-5 from 3 B on."""
    return 5e-5 if parameters < 1e9 else 3e-5 if parameters < 3e9 else 1e-5


def lr_bounds(parameters: int) -> tuple[float, float]:
    """Half the lower of the guide's two rates, or where that is less what it advises where training is unstable; and
    twice the higher.

    >>> [lr_bounds(int(billions * 1e9)) for billions in (0.9, 2.4, 4.7)]
    [(2e-05, 0.0001), (1.5e-05, 0.0001), (5e-06, 6e-05)]

    Raises:
        ValueError: see `optimal_lr`.
    """
    both = optimal_lr(parameters), other_lr(parameters)
    return min(min(both) / 2, UNSTABLE), 2 * max(both)


def optimal_rank(parameters: int) -> int:
    """The guide's: 16 below 0.5 B, 32 for 1B, 64 above 3 B. InternVL3.5-1B has 0.9 B and is its "1B".

    Raises:
        ValueError: see `optimal_lr`.
    """
    return {7e-5: 16, 5e-5: 32, 3e-5: 64}[optimal_lr(parameters)]


class Bounds(NamedTuple):
    """Recommended settings for a base: minimum epochs and batch size, lowest and highest lr."""

    name: str
    epochs: int
    batch: int
    lr: tuple[float, float]
    lr_source: str


DEMO = "demo"  # bounds of bases with fewer than SMALLEST parameters


def bounds_for(parameters: int) -> Bounds:
    """Look up the bounds for a base by its number of parameters, with its head."""
    if parameters < SMALLEST:
        return Bounds(DEMO, 1, 32, (3e-3, 1e-2), "6e-3 gives 82.7, 5e-4 58.3, 2e-2 collapses")
    rates = sorted({optimal_lr(parameters), other_lr(parameters)}, reverse=True)
    source = "the guide: " + " or ".join(f"{rate:g}" for rate in rates)
    return Bounds(f"{parameters / 1e9:.1f} B", EPOCHS, BATCH, lr_bounds(parameters), source)
