"""What is wrong with the data: unreadable files, copies, leakage, label conflicts, shortcuts, shift."""

from chestct.audit.findings import Audit, Finding
from chestct.audit.report import audit, summary, write

__all__ = ["Audit", "Finding", "audit", "summary", "write"]
