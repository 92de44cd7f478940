"""The torch-free base of Baton: configuration, errors, request types, stages, metrics, client and wire types.

Everything above imports this package; it imports nothing of Baton's other packages.
"""

__version__ = "0.1.0"
