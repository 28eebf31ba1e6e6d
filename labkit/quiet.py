"""A log record that says nothing to a learner, dropped before the library that writes it loads."""

import logging


def drop_kernel_notice() -> None:
    """Hide one notice of bitsandbytes: an optional CPU kernel, which it would download, is missing.

    transformers imports bitsandbytes, so this must run before transformers is imported.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())
