"""Every statement of the course that a measurement decides, notebook by notebook.

A claim is one sentence, where it comes from, the quantity that decides it, and the rule that makes
it hold. Popular beliefs stand here beside our own and are judged the same way, by `labkit.claims`.
"""

import math
from dataclasses import dataclass

Interval = tuple[float, float]
Bar = float | tuple[float, float]


@dataclass(frozen=True)
class Rule:
    """Which values of a quantity make a claim hold: those in [low, high]."""

    low: float
    high: float

    @property
    def bar(self) -> Bar:
        """The one finite end, or both."""
        if math.isinf(self.high):
            return self.low
        return self.high if math.isinf(self.low) else (self.low, self.high)

    @property
    def words(self) -> str:
        """The rule as it is read aloud: "at least 0.9"."""
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return (
            f"at most {self.high:g}" if math.isinf(self.low) else f"{self.low:g} to {self.high:g}"
        )

    def verdict(self, value: float, interval: Interval | None = None) -> str:
        """ "holds" inside, "does not hold" outside, "inconclusive" across an end."""
        low, high = interval or (value, value)
        if self.low <= low and high <= self.high:
            return "holds"
        return "does not hold" if high < self.low or low > self.high else "inconclusive"


def at_least(bar: float) -> Rule:
    """Holds from `bar` up."""
    return Rule(bar, math.inf)


def at_most(bar: float) -> Rule:
    """Holds up to `bar`."""
    return Rule(-math.inf, bar)


def within(low: float, high: float) -> Rule:
    """Holds from `low` to `high`, both included."""
    if not low <= high:
        raise ValueError(f"low={low} is above high={high}: swap them")
    return Rule(low, high)


def equivalent(margin: float) -> Rule:
    """Holds for a difference of at most `margin` either way; judge it with a 90 % interval."""
    return within(-margin, margin)


@dataclass(frozen=True)
class Claim:
    """One statement that a measurement decides."""

    id: str
    statement: str
    source: str
    """Who says so: a paper, or a popular guide whose belief is put to the test."""
    quantity: str
    """What is measured, with its unit."""
    rule: Rule


_FULL_FINE_TUNING = (
    Claim(
        "full-learns-d1",
        "Full fine-tuning teaches the ticket task to the small model.",
        "shared by all guides; measured in notebook 02",
        "exact match on the ticket task's test rows after full fine-tuning",
        at_least(0.90),
    ),
    Claim(
        "full-forgets",
        "Full fine-tuning on one task alone costs general ability.",
        "McCloskey and Cohen 1989, catastrophic interference; measured in notebook 02",
        "general macro exact match before minus after",
        at_least(0.05),
    ),
    Claim(
        "pad-is-not-end",
        "Every row's end token is learned from, so the model is trained to stop.",
        "common failure on trackers: pad = end, and the model never stops",
        "share of training rows whose end token is supervised",
        at_least(1.0),
    ),
    Claim(
        "save-every-2000-never-saves",
        "A checkpoint every 2,000 steps leaves a short run without one before its last step.",
        "popular guides: save every 2,000 steps",
        "checkpoints written before the last step, at an interval of 2,000",
        at_most(0),
    ),
    Claim(
        "steps-formula-is-wrong",
        "The popular step formula at least doubles the steps of a run that accumulates gradients.",
        "popular guides: steps = epochs x rows / (devices x batch)",
        "formula divided by real steps: 1,000 rows, batch 8, 2 devices, accumulation 4, 3 epochs",
        at_least(2.0),
    ),
    Claim(
        "early-stopping-restores-best",
        "With load_best_model_at_end, training ends with the best validation loss, not the last.",
        "transformers documentation; trackers report lost best models",
        "validation loss of the final model minus the lowest logged one, in nats per token",
        at_most(0.001),
    ),
    Claim(
        "higher-rate-forgets-more",
        "At equal steps, the highest rate tried costs more general ability than the lowest.",
        "popular guides: lower the rate against forgetting",
        "general macro drop at the highest rate minus the drop at the lowest one",
        at_least(0.02),
    ),
    Claim(
        "full-rate-2e-5-is-too-low-here",
        "In 50 steps, the usual 2e-5 of billion-parameter models teaches far less than a faster "
        "rate.",
        "popular guides: full fine-tuning at 2e-5",
        "exact match on tickets after 50 steps at the best rate tried minus at 2e-5",
        at_least(0.20),
    ),
)

