"""The errors that saccade raises at the edge of its public interface."""

from __future__ import annotations


class MechanismError(ValueError):
    """A description that names no mechanism: an unknown name, a bad argument, parts that exclude each other."""


class NotSupported(ValueError):
    """A well-formed request that nothing here can run; the message says why and what to call instead."""
