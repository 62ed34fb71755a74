"""Pure tensor mathematics: torch and the standard library only; no files, configuration, modules or ranks."""
