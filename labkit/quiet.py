"""What libraries say that no learner can act on, dropped before they say it."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

_OLDER_NAME = "`is_gradient_checkpointing` is deprecated"


def drop_import_notices() -> None:
    """Hide what two libraries say when others import them, which must not have happened yet.

    bitsandbytes (by transformers): an optional CPU kernel, which it would download, is missing.
    DeepSpeed (by accelerate, where it is installed): there is no GPU, so it uses the CPU.
    """
    _drop("bitsandbytes.backends.cpu.ops", "gemm_4bit_forward")
    _drop("DeepSpeed", "Setting accelerator to CPU")


def _drop(logger: str, words: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: words not in record.getMessage())


def drop_peft_notice() -> None:
    """Hide what PEFT's own doings make it or transformers say.

    transformers: PEFT asks by an older name for a setting. PEFT: the rank that it set for stacked
    experts itself matched no module, which is true of a parameter, and the rank is used.
    """
    warnings.filterwarnings("ignore", message=_OLDER_NAME, category=FutureWarning)
    message = r"The following (rank|alpha)_pattern keys did not match .*gate_up_proj"
    warnings.filterwarnings("ignore", message=message, category=RuntimeWarning)


def drop_trainer_notices() -> None:
    """Hide what trainers say where all is well.

    TRL asks by an older name for a setting, as PEFT does. transformers: a checkpoint lacks the
    output head of a model whose head is its embedding; checkpoints that were written within a
    second of each other are told apart by their numbers.
    """
    warnings.filterwarnings("ignore", message=_OLDER_NAME, category=FutureWarning)
    _drop("transformers.trainer", "missing keys in the checkpoint model loaded: ['lm_head.weight']")
    _drop("transformers.trainer_utils", "mtime may not be reliable on this filesystem")


@contextlib.contextmanager
def without_progress_bars(hide: bool = True) -> Iterator[None]:
    """Hide transformers' progress bars inside, where a bar would be full before it is read.

    Args:
        hide: False changes nothing.
    """
    from transformers.utils import logging as transformers_logging

    hide = hide and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()
