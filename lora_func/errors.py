"""The exceptions of this library; every other error is a ValueError, TypeError or KeyError."""


class BusyModelError(RuntimeError):
    """The model already runs with an adapter, in another thread or around this call."""


class UnusedLeafError(RuntimeError):
    """A call finished and some leaf had no part in it, for example because its layer never ran."""


class FoldError(RuntimeError):
    """Several adapters cannot share one call of this model."""


class AdapterFileError(ValueError):
    """A file holds no adapter, is damaged, or does not fit the model."""
