"""What is wrong with the data, as data: copies, leakage, label conflicts, shortcuts. Reporting writes it up."""

from chestct.audit.findings import Audit, Finding
from chestct.audit.stage import audit

__all__ = ["Audit", "Finding", "audit"]
