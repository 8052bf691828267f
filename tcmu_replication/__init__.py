"""Replicated block storage for the Linux iSCSI target."""

__version__ = "0.1.0"