_LORA: tuple[Claim, ...] = (
    Claim(
        "zero-b-is-the-base",
        "A new LoRA adapter changes nothing: B is zero, so the first answers are the base model's.",
        "Hu et al. 2021, arXiv:2106.09685, section 4.1",
        "largest difference of a logit, new adapter against base model",
        at_most(0),
    ),
    Claim(
        "lora-trains-2-percent",
        "LoRA of rank 3 on all linear layers trains less than 2 % of this model's parameters.",
        "the course's promise",
        "numbers that LoRA trains divided by all of the model's",
        at_most(0.02),
    ),
    Claim(
        "lora-trains-0.01-percent-of-gpt3",
        "LoRA trains 0.01 % of GPT-3.",
        "popular guides, after Hu et al. 2021; true for rank 4 on queries and values",
        "rank 4 on two of four attention matrices of 96 layers, in percent of 175 billion",
        within(0.005, 0.015),
    ),
    Claim(
        "lora-and-full-learn-d1",
        "Both LoRA and full fine-tuning teach the ticket task, by 30 points or more.",
        "the course's promise",
        "the smaller of the two gains in exact match on the ticket task's test rows",
        at_least(0.30),
    ),
    Claim(
        "lora-as-good-as-full-on-d1",
        "On the ticket task, LoRA with less than 2 % of the parameters does as well as full "
        "fine-tuning on the same rows, given 1,000 steps where full takes 500.",
        "Schulman et al. 2025, LoRA Without Regret",
        "exact match on test rows with the same seed, LoRA (1,000 steps at 8e-3) minus full (500 "
        "at 5e-4)",
        equivalent(0.03),
    ),
    Claim(
        "full-is-always-better",
        "Full fine-tuning always learns more than LoRA.",
        "popular guides: full is better, LoRA is cheaper",
        "the smaller of two differences in exact match, full (rate 5e-4) minus LoRA: tickets, rank "
        "3, 500 steps against 1,000 at 8e-3; newcomers, rank 16, 200 steps each, 4e-3",
        at_least(0.01),
    ),
    Claim(
        "lora-forgets-less",
        "LoRA forgets less than full fine-tuning.",
        "Biderman et al. 2024, arXiv:2405.09673, LoRA Learns Less and Forgets Less",
        "general macro exact match kept after the ticket task, LoRA (1,000 steps at 8e-3) minus "
        "full (500 at 5e-4)",
        at_least(0.02),
    ),
    Claim(
        "lora-needs-10x-the-rate",
        "The best learning rate for LoRA is about ten times the best one for full fine-tuning.",
        "Schulman et al. 2025, LoRA Without Regret",
        "best rate of LoRA divided by best rate of full, on validation rows, 64 steps each",
        within(5, 20),
    ),
    Claim(
        "new-facts-need-rank",
        "In 200 steps at one rate, rank 16 stores more of 500 new facts than rank 1.",
        "Schulman et al. 2025 on an adapter's capacity; Hu et al. 2021, section 7.2, found small "
        "ranks enough for their tasks",
        "exact match on the newcomers' test rows, rank 16 minus rank 1, all linear layers, 4e-3",
        at_least(0.10),
    ),
    Claim(
        "specialised-domain-larger-rank",
        "The more specialised the domain, the larger the rank it needs: new facts gain more from "
        "rank than a new form does.",
        "popular guides: the more specialised the domain, the larger the rank",
        "gain from rank 1 to rank 16, all linear layers, rate 4e-3: newcomers after 200 steps "
        "minus tickets after 64",
        at_least(0.05),
    ),
    Claim(
        "layers-matter-more-than-rank",
        "At equal size, a small rank on the MLP stores more facts than a large rank on queries "
        "and values.",
        "PEFT's method comparison: rank 10 on the MLP beat rank 64 on queries and values",
        "exact match on the newcomers' test rows after 200 steps at 4e-3, MLP minus queries and "
        "values, equal parameters",
        at_least(0.05),
    ),
    Claim(
        "dora-beats-lora",
        "DoRA learns more than LoRA of the same rank in the same steps.",
        "Liu et al. 2024, arXiv:2402.09353",
        "exact match on the ticket task's test rows, DoRA minus LoRA, 64 steps at 4e-3 each",
        at_least(0.02),
    ),
    Claim(
        "bitfit-needs-biases",
        "BitFit trains nothing in a model of Llama's kind, which has no biases.",
        "Ben Zaken et al. 2022, arXiv:2106.10199, defined it on BERT, which has them",
        "parameters of the base model that are biases",
        at_most(0),
    ),
    Claim(
        "merged-equals-adapter",
        "A merged model says what the adapter says: in memory only rounding differs.",
        "trackers: the merged model answers differently from the adapter",
        "largest difference of a logit, merged against attached, divided by the largest logit",
        at_most(1e-5),
    ),
    Claim(
        "switched-off-is-the-base",
        "Switched off, an adapter leaves the base model's answers bit for bit.",
        "Hu et al. 2021, section 4.2: the base is shared and tasks are switched",
        "largest difference of a logit, adapters switched off against the base model",
        at_most(0),
    ),
)

