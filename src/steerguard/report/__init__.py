"""Reports: what was measured, shown to people. This wing formats figures and computes none."""
