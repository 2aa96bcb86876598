"""The exceptions of our own; everything else is ValueError, TypeError or KeyError."""


class BusyModelError(RuntimeError):
    """The model is already running with an adapter, in another thread or around this call."""


class UnusedLeafError(RuntimeError):
    """A call finished without using some leaf, as when its layer never ran."""


class FoldError(RuntimeError):
    """Adapters cannot share one call of a model, since its rows would not stay apart."""


class AdapterFileError(ValueError):
    """A file that is no adapter, is damaged, or does not fit the model."""
