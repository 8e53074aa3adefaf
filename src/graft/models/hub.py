"""One quick error where weights cannot be downloaded from Hugging Face's hub."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hub(what: str, *, load: bool) -> Iterator[None]:
    """The hub's client retries for 47 s by itself where there is no network.

    Args:
        what: is loaded, for the message.
        load: whether anything is.

    Raises:
        OSError: it cannot be had.
    """
    if not load:
        yield
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            with urllib.request.urlopen(request, timeout=5):
                pass
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError:
        constants.HF_HUB_OFFLINE = True  # what is cached still loads
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if constants.HF_HUB_OFFLINE:
            reason = f"{constants.ENDPOINT} is out of reach and they are not in HF_HOME"
        raise OSError(
            f"the weights of {what} could not be loaded ({reason}): download them once "
            "where there is a network, or use backbone.weights=FILE or null"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before
