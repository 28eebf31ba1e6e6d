"""Work that a process does not survive, for tests of what runs it; imports nothing heavy."""

import os
import time


def end_the_process(case, device):
    os._exit(3)


def take_for_ever(case, device):
    time.sleep(60)


def return_a_row(case, device):
    return {"name": case.name, "device": device, "process": os.getpid()}
