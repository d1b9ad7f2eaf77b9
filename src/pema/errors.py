"""The exceptions of pema: each message says what is wrong, with which value, and what to do next."""


class PemaError(Exception):
    """Base class of all exceptions below; the command line prints the message in one line and exits with 1."""


class ConfigError(PemaError, ValueError):
    """An invalid setting or combination of settings."""


class DataError(PemaError):
    """An input file or example that cannot be used; the message names the file and the line."""


class OwnerError(PemaError):
    """A PLM that cannot be loaded or reached, or whose head is not supported."""


class CapacityError(OwnerError):
    """A context for which the PLM's device has no memory."""


class ExternalMemoryError(PemaError):
    """An external memory that is damaged, incomplete or in another format."""


class AdapterError(PemaError):
    """An adapter that is damaged, or a training that cannot continue."""


class MismatchError(PemaError):
    """Two parts that do not belong together: a memory, an adapter, a head, a PLM or a tokenizer."""


class ProcessError(PemaError):
    """Another process of the same command that has ended or does not answer."""


class StorageError(PemaError, OSError):
    """A failed write; the previous content is unchanged."""
