"""Checks of an adapted model: the public address of `dvora.tools.doctor`."""

from .tools.doctor import Examination, Finding, examine

__all__ = ["Examination", "Finding", "examine"]
