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

_FORGETTING = (
    Claim(
        "domain-only-forgets-15-points",
        "Full fine-tuning on the new language alone costs at least 15 points of general ability.",
        "McCloskey and Cohen 1989, catastrophic interference; bar of notebook 06",
        "general macro exact match before minus after, 200 domain rows twice, rate 5e-4",
        at_least(0.15),
    ),
    Claim(
        "sentiment-is-forgotten",
        "A model that classified sentiment well no longer does after learning another task.",
        "the classic report of practitioners; measured in notebook 06",
        "exact match on sentiment before minus after full fine-tuning on the domain alone",
        at_least(0.15),
    ),
    Claim(
        "plain-text-shows-forgetting",
        "Forgetting also shows clearly on plain text: its loss rises by 0.1 nats a token or more.",
        "PEFT's benchmark measures forgetting so; measured in notebook 06",
        "loss on 100 plain texts after domain-only full fine-tuning minus before, in nats per "
        "token",
        at_least(0.10),
    ),
    Claim(
        "1-to-5-returns-70-percent",
        "Mixing 1:5 (domain : general) returns at least 70 % of what domain-only training loses.",
        "popular guides: mix 1:5 or 1:10; bar of notebook 06",
        "share of the lost general points that 1:5 returns, full fine-tuning, equal domain steps",
        at_least(0.70),
    ),
    Claim(
        "1-to-10-keeps-as-much-as-1-to-5",
        "Mixing 1:10 keeps at least as much as 1:5.",
        "popular guides: the more general data, the less is forgotten; bar of notebook 06",
        "general macro exact match, 1:10 minus 1:5, paired by seed, equal domain steps",
        at_least(0.0),
    ),
    Claim(
        "mixing-leaves-the-domain-score",
        "Mixed with 1:5 or 1:10 of general data, the new task is learned as well as alone.",
        "bar of notebook 06",
        "exact match on the new language minus that of domain-only training, equal domain steps; "
        "of 1:5 and 1:10 the one that differs more",
        equivalent(0.05),
    ),
    Claim(
        "1-to-5-or-1-to-10-cures",
        "Mixing 1:5 or 1:10 cures forgetting.",
        "popular guides: 1:5 or 1:10 stops catastrophic forgetting",
        "general points still lost at the better of the two ratios, equal domain steps",
        at_most(0.02),
    ),
    Claim(
        "5-percent-is-enough",
        "Five general rows for a hundred of the new task are enough.",
        "Ibrahim et al. 2024: 5 % replay is enough for a weak shift; the shift here is strong",
        "general points still lost at 5 %, full fine-tuning, equal domain steps",
        at_most(0.05),
    ),
    Claim(
        "25-percent-for-a-strong-shift",
        "For a strong shift, 25 % of general data are enough.",
        "Ibrahim et al. 2024: 25 % replay for a strong shift",
        "general points still lost at 25 %, full fine-tuning, equal domain steps",
        at_most(0.05),
    ),
    Claim(
        "replay-helps-the-target",
        "Replaying general data even helps the new task, where that is learned well alone.",
        "replay studies report better target scores too; a trial of this course saw it",
        "exact match on the new language, 1:5 minus domain only, equal domain steps",
        at_least(0.02),
    ),
    Claim(
        "at-equal-compute-1-to-10-costs-the-domain",
        "At equal compute, 1:10 learns less of the new task than 1:1.",
        "1:10 takes eleven times the steps of domain-only; measured in notebook 06",
        "exact match on the new language, 1:10 minus 1:1, both in the steps of 1:1",
        at_most(-0.05),
    ),
    Claim(
        "at-equal-compute-more-replay-keeps-more",
        "At equal compute, 1:10 still keeps more than 1:1.",
        "measured in notebook 06: is it the data or the steps?",
        "general macro exact match, 1:10 minus 1:1, both in the steps of 1:1",
        at_least(0.01),
    ),
    Claim(
        "a-lower-rate-forgets-less",
        "A lower rate forgets less, full fine-tuning on the new task alone.",
        "popular guides: lower the rate against forgetting",
        "general points lost by domain-only full fine-tuning, rate 5e-4 minus rate 2e-4",
        at_least(0.02),
    ),
    Claim(
        "a-lower-rate-learns-as-much",
        "The lower rate learns the new task as well, in as many steps.",
        "popular guides leave out the price; measured in notebook 06",
        "exact match on the new language, domain-only, rate 2e-4 minus rate 5e-4",
        at_least(-0.05),
    ),
    Claim(
        "raise-the-rate-when-a-prompt-forgets",
        "When a trained prompt forgets, raise its learning rate.",
        "popular guides on P-tuning; the discussion they cite says to lower it",
        "general points lost with a prefix attached, domain only, rate 0.1 minus rate 0.3",
        at_least(0.0),
    ),
    Claim(
        "lora-forgets-less-on-d3",
        "LoRA forgets less than full fine-tuning of as many steps, both on the new task alone.",
        "Biderman et al. 2024: LoRA learns less and forgets less",
        "general points lost, domain only, full at 5e-4 minus LoRA r8 at 4e-3",
        at_least(0.02),
    ),
    Claim(
        "a-frozen-base-cannot-forget-d3",
        "A frozen base cannot forget, adapter attached.",
        "popular guides: adapters avoid forgetting since the base is frozen",
        "general points lost with the adapter attached, domain only, mean of LoRA and prefix",
        at_most(0.02),
    ),
    Claim(
        "an-adapter-switched-off-is-the-base",
        "Switched off, an adapter leaves the base bit for bit.",
        "Hu et al. 2021, section 4.1; measured in notebook 06",
        "largest difference of a logit between the base and LoRA switched off after training",
        at_most(0.0),
    ),
    Claim(
        "ewc-forgets-less",
        "Elastic weight consolidation forgets less than plain fine-tuning.",
        "Kirkpatrick et al. 2017",
        "general points lost, domain only, plain minus EWC, full fine-tuning of as many steps",
        at_least(0.02),
    ),
    Claim(
        "kl-to-the-base-forgets-less",
        "A KL term towards the base forgets less than plain fine-tuning.",
        "Li and Hoiem 2016, learning without forgetting; KL terms of preference tuning",
        "general points lost, domain only, plain minus with a KL term on all tokens",
        at_least(0.02),
    ),
    Claim(
        "averaging-keeps-both",
        "Half-way between the weights of before and after, both tasks are kept.",
        "Wortsman et al. 2022, weight-space ensembles",
        "the worse of two: exact match on the new language against that of the end point, and "
        "general ability against the base, at half of the way",
        at_least(-0.05),
    ),
    Claim(
        "any-general-data-will-do",
        "Any general data will do: rows of the number skills alone keep as much as all skills.",
        "popular guides say 'general data' and no more; control of notebook 06",
        "general macro exact match at 1:1, number skills alone minus all skills",
        at_least(-0.02),
    ),
    Claim(
        "order-matters",
        "General data read before the new task protects less than the two interleaved.",
        "training in sequence is how interference was found; control of notebook 06",
        "general macro exact match at 1:1, shuffled minus general rows first",
        at_least(0.05),
    ),
    Claim(
        "no-lever-replaces-general-data",
        "No lever that trains on the new task alone keeps as much as mixing 1:1; EWC reads old "
        "rows once.",
        "measured in notebook 06",
        "general points lost: the least of any domain-only arm whose domain score is at most 5 "
        "points below plain domain-only training, minus 1:1",
        at_least(0.02),
    ),
)

