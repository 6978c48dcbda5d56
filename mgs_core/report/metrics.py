"""What is drawn and listed: the figures of a record, their names, and how each is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Describe one figure of an epoch's record.

    Attributes:
        field: its name in the records.
        title: its name for readers.
        reading: one sentence that says what it is and which way is good.
        share: it is written in percent.
        logarithmic: it is drawn on a logarithmic axis.
        from_zero: the axis begins at 0.
        settled: the axis need not hold the first tenth of the epochs, where every network climbs.
        stop: "least" or "greatest": where early stopping by this metric stops; empty where it does not.
    """

    field: str
    title: str
    reading: str
    share: bool = False
    logarithmic: bool = False
    from_zero: bool = False
    settled: bool = False
    stop: str = ""

    @property
    def name(self) -> str:
        """The title as it stands alone."""
        return self.title.removeprefix("… its ").capitalize() if self.title.startswith("…") else self.title


TEST = Metric(
    "test_accuracy",
    "Test accuracy",
    "Share of the clean test samples that are classified right; where the curve rises and then falls, the network memorises.",
    share=True,
    settled=True,
)
MEMORISATION = Metric(
    "memorisation",
    "Wrong labels memorised",
    "Share of the wrongly labelled training samples whose wrong label the network predicts; lower is better.",
    share=True,
    from_zero=True,
)
OUTCOMES = (MEMORISATION, TEST)
_TRACE = Metric(
    "mgs_trace",
    "Trace",
    "Sum of the squared lengths of the probe samples' gradients: it sees size only, not direction.",
    logarithmic=True,
    stop="least",
)
_LOG_DETERMINANT = Metric(
    "mgs_log_determinant",
    "Log-determinant",
    "Volume that the gradients span, on a logarithmic scale: the sum of the magnitude part and the similarity part.",
    stop="least",
)
_MAGNITUDE = Metric(
    "mgs_magnitude",
    "… its magnitude part",
    "What the log-determinant would be if no two gradients had anything in common: size alone.",
    stop="least",
)
_SIMILARITY = Metric(
    "mgs_similarity",
    "… its similarity part",
    "Log-determinant of the cosines between gradients, at most 0: the lower, the more the samples pull the same way.",
    stop="least",
)
_EFFECTIVE_RANK = Metric(
    "mgs_effective_rank",
    "Effective rank",
    "Number of directions in which the gradients point, between 1 and the number of probe samples; low means similar.",
    stop="least",
)
_TOP_SHARE = Metric(
    "mgs_top_share",
    "Share of the first direction",
    "Part of the trace that lies along one direction; high means similar.",
    share=True,
    stop="greatest",
)
_MEAN_COSINE = Metric(
    "mgs_mean_cosine",
    "Mean cosine",
    "Mean cosine between the gradients of two samples; 1 when all point the same way.",
    stop="greatest",
)
_SAME_CLASS = Metric(
    "mgs_same_class_cosine",
    "Cosine within a class",
    "Mean cosine between gradients of samples with one given label; high where a class is learned by what its samples share.",
    stop="greatest",
)
_OTHER_CLASS = Metric(
    "mgs_other_class_cosine",
    "Cosine between classes",
    "Mean cosine between the gradients of two samples with different given labels.",
)
_ALIGNMENT = Metric(
    "mgs_alignment",
    "Alignment with the labels",
    "Likeness of the kernel to the pattern of equal given labels; 1 when gradients agree within classes and are orthogonal "
    "otherwise.",
    stop="greatest",
)
DISPARITY = Metric(
    "gradient_disparity",
    "Gradient disparity",
    "Distance between the mean loss gradients of the probe samples' two halves; another method's metric, for comparison.",
)
KERNEL_METRICS = (
    _TRACE, _LOG_DETERMINANT, _MAGNITUDE, _SIMILARITY, _EFFECTIVE_RANK, _TOP_SHARE,
    _MEAN_COSINE, _SAME_CLASS, _OTHER_CLASS, _ALIGNMENT, DISPARITY,
)  # fmt: skip
TRAINING = Metric(
    "train_accuracy",
    "Training accuracy",
    "Share of the training samples whose given label, right or wrong, the network predicts; near 100 % all are learned by heart.",
    share=True,
    settled=True,
)
SECTIONS: tuple[tuple[str, str, tuple[Metric, ...]], ...] = (
    ("outcome", "Does it learn, or memorise?", (TEST, MEMORISATION, TRAINING)),
    ("volume", "Size and similarity of the gradients, in one number and in two", (_LOG_DETERMINANT, _MAGNITUDE, _SIMILARITY)),
    ("spread", "How large, and in how many directions?", (_TRACE, _EFFECTIVE_RANK, _TOP_SHARE)),
    ("classes", "Who pulls with whom?", (_SAME_CLASS, _OTHER_CLASS, _ALIGNMENT)),
)
SCATTERED = (_TRACE, _LOG_DETERMINANT, _SIMILARITY, _EFFECTIVE_RANK)