_QLORA: tuple[Claim, ...] = (
    Claim(
        "nf4-rounds-best",
        "NF4 rounds this model's trained weights with a smaller error than FP4 and int4.",
        "Dettmers et al. 2023, QLoRA, section 3",
        "relative error of the better of FP4 and int4, divided by NF4's, blocks of 64",
        at_least(1.05),
    ),
    Claim(
        "uniform-weights-prefer-int4",
        "For uniformly distributed weights int4 rounds better than NF4.",
        "NF4 is built for normal weights (Dettmers et al. 2023); measured in notebook 04",
        "NF4's relative error divided by int4's on uniform weights, blocks of 64",
        at_least(1.05),
    ),
    Claim(
        "double-quantization-saves",
        "Double quantization saves 0.373 bits a parameter.",
        "Dettmers et al. 2023, QLoRA, section 3",
        "bits a parameter of fp32 constants minus those of doubly quantized ones, blocks of 64",
        within(0.372, 0.374),
    ),
    Claim(
        "nf4-linears-below-0.29",
        "Linear layers in NF4 take at most 0.29 of their bytes in bf16.",
        "Dettmers et al. 2023: 4.127 bits a parameter; measured in notebook 04",
        "bytes of the quantized layers, constants and code books included, over their bf16 bytes",
        at_most(0.29),
    ),
    Claim(
        "4-bit-is-a-quarter",
        "A model loaded in 4 bits takes a little over a quarter of its bf16 bytes.",
        "popular guides: 4-bit means four times smaller",
        "bytes of the whole model in NF4, all that is not linear in fp32, over its bytes in bf16",
        at_most(0.29),
    ),
    Claim(
        "4-bit-cuts-knowledge",
        "Rounding to 4 bits cuts into facts that the model had stored.",
        "Allen-Zhu and Li 2024, knowledge capacity scaling laws",
        "exact match on facts read in biographies alone, before minus after rounding to NF4",
        at_least(0.02),
    ),
    Claim(
        "qlora-matches-lora-d1",
        "QLoRA matches LoRA on a 16-bit base: within 3 points on tickets.",
        "Dettmers et al. 2023, QLoRA, section 4",
        "exact match on tickets, QLoRA NF4 minus LoRA, same seed, at the rate QLoRA chose",
        equivalent(0.03),
    ),
    Claim(
        "qlora-matches-lora-d2",
        "QLoRA matches LoRA on new facts: within 3 points on newcomers.",
        "Dettmers et al. 2023, QLoRA, section 4",
        "exact match on newcomers, QLoRA NF4 minus LoRA, same seed, at the rate of the tickets",
        equivalent(0.03),
    ),
    Claim(
        "double-quantization-is-free",
        "Double quantization costs no accuracy: within 3 points on tickets.",
        "Dettmers et al. 2023, QLoRA, section 4",
        "exact match on tickets, NF4 with minus without double quantization, same seed",
        equivalent(0.03),
    ),
    Claim(
        "nf4-beats-fp4",
        "After fine-tuning, NF4 scores higher than FP4.",
        "Dettmers et al. 2023: MMLU 53.1 against 52.2",
        "exact match on tickets, NF4 minus FP4, same seed",
        at_least(0.0),
    ),
    Claim(
        "qlora-is-slower",
        "A QLoRA step takes longer than a LoRA step.",
        "each product turns 4-bit weights back first; guides praise QLoRA as fast",
        "seconds of the same training run, QLoRA NF4 divided by LoRA",
        at_least(1.05),
    ),
    Claim(
        "merge-into-4-bit-is-lossless",
        "Merging a QLoRA adapter into the 4-bit model costs no accuracy: within 3 points.",
        "popular guides: merge_and_unload, and ship it",
        "exact match on tickets, merged into the 4-bit weights minus attached",
        equivalent(0.03),
    ),
    Claim(
        "merge-into-16-bit-is-fine",
        "A QLoRA adapter may be merged into the original 16-bit model: within 3 points.",
        "popular guides: reload the base in 16 bits, then merge",
        "exact match on tickets, merged into the original weights in fp32 minus attached",
        equivalent(0.03),
    ),
    Claim(
        "merge-into-written-out-is-exact",
        "Merged into the rounded weights written out in full, the adapter answers as attached.",
        "arithmetic: the same sum without another rounding",
        "exact match on tickets, merged into the dequantized weights minus attached",
        equivalent(0.01),
    ),
)