_BADCASES = (
    Claim(
        "badcases-start-at-a-fifth",
        "The careless start gives a bad answer to 20 to 40 % of held-out prompts.",
        "the course's design of task D4",
        "share of bad answers at temperature 1 on the 600 test prompts, exact",
        within(0.20, 0.40),
    ),
    Claim(
        "dpo-starts-at-ln-2",
        "DPO's first loss is ln 2, whatever the pairs.",
        "Rafailov et al. 2023, arXiv:2305.18290, eq. 7, with the model as its own reference",
        "first logged loss minus ln 2, either way, in nats per pair",
        at_most(0.002),
    ),
    Claim(
        "dpo-cuts-badcases-sampled",
        "DPO cuts bad answers by 60 % or more when answers are sampled.",
        "the course's promise",
        "1 minus bad answers after DPO divided by before, temperature 1, test prompts, exact",
        at_least(0.60),
    ),
    Claim(
        "dpo-cuts-badcases-greedy",
        "DPO cuts bad answers by 60 % or more when answers are decoded greedily.",
        "the course's promise",
        "1 minus bad answers after DPO divided by before, greedy, test prompts",
        at_least(0.60),
    ),
    Claim(
        "dpo-keeps-general",
        "DPO costs at most 3 points of general ability.",
        "the course's promise",
        "general macro exact match before DPO minus after",
        at_most(0.03),
    ),
    Claim(
        "dpo-keeps-the-chosen",
        "Under this recipe the right answers lose at most 0.1 nat a token.",
        "the course's promise",
        "log-probability of chosen answers of held-out pairs, after DPO minus before, per token",
        at_least(-0.1),
    ),
    Claim(
        "dpo-raises-the-good-answers",
        "DPO raises the good answers, whatever the rate and the pairs.",
        "popular guides; Razin et al. 2024, arXiv:2410.08847, found that both sides often fall",
        "change of the chosen answers of held-out pairs, nats per token, the smaller of two runs: "
        "the recipe, and a rate ten times as high on pairs that differ in one token",
        at_least(0.0),
    ),
    Claim(
        "failure-arm-fails",
        "At a high rate, on pairs one token apart, the right answers lose more than 0.1 nat a "
        "token.",
        "Pal et al. 2024, arXiv:2402.13228; Razin et al. 2024, arXiv:2410.08847",
        "change of the chosen answers of held-out pairs, nats per token, rate 1e-3",
        at_most(-0.1),
    ),
    Claim(
        "failure-arm-adds-badcases",
        "That run leaves more bad greedy answers than it found.",
        "Razin et al. 2024, arXiv:2410.08847",
        "greedy badcase rate after the failure arm minus before, test prompts",
        at_least(0.0),
    ),
    Claim(
        "dpo-accuracy-warns",
        "The accuracy that TRL logs on the training pairs shows when a run goes wrong.",
        "popular guides: watch the reward accuracy",
        "1 minus the accuracy that TRL logged over the last five steps of the failure arm",
        at_least(0.20),
    ),
    Claim(
        "repair-repairs",
        "A lower rate and an SFT term on the same pairs repair the failed run.",
        "Pang et al. 2024, arXiv:2404.19733, iterative RPO; Pal et al. 2024",
        "badcase rate at temperature 1, failure arm minus repaired arm, test prompts, exact",
        at_least(0.10),
    ),
    Claim(
        "repair-keeps-the-chosen",
        "After the repair the right answers lose at most 0.1 nat a token.",
        "Pang et al. 2024, arXiv:2404.19733",
        "change of the chosen answers of held-out pairs, nats per token, repaired arm",
        at_least(-0.1),
    ),
    Claim(
        "sft-term-helps",
        "Adding the SFT loss on the chosen answers keeps them likely, at the high rate too.",
        "Pang et al. 2024, arXiv:2404.19733",
        "change of the chosen answers, nats per token, rate 1e-3 on close pairs: with the SFT "
        "term minus without",
        at_least(0.05),
    ),
    Claim(
        "dpo-ties-with-sft-on-chosen",
        "SFT on the chosen answers alone ties with DPO: within 3 points of bad answers.",
        "the control that few reports of DPO show; measured in notebook 07",
        "badcase rate at temperature 1, SFT on chosen minus DPO, each as validation prompts chose, "
        "as many epochs",
        equivalent(0.03),
    ),
    Claim(
        "dpo-is-enough-here",
        "A short GRPO run with a rule reward leaves at least as many bad answers as DPO.",
        "Rafailov et al. 2023 against online methods; Shao et al. 2024, arXiv:2402.03300",
        "badcase rate at temperature 1, GRPO (8 steps of 64 samples) minus DPO",
        at_least(0.0),
    ),
    Claim(
        "reward-model-ranks",
        "A reward model trained on the same pairs ranks nine of ten held-out pairs rightly.",
        "Ouyang et al. 2022, arXiv:2203.02155, section 3.5",
        "share of held-out pairs whose chosen answer gets the higher reward, after one epoch",
        at_least(0.90),
    ),
    Claim(
        "clean-data-beats-dpo",
        "Cleaning the training data fixes more complaints than aligning afterwards.",
        "popular guides: fix the data first",
        "share of complaints fixed, SFT again on cleaned rows minus DPO, sampled",
        at_least(0.0),
    ),
    Claim(
        "a-system-prompt-fixes",
        "A system prompt fixes badcases: 10 points more than asking again.",
        "popular guides: try the prompt first",
        "share of complaints fixed, with 'Answer shortly.' minus asked again unchanged",
        at_least(0.10),
    ),
    Claim(
        "greedy-fixes",
        "Greedy decoding fixes badcases: 10 points more than asking again.",
        "popular guides: lower the temperature",
        "share of complaints fixed, greedy minus asked again at temperature 1",
        at_least(0.10),
    ),
    Claim(
        "retrieval-fixes",
        "Retrieval fixes badcases: 10 points more than asking again.",
        "popular guides: retrieval cures invented facts",
        "share of complaints fixed, with a retrieved passage minus without, temperature 1",
        at_least(0.10),
    ),
    Claim(
        "a-tool-fixes-sums",
        "With the calculator call executed, the sums are right.",
        "Schick et al. 2023, Toolformer, arXiv:2302.04761",
        "share of sums answered with the right number, sampled",
        at_least(0.95),
    ),
    Claim(
        "filters-spare-good-answers",
        "Rule filters stop at most 2 % of good answers to the prompts that they were made for.",
        "popular guides: filters are free",
        "share of good answers that users no longer get, all filters together",
        at_most(0.02),
    ),
    Claim(
        "filters-spare-other-tasks",
        "The same filters stop at most 2 % of right answers to everything else.",
        "popular guides: filters are free",
        "share of right answers of the general test rows that the filters stop or replace",
        at_most(0.02),
    ),
)

