"""Drift: does benign traffic still stand where it stood when the guard was made?

    betting      evidence about the mean of a bounded number, at a stated rate of false alarms
    reference    what benign traffic looks like on a guard's directions; kept in the guard's provenance
    monitor      requests as they come, against the reference

`recalibrating` mends what a monitor finds. See docs/drift.md.
"""

from steerguard.drift.monitor import Drift, DriftState, Monitor
from steerguard.drift.reference import Reference, projections, with_reference

__all__ = ["Drift", "DriftState", "Monitor", "Reference", "projections", "with_reference"]