_SOFT_PROMPTS = (
    Claim(
        "zero-prefix-is-a-no-op",
        "A prefix of zeros changes nothing before training.",
        "PEFT's documentation of PrefixTuningConfig: init_weights='zero' is a no-op",
        "largest absolute change of a logit by an untrained prefix of 20 zero keys and values",
        at_most(0.001),
    ),
    Claim(
        "raise-the-rate-when-p-tuning-forgets",
        "Raising P-tuning's learning rate makes it forget less.",
        "popular guides: raise the learning rate when P-tuning forgets",
        "general macro, attached, after equal short runs: at the highest rate tried minus at the "
        "lowest",
        at_least(0.02),
    ),
    Claim(
        "switched-off-nothing-is-lost",
        "With a trained soft prompt switched off, the model is the base bit for bit.",
        "PEFT's documentation of disable_adapter; measured in notebook 05",
        "logits of a question that differ from the base's, over three trained prompts",
        at_most(0),
    ),
    Claim(
        "a-frozen-base-cannot-forget",
        "A frozen base cannot forget, prompt attached.",
        "popular guides: soft prompts avoid forgetting since the base is frozen",
        "general macro of the base minus with the prompt attached after training on tickets, mean "
        "of prompt tuning, P-tuning and prefix tuning",
        at_most(0.02),
    ),
    Claim(
        "prompt-tuning-needs-a-large-model",
        "At this size, prompt tuning stays far behind full fine-tuning of as many steps.",
        "Lester et al. 2021, section 3: prompt tuning catches up at about 10 B parameters",
        "exact match on tickets after equal steps: full fine-tuning minus prompt tuning, 20 tokens",
        at_least(0.30),
    ),
    Claim(
        "soft-prompts-need-large-models",
        "At this size, even the best soft prompt stays far behind full fine-tuning of as many "
        "steps.",
        "popular guides: p-tuning catches up with model size",
        "exact match on tickets after equal steps: full fine-tuning minus the best of five soft "
        "prompts",
        at_least(0.30),
    ),
    Claim(
        "p-tuning-beats-prompt-tuning",
        "P-tuning learns more than prompt tuning with as many tokens.",
        "Liu et al. 2021 (P-tuning): an encoder makes vectors easier to train",
        "exact match on tickets, P-tuning (MLP) minus prompt tuning, equal steps",
        at_least(0.02),
    ),
    Claim(
        "prefix-is-no-worse-than-p-tuning",
        "Prefix tuning learns at least as much as P-tuning with as many tokens.",
        "Liu et al. 2022 (P-tuning v2): trained vectors in every layer",
        "exact match on tickets, prefix minus P-tuning (MLP), equal steps",
        at_least(0.0),
    ),
    Claim(
        "lora-is-no-worse-than-prefix",
        "LoRA learns at least as much as prefix tuning.",
        "He et al. 2022, section 4; measured in notebook 05",
        "exact match on tickets, LoRA r3 on all linear layers minus prefix 20, equal steps",
        at_least(0.0),
    ),
    Claim(
        "p-tuning-needs-its-lstm",
        "P-tuning's LSTM encoder learns more than an MLP.",
        "popular guides: P-tuning is an MLP plus LSTM; Liu et al. 2021 (P-tuning)",
        "exact match on tickets, LSTM encoder minus PEFT's default MLP, equal steps",
        at_least(0.02),
    ),
    Claim(
        "a-projection-helps-a-prefix",
        "A prefix learns more through a projection.",
        "Li and Liang 2021, section 4.3; Liu et al. 2022 (P-tuning v2) found it mixed",
        "exact match on tickets, projected prefix minus plain prefix started from a text",
        at_least(0.02),
    ),
    Claim(
        "real-words-start-a-prompt-better",
        "Prompt tuning that starts from real words learns faster than from random vectors.",
        "Lester et al. 2021, section 3.2; Li and Liang 2021, section 7.4",
        "validation loss after a short run at the rate chosen for the text start, random start "
        "minus text start, in nats per token",
        at_least(0.10),
    ),
    Claim(
        "real-words-start-a-prefix-better",
        "A prefix that starts from a real text learns faster than from random vectors.",
        "Li and Liang 2021, section 7.4",
        "validation loss after a short run at the rate chosen for the text start, random start "
        "minus text start, in nats per token",
        at_least(0.10),
    ),
    Claim(
        "a-longer-prefix-learns-more",
        "A longer prefix learns more in as many steps.",
        "popular guides: use more virtual tokens; Li and Liang 2021, section 7.1",
        "lowest validation loss over the rates tried, 5 tokens minus 40, in nats per token",
        at_least(0.10),
    ),
)

CLAIMS: dict[str, Claim] = {
    claim.id: claim for claim in (*_FULL_FINE_TUNING, *_LORA, *_QLORA, *_SOFT_PROMPTS)
}
