"""The registry of regularisers. A recipe is data: what it adds to the plain training step, which is in `step.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mgs_core._errors import ArgumentError
from mgs_core.penalty import Penalty


@dataclass(frozen=True)
class Recipe:
    """Describe a regulariser; fields combine.

    Attributes:
        name: as on the command line.
        weight_decay: decoupled decay a step, as a multiple of the learning rate (Loshchilov and Hutter 2019).
        dropout: probability to drop a hidden unit.
        hold_out: share of the noisy training samples held out for validation; the weights that are best on them are kept.
        label_smoothing: share of each target spread over all classes.
        mixup: α of the Beta distribution that mixes pairs of samples (Zhang et al. 2018); 0 for none.
        gradient_penalty: factor on `mean ‖∇_x loss‖²` (Drucker and Le Cun 1992).
        penalty: penalty on the kernel, or None.
        output: the head of the kernel that is penalised.
        transform: applied to the outputs before that head.
        agreement: weight the losses by `agreement_weights`.
        relabel: train on the labels that `audit` suggests, which kernel regression predicts for each sample from all others.

    Example:
        >>> from mgs_core.experiments import RECIPES
        >>> RECIPES["weight-decay"].weight_decay > 0
        True
    """

    name: str
    weight_decay: float = 0.0
    dropout: float = 0.0
    hold_out: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    gradient_penalty: float = 0.0
    penalty: Penalty | None = None
    output: Any = "loss"
    transform: Any = "identity"
    agreement: bool = False
    relabel: bool = False


#: The strengths are those of five tried, three of mixup, that predict held-out NOISY labels of the digits best (40 % noise, two
#: seeds that the default comparison does not use); no clean label was looked at.
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("none"),
        Recipe("weight-decay", weight_decay=3.0),
        Recipe("dropout", dropout=0.5),
        Recipe("early-stopping", hold_out=0.2),
        Recipe("label-smoothing", label_smoothing=0.4),
        Recipe("mixup", mixup=4.0),
        Recipe("gradient-penalty", gradient_penalty=3.0),
        Recipe("mgs-trace", penalty=Penalty("trace", strength=3e-2)),
        Recipe("mgs-log-determinant", penalty=Penalty("log_determinant", strength=3.0)),
        Recipe("mgs-agreement", agreement=True),
        Recipe("mgs-relabel", relabel=True),
    )
}


def choose(names: Iterable[str]) -> list[Recipe]:
    """Return the recipes of these names, each once.

    Args:
        names: names from `RECIPES`.

    Returns:
        The recipes in the order of the names.

    Raises:
        ArgumentError: when a name is unknown or there is none.
    """
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in RECIPES]
    if unknown or not wanted:
        raise ArgumentError(f"`regularizers` must be among {', '.join(RECIPES)}; got {', '.join(unknown) or 'none'}.")
    return [RECIPES[name] for name in wanted]
