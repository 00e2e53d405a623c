"""What a penalty does to a user's own network: `robustkern.check`."""

from robustkern.analysis.check import CheckReport, check

__all__ = ["CheckReport", "check"]
