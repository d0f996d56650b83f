"""How soon ``bnprobe.ShiftMonitor`` finds a shift, and how often it is wrong, beside other detectors."""
