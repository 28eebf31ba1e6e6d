"""Mixing domain rows with general rows, the usual remedy against forgetting."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from labkit.data.masks import encode
from labkit.data.rows import Rows
from labkit.data.tables import as_dataset

if TYPE_CHECKING:
    import pandas as pd

UNITS = ("rows", "tokens", "loss_tokens")
ORDERS = ("interleaved", "concatenated")
SOURCE_COLUMN = "mixed_from"


@dataclass(frozen=True)
class MixReport:
    """What a mixture holds, to compare with what was asked for."""

    ratio: float
    """General per one domain, in `unit`, as asked for."""
    unit: str
    repeats: int
    """General rows in the mixture beyond the first use of each; 0 unless allowed."""
    domain: dict[str, int]
    """Amount of domain data in each unit that was counted."""
    general: dict[str, int]
    """Amount of general data in each unit that was counted."""

    @property
    def general_share(self) -> dict[str, float]:
        """Share of the mixture that is general, 0 to 1, in each unit that was counted."""
        return {
            unit: self.general[unit] / (self.general[unit] + self.domain[unit])
            for unit in self.domain
        }

    def to_frame(self) -> "pd.DataFrame":
        """One line a unit: columns unit, domain and general (amounts), general_share (0 to 1)."""
        import pandas as pd

        rows = [
            (unit, self.domain[unit], self.general[unit], share)
            for unit, share in self.general_share.items()
        ]
        return pd.DataFrame(rows, columns=["unit", "domain", "general", "general_share"])

    def __str__(self) -> str:
        lines = [f"domain : general = 1 : {self.ratio:g} asked for in {self.unit}"]
        lines.append(f"{'unit':<12}{'domain':>9}{'general':>9}{'general share':>15}")
        for unit, share in self.general_share.items():
            counts = f"{self.domain[unit]:>9}{self.general[unit]:>9}"
            lines.append(f"{unit:<12}{counts}{share:>15.1%}")
        if self.repeats:
            lines.append(f"{self.repeats} general rows are repeats")
        return "\n".join(lines)


@dataclass(frozen=True)
class Mixture:
    """A mixed dataset and its report."""

    dataset: Dataset = field(repr=False)
    """Rows of both, with the column `mixed_from`: "domain" or "general"."""
    report: MixReport


def mix(
    domain: Rows,
    general: Rows,
    ratio: float,
    *,
    unit: str = "rows",
    order: str = "interleaved",
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_repeats: bool = False,
) -> Mixture:
    """All domain rows with as many general ones as `ratio` asks for: domain : general = 1 : ratio.

    Every row is used at most once, and the inputs stay as they are. A trainer that shuffles undoes
    the order.

    Args:
        domain: rows of the new task.
        general: rows to draw from, without replacement, by `seed`.
        ratio: general per one domain; 5 means 1 : 5, and 0.05 means five per hundred.
        unit: what the ratio counts: "rows", "tokens", or "loss_tokens" (those of the answers). The
            last two need a tokenizer and come as close as whole rows allow.
        order: "interleaved" spreads the general rows evenly, "concatenated" puts them last.
        tokenizer: also counts tokens for the report.
        allow_repeats: go round `general` again when it is too small, and report how often.

    Raises:
        ValueError: a ratio that is not above 0 or rounds to no row, an empty input, an unknown
            unit or order, columns that do not fit, a row without an answer to learn from (where
            tokens are counted), or too few general rows (says how many).
    """
    _check_arguments(ratio, unit, order, tokenizer)
    domain, general = as_dataset(domain), as_dataset(general)
    _check_datasets(domain, general)

    amounts_domain = _amounts("domain", domain, tokenizer)
    amounts_general = _amounts("general", general, tokenizer)
    asked = ratio * sum(amounts_domain[unit])
    drawn = _draw(amounts_general[unit], asked, seed)
    if not drawn:
        raise ValueError(
            f"ratio={ratio} of {sum(amounts_domain[unit])} domain {unit} rounds to no general row; "
            "raise ratio or give more domain rows"
        )
    missing = len(drawn) - len(general)
    if missing > 0 and not allow_repeats:
        largest = sum(amounts_general[unit]) / sum(amounts_domain[unit])
        largest = math.floor(largest * 1e4) / 1e4  # rounded up it would be refused again
        raise ValueError(
            f"ratio={ratio} needs {len(drawn)} general rows, got {len(general)}: {missing} are "
            f"missing; lower ratio to {largest:g}, add rows, or pass allow_repeats=True"
        )

    parts = [(domain, "domain"), (general.select(drawn), "general")]
    marked = [part.add_column(SOURCE_COLUMN, [name] * len(part)) for part, name in parts]
    mixed = concatenate_datasets(marked)
    if order == "interleaved":
        mixed = mixed.select(_interleaved(len(domain), len(drawn)))
    report = MixReport(
        ratio=ratio,
        unit=unit,
        repeats=len(drawn) - len(set(drawn)),
        domain={name: sum(amounts) for name, amounts in amounts_domain.items()},
        general={name: sum(amounts[i] for i in drawn) for name, amounts in amounts_general.items()},
    )
    return Mixture(mixed, report)


def _check_arguments(ratio: float, unit: str, order: str, tokenizer) -> None:
    if not isinstance(ratio, Real):
        raise ValueError(f"ratio={ratio!r} is no number: give general per one domain, 5 for 1 : 5")
    if not (ratio > 0 and math.isfinite(ratio)):
        raise ValueError(f"ratio={ratio} must be above 0: general per one domain, 5 for 1 : 5")
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r} is unknown; use one of {', '.join(UNITS)}")
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; use one of {', '.join(ORDERS)}")
    if unit != "rows" and tokenizer is None:
        raise ValueError(f"unit={unit!r} counts tokens; pass tokenizer=")


def _check_datasets(domain: Dataset, general: Dataset) -> None:
    for name, dataset in (("domain", domain), ("general", general)):
        if len(dataset) == 0:
            raise ValueError(
                f"{name} has no rows; load some, for instance data.load_task('general')"
            )
        if SOURCE_COLUMN in dataset.column_names:
            raise ValueError(f"{name} has a column {SOURCE_COLUMN!r}; rename it, mix() writes it")
    if not {"messages", "prompt"} & set(domain.column_names) & set(general.column_names):
        raise ValueError(
            f"domain has the columns {domain.column_names}, general {general.column_names}; "
            "bring both to messages or both to prompt and completion"
        )
    for name in set(domain.column_names) & set(general.column_names):
        types = domain.features[name], general.features[name]
        if types[0] != types[1] and "null" not in str(types):
            raise ValueError(
                f"column {name!r} is {types[0]} in domain and {types[1]} in general; "
                "make it one type, or remove it"
            )


def _amounts(
    name: str, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, list[int]]:
    """Unit to the amount in each row; tokens only where there is something to count them with."""
    amounts = {"rows": [1] * len(dataset)}
    if tokenizer is not None:
        encoded = encode(tokenizer, list(dataset))
        amounts["tokens"] = [len(tokens.ids) for tokens in encoded]
        amounts["loss_tokens"] = [sum(tokens.supervised) for tokens in encoded]
        _refuse_unlearnable(name, dataset, amounts["loss_tokens"])
    return amounts


def _refuse_unlearnable(name: str, dataset: Dataset, loss_tokens: Sequence[int]) -> None:
    """Raise ValueError if a row has no token that the loss learns from.

    TRL's trainer drops such rows, so the mixture that is trained on would not be the one reported.
    """
    empty = [number for number, amount in enumerate(loss_tokens) if not amount]
    if empty:
        row = dataset[empty[0]]
        what = f"{name} row {empty[0]}" + (f" (id {row['id']!r})" if row.get("id") else "")
        more = f", and {len(empty) - 1} more like it" if len(empty) > 1 else ""
        raise ValueError(
            f"{what} has no token that would be learned from{more}; look at it with "
            "data.mask_view, then give it an answer or leave it out"
        )


def _draw(amounts: list[int], asked: float, seed: int) -> list[int]:
    """Indices in random order whose amounts add up to what is asked for, to the nearest row.

    Where all of them are not enough it goes round again, so that the length tells how many are
    missing.
    """
    order = list(range(len(amounts)))
    random.Random(seed).shuffle(order)
    drawn: list[int] = []
    total = 0
    while True:
        index = order[len(drawn) % len(order)]
        if total + amounts[index] / 2 > asked:
            return drawn
        drawn.append(index)
        total += amounts[index]


def _interleaved(n_first: int, n_second: int) -> list[int]:
    """Indices of first + second with both spread evenly and each in its own order."""
    places = [((i + 0.5) / n_first, i) for i in range(n_first)]
    places += [((i + 0.5) / n_second, n_first + i) for i in range(n_second)]
    return [index for _, index in sorted(places)]
