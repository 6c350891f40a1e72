"""The audit: the only place that knows all the stages."""

from initaudit.auditing.run import Audit, audit, run_one

__all__ = ["Audit", "audit", "run_one"]
