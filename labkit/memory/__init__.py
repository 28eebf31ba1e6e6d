"""Where the bytes of a training step go."""

from labkit.memory.measure import StepBytes, step_bytes

__all__ = ["StepBytes", "step_bytes"]
