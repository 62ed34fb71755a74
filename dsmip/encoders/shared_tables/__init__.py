"""Feature tables that runs share: found by what is in them, written once, given up again when room is needed."""
