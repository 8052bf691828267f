"""Generations to be told apart at a glance: A is aaaaaaaa-..."""

from __future__ import annotations


def generation(letter: str) -> str:
    """The generation that consists of one hexadecimal digit."""
    return "-".join(letter.lower() * length for length in (8, 4, 4, 4, 12))


A, B, C, D, E, F = (generation(letter) for letter in "ABCDEF")
