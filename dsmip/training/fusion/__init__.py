"""Stage two of fused experts: scales, the gate, and figures of fusions without one."""
