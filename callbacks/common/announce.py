"""Sentences that every user should see, such as where the merged model is."""

import logging
import sys

from neuromerge_hf.callbacks.common.processes import is_first_process

logger = logging.getLogger("neuromerge_hf.callbacks")
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)  # otherwise only a program that asks for it would log where its model is


def announce(sentence: str) -> None:
    """Log a sentence, once for all processes. A program that has not set up logging gets it on stderr."""
    if not is_first_process():
        return
    if logger.hasHandlers():
        logger.info(sentence)
    elif logger.isEnabledFor(logging.INFO):
        print(sentence, file=sys.stderr, flush=True)
