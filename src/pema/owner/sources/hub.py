"""Names on the Hugging Face hub, checked by the one file that every model has, before torch is imported."""

from __future__ import annotations

from pema.errors import OwnerError

CONFIG = "config.json"


def require_on_hub(name: str, what: str, advice: str = "", revision: str | None = None) -> None:
    """Refuse the name of a model that is neither on the hub nor in its cache.

    Args:
        name: the name.
        what: kind of model, with its article, for the message.
        advice: sentence at the end of the message.
        revision: branch, tag or commit.

    Raises:
        OwnerError: there is no such model, or the hub cannot be reached and the model is not in its cache.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        hf_hub_download(name, CONFIG, revision=revision)
    except errors.GatedRepoError:
        reason = "its authors restrict access: ask for it on its page on the hub, and log in with `hf auth login`."
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private: check the name, or log in with `hf auth login`."
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision!r} on the hub."
    except errors.LocalEntryNotFoundError:
        reason = (
            "it is not in the cache, and HF_HUB_OFFLINE forbids a download."
            if constants.HF_HUB_OFFLINE
            else "it is not in the cache, and the hub cannot be reached."
        )
    except errors.EntryNotFoundError:
        reason = f"it has no {CONFIG} on the hub, so it is not a model of transformers."
    except errors.HFValidationError:
        reason = "it is neither a folder nor a name on the hub, which is NAME or OWNER/NAME."
    except (errors.HfHubHTTPError, OSError) as error:
        reason = f"the hub does not give its {CONFIG}: {' '.join(str(error).split())}."
    else:
        return
    raise OwnerError(f"{name} cannot be loaded as {what}: {reason}{advice}")
