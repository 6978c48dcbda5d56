"""The regulariser's arguments: one object that Keras can serialise, as those of `keras.regularizers`."""

from __future__ import annotations

from typing import Any, Literal, get_args

from mgs_core import ArgumentError, Penalty
from mgs_core._arguments import integer
from mgs_core._errors import renamed

from ._keras import keras

OutputName = Literal["loss", "trace", "sum", "target", "random"]
TransformName = Literal["identity", "softmax", "log_softmax", "sigmoid"]


@keras.saving.register_keras_serializable(package="mgs_core")
class MGSRegularizer:
    """Hold how a model is regularised: `loss + strength · R(K)`, or each sample's loss weighted by its agreement.

    The kernel is that of the model at inference: dropout off, batch normalisation with its running statistics.

    Attributes:
        penalty: name of the penalty R, see `mgs_core.Penalty`; None for weighting alone.
        strength: factor of the penalty, at least 0; None for the default of `mgs_core.Penalty`. `StrengthSchedule` changes that
            of one model during `fit`.
        scale: of the penalty.
        output: the head: "loss" (the losses the model is compiled with), "trace", "sum", "target" or "random".
        transform: applied to the outputs before the head; "softmax" for a model that returns logits. Not to those of the losses.
        probes: of `output="random"`.
        seed: of `output="random"`, whose probes are drawn anew in each step.
        max_samples: the kernel is that of the first so many samples of each batch; None for all. Bounds the cost.
        every: penalise every so many steps, that many times as strongly.
        weighting: "agreement" to weight the samples' losses by `mgs_core.agreement_weights`; None for equal weights.

    Raises:
        ArgumentError: when an argument is out of range.

    Cost:
        A second forward and backward pass of the samples in the kernel, their contraction, and the derivative of both.

    Example:
        >>> from mgs_core.adapters.keras import MGSRegularizer
        >>> regularizer = MGSRegularizer("trace", strength=0.5, max_samples=32)
        >>> MGSRegularizer.from_config(regularizer.get_config()).strength
        0.5
    """

    def __init__(
        self,
        penalty: str | None = "trace",
        strength: float | None = None,
        *,
        scale: float = 1.0,
        output: OutputName = "loss",
        transform: TransformName = "identity",
        probes: int = 1,
        seed: int = 0,
        max_samples: int | None = None,
        every: int = 1,
        weighting: Literal["agreement"] | None = None,
    ) -> None:
        if penalty is None and weighting is None:
            raise ArgumentError("`penalty` must be the name of a penalty unless `weighting` is given; got None for both.")
        strength = 0.0 if penalty is None and strength is None else strength
        with renamed(name="penalty"):
            checked = Penalty("trace" if penalty is None else penalty, strength, scale)  # type: ignore[arg-type]  # refuses what it does not know
        for name, value, choices in (
            ("output", output, get_args(OutputName)),
            ("transform", transform, get_args(TransformName)),
            ("weighting", weighting, (None, "agreement")),
        ):
            if value not in choices:
                raise ArgumentError(f"`{name}` must be one of {', '.join(map(str, choices))}; got {value!r}.")
        if output == "loss" and transform != "identity":
            raise ArgumentError(
                f'`transform` must be "identity" for output="loss"; got {transform!r}. The losses that the model is compiled '
                "with have their own, as from_logits=True; or choose another output."
            )
        probes, every, seed = integer("probes", probes, 1), integer("every", every, 1), integer("seed", seed, 0)
        max_samples = None if max_samples is None else integer("max_samples", max_samples, 1)
        if weighting is not None and max_samples is not None:
            raise ArgumentError(f"`max_samples` must be None with weighting, which weights all samples; got {max_samples}.")
        self.penalty, self.scale = penalty, checked.scale
        self.output, self.transform, self.probes, self.seed = output, transform, probes, seed
        self.max_samples, self.every, self.weighting = max_samples, every, weighting
        self.strength = float(checked.strength)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what the constructor sets, once: models keep what they were given, and several may share it."""
        if "strength" in self.__dict__:  # the last
            remedy = "Use StrengthSchedule, or attach a new regularizer." if name == "strength" else "Attach a new regularizer."
            raise ArgumentError(f"`{name}` must stay as it was made, for a model is trained by it; got {value!r}. {remedy}")
        object.__setattr__(self, name, value)

    def __call__(self, kernel: Any) -> Any:
        """Return `strength · R(K)`, as `mgs_core.Penalty` does.

        Args:
            kernel: (n, n), of any framework.

        Raises:
            ArgumentError: when it weights samples alone.
        """
        if self.penalty is None:
            raise ArgumentError("`penalty` must be a name for its value to be asked for; got None, of weighting alone.")
        return Penalty(self.penalty, self.strength, self.scale)(kernel)  # type: ignore[arg-type]  # checked when it was made

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        return dict(self.__dict__)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MGSRegularizer:
        """Return the regulariser that `get_config` described."""
        return cls(**config)

    def __repr__(self) -> str:
        """Return the call that makes it."""
        return f"MGSRegularizer({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"
