"""What libraries say that no learner can act on, dropped before they say it."""

import logging
import warnings


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