_MEMORY = (
    Claim(
        "kept-for-backward-is-predicted",
        "What every method keeps for backward is predicted within 2 %, with and without "
        "checkpointing.",
        "the course's promise; Korthikanti et al. 2022, arXiv:2205.05198, count GPT's layers so",
        "largest relative difference of predicted and counted bytes over full, LoRA, QLoRA and "
        "prefix, kept and recomputed",
        at_most(0.02),
    ),
    Claim(
        "closed-form-on-public-rows",
        "From a config.json alone, peaks of others' single GPUs are met within 0.5 % (median).",
        "the course's promise",
        "median relative error over the public single-GPU rows that no formula was written from",
        at_most(0.005),
    ),
    Claim(
        "full-needs-16-bytes-a-parameter",
        "Full fine-tuning needs 16 bytes a parameter.",
        "popular guides, after ZeRO's count for mixed precision (arXiv:1910.02054, section 3.1)",
        "measured on an A100: peak of Mistral-7B in bf16 with AdamW, batch 4, over its parameters",
        within(15.5, 16.5),
    ),
    Claim(
        "fp32-adamw-holds-16-bytes",
        "In fp32, weights, gradients and AdamW's two means are 16 bytes a parameter.",
        "arithmetic: 4 + 4 + 8",
        "tensor bytes of a real full fine-tuning step here, activations left out, over parameters",
        within(15.9, 16.1),
    ),
    Claim(
        "a-rule-of-thumb-is-enough",
        "Bytes a parameter are enough to tell what any training needs, adapters too: within 25 %.",
        "popular guides: 8, 16 or 18 bytes a parameter",
        "median relative error of the best of three rules over the public single-GPU rows",
        at_most(0.25),
    ),
    Claim(
        "halving-the-batch-halves-the-memory",
        "Out of memory? Half the batch takes about half the memory.",
        "popular guides and trackers",
        "measured on an A100: peak of full fine-tuning of Mistral-7B, batch 4 over batch 8",
        at_most(0.60),
    ),
    Claim(
        "lora-saves-most-of-the-memory",
        "LoRA saves most of the memory, whatever the batch.",
        "popular guides",
        "measured on an A100: share that LoRA saves of full fine-tuning's peak, Mistral-7B under "
        "checkpointing, the smaller of batch 4 and batch 8",
        at_least(0.50),
    ),
    Claim(
        "lora-halves-the-activations",
        "With few trained parameters, LoRA keeps at most half as much for backward.",
        "popular guides: LoRA needs a fraction of the memory",
        "bytes kept for backward here in fp32 without checkpointing, LoRA over full",
        at_most(0.50),
    ),
    Claim(
        "lora-keeps-more-in-bf16",
        "Over a bf16 base, LoRA keeps more for backward than full fine-tuning.",
        "read in PEFT: adapters are fp32 and keep fp32 copies of their inputs; counted in 08",
        "bytes kept for backward here in bf16 without checkpointing, LoRA over full",
        at_least(1.05),
    ),
    Claim(
        "4-bit-weights-quarter-the-peak",
        "QLoRA needs a quarter of LoRA's memory.",
        "popular guides: 4-bit means four times smaller",
        "measured on an A100: peak of QLoRA over LoRA, Mistral-7B, batch 4, under checkpointing",
        at_most(0.30),
    ),
    Claim(
        "qlora-always-needs-less-than-lora",
        "QLoRA always needs less memory than LoRA.",
        "popular guides",
        "estimate for Mistral-7B, prepared for k-bit training, batch 16 of 4,096 tokens under "
        "checkpointing: peak of QLoRA over LoRA",
        at_most(0.999),
    ),
    Claim(
        "qlora-pages-the-data",
        "QLoRA's paged optimizer pages the data: a larger batch goes to the host.",
        "popular guides; Dettmers et al. 2023, arXiv:2305.14314, page optimizer states",
        "paged bytes that eight times the rows add, full fine-tuning of 7 B, paged 8-bit AdamW",
        at_least(1),
    ),
    Claim(
        "double-quantization-frees-5-percent",
        "Double quantization is free memory worth having: 5 % of a QLoRA training.",
        "popular guides; the paper saves 0.37 bits a parameter",
        "estimate for Mistral-7B, batch 4 of 4,096 tokens: share of the peak that it saves",
        at_least(0.05),
    ),
    Claim(
        "weights-outweigh-the-logits",
        "In a LoRA training of 8 B, nothing is larger than the frozen weights.",
        "popular guides count parameters only",
        "logits and their copies over the weights, Llama-3-8B, 4 rows of 4,096 tokens, the "
        "loss of transformers 4.46 to 4.48",
        at_most(1),
    ),
    Claim(
        "checkpointing-changes-nothing",
        "Checkpointing changes what is kept, not what is learned.",
        "Chen et al. 2016, arXiv:1604.06174",
        "tensors that differ after the same training with and without it, full and LoRA",
        at_most(0),
    ),
    Claim(
        "checkpointing-costs-30-percent",
        "Checkpointing costs full fine-tuning about 30 % more time.",
        "popular guides; one forward pass more on the three of a step",
        "seconds of a step here, full fine-tuning with checkpointing over without, less 1",
        within(0.20, 0.40),
    ),
    Claim(
        "checkpointing-costs-lora-more",
        "The same second forward pass costs LoRA a larger share of its step.",
        "a count of products: frozen weights have no gradient, so a step has two parts, not three",
        "extra time here: LoRA's share less full's share",
        at_least(0.05),
    ),
    Claim(
        "zero-table-of-the-paper",
        "Four short formulas give ZeRO's table: 120, 31.4, 16.6 and 1.88 GB.",
        "Rajbhandari et al. 2020, arXiv:1910.02054, figure 1",
        "largest relative difference over stages 0 to 3, 7.5 B parameters on 64 devices",
        at_most(0.005),
    ),
    Claim(
        "zero-2-is-an-eighth",
        "ZeRO-2 cuts the states of training to an eighth.",
        "popular guides: ZeRO-1 is 4x, ZeRO-2 is 8x, ZeRO-3 is 16x",
        "states on one of 8 devices under stage 2 over those without ZeRO",
        at_most(0.13),
    ),
    Claim(
        "zero-3-is-a-sixteenth",
        "ZeRO-3 cuts the states of training to a sixteenth.",
        "popular guides: ZeRO-1 is 4x, ZeRO-2 is 8x, ZeRO-3 is 16x",
        "states on one of 8 devices under stage 3 over those without ZeRO",
        at_most(0.07),
    ),
    Claim(
        "zero-4x-and-8x-are-limits",
        "Stages 1 and 2 reach 4x and 8x with very many devices.",
        "Rajbhandari et al. 2020: the paper says so, guides leave it out",
        "the smaller share of its limit that stage 1 and stage 2 reach on 1,024 devices",
        within(0.99, 1.0),
    ),
    Claim(
        "lora-steps-are-shorter",
        "LoRA makes a step faster, by a tenth or more: it trains a hundredth of the numbers.",
        "popular guides: LoRA trains faster",
        "seconds of a step on an H200, LoRA over full fine-tuning: median of seven shapes, five of "
        "them with 4,096 tokens",
        at_most(0.9),
    ),
    Claim(
        "the-larger-card-is-the-faster",
        "Choose a GPU by memory first: the one with more memory is also the faster.",
        "popular guides: memory first when choosing a GPU",
        "share of pairs of the course's cards in which the one with more memory multiplies faster",
        at_least(0.95),
    ),
)

