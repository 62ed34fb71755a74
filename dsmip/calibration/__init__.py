"""Calibration: how sure a system is that its best link is right, and that the mention's entity is known at all."""
