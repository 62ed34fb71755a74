"""Exporting: a run's model as a bundle that stands alone, with its model card and what cheaper searches find."""