_SCALE = (
    Claim(
        "ddp-gradients-are-equal",
        "DDP on two devices computes the gradients that one device computes on all rows.",
        "Li et al. 2020, arXiv:2006.15704; every step holds the same rows, in fp32",
        "norm of the difference over the norm of the gradients, each token weighted alike",
        at_most(1e-5),
    ),
    Claim(
        "mean-of-means-is-harmless",
        "Averaging each device's own mean loss makes the same step, within 1 %.",
        "what a plain training loop under DDP does; a bug of many trainers until October 2024",
        "norm of the difference over the norm of the gradients, tickets beside short answers",
        at_most(0.01),
    ),
    Claim(
        "shards-are-as-predicted",
        "FSDP2 leaves on each device the bytes that its tensors' shapes predict.",
        "torch.distributed.fsdp.fully_shard; formula in notebook 09",
        "largest relative error over weights, gradients and AdamW's means of both devices",
        at_most(0.001),
    ),
    Claim(
        "zero-formulas-hold",
        "Each stage of ZeRO leaves on each device what the paper's formulas say.",
        "Rajbhandari et al. 2020, arXiv:1910.02054, section 3",
        "largest relative error over stages 1 to 3 and both devices, engine and type as measured",
        at_most(0.01),
    ),
    Claim(
        "zero-2-is-an-eighth-on-two-devices",
        "ZeRO-2 leaves an eighth of the state on each device, two devices included.",
        "popular guides: ZeRO-2 is 1/8, ZeRO-3 is 1/16",
        "bytes of weights, gradients and optimizer on one of two devices over those undivided",
        at_most(0.13),
    ),
    Claim(
        "fsdp-sends-half-as-much-again",
        "Sharding weights makes each device send 1.5 times the bytes of DDP.",
        "Rajbhandari et al. 2020, section 7: 3 P against 2 P",
        "bytes of a step's collectives under FSDP2 that gives all weights back, over DDP's",
        within(1.45, 1.55),
    ),
    Claim(
        "sharding-changes-the-result",
        "Sharding the model changes what a step computes.",
        "a common worry on trackers",
        "largest difference of the loss in nats over three steps, FSDP2 on two devices against one",
        at_least(1e-3),
    ),
    Claim(
        "two-devices-same-model",
        "Two devices with half the batch each learn what one device learns: within 3 points.",
        "promise of data parallelism",
        "exact match on tickets, two devices under DDP minus one device, as many steps",
        equivalent(0.03),
    ),
    Claim(
        "two-devices-need-no-other-settings",
        "A second device needs no other settings: with batch per device, epochs and rate kept, the "
        "score stays within 3 points.",
        "popular guides, which name settings per device",
        "exact match on tickets, two devices minus one, half as many steps",
        equivalent(0.03),
    ),
    Claim(
        "rate-grows-with-devices",
        "With the learning rate doubled as well, a second device leaves the score within 3 points.",
        "Goyal et al. 2017, arXiv:1706.02677: the linear scaling rule",
        "exact match on tickets, two devices at twice the rate minus one device, half the steps",
        equivalent(0.03),
    ),
    Claim(
        "two-devices-are-twice-as-fast",
        "Two devices are twice as fast as one: at least 1.9 times.",
        "popular guides: training time falls in proportion",
        "seconds of a step on one process over two, the same rows, two cores and gloo",
        at_least(1.9),
    ),
    Claim(
        "sharded-checkpoint-moves",
        "A checkpoint that two devices saved in pieces goes on with one, to the same losses.",
        "torch.distributed.checkpoint; trackers ask whether the number of devices may change",
        "difference in nats of the last loss, one device that went on against two",
        at_most(1e-3),
    ),
    Claim(
        "a-killed-run-ends-as-the-unbroken-one",
        "A run that lost a rank and went on with one ends with the unbroken run's score.",
        "promise of checkpoints; trackers doubt it",
        "exact match on tickets, killed and resumed minus unbroken",
        equivalent(0.03),
    ),
    Claim(
        "merged-pieces-are-the-model",
        "Pieces put together into one file are the model that the devices had.",
        "accelerate merge-weights",
        "difference in nats of the next batch's loss, merged file against two devices",
        at_most(1e-4),
    ),
    Claim(
        "prefer-one-node",
        "One node of 8 GPUs trains a 7 B model faster than two nodes of 4, by a tenth or more.",
        "popular guides: prefer one node; here by a model of throughput, nothing is measured",
        "modelled seconds of a step, two nodes with 100 Gbit/s over one: ZeRO-3, 4 x 4,096 tokens",
        at_least(1.1),
    ),
    Claim(
        "zero-r-gives-2.2x",
        "ZeRO-R makes training 2.2 times as fast.",
        "popular guides; 2.16x is ZeRO++ on 384 GPUs (Wang et al. 2023, arXiv:2306.10209)",
        "bytes of a layer under tensor parallelism, before over after ZeRO-R divides checkpoints",
        at_least(2.0),
    ),
    Claim(
        "infinity-reaches-15-petaflops",
        "ZeRO-Infinity's figure is 15 petaflops on 400 GPUs.",
        "popular guides; that figure is the first ZeRO paper's",
        "petaflops in the abstract of ZeRO-Infinity (Rajbhandari et al. 2021, arXiv:2104.07857)",
        within(14, 16),
    ),
)

CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for claim in (
        *_FULL_FINE_TUNING,
        *_LORA,
        *_QLORA,
        *_SOFT_PROMPTS,
        *_FORGETTING,
        *_BADCASES,
        *_MEMORY,
        *_SCALE,
    )
}
