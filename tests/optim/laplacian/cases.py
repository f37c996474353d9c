"""Rows of the table of rules."""

from __future__ import annotations

from tests.rule_case import RuleCase

__all__ = ["LAPLACIAN"]

LAPLACIAN: tuple[RuleCase, ...] = ()
