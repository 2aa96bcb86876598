"""The exceptions of our own; everything else is ValueError, TypeError or KeyError."""


class ConcurrentCallError(RuntimeError):
    """Two threads tried to adapt one model object at the same time."""


class UnreachedSiteError(RuntimeError):
    """A call finished without ever running an adapted layer, so its adapter had no effect."""
