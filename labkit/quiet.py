"""What libraries say that no learner can act on, dropped before they say it."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


def drop_kernel_notice() -> None:
    """Hide one notice of bitsandbytes: an optional CPU kernel, which it would download, is missing.

    transformers imports bitsandbytes, so this must run before transformers is imported.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())


def drop_peft_notice() -> None:
    """Hide one warning of transformers to PEFT, which asks by an older name for a setting."""
    message = "`is_gradient_checkpointing` is deprecated"
    warnings.filterwarnings("ignore", message=message, category=FutureWarning)


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
