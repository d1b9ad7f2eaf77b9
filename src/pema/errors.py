"""The errors that pema raises on purpose: each names what is wrong, which value, and what to do next."""


class PemaError(Exception):
    """Base of every error below; the command line prints it as one line and exits with 1."""


class ConfigError(PemaError, ValueError):
    """A setting, or a combination of settings, that cannot be meant."""


class DataError(PemaError):
    """An input file or example that cannot be used; the message names the file and the line."""


class OwnerError(PemaError):
    """A PLM that cannot be loaded, or whose head the derivation does not understand."""


class ExternalMemoryError(PemaError):
    """An external memory that is damaged, incomplete or of another format."""


class AdapterError(PemaError):
    """An adapter that is damaged, or training that cannot go on."""


class MismatchError(PemaError):
    """Two things that do not belong together: a memory, an adapter, a head, a PLM or a tokenizer."""


class StorageError(PemaError, OSError):
    """The disk refused a write; what was there before is untouched."""
